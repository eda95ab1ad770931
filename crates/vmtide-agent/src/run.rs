//! One agent from its options to its end.

use crate::audit::AuditLog;
use crate::auth::{KeyStore, RELOAD_INTERVAL};
use crate::config::{AgentOptions, ConnectionLimits};
use crate::error::{AgentError, Result};
use crate::metrics::Metrics;
use crate::provider::DiskProvider;
use crate::roots::Roots;
use crate::server;
use crate::state::{AppState, Shared};
use crate::systemd;
use crate::tls::{Fingerprint, TlsIdentity};
use crate::vms::{VmPlatform, Vms};
use crate::work::Work;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use vmtide_block::CancelToken;

/// How often it is looked whether the agent shall end.
const STOP_INTERVAL: Duration = Duration::from_millis(100);
/// The most threads that block at once: reading disks, asking the platform. Requests past that wait.
const BLOCKING_THREADS: usize = 128;
/// The handles that are kept for disks, their chains and their tracking, out of reach of connections.
const HANDLES_FOR_DISKS: u64 = 384;
/// The name of the audit log in the state directory.
const AUDIT_FILE: &str = "audit.log";

/// An agent that answers.
#[derive(Clone, Debug)]
pub struct Started {
    /// Where it listens.
    pub address: SocketAddr,
    /// The fingerprint of its certificate, for clients to pin.
    pub fingerprint: Fingerprint,
    /// Its certificate, for clients to trust.
    pub certificate: PathBuf,
    /// The directories it serves, links followed.
    pub roots: Vec<PathBuf>,
    /// How many keys it knows.
    pub keys: usize,
    /// Whether its key stands in the clear in its file.
    pub key_is_plain: bool,
}

/// What an agent serves of its host.
#[derive(Clone)]
pub struct Platform {
    /// The disks.
    pub disks: Arc<dyn DiskProvider>,
    /// The VMs, where there are some.
    pub vms: Option<VmPlatform>,
}

impl From<Arc<dyn DiskProvider>> for Platform {
    fn from(disks: Arc<dyn DiskProvider>) -> Self {
        Self { disks, vms: None }
    }
}

/// The disks of this host; it has no Hyper-V.
#[cfg(not(windows))]
pub fn platform_of_this_host(_options: &AgentOptions) -> Platform {
    Platform::from(crate::provider::of_this_host())
}

/// Runs an agent until `stop` is cancelled; then lets running requests end. `started` is called once, when it
/// answers.
///
/// # Errors
/// [`AgentError`] where it cannot start: options, files, the address.
pub fn run(
    options: &AgentOptions,
    platform: impl Into<Platform>,
    stop: &CancelToken,
    started: impl FnOnce(&Started),
) -> Result<()> {
    let state = prepare(options, platform.into())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_name("agent")
        .build()
        .map_err(|error| AgentError::io("start the agent's threads", error))?;
    let ended = runtime.block_on(run_until(options, state, stop, started));
    // A read that hangs in a broken file system must not keep the agent from ending.
    runtime.shutdown_timeout(options.connections.drain_timeout);
    ended
}

/// Reads what the agent needs before it listens.
fn prepare(options: &AgentOptions, platform: Platform) -> Result<Shared> {
    let host_path = platform.vms.as_ref().and_then(|vms| vms.host_path.clone());
    let roots = Roots::new(&options.roots)?.with_host_path(host_path);
    let keys = Arc::new(KeyStore::open(&options.auth_key_file)?);
    make_state_directory(&options.state_directory)?;
    let audit_log =
        options.audit_log.clone().unwrap_or_else(|| options.state_directory.join(AUDIT_FILE));
    let audit = AuditLog::open(&audit_log)?;
    let limits = options.limits.clone();
    let work = Work::new(&limits);
    let metrics = Metrics::default();
    let Platform { disks: provider, vms } = platform;
    let vms = vms.map(|platform| Arc::new(Vms::new(platform, &limits)));
    if let Some(vms) = &vms {
        vms.reap_in_background();
    }
    Ok(Arc::new(AppState { provider, vms, roots, keys, limits, metrics, audit, work }))
}

fn make_state_directory(path: &Path) -> Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path).map_err(|error| {
        AgentError::io(format!("make the state directory {}", path.display()), error)
    })
}

async fn run_until(
    options: &AgentOptions,
    state: Shared,
    stop: &CancelToken,
    started: impl FnOnce(&Started),
) -> Result<()> {
    let listener = TcpListener::bind(&options.listen)
        .await
        .map_err(|error| AgentError::io(format!("listen at {}", options.listen), error))?;
    let address = listener
        .local_addr()
        .map_err(|error| AgentError::io(format!("listen at {}", options.listen), error))?;
    let identity = match &options.certificate {
        Some(files) => TlsIdentity::open(files.clone())?,
        None => TlsIdentity::open_or_make(&options.state_directory, address.ip())?,
    };
    let tls = identity.server_config(options.tls12)?;
    let keys = state.keys.current();
    started(&Started {
        address,
        fingerprint: identity.fingerprint(),
        certificate: identity.certificate_file().to_path_buf(),
        roots: state.roots.directories().map(Path::to_path_buf).collect(),
        keys: keys.len(),
        key_is_plain: keys.is_plain(),
    });
    let (stopping, stopped) = watch::channel(false);
    let care = tokio::spawn(take_care(Arc::clone(&state.keys), identity));
    let open = state.metrics.connections.clone();
    let router = server::router(state);
    let connections = within_handles(options.connections);
    let serving = tokio::spawn(server::serve(listener, tls, router, connections, open, stopped));
    systemd::notify(systemd::READY);
    while !stop.is_cancelled() && !serving.is_finished() {
        tokio::time::sleep(STOP_INTERVAL).await;
    }
    systemd::notify(systemd::STOPPING);
    care.abort();
    // Nobody listens any more where the server has ended by itself.
    let _ = stopping.send(true);
    serving.await.map_err(|error| AgentError::refused("serve", error))
}

/// These limits, with no more connections than there are handles for.
fn within_handles(mut connections: ConnectionLimits) -> ConnectionLimits {
    let Some(handles) = raise_handles(connections.total as u64 + HANDLES_FOR_DISKS) else {
        return connections;
    };
    let left = usize::try_from(handles.saturating_sub(HANDLES_FOR_DISKS)).unwrap_or(usize::MAX);
    if left < connections.total {
        tracing::warn!("this process may have {handles} handles: at most {left} connections");
        connections.total = left.max(1);
    }
    connections
}

/// Lets this process have so many handles, as far as it may. Answers how many it has now; none without a limit.
#[cfg(unix)]
fn raise_handles(wanted: u64) -> Option<u64> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let current = limit.current?;
    let reachable = limit.maximum.map_or(wanted, |maximum| wanted.min(maximum));
    if current >= reachable {
        return Some(current);
    }
    let raised = Rlimit { current: Some(reachable), maximum: limit.maximum };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => Some(reachable),
        Err(error) => {
            tracing::debug!(%error, "the number of handles could not be raised");
            Some(current)
        }
    }
}

/// Windows has no such limit worth speaking of.
#[cfg(not(unix))]
fn raise_handles(_wanted: u64) -> Option<u64> {
    None
}

/// Tells systemd that the agent lives, and reads files again that changed: apart, so that a file system that hangs
/// does not look like an agent that hangs.
async fn take_care(keys: Arc<KeyStore>, identity: Arc<TlsIdentity>) {
    tokio::join!(feed_watchdog(), reload_files(keys, identity));
}

async fn feed_watchdog() {
    let Some(interval) = systemd::watchdog_interval() else { return };
    let mut feed = tokio::time::interval(interval);
    loop {
        feed.tick().await;
        systemd::notify(systemd::WATCHDOG);
    }
}

async fn reload_files(keys: Arc<KeyStore>, identity: Arc<TlsIdentity>) {
    let mut look = tokio::time::interval(RELOAD_INTERVAL);
    let mut hangup = Hangup::new();
    loop {
        let in_any_case = tokio::select! {
            _ = look.tick() => false,
            () = hangup.wait() => true,
        };
        let (keys, identity) = (Arc::clone(&keys), Arc::clone(&identity));
        let reload = move || {
            keys.reload(in_any_case);
            identity.reload();
        };
        if let Err(error) = on_own_thread(reload).await {
            tracing::error!(%error, "keys and certificate could not be looked at");
        }
    }
}

/// Runs `work` on a thread of its own and waits for its end: those for requests may all be busy, and a key that was
/// revoked must not stay good for as long.
async fn on_own_thread(work: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    let (ended, end) = oneshot::channel();
    let run = move || {
        work();
        // Nobody waits any more where the agent ends.
        let _ = ended.send(());
    };
    // It ends by itself; nobody joins it.
    drop(std::thread::Builder::new().name("care".into()).spawn(run)?);
    end.await.map_err(|_| std::io::Error::other("failed inside the agent"))
}

/// SIGHUP, where there is such a thing.
struct Hangup {
    #[cfg(unix)]
    signal: Option<tokio::signal::unix::Signal>,
}

impl Hangup {
    #[cfg(unix)]
    fn new() -> Self {
        use tokio::signal::unix::{SignalKind, signal};
        let signal = signal(SignalKind::hangup());
        Self {
            signal: signal
                .inspect_err(|error| tracing::warn!(%error, "SIGHUP is not noticed"))
                .ok(),
        }
    }

    #[cfg(not(unix))]
    fn new() -> Self {
        Self {}
    }

    async fn wait(&mut self) {
        #[cfg(unix)]
        if let Some(signal) = &mut self.signal
            && signal.recv().await.is_some()
        {
            return;
        }
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn keys_are_read_again_also_while_all_threads_are_busy() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(1)
            .build()
            .unwrap();
        let (release, held) = channel::<()>();
        let busy = runtime.spawn_blocking(move || held.recv());
        let (sender, reached) = channel();
        runtime.block_on(on_own_thread(move || sender.send(1).unwrap())).unwrap();
        assert_eq!(reached.recv().unwrap(), 1);
        assert!(!busy.is_finished());
        drop(release);
        let panics: fn() = || std::panic::resume_unwind(Box::new("no message"));
        assert!(runtime.block_on(on_own_thread(panics)).is_err());
    }
}
