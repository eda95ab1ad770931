//! Entry for fuzzing: not for use.

use vmtide_block::{BlockDevice, ByteRange, CancelToken, MemoryDevice, RangeSet};

/// Looks for files in hostile bytes: ends, and finds nothing outside of what was asked for.
///
/// # Panics
/// Where it does not.
pub fn file_system(input: &[u8]) {
    let device = MemoryDevice::from_bytes(input.to_vec());
    let whole = ByteRange::new(0, device.size_bytes());
    let asked = RangeSet::from(vec![ByteRange::new(whole.length / 4, whole.length / 2)]);
    let found = crate::files_at(&device, whole, &asked, &CancelToken::new());
    let Ok(found) = found else { panic!("memory was read wrong: {found:?}") };
    for file in found.into_iter().flat_map(|found| found.files) {
        assert!(!file.ranges.is_empty() && file.ranges.subtract(&asked).is_empty(), "{file:?}");
        assert!(!file.path.chars().any(char::is_control), "{file:?}");
    }
}
