//! Holds: restore points that must stay, whatever `forget` is told (format §9.1).
//!
//! A hold carries the whole record of its restore point and keeps the point's data by itself: where
//! the point's own object is gone, the hold stands in for it. That makes holds safe without any lock.
//! Whoever holds puts the hold first and then looks for the point again. It is there: whoever
//! removes it, and whoever then no longer sees it and would remove its data, looks for holds after
//! that, and sees this one. It is gone: the data may be gone, too, and the hold is taken back.

use crate::context::RepoContext;
use crate::envelope::ObjectKind;
use crate::lease::Purpose;
use crate::point::RestorePoint;
use crate::repository::{PointList, Repository};
use crate::{ObjectId, PROGRAM, RepoError, Result, record};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// The longest reason, in bytes: a sentence for people.
const MAX_REASON_BYTES: usize = 1000;

/// What a hold is to say.
#[derive(Clone, Debug, Default)]
pub struct HoldOptions {
    /// Why, for people; one line, may be empty.
    pub reason: String,
    /// When the hold ends by itself, by the clock of whoever looks; none means never.
    pub until: Option<Timestamp>,
    /// The host that asks for it.
    pub host: String,
}

/// A hold on a restore point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Hold {
    /// Its id, by which it is released.
    pub id: ObjectId,
    /// The restore point it is on.
    pub point: ObjectId,
    /// The point's VM.
    pub vm: String,
    /// The point's moment.
    pub time: Timestamp,
    /// Why; may be empty.
    pub reason: String,
    /// When it ends by itself.
    pub until: Option<Timestamp>,
    /// When it was put.
    pub created: Timestamp,
    /// The host that asked for it.
    pub host: String,
}

impl Hold {
    /// Whether it has ended by itself at that moment.
    pub fn is_over_at(&self, moment: Timestamp) -> bool {
        self.until.is_some_and(|until| until <= moment)
    }
}

impl std::fmt::Display for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "hold {}", &self.id.to_string()[..8])?;
        if let Some(until) = self.until {
            write!(f, " until {until:.0}")?;
        }
        if self.reason.is_empty() { Ok(()) } else { write!(f, ": {}", self.reason) }
    }
}

/// The holds of a repository.
#[derive(Debug, Default)]
pub struct HoldList {
    /// Those that are not released, oldest first; some may be over.
    pub holds: Vec<Hold>,
    /// The objects that cannot be read, and why.
    pub unreadable: Vec<(String, RepoError)>,
}

/// A hold as it is stored.
#[derive(Serialize, Deserialize)]
struct Stored {
    id: ObjectId,
    created: Timestamp,
    until: Option<Timestamp>,
    reason: String,
    host: String,
    program: String,
    /// The whole restore point.
    record: RestorePoint,
}

impl Stored {
    fn hold(&self) -> Hold {
        Hold {
            id: self.id,
            point: self.record.id,
            vm: self.record.vm.clone(),
            time: self.record.time,
            reason: self.reason.clone(),
            until: self.until,
            created: self.created,
            host: self.host.clone(),
        }
    }
}

/// A release as it is stored: nothing but what is the same for all that release the same hold, because
/// they seal it with the same key and nonce.
#[derive(Serialize, Deserialize)]
struct StoredRelease {
    id: ObjectId,
}

/// All holds, and what is known of each.
#[derive(Default)]
struct AllHolds {
    /// Neither released nor over.
    in_force: Vec<Stored>,
    /// Not released, but over.
    over: Vec<Stored>,
    /// Released and still there.
    released: Vec<ObjectId>,
    unreadable: Vec<(String, RepoError)>,
}

fn read_all(context: &RepoContext) -> Result<AllHolds> {
    let ids = ids_of(context, ObjectKind::Hold)?;
    let mut all = AllHolds::default();
    if ids.is_empty() {
        return Ok(all);
    }
    let released = ids_of(context, ObjectKind::Release)?;
    let now = Timestamp::now();
    for id in ids {
        let name = ObjectKind::Hold.object_name(id);
        // The name alone would do, but anybody can write a name; this took the key.
        if released.contains(&id) && is_released(context, id)? {
            all.released.push(id);
            continue;
        }
        match record::read::<Stored>(context, ObjectKind::Hold, id) {
            Ok(stored) if stored.id != id => {
                let error = RepoError::damaged(&name, "it carries the id of another hold");
                all.unreadable.push((name, error));
            }
            Ok(stored) if stored.hold().is_over_at(now) => all.over.push(stored),
            Ok(stored) => all.in_force.push(stored),
            // Released between the listing and the reading.
            Err(RepoError::Damaged { .. }) if is_gone(context, &name) => {}
            Err(error) => all.unreadable.push((name, error)),
        }
    }
    all.in_force.sort_by_key(|stored| (stored.created, stored.id));
    Ok(all)
}

/// Whether the release of a hold is one. What cannot be read releases nothing: anybody can put it there.
fn is_released(context: &RepoContext, id: ObjectId) -> Result<bool> {
    match record::read::<StoredRelease>(context, ObjectKind::Release, id) {
        Ok(release) => Ok(release.id == id),
        Err(error @ (RepoError::Damaged { .. } | RepoError::Unsupported { .. })) => {
            tracing::warn!(%error, "hold {id} is not released by what cannot be read");
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn ids_of(context: &RepoContext, kind: ObjectKind) -> Result<BTreeSet<ObjectId>> {
    let mut ids = BTreeSet::new();
    context.store.list(kind.prefix(), &mut |entry| {
        ids.extend(
            entry.name.strip_prefix(kind.prefix()).and_then(|id| id.parse::<ObjectId>().ok()),
        );
        Ok(())
    })?;
    Ok(ids)
}

fn is_gone(context: &RepoContext, name: &str) -> bool {
    matches!(context.store.open(name), Err(RepoError::NotFound { .. }))
}

/// Adds to a list of restore points the holds, and the points that only a hold keeps or can tell. The points
/// must have been listed before (see the head of this file).
pub(crate) fn add_to(context: &RepoContext, list: &mut PointList) -> Result<()> {
    let all = read_all(context)?;
    for stored in all.in_force {
        list.holds.push(stored.hold());
        let id = stored.record.id;
        // Also where its own object cannot be read: the hold has all that was in it.
        if list.points.iter().all(|point| point.id != id) {
            list.points.push(stored.record);
        }
    }
    list.unreadable_holds = all.unreadable;
    Ok(())
}

/// The record of a restore point that a hold has, in force or over.
pub(crate) fn record_of(context: &RepoContext, point: ObjectId) -> Result<Option<RestorePoint>> {
    let AllHolds { in_force, over, .. } = read_all(context)?;
    let mut records = in_force.into_iter().chain(over).map(|stored| stored.record);
    Ok(records.find(|record| record.id == point))
}

/// How long a hold has been over before it is removed: longer than a clock that is set by hand is wrong.
const KEPT_AFTER_END: SignedDuration = SignedDuration::from_hours(30 * 24);

/// Whether a hold that ended `until` may be removed. Not the clock of this host alone says so: something was
/// `written` that much later by the clock of the store.
fn may_go(until: Timestamp, now: Timestamp, written: Timestamp) -> bool {
    now.min(written).duration_since(until) >= KEPT_AFTER_END
}

/// When the newest restore point was written, by the clock of the store.
fn newest_written(context: &RepoContext) -> Result<Timestamp> {
    let mut newest = Timestamp::UNIX_EPOCH;
    context.store.list(ObjectKind::Point.prefix(), &mut |entry| {
        newest = newest.max(entry.modified);
        Ok(())
    })?;
    Ok(newest)
}

/// Removes holds that are released or long over, and what released them. Nothing depends on it: an error
/// is only logged.
pub(crate) fn tidy(context: &RepoContext) {
    let tidied = || -> Result<()> {
        let all = read_all(context)?;
        let remove = |kind: ObjectKind, id| match context.store.remove(&kind.object_name(id)) {
            // Its time will come.
            Err(RepoError::Locked { .. }) => Ok(()),
            outcome => outcome,
        };
        if !all.over.is_empty() {
            let (now, written) = (Timestamp::now(), newest_written(context)?);
            let is_long_over =
                |stored: &&Stored| stored.until.is_some_and(|until| may_go(until, now, written));
            let over = all.over.iter().filter(is_long_over);
            over.map(|stored| stored.id).try_for_each(|id| remove(ObjectKind::Hold, id))?;
        }
        all.released.into_iter().try_for_each(|id| remove(ObjectKind::Hold, id))?;
        let holds = ids_of(context, ObjectKind::Hold)?;
        let releases = ids_of(context, ObjectKind::Release)?;
        releases.difference(&holds).try_for_each(|id| remove(ObjectKind::Release, *id))
    };
    if let Err(error) = tidied() {
        tracing::info!(%error, "holds that are over were not removed; the next run tries again");
    }
}

impl Repository {
    /// Holds a restore point: `forget` passes over it, and its data stays, until the hold is
    /// [released](Self::release_hold) or over.
    ///
    /// # Errors
    /// [`RepoError::NotFound`] where there is no such point, or it is forgotten at this moment;
    /// [`RepoError::Invalid`] for a reason of several lines or an end in the past; those of the store.
    pub fn hold(&self, point: ObjectId, options: &HoldOptions) -> Result<Hold> {
        check_options(options)?;
        let _lease = self.lease(Purpose::Backup)?;
        let gone = |hint: &str| RepoError::NotFound {
            what: format!("restore point {point} in {}", self.location()),
            hint: hint.into(),
        };
        let find = || -> Result<Option<RestorePoint>> {
            Ok(self.points()?.points.into_iter().find(|found| found.id == point))
        };
        let now = Timestamp::now();
        let stored = Stored {
            id: ObjectId::random()?,
            created: Timestamp::from_second(now.as_second()).unwrap_or(now),
            until: options.until,
            reason: options.reason.clone(),
            host: options.host.clone(),
            program: PROGRAM.into(),
            record: find()?.ok_or_else(|| gone(""))?,
        };
        record::write(&self.context, ObjectKind::Hold, stored.id, &stored)?;
        if self.is_point_without(point, stored.id)? {
            return Ok(stored.hold());
        }
        self.release_hold(stored.id)?;
        Err(gone("it was forgotten at this very moment; it is not held"))
    }

    /// Whether the point would be there without this hold.
    fn is_point_without(&self, point: ObjectId, hold: ObjectId) -> Result<bool> {
        let name = ObjectKind::Point.object_name(point);
        match self.context.store.open(&name) {
            Ok(_) => return Ok(true),
            Err(RepoError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        let all = read_all(&self.context)?;
        Ok(all.in_force.iter().any(|stored| stored.id != hold && stored.record.id == point))
    }

    /// The holds that are not released.
    ///
    /// # Errors
    /// Those of the store. A hold that cannot be read is not an error here: it is listed.
    pub fn holds(&self) -> Result<HoldList> {
        let all = read_all(&self.context)?;
        let mut holds: Vec<Hold> = all.in_force.iter().chain(&all.over).map(Stored::hold).collect();
        holds.sort_by_key(|hold| (hold.created, hold.id));
        Ok(HoldList { holds, unreadable: all.unreadable })
    }

    /// Ends a hold, readable or not: removes it, or where that is denied says in another object that it is
    /// over. Answers whether it was removed.
    ///
    /// # Errors
    /// [`RepoError::NotFound`] where there is no such hold; those of the store.
    pub fn release_hold(&self, id: ObjectId) -> Result<bool> {
        let context = &self.context;
        let name = ObjectKind::Hold.object_name(id);
        if is_gone(context, &name) {
            return Err(RepoError::NotFound {
                what: format!("hold {id} in {}", self.location()),
                hint: "`vmtide hold --list` shows those there are".into(),
            });
        }
        let denied = match context.store.remove(&name) {
            Ok(()) => {
                // What an earlier release without the right to remove left.
                let _ = context.store.remove(&ObjectKind::Release.object_name(id));
                return Ok(true);
            }
            Err(error @ (RepoError::Denied { .. } | RepoError::Locked { .. })) => error,
            Err(error) => return Err(error),
        };
        match record::write(context, ObjectKind::Release, id, &StoredRelease { id }) {
            Ok(()) => Ok(false),
            // Somebody released it before; or put junk there, which releases nothing.
            Err(RepoError::AlreadyExists { .. }) if is_released(context, id)? => Ok(false),
            Err(RepoError::AlreadyExists { .. }) => Err(denied),
            Err(RepoError::Denied { .. }) => Err(denied),
            Err(error) => Err(error),
        }
    }
}

fn check_options(options: &HoldOptions) -> Result<()> {
    if options.reason.len() > MAX_REASON_BYTES || options.reason.chars().any(char::is_control) {
        return Err(RepoError::Invalid(format!(
            "the reason of a hold is one line of at most {MAX_REASON_BYTES} bytes"
        )));
    }
    match options.until {
        Some(until) if until <= Timestamp::now() => {
            Err(RepoError::Invalid(format!("a hold until {until:.0} would be over already")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hold_is_removed_when_the_store_too_is_long_past_its_end() {
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let until = at("2026-06-30T00:00:00Z");
        for (now, written, goes) in [
            ("2026-07-29T00:00:00Z", "2026-07-29T00:00:00Z", false),
            ("2026-07-30T00:00:00Z", "2026-07-30T00:00:00Z", true),
            ("2036-01-01T00:00:00Z", "2026-06-30T12:00:00Z", false),
            ("2026-07-01T00:00:00Z", "2036-01-01T00:00:00Z", false),
        ] {
            assert_eq!(may_go(until, at(now), at(written)), goes, "{now} {written}");
        }
    }
}
