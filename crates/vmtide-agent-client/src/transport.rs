//! Requests to one agent: sent, answered, and sent again while the failure may pass.
//!
//! The callers block; the connections live on a small runtime of the client's own. A key goes into a header of
//! every request and nowhere else.

use crate::connect::{self, Seen};
use crate::options::AgentOptions;
use crate::tries::{Failure, Tries, Verdict};
use crate::{AgentError, Result};
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use serde::Deserialize;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::runtime::Runtime;
use vmtide_block::CancelToken;

/// The header that carries the key, as rct-service has it.
const KEY_HEADER: &str = "auth_key";

/// How long nothing may move before a try counts as stuck. Attaching a disk and freezing several takes
/// seconds on a busy host, minutes on none.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How often a request that runs looks whether the user wants to end.
const CANCEL_INTERVAL: Duration = Duration::from_millis(100);

/// The most of an answer that is an error.
const MAX_ERROR_BYTES: usize = 64 << 10;

/// The most of an agent's own words that are repeated.
const MAX_WORDS: usize = 300;

/// The most of an answer that is a document.
pub(crate) const MAX_DOCUMENT_BYTES: usize = 4 << 20;

/// A request.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub method: Method,
    /// Path and query, encoded.
    pub target: String,
    pub headers: HeaderMap,
    pub body: Option<Bytes>,
    /// The most of the answer that is taken, in bytes.
    pub max_bytes: usize,
}

impl Request {
    pub fn new(method: Method, target: impl Into<String>) -> Self {
        Self {
            method,
            target: target.into(),
            headers: HeaderMap::new(),
            body: None,
            max_bytes: MAX_DOCUMENT_BYTES,
        }
    }

    pub fn get(target: impl Into<String>) -> Self {
        Self::new(Method::GET, target)
    }

    pub fn header(mut self, name: &'static str, value: HeaderValue) -> Self {
        self.headers.insert(HeaderName::from_static(name), value);
        self
    }

    pub fn body(mut self, content_type: &'static str, body: impl Into<Bytes>) -> Self {
        self.body = Some(body.into());
        self.headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        self
    }

    pub const fn at_most(mut self, bytes: usize) -> Self {
        self.max_bytes = bytes;
        self
    }
}

/// The connections to one agent.
pub(crate) struct Transport {
    /// Taken out when it ends, which must not wait for what still runs.
    runtime: Option<Runtime>,
    http: reqwest::Client,
    seen: Seen,
    options: AgentOptions,
    key: Option<HeaderValue>,
    /// `https://host:port`.
    base: String,
    /// The agent as errors name it.
    pub agent: String,
    reached: AtomicBool,
}

impl Drop for Transport {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Transport {
    /// For the agent at `authority` (`host:port`). Asks nobody yet.
    ///
    /// # Errors
    /// Those of the options.
    pub fn new(authority: &str, agent: String, options: &AgentOptions) -> Result<Self> {
        let (http, seen) = connect::http_client(options)?;
        let key = match &options.key {
            None => None,
            Some(key) => {
                let mut value = HeaderValue::from_str(key.expose())
                    .map_err(|_| AgentError::usage("the agent's key cannot stand in a header"))?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("agent-client")
            .enable_all()
            .build()
            .map_err(|source| AgentError::Io {
                context: "start the threads of the agent's client".into(),
                source,
            })?;
        Ok(Self {
            runtime: Some(runtime),
            http,
            seen,
            options: options.clone(),
            key,
            base: format!("https://{authority}"),
            agent,
            reached: AtomicBool::new(false),
        })
    }

    /// The tries of a new request.
    pub fn tries(&self) -> Tries {
        Tries::begin(self.options.retry_time, self.reached.load(Ordering::Relaxed))
    }

    /// Waits for the next try of `tries`.
    ///
    /// # Errors
    /// Where there is none.
    pub fn again(&self, tries: &mut Tries, failure: Failure, cancel: &CancelToken) -> Result<()> {
        if failure.answered {
            self.reached.store(true, Ordering::Relaxed);
        }
        tries.again(failure, self.options.retry_time, cancel)
    }

    /// Runs one try on the calling thread; none where the caller cancelled.
    pub fn block_on<F: Future>(&self, cancel: &CancelToken, future: F) -> Option<F::Output> {
        let cancelled = async {
            while !cancel.is_cancelled() {
                tokio::time::sleep(CANCEL_INTERVAL).await;
            }
        };
        self.runtime.as_ref()?.block_on(async {
            tokio::select! {
                biased;
                output = future => Some(output),
                () = cancelled => None,
            }
        })
    }

    /// The whole answer of a request, which is tried again while it may help.
    ///
    /// # Errors
    /// With what it failed for good.
    pub fn document(&self, request: &Request, cancel: &CancelToken) -> Result<Bytes> {
        self.persist(cancel, |_| self.attempt(request, cancel))
    }

    /// What `attempt` brings, which is tried again while it may help. It is told how many tries there were before.
    ///
    /// # Errors
    /// With what it failed for good.
    pub fn persist<T>(
        &self,
        cancel: &CancelToken,
        mut attempt: impl FnMut(u32) -> Result<T, Failure>,
    ) -> Result<T> {
        let mut tries = self.tries();
        let mut earlier = 0;
        loop {
            cancel.check().map_err(|_| AgentError::Cancelled)?;
            match attempt(earlier) {
                Ok(answer) => return Ok(answer),
                Err(failure) => self.again(&mut tries, failure, cancel)?,
            }
            earlier = earlier.saturating_add(1);
        }
    }

    /// The whole answer of a request, which is tried once.
    ///
    /// # Errors
    /// With what it failed.
    pub fn once(&self, request: &Request) -> Result<Bytes> {
        self.attempt(request, &CancelToken::new()).map_err(|failure| failure.error)
    }

    /// The whole answer of one try.
    ///
    /// # Errors
    /// With what it failed, and whether to try again.
    pub fn attempt(&self, request: &Request, cancel: &CancelToken) -> Result<Bytes, Failure> {
        let tried = self.block_on(cancel, async {
            let mut response = self.begin(request).await?;
            self.whole(&mut response, request.max_bytes).await
        });
        tried.unwrap_or_else(|| Err(Failure::last(AgentError::Cancelled)))
    }

    /// Sends a request, and takes the head of its answer if that is a success.
    ///
    /// # Errors
    /// What the agent answered otherwise, or that it did not.
    pub async fn begin(&self, request: &Request) -> Result<reqwest::Response, Failure> {
        let url = format!("{}{}", self.base, request.target);
        let url = url.parse().map_err(|_| {
            Failure::last(AgentError::usage(format!("{}: bad address", self.agent)))
        })?;
        let mut sent = reqwest::Request::new(request.method.clone(), url);
        sent.headers_mut().clone_from(&request.headers);
        if let Some(key) = &self.key {
            sent.headers_mut().insert(HeaderName::from_static(KEY_HEADER), key.clone());
        }
        match &request.body {
            Some(body) => *sent.body_mut() = Some(body.clone().into()),
            None if matches!(request.method, Method::PUT | Method::POST) => {
                sent.headers_mut().insert(http::header::CONTENT_LENGTH, HeaderValue::from(0));
            }
            None => {}
        }
        let mut response = tokio::time::timeout(PATIENCE, self.http.execute(sent))
            .await
            .map_err(|_| self.stuck())?
            .map_err(|error| self.not_connected(&error))?;
        self.reached.store(true, Ordering::Relaxed);
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let wait = response
            .headers()
            .get(http::header::RETRY_AFTER)
            .and_then(|value| value.to_str().ok()?.parse().ok())
            .map(Duration::from_secs);
        // What an error says is worth little; that it is one stands already.
        let body = self.whole(&mut response, MAX_ERROR_BYTES).await.unwrap_or_default();
        Err(self.refused(status, &body, wait))
    }

    /// The rest of an answer.
    ///
    /// # Errors
    /// Where it is longer than `limit`, or cut.
    pub async fn whole(
        &self,
        response: &mut reqwest::Response,
        limit: usize,
    ) -> Result<Bytes, Failure> {
        let mut body = BytesMut::new();
        while let Some(part) = self.part(response).await? {
            if body.len().saturating_add(part.len()) > limit {
                let detail = format!("more than {limit} bytes where a document was expected");
                return Err(Failure::last(AgentError::protocol(&self.agent, detail)));
            }
            body.extend_from_slice(&part);
        }
        Ok(body.freeze())
    }

    /// The next part of an answer; none at its end, which is only an end where all that was announced came.
    ///
    /// # Errors
    /// Where the connection is gone or nothing moves.
    pub async fn part(&self, response: &mut reqwest::Response) -> Result<Option<Bytes>, Failure> {
        match tokio::time::timeout(PATIENCE, response.chunk()).await {
            Err(_) => Err(self.stuck()),
            Ok(Err(error)) => Err(self.lost(innermost(&error))),
            Ok(Ok(part)) => Ok(part),
        }
    }

    /// The failure of a connection that was there.
    pub fn lost(&self, detail: impl Into<String>) -> Failure {
        Failure {
            error: AgentError::Unreachable { agent: self.agent.clone(), detail: detail.into() },
            verdict: Verdict::Passing,
            wait: None,
            answered: true,
        }
    }

    /// The failure of an answer that breaks the protocol.
    pub fn nonsense(&self, detail: impl Into<String>) -> Failure {
        Failure::last(AgentError::protocol(&self.agent, detail))
    }

    fn stuck(&self) -> Failure {
        self.lost(format!("nothing moved for {} s", PATIENCE.as_secs()))
    }

    fn not_connected(&self, error: &reqwest::Error) -> Failure {
        match connect::certificate_error(error, &self.options, &self.seen) {
            Some(detail) => {
                Failure::last(AgentError::Certificate { agent: self.agent.clone(), detail })
            }
            None => Failure {
                error: AgentError::Unreachable {
                    agent: self.agent.clone(),
                    detail: innermost(error),
                },
                verdict: Verdict::Passing,
                wait: None,
                answered: !error.is_connect(),
            },
        }
    }

    fn refused(&self, status: StatusCode, body: &[u8], wait: Option<Duration>) -> Failure {
        let agent = self.agent.clone();
        let (code, detail) = words_of(status, body);
        let verdict = match status.as_u16() {
            408 | 425 | 429 | 502 | 503 | 504 => Verdict::Passing,
            500 => Verdict::Few,
            _ => Verdict::Final,
        };
        let error = match status {
            StatusCode::UNAUTHORIZED => AgentError::Denied {
                agent,
                detail: format!(
                    "{}: give the agent's key with VMTIDE_AGENT_KEY or --agent-key-file",
                    if self.key.is_some() { "wrong key" } else { "a key is needed" }
                ),
            },
            StatusCode::FORBIDDEN => {
                AgentError::Denied { agent, detail: format!("denied: {detail}") }
            }
            StatusCode::NOT_FOUND => AgentError::NotFound { agent, code, detail },
            _ => AgentError::Refused { agent, status: status.as_u16(), code, detail },
        };
        Failure { error, verdict, wait, answered: true }
    }
}

#[derive(Deserialize)]
struct ErrorDocument {
    error: ErrorWords,
}

#[derive(Deserialize)]
struct ErrorWords {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// What an error says of itself: the agent's own form, or the text of rct-service.
fn words_of(status: StatusCode, body: &[u8]) -> (String, String) {
    if let Ok(document) = serde_json::from_slice::<ErrorDocument>(body) {
        return (words(&document.error.code), words(&document.error.message));
    }
    let text = String::from_utf8_lossy(body);
    // A page for a browser says nothing more than its status.
    let text = if text.trim_start().starts_with('<') { "" } else { text.trim() };
    let said = if text.is_empty() {
        status.canonical_reason().unwrap_or("no reason was given")
    } else {
        text
    };
    (String::new(), words(said))
}

/// Foreign text as a part of one line: short, and without what moves a terminal's cursor.
pub(crate) fn words(text: &str) -> String {
    let mut line: String =
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_WORDS).collect();
    line.truncate(line.trim_end().len());
    line
}

/// What failed in a chain of errors: the innermost says it, the outer ones only where.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut last = error.to_string();
    let mut current = error.source();
    while let Some(error) = current {
        last = error.to_string();
        current = error.source();
    }
    words(&last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_both_kinds_of_agents_are_read() {
        let ours = br#"{"error":{"code":"not-found","message":"no such\ndisk"}}"#;
        assert_eq!(
            words_of(StatusCode::NOT_FOUND, ours),
            ("not-found".into(), "no such disk".into())
        );
        let theirs = b"Bad vdisk path: C:\\x.vhdx";
        assert_eq!(words_of(StatusCode::NOT_FOUND, theirs).1, "Bad vdisk path: C:\\x.vhdx");
        assert_eq!(words_of(StatusCode::NOT_FOUND, b"<!DOCTYPE html>").1, "Not Found");
        assert_eq!(words_of(StatusCode::NOT_FOUND, &[0xff; 1000]).1.chars().count(), MAX_WORDS);
    }
}
