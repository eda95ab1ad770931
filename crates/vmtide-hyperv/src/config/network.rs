//! The network adapters of a VM.

use crate::model::disks::host_resource;
use std::collections::HashMap;
use vmtide_cim::{CimInstance, ObjectPath};
use vmtide_hypervisor::{NetworkAdapterConfig, Result};

/// Hyper-V's own address for "none yet": a dynamic one is chosen when the VM starts first.
const NO_ADDRESS: &str = "000000000000";

/// The adapters among the resources of a VM, by their ids. `switches` are the names of the host's virtual
/// switches by their lower-case ids.
pub(super) fn adapters(
    resources: &[CimInstance],
    switches: &HashMap<String, String>,
) -> Result<Vec<NetworkAdapterConfig>> {
    let mut found = Vec::new();
    for port in resources {
        let model = match port.class.to_lowercase().as_str() {
            "msvm_syntheticethernetportsettingdata" => "synthetic",
            "msvm_emulatedethernetportsettingdata" => "legacy",
            _ => continue,
        };
        let Ok(id) = port.text("InstanceID") else { continue };
        let text = |name| port.optional_text(name).ok().flatten().filter(|text| !text.is_empty());
        found.push(NetworkAdapterConfig {
            id: id.rsplit('\\').next().unwrap_or(id).to_owned(),
            model: Some(model.into()),
            mac: text("Address").and_then(address),
            network: network_of(id, resources, switches)?,
            name: text("ElementName").map(str::to_owned),
            static_mac: port.optional_bool("StaticMacAddress").ok().flatten(),
            vlan: vlan_of(id, resources),
            boot_index: None,
        });
    }
    found.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(found)
}

/// `00155D012345` as `00:15:5d:01:23:45`; none for the address that is none, or what is no address.
fn address(text: &str) -> Option<String> {
    let digits: String = text.chars().filter(|c| !matches!(c, ':' | '-')).collect();
    if digits.len() != 12 || !digits.chars().all(|c| c.is_ascii_hexdigit()) || digits == NO_ADDRESS
    {
        return None;
    }
    let pairs = digits.as_bytes().chunks(2).map(String::from_utf8_lossy);
    Some(pairs.collect::<Vec<_>>().join(":").to_lowercase())
}

/// The name of the switch that the port is connected to; none where it is not.
fn network_of(
    port: &str,
    resources: &[CimInstance],
    switches: &HashMap<String, String>,
) -> Result<Option<String>> {
    /// `EnabledState` of a connection that is not made.
    const DISABLED: u64 = 3;
    for connection in resources {
        if !connection.class.eq_ignore_ascii_case("Msvm_EthernetPortAllocationSettingData") {
            continue;
        }
        let parent = connection.optional_reference("Parent").ok().flatten();
        let is_ours = parent
            .as_ref()
            .and_then(|path| path.key("InstanceID"))
            .is_some_and(|id| id.eq_ignore_ascii_case(port));
        let state = connection.optional_number::<u64>("EnabledState").ok().flatten();
        if !is_ours || state == Some(DISABLED) {
            continue;
        }
        let switch = host_resource(connection)?
            .and_then(|text| text.parse::<ObjectPath>().ok())
            .and_then(|path| switches.get(&path.key("Name")?.to_lowercase()).cloned());
        let last = connection.optional_text("LastKnownSwitchName").ok().flatten();
        let last = last.filter(|name| !name.is_empty()).map(str::to_owned);
        if let Some(name) = switch.or(last) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// The VLAN of the port in access mode. The id of the settings begins with that of the port.
fn vlan_of(port: &str, resources: &[CimInstance]) -> Option<u16> {
    /// `OperationMode`: access.
    const ACCESS: u32 = 1;
    let owner = format!("{}\\", port.to_lowercase());
    let settings = resources.iter().find(|one| {
        one.class.eq_ignore_ascii_case("Msvm_EthernetSwitchPortVlanSettingData")
            && one.text("InstanceID").is_ok_and(|id| id.to_lowercase().starts_with(&owner))
    })?;
    let mode: u32 = settings.optional_number("OperationMode").ok()??;
    let vlan: u16 = settings.optional_number("AccessVlanId").ok()??;
    (mode == ACCESS && vlan != 0).then_some(vlan)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_as_everywhere() {
        assert_eq!(address("00155D01AF45").as_deref(), Some("00:15:5d:01:af:45"));
        assert_eq!(address("00-15-5D-01-AF-45").as_deref(), Some("00:15:5d:01:af:45"));
        for text in ["000000000000", "", "00155D01AF4", "00155D01AFXX", "äöü123"] {
            assert_eq!(address(text), None, "{text}");
        }
    }
}
