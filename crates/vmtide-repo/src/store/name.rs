//! What a name in a store may look like.
//!
//! Names come from listings and from objects that somebody else may have written, and become paths
//! of a file system: so a name is a few short components of plain characters, and nothing that a
//! file system would take for more than a name.

use crate::{RepoError, Result};

/// The longest name. `packs/XX/ID` has 41 bytes; file systems stop at 255 per component.
const MAX_BYTES: usize = 200;

/// The deepest name, in components. `packs/XX/ID` has three.
pub(super) const MAX_DEPTH: usize = 4;

/// First components that stores keep for themselves.
const RESERVED: [&str; 1] = ["tmp"];

/// Whether one component is letters, digits, `-`, `_` and `.` and does not begin with a dot.
pub(super) fn is_component(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with('.')
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
}

/// Whether this may name an object.
pub fn is_object(name: &str) -> bool {
    name.len() <= MAX_BYTES
        && name.split('/').count() <= MAX_DEPTH
        && name.split('/').all(is_component)
        && !name.split('/').next().is_some_and(|first| RESERVED.contains(&first))
}

/// Checks the name of an object.
///
/// # Errors
/// [`RepoError::Invalid`] where it has an empty component, one that begins with a dot, a character
/// that is not plain, or begins with a directory of the store's own.
pub fn check_object(name: &str) -> Result<()> {
    if is_object(name) {
        return Ok(());
    }
    Err(RepoError::Invalid(format!("{name:?} cannot be the name of an object")))
}

/// Checks the prefix of a listing, and answers with it without its slash.
///
/// # Errors
/// [`RepoError::Invalid`] where it does not end in `/` or is no name before that.
pub fn check_prefix(prefix: &str) -> Result<&str> {
    match prefix.strip_suffix('/') {
        Some(directory) if is_object(directory) => Ok(directory),
        _ => Err(RepoError::Invalid(format!("{prefix:?} cannot be the prefix of a listing"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_leave_the_directory_are_refused() {
        for name in [
            "",
            "/",
            "..",
            ".",
            "../x",
            "a/../b",
            "a//b",
            "/etc/passwd",
            "a/",
            ".hidden",
            "a/.b",
            "a\\b",
            "a b",
            "a\0b",
            "ü",
            "tmp/x",
            "tmp",
            "a/b/c/d/e",
        ] {
            assert!(check_object(name).is_err(), "{name:?}");
        }
        assert!(check_object(&"a".repeat(MAX_BYTES + 1)).is_err());
        for name in ["vmtide.repo", "keys/00ff", "packs/ab/abcd", "a.b-c_d"] {
            assert!(check_object(name).is_ok(), "{name:?}");
        }
    }

    #[test]
    fn prefixes_end_in_a_slash() {
        assert_eq!(check_prefix("packs/").unwrap(), "packs");
        assert_eq!(check_prefix("packs/ab/").unwrap(), "packs/ab");
        for prefix in ["", "/", "packs", "../", "packs//", "tmp/"] {
            assert!(check_prefix(prefix).is_err(), "{prefix:?}");
        }
    }
}
