//! Delta streams: the changed data of a disk between two moments, as a stream that can be checked,
//! stored, sent, merged and applied.
//!
//! A delta says of the ranges of a disk that changed what they hold now: data, zeros, or nothing
//! that is allocated. It knows the two moments it lies between, so deltas form chains that are
//! checked. The format is open: `docs/delta-format.md` has it to the byte.
//!
//! - [`create_delta`] makes one from a disk and its changed ranges, or by comparing it with its base.
//! - [`DeltaReader`] reads one from a pipe, [`DeltaFile`] from a file, any place of it by its index.
//! - [`ApplyPlan`] and [`apply_stream`] bring a disk from one moment to the other.
//! - [`merge_deltas`] makes one of several that follow each other.
//!
//! All of it blocks, works with as many threads as it is told to, and takes memory by workers and not
//! by disks. A delta comes from anywhere: no bytes in it make this crate panic or allocate more than
//! the format's limits.

mod apply;
mod create;
mod error;
mod file;
mod fingerprint;
mod format;
mod frame;
#[doc(hidden)]
pub mod fuzzing;
mod merge;
mod page_buffer;
mod pipeline;
mod reader;
mod writer;

pub use apply::{ApplyOptions, ApplyPlan, ApplySummary, apply_stream};
pub use create::{CreateOptions, DeltaSource, create_delta};
pub use error::{DeltaError, Result};
pub use file::DeltaFile;
pub use fingerprint::fingerprint;
pub use format::{DeltaHeader, DeltaTotals, MAX_DISK_BYTES, MAX_FRAME_BYTES, MAX_STRING_BYTES};
pub use merge::{MAX_MERGED, merge_deltas};
pub use reader::DeltaReader;
pub use writer::DeltaSummary;
