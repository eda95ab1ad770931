//! One connected socket of either kind.

use crate::url::NbdAddress;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
#[cfg(unix)]
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

/// A connected socket. Reading and writing go through `&self`, so clones are seldom needed.
#[derive(Debug)]
pub(crate) enum Stream {
    /// TCP, without delay.
    Tcp(TcpStream),
    /// A Unix domain socket.
    #[cfg(unix)]
    Unix(UnixStream),
}

macro_rules! each {
    ($self:expr, $stream:ident => $body:expr) => {
        match $self {
            Stream::Tcp($stream) => $body,
            #[cfg(unix)]
            Stream::Unix($stream) => $body,
        }
    };
}

impl Stream {
    /// Connects within `timeout` (each address of a host name has its own).
    pub(crate) fn connect(address: &NbdAddress, timeout: Duration) -> io::Result<Self> {
        match address {
            NbdAddress::Tcp { host, port } => connect_tcp(host, *port, timeout),
            #[cfg(unix)]
            NbdAddress::Unix { socket } => connect_unix_within(socket, timeout),
            #[cfg(not(unix))]
            NbdAddress::Unix { .. } => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this system has no Unix domain sockets",
            )),
        }
    }

    /// Ends both directions; blocked readers and writers wake up.
    pub(crate) fn shutdown(&self) {
        // It may be closed already; either way nothing more can be done with it.
        let _ = each!(self, stream => stream.shutdown(Shutdown::Both));
    }

    /// Ends the direction towards us; a blocked reader wakes up.
    pub(crate) fn shutdown_reading(&self) {
        // It may be closed already.
        let _ = each!(self, stream => stream.shutdown(Shutdown::Read));
    }

    /// The longest one read may wait.
    pub(crate) fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        each!(self, stream => stream.set_read_timeout(timeout))
    }

    /// The longest one write may wait.
    pub(crate) fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        each!(self, stream => stream.set_write_timeout(timeout))
    }

    /// Reads what is there.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        each!(self, stream => Read::read(&mut &*stream, buffer))
    }

    /// Writes what fits.
    pub(crate) fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        each!(self, stream => Write::write(&mut &*stream, bytes))
    }

    /// Writes what fits of two pieces.
    pub(crate) fn send_two(&self, first: &[u8], second: &[u8]) -> io::Result<usize> {
        let pieces = [IoSlice::new(first), IoSlice::new(second)];
        each!(self, stream => Write::write_vectored(&mut &*stream, &pieces))
    }
}

fn connect_tcp(host: &str, port: u16, timeout: Duration) -> io::Result<Stream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(Stream::Tcp(stream));
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The system has no timeout for this, and a server that accepts nobody any more fills its
/// queue and then blocks whoever connects: so it is done on a thread that may be left behind.
#[cfg(unix)]
fn connect_unix_within(socket: &str, timeout: Duration) -> io::Result<Stream> {
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    let socket = socket.to_owned();
    std::thread::Builder::new().name("nbd-connect".to_owned()).spawn(move || {
        // Nobody listens any more where the time was up.
        let _ = sender.send(connect_unix(&socket));
    })?;
    receiver.recv_timeout(timeout).unwrap_or_else(|_| {
        Err(io::Error::new(io::ErrorKind::TimedOut, "the server does not accept the connection"))
    })
}

#[cfg(unix)]
fn connect_unix(socket: &str) -> io::Result<Stream> {
    #[cfg(target_os = "linux")]
    if let Some(name) = socket.strip_prefix('\0') {
        use std::os::linux::net::SocketAddrExt;
        let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
        return Ok(Stream::Unix(UnixStream::connect_addr(&address)?));
    }
    Ok(Stream::Unix(UnixStream::connect(socket)?))
}

/// A socket that waits for clients.
#[derive(Debug)]
pub(crate) enum Listener {
    /// On a TCP address.
    Tcp(TcpListener),
    /// On a path.
    #[cfg(unix)]
    Unix(UnixListener),
}

impl Listener {
    /// The next client, or `WouldBlock` where there is none now.
    pub(crate) fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
            #[cfg(unix)]
            Self::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                Ok(Stream::Unix(stream))
            }
        }
    }

    /// The TCP address, where it is one.
    pub(crate) fn local_addr(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok(),
            #[cfg(unix)]
            Self::Unix(_) => None,
        }
    }
}
