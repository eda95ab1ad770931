//! How long, and how often, a file is opened again within one call.

use std::time::{Duration, Instant};

/// The first pause before a connection is made again; each further one is twice as long, up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// How often a file may be opened again within one call. A server that opens it each time and then refuses each read
/// would else be asked for a minute, and keep each of the handles.
const MAX_REOPENED: u32 = 8;

/// What is left of it.
pub(crate) struct Patience {
    limit: Duration,
    /// Runs from the first failure on.
    deadline: Option<Instant>,
    pause: Duration,
    reopened: u32,
}

impl Patience {
    /// For one call, of which reconnecting may take `limit`.
    pub fn new(limit: Duration) -> Self {
        Self { limit, deadline: None, pause: FIRST_PAUSE, reopened: 0 }
    }

    /// Waits before the next try, longer each time; false where there is no time left for one.
    pub fn pause(&mut self) -> bool {
        if Instant::now() + self.pause > self.deadline() {
            return false;
        }
        std::thread::sleep(self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        true
    }

    /// The file was opened again: whether it is to be used. At once the first time, after a pause when that did not
    /// help, and not for ever.
    pub fn may_use_reopened(&mut self) -> bool {
        self.reopened += 1;
        match self.reopened {
            1 => Instant::now() <= self.deadline(),
            2..=MAX_REOPENED => self.pause(),
            _ => false,
        }
    }

    fn deadline(&mut self) -> Instant {
        *self.deadline.get_or_insert_with(|| Instant::now() + self.limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_at_once_after_each_reopening_ends() {
        let mut patience = Patience::new(Duration::from_secs(3600));
        // Without the pauses themselves, which the test need not sit through.
        patience.pause = Duration::ZERO;
        let used = (0..100).take_while(|_| patience.may_use_reopened()).count();
        assert_eq!(used, 8);
    }

    #[test]
    fn pauses_grow_and_end_with_the_time() {
        let mut patience = Patience::new(Duration::from_secs(3600));
        assert!(patience.may_use_reopened());
        assert!(patience.pause());
        assert_eq!(patience.pause, FIRST_PAUSE * 2);
        // Now any pause is more than is left.
        patience.deadline = Some(Instant::now());
        assert!(!patience.pause());
        assert!(!patience.may_use_reopened());
    }
}
