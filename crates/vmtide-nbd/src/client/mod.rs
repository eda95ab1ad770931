//! The client: an export as a block device.

mod connect;
mod connection;
mod device;
pub(crate) mod handshake;
mod receive;
pub(crate) mod status;

pub use connect::{ProbedExport, list_exports, probe_export};
pub use device::{NbdDevice, ZeroMode};
pub use status::dirty_bitmap_context;
