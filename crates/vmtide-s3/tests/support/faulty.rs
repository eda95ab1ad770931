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

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    /// Path and query; of a bucket in the host without the bucket.
    pub target: String,
    /// With names in lower case.
    pub headers: Vec<(String, String)>,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|header| header.0 == name).map(|header| &*header.1)
    }
}

/// The headers that an upload began with, and its parts by number.
type Upload = (Vec<(String, String)>, BTreeMap<u32, Vec<u8>>);

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Object>,
    /// Parts of uploads that are not complete, by upload, with the headers they began with.
    uploads: BTreeMap<String, Upload>,
    faults: VecDeque<Fault>,
    seen: Vec<String>,
    requests: Vec<Seen>,
    denies_removal: bool,
    honours_conditions: bool,
    lists_late: bool,
    pages: Pages,
    keeps_versions: bool,
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

    /// Answers from now on as a bucket with object lock, of which one may not ask whether it keeps
    /// versions. Each object has one.
    pub fn keep_versions(&self) {
        self.state.lock().unwrap().keeps_versions = true;
    }

    /// The mode that an object is kept in, by its path.
    pub fn mode_of(&self, path: &str) -> Option<String> {
        let state = self.state.lock().unwrap();
        let mut kept = state.objects.get(path)?.kept.iter();
        kept.find(|header| header.0 == "x-amz-object-lock-mode").map(|header| header.1.clone())
    }

    /// How listings go on from now on.
    pub fn pages(&self, pages: Pages) {
        self.state.lock().unwrap().pages = pages;
    }

    /// The requests until now, method and path.
    pub fn seen(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().seen)
    }

    /// Everything that was asked until now, with headers.
    pub fn requests(&self) -> Vec<Seen> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }

    /// From now on the policy of whatever keys are used has no `s3:DeleteObject`.
    pub fn deny_removal(&self) {
        self.state.lock().unwrap().denies_removal = true;
    }

    /// The paths of all objects, `/bucket/…`.
    pub fn paths(&self) -> Vec<String> {
        self.state.lock().unwrap().objects.keys().cloned().collect()
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
            let (method, target, headers) = (method.clone(), target.clone(), headers.clone());
            state.requests.push(Seen { method, target, headers });
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
        let target = with_bucket(&target, header("host").unwrap_or_default());
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
        if method == "DELETE" && state.denies_removal && !query.contains("uploadId") {
            return error(403, "AccessDenied");
        }
        if let Some(answer) = locking(&mut state, method, path, query, &body) {
            return answer;
        }
        if let Some(answer) = in_parts(&mut state, method, path, query, headers, &body) {
            return answer;
        }
        let asks_for_version = method == "HEAD" && query.contains("versionId");
        if !query.is_empty() && !asks_for_version {
            return error(501, "NotImplemented");
        }
        match method {
            "PUT" => {
                let conditional = state.honours_conditions && header("if-none-match").is_some();
                if conditional && state.objects.contains_key(path) {
                    return error(412, "PreconditionFailed");
                }
                let kept = headers.iter().filter(|header| header.0.starts_with("x-amz-meta-"));
                let mut kept: Vec<_> = kept.cloned().collect();
                if state.keeps_versions {
                    kept.push(("x-amz-version-id".into(), "1".into()));
                }
                let object = Object { content: body, kept, modified: jiff::Timestamp::now() };
                state.objects.insert(path.to_owned(), object);
                (200, Vec::new(), Vec::new())
            }
            "DELETE" => {
                state.objects.remove(path);
                let marker = ("x-amz-version-id".into(), "marker".into());
                (204, if state.keeps_versions { vec![marker] } else { Vec::new() }, Vec::new())
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

type Answer = (u16, Vec<(String, String)>, Vec<u8>);

/// The path with the bucket in it, where the request has the bucket in the name of its host
/// (`bucket.s3.example`), also as a proxy is asked (`http://bucket.s3.example/key`).
fn with_bucket(target: &str, host: &str) -> String {
    let path = match target.strip_prefix("http://") {
        Some(rest) => rest.split_once('/').map_or("/".into(), |(_, path)| format!("/{path}")),
        None => target.to_owned(),
    };
    match host.strip_prefix("bucket.") {
        Some(_) => format!("/bucket{path}"),
        None => path,
    }
}

/// Objects that are sent in parts.
fn in_parts(
    state: &mut State,
    method: &str,
    path: &str,
    query: &str,
    headers: &[(String, String)],
    body: &[u8],
) -> Option<Answer> {
    let part = |name: &str| query.split('&').find_map(|part| part.strip_prefix(name));
    let done = || (200, Vec::new(), Vec::new());
    match method {
        "POST" if query.starts_with("uploads") => {
            let id = format!("upload-{}", state.uploads.len());
            let kept = headers.iter().filter(|header| header.0.starts_with("x-amz-meta-"));
            state.uploads.insert(id.clone(), (kept.cloned().collect(), BTreeMap::new()));
            let xml = format!(
                "<InitiateMultipartUploadResult><UploadId>{id}</UploadId>\
                 </InitiateMultipartUploadResult>"
            );
            Some((200, Vec::new(), xml.into_bytes()))
        }
        "PUT" => {
            let (number, id) = (part("partNumber=")?, part("uploadId=")?);
            let (_, parts) = state.uploads.get_mut(id)?;
            parts.insert(number.parse().unwrap(), body.to_vec());
            Some((200, vec![("etag".into(), format!("\"{number}\""))], Vec::new()))
        }
        "POST" => {
            let (kept, parts) = state.uploads.remove(part("uploadId=")?)?;
            let content = parts.into_values().flatten().collect();
            let object = Object { content, kept, modified: jiff::Timestamp::now() };
            state.objects.insert(path.to_owned(), object);
            let xml = b"<CompleteMultipartUploadResult></CompleteMultipartUploadResult>";
            Some((200, Vec::new(), xml.to_vec()))
        }
        "DELETE" => state.uploads.remove(part("uploadId=")?).map(|_| done()),
        _ => None,
    }
}

/// What concerns versions and object lock: what is locked is not removed, its time not shortened,
/// its mode not weakened.
fn locking(
    state: &mut State,
    method: &str,
    path: &str,
    query: &str,
    body: &[u8],
) -> Option<Answer> {
    if !state.keeps_versions {
        return None;
    }
    let denied = || (403, Vec::new(), b"<Error><Code>AccessDenied</Code></Error>".to_vec());
    if query.starts_with("prefix=") && query.contains("versions") {
        let key = query.split('&').find_map(|part| part.strip_prefix("prefix=")).unwrap();
        let key = key.replace("%2F", "/");
        let xml = format!(
            "<ListVersionsResult><Version><Key>{key}</Key><VersionId>1</VersionId></Version>\
             </ListVersionsResult>"
        );
        return Some((200, Vec::new(), xml.into_bytes()));
    }
    const MODE: &str = "x-amz-object-lock-mode";
    const UNTIL: &str = "x-amz-object-lock-retain-until-date";
    let object = state.objects.get_mut(path)?;
    let kept = |name| object.kept.iter().find(|header| header.0 == name).map(|h| h.1.clone());
    let (mode, until) = (kept(MODE), kept(UNTIL));
    match method {
        "DELETE" if query.contains("versionId") => {
            if until.is_some() {
                return Some(denied());
            }
            state.objects.remove(path);
            Some((204, Vec::new(), Vec::new()))
        }
        "PUT" if query.starts_with("retention") => {
            let text = std::str::from_utf8(body).unwrap();
            let part = |tag: &str| {
                let rest = text.split_once(&format!("<{tag}>")).unwrap().1;
                rest.split_once('<').unwrap().0.to_owned()
            };
            let (new_mode, new_until) = (part("Mode"), part("RetainUntilDate"));
            let weaker = mode.as_deref() == Some("COMPLIANCE") && new_mode != "COMPLIANCE";
            // As texts they have the order of their times.
            if weaker || until.is_some_and(|until| new_until < until) {
                return Some(denied());
            }
            object.kept.retain(|header| header.0 != MODE && header.0 != UNTIL);
            object.kept.push((MODE.into(), new_mode));
            object.kept.push((UNTIL.into(), new_until));
            Some((200, Vec::new(), Vec::new()))
        }
        _ => None,
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
