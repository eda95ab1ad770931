//! Deltas as jobs: [`create`] one from images, changed ranges or restore points, look at one ([`info`]),
//! [`merge`] several, [`apply`] one to an image.
//!
//! A delta file gets its name when it is complete. An image that a delta is applied to is touched only
//! when all of the delta was checked; while it is written, a note beside it says that it is incomplete,
//! and afterwards at which moment it is, so that the next delta in the chain fits or is refused.

mod apply;
mod create;
mod merge;
mod note;

pub use apply::{AppliedDelta, ApplyJob, apply};
pub use create::{CreateDeltaJob, DeltaOrigin, DeltaOutput, MadeDelta, create};
pub use merge::{MergeJob, info, merge};
pub(crate) use note::{check_complete, forget};
pub use vmtide_delta::{CreateOptions, DeltaSummary};

use crate::EngineError;
use vmtide_block::BlockError;
use vmtide_delta::DeltaError;

impl From<DeltaError> for EngineError {
    fn from(error: DeltaError) -> Self {
        let text = error.to_string();
        match error {
            DeltaError::Damaged { delta, detail } => {
                BlockError::Damaged { context: delta, detail }.into()
            }
            DeltaError::Unsupported { delta, detail } => {
                BlockError::Unsupported { context: delta, detail }.into()
            }
            DeltaError::WrongBase { delta, target, detail } => {
                Self::refused(format!("apply {delta} to {target}"), detail)
            }
            DeltaError::BrokenChain { .. } => Self::refused("merge deltas", text),
            DeltaError::Io { context, source } => Self::Io { context, source },
            DeltaError::Block(error) => error.into(),
        }
    }
}
