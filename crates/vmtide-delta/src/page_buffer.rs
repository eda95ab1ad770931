//! Memory for a frame that is written to a disk: past the page cache only bytes go that begin a page.

use vmtide_block::AlignedBuffer;

/// What the memory of a write past the page cache begins at a multiple of, in bytes.
const PAGE_BYTES: usize = 4096;

/// Bytes of which a chosen one begins a page. Kept from frame to frame; grows to the largest.
#[derive(Debug)]
pub(crate) struct PageBuffer {
    memory: AlignedBuffer,
    start: usize,
    length: usize,
}

impl Default for PageBuffer {
    fn default() -> Self {
        Self { memory: AlignedBuffer::new(0), start: 0, length: 0 }
    }
}

impl PageBuffer {
    /// Makes room for `length` bytes, of which the one at `page_at` begins a page. What they hold is left over from
    /// before. The caller has checked both against the limits of the format.
    pub fn room(&mut self, page_at: usize, length: usize) -> &mut [u8] {
        let start = page_at.next_multiple_of(PAGE_BYTES) - page_at;
        if self.memory.len() < start + length {
            self.memory = AlignedBuffer::new((start + length).next_multiple_of(PAGE_BYTES));
        }
        (self.start, self.length) = (start, length);
        self.memory.get_mut(start..start + length).unwrap_or_default()
    }

    /// The bytes that [`room`](Self::room) made.
    pub fn bytes(&self) -> &[u8] {
        self.memory.get(self.start..self.start + self.length).unwrap_or_default()
    }
}

/// Whether these bytes begin a page.
pub(crate) fn begins_page(bytes: &[u8]) -> bool {
    bytes.as_ptr().align_offset(PAGE_BYTES) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chosen_byte_begins_a_page() {
        let mut buffer = PageBuffer::default();
        assert!(buffer.bytes().is_empty());
        for (page_at, length) in [(0, 1), (16, 70_000), (4096, 4097), (65_552, 1 << 20), (5, 5)] {
            let room = buffer.room(page_at, length);
            assert_eq!(room.len(), length);
            room.fill(7);
            assert!(buffer.bytes().len() == length && buffer.bytes().iter().all(|byte| *byte == 7));
            assert!(begins_page(&buffer.bytes()[page_at..]), "{page_at} of {length}");
        }
    }
}
