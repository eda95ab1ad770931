//! Restores of whole VMs to a stand-in for a platform, which keeps disks in memory and says what it was told.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests: a failed unwrap is a failed test"
)]

use crate::support;

use parking_lot::Mutex;
use std::sync::Arc;
use support::{ScriptedHypervisor, TestRepository, job, run};
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, CancelToken, Extent, MemoryDevice, Progress, RangeSet,
    Result as BlockResult, WritableBlockDevice,
};
use vmtide_engine::{
    EngineError, JobContext, NewVmOptions, RestoreVmJob, RestoreVmSummary, Result, Silent,
    VmTarget, restore_vm,
};
use vmtide_hypervisor::{
    DiskContent, FullReason, InPlaceRequest, NewVmRequest, ReapReport, RestoredVm, RestoringDisk,
    RestoringVm, Result as PlatformResult, VmRestorer,
};
use vmtide_repo::RestorePoint;

/// A disk of the platform, which may lose what is written.
struct Disk {
    memory: MemoryDevice,
    loses: bool,
    fails: bool,
}

impl BlockDevice for Disk {
    fn name(&self) -> String {
        "a disk of the platform".into()
    }
    fn size_bytes(&self) -> u64 {
        self.memory.size_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> BlockResult<()> {
        self.memory.read_at(buffer, offset)
    }
    fn extents(&self, range: ByteRange) -> BlockResult<Vec<Extent>> {
        self.memory.extents(range)
    }
}

impl WritableBlockDevice for Disk {
    fn write_at(&self, data: &[u8], offset: u64) -> BlockResult<()> {
        if self.fails {
            return Err(BlockError::unsupported("a disk of the platform", "switched on"));
        }
        if self.loses { Ok(()) } else { self.memory.write_at(data, offset) }
    }
    fn write_zeroes(&self, range: ByteRange) -> BlockResult<()> {
        self.memory.write_zeroes(range)
    }
    fn flush(&self) -> BlockResult<()> {
        Ok(())
    }
}

/// The platform: what it is asked, the disks it gives, and what was told to it at the end.
#[derive(Default)]
struct Platform {
    begun: Mutex<Option<NewVmRequest>>,
    in_place: Mutex<Option<InPlaceRequest>>,
    /// What the disks hold before; empty for zeros.
    before: Mutex<Vec<Vec<u8>>>,
    content: Mutex<Option<DiskContent>>,
    disks: Mutex<Vec<Arc<Disk>>>,
    ends: Arc<Mutex<Vec<&'static str>>>,
    loses: bool,
    fails: bool,
}

struct Vm {
    disks: Vec<RestoringDisk>,
    warnings: Vec<String>,
    ends: Arc<Mutex<Vec<&'static str>>>,
}

impl RestoringVm for Vm {
    fn disks(&self) -> &[RestoringDisk] {
        &self.disks
    }
    fn warnings(&self) -> &[String] {
        &self.warnings
    }
    fn finish(mut self: Box<Self>, power_on: bool) -> PlatformResult<RestoredVm> {
        self.ends.lock().push("finish");
        self.warnings.push("late".into());
        let (name, warnings) = ("web".to_owned(), self.warnings.clone());
        Ok(RestoredVm { name, powered_on: power_on, warnings, ..RestoredVm::default() })
    }
    fn abort(self: Box<Self>) -> PlatformResult<()> {
        self.ends.lock().push("abort");
        Ok(())
    }
}

impl Platform {
    fn vm(&self, disks: &[vmtide_hypervisor::DiskToRestore]) -> Box<dyn RestoringVm> {
        let before = self.before.lock();
        let content = self.content.lock().clone().unwrap_or(DiskContent::Zeros);
        let made = disks.iter().enumerate().map(|(index, disk)| {
            let zeros = || vec![0; usize::try_from(disk.size_bytes).unwrap()];
            let bytes = before.get(index).cloned().unwrap_or_else(zeros);
            let memory = MemoryDevice::from_bytes(bytes);
            let device = Arc::new(Disk { memory, loses: self.loses, fails: self.fails });
            self.disks.lock().push(device.clone());
            RestoringDisk {
                id: disk.id.clone(),
                path: format!("C:\\{}.vhdx", disk.id),
                format: "vhdx".into(),
                device,
                content: content.clone(),
            }
        });
        Box::new(Vm {
            disks: made.collect(),
            warnings: vec!["early".into()],
            ends: self.ends.clone(),
        })
    }
}

impl VmRestorer for Platform {
    fn begin(&self, request: &NewVmRequest) -> PlatformResult<Box<dyn RestoringVm>> {
        *self.begun.lock() = Some(request.clone());
        Ok(self.vm(&request.disks))
    }
    fn begin_in_place(&self, request: &InPlaceRequest) -> PlatformResult<Box<dyn RestoringVm>> {
        *self.in_place.lock() = Some(request.clone());
        Ok(self.vm(&request.disks))
    }
    fn reap_restores(&self) -> PlatformResult<ReapReport> {
        Ok(ReapReport::default())
    }
}

const MIB: usize = 1 << 20;

fn backed_up() -> (TestRepository, ScriptedHypervisor, RestorePoint) {
    let target = TestRepository::new();
    let hypervisor = ScriptedHypervisor::new(&[("scsi0:0", 3 * MIB), ("scsi0:1", 2 * MIB)]);
    run(&job(&target.repository, &hypervisor)).unwrap();
    let point = target.repository.latest("web").unwrap().unwrap();
    (target, hypervisor, point)
}

fn go(
    source: &TestRepository,
    point: &RestorePoint,
    platform: &Platform,
    to: VmTarget,
) -> Result<RestoreVmSummary> {
    let job = RestoreVmJob {
        repository: &source.repository,
        point,
        restorer: platform,
        to,
        disk: None,
        workers: Some(2),
        verify: true,
        salvage: false,
        power_on: true,
    };
    let (progress, cancel) = (Progress::new(), CancelToken::new());
    restore_vm(&job, JobContext { progress: &progress, cancel: &cancel, observer: &Silent })
}

fn originals(hypervisor: &ScriptedHypervisor) -> Vec<Vec<u8>> {
    hypervisor.disks.iter().map(|disk| disk.device.memory.to_bytes()).collect()
}

fn written(platform: &Platform) -> Vec<Vec<u8>> {
    platform.disks.lock().iter().map(|disk| disk.memory.to_bytes()).collect()
}

fn in_place() -> VmTarget {
    VmTarget::InPlace { vm: "web".into(), into_other_vm: false }
}

#[test]
fn a_new_vm_gets_every_byte_and_its_warnings_once() {
    let (source, hypervisor, point) = backed_up();
    let platform = Platform::default();
    let options = NewVmOptions { name: Some("copy".into()), ..NewVmOptions::default() };
    let done = go(&source, &point, &platform, VmTarget::New(options)).unwrap();
    assert!(written(&platform) == originals(&hypervisor));
    assert_eq!(done.warnings, ["early", "late"]);
    assert!(done.verified && done.restored.powered_on && !done.in_place);
    assert_eq!(*platform.ends.lock(), ["finish"]);
    let asked = platform.begun.lock().take().unwrap();
    assert_eq!((asked.name.as_str(), asked.config.name.as_str()), ("copy", "web"));
    let sizes: Vec<_> = asked.disks.iter().map(|disk| disk.size_bytes).collect();
    assert_eq!(sizes, [3 << 20, 2 << 20]);
    assert!(asked.disks.iter().all(|disk| disk.data_bytes.is_some_and(|bytes| bytes <= 3 << 20)));
}

#[test]
fn what_reads_back_differently_or_fails_makes_no_vm() {
    let (source, _, point) = backed_up();
    for (loses, fails) in [(true, false), (false, true)] {
        let platform = Platform { loses, fails, ..Platform::default() };
        let error = go(&source, &point, &platform, VmTarget::New(NewVmOptions::default()));
        let error = error.unwrap_err();
        assert_eq!(error.to_string().contains("reads back differently"), loses, "{error}");
        assert_eq!(*platform.ends.lock(), ["abort"]);
        // In place the user has to know that the VM is in between.
        let error = go(&source, &point, &platform, in_place()).unwrap_err();
        assert!(matches!(error, EngineError::Incomplete { .. }), "{error}");
        assert_eq!(platform.ends.lock().len(), 2);
    }
}

#[test]
fn in_place_nothing_that_cannot_be_read_overwrites_what_is_there() {
    let (source, _, point) = backed_up();
    let platform = Platform::default();
    let job = RestoreVmJob {
        repository: &source.repository,
        point: &point,
        restorer: &platform,
        to: in_place(),
        disk: None,
        workers: Some(2),
        verify: false,
        salvage: true,
        power_on: false,
    };
    let (progress, cancel) = (Progress::new(), CancelToken::new());
    let context = JobContext { progress: &progress, cancel: &cancel, observer: &Silent };
    let error = restore_vm(&job, context).unwrap_err();
    assert!(matches!(error, EngineError::Usage(_)), "{error}");
    assert!(platform.in_place.lock().is_none());
}

#[test]
fn in_place_only_what_may_differ_is_read_and_what_differs_written() {
    let (source, hypervisor, point) = backed_up();
    let mut before = originals(&hypervisor);
    before[0][100_000..100_010].fill(0xEE);
    before[1][4096..8192].fill(0xEE);
    let ranges: RangeSet =
        [ByteRange::new(4096, 4096), ByteRange::new(98_304, 8192)].into_iter().collect();
    for content in
        [DiskContent::DiffersWithin(ranges.clone()), DiskContent::Unknown(FullReason::NoTrackingId)]
    {
        let platform = Platform::default();
        *platform.before.lock() = before.clone();
        *platform.content.lock() = Some(content.clone());
        let done = go(&source, &point, &platform, in_place()).unwrap();
        assert!(written(&platform) == originals(&hypervisor), "{content:?}");
        let read: u64 = done.disks.iter().map(|disk| disk.read_bytes).sum();
        if matches!(content, DiskContent::DiffersWithin(_)) {
            assert_eq!(read, 2 * ranges.total_bytes());
        }
        let changed: u64 =
            done.disks.iter().map(|disk| disk.written_bytes + disk.zeroed_bytes).sum();
        assert!(changed <= 2 * 64 * 1024, "{changed}");
        let asked = platform.in_place.lock().take().unwrap();
        assert_eq!((asked.vm.as_str(), asked.point), ("web", point.id.to_string()));
    }
}
