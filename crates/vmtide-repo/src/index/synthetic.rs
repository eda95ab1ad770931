//! An index of made-up chunks, to see what one of many TiB costs.

use super::writer::IndexSegmentWriter;
use super::{ChunkIndex, Key};
use crate::context::RepoContext;
use crate::{Location, ObjectId, Result};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmtide_block::CancelToken;

/// Segments of equal length: what compaction leaves alive at most when it is done.
const SEGMENTS: usize = 24;

/// Chunks of one pack: 64 MiB stored of chunks of 64 KiB, compressed to some half.
const PACK_CHUNKS: u64 = 2048;

/// How often `cancel` is looked at, in entries.
const CHECK_EVERY: u64 = 1 << 16;

/// What an index costs.
pub(crate) struct IndexCost {
    /// The bytes it holds in memory, with the cache of pages.
    pub memory_bytes: u64,
    /// How long opening took.
    pub open: Duration,
    /// How long each of `lookups` questions for chunks that are known took, all together.
    pub known: Duration,
    /// The same for unknown ones.
    pub unknown: Duration,
}

/// The key of the n-th of `entries` chunks: they ascend, and their low bits look random.
fn key(number: u64, entries: u64) -> Key {
    let step = u128::MAX / u128::from(entries.max(1));
    let noise = u128::from(number.wrapping_mul(0x9E37_79B9_7F4A_7C15)) << 20 | u128::from(number);
    (step * u128::from(number) + noise % step.max(1)).to_be_bytes()
}

/// Writes an index of `entries` chunks and measures asking it `lookups` times.
///
/// # Errors
/// Those of the store; cancelled.
pub(crate) fn measure(
    ctx: &Arc<RepoContext>,
    entries: u64,
    lookups: u64,
    cancel: &CancelToken,
) -> Result<IndexCost> {
    for segment in 0..SEGMENTS as u64 {
        let expected = entries / SEGMENTS as u64 + 1;
        let mut writer = IndexSegmentWriter::create(ctx, expected, Vec::new())?;
        let mut pack = ObjectId::random()?;
        for (count, number) in (segment..entries).step_by(SEGMENTS).enumerate() {
            let count = count as u64;
            if count.is_multiple_of(CHECK_EVERY) {
                cancel.check()?;
            }
            if count.is_multiple_of(PACK_CHUNKS) {
                pack = ObjectId::random()?;
            }
            let ordinal = u32::try_from(count % PACK_CHUNKS * 16).unwrap_or(0);
            writer.push(&key(number, entries), Location { pack, ordinal })?;
        }
        writer.finish()?;
    }
    let begun = Instant::now();
    let index = ChunkIndex::open(ctx)?;
    let open = begun.elapsed();
    let ask = |change: u128| -> Result<(Duration, u64)> {
        let begun = Instant::now();
        let mut found = 0;
        for number in 0..lookups {
            // Scattered, as new content is: the cache of pages is of no help.
            let number = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) % entries.max(1);
            let key = (u128::from_be_bytes(key(number, entries)) ^ change).to_be_bytes();
            index.lookup_each(&key, &mut |_| {
                found += 1;
                Ok(true)
            })?;
        }
        Ok((begun.elapsed(), found))
    };
    let (known, found) = ask(0)?;
    let (unknown, strangers) = ask(1 << 50)?;
    if found != lookups || strangers != 0 {
        let detail = format!(
            "an index of {entries} chunks found {found} of {lookups} and {strangers} that it has not"
        );
        return Err(crate::RepoError::Invalid(detail));
    }
    Ok(IndexCost { memory_bytes: index.memory_bytes() as u64, open, known, unknown })
}
