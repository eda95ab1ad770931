//! A small S3 server in this process that fails as it is told: errors, torn connections, answers
//! that are lost after the effect, conditions that are passed over, answers that trickle.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing: it is answered.
    None,
    /// This status with this code, without effect.
    Answer(u16, &'static str),
    /// The connection is closed without effect.
    Torn,
    /// It takes effect, and the connection is closed before the answer.
    LostAnswer,
    /// The answer is cut in the middle.
    CutAnswer,
    /// The answer comes in small pieces.
    Slow,
}

struct Object {
    content: Vec<u8>,
    kept: Vec<(String, String)>,
    modified: jiff::Timestamp,
}

/// How listings go on that do not fit in a page of 1,000 keys, or of `max-keys`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pages {
    /// As they should.
    #[default]
    Whole,
    /// They are cut, and only the V1 form of listing could go on.
    Cut,
    /// Each page leads to itself.
    Same,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Object>,
    faults: VecDeque<Fault>,
    seen: Vec<String>,
    honours_conditions: bool,
    lists_late: bool,
    pages: Pages,
}

/// The server. Ends with the process.
#[derive(Clone)]
pub struct FaultyServer {
    state: Arc<Mutex<State>>,
    pub endpoint: String,
}

impl FaultyServer {
    pub fn start(honours_conditions: bool) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let endpoint = format!("http://127.0.0.1:{}", listener.local_addr().unwrap().port());
        let state = Arc::new(Mutex::new(State { honours_conditions, ..State::default() }));
        let server = Self { state, endpoint };
        let own = server.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let own = own.clone();
                std::thread::spawn(move || while own.serve(&stream).is_some() {});
            }
        });
        server
    }

    /// What is to happen to the next requests.
    pub fn plan(&self, faults: &[Fault]) {
        self.state.lock().unwrap().faults.extend(faults);
    }

    /// Listings leave out everything from now on.
    pub fn list_late(&self) {
        self.state.lock().unwrap().lists_late = true;
    }

    /// How listings go on from now on.
    pub fn pages(&self, pages: Pages) {
        self.state.lock().unwrap().pages = pages;
    }

    /// The requests until now, method and path.
    pub fn seen(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().seen)
    }

    /// Answers one request; none where the connection is to end.
    fn serve(&self, stream: &TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
        let mut words = line.split_whitespace();
        let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok()?;
            let Some((name, value)) = line.trim().split_once(':') else { break };
            headers.push((name.to_lowercase(), value.trim().to_owned()));
        }
        let header = |name: &str| headers.iter().find(|header| header.0 == name).map(|h| &*h.1);
        let length = header("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        let fault = {
            let mut state = self.state.lock().unwrap();
            state.seen.push(format!("{method} {target}"));
            state.faults.pop_front().unwrap_or(Fault::None)
        };
        match fault {
            Fault::Torn => return None,
            Fault::Answer(status, code) => {
                let xml = format!("<Error><Code>{code}</Code><Message>as told</Message></Error>");
                return send(stream, status, &[], xml.as_bytes(), &method, Fault::None);
            }
            _ => {}
        }
        let (status, more, content) = self.act(&method, &target, &headers, body);
        match fault {
            Fault::LostAnswer => None,
            _ => send(stream, status, &more, &content, &method, fault),
        }
    }

    fn act(
        &self,
        method: &str,
        target: &str,
        headers: &[(String, String)],
        body: Vec<u8>,
    ) -> (u16, Vec<(String, String)>, Vec<u8>) {
        let mut state = self.state.lock().unwrap();
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let header = |name: &str| headers.iter().find(|header| header.0 == name).map(|h| &*h.1);
        let error = |status, code| {
            (status, Vec::new(), format!("<Error><Code>{code}</Code></Error>").into_bytes())
        };
        if query.contains("list-type") {
            return (200, Vec::new(), list(&state, query).into_bytes());
        }
        if !query.is_empty() {
            return error(501, "NotImplemented");
        }
        match method {
            "PUT" => {
                let conditional = state.honours_conditions && header("if-none-match").is_some();
                if conditional && state.objects.contains_key(path) {
                    return error(412, "PreconditionFailed");
                }
                let kept = headers.iter().filter(|header| header.0.starts_with("x-amz-meta-"));
                let kept = kept.cloned().collect();
                let object = Object { content: body, kept, modified: jiff::Timestamp::now() };
                state.objects.insert(path.to_owned(), object);
                (200, Vec::new(), Vec::new())
            }
            "DELETE" => {
                state.objects.remove(path);
                (204, Vec::new(), Vec::new())
            }
            _ => {
                let Some(Object { content, kept, .. }) = state.objects.get(path) else {
                    return error(404, "NoSuchKey");
                };
                let range = header("range").and_then(|text| text.strip_prefix("bytes="));
                let Some((from, to)) = range.and_then(|text| text.split_once('-')) else {
                    return (200, kept.clone(), content.clone());
                };
                let from: usize = from.parse().unwrap();
                if from >= content.len() {
                    return error(416, "InvalidRange");
                }
                let to = to.parse::<usize>().unwrap().min(content.len() - 1);
                let range = format!("bytes {from}-{to}/{}", content.len());
                (206, vec![("content-range".into(), range)], content[from..=to].to_vec())
            }
        }
    }
}

/// A page of a listing.
fn list(state: &State, query: &str) -> String {
    let part = |name: &str| query.split('&').find_map(|part| part.strip_prefix(name));
    let prefix = format!("/bucket/{}", part("prefix=").unwrap().replace("%2F", "/"));
    let length = part("max-keys=").map_or(1000, |text| text.parse().unwrap());
    let from = part("continuation-token=").filter(|_| state.pages == Pages::Whole);
    let from: usize = from.map_or(0, |text| text.parse().unwrap());
    let keys: Vec<_> = state
        .objects
        .iter()
        .filter(|(key, _)| !state.lists_late && key.starts_with(&prefix))
        .skip(from)
        .collect();
    let mut xml = String::from("<ListBucketResult>");
    for (key, object) in keys.iter().take(length) {
        xml.push_str(&format!(
            "<Contents><Key>{}</Key><Size>{}</Size><LastModified>{}</LastModified></Contents>",
            key.strip_prefix("/bucket/").unwrap(),
            object.content.len(),
            object.modified
        ));
    }
    if keys.len() > length {
        xml.push_str("<IsTruncated>true</IsTruncated>");
        if state.pages != Pages::Cut {
            let next = from + length;
            xml.push_str(&format!("<NextContinuationToken>{next}</NextContinuationToken>"));
        }
    }
    xml + "</ListBucketResult>"
}

fn send(
    mut stream: &TcpStream,
    status: u16,
    headers: &[(String, String)],
    content: &[u8],
    method: &str,
    fault: Fault,
) -> Option<()> {
    let mut head = format!("HTTP/1.1 {status} x\r\n");
    if status != 204 {
        head.push_str(&format!("content-length: {}\r\n", content.len()));
    }
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).ok()?;
    if method == "HEAD" {
        return Some(());
    }
    match fault {
        Fault::CutAnswer => {
            stream.write_all(&content[..content.len() / 2]).ok()?;
            stream.shutdown(std::net::Shutdown::Both).ok()?;
            None
        }
        Fault::Slow => {
            for piece in content.chunks(content.len() / 20 + 1) {
                stream.write_all(piece).ok()?;
                std::thread::sleep(Duration::from_millis(20));
            }
            Some(())
        }
        _ => stream.write_all(content).ok(),
    }
}
