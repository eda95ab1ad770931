//! Where the files of a restored VM go: one directory for the VM, its disks in one below it, as Hyper-V's
//! own tools lay VMs out. The directory is new, so everything in it is ours until the restore has ended.

use super::host_path::{extension_of, file_name_of, join, stem_of};
use std::collections::BTreeSet;
use vmtide_hypervisor::{DiskId, VmConfig};

/// The directory of the disks, within that of the VM.
const DISKS: &str = "Virtual Hard Disks";

/// The directory of configuration files that are imported, within that of the VM: the one in which Hyper-V
/// looks for them, so that what lies above it is the place of the VM.
const IMPORT: &str = "Virtual Machines";

/// The file that says that a VM is not complete, within its directory. Its name is for people.
const MARK: &str = "INCOMPLETE - vmtide is restoring this VM.txt";

/// The most characters of a VM's or disk's name in a file name, so that paths stay below the 260 that
/// parts of Windows take.
const NAME_CHARACTERS: usize = 64;

/// What Windows takes for devices, whatever the extension.
const DEVICES: &[&str] = &["con", "prn", "aux", "nul"];

/// The places of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// The VM's own directory.
    pub directory: String,
    /// That of its disks.
    pub disks: String,
    /// That of its configuration as it is imported.
    pub import: String,
    /// The file that says that it is not complete.
    pub mark: String,
}

impl Layout {
    /// The places of the VM `name` below `root`.
    pub fn new(root: &str, name: &str) -> Self {
        let directory = join(root, &safe_name(name, "vm"));
        Self {
            disks: join(&directory, DISKS),
            import: join(&directory, IMPORT),
            mark: join(&directory, MARK),
            directory,
        }
    }

    /// A path for each disk: the name its file had, where that was a VHDX, else one made of the VM's and
    /// the disk's. No two are the same, whatever the case.
    pub fn disk_paths<'a>(
        &self,
        config: &VmConfig,
        name: &str,
        disks: impl IntoIterator<Item = &'a DiskId>,
    ) -> Vec<String> {
        let mut taken = BTreeSet::new();
        disks
            .into_iter()
            .map(|id| {
                let old = config.disks.iter().find(|disk| disk.id == *id);
                let old = old.and_then(|disk| disk.path.as_deref()).map(file_name_of);
                let stem = match old {
                    // The name of a base; an `.avhdx` has that of a checkpoint.
                    Some(old) if extension_of(old).eq_ignore_ascii_case("vhdx") => {
                        safe_name(stem_of(old), "disk")
                    }
                    _ => safe_name(&format!("{name}-{id}"), "disk"),
                };
                let mut file = format!("{stem}.vhdx");
                let mut number = 2;
                while !taken.insert(file.to_lowercase()) {
                    file = format!("{stem}-{number}.vhdx");
                    number += 1;
                }
                join(&self.disks, &file)
            })
            .collect()
    }
}

/// A name as one part of a path on Windows.
fn safe_name(name: &str, fallback: &str) -> String {
    let mut safe: String = name
        .chars()
        .map(|c| if c.is_control() || "<>:\"/\\|?*".contains(c) { '_' } else { c })
        .take(NAME_CHARACTERS)
        .collect();
    // Windows drops these at the end of a name.
    safe.truncate(safe.trim_end_matches(['.', ' ']).len());
    let safe = safe.trim_start();
    let stem = safe.split('.').next().unwrap_or(safe).trim_end().to_lowercase();
    let is_port = matches!(stem.as_bytes(), [b'c', b'o', b'm', _] | [b'l', b'p', b't', _]);
    if safe.is_empty() {
        fallback.to_owned()
    } else if is_port || DEVICES.contains(&stem.as_str()) {
        format!("_{safe}")
    } else {
        safe.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtide_hypervisor::{DiskBus, DiskConfig};

    #[test]
    fn names_are_safe_on_windows() {
        for (name, safe) in [
            ("web", "web"),
            ("web: test/1", "web_ test_1"),
            ("..\\..\\x", ".._.._x"),
            ("..", "vm"),
            (" ", "vm"),
            ("name. ", "name"),
            ("con", "_con"),
            ("COM1.old", "_COM1.old"),
            ("compute", "compute"),
        ] {
            assert_eq!(safe_name(name, "vm"), safe, "{name:?}");
        }
        assert_eq!(safe_name(&"ä".repeat(300), "vm").chars().count(), NAME_CHARACTERS);
    }

    #[test]
    fn disks_keep_their_names_and_never_share_one() {
        let disk = |id: &str, path: Option<&str>| DiskConfig {
            id: DiskId(id.into()),
            size_bytes: 1,
            bus: DiskBus::Scsi,
            path: path.map(str::to_owned),
            ..DiskConfig::default()
        };
        let config = VmConfig {
            disks: vec![
                disk("scsi0:0", Some(r"C:\VMs\Web.vhdx")),
                disk("scsi0:1", Some(r"D:\data\WEB.VHDX")),
                disk("scsi0:2", Some(r"C:\VMs\web_1234.avhdx")),
                disk("virtio0", Some("/var/lib/web.qcow2")),
            ],
            ..VmConfig::default()
        };
        let layout = Layout::new(r"C:\VMs\", "web");
        let ids: Vec<_> = config.disks.iter().map(|disk| disk.id.clone()).collect();
        let paths = layout.disk_paths(&config, "web", &ids);
        let names: Vec<_> = paths.iter().map(|path| file_name_of(path)).collect();
        assert_eq!(names, ["Web.vhdx", "WEB-2.vhdx", "web-scsi0_2.vhdx", "web-virtio0.vhdx"]);
        assert!(paths.iter().all(|path| path.starts_with(r"C:\VMs\web\Virtual Hard Disks\")));
    }
}
