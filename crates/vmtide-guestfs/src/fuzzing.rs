//! What the fuzz target calls. The tests run it over seeds and mutations of them.

use vmtide_block::{BlockDevice, ByteRange, CancelToken, MemoryDevice, RangeSet};

/// The length of the disk that the input is put on, in bytes.
pub const DISK_BYTES: usize = 2 << 20;

/// The length of a sector, in bytes. Before each in the input is its number, in two bytes: a small file system is a
/// megabyte, nearly all of it zeros.
pub const SECTOR_BYTES: usize = 512;

/// Looks for files in hostile bytes: ends, and finds nothing outside of what was asked for. Answers with how many it found.
///
/// # Panics
/// Where it does not.
pub fn file_system(input: &[u8]) -> usize {
    let mut disk = vec![0; DISK_BYTES];
    for entry in input.chunks_exact(2 + SECTOR_BYTES) {
        let (number, sector) = entry.split_at(2);
        let number = usize::from(u16::from_le_bytes([number[0], number[1]]));
        let at = number % (DISK_BYTES / SECTOR_BYTES) * SECTOR_BYTES;
        disk[at..at + SECTOR_BYTES].copy_from_slice(sector);
    }
    let device = MemoryDevice::from_bytes(disk);
    let whole = ByteRange::new(0, device.size_bytes());
    let asked = RangeSet::from(vec![ByteRange::new(4096, whole.length / 2)]);
    let found = crate::files_at(&device, whole, &asked, &CancelToken::new());
    assert!(found.is_ok(), "memory was read wrong: {found:?}");
    let files: Vec<_> = found.into_iter().flatten().flat_map(|found| found.files).collect();
    for file in &files {
        assert!(!file.ranges.is_empty() && file.ranges.subtract(&asked).is_empty(), "{file:?}");
        assert!(!file.path.chars().any(char::is_control), "{file:?}");
    }
    files.len()
}
