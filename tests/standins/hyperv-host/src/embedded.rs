//! Instances as text (CIM-XML of DTD 2.0), as parameters carry them: read strictly, written for answers.
//!
//! Written apart from vmtide's own reader and writer, so that the two check each other. Class, properties and
//! types must be those of the schema to the letter; a value must fit its type.

use crate::schema::{Property, Schema};
use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};
use vmtide_cim::{CimInstance, CimType, CimValue};

/// Reads an instance; an error says what is wrong with it.
pub(crate) fn read(text: &str) -> Result<CimInstance, String> {
    let mut reader = Reader::from_str(text);
    reader.config_mut().expand_empty_elements = true;
    let mut state = Reading::default();
    loop {
        match reader.read_event().map_err(|error| format!("no XML: {error}"))? {
            Event::Start(start) => state.start(&start)?,
            Event::End(_) => state.end()?,
            Event::Text(text) => {
                let text = text.decode().map_err(|error| error.to_string())?;
                state.text.push_str(&text);
            }
            Event::GeneralRef(entity) => state.text.push(character(&entity)?),
            Event::CData(data) => {
                state.text.push_str(&String::from_utf8_lossy(data.as_ref()));
            }
            Event::Eof => break,
            Event::Decl(_) | Event::Comment(_) => {}
            other => return Err(format!("{other:?} does not belong into an instance")),
        }
    }
    if !state.open.is_empty() {
        return Err("elements are not closed".into());
    }
    state.instance.ok_or_else(|| "there is no INSTANCE".into())
}

/// One character of `&name;` or `&#number;`.
fn character(entity: &quick_xml::events::BytesRef<'_>) -> Result<char, String> {
    if let Some(found) = entity.resolve_char_ref().map_err(|error| error.to_string())? {
        return Ok(found);
    }
    match entity.as_ref() {
        b"lt" => Ok('<'),
        b"gt" => Ok('>'),
        b"amp" => Ok('&'),
        b"quot" => Ok('"'),
        b"apos" => Ok('\''),
        other => Err(format!("the entity {} is not known", String::from_utf8_lossy(other))),
    }
}

#[derive(Default)]
struct Reading {
    open: Vec<String>,
    instance: Option<CimInstance>,
    /// The property that is being read, and its values so far.
    property: Option<(Property, Vec<Option<String>>)>,
    text: String,
}

impl Reading {
    fn start(&mut self, start: &BytesStart<'_>) -> Result<(), String> {
        let name = String::from_utf8_lossy(start.name().as_ref()).into_owned();
        let parent = self.open.last().map_or("", String::as_str);
        match (parent, name.as_str()) {
            ("", "INSTANCE") if self.instance.is_none() => {
                let class = attribute(start, "CLASSNAME")?.ok_or("INSTANCE has no CLASSNAME")?;
                if Schema::get().class(&class).is_none() {
                    return Err(format!("the class {class} is not known"));
                }
                self.instance = Some(CimInstance::new(class));
            }
            ("INSTANCE", "QUALIFIER") | ("PROPERTY" | "PROPERTY.ARRAY", "QUALIFIER") => {}
            ("INSTANCE", "PROPERTY" | "PROPERTY.ARRAY" | "PROPERTY.REFERENCE") => {
                self.property = Some((self.declared(start, &name)?, Vec::new()));
            }
            ("PROPERTY" | "VALUE.ARRAY" | "QUALIFIER", "VALUE")
            | ("PROPERTY.ARRAY", "VALUE.ARRAY") => {}
            ("VALUE.ARRAY", "VALUE.NULL") => {}
            _ => return Err(format!("{name} does not belong into {parent:?}")),
        }
        self.text.clear();
        self.open.push(name);
        Ok(())
    }

    /// The property that the schema declares for an element.
    fn declared(&self, start: &BytesStart<'_>, element: &str) -> Result<Property, String> {
        let class = self.instance.as_ref().map_or("", |instance| instance.class.as_str());
        let name = attribute(start, "NAME")?.ok_or("a property has no NAME")?;
        let kind = attribute(start, "TYPE")?.ok_or_else(|| format!("{name} has no TYPE"))?;
        let class = Schema::get().class(class).ok_or("a property outside of an instance")?;
        let property =
            class.property(&name).ok_or_else(|| format!("{} has no {name}", class.name))?;
        if property.kind.as_str() != kind {
            return Err(format!("{name} is {}, not {kind}", property.kind.as_str()));
        }
        if property.is_array != (element == "PROPERTY.ARRAY") || element == "PROPERTY.REFERENCE" {
            return Err(format!("{name} does not stand in {element}"));
        }
        let known = self
            .instance
            .as_ref()
            .is_some_and(|instance| instance.properties.iter().any(|(known, _)| *known == name));
        if known { Err(format!("{name} is there twice")) } else { Ok(property.clone()) }
    }

    fn end(&mut self) -> Result<(), String> {
        let name = self.open.pop().ok_or("an element ends that did not begin")?;
        let in_qualifier = self.open.last().is_some_and(|parent| parent == "QUALIFIER");
        match name.as_str() {
            "VALUE" if !in_qualifier => {
                if let Some((_, values)) = &mut self.property {
                    values.push(Some(std::mem::take(&mut self.text)));
                }
            }
            "VALUE.NULL" => {
                if let Some((_, values)) = &mut self.property {
                    values.push(None);
                }
            }
            "PROPERTY" | "PROPERTY.ARRAY" => {
                let (property, values) = self.property.take().ok_or("no property is open")?;
                let value = value_of(&property, values)?;
                if let Some(instance) = &mut self.instance {
                    instance.properties.push((property.name.to_owned(), value));
                }
            }
            _ => {}
        }
        self.text.clear();
        Ok(())
    }
}

fn attribute(start: &BytesStart<'_>, name: &str) -> Result<Option<String>, String> {
    let found = start.try_get_attribute(name).map_err(|error| error.to_string())?;
    found
        .map(|attribute| {
            let raw = String::from_utf8_lossy(&attribute.value).into_owned();
            quick_xml::escape::unescape(&raw)
                .map(|text| text.into_owned())
                .map_err(|error| error.to_string())
        })
        .transpose()
}

fn value_of(property: &Property, values: Vec<Option<String>>) -> Result<CimValue, String> {
    let scalar = |text: Option<String>| match text {
        None => Ok(CimValue::Null),
        Some(text) => scalar(property.kind, &text)
            .ok_or_else(|| format!("{}: {text:?} is no {}", property.name, property.kind.as_str())),
    };
    if property.is_array {
        if values.is_empty() {
            return Ok(CimValue::Null);
        }
        let items = values.into_iter().map(scalar).collect::<Result<_, _>>()?;
        return Ok(CimValue::Array(property.kind, items));
    }
    let mut values = values.into_iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(CimValue::Null),
        (Some(value), None) => scalar(value),
        (Some(_), Some(_)) => Err(format!("{} has several values", property.name)),
    }
}

/// A value of the type by its text in CIM-XML.
pub(crate) fn scalar(kind: CimType, text: &str) -> Option<CimValue> {
    Some(match kind {
        CimType::Boolean => match text.trim() {
            "TRUE" | "true" => CimValue::Boolean(true),
            "FALSE" | "false" => CimValue::Boolean(false),
            _ => return None,
        },
        CimType::Uint8 => CimValue::Uint8(text.trim().parse().ok()?),
        CimType::Uint16 => CimValue::Uint16(text.trim().parse().ok()?),
        CimType::Uint32 => CimValue::Uint32(text.trim().parse().ok()?),
        CimType::Uint64 => CimValue::Uint64(text.trim().parse().ok()?),
        CimType::Sint8 => CimValue::Sint8(text.trim().parse().ok()?),
        CimType::Sint16 => CimValue::Sint16(text.trim().parse().ok()?),
        CimType::Sint32 => CimValue::Sint32(text.trim().parse().ok()?),
        CimType::Sint64 => CimValue::Sint64(text.trim().parse().ok()?),
        CimType::DateTime => {
            if text.len() != 25 {
                return None;
            }
            CimValue::DateTime(text.to_owned())
        }
        CimType::String => CimValue::String(text.to_owned()),
        _ => return None,
    })
}

/// Writes an instance, as Windows does: what is null has no value.
pub(crate) fn write(instance: &CimInstance) -> String {
    let mut text = format!("<INSTANCE CLASSNAME=\"{}\">", instance.class);
    for (name, value) in &instance.properties {
        let declared = Schema::get().class(&instance.class).and_then(|class| class.property(name));
        let kind = declared.map(|property| property.kind).or(value.cim_type());
        let kind = kind.unwrap_or(CimType::String).as_str();
        let is_array = declared.map_or(matches!(value, CimValue::Array(..)), |p| p.is_array);
        let element = if is_array { "PROPERTY.ARRAY" } else { "PROPERTY" };
        text.push_str(&format!("<{element} NAME=\"{name}\" TYPE=\"{kind}\">"));
        let values: String = value
            .elements()
            .iter()
            .map(|value| {
                let plain = plain(value);
                format!("<VALUE>{}</VALUE>", quick_xml::escape::escape(plain.as_str()))
            })
            .collect();
        match (is_array, value) {
            (_, CimValue::Null) => {}
            (true, _) => text.push_str(&format!("<VALUE.ARRAY>{values}</VALUE.ARRAY>")),
            (false, _) => text.push_str(&values),
        }
        text.push_str(&format!("</{element}>"));
    }
    text.push_str("</INSTANCE>");
    text
}

/// A scalar as text.
pub(crate) fn plain(value: &CimValue) -> String {
    match value {
        CimValue::Boolean(true) => "TRUE".into(),
        CimValue::Boolean(false) => "FALSE".into(),
        CimValue::String(text) | CimValue::DateTime(text) => text.clone(),
        CimValue::Reference(path) => path.to_string(),
        CimValue::Sint8(value) => value.to_string(),
        CimValue::Sint16(value) => value.to_string(),
        CimValue::Sint32(value) => value.to_string(),
        CimValue::Sint64(value) => value.to_string(),
        CimValue::Real32(value) => value.to_string(),
        CimValue::Real64(value) => value.to_string(),
        CimValue::Instance(instance) => write(instance),
        other => other.as_u64().map(|number| number.to_string()).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_survive_both_writers() {
        let instance = CimInstance::new("Msvm_StorageAllocationSettingData")
            .with("InstanceID", r"Microsoft:A\B<&>")
            .with("HostResource", CimValue::strings([r"C:\a b\x.vhdx"]))
            .with("ResourceType", CimValue::Uint16(31))
            .with("IgnoreFlushes", true);
        assert_eq!(read(&write(&instance)).unwrap(), instance);
        assert_eq!(read(&vmtide_cim::xml::to_xml(&instance).unwrap()).unwrap(), instance);
        let theirs = vmtide_cim::xml::from_xml(&write(&instance)).unwrap();
        assert_eq!(theirs.properties, instance.properties);
    }

    #[test]
    fn what_the_schema_does_not_say_is_refused() {
        let property = |name: &str, kind: &str, value: &str| {
            format!(
                "<INSTANCE CLASSNAME=\"Msvm_VirtualSystemSnapshotSettingData\"><PROPERTY NAME=\"{name}\" \
                 TYPE=\"{kind}\"><VALUE>{value}</VALUE></PROPERTY></INSTANCE>"
            )
        };
        assert!(read(&property("ConsistencyLevel", "uint8", "1")).is_ok());
        for text in [
            property("ConsistencyLevel", "uint16", "1"),
            property("consistencyLevel", "uint8", "1"),
            property("ConsistencyLevel", "uint8", "256"),
            property("IgnoreNonSnapshottableDisks", "boolean", "1"),
            property("ConsistencyLevel", "uint8", "1").replace("Msvm_V", "Msvm_X"),
            "<INSTANCE CLASSNAME=\"Msvm_ComputerSystem\">".into(),
            String::new(),
        ] {
            assert!(read(&text).is_err(), "{text}");
        }
    }
}
