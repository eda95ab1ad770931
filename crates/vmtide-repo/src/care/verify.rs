//! Finding damage before it is needed.
//!
//! Without reading data: every restore point, map and index segment and forward opens and verifies, and every
//! pack that a map names is there with a sound directory and has the chunks. With reading data: every
//! frame, or a random sample of them, is read, opened, decompressed and its chunks compared with
//! their ids. Damage is collected, not stopped at; it is put on record, so that the next backup
//! heals it, and each piece of it says which restore points, disks and bytes it touches.

use super::impact::Impact;
use super::sample::{ReadData, SampleReport, Sampling};
use super::{integrity, quarantine, read_frames};
use crate::context::RepoContext;
use crate::disk::{PackSet, for_each_place};
use crate::envelope::ObjectKind;
use crate::index::ChunkIndex;
use crate::map::DiskMap;
use crate::pack::Pack;
use crate::point::{DiskRecord, RestorePoint};
use crate::{BLOCK_BYTES, Location, ObjectId, RepoError, Result, keys};
use serde::Serialize;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use vmtide_block::{CancelToken, Progress, RangeSet};

/// What to verify.
#[derive(Clone, Debug, Default)]
pub struct VerifyOptions {
    /// These restore points; all when empty.
    pub points: Vec<ObjectId>,
    /// How much of the data to read.
    pub read: ReadData,
    /// What the sample is drawn by; the same seed reads the same frames. None draws one.
    pub seed: Option<u64>,
}

/// One damaged object, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// The object's name in the repository.
    pub object: String,
    /// The number of the frame, where one of a pack is damaged and not the whole.
    pub frame: Option<u32>,
    /// What is wrong with it.
    pub detail: String,
    /// The restore points that need it.
    pub points: Vec<ObjectId>,
    /// Which bytes of their disks it is.
    pub places: Vec<DamagedPlace>,
}

/// What a piece of damage touches on one disk of one restore point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DamagedPlace {
    /// The restore point.
    pub point: ObjectId,
    /// Its VM.
    pub vm: String,
    /// The disk.
    pub disk: String,
    /// The bytes of the disk. Empty where that cannot be told, because the map is what is damaged.
    pub ranges: RangeSet,
}

impl Damage {
    /// An object that no restore point is known to need.
    pub(super) fn of_object(object: String, error: &RepoError) -> Self {
        let detail = match error {
            RepoError::Damaged { detail, .. } => detail.clone(),
            other => other.to_string(),
        };
        Self { object, frame: None, detail, points: Vec::new(), places: Vec::new() }
    }
}

/// What verify found.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct VerifyReport {
    /// Restore points looked at.
    pub points_checked: u64,
    /// Packs looked at.
    pub packs_checked: u64,
    /// Frames in these packs.
    pub frames: u64,
    /// Frames read and verified.
    pub frames_read: u64,
    /// Stored bytes read and verified.
    pub read_bytes: u64,
    /// What the sample says of the frames that were not read; none where all or none were.
    pub sample: Option<SampleReport>,
    /// What is damaged; empty when all is well.
    pub damage: Vec<Damage>,
    /// Parts of packs that were put on record as damaged by this run.
    pub quarantined: u64,
    /// Parts of packs that were on record as damaged and are sound after all.
    pub recovered: u64,
    /// Why damage could not be put on record.
    pub not_recorded: Option<String>,
}

/// What is needed of a pack. Only its id: thousands of open packs would take as many file
/// descriptors.
#[derive(Default)]
pub(super) struct NeededPack {
    /// The points that need it.
    pub points: BTreeSet<ObjectId>,
    /// The number of its frames.
    pub frames: u64,
}

/// The packs that are needed.
pub(super) type Needed = HashMap<ObjectId, NeededPack>;

/// Verifies `points`; `unreadable` are those that could not even be read.
pub(crate) fn verify(
    context: &Arc<RepoContext>,
    points: &[RestorePoint],
    unreadable: &[(String, RepoError)],
    options: &VerifyOptions,
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<VerifyReport> {
    let mut impact = Impact::default();
    for (object, error) in unreadable {
        impact.add(Damage::of_object(object.clone(), error));
    }
    let recovered =
        if options.read.is_some() { quarantine::lift_sound(context, cancel)? } else { 0 };
    let mut needed = Needed::new();
    let packs = PackSet::new(Arc::clone(context));
    for point in points {
        for disk in &point.disks {
            cancel.check()?;
            check_disk(context, &packs, point, disk, &mut needed, &mut impact)?;
        }
    }
    let everything = options.points.is_empty();
    if everything {
        check_index(context, options.read.is_some(), cancel, &mut impact)?;
        check_small_objects(context, &packs, &mut impact)?;
    }
    let mut report = VerifyReport {
        points_checked: (points.len() + unreadable.len()) as u64,
        packs_checked: needed.len() as u64,
        frames: needed.values().map(|pack| pack.frames).sum(),
        recovered,
        ..VerifyReport::default()
    };
    if options.read.is_some() {
        let sampling = Sampling::new(options.read, options.seed, context, &needed)?;
        let read = read_frames::read(context, &needed, &sampling, &packs, progress, cancel)?;
        report.frames_read = read.frames;
        report.read_bytes = read.bytes;
        report.sample = sampling.report(report.frames, read.frames);
        impact.add_frames(context, points, read.damage, cancel)?;
    }
    if everything && options.read == ReadData::All {
        let rest = unneeded_objects(context, &packs, &needed)?;
        let checked = integrity::check_objects(context, &rest, progress, cancel)?;
        report.read_bytes += checked.read_bytes;
        checked.damage.into_iter().for_each(|damage| impact.add(damage));
        let mut markers = Vec::new();
        for prefix in ObjectKind::prefixes() {
            context.store.list(prefix, &mut |entry| {
                let is_marker = ObjectKind::marker_content(&entry.name).is_some();
                markers.extend(is_marker.then_some(entry.name));
                Ok(())
            })?;
        }
        let damage = integrity::check_markers(&*context.store, &markers)?;
        damage.into_iter().for_each(|damage| impact.add(damage));
    }
    match quarantine::quarantine_found(context, "verify") {
        Ok(parts) => report.quarantined = parts.len() as u64,
        Err(error) => report.not_recorded = Some(error.to_string()),
    }
    report.damage = impact.into_damage();
    Ok(report)
}

/// Opens all index segments in use, and reads them where data is read. No restore point needs them;
/// `repair` makes the index anew.
fn check_index(
    context: &Arc<RepoContext>,
    read: bool,
    cancel: &CancelToken,
    impact: &mut Impact,
) -> Result<()> {
    let superseded: BTreeSet<ObjectId> =
        ChunkIndex::open(context)?.superseded().iter().copied().collect();
    for id in ChunkIndex::list(context)? {
        cancel.check()?;
        if superseded.contains(&id) {
            continue;
        }
        if let Err(error) = ChunkIndex::check_segment(context, id, read) {
            let error = match error {
                RepoError::Damaged { object, detail } => RepoError::Damaged {
                    object,
                    detail: format!(
                        "{detail} (no restore point needs it; `vmtide repair` makes it anew)"
                    ),
                },
                other => other,
            };
            impact.note(None, error)?;
        }
    }
    Ok(())
}

/// Key slots, and the records of damage and healing. Few, so they are always read whole.
fn check_small_objects(context: &RepoContext, packs: &PackSet, impact: &mut Impact) -> Result<()> {
    if context.sealed {
        for (id, error) in keys::unreadable(&*context.store)? {
            impact.add(Damage::of_object(format!("keys/{id}"), &error));
        }
    }
    let repairs = packs.repairs()?;
    for error in repairs.damaged.unreadable.iter().chain(&repairs.healed.unreadable) {
        if let RepoError::Damaged { object, .. } | RepoError::Unsupported { object, .. } = error {
            impact.add(Damage::of_object(object.clone(), error));
        }
    }
    Ok(())
}

/// The objects that no restore point that was looked at needs: garbage, or what only damage leads to.
fn unneeded_objects(
    context: &RepoContext,
    packs: &PackSet,
    needed: &Needed,
) -> Result<Vec<(ObjectKind, ObjectId, ObjectId)>> {
    let damaged: BTreeSet<ObjectId> =
        packs.repairs()?.damaged.iter().map(|entry| entry.part.pack).collect();
    let mut objects = Vec::new();
    for prefix in ObjectKind::prefixes() {
        context.store.list(prefix, &mut |entry| {
            let found = ObjectKind::parse_name(&entry.name);
            objects.extend(found.filter(|(kind, _, id)| match kind {
                // What is on record and nobody needs is no news.
                ObjectKind::Pack => !needed.contains_key(id) && !damaged.contains(id),
                // Read and reported before, as far as they can be read.
                ObjectKind::Point | ObjectKind::IndexSegment => false,
                ObjectKind::Damaged | ObjectKind::Healed => false,
                _ => true,
            }));
            Ok(())
        })?;
    }
    Ok(objects)
}

/// Walks one disk's map and the directories of the packs it names.
fn check_disk(
    context: &Arc<RepoContext>,
    packs: &PackSet,
    point: &RestorePoint,
    disk: &DiskRecord,
    needed: &mut Needed,
    impact: &mut Impact,
) -> Result<()> {
    let blocks = disk.size_bytes.div_ceil(BLOCK_BYTES as u64);
    let repairs = packs.repairs()?;
    let outcome = DiskMap::open(context, &disk.map, blocks).and_then(|map| {
        for_each_place(&map, packs, 0..blocks, &mut |run| {
            let bytes = run.bytes(disk.size_bytes);
            match run.place {
                Ok((pack, ordinal)) => {
                    need(needed, &pack, point.id);
                    let place = Location { pack: pack.id(), ordinal };
                    if let Some(entry) = repairs.damaged.entry(place) {
                        impact.add_known(point, disk, bytes, entry);
                    }
                    Ok(())
                }
                // One broken pack must not hide the next one.
                Err(error) => impact.note(Some((point, disk, Some(bytes))), error),
            }
        })
    });
    match outcome {
        // A record that no map can be, such as a disk of more blocks than there are.
        Err(RepoError::Invalid(detail)) => {
            let error = RepoError::damaged(ObjectKind::Point.object_name(point.id), detail);
            impact.note(Some((point, disk, None)), error)
        }
        Err(error) => impact.note(Some((point, disk, None)), error),
        Ok(()) => Ok(()),
    }
}

fn need(needed: &mut Needed, pack: &Pack, point: ObjectId) {
    let entry = needed.entry(pack.id()).or_default();
    entry.frames = pack.frames().len() as u64;
    entry.points.insert(point);
}
