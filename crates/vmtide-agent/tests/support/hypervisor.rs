//! A stand-in for a platform with VMs: one VM whose disks are in memory, with steps that wait and fail on demand.

use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use vmtide_block::{BlockDevice, ByteRange, MemoryDevice, RangeSet};
use vmtide_cim::{Association, Cim, CimError, CimInstance, CimValue, MethodOutput, ObjectPath};
use vmtide_hypervisor::{
    Changes, Consistency, DiskBus, DiskConfig, DiskId, FreezeRequest, FrozenDisk, FrozenVm,
    FullReason, HealthCheck, Hypervisor, HypervisorError, JobId, ReapReport, Result, Seal,
    TrackingId, VmConfig, VmSummary,
};

pub const DISK: usize = 1 << 20;

/// What happened, and what shall.
#[derive(Default)]
pub struct Script {
    pub freezes: AtomicUsize,
    pub commits: AtomicUsize,
    pub seals: AtomicUsize,
    pub aborts: AtomicUsize,
    pub reaps: AtomicUsize,
    /// Handles of disks that are open now.
    pub handles: AtomicUsize,
    /// How many were open when a freeze was ended.
    pub handles_at_end: AtomicUsize,
    /// Freezing waits until this is false.
    pub hold_freeze: AtomicBool,
    /// Committing waits until this is false.
    pub hold_commit: AtomicBool,
    pub fail_freeze: AtomicBool,
    pub fail_seal: AtomicBool,
    pub fail_commit: AtomicBool,
    pub lost: AtomicBool,
    pub request: Mutex<Option<FreezeRequest>>,
    /// What sealing says of the consistency.
    pub late_consistency: Mutex<Seal>,
}

/// One VM, `web`.
#[derive(Clone)]
pub struct TestHypervisor {
    pub script: Arc<Script>,
    pub paths: Vec<String>,
}

impl TestHypervisor {
    /// Its disks lie at these paths.
    pub fn new(paths: &[String]) -> Self {
        Self { script: Arc::default(), paths: paths.to_vec() }
    }

    fn config(&self) -> VmConfig {
        let disks = self.paths.iter().enumerate().map(|(number, path)| DiskConfig {
            id: DiskId(format!("scsi0:{number}")),
            size_bytes: DISK as u64,
            bus: DiskBus::Scsi,
            format: Some("vhdx".into()),
            path: Some(path.clone()),
            ..DiskConfig::default()
        });
        VmConfig {
            name: "web".into(),
            id: Some("6b17".into()),
            platform: "test".into(),
            disks: disks.collect(),
            ..VmConfig::default()
        }
    }
}

/// The content of disk `number`.
pub fn content(number: usize) -> Vec<u8> {
    (0..DISK).map(|at| u8::try_from((at / 512 + number) % 251).unwrap()).collect()
}

fn wait_while(flag: &AtomicBool, request: Option<&FreezeRequest>) -> Result<()> {
    while flag.load(Ordering::SeqCst) {
        if let Some(request) = request {
            request.cancel.check()?;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

impl Hypervisor for TestHypervisor {
    fn list(&self) -> Result<Vec<VmSummary>> {
        let disks = self.paths.len();
        Ok(vec![VmSummary { name: "web".into(), id: None, state: "running".into(), disks }])
    }

    fn describe(&self, vm: &str) -> Result<VmConfig> {
        match vm {
            "web" | "6b17" => Ok(self.config()),
            _ => Err(HypervisorError::NotFound {
                what: format!("the VM {vm}"),
                detail: "there is web".into(),
            }),
        }
    }

    fn freeze(&self, request: &FreezeRequest) -> Result<Box<dyn FrozenVm>> {
        self.script.freezes.fetch_add(1, Ordering::SeqCst);
        *self.script.request.lock() = Some(request.clone());
        wait_while(&self.script.hold_freeze, Some(request))?;
        if self.script.fail_freeze.load(Ordering::SeqCst) {
            return Err(HypervisorError::ConsistencyNotReached {
                wanted: request.consistency,
                detail: "VSS said no".into(),
            });
        }
        let disks = self.config().disks.into_iter().enumerate().map(|(number, disk)| FrozenDisk {
            changes: match request.bases.contains_key(&disk.id) {
                true => {
                    let ranges = vec![ByteRange::new(4096, 512), ByteRange::new(65536, 1024)];
                    Changes::Ranges(RangeSet::from(ranges))
                }
                false => Changes::Everything(FullReason::FirstBackup),
            },
            id: disk.id,
            device: Arc::new(Counted::new(&self.script, number)),
            tracking: Some(TrackingId(format!("rctX:{number}"))),
        });
        Ok(Box::new(Frozen {
            config: self.config(),
            consistency: request.consistency,
            warnings: vec!["a warning".into()],
            disks: disks.collect(),
            script: Arc::clone(&self.script),
            committed: false,
        }))
    }

    fn examine(&self, vm: Option<&str>) -> Vec<HealthCheck> {
        let first = HealthCheck::ok("host", "answers");
        let second = HealthCheck::warn("version", vm.unwrap_or("all"), "raise it");
        vec![first, second]
    }

    fn reap(&self) -> Result<ReapReport> {
        self.script.reaps.fetch_add(1, Ordering::SeqCst);
        Ok(ReapReport { removed: vec!["a checkpoint".into()], ..ReapReport::default() })
    }

    fn reap_orphans(&self) -> Result<ReapReport> {
        Ok(ReapReport { removed: vec!["an orphan".into()], ..ReapReport::default() })
    }
}

/// A disk whose open handles are counted.
struct Counted(MemoryDevice, Arc<Script>);

impl Counted {
    fn new(script: &Arc<Script>, number: usize) -> Self {
        script.handles.fetch_add(1, Ordering::SeqCst);
        Self(MemoryDevice::from_bytes(content(number)), Arc::clone(script))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.1.handles.fetch_sub(1, Ordering::SeqCst);
    }
}

impl BlockDevice for Counted {
    fn name(&self) -> String {
        "counted".into()
    }
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        self.0.read_at(buffer, offset)
    }
}

struct Frozen {
    config: VmConfig,
    consistency: Consistency,
    warnings: Vec<String>,
    disks: Vec<FrozenDisk>,
    script: Arc<Script>,
    committed: bool,
}

impl FrozenVm for Frozen {
    fn config(&self) -> &VmConfig {
        &self.config
    }
    fn consistency(&self) -> Consistency {
        self.consistency
    }
    fn warnings(&self) -> &[String] {
        &self.warnings
    }
    fn disks(&self) -> &[FrozenDisk] {
        &self.disks
    }
    fn check(&self) -> Result<()> {
        match self.script.lost.load(Ordering::SeqCst) {
            true => Err(HypervisorError::failed("reading the checkpoint", "somebody removed it")),
            false => Ok(()),
        }
    }
    fn seal(&mut self) -> Result<Seal> {
        self.end();
        self.script.seals.fetch_add(1, Ordering::SeqCst);
        match self.script.fail_seal.load(Ordering::SeqCst) {
            true => Err(HypervisorError::failed("converting", "no reference point")),
            false => Ok(Seal {
                tracking: [(DiskId("scsi0:0".into()), TrackingId("rctX:sealed".into()))].into(),
                warnings: vec!["disk 1 has no name".into()],
                ..self.script.late_consistency.lock().clone()
            }),
        }
    }
    fn commit(mut self: Box<Self>) -> Result<Vec<String>> {
        self.end();
        self.committed = true;
        self.script.commits.fetch_add(1, Ordering::SeqCst);
        wait_while(&self.script.hold_commit, None)?;
        match self.script.fail_commit.load(Ordering::SeqCst) {
            true => Err(HypervisorError::failed("converting", "32775")),
            false => Ok(vec!["an AVHDX that still merges".into()]),
        }
    }
    fn abort(mut self: Box<Self>) -> Result<()> {
        self.end();
        Ok(())
    }
}

impl Frozen {
    fn end(&mut self) {
        self.disks.clear();
        let open = self.script.handles.load(Ordering::SeqCst);
        self.script.handles_at_end.fetch_add(open, Ordering::SeqCst);
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if !self.committed {
            self.script.aborts.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// A body that freezes the VM `web`, under this mark.
pub fn wanted(token: &str) -> serde_json::Value {
    serde_json::json!({
        "client_token": token, "vm": "web", "job": JobId::random(), "lineage": "0123456789abcdef",
        "consistency": "app",
        "bases": [{"disk": "scsi0:0", "tracking_id": "rctX:0", "size_bytes": DISK}],
    })
}

/// Management objects that answer with what they were asked.
pub struct EchoCim;

impl EchoCim {
    fn echo(text: &str) -> CimInstance {
        CimInstance::new("Echo").with("Text", text)
    }
}

impl Cim for EchoCim {
    fn peer(&self) -> &str {
        "this host"
    }
    fn query(&self, _: &str, wql: &str) -> vmtide_cim::Result<Vec<CimInstance>> {
        Ok(vec![Self::echo(wql)])
    }
    fn get(&self, path: &ObjectPath) -> vmtide_cim::Result<CimInstance> {
        Ok(Self::echo(&path.to_string()))
    }
    fn associators(
        &self,
        _: &ObjectPath,
        association: &Association,
    ) -> vmtide_cim::Result<Vec<CimInstance>> {
        Ok(vec![Self::echo(association.class.as_deref().unwrap_or_default())])
    }
    fn references(
        &self,
        path: &ObjectPath,
        _: &Association,
    ) -> vmtide_cim::Result<Vec<CimInstance>> {
        Err(CimError::NotFound { what: path.to_string(), detail: "none".into() })
    }
    fn invoke(
        &self,
        _: &ObjectPath,
        method: &str,
        parameters: &[(&str, CimValue)],
    ) -> vmtide_cim::Result<MethodOutput> {
        let mut output = CimInstance::default();
        for (name, value) in parameters {
            output.set(name, value.clone());
        }
        let return_value = if method == "Start" { 4096 } else { 0 };
        Ok(MethodOutput { return_value, parameters: output })
    }
}
