//! HTTP/1.1 over a stream that blocks: requests in, answers out, nothing clever.

use rustls::{ServerConnection, StreamOwned};
use std::io::{self, Read, Write};
use std::net::TcpStream;

/// The largest head of a request. Tokens of Kerberos with many groups have up to 48 KiB.
const MAX_HEAD_BYTES: usize = 128 * 1024;
/// The largest body; more than any envelope, so that one that is too large is answered with a fault.
const MAX_BODY_BYTES: usize = 16 << 20;

/// A connection.
pub enum Stream {
    /// Without TLS.
    Plain(TcpStream),
    /// With TLS.
    Tls(Box<StreamOwned<ServerConnection, TcpStream>>),
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(buffer),
            Self::Tls(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

/// A request.
#[derive(Debug)]
pub struct Request {
    /// `POST`.
    pub method: String,
    /// `/wsman`.
    pub target: String,
    /// The headers in their order.
    headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Request {
    /// A header by its name.
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    /// Whether the client wants the connection to end after the answer.
    pub fn closes(&self) -> bool {
        self.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }
}

/// A connection with what was read beyond the last request.
pub struct Connection {
    stream: Stream,
    buffer: Vec<u8>,
}

fn bad(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl Connection {
    /// A fresh one.
    pub const fn new(stream: Stream) -> Self {
        Self { stream, buffer: Vec::new() }
    }

    /// The next request; none where the client ended the connection.
    ///
    /// # Errors
    /// Of the connection; what is no request.
    pub fn read(&mut self) -> io::Result<Option<Request>> {
        let end = loop {
            if let Some(at) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break at;
            }
            if self.buffer.len() > MAX_HEAD_BYTES {
                return Err(bad("the head of the request is too large"));
            }
            if !self.fill()? {
                return if self.buffer.is_empty() { Ok(None) } else { Err(bad("half a request")) };
            }
        };
        let head = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
        self.buffer.drain(..end + 4);
        let mut lines = head.split("\r\n");
        let mut first = lines.next().unwrap_or_default().split(' ');
        let (Some(method), Some(target), Some("HTTP/1.1" | "HTTP/1.0")) =
            (first.next(), first.next(), first.next())
        else {
            return Err(bad("no request line"));
        };
        let headers = lines
            .map(|line| {
                line.split_once(':')
                    .map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned()))
            })
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| bad("a header without a colon"))?;
        let mut request =
            Request { method: method.into(), target: target.into(), headers, body: Vec::new() };
        if request.header("expect").is_some_and(|value| value.eq_ignore_ascii_case("100-continue"))
        {
            self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
            self.stream.flush()?;
        }
        request.body = if request
            .header("transfer-encoding")
            .is_some_and(|value| value.eq_ignore_ascii_case("chunked"))
        {
            self.chunks()?
        } else {
            let length = request.header("content-length").unwrap_or("0").parse();
            self.exactly(length.map_err(|_| bad("Content-Length is no number"))?)?
        };
        Ok(Some(request))
    }

    fn fill(&mut self) -> io::Result<bool> {
        let mut piece = [0; 16 * 1024];
        let count = match self.stream.read(&mut piece) {
            // A client that ends TLS without saying so has gone just the same.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => 0,
            other => other?,
        };
        self.buffer.extend_from_slice(&piece[..count]);
        Ok(count > 0)
    }

    fn exactly(&mut self, length: usize) -> io::Result<Vec<u8>> {
        if length > MAX_BODY_BYTES {
            return Err(bad("the body is too large"));
        }
        while self.buffer.len() < length {
            if !self.fill()? {
                return Err(bad("half a body"));
            }
        }
        Ok(self.buffer.drain(..length).collect())
    }

    fn line(&mut self) -> io::Result<String> {
        loop {
            if let Some(at) = self.buffer.windows(2).position(|window| window == b"\r\n") {
                let line = String::from_utf8_lossy(&self.buffer[..at]).into_owned();
                self.buffer.drain(..at + 2);
                return Ok(line);
            }
            if self.buffer.len() > MAX_HEAD_BYTES || !self.fill()? {
                return Err(bad("half a chunk"));
            }
        }
    }

    fn chunks(&mut self) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let line = self.line()?;
            let size = line.split(';').next().unwrap_or_default().trim();
            let size =
                usize::from_str_radix(size, 16).map_err(|_| bad("a chunk without a size"))?;
            if size.saturating_add(body.len()) > MAX_BODY_BYTES {
                return Err(bad("the body is too large"));
            }
            if size == 0 {
                while !self.line()?.is_empty() {}
                return Ok(body);
            }
            body.extend(self.exactly(size)?);
            self.line()?;
        }
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// Of the connection.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)?;
        self.stream.flush()
    }

    /// Waits until the client ends the connection, and takes no notice of what it sends until then.
    pub fn wait_for_end(&mut self) {
        while matches!(self.fill(), Ok(true)) {
            self.buffer.clear();
        }
    }
}

/// The head of an answer with a body of `length` bytes.
pub fn head(status: u16, headers: &[(&str, &str)], length: usize, close: bool) -> String {
    let reason = match status {
        200 => "OK",
        401 => "Unauthorized",
        404 => "Not Found",
        405 => "Method Not Allowed",
        415 => "Unsupported Media Type",
        500 => "Internal Server Error",
        503 => "Service Unavailable",
        _ => "Bad Request",
    };
    let mut out = format!("HTTP/1.1 {status} {reason}\r\nServer: Microsoft-HTTPAPI/2.0\r\n");
    for (name, value) in headers {
        out.push_str(&format!("{name}: {value}\r\n"));
    }
    if close {
        out.push_str("Connection: close\r\n");
    }
    out.push_str(&format!("Content-Length: {length}\r\n\r\n"));
    out
}
