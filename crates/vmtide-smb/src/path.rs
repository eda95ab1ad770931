//! Where a file that the host names is on the network.
//!
//! `C:\VMs\web.vhdx` is `\\host\C$\VMs\web.vhdx`; a cluster's volumes (`C:\ClusterStorage\Volume1\…`) are so, too.
//! `\\files\vms\web.vhdx` is on another server. Some names come from disk images, whose authors may be anybody, and
//! a login at a server of theirs would give them what they need to guess the password: so other servers are asked only
//! where the user has named them.

use crate::error::{Result, SmbError};
use vmtide_image::windows_path;

/// A file on a share.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SharePath {
    /// The server's name or address.
    pub server: String,
    /// The share.
    pub share: String,
    /// The path on it, with backslashes; empty for the share itself.
    pub path: String,
}

impl std::fmt::Display for SharePath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, r"\\{}\{}\{}", self.server, self.share, self.path)
    }
}

/// A part of the host's files that is under another share than usual.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// As the host names it: `D:`, `C:\VMs`, `\\files\vms`.
    pub host_path: String,
    /// Where that is: `\\server\share` or `\\server\share\directory`.
    pub share_path: String,
}

impl std::str::FromStr for Mapping {
    type Err = SmbError;

    /// `D:\VMs=\\host\vms`.
    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            SmbError::unsupported(format!(
                r"{text:?} is no mapping: write HOSTPATH=\\SERVER\SHARE, e.g. D:\VMs=\\hv1\vms"
            ))
        };
        let (host_path, share_path) = text.split_once('=').ok_or_else(wrong)?;
        let is_path =
            |path: &str| windows_path(&format!(r"{}\x", path.trim_end_matches('\\'))).is_some();
        if !is_path(host_path) || !is_path(share_path) || !share_path.starts_with(r"\\") {
            return Err(wrong());
        }
        let plain = |path: &str| path.trim_end_matches('\\').to_owned();
        Ok(Self { host_path: plain(host_path), share_path: plain(share_path) })
    }
}

/// Finds files of one host.
#[derive(Clone, Debug)]
pub struct PathMap {
    /// The host's name or address.
    pub host: String,
    /// Parts that are elsewhere; the first that fits counts.
    pub mappings: Vec<Mapping>,
    /// Other servers that may be asked, e.g. a cluster's file server on which its VMs lie.
    pub servers: Vec<String>,
}

impl PathMap {
    /// The usual places of a host.
    pub fn new(host: &str) -> Self {
        Self { host: host.to_owned(), mappings: Vec::new(), servers: Vec::new() }
    }

    /// Where `path` is. A drive's own directory, `C:\`, is a path, too.
    ///
    /// # Errors
    /// [`SmbError::Unsupported`] for what is no full path of Windows, and for servers that were not named.
    pub fn locate(&self, path: &str) -> Result<SharePath> {
        // A root by itself is told by a name below it.
        let below = windows_path(path).or_else(|| {
            let below = windows_path(&format!(r"{}\x", path.trim_end_matches(['\\', '/'])))?;
            below.strip_suffix(r"\x").map(ToOwned::to_owned)
        });
        let Some(path) = below else {
            return Err(SmbError::unsupported(format!(
                "{path:?} is no full path of a file on a Windows host"
            )));
        };
        for mapping in &self.mappings {
            if let Some(rest) = inside(&path, &mapping.host_path) {
                let unc = format!("{}{rest}", mapping.share_path);
                return split(&unc)
                    .ok_or_else(|| SmbError::unsupported(format!("{unc:?} is no share")));
            }
        }
        if let Some(found) = split(&path) {
            let may_be = std::iter::once(&self.host).chain(&self.servers);
            if may_be.into_iter().any(|server| server.eq_ignore_ascii_case(&found.server)) {
                return Ok(found);
            }
            return Err(SmbError::unsupported(format!(
                "{found} is on another server than {}, which is asked only where it is named (--smb-server {})",
                self.host, found.server
            )));
        }
        let mut characters = path.chars();
        let drive = characters.next().unwrap_or('C').to_ascii_uppercase();
        let rest = path.get(2..).unwrap_or_default().trim_start_matches('\\');
        Ok(SharePath {
            server: self.host.clone(),
            share: format!("{drive}$"),
            path: rest.to_owned(),
        })
    }
}

/// What is behind `directory` in `path`, with its backslash; empty where they are the same.
fn inside<'a>(path: &'a str, directory: &str) -> Option<&'a str> {
    let head = path.get(..directory.len())?;
    let rest = path.get(directory.len()..)?;
    let is_inside =
        head.eq_ignore_ascii_case(directory) && (rest.is_empty() || rest.starts_with('\\'));
    is_inside.then_some(rest)
}

/// `\\server\share\path` in its parts.
fn split(unc: &str) -> Option<SharePath> {
    let mut parts = unc.strip_prefix(r"\\")?.splitn(3, '\\');
    let (server, share) = (parts.next()?, parts.next()?);
    if server.is_empty() || share.is_empty() {
        return None;
    }
    let path = parts.next().unwrap_or_default();
    Some(SharePath { server: server.into(), share: share.into(), path: path.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_host_are_on_its_shares() {
        let mut map = PathMap::new("hv1.lab");
        map.mappings.push(r"D:\VMs=\\hv1.lab\vms\d".parse().unwrap());
        map.mappings.push(r"\\sofs\a=\\10.0.0.7\b".parse().unwrap());
        map.servers.push("files".into());
        for (path, found) in [
            (r"C:\VMs\web.vhdx", r"\\hv1.lab\C$\VMs\web.vhdx"),
            (r"c:\ClusterStorage\Volume1\w.vhdx", r"\\hv1.lab\C$\ClusterStorage\Volume1\w.vhdx"),
            (r"\\?\E:\x.vhdx", r"\\hv1.lab\E$\x.vhdx"),
            (r"C:\", r"\\hv1.lab\C$\"),
            ("C:", r"\\hv1.lab\C$\"),
            (r"d:\vms\web\w.vhdx", r"\\hv1.lab\vms\d\web\w.vhdx"),
            (r"D:\VMs", r"\\hv1.lab\vms\d"),
            (r"D:\VMs2\w.vhdx", r"\\hv1.lab\D$\VMs2\w.vhdx"),
            (r"\\HV1.LAB\vms\w.vhdx", r"\\HV1.LAB\vms\w.vhdx"),
            (r"\\FILES\vms\w.vhdx", r"\\FILES\vms\w.vhdx"),
            (r"\\files\vms", r"\\files\vms\"),
            (r"\\sofs\a\w.vhdx", r"\\10.0.0.7\b\w.vhdx"),
        ] {
            assert_eq!(map.locate(path).unwrap().to_string(), found, "{path}");
        }
    }

    #[test]
    fn no_name_leads_to_a_server_that_was_not_named() {
        let map = PathMap::new("hv1");
        let error = map.locate(r"\\evil\share\x.vhdx").unwrap_err();
        assert!(error.to_string().contains("--smb-server evil"), "{error}");
        for path in ["", "x.vhdx", r"\x", "C:x", r"\\.\pipe\x", r"C:\..\x", r"C:\a:b", r"\\evil"] {
            assert!(map.locate(path).is_err(), "{path}");
        }
        for text in ["", "D:", r"D:\VMs=C:\x", r"D=\\a\b", r"D:\VMs=\\a", r"x=\\a\b"] {
            assert!(text.parse::<Mapping>().is_err(), "{text}");
        }
    }
}
