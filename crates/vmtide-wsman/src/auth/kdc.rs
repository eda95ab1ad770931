//! The servers of a Kerberos domain: where they are, and one question to one of them.

use super::mit;
use crate::options::{Credentials, WsmanOptions};
use sspi::network_client::{NetworkClient, NetworkProtocol};
use sspi::{Error, ErrorKind, NetworkRequest};
use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};
use url::Url;
use zeroize::Zeroizing;

const KERBEROS_PORT: u16 = 88;

/// Addresses of a domain's name that are tried. Large domains have dozens of servers, and each that is down takes its time.
const MAX_ADDRESSES: usize = 4;

/// The shortest time that an address is given to take a connection, where the user does not give less.
const SHORTEST_CONNECT: Duration = Duration::from_secs(2);

/// The longest answer that is read; tickets of users in very many groups have 64 KB.
const MAX_ANSWER_BYTES: u32 = 256 << 10;

/// Who is asked for a domain's tickets.
pub(super) struct Kdc {
    server: Option<Url>,
    timeout: Duration,
    password: Zeroizing<String>,
}

impl Kdc {
    /// The server that the options name, else the one of `krb5.conf`, else the domain's own name: all controllers of
    /// an Active Directory domain answer to that.
    pub fn new(options: &WsmanOptions, credentials: &Credentials) -> Self {
        let (domain, _) = credentials.parts();
        let server = match &options.kdc {
            Some(named) => Url::parse(&format!("tcp://{named}")).ok(),
            None => {
                let realm = domain.to_uppercase();
                let silent = tracing::subscriber::NoSubscriber::default();
                let known =
                    tracing::subscriber::with_default(silent, || sspi::detect_kdc_url(&realm));
                known.or_else(|| Url::parse(&format!("tcp://{}", domain.to_lowercase())).ok())
            }
        };
        let password = Zeroizing::new(credentials.password().to_owned());
        Self { server, timeout: options.connect_timeout, password }
    }

    pub fn url(&self) -> Option<Url> {
        self.server.clone()
    }

    fn ask(&self, url: &Url, request: &[u8]) -> std::io::Result<Vec<u8>> {
        let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
        let port = url.port().unwrap_or(KERBEROS_PORT);
        let mut stream = connect(host, port, self.timeout)?;
        // Addresses that are dead have had their own time.
        let deadline = Instant::now() + self.timeout;
        let rest = || {
            let rest = deadline.saturating_duration_since(Instant::now());
            Some(rest.max(Duration::from_millis(1)))
        };
        stream.set_write_timeout(rest())?;
        stream.write_all(request)?;
        let mut head = [0; 4];
        stream.set_read_timeout(rest())?;
        stream.read_exact(&mut head)?;
        let length = u32::from_be_bytes(head);
        if length > MAX_ANSWER_BYTES {
            return Err(std::io::Error::other("its answer is too large"));
        }
        let mut answer = head.to_vec();
        let length = u64::from(length);
        let mut part = [0; 4096];
        let mut body = stream.take(length);
        loop {
            body.get_ref().set_read_timeout(rest())?;
            let count = body.read(&mut part)?;
            answer.extend_from_slice(part.get(..count).unwrap_or_default());
            if body.limit() == 0 {
                return Ok(answer);
            }
            if count == 0 || Instant::now() >= deadline {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

fn connect(host: &str, port: u16, timeout: Duration) -> std::io::Result<TcpStream> {
    // One that drops what it gets must not take the time of all.
    let timeout = (timeout / 4).max(SHORTEST_CONNECT).min(timeout);
    let mut last = std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address");
    for address in (host, port).to_socket_addrs()?.take(MAX_ADDRESSES) {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

impl NetworkClient for Kdc {
    fn send(&self, request: &NetworkRequest) -> sspi::Result<Vec<u8>> {
        let failed = |detail: String| {
            let server = request.url.host_str().unwrap_or_default();
            Error::new(
                ErrorKind::NoAuthenticatingAuthority,
                format!(
                    "the domain's server {server} does not answer: {detail} (set VMTIDE_WINRM_KDC)"
                ),
            )
        };
        if request.protocol != NetworkProtocol::Tcp {
            return Err(failed("only TCP is spoken".into()));
        }
        let answer = self.ask(&request.url, &request.data);
        let answer = answer.map_err(|error| failed(error.to_string()))?;
        Ok(mit::with_right_tag(answer, &self.password))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn user(domain: &str) -> Credentials {
        Credentials::new(&format!("u@{domain}"), Zeroizing::new("p".into())).unwrap()
    }

    /// A server that answers anybody with `answer`.
    fn served(answer: &'static [u8]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 3];
            stream.read_exact(&mut request).unwrap();
            stream.write_all(answer).unwrap();
        });
        address
    }

    fn ask(answer: &'static [u8]) -> sspi::Result<Vec<u8>> {
        let kdc = Some(served(answer));
        let options = WsmanOptions { kdc, ..WsmanOptions::new("h") };
        let kdc = Kdc::new(&options, &user("d.example"));
        kdc.send(&NetworkRequest {
            protocol: NetworkProtocol::Tcp,
            url: kdc.url().unwrap(),
            data: b"abc".to_vec(),
        })
    }

    #[test]
    fn answers_are_whole_or_none() {
        assert_eq!(ask(b"\0\0\0\x02hi").unwrap(), b"\0\0\0\x02hi");
        for bad in [&b"\0\0"[..], b"\0\0\0\x05hi", b"\x7f\xff\xff\xffhi"] {
            let error = ask(bad).unwrap_err();
            assert_eq!(error.error_type, ErrorKind::NoAuthenticatingAuthority, "{error}");
        }
    }

    #[test]
    fn domains_are_found_by_their_name() {
        let kdc = Kdc::new(&WsmanOptions::new("h"), &user("Nowhere.Invalid"));
        assert_eq!(kdc.url().unwrap().as_str(), "tcp://nowhere.invalid");
    }
}
