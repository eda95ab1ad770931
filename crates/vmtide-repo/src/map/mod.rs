//! Disk maps: where the content of every block of a disk is (format §7).
//!
//! A disk map is a short list of immutable segments, newest first. Each holds sorted runs; the
//! newest segment that has a run over a block decides, and a block in none is zero. An incremental
//! writes one segment with its changes and shares the others; so that the list stays short, it
//! merges older segments into its own while they are no more than twice as large
//! ([`write_layered`]), which leaves each segment more than twice the size of the next newer one:
//! at most 48 of them, and every run rewritten a logarithmic number of times.
//!
//! Memory: the page table (48 bytes per 4096 runs) and pack table (16 bytes per pack) of each
//! segment; pages are read when needed, through a cache of [`CACHED_PAGES`] or one page per segment
//! when streaming; a backup holds at most [`MAX_RUNS_IN_MEMORY`] runs before it spills.

mod builder;
mod covering;
mod directory;
mod disk_map;
mod layered;
mod overlay;
pub(crate) mod page;
mod run;
mod segment;
#[cfg(test)]
mod tests;
mod writer;

pub use run::{MapRun, Target};

pub(crate) use builder::MapBuilder;
pub(crate) use directory::stored_pages;
pub(crate) use disk_map::DiskMap;
pub(crate) use layered::{BaseMap, write_layered};
pub(crate) use segment::MapSegment;

/// No disk has more blocks: at 4 KiB each, that is 1 EiB. It bounds every sum
/// of positions far below where 64 bits overflow.
pub(crate) const MAX_BLOCKS: u64 = 1 << 48;

/// The pack that blocks of a salvaged map lead to where nobody can tell where they are. There is no
/// such pack: ids are random.
pub(crate) const LOST: crate::ObjectId = crate::ObjectId([0xff; 16]);

/// Runs per page. More makes a single lookup decode more; fewer makes the page table, which is kept
/// in memory, larger.
pub(crate) const RUNS_PER_PAGE: usize = 4096;

/// The most a page may be before compression; 4096 runs take at most 96 KiB.
pub(crate) const MAX_PAGE_BYTES: usize = 256 << 10;

/// The most a stored page may be: what zstd can make of 256 KiB, and the tag, rounded up.
pub(crate) const MAX_STORED_PAGE_BYTES: u32 = (256 << 10) + 4096;

/// The segments of one disk map. [`write_layered`] makes at most 48; a longer list is not ours, and
/// every lookup would pay for it.
pub(crate) const MAX_SEGMENTS: usize = 64;

/// Pages cached per open disk, at most 96 KiB each: 12 MiB at worst, for 512 Ki runs.
pub(crate) const CACHED_PAGES: usize = 128;

/// Runs a [`MapBuilder`] holds, 40 bytes each: 40 MiB (and half as much again for a moment while its
/// vector grows). A disk in order needs a few per pack; only a fragmented one spills.
pub(crate) const MAX_RUNS_IN_MEMORY: usize = 1 << 20;

/// Writes a small segment, the seed of a corpus.
///
/// # Errors
/// Those of the store.
pub(crate) fn write_sample(ctx: &std::sync::Arc<crate::context::RepoContext>) -> crate::Result<()> {
    let builder = MapBuilder::new(std::sync::Arc::clone(ctx));
    for number in 0..100u32 {
        let pack = crate::ObjectId([number.to_le_bytes()[0] % 3; 16]);
        let target = match number % 7 {
            0 => Target::Zero,
            _ => Target::Data { pack, ordinal: number * 5 },
        };
        builder.push(MapRun { first_block: u64::from(number) * 3, count: 2, target })?;
    }
    write_layered(ctx, BaseMap::default(), builder, 300).map(drop)
}
