//! Which restore points there are, and which of them count.

use crate::context::RepoContext;
use crate::envelope::ObjectKind;
use crate::hold;
use crate::lease::Revocations;
use crate::point::{self, RestorePoint};
use crate::repository::PointList;
use crate::{ObjectId, RepoError, Result};
use parking_lot::Mutex;
use std::collections::HashMap;

/// Restore points that are remembered at most, of some kilobytes each.
const MAX_KEPT: usize = 4096;

/// Restore points read before. They never change, so that what is listed again need not be read
/// again. Shared by threads.
#[derive(Debug, Default)]
pub(crate) struct PointCache(Mutex<HashMap<ObjectId, RestorePoint>>);

impl PointCache {
    fn get(&self, id: ObjectId) -> Option<RestorePoint> {
        self.0.lock().get(&id).cloned()
    }

    fn keep(&self, point: &RestorePoint) {
        let mut kept = self.0.lock();
        if kept.len() < MAX_KEPT {
            kept.insert(point.id, point.clone());
        }
    }
}

/// Whether restore points are read though they were read before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reading {
    /// All are read: damage since then shows.
    Fresh,
    /// What is remembered is enough.
    Remembered,
}

/// All restore points.
///
/// # Errors
/// Those of the store. A restore point that cannot be read is not an error here: it is listed.
pub(crate) fn load(context: &RepoContext, reading: Reading) -> Result<PointList> {
    let mut list = PointList::default();
    read_all(context, reading, &mut list)?;
    // After the points and holds: whoever sees a point and no judgement here knows that every later judgement
    // names it.
    let mut revocations = Revocations::read(context)?;
    for point in std::mem::take(&mut list.points) {
        let lease = point.lease;
        match lease.map_or(Ok(false), |lease| revocations.is_void(context, lease, point.id)) {
            Ok(true) => list.void.push(point.id),
            Ok(false) => list.points.push(point),
            // What it says is not known: the point is shown, and nothing is removed.
            Err(error) if error.is_damage() => {
                let RepoError::Damaged { object, .. } = &error else { continue };
                list.unreadable.push((object.clone(), error));
                list.points.push(point);
            }
            Err(error) => return Err(error),
        }
    }
    list.points.sort_by_key(|point| (point.time, point.id));
    Ok(list)
}

/// The restore points that were made under a lease, whether they count or not. Those that cannot be
/// read are among them: they may be.
///
/// # Errors
/// Those of the store.
pub(crate) fn made_under(context: &RepoContext, lease: ObjectId) -> Result<Vec<ObjectId>> {
    let mut list = PointList::default();
    read_all(context, Reading::Remembered, &mut list)?;
    let of_lease = list.points.iter().filter(|point| point.lease == Some(lease));
    let unreadable = list.unreadable.iter().filter_map(|(name, _)| id_of(name));
    Ok(of_lease.map(|point| point.id).chain(unreadable).collect())
}

fn read_all(context: &RepoContext, reading: Reading, list: &mut PointList) -> Result<()> {
    let mut names = Vec::new();
    context.store.list(ObjectKind::Point.prefix(), &mut |entry| {
        names.push(entry.name);
        Ok(())
    })?;
    for name in names {
        let Some(id) = id_of(&name) else { continue };
        let known = context.points.get(id).filter(|_| reading == Reading::Remembered);
        if let Some(point) = known {
            list.points.push(point);
            continue;
        }
        match point::read(context, id) {
            Ok(point) => {
                context.points.keep(&point);
                list.points.push(point);
            }
            // Forgotten between the listing and the reading.
            Err(RepoError::Damaged { .. } | RepoError::NotFound { .. })
                if is_gone(context, &name) => {}
            Err(error) => list.unreadable.push((name, error)),
        }
    }
    // After the points: whoever does not see a point any more sees the hold that keeps it.
    hold::add_to(context, list)
}

fn id_of(name: &str) -> Option<ObjectId> {
    name.rsplit('/').next()?.parse().ok()
}

/// Whether an object is really not there; a store that cannot say so is no proof of it.
fn is_gone(context: &RepoContext, name: &str) -> bool {
    matches!(context.store.open(name), Err(RepoError::NotFound { .. }))
}
