//! What was written and is not known to be on the server's disks.
//!
//! A flush covers only what was acknowledged before it was sent. Writes of other threads that overlap with it count as
//! not flushed, whichever is answered first.

use parking_lot::Mutex;
use std::collections::BTreeSet;

/// The writes of a file, counted.
#[derive(Default)]
pub(crate) struct Unflushed(Mutex<Writes>);

#[derive(Default)]
struct Writes {
    /// How many were begun.
    begun: u64,
    /// Those that are under way, by their numbers from 0.
    under_way: BTreeSet<u64>,
    /// All before this number are flushed.
    flushed: u64,
}

/// A write that is under way, until it is dropped.
pub(crate) struct Writing<'a> {
    file: &'a Unflushed,
    number: u64,
}

/// What a flush covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark(u64);

impl Unflushed {
    /// To be called before anything is sent: it may be written although the answer is lost.
    pub fn write(&self) -> Writing<'_> {
        let mut writes = self.0.lock();
        let number = writes.begun;
        writes.begun += 1;
        writes.under_way.insert(number);
        Writing { file: self, number }
    }

    /// What a flush covers that is sent after this.
    pub fn mark(&self) -> Mark {
        let writes = self.0.lock();
        Mark(writes.under_way.first().copied().unwrap_or(writes.begun))
    }

    /// The flush was acknowledged.
    pub fn flushed(&self, mark: Mark) {
        let mut writes = self.0.lock();
        writes.flushed = writes.flushed.max(mark.0);
    }

    /// Whether something was written that no flush covers.
    pub fn is_dirty(&self) -> bool {
        let writes = self.0.lock();
        writes.flushed < writes.begun
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.file.0.lock().under_way.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_covers_what_was_acknowledged_before_it() {
        let file = Unflushed::default();
        assert!(!file.is_dirty());
        drop(file.write());
        assert!(file.is_dirty());
        file.flushed(file.mark());
        assert!(!file.is_dirty());
    }

    #[test]
    fn a_flush_does_not_cover_what_came_while_it_was_under_way() {
        let file = Unflushed::default();
        drop(file.write());
        let mark = file.mark();
        // Begun and acknowledged while the flush is under way.
        drop(file.write());
        file.flushed(mark);
        assert!(file.is_dirty());
        file.flushed(file.mark());
        assert!(!file.is_dirty());
        // Begun before it, acknowledged after it.
        let slow = file.write();
        let mark = file.mark();
        drop(slow);
        file.flushed(mark);
        assert!(file.is_dirty());
    }
}
