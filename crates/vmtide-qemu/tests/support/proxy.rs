//! Stands between vmtide and the monitor, and kills vmtide after a chosen command.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

/// A counting relay to a monitor.
pub struct Proxy {
    shared: Arc<Shared>,
}

struct Shared {
    target: PathBuf,
    /// Commands until the kill; negative never kills.
    left: AtomicI64,
    /// Whether the fatal command still reaches QEMU.
    deliver: AtomicU32,
    victim: AtomicU32,
    /// The command at which it was killed.
    fatal: Mutex<String>,
}

impl Proxy {
    pub fn start(path: &Path, target: PathBuf) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let shared = Arc::new(Shared {
            target,
            left: AtomicI64::new(-1),
            deliver: AtomicU32::new(0),
            victim: AtomicU32::new(0),
            fatal: Mutex::new(String::new()),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let shared = Arc::clone(&accepting);
                let stream = stream.unwrap();
                std::thread::spawn(move || relay(&stream, &shared));
            }
        });
        Self { shared }
    }

    /// Kills `process` at the command number `after` (from 0) from now that is no query; with `deliver` QEMU still
    /// gets that command.
    pub fn arm(&self, process: u32, after: i64, deliver: bool) {
        self.shared.victim.store(process, Ordering::SeqCst);
        self.shared.deliver.store(u32::from(deliver), Ordering::SeqCst);
        self.shared.left.store(after, Ordering::SeqCst);
    }

    pub fn disarm(&self) {
        self.shared.left.store(-1, Ordering::SeqCst);
    }

    pub fn fatal_command(&self) -> String {
        self.shared.fatal.lock().unwrap().clone()
    }
}

fn relay(client: &UnixStream, shared: &Shared) {
    let Ok(qemu) = UnixStream::connect(&shared.target) else {
        return;
    };
    let mut answers = qemu.try_clone().unwrap();
    let mut back = client.try_clone().unwrap();
    let reader = std::thread::spawn(move || {
        let _ = std::io::copy(&mut answers, &mut back);
        let _ = back.shutdown(std::net::Shutdown::Both);
    });
    let mut out = &qemu;
    for line in BufReader::new(client).lines() {
        let Ok(line) = line else { break };
        let looks = ["\"query-", "\"qom-get", "\"qom-list", "\"x-debug"];
        let changes = !looks.iter().any(|word| line.contains(word));
        if changes && shared.left.fetch_sub(1, Ordering::SeqCst) == 0 {
            shared.fatal.lock().unwrap().clone_from(&line);
            let victim = shared.victim.load(Ordering::SeqCst);
            if shared.deliver.load(Ordering::SeqCst) == 1 {
                let _ = out.write_all(format!("{line}\n").as_bytes());
            }
            kill(victim);
            break;
        }
        if out.write_all(format!("{line}\n").as_bytes()).is_err() {
            break;
        }
    }
    let _ = qemu.shutdown(std::net::Shutdown::Both);
    let _ = reader.join();
}

/// SIGKILL, to one process of our own.
pub fn kill(process: u32) {
    let raw = i32::try_from(process).unwrap();
    let pid = rustix::process::Pid::from_raw(raw).unwrap();
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}
