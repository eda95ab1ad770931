//! Making a delta: from a list of changed ranges, by comparing two disks, or from two restore points.

use crate::events::{JobContext, Phase};
use crate::image::OpenDisk;
use crate::image::staged;
use crate::{EngineError, Result};
use jiff::Timestamp;
use serde::Serialize;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::time::Instant;
use vmtide_block::{BlockDevice, RangeSet};
use vmtide_delta::{
    CreateOptions, DeltaHeader, DeltaSource, DeltaSummary, create_delta, fingerprint,
};
use vmtide_repo::{Purpose, Repository, RestorePoint};

/// What is gathered before it is written to a file: heads and tables are small.
const BUFFER_BYTES: usize = 256 << 10;

/// What a delta is made from.
pub enum DeltaOrigin<'a> {
    /// A disk, and what changed in it according to whoever tracked that.
    Changes {
        /// The disk as it is now.
        disk: &'a OpenDisk,
        /// The changed ranges; none of them past its end.
        changed: RangeSet,
        /// The disk as it was, where that can be read.
        base: Option<&'a OpenDisk>,
        /// Its size then in bytes, where it was another one and `base` is none.
        base_size_bytes: Option<u64>,
    },
    /// Two disks that are compared.
    Disks {
        /// The disk as it was.
        base: &'a OpenDisk,
        /// The disk as it is now.
        disk: &'a OpenDisk,
    },
    /// One disk of two restore points.
    Points {
        /// Where they are.
        repository: &'a Repository,
        /// The older.
        from: &'a RestorePoint,
        /// The newer.
        to: &'a RestorePoint,
        /// The disk; none takes the only one.
        disk: Option<&'a str>,
    },
}

/// The making of a delta.
pub struct CreateDeltaJob<'a> {
    /// What from.
    pub origin: DeltaOrigin<'a>,
    /// The name of the moment before; none takes the restore point's id.
    pub base_id: Option<String>,
    /// The name of the moment afterwards; none takes the restore point's id.
    pub new_id: Option<String>,
    /// The virtual machine, for people; none takes the restore point's.
    pub vm: Option<String>,
    /// The unit in which disks are compared, in bytes: a power of two from 512.
    pub granularity_bytes: u32,
    /// Whether the header gets a fingerprint of the whole base, which is read for it.
    pub fingerprint_base: bool,
    /// How to make it; whether to compare is decided by the origin.
    pub options: CreateOptions,
}

/// Where a delta goes.
pub enum DeltaOutput<'a> {
    /// A file, which gets its name when it is complete.
    File {
        /// Its path.
        path: PathBuf,
        /// Replace what is there.
        replace: bool,
    },
    /// A pipe or socket. Whoever reads it sees by the trailer that it is complete.
    Stream(&'a mut dyn Write),
}

/// What was made. The serialised form is the summary event of `--json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MadeDelta {
    /// The file; none where it was a stream.
    pub path: Option<PathBuf>,
    /// The delta.
    #[serde(flatten)]
    pub delta: DeltaSummary,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
}

/// Makes a delta.
///
/// # Errors
/// A file is then not there; those of reading, comparing and writing.
pub fn create(
    job: &CreateDeltaJob<'_>,
    output: DeltaOutput<'_>,
    context: JobContext<'_>,
) -> Result<MadeDelta> {
    let begun = Instant::now();
    let mut options = job.options.clone();
    let (path, delta) = match &job.origin {
        DeltaOrigin::Changes { disk, changed, base, base_size_bytes } => {
            let size_bytes = disk.device.size_bytes();
            if let Some(range) = changed.iter().find(|range| range.end() > size_bytes) {
                return Err(EngineError::usage(format!(
                    "the changed range {range} reaches past the end of {} ({size_bytes} bytes)",
                    disk.name
                )));
            }
            let base_size = base.map(|base| base.device.size_bytes()).or(*base_size_bytes);
            let header = header(job, base_size.unwrap_or(size_bytes), size_bytes);
            // Whole units: what a tracker says in finer ones costs more than it saves.
            let changed = changed.align_outward(job.granularity_bytes.into(), size_bytes);
            let source = DeltaSource {
                device: disk.device.as_ref(),
                base: base.map(|base| base.device.as_ref()),
                changed: &changed,
            };
            context.phase(Phase::Delta, &disk.name);
            make(job, header, &source, &options, output, context)?
        }
        DeltaOrigin::Disks { base, disk } => {
            let size_bytes = disk.device.size_bytes();
            let header = header(job, base.device.size_bytes(), size_bytes);
            let changed = RangeSet::full(size_bytes);
            let source = DeltaSource {
                device: disk.device.as_ref(),
                base: Some(base.device.as_ref()),
                changed: &changed,
            };
            options.differing_only = true;
            context.phase(Phase::Delta, &disk.name);
            make(job, header, &source, &options, output, context)?
        }
        DeltaOrigin::Points { repository, from, to, disk } => {
            let _lease = repository.lease(Purpose::Read)?;
            let disk = only_disk(from, to, *disk)?;
            let (old, new) = (record(from, disk)?, record(to, disk)?);
            let changed = repository.changed_between(old, new)?;
            let (base, device) =
                (repository.open_disk(from, disk)?, repository.open_disk(to, disk)?);
            let mut header = header(job, old.size_bytes, new.size_bytes);
            let unnamed = |id: &Option<String>, point: &RestorePoint| {
                id.clone().unwrap_or_else(|| format!("{}/{disk}", point.id))
            };
            header.base_id = unnamed(&job.base_id, from);
            header.new_id = unnamed(&job.new_id, to);
            header.vm = job.vm.clone().unwrap_or_else(|| to.vm.clone());
            header.disk = disk.to_owned();
            let source = DeltaSource {
                device: device.as_ref(),
                base: Some(base.as_ref()),
                changed: &changed,
            };
            // Blocks that were stored twice are equal after all.
            options.differing_only = true;
            context.phase(Phase::Delta, format!("disk {disk} of {}", to.vm));
            make(job, header, &source, &options, output, context)?
        }
    };
    let duration_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(MadeDelta { path, delta, duration_ms })
}

fn header(job: &CreateDeltaJob<'_>, base_size_bytes: u64, size_bytes: u64) -> DeltaHeader {
    DeltaHeader {
        granularity_bytes: job.granularity_bytes,
        created_ms: u64::try_from(Timestamp::now().as_millisecond()).unwrap_or(0),
        base_id: job.base_id.clone().unwrap_or_default(),
        new_id: job.new_id.clone().unwrap_or_default(),
        vm: job.vm.clone().unwrap_or_default(),
        ..DeltaHeader::new(base_size_bytes, size_bytes)
    }
}

fn record<'p>(point: &'p RestorePoint, disk: &str) -> Result<&'p vmtide_repo::DiskRecord> {
    point.disk_record(disk).ok_or_else(|| EngineError::NotFound {
        what: format!("disk {disk} in restore point {}", point.id),
        hint: "see `vmtide show`".into(),
    })
}

/// The disk to take where the user names none.
fn only_disk<'p>(
    from: &RestorePoint,
    to: &'p RestorePoint,
    disk: Option<&'p str>,
) -> Result<&'p str> {
    if let Some(disk) = disk {
        return Ok(disk);
    }
    match &to.disks[..] {
        [only] => Ok(&only.id),
        disks => {
            let ids: Vec<_> = disks
                .iter()
                .map(|disk| disk.id.as_str())
                .filter(|id| from.disk_record(id).is_some())
                .collect();
            Err(EngineError::usage(format!(
                "a delta is of one disk, and {} has several: add --disk, one of {}",
                to.vm,
                ids.join(", ")
            )))
        }
    }
}

fn make(
    job: &CreateDeltaJob<'_>,
    mut header: DeltaHeader,
    source: &DeltaSource<'_>,
    options: &CreateOptions,
    output: DeltaOutput<'_>,
    context: JobContext<'_>,
) -> Result<(Option<PathBuf>, DeltaSummary)> {
    let (progress, cancel) = (context.progress, context.cancel);
    if job.fingerprint_base {
        let base: &dyn BlockDevice = source.base.ok_or_else(|| {
            EngineError::usage("a fingerprint of the base needs the base: name it")
        })?;
        progress.add_total(base.size_bytes());
        header.base_fingerprint = Some(fingerprint(base, base.size_bytes(), progress, cancel)?);
    }
    write_to(output, &mut |out| Ok(create_delta(source, &header, options, out, progress, cancel)?))
}

/// Gives `write` what it writes to, and a file its name afterwards.
pub(super) fn write_to(
    output: DeltaOutput<'_>,
    write: &mut dyn FnMut(&mut dyn Write) -> Result<DeltaSummary>,
) -> Result<(Option<PathBuf>, DeltaSummary)> {
    let (path, replace) = match output {
        DeltaOutput::Stream(out) => return Ok((None, write(out)?)),
        DeltaOutput::File { path, replace } => (path, replace),
    };
    if !replace && path.symlink_metadata().is_ok() {
        return Err(EngineError::refused(
            format!("{} already exists", path.display()),
            "add --overwrite to replace it",
        ));
    }
    let temporary = staged::temporary_beside(&path)?;
    let failed = |error| EngineError::io(format!("write {}", path.display()), error);
    let file = new_file(&temporary).map_err(failed)?;
    let written = {
        let mut out = BufWriter::with_capacity(BUFFER_BYTES, &file);
        write(&mut out).and_then(|summary| out.flush().map(|()| summary).map_err(failed))
    }
    .and_then(|summary| file.sync_all().map(|()| summary).map_err(failed))
    .and_then(|summary| staged::publish(&temporary, &path, replace).map(|()| summary));
    if written.is_err() {
        // What cannot be removed has `vmtide-partial` in its name.
        let _ = std::fs::remove_file(&temporary);
    }
    Ok((Some(path), written?))
}

/// A new file for its owner only: it holds what the guest's disk does.
pub(super) fn new_file(path: &std::path::Path) -> std::io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}
