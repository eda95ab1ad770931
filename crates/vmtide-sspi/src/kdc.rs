//! The servers of a Kerberos domain: where they are, and one question to one of them.

use crate::error::AuthError;
use crate::mit;
use parking_lot::Mutex;
use sspi::network_client::{NetworkClient, NetworkProtocol};
use sspi::{Error, ErrorKind, NetworkRequest};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};
use url::Url;
use zeroize::Zeroizing;

const KERBEROS_PORT: u16 = 88;

/// Addresses of a domain's name that are tried. Large domains have dozens of servers, and each that is down takes its time.
const MAX_ADDRESSES: usize = 4;

/// The shortest time that one of several addresses is given, where the user does not give less.
const SHORTEST: Duration = Duration::from_secs(2);

/// The longest answer that is read; tickets of users in very many groups have 64 KB.
const MAX_ANSWER_BYTES: u32 = 256 << 10;

/// Who is asked for a domain's tickets. Shows no secret, as it has no `Debug`.
pub struct Kdc {
    server: Option<Url>,
    timeout: Duration,
    password: Zeroizing<String>,
    /// The address that answered last: a login has three questions, and a dead address is waited for once.
    answered: Mutex<Option<SocketAddr>>,
}

impl Kdc {
    /// The server that was `named` (as [`kdc_url`] takes it), else the one of the system's settings (`krb5.conf`, the
    /// registry), else the domain's own name: all controllers of an Active Directory domain answer to that.
    ///
    /// `timeout` is for one answer. `password` is the user's: answers of MIT's servers need it to be read.
    ///
    /// # Errors
    /// [`AuthError::Refused`] where what was named is no server: nobody else is asked instead.
    pub fn new(
        named: Option<&str>,
        domain: &str,
        password: &str,
        timeout: Duration,
    ) -> Result<Self, AuthError> {
        let server = match named {
            Some(named) => Some(kdc_url(named).map_err(AuthError::Refused)?),
            None => {
                let realm = domain.to_uppercase();
                let silent = tracing::subscriber::NoSubscriber::default();
                let known =
                    tracing::subscriber::with_default(silent, || sspi::detect_kdc_url(&realm));
                known.or_else(|| Url::parse(&format!("tcp://{}", domain.to_lowercase())).ok())
            }
        };
        let password = Zeroizing::new(password.to_owned());
        Ok(Self { server, timeout, password, answered: Mutex::default() })
    }

    /// Where it is; none where the domain has no name.
    pub fn url(&self) -> Option<Url> {
        self.server.clone()
    }

    fn ask(&self, url: &Url, request: &[u8]) -> std::io::Result<Vec<u8>> {
        let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
        let port = url.port().unwrap_or(KERBEROS_PORT);
        let mut addresses: Vec<SocketAddr> =
            (host, port).to_socket_addrs()?.take(MAX_ADDRESSES).collect();
        let known = *self.answered.lock();
        if let Some(at) = addresses.iter().position(|address| Some(*address) == known) {
            addresses.swap(0, at);
        }
        self.ask_any(&addresses, request)
    }

    /// The first answer. Each address has a time of its own, so that one which drops what it gets, or takes connections
    /// and says nothing, does not use up the others'.
    fn ask_any(&self, addresses: &[SocketAddr], request: &[u8]) -> std::io::Result<Vec<u8>> {
        let mut last = std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address");
        for (index, address) in addresses.iter().enumerate() {
            let part = |divisor: u32| match index + 1 < addresses.len() {
                true => (self.timeout / divisor).max(SHORTEST).min(self.timeout),
                false => self.timeout,
            };
            let connected = TcpStream::connect_timeout(address, part(4));
            match connected.and_then(|stream| exchange(stream, request, part(2))) {
                Ok(answer) => {
                    *self.answered.lock() = Some(*address);
                    return Ok(answer);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

/// The URL of a server that a user named as `host`, `host:port` or `tcp://host:port`.
///
/// # Errors
/// A phrase that says what is wrong with it.
pub fn kdc_url(text: &str) -> Result<Url, String> {
    let whole = if text.contains("://") { text.to_owned() } else { format!("tcp://{text}") };
    let url = Url::parse(&whole).map_err(|error| format!("{text:?} is no KDC: {error}"))?;
    let is_server = url.host_str().is_some_and(|host| !host.is_empty())
        && url.username().is_empty()
        && url.password().is_none()
        && matches!(url.path(), "" | "/");
    match url.scheme() {
        "tcp" if is_server => Ok(url),
        _ => Err(format!("{text:?} is no KDC, which is asked over TCP: give HOST or HOST:PORT")),
    }
}

/// Sends a request that begins with its length, and receives an answer that does (RFC 4120 7.2.2), all within `limit`.
fn exchange(mut stream: TcpStream, request: &[u8], limit: Duration) -> std::io::Result<Vec<u8>> {
    let deadline = Instant::now() + limit;
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
    let mut part = [0; 4096];
    let mut body = stream.take(u64::from(length));
    loop {
        body.get_ref().set_read_timeout(rest())?;
        let count = body.read(&mut part)?;
        answer.extend_from_slice(part.get(..count).unwrap_or_default());
        if body.limit() == 0 {
            return Ok(answer);
        }
        // A byte now and then is no answer.
        if count == 0 || Instant::now() >= deadline {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
}

impl NetworkClient for Kdc {
    fn send(&self, request: &NetworkRequest) -> sspi::Result<Vec<u8>> {
        let failed = |detail: String| {
            let server = request.url.host_str().unwrap_or_default();
            Error::new(
                ErrorKind::NoAuthenticatingAuthority,
                format!(
                    "the domain's server {server} does not answer: {detail} (name it by --winrm-kdc or VMTIDE_WINRM_KDC)"
                ),
            )
        };
        let framed;
        let data = match request.protocol {
            NetworkProtocol::Tcp => &request.data,
            // Whoever speaks UDP speaks TCP, too, where a large ticket has room; there its length goes first.
            NetworkProtocol::Udp => {
                let length = u32::try_from(request.data.len()).unwrap_or(u32::MAX);
                framed = [&length.to_be_bytes()[..], &request.data].concat();
                &framed
            }
            _ => return Err(failed("only TCP is spoken".into())),
        };
        let answer = self.ask(&request.url, data);
        let answer = answer.map_err(|error| failed(error.to_string()))?;
        Ok(mit::with_right_tag(answer, &self.password))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    const QUESTION: &[u8] = b"abc";

    fn kdc(named: Option<&str>, domain: &str) -> Kdc {
        Kdc::new(named, domain, "p", Duration::from_secs(5)).unwrap()
    }

    /// A server that answers one who asks [`QUESTION`].
    fn served(answer: &'static [u8]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let mut request = [0; QUESTION.len()];
                if stream.read_exact(&mut request).is_ok() {
                    drop(stream.write_all(answer));
                }
            }
        });
        address
    }

    fn send(answer: &'static [u8], protocol: NetworkProtocol) -> sspi::Result<Vec<u8>> {
        let kdc = kdc(Some(&served(answer).to_string()), "d.example");
        kdc.send(&NetworkRequest { protocol, url: kdc.url().unwrap(), data: QUESTION.to_vec() })
    }

    #[test]
    fn answers_are_whole_or_none() {
        assert_eq!(send(b"\0\0\0\x02hi", NetworkProtocol::Tcp).unwrap(), b"\0\0\0\x02hi");
        for bad in [&b"\0\0"[..], b"\0\0\0\x05hi", b"\x7f\xff\xff\xffhi"] {
            let error = send(bad, NetworkProtocol::Tcp).unwrap_err();
            assert_eq!(error.error_type, ErrorKind::NoAuthenticatingAuthority, "{error}");
        }
        let error = send(b"\0\0\0\x02hi", NetworkProtocol::Https).unwrap_err();
        assert!(error.description.contains("only TCP"), "{error}");
    }

    /// Of a name with several addresses the living one is found, whatever the dead ones do: refuse, or take a
    /// connection and say nothing.
    #[test]
    fn a_dead_address_leaves_time_for_the_living() {
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        // Nobody listens there, and no other test gets it.
        let closed = SocketAddr::from(([127, 0, 0, 1], 1));
        let living = served(b"\0\0\0\x02hi");
        let timeout = Duration::from_secs(5);
        let kdc = Kdc::new(None, "d.example", "p", timeout).unwrap();
        let addresses = [silent.local_addr().unwrap(), closed, living];
        assert_eq!(kdc.ask_any(&addresses, QUESTION).unwrap(), b"\0\0\0\x02hi");
        // It is the first to be asked the next time.
        assert_eq!(*kdc.answered.lock(), Some(living));
        assert!(kdc.ask_any(&addresses[..2], QUESTION).is_err());
        assert!(kdc.ask_any(&[], QUESTION).is_err());
    }

    #[test]
    fn domains_are_found_by_their_name() {
        let kdc = kdc(None, "Nowhere.Invalid");
        assert_eq!(kdc.url().unwrap().as_str(), "tcp://nowhere.invalid");
    }

    #[test]
    fn servers_that_are_named_are_taken_or_refused() {
        assert_eq!(kdc_url("dc1").unwrap().host_str(), Some("dc1"));
        assert_eq!(kdc_url("dc1:1088").unwrap().port(), Some(1088));
        assert_eq!(kdc_url("tcp://[fe80::1]:88").unwrap().port(), Some(88));
        for text in ["", "https://dc1/KdcProxy", "dc1:x", "a b", "u@dc1", "dc1/x", "udp://dc1"] {
            assert!(kdc_url(text).is_err(), "{text}");
            // Nobody else is asked in its place.
            assert!(Kdc::new(Some(text), "d.example", "p", SHORTEST).is_err(), "{text}");
        }
    }
}
