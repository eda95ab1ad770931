//! A guest agent that does what the test says.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    Good,
    FreezeFails,
    /// Freezes, but never answers that it did.
    FreezeHangs,
    /// Freezes and closes the connection.
    FreezeDies,
    /// Freezes and thaws by itself at once, as Windows does after ten seconds.
    ThawsItself,
    FreezesNothing,
    Silent,
}

/// A scripted guest agent behind a socket.
pub struct FakeAgent {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    frozen: bool,
    log: Vec<String>,
}

impl FakeAgent {
    pub fn start(path: &Path, behaviour: Behaviour) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            // One conversation at a time, as behind a serial port.
            for stream in listener.incoming() {
                serve(&stream.unwrap(), behaviour, &shared);
            }
        });
        Self { state }
    }

    pub fn is_frozen(&self) -> bool {
        self.state.lock().unwrap().frozen
    }

    pub fn log(&self) -> Vec<String> {
        self.state.lock().unwrap().log.clone()
    }

    pub fn was_frozen(&self) -> bool {
        self.log().iter().any(|command| command.contains("freeze-freeze"))
    }

    pub fn wait_until_thawed(&self, patience: Duration) -> bool {
        let deadline = std::time::Instant::now() + patience;
        while self.is_frozen() {
            if std::time::Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        true
    }
}

fn serve(stream: &UnixStream, behaviour: Behaviour, state: &Mutex<State>) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        match reader.read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if behaviour == Behaviour::Silent {
            continue;
        }
        line.retain(|byte| *byte != 0xff);
        let request: Value = serde_json::from_slice(&line).unwrap();
        let command = request["execute"].as_str().unwrap();
        let mut state = state.lock().unwrap();
        state.log.push(command.to_owned());
        let answer = match command {
            "guest-sync-delimited" => json!({"return": request["arguments"]["id"]}),
            "guest-fsfreeze-status" => {
                json!({"return": if state.frozen { "frozen" } else { "thawed" }})
            }
            "guest-fsfreeze-thaw" => {
                let count = u64::from(std::mem::take(&mut state.frozen));
                json!({"return": count})
            }
            "guest-fsfreeze-freeze" => {
                state.frozen = !matches!(
                    behaviour,
                    Behaviour::FreezeFails | Behaviour::ThawsItself | Behaviour::FreezesNothing
                );
                match behaviour {
                    Behaviour::FreezeFails => {
                        json!({"error": {"class": "GenericError", "desc": "a hook said no"}})
                    }
                    Behaviour::FreezeHangs => continue,
                    Behaviour::FreezeDies => return,
                    Behaviour::FreezesNothing => json!({"return": 0}),
                    _ => json!({"return": 2}),
                }
            }
            other => json!({"error": {"class": "CommandNotFound", "desc": other}}),
        };
        drop(state);
        let mut out = stream;
        if command == "guest-sync-delimited" {
            // What an earlier conversation left in the pipe, and the mark.
            out.write_all(b"{\"return\": 99}\n\xff").unwrap();
        }
        let _ = out.write_all(format!("{answer}\n").as_bytes());
    }
}
