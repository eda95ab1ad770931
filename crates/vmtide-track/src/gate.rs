//! What every write passes, and what only a closed gate may change.

use crate::tracking::Tracking;
use crate::view::ViewState;
use crate::{Result, TrackError};
use std::sync::Arc;

/// Shared by writes, closed for moments.
#[derive(Default)]
pub(crate) struct Gate {
    /// None while the disk is not tracked.
    pub tracking: Option<Tracking>,
    /// The frozen views there are.
    pub views: Vec<Arc<ViewState>>,
    /// The planned stop has begun: nothing is written any more.
    pub closed: bool,
}

impl Gate {
    /// Forgets views that nobody has any more.
    pub fn drop_ended_views(&mut self) {
        self.views.retain(|view| !view.is_ended());
    }

    /// # Errors
    /// After the planned stop.
    pub fn check_open(&self, disk: &str) -> Result<()> {
        if self.closed {
            return Err(TrackError::unsupported(disk, "it was closed"));
        }
        Ok(())
    }

    /// The tracking, if it is on.
    ///
    /// # Errors
    /// [`TrackError::Disabled`], [`TrackError::Lost`].
    pub fn tracking(&self, disk: &str) -> Result<&Tracking> {
        let disabled = || TrackError::Disabled { disk: disk.to_owned() };
        let tracking = self.tracking.as_ref().ok_or_else(disabled)?;
        match tracking.given_up() {
            Some(reason) => {
                Err(TrackError::Lost { disk: disk.to_owned(), reason: reason.to_owned() })
            }
            None => Ok(tracking),
        }
    }
}
