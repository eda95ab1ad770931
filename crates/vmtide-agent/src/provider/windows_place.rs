//! The names by which an image knows its parent, as full paths.
//!
//! A VHDX names its parent three times (MS-VHDX 2.6.2.6): from its own directory, by its volume's id
//! (`\\?\Volume{…}\…`), and by a drive. The first becomes a full path as text. The second is looked up, on volumes of
//! this host alone: the file that it leads to has a path with a drive, by which it can be compared with the roots. Any
//! other name stays as it is, and is refused where it leads elsewhere.

use std::path::{Component, Path, PathBuf, Prefix};

/// How the name of a file on a volume begins that is named by its id.
const VOLUME: &str = r"\\?\Volume{";

/// The full path of `name` in an image in `directory`; none where it names a file that is not there on a volume that is
/// named by its id, so that nobody will find it.
pub(super) fn in_full(directory: &Path, name: &str) -> Option<PathBuf> {
    if is_on_volume(name) {
        let real = std::fs::canonicalize(name).ok()?;
        let text = real.to_string_lossy();
        return Some(text.strip_prefix(r"\\?\").unwrap_or(&text).into());
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
