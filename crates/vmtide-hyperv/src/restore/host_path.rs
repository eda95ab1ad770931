//! Paths as the host writes them, whatever machine this runs on.

/// `directory\name`.
pub(super) fn join(directory: &str, name: &str) -> String {
    let directory = directory.trim_end_matches(['\\', '/']);
    format!(r"{directory}\{name}")
}

/// The last part of a path; both separators count, for paths of other platforms.
pub(super) fn file_name_of(path: &str) -> &str {
    path.rsplit(['\\', '/']).next().unwrap_or(path)
}

/// The directory of a path; empty where it has none.
pub(super) fn directory_of(path: &str) -> &str {
    path.rfind(['\\', '/']).map_or("", |at| &path[..at])
}

/// The extension of a file name, without its dot; empty where it has none.
pub(super) fn extension_of(name: &str) -> &str {
    name.rfind('.').map_or("", |at| &name[at + 1..])
}

/// A file name without its extension.
pub(super) fn stem_of(name: &str) -> &str {
    name.rfind('.').map_or(name, |at| &name[..at])
}

/// Whether a user's path is one that a host can have: absolute, on a drive or a share.
pub(super) fn is_absolute(path: &str) -> bool {
    let bytes = path.as_bytes();
    let is_drive =
        matches!(bytes, [letter, b':', b'\\' | b'/', ..] if letter.is_ascii_alphabetic());
    let is_share = path.strip_prefix(r"\\").is_some_and(|rest| {
        // Not `\\?\` and `\\.\`, which lead to devices.
        !rest.starts_with(['?', '.', '\\']) && rest.contains('\\')
    });
    let climbs = path.split(['\\', '/']).any(|part| part == "..");
    (is_drive || is_share) && !climbs
}

/// The same path, as far as its text tells.
pub(super) fn same(one: &str, other: &str) -> bool {
    let plain = |path: &str| path.replace('/', r"\").trim_end_matches('\\').to_lowercase();
    plain(one) == plain(other)
}

/// Whether `path` is `directory` or lies below it.
pub(super) fn is_within(path: &str, directory: &str) -> bool {
    let plain = |path: &str| path.replace('/', r"\").trim_end_matches('\\').to_lowercase();
    let (path, directory) = (plain(path), plain(directory));
    path.strip_prefix(&directory).is_some_and(|rest| rest.is_empty() || rest.starts_with('\\'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_come_apart_and_together() {
        assert_eq!(join(r"C:\", "x"), r"C:\x");
        assert_eq!(join(r"C:\a\", "x"), r"C:\a\x");
        assert_eq!(file_name_of(r"C:\a\b.vhdx"), "b.vhdx");
        assert_eq!(directory_of(r"C:\a\b.vhdx"), r"C:\a");
        assert_eq!((stem_of("a.b.c"), extension_of("a.b.c")), ("a.b", "c"));
        assert_eq!((stem_of("a"), extension_of("a")), ("a", ""));
        assert!(same(r"C:\A\b", "c:/a/B/"));
        assert!(is_within(r"C:\A\b", "c:/a") && is_within(r"C:\a", r"C:\a\"));
        assert!(!is_within(r"C:\ab", r"C:\a"));
    }

    #[test]
    fn only_places_of_a_host_are_taken() {
        for path in [r"C:\VMs", "d:/vms", r"\\files\vms", r"C:\ClusterStorage\Volume1"] {
            assert!(is_absolute(path), "{path}");
        }
        for path in
            ["VMs", r"\VMs", "C:", "C:VMs", r"\\?\C:\x", r"\\.\pipe\x", r"\\x", r"C:\a\..\b", "/x"]
        {
            assert!(!is_absolute(path), "{path}");
        }
    }
}
