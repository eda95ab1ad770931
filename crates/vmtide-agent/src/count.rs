//! How many there are of something now, for the metrics.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A number that goes up with each [`Counted`] that is made and down again when that is dropped. Its clones are one number.
#[derive(Clone, Debug, Default)]
pub struct Count(Arc<AtomicUsize>);

impl Count {
    /// One more, as long as what is returned lives.
    #[must_use = "what is dropped at once is not counted"]
    pub fn enter(&self) -> Counted {
        self.0.fetch_add(1, Ordering::Relaxed);
        Counted(Arc::clone(&self.0))
    }

    /// How many there are.
    pub fn now(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// One of those that a [`Count`] counts.
#[derive(Debug)]
pub struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lives_is_counted_and_what_was_dropped_is_not() {
        let count = Count::default();
        let (one, other) = (count.enter(), count.clone().enter());
        assert_eq!(count.now(), 2);
        drop(one);
        assert_eq!(count.clone().now(), 1);
        drop(other);
        assert_eq!(count.now(), 0);
    }
}
