//! The host from outside: made, driven and looked at by tests.

use crate::cim::{AnswerForm, Connection};
use crate::content::Content;
use crate::faults::Faults;
use crate::files::WorldFiles;
use crate::random::Random;
use crate::state::{State, guid};
use parking_lot::{Mutex, MutexGuard};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;
use uuid::Uuid;
use vmtide_cim::{Cim, CimValue};
use vmtide_hyperv::HostFiles;

/// What the host is like.
#[derive(Clone, Debug)]
pub struct WorldOptions {
    /// The seed of all ids.
    pub seed: u64,
    /// The name of the host.
    pub host_name: String,
    /// `Win32_OperatingSystem.Version`.
    pub os_version: String,
    /// `Win32_OperatingSystem.Caption`.
    pub os_caption: String,
    /// How far time goes on with each call, in milliseconds.
    pub tick_ms: u64,
    /// How long a job takes, in milliseconds.
    pub job_ms: u64,
    /// How long a merge takes, in milliseconds.
    pub merge_ms: u64,
    /// The unit of change tracking in bytes. Real hosts do not tell theirs.
    pub granularity_bytes: u64,
    /// The unit that tracking falls back to when the host crashes, in bytes.
    pub coarse_bytes: u64,
    /// Whether reference points are called `Microsoft:POINT`, not `Microsoft:VM\POINT` (Windows Server 2025).
    pub short_point_ids: bool,
    /// Whether reference points name the disks of the checkpoint, not those of the VM.
    pub points_name_checkpoint_disks: bool,
    /// Whether tracking ids stay known without a reference point or checkpoint.
    pub ids_last: bool,
    /// Whether tracking ids stay known when a disk is written past the host, without the host's knowledge of what was
    /// written.
    pub ids_survive_offline_writes: bool,
    /// Whether a change of its size makes a disk's earlier ids unknown.
    pub resize_loses_ids: bool,
    /// Whether tracking goes on from a checkpoint that is applied as if nothing had been since: ids of later moments stay
    /// known, and new ones are counted from the checkpoint's. What hosts do is not documented; this is the worst of it.
    pub ids_survive_revert: bool,
    /// Whether a VM may have several checkpoints for backups at once.
    pub many_recovery_snapshots: bool,
    /// Physical disks of the host that VMs can be given.
    pub physical_disks: u64,
    /// The free space that volumes report, in bytes.
    pub free_bytes: u64,
    /// The directories that the virus scanner leaves out.
    pub av_exclusions: Vec<String>,
}

impl Default for WorldOptions {
    fn default() -> Self {
        Self {
            seed: 1,
            host_name: "HV1".into(),
            os_version: "10.0.20348".into(),
            os_caption: "Microsoft Windows Server 2022 Datacenter".into(),
            tick_ms: 100,
            job_ms: 400,
            merge_ms: 2000,
            granularity_bytes: 4096,
            coarse_bytes: 1 << 20,
            short_point_ids: false,
            points_name_checkpoint_disks: false,
            ids_last: false,
            ids_survive_offline_writes: false,
            resize_loses_ids: false,
            ids_survive_revert: false,
            many_recovery_snapshots: false,
            physical_disks: 2,
            free_bytes: 500 << 30,
            av_exclusions: vec![r"C:\VMs".into()],
        }
    }
}

/// A stand-in Hyper-V host. Clones are the same host; all calls may be made by many threads.
#[derive(Clone)]
pub struct World {
    state: Arc<Mutex<State>>,
}

/// What backups have left on the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leftovers {
    /// Checkpoints for backups, by their names.
    pub recovery_snapshots: Vec<String>,
    /// Reference points, by their `InstanceID`.
    pub reference_points: Vec<String>,
    /// Differencing files that belong to no checkpoint: still to be merged, or forgotten.
    pub unmerged_files: Vec<String>,
    /// Disk files that clients hold open.
    pub open_files: Vec<String>,
}

impl World {
    /// A host without VMs, with its volumes in `directory`.
    pub fn new(directory: impl AsRef<Path>, options: WorldOptions) -> Self {
        let root = directory.as_ref().to_path_buf();
        std::fs::create_dir_all(root.join("C")).expect("the directory of the host");
        let random = Random::new(options.seed);
        // Of this machine, so that clients which look at their own clock find it right.
        let begun = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let state = State {
            options,
            root,
            now_ms: 0,
            begun_unix_s: begun.map_or(0, |begun| begun.as_secs()),
            random,
            vms: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            points: BTreeMap::new(),
            disks: BTreeMap::new(),
            switches: BTreeMap::new(),
            jobs: BTreeMap::new(),
            faults: Faults::default(),
            handles: Vec::new(),
            events: Vec::new(),
            harm: 0,
            next: 0,
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// A connection that answers as COM does.
    pub fn cim(&self) -> Arc<dyn Cim> {
        self.cim_in(AnswerForm::Typed)
    }

    /// A connection that answers in this form.
    pub fn cim_in(&self, form: AnswerForm) -> Arc<dyn Cim> {
        let peer = format!("stand-in {}", self.lock().options.host_name);
        Arc::new(Connection { world: self.clone(), form, peer })
    }

    /// The host's files.
    pub fn files(&self) -> Arc<dyn HostFiles> {
        Arc::new(WorldFiles { world: self.clone() })
    }

    /// Switches faults. They hold from the next call on.
    pub fn faults<T>(&self, change: impl FnOnce(&mut Faults) -> T) -> T {
        change(&mut self.lock().faults)
    }

    /// Changes what the host is like, e.g. when it was upgraded.
    pub fn configure(&self, change: impl FnOnce(&mut WorldOptions)) {
        change(&mut self.lock().options);
    }

    /// Lets time go on.
    pub fn advance(&self, ms: u64) {
        let mut state = self.lock();
        state.now_ms += ms;
        state.catch_up();
    }

    /// Simulated milliseconds since the host was started.
    pub fn now_ms(&self) -> u64 {
        self.lock().now_ms
    }

    /// The time on the host, in seconds since 1970. It begins with that of this machine.
    pub fn unix_s(&self) -> u64 {
        self.lock().unix_s()
    }

    /// Lets time go on until no job runs and no merge can go on.
    pub fn settle(&self) {
        for _ in 0..10_000 {
            self.advance(1000);
            let state = self.lock();
            let running = state.jobs.values().any(|job| job.end.is_none() && job.due_ms.is_some());
            let merging = state.disks.values().any(|disk| disk.merge.is_some());
            if !running && (!merging || state.faults.merges_blocked) {
                return;
            }
        }
        panic!("the host does not come to rest");
    }

    /// What happened so far, for a person who looks at a failed run.
    pub fn events(&self) -> Vec<String> {
        self.lock().events.clone()
    }

    /// What backups have left.
    pub fn leftovers(&self) -> Leftovers {
        let mut state = self.lock();
        let name = |snapshot: &crate::state::Snapshot| {
            snapshot.configuration.text("ElementName").to_owned()
        };
        let recovery = state.snapshots.values().filter(|snapshot| snapshot.recovery);
        let recovery_snapshots = recovery.map(name).collect();
        let reference_points = state.points.values().map(|p| state.id_of_point(p)).collect();
        let mut unmerged_files = Vec::new();
        for disk in state.disks.values() {
            for (file, node) in &disk.files {
                let Some(parent) = &node.parent else { continue };
                let mut held = state.snapshots.values().flat_map(|s| s.disks.values());
                // One that a checkpoint holds is merged when that is gone.
                if !held.any(|frozen| frozen.path == *parent || frozen.path == *file) {
                    unmerged_files.push(file.clone());
                }
            }
        }
        state.handles.retain(|(_, handle)| handle.strong_count() > 0);
        let open_files = state.handles.iter().map(|(path, _)| path.clone()).collect();
        Leftovers { recovery_snapshots, reference_points, unmerged_files, open_files }
    }

    /// The disks of a VM, in the order of their controllers and locations: the suffix of the allocation, and
    /// the path of the file that the VM writes to.
    pub fn disks(&self, vm: Uuid) -> Vec<(String, String)> {
        let state = self.lock();
        let Some(vm) = state.vms.get(&vm) else { return Vec::new() };
        vm.configuration.disk_paths().map(|(a, b)| (a.to_owned(), b.to_owned())).collect()
    }

    /// The GUID of a disk of a VM, by its number in [`disks`](Self::disks).
    pub fn disk_id(&self, vm: Uuid, disk: usize) -> Uuid {
        let key = self.key(vm, disk);
        self.lock().disks[&key].disk_id
    }

    pub(crate) fn key(&self, vm: Uuid, disk: usize) -> u64 {
        let disks = self.disks(vm);
        let (suffix, _) = disks.get(disk).unwrap_or_else(|| panic!("the VM has no disk {disk}"));
        self.lock().disk_at(vm, suffix).expect("the disk is one of the host")
    }

    /// The guest writes to a disk; also while the VM is frozen. Nothing happens while it does not run.
    pub fn write(&self, vm: Uuid, disk: usize, offset: u64, data: &[u8]) {
        let key = self.key(vm, disk);
        let mut state = self.lock();
        state.catch_up();
        if state.vms.get(&vm).is_some_and(|vm| vm.state == 2) {
            state.write_disk(key, offset, data).expect("the guest writes");
        }
    }

    /// Starts a VM, or turns it off as if the plug were pulled.
    pub fn power(&self, vm: Uuid, on: bool) {
        let done = self.lock().set_vm_state(vm, if on { 2 } else { 3 });
        done.unwrap_or_else(|error| panic!("the VM does not change its state: {error:?}"));
    }

    /// Takes note of what clients have written into the files of a VM that is off, past this host's own
    /// [`files`](Self::files), such as over a share.
    pub fn reread(&self, vm: Uuid) {
        for disk in 0..self.disks(vm).len() {
            let key = self.key(vm, disk);
            self.lock().reread_disk(key).expect("the file of a disk");
        }
    }

    /// What a disk of a VM holds now.
    pub fn content(&self, vm: Uuid, disk: usize) -> Content {
        let key = self.key(vm, disk);
        self.lock().disks[&key].content.clone()
    }

    /// What the disks held when the newest checkpoint for a backup of a VM was made, by the GUID of the disk.
    pub fn frozen_content(&self, vm: Uuid) -> Option<BTreeMap<Uuid, Content>> {
        let state = self.lock();
        let snapshot = state.newest_recovery(vm)?;
        let disks = snapshot.disks.values();
        Some(disks.map(|d| (state.disks[&d.disk].disk_id, d.content.clone())).collect())
    }

    /// What the disks held when the newest checkpoint for a backup of a VM was made, by their location on the
    /// controller; for VMs with one controller.
    pub fn frozen_at(&self, vm: Uuid) -> BTreeMap<u32, Content> {
        let state = self.lock();
        let snapshot = state.newest_recovery(vm);
        let disks = snapshot.into_iter().flat_map(|snapshot| &snapshot.disks);
        disks
            .filter_map(|(suffix, frozen)| {
                let location = suffix.rsplit('\\').nth(1)?.parse().ok()?;
                Some((location, frozen.content.clone()))
            })
            .collect()
    }

    /// The reference points of a VM by their `InstanceID`s, the oldest first.
    pub fn reference_points(&self, vm: Uuid) -> Vec<String> {
        let state = self.lock();
        let mut own: Vec<_> = state.points.values().filter(|point| point.vm == vm).collect();
        own.sort_by_key(|point| point.made);
        own.into_iter().map(|point| state.id_of_point(point)).collect()
    }

    /// Somebody removes a reference point.
    pub fn remove_reference_point(&self, instance_id: &str) {
        let mut state = self.lock();
        let found = state.points.values().find(|point| state.id_of_point(point) == instance_id);
        if let Some(id) = found.map(|point| point.id) {
            drop(state.destroy_point(id));
        }
    }

    /// The tracking ids of a disk of a VM that the host still knows.
    pub fn known_ids(&self, vm: Uuid, disk: usize) -> Vec<String> {
        let key = self.key(vm, disk);
        self.lock().disks[&key].tracking.known_ids().collect()
    }

    /// The checkpoints of a VM, the oldest first: id, name, and whether it is for a backup.
    pub fn snapshots(&self, vm: Uuid) -> Vec<(Uuid, String, bool)> {
        let state = self.lock();
        let mut own: Vec<_> = state.snapshots.values().filter(|s| s.vm == vm).collect();
        own.sort_by_key(|snapshot| snapshot.made);
        own.into_iter()
            .map(|s| (s.id, s.configuration.text("ElementName").to_owned(), s.recovery))
            .collect()
    }

    /// Whether somebody else than the connections of this host's clients has asked for a checkpoint.
    pub fn is_by_other(&self, checkpoint: Uuid) -> bool {
        self.lock().snapshots.get(&checkpoint).is_some_and(|snapshot| snapshot.by_other)
    }

    /// The reference points of a VM that another product has asked for; their `InstanceID`s.
    pub fn points_of_others(&self, vm: Uuid) -> Vec<String> {
        let state = self.lock();
        let others = state.points.values().filter(|point| point.vm == vm && point.by_other);
        others.map(|point| state.id_of_point(point)).collect()
    }

    /// The `InstanceID`s of the jobs that are not forgotten.
    pub fn jobs(&self) -> Vec<String> {
        self.lock().jobs.keys().map(|id| guid(*id)).collect()
    }

    /// How often clients have asked to remove or convert what another product has made.
    pub fn harm(&self) -> u64 {
        self.lock().harm
    }

    /// A property of the settings of a VM or checkpoint.
    pub fn setting(&self, id: Uuid, name: &str) -> Option<CimValue> {
        let state = self.lock();
        let found = state.configurations().find(|(found, _, _)| *found == id);
        found.and_then(|(_, _, configuration)| configuration.settings.value(name).cloned())
    }

    /// The ids of all VMs, also planned ones.
    pub fn vms(&self) -> Vec<Uuid> {
        self.lock().vms.keys().copied().collect()
    }

    /// Whether a VM is only planned, and its `EnabledState`.
    pub fn vm_state(&self, vm: Uuid) -> Option<(bool, u16)> {
        self.lock().vms.get(&vm).map(|vm| (vm.planned, vm.state))
    }

    /// The files of the host below its directory, as the host names them.
    pub fn all_files(&self) -> Vec<String> {
        let root = self.lock().root.clone();
        let mut found = Vec::new();
        let mut open = vec![(root.join("C"), "C:".to_owned())];
        while let Some((directory, name)) = open.pop() {
            for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
                let path = format!(r"{name}\{}", entry.file_name().to_string_lossy());
                if entry.path().is_dir() {
                    open.push((entry.path(), path));
                } else {
                    found.push(path);
                }
            }
        }
        found.sort();
        found
    }

    /// A VM as people speak of it in messages.
    pub fn describe(&self, vm: Uuid) -> String {
        let state = self.lock();
        let name = state.vms.get(&vm).map_or("?", |vm| vm.configuration.text("ElementName"));
        format!("{name} ({})", guid(vm))
    }
}
