//! qcow2, versions 2 and 3 (QEMU's `docs/interop/qcow2`).
//!
//! A disk is cut into clusters; two levels of tables (L1, L2) say where each cluster's bytes are:
//! in the file, compressed in it, nowhere (zero), or in the backing file. Reading follows the
//! tables and never needs the reference counts; [`Qcow2Image`] does it for the disk and for
//! internal snapshots, and also reads the persistent dirty bitmaps. [`Qcow2Writer`] creates and
//! changes images and keeps the reference counts right.

mod bitmap;
mod check;
mod compress;
mod compressed;
mod create;
mod decompress;
mod flush;
mod grow;
pub(crate) mod header;
mod image;
mod marks;
mod metadata;
mod read;
mod refcount;
mod set_parent;
mod snapshot;
mod table;
mod write;
mod writer;
mod zero;

pub(crate) use bitmap::read_directory;
pub(crate) use check::{check, repair};
pub use create::{CreateBacking, Qcow2CreateOptions, Qcow2Version};
pub use image::{Companions, Qcow2Image};
pub(crate) use set_parent::set_parent;
pub(crate) use snapshot::read_snapshots;
pub use writer::Qcow2Writer;
