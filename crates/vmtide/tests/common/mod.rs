//! What the tests of the command line share: running the program with an environment of its own.

pub mod disks;

use assert_cmd::Command;
use serde_json::Value;
use std::path::{Path, PathBuf};

pub const PASSWORD: &str = "correct horse battery staple";

/// A directory with a repository-to-be, a state directory and no settings of this machine.
pub struct Place {
    pub directory: tempfile::TempDir,
}

/// How one run ended.
pub struct Run {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    /// The events of `--json`.
    pub fn events(&self) -> Vec<Value> {
        let parse = |line: &str| {
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
        };
        self.stdout.lines().map(parse).collect()
    }

    /// The last event, which must be a summary.
    pub fn summary(&self) -> Value {
        let last = self.events().pop().unwrap_or_else(|| panic!("no events: {}", self.stderr));
        assert_eq!(last["type"], "summary", "{last}");
        last
    }

    /// Fails unless it ended with this code.
    pub fn must_end_with(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        self
    }
}

impl Place {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { directory }
    }

    /// A place with a repository.
    pub fn with_repository() -> Self {
        let place = Self::new();
        place.run(&["init", place.repository().to_str().unwrap()]).must_end_with(0);
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    pub fn repository(&self) -> PathBuf {
        self.path("repository")
    }

    /// A disk image with data in its first half.
    pub fn image(&self, name: &str, size: usize) -> PathBuf {
        let path = self.path(name);
        let mut bytes = vec![0u8; size];
        for (at, byte) in bytes[..size / 2].iter_mut().enumerate() {
            *byte = u8::try_from((at / 512 * 7 + at) % 251).unwrap();
        }
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// The program, with the password in the environment and `-r` set.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("vmtide"));
        command
            .args(arguments)
            .current_dir(self.directory.path())
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.directory.path())
            .env("XDG_STATE_HOME", self.path("state"))
            .env("XDG_CONFIG_HOME", self.path("config"))
            .env("VMTIDE_PASSWORD", PASSWORD)
            .env("VMTIDE_REPOSITORY", self.repository())
            .timeout(std::time::Duration::from_secs(600));
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Run {
        finish(&mut self.command(arguments))
    }
}

/// Runs a command to its end.
pub fn finish(command: &mut Command) -> Run {
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Run {
        code: output.status.code().unwrap_or(-1),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    }
}

/// All files below a directory.
pub fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![directory.to_path_buf()];
    while let Some(directory) = waiting.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                waiting.push(path);
            } else {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}
