//! A small process that lets the guest go when the job that holds it dies.
//!
//! While a guest's file systems are frozen or its processors paused, a job that is killed would
//! leave it so. Before either, the job starts its own executable again as a guardian, connected by
//! a pipe, and tells it each step. When the pipe ends without a farewell, the guardian undoes what
//! was under way: it thaws through the guest agent and continues through the monitor, both free
//! then, because their sockets died with the job. It also thaws when the job lives but holds the
//! file systems past a deadline; the job keeps no connection to the agent meanwhile.
//!
//! After the job's death it leaves a mark beside the job's journal when the guest was let go, so
//! that the next job does not take for the dead one's what somebody else holds later.
//!
//! The words on the pipe, one a line: `frozen`, `thawed`, `paused`, `resumed`, `done` from the job
//! (each *before* a hold and *after* a release); `ready`, and at the end `released` (there was
//! nothing to do) or `expired` (the deadline had passed) from the guardian.

use crate::agent::{self, FreezeStatus, GuestAgent};
use crate::channel::Address;
use crate::process;
use crate::qmp::{QmpClient, milliseconds};
use serde_json::json;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use vmtide_hypervisor::Journal;

/// The hidden command under which an executable must call [`run`].
pub const COMMAND: &str = "internal-guardian";

/// How long a guardian may take to start.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a guardian keeps trying to let a guest go. A guest agent that hangs may come back;
/// an agent or QEMU that ended needs nothing.
const PATIENCE: Duration = Duration::from_secs(300);

/// The pause between two tries.
const RETRY: Duration = Duration::from_millis(250);

/// Runs a guardian with the arguments that follow [`COMMAND`], on standard input and output.
/// Returns the exit code. Never call it for anything a user typed.
pub fn run(arguments: impl IntoIterator<Item = String>) -> i32 {
    let Some(spec) = Spec::parse(arguments) else {
        eprintln!("{COMMAND}: for vmtide's own use");
        return 2;
    };
    if say("ready").is_err() {
        return 1;
    }
    let (sender, words) = mpsc::channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let Ok(line) = line else { break };
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    spec.watch(&words)
}

fn say(word: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{word}")?;
    out.flush()
}

/// What a guardian has to know.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Spec {
    qmp: Address,
    agent: Option<Address>,
    /// The mark to leave when the guest was let go after the job's death.
    mark: Option<PathBuf>,
    deadline: Duration,
}

#[derive(Clone, Copy, Default)]
struct Holds {
    frozen_since: Option<Instant>,
    paused: bool,
    /// The deadline passed and thawing failed.
    stuck: bool,
}

impl Spec {
    fn parse(arguments: impl IntoIterator<Item = String>) -> Option<Self> {
        let mut spec = Self {
            qmp: Address::Tcp(String::new()),
            agent: None,
            mark: None,
            deadline: Duration::ZERO,
        };
        let mut arguments = arguments.into_iter();
        while let Some(key) = arguments.next() {
            let value = arguments.next()?;
            match key.as_str() {
                "qmp-unix" => spec.qmp = Address::Unix(value.into()),
                "qmp-tcp" => spec.qmp = Address::Tcp(value),
                "agent-unix" => spec.agent = Some(Address::Unix(value.into())),
                "agent-tcp" => spec.agent = Some(Address::Tcp(value)),
                "mark" => spec.mark = Some(value.into()),
                "deadline-ms" => spec.deadline = Duration::from_millis(value.parse().ok()?),
                _ => return None,
            }
        }
        let known = spec.qmp != Address::Tcp(String::new()) && !spec.deadline.is_zero();
        known.then_some(spec)
    }

    fn to_arguments(&self) -> Vec<String> {
        let mut arguments = vec!["deadline-ms".to_owned(), milliseconds(self.deadline).to_string()];
        let mut add = |what: &str, address: &Address| {
            let kind = match address {
                Address::Unix(_) => "unix",
                Address::Tcp(_) => "tcp",
            };
            arguments.extend([format!("{what}-{kind}"), address.to_string()]);
        };
        add("qmp", &self.qmp);
        if let Some(agent) = &self.agent {
            add("agent", agent);
        }
        if let Some(mark) = &self.mark {
            arguments.extend(["mark".to_owned(), mark.display().to_string()]);
        }
        arguments
    }

    fn watch(&self, words: &mpsc::Receiver<String>) -> i32 {
        let mut holds = Holds::default();
        let mut expired = false;
        loop {
            let wait = match holds.frozen_since {
                Some(since) => (since + self.deadline).saturating_duration_since(Instant::now()),
                None => Duration::from_secs(3600),
            };
            match words.recv_timeout(wait) {
                Ok(word) => match word.as_str() {
                    "frozen" => holds.frozen_since = Some(Instant::now()),
                    "thawed" => (holds.frozen_since, holds.stuck) = (None, false),
                    "paused" => holds.paused = true,
                    "resumed" => holds.paused = false,
                    "done" => {
                        // Nobody may be left to hear it.
                        let _ = say(if expired { "expired" } else { "released" });
                        return 0;
                    }
                    _ => {}
                },
                Err(mpsc::RecvTimeoutError::Timeout) if holds.frozen_since.is_some() => {
                    expired = true;
                    holds.frozen_since = None;
                    holds.stuck = !self.thaw();
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    if self.release(holds) {
                        self.leave_mark();
                    }
                    return 0;
                }
            }
        }
    }

    /// The job is gone: undo its holds, the pause first, because a paused guest cannot thaw.
    /// Answers whether nothing is held any more.
    fn release(&self, holds: Holds) -> bool {
        let resumed = !holds.paused || self.resume();
        let thawed = holds.frozen_since.is_none() || self.thaw();
        resumed && thawed && !holds.stuck
    }

    /// Leaves the mark where the job's journal is still there.
    fn leave_mark(&self) {
        if let Some(mark) = &self.mark
            && Journal::file_of_mark(mark).exists()
        {
            // Without it the next job looks at the guest itself.
            let _ = std::fs::write(mark, "");
        }
    }

    /// Answers whether the file systems run, or QEMU has ended.
    fn thaw(&self) -> bool {
        let Some(agent) = &self.agent else { return true };
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            let thawed = GuestAgent::connect(agent, agent::SYNC_TIMEOUT).and_then(|mut agent| {
                agent.thaw()?;
                agent.status()
            });
            match thawed {
                Ok(FreezeStatus::Thawed) => return true,
                Ok(FreezeStatus::Frozen) | Err(_) => std::thread::sleep(RETRY),
            }
            if self.qemu_is_gone() {
                return true;
            }
        }
        false
    }

    /// Answers whether the guest runs, or QEMU has ended.
    fn resume(&self) -> bool {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            match QmpClient::connect(&self.qmp, Duration::from_secs(5)) {
                Ok(qmp) => {
                    let status = qmp.query("query-status", json!({}));
                    match status.map(|status| status["status"] == "paused") {
                        Ok(false) => return true,
                        Ok(true) if qmp.execute("cont", json!({})).is_ok() => return true,
                        _ => {}
                    }
                }
                Err(_) if self.qemu_is_gone() => return true,
                Err(_) => {}
            }
            std::thread::sleep(RETRY);
        }
        false
    }

    /// Whether nobody listens on the monitor any more.
    fn qemu_is_gone(&self) -> bool {
        use crate::qmp::QmpError;
        use std::io::ErrorKind::{ConnectionRefused, NotFound};
        matches!(
            QmpClient::connect(&self.qmp, Duration::from_millis(100)),
            Err(QmpError::Connect { source, .. }) if matches!(source.kind(), ConnectionRefused | NotFound)
        )
    }
}

/// The job's end of the pipe to its guardian. Dropping it lets the guardian act.
pub(crate) struct Guardian {
    child: Child,
    input: Option<ChildStdin>,
    answers: mpsc::Receiver<String>,
}

impl Guardian {
    /// Starts `executable` as the guardian of the VM at `qmp` and waits until it watches. The
    /// file systems are thawed `deadline` after [`frozen`](Self::tell) at the latest.
    pub fn start(
        executable: &Path,
        qmp: &Address,
        agent: Option<&Address>,
        released_mark: &Path,
        deadline: Duration,
    ) -> Result<Self, String> {
        let mark = Some(released_mark.to_owned());
        let spec = Spec { qmp: qmp.clone(), agent: agent.cloned(), mark, deadline };
        // Its own process group: an interrupt typed at the terminal ends the job, not the guardian.
        let mut child = process::command(executable)
            .arg(COMMAND)
            .args(spec.to_arguments())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(|error| format!("start {}: {error}", executable.display()))?;
        let input = child.stdin.take();
        let (sender, answers) = mpsc::channel();
        if let Some(output) = child.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(output.take(64 * 1024)).lines() {
                    let Ok(line) = line else { break };
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        let guardian = Self { child, input, answers };
        guardian
            .hear(&["ready"], START_TIMEOUT)
            .map_err(|error| format!("{} does not start: {error}", executable.display()))?;
        Ok(guardian)
    }

    /// Says what is about to be held or was let go.
    pub fn tell(&mut self, word: &str) -> Result<(), String> {
        let input = self.input.as_mut().ok_or("the guardian was dismissed")?;
        writeln!(input, "{word}")
            .and_then(|()| input.flush())
            .map_err(|error| format!("the guardian is gone: {error}"))
    }

    /// Everything was let go: ends the guardian. Answers whether it had to act before.
    pub fn dismiss(mut self) -> Result<bool, String> {
        self.tell("done")?;
        let word = self.hear(&["released", "expired"], START_TIMEOUT)?;
        drop(self.input.take());
        // It is about to exit; waiting only collects it.
        let _ = self.child.wait();
        Ok(word == "expired")
    }

    fn hear(&self, words: &[&str], timeout: Duration) -> Result<String, String> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.answers.recv_timeout(left) {
                Ok(line) if words.contains(&line.as_str()) => return Ok(line),
                Ok(_) => {}
                Err(mpsc::RecvTimeoutError::Timeout) => return Err("no answer in time".into()),
                Err(mpsc::RecvTimeoutError::Disconnected) => return Err("it has ended".into()),
            }
        }
    }
}

impl Drop for Guardian {
    /// The guardian acts on the closed pipe by itself; it is collected where it already ended.
    fn drop(&mut self) {
        drop(self.input.take());
        // Not waited for: it may keep trying for minutes.
        let _ = self.child.try_wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guardian_understands_what_it_is_told() {
        let spec = Spec {
            qmp: Address::Unix("/run/a b.qmp".into()),
            agent: Some(Address::Tcp("[::1]:9".into())),
            mark: Some("/var/lib/a b/1.released".into()),
            deadline: Duration::from_millis(90_000),
        };
        assert_eq!(Spec::parse(spec.to_arguments()), Some(spec));
        for wrong in [&["qmp-unix"][..], &["deadline-ms", "x"], &["a", "b"], &[]] {
            assert_eq!(Spec::parse(wrong.iter().map(ToString::to_string)), None);
        }
    }
}
