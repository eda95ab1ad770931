//! Listening, and the handle on a server that runs.

use super::export::Export;
use super::options::ServerOptions;
use super::session::{Common, serve};
use crate::transport::{Listener, Stream};
use crate::url::{NbdAddress, NbdUrl};
use parking_lot::{Condvar, Mutex};
use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
#[cfg(unix)]
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vmtide_block::{BlockError, Result};

/// How often a server without new clients looks whether it should end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// How long a server that ends waits for replies that are being made.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(10);

/// A server in preparation: what it offers, and its limits.
///
/// ```no_run
/// use std::sync::Arc;
/// use vmtide_block::{OpenMode, RawDevice};
/// use vmtide_nbd::{Export, NbdServer};
///
/// let disk = Arc::new(RawDevice::open("disk.raw", OpenMode::ReadOnly)?);
/// let server = NbdServer::new()
///     .export(Export::read_only(disk).named("vda"))
///     .listen_unix("/run/vmtide/nbd.sock")?;
/// println!("{}", server.url());
/// server.shutdown();
/// # Ok::<(), vmtide_block::BlockError>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct NbdServer {
    exports: Vec<Export>,
    options: ServerOptions,
}

impl NbdServer {
    /// A server without exports.
    pub fn new() -> Self {
        Self::default()
    }

    /// With another export. Of two with one name the first is found.
    #[must_use]
    pub fn export(mut self, export: Export) -> Self {
        self.exports.push(export);
        self
    }

    /// With these options.
    #[must_use]
    pub fn options(mut self, options: ServerOptions) -> Self {
        self.options = options;
        self
    }

    /// Listens on a Unix socket that only this user may connect to. A socket at the path that
    /// nobody listens on any more is replaced.
    ///
    /// # Errors
    /// [`BlockError::Io`] where the path cannot be listened on or certificates cannot be read.
    #[cfg(unix)]
    pub fn listen_unix(self, path: impl AsRef<Path>) -> Result<ServerHandle> {
        use std::os::unix::fs::{FileTypeExt, PermissionsExt};
        use std::os::unix::net::{UnixListener, UnixStream};
        let path = path.as_ref();
        let failed = |error| BlockError::io(format!("listen on {}", path.display()), error);
        let is_socket =
            std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
        if is_socket && UnixStream::connect(path).is_err() {
            std::fs::remove_file(path).map_err(failed)?;
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address = NbdAddress::Unix { socket: path.display().to_string() };
        self.start(Listener::Unix(listener), address, Some(path.to_owned()))
    }

    /// Listens on a TCP address, e.g. `127.0.0.1:0` for any free port. Anybody who reaches the
    /// port can connect: give TLS options with client certificates unless it is local.
    ///
    /// # Errors
    /// [`BlockError::Io`] where the address cannot be listened on or certificates cannot be read.
    pub fn listen_tcp(self, address: impl ToSocketAddrs) -> Result<ServerHandle> {
        let failed = |error| BlockError::io("listen for NBD clients", error);
        let listener = TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        let address = NbdAddress::Tcp { host: bound.ip().to_string(), port: bound.port() };
        self.start(Listener::Tcp(listener), address, None)
    }

    fn start(
        self,
        listener: Listener,
        address: NbdAddress,
        socket: Option<PathBuf>,
    ) -> Result<ServerHandle> {
        let options = self.options.normalised();
        let tls = match &options.tls {
            Some(tls) => Some(tls.config()?),
            None => None,
        };
        let local_addr = listener.local_addr();
        let common = Arc::new(Common {
            exports: self.exports,
            options,
            tls,
            stopping: AtomicBool::new(false),
        });
        let sessions = Arc::new(Sessions::default());
        let (for_thread, with) = (Arc::clone(&common), Arc::clone(&sessions));
        let accepting = std::thread::Builder::new()
            .name("nbd-accept".to_owned())
            .spawn(move || accept(&listener, &for_thread, &with))
            .map_err(|error| BlockError::io("start an NBD server", error))?;
        Ok(ServerHandle {
            common,
            sessions,
            accepting: Some(accepting),
            address,
            local_addr,
            socket,
        })
    }
}

/// The clients there are.
#[derive(Debug, Default)]
struct Sessions {
    streams: Mutex<HashMap<u64, Arc<Stream>>>,
    left: Condvar,
}

/// Strikes a client off the list when its thread ends, in whatever way.
struct Leaving<'a> {
    sessions: &'a Sessions,
    id: u64,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        if let Some(stream) = self.sessions.streams.lock().remove(&self.id) {
            stream.shutdown();
        }
        self.sessions.left.notify_all();
    }
}

fn accept(listener: &Listener, common: &Arc<Common>, sessions: &Arc<Sessions>) {
    let mut next = 0;
    while !common.stopping.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok(stream) => {
                next += 1;
                if let Err(error) = start_session(common, sessions, next, Arc::new(stream)) {
                    tracing::warn!(%error, "cannot serve an NBD client");
                }
            }
            Err(error) => {
                if error.kind() != io::ErrorKind::WouldBlock {
                    tracing::debug!(%error, "cannot accept an NBD client");
                }
                std::thread::sleep(ACCEPT_PAUSE);
            }
        }
    }
}

fn start_session(
    common: &Arc<Common>,
    sessions: &Arc<Sessions>,
    id: u64,
    stream: Arc<Stream>,
) -> io::Result<()> {
    {
        let mut streams = sessions.streams.lock();
        if streams.len() >= common.options.max_connections {
            tracing::warn!("too many NBD clients, one is hung up on");
            return Ok(());
        }
        streams.insert(id, Arc::clone(&stream));
    }
    let (common, for_thread) = (Arc::clone(common), Arc::clone(sessions));
    let spawned = std::thread::Builder::new().name("nbd-session".to_owned()).spawn(move || {
        let _leaving = Leaving { sessions: &for_thread, id };
        if let Err(error) = serve(&common, &stream) {
            tracing::debug!(%error, "NBD client hung up on");
        }
    });
    if spawned.is_err() {
        sessions.streams.lock().remove(&id);
    }
    spawned.map(drop)
}

/// A server that runs. Dropping it ends it.
#[derive(Debug)]
pub struct ServerHandle {
    common: Arc<Common>,
    sessions: Arc<Sessions>,
    accepting: Option<std::thread::JoinHandle<()>>,
    address: NbdAddress,
    local_addr: Option<SocketAddr>,
    socket: Option<PathBuf>,
}

impl ServerHandle {
    /// The URL of the first export.
    pub fn url(&self) -> NbdUrl {
        let name = self.common.exports.first().map_or("", Export::name);
        self.url_of(name)
    }

    /// The URL of the export `name`.
    pub fn url_of(&self, name: &str) -> NbdUrl {
        let mut url = match &self.address {
            NbdAddress::Tcp { host, port } => NbdUrl::tcp(host.clone(), *port, name),
            NbdAddress::Unix { socket } => NbdUrl::unix(socket.clone(), name),
        };
        url.tls = self.common.tls.is_some();
        url
    }

    /// The TCP address it listens on, where it is one.
    pub const fn local_addr(&self) -> Option<SocketAddr> {
        self.local_addr
    }

    /// The clients connected now.
    pub fn connections(&self) -> usize {
        self.sessions.streams.lock().len()
    }

    /// Takes no more clients and no more requests, waits (10 s at most) until those under way
    /// are answered, and closes all connections. Writes are not flushed unless clients did.
    pub fn shutdown(self) {
        drop(self);
    }

    fn stop(&mut self) {
        self.common.stopping.store(true, Ordering::Relaxed);
        if let Some(accepting) = self.accepting.take() {
            // It ends by itself; a panic in it was its own.
            let _ = accepting.join();
        }
        if let Some(socket) = self.socket.take() {
            // Somebody may have removed it already.
            let _ = std::fs::remove_file(socket);
        }
        let end = Instant::now() + SHUTDOWN_PATIENCE;
        let mut streams = self.sessions.streams.lock();
        for stream in streams.values() {
            stream.shutdown_reading();
        }
        while !streams.is_empty() {
            if self.sessions.left.wait_until(&mut streams, end).timed_out() {
                for stream in streams.values() {
                    stream.shutdown();
                }
                return;
            }
        }
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.stop();
    }
}
