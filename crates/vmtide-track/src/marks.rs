//! The marks of regions: what a write waits for, seldom.
//!
//! A write that touches only regions already marked in this epoch costs a look at one word. One that does not waits
//! for the medium, once, together with all others that wait at the moment; and the neighbourhood of what it touches is
//! marked along with it. The neighbourhood grows with the number of waits in the epoch, so that a guest that
//! writes everywhere waits a few hundred times for each TiB, and one that writes in one place is not charged
//! with much more than that place after a crash.

use crate::bitmap::AtomicBitmap;
use crate::mrt::{MARK_WORDS, Marks, Owner, PAGE_BYTES, PAGE_REGIONS};
use crate::store::{StoreFile, TrackingStore};
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::io;
use vmtide_block::ByteRange;

/// The regions that the first waits of an epoch mark: 64 MiB at 16 MiB a region. With one, a guest that writes
/// a file from front to back would wait for every region of it.
const FIRST_NEIGHBOURHOOD: u64 = 4;

/// After so many waits the neighbourhood doubles.
const WAITS_PER_DOUBLING: u32 = 8;

/// The most that it doubles: to 256 regions, 4 GiB. A TiB then takes some 300 waits in all; more doublings would
/// hardly save any, and answers after a crash would be of the whole disk.
const MOST_DOUBLINGS: u32 = 6;

/// The marks of one disk.
#[derive(Debug)]
pub(crate) struct RegionMarks {
    owner: Owner,
    /// The regions marked in this epoch, on the medium.
    durable: AtomicBitmap,
    /// Regions that threads wait for.
    wanted: Mutex<Vec<(u64, u64)>>,
    pages: Mutex<Pages>,
}

#[derive(Debug)]
struct Pages {
    pages: Vec<MarkPage>,
    epoch: u64,
    /// That of the `.rct` that is surely on the medium: marks of earlier epochs are in its bitmaps.
    saved_epoch: u64,
    /// How often a write waited in this epoch.
    waits: u32,
}

#[derive(Clone, Debug)]
struct MarkPage {
    epoch: u64,
    marks: Marks,
}

impl RegionMarks {
    /// Marks over a file that is there, none of which are of `epoch` or later.
    pub fn new(owner: Owner, epoch: u64) -> Self {
        let count = usize::try_from(owner.pages()).unwrap_or(usize::MAX);
        let page = MarkPage { epoch: 0, marks: [0; MARK_WORDS] };
        let pages = Pages { pages: vec![page; count], epoch, saved_epoch: epoch, waits: 0 };
        Self {
            owner,
            durable: AtomicBitmap::new(owner.geometry.regions()),
            wanted: Mutex::new(Vec::new()),
            pages: Mutex::new(pages),
        }
    }

    /// Returns when the regions of `range` are marked on the medium, under the present epoch.
    ///
    /// # Errors
    /// What the medium says; nothing may be written to the range then.
    pub fn mark(&self, range: ByteRange, store: &dyn TrackingStore) -> io::Result<()> {
        let region = u64::from(self.owner.geometry.region_bytes);
        let (first, end) = (range.offset / region, range.end().div_ceil(region));
        if self.durable.has_range(first, end) {
            return Ok(());
        }
        self.wanted.lock().push((first, end));
        let mut pages = self.pages.lock();
        // Whoever held the lock may have done it for this one.
        if self.durable.has_range(first, end) {
            return Ok(());
        }
        let mut wanted = std::mem::take(&mut *self.wanted.lock());
        wanted.push((first, end));
        let reach = FIRST_NEIGHBOURHOOD << (pages.waits / WAITS_PER_DOUBLING).min(MOST_DOUBLINGS);
        pages.waits = pages.waits.saturating_add(1);
        let mut touched = BTreeSet::new();
        for (first, end) in &mut wanted {
            *first -= *first % reach;
            *end = end.next_multiple_of(reach).min(self.owner.geometry.regions());
            pages.set(*first, *end, &mut touched);
        }
        pages.write(&self.owner, &touched, store)?;
        for (first, end) in wanted {
            self.durable.set_range(first, end);
        }
        Ok(())
    }

    /// From now on marks are of `epoch`, and no region has one. No write is under way.
    pub fn begin_epoch(&self, epoch: u64) {
        let mut pages = self.pages.lock();
        pages.epoch = epoch;
        pages.waits = 0;
        self.wanted.lock().clear();
        self.durable.clear();
    }

    /// The `.rct` of `epoch` is on the medium.
    pub fn saved(&self, epoch: u64) {
        self.pages.lock().saved_epoch = epoch;
    }

    /// Whether any region was marked in this epoch.
    pub fn is_any(&self) -> bool {
        self.durable.is_any()
    }
}

impl Pages {
    /// Sets `first..end` in memory, and notes which pages have to be written.
    fn set(&mut self, first: u64, end: u64, touched: &mut BTreeSet<usize>) {
        for region in first..end {
            let index = usize::try_from(region / PAGE_REGIONS).unwrap_or(usize::MAX);
            let Some(page) = self.pages.get_mut(index) else {
                return;
            };
            if page.epoch < self.saved_epoch {
                page.marks = [0; MARK_WORDS];
            }
            page.epoch = self.epoch;
            let bit = region % PAGE_REGIONS;
            let word = usize::try_from(bit / 64).unwrap_or(usize::MAX);
            if let Some(word) = page.marks.get_mut(word) {
                *word |= 1 << (bit % 64);
            }
            touched.insert(index);
        }
    }

    fn write(
        &self,
        owner: &Owner,
        touched: &BTreeSet<usize>,
        store: &dyn TrackingStore,
    ) -> io::Result<()> {
        let encoded: Vec<(u64, [u8; PAGE_BYTES])> = touched
            .iter()
            .filter_map(|index| {
                let page = self.pages.get(*index)?;
                let number = *index as u64;
                let bytes = owner.encode(number, page.epoch, &page.marks);
                Some((number * PAGE_BYTES as u64, bytes))
            })
            .collect();
        let pieces: Vec<(u64, &[u8])> = encoded.iter().map(|(at, page)| (*at, &page[..])).collect();
        store.update(StoreFile::Mrt, &pieces)
    }
}
