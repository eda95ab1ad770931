//! A client of HTTP/1.1 over TLS that hides nothing: it tells when an answer was cut off.

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub type Stream = StreamOwned<ClientConnection, TcpStream>;

/// How long a test waits for an answer that does not come.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone)]
pub struct Client {
    pub address: SocketAddr,
    pub key: String,
    pub tls: Arc<ClientConfig>,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HashMap<String, String>,
    pub body: Vec<u8>,
    /// Whether the body came to the end that it promised.
    pub complete: bool,
}

impl Answer {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| {
            panic!("{error}: {} {}", self.status, String::from_utf8_lossy(&self.body))
        })
    }

    /// The code of an error.
    pub fn code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap_or_default().to_owned()
    }
}

/// The head of an answer, and its body as it comes.
pub struct Incoming {
    pub status: u16,
    pub headers: HashMap<String, String>,
    stream: BufReader<Stream>,
    left: Left,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    Bytes(u64),
    /// Bytes of this chunk; none before its head.
    Chunk(Option<u64>),
    UntilClosed,
    Done,
}

impl Client {
    pub fn new(address: SocketAddr, certificate: &Path, key: &str) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(certificate).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Self { address, key: key.to_owned(), tls: Arc::new(tls) }
    }

    pub fn connect(&self) -> Stream {
        let socket = TcpStream::connect(self.address).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        let name = ServerName::from(self.address.ip());
        StreamOwned::new(ClientConnection::new(Arc::clone(&self.tls), name).unwrap(), socket)
    }

    /// Sends the head of a request over a new connection.
    pub fn begin(&self, method: &str, target: &str, headers: &[(&str, &str)]) -> Stream {
        let mut stream = self.connect();
        let mut head =
            format!("{method} {target} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n");
        if !self.key.is_empty() {
            head.push_str(&format!("authorization: Bearer {}\r\n", self.key));
        }
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        stream
    }

    /// Sends a request; the answer is read as it is asked for.
    pub fn send(
        &self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Incoming {
        let length = body.len().to_string();
        let mut headers = headers.to_vec();
        if !body.is_empty() || matches!(method, "POST" | "PUT") {
            headers.push(("content-length", &length));
        }
        let mut stream = self.begin(method, target, &headers);
        // An agent that wants no more may have closed already; its answer is there all the same.
        let _ = stream.write_all(body).and_then(|()| stream.flush());
        Incoming::read_head(stream, method == "HEAD").unwrap()
    }

    /// The same for an answer that may be cut off before it begins.
    pub fn try_get(&self, target: &str) -> Option<Answer> {
        let stream = self.begin("GET", target, &[]);
        Some(Incoming::read_head(stream, false).ok()?.read_all())
    }

    pub fn request(
        &self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Answer {
        self.send(method, target, headers, body).read_all()
    }

    pub fn get(&self, target: &str) -> Answer {
        self.request("GET", target, &[], b"")
    }

    pub fn json(&self, method: &str, target: &str, body: &serde_json::Value) -> Answer {
        let headers = [("content-type", "application/json")];
        self.request(method, target, &headers, body.to_string().as_bytes())
    }
}

impl Incoming {
    fn read_head(stream: Stream, is_head: bool) -> std::io::Result<Self> {
        let mut stream = BufReader::with_capacity(256 << 10, stream);
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status: u16 = status.ok_or(std::io::ErrorKind::UnexpectedEof)?;
        let mut headers = HashMap::new();
        loop {
            let mut line = String::new();
            stream.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            headers.insert(name.to_ascii_lowercase(), value.to_owned());
        }
        let left = match (headers.get("content-length"), headers.get("transfer-encoding")) {
            _ if is_head || status == 204 => Left::Done,
            (Some(length), None) => Left::Bytes(length.parse().unwrap()),
            (None, Some(_)) => Left::Chunk(None),
            (None, None) => Left::UntilClosed,
            both => panic!("{both:?}"),
        };
        Ok(Self { status, headers, stream, left })
    }

    /// The next bytes of the body; none at its promised end; an error where it was cut off.
    pub fn next(&mut self, most: usize) -> std::io::Result<Option<Vec<u8>>> {
        let room = match self.left {
            Left::Done | Left::Bytes(0) => return Ok(None),
            Left::Bytes(left) | Left::Chunk(Some(left)) => left,
            Left::UntilClosed => u64::MAX,
            Left::Chunk(None) => match self.chunk()? {
                0 => {
                    self.left = Left::Done;
                    return Ok(None);
                }
                left => left,
            },
        };
        let mut bytes = vec![0; most.min(usize::try_from(room).unwrap_or(usize::MAX))];
        let length = self.stream.read(&mut bytes)?;
        bytes.truncate(length);
        if length == 0 {
            return match self.left {
                Left::UntilClosed => Ok(None),
                _ => Err(std::io::ErrorKind::UnexpectedEof.into()),
            };
        }
        let length = length as u64;
        match &mut self.left {
            Left::Bytes(left) => *left -= length,
            Left::Chunk(_) if length == room => {
                self.stream.read_exact(&mut [0; 2])?;
                self.left = Left::Chunk(None);
            }
            Left::Chunk(left) => *left = Some(room - length),
            Left::UntilClosed | Left::Done => {}
        }
        Ok(Some(bytes))
    }

    fn chunk(&mut self) -> std::io::Result<u64> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let length = u64::from_str_radix(line.trim_end(), 16);
        let length = length.map_err(|_| std::io::Error::from(std::io::ErrorKind::UnexpectedEof))?;
        if length == 0 {
            self.stream.read_exact(&mut [0; 2])?;
        }
        self.left = Left::Chunk(Some(length));
        Ok(length)
    }

    pub fn read_all(mut self) -> Answer {
        let mut body = Vec::new();
        let complete = loop {
            match self.next(1 << 20) {
                Ok(Some(bytes)) => body.extend(bytes),
                Ok(None) => break true,
                Err(_) => break false,
            }
        };
        Answer { status: self.status, headers: self.headers, body, complete }
    }
}

/// A value for a query.
pub fn escape(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
}
