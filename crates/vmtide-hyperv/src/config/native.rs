//! All settings of a VM as its host told them, kept as a document of ours in the restore point.
//!
//! The document is JSON that people can read and compare: an object for the VM and one for every resource,
//! each with its class and its properties in order, every value with its type. Properties without a value
//! are left out, and so are the paths, which follow from the ids. From it a restore makes the VM
//! again on another host or another version of Windows.

use crate::model::schema::typed;
use serde::{Deserialize, Serialize};
use vmtide_cim::{CimError, CimInstance, CimType, CimValue};
use vmtide_hypervisor::{HypervisorError, NativeFile, Result, VmConfig};

/// The name of the document.
pub(crate) const SETTINGS_FILE: &str = "vmtide-hyperv-settings.json";

/// The version of the document's form. A reader refuses newer ones.
const FORM: u32 = 1;

/// Instances nested deeper than this are refused.
const MAX_NESTING: usize = 4;

#[derive(Serialize, Deserialize)]
struct Document {
    version: u32,
    system: Instance,
    resources: Vec<Instance>,
}

#[derive(Serialize, Deserialize)]
struct Instance {
    class: String,
    properties: Vec<Property>,
}

#[derive(Serialize, Deserialize)]
struct Property {
    name: String,
    /// A type of CIM; none for a property without a value.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value: Option<Scalar>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    values: Option<Vec<Option<Scalar>>>,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Scalar {
    /// The text of a scalar or of a path. Numbers too: JSON's have no 64 bits everywhere.
    Text(String),
    Instance(Instance),
}

/// The document of a VM.
///
/// # Errors
/// [`HypervisorError::Protocol`] for instances within instances deeper than any class has.
pub(crate) fn settings_file(system: &CimInstance, resources: &[CimInstance]) -> Result<NativeFile> {
    let document = Document {
        version: FORM,
        system: write(&typed(system), 0)?,
        resources: resources.iter().map(|one| write(&typed(one), 0)).collect::<Result<_>>()?,
    };
    let content = serde_json::to_string_pretty(&document).map_err(|error| unreadable(&error))?;
    Ok(NativeFile { name: SETTINGS_FILE.into(), content })
}

/// The settings of the VM, `Msvm_VirtualSystemSettingData`, and its resources that a restore point keeps;
/// none where it keeps none.
///
/// # Errors
/// [`HypervisorError::Protocol`] where the document cannot be read.
pub fn native_settings(config: &VmConfig) -> Result<Option<(CimInstance, Vec<CimInstance>)>> {
    config
        .native
        .iter()
        .find(|file| file.name == SETTINGS_FILE)
        .map(|file| read_settings(&file.content))
        .transpose()
}

/// Reads the document.
pub(crate) fn read_settings(content: &str) -> Result<(CimInstance, Vec<CimInstance>)> {
    let document: Document = serde_json::from_str(content).map_err(|error| unreadable(&error))?;
    if document.version != FORM {
        return Err(unreadable(&format!(
            "it has version {}, and this vmtide reads version {FORM}; use a newer vmtide",
            document.version
        )));
    }
    let resources = document.resources.iter().map(|one| read(one, 0)).collect::<Result<_>>()?;
    Ok((read(&document.system, 0)?, resources))
}

fn unreadable(detail: &dyn std::fmt::Display) -> HypervisorError {
    HypervisorError::protocol(SETTINGS_FILE, detail.to_string())
}

fn check_nesting(nesting: usize) -> Result<()> {
    if nesting > MAX_NESTING {
        return Err(unreadable(&"instances are nested too deep"));
    }
    Ok(())
}

fn write(instance: &CimInstance, nesting: usize) -> Result<Instance> {
    check_nesting(nesting)?;
    let scalar = |value: &CimValue| {
        Ok::<_, HypervisorError>(match value {
            CimValue::Instance(inner) => Some(Scalar::Instance(write(inner, nesting + 1)?)),
            CimValue::Reference(path) => Some(Scalar::Text(path.to_string())),
            other => other.to_text().map(Scalar::Text),
        })
    };
    let mut properties = Vec::with_capacity(instance.properties.len());
    for (name, value) in &instance.properties {
        if *value == CimValue::Null {
            continue;
        }
        let (value_of, values) = match value {
            CimValue::Array(_, items) => {
                (None, Some(items.iter().map(scalar).collect::<Result<Vec<_>>>()?))
            }
            one => (scalar(one)?, None),
        };
        let kind = value.cim_type().map(|kind| kind.as_str().to_owned());
        properties.push(Property { name: name.clone(), kind, value: value_of, values });
    }
    Ok(Instance { class: instance.class.clone(), properties })
}

fn read(instance: &Instance, nesting: usize) -> Result<CimInstance> {
    check_nesting(nesting)?;
    let mut read = CimInstance::new(instance.class.as_str());
    for property in &instance.properties {
        let value = read_property(property, nesting)?;
        read.properties.push((property.name.clone(), value));
    }
    Ok(read)
}

fn read_property(property: &Property, nesting: usize) -> Result<CimValue> {
    let name = &property.name;
    let Some(kind) = &property.kind else {
        return Ok(CimValue::Null);
    };
    let kind = CimType::from_name(kind)
        .ok_or_else(|| unreadable(&format!("{name} has the type {kind:?}, which CIM has not")))?;
    let scalar = |scalar: &Scalar| match (kind, scalar) {
        (CimType::Instance, Scalar::Instance(inner)) => {
            Ok(CimValue::Instance(Box::new(read(inner, nesting + 1)?)))
        }
        (CimType::Reference, Scalar::Text(text)) => {
            let path = text.parse().map_err(|error: CimError| unreadable(&error))?;
            Ok(CimValue::Reference(path))
        }
        (_, Scalar::Text(text)) => CimValue::from_text(kind, text)
            .ok_or_else(|| unreadable(&format!("{name} is no {}", kind.as_str()))),
        (_, Scalar::Instance(_)) => Err(unreadable(&format!("{name} is no {}", kind.as_str()))),
    };
    match (&property.value, &property.values) {
        (Some(value), None) => scalar(value),
        (None, Some(values)) => {
            let items = values.iter().map(|item| item.as_ref().map_or(Ok(CimValue::Null), scalar));
            Ok(CimValue::Array(kind, items.collect::<Result<_>>()?))
        }
        _ => Err(unreadable(&format!("{name} has a type and no value, or two"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtide_cim::ObjectPath;

    #[test]
    fn settings_are_read_as_they_were_written() {
        let path = ObjectPath::new("Msvm_X", &[("InstanceID", r"Microsoft:A\B")]);
        let inner = CimInstance::new("Msvm_Inner").with("A", CimValue::Uint64(u64::MAX));
        let mut system = CimInstance::new("Msvm_VirtualSystemSettingData")
            .with("InstanceID", "Microsoft:A")
            .with("Truth", false)
            .with("Real", CimValue::Real64(0.1))
            .with("Path", &path)
            .with("Inner", CimValue::Instance(Box::new(inner)))
            .with("BootOrder", CimValue::Array(CimType::Uint16, vec![CimValue::Uint16(1)]))
            .with("Holes", CimValue::Array(CimType::String, vec![CimValue::Null, "a".into()]));
        system.path = Some(path);
        system.set("Nothing", CimValue::Null);
        let resource = CimInstance::new("Msvm_MemorySettingData").with("Limit", "1048576");
        let file = settings_file(&system, std::slice::from_ref(&resource)).unwrap();
        let config = VmConfig { native: vec![file], ..VmConfig::default() };
        let (read, resources) = native_settings(&config).unwrap().unwrap();
        system.path = None;
        system.properties.retain(|(name, _)| name != "Nothing");
        assert_eq!(read, system);
        // What came as text has its type.
        assert_eq!(resources[0].value("Limit"), Some(&CimValue::Uint64(1_048_576)));
        assert_eq!(native_settings(&VmConfig::default()).unwrap(), None);
    }

    /// What the fuzz target runs, over the seed and mutations of it.
    #[test]
    fn mutations_never_panic_and_are_stable() {
        let system = CimInstance::new("Msvm_VirtualSystemSettingData")
            .with("InstanceID", "Microsoft:A")
            .with("BootOrder", CimValue::Array(CimType::Uint16, vec![CimValue::Uint16(1)]))
            .with("SecureBootEnabled", true);
        let resource = CimInstance::new("Msvm_MemorySettingData")
            .with("Limit", CimValue::Uint64(u64::MAX))
            .with("Parent", r#"Msvm_X.InstanceID="A\\B""#);
        let seed = settings_file(&system, &[resource]).unwrap().content;
        if std::env::var_os("VMTIDE_WRITE_SEEDS").is_some() {
            let directory =
                concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds/hyperv_settings");
            std::fs::create_dir_all(directory).unwrap();
            std::fs::write(format!("{directory}/settings.json"), &seed).unwrap();
        }
        let mut state = 1_u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            usize::try_from((state >> 33) % u64::try_from(below).unwrap()).unwrap()
        };
        for _ in 0..2_000 {
            let mut bytes = seed.clone().into_bytes();
            for _ in 0..=random(3) {
                let at = random(bytes.len());
                bytes[at] = b"\"{}[]:,1a "[random(10)];
            }
            crate::fuzzing::settings(&bytes);
        }
    }

    #[test]
    fn broken_settings_are_refused() {
        let property = |text: &str| {
            format!(
                r#"{{"version":1,"system":{{"class":"X","properties":[{text}]}},"resources":[]}}"#
            )
        };
        assert!(read_settings(&property("")).is_ok());
        let mut nested = r#"{"class":"X","properties":[]}"#.to_owned();
        for _ in 0..6 {
            nested = format!(
                r#"{{"class":"X","properties":[{{"name":"a","type":"instance","value":{nested}}}]}}"#
            );
        }
        for text in [
            String::new(),
            property("").replace("\"version\":1", "\"version\":2"),
            property(r#"{"name":"a","type":"uint99","value":"1"}"#),
            property(r#"{"name":"a","type":"uint8","value":"256"}"#),
            property(r#"{"name":"a","type":"uint8"}"#),
            property(r#"{"name":"a","type":"uint8","value":"1","values":["1"]}"#),
            property(r#"{"name":"a","type":"string","value":{"class":"X","properties":[]}}"#),
            property(r#"{"name":"a","type":"instance","value":"X"}"#),
            property(r#"{"name":"a","type":"reference","value":"no path"}"#),
            format!(r#"{{"version":1,"system":{nested},"resources":[]}}"#),
        ] {
            assert!(read_settings(&text).is_err(), "{text}");
        }
    }
}
