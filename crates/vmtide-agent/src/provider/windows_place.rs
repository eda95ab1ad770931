//! The names by which an image knows its parent, as full paths.
//!
//! A VHDX names its parent three times (MS-VHDX 2.6.2.6): from its own directory, by its volume's id
//! (`\\?\Volume{…}\…`), and by a drive. The first becomes a full path as text. The second is looked up, on volumes of
//! this host alone: the file that it leads to has a path with a drive, by which it can be compared with the roots. Any
//! other name stays as it is, and is refused where it leads elsewhere.

use crate::roots::windows_names::without_verbatim;
use std::io::{self, ErrorKind};
use std::path::PathBuf;
#[cfg(windows)]
use std::path::{Component, Path, Prefix};

/// How the name of a file on a volume begins that is named by its id.
const VOLUME: &str = r"\\?\Volume{";

/// The full path of `name` in an image in `directory`; none where it names a file that is not there on a volume that is
/// named by its id, so that nobody will find it.
#[cfg(windows)]
pub(super) fn in_full(directory: &Path, name: &str) -> Option<PathBuf> {
    if is_on_volume(name) {
        return on_volume(name, std::fs::canonicalize(name), || {
            std::fs::symlink_metadata(name).map(drop)
        });
    }
    if let Some(plain) = without_namespace(name) {
        return Some(plain.into());
    }
    let path = Path::new(name);
    match path.components().next() {
        // Left as they are: nothing is asked of other machines or devices, and what begins in the current directory of
        // a drive would be looked for in one of this process.
        Some(Component::Prefix(prefix))
            if !matches!(prefix.kind(), Prefix::Disk(_)) || !path.has_root() =>
        {
            Some(path.to_path_buf())
        }
        // As text, without asking for any file.
        _ => std::path::absolute(directory.join(path)).ok(),
    }
}

/// The place of a file on a volume, by what the system found it to be, or else by what it answers to whether there is any.
/// None only where there is none: a file that is there and has no path with a drive, as on a volume without one, stays
/// named as it is, and is refused, for the platform may take it.
fn on_volume(
    name: &str,
    real: io::Result<PathBuf>,
    look: impl FnOnce() -> io::Result<()>,
) -> Option<PathBuf> {
    match real {
        Ok(real) => Some(without_verbatim(&real.to_string_lossy()).into()),
        Err(_) if look().is_err_and(|error| error.kind() == ErrorKind::NotFound) => None,
        Err(_) => Some(name.into()),
    }
}

/// What `\\?\E:\golden\base.vhdx` names, as MS-VHDX has the names of parents with a drive. Not made shorter: without the
/// prefix Windows would read `E:\golden.\base.vhdx` as another file, and such names are refused. A slash is no separator
/// there, and is in no name: one with it stays as it is.
fn without_namespace(name: &str) -> Option<&str> {
    let plain = name.strip_prefix(r"\\?\")?;
    let is_on_drive =
        matches!(plain.as_bytes(), [drive, b':', b'\\', ..] if drive.is_ascii_alphabetic());
    (is_on_drive && !plain.contains('/')).then_some(plain)
}

/// Whether a name begins as `\\?\Volume{12345678-1234-1234-1234-123456789abc}\`.
fn is_on_volume(name: &str) -> bool {
    let Some((start, rest)) = name.split_at_checked(VOLUME.len()) else { return false };
    let Some((id, rest)) = rest.split_once('}') else { return false };
    let is_id = id.len() == 36 && id.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    start.eq_ignore_ascii_case(VOLUME) && is_id && rest.starts_with('\\')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_drives_lose_the_prefix_of_their_namespace() {
        for (name, plain) in [
            (r"\\?\E:\golden\base.vhdx", Some(r"E:\golden\base.vhdx")),
            (r"\\?\d:\path2\sub3\parent.vhdx", Some(r"d:\path2\sub3\parent.vhdx")),
            (r"\\?\E:\golden.\..\base.vhdx ", Some(r"E:\golden.\..\base.vhdx ")),
            (r"\\?\E:\golden/base.vhdx", None),
            (r"\\?\E:base.vhdx", None),
            (r"\\?\E:", None),
            (r"\\?\UNC\203.0.113.5\s\p.vhdx", None),
            (r"\\?\Volume{x}\p.vhdx", None),
            (r"\\?\GLOBALROOT\Device\Harddisk0\DR0", None),
            (r"\\.\E:\golden\base.vhdx", None),
            (r"//?/E:/golden/base.vhdx", None),
            (r"E:\golden\base.vhdx", None),
        ] {
            assert_eq!(without_namespace(name), plain, "{name}");
        }
    }

    #[test]
    fn a_file_on_a_volume_vanishes_only_where_there_is_none() {
        let name = r"\\?\Volume{12345678-1234-1234-1234-123456789abc}\p.vhdx";
        assert!(is_on_volume(name));
        let error = |kind: ErrorKind| io::Error::from(kind);
        for (real, plain) in [
            (r"\\?\D:\vms\p.vhdx", r"D:\vms\p.vhdx"),
            (r"\\?\UNC\203.0.113.5\s\p.vhdx", r"\\203.0.113.5\s\p.vhdx"),
        ] {
            let place = on_volume(name, Ok(real.into()), || Err(error(ErrorKind::NotFound)));
            assert_eq!(place, Some(plain.into()));
        }
        // Windows has no name with a drive for it, and cannot find one.
        for kind in [ErrorKind::NotFound, ErrorKind::PermissionDenied, ErrorKind::Other] {
            let place = on_volume(name, Err(error(kind)), || Ok(()));
            assert_eq!(place, Some(name.into()), "{kind}");
            let place =
                on_volume(name, Err(error(kind)), || Err(error(ErrorKind::PermissionDenied)));
            assert_eq!(place, Some(name.into()), "{kind}");
            let place = on_volume(name, Err(error(kind)), || Err(error(ErrorKind::NotFound)));
            assert_eq!(place, None, "{kind}");
        }
    }

    #[cfg(windows)]
    #[test]
    fn names_become_full_paths_and_other_machines_stay_other_machines() {
        let directory = Path::new(r"D:\vms\web");
        for (name, expected) in [
            (r".\base.vhdx", r"D:\vms\web\base.vhdx"),
            (r"..\golden\base.vhdx", r"D:\vms\golden\base.vhdx"),
            (r"..\..\..\base.vhdx", r"D:\base.vhdx"),
            ("base.vhdx", r"D:\vms\web\base.vhdx"),
            (r"E:\golden\base.vhdx", r"E:\golden\base.vhdx"),
            (r"E:\golden\..\base.vhdx", r"E:\base.vhdx"),
            ("E:base.vhdx", "E:base.vhdx"),
            (r"\\?\E:\golden\base.vhdx", r"E:\golden\base.vhdx"),
            (r"\\?\E:\golden.\base.vhdx", r"E:\golden.\base.vhdx"),
            (r"\\203.0.113.5\s\p.vhdx", r"\\203.0.113.5\s\p.vhdx"),
            (r"\\.\PhysicalDrive0", r"\\.\PhysicalDrive0"),
            (r"\\?\UNC\203.0.113.5\s\p.vhdx", r"\\?\UNC\203.0.113.5\s\p.vhdx"),
            (r"\\?\Volume{x}\p.vhdx", r"\\?\Volume{x}\p.vhdx"),
        ] {
            assert_eq!(in_full(directory, name), Some(expected.into()), "{name}");
        }
        let nowhere = r"\\?\Volume{00000000-0000-0000-0000-000000000000}\p.vhdx";
        assert_eq!(in_full(directory, nowhere), None);
    }
}
