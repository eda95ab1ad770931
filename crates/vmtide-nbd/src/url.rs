//! NBD URLs (the NBD project's `doc/uri.md`): where an export is and how to get to it.

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use vmtide_block::BlockError;

/// The port registered for NBD.
pub const DEFAULT_PORT: u16 = 10809;

/// What is escaped when a URL is written: what has a meaning in a URL or cannot be in one.
const ESCAPED: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'&')
    .add(b'+')
    .add(b'<')
    .add(b'=')
    .add(b'>')
    .add(b'?')
    .add(b'[')
    .add(b'\\')
    .add(b']')
    .add(b'^')
    .add(b'`')
    .add(b'{')
    .add(b'|')
    .add(b'}');

/// Where an NBD server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NbdAddress {
    /// A TCP port.
    Tcp {
        /// A host name, an IPv4 address, or an IPv6 address without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// A Unix domain socket.
    Unix {
        /// Its path; one that starts with NUL is in Linux's abstract namespace.
        socket: String,
    },
}

impl fmt::Display for NbdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix { socket } => f.write_str(&socket.replace('\0', "@")),
        }
    }
}

/// An NBD URL: `nbd://host[:port]/export`, `nbds://…` with TLS,
/// `nbd+unix:///export?socket=/path`, `nbds+unix:///…`.
///
/// The export name is the path without its first `/`, percent-decoded; it may be empty (the
/// default export). Of the query, `socket`, `tls-certificates`, `tls-hostname`,
/// `tls-verify-peer` and `tls-type=x509` are understood; anything else is an error, because a
/// security parameter that is passed over is worse than a refusal. The plain schemes never use
/// TLS: an attacker could undo an encryption that is only tried.
///
/// ```
/// use vmtide_nbd::{NbdAddress, NbdUrl};
/// let url: NbdUrl = "nbd+unix:///my%20disk?socket=/run/vm.sock".parse()?;
/// assert_eq!(url.export, "my disk");
/// assert_eq!(url.address, NbdAddress::Unix { socket: "/run/vm.sock".into() });
/// assert_eq!(url.to_string(), "nbd+unix:///my%20disk?socket=/run/vm.sock");
/// # Ok::<(), vmtide_block::BlockError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NbdUrl {
    /// Where the server listens.
    pub address: NbdAddress,
    /// The export's name.
    pub export: String,
    /// Whether the connection must be encrypted.
    pub tls: bool,
    /// `tls-certificates`: a directory of certificates.
    pub tls_certificates: Option<PathBuf>,
    /// `tls-hostname`: the name the server's certificate must carry.
    pub tls_hostname: Option<String>,
    /// `tls-verify-peer`: whether the server's certificate is verified.
    pub tls_verify_peer: bool,
}

impl NbdUrl {
    /// The export `export` on a Unix socket.
    pub fn unix(socket: impl Into<String>, export: impl Into<String>) -> Self {
        Self::at(NbdAddress::Unix { socket: socket.into() }, export.into())
    }

    /// The export `export` on a TCP port.
    pub fn tcp(host: impl Into<String>, port: u16, export: impl Into<String>) -> Self {
        Self::at(NbdAddress::Tcp { host: host.into(), port }, export.into())
    }

    fn at(address: NbdAddress, export: String) -> Self {
        Self {
            address,
            export,
            tls: false,
            tls_certificates: None,
            tls_hostname: None,
            tls_verify_peer: true,
        }
    }

    /// Whether `text` looks like an NBD URL at all, to tell it from a path.
    pub fn is_nbd_url(text: &str) -> bool {
        ["nbd://", "nbds://", "nbd+unix:", "nbds+unix:"]
            .iter()
            .any(|scheme| text.starts_with(scheme))
    }

    /// The same server, another export.
    pub fn with_export(&self, export: impl Into<String>) -> Self {
        Self { export: export.into(), ..self.clone() }
    }
}

fn invalid(text: &str, why: impl fmt::Display) -> BlockError {
    BlockError::unsupported(format!("NBD URL {text}"), why.to_string())
}

fn decode(text: &str, part: &str) -> Result<String, BlockError> {
    percent_decode_str(part)
        .decode_utf8()
        .map(std::borrow::Cow::into_owned)
        .map_err(|_| invalid(text, "is not UTF-8 where it is decoded"))
}

fn parse_authority(text: &str, authority: &str) -> Result<(String, u16), BlockError> {
    if authority.contains('@') {
        return Err(invalid(text, "has a user, which NBD uses for pre-shared keys only"));
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest
                .split_once(']')
                .ok_or_else(|| invalid(text, "lacks the ']' after an IPv6 address"))?;
            (host.to_owned(), port)
        }
        None => match authority.find(':') {
            Some(at) => (decode(text, &authority[..at])?, &authority[at..]),
            None => (decode(text, authority)?, ""),
        },
    };
    let port = match port.strip_prefix(':') {
        None if port.is_empty() => DEFAULT_PORT,
        Some("") => DEFAULT_PORT,
        Some(number) => number.parse().map_err(|_| invalid(text, "has an invalid port"))?,
        None => return Err(invalid(text, "has an invalid host")),
    };
    let host = if host.is_empty() { "localhost".to_owned() } else { host };
    Ok((host, port))
}

impl NbdUrl {
    fn apply_query(&mut self, text: &str, query: &str) -> Result<Option<String>, BlockError> {
        let mut socket = None;
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decode(text, value)?;
            match (decode(text, key)?.as_str(), value.as_str()) {
                ("socket", _) => socket = Some(value),
                ("tls-certificates", _) => self.tls_certificates = Some(value.into()),
                ("tls-hostname", _) => self.tls_hostname = Some(value),
                ("tls-verify-peer", "0" | "false") => self.tls_verify_peer = false,
                ("tls-verify-peer", "1" | "true") => self.tls_verify_peer = true,
                ("tls-type", "x509") => {}
                ("tls-type" | "tls-psk-file" | "tls-username", _) => {
                    return Err(invalid(text, "asks for TLS other than with certificates"));
                }
                (key, _) => return Err(invalid(text, format!("has the unknown parameter {key}"))),
            }
        }
        Ok(socket)
    }
}

impl FromStr for NbdUrl {
    type Err = BlockError;

    /// # Errors
    /// [`BlockError::Unsupported`] with the URL and what is wrong with it.
    fn from_str(text: &str) -> Result<Self, BlockError> {
        let (scheme, rest) = text.split_once(':').ok_or_else(|| invalid(text, "has no scheme"))?;
        let (tls, unix) = match scheme {
            "nbd" => (false, false),
            "nbds" => (true, false),
            "nbd+unix" => (false, true),
            "nbds+unix" => (true, true),
            _ => return Err(invalid(text, "is none of nbd, nbds, nbd+unix, nbds+unix")),
        };
        let rest = rest.split('#').next().unwrap_or_default();
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = match rest.strip_prefix("//") {
            Some(rest) => rest.split_at(rest.find('/').unwrap_or(rest.len())),
            None => ("", rest),
        };
        let export = decode(text, path.strip_prefix('/').unwrap_or(path))?;
        if export.len() > crate::proto::constants::MAX_STRING_BYTES || export.contains('\0') {
            return Err(invalid(text, "has an export name that cannot be one"));
        }
        let mut url = Self::unix("", export);
        url.tls = tls;
        let socket = url.apply_query(text, query)?;
        url.address = match (unix, socket) {
            (true, Some(socket)) if !socket.is_empty() && authority.is_empty() => {
                NbdAddress::Unix { socket }
            }
            (true, Some(_)) => return Err(invalid(text, "has a host beside a socket")),
            (true, None) => return Err(invalid(text, "lacks ?socket=PATH")),
            (false, Some(_)) => return Err(invalid(text, "has a socket but no +unix")),
            (false, None) => {
                let (host, port) = parse_authority(text, authority)?;
                NbdAddress::Tcp { host, port }
            }
        };
        Ok(url)
    }
}

impl fmt::Display for NbdUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let escape = |text: &str| utf8_percent_encode(text, ESCAPED).to_string();
        let secure = if self.tls { "s" } else { "" };
        let export = escape(&self.export);
        let mut parameters = Vec::new();
        match &self.address {
            NbdAddress::Tcp { host, port } => {
                let host = if host.contains(':') { format!("[{host}]") } else { escape(host) };
                write!(f, "nbd{secure}://{host}")?;
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
                write!(f, "/{export}")?;
            }
            NbdAddress::Unix { socket } => {
                write!(f, "nbd{secure}+unix:///{export}")?;
                parameters.push(format!("socket={}", escape(socket)));
            }
        }
        if let Some(directory) = &self.tls_certificates {
            let directory = escape(&directory.to_string_lossy());
            parameters.push(format!("tls-certificates={directory}"));
        }
        if let Some(hostname) = &self.tls_hostname {
            parameters.push(format!("tls-hostname={}", escape(hostname)));
        }
        if !self.tls_verify_peer {
            parameters.push("tls-verify-peer=0".to_owned());
        }
        if parameters.is_empty() {
            return Ok(());
        }
        write!(f, "?{}", parameters.join("&"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_examples_of_the_specification_parse() {
        for (text, export) in [
            ("nbd://example.com/disk", "disk"),
            ("nbd+unix:///disk?socket=sock", "disk"),
            ("nbd://example.com/", ""),
            ("nbd://example.com", ""),
            ("nbd://example.com//disk", "/disk"),
            ("nbd://example.com/hello%20world", "hello world"),
            ("nbd+unix:/disk?socket=sock", "disk"),
        ] {
            let url: NbdUrl = text.parse().unwrap();
            assert_eq!(url.export, export, "{text}");
        }
        let url: NbdUrl = "nbd+unix:///?socket=%00/abstract".parse().unwrap();
        let socket = "\0/abstract".to_owned();
        assert_eq!(url.address, NbdAddress::Unix { socket });
    }

    #[test]
    fn a_written_url_parses_to_itself() {
        for text in [
            "nbd://example.com/disk",
            "nbds://[::1]:10810/a%20b",
            "nbd+unix:///?socket=/run/a%26b.sock",
            "nbds+unix:///x?socket=s&tls-certificates=/etc/pki&tls-hostname=h&tls-verify-peer=0",
        ] {
            let url: NbdUrl = text.parse().unwrap();
            assert_eq!(url.to_string(), text);
        }
    }

    #[test]
    fn what_cannot_be_followed_is_refused() {
        for text in [
            "http://host/x",
            "nbd",
            "nbd://user@host/x",
            "nbd://host:99999/x",
            "nbd://[::1/x",
            "nbd+unix:///x",
            "nbd+unix://host/x?socket=s",
            "nbd://host/x?socket=s",
            "nbd://host/x?tls-type=psk",
            "nbd://host/x?tls-verify-peer=maybe",
            "nbd://host/x?unknown=1",
            "nbd://host/%ff",
            "nbd://host/%00",
        ] {
            assert!(text.parse::<NbdUrl>().is_err(), "{text}");
        }
    }
}
