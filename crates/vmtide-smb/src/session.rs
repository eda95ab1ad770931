//! A login at one server: negotiation, session, shares.

use crate::auth::{Authenticator, Login, MAX_STEPS, Method};
use crate::crypto::{Cipher, PreauthHash, Signer};
use crate::error::{Result, SmbError, login_reason, status};
use crate::header::{Command, HEADER_BYTES};
use crate::link::{Link, Reply, Request, Security, Traffic};
use crate::negotiate::{self, Negotiated, SIGNING_REQUIRED};
use crate::wire::{Reader, Writer, length16, utf16};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

/// The port of SMB over TCP.
pub const DEFAULT_PORT: u16 = 445;
/// `SMB2_SESSION_FLAG_IS_GUEST` and `…_IS_NULL`.
const NOBODY: u16 = 3;
/// `SMB2_SHARE_TYPE_DISK`.
const DISK_SHARE: u8 = 1;
/// `SMB2_SHAREFLAG_ENCRYPT_DATA`.
const SHARE_ENCRYPTS: u32 = 0x8000;

/// Whether messages are encrypted. They are signed in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protection {
    /// Encrypted where the server can, which Windows and Samba do unless it was switched off.
    #[default]
    EncryptedWhereOffered,
    /// A server that cannot encrypt is refused.
    Encrypted,
    /// Signed only: for networks that are trusted or encrypt themselves.
    Signed,
}

/// How to get at servers.
#[derive(Clone, Debug)]
pub struct SmbOptions {
    /// The port.
    pub port: u16,
    /// Who logs in.
    pub login: Login,
    /// Whether messages are encrypted.
    pub protection: Protection,
    /// How long one request may take before the server counts as gone.
    pub timeout: Duration,
    /// How long a connection that broke is tried to be made again before a read fails.
    pub reconnect_for: Duration,
}

impl SmbOptions {
    /// The usual ones.
    pub const fn new(login: Login) -> Self {
        Self {
            port: DEFAULT_PORT,
            login,
            protection: Protection::EncryptedWhereOffered,
            timeout: Duration::from_secs(60),
            reconnect_for: Duration::from_secs(60),
        }
    }
}

/// A logged-in connection.
pub(crate) struct Session {
    pub(crate) link: Link,
    pub(crate) negotiated: Negotiated,
    /// The shares that are connected, by their names in lower case.
    trees: Mutex<HashMap<String, u32>>,
    server: String,
}

impl Session {
    /// Connects and logs in.
    ///
    /// # Errors
    /// [`SmbError::Unreachable`], [`SmbError::Login`], [`SmbError::Unsupported`] for servers of old dialects and where
    /// encryption was insisted on.
    pub(crate) fn connect(options: &SmbOptions, server: &str) -> Result<Self> {
        let login = &options.login;
        let mut ways = login.method.ways(&login.user, server).iter().peekable();
        loop {
            let method = *ways.next().unwrap_or(&login.method);
            match Self::connect_by(method, options, server) {
                // No ticket is to be had; the host itself is another matter.
                Err(SmbError::Unreachable { detail, .. })
                    if method == Method::Kerberos && ways.peek().is_some() =>
                {
                    tracing::debug!(%server, %detail, "no Kerberos for SMB: NTLM is tried");
                }
                other => return other,
            }
        }
    }

    fn connect_by(method: Method, options: &SmbOptions, server: &str) -> Result<Self> {
        let peer = format!("{server}:{}", options.port);
        let link = Link::start(dial(options, server, &peer)?, peer.clone(), options.timeout)?;
        let mut preauth = PreauthHash::new();
        let negotiated = negotiate(&link, options, server, &mut preauth)?;
        if options.protection == Protection::Encrypted && negotiated.encryption.is_none() {
            return Err(SmbError::unsupported(format!(
                "{peer} does not encrypt (AES-GCM), and encryption is insisted on"
            )));
        }
        let security = log_in(&link, (options, method), server, &peer, negotiated, preauth)?;
        link.secure(security);
        tracing::debug!(%peer, ?negotiated, "logged in over SMB");
        Ok(Self { link, negotiated, trees: Mutex::default(), server: server.to_owned() })
    }

    /// The id of a share, which is connected where it is not.
    ///
    /// # Errors
    /// [`SmbError::NotFound`], [`SmbError::Denied`], or that it is no share of files.
    pub(crate) fn tree(&self, share: &str) -> Result<u32> {
        let key = share.to_lowercase();
        if let Some(id) = self.trees.lock().get(&key) {
            return Ok(*id);
        }
        let what = format!(r"\\{}\{share}", self.server);
        let path = utf16(&what);
        let mut body = Writer::default();
        body.u16(9).u16(0).u16(72).u16(length16(&path, "the share's name")?).bytes(&path);
        let reply = self.call(Command::TreeConnect, 0, &body.0, 0)?;
        if reply.header.status != status::SUCCESS {
            return Err(SmbError::from_status(&what, reply.header.status));
        }
        let reader = Reader::new(reply.message(), "answer to TREE_CONNECT");
        reader.structure(HEADER_BYTES, 16)?;
        if reader.u8(HEADER_BYTES + 2)? != DISK_SHARE {
            return Err(SmbError::unsupported(format!("{what} is no share of files")));
        }
        let flags = reader.u32(HEADER_BYTES + 4)?;
        if flags & SHARE_ENCRYPTS != 0 && self.negotiated.encryption.is_none() {
            return Err(SmbError::unsupported(format!(
                "{what} must be encrypted, which was switched off here or is not known to the server"
            )));
        }
        let id = reply.header.tree_id;
        self.trees.lock().insert(key, id);
        Ok(id)
    }

    /// Connects the share anew the next time, where `error` may say that it is gone: a share that was removed and made
    /// again has another id.
    pub(crate) fn forget_tree(&self, tree: u32, error: &SmbError) {
        if error.is_connection_lost() {
            self.trees.lock().retain(|_, id| *id != tree);
        }
    }

    /// A request with no data behind its body, that is answered with at most so many bytes.
    pub(crate) fn call(
        &self,
        command: Command,
        tree_id: u32,
        body: &[u8],
        answer_bytes: u32,
    ) -> Result<Reply> {
        let payload_bytes = answer_bytes.max(u32::try_from(body.len()).unwrap_or(u32::MAX));
        self.link.call(&Request { command, tree_id, body, data: &[], payload_bytes })
    }

    pub(crate) fn traffic(&self) -> Traffic {
        self.link.traffic()
    }
}

fn dial(options: &SmbOptions, server: &str, peer: &str) -> Result<TcpStream> {
    let unreachable = |detail: String| SmbError::Unreachable { peer: peer.to_owned(), detail };
    let addresses = (server, options.port)
        .to_socket_addrs()
        .map_err(|error| unreachable(format!("its name has no address: {error}")))?;
    let mut last = "its name has no address".to_owned();
    for address in addresses {
        match TcpStream::connect_timeout(&address, options.timeout.min(Duration::from_secs(15))) {
            Ok(stream) => return Ok(stream),
            Err(error) => {
                last =
                    format!("{error}; check that the host runs and port {} is open", options.port);
            }
        }
    }
    Err(unreachable(last))
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|error| SmbError::unsupported(format!("no random numbers: {error}")))?;
    Ok(bytes)
}

fn negotiate(
    link: &Link,
    options: &SmbOptions,
    server: &str,
    preauth: &mut PreauthHash,
) -> Result<Negotiated> {
    let encrypt = options.protection != Protection::Signed;
    let body = negotiate::request(server, random()?, &random()?, encrypt)?;
    let request = Request {
        command: Command::Negotiate,
        tree_id: 0,
        body: &body,
        data: &[],
        payload_bytes: 0,
    };
    let (sent, reply) = link.call_login(&request, 0)?;
    preauth.add(&sent);
    preauth.add(reply.message());
    let mut negotiated = negotiate::response(reply.message(), &reply.header)?;
    if !encrypt {
        negotiated.encryption = None;
    }
    Ok(negotiated)
}

/// The login (MS-SMB2 3.2.5.3). Keys depend on all of its messages but the last.
fn log_in(
    link: &Link,
    (options, method): (&SmbOptions, Method),
    server: &str,
    peer: &str,
    negotiated: Negotiated,
    mut preauth: PreauthHash,
) -> Result<Security> {
    let refused = |detail: String| SmbError::Login { peer: peer.to_owned(), detail };
    let mut login = Authenticator::new(&options.login, method, server, peer)?;
    let mut session_id = 0;
    let mut answer = Vec::new();
    for _ in 0..MAX_STEPS {
        let token = login.step(&answer)?;
        let mut body = Writer::default();
        body.u16(25).u8(0).u8(SIGNING_REQUIRED).u32(0).u32(0).u16(88);
        body.u16(length16(&token, "the ticket")?).u64(0).bytes(&token);
        let request = Request {
            command: Command::SessionSetup,
            tree_id: 0,
            body: &body.0,
            data: &[],
            payload_bytes: u32::try_from(body.0.len()).unwrap_or(u32::MAX),
        };
        let (sent, reply) = link.call_login(&request, session_id)?;
        preauth.add(&sent);
        let code = reply.header.status;
        if let Some(reason) = login_reason(code) {
            return Err(refused(reason.to_owned()));
        }
        if code != status::SUCCESS && code != status::MORE_PROCESSING_REQUIRED {
            return Err(SmbError::from_status(&format!("login to {peer}"), code));
        }
        let (flags, token) = setup_answer(reply.message())?;
        if session_id == 0 {
            session_id = reply.header.session_id;
        }
        if session_id == 0 || reply.header.session_id != session_id {
            return Err(SmbError::protocol("the session's id is missing or changes"));
        }
        if code == status::MORE_PROCESSING_REQUIRED {
            preauth.add(reply.message());
            answer = token;
            continue;
        }
        if flags & NOBODY != 0 {
            return Err(refused(
                "the server took the user for a guest; give an account it knows".into(),
            ));
        }
        // The server's last token may complete the login: it proves then that nobody changed what was offered.
        if !login.is_complete() {
            login.step(&token)?;
        }
        let key = login.key()?;
        let signer = Signer::new(negotiated.signing, key.get(..16).unwrap_or_default(), &preauth)?;
        // Who does not know the key cannot have signed this.
        signer.verify(reply.message(), reply.header.flags, reply.header.message_id)?;
        let cipher = match negotiated.encryption {
            Some(encryption) => Some(Cipher::new(encryption, &key, &preauth)?),
            None => None,
        };
        return Ok(Security { session_id, signer, cipher });
    }
    Err(refused(format!("the login did not end after {MAX_STEPS} steps")))
}

/// The session's flags and the token in an answer to `SESSION_SETUP`.
pub(crate) fn setup_answer(message: &[u8]) -> Result<(u16, Vec<u8>)> {
    let reader = Reader::new(message, "answer to SESSION_SETUP");
    reader.structure(HEADER_BYTES, 9)?;
    let flags = reader.u16(HEADER_BYTES + 2)?;
    let at = usize::from(reader.u16(HEADER_BYTES + 4)?);
    let length = usize::from(reader.u16(HEADER_BYTES + 6)?);
    let token = if length == 0 { &[] } else { reader.slice(at, length)? };
    Ok((flags, token.to_vec()))
}
