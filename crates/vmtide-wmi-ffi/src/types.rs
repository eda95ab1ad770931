//! From what COM gives to typed values, and back.
//!
//! A `VARIANT` has fewer types than CIM: `uint16` and `uint32` come as signed 32-bit integers with the same bits,
//! `sint8` as 16 bits, 64-bit integers as decimal text, references and times as text ("Numbers" in the documentation
//! of WMI). Which one is meant is told by the type in the schema.

use vmtide_cim::{CimError, CimInstance, CimType, CimValue, ObjectPath, Result};

/// Bit of the types of CIM in COM that says array (`CIM_FLAG_ARRAY`).
pub const ARRAY: i32 = 0x2000;

/// The most elements of one array: lists of changed ranges are the longest, some hundred thousand.
pub const MAX_ELEMENTS: usize = 4 << 20;

/// `CIMTYPE_ENUMERATION` of `wbemcli.h`. `char16` is a number here: Hyper-V has none.
const TYPES: &[(i32, CimType)] = &[
    (16, CimType::Sint8),
    (17, CimType::Uint8),
    (2, CimType::Sint16),
    (18, CimType::Uint16),
    (103, CimType::Uint16),
    (3, CimType::Sint32),
    (19, CimType::Uint32),
    (20, CimType::Sint64),
    (21, CimType::Uint64),
    (4, CimType::Real32),
    (5, CimType::Real64),
    (11, CimType::Boolean),
    (8, CimType::String),
    (101, CimType::DateTime),
    (102, CimType::Reference),
    (13, CimType::Instance),
];

/// What a `VARIANT` holds, without regard to how many bits it uses for it.
#[derive(Clone, Debug, PartialEq)]
pub enum Raw {
    /// `VT_NULL` and `VT_EMPTY`.
    Null,
    /// Any whole number; its bits where it is a signed one in place of an unsigned.
    Integer(i64),
    /// A whole number of 64 bits without a sign.
    Unsigned(u64),
    /// `VT_R4` and `VT_R8`.
    Real(f64),
    /// `VT_BOOL`.
    Boolean(bool),
    /// `VT_BSTR`.
    Text(String),
    /// `VT_UNKNOWN` that is an object of management.
    Object(Box<CimInstance>),
    /// `VT_ARRAY`.
    Array(Vec<Raw>),
}

/// How a value is handed to COM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `VT_I2`.
    I2,
    /// `VT_I4`.
    I4,
    /// `VT_UI1`.
    Ui1,
    /// `VT_R4`.
    R4,
    /// `VT_R8`.
    R8,
    /// `VT_BOOL`.
    Bool,
    /// `VT_BSTR`.
    Bstr,
}

/// The value of a property of the type `cim_type`.
///
/// # Errors
/// [`CimError::Protocol`] where the two do not go together.
pub fn typed(name: &str, cim_type: i32, raw: Raw) -> Result<CimValue> {
    let wrong = || {
        CimError::protocol(format!("the property {name}"), format!("is not of its type {cim_type}"))
    };
    let bare = cim_type & !ARRAY;
    let kind = TYPES.iter().find(|(number, _)| *number == bare).map(|(_, kind)| *kind);
    let kind = kind.ok_or_else(wrong)?;
    match raw {
        Raw::Null => Ok(CimValue::Null),
        Raw::Array(items) if items.len() <= MAX_ELEMENTS => {
            // One that is nothing, of one odd object, must not keep all others of an answer from being read.
            let element = |item: Raw| match item {
                Raw::Null => Ok(CimValue::Null),
                item => scalar(kind, item).ok_or_else(wrong),
            };
            Ok(CimValue::Array(kind, items.into_iter().map(element).collect::<Result<_>>()?))
        }
        raw => scalar(kind, raw).ok_or_else(wrong),
    }
}

fn scalar(kind: CimType, raw: Raw) -> Option<CimValue> {
    Some(match (kind, raw) {
        (CimType::Real32, raw) => CimValue::Real32(narrowed(real(&raw)?)),
        (CimType::Real64, raw) => CimValue::Real64(real(&raw)?),
        (CimType::Boolean, Raw::Boolean(value)) => CimValue::Boolean(value),
        (CimType::Boolean, raw) => CimValue::Boolean(number(&raw)? != 0),
        (CimType::String, Raw::Text(text)) => CimValue::String(text),
        // Embedded instances of properties that are declared as text.
        (CimType::String | CimType::Instance, Raw::Object(instance)) => {
            CimValue::Instance(instance)
        }
        (CimType::DateTime, Raw::Text(text)) => CimValue::DateTime(text),
        (CimType::Reference, Raw::Text(text)) => match text.parse::<ObjectPath>() {
            Ok(path) => CimValue::Reference(path),
            // Whoever reads it as a reference is told that it is none.
            Err(_) => CimValue::String(text),
        },
        (kind, raw) => integer(kind, &raw)?,
    })
}

#[allow(clippy::cast_possible_truncation, reason = "a real32 that COM widened has its bits")]
fn narrowed(value: f64) -> f32 {
    value as f32
}

fn real(raw: &Raw) -> Option<f64> {
    match raw {
        Raw::Real(value) => Some(*value),
        Raw::Text(text) => text.trim().parse().ok(),
        _ => None,
    }
}

/// A whole number with its sign, of whatever was given.
fn number(raw: &Raw) -> Option<i128> {
    match raw {
        Raw::Integer(value) => Some((*value).into()),
        Raw::Unsigned(value) => Some((*value).into()),
        Raw::Boolean(value) => Some((*value).into()),
        Raw::Text(text) => text.trim().parse().ok(),
        _ => None,
    }
}

/// A whole number of `kind`; a negative one in place of an unsigned one stands for its bits.
fn integer(kind: CimType, raw: &Raw) -> Option<CimValue> {
    let value = number(raw)?;
    let unsigned = |bits: u32| match value {
        0.. => Some(value),
        _ => Some(value + (1_i128 << bits)).filter(|value| *value >= 0),
    };
    Some(match kind {
        CimType::Uint8 => CimValue::Uint8(unsigned(8)?.try_into().ok()?),
        CimType::Uint16 => {
            // Carried by 32 bits, or by 16.
            let of_16 = |value: i128| u16::try_from(value).ok();
            CimValue::Uint16(of_16(unsigned(16)?)?)
        }
        CimType::Uint32 => CimValue::Uint32(unsigned(32)?.try_into().ok()?),
        CimType::Uint64 => CimValue::Uint64(unsigned(64)?.try_into().ok()?),
        CimType::Sint8 => CimValue::Sint8(value.try_into().ok()?),
        CimType::Sint16 => CimValue::Sint16(value.try_into().ok()?),
        CimType::Sint32 => CimValue::Sint32(value.try_into().ok()?),
        CimType::Sint64 => CimValue::Sint64(value.try_into().ok()?),
        _ => return None,
    })
}

/// The form and content by which a value is handed over. An array has the form of its elements.
///
/// # Errors
/// [`CimError::Protocol`] for what cannot be a parameter: an instance, which is handed over as text.
pub fn encoded(name: &str, value: &CimValue) -> Result<(Form, Raw)> {
    let instance = || {
        CimError::protocol(
            format!("the parameter {name}"),
            "an instance is handed over as CIM-XML text",
        )
    };
    Ok(match value {
        CimValue::Null => (Form::Bstr, Raw::Null),
        CimValue::Boolean(value) => (Form::Bool, Raw::Boolean(*value)),
        CimValue::Uint8(value) => (Form::Ui1, Raw::Integer((*value).into())),
        CimValue::Uint16(value) => (Form::I4, Raw::Integer((*value).into())),
        CimValue::Uint32(value) => (Form::I4, Raw::Integer(value.cast_signed().into())),
        CimValue::Uint64(value) => (Form::Bstr, Raw::Text(value.to_string())),
        CimValue::Sint8(value) => (Form::I2, Raw::Integer((*value).into())),
        CimValue::Sint16(value) => (Form::I2, Raw::Integer((*value).into())),
        CimValue::Sint32(value) => (Form::I4, Raw::Integer((*value).into())),
        CimValue::Sint64(value) => (Form::Bstr, Raw::Text(value.to_string())),
        CimValue::Real32(value) => (Form::R4, Raw::Real((*value).into())),
        CimValue::Real64(value) => (Form::R8, Raw::Real(*value)),
        CimValue::String(text) | CimValue::DateTime(text) => (Form::Bstr, Raw::Text(text.clone())),
        CimValue::Reference(path) => (Form::Bstr, Raw::Text(path.to_string())),
        CimValue::Instance(_) => return Err(instance()),
        CimValue::Array(kind, items) => {
            let form = match kind {
                CimType::Boolean => Form::Bool,
                CimType::Uint8 => Form::Ui1,
                CimType::Uint16 | CimType::Uint32 | CimType::Sint32 => Form::I4,
                CimType::Sint8 | CimType::Sint16 => Form::I2,
                CimType::Real32 => Form::R4,
                CimType::Real64 => Form::R8,
                CimType::Instance => return Err(instance()),
                _ => Form::Bstr,
            };
            let mut raw = Vec::with_capacity(items.len().min(MAX_ELEMENTS));
            for item in items {
                if matches!(item, CimValue::Array(..)) || item.cim_type() != Some(*kind) {
                    let detail = "an array has elements of its one type";
                    return Err(CimError::protocol(format!("the parameter {name}"), detail));
                }
                raw.push(encoded(name, item)?.1);
            }
            (form, Raw::Array(raw))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_com_carries_in_fewer_types_is_what_the_schema_says() {
        for (cim_type, raw, expected) in [
            (18, Raw::Integer(32768), CimValue::Uint16(32768)),
            (18, Raw::Integer(-32768), CimValue::Uint16(32768)),
            (19, Raw::Integer(-1), CimValue::Uint32(u32::MAX)),
            (17, Raw::Integer(255), CimValue::Uint8(255)),
            (21, Raw::Text("18446744073709551615".into()), CimValue::Uint64(u64::MAX)),
            (21, Raw::Unsigned(u64::MAX), CimValue::Uint64(u64::MAX)),
            (21, Raw::Integer(-1), CimValue::Uint64(u64::MAX)),
            (20, Raw::Text("-5".into()), CimValue::Sint64(-5)),
            (16, Raw::Integer(-5), CimValue::Sint8(-5)),
            (11, Raw::Boolean(true), CimValue::Boolean(true)),
            (5, Raw::Real(0.5), CimValue::Real64(0.5)),
            (8, Raw::Text("x".into()), CimValue::String("x".into())),
            (101, Raw::Text("2".into()), CimValue::DateTime("2".into())),
            (8, Raw::Null, CimValue::Null),
        ] {
            assert_eq!(typed("P", cim_type, raw.clone()).unwrap(), expected, "{cim_type} {raw:?}");
        }
        let path = ObjectPath::new("C", &[("K", "v")]);
        assert_eq!(
            typed("P", 102, Raw::Text(path.to_string())).unwrap(),
            CimValue::Reference(path)
        );
        let strings = Raw::Array(vec![Raw::Text("a".into()), Raw::Text("b".into())]);
        assert_eq!(typed("P", 8 | ARRAY, strings).unwrap(), CimValue::strings(["a", "b"]));
        let holes = Raw::Array(vec![Raw::Null, Raw::Text("a".into())]);
        let expected = CimValue::Array(CimType::String, vec![CimValue::Null, "a".into()]);
        assert_eq!(typed("P", 8 | ARRAY, holes).unwrap(), expected);
        for (cim_type, raw) in [
            (17, Raw::Integer(256)),
            (17, Raw::Integer(-300)),
            (18, Raw::Integer(65536)),
            (16, Raw::Integer(200)),
            (21, Raw::Text("x".into())),
            (8, Raw::Integer(1)),
            (4095, Raw::Integer(1)),
            (8 | ARRAY, Raw::Array(vec![Raw::Null, Raw::Integer(1)])),
            (18 | ARRAY, Raw::Array(vec![Raw::Array(Vec::new())])),
        ] {
            assert!(typed("P", cim_type, raw.clone()).is_err(), "{cim_type} {raw:?}");
        }
    }

    #[test]
    fn parameters_survive_the_way_through_com() {
        for (cim_type, value) in [
            (18, CimValue::Uint16(32768)),
            (19, CimValue::Uint32(u32::MAX)),
            (21, CimValue::Uint64(u64::MAX)),
            (20, CimValue::Sint64(i64::MIN)),
            (16, CimValue::Sint8(-1)),
            (17, CimValue::Uint8(255)),
            (11, CimValue::Boolean(false)),
            (4, CimValue::Real32(0.25)),
            (102, CimValue::Reference(ObjectPath::new("C", &[("K", r#"a\"b"#)]))),
            (8 | ARRAY, CimValue::strings(["<INSTANCE/>"])),
            (18 | ARRAY, CimValue::Array(CimType::Uint16, vec![CimValue::Uint16(65535)])),
        ] {
            let (_, raw) = encoded("P", &value).unwrap();
            assert_eq!(typed("P", cim_type, raw).unwrap(), value);
        }
        assert!(encoded("P", &CimValue::Instance(Box::default())).is_err());
        let mixed = CimValue::Array(CimType::Uint8, vec![CimValue::from("x")]);
        assert!(encoded("P", &mixed).is_err());
    }
}
