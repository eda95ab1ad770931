//! Healing: content that is on record as damaged is stored once more when a backup meets it.
//!
//! A backup meets it in two ways. Whatever it stores or finds known is looked up by name among the
//! damaged chunks, of any VM. And what the base of a disk has on damaged places is read again from the
//! source, chunk by chunk as they were cut then, whether it changed or not: so the next incremental
//! heals its own VM. What was healed is noted when the backup is committed, before the restore point.

use super::fill::PackFiller;
use super::session::BackupSession;
use super::state::SessionState;
use crate::disk::{
    DamagedPart, Heal, PackSet, Place, PlacedRun, Repairs, Suspects, for_each_suspect, write_healed,
};
use crate::index::{ChunkIndex, Key};
use crate::map::DiskMap;
use crate::pack::{ChunkEntry, MAX_CHUNK_BLOCKS};
use crate::point::DiskRecord;
use crate::{BLOCK_BYTES, ChunkId, Location, ObjectId, Result};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap, HashSet};
use vmtide_block::{BlockDevice, BlockError, CancelToken, RangeSet};

const BLOCK: u64 = BLOCK_BYTES as u64;

/// Damaged chunks that one job looks for: 16 GiB of them at 64 KiB, in some 30 MiB of memory. What is
/// more is healed by the next job.
const MAX_WANTED: usize = 256 << 10;

/// The length of chunks that are cut anew because nobody knows how they were cut: 64 KiB.
const NAMELESS_BLOCKS: u32 = 16;

/// What one job heals. Shared by its workers.
#[derive(Default)]
pub(crate) struct Healing {
    /// Nothing is damaged that was not healed, so that nobody needs to ask.
    idle: bool,
    /// The places of damaged chunks by their names.
    wanted: Mutex<HashMap<Key, Vec<Location>>>,
    /// The names of chunks in lost packs by their places, from the index.
    lost: BTreeMap<Location, Key>,
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
        let mut names = BTreeMap::new();
        // The index of a repository that was pruned since does not name them any more.
        if !lost.is_disjoint(&index.packs()) {
            index.for_each_entry(&mut |key, place| {
                if !lost.contains(&place.pack) || names.len() >= MAX_WANTED {
                    return Ok(());
                }
                names.insert(place, key);
                want(key, place)
            })?;
        }
        if wanted.is_empty() && lost.is_empty() {
            return Ok(Self { idle: true, ..Self::default() });
        }
        tracing::info!(chunks = wanted.len(), "looking for the content of damaged chunks");
        Ok(Self { idle: false, wanted: Mutex::new(wanted), lost: names, healed: Mutex::default() })
    }

    /// Whether nothing is on record as damaged that is not healed.
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

    /// Adds what another healed in the same job.
    pub fn take_over(&self, other: &Self) {
        self.healed.lock().append(&mut other.healed.lock());
    }

    /// The names of all damaged chunks that are wanted.
    fn wanted(&self) -> Vec<Key> {
        self.wanted.lock().keys().copied().collect()
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

/// A disk that what is damaged is read from.
pub(crate) struct HealthyDisk<'a> {
    /// The disk.
    pub source: &'a dyn BlockDevice,
    /// Whether what it cannot read is passed over: it is a stored disk, which may be damaged itself.
    pub tolerant: bool,
    /// Whether it is certain to be the same disk at the same moment, so that it heals also what has no
    /// name any more.
    pub is_same: bool,
    /// Whether nothing is stored, only counted.
    pub dry_run: bool,
}

impl<'a> HealthyDisk<'a> {
    /// The source of a backup.
    pub const fn source(source: &'a dyn BlockDevice) -> Self {
        Self { source, tolerant: false, is_same: false, dry_run: false }
    }

    /// The blocks of a chunk, padded with zeros beyond `size_bytes`; none where they cannot be read.
    fn read(&self, block: u64, blocks: u64, size_bytes: u64) -> Result<Option<Vec<u8>>> {
        let offset = block * BLOCK;
        // A chunk is at most 1024 blocks long.
        let length = usize::try_from(blocks).unwrap_or(0) * BLOCK_BYTES;
        let mut buffer = vec![0; length];
        let there = size_bytes.saturating_sub(offset).min(length as u64);
        let content = &mut buffer[..usize::try_from(there).unwrap_or(0)];
        match self.source.read_at(content, offset) {
            Err(BlockError::Damaged { .. }) if self.tolerant => Ok(None),
            other => other.map(|()| Some(buffer)).map_err(Into::into),
        }
    }
}

/// Reads again from a disk what a disk map has on damaged places, and stores the chunks that are
/// still the same. Answers with the bytes of the disk that lie on damaged places.
///
/// # Errors
/// Those of the map, of the source and of the store.
pub(super) fn heal_disk(
    session: &SessionState,
    healthy: &HealthyDisk<'_>,
    map: &DiskMap,
    map_bytes: u64,
    filler: &mut PackFiller,
    cancel: &CancelToken,
) -> Result<RangeSet> {
    let mut lost = RangeSet::new();
    let size_bytes = map_bytes.min(healthy.source.size_bytes());
    let suspects = Suspects::of(&session.context, session.packs.repairs()?, &[])?;
    for_each_suspect(map, &session.packs, size_bytes.div_ceil(BLOCK), &suspects, &mut |run| {
        if !run.is_lost() {
            return Ok(());
        }
        cancel.check()?;
        lost.insert(run.bytes(size_bytes));
        let chunks = chunks_in(session, &run)?;
        if chunks.is_empty() && run.place.is_err() && healthy.is_same {
            return heal_nameless(session, healthy, &run, size_bytes, filler);
        }
        for chunk in chunks {
            let read = healthy.read(chunk.block, chunk.blocks, size_bytes)?;
            let Some(content) = read else { continue };
            let id = session.context.subkeys.chunk_id(&content);
            if id.prefix() != chunk.key {
                continue;
            }
            if healthy.dry_run {
                session.healing.met(&id, content.len(), run.at);
            } else {
                session.store_chunk(&content, filler)?;
            }
        }
        Ok(())
    })?;
    Ok(lost)
}

/// Stores what is in the place of blocks of which nobody knows the names any more.
fn heal_nameless(
    session: &SessionState,
    healthy: &HealthyDisk<'_>,
    run: &PlacedRun,
    size_bytes: u64,
    filler: &mut PackFiller,
) -> Result<()> {
    let mut done = 0;
    while done < run.count {
        let blocks = (run.count - done).min(NAMELESS_BLOCKS);
        let block = run.first_block + u64::from(done);
        if let Some(content) = healthy.read(block, blocks.into(), size_bytes)? {
            let from = Location { ordinal: run.at.ordinal.saturating_add(done), ..run.at };
            let to = match healthy.dry_run {
                true => from,
                false => session.store_chunk(&content, filler)?.place,
            };
            session.healing.healed.lock().push((from, blocks, to));
        }
        done += blocks;
    }
    Ok(())
}

/// A damaged chunk, and where it is on a disk.
struct LostChunk {
    block: u64,
    blocks: u64,
    key: Key,
}

/// The chunks that lie in a damaged run from end to end: from the directory of the pack, or where
/// that is lost from what the index remembers of it.
fn chunks_in(session: &SessionState, run: &PlacedRun) -> Result<Vec<LostChunk>> {
    let mut chunks = Vec::new();
    if run.place.is_ok() {
        whole_chunks(run, &mut |block, chunk| {
            let blocks = u64::from(chunk.blocks);
            chunks.push(LostChunk { block, blocks, key: chunk.id.prefix() });
            Ok(())
        })?;
        return Ok(chunks);
    }
    let end = Location { ordinal: run.at.ordinal.saturating_add(run.count), ..run.at };
    let mut known = session.healing.lost.range(run.at..end).peekable();
    while let Some((place, key)) = known.next() {
        // A chunk ends where the next one begins; one that the index has elsewhere makes the one
        // before it seem longer, and is no more found than that.
        let next = known.peek().map_or(end.ordinal, |(next, _)| next.ordinal);
        let blocks = next - place.ordinal;
        if (1..=u32::from(MAX_CHUNK_BLOCKS)).contains(&blocks) {
            let block = run.first_block + u64::from(place.ordinal - run.at.ordinal);
            chunks.push(LostChunk { block, blocks: blocks.into(), key: *key });
        }
    }
    Ok(chunks)
}

impl BackupSession {
    /// Finds the content of damaged chunks elsewhere in the repository, where it was stored twice.
    ///
    /// # Errors
    /// Those of the store; cancelled.
    pub(crate) fn heal_from_duplicates(&self, cancel: &CancelToken) -> Result<()> {
        let (session, keys) = (self.state(), self.state().healing.wanted());
        for key in keys {
            cancel.check()?;
            session.index.lookup_each(&key, &mut |place| {
                let Ok(Place::Pack(pack)) = session.packs.place(place.pack) else {
                    return Ok(false);
                };
                let Ok(number) = pack.chunk_of(place.ordinal) else { return Ok(false) };
                let (_, chunk) = pack.chunk(number);
                let length_bytes = usize::from(chunk.blocks) * BLOCK_BYTES;
                let sound = session.sound(place, &chunk.id, length_bytes)?;
                if let Some(sound) = sound.filter(|_| chunk.id.prefix() == key) {
                    session.healing.met(&chunk.id, length_bytes, sound);
                }
                Ok(sound.is_some())
            })?;
        }
        Ok(())
    }

    /// Takes from a disk that holds the same or much the same what `record` has on damaged places, as
    /// far as the content is the same by its name.
    ///
    /// # Errors
    /// Those of the map and of the store; cancelled.
    pub(crate) fn heal_from_disk(
        &self,
        healthy: &HealthyDisk<'_>,
        record: &DiskRecord,
        cancel: &CancelToken,
    ) -> Result<()> {
        let session = self.state();
        let blocks = record.size_bytes.div_ceil(BLOCK);
        let map = DiskMap::open(&session.context, &record.map, blocks)?;
        self.with_filler(|filler| {
            heal_disk(session, healthy, &map, record.size_bytes, filler, cancel).map(drop)
        })
    }
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
