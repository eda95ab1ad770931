//! Network adapters of a restored VM, and the switches of the host.

use super::hardware::{Adapter, AdapterKind};
use super::management::Management;
use crate::host::path_of;
use vmtide_cim::{CimInstance, CimValue, ObjectPath};
use vmtide_hypervisor::Result;

/// `EnabledState` of a connection that is in force.
const CONNECTED: u16 = 2;
/// `EnabledState` of a connection that is not: the host does not process it.
const DISCONNECTED: u16 = 3;

/// `ResourceType` of adapters.
const ADAPTER: u16 = 10;
/// `ResourceType` of connections.
const CONNECTION: u16 = 33;

/// The class of connections.
pub(super) const CONNECTION_CLASS: &str = "Msvm_EthernetPortAllocationSettingData";

/// The switches of a host, read when the first is asked for.
#[derive(Default)]
pub(super) struct Switches(Option<Vec<(String, String, ObjectPath)>>);

impl Switches {
    /// The switch of that name or id; none where the host has none. Of several with one name none is
    /// taken: a VM must not end up in a network by chance.
    pub fn find(&mut self, management: &Management<'_>, name: &str) -> Result<Option<ObjectPath>> {
        if self.0.is_none() {
            let class = "Msvm_VirtualEthernetSwitch";
            let found = management.host.query(&format!("SELECT * FROM {class}"))?;
            let read = |instance: CimInstance| {
                let path = path_of(&instance, &["CreationClassName", "Name"]).ok()?;
                let name = instance.text("ElementName").ok()?.to_owned();
                Some((name, instance.text("Name").ok()?.to_owned(), path))
            };
            self.0 = Some(found.into_iter().filter_map(read).collect());
        }
        let wanted = name.to_lowercase();
        let known = self.0.iter().flatten();
        let mut fitting = known
            .filter(|(name, id, _)| name.to_lowercase() == wanted || id.to_lowercase() == wanted);
        Ok(match (fitting.next(), fitting.next()) {
            (Some((_, _, path)), None) => Some(path.clone()),
            _ => None,
        })
    }

    /// Why an adapter stays disconnected.
    pub fn missing(&self, adapter: &str, network: &str) -> String {
        let wanted = network.to_lowercase();
        let count =
            self.0.iter().flatten().filter(|(name, ..)| name.to_lowercase() == wanted).count();
        let why =
            if count > 1 { "has several switches of that name" } else { "has no such switch" };
        format!(
            "adapter {adapter} is left disconnected from {network}: the host {why}; connect it with \
             Connect-VMNetworkAdapter, or map it (--network-map {network}=SWITCH)"
        )
    }
}

/// The settings of a new adapter.
pub(super) fn adapter_settings(adapter: &Adapter) -> CimInstance {
    let (class, subtype) = match adapter.kind {
        AdapterKind::Synthetic => {
            ("Msvm_SyntheticEthernetPortSettingData", "Microsoft:Hyper-V:Synthetic Ethernet Port")
        }
        AdapterKind::Emulated => {
            ("Msvm_EmulatedEthernetPortSettingData", "Microsoft:Hyper-V:Emulated Ethernet Port")
        }
    };
    let mut settings = CimInstance::new(class)
        .with("ResourceType", CimValue::Uint16(ADAPTER))
        .with("ResourceSubType", subtype)
        .with("ElementName", adapter.name.as_str())
        .with("StaticMacAddress", adapter.address.is_some());
    if let Some(address) = &adapter.address {
        settings.set("Address", address.as_str());
    }
    settings
}

/// The settings of a new connection of `port` to `switch`; to none, it is there and switched off.
pub(super) fn connection_settings(
    management: &Management<'_>,
    port: &ObjectPath,
    switch: Option<&ObjectPath>,
) -> CimInstance {
    let settings = CimInstance::new(CONNECTION_CLASS)
        .with("ResourceType", CimValue::Uint16(CONNECTION))
        .with("ResourceSubType", "Microsoft:Hyper-V:Ethernet Connection")
        .with("Parent", management.text_of(port));
    match switch {
        Some(switch) => settings
            .with("HostResource", CimValue::strings([management.text_of(switch)]))
            .with("EnabledState", CimValue::Uint16(CONNECTED)),
        None => settings.with("EnabledState", CimValue::Uint16(DISCONNECTED)),
    }
}

/// The change that disconnects a connection.
pub(super) fn disconnected(instance_id: &str) -> CimInstance {
    connection_change(instance_id).with("EnabledState", CimValue::Uint16(DISCONNECTED))
}

/// The change that connects a connection to `switch`.
pub(super) fn connected(
    management: &Management<'_>,
    instance_id: &str,
    switch: &ObjectPath,
) -> CimInstance {
    connection_change(instance_id)
        .with("HostResource", CimValue::strings([management.text_of(switch)]))
        .with("EnabledState", CimValue::Uint16(CONNECTED))
}

fn connection_change(instance_id: &str) -> CimInstance {
    CimInstance::new(CONNECTION_CLASS)
        .with("InstanceID", instance_id)
        .with("ResourceType", CimValue::Uint16(CONNECTION))
        .with("ResourceSubType", "Microsoft:Hyper-V:Ethernet Connection")
}

/// A hardware address as Hyper-V writes it: 12 digits; none for anything else.
pub(super) fn address_text(mac: &str) -> Option<String> {
    let digits: String = mac.chars().filter(|c| !matches!(c, ':' | '-' | '.')).collect();
    let is_address = digits.len() == 12 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_address.then(|| digits.to_ascii_uppercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_as_the_host_does() {
        assert_eq!(address_text("00:15:5d:0a:0b:0c").as_deref(), Some("00155D0A0B0C"));
        assert_eq!(address_text("00155D0a0b0c").as_deref(), Some("00155D0A0B0C"));
        for bad in ["", "00:15:5d", "00155D0A0B0G", "é0155D0A0B0"] {
            assert_eq!(address_text(bad), None, "{bad}");
        }
    }
}
