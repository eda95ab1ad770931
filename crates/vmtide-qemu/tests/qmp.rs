//! The monitor client against a server that does what the test says.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "outside of test functions too, a failure here is a failed test"
)]

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use vmtide_hypervisor::{Hypervisor, HypervisorError};
use vmtide_qemu::qmp::{QmpClient, QmpError};
use vmtide_qemu::{Address, QemuTarget, QemuVm};

const GREETING: &str =
    r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}}, "capabilities": []}}"#;
/// For what must run out.
const SHORT: Duration = Duration::from_millis(300);
/// For what must not, also on a busy machine.
const LONG: Duration = Duration::from_secs(20);

struct Server {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

impl Server {
    /// Answers one connection with `script`.
    fn start(script: impl FnOnce(BufReader<UnixStream>) + Send + 'static) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fake.qmp");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            script(BufReader::new(stream));
        });
        Self { _directory: directory, path }
    }

    fn connect(&self) -> Result<QmpClient, QmpError> {
        self.connect_within(LONG)
    }

    fn connect_within(&self, timeout: Duration) -> Result<QmpClient, QmpError> {
        QmpClient::connect(&Address::Unix(self.path.clone()), timeout)
    }
}

fn send(stream: &mut BufReader<UnixStream>, text: &str) {
    // The client may have given up already.
    let _ = stream.get_mut().write_all(format!("{text}\n").as_bytes());
}

fn receive(stream: &mut BufReader<UnixStream>) -> Value {
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap_or_default()
}

/// Greets and answers `qmp_capabilities`.
fn greet(stream: &mut BufReader<UnixStream>) {
    send(stream, GREETING);
    let id = receive(stream)["id"].clone();
    send(stream, &json!({"return": {}, "id": id}).to_string());
}

#[test]
fn answers_are_matched_by_id_and_events_kept() {
    let server = Server::start(|mut stream| {
        greet(&mut stream);
        let first = receive(&mut stream)["id"].clone();
        send(&mut stream, r#"{"event": "STOP", "timestamp": {}}"#);
        std::thread::sleep(SHORT * 2);
        // Too late for the first, and answered only now.
        let second = receive(&mut stream)["id"].clone();
        send(&mut stream, &json!({"return": "first", "id": first}).to_string());
        send(&mut stream, r#"{"event": "RESUME", "timestamp": {}}"#);
        send(&mut stream, &json!({"return": "second", "id": second}).to_string());
        let third = receive(&mut stream)["id"].clone();
        let error = json!({"class": "GenericError", "desc": "no\n  way"});
        send(&mut stream, &json!({"error": error, "id": third}).to_string());
        drop(receive(&mut stream));
    });
    let qmp = server.connect().unwrap();
    assert!(qmp.version().at_least(10, 0) && !qmp.version().at_least(10, 1));
    let error = qmp.execute_within("a", json!({}), SHORT).unwrap_err();
    assert!(matches!(error, QmpError::Timeout { timeout_ms: 300, .. }), "{error}");
    assert_eq!(qmp.query("b", json!({})).unwrap(), "second");
    let events: Vec<_> = qmp.take_events().iter().map(|e| e["event"].clone()).collect();
    assert_eq!(events, ["STOP", "RESUME"]);
    let error = qmp.query("c", json!({})).unwrap_err();
    assert_eq!(error.to_string(), "QEMU refused c: no way");
    assert!(!error.is_connection());
}

/// QEMU says to the next client what the last one, which was killed, had not read.
#[test]
fn what_was_meant_for_an_earlier_client_is_passed_over() {
    let server = Server::start(|mut stream| {
        send(&mut stream, r#"rn": {}, "id": 7}"#);
        send(&mut stream, r#"{"return": {}, "id": 1}"#);
        send(&mut stream, r#"{"event": "STOP", "timestamp": {}}"#);
        send(&mut stream, r#"{"error": {"class": "GenericError", "desc": "x"}, "id": "y"}"#);
        greet(&mut stream);
        let id = receive(&mut stream)["id"].clone();
        // The same numbers that a client would count with, and those of another of our own.
        for stale in [json!(1), json!(2), json!("vmtide-0123456789abcdef-2")] {
            send(&mut stream, &json!({"return": "stale", "id": stale}).to_string());
        }
        send(&mut stream, &json!({"return": "ours", "id": id}).to_string());
        drop(receive(&mut stream));
    });
    let qmp = server.connect().unwrap();
    assert_eq!(qmp.query("a", json!({})).unwrap(), "ours");
    let endless = Server::start(|mut stream| {
        for _ in 0..10_000 {
            send(&mut stream, r#"{"return": {}, "id": 1}"#);
        }
        drop(receive(&mut stream));
    });
    let error = endless.connect().err().unwrap().to_string();
    assert!(error.contains("no greeting"), "{error}");
}

#[test]
fn nonsense_silence_and_endless_lines_are_errors() {
    type Script = fn(BufReader<UnixStream>);
    let cases: [(&str, Script, &str); 7] = [
        ("silent", |mut stream| drop(receive(&mut stream)), "another program may hold"),
        ("closed", drop, "connection lost"),
        ("text", |mut stream| send(&mut stream, "SSH-2.0-OpenSSH_9"), "does not speak QMP"),
        ("no version", |mut stream| send(&mut stream, r#"{"QMP": 5}"#), "does not speak QMP"),
        ("list", |mut stream| send(&mut stream, "[1]"), "does not speak QMP"),
        ("deep", |mut stream| send(&mut stream, &"[".repeat(1 << 20)), "does not speak QMP"),
        (
            "half",
            |mut stream| {
                let _ = stream.get_mut().write_all(&GREETING.as_bytes()[..20]);
                drop(receive(&mut stream));
            },
            "another program may hold",
        ),
    ];
    for (name, script, word) in cases {
        let begun = Instant::now();
        let timeout = if word.starts_with("another") { SHORT } else { LONG };
        let error = Server::start(script).connect_within(timeout).err().unwrap().to_string();
        assert!(error.contains(word), "{name}: {error}");
        assert!(error.len() < 500 && !error.contains('\n'), "{name}: {error}");
        assert!(begun.elapsed() < LONG, "{name}");
    }
}

#[test]
fn a_line_without_end_does_not_fill_the_memory() {
    let server = Server::start(|mut stream| {
        let chunk = vec![b'x'; 1 << 20];
        while stream.get_mut().write_all(&chunk).is_ok() {}
    });
    let address = Address::Unix(server.path.clone());
    let error = QmpClient::connect(&address, Duration::from_secs(60)).err().unwrap();
    assert!(error.to_string().contains("16777216 bytes"), "{error}");
}

#[test]
fn a_connection_that_broke_stays_broken() {
    let server = Server::start(|mut stream| {
        greet(&mut stream);
        drop(receive(&mut stream));
        send(&mut stream, r#"{"return": 1}"#);
        std::thread::sleep(SHORT);
    });
    let qmp = server.connect().unwrap();
    let error = qmp.query("a", json!({})).unwrap_err();
    assert!(matches!(error, QmpError::Protocol { .. }), "{error}");
    let error = qmp.query("b", json!({})).unwrap_err();
    assert!(matches!(error, QmpError::Closed { .. }) && error.is_connection(), "{error}");
}

#[test]
fn a_busy_monitor_does_not_hang_the_connect() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("busy.qmp");
    // Nobody accepts; when the queue is full a plain connect would block for ever.
    let listener = UnixListener::bind(&path).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _first = UnixStream::connect(&path).unwrap();
    for _ in 0..3 {
        let begun = Instant::now();
        let error = QmpClient::connect(&Address::Unix(path.clone()), SHORT).err().unwrap();
        assert!(error.to_string().contains("another program"), "{error}");
        assert!(begun.elapsed() < LONG);
    }
}

#[test]
fn answers_without_sense_are_no_disks_and_no_panic() {
    for junk in [json!(null), json!(5), json!("x"), json!([1, null, {"inserted": []}]), json!({})] {
        let server = Server::start(move |mut stream| {
            greet(&mut stream);
            loop {
                let request = receive(&mut stream);
                if request.is_null() {
                    return;
                }
                send(&mut stream, &json!({"return": junk, "id": request["id"]}).to_string());
            }
        });
        let state = tempfile::tempdir().unwrap();
        let vm = QemuVm::new(QemuTarget::new(&server.path, state.path()));
        let config = vm.describe("").unwrap();
        assert!(config.disks.is_empty());
        assert_eq!(config.name, "fake");
    }
}

#[test]
fn sockets_that_are_not_there_say_what_to_do() {
    let state = tempfile::tempdir().unwrap();
    let missing = QemuVm::new(QemuTarget::new("/nonexistent/vm.qmp", state.path()));
    let error = missing.list().unwrap_err();
    assert!(matches!(error, HypervisorError::NotFound { .. }), "{error}");
    let stale = state.path().join("stale.qmp");
    drop(UnixListener::bind(&stale).unwrap());
    let error = QemuVm::new(QemuTarget::new(&stale, state.path())).list().unwrap_err();
    assert!(matches!(error, HypervisorError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("is the VM running"), "{error}");
}
