//! The server: a listener, a thread for every connection, and what happens to a request on its way.

use crate::auth::{Acceptor, Login, Outcome, Who};
use crate::fault::Fault;
use crate::http::{self, Connection, Stream};
use crate::operations::{Failure, Service};
use crate::options::ServerOptions;
use crate::schema::Schema;
use crate::seal;
use crate::soap;
use crate::switches::{Effect, Operation, Switches};
use crate::tls::{self, Identity, Pem};
use crate::uri::{self, Resource};
use parking_lot::Mutex;
use rustls::{ServerConnection, StreamOwned};
use std::collections::HashMap;
use std::io::{self, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use vmtide_cim::Cim;

/// How long a connection may be silent. Longer than any test waits.
const IDLE_TIMEOUT: Duration = Duration::from_secs(300);
/// How many requests the log keeps.
const MAX_LOG: usize = 100_000;
/// How large an answer is that is too large.
const OVERSIZED_BYTES: usize = 64 << 20;
/// How deep an answer is that is too deep.
const NESTED_DEPTH: usize = 20_000;
/// The pieces of a slow answer and the pause after each.
const SLOW_BYTES: usize = 16;
const SLOW_PAUSE: Duration = Duration::from_millis(20);

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address cannot be listened on, or a thread or process not be started.
    #[error("cannot start the stand-in: {0}")]
    Io(#[from] io::Error),
    /// Certificates cannot be made.
    #[error("cannot make certificates for the stand-in: {0}")]
    Certificates(String),
}

/// A request that came, for tests to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// The connection, counted from 1.
    pub connection: u64,
    /// What was asked; none where the request was refused before that was known.
    pub operation: Option<Operation>,
    /// The action, which names the method of an Invoke.
    pub action: String,
    /// The resource URI.
    pub resource: String,
    /// Who asked, and how that was proven; none where nobody was logged in.
    pub user: Option<(String, &'static str)>,
    /// Whether the message was sealed.
    pub sealed: bool,
    /// The HTTP status of the answer; 0 where the connection was cut.
    pub status: u16,
    /// Why a login was refused, or the reason of the fault; empty for none. The client is not told more than a real host
    /// tells.
    pub reason: String,
}

/// What all connections share.
struct Shared {
    service: Service,
    options: Arc<ServerOptions>,
    switches: Switches,
    log: Mutex<Vec<Exchange>>,
    identity: Option<Identity>,
    acceptor: Option<Arc<Acceptor>>,
    /// Who the certificates made here belong to, by their fingerprints.
    certificates: Mutex<HashMap<[u8; 32], String>>,
    connections: Mutex<HashMap<u64, TcpStream>>,
    count: AtomicU64,
    stopping: AtomicBool,
}

/// A server that runs until it is dropped.
pub struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    listener: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts a server in front of a world.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(
        options: ServerOptions,
        cim: Arc<dyn Cim>,
        schema: Arc<dyn Schema>,
    ) -> Result<Self, StartError> {
        let identity = match &options.tls_names {
            Some(names) => Some(
                Identity::make(names, options.certificates, options.tls_sha384)
                    .map_err(StartError::Certificates)?,
            ),
            None => None,
        };
        let acceptor = options.kerberos.as_ref().map(Acceptor::start).transpose()?;
        let listener = TcpListener::bind(&options.listen)?;
        let address = listener.local_addr()?;
        let options = Arc::new(options);
        let shared = Arc::new(Shared {
            service: Service::new(cim, schema, options.clone()),
            options,
            switches: Switches::default(),
            log: Mutex::default(),
            identity,
            acceptor,
            certificates: Mutex::default(),
            connections: Mutex::default(),
            count: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
        });
        let accepting = shared.clone();
        let listener = thread::Builder::new()
            .name("wsman-listener".into())
            .spawn(move || accepting.accept(&listener))?;
        Ok(Self { address, shared, listener: Some(listener) })
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// The URL of the service by its address, e.g. `http://127.0.0.1:4711/wsman`.
    pub fn url(&self) -> String {
        let scheme = if self.shared.identity.is_some() { "https" } else { "http" };
        format!("{scheme}://{}/wsman", self.address)
    }

    /// The certificate in PEM that the server's is signed by; none without TLS.
    pub fn authority_pem(&self) -> Option<String> {
        self.shared.identity.as_ref().map(Identity::authority_pem)
    }

    /// The server's certificate in DER, e.g. for its fingerprint; none without TLS.
    pub fn certificate_der(&self) -> Option<&[u8]> {
        self.shared.identity.as_ref().map(|identity| identity.certificate.as_slice())
    }

    /// A certificate that logs `user` in, where the options allow it.
    ///
    /// # Errors
    /// [`StartError::Certificates`], also without TLS.
    pub fn client_certificate(&self, user: &str) -> Result<Pem, StartError> {
        let identity = self.shared.identity.as_ref();
        let identity =
            identity.ok_or_else(|| StartError::Certificates("the server has no TLS".into()))?;
        let (pem, fingerprint) = identity.client(user).map_err(StartError::Certificates)?;
        self.shared.certificates.lock().insert(fingerprint, user.into());
        Ok(pem)
    }

    /// The faults that can be switched on.
    pub fn switches(&self) -> &Switches {
        &self.shared.switches
    }

    /// Forgets all open enumerations, as a host does whose service was started again.
    pub fn expire_enumerations(&self) {
        self.shared.service.expire();
    }

    /// The requests that came until now.
    pub fn log(&self) -> Vec<Exchange> {
        self.shared.log.lock().clone()
    }

    /// Ends all connections, and leaves the listener: as when the network drops for a moment.
    pub fn cut_connections(&self) {
        for (_, stream) in self.shared.connections.lock().drain() {
            // It may have ended already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Wakes the listener, which then sees that it is to stop.
        let _ = TcpStream::connect(self.address);
        self.cut_connections();
        if let Some(listener) = self.listener.take() {
            // A listener that panicked has stopped too.
            let _ = listener.join();
        }
    }
}

/// What to send.
struct Answer {
    status: u16,
    content_type: String,
    body: Vec<u8>,
    authenticate: Vec<String>,
    close: bool,
}

impl Answer {
    const fn empty(status: u16) -> Self {
        Self {
            status,
            content_type: String::new(),
            body: Vec::new(),
            authenticate: Vec::new(),
            close: false,
        }
    }
}

/// A request as it comes to be known.
struct Seen {
    exchange: Exchange,
    effect: Option<Effect>,
}

impl Shared {
    /// Whether a user may not see the namespace of a resource.
    fn is_closed_to(&self, user: &str, resource: &str) -> bool {
        let of_hyperv = Resource::parse(resource).is_some_and(|resource| {
            resource.namespace.eq_ignore_ascii_case(vmtide_cim::VIRTUALIZATION_NAMESPACE)
        });
        let users = &self.service.options.users;
        let found = users.iter().find(|known| known.name.eq_ignore_ascii_case(user));
        of_hyperv && found.is_some_and(|known| !known.hyper_v)
    }

    fn accept(self: Arc<Self>, listener: &TcpListener) {
        for stream in listener.incoming() {
            if self.stopping.load(Ordering::SeqCst) {
                return;
            }
            let Ok(stream) = stream else { continue };
            let shared = self.clone();
            let id = self.count.fetch_add(1, Ordering::SeqCst) + 1;
            // A connection without a thread is dropped, and so ends.
            let _ = thread::Builder::new().name(format!("wsman-{id}")).spawn(move || {
                // A connection that breaks is the client's to report.
                let _ = shared.serve(id, stream);
                shared.connections.lock().remove(&id);
            });
        }
    }

    fn serve(&self, id: u64, stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(IDLE_TIMEOUT))?;
        self.connections.lock().insert(id, stream.try_clone()?);
        if self.stopping.load(Ordering::SeqCst) {
            return Ok(());
        }
        let mut certificate = None;
        let stream = match &self.identity {
            None => Stream::Plain(stream),
            Some(identity) => {
                let tls =
                    ServerConnection::new(identity.config.clone()).map_err(io::Error::other)?;
                let mut tls = StreamOwned::new(tls, stream);
                while tls.conn.is_handshaking() {
                    tls.conn.complete_io(&mut tls.sock)?;
                }
                let known = tls::fingerprint(tls.conn.peer_certificates());
                certificate = known.and_then(|known| self.certificates.lock().get(&known).cloned());
                Stream::Tls(Box::new(tls))
            }
        };
        let binding = self.identity.as_ref().map(Identity::binding);
        let mut login =
            Login::new(self.options.clone(), self.acceptor.clone(), binding, certificate);
        let mut connection = Connection::new(stream);
        while let Some(request) = connection.read()? {
            let mut seen = Seen {
                exchange: Exchange {
                    connection: id,
                    operation: None,
                    action: String::new(),
                    resource: String::new(),
                    user: None,
                    sealed: false,
                    status: 0,
                    reason: String::new(),
                },
                effect: None,
            };
            let answer = self.answer(&request, &mut login, &mut seen);
            seen.exchange.status = answer.as_ref().map_or(0, |answer| answer.status);
            let effect = seen.effect;
            self.record(seen.exchange);
            if effect == Some(Effect::Silent) {
                connection.wait_for_end();
                return Ok(());
            }
            let Some(mut answer) = answer else { return Ok(()) };
            answer.close |= request.closes();
            if !send(&mut connection, &answer, effect)? || answer.close {
                return Ok(());
            }
        }
        Ok(())
    }

    fn record(&self, exchange: Exchange) {
        let mut log = self.log.lock();
        if log.len() < MAX_LOG {
            log.push(exchange);
        }
    }

    /// From the request to the answer; none where the connection is to be cut.
    fn answer(
        &self,
        request: &http::Request,
        login: &mut Login,
        seen: &mut Seen,
    ) -> Option<Answer> {
        let path = request.target.split('?').next().unwrap_or_default();
        if !matches!(path, "/wsman" | "/wsman-anon/identify") {
            return Some(Answer::empty(404));
        }
        if request.method != "POST" {
            return Some(Answer::empty(405));
        }
        if request
            .header("wsmanidentify")
            .is_some_and(|value| value.eq_ignore_ascii_case("unauthenticated"))
        {
            return self.anonymous(request, seen);
        }
        let (who, token) = match login.check(request.header("authorization")) {
            Outcome::Accepted(who, token) => (who, token),
            Outcome::Refused(offers, why) => {
                seen.exchange.reason = why;
                return Some(Answer { authenticate: offers, ..Answer::empty(401) });
            }
        };
        seen.exchange.user = Some((who.user.clone(), who.how));
        let mut answer = if request.body.is_empty() {
            seen.exchange.operation = Some(Operation::Login);
            seen.effect = self.switches.hit(Operation::Login);
            match seen.effect {
                Some(Effect::Unauthorized) => unauthorized(login),
                Some(Effect::EmptyError) => Answer::empty(500),
                Some(Effect::Unavailable) => Answer::empty(503),
                Some(Effect::CutBefore | Effect::CutAfter | Effect::CutDuring) => return None,
                _ => Answer::empty(200),
            }
        } else {
            self.message(request, &who, login, seen)?
        };
        if answer.status != 401 {
            answer.authenticate.extend(token);
        }
        Some(answer)
    }

    /// Identify of somebody who is not logged in.
    fn anonymous(&self, request: &http::Request, seen: &mut Seen) -> Option<Answer> {
        seen.exchange.operation = Some(Operation::Identify);
        seen.effect = self.switches.hit(Operation::Identify);
        if matches!(seen.effect, Some(Effect::CutBefore | Effect::CutAfter)) {
            return None;
        }
        let read = soap::read(&request.body, self.options.max_envelope_bytes, true);
        Some(match read {
            Ok(envelope) if envelope.is_identify() => Answer {
                content_type: CONTENT_TYPE.into(),
                body: format!(
                    "<s:Envelope xmlns:s=\"{}\"><s:Header/><s:Body>{}</s:Body></s:Envelope>",
                    uri::SOAP,
                    self.service.identify(false)
                )
                .into_bytes(),
                ..Answer::empty(200)
            },
            _ => Answer::empty(401),
        })
    }

    /// A request with a message, of somebody who is logged in.
    fn message(
        &self,
        request: &http::Request,
        who: &Who,
        login: &mut Login,
        seen: &mut Seen,
    ) -> Option<Answer> {
        let content_type = request.header("content-type").unwrap_or_default();
        let mut protocol = None;
        let opened;
        let plain = if seal::is_sealed(content_type) {
            let opening = login
                .sealer
                .as_mut()
                .ok_or_else(|| "this login cannot seal messages".to_owned())
                .and_then(|sealer| seal::open(content_type, &request.body, sealer));
            match opening {
                Ok((plain, with)) => {
                    protocol = Some(with);
                    opened = plain;
                    &opened
                }
                Err(why) => {
                    seen.exchange.reason = why;
                    return Some(Answer { close: true, ..Answer::empty(400) });
                }
            }
        } else if self.identity.is_none() && !self.options.allow_unencrypted {
            // As pywinrm's users know it: the service does not say why.
            seen.exchange.reason = "a message that is not sealed over plain HTTP".into();
            return Some(Answer::empty(500));
        } else if !is_soap(content_type) {
            seen.exchange.reason = format!("the content type {content_type:?}");
            return Some(Answer::empty(415));
        } else {
            &request.body
        };
        seen.exchange.sealed = protocol.is_some();
        let (status, body) = match self.envelope(plain, who, login, seen) {
            Reply::Status(401) => return Some(unauthorized(login)),
            Reply::Status(status) => return Some(Answer::empty(status)),
            Reply::Cut => return None,
            Reply::Message(status, body) => (status, body),
        };
        let Some(protocol) = protocol else {
            return Some(Answer {
                content_type: CONTENT_TYPE.into(),
                body,
                ..Answer::empty(status)
            });
        };
        match login.sealer.as_mut().map(|sealer| seal::close(&body, &protocol, sealer)) {
            Some(Ok((content_type, body))) => {
                Some(Answer { content_type, body, ..Answer::empty(status) })
            }
            Some(Err(why)) => {
                seen.exchange.reason = why;
                None
            }
            None => None,
        }
    }

    /// An envelope, with the effect that is switched on for it.
    fn envelope(&self, plain: &[u8], who: &Who, login: &mut Login, seen: &mut Seen) -> Reply {
        let read = soap::read(
            plain,
            self.options.max_envelope_bytes,
            self.options.require_must_understand,
        );
        let request = match read {
            Ok(request) => request,
            Err((id, fault)) => return self.fault(&id, &fault, seen),
        };
        let operation = Service::operation(&request);
        seen.exchange.operation = Some(operation);
        seen.exchange.action.clone_from(&request.action);
        seen.exchange.resource.clone_from(&request.resource);
        seen.effect = self.switches.hit(operation);
        let fault = match seen.effect {
            Some(Effect::Unauthorized) => {
                login.reset();
                return Reply::Status(401);
            }
            Some(Effect::EmptyError) => return Reply::Status(500),
            Some(Effect::Unavailable) => return Reply::Status(503),
            Some(Effect::CutBefore | Effect::Silent) => return Reply::Cut,
            Some(Effect::AccessDenied) => Some(Fault::denied()),
            Some(Effect::ExpiredEnumeration) if operation == Operation::Pull => {
                Some(Fault::enumeration())
            }
            _ if !who.allowed || self.is_closed_to(&who.user, &request.resource) => {
                Some(Fault::denied())
            }
            _ => None,
        };
        if let Some(fault) = fault {
            return self.fault(&request.message_id, &fault, seen);
        }
        let done = self.service.run(&request);
        match seen.effect {
            Some(Effect::CutAfter) => return Reply::Cut,
            Some(Effect::UnauthorizedAfter) => return Reply::Status(401),
            Some(Effect::UnavailableAfter) => return Reply::Status(503),
            Some(Effect::TimedOut) => {
                return self.fault(&request.message_id, &Fault::timed_out(), seen);
            }
            Some(Effect::Garbage) => {
                return Reply::Message(200, b"<s:Envelope this is no XML".to_vec());
            }
            Some(Effect::Nested) => {
                return Reply::Message(200, "<a>".repeat(NESTED_DEPTH).into_bytes());
            }
            Some(Effect::Oversized) => {
                let filling = "x".repeat(OVERSIZED_BYTES);
                let text = soap::envelope("urn:oversized", &request.message_id, &filling);
                return Reply::Message(200, text.into_bytes());
            }
            _ => {}
        }
        match done {
            Ok(envelope) => Reply::Message(200, envelope.into_bytes()),
            Err(Failure::Fault(fault)) => self.fault(&request.message_id, &fault, seen),
            Err(Failure::Cut) => Reply::Cut,
        }
    }

    fn fault(&self, relates_to: &str, fault: &Fault, seen: &mut Seen) -> Reply {
        seen.exchange.reason.clone_from(&fault.reason);
        let text = soap::envelope(fault.action(), relates_to, &fault.body(&self.options.machine));
        Reply::Message(500, text.into_bytes())
    }
}

/// What a plain message is.
const CONTENT_TYPE: &str = "application/soap+xml;charset=UTF-8";

/// What an envelope is answered with.
enum Reply {
    /// A message.
    Message(u16, Vec<u8>),
    /// No message.
    Status(u16),
    /// Nothing.
    Cut,
}

fn unauthorized(login: &Login) -> Answer {
    Answer { authenticate: login.offers(), ..Answer::empty(401) }
}

fn is_soap(content_type: &str) -> bool {
    let mut parts = content_type.split(';').map(|part| part.trim().to_ascii_lowercase());
    let kind = parts.next().unwrap_or_default();
    let charset = parts
        .find_map(|part| part.strip_prefix("charset=").map(|set| set.trim_matches('"').to_owned()));
    kind == "application/soap+xml" && charset.is_none_or(|set| set == "utf-8")
}

/// Sends an answer; false where the connection was cut while it was sent.
fn send(connection: &mut Connection, answer: &Answer, effect: Option<Effect>) -> io::Result<bool> {
    let mut headers: Vec<(&str, &str)> = Vec::new();
    if !answer.content_type.is_empty() {
        headers.push(("Content-Type", &answer.content_type));
    }
    headers.extend(answer.authenticate.iter().map(|value| ("WWW-Authenticate", value.as_str())));
    let mut bytes =
        http::head(answer.status, &headers, answer.body.len(), answer.close).into_bytes();
    bytes.write_all(&answer.body)?;
    match effect {
        Some(Effect::CutDuring) => {
            connection
                .send(bytes.get(..bytes.len() - answer.body.len() / 2 - 1).unwrap_or_default())?;
            return Ok(false);
        }
        Some(Effect::Slow) => {
            for piece in bytes.chunks(SLOW_BYTES) {
                connection.send(piece)?;
                thread::sleep(SLOW_PAUSE);
            }
        }
        _ => connection.send(&bytes)?,
    }
    Ok(true)
}
