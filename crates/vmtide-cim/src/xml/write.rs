//! Writing: from an instance to text.

use super::MAX_XML_BYTES;
use super::tree::bad;
use crate::{CimError, CimInstance, CimType, CimValue, ObjectPath, Result};

/// Writes an instance as methods of Hyper-V take it: `<INSTANCE CLASSNAME="…">` with its properties in
/// their order. Properties without a value are left out, which a method takes for "as it is".
///
/// # Errors
/// [`CimError::Protocol`] for characters that XML cannot carry and arrays of mixed types,
/// [`CimError::TooLarge`] past [`MAX_XML_BYTES`].
pub fn to_xml(instance: &CimInstance) -> Result<String> {
    let mut out = String::new();
    write_instance(&mut out, instance)?;
    Ok(out)
}

fn write_instance(out: &mut String, instance: &CimInstance) -> Result<()> {
    out.push_str("<INSTANCE CLASSNAME=\"");
    escape(out, &instance.class)?;
    out.push_str("\">");
    for (name, value) in &instance.properties {
        write_property(out, name, value)?;
        if out.len() > MAX_XML_BYTES {
            return Err(CimError::TooLarge {
                action: format!("writing {} as CIM-XML", instance.class),
                limit_bytes: MAX_XML_BYTES as u64,
            });
        }
    }
    out.push_str("</INSTANCE>");
    Ok(())
}

fn write_property(out: &mut String, name: &str, value: &CimValue) -> Result<()> {
    let Some(kind) = value.cim_type() else {
        return Ok(());
    };
    let list = matches!(value, CimValue::Array(..));
    let (element, inner) = match (kind, list) {
        (CimType::Reference, false) => ("PROPERTY.REFERENCE", None),
        (CimType::Reference, true) => ("PROPERTY.REFARRAY", Some("VALUE.REFARRAY")),
        (CimType::Instance, false) => ("PROPERTY.OBJECT", None),
        (CimType::Instance, true) => ("PROPERTY.OBJECTARRAY", Some("VALUE.OBJECTARRAY")),
        (_, false) => ("PROPERTY", None),
        (_, true) => ("PROPERTY.ARRAY", Some("VALUE.ARRAY")),
    };
    out.push('<');
    out.push_str(element);
    out.push_str(" NAME=\"");
    escape(out, name)?;
    out.push('"');
    if !matches!(kind, CimType::Reference | CimType::Instance) {
        out.push_str(" TYPE=\"");
        out.push_str(kind.as_str());
        out.push('"');
    }
    out.push('>');
    if let Some(inner) = inner {
        out.push_str(&format!("<{inner}>"));
    }
    for item in value.elements() {
        if matches!(item, CimValue::Array(..)) || item.cim_type().is_some_and(|other| other != kind)
        {
            return Err(bad(format!("the array {name} is not of one type")));
        }
        write_value(out, item)?;
    }
    if let Some(inner) = inner {
        out.push_str(&format!("</{inner}>"));
    }
    out.push_str("</");
    out.push_str(element);
    out.push('>');
    Ok(())
}

fn write_value(out: &mut String, value: &CimValue) -> Result<()> {
    match value {
        CimValue::Null => out.push_str("<VALUE.NULL/>"),
        CimValue::Reference(path) => write_reference(out, path)?,
        CimValue::Instance(inner) => {
            out.push_str("<VALUE.OBJECT>");
            write_instance(out, inner)?;
            out.push_str("</VALUE.OBJECT>");
        }
        scalar => {
            out.push_str("<VALUE>");
            escape(out, &scalar.to_text().unwrap_or_default())?;
            out.push_str("</VALUE>");
        }
    }
    Ok(())
}

fn write_reference(out: &mut String, path: &ObjectPath) -> Result<()> {
    out.push_str("<VALUE.REFERENCE>");
    let around = match (&path.host, path.namespace.is_empty()) {
        (_, true) => None,
        (Some(_), false) => Some("INSTANCEPATH"),
        (None, false) => Some("LOCALINSTANCEPATH"),
    };
    if let Some(around) = around {
        out.push_str(&format!("<{around}>"));
        if let Some(host) = &path.host {
            out.push_str("<NAMESPACEPATH><HOST>");
            escape(out, host)?;
            out.push_str("</HOST>");
        }
        out.push_str("<LOCALNAMESPACEPATH>");
        for part in path.namespace.split(['\\', '/']) {
            out.push_str("<NAMESPACE NAME=\"");
            escape(out, part)?;
            out.push_str("\"/>");
        }
        out.push_str("</LOCALNAMESPACEPATH>");
        if path.host.is_some() {
            out.push_str("</NAMESPACEPATH>");
        }
    }
    out.push_str("<INSTANCENAME CLASSNAME=\"");
    escape(out, &path.class)?;
    out.push_str("\">");
    for (name, value) in &path.keys {
        out.push_str("<KEYBINDING NAME=\"");
        escape(out, name)?;
        out.push_str("\"><KEYVALUE VALUETYPE=\"string\">");
        escape(out, value)?;
        out.push_str("</KEYVALUE></KEYBINDING>");
    }
    out.push_str("</INSTANCENAME>");
    if let Some(around) = around {
        out.push_str(&format!("</{around}>"));
    }
    out.push_str("</VALUE.REFERENCE>");
    Ok(())
}

/// Text as it may stand in an element or a quoted attribute. Tabs and ends of lines are written as
/// references: those that stand there themselves a reader may make blanks or line feeds of.
fn escape(out: &mut String, text: &str) -> Result<()> {
    for character in text.chars() {
        match character {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            '\t' => out.push_str("&#9;"),
            '\n' => out.push_str("&#10;"),
            '\r' => out.push_str("&#13;"),
            '\0'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => {
                return Err(bad(format!("{character:?} cannot stand in XML")));
            }
            other => out.push(other),
        }
    }
    Ok(())
}
