//! A stand-in for the engine with its repository: it asks for bases as the engine does, puts the restore point together
//! from the base and what it was told changed, and compares it byte by byte with what the guest had written at that moment,
//! which the stand-in host keeps apart from every image.

use super::host::{Cut, TestHost, bare};
use std::collections::BTreeMap;
use std::path::Path;
use tempfile::TempDir;
use vmtide_block::{BlockDevice, CancelToken};
use vmtide_hyperv::{HypervHypervisor, HypervOptions};
use vmtide_hypervisor::{
    Base, Changes, Consistency, DiskId, FreezeRequest, FrozenVm, FullReason, Hypervisor,
    HypervisorError, JobId, TrackingId,
};

/// A disk of a restore point.
#[derive(Clone)]
pub struct StoredDisk {
    pub bytes: Vec<u8>,
    pub tracking: Option<TrackingId>,
}

/// A restore point.
#[derive(Clone)]
pub struct StoredPoint {
    pub disks: BTreeMap<DiskId, StoredDisk>,
    pub consistency: Consistency,
}

/// What a backup did.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub warnings: Vec<String>,
    /// Why disks were read in full.
    pub full: BTreeMap<String, FullReason>,
    /// Bytes read of all disks.
    pub read_bytes: u64,
    pub left: Vec<String>,
}

/// One machine that backs up one VM into one repository.
pub struct Machine {
    pub world: TestHost,
    pub state: TempDir,
    pub points: Vec<StoredPoint>,
    pub lineage: String,
    pub consistency: Consistency,
    pub allow_downgrade: bool,
    pub exclude: Vec<DiskId>,
    /// The repository refuses the restore point.
    pub commit_fails: bool,
    /// The process is killed when the restore point is committed, and before the VM is told.
    pub killed_after_commit: bool,
    /// Asks for a full backup.
    pub full: bool,
    /// It is the host that goes away, and not the process: the repository goes on.
    pub host_dies: bool,
    /// Nobody else backs up the VM, and vmtide has been told so.
    pub only_backup_program: bool,
}

/// The hypervisor of a new process on this state directory.
pub fn hypervisor(world: &TestHost, state: &Path) -> HypervHypervisor {
    with_options(world, HypervOptions::new(state))
}

fn with_options(world: &TestHost, options: HypervOptions) -> HypervHypervisor {
    let (host, files) = world.connect();
    HypervHypervisor::new(host, files, options)
}

impl Machine {
    pub fn new(world: &TestHost) -> Self {
        Self {
            world: world.clone(),
            state: super::host::directory(),
            points: Vec::new(),
            lineage: "0123456789abcdef".into(),
            consistency: Consistency::Application,
            allow_downgrade: true,
            exclude: Vec::new(),
            commit_fails: false,
            killed_after_commit: false,
            full: false,
            host_dies: false,
            only_backup_program: false,
        }
    }

    pub fn hypervisor(&self) -> HypervHypervisor {
        let mut options = HypervOptions::new(self.state.path());
        options.only_backup_program = self.only_backup_program;
        with_options(&self.world, options)
    }

    pub fn request(&self, vm: &str) -> FreezeRequest {
        let newest = self.points.last().filter(|_| !self.full);
        let bases = newest.into_iter().flat_map(|point| &point.disks).map(|(id, disk)| {
            let size_bytes = disk.bytes.len() as u64;
            (id.clone(), Base { tracking: disk.tracking.clone(), size_bytes })
        });
        FreezeRequest {
            vm: vm.into(),
            job: JobId::random(),
            lineage: self.lineage.clone(),
            consistency: self.consistency,
            allow_downgrade: self.allow_downgrade,
            bases: bases.collect(),
            exclude: self.exclude.clone(),
            cancel: CancelToken::new(),
        }
    }

    /// Backs a VM up, as the engine does.
    pub fn backup(&mut self, vm: &str) -> Result<Outcome, HypervisorError> {
        let request = self.request(vm);
        let mut frozen = self.hypervisor().freeze(&request)?;
        match self.store(frozen.as_mut(), vm) {
            Ok((point, mut outcome)) => {
                if self.world.is_dead() && !self.host_dies {
                    return Err(HypervisorError::failed("go on", "killed"));
                }
                self.points.push(point);
                if self.killed_after_commit {
                    self.world.cut(Some(Cut::DieBefore(1)));
                    drop(frozen);
                    return Err(HypervisorError::failed("go on", "killed"));
                }
                match frozen.commit() {
                    Ok(left) => outcome.left = left,
                    Err(error) => outcome.left = vec![error.to_string()],
                }
                Ok(outcome)
            }
            Err(error) => {
                // As the engine does: the job's own error is the one that counts.
                let _ = frozen.abort();
                Err(error)
            }
        }
    }

    fn store(
        &self,
        frozen: &mut dyn FrozenVm,
        vm: &str,
    ) -> Result<(StoredPoint, Outcome), HypervisorError> {
        let truth = self.world.world().frozen_at(self.world.find(vm));
        let mut outcome = Outcome { warnings: frozen.warnings().to_vec(), ..Outcome::default() };
        let mut disks = BTreeMap::new();
        for disk in frozen.disks() {
            let from = frozen.moved_from(&disk.id).unwrap_or(&disk.id);
            let newest = self.points.last().filter(|_| !self.full);
            let base = newest.and_then(|point| point.disks.get(from)).map(|disk| &disk.bytes);
            let bytes = assemble(disk.device.as_ref(), &disk.changes, base, &mut outcome)?;
            let location: u32 = disk.id.0.rsplit(':').next().unwrap().parse().unwrap();
            let content = &truth[&location];
            assert_eq!(bytes.len() as u64, content.size_bytes(), "disk {}", disk.id);
            let written = content.read(0, bytes.len());
            let missed =
                bytes.iter().zip(&written).position(|(stored, true_byte)| stored != true_byte);
            assert_eq!(missed, None, "SILENTLY INCOMPLETE: disk {}, {:?}", disk.id, disk.changes);
            if let Changes::Everything(reason) = &disk.changes {
                outcome.full.insert(disk.id.to_string(), reason.clone());
            }
            disks.insert(disk.id.clone(), StoredDisk { bytes, tracking: None });
        }
        frozen.check()?;
        let seal = frozen.seal()?;
        outcome.warnings.extend(seal.warnings);
        for (id, token) in seal.tracking {
            disks.get_mut(&id).unwrap().tracking = Some(token);
        }
        if frozen.consistency() < self.consistency && !self.allow_downgrade {
            return Err(HypervisorError::ConsistencyNotReached {
                wanted: self.consistency,
                detail: frozen.downgrade_reason().unwrap_or_default().into(),
            });
        }
        if self.commit_fails {
            return Err(HypervisorError::failed("commit", "the repository is full"));
        }
        Ok((StoredPoint { disks, consistency: frozen.consistency() }, outcome))
    }

    /// Whether the reference points that the newest restore point needs are there.
    pub fn base_is_alive(&self, vm: usize) -> bool {
        let Some(newest) = self.points.last() else { return true };
        let there = self.world.points(vm);
        let tokens = newest.disks.values().filter_map(|disk| disk.tracking.as_ref());
        tokens.into_iter().all(|token| there.contains(&point_of(token)))
    }

    /// The journals and ledgers that are left.
    pub fn state_files(&self, directory: &str) -> Vec<String> {
        let found = std::fs::read_dir(self.state.path().join(directory));
        let mut names: Vec<String> = found
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

/// The reference point that a token names, as [`bare`] writes it.
pub fn point_of(token: &TrackingId) -> String {
    let value: serde_json::Value = serde_json::from_str(&token.0).unwrap();
    bare(value["point"].as_str().unwrap())
}

fn assemble(
    device: &dyn BlockDevice,
    changes: &Changes,
    base: Option<&Vec<u8>>,
    outcome: &mut Outcome,
) -> Result<Vec<u8>, HypervisorError> {
    let size = device.size_bytes() as usize;
    match changes {
        Changes::Everything(_) => {
            let mut bytes = vec![0; size];
            device.read_at(&mut bytes, 0)?;
            outcome.read_bytes += size as u64;
            Ok(bytes)
        }
        Changes::Ranges(ranges) => {
            let mut bytes = base.expect("changes since a base that is there").clone();
            assert_eq!(bytes.len(), size, "changes since a base of another size");
            for range in ranges.iter() {
                let (from, to) = (range.offset as usize, range.end() as usize);
                device.read_at(&mut bytes[from..to], range.offset)?;
                outcome.read_bytes += range.length;
            }
            Ok(bytes)
        }
    }
}
