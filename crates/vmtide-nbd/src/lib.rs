//! NBD, both sides: an export of any server as a block device, and any block device as an export.
//!
//! The client ([`NbdDevice`]) speaks fixed newstyle NBD with TLS, structured replies, 64-bit
//! extended headers and metadata contexts where the server has them, and without where it has
//! not. It reads into the caller's buffers, keeps many requests of many callers under way on each
//! connection, and opens several connections where the server says that is safe. Dirty bitmaps of
//! QEMU are read as range sets.
//!
//! Everything blocks its thread; there is no runtime to bring along and no global state. Bytes of
//! the other side are hostile: every length is checked before it is believed, every wait has a
//! limit, and a reply that does not cover its request is an error.
//!
//! The layers, from the bottom: `proto` knows messages and what a valid reply is, without any
//! input or output; `transport` knows sockets and TLS; `client` and `server` put them together.
//!
//! ```no_run
//! use vmtide_block::{BlockDevice, ByteRange, CancelToken};
//! use vmtide_nbd::{NbdDevice, NbdOptions, NbdUrl};
//!
//! let url: NbdUrl = "nbd+unix:///vda?socket=/run/vm/backup.sock".parse()?;
//! let options = NbdOptions { read_only: true, ..NbdOptions::default() }.with_dirty_bitmap("b0");
//! let disk = NbdDevice::connect(&url, &options)?;
//! let whole = ByteRange::new(0, disk.size_bytes());
//! let changed = disk.dirty_ranges("b0", whole, &CancelToken::new())?;
//! disk.for_each_changed_extent(&changed, &CancelToken::new(), |extent| {
//!     if !extent.kind.reads_as_zero() {
//!         let mut buffer = vec![0; extent.range.length.min(1 << 20) as usize];
//!         disk.read_at(&mut buffer, extent.range.offset)?;
//!     }
//!     Ok(())
//! })?;
//! # Ok::<(), vmtide_block::BlockError>(())
//! ```

mod client;
#[doc(hidden)]
pub mod fuzzing;
mod options;
mod proto;
mod server;
mod transport;
mod url;

pub use client::{
    NbdDevice, ProbedExport, ZeroMode, dirty_bitmap_context, list_exports, probe_export,
};
pub use options::NbdOptions;
pub use proto::ProtocolError;
pub use proto::constants::CONTEXT_ALLOCATION;
pub use proto::export_info::{BlockSizes, ExportInfo, TransmissionFlags};
pub use proto::option::ListedExport;
pub use proto::request::HeaderStyle;
pub use proto::status::StatusExtent;
pub use server::{ContextSource, Export, NbdServer, ServerHandle, ServerOptions};
pub use transport::{TlsClientOptions, TlsServerOptions};
pub use url::{DEFAULT_PORT, NbdAddress, NbdUrl};
