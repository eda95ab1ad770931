//! The login: NTLM or Kerberos through `sspi`, wrapped in SPNEGO. What Kerberos needs around it is `vmtide_sspi`'s, the
//! same as for WinRM.
//!
//! NTLM works with any host that is reached by a name or an address. Kerberos needs the host's name, a key
//! distribution centre, and gives what NTLM does not: the host proves that it is the one meant.

use sspi::ntlm::NtlmConfig;
use sspi::{
    AuthIdentityBuffers, BufferType, ClientRequestFlags, CredentialsBuffers, DataRepresentation,
    KerberosConfig, Negotiate, NegotiateConfig, SecurityBuffer, SecurityStatus, Sspi, SspiImpl,
};
use std::net::IpAddr;
use std::time::Duration;
use vmtide_sspi::{
    AuthError, Kdc, guarded, kerberos_error, may_try_kerberos, one_line, split_user,
};
use zeroize::Zeroizing;

/// How long a key distribution centre may take for one answer, as for WinRM.
const KDC_TIMEOUT: Duration = Duration::from_secs(10);
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
    /// What to try for `login` at `host`, in this order.
    pub(crate) fn ways(login: &Login, host: &str) -> &'static [Self] {
        match login.method {
            Self::Negotiate if may_try_kerberos(&login.user, host, login.kdc.is_some()) => {
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
    /// (`krb5.conf`, Windows' registry), else by the domain's own name.
    pub kdc: Option<String>,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Login").field("user", &self.user).field("method", &self.method).finish()
    }
}

/// One login that is under way.
pub(crate) struct Authenticator {
    target: String,
    package: Negotiate,
    credentials: Option<CredentialsBuffers>,
    /// Whom Kerberos asks; none for NTLM.
    kdc: Option<Kdc>,
    /// Whether the first token was made: what comes after it is the server's word, be it empty.
    has_begun: bool,
    /// Whether the package expects no further token.
    is_complete: bool,
}

impl Authenticator {
    /// A login at a server that is called `host` in its own name for services.
    ///
    /// # Errors
    /// [`AuthError`] where this user cannot log in there in this way.
    pub(crate) fn new(login: &Login, method: Method, host: &str) -> Result<Self, AuthError> {
        if login.user.is_empty() || login.password.is_empty() {
            return Err(AuthError::Refused(
                "a user name and a password are needed: nobody is logged in as a guest".into(),
            ));
        }
        // The name that NTLM tells the server of this machine; nothing depends on it.
        let here = "vmtide".to_owned();
        let (domain, account) = split_user(&login.user);
        let (packages, protocol, kdc): (_, Box<dyn sspi::negotiate::ProtocolConfig>, _) =
            match method {
                Method::Ntlm | Method::Negotiate => {
                    ("ntlm,!kerberos,!pku2u", Box::new(NtlmConfig::new(here.clone())), None)
                }
                Method::Kerberos => {
                    check_kerberos(domain, host)?;
                    let kdc = Kdc::new(login.kdc.as_deref(), domain, &login.password, KDC_TIMEOUT)?;
                    let config =
                        KerberosConfig { kdc_url: kdc.url(), client_computer_name: here.clone() };
                    ("!ntlm,kerberos,!pku2u", Box::new(config), Some(kdc))
                }
            };
        let identity = match method {
            // A name with its domain's dots is one name to NTLM: the host sends it on to the domain as it is.
            Method::Ntlm | Method::Negotiate if login.user.contains('@') => {
                AuthIdentityBuffers::from_utf8(&login.user, "", &login.password)
            }
            _ => AuthIdentityBuffers::from_utf8(account, domain, &login.password),
        };
        let config = NegotiateConfig::new(protocol, Some(packages.into()), here);
        let package = guarded(|| Negotiate::new_client(config));
        Ok(Self {
            target: format!("cifs/{host}"),
            package: package.map_err(|error| AuthError::broken(&error))?,
            credentials: Some(CredentialsBuffers::AuthIdentity(identity)),
            kdc,
            has_begun: false,
            is_complete: false,
        })
    }

    /// The next token, after the server's `answer`; the first is made before there is one.
    ///
    /// # Errors
    /// [`AuthError`]: of Kerberos, whether another way may do.
    pub(crate) fn step(&mut self, answer: &[u8]) -> Result<Vec<u8>, AuthError> {
        let has_answered = std::mem::replace(&mut self.has_begun, true);
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
        let (package, kdc) = (&mut self.package, &self.kdc);
        let result = guarded(|| {
            let mut generator = package.initialize_security_context_impl(&mut builder)?;
            match kdc {
                Some(kdc) => generator.resolve_with_client(kdc),
                None => generator.resolve_to_result(),
            }
        });
        let status = result.map_err(|error| self.failed(&error, has_answered))?.status;
        self.is_complete = status == SecurityStatus::Ok;
        if !matches!(status, SecurityStatus::Ok | SecurityStatus::ContinueNeeded) {
            let detail = format!("the login ended as {status:?}, which is not known here");
            return Err(AuthError::Broken(detail));
        }
        let [output] = output;
        Ok(output.buffer)
    }

    fn failed(&self, error: &sspi::Error, has_answered: bool) -> AuthError {
        match self.kdc {
            Some(_) => kerberos_error(error, &self.target, has_answered),
            None => AuthError::Broken(format!(
                "the login cannot go on after the server's answer: {}",
                one_line(&error.description)
            )),
        }
    }

    /// Whether nothing is expected from the server any more.
    pub(crate) const fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// The key that the login agreed on.
    ///
    /// # Errors
    /// [`AuthError::Broken`] where there is none, or one that is too short to protect anything.
    pub(crate) fn key(&self) -> Result<Zeroizing<Vec<u8>>, AuthError> {
        let keys = guarded(|| self.package.query_context_session_key());
        let keys = keys.map_err(|error| AuthError::broken(&error))?;
        let key = Zeroizing::new(keys.session_key.as_ref().clone());
        if key.len() < 16 {
            return Err(AuthError::Broken("the login gives a key of less than 128 bits".into()));
        }
        Ok(key)
    }
}

/// Succeeds where a ticket to `host` can be had at all.
fn check_kerberos(domain: &str, host: &str) -> Result<(), AuthError> {
    let refused = |text: &str| Err(AuthError::Refused(text.to_owned()));
    if host.parse::<IpAddr>().is_ok() {
        return refused("Kerberos needs the server's name, not its address; or use NTLM");
    }
    if domain.is_empty() {
        return refused("Kerberos needs the user's domain: user@domain.example; or use NTLM");
    }
    Ok(())
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
            let error = Authenticator::new(&login(user, password), Method::Ntlm, "hv1");
            let error = error.err().unwrap();
            assert!(matches!(error, AuthError::Refused(_)), "{error:?}");
        }
        let shown = format!("{:?}", login("admin", "s3cret"));
        assert!(shown.contains("admin") && !shown.contains("s3cret"), "{shown}");
    }

    #[test]
    fn a_login_begins_with_a_token_and_ends_at_nonsense() {
        let mut login = Authenticator::new(&login(r"LAB\admin", "x"), Method::Ntlm, "hv1").unwrap();
        let first = login.step(&[]).unwrap();
        assert!(!first.is_empty() && !login.is_complete() && login.key().is_err());
        assert!(login.step(b"nonsense").is_err());
    }

    #[test]
    fn kerberos_is_tried_where_it_can_be() {
        use Method::{Kerberos, Negotiate, Ntlm};
        let ways =
            |method, user: &str, host| Method::ways(&Login { method, ..login(user, "x") }, host);
        assert_eq!(ways(Negotiate, "admin@lab.test", "hv1.lab.test"), [Kerberos, Ntlm]);
        assert_eq!(ways(Negotiate, r".\admin", "hv1"), [Ntlm]);
        assert_eq!(ways(Negotiate, "admin", "hv1"), [Ntlm]);
        assert_eq!(ways(Negotiate, "admin@lab.test", "10.0.0.7"), [Ntlm]);
        assert_eq!(ways(Ntlm, "admin@lab.test", "hv1"), [Ntlm]);
        assert_eq!(ways(Kerberos, "admin", "10.0.0.7"), [Kerberos]);
        for (user, host) in [("admin@lab.test", "10.0.0.7"), ("admin", "hv1")] {
            let error = Authenticator::new(&login(user, "x"), Kerberos, host).err().unwrap();
            assert!(error.words().contains("Kerberos needs"), "{error:?}");
        }
    }

    /// Where nobody answers, that is what is said, and not that a password is wrong.
    #[test]
    fn a_centre_that_does_not_answer_is_told_from_a_wrong_password() {
        let login = Login { kdc: Some("127.0.0.1:1".into()), ..login("admin@lab.test", "x") };
        let mut login = Authenticator::new(&login, Method::Kerberos, "hv1").unwrap();
        let error = login.step(&[]).unwrap_err();
        assert!(matches!(error, AuthError::NoAuthority(_)), "{error:?}");
    }
}
