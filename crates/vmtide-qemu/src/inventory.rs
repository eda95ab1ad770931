//! The drives of a running VM, as the monitor tells them.
//!
//! `query-block` lists what is attached to guest devices, each with the block node on top and the
//! dirty bitmaps on that node. From it come the disks to back up, with ids that survive restarts
//! of QEMU: the qdev id the administrator gave, else the drive's name, else the place in QEMU's
//! object tree. File names are never ids, because they change with every external snapshot.

use crate::qmp::{QmpClient, QmpError};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use vmtide_hypervisor::DiskId;

/// One dirty bitmap on a block node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bitmap {
    pub name: String,
    pub granularity_bytes: u64,
    pub recording: bool,
    pub persistent: bool,
    pub inconsistent: bool,
}

/// One disk of the guest that a backup holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Drive {
    pub id: DiskId,
    /// Path of the guest device in QEMU's object tree, where a drive hangs on one.
    pub qom_path: Option<String>,
    /// The block node on top.
    pub node: String,
    pub driver: String,
    pub size_bytes: u64,
    pub filename: String,
    /// Whether the image can keep bitmaps over a restart: qcow2 of version 3.
    pub keeps_bitmaps: bool,
    pub bitmaps: Vec<Bitmap>,
}

/// What was found, and what was left out that a user would expect in a backup.
#[derive(Clone, Debug, Default)]
pub(crate) struct Inventory {
    pub drives: Vec<Drive>,
    pub warnings: Vec<String>,
    /// UEFI code or variables in flash memory were seen.
    pub flash: bool,
    /// The answer to `query-block`, verbatim.
    pub raw: Value,
}

/// Drivers that are no block storage of the VM: a directory shown as FAT, and test drivers.
const NO_DISK_DRIVERS: [&str; 3] = ["vvfat", "null-co", "null-aio"];

/// Asks QEMU for its drives.
pub(crate) fn take(qmp: &QmpClient) -> Result<Inventory, QmpError> {
    let raw = qmp.query("query-block", json!({}))?;
    Ok(read(raw))
}

fn read(raw: Value) -> Inventory {
    let mut inventory = Inventory::default();
    let mut taken = BTreeSet::new();
    for entry in raw.as_array().into_iter().flatten() {
        let Some(name) = Naming::of(entry) else {
            continue;
        };
        inventory.flash |= name.is_flash();
        match why_left_out(entry, &name) {
            Verdict::Disk => {}
            Verdict::Silently => continue,
            Verdict::Warn(reason) => {
                let text = format!("disk {} is left out: {reason}", name.preferred());
                inventory.warnings.push(text);
                continue;
            }
        }
        match drive_of(entry, &name, &mut taken) {
            Some(drive) => inventory.drives.push(drive),
            None => inventory.warnings.push(format!(
                "disk {} is left out: QEMU does not tell its node and size",
                name.preferred()
            )),
        }
    }
    // QEMU's order depends on how the drives were given to it; ids do not.
    inventory.drives.sort_by(|a, b| a.id.cmp(&b.id));
    inventory.raw = raw;
    inventory
}

/// The ways to call a drive.
struct Naming<'a> {
    qdev: Option<&'a str>,
    device: Option<&'a str>,
    node: Option<&'a str>,
}

impl<'a> Naming<'a> {
    fn of(entry: &'a Value) -> Option<Self> {
        let text = |value: &'a Value| value.as_str().filter(|text| !text.is_empty());
        let name = Self {
            qdev: text(&entry["qdev"]),
            device: text(&entry["device"]),
            node: text(&entry["inserted"]["node-name"]),
        };
        (name.qdev.is_some() || name.device.is_some() || name.node.is_some()).then_some(name)
    }

    /// The id that the administrator gave the guest device, where there is one.
    fn qdev_id(&self) -> Option<&'a str> {
        let qdev = self.qdev?;
        if !qdev.starts_with('/') {
            return Some(qdev);
        }
        qdev.strip_prefix("/machine/peripheral/")?.split('/').next()
    }

    fn preferred(&self) -> &'a str {
        self.qdev_id().or(self.device).or(self.qdev).or(self.node).unwrap_or_default()
    }

    fn qom_path(&self) -> Option<String> {
        let qdev = self.qdev?;
        Some(if qdev.starts_with('/') {
            qdev.to_owned()
        } else {
            format!("/machine/peripheral/{qdev}")
        })
    }

    fn is_flash(&self) -> bool {
        self.device.is_some_and(|name| name.starts_with("pflash"))
            || self.qdev.is_some_and(|path| path.contains("flash"))
    }
}

/// The path in QEMU's object tree of the guest device in an entry of `query-block`.
pub(crate) fn qom_path_of(entry: &Value) -> Option<String> {
    Naming::of(entry)?.qom_path()
}

enum Verdict {
    Disk,
    Silently,
    Warn(&'static str),
}

fn why_left_out(entry: &Value, name: &Naming<'_>) -> Verdict {
    let inserted = &entry["inserted"];
    if !inserted.is_object() {
        return Verdict::Silently;
    }
    let writable = inserted["ro"] == false;
    if name.is_flash() {
        return if writable {
            Verdict::Warn("firmware variables in flash memory are not backed up")
        } else {
            Verdict::Silently
        };
    }
    if inserted["drv"].as_str().is_some_and(|driver| NO_DISK_DRIVERS.contains(&driver)) {
        return Verdict::Warn("it is a test or directory driver and no disk");
    }
    match (entry["removable"] == true, writable) {
        (true, false) => Verdict::Silently,
        (true, true) => Verdict::Warn("it is a removable medium"),
        (false, false) => Verdict::Warn("it is read-only"),
        (false, true) => Verdict::Disk,
    }
}

fn drive_of(entry: &Value, name: &Naming<'_>, taken: &mut BTreeSet<String>) -> Option<Drive> {
    let inserted = &entry["inserted"];
    let image = &inserted["image"];
    // Two devices of one name cannot be told apart by it: the later one takes its place as id.
    let id = [Some(name.preferred()), name.qdev, name.node]
        .into_iter()
        .flatten()
        .find(|id| !taken.contains(*id))?;
    taken.insert(id.to_owned());
    let driver = inserted["drv"].as_str()?.to_owned();
    let compat = image["format-specific"]["data"]["compat"].as_str();
    Some(Drive {
        id: DiskId(id.to_owned()),
        qom_path: name.qom_path(),
        node: name.node?.to_owned(),
        size_bytes: image["virtual-size"].as_u64()?,
        filename: inserted["file"].as_str().unwrap_or_default().to_owned(),
        keeps_bitmaps: driver == "qcow2" && compat.is_some_and(|compat| compat != "0.10"),
        driver,
        bitmaps: bitmaps_of(inserted),
    })
}

/// The named bitmaps in an answer about one block node.
pub(crate) fn bitmaps_of(node: &Value) -> Vec<Bitmap> {
    node["dirty-bitmaps"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|bitmap| {
            Some(Bitmap {
                name: bitmap["name"].as_str()?.to_owned(),
                granularity_bytes: bitmap["granularity"].as_u64()?,
                recording: bitmap["recording"] == true,
                persistent: bitmap["persistent"] == true,
                inconsistent: bitmap["inconsistent"] == true,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(device: &str, qdev: &str, node: &str, extra: &Value) -> Value {
        let mut entry = json!({
            "device": device, "qdev": qdev, "removable": false,
            "inserted": {"ro": false, "drv": "raw", "node-name": node, "file": "x",
                         "image": {"virtual-size": 4096}},
        });
        merge(&mut entry, extra);
        entry
    }

    fn merge(into: &mut Value, from: &Value) {
        match (into, from) {
            (Value::Object(into), Value::Object(from)) => {
                for (key, value) in from {
                    merge(into.entry(key.clone()).or_insert(Value::Null), value);
                }
            }
            (into, from) => *into = from.clone(),
        }
    }

    #[test]
    fn ids_are_attachment_points_and_never_file_names() {
        let none = json!({});
        let inventory = read(json!([
            entry("", "/machine/peripheral/vda/virtio-backend", "n0", &none),
            entry("drv1", "/machine/peripheral-anon/device[0]", "#block1", &none),
            entry("", "sd0", "n2", &none),
            entry("", "/machine/unattached/device[9]", "n3", &none),
            entry("x", "sd0", "n4", &none),
        ]));
        let ids: Vec<_> = inventory.drives.iter().map(|d| d.id.0.as_str()).collect();
        let place = "/machine/unattached/device[9]";
        assert_eq!(ids, [place, "drv1", "n4", "sd0", "vda"]);
        assert_eq!(inventory.drives[2].qom_path.as_deref(), Some("/machine/peripheral/sd0"));
    }

    #[test]
    fn what_is_no_disk_is_left_out_with_a_word_where_it_matters() {
        let inventory = read(json!([
            entry("cd", "cd0", "a", &json!({"removable": true, "inserted": {"ro": true}})),
            entry("empty", "cd1", "b", &json!({"removable": true, "inserted": null})),
            entry("ro", "d0", "c", &json!({"inserted": {"ro": true}})),
            entry("fat", "d1", "d", &json!({"inserted": {"drv": "vvfat"}})),
            entry("fd", "d2", "e", &json!({"removable": true})),
            entry("pflash0", "/machine/system.flash0", "f", &json!({"inserted": {"ro": true}})),
            entry("pflash1", "/machine/system.flash1", "g", &none()),
            "nonsense", {}, {"device": 7}
        ]));
        assert!(inventory.drives.is_empty());
        assert!(inventory.flash);
        let all = inventory.warnings.join("; ");
        for word in ["d0", "d1", "d2", "flash memory"] {
            assert!(all.contains(word), "{word} in {all}");
        }
        assert_eq!(inventory.warnings.len(), 4, "{all}");
    }

    fn none() -> Value {
        json!({})
    }

    #[test]
    fn bitmaps_and_what_can_keep_them_are_read() {
        let qcow2 = json!({"inserted": {
        "drv": "qcow2",
        "image": {"format-specific": {"data": {"compat": "1.1"}}},
        "dirty-bitmaps": [
            {"name": "b", "granularity": 65536, "recording": true, "persistent": true},
            {"granularity": 65536}
        ]}});
        let drive = &read(json!([entry("", "vda", "n", &qcow2)])).drives[0];
        assert!(drive.keeps_bitmaps);
        assert_eq!(drive.bitmaps.len(), 1);
        assert!(drive.bitmaps[0].recording && !drive.bitmaps[0].inconsistent);
    }
}
