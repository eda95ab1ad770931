//! Names of files as Unix has them, checked as text.

/// The longest path in bytes; the kernel's own limit.
const MAX_PATH_BYTES: usize = 4096;

/// Checks the text that a client sent as a path. HTTP libraries and proxies take a slash too many, so one at the
/// beginning may be missing: all paths are absolute.
///
/// # Errors
/// Why it is no path that is served.
pub fn check(requested: &str) -> Result<String, &'static str> {
    if requested.len() > MAX_PATH_BYTES {
        return Err("is longer than a path can be");
    }
    if requested.chars().any(char::is_control) {
        return Err("has control characters");
    }
    if requested.ends_with('/') {
        return Err("ends with a slash: it names no file");
    }
    let mut path = String::with_capacity(requested.len() + 1);
    for part in requested.split('/').filter(|part| !part.is_empty()) {
        if part == "." || part == ".." {
            return Err("has a part . or ..");
        }
        path.push('/');
        path.push_str(part);
    }
    if path.is_empty() {
        return Err("is empty");
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slashes_are_made_right_and_nothing_else() {
        for (text, path) in [
            ("/srv/a.vhdx", "/srv/a.vhdx"),
            ("srv/a.vhdx", "/srv/a.vhdx"),
            ("//srv///a.vhdx", "/srv/a.vhdx"),
            ("/srv/...", "/srv/..."),
            ("/srv/a b%20c:\\", "/srv/a b%20c:\\"),
        ] {
            assert_eq!(check(text).as_deref(), Ok(path), "{text}");
        }
        for text in
            ["", "/", "//", "/srv/", "/srv/../etc", "..", "/srv/.", "/a\0", "/a\n", "/a\x7f"]
        {
            assert!(check(text).is_err(), "{text:?}");
        }
        assert!(check(&"/a".repeat(3000)).is_err());
    }
}
