//! Types of the properties of settings.
//!
//! Over WS-Management every value arrives as text and an array of one element looks like its element. What
//! is kept for a restore has its true types, because a method takes nothing else. A name has the same type
//! in all classes of settings, so the table is by name; the types are those of the class pages.

use vmtide_cim::{CimInstance, CimType, CimValue};

/// Properties that are no scalar strings: the type, whether it is an array, the names.
const TYPES: [(CimType, bool, &[&str]); 9] = [
    (
        CimType::String,
        true,
        &[
            "Notes",
            "BootSourceOrder",
            "HostResource",
            "Connection",
            "VirtualSystemIdentifiers",
            "RequiredFeatures",
            "RequiredFeatureHints",
            "IPAddresses",
            "Subnets",
            "DefaultGateways",
            "DNSServers",
        ],
    ),
    (CimType::Uint8, true, &["OptionalData"]),
    (
        CimType::Uint16,
        true,
        &[
            "BootOrder",
            "PruneVlanIdArray",
            "TrunkVlanIdArray",
            "SecondaryVlanIdArray",
            "IPAddressOrigins",
        ],
    ),
    (
        CimType::DateTime,
        false,
        &[
            "CreationTime",
            "AutomaticStartupActionDelay",
            "AutomaticCriticalErrorActionTimeout",
            "ParentTimestamp",
        ],
    ),
    (
        CimType::Boolean,
        false,
        &[
            "BIOSNumLock",
            "IsSaved",
            "AllowFullSCSICommandSet",
            "IncrementalBackupEnabled",
            "VirtualNumaEnabled",
            "AllowReducedFcRedundancy",
            "PauseAfterBootFailure",
            "GuestControlledCacheTypes",
            "AutomaticSnapshotsEnabled",
            "IsAutomaticSnapshot",
            "LockOnDisconnect",
            "SecureBootEnabled",
            "AutomaticAllocation",
            "AutomaticDeallocation",
            "PersistentReservationsSupported",
            "IgnoreFlushes",
            "LimitCPUID",
            "LimitProcessorFeatures",
            "EnableHostResourceProtection",
            "HideHypervisorPresent",
            "ExposeVirtualizationExtensions",
            "DynamicMemoryEnabled",
            "IsVirtualized",
            "SwapFilesInUse",
            "SgxEnabled",
            "HugePagesEnabled",
            "DeviceNamingEnabled",
            "AllowPacketDirect",
            "StaticMacAddress",
            "ClusterMonitored",
            "TpmEnabled",
            "KsdEnabled",
            "ShieldingRequested",
            "DataProtectionRequested",
            "EncryptStateAndVmMigrationTraffic",
            "VirtualizationBasedSecurityOptOut",
            "DHCPEnabled",
            "AllowMacSpoofing",
            "EnableDhcpGuard",
            "EnableRouterGuard",
            "AllowIeeePriorityTag",
            "AllowTeaming",
            "EnableFixSpeed10G",
            "IsPmemCompatible",
        ],
    ),
    (
        CimType::Uint16,
        false,
        &[
            "AutomaticStartupAction",
            "AutomaticStartupActionSequenceNumber",
            "AutomaticShutdownAction",
            "AutomaticRecoveryAction",
            "UserSnapshotType",
            "DebugPortEnabled",
            "NetworkBootPreferredProtocol",
            "AutomaticCriticalErrorAction",
            "ConsoleMode",
            "EnhancedSessionTransportType",
            "ResourceType",
            "ConsumerVisibility",
            "MappingBehavior",
            "Access",
            "HostExtentNameFormat",
            "HostExtentNameNamespace",
            "CachingMode",
            "WriteHardeningMethod",
            "DesiredVLANEndpointMode",
            "EnabledState",
            "AccessVlanId",
            "NativeVlanId",
            "PrimaryVlanId",
            "SecondaryVlanId",
            "ProtocolIFType",
            "Type",
            "Format",
            "PmemAddressAbstractionType",
        ],
    ),
    (
        CimType::Uint32,
        false,
        &[
            "DebugChannelId",
            "DebugPort",
            "Weight",
            "TargetMemoryBuffer",
            "OperationMode",
            "PvlanMode",
            "BootSourceType",
            "BlockSize",
            "LogicalSectorSize",
            "PhysicalSectorSize",
            "VMQOffloadWeight",
            "IOVOffloadWeight",
            "IPSecOffloadLimit",
            "ErrorThreshold",
            "Interval",
            "Latency",
        ],
    ),
    (
        CimType::Uint64,
        false,
        &[
            "LowMmioGapSize",
            "HighMmioGapSize",
            "VirtualQuantity",
            "Reservation",
            "Limit",
            "VirtualResourceBlockSize",
            "HostResourceBlockSize",
            "HostExtentStartingAddress",
            "IOPSLimit",
            "IOPSReservation",
            "HwThreadsPerCore",
            "MaxProcessorsPerNumaNode",
            "MaxNumaNodesPerSocket",
            "MaxMemoryBlocksPerNumaNode",
            "SgxSize",
            "MaxInternalSize",
            "DataAlignment",
            "BurstLimit",
            "BurstSize",
        ],
    ),
    (
        CimType::String,
        false,
        &["InstanceID", "ElementName", "Parent", "Address", "AddressOnParent", "PoolID"],
    ),
];

/// The instance with the types that its properties have. What is not in the table, or is no value of its
/// type, stays as it came.
pub(crate) fn typed(instance: &CimInstance) -> CimInstance {
    let mut typed = instance.clone();
    for (name, value) in &mut typed.properties {
        let known = TYPES
            .iter()
            .find(|(_, _, names)| names.iter().any(|known| known.eq_ignore_ascii_case(name)));
        if let Some(&(kind, list, _)) = known
            && let Some(right) = convert(value, kind, list)
        {
            *value = right;
        }
    }
    typed
}

fn convert(value: &CimValue, kind: CimType, list: bool) -> Option<CimValue> {
    let scalar = |value: &CimValue| match value {
        CimValue::Null => Some(CimValue::Null),
        // Text where a path is kept as text.
        CimValue::Reference(path) if kind == CimType::String => {
            Some(CimValue::String(path.to_string()))
        }
        other => CimValue::from_text(kind, &other.to_text()?),
    };
    match (value, list) {
        (CimValue::Null, _) => None,
        (_, true) => {
            let items: Option<Vec<_>> = value.elements().iter().map(scalar).collect();
            Some(CimValue::Array(kind, items?))
        }
        (CimValue::Array(..), false) => match value.elements() {
            [one] => scalar(one),
            _ => None,
        },
        (_, false) => scalar(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_get_the_types_of_the_class_pages() {
        let came = CimInstance::new("Msvm_MemorySettingData")
            .with("InstanceID", "Microsoft:A\\B")
            .with("VirtualQuantity", "4096")
            .with("DynamicMemoryEnabled", "true")
            .with("HostResource", "C:\\a.vhdx")
            .with("ResourceType", "4")
            .with("Weight", "many")
            .with("Unknown", "7")
            .with("Parent", CimValue::Null);
        let typed = typed(&came);
        assert_eq!(typed.value("VirtualQuantity"), Some(&CimValue::Uint64(4096)));
        assert_eq!(typed.value("dynamicmemoryenabled"), Some(&CimValue::Boolean(true)));
        assert_eq!(typed.value("HostResource"), Some(&CimValue::strings(["C:\\a.vhdx"])));
        assert_eq!(typed.value("ResourceType"), Some(&CimValue::Uint16(4)));
        assert_eq!(typed.value("Weight"), Some(&CimValue::from("many")));
        assert_eq!(typed.value("Unknown"), Some(&CimValue::from("7")));
        assert_eq!(super::typed(&typed), typed);
    }
}
