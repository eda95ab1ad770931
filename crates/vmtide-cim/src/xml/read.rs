//! Reading: from elements to an instance.

use super::tree::{Element, bad, parse};
use crate::{CimInstance, CimType, CimValue, ObjectPath, Result};
use std::collections::{BTreeMap, HashSet};

/// The deepest `<INSTANCE>` within the elements that may wrap it.
const MAX_WRAPPING: usize = 8;

/// Instances nested deeper than this are refused.
const MAX_NESTING: usize = 4;

/// Reads an instance: an `<INSTANCE>`, alone or within what WMI wraps it in (`<DECLARATIONS>`, `<CIM>`, …).
/// Properties without a value are [`CimValue::Null`]. A `<VALUE>` of a number may have blanks around it.
///
/// # Errors
/// [`CimError::Protocol`](crate::CimError::Protocol) with what is wrong,
/// [`CimError::TooLarge`](crate::CimError::TooLarge) past [`MAX_XML_BYTES`](super::MAX_XML_BYTES).
pub fn from_xml(text: &str) -> Result<CimInstance> {
    let root = parse(text)?;
    let mut element = &root;
    for _ in 0..MAX_WRAPPING {
        if element.name == "INSTANCE" {
            return instance(element, 0);
        }
        match element.children.as_slice() {
            [only] => element = only,
            _ => break,
        }
    }
    Err(bad(format!("<{}> holds no <INSTANCE>", root.name)))
}

fn instance(element: &Element, nesting: usize) -> Result<CimInstance> {
    if nesting > MAX_NESTING {
        return Err(bad(format!("instances are nested deeper than {MAX_NESTING}")));
    }
    let mut read = CimInstance::new(element.required("CLASSNAME")?);
    let mut names = HashSet::new();
    for child in &element.children {
        if !child.name.starts_with("PROPERTY") {
            continue; // A qualifier.
        }
        let name = child.required("NAME")?;
        if !names.insert(name.to_ascii_lowercase()) {
            return Err(bad(format!("the property {name} comes twice")));
        }
        read.properties.push((name.to_owned(), property(child, nesting)?));
    }
    Ok(read)
}

fn property(element: &Element, nesting: usize) -> Result<CimValue> {
    match element.name.as_str() {
        "PROPERTY" => {
            let kind = type_of(element)?;
            element.at_most_one("VALUE")?.map_or(Ok(CimValue::Null), |value| scalar(kind, value))
        }
        "PROPERTY.ARRAY" => {
            let kind = type_of(element)?;
            array(element, "VALUE.ARRAY", kind, |value| match value.name.as_str() {
                "VALUE" => scalar(kind, value),
                "VALUE.NULL" => Ok(CimValue::Null),
                other => Err(bad(format!("<{other}> is no element of an array"))),
            })
        }
        "PROPERTY.REFERENCE" => element
            .at_most_one("VALUE.REFERENCE")?
            .map_or(Ok(CimValue::Null), |value| reference(value).map(CimValue::Reference)),
        "PROPERTY.REFARRAY" => array(element, "VALUE.REFARRAY", CimType::Reference, |value| {
            reference(value).map(CimValue::Reference)
        }),
        "PROPERTY.OBJECT" => element
            .at_most_one("VALUE.OBJECT")?
            .map_or(Ok(CimValue::Null), |value| object(value, nesting)),
        "PROPERTY.OBJECTARRAY" => {
            array(element, "VALUE.OBJECTARRAY", CimType::Instance, |value| object(value, nesting))
        }
        other => Err(bad(format!("<{other}> is not known"))),
    }
}

fn array(
    element: &Element,
    name: &str,
    kind: CimType,
    read: impl FnMut(&Element) -> Result<CimValue>,
) -> Result<CimValue> {
    let Some(list) = element.at_most_one(name)? else {
        return Ok(CimValue::Null);
    };
    let items = list.children.iter().map(read).collect::<Result<Vec<_>>>()?;
    Ok(CimValue::Array(kind, items))
}

fn type_of(element: &Element) -> Result<CimType> {
    match element.required("TYPE")? {
        // A 16-bit character; none of the classes that are used here has one.
        "char16" => Ok(CimType::String),
        "reference" | "instance" => Err(bad("a reference has an element of its own")),
        name => CimType::from_name(name).ok_or_else(|| bad("a type that CIM does not have")),
    }
}

fn object(element: &Element, nesting: usize) -> Result<CimValue> {
    let inner = element.at_most_one("INSTANCE")?;
    let inner = inner.ok_or_else(|| bad(format!("<{}> holds no <INSTANCE>", element.name)))?;
    Ok(CimValue::Instance(Box::new(instance(inner, nesting + 1)?)))
}

fn scalar(kind: CimType, element: &Element) -> Result<CimValue> {
    let value = CimValue::from_text(kind, &element.text);
    value.ok_or_else(|| bad(format!("a value is no {}", kind.as_str())))
}

/// `<VALUE.REFERENCE>` with the path in whichever of its forms.
fn reference(element: &Element) -> Result<ObjectPath> {
    let [inner] = element.children.as_slice() else {
        return Err(bad("a reference is not one path"));
    };
    let mut path = ObjectPath::default();
    let name = match inner.name.as_str() {
        "INSTANCEPATH" | "CLASSPATH" => {
            let place = inner.at_most_one("NAMESPACEPATH")?;
            let place = place.ok_or_else(|| bad("a path lacks its namespace"))?;
            path.host = place.at_most_one("HOST")?.map(|host| host.text.trim().to_owned());
            path.namespace = namespace(place)?;
            inner
        }
        "LOCALINSTANCEPATH" | "LOCALCLASSPATH" => {
            path.namespace = namespace(inner)?;
            inner
        }
        "INSTANCENAME" => return instance_name(inner, path),
        other => return Err(bad(format!("<{other}> is no path"))),
    };
    if let Some(class) = name.at_most_one("CLASSNAME")? {
        class.required("NAME")?.clone_into(&mut path.class);
        return Ok(path);
    }
    let inner = name.at_most_one("INSTANCENAME")?;
    instance_name(inner.ok_or_else(|| bad("a path names no instance"))?, path)
}

fn namespace(element: &Element) -> Result<String> {
    let Some(list) = element.at_most_one("LOCALNAMESPACEPATH")? else {
        return Err(bad("a path lacks its namespace"));
    };
    let names: Result<Vec<&str>> =
        list.named("NAMESPACE").map(|part| part.required("NAME")).collect();
    Ok(names?.join(r"\"))
}

fn instance_name(element: &Element, mut path: ObjectPath) -> Result<ObjectPath> {
    element.required("CLASSNAME")?.clone_into(&mut path.class);
    let mut keys = BTreeMap::new();
    for binding in element.named("KEYBINDING") {
        let name = binding.required("NAME")?;
        let value = binding.at_most_one("KEYVALUE")?;
        let value = value.ok_or_else(|| bad(format!("the key {name} has no value")))?;
        if keys.insert(name.to_owned(), value.text.clone()).is_some() {
            return Err(bad(format!("the key {name} comes twice")));
        }
    }
    path.keys = keys;
    Ok(path)
}
