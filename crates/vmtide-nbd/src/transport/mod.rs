//! Sockets: TCP and Unix streams, with and without TLS, split into a reading and a writing half
//! that two threads use at once.

mod halves;
mod stream;
mod timed;
mod tls;

pub(crate) use halves::{ReadHalf, WriteHalf, split};
pub(crate) use stream::{Listener, Stream};
pub(crate) use timed::TimedStream;
pub use tls::{TlsClientOptions, TlsServerOptions};
pub(crate) use tls::{client_handshake, server_handshake};
