//! Healing: content that is on record as damaged is stored once more when a backup meets it.
//!
//! A backup meets it in two ways. Whatever it stores or finds known is looked up by name among the
//! damaged chunks, of any VM. And what the base of a disk has on damaged places is read again from the
//! source, chunk by chunk as they were cut then, whether it changed or not: so the next incremental
//! heals its own VM. What was healed is noted when the backup is committed, before the restore point.

use super::fill::PackFiller;
use super::session::SessionState;
use crate::disk::{DamagedPart, Heal, PackSet, PlacedRun, Repairs, for_each_place, write_healed};
use crate::index::{ChunkIndex, Key};
use crate::map::DiskMap;
use crate::pack::ChunkEntry;
use crate::{BLOCK_BYTES, ChunkId, Location, ObjectId, Result};
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use vmtide_block::{BlockDevice, CancelToken, RangeSet};

const BLOCK: u64 = BLOCK_BYTES as u64;

/// Damaged chunks that one job looks for: 16 GiB of them at 64 KiB, in some 30 MiB of memory. What is
/// more is healed by the next job.
const MAX_WANTED: usize = 256 << 10;

/// What one job heals. Shared by its workers.
#[derive(Default)]
pub(crate) struct Healing {
    /// Nothing is damaged, so that nobody needs to ask.
    idle: bool,
    /// The places of damaged chunks by their names.
    wanted: Mutex<HashMap<Key, Vec<Location>>>,
    healed: Mutex<Vec<Heal>>,
}

impl Healing {
    /// Finds out what is damaged and not healed. The chunks of a pack whose directory is lost are
    /// taken from the index.
    ///
    /// # Errors
    /// Those of the store.
    pub fn begin(packs: &PackSet, index: &ChunkIndex) -> Result<Self> {
        let repairs = packs.repairs()?;
        if repairs.damaged.is_empty() {
            return Ok(Self { idle: true, ..Self::default() });
        }
        let mut wanted: HashMap<Key, Vec<Location>> = HashMap::new();
        let mut room = MAX_WANTED;
        let mut want = |key: Key, place: Location| -> Result<()> {
            if room > 0 && !is_healed(packs, repairs, place)? {
                room -= 1;
                wanted.entry(key).or_default().push(place);
            }
            Ok(())
        };
        let mut lost: HashSet<ObjectId> = HashSet::new();
        for entry in repairs.damaged.iter() {
            match chunks_of(packs, &entry.part)? {
                Some(chunks) => {
                    for (ordinal, chunk) in chunks {
                        want(chunk.id.prefix(), Location { pack: entry.part.pack, ordinal })?;
                    }
                }
                None => {
                    lost.insert(entry.part.pack);
                }
            }
        }
        if !lost.is_empty() {
            index.for_each_entry(&mut |key, place| {
                if lost.contains(&place.pack) { want(key, place) } else { Ok(()) }
            })?;
        }
        tracing::info!(chunks = wanted.len(), "looking for the content of damaged chunks");
        Ok(Self { idle: false, wanted: Mutex::new(wanted), healed: Mutex::default() })
    }

    /// Whether there is nothing on record as damaged.
    pub const fn is_idle(&self) -> bool {
        self.idle
    }

    /// Takes note that a chunk of `length_bytes` is stored at a sound place.
    pub fn met(&self, id: &ChunkId, length_bytes: usize, place: Location) {
        if self.idle {
            return;
        }
        if let Some(damaged) = self.wanted.lock().remove(&id.prefix()) {
            // A chunk is at most 1024 blocks long.
            let blocks = u32::try_from(length_bytes / BLOCK_BYTES).unwrap_or(0);
            let mut healed = self.healed.lock();
            healed.extend(damaged.into_iter().map(|from| (from, blocks, place)));
        }
    }

    /// How many bytes were healed so far.
    pub fn healed_bytes(&self) -> u64 {
        self.healed.lock().iter().map(|(_, blocks, _)| u64::from(*blocks) * BLOCK).sum()
    }

    /// Puts on record what was healed; all of it must be durable.
    ///
    /// # Errors
    /// Those of the store.
    pub fn write(&self, session: &SessionState, by: &str) -> Result<()> {
        let healed = std::mem::take(&mut *self.healed.lock());
        if !healed.is_empty() {
            let blocks = write_healed(&session.context, by, healed)?;
            tracing::info!(bytes = blocks * BLOCK, "damaged data was stored once more");
        }
        Ok(())
    }
}

/// Whether a damaged place leads to a sound one.
fn is_healed(packs: &PackSet, repairs: &Repairs, place: Location) -> Result<bool> {
    let traced = packs.trace(place, 1, true, &mut |_| {})?;
    Ok(traced.place.is_ok_and(|(pack, ordinal)| {
        !repairs.damaged.covers(Location { pack: pack.id(), ordinal })
    }))
}

/// The chunks of a damaged part with the ordinals of their first blocks; none where nobody but the
/// index can tell.
fn chunks_of(packs: &PackSet, part: &DamagedPart) -> Result<Option<Vec<(u32, ChunkEntry)>>> {
    let traced = packs.trace(
        Location { pack: part.pack, ordinal: part.first_block },
        1,
        false,
        &mut |_| {},
    )?;
    let Ok((pack, _)) = traced.place else { return Ok(None) };
    // Moved as a whole: then it was not as damaged as that.
    if pack.id() != part.pack {
        return Ok(Some(Vec::new()));
    }
    let end = part.first_block.saturating_add(part.blocks);
    let within = |(ordinal, _): &(u32, ChunkEntry)| (part.first_block..end).contains(ordinal);
    Ok(Some(pack.chunks().filter(within).collect()))
}

/// Reads again from `source` what the base of a disk has on damaged places, and stores the chunks
/// that are still the same. Answers with the bytes of the disk that lie on damaged places.
///
/// # Errors
/// Those of the map, of the source and of the store.
pub(super) fn heal_base(
    session: &SessionState,
    source: &dyn BlockDevice,
    base: &DiskMap,
    base_bytes: u64,
    filler: &mut PackFiller,
    cancel: &CancelToken,
) -> Result<RangeSet> {
    let mut lost = RangeSet::new();
    let mut buffer = Vec::new();
    let size_bytes = base_bytes.min(source.size_bytes());
    for_each_place(base, &session.packs, 0..size_bytes.div_ceil(BLOCK), &mut |run| {
        if !run.is_lost() {
            return Ok(());
        }
        cancel.check()?;
        lost.insert(run.bytes(size_bytes));
        whole_chunks(&run, &mut |block, chunk| {
            let offset = block * BLOCK;
            buffer.resize(usize::from(chunk.blocks) * BLOCK_BYTES, 0);
            let there = size_bytes.saturating_sub(offset).min(buffer.len() as u64);
            let (content, rest) = buffer.split_at_mut(usize::try_from(there).unwrap_or(0));
            source.read_at(content, offset)?;
            rest.fill(0);
            let id = session.context.subkeys.chunk_id(&buffer);
            if id == chunk.id {
                session.store_chunk(&buffer, filler)?;
            }
            Ok(())
        })
    })?;
    Ok(lost)
}

/// Calls `visit` for the chunks that lie in a run from end to end, with the first block of each on
/// the disk.
pub(crate) fn whole_chunks(
    run: &PlacedRun,
    visit: &mut dyn FnMut(u64, ChunkEntry) -> Result<()>,
) -> Result<()> {
    let Ok((pack, ordinal)) = &run.place else { return Ok(()) };
    let end = ordinal.saturating_add(run.count);
    for number in pack.chunk_of(*ordinal)?..pack.chunk_count() {
        let (first, chunk) = pack.chunk(number);
        if first >= end {
            break;
        }
        if first >= *ordinal && first.saturating_add(u32::from(chunk.blocks)) <= end {
            visit(run.first_block + u64::from(first - ordinal), chunk)?;
        }
    }
    Ok(())
}
