//! One request: addressed, signed, sent, and sent again while its failure may pass.

use crate::answer::{Answer, Sink};
use crate::body::ContentBody;
use crate::counts::Counters;
use crate::credentials::Credentials;
use crate::endpoint::Endpoint;
use crate::failure::{Cause, Failure, innermost, words};
use crate::options::S3Options;
use crate::profile::Profile;
use crate::retry::{self, Tries, Verdict};
use crate::spool::Content;
use crate::{connect, xml};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use object_store::aws::{AwsAuthorizer, AwsCredential};
use object_store::client::{HttpRequest, HttpRequestBody};
use std::io::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use vmtide_repo::{RepoError, Result};

/// The most of an answer that is no object's content: a page of 1,000 keys of 1 KiB in XML.
const MAX_DOCUMENT_BYTES: usize = 8 << 20;

/// What one try may take beside the moving of its content.
const TRY_TIME: Duration = Duration::from_secs(60);

/// Content so short that all of it moves within [`TRY_TIME`].
const SHORT_BYTES: u64 = 1 << 20;

/// How many times the patience with anything else long content has while nothing of it moves. What
/// moved last may wait in buffers of this machine, 4 MiB on Linux by default, which at the slowest
/// rate take 128 s to be empty.
const BUFFERS_PATIENCE: u32 = 3;

/// The slowest rate at which content may move before a try counts as stuck, in bytes per second.
const SLOWEST_RATE: u64 = 32 << 10;

/// At which try the user is told that something is wrong.
const WARN_AFTER_TRIES: u32 = 3;

/// A request to be made.
#[derive(Clone)]
pub(crate) struct Request {
    method: Method,
    key: String,
    query: Vec<(&'static str, String)>,
    headers: HeaderMap,
    content: Option<Content>,
    expected_bytes: usize,
    error_in_body: bool,
}

impl Request {
    /// A request for an object, or with an empty key for the bucket.
    pub(crate) fn new(method: Method, key: &str) -> Self {
        Self {
            method,
            key: key.to_owned(),
            query: Vec::new(),
            headers: HeaderMap::new(),
            content: None,
            expected_bytes: MAX_DOCUMENT_BYTES,
            error_in_body: false,
        }
    }

    /// With a parameter. Those of one request come in the order of their names.
    pub(crate) fn query(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.query.push((name, value.into()));
        self.query.sort();
        self
    }

    /// With a header. A value that cannot be one is left out: all are made from checked texts.
    pub(crate) fn header(mut self, name: &'static str, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.insert(HeaderName::from_static(name), value);
        }
        self
    }

    /// With a body.
    pub(crate) fn content(mut self, content: Content) -> Self {
        self.content = Some(content);
        self
    }

    /// With so many bytes of content in the answer, at most.
    pub(crate) const fn expect(mut self, bytes: usize) -> Self {
        self.expected_bytes = bytes;
        self
    }

    /// That may fail after the server began to answer with 200.
    pub(crate) const fn error_in_body(mut self) -> Self {
        self.error_in_body = true;
        self
    }

    fn is_list(&self) -> bool {
        self.key.is_empty()
            && self
                .query
                .iter()
                .any(|(name, _)| matches!(*name, "list-type" | "versions" | "uploads"))
    }
}

/// What came of one try.
struct TryFailure {
    cause: Cause,
    verdict: Verdict,
    wait: Option<Duration>,
    answered: bool,
}

/// A connection to a bucket.
pub(crate) struct Client {
    http: reqwest::Client,
    credentials: Credentials,
    pub(crate) endpoint: Endpoint,
    retry_time: Duration,
    /// How long nothing may move before a try counts as stuck, beside what buffers take.
    patience: Duration,
    reached: AtomicBool,
    /// Keys were had once.
    had_keys: AtomicBool,
    pub(crate) counters: Counters,
}

impl Client {
    /// For the bucket of `options`. Asks nobody yet.
    ///
    /// # Errors
    /// Those of endpoint, connection and credentials.
    pub(crate) fn new(options: &S3Options) -> Result<Self> {
        let profile = Profile::load(options.profile.as_deref())?;
        let endpoint = Endpoint::new(options, &profile)?;
        let http = connect::client(options, &endpoint)?;
        Ok(Self {
            credentials: Credentials::new(options, &profile, &endpoint.region, &http)?,
            http,
            endpoint,
            retry_time: options.retry_time,
            patience: TRY_TIME,
            reached: AtomicBool::new(false),
            had_keys: AtomicBool::new(false),
            counters: Counters::default(),
        })
    }

    /// Makes a request, again and again while its failure may pass.
    ///
    /// # Errors
    /// What it failed with for good.
    pub(crate) async fn send(&self, request: &Request) -> Result<Answer, Failure> {
        self.send_and_take(request, None).await
    }

    /// As [`send`](Self::send), with the content of the answer in `buffer`, from its beginning. What was behind it, and all of
    /// the buffer after an error, means nothing.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub(crate) async fn send_into(
        &self,
        request: &Request,
        buffer: &mut [u8],
    ) -> Result<Answer, Failure> {
        self.send_and_take(request, Some(buffer)).await
    }

    async fn send_and_take(
        &self,
        request: &Request,
        mut buffer: Option<&mut [u8]>,
    ) -> Result<Answer, Failure> {
        let mut tries = Tries::begin(self.retry_time, self.reached.load(Ordering::Relaxed));
        loop {
            let failed = match self.try_once(request, buffer.as_deref_mut()).await {
                Ok(answer) => {
                    self.reached.store(true, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(failed) => failed,
            };
            if failed.answered {
                self.reached.store(true, Ordering::Relaxed);
                tries.reached(self.retry_time);
            }
            let Some(wait) = tries.next(failed.verdict, failed.wait) else {
                return Err(Failure {
                    cause: failed.cause,
                    tries: tries.made(),
                    elapsed: tries.elapsed(),
                });
            };
            let (method, key, cause) = (&request.method, &request.key, &failed.cause);
            if tries.made() == WARN_AFTER_TRIES {
                tracing::warn!(%method, key, ?cause, "S3 fails; trying again");
            } else {
                tracing::debug!(%method, key, ?cause, ?wait, "S3 fails; trying again");
            }
            tokio::time::sleep(wait).await;
            if matches!(failed.cause, Cause::Connection(_)) && self.is_there(request).await {
                return Err(Failure {
                    cause: Cause::Answer {
                        status: StatusCode::PRECONDITION_FAILED.as_u16(),
                        code: "PreconditionFailed".into(),
                        message: String::new(),
                        region: None,
                    },
                    tries: tries.made(),
                    elapsed: tries.elapsed(),
                });
            }
        }
    }

    /// Whether the object that `request` makes, and may not replace, is there. Asked after a connection that ended
    /// while it was sent: either all of it arrived and the answer was lost, and it is not sent again, or the server has
    /// refused it without taking its content, as some do, and would as often as it is sent.
    async fn is_there(&self, request: &Request) -> bool {
        if request.content.is_none() || !request.headers.contains_key(http::header::IF_NONE_MATCH) {
            return false;
        }
        self.try_once(&Request::new(Method::HEAD, &request.key), None).await.is_ok()
    }

    async fn try_once(
        &self,
        request: &Request,
        buffer: Option<&mut [u8]>,
    ) -> Result<Answer, TryFailure> {
        let own = |error, verdict| TryFailure {
            cause: Cause::Own(error),
            verdict,
            wait: None,
            answered: false,
        };
        let credential = match tokio::time::timeout(self.patience, self.credentials.get()).await {
            Ok(had) => had,
            Err(_) => Err(RepoError::io("get AWS credentials", Error::other("no answer"))),
        };
        let credential = match credential {
            Ok(credential) => credential,
            // Who had keys will have some again: the service that gives them is away for a while.
            Err(RepoError::Denied { context, source } | RepoError::Io { context, source })
                if self.had_keys.load(Ordering::Relaxed) =>
            {
                let source =
                    Error::other(format!("keys were had before, and are not now: {source}"));
                return Err(own(RepoError::Io { context, source }, Verdict::Passing));
            }
            Err(error) => return Err(own(error, Verdict::Final)),
        };
        self.had_keys.store(true, Ordering::Relaxed);
        let signed = self.sign(request, &credential).map_err(|error| own(error, Verdict::Final))?;
        self.counters.count(&request.method, request.is_list());
        let moved = request.content.as_ref().map_or(0, Content::length_bytes)
            + u64::try_from(request.expected_bytes).unwrap_or(u64::MAX);
        let limit = TRY_TIME + Duration::from_secs(moved / SLOWEST_RATE);
        match tokio::time::timeout(limit, self.exchange(request, signed, buffer)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(connection_failed(format!("no answer in {} s", limit.as_secs()), false)),
        }
    }

    /// The signed request, as it is sent.
    fn sign(&self, request: &Request, credential: &AwsCredential) -> Result<reqwest::Request> {
        let invalid = |error: &dyn std::fmt::Display| {
            RepoError::Invalid(format!("sign a request to S3: {error}"))
        };
        let url = self.endpoint.url(&request.key, &request.query);
        let mut to_sign = HttpRequest::new(HttpRequestBody::empty());
        *to_sign.uri_mut() = url.parse().map_err(|error| invalid(&error))?;
        *to_sign.method_mut() = request.method.clone();
        to_sign.headers_mut().clone_from(&request.headers);
        AwsAuthorizer::new(credential, "s3", &self.endpoint.region)
            .try_authorize(
                &mut to_sign,
                request.content.as_ref().map(|content| content.sha256.as_slice()),
            )
            .map_err(|error| invalid(&error))?;
        let url = url.parse().map_err(|error| invalid(&error))?;
        let mut signed = reqwest::Request::new(request.method.clone(), url);
        *signed.headers_mut() = std::mem::take(to_sign.headers_mut());
        if let Some(content) = &request.content {
            let length = HeaderValue::from(content.length_bytes());
            signed.headers_mut().insert(http::header::CONTENT_LENGTH, length);
        } else if matches!(request.method, Method::PUT | Method::POST) {
            signed.headers_mut().insert(http::header::CONTENT_LENGTH, HeaderValue::from(0));
        }
        Ok(signed)
    }

    /// Sends the request with its content. The answer's head may take as long as content moves: on
    /// a slow line that is most of an hour for a large pack, and nothing is wrong.
    async fn answer_head(
        &self,
        request: &Request,
        mut signed: reqwest::Request,
    ) -> Result<reqwest::Response, TryFailure> {
        let sent_bytes = Arc::new(AtomicU64::new(0));
        let mut stalled = self.patience;
        if let Some(content) = &request.content {
            if content.length_bytes() > SHORT_BYTES {
                stalled *= BUFFERS_PATIENCE;
            }
            let body = ContentBody::new(content.clone(), Arc::clone(&sent_bytes));
            *signed.body_mut() = Some(reqwest::Body::wrap(body));
        }
        let mut answer = std::pin::pin!(self.http.execute(signed));
        let mut before = 0;
        loop {
            if let Ok(answer) = tokio::time::timeout(stalled, answer.as_mut()).await {
                return answer.map_err(|error| connection_failed(innermost(&error), false));
            }
            let sent = sent_bytes.load(Ordering::Relaxed);
            if sent == before {
                return Err(stuck(stalled, false));
            }
            before = sent;
        }
    }

    async fn exchange(
        &self,
        request: &Request,
        signed: reqwest::Request,
        buffer: Option<&mut [u8]>,
    ) -> Result<Answer, TryFailure> {
        let mut response = self.answer_head(request, signed).await?;
        let status = response.status();
        let mut sink = match buffer {
            _ if !status.is_success() => Sink::kept(MAX_DOCUMENT_BYTES),
            Some(buffer) => Sink::caller(buffer),
            None => Sink::kept(request.expected_bytes),
        };
        let announced = response.content_length().filter(|_| request.method != Method::HEAD);
        let headers = std::mem::take(response.headers_mut());
        let too_long =
            |length: u64| usize::try_from(length).map_or(true, |length| length > sink.limit());
        // What is longer than asked for is not read: its length is in the headers.
        if !announced.is_some_and(too_long) {
            loop {
                let part = tokio::time::timeout(self.patience, response.chunk())
                    .await
                    .map_err(|_| stuck(self.patience, true))?
                    .map_err(|error| connection_failed(innermost(&error), true))?;
                let Some(part) = part else { break };
                if !sink.push(&part) {
                    break;
                }
            }
            if let Some(announced) = announced
                && status.is_success()
                && sink.length() as u64 != announced
            {
                return Err(connection_failed("the answer was cut".into(), true));
            }
        }
        let body_bytes = sink.length();
        let body = sink.into_bytes();
        let error_in_body = request.error_in_body && !xml::parse_error(&body).code.is_empty();
        if !status.is_success() || error_in_body {
            return Err(refused(status.as_u16(), &headers, &body));
        }
        Ok(Answer { status: status.as_u16(), headers, body, body_bytes })
    }
}

fn stuck(waited: Duration, answered: bool) -> TryFailure {
    connection_failed(format!("nothing moved for {} s", waited.as_secs()), answered)
}

fn connection_failed(text: String, answered: bool) -> TryFailure {
    TryFailure { cause: Cause::Connection(text), verdict: Verdict::Passing, wait: None, answered }
}

/// What an answer that is no success means.
fn refused(status: u16, headers: &HeaderMap, body: &[u8]) -> TryFailure {
    let document = xml::parse_error(body);
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    // A success whose body is an error is an error of the server.
    let status = if (200..300).contains(&status) { 500 } else { status };
    let wait = header("retry-after").and_then(|text| text.parse().ok()).map(Duration::from_secs);
    TryFailure {
        verdict: retry::of_answer(status, &document.code),
        cause: Cause::Answer {
            status,
            code: words(&document.code),
            message: words(&document.message),
            region: header("x-amz-bucket-region").map(words).or(document.region),
        },
        wait,
        answered: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::StaticCredentials;
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, TcpListener};
    use std::time::Instant;

    const LENGTH: usize = 12 << 20;
    const PIECE: usize = 256 << 10;
    /// Several times what sockets hold, which nobody sees moving.
    const LONG: usize = 48 << 20;

    /// A server for one request of a connection each: takes `pieces` of 256 KiB with a wait after
    /// each, then nothing more; answers what it took whole with a body that trickles for as long.
    fn slow_server(pieces: usize, wait: Duration) -> String {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let mut stuck = Vec::new();
            for mut stream in listener.incoming().flatten() {
                let mut buffer = vec![0; PIECE];
                let mut taken = 0;
                for _ in 0..pieces {
                    let mut filled = 0;
                    while filled < buffer.len() && taken < LONG {
                        let read = stream.read(&mut buffer[filled..]).unwrap_or(0);
                        filled += read;
                        taken += read;
                        if read == 0 {
                            break;
                        }
                    }
                    std::thread::sleep(wait);
                }
                if taken < LONG {
                    stuck.push(stream);
                    continue;
                }
                let head = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 20\r\n\r\n";
                let _ = stream.write_all(head);
                for _ in 0..20 {
                    let _ = stream.write_all(b"x");
                    std::thread::sleep(wait);
                }
            }
        });
        endpoint
    }

    /// A client that hardly waits.
    fn client(endpoint: String) -> Client {
        let mut options = S3Options::parse("s3://bucket/x").unwrap();
        options.endpoint = Some(endpoint);
        options.retry_time = Duration::from_millis(1);
        options.credentials = Some(StaticCredentials {
            key_id: "AKIA".into(),
            secret_key: "geheim".to_owned().into(),
            token: None,
        });
        Client::new(&options).unwrap()
    }

    async fn put(endpoint: String, patience: Duration) -> Result<Answer, Failure> {
        let mut client = client(endpoint);
        client.patience = patience;
        let content = Content::of(&vec![7; LONG], false);
        client.send(&Request::new(Method::PUT, "packs/p").content(content)).await
    }

    /// Closes while it is being sent to; says of an object that it is there, where `is_there`. Counts what is sent.
    fn closing_server(is_there: bool) -> (String, Arc<AtomicU64>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let puts = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&puts);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut head = [0; 4096];
                // A connection that was opened ahead of need says nothing.
                let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
                let _ = stream.read(&mut head);
                if head.starts_with(b"PUT") {
                    count.fetch_add(1, Ordering::SeqCst);
                    continue;
                }
                let status = if is_there { "200 OK" } else { "404 Not Found" };
                let answer =
                    format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        (endpoint, puts)
    }

    #[test]
    fn what_is_there_is_not_sent_again() {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        for is_there in [true, false] {
            let (endpoint, puts) = closing_server(is_there);
            let mut client = client(endpoint);
            client.retry_time = Duration::from_secs(if is_there { 60 } else { 5 });
            let content = Content::of(&vec![7; LENGTH], false);
            let request = Request::new(Method::PUT, "packs/p").content(content);
            let request = request.header("if-none-match", "*");
            let failure = runtime.block_on(client.send(&request)).unwrap_err();
            assert_eq!(failure.is(412, "PreconditionFailed"), is_there, "{failure:?}");
            assert_eq!(puts.load(Ordering::SeqCst) == 1, is_there);
        }
    }

    #[cfg(unix)]
    #[test]
    fn keys_that_are_not_had_for_a_while_end_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let count = directory.path().join("count");
        // Not had the second and third time; they end at once.
        let command = format!(
            "echo x >> {0}; n=$(wc -l < {0}); [ $n = 2 ] && exit 1; [ $n = 3 ] && exit 1; \
             echo '{{\"Version\":1,\"AccessKeyId\":\"A\",\"SecretAccessKey\":\"s\",\
             \"Expiration\":\"2020-01-01T00:00:00Z\"}}'",
            count.display()
        );
        let mut options = S3Options::parse("s3://bucket/x").unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        options.endpoint = Some(format!("http://{}", listener.local_addr().unwrap()));
        options.credentials = Some(StaticCredentials {
            key_id: "A".into(),
            secret_key: "s".to_owned().into(),
            token: None,
        });
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let _ = stream.read(&mut [0; 4096]);
                let _ = stream.write_all(
                    b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
                );
            }
        });
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let mut client = Client::new(&options).unwrap();
        let current = parking_lot::Mutex::new(None);
        client.credentials = Credentials::Process { command, current };
        for _ in 0..2 {
            runtime.block_on(client.send(&Request::new(Method::GET, "points/p"))).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&count).unwrap().lines().count(), 4);
    }

    #[test]
    fn what_moves_is_waited_for_and_what_stands_still_is_not() {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let wait = Duration::from_millis(70);
        let patience = Duration::from_secs(3);
        let begun = Instant::now();
        let answer = runtime.block_on(put(slow_server(LONG / PIECE, wait), patience)).unwrap();
        assert_eq!(&answer.body[..], [b'x'; 20]);
        // Longer than anything may stand still, both ways.
        assert!(begun.elapsed() > patience * (BUFFERS_PATIENCE + 1), "{:?}", begun.elapsed());
        let begun = Instant::now();
        let failure = runtime.block_on(put(slow_server(4, wait), patience)).unwrap_err();
        assert!(format!("{failure:?}").contains("nothing moved"), "{failure:?}");
        assert!(begun.elapsed() < patience * BUFFERS_PATIENCE * 4, "{:?}", begun.elapsed());
    }
}
