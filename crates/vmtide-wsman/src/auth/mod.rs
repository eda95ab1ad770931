//! Authentication: contexts of NTLM and Kerberos, each for one connection.
//!
//! The mechanisms themselves are those of the `sspi` crate. What it is given and what comes out of it is checked here:
//! it trusts lengths that a host chose, and it writes messages into its logs.

pub(crate) mod sealed;
mod wrap;

use crate::options::{Authentication, Credentials, Scheme, WsmanOptions};
use sspi::{
    AuthIdentityBuffers, BufferType, ClientRequestFlags, CredentialsBuffers, DataRepresentation,
    Kerberos, KerberosConfig, Ntlm, SecurityBuffer, SecurityBufferRef, Sspi, SspiImpl,
};
pub(crate) use vmtide_sspi::{AuthError, ticket_refusal};
use vmtide_sspi::{Kdc, der, guarded, kerberos_error, may_try_kerberos};
use wrap::Wrap;
use zeroize::Zeroizing;

/// The most of a token that is taken; real ones have some KB, Kerberos' up to 64 KB.
const MAX_TOKEN_BYTES: usize = 96 << 10;

const NTLM_SIGNATURE_BYTES: usize = 16;

/// The mechanism of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mechanism {
    Ntlm,
    Kerberos,
}

impl Mechanism {
    /// The protocol in the `Content-Type` of sealed messages.
    pub const fn protocol(self) -> &'static str {
        match self {
            Self::Ntlm => "application/HTTP-SPNEGO-session-encrypted",
            Self::Kerberos => "application/HTTP-Kerberos-session-encrypted",
        }
    }

    /// Mechanisms to try for these options, in this order, and whether to bind each to the TLS connection.
    ///
    /// The library writes a binding into Kerberos' request in a way that MIT's acceptors refuse. So that hosts which
    /// look at it strictly are served as well as those which do not care, it is tried with and then without. Nothing is
    /// lost by that: we know by its certificate whom we talk to; bindings protect the host from others than us.
    pub fn attempts(options: &WsmanOptions) -> Vec<(Self, bool)> {
        let secured = options.scheme == Scheme::Https;
        let ways = |mechanism| match mechanism {
            Self::Kerberos if secured => vec![(mechanism, true), (mechanism, false)],
            _ => vec![(mechanism, secured)],
        };
        Self::candidates(options).into_iter().flat_map(ways).collect()
    }

    /// What can be tried at all.
    fn candidates(options: &WsmanOptions) -> Vec<Self> {
        let user = options.credentials.as_ref().map_or("", Credentials::user);
        match options.authentication {
            Authentication::Ntlm => vec![Self::Ntlm],
            Authentication::Kerberos => vec![Self::Kerberos],
            Authentication::Negotiate
                if may_try_kerberos(user, &options.host, options.kdc.is_some()) =>
            {
                vec![Self::Kerberos, Self::Ntlm]
            }
            Authentication::Negotiate => vec![Self::Ntlm],
            Authentication::Basic | Authentication::Certificate => Vec::new(),
        }
    }
}

/// The state of one connection's authentication.
pub(crate) struct Context {
    inner: Inner,
    target: String,
    /// As `SEC_CHANNEL_BINDINGS`; empty where there is no TLS.
    binding: Vec<u8>,
}

enum Inner {
    Ntlm {
        context: Box<Ntlm>,
        credentials: Option<AuthIdentityBuffers>,
    },
    Kerberos {
        context: Box<Kerberos>,
        credentials: Option<CredentialsBuffers>,
        kdc: Box<Kdc>,
        /// Once the host has answered.
        wrap: Option<Wrap>,
    },
}

impl Context {
    /// A context that has said nothing yet. `binding` is that of the TLS connection, if there is one.
    ///
    /// # Errors
    /// Where the mechanism cannot be used by this user.
    pub fn new(
        mechanism: Mechanism,
        options: &WsmanOptions,
        credentials: &Credentials,
        binding: Option<&[u8]>,
    ) -> Result<Self, AuthError> {
        let (domain, account) = credentials.parts();
        let password = credentials.password();
        let inner = match mechanism {
            // A name with its domain's dots is one name to NTLM: the host sends it on to the domain as it is.
            Mechanism::Ntlm if domain.contains('.') && credentials.user().contains('@') => {
                let identity = AuthIdentityBuffers::from_utf8(credentials.user(), "", password);
                Inner::Ntlm { context: Box::default(), credentials: Some(identity) }
            }
            Mechanism::Ntlm => {
                let identity = AuthIdentityBuffers::from_utf8(account, domain, password);
                Inner::Ntlm { context: Box::default(), credentials: Some(identity) }
            }
            Mechanism::Kerberos => {
                let identity = AuthIdentityBuffers::from_utf8(account, domain, password);
                let named = options.kdc.as_deref();
                let kdc = Kdc::new(named, domain, password, options.connect_timeout)?;
                let config =
                    KerberosConfig { kdc_url: kdc.url(), client_computer_name: "vmtide".into() };
                let context =
                    guarded(|| Kerberos::new_client_from_config(config)).map_err(broken)?;
                Inner::Kerberos {
                    context: Box::new(context),
                    credentials: Some(CredentialsBuffers::AuthIdentity(identity)),
                    kdc: Box::new(kdc),
                    wrap: None,
                }
            }
        };
        Ok(Self {
            inner,
            target: format!("HTTP/{}", options.host),
            binding: binding.map(security_channel_bindings).unwrap_or_default(),
        })
    }

    /// The mechanism.
    pub const fn mechanism(&self) -> Mechanism {
        match &self.inner {
            Inner::Ntlm { .. } => Mechanism::Ntlm,
            Inner::Kerberos { .. } => Mechanism::Kerberos,
        }
    }

    /// Takes the host's token (none at first) and makes the next of ours; empty where none is left to send.
    ///
    /// # Errors
    /// [`AuthError`].
    pub fn step(&mut self, token: Option<&[u8]>) -> Result<Vec<u8>, AuthError> {
        // Be it empty, it is the host that said it.
        let has_answered = token.is_some();
        let token = token.map(der::mechanism_token).unwrap_or_default();
        if token.len() > MAX_TOKEN_BYTES {
            return Err(AuthError::Broken("its token is too large".into()));
        }
        let mut input = vec![SecurityBuffer::new(token.to_vec(), BufferType::Token)];
        if !self.binding.is_empty() {
            input.push(SecurityBuffer::new(self.binding.clone(), BufferType::ChannelBindings));
        }
        let mut output = vec![SecurityBuffer::new(Vec::new(), BufferType::Token)];
        let target = &self.target;
        match &mut self.inner {
            Inner::Ntlm { context, credentials } => guarded(|| {
                let mut builder = context
                    .initialize_security_context()
                    .with_credentials_handle(credentials)
                    .with_context_requirements(requirements())
                    .with_target_data_representation(DataRepresentation::Native)
                    .with_target_name(target)
                    .with_input(&mut input)
                    .with_output(&mut output);
                context.initialize_security_context_impl(&mut builder)?.resolve_to_result()
            })
            .map_err(broken)?,
            Inner::Kerberos { context, credentials, kdc, .. } => guarded(|| {
                let mut builder = context
                    .initialize_security_context()
                    .with_credentials_handle(credentials)
                    .with_context_requirements(requirements() | ClientRequestFlags::MUTUAL_AUTH)
                    .with_target_data_representation(DataRepresentation::Native)
                    .with_target_name(target)
                    .with_input(&mut input)
                    .with_output(&mut output);
                context
                    .initialize_security_context_impl(&mut builder)?
                    .resolve_with_client(kdc.as_ref())
            })
            .map_err(|error| kerberos_error(&error, target, has_answered))?,
        };
        if let Inner::Kerberos { context, wrap, .. } = &mut self.inner
            && has_answered
        {
            *wrap = Some(wrap_of(context)?);
        }
        Ok(output.pop().map(|buffer| buffer.buffer).unwrap_or_default())
    }

    /// Seals an envelope: its signature and the sealed bytes.
    ///
    /// # Errors
    /// [`AuthError::Broken`] where the context is not ready.
    pub fn seal(&mut self, plain: &[u8]) -> Result<(Vec<u8>, Vec<u8>), AuthError> {
        match &mut self.inner {
            Inner::Ntlm { context, .. } => {
                let (mut signature, mut data) = (vec![0; NTLM_SIGNATURE_BYTES], plain.to_vec());
                guarded(|| {
                    let mut buffers = [
                        SecurityBufferRef::token_buf(&mut signature),
                        SecurityBufferRef::data_buf(&mut data),
                    ];
                    context.encrypt_message(sspi::EncryptionFlags::empty(), &mut buffers)
                })
                .map_err(broken)?;
                Ok((signature, data))
            }
            Inner::Kerberos { wrap, .. } => {
                let sealed = wrap.as_mut().and_then(|wrap| wrap.seal(plain));
                sealed.ok_or_else(|| AuthError::Broken("the connection has no key".into()))
            }
        }
    }

    /// Opens what the host sealed.
    ///
    /// # Errors
    /// [`AuthError::Broken`] where it was changed on the way, or is not the next message.
    pub fn unseal(&mut self, signature: &[u8], data: &[u8]) -> Result<Vec<u8>, AuthError> {
        let broken = |why: &str| AuthError::Broken(why.to_owned());
        match &mut self.inner {
            Inner::Ntlm { .. } if signature.len() != NTLM_SIGNATURE_BYTES => {
                Err(broken("a sealed message has the wrong form"))
            }
            Inner::Ntlm { context, .. } => {
                let (mut signature, mut data) = (signature.to_vec(), data.to_vec());
                guarded(|| {
                    let mut buffers = [
                        SecurityBufferRef::token_buf(&mut signature),
                        SecurityBufferRef::data_buf(&mut data),
                    ];
                    context.decrypt_message(&mut buffers)?;
                    let [_, opened] = &buffers;
                    Ok(opened.data().to_vec())
                })
                .map_err(|_| broken("a message was changed on the way, or is not the next one"))
            }
            Inner::Kerberos { wrap, .. } => {
                let wrap = wrap.as_mut().ok_or_else(|| broken("the connection has no key"))?;
                let opened = guarded(|| Ok(wrap.open(signature, data)));
                opened.unwrap_or(Err("a sealed message cannot be read")).map_err(broken)
            }
        }
    }
}

/// What seals messages once both sides know each other. The library seals as well, but numbers our first message as
/// if it were the second, which acceptors that count refuse, and does not count the host's at all.
fn wrap_of(context: &mut Kerberos) -> Result<Wrap, AuthError> {
    let keys = guarded(|| context.query_context_session_key()).map_err(broken)?;
    let key = Zeroizing::new(keys.session_key.as_ref().clone());
    // The number that the library would use is one past the one that it told the host.
    let next = guarded(|| Ok(context.next_seq_number())).map_err(broken)?;
    let first = u64::from(next).saturating_sub(1);
    Wrap::new(key, first)
        .ok_or_else(|| AuthError::Broken("the domain chose a cipher that is no AES".into()))
}

fn broken(error: sspi::Error) -> AuthError {
    AuthError::broken(&error)
}

fn requirements() -> ClientRequestFlags {
    ClientRequestFlags::CONFIDENTIALITY
        | ClientRequestFlags::INTEGRITY
        | ClientRequestFlags::REPLAY_DETECT
        | ClientRequestFlags::SEQUENCE_DETECT
}

/// The structure of that name of SSPI: three parts by length and offset, of which only the last is used.
fn security_channel_bindings(application_data: &[u8]) -> Vec<u8> {
    const STRUCTURE_BYTES: u32 = 32;
    let length = u32::try_from(application_data.len()).unwrap_or(u32::MAX);
    let mut bytes = vec![0; 24];
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&STRUCTURE_BYTES.to_le_bytes());
    bytes.extend_from_slice(application_data);
    bytes
}

#[cfg(test)]
mod tests;
