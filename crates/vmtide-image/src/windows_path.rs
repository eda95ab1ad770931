//! Paths as Windows writes them, told by their text alone, so that it is the same on every system.
//!
//! Sources: "Naming Files, Paths, and Namespaces" and "File path formats on Windows systems"
//! (learn.microsoft.com).

use crate::ParentLink;
use crate::elsewhere::is_device;

/// The longest path that Windows has, in UTF-16 units.
const MAX_PATH_UNITS: usize = 32_767;

/// The full path `text` with one spelling: backslashes, no `\\?\`, neither `.` nor `..`. None where it is no full
/// path of a file (relative, a device, a stream, a volume by its GUID) or leaves its drive or share.
pub fn windows_path(text: &str) -> Option<String> {
    let (root, rest) = split_root(text)?;
    join(&root, &[], &rest)
}

/// Where the parent that `link` in the image at `child` means may be, the likeliest first: by each of its names, as
/// far as that stays on the drive or share of the child, and beside the child. What leads to another machine, a
/// device or a stream is left out, because the image's author chose the names.
pub fn windows_parents(child: &str, link: &ParentLink) -> Vec<String> {
    let Some((root, rest)) = split_root(child) else { return Vec::new() };
    let mut directory = parts(&rest);
    directory.pop();
    let mut found: Vec<String> = Vec::new();
    let mut add = |path: Option<String>| {
        let is_same = |known: &String, path: &str| known.eq_ignore_ascii_case(path);
        if let Some(path) = path
            && !found.iter().any(|known| is_same(known, &path))
            && !windows_path(child).is_some_and(|child| is_same(&child, &path))
        {
            found.push(path);
        }
    };
    for name in &link.names {
        let plain = name.replace('/', "\\");
        add(match split_root(&plain) {
            Some((its, rest)) if its.eq_ignore_ascii_case(&root) => join(&root, &[], &rest),
            Some(_) => None,
            // Another form of a path with a root, among them `C:name` and `\\?\Volume{…}`.
            None if plain.starts_with(r"\\") || plain.contains(':') => None,
            None => match plain.strip_prefix('\\') {
                Some(rest) => join(&root, &[], rest),
                None => join(&root, &directory, &plain),
            },
        });
    }
    for name in &link.names {
        let base = name.rsplit(['/', '\\']).next().unwrap_or_default();
        add(join(&root, &directory, base));
    }
    found
}

/// `C:` or `\\server\share`, and the rest behind its backslash.
fn split_root(text: &str) -> Option<(String, String)> {
    let mut text = text.replace('/', "\\");
    if let Some(rest) = text.strip_prefix(r"\\?\") {
        if rest.starts_with('\\') {
            return None;
        }
        text = match (rest.get(..4), rest.get(4..)) {
            (Some(unc), Some(rest)) if unc.eq_ignore_ascii_case(r"UNC\") => format!(r"\\{rest}"),
            _ => rest.to_owned(),
        };
    }
    if let Some(rest) = text.strip_prefix(r"\\") {
        let mut pieces = rest.splitn(3, '\\');
        let (server, share) = (pieces.next()?, pieces.next()?);
        if !is_name(server) || !is_name(share) || matches!(server, "." | "..") {
            return None;
        }
        let rest = pieces.next().unwrap_or_default();
        return Some((format!(r"\\{server}\{share}"), rest.to_owned()));
    }
    match text.as_bytes() {
        [letter, b':', b'\\', ..] if letter.is_ascii_alphabetic() => {
            Some((text[..2].to_owned(), text[3..].to_owned()))
        }
        _ => None,
    }
}

fn parts(text: &str) -> Vec<&str> {
    text.split('\\').filter(|part| !part.is_empty()).collect()
}

/// `rest` from `directory` below `root`; none where that leaves the root, or names no file.
fn join(root: &str, directory: &[&str], rest: &str) -> Option<String> {
    let mut path = directory.to_vec();
    let rest = rest.replace('/', "\\");
    for part in parts(&rest) {
        match part {
            "." => {}
            ".." => {
                path.pop()?;
            }
            part => path.push(part),
        }
    }
    if path.is_empty() || !path.iter().all(|part| is_name(part)) {
        return None;
    }
    let path = format!(r"{root}\{}", path.join("\\"));
    (path.encode_utf16().count() <= MAX_PATH_UNITS).then_some(path)
}

/// Whether this may be the name of a file or directory.
fn is_name(part: &str) -> bool {
    let is_odd = |c: char| c.is_control() || r#"<>:"|?*/\"#.contains(c);
    !part.is_empty()
        && !part.chars().any(is_odd)
        // Windows takes these off, so that two names would be one file.
        && (matches!(part, "." | "..") || !part.ends_with(['.', ' ']))
        && !is_device(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_paths_have_one_spelling() {
        for (text, path) in [
            (r"C:\VMs\web.vhdx", r"C:\VMs\web.vhdx"),
            ("c:/VMs//x/../web.vhdx", r"c:\VMs\web.vhdx"),
            (r"\\?\C:\VMs\.\web.vhdx", r"C:\VMs\web.vhdx"),
            (r"\\files\vms\web\web.vhdx", r"\\files\vms\web\web.vhdx"),
            (r"\\?\UNC\files\vms\web.vhdx", r"\\files\vms\web.vhdx"),
            (r"C:\ClusterStorage\Volume1\größe.vhdx", r"C:\ClusterStorage\Volume1\größe.vhdx"),
        ] {
            assert_eq!(windows_path(text).as_deref(), Some(path), "{text}");
        }
        for text in [
            "",
            "web.vhdx",
            "C:web.vhdx",
            r"C:\",
            r"C:\..\x.vhdx",
            r"C:\a\..\..\x.vhdx",
            r"C:\a.vhdx:stream",
            r"C:\NUL",
            r"C:\a\com1.vhdx",
            "C:\\a\0b",
            r"C:\a.",
            r"\\.\PhysicalDrive0",
            r"\\?\Volume{5c39b92d-1d5a-4cc6-a8c5-3d9a7c1f9b10}\x.vhdx",
            r"\\?\GLOBALROOT\Device\x",
            r"\\?\\\server\share\x",
            r"\\server",
            r"\\server\share",
            r"\\server\share\..\x",
            r"\\\share\x",
            r"\??\C:\x",
            "/etc/passwd",
        ] {
            assert_eq!(windows_path(text), None, "{text}");
        }
    }

    #[test]
    fn parents_stay_on_their_drive_or_share() {
        let link = |names: &[&str]| ParentLink {
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            ..ParentLink::default()
        };
        let names = [
            r"..\base\web.vhdx",
            r"\\?\Volume{5c39b92d-1d5a-4cc6-a8c5-3d9a7c1f9b10}\base\web.vhdx",
            r"c:\Base\WEB.vhdx",
            r"D:\other\web.vhdx",
            r"\\evil\share\web.vhdx",
            r"..\..\..\web.vhdx",
            "C:web.vhdx",
            r"\root\web.vhdx",
        ];
        let found = windows_parents(r"C:\VMs\snap\web_1.avhdx", &link(&names));
        let wanted = [
            r"C:\VMs\base\web.vhdx",
            r"C:\Base\WEB.vhdx",
            r"C:\root\web.vhdx",
            r"C:\VMs\snap\web.vhdx",
        ];
        assert_eq!(found, wanted);
        let found = windows_parents(
            r"\\files\vms\a\x.avhdx",
            &link(&[r"\\FILES\vms\b\y.vhdx", r"\\files\other\y.vhdx", r"C:\y.vhdx", r".\x.avhdx"]),
        );
        assert_eq!(found, [r"\\files\vms\b\y.vhdx", r"\\files\vms\a\y.vhdx"]);
        assert!(windows_parents("relative.avhdx", &link(&[r"C:\x"])).is_empty());
    }
}
