//! Finding damage before it is needed.
//!
//! Without reading data: every restore point, map and index segment and forward opens and verifies, and every
//! pack that a map names is there with a sound directory and has the chunks. With reading data: every
//! frame (or a random part of them) is read, opened, decompressed and its chunks compared with
//! their ids. Damage is collected, not stopped at, and each piece of it says which restore points it
//! touches.

use crate::context::RepoContext;
use crate::disk::PackSet;
use crate::envelope::ObjectKind;
use crate::index::ChunkIndex;
use crate::map::{DiskMap, Target};
use crate::pack::{FrameDecoder, Pack};
use crate::point::{DiskRecord, RestorePoint};
use crate::{BLOCK_BYTES, Location, ObjectId, RepoError, Result};
use parking_lot::Mutex;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use vmtide_block::{CancelToken, Progress};

/// The stored bytes read at once.
const BATCH_BYTES: u64 = 4 << 20;

/// What to verify.
#[derive(Clone, Debug, Default)]
pub struct VerifyOptions {
    /// These restore points; all when empty.
    pub points: Vec<ObjectId>,
    /// How many of a hundred frames to read; 100 reads all, 0 none.
    pub read_data_percent: u8,
}

/// One damaged object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// The object's name in the repository.
    pub object: String,
    /// What is wrong with it.
    pub detail: String,
    /// The restore points that need it.
    pub points: Vec<ObjectId>,
}

/// What verify found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Restore points looked at.
    pub points_checked: u64,
    /// Packs looked at.
    pub packs_checked: u64,
    /// Stored bytes read and verified.
    pub read_bytes: u64,
    /// What is damaged; empty when all is well.
    pub damage: Vec<Damage>,
}

/// Damage by object, with the points that need it.
type Found = BTreeMap<(String, String), BTreeSet<ObjectId>>;

/// The packs that are needed, with the points that need them. Only their ids: thousands of open packs
/// would take as many file descriptors.
type Needed = HashMap<ObjectId, BTreeSet<ObjectId>>;

/// Verifies `points`; `unreadable` are those that could not even be read.
pub(crate) fn verify(
    context: &Arc<RepoContext>,
    points: &[RestorePoint],
    unreadable: &[(String, RepoError)],
    options: &VerifyOptions,
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<VerifyReport> {
    let mut found = Found::new();
    for (object, error) in unreadable {
        found.entry((object.clone(), error.to_string())).or_default();
    }
    let mut needed = Needed::new();
    let packs = PackSet::new(Arc::clone(context));
    for point in points {
        for disk in &point.disks {
            cancel.check()?;
            check_disk(context, &packs, point.id, disk, &mut needed, &mut found)?;
        }
    }
    if options.points.is_empty() {
        check_index(context, options.read_data_percent > 0, cancel, &mut found)?;
    }
    let mut report = VerifyReport {
        points_checked: (points.len() + unreadable.len()) as u64,
        packs_checked: needed.len() as u64,
        ..VerifyReport::default()
    };
    if options.read_data_percent > 0 {
        report.read_bytes =
            read_packs(context, &needed, options.read_data_percent, progress, cancel, &mut found)?;
    }
    report.damage = found
        .into_iter()
        .map(|((object, detail), points)| Damage {
            object,
            detail,
            points: points.into_iter().collect(),
        })
        .collect();
    Ok(report)
}

/// Opens all index segments, and reads them where data is read. No restore point needs them; `prune`
/// makes the index anew.
fn check_index(
    context: &Arc<RepoContext>,
    read: bool,
    cancel: &CancelToken,
    found: &mut Found,
) -> Result<()> {
    for id in ChunkIndex::list(context)? {
        cancel.check()?;
        match ChunkIndex::check_segment(context, id, read) {
            Err(RepoError::Damaged { object, detail }) => {
                let detail = format!("{detail} (no restore point needs it; prune makes it anew)");
                note(found, [], RepoError::Damaged { object, detail })?;
            }
            Err(error) => note(found, [], error)?,
            Ok(()) => {}
        }
    }
    Ok(())
}

/// Walks one disk's map and the directories of the packs it names.
fn check_disk(
    context: &Arc<RepoContext>,
    packs: &PackSet,
    point: ObjectId,
    disk: &DiskRecord,
    needed: &mut Needed,
    found: &mut Found,
) -> Result<()> {
    let blocks = disk.size_bytes.div_ceil(BLOCK_BYTES as u64);
    let outcome = DiskMap::open(context, &disk.map, blocks).and_then(|map| {
        map.for_each_run(0..blocks, &mut |run| {
            let Target::Data { pack, ordinal } = run.target else { return Ok(()) };
            let mut done = 0u64;
            while done < run.count {
                let offset = u32::try_from(done).unwrap_or(u32::MAX);
                let place = Location { pack, ordinal: ordinal.saturating_add(offset) };
                let left = u32::try_from(run.count - done).unwrap_or(u32::MAX);
                match check_run(packs, place, left, point, needed) {
                    Ok(count) => done += u64::from(count),
                    Err(error) => {
                        // One broken pack must not hide the next one.
                        return note(found, [point], error);
                    }
                }
            }
            Ok(())
        })
    });
    match outcome {
        // A record that no map can be, such as a disk of more blocks than there are.
        Err(RepoError::Invalid(detail)) => {
            note(found, [point], RepoError::damaged(ObjectKind::Point.object_name(point), detail))
        }
        Err(error) => note(found, [point], error),
        Ok(()) => Ok(()),
    }
}

fn check_run(
    packs: &PackSet,
    place: Location,
    count: u32,
    point: ObjectId,
    needed: &mut Needed,
) -> Result<u32> {
    let (pack, ordinal, count) = packs.resolve(place, count)?;
    pack.frame_of(ordinal.saturating_add(count - 1))?;
    needed.entry(pack.id()).or_default().insert(point);
    Ok(count)
}

/// Notes damage that touches `points`; anything else (no rights, cancelled) ends the verification.
fn note(
    found: &mut Found,
    points: impl IntoIterator<Item = ObjectId>,
    error: RepoError,
) -> Result<()> {
    let key = match error {
        RepoError::Damaged { object, detail } => (object, detail),
        RepoError::Unsupported { object, what } => (object, format!("unsupported {what}")),
        // Too many open files, or no memory: the machine is at fault, not the object.
        RepoError::Io { ref source, .. } if matches!(source.raw_os_error(), Some(12 | 23 | 24)) => {
            return Err(error);
        }
        RepoError::Io { context, source } => (context, format!("cannot be read: {source}")),
        other => return Err(other),
    };
    found.entry(key).or_default().extend(points);
    Ok(())
}

/// Reads and verifies frames of all packs, on all cores. Answers with the bytes read.
fn read_packs(
    context: &Arc<RepoContext>,
    needed: &Needed,
    percent: u8,
    progress: &Progress,
    cancel: &CancelToken,
    found: &mut Found,
) -> Result<u64> {
    let work: Vec<_> = needed.iter().collect();
    // All lengths are known once the packs were listed; reading them here would open each twice.
    context.store.list(ObjectKind::Pack.prefix(), &mut |entry| {
        let id = entry.name.rsplit('/').next().and_then(|name| name.parse::<ObjectId>().ok());
        if id.is_some_and(|id| needed.contains_key(&id)) {
            progress.add_total(entry.length_bytes);
        }
        Ok(())
    })?;
    let next = AtomicUsize::new(0);
    let read_bytes = AtomicU64::new(0);
    let shared = Mutex::new(found);
    let worker = || -> Result<()> {
        let mut decoder = FrameDecoder::new()?;
        while let Some((id, points)) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
            let opened = context
                .open_object(ObjectKind::Pack, **id)
                .and_then(|opened| Pack::from_object(context, opened));
            let wrong = match opened {
                Ok(pack) => read_pack(&pack, percent, &mut decoder, &read_bytes, progress, cancel)?,
                Err(error) => vec![error],
            };
            for error in wrong {
                note(&mut shared.lock(), points.iter().copied(), error)?;
            }
        }
        Ok(())
    };
    let workers = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..workers).map(|_| scope.spawn(worker)).collect();
        handles.into_iter().try_for_each(|handle| {
            handle.join().unwrap_or_else(|_| {
                Err(RepoError::Invalid("a verify worker ended abnormally".into()))
            })
        })
    })?;
    Ok(read_bytes.into_inner())
}

/// Reads frames of one pack; answers with what is wrong in it.
fn read_pack(
    pack: &Pack,
    percent: u8,
    decoder: &mut FrameDecoder,
    read_bytes: &AtomicU64,
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<Vec<RepoError>> {
    let mut wrong = Vec::new();
    let (mut stored, mut content) = (Vec::new(), Vec::new());
    let mut frame = 0;
    while frame < pack.frames().len() {
        cancel.check()?;
        if percent < 100 && random_percent()? >= percent {
            frame += 1;
            continue;
        }
        let mut bytes = 0;
        let mut end = frame;
        while end < pack.frames().len() && (end == frame || (percent >= 100 && bytes < BATCH_BYTES))
        {
            bytes += u64::from(pack.frames()[end].stored_length);
            end += 1;
        }
        match pack.read_stored(frame..end, &mut stored) {
            Ok(mut rest) => {
                for number in frame..end {
                    let length = pack.frames()[number].stored_length as usize;
                    let (this, after) = rest.split_at_mut(length);
                    rest = after;
                    content.resize(pack.content_length(number), 0);
                    wrong
                        .extend(pack.decode_and_compare(number, this, &mut content, decoder).err());
                }
            }
            Err(error) => wrong.push(RepoError::damaged(pack.name(), error.to_string())),
        }
        read_bytes.fetch_add(bytes, Ordering::Relaxed);
        progress.add_done(bytes);
        progress.add_transferred(bytes);
        frame = end;
    }
    Ok(wrong)
}

/// A random number from 0 to 99; the slight unevenness of a remainder does not matter here.
fn random_percent() -> Result<u8> {
    let bits = getrandom::u32()
        .map_err(|error| RepoError::io("get random bytes", std::io::Error::other(error)))?;
    Ok(u8::try_from(bits % 100).unwrap_or(0))
}
