//! Restoring the disks of a restore point to files, a directory, a block device, an NBD export or an agent's disk.
//!
//! A new file is written under a temporary name beside its own and renamed when all of it is on
//! stable storage, so a file of the wanted name is always complete. An existing target is touched
//! only when the user says how: replaced as a whole, or changed in place where it differs. All
//! data is verified by the repository before it gets here.

use crate::damage::record_damage;
use crate::events::{JobContext, Phase};
use crate::located::{TouchedParts, locate_lost};
use crate::restore_target;
use crate::target::{SourceHints, WritePlan};
use crate::{EngineError, Result};
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;
use vmtide_agent_client::{AgentOptions, AgentUrl};
use vmtide_block::{CopyOptions, RangeSet};
use vmtide_image::Format;
use vmtide_nbd::NbdUrl;
use vmtide_repo::{DiskRecord, ObjectId, Purpose, Repository, RestorePoint};

/// Where a restore goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RestoreTarget {
    /// A file, a directory or a block device.
    Path(PathBuf),
    /// An NBD export of at least the disk's size.
    Nbd(NbdUrl),
    /// A disk of an agent's host, made where it is not there.
    Agent(AgentUrl, Box<AgentOptions>),
}

impl RestoreTarget {
    /// Takes a path, an NBD URL or an agent's.
    ///
    /// # Errors
    /// [`EngineError::Usage`] for other URLs.
    pub fn parse(text: &str) -> Result<Self> {
        if NbdUrl::is_nbd_url(text) {
            let url = text.parse().map_err(|error| EngineError::usage(format!("{error}")))?;
            return Ok(Self::Nbd(url));
        }
        if AgentUrl::is_agent_url(text) {
            let url = AgentUrl::parse(text)?;
            if url.paths().len() != 1 {
                return Err(EngineError::usage(format!(
                    "{url}: restore one disk at a time to an agent (--disk)"
                )));
            }
            return Ok(Self::Agent(url, Box::default()));
        }
        if let Some((scheme, _)) = crate::source::split_scheme(text) {
            return Err(EngineError::usage(format!(
                "cannot restore to a {scheme}:// URL in this build: give a file, a directory, a \
                 block device or an nbd://, nbd+unix:// or agent+https:// URL"
            )));
        }
        Ok(Self::Path(text.into()))
    }

    /// With what it takes to get at an agent, where it is one's disk.
    #[must_use]
    pub fn with_agent(self, options: AgentOptions) -> Self {
        match self {
            Self::Agent(url, _) => Self::Agent(url, Box::new(options)),
            other => other,
        }
    }
}

/// A restore.
pub struct RestoreJob<'a> {
    /// Where from.
    pub repository: &'a Repository,
    /// Which restore point.
    pub point: &'a RestorePoint,
    /// Where to.
    pub target: RestoreTarget,
    /// Which disk; none means all.
    pub disk: Option<String>,
    /// The image format of new files; none goes by the target's extension, else raw.
    pub format: Option<Format>,
    /// The kind within the format, see [`vmtide_image::subformats`]; none is the format's default.
    pub subformat: Option<String>,
    /// Change an existing target where it differs, and nowhere else.
    pub in_place: bool,
    /// Replace an existing target; with `in_place`, change it even where other images read through
    /// it, which breaks them.
    pub force: bool,
    /// The number of workers; none suits the machine.
    pub workers: Option<usize>,
    /// Restore what is left of a damaged disk: what cannot be read becomes zeros, and is listed.
    pub salvage: bool,
}

/// What a restore did. The serialised form is the summary event of `--json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RestoreSummary {
    /// The restore point.
    pub point: ObjectId,
    /// Its VM.
    pub vm: String,
    /// The disks written.
    pub disks: Vec<RestoredDisk>,
    /// The VM's configuration as a file, in a restore to a directory.
    pub config_path: Option<String>,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
    /// What the user should know, one line each.
    pub warnings: Vec<String>,
}

/// One disk of a [`RestoreSummary`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RestoredDisk {
    /// The disk.
    pub id: String,
    /// The file, device or URL it was written to.
    pub path: String,
    /// The image format it was written in.
    pub format: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The bytes that held data and were read from the repository.
    pub read_bytes: u64,
    /// The bytes of data written.
    pub written_bytes: u64,
    /// The bytes of the target made zero explicitly.
    pub zeroed_bytes: u64,
    /// The bytes that could not be read and are zeros on the target; only of a salvage.
    pub lost: RangeSet,
    /// The partitions and files these are; none where nothing was lost.
    pub lost_in: Option<TouchedParts>,
}

/// Restores.
///
/// # Errors
/// New files are then not there; a target changed in place or a device is incomplete, and the
/// error is [`EngineError::Incomplete`].
pub fn restore(job: &RestoreJob<'_>, context: JobContext<'_>) -> Result<RestoreSummary> {
    let begun = Instant::now();
    let _lease = job.repository.lease(Purpose::Read)?;
    let disks = choose_disks(job.point, job.disk.as_deref())?;
    let plan = restore_target::plan(job, &disks)?;
    for disk in &disks {
        context.progress.add_total(disk.size_bytes);
    }
    let mut restored = Vec::with_capacity(disks.len());
    for (disk, write) in disks.iter().zip(&plan.writes) {
        context.phase(Phase::Restore, format!("{} to {}", disk.id, write.name()));
        let done = restore_disk(job, disk, write, context);
        record_damage(job.repository, "restore");
        restored.push(done?);
    }
    let config_path = match &plan.config_path {
        Some(path) => {
            Some(restore_target::write_config(path, job.point, job.force || job.in_place)?)
        }
        None => None,
    };
    Ok(RestoreSummary {
        point: job.point.id,
        vm: job.point.vm.clone(),
        disks: restored,
        config_path,
        duration_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        warnings: Vec::new(),
    })
}

/// The disks of a restore point, or the one that `wanted` names by id or number.
pub(crate) fn choose_disks<'a>(
    point: &'a RestorePoint,
    wanted: Option<&str>,
) -> Result<Vec<&'a DiskRecord>> {
    let Some(wanted) = wanted else {
        return Ok(point.disks.iter().collect());
    };
    let ids = || {
        let ids: Vec<_> = point.disks.iter().map(|disk| disk.id.as_str()).collect();
        ids.join(", ")
    };
    // By id first; a number counts the disks from 0, as they are listed.
    let by_id = point.disk_record(wanted);
    let by_number = || point.disks.get(wanted.parse::<usize>().ok()?);
    let found = by_id.or_else(by_number).ok_or_else(|| EngineError::NotFound {
        what: format!("disk {wanted} in restore point {}", point.id),
        hint: format!("it has {}", ids()),
    })?;
    Ok(vec![found])
}

fn restore_disk(
    job: &RestoreJob<'_>,
    disk: &DiskRecord,
    write: &WritePlan,
    context: JobContext<'_>,
) -> Result<RestoredDisk> {
    let hints = SourceHints::default();
    let workers = job.workers.unwrap_or(job.repository.readers(CopyOptions::default().workers));
    let (summary, lost) = if job.salvage {
        let source = job.repository.salvage_disk(job.point, &disk.id)?;
        let summary = write.write(source.as_ref(), Some(workers), &hints, context)?;
        (summary, source.lost())
    } else {
        let source = job.repository.open_disk(job.point, &disk.id)?;
        (write.write(source.as_ref(), Some(workers), &hints, context)?, RangeSet::new())
    };
    let lost_in = locate_lost(job.repository, job.point, &disk.id, &lost, context.cancel);
    Ok(RestoredDisk {
        id: disk.id.clone(),
        path: write.name(),
        format: write.format.to_string(),
        size_bytes: disk.size_bytes,
        read_bytes: summary.read_bytes,
        written_bytes: summary.written_bytes,
        zeroed_bytes: summary.zeroed_bytes,
        lost,
        lost_in,
    })
}
