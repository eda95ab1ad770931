//! Answers as trees: small, bounded, and without what XML has beyond elements and text.
//!
//! WS-Management needs no document types, no entities but the five of XML itself, and no processing
//! instructions; none is read. Names are kept without their prefix: where an element stands says what it is.

use quick_xml::events::{BytesStart, Event};
use quick_xml::{Reader, XmlVersion};

/// The deepest nesting that is read; real answers have some 12 levels. Trees are walked by recursion.
const MAX_DEPTH: usize = 48;

/// The most attributes of one element; real ones have four.
const MAX_ATTRIBUTES: usize = 32;

/// Bytes of the document for each element at least: shorter ones (`<a/>`) would take more memory as a tree
/// than the limit on the answer allows for.
const BYTES_PER_ELEMENT: usize = 8;

/// An element.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Element {
    /// The name without its prefix.
    pub name: String,
    /// Attributes by name without prefix; declarations of namespaces are left out.
    pub attributes: Vec<(String, String)>,
    /// All text directly in it, as it is.
    pub text: String,
    /// The elements in it.
    pub children: Vec<Self>,
}

impl Element {
    /// The first child of that name.
    pub fn child(&self, name: &str) -> Option<&Self> {
        self.children.iter().find(|child| child.name == name)
    }

    /// What a chain of names leads to.
    pub fn descend(&self, names: &[&str]) -> Option<&Self> {
        names.iter().try_fold(self, |element, name| element.child(name))
    }

    /// An attribute by name.
    pub fn attribute(&self, name: &str) -> Option<&str> {
        let found = self.attributes.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.as_str())
    }

    /// Whether the element says that it has no value (`xsi:nil`).
    pub fn is_nil(&self) -> bool {
        matches!(self.attribute("nil").map(str::trim), Some("true" | "1"))
    }
}

/// Reads a document.
///
/// # Errors
/// A phrase that says what is wrong with it.
pub(crate) fn parse(document: &[u8]) -> Result<Element, String> {
    let text = std::str::from_utf8(document).map_err(|_| "it is not UTF-8".to_owned())?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut budget = text.len() / BYTES_PER_ELEMENT + 8;
    let mut reader = Reader::from_str(text);
    let mut open: Vec<Element> = Vec::new();
    loop {
        let event = reader.read_event().map_err(|error| format!("it is no XML: {error}"))?;
        let finished = match event {
            Event::Start(start) => {
                open.push(begin(&start, open.len(), &mut budget)?);
                None
            }
            Event::Empty(start) => Some(begin(&start, open.len(), &mut budget)?),
            Event::End(_) => open.pop(),
            other => {
                if matches!(other, Event::Eof) {
                    return Err("it ends in the middle".into());
                }
                take_text(other, &mut open)?;
                None
            }
        };
        let Some(element) = finished else { continue };
        match open.last_mut() {
            Some(parent) => parent.children.push(element),
            None => return finish(&mut reader, element),
        }
    }
}

/// Nothing but white space and comments may follow the root.
fn finish(reader: &mut Reader<&[u8]>, root: Element) -> Result<Element, String> {
    loop {
        match reader.read_event().map_err(|error| format!("it is no XML: {error}"))? {
            Event::Eof => return Ok(root),
            Event::Comment(_) => {}
            Event::Text(text) if text.iter().all(u8::is_ascii_whitespace) => {}
            _ => return Err("something follows its end".into()),
        }
    }
}

fn begin(start: &BytesStart<'_>, depth: usize, budget: &mut usize) -> Result<Element, String> {
    if depth >= MAX_DEPTH {
        return Err(format!("it is nested more than {MAX_DEPTH} deep"));
    }
    *budget = budget.checked_sub(1).ok_or("it has too many elements for its size")?;
    let mut element = Element { name: utf8(start.local_name().as_ref())?, ..Element::default() };
    for (index, attribute) in start.attributes().with_checks(false).enumerate() {
        if index >= MAX_ATTRIBUTES {
            return Err(format!("an element has more than {MAX_ATTRIBUTES} attributes"));
        }
        let attribute = attribute.map_err(|error| format!("it is no XML: {error}"))?;
        let name = attribute.key.as_ref();
        if name == b"xmlns" || name.starts_with(b"xmlns:") {
            continue;
        }
        let value = attribute
            .normalized_value(XmlVersion::Implicit1_0)
            .map_err(|error| format!("it is no XML: {error}"))?;
        element.attributes.push((utf8(attribute.key.local_name().as_ref())?, value.into_owned()));
    }
    Ok(element)
}

fn utf8(bytes: &[u8]) -> Result<String, String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| "it is not UTF-8".to_owned())
}

/// Adds what is no element to the text of the innermost one.
fn take_text(event: Event<'_>, open: &mut [Element]) -> Result<(), String> {
    let text = match event {
        Event::Text(text) => {
            text.xml10_content().map_err(|error| format!("it is no XML: {error}"))?.into_owned()
        }
        Event::CData(text) => {
            text.xml10_content().map_err(|error| format!("it is no XML: {error}"))?.into_owned()
        }
        Event::GeneralRef(reference) => resolve(&reference)?.to_string(),
        Event::Decl(_) | Event::Comment(_) => return Ok(()),
        Event::DocType(_) => return Err("it has a document type".into()),
        _ => return Err("it has a processing instruction".into()),
    };
    match open.last_mut() {
        Some(element) => element.text.push_str(&text),
        None if text.trim().is_empty() => {}
        None => return Err("it is no XML: text outside of its root".into()),
    }
    Ok(())
}

fn resolve(reference: &quick_xml::events::BytesRef<'_>) -> Result<char, String> {
    let unknown = || "it has an entity that XML does not know".to_owned();
    if reference.is_char_ref() {
        return reference.resolve_char_ref().ok().flatten().ok_or_else(unknown);
    }
    match reference.as_ref() {
        b"lt" => Ok('<'),
        b"gt" => Ok('>'),
        b"amp" => Ok('&'),
        b"apos" => Ok('\''),
        b"quot" => Ok('"'),
        _ => Err(unknown()),
    }
}

/// Text as content of an element or attribute; none where XML cannot carry one of its characters.
pub(crate) fn escape(text: &str) -> Option<String> {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '"' => escaped.push_str("&quot;"),
            // As itself a reader would take it for a line feed.
            '\r' => escaped.push_str("&#13;"),
            '\t' | '\n' => escaped.push(c),
            '\0'..'\u{20}' | '\u{fffe}' | '\u{ffff}' => return None,
            c => escaped.push(c),
        }
    }
    Some(escaped)
}

/// Text as character data; an end of such data within it is cut in two. None as of [`escape`].
pub(crate) fn cdata(text: &str) -> Option<String> {
    escape(text)?;
    Some(format!("<![CDATA[{}]]>", text.replace("]]>", "]]]]><![CDATA[>")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_entities_and_character_data_are_one_text() {
        let tree = parse(
            b"<?xml version=\"1.0\"?><!-- c --><a:x xmlns:a='u' a:t='1&amp;2'> a&lt;<b/>&#x41;<![CDATA[<c>&]]></a:x>\n",
        )
        .unwrap();
        assert_eq!(tree.name, "x");
        assert_eq!(tree.attributes, [("t".to_owned(), "1&2".to_owned())]);
        assert_eq!(tree.text, " a<A<c>&");
        assert_eq!(tree.children.len(), 1);
    }

    #[test]
    fn what_management_does_not_need_is_refused() {
        let deep = "<a>".repeat(100) + &"</a>".repeat(100);
        let wide = format!("<a {}/>", (0..100).map(|n| format!("b{n}='' ")).collect::<String>());
        let many = format!("<a>{}</a>", "<b/>".repeat(1000));
        for text in [
            "",
            "x",
            "<a>",
            "<a></b>",
            "<a/><b/>",
            "<a/>x",
            "<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>",
            "<a>&b;</a>",
            "<a>&#0;</a>",
            "<?p?><a/>",
            "<a b/>",
            deep.as_str(),
            wide.as_str(),
            many.as_str(),
        ] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
        assert!(parse(b"<a>\xff</a>").is_err());
    }

    #[test]
    fn what_is_written_is_read_again() {
        for text in ["a<b>&\"'\r\n\tü\u{1f600}]]>", "]]>]]>", "<INSTANCE CLASSNAME=\"X\"/>", ""] {
            let escaped = format!("<a>{}</a>", escape(text).unwrap());
            assert_eq!(parse(escaped.as_bytes()).unwrap().text, text);
            if !text.contains('\r') {
                let data = format!("<a>{}</a>", cdata(text).unwrap());
                assert_eq!(parse(data.as_bytes()).unwrap().text, text);
            }
        }
        assert_eq!(escape("\0"), None);
        assert_eq!(cdata("\u{1b}"), None);
    }
}
