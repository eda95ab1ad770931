//! A file whose changes are kept in memory and forgotten: to find out whether a small change can
//! be made, by making it, before hours of work are spent on what leads up to it.

use crate::bytes::length;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use vmtide_block::{BlockDevice, BlockError, ByteRange, RawDevice, Result, WritableBlockDevice};

/// The unit of what is kept.
const PAGE_BYTES: u64 = 4096;

/// The most pages that are kept, 64 MiB: names of parents take kilobytes, the log of a VHDX that is
/// replayed first a few MiB.
const MAX_PAGES: usize = 16_384;

/// A file that seems to change.
pub(super) struct Trial {
    file: RawDevice,
    changes: Mutex<Changes>,
}

struct Changes {
    size_bytes: u64,
    pages: BTreeMap<u64, Box<[u8]>>,
}

impl Trial {
    pub(super) fn new(file: RawDevice) -> Self {
        let size_bytes = file.size_bytes();
        Self { file, changes: Mutex::new(Changes { size_bytes, pages: BTreeMap::new() }) }
    }

    /// Whether more was changed than is kept, so that an error says nothing of the file.
    pub(super) fn is_full(&self) -> bool {
        self.changes.lock().pages.len() >= MAX_PAGES
    }

    /// Fills `buffer` from the file, with zeros past its end.
    fn read_file(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let present = length(self.file.size_bytes().saturating_sub(offset)).min(buffer.len());
        let (stored, missing) = buffer.split_at_mut(present);
        missing.fill(0);
        if stored.is_empty() { Ok(()) } else { self.file.read_at(stored, offset) }
    }
}

impl BlockDevice for Trial {
    fn name(&self) -> String {
        self.file.name()
    }

    fn size_bytes(&self) -> u64 {
        self.changes.lock().size_bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        self.check_range(range)?;
        self.read_file(buffer, offset)?;
        let changes = self.changes.lock();
        for (at, page) in changes.pages.range(offset - offset % PAGE_BYTES..range.end()) {
            let both = range.intersect(&ByteRange::new(*at, PAGE_BYTES));
            let target = length(both.offset - offset)..length(both.end() - offset);
            let source = length(both.offset - at)..length(both.end() - at);
            if let (Some(target), Some(source)) = (buffer.get_mut(target), page.get(source)) {
                target.copy_from_slice(source);
            }
        }
        Ok(())
    }
}

impl WritableBlockDevice for Trial {
    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.check_range(ByteRange::new(offset, data.len() as u64))?;
        let mut changes = self.changes.lock();
        let (mut rest, mut at) = (data, offset);
        while !rest.is_empty() {
            let start = at - at % PAGE_BYTES;
            if !changes.pages.contains_key(&start) {
                if changes.pages.len() >= MAX_PAGES {
                    return Err(BlockError::unsupported(
                        self.file.name(),
                        "needs more changes than are tried out",
                    ));
                }
                let mut page = vec![0; length(PAGE_BYTES)];
                self.read_file(&mut page, start)?;
                changes.pages.insert(start, page.into_boxed_slice());
            }
            let inside = length(at - start);
            let (now, after) = rest.split_at(rest.len().min(length(PAGE_BYTES) - inside));
            let page = changes.pages.get_mut(&start);
            if let Some(target) = page.and_then(|page| page.get_mut(inside..inside + now.len())) {
                target.copy_from_slice(now);
            }
            at += now.len() as u64;
            rest = after;
        }
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        self.check_range(range)?;
        let zeros = vec![0; length(range.length.min(PAGE_BYTES))];
        let mut at = range.offset;
        while at < range.end() {
            let piece = length(range.end() - at).min(zeros.len());
            self.write_at(zeros.get(..piece).unwrap_or_default(), at)?;
            at += piece as u64;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        self.changes.lock().size_bytes = size_bytes;
        Ok(())
    }
}
