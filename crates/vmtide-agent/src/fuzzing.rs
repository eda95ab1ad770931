//! Entry points of the fuzz targets: the parsers of what clients send before anything is known of them, and of the
//! file of keys.

use crate::auth::keys;
use crate::contract;
use crate::roots::{unix_names, windows_names};

/// The path of a request with its query, and the name of a disk.
///
/// # Panics
/// Where what was found good is not found good again: a path that was made plain must stay as it is.
pub fn agent_request(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let (path, query) = text.split_once('?').unwrap_or((text, ""));
    let disk = contract::parse_for_fuzzing(path, query);
    for name in [Some(text), disk.as_deref()].into_iter().flatten() {
        if let Ok(plain) = windows_names::check(name) {
            assert_eq!(windows_names::check(&plain).as_deref(), Ok(plain.as_str()), "{name:?}");
            assert!(!plain.split('\\').any(|part| part == ".."), "{name:?}");
        }
        if let Ok(plain) = unix_names::check(name) {
            assert_eq!(unix_names::check(&plain).as_deref(), Ok(plain.as_str()), "{name:?}");
            assert!(!plain.split('/').any(|part| part == ".."), "{name:?}");
        }
    }
}

/// A file of keys.
pub fn agent_keys(input: &[u8]) {
    if let Ok(text) = std::str::from_utf8(input)
        && let Ok(set) = keys::parse(text)
    {
        // An empty key must never be good.
        assert!(set.find(b"").is_none());
    }
}
