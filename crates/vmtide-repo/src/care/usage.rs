//! What a repository is used for: per VM, how much data its restore points speak of, how much of it
//! is stored for them, and how much for nobody else.
//!
//! Two bits per chunk and VM, so some 4 MiB per TiB of data that a VM needs. Every pack is opened once to
//! know what its chunks take; no data is read.

use crate::context::RepoContext;
use crate::disk::{FETCH_BYTES, PackSet, Place, for_each_place};
use crate::map::DiskMap;
use crate::pack::Pack;
use crate::point::RestorePoint;
use crate::repository::{Repository, RepositoryStats};
use crate::{BLOCK_BYTES, ObjectId, Result};
use jiff::Timestamp;
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use vmtide_block::CancelToken;

const BLOCK: u64 = BLOCK_BYTES as u64;

/// What a repository is used for.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct UsageReport {
    /// What is there.
    #[serde(flatten)]
    pub stats: RepositoryStats,
    /// The data of all restore points as if each were stored whole, in bytes; zeros are no data.
    pub logical_bytes: u64,
    /// The chunks that restore points need, each once, before compression.
    pub needed_bytes: u64,
    /// What these take in packs.
    pub stored_bytes: u64,
    /// What is in packs and no restore point needs; `prune` gives most of it back.
    pub unneeded_bytes: u64,
    /// The packs that immutable restore points need, in bytes: what nobody can remove before
    /// [`locked_until`](Self::locked_until). By what the points say, not by the store.
    pub locked_bytes: u64,
    /// Until when the last of them is immutable; none where none is now.
    pub locked_until: Option<Timestamp>,
    /// The VMs, by name.
    pub vms: Vec<VmUsage>,
    /// What backups added, by day (UTC), oldest first.
    pub growth: Vec<Growth>,
}

/// What one VM uses.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct VmUsage {
    /// The VM.
    pub vm: String,
    /// Its restore points.
    pub points: u64,
    /// The time of the oldest.
    pub oldest: Option<Timestamp>,
    /// The time of the newest.
    pub newest: Option<Timestamp>,
    /// The size of the disks of its newest restore point, in bytes.
    pub size_bytes: u64,
    /// The data of all its restore points as if each were stored whole.
    pub logical_bytes: u64,
    /// The chunks they need, each once, before compression.
    pub needed_bytes: u64,
    /// What these take in packs; chunks that other VMs need, too, count in full.
    pub stored_bytes: u64,
    /// What only this VM needs, in packs: so much would become free without it.
    pub unique_bytes: u64,
    /// What a restore of its newest point reads from packs, in bytes.
    pub restore_bytes: u64,
    /// In how many requests, about.
    pub restore_requests: u64,
    /// Data that cannot be found; see `verify`.
    pub lost_bytes: u64,
}

/// What the backups of one day added.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Growth {
    /// The day, `2026-11-20`.
    pub day: String,
    /// Backups.
    pub points: u64,
    /// What changed on the disks, in bytes.
    pub changed_bytes: u64,
    /// What was new in the repository, before compression.
    pub new_bytes: u64,
    /// What that took, compressed and sealed.
    pub stored_bytes: u64,
}

/// Chunks of packs, a bit each.
type Chunks = HashMap<ObjectId, Vec<u64>>;

/// One VM while it is counted.
#[derive(Default)]
struct Counted {
    usage: VmUsage,
    chunks: Chunks,
    /// Those of its newest point.
    newest: Chunks,
}

/// What immutable points need.
#[derive(Default)]
struct Locked {
    packs: HashMap<ObjectId, u64>,
    until: Option<Timestamp>,
}

/// The requests that opening a pack takes: its length, its directory.
const OPEN_REQUESTS: u64 = 2;

impl Repository {
    /// Finds out what the repository is used for. Restore points that cannot be read are left out.
    ///
    /// # Errors
    /// Those of the store other than damage; cancelled.
    pub fn usage(&self, cancel: &CancelToken) -> Result<UsageReport> {
        let _lease = self.lease(crate::lease::Purpose::Read)?;
        let points = self.points()?.points;
        let context = self.context();
        let packs = PackSet::new(Arc::clone(context));
        let mut vms: BTreeMap<String, Counted> = BTreeMap::new();
        let (mut locked, now) = (Locked::default(), Timestamp::now());
        for point in &points {
            let counted = vms.entry(point.vm.clone()).or_default();
            count_point(context, &packs, point, counted, cancel)?;
            if let Some(kept) = point.immutable.filter(|kept| kept.until > now) {
                locked.until = locked.until.max(Some(kept.until));
                let lock = &mut |pack: &Pack, _: u32, _: u32| {
                    locked.packs.insert(pack.id(), pack.length_bytes());
                    Ok(())
                };
                for_each_stored(context, &packs, point, cancel, lock)?;
            }
        }
        // The points come in the order of their times.
        let newest: BTreeMap<&str, _> = points.iter().map(|p| (p.vm.as_str(), p)).collect();
        for (vm, point) in newest {
            let Some(counted) = vms.get_mut(vm) else { continue };
            let chunks = &mut counted.newest;
            let note =
                &mut |pack: &Pack, ordinal: u32, count: u32| mark(chunks, pack, ordinal, count);
            for_each_stored(context, &packs, point, cancel, note)?;
        }
        let stats = self.stats()?;
        let mut report = UsageReport {
            growth: growth(&points),
            logical_bytes: vms.values().map(|vm| vm.usage.logical_bytes).sum(),
            locked_bytes: locked.packs.values().sum(),
            locked_until: locked.until,
            ..UsageReport::default()
        };
        let mut counted: Vec<Counted> = vms.into_values().collect();
        weigh(&packs, &mut counted, &mut report, cancel)?;
        report.unneeded_bytes = stats.pack_bytes.saturating_sub(report.stored_bytes);
        report.stats = stats;
        report.vms = counted.into_iter().map(|vm| vm.usage).collect();
        Ok(report)
    }
}

/// Marks the chunks of a point, and counts its data.
fn count_point(
    context: &Arc<RepoContext>,
    packs: &PackSet,
    point: &RestorePoint,
    counted: &mut Counted,
    cancel: &CancelToken,
) -> Result<()> {
    let usage = &mut counted.usage;
    usage.vm.clone_from(&point.vm);
    usage.points += 1;
    usage.oldest.get_or_insert(point.time);
    usage.newest = Some(point.time);
    usage.size_bytes = point.disks.iter().map(|disk| disk.size_bytes).sum();
    for disk in &point.disks {
        cancel.check()?;
        let blocks = disk.size_bytes.div_ceil(BLOCK);
        let map = match DiskMap::open(context, &disk.map, blocks) {
            Err(error) if error.is_damage() => continue,
            other => other?,
        };
        let walked = for_each_place(&map, packs, 0..blocks, &mut |run| {
            let bytes = u64::from(run.count) * BLOCK;
            usage.logical_bytes += bytes;
            match &run.place {
                Ok((pack, ordinal)) => mark(&mut counted.chunks, pack, *ordinal, run.count),
                Err(_) => {
                    usage.lost_bytes += bytes;
                    Ok(())
                }
            }
        });
        match walked {
            Err(error) if error.is_damage() => {}
            other => other?,
        }
    }
    Ok(())
}

/// Visits all chunks of a point that are there: the pack, the ordinal of the first and how many
/// blocks. What is damaged is passed over.
fn for_each_stored(
    context: &Arc<RepoContext>,
    packs: &PackSet,
    point: &RestorePoint,
    cancel: &CancelToken,
    visit: &mut dyn FnMut(&Pack, u32, u32) -> Result<()>,
) -> Result<()> {
    for disk in &point.disks {
        cancel.check()?;
        let blocks = disk.size_bytes.div_ceil(BLOCK);
        let walked = DiskMap::open(context, &disk.map, blocks).and_then(|map| {
            for_each_place(&map, packs, 0..blocks, &mut |run| match &run.place {
                Ok((pack, ordinal)) => visit(pack, *ordinal, run.count),
                Err(_) => Ok(()),
            })
        });
        match walked {
            Err(error) if error.is_damage() => {}
            other => other?,
        }
    }
    Ok(())
}

fn mark(chunks: &mut Chunks, pack: &Pack, ordinal: u32, count: u32) -> Result<()> {
    let (first, last) = (pack.chunk_of(ordinal)?, pack.chunk_of(ordinal + (count - 1))?);
    let bits = chunks.entry(pack.id()).or_insert_with(|| vec![0; pack.chunk_count().div_ceil(64)]);
    for number in first..=last {
        if let Some(word) = bits.get_mut(number / 64) {
            *word |= 1 << (number % 64);
        }
    }
    Ok(())
}

/// Adds up what the marked chunks take: for each VM, for each alone, and for all together.
fn weigh(
    packs: &PackSet,
    vms: &mut [Counted],
    report: &mut UsageReport,
    cancel: &CancelToken,
) -> Result<()> {
    // Which VMs need something of a pack.
    let mut users: HashMap<ObjectId, Vec<usize>> = HashMap::new();
    for (number, vm) in vms.iter().enumerate() {
        for pack in vm.chunks.keys() {
            users.entry(*pack).or_default().push(number);
        }
    }
    for (id, users) in users {
        cancel.check()?;
        let Place::Pack(pack) = packs.place(id)? else { continue };
        for vm in &users {
            let Counted { usage, newest, .. } = &mut vms[*vm];
            if let Some(bits) = newest.get(&id) {
                let bytes = frames_bytes(&pack, bits);
                usage.restore_bytes += bytes;
                usage.restore_requests += OPEN_REQUESTS + bytes.div_ceil(FETCH_BYTES);
            }
        }
        for frame in 0..pack.frames().len() {
            let blocks = pack.blocks_of(frame);
            let blocks = u64::from(blocks.end - blocks.start).max(1);
            let stored = u64::from(pack.frames()[frame].stored_length);
            for number in pack.chunks_of(frame) {
                let (_, chunk) = pack.chunk(number);
                // A frame is stored as one; a chunk has its share of it.
                let share = stored * u64::from(chunk.blocks) / blocks;
                let needs = |vm: &&usize| {
                    vms[**vm].chunks.get(&id).is_some_and(|bits| is_set(bits, number))
                };
                let needed_by: Vec<usize> = users.iter().filter(needs).copied().collect();
                let bytes = u64::from(chunk.blocks) * BLOCK;
                for vm in &needed_by {
                    let usage = &mut vms[*vm].usage;
                    usage.needed_bytes += bytes;
                    usage.stored_bytes += share;
                    usage.unique_bytes += if needed_by.len() == 1 { share } else { 0 };
                }
                if !needed_by.is_empty() {
                    report.needed_bytes += bytes;
                    report.stored_bytes += share;
                }
            }
        }
    }
    Ok(())
}

fn is_set(bits: &[u64], number: usize) -> bool {
    bits.get(number / 64).is_some_and(|word| word >> (number % 64) & 1 == 1)
}

/// The length of the frames that the marked chunks are in: a frame is read as a whole.
fn frames_bytes(pack: &Pack, bits: &[u64]) -> u64 {
    let frames = pack.frames().iter().enumerate();
    let read = frames.filter(|(frame, _)| pack.chunks_of(*frame).any(|chunk| is_set(bits, chunk)));
    read.map(|(_, entry)| u64::from(entry.stored_length)).sum()
}

fn growth(points: &[RestorePoint]) -> Vec<Growth> {
    let mut days: BTreeMap<String, Growth> = BTreeMap::new();
    for point in points {
        let day = point.time.strftime("%Y-%m-%d").to_string();
        let entry = days.entry(day.clone()).or_default();
        entry.day = day;
        entry.points += 1;
        for disk in &point.disks {
            entry.changed_bytes += disk.counts.changed_bytes;
            entry.new_bytes += disk.counts.new_bytes;
            entry.stored_bytes += disk.counts.stored_bytes;
        }
    }
    days.into_values().collect()
}
