//! A Hyper-V host with an agent on it, for tests only: vmtide's own agent, over the management objects and the disks of
//! the stand-in host.
//!
//! What stands in for what: management objects, checkpoints and change tracking are those of the stand-in host; disks that a
//! client opens by their paths, as restores do, are read and written by the agent's provider for image files.
//!
//! The program `standin-hyperv-agent` serves such a host, for trying things by hand.

mod disks;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use vmtide_agent::auth::{Rights, keys};
use vmtide_agent::limits::Limits;
use vmtide_agent::vms::VmPlatform;
use vmtide_agent::{AgentOptions, ConnectionLimits, Platform};
use vmtide_block::CancelToken;
use vmtide_hyperv::{Clock, Host, HostOptions, HypervHypervisor, HypervOptions};
use vmtide_standin_hyperv_host::World;

/// The host's own time: waiting lets it go on.
struct WorldClock(World);

impl Clock for WorldClock {
    fn now_ms(&self) -> u64 {
        self.0.now_ms()
    }
    fn sleep_ms(&self, ms: u64) {
        self.0.advance(ms);
    }
}

/// A running agent; it ends when this is dropped.
#[derive(Debug)]
pub struct HostAgent {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its certificate, for clients to trust.
    pub certificate: PathBuf,
    /// The fingerprint of its certificate, for clients to pin.
    pub fingerprint: String,
    /// The secret of a key that may read.
    pub reader: String,
    /// The secret of a key that may write.
    pub writer: String,
    stop: CancelToken,
    thread: Option<JoinHandle<Result<(), String>>>,
}

impl HostAgent {
    /// An agent on `world`, whose volumes lie in `volumes`; keys and state in `directory`.
    ///
    /// # Errors
    /// What the agent says where it cannot start.
    pub fn start(world: &World, volumes: &Path, directory: &Path) -> Result<Self, String> {
        let mut lines = Vec::new();
        let mut secrets = Vec::new();
        for (name, rights) in [("reader", Rights::ReadOnly), ("writer", Rights::ReadWrite)] {
            let key = keys::generate(name, rights).map_err(|error| error.to_string())?;
            secrets.push(key.secret.as_str().to_owned());
            lines.push(key.line.as_str().to_owned());
        }
        let writer = secrets.pop().unwrap_or_default();
        let reader = secrets.pop().unwrap_or_default();
        let written = std::fs::create_dir_all(directory)
            .and_then(|()| std::fs::write(directory.join("keys"), lines.join("\n")));
        written.map_err(|error| error.to_string())?;
        let options = AgentOptions {
            listen: "127.0.0.1:0".into(),
            roots: vec![volumes.join("C")],
            auth_key_file: directory.join("keys"),
            certificate: None,
            state_directory: directory.join("state"),
            only_backup_program: false,
            tls12: false,
            audit_log: None,
            connections: ConnectionLimits::default(),
            limits: Limits::default(),
        };
        let platform = platform(world, volumes, &options);
        let stop = CancelToken::new();
        let (sender, started) = channel();
        let thread = std::thread::spawn({
            let stop = stop.clone();
            move || {
                let told = |started: &vmtide_agent::Started| {
                    let fingerprint = started.fingerprint.to_string();
                    // Nobody waits for it where the other side has given up.
                    drop(sender.send((started.address, started.certificate.clone(), fingerprint)));
                };
                let ended = vmtide_agent::run(&options, platform, &stop, told);
                ended.map_err(|error| error.to_string())
            }
        });
        let Ok((address, certificate, fingerprint)) = started.recv() else {
            let ended = thread.join().map_err(|_| "the agent panicked".to_owned())?;
            return Err(ended.err().unwrap_or_else(|| "the agent ended at once".into()));
        };
        let thread = Some(thread);
        Ok(Self { address, certificate, fingerprint, reader, writer, stop, thread })
    }
}

impl Drop for HostAgent {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            // What it says at its end interests nobody any more.
            drop(thread.join());
        }
    }
}

fn platform(world: &World, volumes: &Path, options: &AgentOptions) -> Platform {
    let clock = Arc::new(WorldClock(world.clone()));
    let host = Host::new(world.cim(), HostOptions { clock, ..HostOptions::default() });
    let how = HypervOptions::new(&options.state_directory);
    let root = volumes.to_path_buf();
    let vms = VmPlatform {
        hypervisor: Arc::new(HypervHypervisor::new(host, world.files(), how)),
        cim: Some(world.cim()),
        host_path: Some(Arc::new(move |path| below(&root, path))),
    };
    Platform { disks: Arc::new(disks::HostDisks::new(world, volumes)), vms: Some(vms) }
}

/// Where the stand-in keeps what the host calls `C:\…`.
fn below(root: &Path, path: &str) -> PathBuf {
    path.split('\\').fold(root.to_path_buf(), |at, part| at.join(part.trim_end_matches(':')))
}
