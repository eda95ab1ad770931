//! Sets of blocks as bitmaps: one that many threads set bits of, and one that never changes again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The words of a page.
pub(crate) const PAGE_WORDS: usize = 512;

/// The bits of a page: 4 KiB of bitmap, 2 GiB of disk at 64 KiB.
pub(crate) const PAGE_BITS: u64 = PAGE_WORDS as u64 * 64;

/// The bits of one page.
pub(crate) type Words = [u64; PAGE_WORDS];

/// A set of blocks that grows, by many threads at once. Bits are never cleared.
#[derive(Debug)]
pub(crate) struct AtomicBitmap {
    words: Vec<AtomicU64>,
    bits: u64,
    any: AtomicBool,
}

impl AtomicBitmap {
    pub fn new(bits: u64) -> Self {
        let words = usize::try_from(bits.div_ceil(64)).unwrap_or(usize::MAX);
        let words = (0..words).map(|_| AtomicU64::new(0)).collect();
        Self { words, bits, any: AtomicBool::new(false) }
    }

    /// Sets `first..end`, as far as there are such bits.
    pub fn set_range(&self, first: u64, end: u64) {
        let end = end.min(self.bits);
        if first >= end {
            return;
        }
        if !self.any.load(Ordering::Relaxed) {
            self.any.store(true, Ordering::Release);
        }
        each_word(first, end, |index, mask| {
            if let Some(word) = self.words.get(index)
                // Most writes are to blocks that were written before: no cache line is taken for them.
                && word.load(Ordering::Relaxed) & mask != mask
            {
                word.fetch_or(mask, Ordering::Release);
            }
            true
        });
    }

    /// Whether all of `first..end` are set.
    pub fn has_range(&self, first: u64, end: u64) -> bool {
        each_word(first, end.min(self.bits), |index, mask| {
            self.words.get(index).is_some_and(|word| word.load(Ordering::Acquire) & mask == mask)
        })
    }

    /// Whether any bit is set.
    pub fn is_any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// Sets what the other one has.
    pub fn add(&self, other: &PagedBitmap) {
        for (page, at) in other.pages.iter().zip((0..).step_by(PAGE_WORDS)) {
            match page {
                Page::Empty => {}
                Page::Full => {
                    let first = at as u64 * 64;
                    self.set_range(first, first + PAGE_BITS);
                }
                Page::Bits(words) => {
                    for (word, index) in words.iter().zip(at..) {
                        if *word != 0
                            && let Some(mine) = self.words.get(index)
                        {
                            mine.fetch_or(*word, Ordering::Release);
                            self.any.store(true, Ordering::Release);
                        }
                    }
                }
            }
        }
    }

    /// Clears everything. Nobody may set bits meanwhile.
    pub fn clear(&self) {
        self.any.store(false, Ordering::Release);
        for word in &self.words {
            word.store(0, Ordering::Release);
        }
    }

    fn or_page(&self, page: usize, into: &mut Words) {
        let start = page.saturating_mul(PAGE_WORDS);
        let words = self.words.get(start..).unwrap_or_default();
        for (word, into) in words.iter().zip(into.iter_mut()) {
            *into |= word.load(Ordering::Acquire);
        }
    }
}

/// Calls `visit` with every word of `first..end` and the bits of the range in it, while it answers true.
fn each_word(first: u64, end: u64, mut visit: impl FnMut(usize, u64) -> bool) -> bool {
    let mut at = first;
    while at < end {
        let last = (at | 63).min(end - 1);
        let mask = (u64::MAX >> (63 - (last - at))) << (at % 64);
        if !visit(usize::try_from(at / 64).unwrap_or(usize::MAX), mask) {
            return false;
        }
        at = last + 1;
    }
    true
}

/// One page of a set that does not change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Page {
    /// No bit is set.
    Empty,
    /// All are, as far as there are such blocks.
    Full,
    /// These are.
    Bits(Box<Words>),
}

impl Page {
    /// The shortest form of these bits.
    pub fn of(words: &Words) -> Self {
        if words.iter().all(|word| *word == 0) {
            Self::Empty
        } else if words.iter().all(|word| *word == u64::MAX) {
            Self::Full
        } else {
            Self::Bits(Box::new(*words))
        }
    }
}

/// A set of blocks that does not change. Memory grows with the pages that are neither empty nor full.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PagedBitmap {
    pub(crate) pages: Vec<Page>,
}

impl PagedBitmap {
    /// What `layers` have together, for a disk of so many blocks.
    pub fn of(layers: &[Layer], bits: u64) -> Self {
        let pages = page_count(bits);
        let mut words = [0; PAGE_WORDS];
        let page = |index| {
            words.fill(0);
            for layer in layers {
                layer.or_page(index, &mut words);
            }
            Page::of(&words)
        };
        Self { pages: (0..pages).map(page).collect() }
    }

    pub fn is_empty(&self) -> bool {
        self.pages.iter().all(|page| *page == Page::Empty)
    }

    fn or_page(&self, page: usize, into: &mut Words) {
        match self.pages.get(page) {
            None | Some(Page::Empty) => {}
            Some(Page::Full) => into.fill(u64::MAX),
            Some(Page::Bits(words)) => {
                for (word, into) in words.iter().zip(into.iter_mut()) {
                    *into |= *word;
                }
            }
        }
    }
}

/// The pages of a bitmap of so many bits.
pub(crate) fn page_count(bits: u64) -> usize {
    usize::try_from(bits.div_ceil(PAGE_BITS)).unwrap_or(usize::MAX)
}

/// One set among several that are looked at together.
#[derive(Clone, Debug)]
pub(crate) enum Layer {
    /// That of an id before the newest.
    Sealed(Arc<PagedBitmap>),
    /// That of the newest id, which grows.
    Growing(Arc<AtomicBitmap>),
}

impl Layer {
    pub fn or_page(&self, page: usize, into: &mut Words) {
        match self {
            Self::Sealed(bitmap) => bitmap.or_page(page, into),
            Self::Growing(bitmap) => bitmap.or_page(page, into),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_set_and_found_across_words_and_pages() {
        let bits = PAGE_BITS * 2 + 100;
        for (first, end) in
            [(0, 1), (63, 65), (64, 128), (5, 5), (PAGE_BITS - 1, PAGE_BITS + 1), (0, bits)]
        {
            let bitmap = AtomicBitmap::new(bits);
            bitmap.set_range(first, end);
            assert_eq!(bitmap.is_any(), first < end);
            assert!(bitmap.has_range(first, end));
            assert!(first == 0 || !bitmap.has_range(first - 1, end), "{first}");
            assert!(end == bits || !bitmap.has_range(first, end + 1), "{end}");
            let bitmap = Arc::new(bitmap);
            let sealed = PagedBitmap::of(&[Layer::Growing(bitmap)], bits);
            let again = AtomicBitmap::new(bits);
            again.add(&sealed);
            assert!(again.has_range(first, end));
            assert_eq!(sealed.is_empty(), !again.is_any());
            assert_eq!(PagedBitmap::of(&[Layer::Growing(Arc::new(again))], bits), sealed);
        }
    }

    #[test]
    fn bits_past_the_end_do_not_exist() {
        let bitmap = AtomicBitmap::new(70);
        bitmap.set_range(69, 1000);
        assert!(bitmap.has_range(69, 70) && bitmap.has_range(69, 1000));
        bitmap.clear();
        assert!(!bitmap.is_any() && !bitmap.has_range(69, 70));
    }
}
