//! What the fuzz targets call; see `fuzz/README.md`.

use crate::config::{decode, read_settings, settings_file};
use vmtide_hypervisor::NativeFile;

/// Reads bytes as the document of all settings of a VM. What can be read is written and read as the same
/// again. Reads them as a packed configuration file too.
///
/// # Panics
/// Where it is not: that is what is looked for.
#[doc(hidden)]
#[allow(clippy::panic, reason = "a fuzz target reports what it finds by a panic")]
pub fn settings(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    // Limits are looked at, and nothing else.
    let _ = decode(&NativeFile { name: "a.vmcx.gz.base64".into(), content: text.into() });
    let Ok((system, resources)) = read_settings(text) else {
        return;
    };
    // Properties with wrong types are given the right ones: once.
    let Ok(first) = settings_file(&system, &resources) else {
        return;
    };
    let again = read_settings(&first.content)
        .and_then(|(system, resources)| settings_file(&system, &resources));
    match again {
        Ok(second) if second == first => {}
        other => panic!("{} was read and written as {other:?}", first.content),
    }
}
