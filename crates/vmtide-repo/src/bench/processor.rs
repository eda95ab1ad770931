//! The processor's part, one core, on data in memory.

use super::Measured;
use crate::backup::{Chunker, Cut};
use crate::crypto::{MasterKey, ObjectCipher, TAG_BYTES, checksum};
use crate::envelope::{Header, ObjectKind};
use crate::pack::{FrameDecoder, FrameEncoder};
use crate::{BLOCK_BYTES, ObjectId, Result};
use std::time::{Duration, Instant};
use vmtide_block::CancelToken;

/// How long a stage is repeated, at least: enough for a core to leave its idle clock.
const STAGE_TIME: Duration = Duration::from_millis(250);

/// What is compressed and sealed together: a frame.
const FRAME_BYTES: usize = 2 << 20;

/// The levels that are compared.
const LEVELS: [i32; 5] = [-3, 1, 3, 6, 9];

/// Repeats `work` over all of `sample` until it took long enough.
fn repeat(
    stage: &str,
    sample_bytes: usize,
    cancel: &CancelToken,
    mut work: impl FnMut() -> Result<u64>,
) -> Result<Measured> {
    let begun = Instant::now();
    let (mut bytes, mut operations) = (0, 0);
    while bytes == 0 || begun.elapsed() < STAGE_TIME {
        cancel.check()?;
        operations += work()?;
        bytes += sample_bytes as u64;
    }
    Ok(Measured::new(stage, bytes, operations, begun.elapsed()))
}

/// Measures every stage of a backup and a restore that the processor does, on `sample`, which
/// should be some tens of MiB of what is to be backed up. Works on whole blocks of it.
///
/// # Errors
/// [`BlockError::Cancelled`](vmtide_block::BlockError::Cancelled); where zstd or the random
/// generator cannot be set up.
pub fn measure_processor(sample: &[u8], cancel: &CancelToken) -> Result<Vec<Measured>> {
    let sample = &sample[..sample.len() / BLOCK_BYTES * BLOCK_BYTES];
    let subkeys = MasterKey::random()?.subkeys();
    let mut measured = Vec::new();
    let zeros = vec![0; 8 << 20];
    measured.push(repeat("zero scan", zeros.len(), cancel, || {
        Ok(u64::from(vmtide_block::is_zero(std::hint::black_box(&zeros))))
    })?);
    let chunker = Chunker::new(64 << 10, subkeys.boundary_seed());
    let mut chunks = Vec::new();
    measured.push(repeat("boundaries", sample.len(), cancel, || {
        chunks.clear();
        chunker.cut(sample, false, |cut| {
            if let Cut::Chunk { first, count } = cut {
                chunks.push(first * BLOCK_BYTES..(first + count) * BLOCK_BYTES);
            }
            Ok(())
        })?;
        Ok(chunks.len() as u64)
    })?);
    let chunk_bytes = chunks.iter().map(std::ops::Range::len).sum();
    measured.push(repeat("chunk ids (BLAKE3)", chunk_bytes, cancel, || {
        for chunk in &chunks {
            std::hint::black_box(subkeys.chunk_id(&sample[chunk.clone()]));
        }
        Ok(chunks.len() as u64)
    })?);
    for level in LEVELS {
        measured.extend(compression(sample, level, cancel)?);
    }
    let header = Header {
        kind: ObjectKind::Pack,
        sealed: true,
        chunk_size_bytes: 64 << 10,
        id: ObjectId::random()?,
        repository: ObjectId::random()?,
        owner: crate::envelope::NO_OWNER,
    };
    let cipher = ObjectCipher::new(&subkeys, &header)?;
    let mut frame = Vec::with_capacity(FRAME_BYTES + TAG_BYTES);
    let mut section = 0;
    measured.push(repeat("AES-256-GCM seal", FRAME_BYTES, cancel, || {
        frame.resize(FRAME_BYTES, 7);
        section += 1;
        cipher.seal(section, &[], &mut frame)?;
        Ok(1)
    })?);
    let sealed = frame.clone();
    measured.push(repeat("AES-256-GCM open", FRAME_BYTES, cancel, || {
        // Opening is in place: what is opened is a copy each time, which costs a tenth of it.
        frame.clear();
        frame.extend_from_slice(&sealed);
        cipher.open(section, &[], &mut frame)?;
        Ok(1)
    })?);
    measured.push(repeat("checksum (BLAKE3)", sealed.len(), cancel, || {
        std::hint::black_box(checksum(&sealed));
        Ok(1)
    })?);
    Ok(measured)
}

/// Compressing the sample as a backup at `level` does, and getting it back.
#[allow(clippy::cast_precision_loss, reason = "a share needs no more than 53 bits")]
fn compression(sample: &[u8], level: i32, cancel: &CancelToken) -> Result<[Measured; 2]> {
    let mut encoder = FrameEncoder::new(level)?;
    let mut frames = Vec::new();
    let mut packed = repeat(&format!("zstd {level}"), sample.len(), cancel, || {
        frames.clear();
        for content in sample.chunks(FRAME_BYTES) {
            let mut stored = Vec::new();
            let compression = encoder.encode(content, &mut stored)?;
            frames.push((compression, stored, content.len()));
        }
        Ok(frames.len() as u64)
    })?;
    let stored: usize = frames.iter().map(|(_, stored, _)| stored.len()).sum();
    packed.left = Some(stored as f64 / sample.len().max(1) as f64);
    let mut decoder = FrameDecoder::new()?;
    let mut content = vec![0; FRAME_BYTES];
    let unpacked = repeat(&format!("zstd {level}, back"), sample.len(), cancel, || {
        for (compression, stored, length) in &frames {
            decoder.decode(*compression, stored, &mut content[..*length]).ok_or_else(|| {
                crate::RepoError::Invalid("what was just compressed does not decompress".into())
            })?;
        }
        Ok(frames.len() as u64)
    })?;
    Ok([packed, unpacked])
}
