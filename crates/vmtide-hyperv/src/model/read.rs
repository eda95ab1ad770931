//! From instances to records.

use super::types::{
    Generation, ReferencePointRecord, SnapshotKind, SnapshotRecord, VmSettings, VmState,
};
use crate::host::{from_cim, path_of};
use uuid::Uuid;
use vmtide_cim::CimInstance;
use vmtide_hypervisor::{HypervisorError, Result};

/// `VirtualSystemType` of the settings in force of a VM.
pub(crate) const REALIZED: &str = "Microsoft:Hyper-V:System:Realized";

/// What the type of a checkpoint's settings begins with.
pub(crate) const SNAPSHOT: &str = "Microsoft:Hyper-V:Snapshot:";

/// A GUID as Hyper-V writes and compares it: upper case, without braces.
pub(crate) fn guid(id: Uuid) -> String {
    id.hyphenated().to_string().to_ascii_uppercase()
}

/// A GUID, also with `Microsoft:` before it.
fn uuid(instance: &CimInstance, name: &str) -> Result<Uuid> {
    let text = instance.text(name).map_err(from_cim)?;
    parse_uuid(text).ok_or_else(|| {
        HypervisorError::protocol(&instance.class, format!("{name} is no GUID: {text:?}"))
    })
}

/// A GUID with or without braces or `Microsoft:` around it; none for other text.
pub(crate) fn parse_uuid(text: &str) -> Option<Uuid> {
    let text = text.trim();
    let text = text.strip_prefix("Microsoft:").unwrap_or(text);
    let text = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).unwrap_or(text);
    // Only the form with hyphens: 32 digits might be anything.
    (text.len() == 36).then(|| Uuid::try_parse(text).ok()).flatten()
}

/// An `Msvm_VirtualSystemSettingData`.
pub(crate) fn settings(instance: CimInstance) -> Result<VmSettings> {
    let text = |name| instance.text(name).map(str::to_owned).map_err(from_cim);
    let optional = |name| {
        let value = instance.optional_text(name).map_err(from_cim)?;
        Ok::<_, HypervisorError>(value.filter(|text| !text.is_empty()).map(str::to_owned))
    };
    let version = text("Version")?;
    let version = parse_version(&version).ok_or_else(|| {
        HypervisorError::protocol(&instance.class, format!("Version is {version:?}"))
    })?;
    let generation = match optional("VirtualSystemSubType")?.as_deref() {
        // Before Windows Server 2012 R2 there was no other.
        None | Some("Microsoft:Hyper-V:SubType:1") => Generation::One,
        Some("Microsoft:Hyper-V:SubType:2") => Generation::Two,
        Some(other) => {
            return Err(HypervisorError::Unsupported {
                what: format!("a VM of the kind {other}"),
                detail: "only generations 1 and 2 are known".into(),
            });
        }
    };
    let guest_state = optional("GuestStateDataRoot")?.zip(optional("GuestStateFile")?);
    Ok(VmSettings {
        instance_id: text("InstanceID")?,
        path: path_of(&instance, &["InstanceID"])?,
        vm: uuid(&instance, "VirtualSystemIdentifier")?,
        name: optional("ElementName")?.unwrap_or_default(),
        system_type: text("VirtualSystemType")?,
        version,
        generation,
        configuration_root: optional("ConfigurationDataRoot")?.unwrap_or_default(),
        configuration_file: optional("ConfigurationFile")?,
        guest_state,
        snapshot_root: optional("SnapshotDataRoot")?,
        secure_boot: instance.optional_bool("SecureBootEnabled").map_err(from_cim)?,
        instance,
    })
}

/// `8.0` as `(8, 0)`.
fn parse_version(text: &str) -> Option<(u16, u16)> {
    let (major, minor) = text.trim().split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// A checkpoint; none where the settings are not those of one.
pub(crate) fn snapshot(settings: VmSettings) -> Option<SnapshotRecord> {
    let kind = match settings.system_type.strip_prefix(SNAPSHOT)? {
        "Realized" => SnapshotKind::Standard,
        "Recovery" => SnapshotKind::Recovery,
        other => SnapshotKind::Other(other.to_owned()),
    };
    Some(SnapshotRecord { settings, kind })
}

/// `EnabledState` of an `Msvm_ComputerSystem`.
pub(crate) fn state(instance: &CimInstance) -> Result<VmState> {
    let number: u16 = instance.number("EnabledState").map_err(from_cim)?;
    Ok(match number {
        2 => VmState::Running,
        3 => VmState::Off,
        9 | 32768 => VmState::Paused,
        6 | 32769 => VmState::Saved,
        other => VmState::Other(other),
    })
}

/// An `Msvm_VirtualSystemReferencePoint`. Its lists are taken as they came.
pub(crate) fn reference_point(instance: &CimInstance) -> Result<ReferencePointRecord> {
    let list = |name| {
        let texts = instance.texts(name).map_err(from_cim)?;
        Ok::<_, HypervisorError>(texts.into_iter().map(str::to_owned).collect())
    };
    Ok(ReferencePointRecord {
        instance_id: instance.text("InstanceID").map_err(from_cim)?.to_owned(),
        vm: uuid(instance, "VirtualSystemIdentifier")?,
        kind: instance.number("ReferencePointType").map_err(from_cim)?,
        consistency: instance.optional_number("ConsistencyLevel").map_err(from_cim)?,
        disk_identifiers: list("VirtualDiskIdentifiers")?,
        tracking_ids: list("ResilientChangeTrackingIdentifiers")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guids_are_read_in_the_forms_hosts_use() {
        let id = Uuid::from_u128(0x5bfd_e23b_ce75_4303_b54f_6c18_394f_105c);
        for text in [
            "5BFDE23B-CE75-4303-B54F-6C18394F105C",
            "Microsoft:5bfde23b-ce75-4303-b54f-6c18394f105c",
            "{5BFDE23B-CE75-4303-B54F-6C18394F105C}",
        ] {
            assert_eq!(parse_uuid(text), Some(id), "{text}");
        }
        assert_eq!(guid(id), "5BFDE23B-CE75-4303-B54F-6C18394F105C");
        for text in
            ["", "HV1", "5BFDE23BCE754303B54F6C18394F105C", "{5BFDE23B-CE75-4303-B54F-6C18394F105C"]
        {
            assert_eq!(parse_uuid(text), None, "{text}");
        }
    }

    #[test]
    fn versions_are_two_numbers() {
        assert_eq!(parse_version("8.0"), Some((8, 0)));
        assert_eq!(parse_version("10.5"), Some((10, 5)));
        for text in ["", "8", "8.", "8.0.1", "x.y", "-1.0", "70000.0"] {
            assert_eq!(parse_version(text), None, "{text}");
        }
    }
}
