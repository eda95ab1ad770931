//! Deltas: made into files or callbacks, looked at, merged, applied from files or callbacks.

mod apply;
mod create;
mod merge;
mod options;

pub use apply::*;
pub use create::*;
pub use merge::*;
pub use options::DeltaOptions;

use crate::status::{Failure, Result};

/// Exactly one of a file and a callback.
fn check_one(has_path: bool, has_callback: bool, what: &str) -> Result<()> {
    match (has_path, has_callback) {
        (true, false) | (false, true) => Ok(()),
        (false, false) => Err(Failure::invalid(format!("{what} and the callback are NULL"))),
        (true, true) => Err(Failure::invalid(format!("{what} and a callback are both given"))),
    }
}
