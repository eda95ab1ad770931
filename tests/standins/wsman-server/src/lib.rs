//! A stand-in for WinRM: a WS-Management server in front of any [`Cim`](vmtide_cim::Cim).
//!
//! It exists for tests only, and has nothing in common with the client that it is tried with: HTTP, XML, NTLM
//! (MS-NLMP), SPNEGO (RFC 4178, MS-SPNG), the sealing of messages (MS-WSMV 2.2.9.1) and the faults (DSP0226, MS-WSMV)
//! are written here from their documents. Kerberos is MIT's own library, in a process beside this one.
//!
//! Where a real host is patient it is strict: what is not documented is a fault. Order, case and names of headers,
//! selectors and parameters are checked against the [`Schema`] that the world behind it declares; answers carry every
//! value as text, as a real host's do. What a real host does only on a bad day is switched on with [`Switches`].
//!
//! ```text
//! connection ─► TLS? ─► HTTP ─► authentication ─► unseal ─► envelope ─► operation ─► Cim
//!               tls      http    auth               seal      soap        operations
//! ```
//!
//! A connection has a thread of its own and blocks; nothing here is for production.

mod auth;
pub mod command_line;
mod fault;
mod http;
mod operations;
mod options;
pub mod sample;
mod schema;
mod seal;
mod server;
mod soap;
mod switches;
mod tls;
mod uri;
mod values;
mod write;
mod xml;

pub use options::{ChannelBinding, Kerberos, ServerOptions, User};
pub use schema::{ClassSchema, Member, MethodSchema, Schema, Table};
pub use server::{Exchange, Server, StartError};
pub use switches::{Effect, Operation, Switch, Switches};
pub use tls::Pem;
