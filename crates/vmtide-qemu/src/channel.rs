//! Lines of text over a local or TCP socket, with a deadline on everything.
//!
//! Both the machine monitor (QMP) and the guest agent speak JSON in lines. The other side may be
//! silent, hung or hostile, so no call here waits past its deadline, not even the connect (a
//! socket whose listener is busy with another client would block for ever), and no line is kept
//! past [`MAX_LINE_BYTES`].

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The longest line accepted. `query-named-block-nodes` of a VM with hundreds of disks is about
/// a megabyte; a longer line than this is nonsense and must not fill our memory.
pub(crate) const MAX_LINE_BYTES: usize = 16 << 20;

/// How long to sleep before another try to connect to a listener whose queue is full.
const CONNECT_RETRY: Duration = Duration::from_millis(20);

/// Where a monitor or an agent listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket by its path.
    Unix(PathBuf),
    /// `HOST:PORT`.
    Tcp(String),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(address) => f.write_str(address),
        }
    }
}

/// Why a line could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChannelError {
    #[error("no answer in time")]
    Timeout,
    #[error("the connection was closed")]
    Closed,
    #[error("a line of more than {MAX_LINE_BYTES} bytes")]
    LineTooLong,
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn set_timeouts(&self, left: Duration) -> std::io::Result<()> {
        match self {
            Self::Unix(stream) => {
                stream.set_read_timeout(Some(left))?;
                stream.set_write_timeout(Some(left))
            }
            Self::Tcp(stream) => {
                stream.set_read_timeout(Some(left))?;
                stream.set_write_timeout(Some(left))
            }
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(buffer),
            Self::Tcp(stream) => stream.read(buffer),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(bytes),
            Self::Tcp(stream) => stream.write(bytes),
        }
    }
}

/// A connected socket that is read by lines.
pub(crate) struct LineChannel {
    stream: Stream,
    /// Bytes received and not yet handed out.
    pending: Vec<u8>,
    /// How much of `pending` is known to hold no newline.
    searched: usize,
}

impl LineChannel {
    /// Connects before `deadline`.
    pub fn connect(address: &Address, deadline: Instant) -> Result<Self, ChannelError> {
        let stream = match address {
            Address::Unix(path) => Stream::Unix(connect_unix(path, deadline)?),
            Address::Tcp(address) => Stream::Tcp(connect_tcp(address, deadline)?),
        };
        Ok(Self { stream, pending: Vec::new(), searched: 0 })
    }

    /// The socket, where it is a Unix one; for asking who listens there.
    pub fn unix_fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.stream {
            Stream::Unix(stream) => Some(stream.as_fd()),
            Stream::Tcp(_) => None,
        }
    }

    /// Sends all of `bytes` before `deadline`.
    pub fn send(&mut self, bytes: &[u8], deadline: Instant) -> Result<(), ChannelError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            self.stream.set_timeouts(time_left(deadline)?)?;
            match self.stream.write(rest) {
                Ok(0) => return Err(ChannelError::Closed),
                Ok(written) => rest = &rest[written..],
                Err(error) => classify(error)?,
            }
        }
        Ok(())
    }

    /// The next line without its end, received before `deadline`.
    pub fn read_line(&mut self, deadline: Instant) -> Result<Vec<u8>, ChannelError> {
        loop {
            let found = self.pending[self.searched..].iter().position(|byte| *byte == b'\n');
            if let Some(at) = found.map(|at| at + self.searched) {
                let rest = self.pending.split_off(at + 1);
                let mut line = std::mem::replace(&mut self.pending, rest);
                self.searched = 0;
                line.pop();
                return Ok(line);
            }
            self.searched = self.pending.len();
            if self.searched > MAX_LINE_BYTES {
                return Err(ChannelError::LineTooLong);
            }
            self.receive(deadline)?;
        }
    }

    /// Throws away everything up to and with the next `mark`, received before `deadline`.
    pub fn skip_past(&mut self, mark: u8, deadline: Instant) -> Result<(), ChannelError> {
        loop {
            self.searched = 0;
            if let Some(at) = self.pending.iter().position(|byte| *byte == mark) {
                self.pending.drain(..=at);
                return Ok(());
            }
            self.pending.clear();
            self.receive(deadline)?;
        }
    }

    fn receive(&mut self, deadline: Instant) -> Result<(), ChannelError> {
        let mut chunk = [0u8; 16 * 1024];
        self.stream.set_timeouts(time_left(deadline)?)?;
        match self.stream.read(&mut chunk) {
            Ok(0) => Err(ChannelError::Closed),
            Ok(received) => {
                self.pending.extend_from_slice(&chunk[..received]);
                Ok(())
            }
            Err(error) => classify(error),
        }
    }
}

/// What is left until `deadline`, never zero (which would mean "for ever" to the system).
fn time_left(deadline: Instant) -> Result<Duration, ChannelError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left < Duration::from_millis(1) {
        return Err(ChannelError::Timeout);
    }
    Ok(left)
}

/// Turns the system's ways to say "later" into going on, and the rest into an error.
fn classify(error: std::io::Error) -> Result<(), ChannelError> {
    match error.kind() {
        ErrorKind::Interrupted => Ok(()),
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Err(ChannelError::Timeout),
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Err(ChannelError::Closed),
        _ => Err(error.into()),
    }
}

fn connect_unix(path: &std::path::Path, deadline: Instant) -> Result<UnixStream, ChannelError> {
    let address = SocketAddrUnix::new(path).map_err(std::io::Error::from)?;
    loop {
        // A blocking connect would wait for ever behind a listener's full queue.
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .map_err(std::io::Error::from)?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) => {
                let stream = UnixStream::from(socket);
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(Errno::AGAIN | Errno::INTR) => {
                time_left(deadline)?;
                std::thread::sleep(CONNECT_RETRY);
            }
            Err(error) => return Err(std::io::Error::from(error).into()),
        }
    }
}

fn connect_tcp(address: &str, deadline: Instant) -> Result<TcpStream, ChannelError> {
    let mut last = std::io::Error::new(ErrorKind::NotFound, "the name has no address");
    for candidate in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&candidate, time_left(deadline)?) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last.into())
}
