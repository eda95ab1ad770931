//! Objects of management (`IWbemClassObject`) as instances, and their parameters.

use crate::error;
use crate::types::{self, Raw};
use crate::variant;
use vmtide_cim::{CimError, CimInstance, CimValue, ObjectPath, Result};
use windows::Win32::System::Variant::VARIANT;
use windows::Win32::System::Wmi::{IWbemClassObject, WBEM_FLAG_NONSYSTEM_ONLY};
use windows::core::{BSTR, HSTRING, IUnknown, Interface, PCWSTR};

/// How deep objects may stand in objects; management has one level.
pub const MAX_DEPTH: usize = 8;
/// The most properties of one object: the largest class has some two hundred.
const MAX_PROPERTIES: usize = 4096;

/// An error of a call.
pub fn failed(action: &str, error: &windows::core::Error) -> CimError {
    error::of_code(action, error.code().0.cast_unsigned(), &error.message())
}

/// An error of a call that was accepted before.
pub fn failed_later(action: &str, error: &windows::core::Error) -> CimError {
    error::of_accepted(action, error.code().0.cast_unsigned(), &error.message())
}

/// The object in a `VARIANT`.
///
/// # Errors
/// Where it is no object of management, or stands too deep.
pub fn embedded(unknown: Option<&IUnknown>, depth: usize) -> Result<Raw> {
    let Some(unknown) = unknown else { return Ok(Raw::Null) };
    let Some(depth) = depth.checked_sub(1) else {
        return Err(CimError::protocol(error::PEER, "objects within objects without an end"));
    };
    let object: IWbemClassObject =
        unknown.cast().map_err(|error| failed("looking at an embedded object", &error))?;
    Ok(Raw::Object(Box::new(read(&object, depth)?)))
}

/// An object with all of its own properties.
///
/// # Errors
/// Where one cannot be read.
pub fn read(object: &IWbemClassObject, depth: usize) -> Result<CimInstance> {
    let mut instance = CimInstance::new(system_text(object, "__CLASS").unwrap_or_default());
    instance.path = system_text(object, "__PATH")
        .or_else(|| system_text(object, "__RELPATH"))
        .and_then(|path| path.parse::<ObjectPath>().ok());
    let action = format!("reading {}", instance.class);
    // SAFETY: the object is alive; no pointers are handed over.
    unsafe { object.BeginEnumeration(WBEM_FLAG_NONSYSTEM_ONLY.0) }
        .map_err(|error| failed(&action, &error))?;
    for _ in 0..MAX_PROPERTIES {
        let mut name = BSTR::new();
        let mut value = VARIANT::default();
        let (mut cim_type, mut flavor) = (0, 0);
        // SAFETY: all pointers are to live, empty values, which own afterwards what they were given.
        unsafe {
            object.Next(0, &raw mut name, &raw mut value, &raw mut cim_type, &raw mut flavor)
        }
        .map_err(|error| failed(&action, &error))?;
        // WBEM_S_NO_MORE_DATA is a success that gives nothing.
        if name.is_empty() {
            // SAFETY: as above. It ends by itself otherwise.
            let _ = unsafe { object.EndEnumeration() };
            return Ok(instance);
        }
        let name = variant::text(&name);
        let value = types::typed(&name, cim_type, variant::read(&value, depth)?)?;
        instance.properties.push((name, value));
    }
    Err(CimError::protocol(instance.class, format!("more than {MAX_PROPERTIES} properties")))
}

/// A property that every object has; none where this one does not say.
fn system_text(object: &IWbemClassObject, name: &str) -> Option<String> {
    let name = HSTRING::from(name);
    let mut value = VARIANT::default();
    // SAFETY: the name ends with a zero and outlives the call; the value is live and empty.
    unsafe { object.Get(PCWSTR(name.as_ptr()), 0, &raw mut value, None, None) }.ok()?;
    match variant::read(&value, 0) {
        Ok(Raw::Text(text)) if !text.is_empty() => Some(text),
        _ => None,
    }
}

/// The parameters of a method: an instance of what its class says it takes, with these values.
///
/// # Errors
/// [`CimError::NotFound`] for a method or parameter that the class does not have.
pub fn parameters(
    class: &IWbemClassObject,
    path: &ObjectPath,
    method: &str,
    values: &[(&str, CimValue)],
) -> Result<Option<IWbemClassObject>> {
    let action = format!("the method {}.{method}", path.class);
    let wide = HSTRING::from(method);
    let (mut takes, mut gives) = (None, None);
    // SAFETY: the name ends with a zero and outlives the call; both places are live and empty.
    unsafe { class.GetMethod(PCWSTR(wide.as_ptr()), 0, &raw mut takes, &raw mut gives) }
        .map_err(|error| failed(&action, &error))?;
    let Some(takes) = takes else {
        return match values.first() {
            None => Ok(None),
            Some((name, _)) => Err(CimError::NotFound {
                what: format!("{action} with the parameter {name}"),
                detail: "the method takes none".into(),
            }),
        };
    };
    // SAFETY: the object is alive.
    let instance = unsafe { takes.SpawnInstance(0) }.map_err(|error| failed(&action, &error))?;
    for (name, value) in values {
        let (form, raw) = types::encoded(name, value)?;
        let made = variant::make(form, &raw)?;
        let wide = HSTRING::from(*name);
        let action = format!("{action}: setting {name}");
        // SAFETY: the name ends with a zero; it and the value outlive the call. Type 0: that of the class.
        unsafe { instance.Put(PCWSTR(wide.as_ptr()), 0, &raw const made, 0) }
            .map_err(|error| failed(&action, &error))?;
    }
    Ok(Some(instance))
}
