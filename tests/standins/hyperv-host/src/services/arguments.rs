//! The parameters of a call, held to the documented names, order and types.

use crate::schema::{Class, Method, Parameter, Schema};
use uuid::Uuid;
use vmtide_cim::{CimError, CimInstance, CimType, CimValue, ObjectPath};

/// `WBEM_E_INVALID_METHOD`.
const INVALID_METHOD: u32 = 0x8004_102E;
/// `WBEM_E_INVALID_METHOD_PARAMETERS`.
const INVALID_METHOD_PARAMETERS: u32 = 0x8004_102F;

/// Parameters that were checked.
#[derive(Clone, Debug)]
pub(crate) struct Arguments {
    values: Vec<(String, CimValue)>,
}

/// The method of that exact name, and its parameters checked.
pub(crate) fn check(
    class: &'static Class,
    method: &str,
    parameters: &[(&str, CimValue)],
) -> Result<(&'static Method, Arguments), CimError> {
    let fault = |detail: String, code: u32| CimError::Fault {
        action: format!("{}.{method}", class.name),
        detail,
        code: Some(code),
    };
    let known = class
        .method(method)
        .ok_or_else(|| fault(format!("{} has no method {method}", class.name), INVALID_METHOD))?;
    let wrong = |detail: String| fault(detail, INVALID_METHOD_PARAMETERS);
    let mut declared = known.parameters.iter().filter(|parameter| parameter.is_input);
    let mut values = Vec::new();
    for (name, value) in parameters {
        let input = known.parameters.iter().find(|p| p.is_input && p.name == *name);
        let input = input.ok_or_else(|| wrong(format!("there is no parameter {name}")))?;
        loop {
            let next = declared.next().ok_or_else(|| {
                wrong(format!("{name} stands behind parameters that follow it, or twice"))
            })?;
            if next.name == *name {
                break;
            }
            if !next.is_optional {
                return Err(wrong(format!("{} is missing before {name}", next.name)));
            }
        }
        check_value(input, value).map_err(wrong)?;
        values.push(((*name).to_owned(), value.clone()));
    }
    if let Some(missing) = declared.find(|parameter| !parameter.is_optional) {
        return Err(wrong(format!("{} is missing", missing.name)));
    }
    Ok((known, Arguments { values }))
}

fn check_value(parameter: &Parameter, value: &CimValue) -> Result<(), String> {
    let name = parameter.name;
    if *value == CimValue::Null {
        return if parameter.is_optional { Ok(()) } else { Err(format!("{name} is null")) };
    }
    let is_array = matches!(value, CimValue::Array(..));
    if is_array != parameter.is_array {
        return Err(format!("{name} is {}an array", if is_array { "not " } else { "" }));
    }
    if value.cim_type() != Some(parameter.kind) {
        return Err(format!("{name} is {}, not {:?}", parameter.kind.as_str(), value.cim_type()));
    }
    for element in value.elements() {
        let kind = element.cim_type();
        if kind != Some(parameter.kind) {
            return Err(format!("an element of {name} is {kind:?}"));
        }
        if let (CimType::Reference, Some(class)) = (parameter.kind, parameter.class) {
            let path = element.as_reference().ok_or_else(|| format!("{name} is no path"))?;
            let found = Schema::get().class(&path.class);
            let found = found.ok_or_else(|| format!("{name}: unknown class {}", path.class))?;
            if !Schema::get().is_a(found.name, class) {
                return Err(format!("{name} leads to {}, not to {class}", path.class));
            }
            if !found.is_path(&path) {
                return Err(format!("{name}: {path} has not the keys of its class"));
            }
        }
    }
    Ok(())
}

impl Arguments {
    /// A parameter; none where it was left out or null.
    pub(crate) fn value(&self, name: &str) -> Option<&CimValue> {
        let found = self.values.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value).filter(|value| **value != CimValue::Null)
    }

    /// A text; empty where it was left out.
    pub(crate) fn text(&self, name: &str) -> &str {
        self.value(name).and_then(CimValue::as_str).unwrap_or_default()
    }

    /// A number; 0 where it was left out.
    pub(crate) fn number(&self, name: &str) -> u64 {
        self.value(name).and_then(CimValue::as_u64).unwrap_or_default()
    }

    /// A truth; false where it was left out.
    pub(crate) fn truth(&self, name: &str) -> bool {
        self.value(name).and_then(CimValue::as_bool).unwrap_or_default()
    }

    /// A reference.
    pub(crate) fn reference(&self, name: &str) -> Option<ObjectPath> {
        self.value(name)?.as_reference()
    }

    /// The references of an array.
    pub(crate) fn references(&self, name: &str) -> Vec<ObjectPath> {
        let elements = self.value(name).map_or(&[][..], CimValue::elements);
        elements.iter().filter_map(CimValue::as_reference).collect()
    }

    /// The VM that a reference means.
    pub(crate) fn vm(&self, name: &str) -> Option<Uuid> {
        self.reference(name)?.key("Name")?.parse().ok()
    }

    /// The VM or checkpoint whose settings a reference means.
    pub(crate) fn settings(&self, name: &str) -> Option<Uuid> {
        id_of(self.reference(name)?.key("InstanceID")?)
    }

    /// An instance within a text: none where the text is empty, an error where it is not as the schema says
    /// or of another class.
    pub(crate) fn embedded(&self, name: &str, class: &str) -> Result<Option<CimInstance>, String> {
        match self.text(name) {
            "" => Ok(None),
            text => embedded(text, class).map(Some),
        }
    }

    /// The instances within an array of texts.
    pub(crate) fn all_embedded(&self, name: &str, class: &str) -> Result<Vec<CimInstance>, String> {
        let elements = self.value(name).map_or(&[][..], CimValue::elements);
        let texts = elements.iter().filter_map(CimValue::as_str);
        texts.map(|text| embedded(text, class)).collect()
    }
}

fn embedded(text: &str, class: &str) -> Result<CimInstance, String> {
    let instance = crate::embedded::read(text)?;
    if Schema::get().is_a(&instance.class, class) {
        Ok(instance)
    } else {
        Err(format!("an instance of {} is passed, not of {class}", instance.class))
    }
}

/// The GUID of `Microsoft:GUID`.
pub(crate) fn id_of(instance_id: &str) -> Option<Uuid> {
    instance_id.strip_prefix("Microsoft:")?.parse().ok()
}
