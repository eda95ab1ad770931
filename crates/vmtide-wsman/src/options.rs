//! How to get at a host: where, as whom, and whom to trust.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use thiserror::Error;
use zeroize::Zeroizing;

/// The ports of WinRM since version 2.0.
const HTTP_PORT: u16 = 5985;
const HTTPS_PORT: u16 = 5986;

/// The longest password or name: more is a mistake, such as a disk image given as a password file.
const MAX_SECRET_BYTES: usize = 4096;

/// The longest file that a password is read from.
const MAX_PASSWORD_FILE_BYTES: u64 = 64 << 10;

/// What is wrong with how a host is to be reached: a mistake of the user.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum OptionsError {
    /// An option, or two that do not go together.
    #[error("{0}")]
    Usage(String),
    /// A file that cannot be used.
    #[error("{path}: {detail}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        detail: String,
    },
}

impl OptionsError {
    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self::Usage(text.into())
    }

    pub(crate) fn file(path: impl Into<PathBuf>, detail: impl fmt::Display) -> Self {
        Self::File { path: path.into(), detail: detail.to_string() }
    }
}

/// How requests travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scheme {
    /// HTTP, port 5985. Every message is sealed by the authentication; nothing goes in the clear.
    #[default]
    Http,
    /// HTTPS, port 5986.
    Https,
}

/// How the user is made known to the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Authentication {
    /// Kerberos where the host has a name, the user a domain and the domain answers; NTLM otherwise.
    #[default]
    Negotiate,
    /// NTLM version 2.
    Ntlm,
    /// Kerberos, by user name and password; nothing else will do.
    Kerberos,
    /// The password itself, over HTTPS only. Local accounts of the host; off by default there.
    Basic,
    /// A certificate of the user, over HTTPS only.
    Certificate,
}

impl FromStr for Authentication {
    type Err = OptionsError;

    fn from_str(text: &str) -> Result<Self, OptionsError> {
        match text.to_ascii_lowercase().as_str() {
            "negotiate" => Ok(Self::Negotiate),
            "ntlm" => Ok(Self::Ntlm),
            "kerberos" => Ok(Self::Kerberos),
            "basic" => Ok(Self::Basic),
            "certificate" => Ok(Self::Certificate),
            _ => Err(OptionsError::usage(format!(
                "unknown authentication {text:?}: negotiate, ntlm, kerberos, basic or certificate"
            ))),
        }
    }
}

/// A user and the password: never shown, wiped from memory when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    user: String,
    password: Zeroizing<String>,
}

impl Credentials {
    /// A user as `user@domain.example`, `DOMAIN\user`, or `user` for an account of the host itself.
    ///
    /// # Errors
    /// [`OptionsError::Usage`] where either is empty, too long, or has a control character.
    pub fn new(user: &str, password: Zeroizing<String>) -> Result<Self, OptionsError> {
        let sound = |text: &str| {
            (1..=MAX_SECRET_BYTES).contains(&text.len()) && !text.chars().any(char::is_control)
        };
        if !sound(user) {
            return Err(OptionsError::usage(
                "the user's name must have 1 to 4096 bytes and no control characters",
            ));
        }
        if !sound(&password) {
            return Err(OptionsError::usage(
                "the password must have 1 to 4096 bytes and no control characters",
            ));
        }
        Ok(Self { user: user.to_owned(), password })
    }

    /// The user as it was given.
    pub fn user(&self) -> &str {
        &self.user
    }

    pub(crate) fn password(&self) -> &str {
        &self.password
    }

    /// Domain (empty for none) and account.
    pub(crate) fn parts(&self) -> (&str, &str) {
        vmtide_sspi::split_user(&self.user)
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({}, …)", self.user)
    }
}

/// A user's certificate and its key, both PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificate {
    /// The certificate, and those between it and its authority.
    pub certificate: PathBuf,
    /// Its private key, not encrypted.
    pub key: PathBuf,
}

/// How to get at a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WsmanOptions {
    /// Name or address. Kerberos needs the name that the domain knows.
    pub host: String,
    /// The port; none for that of the scheme (5985, 5986).
    pub port: Option<u16>,
    /// HTTP or HTTPS.
    pub scheme: Scheme,
    /// How the user is made known.
    pub authentication: Authentication,
    /// The user; needed by all but certificates.
    pub credentials: Option<Credentials>,
    /// The user's certificate.
    pub client_certificate: Option<ClientCertificate>,
    /// The fingerprint of the host's certificate. Where it is given nothing else is looked at: neither the name in the
    /// certificate, nor its dates, nor who signed it.
    pub fingerprint: Option<Fingerprint>,
    /// Authorities (PEM) to trust instead of the system's; also the host's own certificate.
    pub ca_file: Option<PathBuf>,
    /// A server of the Kerberos domain, `host` or `host:port`; none to look it up (`krb5.conf`, else the domain's name).
    pub kdc: Option<String>,
    /// How long the host may take for one request.
    pub operation_timeout: Duration,
    /// How long making a connection may take.
    pub connect_timeout: Duration,
    /// Connections at most; each is authenticated once and kept. A request more waits.
    pub connections: usize,
    /// The largest single answer that is asked for, in bytes: 8 KiB to 4 MiB. Hosts refuse what is above their own
    /// limit only when an answer would be that large.
    pub max_envelope_bytes: u32,
    /// The most that one query may find, in bytes of memory that it takes, about: some hundred for each property.
    pub max_result_bytes: u64,
}

impl WsmanOptions {
    /// For `host`, as hosts are set up out of the box.
    pub fn new(host: impl Into<String>) -> Self {
        Self {
            host: host.into(),
            port: None,
            scheme: Scheme::default(),
            authentication: Authentication::default(),
            credentials: None,
            client_certificate: None,
            fingerprint: None,
            ca_file: None,
            kdc: None,
            operation_timeout: Duration::from_secs(60),
            connect_timeout: Duration::from_secs(10),
            connections: 4,
            // The default limit of Windows before Server 2012; all hosts answer within it.
            max_envelope_bytes: 153_600,
            // Some five thousand objects with a hundred properties each.
            max_result_bytes: 256 << 20,
        }
    }

    /// The options with what variables of the environment say, where they are set and not empty:
    /// `VMTIDE_WINRM_USER`, `VMTIDE_WINRM_PASSWORD` or `VMTIDE_WINRM_PASSWORD_FILE`, `VMTIDE_WINRM_AUTH`,
    /// `VMTIDE_WINRM_FINGERPRINT`, `VMTIDE_WINRM_CA_FILE`, `VMTIDE_WINRM_CERT` with `VMTIDE_WINRM_KEY`, and
    /// `VMTIDE_WINRM_KDC`. Secrets come in no other way: not in arguments, not in URLs.
    ///
    /// # Errors
    /// [`OptionsError`] where one makes no sense, or a file cannot be read.
    pub fn with_variables(
        mut self,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, OptionsError> {
        let get = |name: &str| {
            variable(&format!("VMTIDE_WINRM_{name}")).filter(|value| !value.is_empty())
        };
        let password = match (get("PASSWORD"), get("PASSWORD_FILE")) {
            (Some(password), _) => Some(Zeroizing::new(password)),
            (None, Some(path)) => Some(password_from_file(path.into())?),
            (None, None) => None,
        };
        match (get("USER"), password) {
            (Some(user), Some(password)) => {
                self.credentials = Some(Credentials::new(&user, password)?);
            }
            (Some(_), None) => {
                return Err(OptionsError::usage(
                    "VMTIDE_WINRM_USER is set, but neither VMTIDE_WINRM_PASSWORD nor VMTIDE_WINRM_PASSWORD_FILE",
                ));
            }
            (None, Some(_)) => {
                return Err(OptionsError::usage(
                    "a password for WinRM is set, but no VMTIDE_WINRM_USER",
                ));
            }
            (None, None) => {}
        }
        if let Some(text) = get("AUTH") {
            self.authentication = text.parse()?;
        }
        if let Some(text) = get("FINGERPRINT") {
            self.fingerprint = Some(text.parse()?);
        }
        if let Some(path) = get("CA_FILE") {
            self.ca_file = Some(path.into());
        }
        match (get("CERT"), get("KEY")) {
            (Some(certificate), Some(key)) => {
                self.client_certificate =
                    Some(ClientCertificate { certificate: certificate.into(), key: key.into() });
            }
            (None, None) => {}
            _ => {
                return Err(OptionsError::usage(
                    "VMTIDE_WINRM_CERT and VMTIDE_WINRM_KEY go together",
                ));
            }
        }
        if let Some(kdc) = get("KDC") {
            self.kdc = Some(kdc);
        }
        Ok(self)
    }

    /// The port in use.
    pub fn effective_port(&self) -> u16 {
        self.port.unwrap_or(match self.scheme {
            Scheme::Http => HTTP_PORT,
            Scheme::Https => HTTPS_PORT,
        })
    }

    /// `https://host:5986`: the host in messages, without credentials.
    pub fn peer(&self) -> String {
        let scheme = match self.scheme {
            Scheme::Http => "http",
            Scheme::Https => "https",
        };
        format!("{scheme}://{}:{}", self.authority_host(), self.effective_port())
    }

    /// The host as a URL has it: addresses of version 6 in brackets.
    pub(crate) fn authority_host(&self) -> String {
        if self.host.parse::<std::net::Ipv6Addr>().is_ok() {
            format!("[{}]", self.host)
        } else {
            self.host.clone()
        }
    }

    /// Whether what is wanted can be done at all.
    pub(crate) fn check(&self) -> Result<(), OptionsError> {
        let name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
        if self.host.is_empty() || self.host.len() > 255 || !self.host.chars().all(name) {
            return Err(OptionsError::usage(format!(
                "{:?} is neither a host's name nor an address",
                self.host
            )));
        }
        if let Some(named) = &self.kdc {
            vmtide_sspi::kdc_url(named).map_err(OptionsError::Usage)?;
        }
        let secured = self.scheme == Scheme::Https;
        let for_tls = self.fingerprint.is_some()
            || self.ca_file.is_some()
            || self.client_certificate.is_some();
        if for_tls && !secured && self.authentication != Authentication::Certificate {
            return Err(OptionsError::usage(
                "a certificate or its fingerprint is named, and without HTTPS nobody would look at it: use HTTPS (port 5986), or leave it out",
            ));
        }
        match self.authentication {
            Authentication::Basic if !secured => {
                return Err(OptionsError::usage(
                    "Basic authentication sends the password itself: use HTTPS (port 5986), or NTLM or Kerberos",
                ));
            }
            Authentication::Certificate if !secured => {
                return Err(OptionsError::usage("certificates of users need HTTPS (port 5986)"));
            }
            Authentication::Certificate if self.client_certificate.is_none() => {
                return Err(OptionsError::usage(
                    "no certificate of the user: set VMTIDE_WINRM_CERT and VMTIDE_WINRM_KEY",
                ));
            }
            Authentication::Certificate => {}
            _ if self.credentials.is_none() => {
                return Err(OptionsError::usage(
                    "no user for WinRM: set VMTIDE_WINRM_USER and VMTIDE_WINRM_PASSWORD (or VMTIDE_WINRM_PASSWORD_FILE)",
                ));
            }
            Authentication::Kerberos => self.check_kerberos()?,
            _ => {}
        }
        if !(8 << 10..=4 << 20).contains(&self.max_envelope_bytes) || self.connections == 0 {
            return Err(OptionsError::usage(
                "an answer may have 8 KiB to 4 MiB, and there must be one connection at least",
            ));
        }
        Ok(())
    }

    fn check_kerberos(&self) -> Result<(), OptionsError> {
        if self.host.parse::<std::net::IpAddr>().is_ok() {
            return Err(OptionsError::usage(
                "Kerberos needs the host's name, not its address; or use NTLM",
            ));
        }
        if self.credentials.as_ref().is_some_and(|credentials| credentials.parts().0.is_empty()) {
            return Err(OptionsError::usage(
                "Kerberos needs the user's domain: user@domain.example; or use NTLM",
            ));
        }
        Ok(())
    }
}

fn password_from_file(path: PathBuf) -> Result<Zeroizing<String>, OptionsError> {
    use std::io::Read;
    let file = std::fs::File::open(&path).map_err(|error| OptionsError::file(&path, error))?;
    let mut text = Zeroizing::new(String::new());
    file.take(MAX_PASSWORD_FILE_BYTES)
        .read_to_string(&mut text)
        .map_err(|error| OptionsError::file(&path, error))?;
    // Editors end a file with a line feed, which is no part of the password.
    let kept = text.trim_end_matches(['\r', '\n']).len();
    text.truncate(kept);
    Ok(text)
}

/// The SHA-256 of a certificate in DER, as `openssl x509 -fingerprint -sha256` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint(pub [u8; 32]);

impl FromStr for Fingerprint {
    type Err = OptionsError;

    /// 64 hexadecimal digits, with or without colons, with or without `sha256:` before them.
    fn from_str(text: &str) -> Result<Self, OptionsError> {
        let wrong = || {
            OptionsError::usage(
                "the fingerprint of a certificate has 64 hexadecimal digits (SHA-256; Windows shows SHA-1 as thumbprint, which is too weak)",
            )
        };
        let lower = text.trim().to_ascii_lowercase();
        let digits = ["sha256 fingerprint=", "sha256:", "sha256="]
            .iter()
            .find_map(|prefix| lower.strip_prefix(prefix))
            .unwrap_or(&lower);
        let digits: Vec<u32> = digits
            .chars()
            .filter(|c| *c != ':' && *c != ' ')
            .map(|c| c.to_digit(16))
            .collect::<Option<_>>()
            .ok_or_else(wrong)?;
        let exact = digits.len() == 64;
        let bytes: Vec<u8> = digits
            .chunks(2)
            .filter_map(|pair| match pair {
                [high, low] => u8::try_from(high << 4 | low).ok(),
                _ => None,
            })
            .collect();
        bytes.try_into().ok().filter(|_| exact).map(Self).ok_or_else(wrong)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(variables: &[(&str, &str)]) -> Result<WsmanOptions, OptionsError> {
        WsmanOptions::new("hv1").with_variables(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_environment_fills_in_what_is_secret() {
        let options = with(&[
            ("VMTIDE_WINRM_USER", r"LAB\admin"),
            ("VMTIDE_WINRM_PASSWORD", "s3cret"),
            ("VMTIDE_WINRM_AUTH", "NTLM"),
            ("VMTIDE_WINRM_FINGERPRINT", &"0f".repeat(32)),
            ("VMTIDE_WINRM_CA_FILE", ""),
        ])
        .unwrap();
        assert_eq!(options.credentials.as_ref().unwrap().parts(), ("LAB", "admin"));
        assert_eq!(options.authentication, Authentication::Ntlm);
        assert_eq!(options.ca_file, None);
        assert!(!format!("{options:?}").contains("s3cret"));
        let ignored = options.check();
        assert!(matches!(ignored, Err(OptionsError::Usage(_))), "a fingerprint without HTTPS");
        WsmanOptions { scheme: Scheme::Https, ..options }.check().unwrap();
        for half in
            [("VMTIDE_WINRM_USER", "u"), ("VMTIDE_WINRM_PASSWORD", "p"), ("VMTIDE_WINRM_CERT", "c")]
        {
            assert!(matches!(with(&[half]), Err(OptionsError::Usage(_))), "{half:?}");
        }
    }

    #[test]
    fn passwords_from_files_lose_their_line_feed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), " pass word \r\n").unwrap();
        let options = with(&[
            ("VMTIDE_WINRM_USER", "u"),
            ("VMTIDE_WINRM_PASSWORD_FILE", file.path().to_str().unwrap()),
        ]);
        assert_eq!(options.unwrap().credentials.unwrap().password(), " pass word ");
        let missing =
            with(&[("VMTIDE_WINRM_USER", "u"), ("VMTIDE_WINRM_PASSWORD_FILE", "/nonexistent")]);
        assert!(matches!(missing, Err(OptionsError::File { .. })));
    }

    #[test]
    fn users_of_all_forms() {
        for (user, parts) in [
            ("a@b.example", ("b.example", "a")),
            (r"B\a", ("B", "a")),
            (r".\a", ("", "a")),
            ("a", ("", "a")),
            ("x@y@b.example", ("b.example", "x@y")),
        ] {
            let credentials = Credentials::new(user, Zeroizing::new("p".into())).unwrap();
            assert_eq!(credentials.parts(), parts);
        }
        for (user, password) in [("", "p"), ("u", ""), ("u\n", "p"), ("u", &"x".repeat(5000))] {
            let error =
                Credentials::new(user, Zeroizing::new(password.into())).unwrap_err().to_string();
            assert!(password.len() < 2 || !error.contains(password), "{error}");
        }
    }

    #[test]
    fn what_would_betray_the_password_is_refused() {
        let credentials = Credentials::new("u", Zeroizing::new("p".into())).ok();
        let base = WsmanOptions { credentials, ..WsmanOptions::new("hv1") };
        base.check().unwrap();
        let refused = |change: &dyn Fn(&mut WsmanOptions)| {
            let mut options = base.clone();
            change(&mut options);
            options.check().unwrap_err().to_string()
        };
        assert!(refused(&|o| o.authentication = Authentication::Basic).contains("HTTPS"));
        assert!(refused(&|o| o.authentication = Authentication::Certificate).contains("HTTPS"));
        assert!(refused(&|o| o.authentication = Authentication::Kerberos).contains("domain"));
        assert!(refused(&|o| o.credentials = None).contains("VMTIDE_WINRM_USER"));
        assert!(refused(&|o| o.host = "a b".into()).contains("host"));
        assert!(refused(&|o| o.host = "h/x?".into()).contains("host"));
        assert!(refused(&|o| o.kdc = Some("https://dc1/x".into())).contains("KDC"));
        assert!(refused(&|o| o.max_envelope_bytes = 1).contains("KiB"));
    }

    #[test]
    fn hosts_as_messages_name_them() {
        assert_eq!(WsmanOptions::new("hv1").peer(), "http://hv1:5985");
        let v6 = WsmanOptions { scheme: Scheme::Https, ..WsmanOptions::new("fe80::1") };
        assert_eq!(v6.peer(), "https://[fe80::1]:5986");
    }

    #[test]
    fn fingerprints_as_tools_show_them() {
        let plain = "0f".repeat(32);
        for text in [plain.clone(), vec!["0F"; 32].join(":"), format!("sha256:{plain}")] {
            assert_eq!(text.parse::<Fingerprint>().unwrap(), Fingerprint([15; 32]));
        }
        for bad in ["", "0f", &"0f".repeat(20), &"0g".repeat(32)] {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
        }
    }
}
