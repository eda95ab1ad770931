//! Removing what no restore point needs (format §11).
//!
//! The order makes every crash harmless: packs that nothing needs go first; then new packs, then
//! forwards, then the new index, and only then what was moved, old packs last. A point resolves through old packs until its forward exists, and
//! through the forward after; a forward and its pack may both exist for a while, the pack wins.

use super::mark::{ChunkBits, Marks};
use crate::context::RepoContext;
use crate::disk::{Move, PackSet, Place, write_forward};
use crate::envelope::ObjectKind;
use crate::index::ChunkIndex;
use crate::pack::{ChunkEntry, FrameDecoder, FrameEncoder, Pack, PackWriter};
use crate::point::RestorePoint;
use crate::{BLOCK_BYTES, Location, ObjectId, RepoError, Result};
use serde::Serialize;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use vmtide_block::{CancelToken, Progress};

/// Index entries that are sorted in memory at once: 1 Mi, some 48 MiB.
const INDEX_BATCH: usize = 1 << 20;

/// Packs that are reached through this many forwards are not moved again (format §10 allows 16).
const MAX_DEPTH: usize = 15;

/// The size of a repacked pack; as in a backup.
const PACK_SIZE_BYTES: u64 = 64 << 20;

/// How to prune.
#[derive(Clone, Debug)]
pub struct PruneOptions {
    /// Only say what would be done.
    pub dry_run: bool,
    /// Packs of which less than this percentage of chunks is alive are rewritten; 0 rewrites none.
    pub repack_below_percent: u8,
}

impl Default for PruneOptions {
    fn default() -> Self {
        Self { dry_run: false, repack_below_percent: 50 }
    }
}

/// What prune did, or would do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PruneReport {
    /// Whether nothing was really done.
    pub dry_run: bool,
    /// Packs left as they are.
    pub packs_kept: u64,
    /// Packs removed because nothing in them is needed.
    pub packs_removed: u64,
    /// Packs rewritten without their dead chunks.
    pub packs_repacked: u64,
    /// Map segments removed.
    pub maps_removed: u64,
    /// Index segments replaced by the new one.
    pub index_removed: u64,
    /// Packs that should have been rewritten but are damaged, and were left as they are.
    pub packs_damaged: u64,
    /// Bytes given back to the store.
    pub freed_bytes: u64,
    /// Bytes written for rewritten packs.
    pub rewritten_bytes: u64,
}

/// What is to happen with each pack.
#[derive(Default)]
struct Decision {
    keep: Vec<ObjectId>,
    repack: Vec<ObjectId>,
    remove: Vec<ObjectId>,
}

struct Prune<'a> {
    context: &'a Arc<RepoContext>,
    packs: PackSet,
    marks: Marks,
    /// All packs in the store with their length.
    lengths: HashMap<ObjectId, u64>,
    progress: &'a Progress,
    cancel: &'a CancelToken,
    report: PruneReport,
}

/// Prunes; the caller holds the exclusive lock and has read *all* points.
pub(crate) fn prune(
    context: &Arc<RepoContext>,
    points: &[RestorePoint],
    options: &PruneOptions,
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<PruneReport> {
    let packs = PackSet::new(Arc::clone(context));
    let marks = Marks::of(context, &packs, points, cancel)?;
    let lengths = list(context, ObjectKind::Pack)?;
    let report = PruneReport { dry_run: options.dry_run, ..PruneReport::default() };
    let mut prune = Prune { context, packs, marks, lengths, progress, cancel, report };
    let decision = prune.decide(options)?;
    prune.report.packs_kept = decision.keep.len() as u64;
    prune.report.packs_removed = decision.remove.len() as u64;
    prune.report.packs_repacked = decision.repack.len() as u64;
    let gone = decision.remove.iter().chain(&decision.repack);
    prune.report.freed_bytes = gone.filter_map(|id| prune.lengths.get(id)).sum();
    if options.dry_run {
        prune.sweep_metadata()?;
        return Ok(prune.report);
    }
    // What nobody needs goes first, so that a full store can be pruned. An index that still names
    // such a pack does no harm: backups look at a pack before they refer to it.
    let unfinished_bytes = context.store.remove_unfinished()?;
    prune.report.freed_bytes += unfinished_bytes;
    prune.remove_packs(&decision.remove)?;
    let (moved, new_packs) = prune.repack(decision.repack)?;
    let stay = |id: &&ObjectId| !moved.contains(id);
    let left: Vec<ObjectId> = prune.marks.packs.keys().filter(stay).copied().collect();
    prune.rebuild_index(left.iter().chain(&new_packs))?;
    prune.sweep_metadata()?;
    prune.remove_packs(&moved)?;
    Ok(prune.report)
}

/// All objects of a kind, with their lengths. What has no id for a name is not ours.
fn list(context: &RepoContext, kind: ObjectKind) -> Result<HashMap<ObjectId, u64>> {
    let mut found = HashMap::new();
    context.store.list(kind.prefix(), &mut |entry| {
        let id = entry.name.rsplit('/').next().and_then(|name| name.parse::<ObjectId>().ok());
        if let Some(id) = id.filter(|id| kind.object_name(*id) == entry.name) {
            found.insert(id, entry.length_bytes);
        }
        Ok(())
    })?;
    Ok(found)
}

impl Prune<'_> {
    fn decide(&self, options: &PruneOptions) -> Result<Decision> {
        let mut decision = Decision::default();
        for id in self.lengths.keys() {
            let Some(live) = self.marks.packs.get(id) else {
                let stays = self.marks.damaged.contains(id);
                if stays { &mut decision.keep } else { &mut decision.remove }.push(*id);
                continue;
            };
            let total = self.pack(*id)?.chunk_count() as u64;
            let depth = self.marks.depth.get(id).copied().unwrap_or(0);
            let sparse = live.count() * 100 < total * u64::from(options.repack_below_percent);
            if sparse && depth < MAX_DEPTH {
                decision.repack.push(*id);
            } else {
                decision.keep.push(*id);
            }
        }
        Ok(decision)
    }

    fn pack(&self, id: ObjectId) -> Result<Arc<Pack>> {
        match self.packs.place(id)? {
            Place::Pack(pack) => Ok(pack),
            Place::Moved(_) => {
                Err(RepoError::damaged(ObjectKind::Pack.object_name(id), "went away meanwhile"))
            }
        }
    }

    fn remove_packs(&self, packs: &[ObjectId]) -> Result<()> {
        packs.iter().try_for_each(|id| {
            self.cancel.check()?;
            self.context.store.remove(&ObjectKind::Pack.object_name(*id))
        })
    }

    /// Rewrites packs without their dead chunks, and writes their forwards. Answers with the packs
    /// that were moved and the new ones. A damaged pack is left as it is: it must not keep the
    /// others from being rewritten.
    fn repack(&mut self, sparse: Vec<ObjectId>) -> Result<(Vec<ObjectId>, Vec<ObjectId>)> {
        let total = sparse.iter().filter_map(|id| self.lengths.get(id)).sum();
        self.progress.add_total(total);
        let mut mover = Mover::new(self.context)?;
        let mut moved = Vec::new();
        for id in sparse {
            self.cancel.check()?;
            let pack = self.pack(id)?;
            let live = self.marks.packs.get(&id).cloned().unwrap_or_default();
            match mover.move_chunks(&pack, &live) {
                Ok(moves) => moved.push((id, moves)),
                Err(error) if error.is_damage() => {
                    tracing::warn!(%error, "a damaged pack is left as it is");
                    self.report.packs_repacked -= 1;
                    self.report.packs_kept += 1;
                    self.report.packs_damaged += 1;
                    self.report.freed_bytes -= pack.length_bytes();
                }
                Err(error) => return Err(error),
            }
            self.progress.add_done(pack.length_bytes());
        }
        // Forwards may only name packs that are durable.
        let (packs, bytes) = mover.finish()?;
        self.report.rewritten_bytes = bytes;
        for (id, moves) in &moved {
            // A crash after the forward and before the removal leaves both: the pack, being there,
            // was moved again. The old forward is right too, but its target is garbage by now.
            self.context.store.remove(&ObjectKind::Forward.object_name(*id))?;
            write_forward(self.context, *id, moves)?;
            self.marks.forwards.insert(*id);
        }
        Ok((moved.into_iter().map(|(id, _)| id).collect(), packs))
    }

    /// One new index of the packs that stay. It supersedes all there were, even unreadable ones.
    fn rebuild_index<'a>(&mut self, packs: impl Iterator<Item = &'a ObjectId>) -> Result<()> {
        let old: Vec<ObjectId> =
            list(self.context, ObjectKind::IndexSegment)?.into_keys().collect();
        let mut builder = ChunkIndex::rebuild(self.context, INDEX_BATCH);
        for id in packs {
            self.cancel.check()?;
            let pack = self.pack(*id)?;
            for (ordinal, chunk) in pack.chunks() {
                builder.push(chunk.id.prefix(), Location { pack: *id, ordinal })?;
            }
        }
        builder.finish(&old)?;
        self.report.index_removed = old.len() as u64;
        for id in old {
            self.context.store.remove(&ObjectKind::IndexSegment.object_name(id))?;
        }
        Ok(())
    }

    /// Removes map segments and forwards that nothing needs.
    fn sweep_metadata(&mut self) -> Result<()> {
        let dead = |kind, live: &HashSet<ObjectId>| -> Result<Vec<(ObjectId, u64)>> {
            let all = list(self.context, kind)?;
            Ok(all.into_iter().filter(|(id, _)| !live.contains(id)).collect())
        };
        let maps = dead(ObjectKind::MapSegment, &self.marks.maps)?;
        let forwards = dead(ObjectKind::Forward, &self.marks.forwards)?;
        self.report.maps_removed = maps.len() as u64;
        let names = maps
            .iter()
            .map(|(id, length)| (ObjectKind::MapSegment, id, length))
            .chain(forwards.iter().map(|(id, length)| (ObjectKind::Forward, id, length)));
        for (kind, id, length) in names {
            self.report.freed_bytes += length;
            if !self.report.dry_run {
                self.context.store.remove(&kind.object_name(*id))?;
            }
        }
        Ok(())
    }
}

/// Notes a move, joined with the one before where it continues it: a pack's moves are few runs.
fn push_move(moves: &mut Vec<Move>, next: Move) {
    let (ordinal, count, target) = next;
    match moves.last_mut() {
        Some((first, length, begun))
            if *first + *length == ordinal
                && begun.pack == target.pack
                && begun.ordinal + *length == target.ordinal =>
        {
            *length += count;
        }
        _ => moves.push(next),
    }
}

/// Moves chunks into new packs.
struct Mover<'a> {
    context: &'a RepoContext,
    decoder: FrameDecoder,
    encoder: FrameEncoder,
    writer: Option<PackWriter>,
    finished: Vec<ObjectId>,
    rewritten_bytes: u64,
}

impl<'a> Mover<'a> {
    fn new(context: &'a RepoContext) -> Result<Self> {
        Ok(Self {
            context,
            decoder: FrameDecoder::new()?,
            encoder: FrameEncoder::new(3)?,
            writer: None,
            finished: Vec::new(),
            rewritten_bytes: 0,
        })
    }

    /// Copies the live chunks of a pack, frame by frame, and says where each went.
    fn move_chunks(&mut self, pack: &Pack, live: &ChunkBits) -> Result<Vec<Move>> {
        let mut moves = Vec::new();
        let (mut stored, mut content) = (Vec::new(), Vec::new());
        for frame in 0..pack.frames().len() {
            let numbers = pack.chunks_of(frame);
            if !numbers.clone().any(|number| live.contains(number)) {
                continue;
            }
            let sealed = pack.read_stored(frame..frame + 1, &mut stored)?;
            content.resize(pack.content_length(frame), 0);
            pack.decode_and_compare(frame, sealed, &mut content, &mut self.decoder)?;
            let first_block = pack.blocks_of(frame).start;
            let mut kept = Vec::new();
            let mut kept_content = Vec::new();
            let mut target = self.next_location()?;
            for number in numbers.filter(|number| live.contains(*number)) {
                let (ordinal, chunk) = pack.chunk(number);
                let start = (ordinal - first_block) as usize * BLOCK_BYTES;
                let end = start + usize::from(chunk.blocks) * BLOCK_BYTES;
                kept_content.extend_from_slice(&content[start..end]);
                kept.push(chunk);
                push_move(&mut moves, (ordinal, u32::from(chunk.blocks), target));
                target.ordinal += u32::from(chunk.blocks);
            }
            self.append(&kept, &kept_content, &mut stored)?;
        }
        Ok(moves)
    }

    /// Where the next frame's first block will be.
    fn next_location(&mut self) -> Result<Location> {
        let writer = match &mut self.writer {
            Some(writer) => writer,
            None => self.writer.insert(PackWriter::create(self.context)?),
        };
        Ok(Location { pack: writer.id(), ordinal: writer.next_ordinal() })
    }

    fn append(
        &mut self,
        chunks: &[ChunkEntry],
        content: &[u8],
        stored: &mut Vec<u8>,
    ) -> Result<()> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        let compression = self.encoder.encode(content, stored)?;
        writer.append(chunks, compression, stored)?;
        if writer.is_full(PACK_SIZE_BYTES) {
            self.finish_pack()?;
        }
        Ok(())
    }

    fn finish_pack(&mut self) -> Result<()> {
        if let Some(writer) = self.writer.take() {
            let pack = writer.finish()?;
            self.finished.push(pack.id);
            self.rewritten_bytes += pack.stored_bytes;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<(Vec<ObjectId>, u64)> {
        self.finish_pack()?;
        Ok((self.finished, self.rewritten_bytes))
    }
}
