//! The login: NTLM or Kerberos through `sspi`, wrapped in SPNEGO.
//!
//! NTLM works with any host that is reached by a name or an address. Kerberos needs the host's name, a key
//! distribution centre, and gives what NTLM does not: the host proves that it is the one meant.

use crate::error::{Result, SmbError};
use sspi::generator::NetworkRequest;
use sspi::network_client::{NetworkClient, NetworkProtocol};
use sspi::ntlm::NtlmConfig;
use sspi::{
    AuthIdentity, BufferType, ClientRequestFlags, CredentialUse, Credentials, CredentialsBuffers,
    DataRepresentation, KerberosConfig, Negotiate, NegotiateConfig, SecurityBuffer, SecurityStatus,
    Sspi, SspiImpl, Username,
};
use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;
use zeroize::Zeroizing;

/// The longest answer of a key distribution centre. Tickets of users in very many groups have 64 KiB.
const MAX_KDC_ANSWER_BYTES: u32 = 1 << 20;
/// As long as Windows waits.
const KDC_TIMEOUT: Duration = Duration::from_secs(5);
/// More steps than any login has.
pub(crate) const MAX_STEPS: usize = 8;

/// How to log in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// NTLM with the password's hash; the host need not be in a domain.
    #[default]
    Ntlm,
    /// Kerberos only; a host that does not take the ticket is refused.
    Kerberos,
    /// Kerberos where the host is called by its name, the user has a domain and that domain's centre answers; NTLM
    /// otherwise.
    Negotiate,
}

impl Method {
    /// What to try for `user` at `host`, in this order.
    pub(crate) fn ways(self, user: &str, host: &str) -> &'static [Self] {
        let has_domain = user.rsplit_once('@').is_some_and(|(_, domain)| !domain.is_empty())
            || user.split_once('\\').is_some_and(|(domain, _)| !matches!(domain, "" | "."));
        match self {
            Self::Negotiate if has_domain && host.parse::<std::net::IpAddr>().is_err() => {
                &[Self::Kerberos, Self::Ntlm]
            }
            Self::Negotiate | Self::Ntlm => &[Self::Ntlm],
            Self::Kerberos => &[Self::Kerberos],
        }
    }
}

/// Who logs in. Shows no secret in its `Debug`.
#[derive(Clone)]
pub struct Login {
    /// `user`, `DOMAIN\user` or `user@domain`.
    pub user: String,
    /// The password.
    pub password: Zeroizing<String>,
    /// How.
    pub method: Method,
    /// The key distribution centre, `host`, `host:port` or `tcp://host:port`; none finds it in the system's settings
    /// (`SSPI_KDC_URL`, `krb5.conf`, Windows' registry).
    pub kdc: Option<String>,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Login").field("user", &self.user).field("method", &self.method).finish()
    }
}

/// One login that is under way.
pub(crate) struct Authenticator {
    peer: String,
    target: String,
    package: Negotiate,
    credentials: Option<CredentialsBuffers>,
    /// Whether the package expects no further token.
    is_complete: bool,
}

impl Authenticator {
    /// A login at `server`, which is called `host` in its own name for services.
    pub(crate) fn new(login: &Login, method: Method, host: &str, peer: &str) -> Result<Self> {
        if login.user.is_empty() || login.password.is_empty() {
            return Err(SmbError::Login {
                peer: peer.to_owned(),
                detail: "a user name and a password are needed: nobody is logged in as a guest"
                    .into(),
            });
        }
        let failed = |error: sspi::Error| told(peer, &error);
        // The name that NTLM tells the server of this machine; nothing depends on it.
        let here = "vmtide".to_owned();
        let (packages, protocol): (_, Box<dyn sspi::negotiate::ProtocolConfig>) = match method {
            Method::Ntlm | Method::Negotiate => {
                ("ntlm,!kerberos,!pku2u", Box::new(NtlmConfig::new(here.clone())))
            }
            Method::Kerberos => {
                let kdc_url = login
                    .kdc
                    .as_deref()
                    .map(kdc_url)
                    .transpose()
                    .map_err(|detail| SmbError::Login { peer: peer.to_owned(), detail })?;
                let config = KerberosConfig { kdc_url, client_computer_name: here.clone() };
                ("!ntlm,kerberos,!pku2u", Box::new(config))
            }
        };
        let config = NegotiateConfig::new(protocol, Some(packages.into()), here);
        let mut package = Negotiate::new_client(config).map_err(failed)?;
        let username = Username::parse(&login.user).map_err(|error| SmbError::Login {
            peer: peer.to_owned(),
            detail: format!("{:?} is no user name: {error}", login.user),
        })?;
        let identity = AuthIdentity { username, password: login.password.to_string().into() };
        let credentials = Credentials::AuthIdentity(identity);
        let acquired = guarded(|| {
            package
                .acquire_credentials_handle()
                .with_credential_use(CredentialUse::Outbound)
                .with_auth_data(&credentials)
                .execute(&mut package)
        });
        let acquired = acquired.map_err(failed)?;
        Ok(Self {
            peer: peer.to_owned(),
            target: format!("cifs/{host}"),
            package,
            credentials: acquired.credentials_handle,
            is_complete: false,
        })
    }

    /// The next token, after the server's `answer`; empty for the first.
    pub(crate) fn step(&mut self, answer: &[u8]) -> Result<Vec<u8>> {
        let mut input = [SecurityBuffer::new(answer.to_vec(), BufferType::Token)];
        let mut output = [SecurityBuffer::new(Vec::new(), BufferType::Token)];
        let mut builder = self
            .package
            .initialize_security_context()
            .with_credentials_handle(&mut self.credentials)
            // Not USE_SESSION_KEY: with Kerberos it means a ticket from user to user, which servers do not take.
            .with_context_requirements(
                ClientRequestFlags::MUTUAL_AUTH | ClientRequestFlags::INTEGRITY,
            )
            .with_target_data_representation(DataRepresentation::Native)
            .with_target_name(&self.target)
            .with_input(&mut input)
            .with_output(&mut output);
        let package = &mut self.package;
        let result = guarded(|| {
            let mut generator = package.initialize_security_context_impl(&mut builder)?;
            generator.resolve_with_client(&Kdc)
        });
        let status = result.map_err(|error| told(&self.peer, &error))?.status;
        self.is_complete = status == SecurityStatus::Ok;
        if !matches!(status, SecurityStatus::Ok | SecurityStatus::ContinueNeeded) {
            let detail = format!("the login ended as {status:?}, which is not known here");
            return Err(SmbError::Login { peer: self.peer.clone(), detail });
        }
        let [output] = output;
        Ok(output.buffer)
    }

    /// Whether nothing is expected from the server any more.
    pub(crate) const fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// The key that the login agreed on.
    pub(crate) fn key(&self) -> Result<Zeroizing<Vec<u8>>> {
        let keys = self.package.query_context_session_key().map_err(|e| told(&self.peer, &e))?;
        let key = Zeroizing::new(keys.session_key.as_ref().clone());
        if key.len() < 16 {
            return Err(SmbError::protocol("the login gives a key of less than 128 bits"));
        }
        Ok(key)
    }
}

/// Calls into the library. It logs tokens, which must stay out of our logs; and where it meets bytes that it did not
/// think of it may panic, which must end the login and not the process.
fn guarded<T>(call: impl FnOnce() -> sspi::Result<T>) -> sspi::Result<T> {
    let silent = tracing::subscriber::NoSubscriber::default();
    let result = tracing::subscriber::with_default(silent, || catch_unwind(AssertUnwindSafe(call)));
    result.unwrap_or_else(|_| {
        let text = "the authentication library cannot read what came".to_owned();
        Err(sspi::Error::new(sspi::ErrorKind::InvalidToken, text))
    })
}

fn kdc_url(text: &str) -> std::result::Result<url::Url, String> {
    let text = if text.contains("://") { text.to_owned() } else { format!("tcp://{text}") };
    let url = url::Url::parse(&text).map_err(|error| format!("{text:?} is no KDC: {error}"))?;
    match url.scheme() {
        "tcp" if url.host().is_some() => Ok(url),
        _ => Err(format!("{text:?}: a KDC is asked over TCP: give HOST or tcp://HOST:PORT")),
    }
}

/// The package's error in a line. Its texts hold no secrets, but may hold line ends.
fn told(peer: &str, error: &sspi::Error) -> SmbError {
    use sspi::ErrorKind as K;
    let line = error.description.split_whitespace().collect::<Vec<_>>().join(" ");
    if error.error_type == K::NoAuthenticatingAuthority {
        let peer = "a key distribution centre of the domain".to_owned();
        return SmbError::Unreachable { peer, detail: line };
    }
    let detail = match error.error_type {
        K::TimeSkew => format!("this machine's clock and the domain's differ: {line}"),
        K::ContextExpired => format!("the ticket has expired: {line}"),
        K::LogonDenied | K::NoCredentials | K::UnknownCredentials | K::WrongCredentialHandle => {
            format!("the user name or password is wrong: {line}")
        }
        kind => format!("{kind:?}: {line}"),
    };
    SmbError::Login { peer: peer.to_owned(), detail }
}

/// Asks a key distribution centre over TCP (RFC 4120, 7.2.2).
struct Kdc;

impl NetworkClient for Kdc {
    fn send(&self, request: &NetworkRequest) -> sspi::Result<Vec<u8>> {
        let failed = |error: std::io::Error| {
            let host = request.url.host_str().unwrap_or_default();
            sspi::Error::new(sspi::ErrorKind::NoAuthenticatingAuthority, format!("{host}: {error}"))
        };
        // UDP loses large tickets; whoever has it has TCP, too.
        if !matches!(request.protocol, NetworkProtocol::Tcp | NetworkProtocol::Udp) {
            return Err(failed(std::io::Error::other("only Kerberos over TCP is known here")));
        }
        let host = request.url.host_str().unwrap_or_default().trim_matches(['[', ']']);
        let addresses =
            (host, request.url.port().unwrap_or(88)).to_socket_addrs().map_err(failed)?;
        let mut last = std::io::Error::from(std::io::ErrorKind::AddrNotAvailable);
        for address in addresses {
            match TcpStream::connect_timeout(&address, KDC_TIMEOUT) {
                Ok(stream) => return exchange(stream, &request.data).map_err(failed),
                Err(error) => last = error,
            }
        }
        Err(failed(last))
    }
}

/// Sends a request that begins with its length, and receives an answer that does.
fn exchange(mut stream: TcpStream, request: &[u8]) -> std::io::Result<Vec<u8>> {
    stream.set_read_timeout(Some(KDC_TIMEOUT))?;
    stream.set_write_timeout(Some(KDC_TIMEOUT))?;
    stream.write_all(request)?;
    let mut head = [0; 4];
    stream.read_exact(&mut head)?;
    let length = u32::from_be_bytes(head);
    if length > MAX_KDC_ANSWER_BYTES {
        let text = format!("an answer of {length} bytes");
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, text));
    }
    let mut answer = head.to_vec();
    stream.take(u64::from(length)).read_to_end(&mut answer)?;
    if answer.len() as u64 != u64::from(length) + 4 {
        return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof));
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn login(user: &str, password: &str) -> Login {
        Login {
            user: user.into(),
            password: Zeroizing::new(password.into()),
            method: Method::Ntlm,
            kdc: None,
        }
    }

    #[test]
    fn nobody_is_a_guest_and_no_secret_is_shown() {
        for (user, password) in [("", "x"), ("x", "")] {
            let error = Authenticator::new(&login(user, password), Method::Ntlm, "hv1", "hv1:445");
            let error = error.err().unwrap();
            assert!(matches!(error, SmbError::Login { .. }), "{error}");
        }
        let shown = format!("{:?}", login("admin", "s3cret"));
        assert!(shown.contains("admin") && !shown.contains("s3cret"), "{shown}");
    }

    #[test]
    fn a_login_begins_with_a_token_and_ends_at_nonsense() {
        let mut login =
            Authenticator::new(&login(r"LAB\admin", "x"), Method::Ntlm, "hv1", "hv1:445").unwrap();
        let first = login.step(&[]).unwrap();
        assert!(!first.is_empty() && !login.is_complete() && login.key().is_err());
        assert!(login.step(b"nonsense").is_err());
    }

    #[test]
    fn kerberos_is_tried_where_it_can_be() {
        use Method::{Kerberos, Negotiate, Ntlm};
        assert_eq!(Negotiate.ways("admin@lab.test", "hv1.lab.test"), [Kerberos, Ntlm]);
        assert_eq!(Negotiate.ways(r"LAB\admin", "hv1"), [Kerberos, Ntlm]);
        assert_eq!(Negotiate.ways(r".\admin", "hv1"), [Ntlm]);
        assert_eq!(Negotiate.ways("admin", "hv1"), [Ntlm]);
        assert_eq!(Negotiate.ways("admin@lab.test", "10.0.0.7"), [Ntlm]);
        assert_eq!(Ntlm.ways("admin@lab.test", "hv1"), [Ntlm]);
        assert_eq!(Kerberos.ways("admin", "10.0.0.7"), [Kerberos]);
    }

    /// Where nobody answers, that is what is said, and not that a password is wrong.
    #[test]
    fn a_centre_that_does_not_answer_is_told_from_a_wrong_password() {
        let login = Login { kdc: Some("127.0.0.1:1".into()), ..login("admin@lab.test", "x") };
        let mut login = Authenticator::new(&login, Method::Kerberos, "hv1", "hv1:445").unwrap();
        let error = login.step(&[]).unwrap_err();
        assert!(matches!(error, SmbError::Unreachable { .. }), "{error}");
    }

    #[test]
    fn centres_are_hosts() {
        assert_eq!(kdc_url("dc1").unwrap().host_str(), Some("dc1"));
        assert_eq!(kdc_url("tcp://dc1:1088").unwrap().port(), Some(1088));
        assert!(kdc_url("https://dc1/KdcProxy").is_err());
        assert!(kdc_url("").is_err());
    }
}
