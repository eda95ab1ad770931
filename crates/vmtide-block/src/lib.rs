//! The ground every vmtide crate stands on: what a disk is, and nothing about how to back one up.
//!
//! A disk is anything that implements [`BlockDevice`]: positional reads by many callers at once,
//! and [`extents`](BlockDevice::extents) that say which ranges hold data and which read as zeros.
//! Image formats, NBD exports, files on a share, restore points and overlays all are block
//! devices, so every consumer (backup, restore, convert, serve) takes the trait and none of them
//! knows where the bytes live. [`RangeSet`] is the arithmetic of changed ranges; [`Progress`] and
//! [`CancelToken`] are how long work is watched and stopped.
//!
//! Everything here blocks the calling thread and is safe to call from many threads. There is no
//! global state.

mod aligned;
mod cancel;
mod copy;
mod device;
mod direct;
mod error;
mod extent;
pub mod files;
mod memory;
mod progress;
mod range;
mod range_set;
mod raw;
mod reflink;
mod room;
mod storage_order;
mod zero;

pub use aligned::AlignedBuffer;
pub use cancel::CancelToken;
pub use copy::{CopyOptions, CopySummary, copy_device};
pub use device::{BlockDevice, ReadOnlyView, WritableBlockDevice, all_extents, for_each_extent};
pub use error::{BlockError, Result};
pub use extent::{Extent, ExtentKind, push_extent};
pub use memory::MemoryDevice;
pub use progress::{Progress, ProgressSnapshot};
pub use range::ByteRange;
pub use range_set::RangeSet;
pub use raw::{OpenMode, RawDevice};
pub use storage_order::{MAX_PIECE_BYTES, StorageOrder, TakePiece};
pub use zero::is_zero;
