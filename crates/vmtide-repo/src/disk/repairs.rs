//! What is damaged and what was healed, together: what readers and writers go by.

use super::{Healed, Quarantine};
use crate::Result;
use crate::context::RepoContext;

/// Both records, as they were when this was loaded.
#[derive(Debug, Default)]
pub(crate) struct Repairs {
    /// What is on record as damaged.
    pub damaged: Quarantine,
    /// What was stored once more.
    pub healed: Healed,
}

impl Repairs {
    /// Reads both: two listings, and no object in a repository where all is well.
    ///
    /// # Errors
    /// Those of the store.
    pub fn load(context: &RepoContext) -> Result<Self> {
        Ok(Self { damaged: Quarantine::load(context)?, healed: Healed::load(context)? })
    }

    /// Whether there is nothing to know.
    pub fn is_empty(&self) -> bool {
        self.damaged.is_empty() && self.healed.is_empty()
    }
}
