//! One HTTP/1.1 connection: authentication belongs to the connection, so that requests are tied to one.

use crate::options::{Scheme, WsmanOptions};
use crate::tls::{self, Tls};
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use vmtide_cim::CimError;

/// The path of the service.
pub(crate) const PATH: &str = "/wsman";

/// The most headers and bytes of them in an answer.
const MAX_HEADERS: usize = 64;
const HEAD_BUFFER_BYTES: usize = 128 << 10;

/// What a connection is spoken through: anything that carries bytes.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// An open connection.
pub(crate) struct Connection {
    sender: SendRequest<Full<Bytes>>,
    host: HeaderValue,
    /// What ties an authentication to this connection; none without TLS.
    pub binding: Option<Vec<u8>>,
}

/// An answer, whole.
#[derive(Debug)]
pub(crate) struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    /// A header as text; empty where there is none.
    pub fn header(&self, name: &HeaderName) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

impl Connection {
    /// Connects. Must run within the runtime that the connection is to live on.
    ///
    /// # Errors
    /// [`CimError::Unreachable`] and [`CimError::Untrusted`].
    pub async fn open(
        options: &WsmanOptions,
        tls: Option<&Tls>,
        peer: &str,
    ) -> Result<Self, CimError> {
        let unreachable = |detail: String| CimError::Unreachable {
            peer: peer.to_owned(),
            detail,
            before_request: true,
        };
        let late =
            |_| unreachable(format!("no answer within {} s", options.connect_timeout.as_secs()));
        let connecting = TcpStream::connect((options.host.as_str(), options.effective_port()));
        let stream = timeout(options.connect_timeout, connecting)
            .await
            .map_err(late)?
            .map_err(|error| unreachable(hint(&error, options)))?;
        // Requests are small, and each waits for its answer.
        let _ = stream.set_nodelay(true);
        let mut binding = None;
        let stream: Box<dyn Stream> = match tls {
            None => Box::new(stream),
            Some(tls) => {
                let name = ServerName::try_from(options.host.clone()).map_err(|_| {
                    unreachable("its name is none that a certificate can have".into())
                })?;
                let connector =
                    tokio_rustls::TlsConnector::from(std::sync::Arc::clone(&tls.config));
                let stream = timeout(options.connect_timeout, connector.connect(name, stream))
                    .await
                    .map_err(late)?
                    .map_err(|error| match tls.explain(&error, options.fingerprint) {
                        Some((true, detail)) => {
                            CimError::Untrusted { peer: peer.to_owned(), detail }
                        }
                        Some((false, detail)) => unreachable(detail),
                        None => unreachable(format!("no TLS connection: {error}")),
                    })?;
                let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
                binding = certificate.map(|certificate| tls::channel_binding(certificate));
                Box::new(stream)
            }
        };
        Self::speak(stream, options, binding)
            .await
            .map_err(|error| unreachable(format!("no HTTP connection: {error}")))
    }

    async fn speak(
        stream: Box<dyn Stream>,
        options: &WsmanOptions,
        binding: Option<Vec<u8>>,
    ) -> Result<Self, hyper::Error> {
        let (sender, connection) = http1::Builder::new()
            .max_headers(MAX_HEADERS)
            .max_buf_size(HEAD_BUFFER_BYTES)
            .handshake(TokioIo::new(stream))
            .await?;
        tokio::spawn(async move {
            // How it ended is told to whoever waits for an answer.
            let _ = connection.await;
        });
        let host = format!("{}:{}", options.authority_host(), options.effective_port());
        let host = HeaderValue::from_str(&host).unwrap_or(HeaderValue::from_static("localhost"));
        Ok(Self { sender, host, binding })
    }

    /// Whether it is known to be closed.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Sends a request and reads its answer, of `limit_bytes` at most.
    ///
    /// # Errors
    /// [`Lost`].
    pub async fn post(
        &mut self,
        headers: &[(HeaderName, HeaderValue)],
        body: Bytes,
        limit_bytes: usize,
        patience: Duration,
    ) -> Result<Answer, Lost> {
        timeout(patience, self.exchange(headers, body, limit_bytes))
            .await
            .unwrap_or(Err(Lost::Late))
    }

    async fn exchange(
        &mut self,
        headers: &[(HeaderName, HeaderValue)],
        body: Bytes,
        limit_bytes: usize,
    ) -> Result<Answer, Lost> {
        self.sender
            .ready()
            .await
            .map_err(|error| Lost::Broken { sent: false, detail: words(&error) })?;
        let length = HeaderValue::from(body.len());
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = http::Method::POST;
        *request.uri_mut() = http::Uri::from_static(PATH);
        let map = request.headers_mut();
        map.insert(header::HOST, self.host.clone());
        map.insert(header::CONTENT_LENGTH, length);
        map.insert(
            header::USER_AGENT,
            HeaderValue::from_static(concat!("vmtide/", env!("CARGO_PKG_VERSION"))),
        );
        for (name, value) in headers {
            map.insert(name.clone(), value.clone());
        }
        let answer = self.sender.try_send_request(request).await.map_err(|mut error| {
            // The library gives the request back where none of it was written.
            let sent = error.take_message().is_none();
            Lost::Broken { sent, detail: words(error.error()) }
        })?;
        let (head, mut stream) = answer.into_parts();
        let mut body = Vec::new();
        while let Some(frame) = stream.frame().await {
            let frame =
                frame.map_err(|error| Lost::Broken { sent: true, detail: words(&error) })?;
            let Ok(part) = frame.into_data() else { continue };
            if body.len().saturating_add(part.len()) > limit_bytes {
                return Err(Lost::TooLarge);
            }
            body.extend_from_slice(&part);
        }
        Ok(Answer { status: head.status, headers: head.headers, body: body.into() })
    }
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    /// The connection broke.
    Broken {
        /// Whether a part of the request may have arrived.
        sent: bool,
        /// What was seen.
        detail: String,
    },
    /// Nothing came in time.
    Late,
    /// The answer is larger than the limit.
    TooLarge,
}

/// What failed in a chain of errors: the innermost says it, the outer ones only where.
fn words(error: &(dyn std::error::Error + 'static)) -> String {
    let mut last = error.to_string();
    let mut current = error.source();
    while let Some(error) = current {
        last = error.to_string();
        current = error.source();
    }
    crate::answer::short(&last)
}

/// A failed connection, with what is behind it most of the time.
fn hint(error: &std::io::Error, options: &WsmanOptions) -> String {
    let port = options.effective_port();
    match error.kind() {
        std::io::ErrorKind::ConnectionRefused => {
            let command = match options.scheme {
                Scheme::Http => "Enable-PSRemoting",
                Scheme::Https => "winrm quickconfig -transport:https",
            };
            format!("nothing listens on port {port}: run {command} on the host")
        }
        _ => error.to_string(),
    }
}
