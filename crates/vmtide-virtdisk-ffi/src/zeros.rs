//! Making a range zero without taking space for it.
//!
//! The interface has no request for zeros that works through a handle, and writing them would give every block of a
//! dynamic disk its place in the file: a restore of a new, sparse disk would fill the host's volume. Blocks that have no
//! place read as zeros without touching the medium, so what is zero already is read and left alone.

use vmtide_block::{AlignedBuffer, ByteRange, Result, is_zero};

/// How much is looked at, and written, at once. Smaller ones cost calls; larger ones write more that is zero already.
const PIECE_BYTES: usize = 1 << 20;

/// Makes `range` zero with `read` and `write`, which take a buffer and an offset.
///
/// # Errors
/// Those of `read` and `write`.
pub fn write_zeroes(
    range: ByteRange,
    read: impl Fn(&mut [u8], u64) -> Result<()>,
    write: impl Fn(&[u8], u64) -> Result<()>,
) -> Result<()> {
    let zeros = AlignedBuffer::new(PIECE_BYTES);
    let mut found = AlignedBuffer::new(PIECE_BYTES);
    let mut at = range.offset;
    while at < range.end() {
        let length = usize::try_from(range.end() - at).unwrap_or(usize::MAX).min(PIECE_BYTES);
        let piece = found.get_mut(..length).unwrap_or_default();
        read(piece, at)?;
        if !is_zero(piece) {
            write(zeros.get(..length).unwrap_or_default(), at)?;
        }
        at += length as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use vmtide_block::{BlockDevice, MemoryDevice, WritableBlockDevice};

    #[test]
    fn only_what_is_not_zero_is_written() {
        let disk = MemoryDevice::new(8 << 20);
        disk.write_at(&[7; 5000], (2 << 20) + 5000).unwrap();
        let written = RefCell::new(Vec::new());
        let read = |buffer: &mut [u8], offset| disk.read_at(buffer, offset);
        let write = |data: &[u8], offset| {
            written.borrow_mut().push((offset, data.len()));
            disk.write_at(data, offset)
        };
        write_zeroes(ByteRange::new(512, (8 << 20) - 1024), read, write).unwrap();
        // One piece: they begin where the range does.
        assert_eq!(*written.borrow(), [((2 << 20) + 512, 1 << 20)]);
        let mut all = vec![1; 8 << 20];
        disk.read_at(&mut all, 0).unwrap();
        assert!(is_zero(&all));
    }
}
