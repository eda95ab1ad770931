//! The server: any block device as an export.

mod budget;
mod export;
pub(crate) mod handshake;
mod listen;
mod options;
pub(crate) mod requests;
mod session;

pub use export::{ContextSource, Export};
pub use listen::{NbdServer, ServerHandle};
pub use options::ServerOptions;
