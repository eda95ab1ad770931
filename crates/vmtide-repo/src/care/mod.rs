//! Looking after a repository: finding damage, and removing what no restore point needs.

mod mark;
mod prune;
mod verify;

pub use prune::{PruneOptions, PruneReport};
pub use verify::{Damage, VerifyOptions, VerifyReport};

pub(crate) use prune::prune;
pub(crate) use verify::verify;
