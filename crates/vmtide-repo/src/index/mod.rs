//! The index: from the name of a chunk's content to a place where it is stored (format §8).
//!
//! It answers "is this content known?" for deduplication and nothing else: it is a cache of what
//! the packs' chunk tables say. A damaged segment is passed over with a warning, costs some
//! deduplication, and is made anew by the next `prune`.
//!
//! A segment is sorted entries in pages of 4 KiB, with a Bloom filter and the first key of each
//! page in memory. Every backup adds segments; when they are many, the small ones are merged into
//! one that supersedes them ([`ChunkIndex::compact`]).
//!
//! Memory: 12 bits of filter and 24/170 bytes of page table per entry, 16 bytes per pack, and a
//! cache of [`CACHED_PAGES`] pages: for 1 TiB of unique 64 KiB chunks (16 Mi entries) in 64 MiB
//! packs 24 + 2.3 + 0.25 MiB, and 8 MiB once. While segments are merged, the new filter comes on top.

mod chunk_index;
mod directory;
mod filter;
mod merge;
mod rebuild;
mod segment;
mod synthetic;
#[cfg(test)]
mod tests;
mod writer;

pub(crate) use chunk_index::ChunkIndex;
pub(crate) use directory::stored_pages;
pub(crate) use synthetic::measure as measure_synthetic;

/// The part of a chunk id that is looked up: its first 16 bytes.
pub(crate) type Key = [u8; 16];

/// The length of an entry: key, pack number, ordinal.
pub(crate) const ENTRY_BYTES: usize = 24;

/// Entries per page: with the tag, a page of an encrypted repository is exactly 4 KiB. Fixed by the
/// format.
pub(crate) const ENTRIES_PER_PAGE: usize = 170;

/// A whole page before sealing.
pub(crate) const PAGE_BYTES: usize = ENTRIES_PER_PAGE * ENTRY_BYTES;

/// Pages cached, for all segments together: 8 MiB. Chunk ids are hashes, so hits spread over all
/// pages: only small repositories gain from a cache at all.
pub(crate) const CACHED_PAGES: usize = 2048;

/// The first eight bytes of a key as a number, in the order of the keys.
pub(crate) fn leading(key: &Key) -> u64 {
    let mut half = [0; 8];
    half.copy_from_slice(&key[..8]);
    u64::from_be_bytes(half)
}

/// `value` of 2⁶⁴ scaled to one of `count` places.
pub(crate) fn scale(value: u64, count: usize) -> usize {
    let product = u128::from(value) * count as u128;
    usize::try_from(product >> 64).unwrap_or(usize::MAX)
}

/// Opens, looks up in and walks a segment made of hostile bytes; answers with the entries it gave.
pub(crate) fn fuzz_segment(object: crate::context::OpenObject, input: &[u8]) -> usize {
    let Ok(segment) = segment::IndexSegment::from_object(object) else { return 0 };
    let cache = segment::IndexCache::new(16);
    for key in input.as_chunks::<16>().0.iter().take(64) {
        let _ = segment.lookup(key, &cache, 0);
    }
    let mut entries = segment.head.entries_in_order();
    std::iter::from_fn(|| entries.next_entry().ok().flatten()).count()
}

/// Writes a small segment, the seed of a corpus.
///
/// # Errors
/// Those of the store.
pub(crate) fn write_sample(ctx: &crate::context::RepoContext) -> crate::Result<()> {
    let entry = |number: u32| {
        let key = *blake3::hash(&number.to_le_bytes()).as_bytes().first_chunk().unwrap_or(&[0; 16]);
        let pack = crate::ObjectId([number.to_le_bytes()[0] % 3; 16]);
        (key, crate::Location { pack, ordinal: number })
    };
    writer::write_unsorted(ctx, (0..400).map(entry).collect(), Vec::new()).map(drop)
}
