//! Changed ranges of a disk, asked for to the end and put in order.
//!
//! A provider answers for as much of the disk as one page holds. What it answers is not trusted: an answer for
//! nothing would be asked for for ever, ranges may come unsorted, overlap, or lie outside of what was asked.
//! Everything doubtful is an error that says to read the disk in full; nothing is ever left out.

use crate::provider::{ChangePage, ProviderError, Result};
use vmtide_block::{ByteRange, RangeSet};

/// Asks the provider for one page. May block.
pub type AskForPage = Box<dyn FnMut(ByteRange) -> Result<ChangePage> + Send>;

/// Walks the changed ranges of one disk, sorted and merged. Every step may block.
pub struct ChangePager {
    /// The disk, for errors.
    disk: String,
    ask: AskForPage,
    size_bytes: u64,
    /// Up to where the provider has answered.
    at: u64,
    page: std::vec::IntoIter<ByteRange>,
    /// The last range of a page, which the next page may go on with.
    pending: Option<ByteRange>,
}

impl ChangePager {
    /// The changed ranges of `disk`, of `size_bytes`, from the offset `from` on.
    pub fn new(disk: String, size_bytes: u64, from: u64, ask: AskForPage) -> Self {
        let page = Vec::new().into_iter();
        Self { disk, ask, size_bytes, at: from.min(size_bytes), page, pending: None }
    }

    /// The size of the disk in bytes.
    pub const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The next range, none at the end.
    ///
    /// # Errors
    /// Those of [`DiskProvider::changes`]; [`ProviderError::TrackingLost`] where its answer makes no sense.
    pub fn next_range(&mut self) -> Result<Option<ByteRange>> {
        loop {
            if let Some(range) = self.page.next() {
                match &mut self.pending {
                    Some(pending) if pending.end() == range.offset => {
                        *pending = ByteRange::from_bounds(pending.offset, range.end());
                    }
                    pending => {
                        if let Some(done) = pending.replace(range) {
                            return Ok(Some(done));
                        }
                    }
                }
            } else if self.at >= self.size_bytes {
                return Ok(self.pending.take());
            } else {
                self.next_page()?;
            }
        }
    }

    fn next_page(&mut self) -> Result<()> {
        let asked = ByteRange::from_bounds(self.at, self.size_bytes);
        let page = (self.ask)(asked)?;
        if page.processed_bytes == 0 {
            return Err(ProviderError::TrackingLost {
                path: self.disk.clone(),
                reason: format!("the platform answered for no byte from {} on", self.at),
            });
        }
        let answered = ByteRange::new(self.at, page.processed_bytes.min(asked.length));
        // What reaches past the part that was answered comes again with the next page.
        let ranges = page.ranges.into_iter().map(|range| range.intersect(&answered));
        let ranges: RangeSet = ranges.collect();
        self.page = Vec::from(ranges).into_iter();
        self.at = answered.end();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 1000;

    /// All ranges of a pager over these pages.
    fn walk(
        from: u64,
        ask: impl FnMut(ByteRange) -> Result<ChangePage> + Send + 'static,
    ) -> Result<Vec<ByteRange>> {
        let mut pager = ChangePager::new("disk".into(), SIZE, from, Box::new(ask));
        let mut all = Vec::new();
        while let Some(range) = pager.next_range()? {
            all.push(range);
        }
        Ok(all)
    }

    #[test]
    fn an_answer_for_nothing_is_an_error_and_not_the_end() {
        let ranges = vec![ByteRange::new(0, 10)];
        let answer = move |_| Ok(ChangePage { ranges: ranges.clone(), processed_bytes: 0 });
        assert!(matches!(walk(0, answer), Err(ProviderError::TrackingLost { .. })));
    }

    proptest! {
        #[test]
        fn pages_of_any_form_give_all_of_the_truth_in_order(
            pairs in prop::collection::vec((0..SIZE, 1..60u64), 0..30), step in 1..300u64, from in 0..SIZE,
            shuffled: bool,
        ) {
            let truth: RangeSet = pairs.iter().map(|(o, l)| ByteRange::new(*o, *l)).collect();
            let wanted = truth.intersect(&RangeSet::from(vec![ByteRange::from_bounds(from, SIZE)]));
            let answer = move |asked: ByteRange| {
                let part = ByteRange::new(asked.offset, step.min(asked.length));
                let mut ranges: Vec<_> = truth.iter()
                    .map(|range| if shuffled { range } else { range.intersect(&part) })
                    .filter(|range| !range.is_empty())
                    .collect();
                if shuffled {
                    ranges.reverse();
                }
                Ok(ChangePage { ranges, processed_bytes: step })
            };
            prop_assert_eq!(walk(from, answer).unwrap(), Vec::from(wanted));
        }
    }
}
