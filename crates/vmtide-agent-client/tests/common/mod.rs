//! A stand-in for an agent: as much of HTTP and of both interfaces as the client's tests need, over a disk in memory,
//! with faults that can be switched on. The real agent is tested with the client in `crates/vmtide/tests`.

use rustls::{ServerConfig, ServerConnection, StreamOwned};
use rustls_pki_types::PrivatePkcs8KeyDer;
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use vmtide_agent_client::frames::FrameWriter;
use vmtide_agent_client::{AgentClient, AgentKey, AgentOptions, AgentUrl, Fingerprint};
use vmtide_block::CancelToken;

pub const KEY: &str = "a-key-for-tests";
pub const DISK: &str = "/vms/web.raw";
pub const KNOWN_ID: &str = "rctX:5f0c1b2a:00000001";

/// What the stand-in has and does; tests change it while it runs.
pub struct State {
    pub disk: Vec<u8>,
    pub v1: bool,
    /// The most bytes of content sent before the connection is cut; one is taken for each answer.
    pub cuts: VecDeque<usize>,
    /// Statuses answered before anything else is looked at.
    pub statuses: VecDeque<u16>,
    /// Codes of errors (409) with which writes of content are answered.
    pub conflicts: VecDeque<&'static str>,
    /// Bytes of bodies after which the connection is cut; one is taken for each body that is longer.
    pub body_cuts: VecDeque<usize>,
    /// Cancelled when the next request has come, which is not answered.
    pub cancels: Option<CancelToken>,
    /// How many requests are carried out without an answer; only `POST` and `PUT` count.
    pub lost_answers: usize,
    /// Bytes of answers with content that are flipped; one is taken for each answer.
    pub flips: VecDeque<usize>,
    /// The answer to a question for changes, as it is sent.
    pub changes: VecDeque<String>,
    pub newer_changes: bool,
    pub requests: Vec<String>,
    /// Streams of frames that were written.
    pub writes: usize,
    /// The format of the disk that a client may make or made; none where it is there from the beginning.
    pub made: Option<String>,
    /// Freezes, as they are listed.
    pub freezes: Vec<serde_json::Value>,
    /// How many freezes were made.
    pub freezes_made: usize,
    /// How many lists of freezes show none, as while one is being made.
    pub empty_lists: usize,
}

pub struct StandIn {
    pub state: Arc<Mutex<State>>,
    pub authority: String,
    pub fingerprint: Fingerprint,
    pub certificate_pem: String,
}

impl StandIn {
    pub fn new(disk: Vec<u8>, v1: bool) -> Self {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".into(), "127.0.0.1".into()])
            .unwrap();
        let certificate = made.cert.der().clone();
        let digest = ring::digest::digest(&ring::digest::SHA256, &certificate);
        let fingerprint = Fingerprint(digest.as_ref().try_into().unwrap());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate],
                PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()).into(),
            )
            .unwrap();
        let config = Arc::new(config);
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let authority = listener.local_addr().unwrap().to_string();
        let state = Arc::new(Mutex::new(State {
            disk,
            v1,
            cuts: VecDeque::new(),
            statuses: VecDeque::new(),
            conflicts: VecDeque::new(),
            body_cuts: VecDeque::new(),
            cancels: None,
            lost_answers: 0,
            flips: VecDeque::new(),
            changes: VecDeque::new(),
            newer_changes: false,
            requests: Vec::new(),
            writes: 0,
            made: None,
            freezes: Vec::new(),
            freezes_made: 0,
            empty_lists: 0,
        }));
        let shared = Arc::clone(&state);
        // It ends with the test's process.
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let (config, state) = (Arc::clone(&config), Arc::clone(&shared));
                std::thread::spawn(move || serve(socket, config, &state));
            }
        });
        Self { state, authority, fingerprint, certificate_pem: made.cert.pem() }
    }

    pub fn url(&self) -> AgentUrl {
        AgentUrl::parse(&format!("agent+https://{}{DISK}", self.authority)).unwrap()
    }

    pub fn options(&self) -> AgentOptions {
        AgentOptions {
            key: Some(AgentKey::new(KEY).unwrap()),
            fingerprint: Some(self.fingerprint),
            ..AgentOptions::default()
        }
    }

    pub fn client(&self) -> AgentClient {
        AgentClient::new(&self.url(), &self.options()).unwrap()
    }

    pub fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap())
    }
}

type Connection = BufReader<StreamOwned<ServerConnection, TcpStream>>;

fn serve(socket: TcpStream, config: Arc<ServerConfig>, state: &Mutex<State>) {
    let Ok(connection) = ServerConnection::new(config) else { return };
    let mut stream = BufReader::new(StreamOwned::new(connection, socket));
    while serve_one(&mut stream, state).is_some() {}
}

/// One request; none ends the connection.
fn serve_one(stream: &mut Connection, state: &Mutex<State>) -> Option<()> {
    let mut line = String::new();
    stream.read_line(&mut line).ok().filter(|read| *read > 0)?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let (mut length, mut key) = (0, String::new());
    loop {
        let mut header = String::new();
        stream.read_line(&mut header).ok().filter(|read| *read > 0)?;
        let Some((name, value)) = header.split_once(':') else { break };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse().ok()?,
            "auth_key" => key = value.trim().to_owned(),
            _ => {}
        }
    }
    let cut_at = {
        let mut state = state.lock().unwrap();
        let applies = state.body_cuts.front().is_some_and(|at| *at < length);
        if applies { state.body_cuts.pop_front() } else { None }
    };
    let mut body = vec![0; cut_at.unwrap_or(length)];
    stream.read_exact(&mut body).ok()?;
    if cut_at.is_some() {
        state.lock().unwrap().requests.push(format!("cut {method} {target}"));
        return None;
    }
    let mut state = state.lock().unwrap();
    state.requests.push(format!("{method} {target}"));
    if let Some(cancel) = state.cancels.take() {
        cancel.cancel();
        return None;
    }
    let (status, answer) = match state.statuses.pop_front() {
        Some(status) => (status, Vec::new()),
        None if key != KEY => (401, Vec::new()),
        None => state.answer(&method, &target, &body),
    };
    if matches!(method.as_str(), "POST" | "PUT") && state.lost_answers > 0 {
        state.lost_answers -= 1;
        return None;
    }
    let is_content = target.contains("/content") && method != "PUT" && status == 200;
    let mut sent = answer.clone();
    if is_content && let Some(at) = state.flips.pop_front() {
        sent[at] ^= 1;
    }
    let cut = if is_content { state.cuts.pop_front() } else { None };
    drop(state);
    let head = format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\n\r\n", answer.len());
    let socket = stream.get_mut();
    socket.write_all(head.as_bytes()).ok()?;
    socket.write_all(&sent[..cut.unwrap_or(sent.len()).min(sent.len())]).ok()?;
    socket.flush().ok()?;
    if cut.is_some() {
        return None;
    }
    Some(())
}

fn conflict(code: &str) -> (u16, Vec<u8>) {
    (409, format!(r#"{{"error":{{"code":"{code}","message":"{code}"}}}}"#).into_bytes())
}

fn range_of(text: &str) -> (usize, usize) {
    let (offset, length) = text.split_once(':').unwrap();
    (offset.parse().unwrap(), length.parse().unwrap())
}

impl State {
    fn answer(&mut self, method: &str, target: &str, body: &[u8]) -> (u16, Vec<u8>) {
        let json = |text: String| (200, text.into_bytes());
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let parameter = |name: &str| {
            query
                .split('&')
                .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
                .map(ToOwned::to_owned)
        };
        let contract = "/vdisk/%2Fvms%2Fweb.raw/";
        if let Some(what) = path.strip_prefix(contract) {
            return match (method, what) {
                ("GET", "info") => json(format!(
                    r#"{{"virtual_size":{},"parent_path":null,"virtual_storage_type":0,"provider_sub_type":2}}"#,
                    self.disk.len()
                )),
                ("GET", "rct") => json(format!(
                    r#"{{"enabled":true,"newer_changes":{},"most_recent_id":"{KNOWN_ID}"}}"#,
                    self.newer_changes
                )),
                ("POST", "content") => {
                    let text = String::from_utf8(body.to_vec()).unwrap();
                    let numbers: Vec<usize> = text
                        .split(|c: char| !c.is_ascii_digit())
                        .filter_map(|digits| digits.parse().ok())
                        .collect();
                    (200, self.disk[numbers[0]..numbers[0] + numbers[1]].to_vec())
                }
                (_, what) if what.ends_with("/changes") => match self.changes.pop_front() {
                    Some(changes) => json(changes),
                    None => (404, b"RCT ID not found".to_vec()),
                },
                _ => (404, Vec::new()),
            };
        }
        if !self.v1 {
            return (404, b"<!DOCTYPE html>".to_vec());
        }
        match (method, path) {
            ("GET", "/v1") => json("{}".into()),
            ("GET", "/v1/disks/changes") => match self.changes.pop_front() {
                Some(changes) => json(changes),
                None => (
                    404,
                    br#"{"error":{"code":"unknown_tracking_id","message":"no such id"}}"#.to_vec(),
                ),
            },
            ("GET", "/v1/disks/content") => {
                let (offset, length) = range_of(&parameter("ranges").unwrap());
                let mut writer = FrameWriter::with_capacity(length);
                for (number, piece) in self.disk[offset..offset + length].chunks(65536).enumerate()
                {
                    let at = (offset + number * 65536) as u64;
                    if piece.iter().all(|byte| *byte == 0) {
                        writer.zeros(at, piece.len() as u64);
                    } else {
                        writer.data(at, piece);
                    }
                }
                (200, writer.finish())
            }
            ("PUT", "/v1/disks/content") => match self.conflicts.pop_front() {
                Some(code) => conflict(code),
                None => self.write(body),
            },
            _ => self.answer_about_making(method, path, body),
        }
    }

    /// Disks that are made, and freezes.
    fn answer_about_making(&mut self, method: &str, path: &str, body: &[u8]) -> (u16, Vec<u8>) {
        let json = |text: String| (200, text.into_bytes());
        match (method, path) {
            ("GET", "/v1/disks") => json(format!(
                r#"{{"virtual_size_bytes":{},"format":"{}"}}"#,
                self.disk.len(),
                self.made.as_deref().unwrap_or("raw")
            )),
            ("POST", "/v1/disks") if self.made.is_some() => conflict("exists"),
            ("POST", "/v1/disks") => {
                let asked: serde_json::Value = serde_json::from_slice(body).unwrap();
                self.made = asked["format"].as_str().map(ToOwned::to_owned);
                let size = usize::try_from(asked["virtual_size_bytes"].as_u64().unwrap()).unwrap();
                self.disk = vec![0; size];
                (201, b"{}".to_vec())
            }
            ("POST", "/v1/freezes") => {
                let asked: serde_json::Value = serde_json::from_slice(body).unwrap();
                self.freezes_made += 1;
                let disks = asked["disks"].as_array().unwrap().iter().map(|path| {
                    serde_json::json!({"path": path, "size_bytes": self.disk.len(), "tracking_id": null})
                });
                let freeze = serde_json::json!({
                    "id": format!("freeze-{}", self.freezes_made),
                    "ttl_seconds": asked["ttl_seconds"],
                    "disks": disks.collect::<Vec<_>>(),
                });
                self.freezes.push(freeze.clone());
                (201, freeze.to_string().into_bytes())
            }
            ("GET", "/v1/freezes") if self.empty_lists > 0 => {
                self.empty_lists -= 1;
                json(r#"{"freezes":[]}"#.into())
            }
            ("GET", "/v1/freezes") => {
                json(serde_json::json!({ "freezes": self.freezes }).to_string())
            }
            ("DELETE", path) if path.starts_with("/v1/freezes/") => {
                let id = path.rsplit('/').next().unwrap();
                self.freezes.retain(|freeze| freeze["id"] != id);
                (204, Vec::new())
            }
            _ => (404, br#"{"error":{"code":"not_found","message":"no such route"}}"#.to_vec()),
        }
    }

    fn write(&mut self, body: &[u8]) -> (u16, Vec<u8>) {
        use vmtide_agent_client::frames::{Frame, FrameReader};
        let mut reader = FrameReader::new();
        reader.push(body);
        self.writes += 1;
        while let Some(frame) = reader.next_frame().unwrap() {
            let at = |offset: u64| usize::try_from(offset).unwrap();
            match frame {
                Frame::Data { offset, content } => {
                    self.disk[at(offset)..at(offset) + content.len()].copy_from_slice(&content);
                }
                Frame::Zero { offset, length } => {
                    self.disk[at(offset)..at(offset + length)].fill(0)
                }
                Frame::End { position } => {
                    let answer =
                        format!(r#"{{"written_bytes":0,"zeroed_bytes":0,"position":{position}}}"#);
                    return (200, answer.into_bytes());
                }
            }
        }
        (422, Vec::new())
    }
}
