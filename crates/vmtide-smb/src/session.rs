//! A login at one server: negotiation, session, shares.

use crate::auth::{Authenticator, Login, MAX_STEPS, Method};
use crate::crypto::{Cipher, PreauthHash, Signer};
use crate::dial::dial;
use crate::error::{Result, SmbError, login_reason, status};
use crate::header::{Command, HEADER_BYTES};
use crate::link::{Link, Reply, Request, Security, Traffic};
use crate::negotiate::{self, Negotiated, SIGNING_REQUIRED};
use crate::path::SharePath;
use crate::requests::{Opened, Purpose};
use crate::wire::{Reader, Writer, length16, utf16};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::time::Duration;
use vmtide_sspi::{AuthError, ticket_refusal};

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
    /// How long one request may take before the server counts as gone. What the server says it works on may take longer,
    /// for as long as it lives.
    pub timeout: Duration,
    /// How long a connection that broke is tried to be made again before a read fails. For half of it a domain's server
    /// that does not answer is asked for a new ticket, before a session is given up whose ticket expired.
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
    /// How the user was proven.
    pub(crate) method: Method,
    /// Why NTLM proves the user although Kerberos was tried.
    pub(crate) fallback: Option<String>,
}

/// Why there is no session.
struct Failed {
    error: SmbError,
    /// Whether another mechanism may do.
    may_go_another_way: bool,
}

impl From<SmbError> for Failed {
    fn from(error: SmbError) -> Self {
        Self { error, may_go_another_way: false }
    }
}

impl Failed {
    /// What a failed login at `peer` is to those who wanted the file.
    fn of(error: AuthError, peer: &str) -> Self {
        let may_go_another_way = error.may_go_another_way();
        let peer = peer.to_owned();
        let error = match error {
            AuthError::Refused(detail) | AuthError::Unusable(detail) => {
                SmbError::Login { peer, detail }
            }
            AuthError::NoAuthority(detail) => SmbError::Unreachable { peer, detail },
            AuthError::Broken(detail) => SmbError::Protocol { detail },
        };
        Self { error, may_go_another_way }
    }
}

impl Session {
    /// Connects and logs in.
    ///
    /// # Errors
    /// [`SmbError::Unreachable`], [`SmbError::Login`], [`SmbError::Unsupported`] for servers of old dialects and where
    /// encryption was insisted on.
    pub(crate) fn connect(options: &SmbOptions, server: &str) -> Result<Self> {
        let mut why_not = None;
        for method in Method::ways(&options.login, server) {
            match Self::connect_by(*method, options, server) {
                Ok(session) => return Ok(Self { fallback: why_not, ..session }),
                Err(failed) if failed.may_go_another_way && *method != Method::Ntlm => {
                    // The last one's error is told where none does.
                    why_not = Some(failed.error.to_string());
                    if options.login.method == Method::Kerberos {
                        return Err(failed.error);
                    }
                }
                Err(failed) => return Err(failed.error),
            }
        }
        Err(SmbError::unsupported("no way to log in is known"))
    }

    fn connect_by(method: Method, options: &SmbOptions, server: &str) -> Result<Self, Failed> {
        let peer = format!("{server}:{}", options.port);
        let link = Link::start(dial(options, server, &peer)?, peer.clone(), options.timeout)?;
        let mut preauth = PreauthHash::new();
        let negotiated = negotiate(&link, options, server, &mut preauth)?;
        if options.protection == Protection::Encrypted && negotiated.encryption.is_none() {
            let text = format!("{peer} does not encrypt (AES-GCM), and encryption is insisted on");
            return Err(SmbError::unsupported(text).into());
        }
        let security = log_in(&link, (options, method), server, &peer, negotiated, preauth)?;
        link.secure(security);
        tracing::debug!(%peer, ?method, ?negotiated, "logged in over SMB");
        let (trees, server) = (Mutex::default(), server.to_owned());
        Ok(Self { link, negotiated, trees, server, method, fallback: None })
    }

    /// Tells the server anew who we are, when it says that the ticket has expired (MS-SMB2 3.2.4.2.3.1). Keys, shares and
    /// what is open stay as they are, so nothing that was written is in doubt. All others are held meanwhile, but not
    /// while the domain is asked.
    ///
    /// # Errors
    /// Those of a login. [`SmbError::Unreachable`]: the domain's server does not answer, and nothing was said to this one;
    /// asked again it may do.
    pub(crate) fn renew(&self, options: &SmbOptions) -> Result<()> {
        let failed = |error: AuthError| Failed::of(error, &self.server).error;
        let mut login =
            Authenticator::new(&options.login, self.method, &self.server).map_err(failed)?;
        let token = login.step(&[]).map_err(failed)?;
        let _held = self.link.hold();
        self.log_in_again(&mut login, token).inspect_err(|_| {
            // Before the others go on: to a server that waits for the rest of a login they could say nothing.
            self.link.end("its Kerberos ticket has expired, and no other was taken");
        })?;
        self.link.renewed();
        tracing::info!(server = %self.server, "the SMB session goes on with a new ticket");
        Ok(())
    }

    fn log_in_again(&self, login: &mut Authenticator, mut token: Vec<u8>) -> Result<()> {
        let failed = |error: AuthError| Failed::of(error, &self.server).error;
        for _ in 0..MAX_STEPS {
            // As any other request it is signed or encrypted by the session's keys, and so is its answer.
            let reply = set_up(&self.link, 0, &token)?.1;
            let code = reply.header.status;
            if let Some(reason) = login_refusal(reply.message(), code, self.method) {
                return Err(failed(AuthError::Refused(reason.to_owned())));
            }
            if code != status::SUCCESS && code != status::MORE_PROCESSING_REQUIRED {
                return Err(SmbError::from_status(&format!("login to {}", self.server), code));
            }
            let (_, answer) = setup_answer(reply.message())?;
            if code == status::MORE_PROCESSING_REQUIRED {
                token = login.step(&answer).map_err(failed)?;
                continue;
            }
            if !login.is_complete() {
                login.step(&answer).map_err(failed)?;
            }
            return Ok(());
        }
        Err(failed(AuthError::Broken("the login does not come to an end".into())))
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

    /// Opens or makes a file or directory, and connects its share where it is not.
    ///
    /// # Errors
    /// Those of [`tree`](Self::tree) and of the server for `path`.
    pub(crate) fn open(&self, path: &SharePath, purpose: Purpose) -> Result<(u32, Opened)> {
        let tree = self.tree(&path.share)?;
        let opened = self.create(tree, &path.path, purpose, &path.to_string());
        let opened = opened.inspect_err(|error| self.forget_tree(tree, error))?;
        Ok((tree, opened))
    }

    /// Connects the share anew the next time, where `error` may say that it is gone: a share that was removed and made
    /// again has another id.
    fn forget_tree(&self, tree: u32, error: &SmbError) {
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

#[cfg(test)]
impl Session {
    /// One that is logged in already, by NTLM, at a server that takes pieces of 64 KiB.
    pub(crate) fn over(link: Link, server: &str) -> Self {
        let piece = 64 << 10;
        let negotiated = Negotiated {
            encryption: Some(crate::crypto::Encryption::Aes128Gcm),
            signing: crate::crypto::Signing::Gmac,
            max_read_bytes: piece,
            max_write_bytes: piece,
            max_transact_bytes: piece,
        };
        let (trees, server) = (Mutex::default(), server.to_owned());
        Self { link, negotiated, trees, server, method: Method::Ntlm, fallback: None }
    }
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
) -> Result<Security, Failed> {
    let failed = |error: AuthError| Failed::of(error, peer);
    let refused = |detail: &str| failed(AuthError::Refused(detail.to_owned()));
    let mut login = Authenticator::new(&options.login, method, server).map_err(failed)?;
    let mut session_id = 0;
    let mut answer = Vec::new();
    for _ in 0..MAX_STEPS {
        let token = login.step(&answer).map_err(failed)?;
        let (sent, reply) = set_up(link, session_id, &token)?;
        preauth.add(&sent);
        let code = reply.header.status;
        if let Some(reason) = login_refusal(reply.message(), code, method) {
            return Err(refused(reason));
        }
        if code != status::SUCCESS && code != status::MORE_PROCESSING_REQUIRED {
            return Err(SmbError::from_status(&format!("login to {peer}"), code).into());
        }
        let (flags, token) = setup_answer(reply.message())?;
        if session_id == 0 {
            session_id = reply.header.session_id;
        }
        if session_id == 0 || reply.header.session_id != session_id {
            return Err(SmbError::protocol("the session's id is missing or changes").into());
        }
        if code == status::MORE_PROCESSING_REQUIRED {
            preauth.add(reply.message());
            answer = token;
            continue;
        }
        if flags & NOBODY != 0 {
            return Err(refused("the server took the user for a guest; give an account it knows"));
        }
        // The server's last token may complete the login: it proves then that nobody changed what was offered.
        if !login.is_complete() {
            login.step(&token).map_err(failed)?;
        }
        let key = login.key().map_err(failed)?;
        let signer = Signer::new(negotiated.signing, key.get(..16).unwrap_or_default(), &preauth)?;
        // Who does not know the key cannot have signed this.
        signer.verify(reply.message(), reply.header.flags, reply.header.message_id)?;
        let cipher = match negotiated.encryption {
            Some(encryption) => Some(Cipher::new(encryption, &key, &preauth)?),
            None => None,
        };
        return Ok(Security { session_id, signer, cipher });
    }
    Err(refused("the login does not come to an end"))
}

/// Sends a token of the login; answers with the message as it was sent, too.
fn set_up(link: &Link, session_id: u64, token: &[u8]) -> Result<(Vec<u8>, Reply)> {
    let mut body = Writer::default();
    body.u16(25).u8(0).u8(SIGNING_REQUIRED).u32(0).u32(0).u16(88);
    body.u16(length16(token, "the ticket")?).u64(0).bytes(token);
    let request = Request {
        command: Command::SessionSetup,
        tree_id: 0,
        body: &body.0,
        data: &[],
        payload_bytes: u32::try_from(body.0.len()).unwrap_or(u32::MAX),
    };
    link.call_login(&request, session_id)
}

/// Why the server does not take the user, in words; none where the login goes on, or failed for another reason.
fn login_refusal(message: &[u8], code: u32, method: Method) -> Option<&'static str> {
    // Of a ticket the server may say what is wrong with it, whatever the status.
    let said = setup_answer(message).ok().and_then(|(_, token)| ticket_refusal(&token));
    match (method, code) {
        (_, status::SUCCESS) => None,
        (Method::Kerberos, _) if said.is_some() => said,
        // The domain took the password: it is the ticket that this server does not take.
        (Method::Kerberos, status::LOGON_FAILURE | status::NO_SUCH_USER) => Some(
            "it did not take the Kerberos ticket: it has expired on the way, or is for another host of that name, or \
             the server does not know the user",
        ),
        _ => login_reason(code),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer to `SESSION_SETUP` with a token, as the server sends it.
    fn answer(token: &[u8]) -> Vec<u8> {
        let mut writer = Writer::default();
        writer.zeros(HEADER_BYTES).u16(9).u16(0).u16(72);
        writer.u16(length16(token, "a token").unwrap()).bytes(token);
        writer.0
    }

    /// `KRB_AP_ERR_TKT_EXPIRED` in GSSAPI's form, as `vmtide_sspi` tests it bit by bit.
    const EXPIRED: &[u8] = b"\x60\x4c\x06\x09\x2a\x86\x48\x86\xf7\x12\x01\x02\x02\x03\x00\x7e\x3d\x30\x3b\
        \xa0\x03\x02\x01\x05\xa1\x03\x02\x01\x1e\xa4\x11\x18\x0f20261121123000Z\xa5\x03\x02\x01\x00\
        \xa6\x03\x02\x01\x20\xa9\x05\x1b\x03LAB\xaa\x0b\x30\x09\xa0\x03\x02\x01\x02\xa1\x02\x30\x00";

    #[test]
    fn an_expired_ticket_is_no_wrong_password() {
        let refusal = |code, method| login_refusal(&answer(EXPIRED), code, method);
        for code in [status::MORE_PROCESSING_REQUIRED, status::LOGON_FAILURE] {
            let words = refusal(code, Method::Kerberos).unwrap();
            assert_eq!(words, "the Kerberos ticket has expired");
        }
        let silent = |method| login_refusal(&answer(b""), status::LOGON_FAILURE, method).unwrap();
        assert!(silent(Method::Kerberos).contains("ticket"));
        assert!(silent(Method::Ntlm).contains("password is wrong"));
        assert_eq!(refusal(status::SUCCESS, Method::Kerberos), None);
        assert_eq!(
            login_refusal(&answer(b"x"), status::MORE_PROCESSING_REQUIRED, Method::Ntlm),
            None
        );
        let locked = login_refusal(&answer(b""), status::ACCOUNT_LOCKED_OUT, Method::Kerberos);
        assert!(locked.unwrap().contains("locked"));
    }
}
