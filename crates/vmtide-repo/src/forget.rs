//! Giving restore points up.

use crate::envelope::ObjectKind;
use crate::hold::{self, Hold};
use crate::repository::Repository;
use crate::{ObjectId, RepoError, Result};

/// What became of restore points that were to be forgotten.
#[derive(Debug, Default)]
pub struct ForgetReport {
    /// Those that are gone.
    pub forgotten: Vec<ObjectId>,
    /// Those that are not, because of this hold.
    pub held: Vec<(ObjectId, Hold)>,
    /// Those that are not, because the store keeps them, and what it says.
    pub locked: Vec<(ObjectId, String)>,
    /// What ended the work after some were forgotten; the points that are in none of the lists are still
    /// there.
    pub failed: Option<RepoError>,
}

impl Repository {
    /// Forgets restore points, but for those that are held. Their data stays until
    /// [`prune`](Self::prune).
    ///
    /// A hold that is put while this runs keeps its point in any case: it carries the whole record.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] where a hold cannot be read, because it may be on any point: nothing is
    /// forgotten then. [`RepoError::Denied`] where this credential may not remove; those of the store. After
    /// some were forgotten the error is in the report.
    pub fn forget(&self, points: &[ObjectId]) -> Result<ForgetReport> {
        let holds = self.holds()?;
        if let Some((_, error)) = holds.unreadable.into_iter().next() {
            return Err(error);
        }
        let now = jiff::Timestamp::now();
        let in_force = |hold: &&Hold| !hold.is_over_at(now);
        let mut report = ForgetReport::default();
        for id in points {
            let mut of_point = holds.holds.iter().filter(in_force);
            if let Some(hold) = of_point.find(|hold| hold.point == *id) {
                report.held.push((*id, hold.clone()));
                continue;
            }
            match self.context.store.remove(&ObjectKind::Point.object_name(*id)) {
                Ok(()) => report.forgotten.push(*id),
                Err(error @ RepoError::Locked { .. }) => {
                    report.locked.push((*id, error.to_string()));
                }
                Err(error) if report.forgotten.is_empty() => {
                    return Err(append_only(error, *id, 0));
                }
                Err(error) => {
                    report.failed = Some(append_only(error, *id, report.forgotten.len()));
                    return Ok(report);
                }
            }
        }
        hold::tidy(&self.context);
        Ok(report)
    }
}

/// Says what a refusal means: many a credential is meant to add and never to remove.
fn append_only(error: RepoError, id: ObjectId, forgotten: usize) -> RepoError {
    match error {
        RepoError::Denied { source, .. } => RepoError::Denied {
            context: format!(
                "forget restore point {id}: this user or credential may not remove objects \
                 ({forgotten} were forgotten before); use one that may"
            ),
            source,
        },
        other => other,
    }
}
