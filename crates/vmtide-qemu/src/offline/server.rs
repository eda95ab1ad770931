//! A `qemu-nbd` child that serves one image read-only.

use super::image::{ImageFile, tool};
use rustix::process::{Pid, Signal};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};
use vmtide_hypervisor::{HypervisorError, Result};

/// The name of the export.
pub(super) const EXPORT: &str = "disk";

/// Clients served at once; more than the connections one reader makes.
const CLIENTS: &str = "16";

/// How long the server may take to listen; opening a long backing chain takes a moment.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// How often to look whether it does.
const POLL: Duration = Duration::from_millis(10);

/// The most of a complaint that is kept.
const MAX_COMPLAINT_BYTES: u64 = 4096;

/// A running server.
pub(super) struct ImageServer {
    child: Child,
}

impl ImageServer {
    /// Serves `image` with `bitmap` at `socket`, whose directory only we can enter.
    pub fn start(image: &ImageFile, bitmap: Option<&str>, socket: &Path) -> Result<Self> {
        let mut command = tool("qemu-nbd");
        command.args(["--read-only", "--format", image.format(), "--shared", CLIENTS]);
        command.args(["--export-name", EXPORT]).arg("--socket").arg(socket);
        if let Some(bitmap) = bitmap {
            command.args(["--bitmap", bitmap]);
        }
        command.arg(image.path()).stdout(Stdio::null()).stderr(Stdio::piped());
        let child = command
            .spawn()
            .map_err(|error| HypervisorError::io("run qemu-nbd (install qemu-utils)", error))?;
        let mut server = Self { child };
        server.wait_until_it_listens(image, socket)?;
        Ok(server)
    }

    /// Looks for the socket instead of connecting to it: the server ends with its last client.
    fn wait_until_it_listens(&mut self, image: &ImageFile, socket: &Path) -> Result<()> {
        let deadline = Instant::now() + START_TIMEOUT;
        while !socket.exists() {
            if let Ok(Some(_)) = self.child.try_wait() {
                return Err(image.failure("read", &self.complaint()));
            }
            if Instant::now() >= deadline {
                return Err(HypervisorError::Timeout {
                    action: format!("qemu-nbd opening {}", image.key()),
                    timeout_ms: crate::qmp::milliseconds(START_TIMEOUT),
                });
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    fn complaint(&mut self) -> String {
        let mut text = Vec::new();
        if let Some(errors) = self.child.stderr.take() {
            // What cannot be read is missing in the message.
            let _ = errors.take(MAX_COMPLAINT_BYTES).read_to_end(&mut text);
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Ends it. It only reads, so it may be ended at any point.
    pub fn end(self) {
        drop(self);
    }
}

impl Drop for ImageServer {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ends the server that a killed job started at `socket`; answers whether there was one. It is
/// known by its arguments, because process numbers are used again.
pub(super) fn end_leftover(socket: &Path) -> Result<bool> {
    let Some(process) = find(socket) else {
        return Ok(false);
    };
    rustix::process::kill_process(process, Signal::KILL)
        .map_err(|error| HypervisorError::io("end a qemu-nbd that a killed job left", error))?;
    let deadline = Instant::now() + START_TIMEOUT;
    while find(socket).is_some() && Instant::now() < deadline {
        std::thread::sleep(POLL);
    }
    Ok(true)
}

fn find(socket: &Path) -> Option<Pid> {
    let wanted = socket.as_os_str().as_encoded_bytes();
    for entry in std::fs::read_dir("/proc").ok()?.flatten() {
        let number = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok());
        let Some(pid) = number.and_then(Pid::from_raw) else { continue };
        let path: PathBuf = entry.path().join("cmdline");
        let Ok(line) = std::fs::read(path) else { continue };
        let mut arguments = line.split(|byte| *byte == 0);
        let is_ours = arguments.next().is_some_and(|program| program.ends_with(b"qemu-nbd"))
            && arguments.any(|argument| argument == wanted);
        if is_ours {
            return Some(pid);
        }
    }
    None
}
