//! Virtual disk images as block devices.
//!
//! A disk image is a file in a format: here the bytes of a virtual disk are found in it and put
//! behind [`vmtide_block::BlockDevice`], so that backup, restore, conversion and the network
//! servers never learn about formats. **Raw** (files and block devices), **qcow2**, **VHDX**,
//! **VHD** and **VMDK** are read and written.
//!
//! Images are hostile input. Every offset is checked against the file before it is followed, every
//! table has a size limit, and what an image says about *other* files (its backing file, its
//! external data file) is followed only as far as [`BackingPolicy`] allows: a guest that can write
//! an image header could otherwise have the host read any file into its disk.
//!
//! All devices may be read by any number of threads at once and no lock is held while data is
//! read; see [`qcow2::Qcow2Writer`] for what concurrent writers may expect.

mod bytes;
mod chain;
mod check;
mod create;
mod deflate;
mod elsewhere;
mod files;
mod format;
#[doc(hidden)]
pub mod fuzzing;
mod identity;
mod image;
mod info;
mod lock;
mod open;
mod parent;
pub mod qcow2;
mod table_cache;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;
mod windows_path;

pub use chain::{
    ChainLayer, ChainParent, CommitOptions, CommitSummary, NewParent, ParentState, RebaseOptions,
    RebaseSummary, commit_image, find_children, list_chain, rebase_image,
};
pub use check::{CheckReport, Problem, Repair, Severity, check_image};
pub use create::{Compression, CreateOptions, CreateParent, create_image, subformats};
pub use files::{FilesLayer, ImageFiles, open_chain_in, open_writer_in};
pub use format::{Format, format_by_name, probe, probe_device, probe_file};
pub use identity::identity;
pub use image::{CompressedCluster, CompressedWriter, DiskImage, ImageWriter, Placement};
pub use info::{
    BackingInfo, BitmapInfo, BitmapState, ImageInfo, LogState, SnapshotInfo, image_info,
    image_info_device,
};
pub use lock::{ImageLock, companion_files};
pub use open::{
    BackingPolicy, Layer, MAX_CHAIN_DEPTH, OpenOptions, open_chain, open_read_only, open_snapshot,
    open_writable,
};
pub use parent::ParentLink;
pub use windows_path::{windows_parents, windows_path};
