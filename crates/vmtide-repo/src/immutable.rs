//! Restore points that nobody can remove before a time.
//!
//! Everything that a restore needs is kept by the store until one time: the packs, the map segments,
//! the notes of where chunks went, the key slots, the configuration, the point itself. New objects
//! are written that way. Those that a point takes over from earlier ones are extended before it is
//! written. So that this is not a request per pack and backup, times are rounded up to the ends of
//! periods: all backups of a period ask for the same time, and what the base of a backup needs was
//! extended with the base.
//!
//! The index is not kept: it is made anew from the packs, and index segments that could not be
//! removed would pile up.

use crate::context::RepoContext;
use crate::disk::{PackSet, Passed};
use crate::envelope::ObjectKind;
use crate::map::{DiskMap, Target};
use crate::point::{self, DiskRecord, RestorePoint};
use crate::store::{Retention, RetentionMode};
use crate::{BLOCK_BYTES, Location, ObjectId, RepoError, Result};
use jiff::{SignedDuration, Timestamp};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The longest period. Within one, nothing has to be extended; the longer it is, the longer above
/// what was asked for everything is kept.
const LONGEST_PERIOD: SignedDuration = SignedDuration::from_hours(10 * 24);

/// The shortest time that a point can be made immutable for. Clocks may be minutes apart.
const SHORTEST: SignedDuration = SignedDuration::from_hours(1);

/// The longest: what is locked by mistake for longer is paid for longer than anybody remembers.
const LONGEST: SignedDuration = SignedDuration::from_hours(100 * 366 * 24);

/// Requests at once when packs are extended.
const AT_ONCE: usize = 16;

/// For how long new restore points are immutable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Immutability {
    mode: RetentionMode,
    duration: SignedDuration,
}

impl Immutability {
    /// From the commit on for `duration` at least.
    ///
    /// # Errors
    /// [`RepoError::Invalid`] for less than an hour or more than 100 years.
    pub fn new(mode: RetentionMode, duration: SignedDuration) -> Result<Self> {
        if !(SHORTEST..=LONGEST).contains(&duration) {
            return Err(RepoError::Invalid(format!(
                "restore points are made immutable for an hour to 100 years, not for {duration:#}"
            )));
        }
        Ok(Self { mode, duration })
    }

    /// What a backup that begins at `now` asks the store for.
    pub(crate) fn from(self, now: Timestamp) -> Retention {
        let duration = self.duration.as_secs();
        let period = (duration / 4).clamp(SHORTEST.as_secs(), LONGEST_PERIOD.as_secs());
        let end = now.as_second().saturating_add(duration);
        // The end of the period that it falls in.
        let rounded = end.div_euclid(period).saturating_add(1).saturating_mul(period);
        let until = Timestamp::from_second(rounded).unwrap_or(Timestamp::MAX);
        Retention { mode: self.mode, until }
    }
}

/// Whether what is kept as `now` says need not be extended to be kept as `wanted` says.
fn suffices(now: Option<Retention>, wanted: Retention) -> bool {
    now.is_some_and(|now| {
        now.until >= wanted.until
            && (now.mode == wanted.mode || now.mode == RetentionMode::Compliance)
    })
}

/// What is known of the job that wrote a point.
pub(crate) struct Job<'a> {
    /// The repository.
    pub context: &'a Arc<RepoContext>,
    /// Its packs.
    pub packs: &'a PackSet,
    /// The packs that the job wrote.
    pub written: &'a HashSet<ObjectId>,
    /// Those of others that it refers to beside what its bases refer to.
    pub reused: &'a HashSet<ObjectId>,
}

/// Extends all that a new point needs and this job did not write. Before the point is written.
///
/// # Errors
/// Those of the store: nothing is promised then.
pub(crate) fn protect(
    job: &Job<'_>,
    point: &RestorePoint,
    base_maps: &[Vec<ObjectId>],
    retention: Retention,
) -> Result<()> {
    let context = job.context;
    let mut names: BTreeSet<String> =
        job.reused.iter().map(|id| ObjectKind::Pack.object_name(*id)).collect();
    if !base_is_kept(context, point, base_maps, retention)? {
        for disk in &point.disks {
            add_disk(job, disk, &mut names)?;
        }
        for prefix in ["keys/", "damaged/", "healed/"] {
            context.store.list(prefix, &mut |entry| {
                names.insert(entry.name);
                Ok(())
            })?;
        }
        names.insert(crate::config::OBJECT_NAME.into());
    }
    for id in job.written.iter() {
        names.remove(&ObjectKind::Pack.object_name(*id));
    }
    extend(context, names.into_iter().collect(), retention)
}

/// Whether all that comes from earlier points was extended with the base.
fn base_is_kept(
    context: &RepoContext,
    point: &RestorePoint,
    base_maps: &[Vec<ObjectId>],
    retention: Retention,
) -> Result<bool> {
    let Some(parent) = point.parent else { return Ok(false) };
    let parent = match point::read(context, parent) {
        Ok(parent) => parent,
        // Forgotten meanwhile, or damaged: then everything is extended.
        Err(RepoError::NotFound { .. } | RepoError::Damaged { .. }) => return Ok(false),
        Err(error) => return Err(error),
    };
    let of_parent = |map: &Vec<ObjectId>| parent.disks.iter().any(|disk| disk.map == *map);
    Ok(suffices(parent.immutable, retention)
        && base_maps.iter().all(|map| map.is_empty() || of_parent(map)))
}

/// Adds what a disk needs: its map, its packs, and where these went.
fn add_disk(job: &Job<'_>, disk: &DiskRecord, names: &mut BTreeSet<String>) -> Result<()> {
    names.extend(disk.map.iter().map(|id| ObjectKind::MapSegment.object_name(*id)));
    let blocks = disk.size_bytes.div_ceil(BLOCK_BYTES as u64);
    let map = DiskMap::open(job.context, &disk.map, blocks)?;
    let mut there: HashMap<ObjectId, bool> = HashMap::new();
    let mut forwards = HashSet::new();
    map.for_each_run(0..blocks, &mut |run| {
        let Target::Data { pack, ordinal } = run.target else { return Ok(()) };
        let name = ObjectKind::Pack.object_name(pack);
        let is_there = match there.get(&pack) {
            Some(known) => *known,
            None => {
                let found = match job.context.store.open(&name) {
                    Ok(_) => true,
                    Err(RepoError::NotFound { .. }) => false,
                    Err(error) => return Err(error),
                };
                there.insert(pack, found);
                found
            }
        };
        if is_there {
            names.insert(name);
            return Ok(());
        }
        let count = u32::try_from(run.count).unwrap_or(u32::MAX);
        let mut done = 0;
        while done < count {
            let place = Location { pack, ordinal: ordinal.saturating_add(done) };
            let traced = job.packs.trace(place, count - done, true, &mut |passed| {
                if let Passed::Forward(id) = passed {
                    forwards.insert(id);
                }
            })?;
            done += traced.count.max(1);
            names.insert(ObjectKind::Pack.object_name(traced.place?.0.id()));
        }
        Ok(())
    })?;
    if !forwards.is_empty() {
        add_forwards(job.context, &forwards, names)?;
    }
    Ok(())
}

/// Adds the notes of where the chunks of these packs went.
fn add_forwards(
    context: &RepoContext,
    packs: &HashSet<ObjectId>,
    names: &mut BTreeSet<String>,
) -> Result<()> {
    context.store.list(ObjectKind::Forward.prefix(), &mut |entry| {
        let of_one = |part: &str| part.parse().is_ok_and(|id: ObjectId| packs.contains(&id));
        if entry.name.split('/').any(of_one) {
            names.insert(entry.name);
        }
        Ok(())
    })
}

/// Extends objects, several at once.
fn extend(context: &RepoContext, names: Vec<String>, retention: Retention) -> Result<()> {
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
            context.store.retain(name, &retention)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads = AT_ONCE.min(names.len());
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        handles.into_iter().try_for_each(|handle| {
            handle.join().unwrap_or_else(|_| {
                Err(RepoError::Invalid("extending what a point needs ended abnormally".into()))
            })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_a_period_and_never_too_short() {
        let month = SignedDuration::from_hours(30 * 24);
        let kept = Immutability::new(RetentionMode::Compliance, month).unwrap();
        let begin: Timestamp = "2026-11-21T00:00:00Z".parse().unwrap();
        let mut ends = BTreeSet::new();
        for hour in 0..24 * 60 {
            let now = begin + SignedDuration::from_hours(hour);
            let until = kept.from(now).until;
            let length = until.duration_since(now);
            assert!(length >= month, "{now}: {length:?}");
            assert!(length <= month + SignedDuration::from_hours(8 * 24), "{now}: {length:?}");
            ends.insert(until);
        }
        assert!(ends.len() <= 9, "{ends:?}");
        for wrong in [SignedDuration::from_mins(59), SignedDuration::MAX, SignedDuration::ZERO] {
            assert!(Immutability::new(RetentionMode::Governance, wrong).is_err());
        }
    }

    #[test]
    fn compliance_stands_for_governance_and_not_the_other_way_round() {
        let retention =
            |mode, second| Retention { mode, until: Timestamp::from_second(second).unwrap() };
        let (weak, firm) = (RetentionMode::Governance, RetentionMode::Compliance);
        assert!(suffices(Some(retention(firm, 10)), retention(weak, 10)));
        assert!(!suffices(Some(retention(weak, 10)), retention(firm, 10)));
        assert!(!suffices(Some(retention(firm, 9)), retention(firm, 10)));
        assert!(!suffices(None, retention(weak, 0)));
    }
}
