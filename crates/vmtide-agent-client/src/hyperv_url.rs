//! `hyperv://HOST[:PORT]/VM`: VMs of a Hyper-V host by way of the agent there; `hyperv:///VM`: of this host.

use crate::url::check_authority;
use crate::{AgentError, Result};
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};
use std::fmt;

const SCHEME: &str = "hyperv://";

/// The longest name of a VM: Hyper-V takes 100 characters; patterns and ids are no longer.
const MAX_NAME_BYTES: usize = 1024;

/// What of a name is written as %XX where people read it.
const UNREADABLE: &AsciiSet = &CONTROLS.add(b' ').add(b'%').add(b'?').add(b'#').add(b'"').add(b'/');

/// VMs of a Hyper-V host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HypervUrl {
    /// Host and port as they are written in a URL; none for this host.
    authority: Option<String>,
    /// The name, id or pattern; none for the host as a whole.
    vm: Option<String>,
}

impl HypervUrl {
    /// Whether a text is meant as such a URL.
    pub fn is_hyperv_url(text: &str) -> bool {
        text.get(..SCHEME.len()).is_some_and(|start| start.eq_ignore_ascii_case(SCHEME))
    }

    /// Understands a URL: `hyperv://hv1/web`, `hyperv://hv1:6677/web%2Fold`, `hyperv:///web` for this host,
    /// `hyperv://hv1` for all of a host. The name is percent-encoded where it has `%`, `?`, `#` or `/`.
    ///
    /// # Errors
    /// [`AgentError::Usage`] with what is wrong.
    pub fn parse(text: &str) -> Result<Self> {
        // Never the whole text: somebody may have written a password into it.
        let wrong = |what: &str| AgentError::usage(format!("a hyperv:// URL {what}"));
        if !Self::is_hyperv_url(text) {
            return Err(wrong("begins with hyperv://"));
        }
        let rest = text.get(SCHEME.len()..).unwrap_or_default();
        let (authority, name) = rest.split_once('/').unwrap_or((rest, ""));
        if name.contains(['?', '#']) {
            return Err(wrong("has nothing after the VM; write ? and # of a name as %3F and %23"));
        }
        if name.trim_end_matches('/').contains('/') {
            return Err(wrong("names one VM; write / of a name as %2F"));
        }
        let authority = match authority {
            "" => None,
            host => Some(check_authority(host).map_err(|what| {
                let what = what.replace("keys do not", "users and keys do not");
                AgentError::usage(format!("the host of a hyperv:// URL: {what}"))
            })?),
        };
        let name = percent_decode_str(name.trim_end_matches('/'))
            .decode_utf8()
            .map_err(|_| wrong("names its VM in UTF-8"))?;
        if name.len() > MAX_NAME_BYTES || name.chars().any(char::is_control) {
            return Err(wrong("names a VM that cannot be"));
        }
        let vm = Some(name.into_owned()).filter(|name| !name.is_empty());
        if authority.is_none() && vm.is_none() && rest.is_empty() {
            return Err(wrong("names a host, or this one with hyperv:///VM"));
        }
        Ok(Self { authority, vm })
    }

    /// Host and port, `host:6677`; none for this host.
    pub fn authority(&self) -> Option<&str> {
        self.authority.as_deref()
    }

    /// The VM by name, id or pattern; none for the host as a whole.
    pub fn vm(&self) -> Option<&str> {
        self.vm.as_deref()
    }

    /// The same host with another VM.
    #[must_use]
    pub fn with_vm(&self, vm: &str) -> Self {
        Self { authority: self.authority.clone(), vm: Some(vm.to_owned()) }
    }
}

impl fmt::Display for HypervUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vm = utf8_percent_encode(self.vm.as_deref().unwrap_or_default(), UNREADABLE);
        write!(f, "{SCHEME}{}/{vm}", self.authority.as_deref().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_names() {
        for (text, authority, vm, shown) in [
            ("hyperv://hv1/web", Some("hv1:6677"), Some("web"), "hyperv://hv1:6677/web"),
            (
                "HYPERV://hv1:7000/a%2Fb c/",
                Some("hv1:7000"),
                Some("a/b c"),
                "hyperv://hv1:7000/a%2Fb%20c",
            ),
            ("hyperv:///web-*", None, Some("web-*"), "hyperv:///web-*"),
            ("hyperv://[::1]:443/x", Some("[::1]:443"), Some("x"), "hyperv://[::1]:443/x"),
            ("hyperv://hv1", Some("hv1:6677"), None, "hyperv://hv1:6677/"),
            ("hyperv:///", None, None, "hyperv:///"),
        ] {
            let url = HypervUrl::parse(text).unwrap();
            assert_eq!((url.authority(), url.vm()), (authority, vm), "{text}");
            assert_eq!(url.to_string(), shown);
            assert_eq!(HypervUrl::parse(shown).unwrap(), url);
        }
    }

    #[test]
    fn what_is_wrong_is_said_without_what_may_be_secret() {
        for text in [
            "hyperv://",
            "hyperv://user:s3cret@hv1/web",
            "hyperv://hv1/a/b",
            "hyperv://hv1/a?b",
            "hyperv://hv1/a#b",
            "hyperv://hv1/%FF",
            "hyperv://hv1/a%00b",
            "hyperv://hv1:x/a",
            "agent+https://hv1/a",
        ] {
            let error = HypervUrl::parse(text).unwrap_err().to_string();
            assert!(error.contains("hyperv://") && !error.contains("s3cret"), "{text}: {error}");
        }
    }
}
