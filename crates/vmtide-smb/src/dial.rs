//! The way to a server's port.

use crate::error::{Result, SmbError};
use crate::session::SmbOptions;
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

/// Connects to a server, by the first of its addresses that takes the connection.
///
/// # Errors
/// [`SmbError::Unreachable`].
pub(crate) fn dial(options: &SmbOptions, server: &str, peer: &str) -> Result<TcpStream> {
    let unreachable = |detail: String| SmbError::Unreachable { peer: peer.to_owned(), detail };
    let addresses = (server, options.port)
        .to_socket_addrs()
        .map_err(|error| unreachable(format!("its name has no address: {error}")))?;
    let mut last = "its name has no address".to_owned();
    for address in addresses {
        match TcpStream::connect_timeout(&address, options.timeout.min(Duration::from_secs(15))) {
            Ok(stream) => return Ok(stream),
            Err(error) => {
                last =
                    format!("{error}; check that the host runs and port {} is open", options.port);
            }
        }
    }
    Err(unreachable(last))
}
