//! The stand-in host as the tests of the cycle use it: its VMs by their numbers, small disks in memory, callers that die at
//! any call, guests that write meanwhile, and other products.

use parking_lot::Mutex;
use std::path::Path;
use std::sync::{Arc, Weak};
use tempfile::TempDir;
use uuid::Uuid;
use vmtide_block::{ByteRange, WritableBlockDevice};
use vmtide_cim::{Cim, CimValue};
use vmtide_hyperv::{
    ChangePage, ChangesError, Clock, FileEntry, FrozenFile, Host, HostFiles, HostOptions, NewDisk,
};
use vmtide_hypervisor::Result;
use vmtide_standin_hyperv_host::{
    AnswerForm, DiskSpec, FaultPlan, Faults, VmSpec, When, World, WorldOptions,
};

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

/// What happens at every call.
type Guest = Box<dyn FnMut(&TestHost) + Send>;

/// A host. Clones are the same one.
#[derive(Clone)]
pub struct TestHost(Arc<Shared>);

struct Shared {
    world: World,
    inner: Mutex<Inner>,
    _directory: TempDir,
}

struct Inner {
    vms: Vec<Uuid>,
    plan: FaultPlan,
    form: AnswerForm,
    agentless: bool,
    guest: Option<Guest>,
    machine_behind_s: i64,
}

/// A directory in memory, where there is room: the files are many and live shortly.
pub fn directory() -> TempDir {
    let memory = Path::new("/dev/shm");
    if has_room(memory) { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

/// Containers often have no more than 64 MiB.
#[cfg(unix)]
fn has_room(directory: &Path) -> bool {
    let found = rustix::fs::statvfs(directory);
    found.is_ok_and(|found| found.f_bavail.saturating_mul(found.f_frsize) >= 256 << 20)
}

#[cfg(not(unix))]
fn has_room(_: &Path) -> bool {
    false
}

/// What the hosts of these tests are like, but for their name and what a test sets.
pub fn options() -> WorldOptions {
    WorldOptions {
        tick_ms: 10,
        job_ms: 1000,
        merge_ms: 3000,
        granularity_bytes: 1,
        many_recovery_snapshots: true,
        ..WorldOptions::default()
    }
}

impl TestHost {
    /// A host without VMs.
    pub fn new() -> Self {
        Self::with(options())
    }

    /// A host without VMs.
    pub fn with(options: WorldOptions) -> Self {
        let directory = directory();
        let world = World::new(directory.path(), options);
        let inner = Inner {
            vms: Vec::new(),
            plan: FaultPlan::none(),
            form: AnswerForm::Typed,
            agentless: false,
            guest: None,
            machine_behind_s: 0,
        };
        let host =
            Self(Arc::new(Shared { world, inner: Mutex::new(inner), _directory: directory }));
        let shared: Weak<Shared> = Arc::downgrade(&host.0);
        let plan = FaultPlan::none().with_meanwhile(move || {
            if let Some(shared) = shared.upgrade() {
                Self(shared).let_guest_write();
            }
        });
        host.0.inner.lock().plan = plan;
        host.set_faults(Faults::default());
        host
    }

    /// The stand-in itself.
    pub fn world(&self) -> &World {
        &self.0.world
    }

    /// Adds a VM with disks of these sizes.
    pub fn add_vm(&self, name: &str, sizes: &[usize]) -> Uuid {
        let sizes: Vec<u64> = sizes.iter().map(|size| *size as u64).collect();
        self.add(&VmSpec { adapters: Vec::new(), ..VmSpec::new(name, &sizes) })
    }

    /// Adds a VM.
    pub fn add(&self, spec: &VmSpec) -> Uuid {
        let id = self.world().add_vm(spec);
        self.0.inner.lock().vms.push(id);
        id
    }

    /// The id of a VM by its number.
    pub fn id(&self, vm: usize) -> Uuid {
        self.0.inner.lock().vms[vm]
    }

    /// The id of a VM by its name or id.
    pub fn find(&self, vm: &str) -> Uuid {
        let named = |id: &Uuid| {
            self.world().setting(*id, "ElementName").is_some_and(|name| name.as_str() == Some(vm))
        };
        vm.parse().ok().or_else(|| self.world().vms().into_iter().find(named)).unwrap()
    }

    /// The guest writes.
    pub fn write(&self, vm: usize, disk: usize, offset: usize, bytes: &[u8]) {
        self.world().write(self.id(vm), disk, offset as u64, bytes);
    }

    /// What a disk holds.
    pub fn data(&self, vm: usize, disk: usize) -> Vec<u8> {
        let content = self.world().content(self.id(vm), disk);
        content.read(0, content.size_bytes() as usize)
    }

    /// The size of a disk in bytes.
    pub fn size(&self, vm: usize, disk: usize) -> usize {
        self.world().content(self.id(vm), disk).size_bytes() as usize
    }

    /// How many disks a VM has.
    pub fn disks(&self, vm: usize) -> usize {
        self.world().disks(self.id(vm)).len()
    }

    /// The location of a disk on its controller.
    pub fn location(&self, vm: usize, disk: usize) -> u32 {
        let (suffix, _) = self.world().disks(self.id(vm))[disk].clone();
        suffix.rsplit('\\').nth(1).unwrap().parse().unwrap()
    }

    /// Moves a disk to a free location.
    pub fn place(&self, vm: usize, disk: usize, location: u32) {
        self.world().move_disk(self.id(vm), disk, location);
    }

    /// Two disks trade places.
    pub fn swap(&self, vm: usize, one: usize, other: usize) {
        let (here, there) = (self.location(vm, one), self.location(vm, other));
        if one != other {
            self.place(vm, one, 63);
            self.place(vm, other, here);
            self.place(vm, one, there);
        }
    }

    /// Adds a disk to a VM.
    pub fn add_disk(&self, vm: usize, location: u32, size: usize) {
        self.world().attach_disk(self.id(vm), &DiskSpec::scsi(location, size as u64));
    }

    /// Switches faults.
    pub fn faults(&self, change: impl FnOnce(&mut Faults)) {
        self.world().faults(change);
    }

    /// Puts faults in the place of all that were.
    pub fn set_faults(&self, faults: Faults) {
        // As hosts are: none takes a checkpoint while disks are merged.
        self.faults(|known| *known = Faults { refuse_while_merging: true, ..faults });
    }

    /// What is asked is answered as over the network: texts, changes by WMI, files that do not tell their newest id.
    pub fn set_agentless(&self, agentless: bool) {
        let mut inner = self.0.inner.lock();
        inner.agentless = agentless;
        inner.form = if agentless { AnswerForm::Texts } else { AnswerForm::Typed };
    }

    /// How far the clock of the machine that makes backups is behind the host's, in seconds.
    pub fn set_machine_behind(&self, seconds: i64) {
        self.0.inner.lock().machine_behind_s = seconds;
    }

    /// What the guests do at every call.
    pub fn set_guest(&self, guest: Option<Guest>) {
        self.0.inner.lock().guest = guest;
    }

    /// From now on this happens at a call, counted from here.
    pub fn cut(&self, cut: Option<Cut>) {
        let begun = match cut {
            None => FaultPlan::none(),
            Some(Cut::DieBefore(at)) => FaultPlan::kill_at(at, When::Before),
            Some(Cut::DieAfter(at)) => FaultPlan::kill_at(at, When::After),
            Some(Cut::LoseAnswer(at)) => FaultPlan::lose_at(at, When::After),
        };
        let plan = self.0.inner.lock().plan.clone();
        plan.restart_as(&begun);
    }

    fn let_guest_write(&self) {
        let guest = self.0.inner.lock().guest.take();
        if let Some(mut guest) = guest {
            guest(self);
            self.0.inner.lock().guest.get_or_insert(guest);
        }
    }

    /// The calls since [`cut`](Self::cut).
    pub fn calls(&self) -> u64 {
        self.0.inner.lock().plan.calls()
    }

    /// Whether the caller was killed.
    pub fn is_dead(&self) -> bool {
        self.0.inner.lock().plan.is_dead()
    }

    /// The two ways to the host, control and files, for one process.
    pub fn connect(&self) -> (Host, Arc<dyn HostFiles>) {
        let (plan, form, agentless) = {
            let inner = self.0.inner.lock();
            (inner.plan.clone(), inner.form, inner.agentless)
        };
        let cim: Arc<dyn Cim> = plan.cim(self.world().cim_in(form));
        let options = HostOptions { clock: Arc::new(self.clone()), ..HostOptions::default() };
        let host = Host::new(cim, options);
        let files = plan.files(self.world().files());
        if agentless {
            return (host.clone(), Arc::new(Remote { host, files }));
        }
        (host, files)
    }

    /// Lets time pass, with everything that takes it.
    pub fn pass(&self, ms: u64) {
        const STEPS: u64 = 16;
        for _ in 0..STEPS {
            self.world().advance(ms.div_ceil(STEPS));
        }
    }

    /// Another product's checkpoint, a day old, and its reference point.
    pub fn add_foreign(&self, vm: usize) {
        let id = self.id(vm);
        self.world().foreign_reference_point(id).unwrap();
        self.pass(60_000);
        let name = self.world().setting(id, "ElementName").unwrap();
        self.add_named(vm, &format!("{} - Backup", name.as_str().unwrap()), 86_400);
    }

    /// A checkpoint for a backup with this name, of somebody who is not known here.
    pub fn add_named(&self, vm: usize, name: &str, age_s: i64) {
        let id = self.world().foreign_recovery_checkpoint(self.id(vm)).unwrap();
        let made = jiff::Timestamp::from_second(self.world().unix_s() as i64 - age_s).unwrap();
        let text = made.strftime("%Y%m%d%H%M%S.000000+000").to_string();
        self.world().set(id, "ElementName", name);
        self.world().set(id, "CreationTime", CimValue::DateTime(text));
    }

    fn is_nameless(&self, id: Uuid, name: &str, recovery: bool) -> bool {
        recovery && name.ends_with(" ms)") && !self.world().is_by_other(id)
    }

    /// The checkpoints for our backups that have the name the host gives.
    pub fn nameless(&self, vm: usize) -> Vec<String> {
        let all = self.world().snapshots(self.id(vm)).into_iter();
        let own = all.filter(|(id, name, recovery)| self.is_nameless(*id, name, *recovery));
        own.map(|(_, name, _)| name).collect()
    }

    /// The administrator removes those of our checkpoints that have the name the host gives.
    pub fn remove_nameless(&self, vm: usize) {
        for (id, name, recovery) in self.world().snapshots(self.id(vm)) {
            if self.is_nameless(id, &name, recovery) {
                self.world().remove_checkpoint(id);
            }
        }
    }

    /// The checkpoints for backups that other products have made; their ids.
    pub fn of_others(&self, vm: usize) -> Vec<Uuid> {
        let all = self.world().snapshots(self.id(vm)).into_iter();
        let others = all.filter(|(id, _, recovery)| *recovery && self.world().is_by_other(*id));
        others.map(|(id, _, _)| id).collect()
    }

    /// Somebody removes all checkpoints in the host's tools.
    pub fn remove_all_checkpoints(&self, vm: usize) {
        for (id, _, _) in self.world().snapshots(self.id(vm)) {
            self.world().remove_checkpoint(id);
        }
    }

    /// What is there beside the VMs' own files: checkpoints for backups by name, files that are still to be merged, and those
    /// that clients hold open.
    pub fn leftovers(&self) -> Vec<String> {
        let left = self.world().leftovers();
        let open = left.open_files.iter().map(|path| format!("open: {path}"));
        let mut found: Vec<String> = left.recovery_snapshots.into_iter().chain(open).collect();
        found.extend(left.unmerged_files);
        found.sort();
        found
    }

    /// The reference points of a VM, the oldest first, as [`bare`] writes them.
    pub fn points(&self, vm: usize) -> Vec<String> {
        self.world().reference_points(self.id(vm)).iter().map(|id| bare(id)).collect()
    }

    /// The administrator removes a reference point.
    pub fn remove_point(&self, vm: usize, point: &str) {
        let all = self.world().reference_points(self.id(vm));
        let id = all.iter().find(|id| bare(id) == point).unwrap();
        self.world().remove_reference_point(id);
    }
}

/// What in the `InstanceID` of a reference point is the same before and after an upgrade of the host.
pub fn bare(id: &str) -> String {
    id.rsplit(['\\', ':']).next().unwrap().to_lowercase()
}

impl Clock for TestHost {
    fn now_ms(&self) -> u64 {
        self.world().now_ms()
    }
    fn sleep_ms(&self, ms: u64) {
        self.world().advance(ms);
    }
    fn unix_s(&self) -> i64 {
        self.world().unix_s() as i64 - self.0.inner.lock().machine_behind_s
    }
}

/// The files of a host as they are reached over the network.
struct Remote {
    host: Host,
    files: Arc<dyn HostFiles>,
}

impl HostFiles for Remote {
    fn open_disk(&self, path: &str) -> Result<FrozenFile> {
        Ok(FrozenFile { most_recent_tracking_id: None, ..self.files.open_disk(path)? })
    }
    fn changes(&self, path: &str, id: &str, range: ByteRange) -> Result<ChangePage, ChangesError> {
        self.host.virtual_disk_changes(path, id, range)
    }
    fn read_file(&self, path: &str, limit_bytes: u64) -> Result<Option<Vec<u8>>> {
        self.files.read_file(path, limit_bytes)
    }
    fn list(&self, directory: &str) -> Result<Option<Vec<FileEntry>>> {
        self.files.list(directory)
    }
    fn free_bytes(&self, directory: &str) -> Result<Option<u64>> {
        self.files.free_bytes(directory)
    }
    fn create_directory(&self, path: &str) -> Result<()> {
        self.files.create_directory(path)
    }
    fn write_file(&self, path: &str, content: &[u8]) -> Result<()> {
        self.files.write_file(path, content)
    }
    fn create_disk(&self, path: &str, disk: &NewDisk) -> Result<Arc<dyn WritableBlockDevice>> {
        self.files.create_disk(path, disk)
    }
    fn open_disk_writable(&self, path: &str) -> Result<Arc<dyn WritableBlockDevice>> {
        self.files.open_disk_writable(path)
    }
    fn remove_file(&self, path: &str) -> Result<()> {
        self.files.remove_file(path)
    }
}
