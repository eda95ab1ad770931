//! An agent in this process, with keys of its own and a directory full of empty files.

use super::client::Client;
use super::provider::TestProvider;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use tempfile::TempDir;
use vmtide_agent::auth::{Rights, keys};
use vmtide_agent::limits::Limits;
use vmtide_agent::vms::VmPlatform;
use vmtide_agent::{AgentOptions, ConnectionLimits, Platform};
use vmtide_block::CancelToken;

/// The secrets of its keys.
#[derive(Clone)]
pub struct Keys {
    pub reader: String,
    pub writer: String,
    pub other: String,
}

pub struct Agent {
    pub address: SocketAddr,
    pub certificate: PathBuf,
    pub keys: Keys,
    pub directory: TempDir,
    stop: CancelToken,
    thread: Option<JoinHandle<()>>,
}

/// Makes the directory of an agent: the files of its disks in `disks`, and its keys.
pub fn prepare(directory: &Path, disks: &[&str]) -> Keys {
    std::fs::create_dir_all(directory.join("disks")).unwrap();
    for disk in disks {
        std::fs::write(directory.join("disks").join(disk), "").unwrap();
    }
    let made: Vec<_> =
        [("reader", Rights::ReadOnly), ("writer", Rights::ReadWrite), ("other", Rights::ReadWrite)]
            .into_iter()
            .map(|(name, rights)| keys::generate(name, rights).unwrap())
            .collect();
    let lines: Vec<_> = made.iter().map(|key| key.line.as_str()).collect();
    std::fs::write(directory.join("keys"), lines.join("\n")).unwrap();
    let secret = |at: usize| made[at].secret.as_str().to_owned();
    Keys { reader: secret(0), writer: secret(1), other: secret(2) }
}

/// The options of an agent over such a directory.
pub fn options(directory: &Path, limits: Limits) -> AgentOptions {
    AgentOptions {
        listen: "127.0.0.1:0".into(),
        roots: ["disks", "C"]
            .map(|name| directory.join(name))
            .into_iter()
            .filter(|root| root.is_dir())
            .collect(),
        auth_key_file: directory.join("keys"),
        certificate: None,
        state_directory: directory.join("state"),
        only_backup_program: false,
        tls12: false,
        audit_log: None,
        connections: ConnectionLimits::default(),
        limits,
    }
}

impl Agent {
    pub fn start(provider: Arc<TestProvider>, limits: Limits) -> Self {
        Self::start_with(provider, limits, None)
    }

    /// An agent whose host has VMs.
    pub fn start_with(
        provider: Arc<TestProvider>,
        limits: Limits,
        vms: Option<VmPlatform>,
    ) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), provider, limits, vms)
    }

    /// An agent that serves all of a directory, which is its own from now on.
    pub fn start_in(
        directory: TempDir,
        provider: Arc<TestProvider>,
        limits: Limits,
        vms: Option<VmPlatform>,
    ) -> Self {
        let names: Vec<String> = provider.disks.lock().keys().cloned().collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let keys = prepare(directory.path(), &names);
        let options = options(directory.path(), limits);
        let stop = CancelToken::new();
        let (sender, started) = channel();
        let thread = std::thread::spawn({
            let stop = stop.clone();
            let platform = Platform { disks: provider, vms };
            move || {
                vmtide_agent::run(&options, platform, &stop, |started| {
                    sender.send((started.address, started.certificate.clone())).unwrap();
                })
                .unwrap();
            }
        });
        let (address, certificate) = started.recv().unwrap();
        Self { address, certificate, keys, directory, stop, thread: Some(thread) }
    }

    /// The path of a disk, as a client names it.
    pub fn path(&self, disk: &str) -> String {
        self.directory.path().join("disks").join(disk).display().to_string()
    }

    pub fn reader(&self) -> Client {
        Client::new(self.address, &self.certificate, &self.keys.reader)
    }

    pub fn writer(&self) -> Client {
        Client::new(self.address, &self.certificate, &self.keys.writer)
    }

    pub fn other(&self) -> Client {
        Client::new(self.address, &self.certificate, &self.keys.other)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.cancel();
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking(), "the agent failed");
    }
}
