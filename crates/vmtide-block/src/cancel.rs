//! Asking long work to stop.

use crate::{BlockError, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A flag that long work looks at between steps. Clones share the flag; setting it is final.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// A token that is not cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// A token that shares `flag`, for a signal handler that can only set an atomic.
    pub fn from_flag(flag: Arc<AtomicBool>) -> Self {
        Self(flag)
    }

    /// Asks all work that holds this token to stop.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether the work should stop.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Succeeds until the token is cancelled.
    ///
    /// # Errors
    /// [`BlockError::Cancelled`].
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() { Err(BlockError::Cancelled) } else { Ok(()) }
    }
}
