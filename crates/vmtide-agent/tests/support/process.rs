//! An agent in a process of its own, whose memory and handles can be measured from outside.
//!
//! The process is the test program itself, run with one test that is the agent.

use super::agent::{Keys, options, prepare};
use super::client::Client;
use super::provider::{TestDisk, TestProvider};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};

use std::time::{Duration, Instant};
use tempfile::TempDir;
use vmtide_agent::limits::Limits;
use vmtide_agent::provider::DiskProvider;
use vmtide_block::{ByteRange, CancelToken};

/// Names the directory of the agent to the process.
const DIRECTORY: &str = "VMTIDE_TEST_AGENT_PROCESS";
/// How many ranges of the big disk have changed, and the largest body with ranges.
const RANGES: &str = "VMTIDE_TEST_AGENT_RANGES";
const BODY_BYTES: &str = "VMTIDE_TEST_AGENT_BODY_BYTES";

pub const BIG_BYTES: u64 = 1 << 40;
pub const GOOD_BYTES: usize = 1 << 20;

/// The range number `at` of the big disk that has changed since `rctX:1`.
pub fn changed(at: u64) -> ByteRange {
    ByteRange::new(at << 20, 512)
}

/// What the test that is the agent does; nothing where it is not run by [`Process::start`].
pub fn serve() {
    let Ok(directory) = std::env::var(DIRECTORY) else { return };
    let number = |name| std::env::var(name).unwrap().parse::<u64>().unwrap();
    let big = TestDisk::pattern(BIG_BYTES);
    big.changed_since("rctX:1", (0..number(RANGES)).map(changed).collect());
    let good = TestDisk::memory(vec![7; GOOD_BYTES]);
    let provider = TestProvider::new(&[("good.vhdx", good), ("big.vhdx", big)]);
    let limits = Limits { range_body_bytes: number(BODY_BYTES), ..Limits::default() };
    let options = options(&PathBuf::from(directory), limits);
    let stop = CancelToken::new();
    std::thread::spawn({
        let stop = stop.clone();
        // The end of the input is the end of the agent.
        move || {
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            stop.cancel();
        }
    });
    let provider: std::sync::Arc<dyn DiskProvider> = provider;
    vmtide_agent::run(&options, provider, &stop, |started| {
        let mut output = std::io::stdout();
        writeln!(output, "\nlistening {}", started.address).unwrap();
        output.flush().unwrap();
    })
    .unwrap();
}

pub struct Process {
    child: Child,
    /// Open until the end: the process says there how its test went.
    _output: BufReader<ChildStdout>,
    pub client: Client,
    pub keys: Keys,
    pub directory: TempDir,
}

impl Process {
    /// Runs the test `test` of this program as an agent.
    pub fn start(test: &str, ranges: u64, body_bytes: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let keys = prepare(directory.path(), &["good.vhdx", "big.vhdx"]);
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--ignored", "--nocapture"])
            .env(DIRECTORY, directory.path())
            .env(RANGES, ranges.to_string())
            .env(BODY_BYTES, body_bytes.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let address = (&mut output)
            .lines()
            .map(Result::unwrap)
            .find_map(|line| line.strip_prefix("listening ").map(str::to_owned))
            .unwrap();
        let certificate = directory.path().join("state/agent-cert.pem");
        let client = Client::new(address.parse().unwrap(), &certificate, &keys.reader);
        Self { child, _output: output, client, keys, directory }
    }

    pub fn path(&self, disk: &str) -> String {
        self.directory.path().join("disks").join(disk).display().to_string()
    }

    fn status(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }

    /// Memory in use now, in bytes.
    pub fn memory(&self) -> u64 {
        self.status("VmRSS")
    }

    /// The most memory that was in use since [`forget_peak`](Self::forget_peak).
    pub fn peak_memory(&self) -> u64 {
        self.status("VmHWM")
    }

    /// Lets the count of the peak begin anew (proc(5), `clear_refs`).
    pub fn forget_peak(&self) {
        std::fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5").unwrap();
    }

    /// Open handles.
    pub fn handles(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// Waits until it has no more handles than `most`.
    pub fn wait_for_handles(&self, most: usize) {
        let began = Instant::now();
        while self.handles() > most {
            let late = began.elapsed() > Duration::from_secs(60);
            assert!(!late, "{} handles are left of {most}", self.handles());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let ended = self.child.wait().unwrap();
        assert!(ended.success() || std::thread::panicking(), "the agent failed: {ended}");
    }
}
