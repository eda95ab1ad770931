//! Which failures pass by themselves, and how long to wait for that.

use std::time::{Duration, Instant};

/// The longest first wait.
const FIRST_WAIT: Duration = Duration::from_millis(200);

/// The longest wait. Longer, a server that is back stays unused; shorter, a thousand clients keep
/// an overloaded one down.
const LONGEST_WAIT: Duration = Duration::from_secs(20);

/// How long a server that was never reached is waited for: its address is probably wrong.
const UNREACHED_TIME: Duration = Duration::from_secs(10);

/// How often keys that ended are replaced by new ones.
const NEW_KEYS: u32 = 2;

/// What to do about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Trying again does not help.
    Final,
    /// It may pass.
    Passing,
    /// The keys have ended; others may be had.
    KeysEnded,
}

/// What an answer with this status and code means for the request.
pub(crate) fn of_answer(status: u16, code: &str) -> Verdict {
    match (status, code) {
        (_, "ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired") => {
            Verdict::KeysEnded
        }
        // Conditions that met another write of the same name at the same moment, and content that
        // was changed on the way: the same request again may go well.
        (
            _,
            "RequestTimeout"
            | "SlowDown"
            | "InternalError"
            | "OperationAborted"
            | "ConditionalRequestConflict"
            | "Throttling"
            | "ThrottlingException"
            | "RequestLimitExceeded"
            | "TooManyRequests"
            | "BandwidthLimitExceeded"
            | "BadDigest"
            | "IncompleteBody"
            | "XAmzContentSHA256Mismatch",
        )
        | (408 | 429 | 500 | 502 | 503 | 504, _) => Verdict::Passing,
        _ => Verdict::Final,
    }
}

/// The tries of one request.
#[derive(Debug)]
pub(crate) struct Tries {
    begun: Instant,
    limit: Duration,
    made: u32,
    keys_replaced: u32,
}

impl Tries {
    /// Begins. `reached` says whether the server ever answered.
    pub(crate) fn begin(limit: Duration, reached: bool) -> Self {
        let limit = if reached { limit } else { limit.min(UNREACHED_TIME) };
        Self { begun: Instant::now(), limit, made: 0, keys_replaced: 0 }
    }

    /// The server answered, if only to fail: now the full time counts.
    pub(crate) fn reached(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// How many tries failed.
    pub(crate) const fn made(&self) -> u32 {
        self.made
    }

    /// Since the beginning.
    pub(crate) fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// How long to wait before the next try; none where there is to be none. `asked` is what the
    /// server asked for.
    pub(crate) fn next(&mut self, verdict: Verdict, asked: Option<Duration>) -> Option<Duration> {
        self.made += 1;
        match verdict {
            Verdict::Final => return None,
            Verdict::KeysEnded => {
                self.keys_replaced += 1;
                return (self.keys_replaced <= NEW_KEYS).then_some(Duration::ZERO);
            }
            Verdict::Passing => {}
        }
        let most = FIRST_WAIT.saturating_mul(1 << (self.made - 1).min(16)).min(LONGEST_WAIT);
        // Anything between nothing and the most, so that clients that failed together do not come
        // back together.
        let wait = most.mul_f64(random_fraction()).max(asked.unwrap_or_default().min(LONGEST_WAIT));
        (self.begun.elapsed() + wait <= self.limit).then_some(wait)
    }
}

/// Between 0 and 1.
fn random_fraction() -> f64 {
    let random = getrandom::u32().unwrap_or(u32::MAX / 2);
    f64::from(random) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_is_tried_again_and_nothing_else() {
        for (status, code) in [(500, ""), (503, "SlowDown"), (409, "OperationAborted"), (429, "")] {
            assert_eq!(of_answer(status, code), Verdict::Passing, "{status} {code}");
        }
        for (status, code) in
            [(403, "AccessDenied"), (404, "NoSuchKey"), (412, ""), (400, ""), (301, ""), (501, "")]
        {
            assert_eq!(of_answer(status, code), Verdict::Final, "{status} {code}");
        }
        assert_eq!(of_answer(400, "ExpiredToken"), Verdict::KeysEnded);
    }

    #[test]
    fn waits_grow_to_a_limit_and_end() {
        let mut tries = Tries::begin(Duration::from_secs(3600), true);
        for n in 0..40_u32 {
            let wait = tries.next(Verdict::Passing, None).unwrap();
            assert!(wait <= LONGEST_WAIT && wait <= FIRST_WAIT * (1 << n.min(10)), "{n}: {wait:?}");
        }
        let asked = tries.next(Verdict::Passing, Some(Duration::from_secs(9))).unwrap();
        assert!(asked >= Duration::from_secs(9));
        let mut short = Tries::begin(Duration::from_millis(1), true);
        let end = (0..100).find(|_| short.next(Verdict::Passing, None).is_none());
        assert!(end.is_some());
        let mut keys = Tries::begin(Duration::from_secs(1), true);
        assert_eq!(keys.next(Verdict::KeysEnded, None), Some(Duration::ZERO));
        assert_eq!(keys.next(Verdict::KeysEnded, None), Some(Duration::ZERO));
        assert_eq!(keys.next(Verdict::KeysEnded, None), None);
        assert_eq!(keys.next(Verdict::Final, None), None);
    }
}
