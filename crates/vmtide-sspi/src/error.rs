//! What it means that a login failed: whether another mechanism may do, and in words that help.

use crate::der;
use crate::guard::guarded;
use picky_krb::messages::KrbError;
use sspi::ErrorKind;

/// The most characters of foreign text that are shown.
const MAX_SHOWN: usize = 300;

/// Why a login failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AuthError {
    /// Wrong name or password, expired or locked: the text says it. No other mechanism would help.
    Refused(String),
    /// Nobody of the user's domain answers; another mechanism may do.
    NoAuthority(String),
    /// The domain does not know the host, or the mechanism cannot be used with it; another one may.
    Unusable(String),
    /// The host does not keep to the protocol. No other mechanism is tried: it did not prove who it is.
    Broken(String),
}

impl AuthError {
    /// The reason.
    pub fn words(&self) -> &str {
        match self {
            Self::Refused(words)
            | Self::NoAuthority(words)
            | Self::Unusable(words)
            | Self::Broken(words) => words,
        }
    }

    /// Whether another mechanism may do where this one failed.
    pub const fn may_go_another_way(&self) -> bool {
        matches!(self, Self::NoAuthority(_) | Self::Unusable(_))
    }

    /// An error of the library in a step that asks nobody else: what the host sent cannot be used.
    pub fn broken(error: &sspi::Error) -> Self {
        Self::Broken(format!("authentication: {}", one_line(&error.description)))
    }
}

/// What a failed step of Kerberos means for a ticket to `target` (`HTTP/hv1`). `has_answered`: the step was about what
/// the host itself answered, so the domain had its say before.
pub fn kerberos_error(error: &sspi::Error, target: &str, has_answered: bool) -> AuthError {
    if has_answered {
        return AuthError::Broken(format!(
            "it did not prove by Kerberos that it is {target}: {}",
            one_line(&error.description)
        ));
    }
    let words = one_line(&error.description);
    let lower = words.to_lowercase();
    match error.error_type {
        ErrorKind::NoAuthenticatingAuthority => AuthError::NoAuthority(words),
        ErrorKind::TimeSkew => AuthError::Refused(
            "the clocks of this machine and of the domain differ too much: set them by NTP".into(),
        ),
        ErrorKind::ContextExpired => AuthError::Refused("the Kerberos ticket has expired".into()),
        ErrorKind::UnknownCredentials
            if lower.contains("server") && lower.contains("not found") =>
        {
            AuthError::Unusable(format!(
                "the domain does not know {target}: use the host's full name, or NTLM"
            ))
        }
        ErrorKind::UnknownCredentials => {
            AuthError::Refused(format!("the domain refused the user: {words}"))
        }
        ErrorKind::KdcInvalidRequest if lower.contains("pre-auth") || lower.contains("preauth") => {
            AuthError::Refused("wrong password".into())
        }
        ErrorKind::InvalidParameter if lower.contains("expired") => {
            AuthError::Refused(format!("the account or its password has expired: {words}"))
        }
        _ => AuthError::Unusable(format!("Kerberos cannot be used: {words}")),
    }
}

/// What a host says with a token that refuses a ticket (`KRB-ERROR` within GSSAPI, RFC 4121 4.1, in SPNEGO or not); none
/// where it says nothing that we know.
pub fn ticket_refusal(token: &[u8]) -> Option<&'static str> {
    const GSSAPI: u8 = 0x60;
    const ERROR_TOKEN: [u8; 2] = [3, 0];
    let frame = der::read(der::mechanism_token(token)).filter(|node| node.tag == GSSAPI)?;
    let mechanism = der::read(frame.content)?;
    let message = mechanism.rest.strip_prefix(&ERROR_TOKEN)?;
    let error = guarded(|| Ok(picky_asn1_der::from_bytes::<KrbError>(message)?)).ok()?;
    // RFC 4120 7.5.9.
    match error.0.error_code.0 {
        32 => Some("the Kerberos ticket has expired"),
        33 => Some(
            "the Kerberos ticket is not valid yet: the clocks of the domain and of the host differ",
        ),
        37 => Some("the clocks of this machine and of the host differ too much: set them by NTP"),
        35 | 36 | 41 | 44 | 45 => Some(
            "the Kerberos ticket is for another host of that name, or the host's password in the domain was changed: \
             use its full name, or NTLM",
        ),
        _ => None,
    }
}

/// Foreign text as a part of one line: short, and without what moves a terminal's cursor.
pub fn one_line(text: &str) -> String {
    let mut line = String::new();
    for word in text.split_whitespace() {
        if !line.is_empty() {
            line.push(' ');
        }
        line.extend(word.chars().filter(|c| !c.is_control()).take(MAX_SHOWN));
        if line.chars().count() >= MAX_SHOWN {
            line = line.chars().take(MAX_SHOWN).chain(['…']).collect();
            break;
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A KRB-ERROR (RFC 4120 5.9.1) within GSSAPI: version, type, time, code, realm, name.
    fn error_token(code: u8) -> Vec<u8> {
        let name = wrap(
            0x30,
            &[wrap(0xa0, &[2, 1, 2]), wrap(0xa1, &wrap(0x30, &wrap(0x1b, b"HTTP")))].concat(),
        );
        let fields = [
            wrap(0xa0, &[2, 1, 5]),
            wrap(0xa1, &[2, 1, 30]),
            wrap(0xa4, &wrap(0x18, b"20261121123000Z")),
            wrap(0xa5, &[2, 1, 0]),
            wrap(0xa6, &[2, 1, code]),
            wrap(0xa9, &wrap(0x1b, b"LAB.EXAMPLE")),
            wrap(0xaa, &name),
        ];
        let error = wrap(0x7e, &wrap(0x30, &fields.concat()));
        let mechanism = [6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x12, 1, 2, 2];
        wrap(0x60, &[&mechanism[..], &[3, 0], &error].concat())
    }

    fn wrap(tag: u8, content: &[u8]) -> Vec<u8> {
        let length = u8::try_from(content.len()).unwrap();
        let head = if length < 0x80 { vec![tag, length] } else { vec![tag, 0x81, length] };
        [&head[..], content].concat()
    }

    #[test]
    fn hosts_say_why_they_refuse_a_ticket() {
        for (code, words) in [(32, "expired"), (37, "clocks"), (33, "clocks"), (41, "full name")] {
            assert!(ticket_refusal(&error_token(code)).unwrap().contains(words), "{code}");
            // In the last message of SPNEGO: rejected, the token.
            let fields = [wrap(0xa0, &[0x0a, 1, 2]), wrap(0xa2, &wrap(4, &error_token(code)))];
            let spnego = wrap(0xa1, &wrap(0x30, &fields.concat()));
            assert!(ticket_refusal(&spnego).unwrap().contains(words), "{code} in SPNEGO");
        }
        assert_eq!(ticket_refusal(&error_token(60)), None);
        let token = error_token(32);
        for length in 0..token.len() {
            assert_eq!(ticket_refusal(&token[..length]), None);
        }
        assert_eq!(ticket_refusal(b"NTLMSSP"), None);
    }

    #[test]
    fn only_what_the_domain_lacks_leads_to_another_mechanism() {
        let error = |kind, text: &str| sspi::Error::new(kind, text.to_owned());
        let of = |kind, text: &str| kerberos_error(&error(kind, text), "cifs/hv1", false);
        for (kind, text) in [
            (ErrorKind::NoAuthenticatingAuthority, "nobody answers"),
            (ErrorKind::UnknownCredentials, "Server not found in Kerberos database"),
            (ErrorKind::KdcUnknownEType, "no cipher that both know"),
        ] {
            assert!(of(kind, text).may_go_another_way(), "{text}");
            // A host that fails to prove itself gets no second chance by a weaker mechanism.
            assert!(!kerberos_error(&error(kind, text), "cifs/hv1", true).may_go_another_way());
        }
        for (kind, text) in [
            (ErrorKind::TimeSkew, "skew"),
            (ErrorKind::ContextExpired, "expired"),
            (ErrorKind::UnknownCredentials, "Client not found in Kerberos database"),
            (ErrorKind::KdcInvalidRequest, "Pre-authentication information was invalid"),
            (ErrorKind::InvalidParameter, "Password has expired"),
        ] {
            let refused = of(kind, text);
            assert!(matches!(refused, AuthError::Refused(_)), "{refused:?}");
        }
    }

    #[test]
    fn foreign_text_is_one_short_line() {
        assert_eq!(one_line(" a\n\tb\u{1b}[2J "), "a b[2J");
        assert_eq!(one_line(&"x".repeat(1000)).chars().count(), MAX_SHOWN + 1);
    }
}
