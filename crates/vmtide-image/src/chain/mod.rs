//! Chains of differencing images as a whole: what they consist of, giving an image another parent,
//! and merging an image into its parent.
//!
//! [`list_chain`] says what each layer wants of its parent and what was found, and goes on as far
//! as there are parents, so it helps exactly where a chain does not open. [`rebase_image`] and
//! [`commit_image`] leave a chain that reads the same at every moment, whatever cuts them off, and
//! can be run again.

mod children;
mod commit;
mod link;
mod list;
mod rebase;
#[cfg(test)]
mod relink_crash;
mod trial;

pub use children::find_children;
pub use commit::{CommitOptions, CommitSummary, commit_image};
pub(crate) use link::LinkTarget;
pub use list::{ChainLayer, ChainParent, ParentState, list_chain};
pub use rebase::{NewParent, RebaseOptions, RebaseSummary, rebase_image};
