//! What this machine and a store can do, stage by stage.
//!
//! The processor's stages work on a sample: of a disk that is named, or made up. What a store is measured with lies apart
//! from the repository in it and is removed at the end; see [`vmtide_repo::measure_store`].

use crate::Result;
use crate::events::{JobContext, Phase};
use serde::Serialize;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmtide_block::{AlignedBuffer, BlockDevice, ByteRange, for_each_extent, is_zero};
use vmtide_repo::{BackupOptions, Measured, ObjectStore, StoreBench};

/// The sample that the stages work on: more than the processor's caches hold, little enough to be read
/// from anything.
const SAMPLE_BYTES: usize = 64 << 20;

/// What is read at once, as a backup does.
const READ_BYTES: usize = 4 << 20;

/// How long reading the source may take.
const READ_LIMIT: Duration = Duration::from_secs(20);

/// What to measure.
pub struct BenchJob<'a> {
    /// The store.
    pub store: Arc<dyn ObjectStore>,
    /// A disk to read and to take the sample from.
    pub source: Option<&'a dyn BlockDevice>,
    /// How much is backed up and restored, and at most read of the source, in bytes.
    pub size_bytes: u64,
    /// How backups are made.
    pub options: BackupOptions,
}

/// What was measured. The serialised form is the summary event of `--json`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BenchSummary {
    /// The store.
    pub store: String,
    /// What the sample is of.
    pub sample: String,
    /// The processors there are.
    pub processors: usize,
    /// The stages, in the order of a backup.
    pub stages: Vec<Measured>,
}

/// Measures.
///
/// # Errors
/// Those of the source and the store; cancelled. Nothing is left in the store then either.
pub fn bench(job: &BenchJob<'_>, context: JobContext<'_>) -> Result<BenchSummary> {
    let mut stages = Vec::new();
    let sample = match job.source {
        Some(source) => {
            context.phase(Phase::Measure, source.name());
            let (read, sample) = read_source(source, job.size_bytes, context)?;
            stages.push(read);
            sample
        }
        None => made_up_sample(),
    };
    context.phase(Phase::Measure, "the processor");
    stages.extend(vmtide_repo::measure_processor(&sample, context.cancel)?);
    context.phase(Phase::Measure, job.store.location());
    let store = StoreBench {
        store: Arc::clone(&job.store),
        sample: &sample,
        size_bytes: job.size_bytes,
        options: job.options.clone(),
    };
    stages.extend(vmtide_repo::measure_store(&store, context.cancel)?);
    Ok(BenchSummary {
        store: job.store.location(),
        sample: job.source.map_or_else(|| "made up".into(), BlockDevice::name),
        processors: std::thread::available_parallelism().map_or(1, usize::from),
        stages,
    })
}

/// Reads data of the source from its beginning, one thread, and keeps the first blocks that are not zero.
fn read_source(
    source: &dyn BlockDevice,
    size_bytes: u64,
    context: JobContext<'_>,
) -> Result<(Measured, Vec<u8>)> {
    let mut sample = Vec::new();
    let mut buffer = AlignedBuffer::new(READ_BYTES);
    let (mut bytes, mut reads, mut time) = (0, 0, Duration::ZERO);
    let everything = ByteRange::new(0, source.size_bytes());
    for_each_extent(source, everything, context.cancel, |extent| {
        let mut at = extent.range.offset;
        while !extent.kind.reads_as_zero()
            && at < extent.range.end()
            && bytes < size_bytes
            && time < READ_LIMIT
        {
            context.cancel.check()?;
            let left = (extent.range.end() - at).min(size_bytes - bytes);
            let length = usize::try_from(left).unwrap_or(READ_BYTES).min(READ_BYTES);
            let data = &mut buffer[..length];
            let begun = Instant::now();
            source.read_at(data, at)?;
            time += begun.elapsed();
            for block in data.chunks_exact(4096).filter(|block| !is_zero(block)) {
                if sample.len() < SAMPLE_BYTES {
                    sample.extend_from_slice(block);
                }
            }
            at += length as u64;
            bytes += length as u64;
            reads += 1;
        }
        Ok(())
    })?;
    if sample.is_empty() {
        sample = made_up_sample();
    }
    Ok((Measured::new("read source", bytes, reads, time), sample))
}

/// Data that compresses to some half, as files of an operating system do.
fn made_up_sample() -> Vec<u8> {
    let mut sample = vec![0; SAMPLE_BYTES];
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    for word in sample.chunks_exact_mut(16) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word[..8].copy_from_slice(&state.to_le_bytes());
        // Half of it says little: a few values, as in tables and text.
        word[8..].fill(state.to_le_bytes()[0] & 15);
    }
    sample
}
