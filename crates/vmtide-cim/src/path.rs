//! Paths of objects: `\\HOST\root\virtualization\v2:Class.Key="value",Other="x"`.

use crate::CimError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// The most bytes of a path that are read; real ones have a few hundred.
const MAX_PATH_BYTES: usize = 16 * 1024;

/// The path of an object. Paths are compared by class and keys, names without regard to case; the host is
/// only kept to be sent back.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ObjectPath {
    /// The host, where it was named.
    pub host: Option<String>,
    /// The namespace, with backslashes, e.g. `root\virtualization\v2`.
    pub namespace: String,
    /// The class.
    pub class: String,
    /// The keys by name; empty for a singleton or a class.
    pub keys: BTreeMap<String, String>,
}

impl ObjectPath {
    /// A path of Hyper-V's namespace.
    pub fn new(class: &str, keys: &[(&str, &str)]) -> Self {
        let keys = keys.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Self {
            host: None,
            namespace: crate::VIRTUALIZATION_NAMESPACE.into(),
            class: class.into(),
            keys: keys.collect(),
        }
    }

    /// A key by name.
    pub fn key(&self, name: &str) -> Option<&str> {
        let found = self.keys.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    /// Class and keys in the form that is compared.
    fn identity(&self) -> (String, Vec<(String, &str)>) {
        let keys =
            self.keys.iter().map(|(name, value)| (name.to_ascii_lowercase(), value.as_str()));
        let mut keys: Vec<_> = keys.collect();
        keys.sort();
        (self.class.to_ascii_lowercase(), keys)
    }
}

impl PartialEq for ObjectPath {
    fn eq(&self, other: &Self) -> bool {
        self.identity() == other.identity()
    }
}

impl Eq for ObjectPath {}

impl fmt::Display for ObjectPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(host) = &self.host {
            write!(f, r"\\{host}\")?;
        }
        if !self.namespace.is_empty() {
            write!(f, "{}:", self.namespace)?;
        }
        write!(f, "{}", self.class)?;
        for (index, (name, value)) in self.keys.iter().enumerate() {
            let separator = if index == 0 { '.' } else { ',' };
            let value = value.replace('\\', r"\\").replace('"', "\\\"");
            write!(f, "{separator}{name}=\"{value}\"")?;
        }
        Ok(())
    }
}

impl From<ObjectPath> for String {
    fn from(path: ObjectPath) -> Self {
        path.to_string()
    }
}

impl TryFrom<String> for ObjectPath {
    type Error = CimError;

    fn try_from(text: String) -> Result<Self, CimError> {
        text.parse()
    }
}

impl FromStr for ObjectPath {
    type Err = CimError;

    fn from_str(text: &str) -> Result<Self, CimError> {
        let bad = |why: &str| CimError::protocol("an object path", why.to_owned());
        if text.len() > MAX_PATH_BYTES {
            return Err(bad("it is longer than 16 KiB"));
        }
        let (host, rest) = match text.strip_prefix(r"\\") {
            Some(rest) => {
                let (host, rest) =
                    rest.split_once('\\').ok_or_else(|| bad("nothing follows the host"))?;
                (Some(host.to_owned()), rest)
            }
            None => (None, text),
        };
        // A quoted key may hold any of the separators.
        let head = rest.split('"').next().unwrap_or(rest);
        let (namespace, rest) = match head.find(':') {
            Some(at) => (&rest[..at], &rest[at + 1..]),
            None => ("", rest),
        };
        let head = rest.split('"').next().unwrap_or(rest);
        let (class, keys) = match head.find('.') {
            Some(at) => (
                &rest[..at],
                parse_keys(&rest[at + 1..])
                    .ok_or_else(|| bad("its keys are not NAME=\"VALUE\""))?,
            ),
            None => (rest.strip_suffix("=@").unwrap_or(rest), BTreeMap::new()),
        };
        if !is_name(class) {
            return Err(bad("it names no class"));
        }
        let namespace = namespace.replace('/', r"\");
        // Written, it would be taken for a host.
        if namespace.starts_with('\\') {
            return Err(bad("its namespace begins with a separator"));
        }
        let path = Self { host, namespace, class: class.into(), keys };
        // Values without quotes get some: whoever is sent the path is to take it, too.
        if path.to_string().len() > MAX_PATH_BYTES {
            return Err(bad("it is longer than 16 KiB"));
        }
        Ok(path)
    }
}

/// Whether this can name a class or a key (DSP0004, annex A: letters, digits and underscores).
fn is_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || c == '_')
}

/// `NAME="VALUE",…` with backslash escapes; values without quotes are numbers or truths.
fn parse_keys(mut rest: &str) -> Option<BTreeMap<String, String>> {
    let mut keys = BTreeMap::new();
    loop {
        let (name, after) = rest.split_once('=')?;
        let mut value = String::new();
        let after = if let Some(quoted) = after.strip_prefix('"') {
            let mut characters = quoted.char_indices();
            let end = loop {
                match characters.next()? {
                    (at, '"') => break at,
                    (_, '\\') => value.push(characters.next()?.1),
                    (_, c) => value.push(c),
                }
            };
            &quoted[end + 1..]
        } else {
            let end = after.find(',').unwrap_or(after.len());
            value.push_str(&after[..end]);
            &after[end..]
        };
        let name = name.trim();
        if !is_name(name) || keys.insert(name.to_owned(), value).is_some() {
            return None;
        }
        match after.strip_prefix(',') {
            Some(next) => rest = next,
            None => return after.is_empty().then_some(keys),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_survive_being_written_and_read() {
        let text = r#"\\HV1\root\virtualization\v2:Msvm_StorageAllocationSettingData.InstanceID="Microsoft:A-B\\C\\0\\1\\L""#;
        let path: ObjectPath = text.parse().unwrap();
        assert_eq!(path.host.as_deref(), Some("HV1"));
        assert_eq!(path.namespace, r"root\virtualization\v2");
        assert_eq!(path.key("instanceid"), Some(r"Microsoft:A-B\C\0\1\L"));
        assert_eq!(path.to_string(), text);
        let odd: ObjectPath = r#"X.A="a,b=\"c\".d:e",B=3"#.parse().unwrap();
        assert_eq!((odd.key("A"), odd.key("b")), (Some(r#"a,b="c".d:e"#), Some("3")));
        assert_eq!(odd.to_string().parse::<ObjectPath>().unwrap(), odd);
        assert_eq!("root/cimv2:Win32_X=@".parse::<ObjectPath>().unwrap().class, "Win32_X");
    }

    #[test]
    fn broken_paths_are_refused() {
        for text in [
            "",
            r"\\host",
            "ns:",
            "X.A",
            "X.A=\"b",
            "X.A=\"b\"c",
            "X.A=\"b\",",
            "X.A=1,A=2",
            "a b",
            "X. =\"b\"",
            "X.A.B=\"b\"",
            "X.A\"=\"b\"",
            r"//host/root/cimv2:X",
        ] {
            assert!(text.parse::<ObjectPath>().is_err(), "{text}");
        }
        assert!("x".repeat(20_000).parse::<ObjectPath>().is_err());
        // It fits as it is read, and would not as it is written.
        assert!(format!("X.A={}", "\\".repeat(10_000)).parse::<ObjectPath>().is_err());
    }
}
