//! `agent+https://HOST[:PORT]/PATH[?disk=PATH…]`: an agent and the disks on its host.

use crate::{AgentError, Result};
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};
use std::fmt;

/// The port of agents, and of rct-service before them.
pub const DEFAULT_PORT: u16 = 6677;

const SCHEME: &str = "agent+https://";

/// The longest path that Windows and Linux take, with room: what is longer is a mistake.
const MAX_PATH_BYTES: usize = 32 << 10;

/// What of a path is written as %XX where people read it.
const UNREADABLE: &AsciiSet = &CONTROLS.add(b' ').add(b'%').add(b'?').add(b'#').add(b'"').add(b'&');

/// What of a path is written as %XX in a request: everything that has a meaning in a URL.
const IN_REQUEST: &AsciiSet =
    &percent_encoding::NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// An agent and disks of its host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AgentUrl {
    /// Host and port as they are written in a URL: `[::1]:6677`.
    authority: String,
    /// The disks, as the host names them; at least one.
    paths: Vec<String>,
}

impl AgentUrl {
    /// Whether a text is meant as such a URL.
    pub fn is_agent_url(text: &str) -> bool {
        text.get(..SCHEME.len()).is_some_and(|start| start.eq_ignore_ascii_case(SCHEME))
    }

    /// Understands a URL. The path is that of a file on the agent's host, with `/` or `\`, percent-encoded
    /// where it has `%`, `?` or `#`: `agent+https://hv1/C:/VMs/web.vhdx`, `agent+https://kvm1/vms/web.qcow2`.
    /// Further disks of the same VM follow as `?disk=PATH&disk=PATH`.
    ///
    /// # Errors
    /// [`AgentError::Usage`] with what is wrong.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = |what: &str| {
            AgentError::usage(format!("{}: {what}", text.split('?').next().unwrap_or_default()))
        };
        if !Self::is_agent_url(text) {
            return Err(wrong("not an agent+https:// URL"));
        }
        let rest = text.get(SCHEME.len()..).unwrap_or_default();
        let (authority, rest) =
            rest.split_once('/').ok_or_else(|| wrong("names no disk: add its path"))?;
        let authority = check_authority(authority).map_err(|what| wrong(&what))?;
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let mut paths = vec![host_path(path).map_err(|what| wrong(&what))?];
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some(("disk", path)) => paths.push(host_path(path).map_err(|what| wrong(&what))?),
                _ => return Err(wrong("after ? only disk=PATH can be given")),
            }
        }
        for (number, path) in paths.iter().enumerate() {
            if paths.iter().take(number).any(|earlier| earlier == path) {
                return Err(wrong("names one disk twice"));
            }
        }
        Ok(Self { authority, paths })
    }

    /// Host and port, `host:6677`.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// The agent without a disk, for errors.
    pub fn agent(&self) -> String {
        format!("{SCHEME}{}", self.authority)
    }

    /// The disks by their paths on the agent's host; at least one.
    pub fn paths(&self) -> &[String] {
        &self.paths
    }

    /// A name for the VM: the first disk's file name without its extension.
    pub fn vm_name(&self) -> Option<String> {
        let file = self.paths.first()?.rsplit(['/', '\\']).next()?;
        let stem = file
            .rsplit_once('.')
            .map_or(file, |(stem, _)| if stem.is_empty() { file } else { stem });
        (!stem.is_empty()).then(|| stem.to_owned())
    }
}

impl fmt::Display for AgentUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.agent())?;
        for (number, path) in self.paths.iter().enumerate() {
            let readable = readable(path);
            match number {
                0 => write!(f, "/{}", readable.strip_prefix('/').unwrap_or(&readable))?,
                1 => write!(f, "?disk={readable}")?,
                _ => write!(f, "&disk={readable}")?,
            }
        }
        Ok(())
    }
}

/// A host's path as it is written in a URL for people.
pub(crate) fn readable(path: &str) -> String {
    let path = if has_drive(path) { path.replace('\\', "/") } else { path.to_owned() };
    utf8_percent_encode(&path, UNREADABLE).to_string()
}

/// A host's path, or any other text, as one segment of a request.
pub(crate) fn segment(text: &str) -> String {
    utf8_percent_encode(text, IN_REQUEST).to_string()
}

/// Host and port of a URL, with the port of agents where it has none.
pub(crate) fn check_authority(text: &str) -> std::result::Result<String, String> {
    if text.contains('@') {
        return Err("keys do not belong into a URL: use VMTIDE_AGENT_KEY or a key file".into());
    }
    let parsed = url::Url::parse(&format!("https://{text}/"))
        .map_err(|error| format!("bad host or port: {error}"))?;
    if parsed.path() != "/" || parsed.query().is_some() || parsed.fragment().is_some() {
        return Err("bad host or port".into());
    }
    let host = parsed.host_str().filter(|host| !host.is_empty()).ok_or("names no host")?;
    // A port of 443 that is written is the scheme's own to the parser, and must not become ours.
    let port = if text.ends_with(":443") { 443 } else { parsed.port().unwrap_or(DEFAULT_PORT) };
    Ok(format!("{host}:{port}"))
}

fn has_drive(path: &str) -> bool {
    let bytes = path.as_bytes();
    bytes.first().is_some_and(u8::is_ascii_alphabetic)
        && bytes.get(1) == Some(&b':')
        && matches!(bytes.get(2), None | Some(b'/' | b'\\'))
}

/// From what stands behind the host to a path of the host.
fn host_path(encoded: &str) -> std::result::Result<String, String> {
    if encoded.contains('#') {
        return Err("write # as %23".into());
    }
    let text = percent_decode_str(encoded)
        .decode_utf8()
        .map_err(|_| "a path that is not UTF-8".to_owned())?;
    if text.len() > MAX_PATH_BYTES || text.contains('\0') {
        return Err("this is no path".into());
    }
    let bare = text.trim_start_matches('/');
    if bare.is_empty() {
        return Err("names no disk: add its path".into());
    }
    if has_drive(bare) {
        return Ok(bare.replace('/', "\\"));
    }
    if bare.starts_with('\\') {
        return Ok(bare.to_owned());
    }
    Ok(format!("/{bare}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_paths_of_both_systems() {
        for (text, authority, path, shown) in [
            (
                "agent+https://kvm1/vms/web.qcow2",
                "kvm1:6677",
                "/vms/web.qcow2",
                "agent+https://kvm1:6677/vms/web.qcow2",
            ),
            (
                "agent+https://kvm1:7000//vms/web.qcow2",
                "kvm1:7000",
                "/vms/web.qcow2",
                "agent+https://kvm1:7000/vms/web.qcow2",
            ),
            (
                "agent+https://hv1/C:/VMs/a b.vhdx",
                "hv1:6677",
                "C:\\VMs\\a b.vhdx",
                "agent+https://hv1:6677/C:/VMs/a%20b.vhdx",
            ),
            (
                "agent+https://hv1/C:%5CVMs%5Ca.vhdx",
                "hv1:6677",
                "C:\\VMs\\a.vhdx",
                "agent+https://hv1:6677/C:/VMs/a.vhdx",
            ),
            (
                "AGENT+HTTPS://[::1]:443/x%3Fy.raw",
                "[::1]:443",
                "/x?y.raw",
                "agent+https://[::1]:443/x%3Fy.raw",
            ),
        ] {
            let url = AgentUrl::parse(text).unwrap();
            assert_eq!(
                (url.authority(), url.paths()),
                (authority, &[path.to_owned()][..]),
                "{text}"
            );
            assert_eq!(url.to_string(), shown);
            assert_eq!(AgentUrl::parse(shown).unwrap(), url);
        }
    }

    #[test]
    fn several_disks_and_a_name() {
        let url = AgentUrl::parse(
            "agent+https://h/vms/web.os.vhdx?disk=/vms/web-data.vhdx&disk=D:/x.vhdx",
        )
        .unwrap();
        assert_eq!(url.paths(), ["/vms/web.os.vhdx", "/vms/web-data.vhdx", "D:\\x.vhdx"]);
        assert_eq!(url.vm_name().as_deref(), Some("web.os"));
        assert_eq!(AgentUrl::parse(&url.to_string()).unwrap(), url);
        assert_eq!(
            AgentUrl::parse("agent+https://h/C:/v/db.vhdx").unwrap().vm_name().as_deref(),
            Some("db")
        );
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, word) in [
            ("agent+https://host", "names no disk"),
            ("agent+https://host/", "names no disk"),
            ("agent+https:///x", "host"),
            ("agent+https://key@host/x", "VMTIDE_AGENT_KEY"),
            ("agent+https://host:x/y", "port"),
            ("agent+https://host/a?b=c", "disk=PATH"),
            ("agent+https://host/a?disk=/a", "twice"),
            ("agent+https://host/a%FF", "UTF-8"),
            ("agent+https://host/a#b", "%23"),
            ("https://host/a", "not an agent"),
        ] {
            let error = AgentUrl::parse(text).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn a_segment_keeps_nothing_that_a_url_would_take_apart() {
        assert_eq!(segment("C:\\a b/c?.vhdx"), "C%3A%5Ca%20b%2Fc%3F.vhdx");
    }
}
