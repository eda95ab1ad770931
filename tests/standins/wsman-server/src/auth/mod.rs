//! Who asks: Basic with every request, a client's certificate, NTLM and Kerberos once for a connection.

mod crypto;
mod kerberos;
mod ntlm;
mod spnego;

use crate::options::{ChannelBinding, ServerOptions, User};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
pub use kerberos::Acceptor;
use std::sync::Arc;

/// `Authorization` of a client that logs in by its certificate (DSP0226 annex C).
const MUTUAL_TLS: &str = "http://schemas.dmtf.org/wbem/wsman/1/wsman/secprofile/https/mutual";

/// A user who is logged in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Who {
    /// The name.
    pub user: String,
    /// How: `Basic`, `Certificate`, `NTLM` or `Kerberos`.
    pub how: &'static str,
    /// Whether the user has the right to use the service.
    pub allowed: bool,
}

/// What comes of a request's credentials.
pub enum Outcome {
    /// The request may go on; the token belongs into the answer's `WWW-Authenticate`.
    Accepted(Who, Option<String>),
    /// HTTP 401 with these values of `WWW-Authenticate`, and why, for the log.
    Refused(Vec<String>, String),
}

/// What seals the messages of a connection.
pub enum Sealer {
    /// NTLM.
    Ntlm(Box<ntlm::Sealing>),
    /// Kerberos.
    Kerberos(kerberos::Context),
}

impl Sealer {
    /// Opens a message.
    ///
    /// # Errors
    /// Where it was changed or is out of order.
    pub fn unwrap(&mut self, signature: &[u8], sealed: &[u8]) -> Result<Vec<u8>, String> {
        match self {
            Self::Ntlm(sealing) => sealing.unwrap(signature, sealed),
            Self::Kerberos(context) => context.unwrap(signature, sealed),
        }
    }

    /// Seals a message: signature, data, and how much longer the data is than the message.
    ///
    /// # Errors
    /// Of Kerberos' library.
    pub fn wrap(&mut self, plain: &[u8]) -> Result<(Vec<u8>, Vec<u8>, usize), String> {
        match self {
            Self::Ntlm(sealing) => {
                let (signature, sealed) = sealing.wrap(plain);
                Ok((signature.to_vec(), sealed, 0))
            }
            Self::Kerberos(context) => context.wrap(plain),
        }
    }
}

/// Where a connection's login stands.
#[derive(Default)]
enum Progress {
    #[default]
    Nothing,
    /// NTLM was chosen and its first message is still to come; with SPNEGO's list of mechanisms.
    NtlmChosen(Vec<u8>),
    /// NTLM's challenge was sent; with SPNEGO's list where it is in use.
    NtlmChallenged(ntlm::Challenge, Option<Vec<u8>>),
    /// Kerberos needs more tokens.
    Kerberos(kerberos::Context),
    /// Done.
    Done(Who),
}

/// The login of one connection.
pub struct Login {
    options: Arc<ServerOptions>,
    acceptor: Option<Arc<Acceptor>>,
    /// The application data of the channel's binding; none without TLS.
    binding: Option<Vec<u8>>,
    /// The user of the client's certificate.
    certificate: Option<String>,
    progress: Progress,
    /// What seals messages, once somebody is logged in who can.
    pub sealer: Option<Sealer>,
}

impl Login {
    /// Nobody yet.
    pub fn new(
        options: Arc<ServerOptions>,
        acceptor: Option<Arc<Acceptor>>,
        binding: Option<Vec<u8>>,
        certificate: Option<String>,
    ) -> Self {
        Self { options, acceptor, binding, certificate, progress: Progress::Nothing, sealer: None }
    }

    /// Forgets who is logged in.
    pub fn reset(&mut self) {
        self.progress = Progress::Nothing;
        self.sealer = None;
    }

    /// The values of `WWW-Authenticate` that say what is offered.
    pub fn offers(&self) -> Vec<String> {
        let mut offers = Vec::new();
        if self.options.ntlm || self.acceptor.is_some() {
            offers.push("Negotiate".to_owned());
        }
        if self.acceptor.is_some() {
            offers.push("Kerberos".into());
        }
        if self.options.basic {
            offers.push("Basic realm=\"WSMAN\"".into());
        }
        offers
    }

    /// Judges the credentials of one request.
    pub fn check(&mut self, authorization: Option<&str>) -> Outcome {
        let Some(authorization) = authorization else {
            return match &self.progress {
                Progress::Done(who) => Outcome::Accepted(who.clone(), None),
                _ => self.refuse("no credentials"),
            };
        };
        if authorization == MUTUAL_TLS {
            return self.by_certificate();
        }
        let Some((scheme, text)) = authorization.split_once(' ') else {
            return self.refuse("an Authorization without credentials");
        };
        let Ok(token) = BASE64_STANDARD.decode(text.trim()) else {
            return self.refuse("credentials that are no base64");
        };
        if scheme.eq_ignore_ascii_case("Basic") {
            self.basic(&token)
        } else if scheme.eq_ignore_ascii_case("Negotiate") {
            self.negotiate("Negotiate", &token)
        } else if scheme.eq_ignore_ascii_case("Kerberos") && self.acceptor.is_some() {
            self.negotiate("Kerberos", &token)
        } else {
            self.refuse("a scheme that is not offered")
        }
    }

    fn refuse(&mut self, why: &str) -> Outcome {
        self.reset();
        Outcome::Refused(self.offers(), why.to_owned())
    }

    fn find(&self, name: &str) -> Option<&User> {
        let name = name.rsplit_once('\\').map_or(name, |(_, name)| name);
        self.options.users.iter().find(|user| user.name.to_lowercase() == name.to_lowercase())
    }

    fn basic(&mut self, token: &[u8]) -> Outcome {
        if !self.options.basic {
            return self.refuse("Basic is not offered");
        }
        if self.binding.is_none() && !self.options.allow_unencrypted {
            return self.refuse("Basic without TLS");
        }
        let text = String::from_utf8_lossy(token).into_owned();
        let (name, password) = text.split_once(':').unwrap_or((&text, ""));
        match self.find(name) {
            Some(user) if user.password == password => {
                let who = Who { user: user.name.clone(), how: "Basic", allowed: user.allowed };
                Outcome::Accepted(who, None)
            }
            _ => self.refuse("a wrong name or password"),
        }
    }

    fn by_certificate(&mut self) -> Outcome {
        let user = self.certificate.as_deref().and_then(|name| self.find(name)).cloned();
        match user {
            Some(user) if self.options.certificates => Outcome::Accepted(
                Who { user: user.name, how: "Certificate", allowed: user.allowed },
                None,
            ),
            _ => self.refuse("no certificate that a user is mapped to"),
        }
    }

    /// A step of Negotiate or Kerberos.
    fn negotiate(&mut self, scheme: &str, token: &[u8]) -> Outcome {
        let done = match std::mem::take(&mut self.progress) {
            Progress::Kerberos(context) => self.kerberos(context, token),
            Progress::NtlmChosen(list) => match spnego::read(token) {
                Some(spnego::Token::Response { token: Some(inner), .. }) => {
                    self.ntlm_challenge(&inner, Some(list))
                }
                _ => Err("no SPNEGO answer with NTLM's first message".into()),
            },
            Progress::NtlmChallenged(challenge, list) => self.ntlm_final(challenge, list, token),
            Progress::Nothing | Progress::Done(_) => {
                self.sealer = None;
                self.first(token)
            }
        };
        match done {
            Ok((None, answer)) => {
                let answer = BASE64_STANDARD.encode(answer.unwrap_or_default());
                Outcome::Refused(vec![format!("{scheme} {answer}")], "more is to come".into())
            }
            Ok((Some(who), answer)) => {
                self.progress = Progress::Done(who.clone());
                let answer =
                    answer.map(|token| format!("{scheme} {}", BASE64_STANDARD.encode(token)));
                Outcome::Accepted(who, answer)
            }
            Err(why) => self.refuse(&why),
        }
    }

    /// The first token: NTLM bare, NTLM in SPNEGO, or Kerberos.
    fn first(&mut self, token: &[u8]) -> Stepped {
        if token.starts_with(b"NTLMSSP\0") {
            return self.ntlm_challenge(token, None);
        }
        if let Some(spnego::Token::Init { list, mechanisms, token: inner }) = spnego::read(token) {
            let ntlm_at = mechanisms.iter().position(|oid| oid == spnego::OID_NTLM);
            if self.options.ntlm && ntlm_at == Some(0) {
                let inner = inner.ok_or("SPNEGO without a token of its first mechanism")?;
                return self.ntlm_challenge(&inner, Some(list));
            }
            // The client would rather have another one, which this host does not know.
            if self.options.ntlm && ntlm_at.is_some() && self.acceptor.is_none() {
                self.progress = Progress::NtlmChosen(list);
                let state = spnego::State::RequestMic;
                return Ok((
                    None,
                    Some(spnego::respond(state, Some(spnego::OID_NTLM), None, None)),
                ));
            }
        }
        let acceptor = self.acceptor.clone().ok_or("neither NTLM nor SPNEGO with NTLM")?;
        self.kerberos(acceptor.context(), token)
    }

    fn kerberos(&mut self, context: kerberos::Context, token: &[u8]) -> Stepped {
        let binding = self
            .binding
            .as_deref()
            .filter(|_| self.options.channel_binding != ChannelBinding::None);
        let step = match context.step(token, binding) {
            Ok(step) => step,
            Err(why) => return Err(format!("Kerberos: {why}")),
        };
        let Some(user) = step.user else {
            self.progress = Progress::Kerberos(context);
            return Ok((None, step.token));
        };
        let without =
            self.options.kerberos.as_ref().map_or(&[][..], |options| &options.without_rights);
        let allowed = !without.contains(&user);
        if binding.is_some()
            && !step.bound
            && self.options.channel_binding == ChannelBinding::Strict
        {
            return Err("Kerberos: the login is not bound to its TLS connection".into());
        }
        if step.sealed {
            self.sealer = Some(Sealer::Kerberos(context));
        }
        Ok((Some(Who { user, how: "Kerberos", allowed }), step.token))
    }

    fn ntlm_challenge(&mut self, negotiate: &[u8], list: Option<Vec<u8>>) -> Stepped {
        if !self.options.ntlm {
            return Err("NTLM is not offered".into());
        }
        let (challenge, message) = ntlm::challenge(negotiate, &self.options.machine)?;
        let answer = match list {
            Some(_) => {
                let state = spnego::State::Incomplete;
                spnego::respond(state, Some(spnego::OID_NTLM), Some(&message), None)
            }
            None => message,
        };
        self.progress = Progress::NtlmChallenged(challenge, list);
        Ok((None, Some(answer)))
    }

    fn ntlm_final(
        &mut self,
        challenge: ntlm::Challenge,
        list: Option<Vec<u8>>,
        token: &[u8],
    ) -> Stepped {
        let (message, mic) = match &list {
            None => (token.to_vec(), None),
            Some(_) => match spnego::read(token) {
                Some(spnego::Token::Response { token: Some(inner), mic }) => (inner, mic),
                _ => return Err("no SPNEGO answer with NTLM's last message".into()),
            },
        };
        let expected = self.binding.as_deref().map(ntlm::binding_hash);
        let accepted = challenge.authenticate(
            &message,
            &self.options.users,
            self.options.channel_binding,
            expected,
        )?;
        let allowed = self.find(&accepted.user).is_some_and(|user| user.allowed);
        let mut sealing = accepted.sealing;
        let answer = match list {
            None => None,
            Some(list) => {
                let own = match (&mut sealing, mic) {
                    (Some(sealing), Some(mic)) => Some(sealing.mechanism_mic(&list, &mic)?),
                    (None, _) => None,
                    (Some(_), None) if accepted.mic => {
                        return Err("NTLM had a MIC and SPNEGO has none over its mechanisms".into());
                    }
                    (Some(_), None) => None,
                };
                let own = own.as_ref().map(<[u8; 16]>::as_slice);
                Some(spnego::respond(spnego::State::Completed, None, None, own))
            }
        };
        self.sealer = sealing.map(|sealing| Sealer::Ntlm(Box::new(sealing)));
        Ok((Some(Who { user: accepted.user, how: "NTLM", allowed }), answer))
    }
}

/// Who it is, once that is known, and the token for the client.
type Stepped = Result<(Option<Who>, Option<Vec<u8>>), String>;
