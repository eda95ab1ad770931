//! Integer fields out of and into byte slices, without panics.

/// The big-endian `u16` at `at`; zero where the slice ends before (callers check lengths first).
pub(crate) fn be_u16(bytes: &[u8], at: usize) -> u16 {
    field(bytes, at).map_or(0, u16::from_be_bytes)
}

/// The big-endian `u32` at `at`; zero where the slice ends before.
pub(crate) fn be_u32(bytes: &[u8], at: usize) -> u32 {
    field(bytes, at).map_or(0, u32::from_be_bytes)
}

/// The big-endian `u64` at `at`; zero where the slice ends before.
pub(crate) fn be_u64(bytes: &[u8], at: usize) -> u64 {
    field(bytes, at).map_or(0, u64::from_be_bytes)
}

/// The little-endian `u16` at `at`; zero where the slice ends before.
pub(crate) fn le_u16(bytes: &[u8], at: usize) -> u16 {
    field(bytes, at).map_or(0, u16::from_le_bytes)
}

/// The little-endian `u32` at `at`; zero where the slice ends before.
pub(crate) fn le_u32(bytes: &[u8], at: usize) -> u32 {
    field(bytes, at).map_or(0, u32::from_le_bytes)
}

/// The little-endian `u64` at `at`; zero where the slice ends before.
pub(crate) fn le_u64(bytes: &[u8], at: usize) -> u64 {
    field(bytes, at).map_or(0, u64::from_le_bytes)
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// Copies `value` to `at`; callers size the buffer.
pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(target) = bytes.get_mut(at..at.saturating_add(value.len())) {
        target.copy_from_slice(value);
    }
}

/// The table of big-endian `u64` entries in `bytes`.
pub(crate) fn decode_table(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|entry| be_u64(entry, 0)).collect()
}

/// The bytes of a table of big-endian `u64` entries.
pub(crate) fn encode_table(entries: &[u64]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(entries.len() * 8);
    for entry in entries {
        bytes.extend_from_slice(&entry.to_be_bytes());
    }
    bytes
}

/// A length that is bounded by a buffer or a table limit as a `usize`. Saturates where a `usize`
/// is too small, so a broken bound ends in a failed slice check and not in a short copy.
pub(crate) fn length(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
