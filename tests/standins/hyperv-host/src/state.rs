//! What the host consists of: VMs, disks, checkpoints, reference points and jobs, in memory; the disks' files
//! lie in a directory.

use crate::content::Content;
use crate::faults::Faults;
use crate::images;
use crate::random::Random;
use crate::tracking::Tracking;
use crate::world::WorldOptions;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use uuid::Uuid;
use vmtide_cim::{CimInstance, CimValue, ObjectPath};
use vmtide_image::{Format, ImageWriter};

pub(crate) use crate::jobs::Job;

/// The whole host.
pub(crate) struct State {
    pub(crate) options: WorldOptions,
    pub(crate) root: PathBuf,
    /// Simulated milliseconds since the host was started.
    pub(crate) now_ms: u64,
    /// When the host was started, in seconds since 1970.
    pub(crate) begun_unix_s: u64,
    pub(crate) random: Random,
    pub(crate) vms: BTreeMap<Uuid, Vm>,
    pub(crate) snapshots: BTreeMap<Uuid, Snapshot>,
    pub(crate) points: BTreeMap<Uuid, Point>,
    pub(crate) disks: BTreeMap<u64, Disk>,
    pub(crate) switches: BTreeMap<Uuid, String>,
    pub(crate) jobs: BTreeMap<Uuid, Job>,
    pub(crate) faults: Faults,
    /// The disk files that clients hold open, by their paths.
    pub(crate) handles: Vec<(String, Weak<()>)>,
    /// What happened, for people who look at a failed run.
    pub(crate) events: Vec<String>,
    /// How many objects of other products the clients have asked to remove or convert.
    pub(crate) harm: u64,
    /// Numbers of new disks, file names and objects.
    pub(crate) next: u64,
}

/// A VM, also one that is only planned.
#[derive(Clone, Debug)]
pub(crate) struct Vm {
    pub(crate) id: Uuid,
    pub(crate) planned: bool,
    /// `EnabledState`: 2 running, 3 off, 32768 paused, 32769 saved.
    pub(crate) state: u16,
    pub(crate) configuration: Configuration,
    pub(crate) vss: Vss,
    /// Whether the guest answers over the integration services (KVP).
    pub(crate) kvp: bool,
    /// Whether merges are switched off (`ModifyDiskMergeSettings`, or an export that blocks them).
    pub(crate) merges_off: bool,
    /// The address configuration of the guest by the adapter's suffix.
    pub(crate) guest_networks: BTreeMap<String, CimInstance>,
    pub(crate) last_applied: Option<Uuid>,
    /// The checkpoint that the running state goes on from.
    pub(crate) current_parent: Option<Uuid>,
}

/// The state of VSS in a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Vss {
    /// It works.
    #[default]
    Works,
    /// The guest has no such service.
    Missing,
    /// It answers with an error.
    Fails,
}

/// `Msvm_VirtualSystemSettingData` with its resources.
#[derive(Clone, Debug)]
pub(crate) struct Configuration {
    /// The properties that are set; without `InstanceID`.
    pub(crate) settings: CimInstance,
    pub(crate) resources: Vec<Resource>,
}

/// A resource of a VM: a controller, a drive, a disk, an adapter, …
#[derive(Clone, Debug)]
pub(crate) struct Resource {
    pub(crate) class: String,
    /// What follows `Microsoft:GUID\` in its `InstanceID`.
    pub(crate) suffix: String,
    /// The suffix of the resource that it hangs on.
    pub(crate) parent: Option<String>,
    /// The properties that are set; without `InstanceID` and `Parent`.
    pub(crate) values: CimInstance,
}

/// A virtual disk with the files that it consists of.
pub(crate) struct Disk {
    pub(crate) format: Format,
    /// The GUID within the file; the same along the chain.
    pub(crate) disk_id: Uuid,
    pub(crate) files: BTreeMap<String, Node>,
    /// The file that the VM writes to.
    pub(crate) live: String,
    pub(crate) content: Content,
    pub(crate) tracking: Tracking,
    pub(crate) writer: Option<Arc<dyn ImageWriter>>,
    /// The file that is being merged into its parent, and when that is done.
    pub(crate) merge: Option<(String, u64)>,
}

/// A file of a disk.
#[derive(Clone, Debug, Default)]
pub(crate) struct Node {
    pub(crate) parent: Option<String>,
    /// The number of the tracking id that was sealed when the file was frozen.
    pub(crate) sealed: Option<u32>,
}

/// A checkpoint.
pub(crate) struct Snapshot {
    pub(crate) id: Uuid,
    pub(crate) vm: Uuid,
    pub(crate) recovery: bool,
    /// Whether another product, or a person, has asked for it.
    pub(crate) by_other: bool,
    /// 1 application, 2 crash.
    pub(crate) consistency: u8,
    pub(crate) configuration: Configuration,
    /// Its frozen disks by the suffix of their allocation.
    pub(crate) disks: BTreeMap<String, FrozenDisk>,
    /// The checkpoint before it.
    pub(crate) parent: Option<Uuid>,
    /// Grows from one checkpoint to the next.
    pub(crate) made: u64,
}

/// A disk as a checkpoint holds it.
#[derive(Clone)]
pub(crate) struct FrozenDisk {
    pub(crate) disk: u64,
    pub(crate) path: String,
    pub(crate) content: Content,
    pub(crate) sealed: Option<u32>,
    /// What was tracked until then.
    pub(crate) tracking: Tracking,
}

/// A reference point.
#[derive(Clone, Debug)]
pub(crate) struct Point {
    pub(crate) id: Uuid,
    pub(crate) vm: Uuid,
    pub(crate) consistency: u8,
    pub(crate) kind: u16,
    /// The key of the disk, its identifier, and the number of its tracking id.
    pub(crate) disks: Vec<(u64, String, u32)>,
    /// The tracking ids as the point shows them.
    pub(crate) shown_ids: Vec<String>,
    /// Grows from one reference point to the next.
    pub(crate) made: u64,
    /// Whether another product has asked for it.
    pub(crate) by_other: bool,
}

/// A GUID as WMI writes it.
pub(crate) fn guid(id: Uuid) -> String {
    id.hyphenated().to_string().to_uppercase()
}

impl State {
    /// A path in Hyper-V's namespace, with the host.
    pub(crate) fn path(&self, class: &str, keys: &[(&str, &str)]) -> ObjectPath {
        let mut path = ObjectPath::new(class, keys);
        path.host = Some(self.options.host_name.clone());
        path
    }

    /// The path of an object that has only an `InstanceID`.
    pub(crate) fn path_of_id(&self, class: &str, id: &str) -> ObjectPath {
        self.path(class, &[("InstanceID", id)])
    }

    /// The path of a VM.
    pub(crate) fn path_of_vm(&self, vm: &Vm) -> ObjectPath {
        let class = if vm.planned { "Msvm_PlannedComputerSystem" } else { "Msvm_ComputerSystem" };
        self.path(class, &[("CreationClassName", class), ("Name", &guid(vm.id))])
    }

    /// The path of the settings of a VM or checkpoint.
    pub(crate) fn path_of_settings(&self, id: Uuid) -> ObjectPath {
        self.path_of_id("Msvm_VirtualSystemSettingData", &format!("Microsoft:{}", guid(id)))
    }

    /// The path of a reference point, by the host's form of the id.
    pub(crate) fn path_of_point(&self, point: &Point) -> ObjectPath {
        self.path_of_id("Msvm_VirtualSystemReferencePoint", &self.id_of_point(point))
    }

    /// `InstanceID` of a reference point: it differs between versions of Windows.
    pub(crate) fn id_of_point(&self, point: &Point) -> String {
        if self.options.short_point_ids {
            format!("Microsoft:{}", guid(point.id))
        } else {
            format!(r"Microsoft:{}\{}", guid(point.vm), guid(point.id))
        }
    }

    /// Where a path of the host lies.
    pub(crate) fn local(&self, path: &str) -> Option<PathBuf> {
        images::local_path(&self.root, path)
    }

    /// As [`local`](Self::local), for paths that the host made itself.
    pub(crate) fn own(&self, path: &str) -> PathBuf {
        self.local(path).unwrap_or_else(|| panic!("{path} is no path of the host"))
    }

    /// The disk that has a file at `path`; its key.
    pub(crate) fn disk_of(&self, path: &str) -> Option<u64> {
        let has = |disk: &Disk| disk.files.keys().any(|file| file.eq_ignore_ascii_case(path));
        self.disks.iter().find(|(_, disk)| has(disk)).map(|(key, _)| *key)
    }

    /// The running or paused VM that writes to a disk.
    pub(crate) fn user_of(&self, disk: u64) -> Option<&Vm> {
        let live = &self.disks.get(&disk)?.live;
        self.vms.values().find(|vm| {
            !vm.planned
                && matches!(vm.state, 2 | 32768)
                && vm.configuration.disk_paths().any(|(_, path)| path.eq_ignore_ascii_case(live))
        })
    }

    /// Whether a client holds a file open.
    pub(crate) fn is_open(&mut self, path: &str) -> bool {
        self.handles.retain(|(_, handle)| handle.strong_count() > 0);
        self.handles.iter().any(|(open, _)| open.eq_ignore_ascii_case(path))
    }

    /// The newest checkpoint for a backup of a VM.
    pub(crate) fn newest_recovery(&self, vm: Uuid) -> Option<&Snapshot> {
        let own = self.snapshots.values().filter(|snapshot| snapshot.vm == vm && snapshot.recovery);
        own.max_by_key(|snapshot| snapshot.made)
    }

    /// A new number.
    pub(crate) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// The time on the host, in seconds since 1970.
    pub(crate) const fn unix_s(&self) -> u64 {
        self.begun_unix_s + self.now_ms / 1000
    }

    /// Notes what happened.
    pub(crate) fn note(&mut self, event: impl Into<String>) {
        self.events.push(format!("{} ms: {}", self.now_ms, event.into()));
    }

    /// Forgets the tracking ids for which no checkpoint and no reference point stands any more.
    pub(crate) fn forget_ids(&mut self) {
        if self.options.ids_last {
            return;
        }
        let mut used: BTreeMap<u64, BTreeSet<u32>> = BTreeMap::new();
        for point in self.points.values() {
            for (disk, _, epoch) in &point.disks {
                used.entry(*disk).or_default().insert(*epoch);
            }
        }
        for frozen in self.snapshots.values().flat_map(|snapshot| snapshot.disks.values()) {
            used.entry(frozen.disk).or_default().extend(frozen.sealed);
        }
        for (key, disk) in &mut self.disks {
            disk.tracking.keep(&used.remove(key).unwrap_or_default());
        }
    }

    /// Replaces the path of a disk's file wherever a configuration names it.
    pub(crate) fn rename_file(&mut self, vm_only: Option<Uuid>, from: &str, to: &str) {
        for vm in self.vms.values_mut().filter(|vm| vm_only.is_none_or(|id| id == vm.id)) {
            vm.configuration.rename_file(from, to);
        }
        if vm_only.is_some() {
            return;
        }
        for snapshot in self.snapshots.values_mut() {
            snapshot.configuration.rename_file(from, to);
            for frozen in snapshot.disks.values_mut() {
                if frozen.path == from {
                    to.clone_into(&mut frozen.path);
                }
            }
        }
    }
}

impl Configuration {
    /// The virtual disks: the suffix of the allocation, and the path of the file.
    pub(crate) fn disk_paths(&self) -> impl Iterator<Item = (&str, &str)> {
        self.resources.iter().filter_map(|resource| {
            let kind = resource.values.value("ResourceType").and_then(CimValue::as_u64);
            if resource.class != "Msvm_StorageAllocationSettingData" || kind != Some(31) {
                return None;
            }
            Some((resource.suffix.as_str(), resource.host_resource()?))
        })
    }

    /// A resource by its suffix.
    pub(crate) fn resource(&self, suffix: &str) -> Option<&Resource> {
        self.resources.iter().find(|resource| resource.suffix.eq_ignore_ascii_case(suffix))
    }

    /// A resource by its suffix.
    pub(crate) fn resource_mut(&mut self, suffix: &str) -> Option<&mut Resource> {
        self.resources.iter_mut().find(|resource| resource.suffix.eq_ignore_ascii_case(suffix))
    }

    /// A text of the settings.
    pub(crate) fn text(&self, name: &str) -> &str {
        self.settings.value(name).and_then(CimValue::as_str).unwrap_or_default()
    }

    fn rename_file(&mut self, from: &str, to: &str) {
        for resource in &mut self.resources {
            if resource.host_resource() == Some(from) {
                resource.values.set("HostResource", CimValue::strings([to]));
            }
        }
    }
}

impl Resource {
    /// The first `HostResource`.
    pub(crate) fn host_resource(&self) -> Option<&str> {
        let first = self.values.value("HostResource")?.elements().first()?;
        first.as_str().filter(|text| !text.is_empty())
    }
}
