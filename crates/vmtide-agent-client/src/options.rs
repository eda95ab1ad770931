//! How to get at an agent: key, certificate, patience.

use crate::{AgentError, Result};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use zeroize::Zeroizing;

/// How long an agent that was there is waited for when it is gone: a restart of its host.
const DEFAULT_RETRY_TIME: Duration = Duration::from_secs(300);

/// The longest key: more is a mistake, such as a disk image given as a key file.
const MAX_KEY_BYTES: usize = 4096;

/// How to get at an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentOptions {
    /// The key that the agent knows us by. Without one only agents that need none answer.
    pub key: Option<AgentKey>,
    /// The certificate's fingerprint. Where it is given nothing else is looked at: neither the name in the
    /// certificate, nor its dates, nor who signed it.
    pub fingerprint: Option<Fingerprint>,
    /// Authorities (PEM) to trust instead of the system's; also the agent's own certificate.
    pub ca_file: Option<PathBuf>,
    /// How long to try again when the agent is gone.
    pub retry_time: Duration,
    /// Whether to have content compressed on the way (zstd): worth it on lines below some 2 Gbit/s.
    pub compress: bool,
}

impl Default for AgentOptions {
    fn default() -> Self {
        Self {
            key: None,
            fingerprint: None,
            ca_file: None,
            retry_time: DEFAULT_RETRY_TIME,
            compress: false,
        }
    }
}

/// A key: never shown, wiped from memory when it is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct AgentKey(Zeroizing<String>);

impl AgentKey {
    /// Takes a key; white space around it, such as a file's last line feed, does not count.
    ///
    /// # Errors
    /// [`AgentError::Usage`] where it is empty, too long, or cannot stand in a header.
    pub fn new(text: &str) -> Result<Self> {
        let key = text.trim();
        if key.is_empty()
            || key.len() > MAX_KEY_BYTES
            || !key.bytes().all(|byte| (0x21..0x7f).contains(&byte))
        {
            return Err(AgentError::usage(format!(
                "the agent's key must have 1 to {MAX_KEY_BYTES} characters, all ASCII and none a space"
            )));
        }
        Ok(Self(Zeroizing::new(key.to_owned())))
    }

    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for AgentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AgentKey(…)")
    }
}

/// The SHA-256 of a certificate in DER, as `vmtide agent` and `openssl x509 -fingerprint -sha256` show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint(pub [u8; 32]);

impl FromStr for Fingerprint {
    type Err = AgentError;

    /// 64 hexadecimal digits, with or without colons, with or without `sha256:` before them.
    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            AgentError::usage(
                "the fingerprint of an agent's certificate has 64 hexadecimal digits (SHA-256), with or without colons",
            )
        };
        let lower = text.trim().to_ascii_lowercase();
        let digits = ["sha256 fingerprint=", "sha256:", "sha256=", "sha-256:"]
            .iter()
            .find_map(|prefix| lower.strip_prefix(prefix))
            .unwrap_or(&lower);
        let digits: Vec<u32> = digits
            .chars()
            .filter(|c| *c != ':' && *c != ' ')
            .map(|c| c.to_digit(16))
            .collect::<Option<_>>()
            .ok_or_else(wrong)?;
        let bytes: Vec<u8> = digits
            .chunks(2)
            .filter_map(|pair| match pair {
                [high, low] => u8::try_from(high << 4 | low).ok(),
                _ => None,
            })
            .collect();
        let exact = digits.len() == 64;
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

    #[test]
    fn fingerprints_as_tools_show_them() {
        let plain = "0f".repeat(32);
        let colons = vec!["0F"; 32].join(":");
        let expected = Fingerprint([15; 32]);
        for text in [
            plain.clone(),
            colons.clone(),
            format!("sha256:{plain}"),
            format!("SHA256 Fingerprint={colons}\n"),
        ] {
            assert_eq!(text.parse::<Fingerprint>().unwrap(), expected, "{text}");
        }
        assert_eq!(expected.to_string().parse::<Fingerprint>().unwrap(), expected);
        for bad in ["", "0f", &"0f".repeat(33), &"0g".repeat(32), &plain[1..]] {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
        }
    }

    #[test]
    fn keys_are_checked_and_never_shown() {
        let key = AgentKey::new(" s3cret-value\n").unwrap();
        assert_eq!(key.expose(), "s3cret-value");
        assert!(
            !format!(
                "{key:?}{:?}",
                AgentOptions { key: Some(key.clone()), ..AgentOptions::default() }
            )
            .contains("s3cret")
        );
        for bad in ["", " ", "a b", "ä", &"x".repeat(5000)] {
            let error = AgentKey::new(bad).unwrap_err().to_string();
            assert!(bad.trim().is_empty() || !error.contains(bad), "{error}");
        }
    }
}
