//! Settings in the types that the host wants.
//!
//! What was read over WS-Management is text throughout, and a host does not take text for a number in an
//! embedded instance. So an instance is never sent back as it came: the properties that a restore sets are
//! listed here with their types, as the class pages of Microsoft's "Hyper-V WMI provider (V2)" give them,
//! and everything else is left to the host.

use vmtide_cim::{CimInstance, CimType, CimValue};

/// A property that may be sent: its name, its type, and whether it is an array.
pub(super) type Property = (&'static str, CimType, bool);

/// What of `Msvm_VirtualSystemSettingData` makes the VM what it is for its guest and for its
/// administrator. Not: ids, names, places (set by the restore), boot order (set when the devices are
/// there), what only a host knows.
pub(super) const SYSTEM: &[Property] = &[
    ("Notes", CimType::String, true),
    ("AutomaticStartupAction", CimType::Uint16, false),
    ("AutomaticStartupActionDelay", CimType::DateTime, false),
    ("AutomaticStartupActionSequenceNumber", CimType::Uint16, false),
    ("AutomaticShutdownAction", CimType::Uint16, false),
    ("AutomaticRecoveryAction", CimType::Uint16, false),
    ("BIOSNumLock", CimType::Boolean, false),
    ("UserSnapshotType", CimType::Uint16, false),
    ("VirtualNumaEnabled", CimType::Boolean, false),
    ("PauseAfterBootFailure", CimType::Boolean, false),
    ("NetworkBootPreferredProtocol", CimType::Uint16, false),
    ("GuestControlledCacheTypes", CimType::Boolean, false),
    ("AutomaticSnapshotsEnabled", CimType::Boolean, false),
    ("LockOnDisconnect", CimType::Boolean, false),
    ("AutomaticCriticalErrorAction", CimType::Uint16, false),
    ("AutomaticCriticalErrorActionTimeout", CimType::DateTime, false),
    ("ConsoleMode", CimType::Uint16, false),
    ("SecureBootEnabled", CimType::Boolean, false),
    ("SecureBootTemplateId", CimType::String, false),
    ("LowMmioGapSize", CimType::Uint64, false),
    ("HighMmioGapSize", CimType::Uint64, false),
    ("EnhancedSessionTransportType", CimType::Uint16, false),
];

/// What of `Msvm_VirtualSystemSettingData` tells one machine from another. A copy gets its own.
pub(super) const SYSTEM_IDENTITY: &[Property] = &[
    ("BIOSGUID", CimType::String, false),
    ("BIOSSerialNumber", CimType::String, false),
    ("BaseBoardSerialNumber", CimType::String, false),
    ("ChassisSerialNumber", CimType::String, false),
    ("ChassisAssetTag", CimType::String, false),
];

/// The boot order of a generation 1 VM, by kinds of devices.
pub(super) const BOOT_ORDER: &[Property] = &[("BootOrder", CimType::Uint16, true)];

/// `Msvm_EthernetSwitchPortVlanSettingData`.
pub(super) const VLAN: &[Property] = &[
    ("OperationMode", CimType::Uint32, false),
    ("AccessVlanId", CimType::Uint16, false),
    ("NativeVlanId", CimType::Uint16, false),
    ("PvlanMode", CimType::Uint32, false),
    ("PrimaryVlanId", CimType::Uint16, false),
    ("SecondaryVlanId", CimType::Uint16, false),
    ("PruneVlanIdArray", CimType::Uint16, true),
    ("TrunkVlanIdArray", CimType::Uint16, true),
    ("SecondaryVlanIdArray", CimType::Uint16, true),
];

/// `Msvm_MemorySettingData`; quantities in MiB.
pub(super) const MEMORY: &[Property] = &[
    ("VirtualQuantity", CimType::Uint64, false),
    ("Reservation", CimType::Uint64, false),
    ("Limit", CimType::Uint64, false),
    ("Weight", CimType::Uint32, false),
    ("DynamicMemoryEnabled", CimType::Boolean, false),
    ("TargetMemoryBuffer", CimType::Uint32, false),
    ("MaxMemoryBlocksPerNumaNode", CimType::Uint64, false),
];

/// `Msvm_ProcessorSettingData`. Not the group of processors (`CpuGroupId`), which is the host's.
pub(super) const PROCESSOR: &[Property] = &[
    ("VirtualQuantity", CimType::Uint64, false),
    ("Reservation", CimType::Uint64, false),
    ("Limit", CimType::Uint64, false),
    ("Weight", CimType::Uint32, false),
    ("LimitCPUID", CimType::Boolean, false),
    ("HwThreadsPerCore", CimType::Uint64, false),
    ("LimitProcessorFeatures", CimType::Boolean, false),
    ("MaxProcessorsPerNumaNode", CimType::Uint64, false),
    ("MaxNumaNodesPerSocket", CimType::Uint64, false),
    ("EnableHostResourceProtection", CimType::Boolean, false),
    ("HideHypervisorPresent", CimType::Boolean, false),
    ("ExposeVirtualizationExtensions", CimType::Boolean, false),
];

/// Sets on `target` what `source` has of `properties`, each in its type. A value that does not fit its
/// type is left out: it says nothing that the host would understand.
pub(super) fn copy_properties(
    target: &mut CimInstance,
    source: &CimInstance,
    properties: &[Property],
) {
    for (name, kind, is_array) in properties {
        if let Some(value) = source.value(name).and_then(|value| typed(value, *kind, *is_array)) {
            target.set(name, value);
        }
    }
}

/// A value in the type given; none where it cannot be that.
fn typed(value: &CimValue, kind: CimType, is_array: bool) -> Option<CimValue> {
    if is_array {
        let items: Option<Vec<_>> =
            value.elements().iter().map(|item| typed_scalar(item, kind)).collect();
        return Some(CimValue::Array(kind, items?));
    }
    match value.elements() {
        [one] => typed_scalar(one, kind),
        _ => None,
    }
}

fn typed_scalar(value: &CimValue, kind: CimType) -> Option<CimValue> {
    let number = || value.as_u64();
    Some(match kind {
        CimType::Boolean => CimValue::Boolean(value.as_bool()?),
        CimType::Uint8 => CimValue::Uint8(number()?.try_into().ok()?),
        CimType::Uint16 => CimValue::Uint16(number()?.try_into().ok()?),
        CimType::Uint32 => CimValue::Uint32(number()?.try_into().ok()?),
        CimType::Uint64 => CimValue::Uint64(number()?),
        CimType::String => CimValue::String(value.as_str()?.to_owned()),
        CimType::DateTime => CimValue::DateTime(value.as_str()?.to_owned()),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_becomes_what_the_host_wants_and_nonsense_is_left_out() {
        let mut source = CimInstance::new("Msvm_MemorySettingData");
        source.set("VirtualQuantity", "2048");
        source.set("DynamicMemoryEnabled", "TRUE");
        source.set("Weight", "99999999999");
        source.set("Limit", "much");
        source.set("InstanceID", "Microsoft:A\\B");
        let mut target = CimInstance::new("Msvm_MemorySettingData");
        copy_properties(&mut target, &source, MEMORY);
        assert_eq!(
            target.properties,
            [
                ("VirtualQuantity".to_owned(), CimValue::Uint64(2048)),
                ("DynamicMemoryEnabled".to_owned(), CimValue::Boolean(true)),
            ]
        );
    }

    #[test]
    fn an_array_of_one_that_looks_like_its_element_is_an_array_again() {
        let mut source = CimInstance::new("Msvm_VirtualSystemSettingData");
        source.set("Notes", "web server");
        let mut target = source.clone();
        target.properties.clear();
        copy_properties(&mut target, &source, SYSTEM);
        assert_eq!(target.properties, [("Notes".to_owned(), CimValue::strings(["web server"]))]);
    }
}
