//! What the tests share: the tools they hold us against, run in temporary directories.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test program uses some of these, and a failed unwrap is a failed test"
)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vmtide_nbd::{NbdDevice, NbdOptions, NbdUrl};

/// A program that ends with the test.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The command, or a failure that names the missing tool.
pub fn tool(name: &str) -> Command {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&paths).any(|directory| directory.join(name).exists());
    assert!(
        found,
        "{name} is not installed: these tests need qemu-utils, qemu-system, libnbd-bin and nbdkit"
    );
    Command::new(name)
}

/// Runs a tool to its end and returns what it printed; fails the test where it fails.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    );
    assert!(output.status.success(), "{command:?}: {out}{err}");
    out
}

/// Waits until something listens on the socket.
pub fn wait_for_socket(path: &Path, child: &mut Child) {
    let end = Instant::now() + Duration::from_secs(20);
    while std::os::unix::net::UnixStream::connect(path).is_err() {
        assert!(
            child.try_wait().unwrap().is_none(),
            "the server ended before it listened on {}",
            path.display()
        );
        assert!(Instant::now() < end, "nobody listens on {}", path.display());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A temporary directory with servers in it.
pub struct Lab {
    pub directory: tempfile::TempDir,
}

impl Lab {
    pub fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// Starts a server that listens on the socket `name`.
    pub fn serve(&self, command: &mut Command, socket: &str) -> Running {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        wait_for_socket(&self.path(socket), &mut child);
        Running(child)
    }

    /// Serves an image with qemu-nbd on the socket `s`, for up to 8 clients.
    pub fn qemu_nbd(&self, image: &str, format: &str, more: &[&str]) -> Running {
        let mut command = tool("qemu-nbd");
        command
            .args(["-t", "-e", "8", "-f", format, "-k"])
            .arg(self.path("s"))
            .args(more)
            .arg(self.path(image));
        self.serve(&mut command, "s")
    }

    /// The URL of an export on the socket `s`.
    pub fn url(&self, export: &str) -> NbdUrl {
        NbdUrl::unix(self.text("s"), export)
    }

    pub fn connect(&self, export: &str) -> NbdDevice {
        NbdDevice::connect(&self.url(export), &NbdOptions::default()).unwrap()
    }
}

/// Bytes that differ everywhere and depend on `seed`.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(length + 8);
    while out.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend(state.to_le_bytes());
    }
    out.truncate(length);
    out
}
