//! Which failures pass by themselves, and how long to wait for that.

use crate::{AgentError, Result};
use std::time::{Duration, Instant};
use vmtide_block::CancelToken;

/// The longest first wait.
const FIRST_WAIT: Duration = Duration::from_millis(200);

/// The longest wait. Longer, an agent that is back stays unused; shorter, many clients keep an overloaded one down.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// How long an agent that was never reached is waited for: its address is probably wrong.
const UNREACHED_TIME: Duration = Duration::from_secs(10);

/// How often something is tried that the agent itself failed at: rct-service answers 500 to whatever it did not expect.
const TRIES_OF_FAILURES: u32 = 3;

/// How often a wait looks whether the user wants to end.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// What to do about a failed try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Trying again does not help.
    Final,
    /// The agent failed, perhaps not the next time.
    Few,
    /// The connection failed, or the agent is busy: it passes.
    Passing,
}

/// One try that failed.
#[derive(Debug)]
pub(crate) struct Failure {
    /// With what.
    pub error: AgentError,
    /// Whether to try again.
    pub verdict: Verdict,
    /// How long the agent asks to wait.
    pub wait: Option<Duration>,
    /// Whether it was the agent that answered.
    pub answered: bool,
}

impl Failure {
    /// That no further try mends.
    pub const fn last(error: AgentError) -> Self {
        Self { error, verdict: Verdict::Final, wait: None, answered: true }
    }
}

/// The tries of one request.
pub(crate) struct Tries {
    begun: Instant,
    limit: Duration,
    made: u32,
    failures: u32,
}

impl Tries {
    /// Begins. `reached` says whether the agent ever answered.
    pub fn begin(limit: Duration, reached: bool) -> Self {
        Self {
            begun: Instant::now(),
            limit: if reached { limit } else { limit.min(UNREACHED_TIME) },
            made: 0,
            failures: 0,
        }
    }

    /// Waits for the next try, or fails for good.
    ///
    /// # Errors
    /// That of the failed try, with how often it was tried; [`AgentError::Cancelled`].
    pub fn again(&mut self, failure: Failure, limit: Duration, cancel: &CancelToken) -> Result<()> {
        self.made += 1;
        if failure.answered {
            self.limit = limit;
        }
        let most = FIRST_WAIT.saturating_mul(1 << (self.made - 1).min(16)).min(LONGEST_WAIT);
        // Between half and all of it, so that clients that failed together do not come back together.
        let wait = (most / 2 + most.mul_f64(random_fraction()) / 2)
            .max(failure.wait.unwrap_or_default().min(LONGEST_WAIT));
        let more = match failure.verdict {
            Verdict::Final => false,
            Verdict::Few => {
                self.failures += 1;
                self.failures < TRIES_OF_FAILURES
            }
            Verdict::Passing => true,
        };
        if !more || self.begun.elapsed() + wait > self.limit {
            return Err(self.gave_up(failure.error));
        }
        tracing::debug!(error = %failure.error, ?wait, "the agent fails; trying again");
        let until = Instant::now() + wait;
        loop {
            cancel.check().map_err(|_| AgentError::Cancelled)?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(POLL_INTERVAL));
        }
    }

    fn gave_up(&self, error: AgentError) -> AgentError {
        match error {
            AgentError::Unreachable { agent, detail } if self.made > 1 => AgentError::Unreachable {
                agent,
                detail: format!(
                    "{detail} ({} tries in {} s)",
                    self.made,
                    self.begun.elapsed().as_secs()
                ),
            },
            other => other,
        }
    }
}

/// Between 0 and 1.
pub(crate) fn random_fraction() -> f64 {
    f64::from(u32::from_le_bytes(random_bytes())) / f64::from(u32::MAX)
}

/// Bytes that nobody else has; where the system gives none, of the clock, which differ from those of other jobs.
pub(crate) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    if ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut bytes).is_err() {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now = now.map_or(0, |now| now.as_nanos()) ^ u128::from(std::process::id());
        bytes.iter_mut().zip(now.to_le_bytes()).for_each(|(to, from)| *to = from);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(verdict: Verdict) -> Failure {
        let error = AgentError::Unreachable { agent: "a".into(), detail: "gone".into() };
        Failure { error, verdict, wait: None, answered: false }
    }

    #[test]
    fn only_what_may_pass_is_tried_again() {
        let long = Duration::from_secs(3600);
        let cancel = CancelToken::new();
        assert!(Tries::begin(long, true).again(failure(Verdict::Final), long, &cancel).is_err());
        let mut few = Tries::begin(long, true);
        let errors = (0..TRIES_OF_FAILURES)
            .filter(|_| few.again(failure(Verdict::Few), long, &cancel).is_err());
        assert_eq!(errors.count(), 1);
        let error = Tries::begin(Duration::ZERO, true).again(
            failure(Verdict::Passing),
            Duration::ZERO,
            &cancel,
        );
        assert!(matches!(error, Err(AgentError::Unreachable { .. })));
        cancel.cancel();
        let error = Tries::begin(long, true).again(failure(Verdict::Passing), long, &cancel);
        assert!(matches!(error, Err(AgentError::Cancelled)));
    }
}
