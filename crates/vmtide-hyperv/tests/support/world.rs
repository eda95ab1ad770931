//! A small stand-in for a Hyper-V host, in memory: the management objects that the cycle of backups uses and the
//! files behind them, with faults, lost answers and callers that die at any call. It keeps what the guest has written
//! byte by byte, and does its own bookkeeping of changes; nothing of it is the code under test.
//!
//! Checkpoints make a new leaf per disk; conversion and destruction take them away and begin a merge that takes time.
//! Time passes only by being waited for.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;
use vmtide_block::{BlockDevice, ByteRange, MemoryDevice, RangeSet, WritableBlockDevice};
use vmtide_cim::{
    Association, Cim, CimError, CimInstance, CimType, CimValue, MethodOutput, ObjectPath, xml,
};
use vmtide_hyperv::{ChangePage, ChangesError, Clock, FileEntry, FrozenFile, HostFiles, NewDisk};
use vmtide_hypervisor::HypervisorError;

/// What the names end with that the host gives to checkpoints.
const NAMELESS: &str = " - (2026)";

/// A day in November 2026.
const EPOCH_S: i64 = 1_795_260_600;

/// What goes wrong, until it is switched off.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// The guest cannot be brought to rest.
    pub vss_fails: bool,
    /// Conversion is refused with this code.
    pub convert_code: Option<u32>,
    /// Creation is refused with this code.
    pub create_code: Option<u32>,
    /// The answers of checkpoints and conversions do not name what was made.
    pub unnamed: bool,
    /// Reference points name no tracking ids.
    pub no_ids: bool,
    /// Reference points name fewer ids than disks.
    pub fewer_ids: bool,
    /// `ReferencePointType`.
    pub point_kind: Option<u16>,
    /// `ConsistencyLevel` of reference points, whatever was asked for.
    pub point_consistency: Option<u16>,
    /// What is asked of change tracking fails.
    pub changes: Option<ChangesError>,
    /// The ranges of one answer of change tracking.
    pub page_ranges: Option<usize>,
    /// Change tracking makes no progress.
    pub no_progress: bool,
    /// More is reported than was written.
    pub over_report: bool,
    /// The files do not tell the most recent id.
    pub no_most_recent: bool,
    /// Merges take so long, in milliseconds.
    pub merge_ms: u64,
    /// A disk cannot be opened: another program holds it.
    pub sharing_violation: bool,
    /// Jobs end with a warning.
    pub job_warns: bool,
    /// Jobs are forgotten at once.
    pub job_vanishes: bool,
    /// `InstanceID`s of reference points are without the VM's id, as on Windows Server 2025.
    pub short_point_ids: bool,
    /// Checkpoints do not hold this disk.
    pub skipped_disk: Option<usize>,
    /// Reference points cannot be destroyed.
    pub points_stick: bool,
    /// Before a conversion somebody removes the checkpoint, and another product converts a later one of its own.
    pub foreign_at_conversion: bool,
    /// While a checkpoint is made, somebody attaches a disk.
    pub disk_at_checkpoint: bool,
    /// While a checkpoint is refused, another product makes its own.
    pub foreign_at_refusal: bool,
}

/// When the caller dies, or an answer is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// At this call, before it has an effect; nothing answers any more.
    DieBefore(u64),
    /// At this call, when it has had its effect.
    DieAfter(u64),
    /// The answer to this call is lost, and the next ones arrive.
    LoseAnswer(u64),
}

#[derive(Clone)]
struct Snapshot {
    id: Uuid,
    name: String,
    kind: &'static str,
    created_s: i64,
    /// Disk by disk: the frozen path, and the counter it is sealed under.
    held: Vec<(usize, String, u32)>,
    consistency: u16,
}

#[derive(Clone)]
struct Point {
    instance_id: String,
    kind: u16,
    consistency: u16,
    disks: Vec<String>,
    ids: Vec<String>,
    /// Disk by disk: the counters it keeps.
    keeps: Vec<(usize, u32)>,
}

/// A disk of a VM.
pub struct Disk {
    sasd: Uuid,
    /// `VIRTUAL_DISK_ID`.
    pub vhd: Uuid,
    /// The location on the SCSI controller.
    pub location: u32,
    base: String,
    live: String,
    /// What the guest sees.
    pub data: Vec<u8>,
    counter: u32,
    log: Vec<(u32, ByteRange)>,
    merging_until_ms: Option<u64>,
}

/// A VM.
pub struct Vm {
    /// Its id.
    pub id: Uuid,
    /// Its name.
    pub name: String,
    /// Its notes.
    pub notes: String,
    /// The version of its configuration.
    pub version: String,
    /// Its disks.
    pub disks: Vec<Disk>,
    snapshots: Vec<Snapshot>,
    points: Vec<Point>,
}

#[derive(Clone)]
struct Job {
    done_ms: u64,
    state: u16,
    error: String,
    affected: Vec<ObjectPath>,
}

/// The state of the host.
#[derive(Default)]
pub struct State {
    /// The VMs.
    pub vms: Vec<Vm>,
    /// The files: frozen content, and what exists.
    files: BTreeMap<String, Option<Arc<Vec<u8>>>>,
    sealed: BTreeMap<String, (usize, usize, u32)>,
    jobs: BTreeMap<String, Job>,
    next: u128,
    now_ms: u64,
    calls: u64,
    cut: Option<Cut>,
    dead: bool,
    /// What goes wrong.
    pub faults: Faults,
    /// How often a disk was opened.
    pub opened: u64,
    /// How far the clock of the machine that makes backups is behind the host's, in seconds.
    pub machine_behind_s: i64,
    /// The fewest reference points that a VM had at any time after its first; to see that a base is never gone early.
    pub destroyed_points: Vec<String>,
    /// What the guest does at every call, by chance or by plan.
    pub guest: Option<Box<dyn FnMut(&mut Vec<Vm>) + Send>>,
}

/// The host.
#[derive(Clone, Default)]
pub struct World(pub Arc<Mutex<State>>);

impl State {
    fn uuid(&mut self) -> Uuid {
        self.next += 1;
        Uuid::from_u128(0x5bfd_e23b_0000_4000_8000_0000_0000_0000 | self.next)
    }

    fn unix_s(&self) -> i64 {
        EPOCH_S + self.now_ms as i64 / 1000
    }

    fn settle(&mut self) {
        let now = self.now_ms;
        for vm in &mut self.vms {
            for disk in &mut vm.disks {
                if disk.merging_until_ms.is_some_and(|until| until <= now) {
                    disk.merging_until_ms = None;
                    self.files.remove(&disk.live);
                    disk.live.clone_from(&disk.base);
                }
            }
        }
    }

    fn vm(&mut self, id: Uuid) -> Option<usize> {
        self.vms.iter().position(|vm| vm.id == id)
    }
}

/// Writes of a guest.
pub fn guest_write(vm: &mut Vm, disk: usize, offset: usize, bytes: &[u8]) {
    let disk = &mut vm.disks[disk];
    disk.data[offset..offset + bytes.len()].copy_from_slice(bytes);
    disk.log.push((disk.counter, ByteRange::new(offset as u64, bytes.len() as u64)));
}

fn attach(state: &mut State, vm: usize, location: u32, size: usize) {
    let (sasd, vhd) = (state.uuid(), state.uuid());
    let base = format!(r"C:\VMs\{}\added{location}.vhdx", state.vms[vm].name);
    state.files.insert(base.clone(), None);
    state.vms[vm].disks.push(Disk {
        sasd,
        vhd,
        location,
        live: base.clone(),
        base,
        data: vec![0; size],
        counter: 0,
        log: Vec::new(),
        merging_until_ms: None,
    });
}

fn guid(id: Uuid) -> String {
    id.to_string().to_ascii_uppercase()
}

fn rct(disk: &Disk, counter: u32) -> String {
    format!("rctX:{}:{counter:08}", disk.vhd.to_string().replace('-', ":"))
}

impl World {
    /// A host without VMs.
    pub fn new() -> Self {
        let world = Self::default();
        world.0.lock().faults.merge_ms = 3000;
        world
    }

    /// Adds a VM with disks of these sizes.
    pub fn add_vm(&self, name: &str, sizes: &[usize]) -> Uuid {
        let mut state = self.0.lock();
        let id = state.uuid();
        let mut disks = Vec::new();
        for (location, size) in sizes.iter().enumerate() {
            let base = format!(r"C:\VMs\{name}\disk{location}.vhdx");
            state.files.insert(base.clone(), None);
            disks.push(Disk {
                sasd: state.uuid(),
                vhd: state.uuid(),
                location: location as u32,
                live: base.clone(),
                base,
                data: vec![0; *size],
                counter: 0,
                log: Vec::new(),
                merging_until_ms: None,
            });
        }
        state.vms.push(Vm {
            id,
            name: name.into(),
            notes: String::new(),
            version: "9.0".into(),
            disks,
            snapshots: Vec::new(),
            points: Vec::new(),
        });
        id
    }

    /// The guest writes.
    pub fn write(&self, vm: usize, disk: usize, offset: usize, bytes: &[u8]) {
        guest_write(&mut self.0.lock().vms[vm], disk, offset, bytes);
    }

    /// Adds a disk to a VM.
    pub fn add_disk(&self, vm: usize, location: u32, size: usize) {
        attach(&mut self.0.lock(), vm, location, size);
    }

    /// Another product's checkpoint and reference point.
    pub fn add_foreign(&self, vm: usize) {
        let mut state = self.0.lock();
        let (snapshot, point) = (state.uuid(), state.uuid());
        let created_s = EPOCH_S + state.now_ms as i64 / 1000 - 86_400;
        let vm = &mut state.vms[vm];
        vm.snapshots.push(Snapshot {
            id: snapshot,
            name: format!("{} - Backup", vm.name),
            kind: "Recovery",
            created_s,
            held: Vec::new(),
            consistency: 1,
        });
        vm.points.push(Point {
            instance_id: format!("Microsoft:{}", guid(point)),
            kind: 2,
            consistency: 1,
            disks: vec!["x".into()],
            ids: vec!["rctX:other:00000001".into()],
            keeps: Vec::new(),
        });
    }

    /// A checkpoint with our name, of an installation that is not known here.
    pub fn add_named(&self, vm: usize, name: &str, age_s: i64) {
        let mut state = self.0.lock();
        let id = state.uuid();
        let created_s = EPOCH_S + state.now_ms as i64 / 1000 - age_s;
        state.vms[vm].snapshots.push(Snapshot {
            id,
            name: name.into(),
            kind: "Recovery",
            created_s,
            held: Vec::new(),
            consistency: 1,
        });
    }

    /// The checkpoints that have the name the host gives.
    pub fn nameless(&self, vm: usize) -> Vec<String> {
        let state = self.0.lock();
        let names = state.vms[vm].snapshots.iter().map(|snapshot| snapshot.name.clone());
        names.filter(|name| name.ends_with(NAMELESS)).collect()
    }

    /// The administrator removes the checkpoints that have the name the host gives.
    pub fn remove_nameless(&self, vm: usize) {
        let mut state = self.0.lock();
        let named = state.vms[vm].snapshots.iter().filter(|one| one.name.ends_with(NAMELESS));
        for id in named.map(|one| one.id).collect::<Vec<_>>() {
            remove_snapshot(&mut state, vm, id);
        }
    }

    /// Somebody removes all checkpoints in the host's tools.
    pub fn remove_all_checkpoints(&self, vm: usize) {
        let mut state = self.0.lock();
        let ids: Vec<_> = state.vms[vm].snapshots.iter().map(|snapshot| snapshot.id).collect();
        for id in ids {
            remove_snapshot(&mut state, vm, id);
        }
    }

    /// From now on this happens at a call, counted from here.
    pub fn cut(&self, cut: Option<Cut>) {
        let mut state = self.0.lock();
        (state.calls, state.dead, state.cut) = (0, false, cut);
    }

    /// The calls since [`cut`](Self::cut).
    pub fn calls(&self) -> u64 {
        self.0.lock().calls
    }

    /// Whether the caller was killed.
    pub fn is_dead(&self) -> bool {
        self.0.lock().dead
    }

    /// Lets time pass.
    pub fn pass(&self, ms: u64) {
        let mut state = self.0.lock();
        state.now_ms += ms;
        state.settle();
    }

    /// What is there beside the VMs' own files: checkpoints by name, and leaves.
    pub fn leftovers(&self) -> Vec<String> {
        let mut state = self.0.lock();
        state.settle();
        let mut found = Vec::new();
        for vm in &state.vms {
            found.extend(vm.snapshots.iter().map(|snapshot| snapshot.name.clone()));
            found.extend(
                vm.disks.iter().filter(|disk| disk.live != disk.base).map(|disk| disk.live.clone()),
            );
        }
        found.extend(state.files.keys().filter(|path| path.ends_with(".avhdx")).cloned());
        found.sort();
        found.dedup();
        found
    }

    /// The reference points of a VM.
    pub fn points(&self, vm: usize) -> Vec<String> {
        self.0.lock().vms[vm].points.iter().map(|point| point.instance_id.clone()).collect()
    }

    /// One call: dies, loses its answer, or has an effect.
    fn call<T, E>(
        &self,
        lost: impl Fn() -> E,
        effect: impl FnOnce(&mut State) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut state = self.0.lock();
        state.calls += 1;
        let number = state.calls;
        if state.dead {
            return Err(lost());
        }
        if state.cut == Some(Cut::DieBefore(number)) {
            state.dead = true;
            return Err(lost());
        }
        if let Some(mut guest) = state.guest.take() {
            guest(&mut state.vms);
            state.guest = Some(guest);
        }
        state.settle();
        let result = effect(&mut state);
        if state.cut == Some(Cut::DieAfter(number)) {
            state.dead = true;
            return Err(lost());
        }
        if state.cut == Some(Cut::LoseAnswer(number)) {
            return Err(lost());
        }
        result
    }
}

impl Clock for World {
    fn now_ms(&self) -> u64 {
        self.0.lock().now_ms
    }
    fn sleep_ms(&self, ms: u64) {
        self.pass(ms);
    }
    fn unix_s(&self) -> i64 {
        let state = self.0.lock();
        state.unix_s() - state.machine_behind_s
    }
}

fn unreachable() -> CimError {
    CimError::Unreachable {
        peer: "the stand-in".into(),
        detail: "the connection broke".into(),
        before_request: false,
    }
}

fn gone() -> HypervisorError {
    HypervisorError::Unreachable {
        peer: "the stand-in".into(),
        detail: "the connection broke".into(),
    }
}

fn datetime(seconds: i64) -> CimValue {
    let time = jiff::Timestamp::from_second(seconds).unwrap();
    CimValue::DateTime(time.strftime("%Y%m%d%H%M%S.000000+000").to_string())
}

fn settings(vm: &Vm, snapshot: Option<&Snapshot>) -> CimInstance {
    let id = guid(snapshot.map_or(vm.id, |snapshot| snapshot.id));
    let kind = snapshot.map_or("System:Realized".into(), |s| format!("Snapshot:{}", s.kind));
    let mut instance = CimInstance::new("Msvm_VirtualSystemSettingData")
        .with("InstanceID", format!("Microsoft:{id}"))
        .with("VirtualSystemIdentifier", guid(vm.id))
        .with("VirtualSystemType", format!("Microsoft:Hyper-V:{kind}"))
        .with("VirtualSystemSubType", "Microsoft:Hyper-V:SubType:2")
        .with("Version", vm.version.as_str())
        .with("ElementName", snapshot.map_or(vm.name.as_str(), |snapshot| &snapshot.name))
        .with("ConfigurationDataRoot", r"C:\VMs")
        .with("ConfigurationFile", format!("Virtual Machines\\{id}.vmcx"))
        .with("Notes", CimValue::strings([vm.notes.as_str()]))
        .with("CreationTime", datetime(snapshot.map_or(EPOCH_S, |snapshot| snapshot.created_s)));
    instance.path = Some(settings_path(&id));
    instance
}

fn settings_path(id: &str) -> ObjectPath {
    ObjectPath::new("Msvm_VirtualSystemSettingData", &[("InstanceID", &format!("Microsoft:{id}"))])
}

fn point_path(point: &Point) -> ObjectPath {
    ObjectPath::new("Msvm_VirtualSystemReferencePoint", &[("InstanceID", &point.instance_id)])
}

fn point_instance(vm: &Vm, point: &Point) -> CimInstance {
    let mut instance = CimInstance::new("Msvm_VirtualSystemReferencePoint")
        .with("InstanceID", point.instance_id.as_str())
        .with("VirtualSystemIdentifier", guid(vm.id))
        .with("ReferencePointType", CimValue::Uint16(point.kind))
        .with("ConsistencyLevel", CimValue::Uint16(point.consistency))
        .with("VirtualDiskIdentifiers", CimValue::strings(point.disks.clone()))
        .with("ResilientChangeTrackingIdentifiers", CimValue::strings(point.ids.clone()));
    instance.path = Some(point_path(point));
    instance
}

/// Controller, drives and extents of a VM or a checkpoint.
fn resources(owner: &str, disks: &[(&Disk, String)]) -> Vec<CimInstance> {
    let device = |id: String, kind: u16| {
        let mut device = CimInstance::new("Msvm_ResourceAllocationSettingData")
            .with("InstanceID", id.as_str())
            .with("ResourceType", CimValue::Uint16(kind));
        device.path =
            Some(ObjectPath::new("Msvm_ResourceAllocationSettingData", &[("InstanceID", &id)]));
        device
    };
    let controller = device(format!(r"Microsoft:{owner}\SCSI\0"), 6);
    let mut all = vec![];
    for (disk, path) in disks {
        let stem = format!(r"Microsoft:{owner}\{}\0\{}", guid(disk.sasd), disk.location);
        let drive = device(format!(r"{stem}\D"), 17)
            .with("Parent", controller.path.as_ref().unwrap())
            .with("AddressOnParent", disk.location.to_string());
        let id = format!(r"{stem}\L");
        let mut extent = CimInstance::new("Msvm_StorageAllocationSettingData")
            .with("InstanceID", id.as_str())
            .with("ResourceType", CimValue::Uint16(31))
            .with("ResourceSubType", "Microsoft:Hyper-V:Virtual Hard Disk")
            .with("Parent", drive.path.as_ref().unwrap())
            .with("HostResource", CimValue::strings([path.as_str()]));
        extent.path =
            Some(ObjectPath::new("Msvm_StorageAllocationSettingData", &[("InstanceID", &id)]));
        all.extend([drive, extent]);
    }
    all.push(controller);
    all
}

fn instances(state: &State, class: &str) -> Vec<CimInstance> {
    let mut all = Vec::new();
    for vm in &state.vms {
        let disks: Vec<_> = vm.disks.iter().map(|disk| (disk, disk.live.clone())).collect();
        let held = |snapshot: &Snapshot| -> Vec<CimInstance> {
            let disks: Vec<_> = snapshot
                .held
                .iter()
                .filter_map(|(disk, path, _)| Some((vm.disks.get(*disk)?, path.clone())))
                .collect();
            resources(&guid(snapshot.id), &disks)
        };
        match class {
            "Msvm_VirtualSystemSettingData" => {
                all.push(settings(vm, None));
                all.extend(vm.snapshots.iter().map(|snapshot| settings(vm, Some(snapshot))));
            }
            "Msvm_ComputerSystem" => {
                let mut system = CimInstance::new(class)
                    .with("CreationClassName", class)
                    .with("Name", guid(vm.id))
                    .with("ElementName", vm.name.as_str())
                    .with("EnabledState", CimValue::Uint16(2));
                system.path = Some(ObjectPath::new(class, &[("Name", &guid(vm.id))]));
                all.push(system);
            }
            "Msvm_VirtualSystemReferencePoint" => {
                all.extend(vm.points.iter().map(|point| point_instance(vm, point)));
            }
            "Msvm_ResourceAllocationSettingData" | "Msvm_StorageAllocationSettingData" => {
                all.extend(resources(&guid(vm.id), &disks));
                all.extend(vm.snapshots.iter().flat_map(held));
                all.retain(|instance| instance.class == class);
            }
            "Win32_OperatingSystem" => {
                return vec![
                    CimInstance::new(class).with("LocalDateTime", datetime(state.unix_s())),
                ];
            }
            service if service.ends_with("Service") => {
                let mut instance = CimInstance::new(service);
                instance.path = Some(ObjectPath::new(service, &[("Name", "vmms")]));
                return vec![instance];
            }
            _ => {}
        }
    }
    all
}

fn literal(text: &str) -> String {
    let mut out = String::new();
    let mut characters = text.trim().trim_matches('\'').chars();
    while let Some(c) = characters.next() {
        out.extend(if c == '\\' { characters.next() } else { Some(c) });
    }
    out.replace("[_]", "_")
}

impl Cim for World {
    fn peer(&self) -> &str {
        "the stand-in"
    }

    fn query(&self, _namespace: &str, wql: &str) -> vmtide_cim::Result<Vec<CimInstance>> {
        self.call(unreachable, |state| {
            let rest = wql.strip_prefix("SELECT * FROM ").expect("a query that is known");
            let (class, filter) = rest.split_once(" WHERE ").unwrap_or((rest, ""));
            let mut found = instances(state, class);
            if let Some((name, value)) = filter.split_once(" LIKE ") {
                let prefix = literal(value).trim_end_matches('%').to_lowercase();
                found.retain(|one| one.text(name).unwrap().to_lowercase().starts_with(&prefix));
            } else if let Some((name, value)) = filter.split_once('=') {
                let value = literal(value);
                found.retain(|one| one.text(name).unwrap().eq_ignore_ascii_case(&value));
            }
            Ok(found)
        })
    }

    fn get(&self, path: &ObjectPath) -> vmtide_cim::Result<CimInstance> {
        let not_found = || CimError::NotFound {
            what: path.to_string(),
            detail: "the stand-in has none".into(),
        };
        self.call(unreachable, |state| {
            if path.class == "Msvm_ConcreteJob" {
                let id = path.key("InstanceID").unwrap_or_default();
                let job = state.jobs.get(id).cloned().ok_or_else(not_found)?;
                let under_way = job.done_ms > state.now_ms;
                let number = if under_way { 4 } else { job.state };
                return Ok(CimInstance::new("Msvm_ConcreteJob")
                    .with("JobState", CimValue::Uint16(number))
                    .with("ErrorCode", CimValue::Uint32(32768))
                    .with("ErrorDescription", job.error.as_str()));
            }
            let found = instances(state, &path.class);
            found.into_iter().find(|one| one.path.as_ref() == Some(path)).ok_or_else(not_found)
        })
    }

    fn associators(&self, _: &ObjectPath, _: &Association) -> vmtide_cim::Result<Vec<CimInstance>> {
        self.call(unreachable, |_| Ok(Vec::new()))
    }

    fn references(
        &self,
        path: &ObjectPath,
        _: &Association,
    ) -> vmtide_cim::Result<Vec<CimInstance>> {
        self.call(unreachable, |state| {
            let job = state.jobs.get(path.key("InstanceID").unwrap_or_default());
            let rows = job.into_iter().flat_map(|job| &job.affected).map(|element| {
                CimInstance::new("Msvm_AffectedJobElement").with("AffectedElement", element).with(
                    "ElementEffects",
                    CimValue::Array(CimType::Uint16, vec![CimValue::Uint16(5)]),
                )
            });
            Ok(rows.collect())
        })
    }

    fn invoke(
        &self,
        path: &ObjectPath,
        method: &str,
        parameters: &[(&str, CimValue)],
    ) -> vmtide_cim::Result<MethodOutput> {
        self.call(unreachable, |state| {
            let reference = |name: &str| {
                let found = parameters.iter().find(|(known, _)| *known == name);
                found.and_then(|(_, value)| value.as_reference()).expect("a reference")
            };
            Ok(match method {
                "CreateSnapshot" => {
                    create_snapshot(state, &reference("AffectedSystem"), parameters)
                }
                "DestroySnapshot" => destroy_snapshot(state, &reference("AffectedSnapshot")),
                "ConvertToReferencePoint" => convert(state, &reference("AffectedSnapshot")),
                "DestroyReferencePoint" => {
                    destroy_point(state, &reference("AffectedReferencePoint"))
                }
                "ModifySystemSettings" => rename(state, parameters),
                "GetErrorEx" | "RequestStateChange" => code(0),
                // What a file is, is not told: the sizes of a description stay unknown.
                "GetVirtualHardDiskSettingData" | "GetVirtualHardDiskState" => code(32779),
                other => panic!("{other} of {path} is not known here"),
            })
        })
    }
}

fn code(return_value: u32) -> MethodOutput {
    MethodOutput { return_value, parameters: CimInstance::default() }
}

/// Starts a job that is done in a second.
fn job(state: &mut State, affected: Vec<ObjectPath>, failed: Option<&str>) -> MethodOutput {
    let id = state.uuid().to_string();
    let warns = state.faults.job_warns;
    let number = if failed.is_some() {
        10
    } else if warns {
        32768
    } else {
        7
    };
    let done_ms = state.now_ms + 1000;
    let affected = if state.faults.unnamed { Vec::new() } else { affected };
    if !state.faults.job_vanishes {
        let error = failed.unwrap_or_default().to_owned();
        state.jobs.insert(id.clone(), Job { done_ms, state: number, error, affected });
    }
    let path = ObjectPath::new("Msvm_ConcreteJob", &[("InstanceID", &id)]);
    MethodOutput { return_value: 4096, parameters: CimInstance::default().with("Job", &path) }
}

fn create_snapshot(
    state: &mut State,
    system: &ObjectPath,
    parameters: &[(&str, CimValue)],
) -> MethodOutput {
    let names: Vec<_> = parameters.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["AffectedSystem", "SnapshotSettings", "SnapshotType"]);
    assert_eq!(parameters[2].1.as_u64(), Some(32768));
    let wanted = xml::from_xml(parameters[1].1.as_str().unwrap()).unwrap();
    let consistency: u16 = wanted.number("ConsistencyLevel").unwrap();
    let id: Uuid = system.key("Name").unwrap().parse().unwrap();
    let Some(index) = state.vm(id) else { return code(32779) };
    if state.faults.foreign_at_refusal
        && (state.faults.create_code.is_some() || consistency == 1 && state.faults.vss_fails)
    {
        let (id, created_s) = (state.uuid(), state.unix_s());
        let name = format!("{} - Other", state.vms[index].name);
        let held = Vec::new();
        let other = Snapshot { id, name, kind: "Recovery", created_s, held, consistency };
        state.vms[index].snapshots.push(other);
    }
    if let Some(refused) = state.faults.create_code {
        return code(refused);
    }
    if state.vms[index].disks.iter().any(|disk| disk.merging_until_ms.is_some()) {
        return code(32775);
    }
    if consistency == 1 && state.faults.vss_fails {
        return job(state, Vec::new(), Some("The guest does not answer."));
    }
    let (snapshot, tag) = (state.uuid(), state.uuid());
    let skipped = state.faults.skipped_disk;
    let created_s = EPOCH_S + state.now_ms as i64 / 1000;
    let vm = &mut state.vms[index];
    let mut held = Vec::new();
    for (number, disk) in vm.disks.iter_mut().enumerate() {
        if skipped == Some(number) {
            continue;
        }
        disk.counter += 1;
        held.push((number, disk.live.clone(), disk.counter));
        let frozen = Arc::new(disk.data.clone());
        state.files.insert(disk.live.clone(), Some(frozen));
        state.sealed.insert(disk.live.clone(), (index, number, disk.counter));
        disk.live = format!(r"C:\VMs\{}\disk{number}_{}.avhdx", vm.name, guid(tag));
        state.files.insert(disk.live.clone(), None);
    }
    vm.snapshots.push(Snapshot {
        id: snapshot,
        name: format!("{}{NAMELESS}", vm.name),
        kind: "Recovery",
        created_s,
        held,
        consistency,
    });
    if std::mem::take(&mut state.faults.disk_at_checkpoint) {
        attach(state, index, 40, 4096);
    }
    job(state, vec![settings_path(&guid(snapshot))], None)
}

fn find_snapshot(state: &State, path: &ObjectPath) -> Option<(usize, Snapshot)> {
    state.vms.iter().enumerate().find_map(|(index, vm)| {
        let found = vm.snapshots.iter().find(|one| settings_path(&guid(one.id)) == *path)?;
        Some((index, found.clone()))
    })
}

/// Takes a checkpoint away; what the VM wrote meanwhile begins to be merged.
fn remove_snapshot(state: &mut State, vm: usize, id: Uuid) {
    let until = state.now_ms + state.faults.merge_ms;
    let vm = &mut state.vms[vm];
    let Some(at) = vm.snapshots.iter().position(|snapshot| snapshot.id == id) else { return };
    let snapshot = vm.snapshots.remove(at);
    for (number, path, _) in snapshot.held {
        vm.disks[number].merging_until_ms = Some(until);
        state.files.insert(path.clone(), None);
        state.sealed.remove(&path);
    }
    state.settle();
}

fn destroy_snapshot(state: &mut State, path: &ObjectPath) -> MethodOutput {
    let Some((vm, snapshot)) = find_snapshot(state, path) else { return code(32773) };
    remove_snapshot(state, vm, snapshot.id);
    job(state, Vec::new(), None)
}

fn convert(state: &mut State, path: &ObjectPath) -> MethodOutput {
    if let Some(refused) = state.faults.convert_code {
        return code(refused);
    }
    let Some((index, snapshot)) = find_snapshot(state, path) else { return code(32773) };
    let (id, faults) = (state.uuid(), state.faults.clone());
    let vm = &state.vms[index];
    let owner = guid(if faults.short_point_ids { snapshot.id } else { vm.id });
    let disk = |number: &usize| &vm.disks[*number];
    let name = |number: &usize| {
        format!(r"Microsoft:{owner}\{}\0\{}\L", guid(disk(number).sasd), disk(number).location)
    };
    let mut ids: Vec<String> =
        snapshot.held.iter().map(|(number, _, counter)| rct(disk(number), *counter)).collect();
    if faults.no_ids {
        ids.clear();
    }
    if faults.fewer_ids {
        ids.pop();
    }
    let instance_id = match faults.short_point_ids {
        true => format!("Microsoft:{}", guid(id)),
        false => format!(r"Microsoft:{}\{}", guid(vm.id), guid(id)),
    };
    let point = Point {
        instance_id,
        kind: faults.point_kind.unwrap_or(2),
        consistency: faults.point_consistency.unwrap_or(snapshot.consistency),
        disks: snapshot.held.iter().map(|(number, ..)| name(number)).collect(),
        ids,
        keeps: snapshot.held.iter().map(|(number, _, counter)| (*number, *counter)).collect(),
    };
    let path = point_path(&point);
    state.vms[index].points.push(point);
    remove_snapshot(state, index, snapshot.id);
    if std::mem::take(&mut state.faults.foreign_at_conversion) {
        return code(32773);
    }
    job(state, vec![path], None)
}

fn destroy_point(state: &mut State, path: &ObjectPath) -> MethodOutput {
    if state.faults.points_stick {
        return code(32775);
    }
    for vm in &mut state.vms {
        if let Some(at) = vm.points.iter().position(|point| point_path(point) == *path) {
            let point = vm.points.remove(at);
            state.destroyed_points.push(point.instance_id);
            return job(state, Vec::new(), None);
        }
    }
    code(32773)
}

fn rename(state: &mut State, parameters: &[(&str, CimValue)]) -> MethodOutput {
    let change = xml::from_xml(parameters[0].1.as_str().unwrap()).unwrap();
    let path = settings_path(change.text("InstanceID").unwrap().trim_start_matches("Microsoft:"));
    let Some((vm, snapshot)) = find_snapshot(state, &path) else { return code(32773) };
    let name = change.text("ElementName").unwrap().to_owned();
    for one in state.vms[vm].snapshots.iter_mut().filter(|one| one.id == snapshot.id) {
        one.name.clone_from(&name);
    }
    code(0)
}

fn no_write<T>() -> vmtide_hypervisor::Result<T> {
    Err(HypervisorError::failed("write", "a backup writes nothing on the host"))
}

impl HostFiles for World {
    fn open_disk(&self, path: &str) -> vmtide_hypervisor::Result<FrozenFile> {
        self.call(gone, |state| {
            state.opened += 1;
            let busy =
                || HypervisorError::Busy { vm: path.into(), detail: "it is written to".into() };
            if state.faults.sharing_violation {
                return Err(busy());
            }
            let content = match state.files.get(path) {
                None => {
                    return Err(HypervisorError::NotFound {
                        what: path.into(),
                        detail: "no such file".into(),
                    });
                }
                Some(None) => return Err(busy()),
                Some(Some(content)) => Arc::clone(content),
            };
            let (vm, disk, counter) = state.sealed[path];
            let disk = &state.vms[vm].disks[disk];
            let device = MemoryDevice::new(content.len());
            device.write_at(&content, 0).unwrap();
            Ok(FrozenFile {
                device: Arc::new(device) as Arc<dyn BlockDevice>,
                format: "vhdx".into(),
                disk_id: Some(disk.vhd),
                most_recent_tracking_id: (!state.faults.no_most_recent).then(|| rct(disk, counter)),
                subtype: "dynamic".into(),
                logical_sector_bytes: 512,
                physical_sector_bytes: 4096,
                block_bytes: 0,
            })
        })
    }

    fn changes(&self, path: &str, id: &str, range: ByteRange) -> Result<ChangePage, ChangesError> {
        self.call(
            || ChangesError::Failed("the connection broke".into()),
            |state| {
                if let Some(error) = &state.faults.changes {
                    return Err(error.clone());
                }
                let Some((index, number, frozen)) = state.sealed.get(path).copied() else {
                    return Err(ChangesError::Failed("sharing violation".into()));
                };
                let (vm, disk) = (&state.vms[index], &state.vms[index].disks[number]);
                let kept = vm.points.iter().flat_map(|point| &point.keeps);
                let since = kept
                    .filter(|(kept, _)| *kept == number)
                    .map(|(_, counter)| *counter)
                    .find(|counter| rct(disk, *counter) == id);
                let Some(since) = since else {
                    return Err(ChangesError::UnknownId("0xC03A0029".into()));
                };
                let written = disk.log.iter().filter(|(epoch, _)| (since..frozen).contains(epoch));
                let all: RangeSet = written.map(|(_, range)| *range).collect();
                Ok(page(state, &all, range, disk.data.len() as u64))
            },
        )
    }

    fn read_file(&self, path: &str, _: u64) -> vmtide_hypervisor::Result<Option<Vec<u8>>> {
        self.call(gone, |_| Ok(path.ends_with(".vmcx").then(|| b"configuration".to_vec())))
    }

    fn list(&self, directory: &str) -> vmtide_hypervisor::Result<Option<Vec<FileEntry>>> {
        self.call(gone, |state| {
            if directory.ends_with("Virtual Machines") {
                let ids = state.vms.iter().flat_map(|vm| {
                    let snapshots = vm.snapshots.iter().map(|snapshot| snapshot.id);
                    snapshots.chain([vm.id]).map(|id| format!("{}.vmcx", guid(id)))
                });
                return Ok(Some(ids.map(|name| FileEntry { name, size_bytes: 13 }).collect()));
            }
            let inside = state.files.keys().filter_map(|path| path.rsplit_once('\\'));
            let names = inside.filter(|(parent, _)| *parent == directory);
            Ok(Some(
                names.map(|(_, name)| FileEntry { name: name.into(), size_bytes: 0 }).collect(),
            ))
        })
    }

    fn free_bytes(&self, _: &str) -> vmtide_hypervisor::Result<Option<u64>> {
        self.call(gone, |_| Ok(None))
    }
    fn create_directory(&self, _: &str) -> vmtide_hypervisor::Result<()> {
        no_write()
    }
    fn write_file(&self, _: &str, _: &[u8]) -> vmtide_hypervisor::Result<()> {
        no_write()
    }
    fn create_disk(
        &self,
        _: &str,
        _: &NewDisk,
    ) -> vmtide_hypervisor::Result<Arc<dyn WritableBlockDevice>> {
        no_write()
    }
    fn open_disk_writable(
        &self,
        _: &str,
    ) -> vmtide_hypervisor::Result<Arc<dyn WritableBlockDevice>> {
        no_write()
    }
    fn remove_file(&self, _: &str) -> vmtide_hypervisor::Result<()> {
        no_write()
    }
}

/// One page of an answer, as the faults want it.
fn page(state: &State, all: &RangeSet, asked: ByteRange, size: u64) -> ChangePage {
    if state.faults.no_progress {
        return ChangePage { ranges: RangeSet::new(), processed_bytes: 0 };
    }
    let all = if state.faults.over_report { all.align_outward(65_536, size) } else { all.clone() };
    let within = all.within(asked);
    let most = state.faults.page_ranges.unwrap_or(usize::MAX);
    match within.as_slice().get(most.saturating_sub(1)) {
        Some(last) if within.as_slice().len() > most => ChangePage {
            ranges: within.iter().take(most).collect(),
            processed_bytes: last.end() - asked.offset,
        },
        _ => ChangePage { ranges: within, processed_bytes: asked.length },
    }
}
