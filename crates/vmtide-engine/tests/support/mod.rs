//! What the tests of jobs share: a repository in a temporary directory, and a scripted stand-in
//! for a hypervisor, whose disks, answers and faults a test chooses.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, CancelToken, Extent, MemoryDevice, Progress, RangeSet,
    Result as BlockResult, WritableBlockDevice,
};
use vmtide_engine::{BackupJob, BackupSummary, Event, JobContext, LevelChoice, Observer, backup};
use vmtide_hypervisor::{
    Changes, Consistency, DiskBus, DiskConfig, DiskId, FreezeRequest, FrozenDisk, FrozenVm,
    Hypervisor, HypervisorError, ReapReport, Result, TrackingId, VmConfig, VmSummary,
};
use vmtide_repo::{BackupOptions, Encryption, InitOptions, LocalStore, Repository};

/// A repository that vanishes with the test.
pub struct TestRepository {
    pub directory: tempfile::TempDir,
    pub repository: Repository,
}

impl TestRepository {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = LocalStore::create(directory.path().join("repository")).unwrap();
        let options = InitOptions { encryption: Encryption::None, ..InitOptions::default() };
        let repository = Repository::init(Arc::new(store), &options, None).unwrap();
        Self { directory, repository }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn points(&self) -> usize {
        self.repository.points().unwrap().points.len()
    }

    /// Flips a bit in every map segment.
    pub fn damage_maps(&self) {
        for entry in std::fs::read_dir(self.path("repository/maps")).unwrap() {
            flip_a_bit(&entry.unwrap().path());
        }
    }

    /// Flips a bit in the object of a restore point.
    pub fn damage_point(&self, id: vmtide_repo::ObjectId) {
        let mut waiting = vec![self.path("repository/points")];
        while let Some(path) = waiting.pop() {
            if path.is_dir() {
                waiting.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
            } else if path.ends_with(id.to_string()) {
                flip_a_bit(&path);
            }
        }
        assert_eq!(self.repository.points().unwrap().unreadable.len(), 1);
    }
}

fn flip_a_bit(path: &std::path::Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    // Objects are read-only; another file takes its place.
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// A disk whose reads fail from an offset on, when told to.
pub struct FaultyDevice {
    pub memory: MemoryDevice,
    pub fail_from: Mutex<Option<u64>>,
    pub cancel_on_read: Mutex<Option<CancelToken>>,
}

impl BlockDevice for FaultyDevice {
    fn name(&self) -> String {
        "faulty disk".into()
    }
    fn size_bytes(&self) -> u64 {
        self.memory.size_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> BlockResult<()> {
        if let Some(cancel) = &*self.cancel_on_read.lock() {
            cancel.cancel();
        }
        let end = offset + buffer.len() as u64;
        if self.fail_from.lock().is_some_and(|from| end > from) {
            let error = std::io::Error::from_raw_os_error(5);
            return Err(BlockError::io(format!("read faulty disk at {offset}"), error));
        }
        self.memory.read_at(buffer, offset)
    }
    fn extents(&self, range: ByteRange) -> BlockResult<Vec<Extent>> {
        self.memory.extents(range)
    }
}

/// How the platform answers a question for changes.
#[derive(Clone)]
pub enum Answer {
    /// With the truth.
    Truth,
    /// With this.
    Say(Changes),
}

/// What the stand-in was asked and told.
#[derive(Default)]
pub struct Calls {
    pub freezes: AtomicU32,
    pub commits: AtomicU32,
    pub aborts: AtomicU32,
    pub requests: Mutex<Vec<FreezeRequest>>,
}

impl Calls {
    /// Freezes, commits, aborts.
    pub fn counts(&self) -> (u32, u32, u32) {
        let get = |count: &AtomicU32| count.load(Ordering::SeqCst);
        (get(&self.freezes), get(&self.commits), get(&self.aborts))
    }
}

/// One disk of the stand-in's VM.
pub struct ScriptedDisk {
    pub id: String,
    pub device: Arc<FaultyDevice>,
    pub written: Mutex<RangeSet>,
    pub answer: Mutex<Answer>,
}

/// A stand-in for a hypervisor with one VM, which tracks the changes of its disks.
pub struct ScriptedHypervisor {
    pub disks: Vec<Arc<ScriptedDisk>>,
    pub calls: Arc<Calls>,
    pub best: Consistency,
    pub freeze_fails: AtomicBool,
    pub commit_fails: Arc<AtomicBool>,
    pub abort_fails: Arc<AtomicBool>,
    /// The disks stop being those of one moment.
    pub check_fails: Arc<AtomicBool>,
    /// Claims to have reached this although more was asked and no downgrade allowed.
    pub lies_about_consistency: AtomicBool,
    pub moment: AtomicU32,
}

impl ScriptedHypervisor {
    pub fn new(disks: &[(&str, usize)]) -> Self {
        let disk = |(id, size): &(&str, usize)| {
            let memory = MemoryDevice::new(*size);
            let data: Vec<u8> = (0..*size / 2).map(|at| (at / 4096 % 251 + 1) as u8).collect();
            memory.write_at(&data, 0).unwrap();
            Arc::new(ScriptedDisk {
                id: (*id).into(),
                device: Arc::new(FaultyDevice {
                    memory,
                    fail_from: Mutex::new(None),
                    cancel_on_read: Mutex::new(None),
                }),
                written: Mutex::new(RangeSet::new()),
                answer: Mutex::new(Answer::Truth),
            })
        };
        Self {
            disks: disks.iter().map(disk).collect(),
            calls: Arc::default(),
            best: Consistency::Crash,
            freeze_fails: AtomicBool::new(false),
            commit_fails: Arc::default(),
            abort_fails: Arc::default(),
            check_fails: Arc::default(),
            lies_about_consistency: AtomicBool::new(false),
            moment: AtomicU32::new(0),
        }
    }

    /// The guest writes.
    pub fn write(&self, disk: usize, offset: u64, data: &[u8]) {
        let disk = &self.disks[disk];
        disk.device.memory.write_at(data, offset).unwrap();
        disk.written.lock().insert(ByteRange::new(offset, data.len() as u64));
    }

    fn freeze_disk(&self, disk: &ScriptedDisk, request: &FreezeRequest, moment: u32) -> FrozenDisk {
        let id = DiskId(disk.id.clone());
        let changes = match (&*disk.answer.lock(), request.bases.get(&id)) {
            (Answer::Say(changes), _) => changes.clone(),
            (Answer::Truth, None) => {
                Changes::Everything(vmtide_hypervisor::FullReason::FirstBackup)
            }
            (Answer::Truth, Some(_)) => Changes::Ranges(disk.written.lock().clone()),
        };
        FrozenDisk {
            id,
            device: Arc::clone(&disk.device) as Arc<dyn BlockDevice>,
            changes,
            tracking: Some(TrackingId(format!("moment-{moment}"))),
        }
    }
}

impl Hypervisor for ScriptedHypervisor {
    fn list(&self) -> Result<Vec<VmSummary>> {
        Ok(Vec::new())
    }

    fn describe(&self, _vm: &str) -> Result<VmConfig> {
        let disk = |disk: &Arc<ScriptedDisk>| DiskConfig {
            id: DiskId(disk.id.clone()),
            size_bytes: disk.device.size_bytes(),
            bus: DiskBus::Other,
            format: None,
            path: None,
            ..DiskConfig::default()
        };
        Ok(VmConfig {
            name: "web".into(),
            platform: "stand-in".into(),
            disks: self.disks.iter().map(disk).collect(),
            ..VmConfig::default()
        })
    }

    fn freeze(&self, request: &FreezeRequest) -> Result<Box<dyn FrozenVm>> {
        self.calls.freezes.fetch_add(1, Ordering::SeqCst);
        self.calls.requests.lock().push(request.clone());
        if self.freeze_fails.load(Ordering::SeqCst) {
            return Err(HypervisorError::failed("freeze", "the stand-in refuses"));
        }
        let lower = self.best < request.consistency;
        if lower && !request.allow_downgrade && !self.lies_about_consistency.load(Ordering::SeqCst)
        {
            return Err(HypervisorError::ConsistencyNotReached {
                wanted: request.consistency,
                detail: "the stand-in has no agent".into(),
            });
        }
        let moment = self.moment.fetch_add(1, Ordering::SeqCst);
        let kept = self
            .disks
            .iter()
            .filter(|disk| !request.exclude.iter().any(|excluded| excluded.0 == disk.id));
        let disks = kept.map(|disk| self.freeze_disk(disk, request, moment)).collect();
        Ok(Box::new(ScriptedFrozen {
            config: self.describe("web")?,
            disks,
            reached: self.best.min(request.consistency),
            tracked: self.disks.clone(),
            calls: Arc::clone(&self.calls),
            commit_fails: Arc::clone(&self.commit_fails),
            abort_fails: Arc::clone(&self.abort_fails),
            check_fails: Arc::clone(&self.check_fails),
        }))
    }

    fn reap(&self) -> Result<ReapReport> {
        Ok(ReapReport::default())
    }
}

struct ScriptedFrozen {
    config: VmConfig,
    disks: Vec<FrozenDisk>,
    reached: Consistency,
    tracked: Vec<Arc<ScriptedDisk>>,
    calls: Arc<Calls>,
    commit_fails: Arc<AtomicBool>,
    abort_fails: Arc<AtomicBool>,
    check_fails: Arc<AtomicBool>,
}

impl FrozenVm for ScriptedFrozen {
    fn config(&self) -> &VmConfig {
        &self.config
    }
    fn consistency(&self) -> Consistency {
        self.reached
    }
    fn downgrade_reason(&self) -> Option<&str> {
        Some("the stand-in has no agent")
    }
    fn warnings(&self) -> &[String] {
        &[]
    }
    fn disks(&self) -> &[FrozenDisk] {
        &self.disks
    }
    fn check(&self) -> Result<()> {
        if self.check_fails.load(Ordering::SeqCst) {
            return Err(HypervisorError::failed("hold the moment", "the scratch space is full"));
        }
        Ok(())
    }
    fn commit(self: Box<Self>) -> Result<Vec<String>> {
        self.calls.commits.fetch_add(1, Ordering::SeqCst);
        if self.commit_fails.load(Ordering::SeqCst) {
            return Err(HypervisorError::failed("keep the tracking", "the stand-in lost it"));
        }
        self.tracked.iter().for_each(|disk| *disk.written.lock() = RangeSet::new());
        Ok(Vec::new())
    }
    fn abort(self: Box<Self>) -> Result<()> {
        self.calls.aborts.fetch_add(1, Ordering::SeqCst);
        if self.abort_fails.load(Ordering::SeqCst) {
            return Err(HypervisorError::failed("undo", "the stand-in is gone"));
        }
        Ok(())
    }
}

/// Keeps the events of a job.
#[derive(Default)]
pub struct Recorder(pub Mutex<Vec<Event>>);

impl Observer for Recorder {
    fn event(&self, event: Event) {
        self.0.lock().push(event);
    }
}

impl Recorder {
    pub fn warnings(&self) -> Vec<String> {
        let events = self.0.lock();
        let texts = events.iter().filter_map(|event| match event {
            Event::Warning { message } => Some(message.clone()),
            _ => None,
        });
        texts.collect()
    }
}

/// A backup job with the defaults.
pub fn job<'a>(repository: &'a Repository, hypervisor: &'a dyn Hypervisor) -> BackupJob<'a> {
    BackupJob {
        repository,
        hypervisor,
        vm: "web".into(),
        name: None,
        source: "stand-in".into(),
        level: LevelChoice::Auto,
        outside_changes: false,
        consistency: None,
        allow_downgrade: false,
        tags: BTreeMap::new(),
        exclude: Vec::new(),
        is_one_of_many: false,
        check_unchanged: 0,
        options: BackupOptions { workers: 2, ..BackupOptions::default() },
    }
}

/// Runs a job with nobody watching.
pub fn run(job: &BackupJob<'_>) -> vmtide_engine::Result<BackupSummary> {
    run_with(job, &Recorder::default(), &CancelToken::new())
}

/// Runs a job.
pub fn run_with(
    job: &BackupJob<'_>,
    recorder: &Recorder,
    cancel: &CancelToken,
) -> vmtide_engine::Result<BackupSummary> {
    let progress = Progress::new();
    backup(job, JobContext { progress: &progress, cancel, observer: recorder })
}

/// All bytes of a disk.
pub fn content(device: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(device.size_bytes()).unwrap()];
    device.read_at(&mut bytes, 0).unwrap();
    bytes
}
