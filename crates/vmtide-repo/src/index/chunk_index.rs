//! All live segments of a repository as one index.

use super::merge::merge;
use super::rebuild::IndexRebuild;
use super::segment::{IndexCache, IndexSegment, SegmentHead};
use super::writer::write_unsorted;
use super::{CACHED_PAGES, Key};
use crate::context::RepoContext;
use crate::envelope::ObjectKind;
use crate::{Location, ObjectId, RepoError, Result};
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

/// Live segments above which [`ChunkIndex::compact`] merges. Every lookup of unknown content asks
/// the filter of each, and every backup opens each: more make backups slower, fewer make merges more frequent. With
/// 16, of which a merge left 8, 365 daily incrementals wrote every entry 3.8 times, with 32 and 24 it is 2.0
/// (`docs/decisions/0013-layout.md`).
const MAX_LIVE: usize = 32;

/// Live segments that a merge leaves at most, so that the next is some backups away.
const LIVE_AFTER: usize = 24;

/// A merge goes on to the next larger segment while that has at most this many times the entries
/// gathered so far. Above 1 it takes what an earlier merge made along with the next batch, and writes it once more for
/// nothing; below 1 segments that are nearly alike are not merged, and the merges of small ones come too often.
const ABSORB_FACTOR: u64 = 1;

/// The segments that are kept open between the first look at them, which tells what is superseded, and their
/// use. Others are opened twice: there may be thousands before a prune, and each holds an open file and its tables.
const KEPT_OPEN: usize = 2 * MAX_LIVE;

/// Segments one job can add. At 512 Ki chunks each that is 64 TiB of new 64 KiB chunks in one job;
/// each is one more filter to ask until the next merge.
const MAX_ADDED: usize = 2048;

/// The index of an open repository. Shared by threads; a lookup takes no lock but one shard of the
/// page cache.
pub(crate) struct ChunkIndex {
    ctx: Arc<RepoContext>,
    /// Those found when it was opened, the largest first: there most known chunks are.
    segments: Vec<Slot>,
    /// Those added since, in order; a place is filled once and never emptied, so readers need no
    /// lock.
    added: Box<[OnceLock<Slot>]>,
    superseded: Vec<ObjectId>,
    skipped: Vec<(ObjectId, RepoError)>,
    cache: IndexCache,
}

struct Slot {
    segment: IndexSegment,
    /// A page of it could not be read: it is not asked any more.
    damaged: AtomicBool,
}

impl ChunkIndex {
    /// Opens all live segments. Damaged ones, and those of a newer version, are passed over with a
    /// warning: see [`skipped`](Self::skipped).
    ///
    /// # Errors
    /// `Io`, `Denied`.
    pub fn open(ctx: &Arc<RepoContext>) -> Result<Self> {
        let mut skipped = Vec::new();
        let mut ids = Vec::new();
        let mut named: HashSet<ObjectId> = HashSet::new();
        let mut open: HashMap<ObjectId, SegmentHead> = HashMap::new();
        for id in Self::list(ctx)? {
            if let Some(head) = tolerate(id, SegmentHead::open(ctx, id), &mut skipped)? {
                named.extend(head.superseded());
                ids.push(id);
                if open.len() < KEPT_OPEN {
                    open.insert(id, head);
                }
            }
        }
        open.retain(|id, _| !named.contains(id));
        let (mut dead, live): (Vec<_>, Vec<_>) = ids.into_iter().partition(|id| named.contains(id));
        // That a segment is damaged does not matter any more when another took its place.
        let (replaced, kept): (Vec<_>, Vec<_>) =
            skipped.into_iter().partition(|(id, _)| named.contains(id));
        skipped = kept;
        dead.extend(replaced.into_iter().map(|(id, _)| id));
        let mut segments = Vec::new();
        for id in live {
            let head = open.remove(&id).map_or_else(|| SegmentHead::open(ctx, id), Ok);
            let opened = head.and_then(IndexSegment::from_head);
            segments.extend(tolerate(id, opened, &mut skipped)?.map(Slot::new));
        }
        segments.sort_by_key(|slot| std::cmp::Reverse(slot.segment.entries()));
        let index = Self {
            ctx: Arc::clone(ctx),
            segments,
            added: (0..MAX_ADDED).map(|_| OnceLock::new()).collect(),
            superseded: dead,
            skipped,
            cache: IndexCache::new(CACHED_PAGES),
        };
        tracing::debug!(
            segments = index.segment_count(),
            superseded = index.superseded().len(),
            skipped = index.skipped().len(),
            entries = index.entries(),
            memory_bytes = index.memory_bytes(),
            "chunk index opened"
        );
        Ok(index)
    }

    /// The ids of all objects under `index/`, whatever they are.
    ///
    /// # Errors
    /// Those of the store.
    pub fn list(ctx: &RepoContext) -> Result<Vec<ObjectId>> {
        let prefix = ObjectKind::IndexSegment.prefix();
        let mut ids = Vec::new();
        ctx.store.list(prefix, &mut |entry| {
            ids.extend(entry.name.strip_prefix(prefix).and_then(|id| id.parse::<ObjectId>().ok()));
            Ok(())
        })?;
        Ok(ids)
    }

    /// Checks one segment: that it opens, and where `read` says so every entry in it.
    ///
    /// # Errors
    /// [`RepoError::Damaged`], `Unsupported`, `Io`, `Denied`.
    pub fn check_segment(ctx: &RepoContext, id: ObjectId, read: bool) -> Result<()> {
        let segment = IndexSegment::from_head(SegmentHead::open(ctx, id)?)?;
        let mut entries = segment.head.entries_in_order();
        while read && entries.next_entry()?.is_some() {}
        Ok(())
    }

    /// Calls `accept` with the places where a chunk with this id prefix is said to be stored, until it
    /// says yes. A segment that turns out damaged is warned of once, and not asked again.
    ///
    /// # Errors
    /// `Io`, `Denied`; those of `accept`.
    pub fn lookup_each(
        &self,
        key: &Key,
        accept: &mut dyn FnMut(Location) -> Result<bool>,
    ) -> Result<()> {
        for (number, slot) in (0..).zip(self.live()) {
            if slot.damaged.load(Ordering::Relaxed) {
                continue;
            }
            match slot.segment.lookup(key, &self.cache, number) {
                Err(error) if error.is_damage() || is_gone(&error) => {
                    if !slot.damaged.swap(true, Ordering::Relaxed) {
                        tracing::warn!(%error, "an index segment is not used any more; `vmtide repair` makes the index anew");
                    }
                }
                Ok(None) => {}
                Ok(Some(place)) => {
                    if accept(place)? {
                        return Ok(());
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The first place where the chunk with this id prefix is said to be stored.
    ///
    /// # Errors
    /// As [`lookup_each`](Self::lookup_each).
    #[cfg(test)]
    pub fn lookup(&self, key: &Key) -> Result<Option<Location>> {
        let mut found = None;
        self.lookup_each(key, &mut |place| {
            found = Some(place);
            Ok(true)
        })?;
        Ok(found)
    }

    /// Calls `visit` for all entries, in no order over all. Segments that are damaged are passed
    /// over from there on.
    ///
    /// # Errors
    /// `Io`, `Denied`; those of `visit`.
    pub fn for_each_entry(&self, visit: &mut dyn FnMut(Key, Location) -> Result<()>) -> Result<()> {
        for slot in self.live() {
            let mut entries = slot.segment.head.entries_in_order();
            loop {
                match entries.next_entry() {
                    Ok(Some((key, place))) => visit(key, place)?,
                    Ok(None) => break,
                    Err(error) if error.is_damage() || is_gone(&error) => {
                        tracing::warn!(%error, "the rest of an index segment is passed over");
                        break;
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// Writes the entries as a segment and makes them known to lookups from here on, also of other
    /// threads. Their packs must be durable.
    ///
    /// # Errors
    /// [`RepoError::Invalid`] after 2048 segments in one job; those of the store.
    pub fn add(&self, entries: Vec<(Key, Location)>) -> Result<()> {
        let Some(id) = write_unsorted(&self.ctx, entries, Vec::new())? else { return Ok(()) };
        // A prune may have put another in its place at once; what it held is stored again then.
        let Some(object) = self.ctx.try_open_object(ObjectKind::IndexSegment, id)? else {
            return Ok(());
        };
        let mut slot = match IndexSegment::from_object(object) {
            Err(error) if is_gone(&error) => return Ok(()),
            opened => Slot::new(opened?),
        };
        for place in &self.added {
            match place.set(slot) {
                Ok(()) => return Ok(()),
                Err(back) => slot = back,
            }
        }
        Err(RepoError::Invalid(format!("one job cannot add more than {MAX_ADDED} index segments")))
    }

    /// Merges small segments into one when there are more than 32; `None` where there is no need.
    /// The new segment supersedes them and is used by whoever opens the index next; this
    /// index goes on with what it has. To be called when a restore point is committed; a failure
    /// hurts nothing.
    ///
    /// # Errors
    /// Those of the store.
    pub fn compact(&self) -> Result<Option<ObjectId>> {
        let mut live: Vec<&SegmentHead> = self.live().map(|slot| &slot.segment.head).collect();
        live.sort_by_key(|head| head.entries());
        let sizes: Vec<u64> = live.iter().map(|head| head.entries()).collect();
        let count = merge_count(&sizes);
        if count == 0 {
            return Ok(None);
        }
        merge(&self.ctx, &live[..count], &[])
    }

    /// Begins an index made anew from the packs' chunk tables, in batches of `batch` entries.
    pub const fn rebuild(ctx: &RepoContext, batch: usize) -> IndexRebuild<'_> {
        IndexRebuild::new(ctx, batch)
    }

    /// Segments that others took the place of: garbage.
    pub fn superseded(&self) -> &[ObjectId] {
        &self.superseded
    }

    /// Segments that could not be used, and why.
    pub fn skipped(&self) -> &[(ObjectId, RepoError)] {
        &self.skipped
    }

    /// The packs that its entries name.
    pub fn packs(&self) -> HashSet<ObjectId> {
        self.live().flat_map(|slot| slot.segment.head.packs()).copied().collect()
    }

    /// How many segments a lookup may ask.
    pub fn segment_count(&self) -> usize {
        self.live().count()
    }

    /// How many entries there are, chunks in two segments counted twice.
    pub fn entries(&self) -> u64 {
        self.live().map(|slot| slot.segment.entries()).sum()
    }

    /// The most it will keep in memory: filters and tables, and the page cache when full.
    pub fn memory_bytes(&self) -> usize {
        let page = super::PAGE_BYTES + 128;
        let segments: usize = self.live().map(|slot| slot.segment.memory_bytes()).sum();
        segments + self.cache.capacity() * page + self.added.len() * size_of::<OnceLock<Slot>>()
    }

    fn live(&self) -> impl Iterator<Item = &Slot> {
        self.segments.iter().chain(self.added.iter().map_while(OnceLock::get))
    }
}

impl Slot {
    const fn new(segment: IndexSegment) -> Self {
        Self { segment, damaged: AtomicBool::new(false) }
    }
}

/// How many of the segments, smallest first with these numbers of entries, to merge: none while
/// they are few.
fn merge_count(sizes: &[u64]) -> usize {
    if sizes.len() <= MAX_LIVE {
        return 0;
    }
    let least = sizes.len() - LIVE_AFTER + 1;
    let mut sum: u64 = sizes[..least].iter().sum();
    let more = sizes[least..].iter().take_while(|&&size| {
        let absorb = size <= sum.saturating_mul(ABSORB_FACTOR);
        sum += size;
        absorb
    });
    least + more.count()
}

/// Whether a prune removed a segment while it was in use: another took its place.
pub(super) const fn is_gone(error: &RepoError) -> bool {
    matches!(error, RepoError::NotFound { .. })
}

/// The segment; none where it is damaged or too new, which is noted.
fn tolerate<T>(
    id: ObjectId,
    outcome: Result<T>,
    skipped: &mut Vec<(ObjectId, RepoError)>,
) -> Result<Option<T>> {
    match outcome {
        Err(error) if is_gone(&error) => {
            tracing::debug!(%error, "an index segment went while it was opened");
            Ok(None)
        }
        Err(error @ (RepoError::Damaged { .. } | RepoError::Unsupported { .. })) => {
            tracing::warn!(%error, "an index segment is passed over; prune makes the index anew");
            skipped.push((id, error));
            Ok(None)
        }
        other => other.map(Some),
    }
}
