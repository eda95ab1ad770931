//! Instances and the checked reading of their properties.

use crate::{CimError, CimValue, ObjectPath, Result};
use serde::{Deserialize, Serialize};

/// An instance of a class: its properties in the order they came, names without regard to case.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CimInstance {
    /// The class, e.g. `Msvm_ComputerSystem`; empty for the out parameters of a method.
    pub class: String,
    /// Where it lives; none where it is a value only, or the transport cannot tell.
    pub path: Option<ObjectPath>,
    /// The properties.
    pub properties: Vec<(String, CimValue)>,
}

impl CimInstance {
    /// An instance without properties yet.
    pub fn new(class: impl Into<String>) -> Self {
        Self { class: class.into(), ..Self::default() }
    }

    /// The instance with one more property.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<CimValue>) -> Self {
        self.set(name, value);
        self
    }

    /// Sets a property, in its place where it has one.
    pub fn set(&mut self, name: &str, value: impl Into<CimValue>) {
        let value = value.into();
        match self.properties.iter_mut().find(|(known, _)| known.eq_ignore_ascii_case(name)) {
            Some((_, old)) => *old = value,
            None => self.properties.push((name.into(), value)),
        }
    }

    /// A property; none where it is missing or null.
    pub fn value(&self, name: &str) -> Option<&CimValue> {
        let found = self.properties.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value).filter(|value| **value != CimValue::Null)
    }

    /// Text that must be there.
    ///
    /// # Errors
    /// [`CimError::Protocol`] where it is missing or no text.
    pub fn text(&self, name: &str) -> Result<&str> {
        self.optional_text(name)?.ok_or_else(|| self.missing(name))
    }

    /// Text that may be missing.
    ///
    /// # Errors
    /// [`CimError::Protocol`] where it is there and no text.
    pub fn optional_text(&self, name: &str) -> Result<Option<&str>> {
        self.scalar(name)?
            .map(|value| value.as_str().ok_or_else(|| self.wrong(name, "text")))
            .transpose()
    }

    /// A whole number that must be there and fit.
    ///
    /// # Errors
    /// [`CimError::Protocol`] where it is missing, no number, or too large.
    pub fn number<N: TryFrom<u64>>(&self, name: &str) -> Result<N> {
        self.optional_number(name)?.ok_or_else(|| self.missing(name))
    }

    /// A whole number that may be missing.
    ///
    /// # Errors
    /// [`CimError::Protocol`] where it is there and no number, or too large.
    pub fn optional_number<N: TryFrom<u64>>(&self, name: &str) -> Result<Option<N>> {
        let wrong = || self.wrong(name, "a whole number in range");
        self.scalar(name)?
            .map(|value| {
                value.as_u64().and_then(|number| N::try_from(number).ok()).ok_or_else(wrong)
            })
            .transpose()
    }

    /// A truth that may be missing.
    ///
    /// # Errors
    /// [`CimError::Protocol`] where it is there and neither true nor false.
    pub fn optional_bool(&self, name: &str) -> Result<Option<bool>> {
        self.scalar(name)?
            .map(|value| value.as_bool().ok_or_else(|| self.wrong(name, "true or false")))
            .transpose()
    }

    /// The texts of an array; empty where it is missing.
    ///
    /// # Errors
    /// [`CimError::Protocol`] where an element is no text.
    pub fn texts(&self, name: &str) -> Result<Vec<&str>> {
        let elements = self.value(name).map_or(&[][..], CimValue::elements);
        elements
            .iter()
            .map(|value| value.as_str().ok_or_else(|| self.wrong(name, "texts")))
            .collect()
    }

    /// The numbers of an array; empty where it is missing.
    ///
    /// # Errors
    /// [`CimError::Protocol`] where an element is no number.
    pub fn numbers(&self, name: &str) -> Result<Vec<u64>> {
        let elements = self.value(name).map_or(&[][..], CimValue::elements);
        elements
            .iter()
            .map(|value| value.as_u64().ok_or_else(|| self.wrong(name, "whole numbers")))
            .collect()
    }

    /// A reference that may be missing.
    ///
    /// # Errors
    /// [`CimError::Protocol`] where it is there and no object path.
    pub fn optional_reference(&self, name: &str) -> Result<Option<ObjectPath>> {
        match self.scalar(name)? {
            // An out parameter that has no object is also answered as empty text.
            Some(CimValue::String(text)) if text.is_empty() => Ok(None),
            Some(value) => {
                value.as_reference().map(Some).ok_or_else(|| self.wrong(name, "an object path"))
            }
            None => Ok(None),
        }
    }

    fn scalar(&self, name: &str) -> Result<Option<&CimValue>> {
        match self.value(name) {
            Some(CimValue::Array(_, items)) => match items.as_slice() {
                [] => Ok(None),
                [one] => Ok(Some(one)),
                _ => Err(self.wrong(name, "one value")),
            },
            other => Ok(other),
        }
    }

    fn missing(&self, name: &str) -> CimError {
        CimError::protocol(self.name(), format!("the property {name} is missing"))
    }

    fn wrong(&self, name: &str, wanted: &str) -> CimError {
        CimError::protocol(self.name(), format!("the property {name} is not {wanted}"))
    }

    fn name(&self) -> &str {
        if self.class.is_empty() { "the answer of a method" } else { &self.class }
    }
}
