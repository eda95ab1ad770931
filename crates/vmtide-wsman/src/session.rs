//! A session: a connection with its authentication, over which envelopes go one after another.

use crate::answer::short;
use crate::auth::{AuthError, Context, Mechanism, sealed, ticket_refusal};
use crate::http::{Answer, Connection, Lost};
use crate::options::{Authentication, Scheme, WsmanOptions};
use crate::tls::Tls;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::StatusCode;
use http::header::{self, HeaderName, HeaderValue};
use std::time::{Duration, Instant};
use vmtide_cim::CimError;
use zeroize::Zeroizing;

const SOAP_TYPE: &str = "application/soap+xml;charset=UTF-8";

/// How the user's certificate is announced (MS-WSMV 3.1.4.1.30).
const CERTIFICATE_PROFILE: &str =
    "http://schemas.dmtf.org/wbem/wsman/1/wsman/secprofile/https/mutual";

/// What an answer may have on top of the envelope that was asked for: seals, headers of parts, faults.
const ANSWER_SLACK_BYTES: usize = 64 << 10;

/// How long an answer is waited for where the host may take `timeout`: long enough for its own word that it took too
/// long, which says more than silence.
fn patience(timeout: Duration) -> Duration {
    timeout + (timeout / 4).max(Duration::from_secs(2))
}

/// The most steps that an authentication may take; NTLM and Kerberos need two.
const MAX_STEPS: usize = 4;

/// Why an envelope was not answered by one.
#[derive(Debug)]
pub(crate) struct Failure {
    pub error: CimError,
    /// Whether the host certainly did nothing, so that the same may be sent once more over a new connection.
    pub not_run: bool,
    /// Whether anybody on the way could have written the answer that says so: it came without the seal that the
    /// session asks for.
    pub unproven: bool,
}

impl Failure {
    fn last(error: CimError) -> Self {
        Self { error, not_run: false, unproven: false }
    }

    fn before(error: CimError) -> Self {
        let not_run = matches!(error, CimError::Unreachable { .. });
        Self { error, not_run, unproven: false }
    }

    /// The error of a call, or of a part of an enumeration, that must not be run twice. What nobody has proven says
    /// nothing of whether it was run.
    pub fn of_call(self, peer: &str) -> Self {
        if !self.unproven {
            return self;
        }
        let detail = format!("whether it did what was asked is not known: {}", self.error);
        let error = CimError::Unreachable { peer: peer.into(), detail, before_request: false };
        Self { error, not_run: false, unproven: true }
    }
}

/// What every request of this session carries.
enum Proof {
    /// A header: the password, or that there is a certificate.
    Header(HeaderValue),
    /// The connection is the proof; the context seals where TLS does not.
    Connection(Box<Context>),
}

/// An authenticated connection.
pub(crate) struct Session {
    connection: Connection,
    proof: Proof,
    seals: bool,
    used: Instant,
    /// Why NTLM proves the user although Kerberos was tried, until somebody tells it.
    pub fallback: Option<String>,
}

impl Session {
    /// Connects and authenticates, by the first mechanism that the domain takes part in.
    ///
    /// # Errors
    /// [`CimError::Unreachable`], [`CimError::Untrusted`], [`CimError::Login`], [`CimError::Protocol`].
    pub async fn open(
        options: &WsmanOptions,
        tls: Option<&Tls>,
        peer: &str,
    ) -> Result<Self, CimError> {
        let mut why_not: Option<CimError> = None;
        for (mechanism, bound) in Mechanism::attempts(options) {
            let mut connection = Connection::open(options, tls, peer).await?;
            if !bound {
                connection.binding = None;
            }
            match Self::authenticate(connection, mechanism, options, peer).await {
                Ok(mut session) => {
                    let why_not = why_not.filter(|_| mechanism == Mechanism::Ntlm);
                    session.fallback = why_not.map(|error| error.to_string());
                    return Ok(session);
                }
                Err(Refusal::Other(error)) => return Err(error),
                Err(Refusal::NotThisWay(error)) => why_not = Some(error),
            }
        }
        if let Some(error) = why_not {
            return Err(error);
        }
        let connection = Connection::open(options, tls, peer).await?;
        let proof = Proof::Header(proof_header(options));
        Ok(Self { connection, proof, seals: false, used: Instant::now(), fallback: None })
    }

    async fn authenticate(
        mut connection: Connection,
        mechanism: Mechanism,
        options: &WsmanOptions,
        peer: &str,
    ) -> Result<Self, Refusal> {
        let Some(credentials) = &options.credentials else {
            let detail = "no user".into();
            return Err(Refusal::Other(CimError::Login { peer: peer.into(), detail }));
        };
        let failed = |error| Refusal::of(error, peer);
        let binding = connection.binding.as_deref();
        let mut context = Context::new(mechanism, options, credentials, binding).map_err(failed)?;
        let mut token = context.step(None).map_err(failed)?;
        for _ in 0..MAX_STEPS {
            let value = Zeroizing::new(format!("Negotiate {}", STANDARD.encode(&token)));
            let answer = connection
                .post(
                    &[(header::AUTHORIZATION, secret(&value))],
                    Bytes::new(),
                    ANSWER_SLACK_BYTES,
                    options.operation_timeout,
                )
                .await
                .map_err(|lost| Refusal::Other(unanswered(&lost, peer, options, true)))?;
            let reply = challenge(&answer);
            match (answer.status, reply) {
                // Only NTLM takes a second step.
                (StatusCode::UNAUTHORIZED, Some(reply))
                    if !reply.is_empty() && mechanism == Mechanism::Ntlm =>
                {
                    token = context.step(Some(&reply)).map_err(failed)?;
                }
                (StatusCode::UNAUTHORIZED, reply) => {
                    let said = reply.as_deref().and_then(ticket_refusal).map(str::to_owned);
                    let detail = said.unwrap_or_else(|| refused(&answer, mechanism));
                    let error = CimError::Login { peer: peer.into(), detail };
                    // Without the binding it may be taken.
                    let bound = mechanism == Mechanism::Kerberos && connection.binding.is_some();
                    return Err(match bound {
                        true => Refusal::NotThisWay(error),
                        false => Refusal::Other(error),
                    });
                }
                (status, reply) if status.is_success() => {
                    prove_host(&mut context, reply).map_err(failed)?;
                    let seals = options.scheme == Scheme::Http;
                    let proof = Proof::Connection(Box::new(context));
                    let used = Instant::now();
                    return Ok(Self { connection, proof, seals, used, fallback: None });
                }
                _ => return Err(Refusal::Other(no_service(&answer, peer))),
            }
        }
        Err(Refusal::Other(CimError::protocol(peer, "the authentication does not come to an end")))
    }

    /// What proved the user, in a word.
    pub fn login(&self, options: &WsmanOptions) -> &'static str {
        match (&self.proof, options.authentication) {
            (Proof::Connection(context), _) => match context.mechanism() {
                Mechanism::Kerberos => "Kerberos",
                Mechanism::Ntlm => "NTLM",
            },
            (Proof::Header(_), Authentication::Certificate) => "a certificate",
            (Proof::Header(_), _) => "a password (Basic)",
        }
    }

    /// How long nothing was sent over it.
    pub fn idle(&self) -> Duration {
        self.used.elapsed()
    }

    /// Whether it can be used again.
    pub fn is_open(&self) -> bool {
        !self.connection.is_closed()
    }

    /// Sends an envelope and gives the answer's: that of a result, or of a fault.
    ///
    /// # Errors
    /// [`Failure`]. The session is of no more use then.
    pub async fn exchange(
        &mut self,
        envelope: &str,
        action: &str,
        options: &WsmanOptions,
        peer: &str,
    ) -> Result<Bytes, Failure> {
        let (headers, body) = self.dress(envelope, peer).map_err(Failure::last)?;
        let limit =
            usize::try_from(options.max_envelope_bytes).unwrap_or(usize::MAX) + ANSWER_SLACK_BYTES;
        let patience = patience(options.operation_timeout);
        let answer =
            self.connection.post(&headers, body, limit, patience).await.map_err(|lost| {
                let before = matches!(&lost, Lost::Broken { sent: false, .. });
                match lost {
                    Lost::Late => Failure::last(CimError::Timeout {
                        action: action.to_owned(),
                        timeout_ms: crate::fault::milliseconds(patience),
                    }),
                    Lost::TooLarge => Failure::last(CimError::TooLarge {
                        action: action.to_owned(),
                        limit_bytes: u64::try_from(limit).unwrap_or(u64::MAX),
                    }),
                    Lost::Broken { .. } => Failure {
                        not_run: before,
                        ..Failure::last(unanswered(&lost, peer, options, before))
                    },
                }
            })?;
        self.used = Instant::now();
        let has_seal = matches!(answer.status, StatusCode::OK | StatusCode::INTERNAL_SERVER_ERROR);
        let unproven = self.seals && !has_seal;
        self.undress(answer, action, peer).map_err(|failure| Failure { unproven, ..failure })
    }

    /// Headers and body of an envelope.
    fn dress(
        &mut self,
        envelope: &str,
        peer: &str,
    ) -> Result<(Vec<(HeaderName, HeaderValue)>, Bytes), CimError> {
        let plain = || (header::CONTENT_TYPE, HeaderValue::from_static(SOAP_TYPE));
        match &mut self.proof {
            Proof::Header(proof) => {
                let headers = vec![plain(), (header::AUTHORIZATION, proof.clone())];
                Ok((headers, Bytes::copy_from_slice(envelope.as_bytes())))
            }
            Proof::Connection(_) if !self.seals => {
                Ok((vec![plain()], Bytes::copy_from_slice(envelope.as_bytes())))
            }
            Proof::Connection(context) => {
                let protocol = context.mechanism().protocol();
                let (signature, data) = context.seal(envelope.as_bytes()).map_err(|error| {
                    CimError::protocol(peer, format!("seal a request: {error:?}"))
                })?;
                let kind = HeaderValue::from_str(&sealed::content_type(protocol))
                    .map_err(|error| CimError::protocol(peer, error.to_string()))?;
                let body = sealed::write(protocol, &signature, &data, envelope.len());
                Ok((vec![(header::CONTENT_TYPE, kind)], body.into()))
            }
        }
    }

    /// The envelope of an answer.
    fn undress(&mut self, answer: Answer, action: &str, peer: &str) -> Result<Bytes, Failure> {
        match answer.status {
            // Faults come with the status of an error of the server.
            StatusCode::OK | StatusCode::INTERNAL_SERVER_ERROR => {}
            StatusCode::UNAUTHORIZED => {
                let detail = match &self.proof {
                    Proof::Header(_) => refused_header(&answer),
                    // A host that has forgotten a connection did not look at what came over it.
                    Proof::Connection(_) => {
                        let error = CimError::Login {
                            peer: peer.into(),
                            detail: "it no longer knows the connection's user".into(),
                        };
                        return Err(Failure { error, not_run: true, unproven: false });
                    }
                };
                return Err(Failure::last(CimError::Login { peer: peer.into(), detail }));
            }
            StatusCode::FORBIDDEN => {
                let detail = format!("{action}: the host forbids it (HTTP 403)");
                return Err(Failure::last(CimError::Denied { peer: peer.into(), detail }));
            }
            _ => return Err(Failure::before(no_service(&answer, peer))),
        }
        let protocol = |detail: &str| Failure::last(CimError::protocol(peer, detail));
        let is_sealed = sealed::is_sealed(answer.header(&header::CONTENT_TYPE));
        match &mut self.proof {
            Proof::Connection(context) if self.seals => {
                if !is_sealed {
                    return Err(protocol(
                        "its answer is not sealed, so anybody could have written it",
                    ));
                }
                let parts = sealed::read(&answer.body)
                    .map_err(|why| protocol(&format!("a sealed answer cannot be read: {why}")))?;
                let plain = context.unseal(parts.signature, parts.data).map_err(|error| {
                    protocol(&format!("a sealed answer cannot be opened: {}", error.words()))
                })?;
                if plain.len() != parts.length {
                    return Err(protocol("a sealed answer has another length than it says"));
                }
                Ok(plain.into())
            }
            _ if is_sealed => Err(protocol("it seals an answer to a request that was not")),
            _ => Ok(answer.body),
        }
    }
}

enum Refusal {
    /// This mechanism cannot be used; another may.
    NotThisWay(CimError),
    /// No other mechanism would help.
    Other(CimError),
}

impl Refusal {
    fn of(error: AuthError, peer: &str) -> Self {
        let login = |detail| CimError::Login { peer: peer.into(), detail };
        match error {
            AuthError::Refused(detail) => Self::Other(login(detail)),
            AuthError::Unusable(detail) => Self::NotThisWay(login(detail)),
            AuthError::NoAuthority(detail) => Self::NotThisWay(CimError::Unreachable {
                peer: peer.into(),
                detail,
                before_request: true,
            }),
            AuthError::Broken(detail) => Self::Other(CimError::protocol(peer, detail)),
        }
    }
}

/// What the host adds once it knows the user: by Kerberos it proves itself, too; by NTLM it has no more to say.
fn prove_host(context: &mut Context, reply: Option<Vec<u8>>) -> Result<(), AuthError> {
    match (context.mechanism(), reply) {
        (Mechanism::Ntlm, _) => Ok(()),
        (Mechanism::Kerberos, Some(reply)) => context.step(Some(&reply)).map(|_| ()),
        (Mechanism::Kerberos, None) => {
            Err(AuthError::Broken("it did not prove that it is the host".into()))
        }
    }
}

/// The header that proves the user where no context does.
fn proof_header(options: &WsmanOptions) -> HeaderValue {
    match (&options.authentication, &options.credentials) {
        (Authentication::Basic, Some(credentials)) => {
            let pair = Zeroizing::new(format!("{}:{}", credentials.user(), credentials.password()));
            secret(&Zeroizing::new(format!("Basic {}", STANDARD.encode(pair.as_bytes()))))
        }
        _ => HeaderValue::from_static(CERTIFICATE_PROFILE),
    }
}

/// A header that is not shown; base64 always can be one.
fn secret(text: &str) -> HeaderValue {
    let mut value = HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static(""));
    value.set_sensitive(true);
    value
}

/// The token of the answer's `WWW-Authenticate: Negotiate …` (or `Kerberos …`); none where there is no such header.
fn challenge(answer: &Answer) -> Option<Vec<u8>> {
    for value in answer.headers.get_all(header::WWW_AUTHENTICATE) {
        let text = value.to_str().unwrap_or_default();
        for offer in text.split(',') {
            let (scheme, token) = offer.trim().split_once(' ').unwrap_or((offer.trim(), ""));
            let ours = ["Negotiate", "Kerberos", "NTLM"];
            if ours.iter().any(|known| known.eq_ignore_ascii_case(scheme)) && !token.is_empty() {
                return STANDARD.decode(token.trim()).ok();
            }
        }
    }
    None
}

/// What a host offers instead, by the names of its `WWW-Authenticate` headers.
fn offers(answer: &Answer) -> String {
    let values = answer.headers.get_all(header::WWW_AUTHENTICATE).iter();
    let offers = values.filter_map(|value| value.to_str().ok()).flat_map(|text| text.split(','));
    let names = offers.filter_map(|offer| offer.split_whitespace().next());
    let mut names: Vec<&str> = names.take(8).collect();
    names.dedup();
    short(&names.join(", "))
}

fn refused(answer: &Answer, mechanism: Mechanism) -> String {
    let offers = offers(answer);
    if !offers.is_empty() && !offers.to_ascii_lowercase().contains("negotiate") {
        return format!("it does not take NTLM or Kerberos but {offers} (VMTIDE_WINRM_AUTH)");
    }
    match mechanism {
        Mechanism::Ntlm => "wrong user name or password, or the user may not log in over the network (local accounts: \
                            LocalAccountTokenFilterPolicy)"
            .into(),
        Mechanism::Kerberos => "it did not take the Kerberos ticket: it has expired, or is for another host of that name".into(),
    }
}

fn refused_header(answer: &Answer) -> String {
    let offers = offers(answer);
    if offers.is_empty() || offers.to_ascii_lowercase().contains("basic") {
        "wrong user name or password".into()
    } else {
        format!("it does not take this authentication but {offers}")
    }
}

/// The error of an answer that no service of management gives.
fn no_service(answer: &Answer, peer: &str) -> CimError {
    match answer.status {
        StatusCode::SERVICE_UNAVAILABLE => CimError::Unreachable {
            peer: peer.into(),
            detail: "its service WinRM does not run (HTTP 503)".into(),
            before_request: true,
        },
        StatusCode::NOT_FOUND => CimError::protocol(peer, "there is no WinRM at /wsman (HTTP 404)"),
        status => CimError::protocol(
            peer,
            format!("HTTP {} where an answer was expected", status.as_u16()),
        ),
    }
}

/// The error of a request without an answer.
fn unanswered(lost: &Lost, peer: &str, options: &WsmanOptions, before_request: bool) -> CimError {
    let detail = match lost {
        Lost::Broken { detail, .. } => format!("the connection broke: {detail}"),
        Lost::Late => format!("no answer within {} s", options.operation_timeout.as_secs()),
        Lost::TooLarge => return CimError::protocol(peer, "its answer to the login is too large"),
    };
    CimError::Unreachable { peer: peer.into(), detail, before_request }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, offers: &[&str]) -> Answer {
        let mut headers = http::HeaderMap::new();
        for offer in offers {
            headers.append(header::WWW_AUTHENTICATE, HeaderValue::from_str(offer).unwrap());
        }
        Answer { status: StatusCode::from_u16(status).unwrap(), headers, body: Bytes::new() }
    }

    #[test]
    fn tokens_are_found_among_offers() {
        assert_eq!(challenge(&answer(401, &["Negotiate YWJj"])), Some(b"abc".to_vec()));
        assert_eq!(
            challenge(&answer(401, &["Basic realm=\"WSMAN\"", "negotiate YWJj, Kerberos"])),
            Some(b"abc".to_vec())
        );
        assert_eq!(challenge(&answer(401, &["Negotiate", "Kerberos"])), None);
        assert_eq!(challenge(&answer(401, &["Negotiate ***"])), None);
        assert_eq!(challenge(&answer(200, &[])), None);
    }

    #[test]
    fn refusals_say_what_to_do() {
        assert!(
            refused(&answer(401, &["Negotiate", "Kerberos"]), Mechanism::Ntlm).contains("password")
        );
        assert!(
            refused(&answer(401, &["Basic realm=\"WSMAN\""]), Mechanism::Ntlm).contains("Basic")
        );
        assert!(
            refused_header(&answer(401, &["Negotiate", "Kerberos"]))
                .contains("Negotiate, Kerberos")
        );
        assert!(matches!(no_service(&answer(503, &[]), "p"), CimError::Unreachable { .. }));
        assert!(matches!(no_service(&answer(404, &[]), "p"), CimError::Protocol { .. }));
    }
}
