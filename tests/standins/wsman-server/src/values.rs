//! Values in XML: out as text without types, in by the type that the schema says (WS-CIM mapping, DSP0230).

use crate::fault::Fault;
use crate::schema::{Member, Schema};
use crate::uri::{self, Resource};
use crate::write::escape;
use crate::xml::Element;
use std::fmt::Write;
use vmtide_cim::{CimInstance, CimType, CimValue, ObjectPath};

/// The selector that names the namespace; WinRM adds it to every reference it writes.
const NAMESPACE_SELECTOR: &str = "__cimnamespace";

/// An instance as an element of its class. Properties that the schema has and the instance has not are nil.
pub fn instance(instance: &CimInstance, namespace: &str, schema: &dyn Schema) -> String {
    let class = &instance.class;
    let mut out = format!(
        "<p:{class} xmlns:xsi=\"{}\" xmlns:p=\"{}\" xmlns:cim=\"{}\" xsi:type=\"p:{class}_Type\">",
        uri::XSI,
        uri::of_class(namespace, class),
        uri::CIM_COMMON,
    );
    out.push_str(&properties(instance, schema));
    // Writing to a string does not fail, here and below.
    let _ = write!(out, "</p:{class}>");
    out
}

/// What a query for single columns finds: an instance without its class (DSP0226 7.7).
pub fn fragment(instance: &CimInstance, namespace: &str) -> String {
    let mut out = format!(
        "<w:XmlFragment xmlns:xsi=\"{}\" xmlns:p=\"{}\" xmlns:cim=\"{}\">",
        uri::XSI,
        uri::of_class(namespace, &instance.class),
        uri::CIM_COMMON,
    );
    for (name, value) in &instance.properties {
        element(&mut out, "p", name, value);
    }
    out.push_str("</w:XmlFragment>");
    out
}

fn properties(instance: &CimInstance, schema: &dyn Schema) -> String {
    let mut out = String::new();
    for (name, value) in &instance.properties {
        element(&mut out, "p", name, value);
    }
    let class = schema.class(&instance.class).unwrap_or_default();
    let known =
        |name: &str| instance.properties.iter().any(|(has, _)| has.eq_ignore_ascii_case(name));
    for property in class.properties.iter().filter(|property| !known(&property.name)) {
        element(&mut out, "p", &property.name, &CimValue::Null);
    }
    out
}

/// `<prefix:name>value</prefix:name>`; an array is one such element for each of its own.
pub fn element(out: &mut String, prefix: &str, name: &str, value: &CimValue) {
    let tag = format!("{prefix}:{name}");
    let text = match value {
        CimValue::Null => {
            let _ = write!(out, "<{tag} xsi:nil=\"true\"/>");
            return;
        }
        CimValue::Array(_, items) => {
            for item in items {
                element(out, prefix, name, item);
            }
            return;
        }
        CimValue::Instance(inner) => {
            let namespace = inner
                .path
                .as_ref()
                .map_or(vmtide_cim::VIRTUALIZATION_NAMESPACE, |path| path.namespace.as_str());
            let class = &inner.class;
            let _ = write!(
                out,
                "<{tag} xmlns:q=\"{}\" xsi:type=\"q:{class}_Type\">",
                uri::of_class(namespace, class)
            );
            for (name, value) in &inner.properties {
                element(out, "q", name, value);
            }
            let _ = write!(out, "</{tag}>");
            return;
        }
        CimValue::Reference(path) => {
            let _ = write!(out, "<{tag}>{}</{tag}>", endpoint(path));
            return;
        }
        CimValue::DateTime(text) => {
            let _ = write!(out, "<{tag}>{}</{tag}>", datetime(text));
            return;
        }
        CimValue::String(text) => escape(text),
        CimValue::Boolean(value) => value.to_string(),
        CimValue::Uint8(value) => value.to_string(),
        CimValue::Uint16(value) => value.to_string(),
        CimValue::Uint32(value) => value.to_string(),
        CimValue::Uint64(value) => value.to_string(),
        CimValue::Sint8(value) => value.to_string(),
        CimValue::Sint16(value) => value.to_string(),
        CimValue::Sint32(value) => value.to_string(),
        CimValue::Sint64(value) => value.to_string(),
        CimValue::Real32(value) => value.to_string(),
        CimValue::Real64(value) => value.to_string(),
    };
    let _ = write!(out, "<{tag}>{text}</{tag}>");
}

/// The content of an endpoint reference.
pub fn endpoint(path: &ObjectPath) -> String {
    let mut out = format!(
        "<a:Address>{}</a:Address><a:ReferenceParameters><w:ResourceURI>{}</w:ResourceURI><w:SelectorSet>",
        uri::ANONYMOUS,
        uri::of_path(path)
    );
    let namespace = (NAMESPACE_SELECTOR.to_owned(), path.namespace.replace('\\', "/"));
    for (name, value) in path.keys.iter().chain(std::iter::once((&namespace.0, &namespace.1))) {
        let _ = write!(out, "<w:Selector Name=\"{}\">{}</w:Selector>", escape(name), escape(value));
    }
    out.push_str("</w:SelectorSet></a:ReferenceParameters>");
    out
}

/// A time of DSP0004 (`20261121120000.000000+060`) as XML Schema writes it, an interval (`00000001…:000`) as a duration.
/// What has other characters than digits where those belong stays text.
fn datetime(text: &str) -> String {
    let digits = |from: usize, to: usize| {
        text.get(from..to).filter(|part| part.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let plain = || escape(text);
    if text.len() != 25 || text.get(14..15) != Some(".") {
        return plain();
    }
    let (Some(fraction), Some(offset)) = (digits(15, 21), digits(22, 25)) else { return plain() };
    let fraction = match fraction.trim_end_matches('0') {
        "" => String::new(),
        digits => format!(".{digits}"),
    };
    match text.get(21..22) {
        Some(":") => {
            let parts = (digits(0, 8), digits(8, 10), digits(10, 12), digits(12, 14));
            let (Some(days), Some(hours), Some(minutes), Some(seconds)) = parts else {
                return plain();
            };
            let number = |part: &str| part.parse::<u32>().unwrap_or_default();
            format!(
                "<cim:Interval>P{}DT{}H{}M{}{fraction}S</cim:Interval>",
                number(days),
                number(hours),
                number(minutes),
                number(seconds)
            )
        }
        Some(sign @ ("+" | "-")) => {
            let parts = (digits(0, 4), digits(4, 6), digits(6, 8), digits(8, 14));
            let (Some(year), Some(month), Some(day), Some(clock)) = parts else { return plain() };
            let minutes: u32 = offset.parse().unwrap_or_default();
            let zone = if minutes == 0 {
                "Z".to_owned()
            } else {
                format!("{sign}{:02}:{:02}", minutes / 60, minutes % 60)
            };
            let (hours, rest) = clock.split_at(2);
            let (minute, second) = rest.split_at(2);
            format!(
                "<cim:Datetime>{year}-{month}-{day}T{hours}:{minute}:{second}{fraction}{zone}</cim:Datetime>"
            )
        }
        _ => plain(),
    }
}

/// A parameter from the elements that bear its name, which are at least one.
///
/// # Errors
/// The fault that says why they are not of its type.
pub fn parameter(
    member: &Member,
    elements: &[&Element],
    schema: &dyn Schema,
) -> Result<CimValue, Fault> {
    let nil = |element: &&Element| element.is_true(uri::XSI, "nil");
    if elements.iter().any(nil) {
        return if elements.len() == 1 && elements.iter().all(|element| element.is_empty()) {
            Ok(CimValue::Null)
        } else {
            Err(Fault::schema(format!("{} is nil and has a value", member.name)))
        };
    }
    let mut values = Vec::with_capacity(elements.len());
    for element in elements {
        values.push(scalar(member, element, schema)?);
    }
    if member.array {
        return Ok(CimValue::Array(member.kind, values));
    }
    match (values.pop(), values.is_empty()) {
        (Some(value), true) => Ok(value),
        _ => Err(Fault::schema(format!(
            "{} is no array and came {} times",
            member.name,
            elements.len()
        ))),
    }
}

fn scalar(member: &Member, element: &Element, schema: &dyn Schema) -> Result<CimValue, Fault> {
    let wrong = || {
        Fault::schema(format!("{} is no {}: {:?}", member.name, member.kind.as_str(), element.text))
    };
    if member.kind == CimType::Reference {
        return reference(&member.name, element, schema).map(CimValue::Reference);
    }
    if member.kind == CimType::DateTime {
        let inner = ["Datetime", "Interval", "CIM_DateTime"];
        let found = inner.iter().find_map(|name| element.child(uri::CIM_COMMON, name));
        return Ok(CimValue::DateTime(found.unwrap_or(element).text.clone()));
    }
    // An embedded instance as elements (WS-CIM 5.2.3) is what real Hyper-V hosts refuse: they want CIM-XML as text.
    if !element.children.is_empty() {
        return Err(Fault::schema(format!("{} has elements where text is expected", member.name)));
    }
    let text = element.text.as_str();
    Ok(match member.kind {
        CimType::String | CimType::Instance => CimValue::String(text.into()),
        CimType::Boolean => match text {
            "true" | "1" => CimValue::Boolean(true),
            "false" | "0" => CimValue::Boolean(false),
            _ => return Err(wrong()),
        },
        CimType::Uint8 => CimValue::Uint8(text.parse().map_err(|_| wrong())?),
        CimType::Uint16 => CimValue::Uint16(text.parse().map_err(|_| wrong())?),
        CimType::Uint32 => CimValue::Uint32(text.parse().map_err(|_| wrong())?),
        CimType::Uint64 => CimValue::Uint64(text.parse().map_err(|_| wrong())?),
        CimType::Sint8 => CimValue::Sint8(text.parse().map_err(|_| wrong())?),
        CimType::Sint16 => CimValue::Sint16(text.parse().map_err(|_| wrong())?),
        CimType::Sint32 => CimValue::Sint32(text.parse().map_err(|_| wrong())?),
        CimType::Sint64 => CimValue::Sint64(text.parse().map_err(|_| wrong())?),
        CimType::Real32 => CimValue::Real32(text.parse().map_err(|_| wrong())?),
        CimType::Real64 => CimValue::Real64(text.parse().map_err(|_| wrong())?),
        CimType::DateTime | CimType::Reference => return Err(wrong()),
    })
}

/// A reference: the content of an endpoint reference, with or without an `a:EndpointReference` around it.
///
/// # Errors
/// The fault that says what is wrong with it.
pub fn reference(name: &str, element: &Element, schema: &dyn Schema) -> Result<ObjectPath, Fault> {
    let wrong = |why: &str| Fault::schema(format!("{name} is no endpoint reference: {why}"));
    let inner = element.child(uri::ADDRESSING, "EndpointReference").unwrap_or(element);
    let address =
        inner.child(uri::ADDRESSING, "Address").ok_or_else(|| wrong("it has no a:Address"))?;
    if address.text.trim() != uri::ANONYMOUS {
        return Err(wrong("its address is not the anonymous one"));
    }
    let parameters = inner
        .child(uri::ADDRESSING, "ReferenceParameters")
        .ok_or_else(|| wrong("it has no a:ReferenceParameters"))?;
    let resource = parameters
        .child(uri::WSMAN, "ResourceURI")
        .and_then(|uri| Resource::parse(uri.text.trim()))
        .filter(|resource| !resource.is_all())
        .ok_or_else(|| wrong("its w:ResourceURI names no class"))?;
    let selectors = parameters.child(uri::WSMAN, "SelectorSet");
    let selectors = selectors.map_or(Ok(Vec::new()), self::selectors)?;
    let path = path(&resource, &selectors, schema)?;
    let class = schema.class(&resource.class).unwrap_or_default();
    if class.keys().any(|key| path.key(&key.name).is_none()) {
        return Err(Fault::selectors(
            crate::fault::code::INSUFFICIENT_SELECTORS,
            format!("{name} does not name all keys of {}", resource.class),
        ));
    }
    Ok(path)
}

/// The selectors of a set as (name, value).
///
/// # Errors
/// The fault for anything else than selectors with names, each once.
pub fn selectors(set: &Element) -> Result<Vec<(String, String)>, Fault> {
    let mut found: Vec<(String, String)> = Vec::new();
    for selector in &set.children {
        if !selector.is(uri::WSMAN, "Selector") || !selector.children.is_empty() {
            return Err(Fault::schema(format!("{} is no w:Selector with text", selector.name)));
        }
        let name = selector.attribute("", "Name");
        let name = name.ok_or_else(|| Fault::schema("a w:Selector has no Name"))?;
        if found.iter().any(|(known, _)| known == name) {
            return Err(Fault::selectors(
                crate::fault::code::DUPLICATE_SELECTORS,
                format!("the selector {name} is there twice"),
            ));
        }
        found.push((name.into(), selector.text.clone()));
    }
    Ok(found)
}

/// The path that a resource and selectors name; keys may be missing.
///
/// # Errors
/// The fault where the class is unknown or a selector is no key.
pub fn path(
    resource: &Resource,
    selectors: &[(String, String)],
    schema: &dyn Schema,
) -> Result<ObjectPath, Fault> {
    let class = schema
        .class(&resource.class)
        .ok_or_else(|| Fault::no_class(&resource.namespace, &resource.class))?;
    let mut path = ObjectPath {
        host: None,
        namespace: resource.namespace.clone(),
        class: class.name.clone(),
        ..ObjectPath::default()
    };
    for (name, value) in selectors {
        if name == NAMESPACE_SELECTOR {
            let same = value.replace('/', r"\").eq_ignore_ascii_case(&resource.namespace);
            if !same {
                return Err(Fault::selectors(
                    crate::fault::code::UNEXPECTED_SELECTORS,
                    format!("{NAMESPACE_SELECTOR} is not the namespace of the resource"),
                ));
            }
            continue;
        }
        let key = class.keys().find(|key| key.name.eq_ignore_ascii_case(name));
        let key = key.ok_or_else(|| {
            Fault::selectors(
                crate::fault::code::UNEXPECTED_SELECTORS,
                format!("{name} is no key of {}", class.name),
            )
        })?;
        path.keys.insert(key.name.clone(), value.clone());
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_xml_schema_does() {
        assert_eq!(
            datetime("20261121123456.000000+060"),
            "<cim:Datetime>2026-11-21T12:34:56+01:00</cim:Datetime>"
        );
        assert_eq!(
            datetime("20261121123456.120000+000"),
            "<cim:Datetime>2026-11-21T12:34:56.12Z</cim:Datetime>"
        );
        assert_eq!(
            datetime("00000001020304.000005:000"),
            "<cim:Interval>P1DT2H3M4.000005S</cim:Interval>"
        );
        assert_eq!(datetime("2026**"), "2026**");
    }

    #[test]
    fn arrays_are_repeated_and_nothing_is_nil() {
        let mut out = String::new();
        element(&mut out, "p", "A", &CimValue::strings(["1", "<"]));
        element(&mut out, "p", "B", &CimValue::Null);
        assert_eq!(out, "<p:A>1</p:A><p:A>&lt;</p:A><p:B xsi:nil=\"true\"/>");
    }
}
