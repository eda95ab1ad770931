//! Merging deltas, and looking at one.

use super::create::{DeltaOutput, MadeDelta, write_to};
use crate::events::{JobContext, Phase};
use crate::{EngineError, Result};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use vmtide_block::{OpenMode, RawDevice};
use vmtide_delta::{CreateOptions, DeltaFile, DeltaReader, DeltaSummary, merge_deltas};

/// What is read of each delta at a time, in bytes.
const BUFFER_BYTES: usize = 256 << 10;

/// The merging of deltas.
#[derive(Clone, Debug)]
pub struct MergeJob {
    /// The deltas, the oldest first.
    pub deltas: Vec<PathBuf>,
    /// How the result is compressed.
    pub options: CreateOptions,
}

/// Merges deltas that follow each other into one.
///
/// # Errors
/// [`EngineError::Refused`] where they do not follow each other; damage found in one. A file is then
/// not there.
pub fn merge(
    job: &MergeJob,
    output: DeltaOutput<'_>,
    context: JobContext<'_>,
) -> Result<MadeDelta> {
    let begun = Instant::now();
    if job.deltas.len() < 2 {
        return Err(EngineError::usage("give two deltas or more, the oldest first"));
    }
    let mut readers = Vec::with_capacity(job.deltas.len());
    for path in &job.deltas {
        let file = File::open(path)
            .map_err(|error| EngineError::io(format!("open {}", path.display()), error))?;
        let input = BufReader::with_capacity(BUFFER_BYTES, file);
        readers.push(DeltaReader::new(input, path.display().to_string())?);
    }
    context.phase(Phase::Merge, format!("{} deltas", readers.len()));
    let (progress, cancel) = (context.progress, context.cancel);
    let (path, delta) = write_to(output, &mut |out| {
        Ok(merge_deltas(&mut readers, &job.options, out, progress, cancel)?)
    })?;
    let duration_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(MadeDelta { path, delta, duration_ms })
}

/// What the delta in a file says of itself; every byte of it is checked where `verify` says so.
///
/// # Errors
/// Damage that was found; where it cannot be read.
pub fn info(path: &Path, verify: bool, context: JobContext<'_>) -> Result<DeltaSummary> {
    let delta = DeltaFile::open(Arc::new(RawDevice::open(path, OpenMode::ReadOnly)?))?;
    let summary = delta.summary();
    if !verify {
        return Ok(summary);
    }
    context.phase(Phase::Check, path.display().to_string());
    context.progress.add_total(summary.stream_bytes);
    let workers = CreateOptions::default().workers;
    Ok(delta.verify(workers, context.progress, context.cancel)?)
}
