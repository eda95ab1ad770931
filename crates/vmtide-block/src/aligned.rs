//! Buffers that the operating system can hand to a device as they are.

use std::ops::{Deref, DerefMut};

/// What the start of a buffer is aligned to, in bytes: a page, which satisfies every device.
const ALIGNMENT: usize = 4096;

/// Zeroed memory of a fixed length whose first byte stands on a page boundary, so that writes from
/// it (and from offsets in it that are multiples of 4096) may go past the page cache.
#[derive(Debug)]
pub struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuffer {
    /// A buffer of `length` bytes.
    pub fn new(length: usize) -> Self {
        let memory = vec![0; length + ALIGNMENT];
        // The address of a vector's bytes does not change while it does not grow.
        let start = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { memory, start, length }
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_start_on_a_page() {
        for length in [0, 1, 4096, 1 << 20] {
            let mut buffer = AlignedBuffer::new(length);
            assert_eq!((buffer.as_ptr().align_offset(ALIGNMENT), buffer.len()), (0, length));
            buffer.fill(7);
        }
    }
}
