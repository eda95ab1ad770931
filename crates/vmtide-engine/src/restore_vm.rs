//! Restoring a whole VM to a platform: its disks are written by the same workers as any other restore's,
//! and the platform makes a VM of them; or the disks of a VM that is off go back to a restore point.
//!
//! A new VM is complete or not there. One that is changed in place is marked until it is complete, and the
//! same restore, run again, goes on.

use crate::copy_ranges::copy_ranges;
use crate::damage::record_damage;
use crate::events::{JobContext, Phase};
use crate::image::compare::first_difference;
use crate::located::locate_lost;
use crate::restore::{RestoredDisk, choose_disks};
use crate::{EngineError, Result};
use serde::Serialize;
use std::sync::Arc;
use std::time::Instant;
use vmtide_block::{
    BlockDevice, ByteRange, CancelToken, CopyOptions, CopySummary, ExtentKind, RangeSet,
    copy_device, for_each_extent,
};
use vmtide_hypervisor::{
    DiskContent, DiskId, DiskToRestore, Firmware, InPlaceRequest, JobId, NetworkPlan, NewVmRequest,
    RestoreRoute, RestoredVm, RestoringDisk, RestoringVm, TrackingId, VmConfig, VmIdentity,
    VmRestorer,
};
use vmtide_repo::{DiskRecord, ObjectId, Purpose, Repository, RestorePoint, SalvagedDisk};

/// A restore of a VM.
pub struct RestoreVmJob<'a> {
    /// Where from.
    pub repository: &'a Repository,
    /// Which restore point.
    pub point: &'a RestorePoint,
    /// The platform.
    pub restorer: &'a dyn VmRestorer,
    /// Which VM comes of it.
    pub to: VmTarget,
    /// Which disk; none means all.
    pub disk: Option<String>,
    /// The number of workers; none suits the machine.
    pub workers: Option<usize>,
    /// Whether to read back what was written and compare it before the VM is made of it.
    pub verify: bool,
    /// Restore what is left of a damaged disk: what cannot be read becomes zeros, and is listed.
    pub salvage: bool,
    /// Whether to start the VM.
    pub power_on: bool,
}

/// The VM that a restore makes or changes.
#[derive(Clone, Debug)]
pub enum VmTarget {
    /// A new VM.
    New(NewVmOptions),
    /// The disks of one that is off.
    InPlace {
        /// Its name or id.
        vm: String,
        /// Whether it may be another VM than that of the restore point, and its disks others.
        into_other_vm: bool,
    },
}

/// What a new VM is to be like.
#[derive(Clone, Debug, Default)]
pub struct NewVmOptions {
    /// Its name; none is that of the VM in the restore point.
    pub name: Option<String>,
    /// Whether it is the VM itself or a copy.
    pub identity: VmIdentity,
    /// By which way it is made.
    pub route: RestoreRoute,
    /// Where on the host; none is the host's default.
    pub directory: Option<String>,
    /// What its network adapters are connected to.
    pub networks: NetworkPlan,
    /// How it boots, against the configuration.
    pub firmware: Option<Firmware>,
}

/// What a restore of a VM did. The serialised form is the summary event of `--json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RestoreVmSummary {
    /// The restore point.
    pub point: ObjectId,
    /// Its VM.
    pub vm: String,
    /// The VM that came of it.
    pub restored: RestoredVm,
    /// Whether it was changed in place.
    pub in_place: bool,
    /// The disks written.
    pub disks: Vec<RestoredDisk>,
    /// Whether what was written was read back and compared.
    pub verified: bool,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
    /// What the user should know, one line each.
    pub warnings: Vec<String>,
}

/// Restores a VM.
///
/// # Errors
/// A new VM is then not there. One that was changed in place is marked as incomplete, and the error is
/// [`EngineError::Incomplete`] where anything may have been written.
pub fn restore_vm(job: &RestoreVmJob<'_>, context: JobContext<'_>) -> Result<RestoreVmSummary> {
    if job.salvage && matches!(job.to, VmTarget::InPlace { .. }) {
        return Err(EngineError::usage(
            "--salvage makes zeros of what cannot be read, and in place these would overwrite what the VM still \
             has: salvage to a new VM or to files",
        ));
    }
    let begun = Instant::now();
    let _lease = job.repository.lease(Purpose::Read)?;
    let records = choose_disks(job.point, job.disk.as_deref())?;
    let config = config_of(job.point)?;
    let (vm, target) = begin(job, config, &records, context)?;
    let mut warnings = Vec::new();
    for warning in vm.warnings() {
        context.warn(&mut warnings, warning.clone());
    }
    let told = warnings.len();
    let disks = match write_disks(job, vm.as_ref(), &records, context) {
        Ok(disks) => disks,
        Err(error) => return Err(given_up(job, vm, target, error)),
    };
    context.phase(Phase::Register, &target);
    let restored =
        vm.finish(job.power_on).map_err(|error| incomplete(job, target, error.into()))?;
    for warning in restored.warnings.iter().skip(told) {
        context.warn(&mut warnings, warning.clone());
    }
    Ok(RestoreVmSummary {
        point: job.point.id,
        vm: job.point.vm.clone(),
        in_place: matches!(job.to, VmTarget::InPlace { .. }),
        restored,
        disks,
        verified: job.verify,
        duration_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        warnings,
    })
}

/// Removes what was made. Answers with the error for the caller.
fn given_up(
    job: &RestoreVmJob<'_>,
    vm: Box<dyn RestoringVm>,
    target: String,
    error: EngineError,
) -> EngineError {
    if let Err(left) = vm.abort() {
        tracing::warn!(error = %left, "what a restore has made was left; the next one removes it");
    }
    incomplete(job, target, error)
}

fn incomplete(job: &RestoreVmJob<'_>, target: String, error: EngineError) -> EngineError {
    match job.to {
        VmTarget::New(_) => error,
        VmTarget::InPlace { .. } => EngineError::Incomplete { target, source: Box::new(error) },
    }
}

fn config_of(point: &RestorePoint) -> Result<VmConfig> {
    serde_json::from_value(point.config.clone()).map_err(|error| {
        EngineError::refused(
            format!("restore a VM from {}", point.id),
            format!("its configuration cannot be read ({error}): restore its disks to files"),
        )
    })
}

/// Begins at the platform. Answers with the VM and its name for people.
fn begin(
    job: &RestoreVmJob<'_>,
    mut config: VmConfig,
    records: &[&DiskRecord],
    context: JobContext<'_>,
) -> Result<(Box<dyn RestoringVm>, String)> {
    let disks = records.iter().map(|record| disk_of(job, record, context.cancel));
    let disks = disks.collect::<Result<Vec<_>>>()?;
    match &job.to {
        VmTarget::New(options) => {
            if config.name.is_empty() {
                config.name.clone_from(&job.point.vm);
            }
            let name = options.name.clone().unwrap_or_else(|| config.name.clone());
            context.phase(Phase::Prepare, &name);
            let request = NewVmRequest {
                name: name.clone(),
                config,
                job: JobId::random(),
                disks,
                identity: options.identity,
                route: options.route,
                directory: options.directory.clone(),
                networks: options.networks.clone(),
                firmware: options.firmware,
                cancel: context.cancel.clone(),
            };
            Ok((job.restorer.begin(&request)?, name))
        }
        VmTarget::InPlace { vm: name, into_other_vm } => {
            context.phase(Phase::Prepare, name);
            let request = InPlaceRequest {
                vm: name.clone(),
                config,
                point: job.point.id.to_string(),
                job: JobId::random(),
                disks,
                into_other_vm: *into_other_vm,
                known_tracking: known_tracking(job)?,
                cancel: context.cancel.clone(),
            };
            Ok((job.restorer.begin_in_place(&request)?, name.clone()))
        }
    }
}

fn disk_of(
    job: &RestoreVmJob<'_>,
    record: &DiskRecord,
    cancel: &CancelToken,
) -> Result<DiskToRestore> {
    let data_bytes = match job.to {
        VmTarget::New(_) if !job.salvage => Some(data_bytes(job, record, cancel)?),
        _ => None,
    };
    Ok(DiskToRestore {
        id: DiskId(record.id.clone()),
        size_bytes: record.size_bytes,
        data_bytes,
        tracking: record.tracking.id.clone().map(TrackingId),
    })
}

/// How many bytes of a disk hold data. Reads its map and no data.
fn data_bytes(job: &RestoreVmJob<'_>, record: &DiskRecord, cancel: &CancelToken) -> Result<u64> {
    let device = job.repository.open_disk(job.point, &record.id)?;
    let mut bytes = 0u64;
    for_each_extent(&*device, ByteRange::new(0, record.size_bytes), cancel, |extent| {
        if extent.kind == ExtentKind::Data {
            bytes = bytes.saturating_add(extent.range.length);
        }
        Ok(())
    })?;
    Ok(bytes)
}

/// The tracking ids of all restore points of the VM.
fn known_tracking(job: &RestoreVmJob<'_>) -> Result<Vec<TrackingId>> {
    let points = job.repository.points()?.points;
    let mut ids: Vec<_> = points
        .into_iter()
        .filter(|point| point.vm == job.point.vm)
        .flat_map(|point| point.disks)
        .filter_map(|disk| disk.tracking.id.map(TrackingId))
        .collect();
    ids.sort();
    ids.dedup();
    Ok(ids)
}

fn write_disks(
    job: &RestoreVmJob<'_>,
    vm: &dyn RestoringVm,
    records: &[&DiskRecord],
    context: JobContext<'_>,
) -> Result<Vec<RestoredDisk>> {
    let pairs: Vec<_> = vm
        .disks()
        .iter()
        .filter_map(|disk| Some((disk, *records.iter().find(|record| record.id == disk.id.0)?)))
        .collect();
    if pairs.len() != records.len() {
        return Err(EngineError::refused(
            format!("restore {}", job.point.vm),
            "the platform did not offer all of its disks",
        ));
    }
    for (disk, record) in &pairs {
        context.progress.add_total(match &disk.content {
            DiskContent::DiffersWithin(ranges) => ranges.clamp(record.size_bytes).total_bytes(),
            _ => record.size_bytes,
        });
    }
    let mut restored = Vec::with_capacity(pairs.len());
    for (disk, record) in pairs {
        context.phase(Phase::Restore, format!("{} to {}", disk.id, disk.path));
        let done = write_disk(job, disk, record, context);
        record_damage(job.repository, "restore");
        restored.push(done?);
    }
    Ok(restored)
}

fn write_disk(
    job: &RestoreVmJob<'_>,
    disk: &RestoringDisk,
    record: &DiskRecord,
    context: JobContext<'_>,
) -> Result<RestoredDisk> {
    let salvaged: Option<Arc<SalvagedDisk>> = match job.salvage {
        true => Some(job.repository.salvage_disk(job.point, &record.id)?),
        false => None,
    };
    let opened = match &salvaged {
        Some(_) => None,
        None => Some(job.repository.open_disk(job.point, &record.id)?),
    };
    let source: &dyn BlockDevice = match (&salvaged, &opened) {
        (Some(device), _) => device.as_ref(),
        (None, Some(device)) => device.as_ref(),
        (None, None) => return Err(EngineError::refused("restore a disk", "it was not opened")),
    };
    let done = copy(job, disk, source, context)?;
    if job.verify {
        context.phase(Phase::Compare, format!("{} with {}", disk.id, disk.path));
        let size_bytes = record.size_bytes.min(disk.device.size_bytes());
        let target: &dyn BlockDevice = &disk.device;
        let found = first_difference(source, target, size_bytes, job.workers, context)?;
        if let Some(offset) = found {
            return Err(EngineError::refused(
                format!("restore {} to {}", disk.id, disk.path),
                format!(
                    "what was written reads back differently at byte {offset}: look at the storage of the host"
                ),
            ));
        }
    }
    let lost = salvaged.map_or_else(RangeSet::new, |device| device.lost());
    let lost_in = locate_lost(job.repository, job.point, &record.id, &lost, context.cancel);
    Ok(RestoredDisk {
        id: record.id.clone(),
        path: disk.path.clone(),
        format: disk.format.clone(),
        size_bytes: record.size_bytes,
        read_bytes: done.read_bytes,
        written_bytes: done.written_bytes,
        zeroed_bytes: done.zeroed_bytes,
        lost,
        lost_in,
    })
}

fn copy(
    job: &RestoreVmJob<'_>,
    disk: &RestoringDisk,
    source: &dyn BlockDevice,
    context: JobContext<'_>,
) -> Result<CopySummary> {
    let defaults = CopyOptions::default();
    let workers = job.workers.unwrap_or(job.repository.readers(defaults.workers)).max(1);
    let (progress, cancel) = (context.progress, context.cancel);
    if let DiskContent::DiffersWithin(ranges) = &disk.content {
        return copy_ranges(source, &*disk.device, ranges, workers, progress, cancel);
    }
    let is_new = disk.content == DiskContent::Zeros;
    let options =
        CopyOptions { workers, target_is_zero: is_new, differing_only: !is_new, ..defaults };
    Ok(copy_device(source, &*disk.device, &options, progress, cancel)?)
}
