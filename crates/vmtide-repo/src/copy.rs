//! What a copy of a restore point from another repository has, and a new backup has not.

use crate::Result;
use crate::point::{Origin, RestorePoint};
use crate::repository::Repository;
use jiff::Timestamp;

/// What a restore point is a copy of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyOf {
    /// Where the point was backed up first.
    pub origin: Origin,
    /// Its moment there, which is that of the copy, too.
    pub time: Timestamp,
}

impl Repository {
    /// Where a restore point of this repository was backed up first: what tells whether two points
    /// in different repositories are the same, however they came there.
    pub fn origin_of(&self, point: &RestorePoint) -> Origin {
        let here = Origin { repository: self.config().id, point: point.id };
        point.origin.unwrap_or(here)
    }

    /// Whether the disk maps of a restore point can be read, so that another point can be built on
    /// it.
    ///
    /// # Errors
    /// Those of the store.
    pub fn is_sound_base(&self, point: &RestorePoint) -> Result<bool> {
        for disk in &point.disks {
            match self.open_disk(point, &disk.id) {
                Ok(_) => {}
                Err(error) if error.is_damage() => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}
