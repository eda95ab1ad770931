//! Typed values.

use crate::{CimInstance, ObjectPath};
use serde::{Deserialize, Serialize};

/// A value of a property or parameter.
///
/// Over WS-Management every scalar arrives as [`String`](Self::String) and an array of one element looks
/// like its element; [`CimInstance`]'s accessors take both. What is sent carries its true type.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CimValue {
    /// No value.
    Null,
    /// `boolean`.
    Boolean(bool),
    /// `uint8`.
    Uint8(u8),
    /// `uint16`.
    Uint16(u16),
    /// `uint32`.
    Uint32(u32),
    /// `uint64`.
    Uint64(u64),
    /// `sint8`.
    Sint8(i8),
    /// `sint16`.
    Sint16(i16),
    /// `sint32`.
    Sint32(i32),
    /// `sint64`.
    Sint64(i64),
    /// `real32`.
    Real32(f32),
    /// `real64`.
    Real64(f64),
    /// `string`; an embedded instance as a parameter is a string that holds CIM-XML.
    String(String),
    /// `datetime` in the form of DSP0004, 25 characters.
    DateTime(String),
    /// A reference to an object.
    Reference(ObjectPath),
    /// An instance within an instance, as some transports deliver it.
    Instance(Box<CimInstance>),
    /// An array of one type; the elements are of that type and never arrays.
    Array(CimType, Vec<CimValue>),
}

/// The types of CIM (DSP0004 §5.1.5), by their names in CIM-XML.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CimType {
    /// `boolean`.
    Boolean,
    /// `uint8`.
    Uint8,
    /// `uint16`.
    Uint16,
    /// `uint32`.
    Uint32,
    /// `uint64`.
    Uint64,
    /// `sint8`.
    Sint8,
    /// `sint16`.
    Sint16,
    /// `sint32`.
    Sint32,
    /// `sint64`.
    Sint64,
    /// `real32`.
    Real32,
    /// `real64`.
    Real64,
    /// `string`.
    String,
    /// `datetime`.
    DateTime,
    /// A reference.
    Reference,
    /// An embedded instance.
    Instance,
}

impl CimType {
    /// All that CIM-XML names in `TYPE=`.
    const NAMED: [(Self, &'static str); 15] = [
        (Self::Boolean, "boolean"),
        (Self::Uint8, "uint8"),
        (Self::Uint16, "uint16"),
        (Self::Uint32, "uint32"),
        (Self::Uint64, "uint64"),
        (Self::Sint8, "sint8"),
        (Self::Sint16, "sint16"),
        (Self::Sint32, "sint32"),
        (Self::Sint64, "sint64"),
        (Self::Real32, "real32"),
        (Self::Real64, "real64"),
        (Self::String, "string"),
        (Self::DateTime, "datetime"),
        (Self::Reference, "reference"),
        (Self::Instance, "instance"),
    ];

    /// The name in CIM-XML.
    pub fn as_str(self) -> &'static str {
        Self::NAMED.iter().find(|(kind, _)| *kind == self).map_or("string", |(_, name)| name)
    }

    /// The type of that name; none for one that CIM does not have.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::NAMED.iter().find(|(_, known)| *known == name).map(|(kind, _)| *kind)
    }
}

impl CimValue {
    /// An array of strings.
    pub fn strings<S: Into<String>>(items: impl IntoIterator<Item = S>) -> Self {
        Self::Array(
            CimType::String,
            items.into_iter().map(|item| Self::String(item.into())).collect(),
        )
    }

    /// The type; none for [`Null`](Self::Null). An array has that of its elements.
    pub fn cim_type(&self) -> Option<CimType> {
        Some(match self {
            Self::Null => return None,
            Self::Boolean(_) => CimType::Boolean,
            Self::Uint8(_) => CimType::Uint8,
            Self::Uint16(_) => CimType::Uint16,
            Self::Uint32(_) => CimType::Uint32,
            Self::Uint64(_) => CimType::Uint64,
            Self::Sint8(_) => CimType::Sint8,
            Self::Sint16(_) => CimType::Sint16,
            Self::Sint32(_) => CimType::Sint32,
            Self::Sint64(_) => CimType::Sint64,
            Self::Real32(_) => CimType::Real32,
            Self::Real64(_) => CimType::Real64,
            Self::String(_) => CimType::String,
            Self::DateTime(_) => CimType::DateTime,
            Self::Reference(_) => CimType::Reference,
            Self::Instance(_) => CimType::Instance,
            Self::Array(kind, _) => *kind,
        })
    }

    /// The elements: of an array its own, of a scalar the one, of nothing none.
    pub fn elements(&self) -> &[Self] {
        match self {
            Self::Null => &[],
            Self::Array(_, items) => items,
            scalar => std::slice::from_ref(scalar),
        }
    }

    /// A scalar of that type from its text, as CIM-XML writes it. Numbers, truths and times may have blanks
    /// around them. None where the text is not of the type, and for references and instances.
    pub fn from_text(kind: CimType, text: &str) -> Option<Self> {
        let trimmed = text.trim();
        Some(match kind {
            CimType::String => Self::String(text.to_owned()),
            CimType::DateTime => {
                Self::DateTime(of_iso(trimmed).unwrap_or_else(|| trimmed.to_owned()))
            }
            CimType::Boolean => Self::Boolean(Self::String(trimmed.to_owned()).as_bool()?),
            CimType::Uint8 => Self::Uint8(trimmed.parse().ok()?),
            CimType::Uint16 => Self::Uint16(trimmed.parse().ok()?),
            CimType::Uint32 => Self::Uint32(trimmed.parse().ok()?),
            CimType::Uint64 => Self::Uint64(trimmed.parse().ok()?),
            CimType::Sint8 => Self::Sint8(trimmed.parse().ok()?),
            CimType::Sint16 => Self::Sint16(trimmed.parse().ok()?),
            CimType::Sint32 => Self::Sint32(trimmed.parse().ok()?),
            CimType::Sint64 => Self::Sint64(trimmed.parse().ok()?),
            CimType::Real32 => Self::Real32(trimmed.parse().ok().filter(|n: &f32| n.is_finite())?),
            CimType::Real64 => Self::Real64(trimmed.parse().ok().filter(|n: &f64| n.is_finite())?),
            CimType::Reference | CimType::Instance => return None,
        })
    }

    /// The text of a scalar, which [`from_text`](Self::from_text) reads again; none for what has none.
    pub fn to_text(&self) -> Option<String> {
        Some(match self {
            Self::Boolean(true) => "TRUE".into(),
            Self::Boolean(false) => "FALSE".into(),
            Self::Uint8(number) => number.to_string(),
            Self::Uint16(number) => number.to_string(),
            Self::Uint32(number) => number.to_string(),
            Self::Uint64(number) => number.to_string(),
            Self::Sint8(number) => number.to_string(),
            Self::Sint16(number) => number.to_string(),
            Self::Sint32(number) => number.to_string(),
            Self::Sint64(number) => number.to_string(),
            Self::Real32(number) => format!("{number:e}"),
            Self::Real64(number) => format!("{number:e}"),
            Self::String(text) | Self::DateTime(text) => text.clone(),
            Self::Null | Self::Reference(_) | Self::Instance(_) | Self::Array(..) => return None,
        })
    }

    /// A whole number from 0, also from decimal text; none for anything else.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Uint8(value) => Some((*value).into()),
            Self::Uint16(value) => Some((*value).into()),
            Self::Uint32(value) => Some((*value).into()),
            Self::Uint64(value) => Some(*value),
            Self::Sint8(value) => u64::try_from(*value).ok(),
            Self::Sint16(value) => u64::try_from(*value).ok(),
            Self::Sint32(value) => u64::try_from(*value).ok(),
            Self::Sint64(value) => u64::try_from(*value).ok(),
            Self::String(text) => text.trim().parse().ok(),
            _ => None,
        }
    }

    /// A truth, also from `true` or `FALSE`; none for anything else.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Boolean(value) => Some(*value),
            Self::String(text) if text.trim().eq_ignore_ascii_case("true") => Some(true),
            Self::String(text) if text.trim().eq_ignore_ascii_case("false") => Some(false),
            _ => None,
        }
    }

    /// Text of a string or datetime; none for anything else.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(text) | Self::DateTime(text) => Some(text),
            _ => None,
        }
    }

    /// A reference, also one written as the text of an object path.
    pub fn as_reference(&self) -> Option<ObjectPath> {
        match self {
            Self::Reference(path) => Some(path.clone()),
            Self::String(text) => text.parse().ok(),
            _ => None,
        }
    }
}

/// A moment in UTC as WS-Management writes it, `2026-11-21T15:01:08.25Z`, in the form of DSP0004,
/// `20261121150108.250000+000`; none for anything else.
fn of_iso(text: &str) -> Option<String> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let (time, fraction) = time.split_once('.').unwrap_or((time, ""));
    let digits = |text: &str, parts: &[usize], separator: char| {
        let found: Vec<&str> = text.split(separator).collect();
        let fits = found.len() == parts.len()
            && found.iter().zip(parts).all(|(part, length)| {
                part.len() == *length && part.bytes().all(|byte| byte.is_ascii_digit())
            });
        fits.then(|| found.concat())
    };
    let (date, time) = (digits(date, &[4, 2, 2], '-')?, digits(time, &[2, 2, 2], ':')?);
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    // DSP0004 has microseconds; what is finer is cut.
    let fraction: String = fraction.chars().chain("000000".chars()).take(6).collect();
    Some(format!("{date}{time}.{fraction}+000"))
}

impl From<&str> for CimValue {
    fn from(text: &str) -> Self {
        Self::String(text.into())
    }
}

impl From<String> for CimValue {
    fn from(text: String) -> Self {
        Self::String(text)
    }
}

impl From<bool> for CimValue {
    fn from(value: bool) -> Self {
        Self::Boolean(value)
    }
}

impl From<&ObjectPath> for CimValue {
    fn from(path: &ObjectPath) -> Self {
        Self::Reference(path.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_of_ws_management_are_those_of_cim() {
        let read = |text: &str| CimValue::from_text(CimType::DateTime, text);
        let is = |text: &str| Some(CimValue::DateTime(text.to_owned()));
        assert_eq!(read("2026-11-21T15:01:08Z"), is("20261121150108.000000+000"));
        assert_eq!(read("2026-11-21T15:01:08.2534567Z"), is("20261121150108.253456+000"));
        for other in
            ["20261121150108.000000+060", "2026-11-21T15:01:08+01:00", "2026-1-21T15:01:08Z"]
        {
            assert_eq!(read(other), is(other));
        }
    }
}
