//! Reading the path of a request of the contract.
//!
//! A client puts the disk into the path as it is and leaves the escaping to its library: `C:\VHDS\a.vhdx` arrives
//! as `C:%5CVHDS%5Ca.vhdx`, `/srv/a.vhdx` with real slashes or as `%2Fsrv%2Fa.vhdx`, and whatever is between may
//! have taken one of two slashes that follow each other. So the path is read from its end, where the verb is, and
//! what is left is the disk. It is decoded once.

use percent_encoding::percent_decode_str;

/// What is asked of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// What it is.
    Info,
    /// Its change tracking.
    Tracking,
    /// What changed.
    Changes {
        /// Since when.
        id: String,
    },
    /// Its bytes.
    Content,
}

/// A disk, and what is asked of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// As the client wrote it, decoded.
    pub disk: String,
    /// What is asked.
    pub action: Action,
}

/// Reads the path of a request, as it was sent. None for what is no path of the contract, or no UTF-8 decoded.
pub fn parse(path: &str) -> Option<Target> {
    let rest = path.strip_prefix("/vdisk/")?.trim_end_matches('/');
    let (disk, verb) = rest.rsplit_once('/')?;
    let (disk, action) = match verb {
        "info" => (disk, Action::Info),
        "rct" => (disk, Action::Tracking),
        "content" => (disk, Action::Content),
        "changes" => {
            let (before, id) = disk.trim_end_matches('/').rsplit_once('/')?;
            let disk = before.trim_end_matches('/').strip_suffix("/rct")?;
            (disk, Action::Changes { id: decode(id)? })
        }
        _ => return None,
    };
    // A slash too many before the verb is none of the disk's.
    let disk = decode(disk.trim_end_matches('/'))?;
    if disk.is_empty() { None } else { Some(Target { disk, action }) }
}

fn decode(text: &str) -> Option<String> {
    percent_decode_str(text).decode_utf8().ok().map(String::from)
}

/// The first value of this name in a query, decoded.
pub fn query_value(query: &str, name: &str) -> Option<String> {
    query.split('&').find_map(|pair| {
        let (found, value) = pair.split_once('=').unwrap_or((pair, ""));
        if decode(found)? == name { decode(value) } else { None }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: &str) -> Option<(String, Action)> {
        parse(path).map(|target| (target.disk, target.action))
    }

    #[test]
    fn disks_are_read_however_they_are_escaped() {
        for (path, disk) in [
            ("/vdisk/C:%5CVHDS%5Ca.vhdx/info", "C:\\VHDS\\a.vhdx"),
            ("/vdisk/C:\\VHDS\\a.vhdx/info", "C:\\VHDS\\a.vhdx"),
            ("/vdisk/C%3A%5CVHDS%5Ca%20b.vhdx/info", "C:\\VHDS\\a b.vhdx"),
            ("/vdisk/C:/VHDS/a.vhdx/info", "C:/VHDS/a.vhdx"),
            ("/vdisk//srv/a.vhdx/info", "/srv/a.vhdx"),
            ("/vdisk/srv/a.vhdx/info", "srv/a.vhdx"),
            ("/vdisk/%2Fsrv%2Fa.vhdx/info", "/srv/a.vhdx"),
            ("/vdisk/%2fsrv/a.vhdx//info/", "/srv/a.vhdx"),
            ("/vdisk//srv/%C3%A4%252e.vhdx/info", "/srv/ä%2e.vhdx"),
            ("/vdisk//srv/info/rct/content/info", "/srv/info/rct/content"),
        ] {
            assert_eq!(read(path), Some((disk.to_owned(), Action::Info)), "{path}");
        }
    }

    #[test]
    fn verbs_are_read_from_the_end() {
        let changes = |id: &str| Action::Changes { id: id.into() };
        for (path, disk, action) in [
            ("/vdisk/a/rct", "a", Action::Tracking),
            ("/vdisk/a/content", "a", Action::Content),
            ("/vdisk/a/rct/rctX:5b:00000001/changes", "a", changes("rctX:5b:00000001")),
            ("/vdisk/a/rct/x%2Fy/changes", "a", changes("x/y")),
            ("/vdisk//srv/rct/x/changes/rct/y/changes", "/srv/rct/x/changes", changes("y")),
            ("/vdisk/a/rct/rct/changes", "a", changes("rct")),
        ] {
            assert_eq!(read(path), Some((disk.to_owned(), action)), "{path}");
        }
    }

    #[test]
    fn everything_else_is_no_path_of_the_contract() {
        for path in [
            "",
            "/",
            "/vdisk",
            "/vdisk/",
            "/vdisk/info",
            "/vdisk//info",
            "/vdisk/a",
            "/vdisk/a/inf",
            "/vdisk/a/INFO",
            "/vdisk/a/changes",
            "/vdisk/a/rct/changes",
            "/vdisk/a/x/y/changes",
            "/vdisk/rct/x/changes",
            "/vdisk/%ff/info",
            "/vdisk/a%c0%af/info",
            "/vdisks/a/info",
            "/vdisk/a/rct/%ff/changes",
            "/VDISK/a/info",
            "/vdisk/a/info/x",
        ] {
            assert_eq!(read(path), None, "{path}");
        }
    }

    #[test]
    fn queries_give_their_first_value() {
        assert_eq!(query_value("enabled=true&enabled=false", "enabled").as_deref(), Some("true"));
        assert_eq!(query_value("x=1&ranges=0%3A512%2C1:2", "ranges").as_deref(), Some("0:512,1:2"));
        assert_eq!(query_value("ranges", "ranges").as_deref(), Some(""));
        assert_eq!(query_value("", "ranges"), None);
        assert_eq!(query_value("ranges=%ff", "ranges"), None);
    }
}
