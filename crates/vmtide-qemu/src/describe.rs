//! The configuration of a running VM, read from the monitor.
//!
//! QEMU has no document of its configuration, only answers to questions. What the portable model
//! holds is taken from them; the answers themselves are kept verbatim. Anything QEMU does not
//! tell stays empty: a VM is never refused because its description is incomplete.

use crate::inventory::{Drive, Inventory};
use crate::qmp::{QmpClient, QmpError};
use serde_json::{Value, json};
use vmtide_hypervisor::{
    DiskBus, DiskConfig, Firmware, NativeFile, NetworkAdapterConfig, VmConfig,
};

/// The queries whose answers are kept verbatim in a restore point.
const KEPT_QUERIES: [&str; 7] = [
    "query-name",
    "query-uuid",
    "query-version",
    "query-status",
    "query-cpus-fast",
    "query-memory-size-summary",
    "query-chardev",
];

/// The objects under which QEMU keeps the devices that the administrator added.
const DEVICE_PARENTS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// More devices than this are not looked at for network adapters: each costs round trips.
const MAX_DEVICES: usize = 256;

/// The uuid QEMU reports when none was given.
const NO_UUID: &str = "00000000-0000-0000-0000-000000000000";

/// Asks for the name of the VM: the one QEMU was given, else its uuid.
pub(crate) fn name_of(qmp: &QmpClient) -> Result<Option<String>, QmpError> {
    let name = ask(qmp, "query-name", &json!({}))?;
    if let Some(name) = name["name"].as_str().filter(|name| !name.is_empty()) {
        return Ok(Some(name.to_owned()));
    }
    uuid_of(qmp)
}

/// The VM's uuid, where it was given one.
pub(crate) fn uuid_of(qmp: &QmpClient) -> Result<Option<String>, QmpError> {
    let uuid = ask(qmp, "query-uuid", &json!({}))?;
    let uuid = uuid["UUID"].as_str().filter(|uuid| *uuid != NO_UUID);
    Ok(uuid.map(str::to_owned))
}

/// What state the VM is in, in QEMU's word: `running`, `paused`, `prelaunch`, …
pub(crate) fn state_of(qmp: &QmpClient) -> Result<String, QmpError> {
    let status = qmp.query("query-status", json!({}))?;
    Ok(status["status"].as_str().unwrap_or("unknown").to_owned())
}

/// The whole configuration.
pub(crate) fn describe(
    qmp: &QmpClient,
    name: String,
    inventory: &Inventory,
) -> Result<VmConfig, QmpError> {
    let mut native = vec![native_file("query-block", &inventory.raw)];
    let mut answers = serde_json::Map::new();
    for query in KEPT_QUERIES {
        let answer = ask(qmp, query, &json!({}))?;
        if !answer.is_null() {
            native.push(native_file(query, &answer));
            answers.insert(query.to_owned(), answer);
        }
    }
    let answer = |query: &str| answers.get(query).unwrap_or(&Value::Null);
    let memory = answer("query-memory-size-summary");
    let memory_bytes = memory["base-memory"]
        .as_u64()
        .map(|base| base.saturating_add(memory["plugged-memory"].as_u64().unwrap_or(0)));
    let processors = answer("query-cpus-fast").as_array().map(Vec::len);
    let machine = ask(qmp, "qom-get", &json!({"path": "/machine", "property": "type"}))?;
    let mut disks = Vec::new();
    for drive in &inventory.drives {
        disks.push(disk_config(qmp, drive)?);
    }
    Ok(VmConfig {
        name,
        id: uuid_of(qmp)?,
        platform: "qemu".into(),
        platform_version: Some(qmp.version().to_string()),
        machine: machine.as_str().map(|name| name.trim_end_matches("-machine").to_owned()),
        processors: processors.and_then(|count| u32::try_from(count).ok()),
        memory_bytes,
        firmware: Some(firmware(qmp, inventory)?),
        disks,
        network_adapters: network_adapters(qmp)?,
        native,
        ..VmConfig::default()
    })
}

/// A query whose refusal only means that QEMU does not tell.
fn ask(qmp: &QmpClient, command: &str, arguments: &Value) -> Result<Value, QmpError> {
    match qmp.query(command, arguments.clone()) {
        Ok(answer) => Ok(answer),
        Err(QmpError::Refused { .. }) => Ok(Value::Null),
        Err(error) => Err(error),
    }
}

fn property(qmp: &QmpClient, path: &str, property: &str) -> Result<Value, QmpError> {
    ask(qmp, "qom-get", &json!({"path": path, "property": property}))
}

fn native_file(query: &str, answer: &Value) -> NativeFile {
    NativeFile {
        name: format!("{query}.json"),
        content: serde_json::to_string_pretty(answer).unwrap_or_default(),
    }
}

/// UEFI lives in flash memory; a PC without it boots the BIOS that QEMU brings.
fn firmware(qmp: &QmpClient, inventory: &Inventory) -> Result<Firmware, QmpError> {
    let flash = property(qmp, "/machine", "pflash0")?;
    let configured = flash.as_str().is_some_and(|node| !node.is_empty());
    Ok(if inventory.flash || configured { Firmware::Uefi } else { Firmware::Bios })
}

fn disk_config(qmp: &QmpClient, drive: &Drive) -> Result<DiskConfig, QmpError> {
    let mut config = DiskConfig {
        id: drive.id.clone(),
        size_bytes: drive.size_bytes,
        bus: DiskBus::Other,
        format: Some(drive.driver.clone()),
        path: Some(drive.filename.clone()).filter(|path| !path.is_empty()),
        ..DiskConfig::default()
    };
    let Some(path) = &drive.qom_path else {
        return Ok(config);
    };
    config.bus = bus_of(qmp, path)?;
    let serial = property(qmp, path, "serial")?;
    config.serial = serial.as_str().filter(|serial| !serial.is_empty()).map(str::to_owned);
    // The backend half of a virtio device has no boot index of its own.
    let device = path.strip_suffix("/virtio-backend").unwrap_or(path);
    let boot = property(qmp, device, "bootindex")?.as_i64();
    config.boot_index = boot.and_then(|index| u32::try_from(index).ok());
    Ok(config)
}

fn bus_of(qmp: &QmpClient, path: &str) -> Result<DiskBus, QmpError> {
    let kind = property(qmp, path, "type")?;
    let kind = kind.as_str().unwrap_or_default();
    Ok(match kind {
        _ if kind.starts_with("virtio-blk") => DiskBus::VirtioBlk,
        _ if kind.starts_with("nvme") => DiskBus::Nvme,
        _ if kind.starts_with("usb") => DiskBus::Usb,
        _ if kind.starts_with("scsi") || kind.starts_with("ide") => {
            let controller = controller_of(qmp, path)?;
            match controller.as_str() {
                name if name.contains("ahci") => DiskBus::Sata,
                name if name.contains("usb") => DiskBus::Usb,
                _ if kind.starts_with("ide") => DiskBus::Ide,
                _ => DiskBus::Scsi,
            }
        }
        _ => DiskBus::Other,
    })
}

/// The type of the controller whose bus a device hangs on.
fn controller_of(qmp: &QmpClient, path: &str) -> Result<String, QmpError> {
    let bus = property(qmp, path, "parent_bus")?;
    let Some((controller, _)) = bus.as_str().and_then(|bus| bus.rsplit_once('/')) else {
        return Ok(String::new());
    };
    let kind = property(qmp, controller, "type")?;
    Ok(kind.as_str().unwrap_or_default().to_owned())
}

fn network_adapters(qmp: &QmpClient) -> Result<Vec<NetworkAdapterConfig>, QmpError> {
    let mut adapters = Vec::new();
    for parent in DEVICE_PARENTS {
        let listing = ask(qmp, "qom-list", &json!({"path": parent}))?;
        for child in listing.as_array().into_iter().flatten().take(MAX_DEVICES) {
            let (Some(name), Some(kind)) = (child["name"].as_str(), child_type(child)) else {
                continue;
            };
            let path = format!("{parent}/{name}");
            let mac = property(qmp, &path, "mac")?;
            let Some(mac) = mac.as_str() else { continue };
            let network = property(qmp, &path, "netdev")?;
            adapters.push(NetworkAdapterConfig {
                id: name.to_owned(),
                model: Some(kind.to_owned()),
                mac: Some(mac.to_ascii_lowercase()),
                network: network.as_str().map(str::to_owned),
                ..NetworkAdapterConfig::default()
            });
        }
    }
    Ok(adapters)
}

/// Devices whose disks are not backed up, because another process or the hardware serves them and
/// QEMU's block layer never sees their data; one warning each.
pub(crate) fn uncovered(qmp: &QmpClient) -> Result<Vec<String>, QmpError> {
    let mut warnings = Vec::new();
    for parent in DEVICE_PARENTS {
        let listing = ask(qmp, "qom-list", &json!({"path": parent}))?;
        for child in listing.as_array().into_iter().flatten() {
            let (Some(name), Some(kind)) = (child["name"].as_str(), child_type(child)) else {
                continue;
            };
            if let Some(reason) = why_uncovered(kind) {
                warnings.push(format!("what is on device {name} ({kind}) is left out: {reason}"));
            }
        }
    }
    Ok(warnings)
}

fn why_uncovered(kind: &str) -> Option<&'static str> {
    match kind {
        _ if kind.starts_with("vhost-user-blk") || kind.starts_with("vhost-user-scsi") => {
            Some("its disks are served by another process")
        }
        _ if kind.starts_with("vhost-scsi") => Some("its disks are served by the host's kernel"),
        _ if kind.starts_with("vfio-") => {
            Some("the guest drives the hardware itself, also if it is a disk controller")
        }
        _ => None,
    }
}

/// `T` of an object-tree entry of type `child<T>`.
fn child_type(entry: &Value) -> Option<&str> {
    entry["type"].as_str()?.strip_prefix("child<")?.strip_suffix('>')
}

/// The socket of the guest agent, where QEMU was given the usual serial port for one.
pub(crate) fn agent_socket(qmp: &QmpClient) -> Result<Option<String>, QmpError> {
    let mut chardev = None;
    for parent in DEVICE_PARENTS {
        let listing = ask(qmp, "qom-list", &json!({"path": parent}))?;
        for child in listing.as_array().into_iter().flatten().take(MAX_DEVICES) {
            if child_type(child) != Some("virtserialport") {
                continue;
            }
            let path = format!("{parent}/{}", child["name"].as_str().unwrap_or_default());
            if property(qmp, &path, "name")? == "org.qemu.guest_agent.0" {
                let label = property(qmp, &path, "chardev")?;
                chardev = label.as_str().map(str::to_owned);
            }
        }
    }
    let Some(label) = chardev else {
        return Ok(None);
    };
    let chardevs = qmp.query("query-chardev", json!({}))?;
    let found = chardevs
        .as_array()
        .into_iter()
        .flatten()
        .find(|chardev| chardev["label"] == label.as_str())
        .and_then(|chardev| chardev["filename"].as_str())
        .and_then(unix_path);
    Ok(found)
}

/// The path in a character device's description, such as
/// `disconnected:unix:/run/vm.qga,server=on`.
fn unix_path(filename: &str) -> Option<String> {
    let rest = filename.strip_prefix("disconnected:").unwrap_or(filename);
    let rest = rest.strip_prefix("unix:")?;
    let path = rest.split(",server").next().unwrap_or(rest);
    (!path.is_empty()).then(|| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_that_qemu_does_not_serve_are_told_from_those_it_does() {
        for kind in ["vhost-user-blk-pci", "vhost-scsi-pci-transitional", "vfio-pci"] {
            assert!(why_uncovered(kind).is_some(), "{kind}");
        }
        for kind in ["virtio-blk-pci", "virtio-scsi-pci", "vhost-user-fs-pci", "nvme"] {
            assert!(why_uncovered(kind).is_none(), "{kind}");
        }
    }

    #[test]
    fn the_agents_socket_is_read_from_qemus_description() {
        for (filename, path) in [
            ("disconnected:unix:/run/a.qga,server=on", Some("/run/a.qga")),
            ("unix:/run/a,b.qga,server=on <-> ", Some("/run/a,b.qga")),
            ("unix:/run/a.qga", Some("/run/a.qga")),
            ("pty:/dev/pts/1", None),
            ("unix:,server=on", None),
        ] {
            assert_eq!(unix_path(filename).as_deref(), path, "{filename}");
        }
    }
}
