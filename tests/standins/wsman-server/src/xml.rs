//! A small tree of XML, with namespaces resolved, from bytes that nobody vouches for.

use quick_xml::NsReader;
use quick_xml::XmlVersion;
use quick_xml::events::{BytesStart, Event};
use quick_xml::name::ResolveResult;

/// How deep elements may be nested. Envelopes need about ten.
const MAX_DEPTH: usize = 64;
/// How many elements an envelope may have.
const MAX_ELEMENTS: usize = 200_000;

/// An element.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Element {
    /// The namespace; empty for none.
    pub namespace: String,
    /// The local name.
    pub name: String,
    /// The attributes as (namespace, local name, value), without declarations of namespaces.
    pub attributes: Vec<(String, String, String)>,
    /// The elements within it.
    pub children: Vec<Element>,
    /// All text directly within it, in one piece.
    pub text: String,
}

impl Element {
    /// Whether it is that element.
    pub fn is(&self, namespace: &str, name: &str) -> bool {
        self.namespace == namespace && self.name == name
    }

    /// The first child of that name.
    pub fn child(&self, namespace: &str, name: &str) -> Option<&Self> {
        self.children.iter().find(|child| child.is(namespace, name))
    }

    /// An attribute.
    pub fn attribute(&self, namespace: &str, name: &str) -> Option<&str> {
        let found = self.attributes.iter().find(|(ns, known, _)| ns == namespace && known == name);
        found.map(|(_, _, value)| value.as_str())
    }

    /// Whether an attribute is there and true, in either way that XML Schema writes it.
    pub fn is_true(&self, namespace: &str, name: &str) -> bool {
        matches!(self.attribute(namespace, name), Some("true" | "1"))
    }

    /// Whether it has elements, or text besides blanks.
    pub fn is_empty(&self) -> bool {
        self.children.is_empty() && self.text.trim().is_empty()
    }
}

/// Reads a document.
///
/// # Errors
/// What is wrong with it: not well-formed, a document type, too deep, too many elements.
pub fn parse(bytes: &[u8]) -> Result<Element, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())?;
    let mut reader = NsReader::from_str(text.trim_start_matches('\u{feff}'));
    let mut open: Vec<Element> = Vec::new();
    let mut root = None;
    let mut count = 0;
    loop {
        let event = reader.read_event().map_err(|error| error.to_string())?;
        match event {
            Event::Start(start) => {
                count += 1;
                if open.len() >= MAX_DEPTH || count > MAX_ELEMENTS || root.is_some() {
                    return Err("it has more elements than an envelope".into());
                }
                let element = begin(&reader, &start)?;
                open.push(element);
            }
            Event::Empty(start) => {
                count += 1;
                if open.len() >= MAX_DEPTH || count > MAX_ELEMENTS || root.is_some() {
                    return Err("it has more elements than an envelope".into());
                }
                let element = begin(&reader, &start)?;
                attach(element, &mut open, &mut root);
            }
            Event::End(_) => {
                let element = open.pop().ok_or("an element ends that never began")?;
                attach(element, &mut open, &mut root);
            }
            Event::Eof => break,
            Event::DocType(_) => return Err("it has a document type".into()),
            Event::Comment(_) | Event::Decl(_) | Event::PI(_) => {}
            other => add_text(&other, open.last_mut())?,
        }
    }
    if !open.is_empty() {
        return Err("it ends within an element".into());
    }
    root.ok_or_else(|| "it has no element".into())
}

fn attach(element: Element, open: &mut [Element], root: &mut Option<Element>) {
    match open.last_mut() {
        Some(parent) => parent.children.push(element),
        None => *root = Some(element),
    }
}

fn add_text(event: &Event<'_>, within: Option<&mut Element>) -> Result<(), String> {
    let piece = match event {
        Event::Text(text) => text.xml10_content().map_err(|error| error.to_string())?.into_owned(),
        Event::CData(data) => data.xml10_content().map_err(|error| error.to_string())?.into_owned(),
        Event::GeneralRef(reference) => {
            let character = reference.resolve_char_ref().map_err(|error| error.to_string())?;
            match character {
                Some(character) => character.to_string(),
                None => {
                    let name = reference.decode().map_err(|error| error.to_string())?;
                    let known = quick_xml::escape::resolve_predefined_entity(&name);
                    known.ok_or_else(|| format!("there is no entity {name:?}"))?.to_owned()
                }
            }
        }
        _ => return Ok(()),
    };
    match within {
        Some(element) => element.text.push_str(&piece),
        None if piece.trim().is_empty() => {}
        None => return Err("it has text outside of its element".into()),
    }
    Ok(())
}

fn begin(reader: &NsReader<&[u8]>, start: &BytesStart<'_>) -> Result<Element, String> {
    let (namespace, local) = reader.resolver().resolve_element(start.name());
    let mut element =
        Element { namespace: bound(namespace)?, name: utf8(local.as_ref())?, ..Element::default() };
    for attribute in start.attributes() {
        let attribute = attribute.map_err(|error| error.to_string())?;
        if attribute.key.as_namespace_binding().is_some() {
            continue;
        }
        let (namespace, local) = reader.resolver().resolve_attribute(attribute.key);
        let value = attribute.normalized_value(XmlVersion::Explicit1_0);
        let value = value.map_err(|error| error.to_string())?.into_owned();
        element.attributes.push((bound(namespace)?, utf8(local.as_ref())?, value));
    }
    Ok(element)
}

fn bound(namespace: ResolveResult<'_>) -> Result<String, String> {
    match namespace {
        ResolveResult::Bound(namespace) => utf8(namespace.as_ref()),
        ResolveResult::Unbound => Ok(String::new()),
        ResolveResult::Unknown(prefix) => {
            Err(format!("the prefix {:?} is not declared", String::from_utf8_lossy(&prefix)))
        }
    }
}

fn utf8(bytes: &[u8]) -> Result<String, String> {
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| "a name is not UTF-8".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_text_and_attributes_are_read() {
        let root = parse(
            b"\xef\xbb\xbf<?xml version='1.0'?><a:x xmlns:a='urn:a' xmlns='urn:d' a:k='1&amp;2' l='3'>t<y>&lt;&#65;<![CDATA[<z>]]></y>u</a:x>",
        )
        .unwrap();
        assert!(root.is("urn:a", "x"));
        assert_eq!(root.text, "tu");
        assert_eq!(root.attribute("urn:a", "k"), Some("1&2"));
        assert_eq!(root.attribute("", "l"), Some("3"));
        assert_eq!(root.child("urn:d", "y").unwrap().text, "<A<z>");
    }

    #[test]
    fn what_is_no_envelope_is_refused() {
        let deep = "<a>".repeat(100);
        let bad: [&[u8]; 9] = [
            b"",
            b"<a>",
            b"<a></b>",
            b"<a/><b/>",
            b"<p:a/>",
            b"<!DOCTYPE a><a/>",
            b"<a>&x;</a>",
            b"text<a/>",
            b"\xff",
        ];
        for text in bad.into_iter().chain([deep.as_bytes()]) {
            assert!(parse(text).is_err(), "{}", String::from_utf8_lossy(text));
        }
    }
}
