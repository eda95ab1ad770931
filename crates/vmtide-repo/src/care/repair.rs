//! Repairing a repository: whatever can be made right without losing anything.
//!
//! The index is made anew from the packs where it is damaged or incomplete; damage on record that is
//! sound after all is taken off the record; damaged content is taken from where the repository has
//! it a second time, or from another repository. What is left is told, with what it touches. Nothing
//! that anybody could still read is removed, so a repair may run beside anything else.

use super::quarantine;
use super::verify::{self, Damage, VerifyOptions};
use crate::backup::{BackupOptions, BackupSession, HealthyDisk};
use crate::context::RepoContext;
use crate::disk::{Quarantine, Repairs};
use crate::envelope::ObjectKind;
use crate::index::ChunkIndex;
use crate::lease::Purpose;
use crate::pack::{Pack, is_media_error};
use crate::point::{DiskRecord, RestorePoint};
use crate::repository::Repository;
use crate::{Location, ObjectId, RepoError, Result};
use serde::Serialize;
use std::collections::HashSet;
use std::sync::Arc;
use vmtide_block::{CancelToken, Progress};

/// Index entries that are sorted in memory at once: 1 Mi, some 48 MiB.
const INDEX_BATCH: usize = 1 << 20;

/// Restore points of the other repository that are tried for one disk, the nearest in time first.
/// Each costs reading what is damaged once.
const MAX_TRIED: usize = 8;

/// How to repair.
#[derive(Clone, Copy, Default)]
pub struct RepairOptions<'a> {
    /// Only say what would be done.
    pub dry_run: bool,
    /// Remove restore points and records whose own object is damaged. Nobody can read them any more;
    /// while they are there `prune` does not run, because what they need is not known.
    pub remove_unreadable: bool,
    /// Another repository that has the same disks.
    pub from: Option<&'a Repository>,
}

impl std::fmt::Debug for RepairOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RepairOptions")
            .field("dry_run", &self.dry_run)
            .field("remove_unreadable", &self.remove_unreadable)
            .field("from", &self.from.map(Repository::location))
            .finish()
    }
}

/// What a repair did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RepairReport {
    /// Whether nothing was really done.
    pub dry_run: bool,
    /// Why the index was made anew; none where it is sound.
    pub index_rebuilt: Option<String>,
    /// The packs whose chunks are in the new index.
    pub packs_indexed: u64,
    /// Packs that could not be read for it.
    pub packs_unreadable: u64,
    /// Parts of packs that were on record as damaged and are sound after all.
    pub recovered: u64,
    /// Damaged bytes that are whole again.
    pub healed_bytes: u64,
    /// Objects removed because nobody can read them.
    pub removed: Vec<String>,
    /// Objects that nobody can read and that were left; see
    /// [`remove_unreadable`](RepairOptions::remove_unreadable).
    pub unreadable: Vec<String>,
    /// What is still damaged.
    pub damage: Vec<Damage>,
}

impl Repository {
    /// Repairs what can be repaired without losing anything.
    ///
    /// # Errors
    /// Those of the store; cancelled. What was done before
    /// stays done.
    pub fn repair(
        &self,
        options: &RepairOptions<'_>,
        progress: &Progress,
        cancel: &CancelToken,
    ) -> Result<RepairReport> {
        let _lease = self.lease(Purpose::Read)?;
        let context = self.context();
        let mut report = RepairReport { dry_run: options.dry_run, ..RepairReport::default() };
        if options.dry_run {
            report.recovered = count_sound(context, cancel)?;
        } else {
            report.recovered = quarantine::lift_sound(context, cancel)?;
        }
        if let Some(reason) = index_fault(context, cancel)? {
            if !options.dry_run {
                rebuild_index(context, &mut report, progress, cancel)?;
            }
            report.index_rebuilt = Some(reason);
        }
        self.remove_unreadable(options, &mut report)?;
        // What cannot be read is put on record first, so that it is looked for.
        let damage = self.structure(progress, cancel)?;
        if !Quarantine::load(context)?.is_empty() {
            report.healed_bytes = self.heal(options, cancel)?;
        }
        report.damage = if report.healed_bytes > 0 && !options.dry_run {
            self.structure(progress, cancel)?
        } else {
            damage
        };
        Ok(report)
    }

    /// All damage that shows without reading data.
    fn structure(&self, progress: &Progress, cancel: &CancelToken) -> Result<Vec<Damage>> {
        let mut list = self.points()?;
        list.unreadable.append(&mut list.unreadable_holds);
        let options = VerifyOptions::default();
        let context = self.context();
        let report =
            verify::verify(context, &list.points, &list.unreadable, &options, progress, cancel)?;
        Ok(report.damage)
    }

    /// Removes, or counts, objects that are records of something and that nobody can read.
    fn remove_unreadable(
        &self,
        options: &RepairOptions<'_>,
        report: &mut RepairReport,
    ) -> Result<()> {
        let list = self.points()?;
        let repairs = Repairs::load(self.context())?;
        // Not judgements: without one, what it left out would count.
        let is_point = |name: &str| name.starts_with(ObjectKind::Point.prefix());
        let points = list.unreadable.into_iter();
        let points = points.filter(|(name, error)| error.is_damage() && is_point(name));
        let records = repairs.damaged.unreadable.into_iter().chain(repairs.healed.unreadable);
        let records = records.filter_map(|error| match error {
            RepoError::Damaged { object, .. } => Some(object),
            _ => None,
        });
        for object in points.map(|(name, _)| name).chain(records) {
            if !options.remove_unreadable {
                report.unreadable.push(object);
                continue;
            }
            if !options.dry_run {
                self.context().store.remove(&object)?;
            }
            report.removed.push(object);
        }
        Ok(())
    }

    /// Stores once more what is damaged, from duplicates and from another repository. Answers with
    /// the bytes that are whole again.
    fn heal(&self, options: &RepairOptions<'_>, cancel: &CancelToken) -> Result<u64> {
        let session = self.begin_backup(&BackupOptions::default())?;
        session.heal_from_duplicates(cancel)?;
        if let Some(from) = options.from {
            let _lease = from.lease(Purpose::Read)?;
            let there = from.points()?.points;
            for point in self.points()?.points {
                for disk in &point.disks {
                    cancel.check()?;
                    let other = OtherRepository {
                        repository: from,
                        points: &there,
                        dry_run: options.dry_run,
                    };
                    self.heal_disk(&session, &point, disk, &other, cancel)?;
                }
            }
        }
        if options.dry_run {
            return Ok(session.healed_bytes());
        }
        session.finish_healing("repair")
    }

    fn heal_disk(
        &self,
        session: &BackupSession,
        point: &RestorePoint,
        disk: &DiskRecord,
        other: &OtherRepository<'_>,
        cancel: &CancelToken,
    ) -> Result<()> {
        let lost = match self.damaged_ranges(disk) {
            Ok(lost) => lost,
            // Its map is damaged: there is nothing to go by.
            Err(error) if error.is_damage() => return Ok(()),
            Err(error) => return Err(error),
        };
        if lost.is_empty() {
            return Ok(());
        }
        for candidate in candidates(self, point, disk, other) {
            let opened = match other.repository.open_disk(candidate.point, &disk.id) {
                Ok(opened) => opened,
                Err(error) if error.is_damage() => continue,
                Err(error) => return Err(error),
            };
            let before = session.healed_bytes();
            let source = HealthyDisk {
                source: opened.as_ref(),
                tolerant: true,
                is_same: candidate.is_same,
                dry_run: other.dry_run,
            };
            session.heal_from_disk(&source, disk, cancel)?;
            let healed = session.healed_bytes() - before;
            tracing::debug!(point = %point.id, from = %candidate.point.id, healed, "healing");
            if healed >= lost.total_bytes() {
                break;
            }
        }
        Ok(())
    }
}

/// Another repository to heal from.
struct OtherRepository<'a> {
    repository: &'a Repository,
    points: &'a [RestorePoint],
    dry_run: bool,
}

/// A restore point to take data from.
struct Candidate<'a> {
    point: &'a RestorePoint,
    /// Whether it is the same one: one is a copy of the other, or both are of a third.
    is_same: bool,
}

/// The restore points that may have the same disk: the same point first, then those of the VM that
/// were made nearest to it. Whether it is the same data is found out by its names.
fn candidates<'a>(
    own: &Repository,
    point: &RestorePoint,
    disk: &DiskRecord,
    other: &OtherRepository<'a>,
) -> Vec<Candidate<'a>> {
    let wanted = own.origin_of(point);
    let mut candidates: Vec<Candidate<'a>> = other
        .points
        .iter()
        .filter(|there| there.disk_record(&disk.id).is_some())
        .map(|there| Candidate {
            point: there,
            is_same: other.repository.origin_of(there) == wanted,
        })
        .filter(|there| there.is_same || there.point.vm == point.vm)
        .collect();
    candidates.sort_by_key(|there| {
        let apart = there.point.time.as_millisecond() - point.time.as_millisecond();
        (!there.is_same, apart.unsigned_abs())
    });
    candidates.truncate(MAX_TRIED);
    candidates
}

/// How much of what is on record is sound after all.
fn count_sound(context: &RepoContext, cancel: &CancelToken) -> Result<u64> {
    let mut sound = 0;
    for entry in Quarantine::load(context)?.iter() {
        cancel.check()?;
        let confirmed = quarantine::confirm(context, entry.part.pack, entry.part.frame)?;
        sound += u64::from(confirmed.is_none());
    }
    Ok(sound)
}

/// Why the index has to be made anew; none where it is sound and knows all packs.
fn index_fault(context: &Arc<RepoContext>, cancel: &CancelToken) -> Result<Option<String>> {
    let index = ChunkIndex::open(context)?;
    if let Some((_, error)) = index.skipped().first() {
        return Ok(Some(error.to_string()));
    }
    let superseded: HashSet<&ObjectId> = index.superseded().iter().collect();
    for id in ChunkIndex::list(context)? {
        cancel.check()?;
        if superseded.contains(&id) {
            continue;
        }
        match ChunkIndex::check_segment(context, id, true) {
            Ok(()) => {}
            Err(error) if is_media_error(&error) => return Ok(Some(error.to_string())),
            Err(error) => return Err(error),
        }
    }
    let known = index.packs();
    let mut missing = 0u64;
    context.store.list(ObjectKind::Pack.prefix(), &mut |entry| {
        let found = ObjectKind::of_name(&entry.name);
        missing += u64::from(found.is_some_and(|(_, id)| !known.contains(&id)));
        Ok(())
    })?;
    Ok((missing > 0).then(|| format!("{missing} packs are not in the index")))
}

/// Makes the index anew from all packs that can be read. It supersedes all there is, which `prune`
/// removes; a segment that a backup writes meanwhile is not superseded.
fn rebuild_index(
    context: &Arc<RepoContext>,
    report: &mut RepairReport,
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<()> {
    let old = ChunkIndex::list(context)?;
    let damaged = Quarantine::load(context)?;
    let mut packs = Vec::new();
    context.store.list(ObjectKind::Pack.prefix(), &mut |entry| {
        packs.extend(ObjectKind::of_name(&entry.name).map(|(_, id)| id));
        Ok(())
    })?;
    progress.add_total(packs.len() as u64);
    let mut builder = ChunkIndex::rebuild(context, INDEX_BATCH);
    for id in packs {
        cancel.check()?;
        let opened = context
            .open_object(ObjectKind::Pack, id)
            .and_then(|object| Pack::from_object(context, object));
        match opened {
            Ok(pack) => {
                report.packs_indexed += 1;
                for (ordinal, chunk) in pack.chunks() {
                    let place = Location { pack: id, ordinal };
                    if !damaged.covers(place) {
                        builder.push(chunk.id.prefix(), place)?;
                    }
                }
            }
            Err(error) if is_media_error(&error) => report.packs_unreadable += 1,
            Err(error) => return Err(error),
        }
        progress.add_done(1);
    }
    builder.finish(&old)?;
    Ok(())
}
