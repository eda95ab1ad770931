//! The bounded cache of mapping tables of images that are open for reading, without locks.
//!
//! A disk's block table can be far larger than what is worth keeping (a 64 TiB VHDX: 512 MiB), so
//! it is read a page at a time and kept in slots. A page's slot is a function of its number alone,
//! and a slot is one atomic pointer: looking a page up is a load and a comparison, and two readers
//! that miss the same page both read it, which is cheaper than either waiting.

use arc_swap::ArcSwapOption;
use std::sync::Arc;

/// Pages of one table by their number. Memory: at most the slots given times the size of a page.
pub(crate) struct TableCache<T> {
    slots: Box<[ArcSwapOption<Page<T>>]>,
}

/// A page that is in memory.
pub(crate) struct Page<T> {
    number: u64,
    /// The entries.
    pub(crate) entries: T,
}

impl<T> TableCache<T> {
    /// A cache for a table of `pages` pages that keeps at most `most` of them, at least one. Where
    /// the whole table fits, every page has a slot of its own.
    pub(crate) fn new(pages: u64, most: usize) -> Self {
        let slots = crate::bytes::length(pages).min(most).max(1);
        Self { slots: (0..slots).map(|_| ArcSwapOption::empty()).collect() }
    }

    /// The page with this number, read by `read` where it is not in memory.
    ///
    /// # Errors
    /// Those of `read`; nothing is kept then.
    pub(crate) fn get_or_read<E>(
        &self,
        number: u64,
        read: impl FnOnce() -> Result<T, E>,
    ) -> Result<Arc<Page<T>>, E> {
        let slot = &self.slots[crate::bytes::length(number % self.slots.len() as u64)];
        if let Some(page) = slot.load().as_ref()
            && page.number == number
        {
            return Ok(page.clone());
        }
        let page = Arc::new(Page { number, entries: read()? });
        slot.store(Some(page.clone()));
        Ok(page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    #[test]
    fn pages_are_kept_until_another_takes_their_slot() {
        let cache = TableCache::new(1 << 40, 8);
        let read = |number: u64, fresh: &mut bool| {
            let page = cache.get_or_read::<Infallible>(number, || {
                *fresh = true;
                Ok(number * 3)
            });
            page.unwrap_or_else(|never| match never {}).entries
        };
        for (number, is_read) in
            [(1, true), (1, false), (2, true), (9, true), (2, false), (1, true)]
        {
            let mut fresh = false;
            assert_eq!(read(number, &mut fresh), number * 3);
            assert_eq!(fresh, is_read, "page {number}");
        }
        assert!(cache.get_or_read(77, || Err::<u64, _>("no")).is_err());
    }
}
