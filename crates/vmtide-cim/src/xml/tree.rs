//! A small tree of elements, bounded while it grows.

use super::MAX_XML_BYTES;
use crate::{CimError, Result};
use quick_xml::XmlVersion;
use quick_xml::escape::resolve_predefined_entity;
use quick_xml::events::{BytesStart, Event};

/// Deeper documents are refused: an instance within an instance within the wrapping of WMI has some 20.
const MAX_DEPTH: usize = 48;

/// More elements are refused: the settings of a VM have some hundreds.
const MAX_ELEMENTS: usize = 1 << 16;

/// More bytes of attributes of one element are refused. Attributes are compared with each other, so many
/// of them would cost the square of their number.
const MAX_ATTRIBUTE_BYTES: usize = 4 << 10;

/// An element: what is in it, and its text without that of the elements in it.
#[derive(Debug, Default)]
pub(super) struct Element {
    pub(super) name: String,
    attributes: Vec<(String, String)>,
    pub(super) children: Vec<Element>,
    pub(super) text: String,
}

impl Element {
    pub(super) fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// The attribute that must be there.
    pub(super) fn required(&self, name: &str) -> Result<&str> {
        self.attribute(name).ok_or_else(|| bad(format!("<{}> lacks {name}", self.name)))
    }

    /// The children of that name.
    pub(super) fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Self> {
        self.children.iter().filter(move |child| child.name == name)
    }

    /// The only child of that name; none where there is none.
    pub(super) fn at_most_one(&self, name: &str) -> Result<Option<&Self>> {
        let mut found = self.children.iter().filter(|child| child.name == name);
        let first = found.next();
        match found.next() {
            None => Ok(first),
            Some(_) => Err(bad(format!("<{}> has several <{name}>", self.name))),
        }
    }
}

pub(super) fn bad(detail: impl Into<String>) -> CimError {
    CimError::protocol("CIM-XML", detail)
}

/// Reads a document: its root element.
pub(super) fn parse(text: &str) -> Result<Element> {
    if text.len() > MAX_XML_BYTES {
        return Err(CimError::TooLarge {
            action: "reading CIM-XML".into(),
            limit_bytes: MAX_XML_BYTES as u64,
        });
    }
    let mut reader = quick_xml::Reader::from_str(text.trim_start_matches('\u{feff}'));
    let mut elements = 0usize;
    // The document itself stands at the bottom, the element that is being read at the top.
    let mut open = vec![Element::default()];
    loop {
        let event = reader.read_event().map_err(|error| bad(error.to_string()))?;
        match event {
            Event::Start(start) => {
                count(&mut elements, open.len())?;
                open.push(begin(&start)?);
            }
            Event::Empty(start) => {
                count(&mut elements, open.len())?;
                let element = begin(&start)?;
                top(&mut open)?.children.push(element);
            }
            Event::End(_) => {
                let element = open.pop().ok_or_else(|| bad("an end without a beginning"))?;
                top(&mut open)?.children.push(element);
            }
            Event::Text(text) => {
                let text = text.xml10_content().map_err(|error| bad(error.to_string()))?;
                top(&mut open)?.text.push_str(&text);
            }
            Event::CData(text) => {
                let text = text.xml10_content().map_err(|error| bad(error.to_string()))?;
                top(&mut open)?.text.push_str(&text);
            }
            Event::GeneralRef(reference) => {
                let character =
                    reference.resolve_char_ref().map_err(|error| bad(error.to_string()))?;
                let name = reference.decode().map_err(|error| bad(error.to_string()))?;
                match (character, resolve_predefined_entity(&name)) {
                    (Some(character), _) => top(&mut open)?.text.push(character),
                    (None, Some(text)) => top(&mut open)?.text.push_str(text),
                    (None, None) => return Err(bad("an entity that XML does not define")),
                }
            }
            Event::Decl(_) | Event::Comment(_) | Event::PI(_) => {}
            Event::DocType(_) => return Err(bad("it has a document type")),
            Event::Eof => break,
        }
    }
    let mut document = match (open.pop(), open.is_empty()) {
        (Some(document), true) => document,
        _ => return Err(bad("it ends within an element")),
    };
    match (document.children.pop(), document.children.is_empty()) {
        (Some(root), true) if document.text.trim().is_empty() => Ok(root),
        _ => Err(bad("it is not one element")),
    }
}

fn count(elements: &mut usize, depth: usize) -> Result<()> {
    *elements += 1;
    if *elements > MAX_ELEMENTS || depth > MAX_DEPTH {
        return Err(bad(format!(
            "more than {MAX_ELEMENTS} elements, or nested deeper than {MAX_DEPTH}"
        )));
    }
    Ok(())
}

fn top(open: &mut [Element]) -> Result<&mut Element> {
    open.last_mut().ok_or_else(|| bad("an end without a beginning"))
}

fn begin(start: &BytesStart<'_>) -> Result<Element> {
    if start.attributes_raw().len() > MAX_ATTRIBUTE_BYTES {
        return Err(bad(format!(
            "the attributes of an element have more than {MAX_ATTRIBUTE_BYTES} bytes"
        )));
    }
    let text = |bytes: &[u8]| {
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| bad("a name is not UTF-8"))
    };
    let mut element = Element { name: text(start.name().as_ref())?, ..Element::default() };
    for attribute in start.attributes() {
        let attribute = attribute.map_err(|error| bad(error.to_string()))?;
        let value = attribute
            .normalized_value(XmlVersion::Implicit1_0)
            .map_err(|error| bad(error.to_string()))?;
        element.attributes.push((text(attribute.key.as_ref())?, value.into_owned()));
    }
    Ok(element)
}
