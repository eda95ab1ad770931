//! The parts of the block table and the sector bitmaps that are in memory, changed ones and others.
//!
//! The log works in pages of 4 KiB (MS-VHDX 2.3.1), so that is the unit in which the metadata is
//! held: a page is known by its offset in the file, whatever it belongs to. A page of the block
//! table maps 512 blocks, which is 16 GiB of disk in Hyper-V's usual 32 MiB blocks.

use super::log_entry::LOG_SECTOR_BYTES;
use crate::bytes::length;
use std::collections::HashMap;
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Result};

/// The unit in which metadata is logged (MS-VHDX 2.3.1.3: a data sector carries 4096 bytes).
pub(super) const PAGE_BYTES: u64 = LOG_SECTOR_BYTES as u64;

/// The bytes of one page.
pub(super) type Page = [u8; LOG_SECTOR_BYTES];

/// Pages by their offset in the file.
#[derive(Default)]
pub(super) struct Pages {
    cached: HashMap<u64, Cached>,
}

struct Cached {
    bytes: Arc<Page>,
    /// It differs from what the log and the file have.
    dirty: bool,
    /// It is on its way into the log and the file: not to be read from there.
    flushing: bool,
}

impl Pages {
    /// The page at this offset of the file, where it is in memory.
    pub(super) fn cached(&self, offset: u64) -> Option<Arc<Page>> {
        self.cached.get(&offset).map(|page| page.bytes.clone())
    }

    /// The page at this offset of the file.
    ///
    /// # Errors
    /// What the file says.
    pub(super) fn load(&mut self, file: &dyn BlockDevice, offset: u64) -> Result<Arc<Page>> {
        Ok(self.entry(file, offset)?.bytes.clone())
    }

    /// Changes the page at this offset of the file.
    ///
    /// # Errors
    /// What the file says.
    pub(super) fn change(
        &mut self,
        file: &dyn BlockDevice,
        offset: u64,
        change: impl FnOnce(&mut Page),
    ) -> Result<()> {
        let page = self.entry(file, offset)?;
        page.dirty = true;
        change(Arc::make_mut(&mut page.bytes));
        Ok(())
    }

    fn entry(&mut self, file: &dyn BlockDevice, offset: u64) -> Result<&mut Cached> {
        use std::collections::hash_map::Entry;
        match self.cached.entry(offset) {
            Entry::Occupied(page) => Ok(page.into_mut()),
            Entry::Vacant(place) => {
                let mut bytes = [0; LOG_SECTOR_BYTES];
                read_page(file, &mut bytes, offset)?;
                let bytes = Arc::new(bytes);
                Ok(place.insert(Cached { bytes, dirty: false, flushing: false }))
            }
        }
    }

    /// The changed pages, in order of offset. They count as unchanged from now on but stay in
    /// memory until [`written`](Self::written).
    pub(super) fn take_dirty(&mut self) -> Vec<(u64, Arc<Page>)> {
        let mut dirty: Vec<_> = self
            .cached
            .iter_mut()
            .filter(|(_, page)| page.dirty)
            .map(|(offset, page)| {
                (page.dirty, page.flushing) = (false, true);
                (*offset, page.bytes.clone())
            })
            .collect();
        dirty.sort_unstable_by_key(|(offset, _)| *offset);
        dirty
    }

    /// From here on the file has these pages as they were taken.
    pub(super) fn written(&mut self, pages: &[(u64, Arc<Page>)]) {
        for (offset, _) in pages {
            if let Some(page) = self.cached.get_mut(offset) {
                page.flushing = false;
            }
        }
    }

    /// Forgets what the file has as well.
    pub(super) fn drop_clean(&mut self) {
        self.cached.retain(|_, page| page.dirty || page.flushing);
    }

    /// Forgets the pages in a part of the file, changed or not: it is about to become free.
    pub(super) fn forget(&mut self, part: ByteRange) {
        self.cached.retain(|offset, _| !part.contains(*offset));
    }

    /// The memory the pages take, about.
    pub(super) fn memory_bytes(&self) -> u64 {
        self.cached.len() as u64 * (PAGE_BYTES + 64)
    }
}

/// Reads one page; a file that ends inside it goes on with zeros, one that ends before it is
/// damaged.
fn read_page(file: &dyn BlockDevice, bytes: &mut Page, offset: u64) -> Result<()> {
    let present = file.size_bytes().saturating_sub(offset).min(PAGE_BYTES);
    if present == 0 {
        return Err(BlockError::damaged(
            file.name(),
            format!(
                "the file ends at {:#x}, before its metadata at {offset:#x}",
                file.size_bytes()
            ),
        ));
    }
    file.read_at(&mut bytes[..length(present)], offset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtide_block::MemoryDevice;

    #[test]
    fn changed_pages_stay_until_they_are_written() {
        let file = MemoryDevice::new(10_000);
        let mut pages = Pages::default();
        assert!(pages.cached(0).is_none());
        pages.change(&file, 4096, |page| page[7] = 1).unwrap();
        assert_eq!(pages.load(&file, 8192).unwrap()[7], 0);
        assert!(pages.load(&file, 12_288).is_err());
        let taken = pages.take_dirty();
        assert_eq!(taken.len(), 1);
        pages.change(&file, 4096, |page| page[8] = 2).unwrap();
        assert_eq!(taken[0].1[8], 0, "a taken page does not change");
        pages.drop_clean();
        assert!(pages.cached(8192).is_none());
        assert_eq!(pages.cached(4096).unwrap()[7..9], [1, 2]);
        pages.written(&taken);
        pages.drop_clean();
        assert!(pages.cached(4096).is_some(), "changed again");
        let taken = pages.take_dirty();
        pages.written(&taken);
        pages.drop_clean();
        assert!(pages.cached(4096).is_none());
    }
}
