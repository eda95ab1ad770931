//! Many workers between one producer and one consumer, in order.
//!
//! Workers take jobs from the producer themselves, one at a time, and do the work without a lock; the
//! calling thread consumes the results in the order of the jobs. No more jobs are under way than
//! the window allows, so memory does not grow where the consumer is slow.

use crate::Result;
use std::collections::BTreeMap;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use vmtide_block::{BlockError, CancelToken};

/// Jobs under way for each worker: one it works on, and results that wait for a slower one.
const JOBS_PER_WORKER: u64 = 3;

/// The most workers that are taken where nobody says how many.
pub(crate) const MAX_WORKERS: usize = 16;

/// As many workers as the machine has cores, but not so many that frames take much memory.
pub(crate) fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from).clamp(2, MAX_WORKERS)
}

struct Gate {
    taken: u64,
    consumed: u64,
    closed: bool,
}

struct Shared<P> {
    gate: Mutex<Gate>,
    changed: Condvar,
    producer: Mutex<(u64, P)>,
    window: u64,
}

impl<P> Shared<P> {
    /// Waits for room. False where no more jobs are to be taken.
    fn reserve(&self) -> bool {
        let mut gate = lock(&self.gate);
        while !gate.closed && gate.taken - gate.consumed >= self.window {
            gate = self.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        gate.taken += 1;
        !gate.closed
    }

    fn consumed(&self) {
        lock(&self.gate).consumed += 1;
        self.changed.notify_all();
    }

    fn close(&self) {
        lock(&self.gate).closed = true;
        self.changed.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs it: `produce` answers with the next job until there is none, `work` does one with the state
/// that `state` made for its thread, `consume` takes the results in order on the calling thread.
///
/// # Errors
/// The first error of any of them, in the order of the jobs as far as that is known; no more jobs are
/// taken then. [`BlockError::Cancelled`].
pub(crate) fn run_in_order<J, O, S, P>(
    workers: usize,
    cancel: &CancelToken,
    produce: P,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, J) -> Result<O> + Sync,
    mut consume: impl FnMut(O) -> Result<()>,
) -> Result<()>
where
    O: Send,
    P: FnMut() -> Result<Option<J>> + Send,
{
    let workers = workers.clamp(1, 256);
    let shared = Shared {
        gate: Mutex::new(Gate { taken: 0, consumed: 0, closed: false }),
        changed: Condvar::new(),
        producer: Mutex::new((0, produce)),
        window: workers as u64 * JOBS_PER_WORKER,
    };
    let (sender, receiver) = mpsc::channel();
    let (shared, state, work) = (&shared, &state, &work);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            let sender = sender.clone();
            scope.spawn(move || {
                // Also where it panics, nobody waits for it.
                let _closes = Closes(shared);
                take_and_work(shared, cancel, &sender, state, work);
            });
        }
        drop(sender);
        let result = consume_in_order(shared, &receiver, &mut consume);
        shared.close();
        result
    })
}

/// Ends the taking of jobs when a worker ends: by then there are no more, or something failed.
struct Closes<'a, P>(&'a Shared<P>);

impl<P> Drop for Closes<'_, P> {
    fn drop(&mut self) {
        self.0.close();
    }
}

fn take_and_work<J, O, S, P>(
    shared: &Shared<P>,
    cancel: &CancelToken,
    sender: &Sender<(u64, Result<O>)>,
    state: &(impl Fn() -> S + Sync),
    work: &(impl Fn(&mut S, J) -> Result<O> + Sync),
) where
    P: FnMut() -> Result<Option<J>> + Send,
{
    let mut state = state();
    while shared.reserve() {
        let (sequence, job) = {
            let mut producer = lock(&shared.producer);
            let sequence = producer.0;
            producer.0 += 1;
            (sequence, cancel.check().map_err(Into::into).and_then(|()| (producer.1)()))
        };
        let outcome = match job {
            Ok(Some(job)) => work(&mut state, job),
            Ok(None) => return,
            Err(error) => Err(error),
        };
        let failed = outcome.is_err();
        if sender.send((sequence, outcome)).is_err() || failed {
            return;
        }
    }
}

fn consume_in_order<O, P>(
    shared: &Shared<P>,
    receiver: &Receiver<(u64, Result<O>)>,
    consume: &mut impl FnMut(O) -> Result<()>,
) -> Result<()> {
    let mut waiting = BTreeMap::new();
    let mut next = 0u64;
    let mut failed = None;
    for (sequence, outcome) in receiver {
        if failed.is_some() {
            continue;
        }
        waiting.insert(sequence, outcome);
        while let Some(outcome) = waiting.remove(&next) {
            next += 1;
            if let Err(error) = outcome.and_then(&mut *consume) {
                shared.close();
                failed = Some(error);
                break;
            }
            shared.consumed();
        }
    }
    if let Some(error) = failed {
        return Err(error);
    }
    // A result is missing before these: its worker is gone without a word.
    if let Some((_, outcome)) = waiting.pop_first() {
        outcome?;
        return Err(BlockError::damaged("a delta", "a worker ended abnormally").into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DeltaError;

    #[test]
    fn results_come_in_order_and_the_first_error_ends_it() {
        for (workers, fail_at) in [(1, None), (4, None), (4, Some(57)), (3, Some(0))] {
            let mut next = 0u64;
            let mut seen = Vec::new();
            let outcome = run_in_order(
                workers,
                &CancelToken::new(),
                || {
                    next += 1;
                    Ok((next <= 100).then_some(next - 1))
                },
                || (),
                |(), job| {
                    if Some(job) == fail_at {
                        return Err(DeltaError::damaged("x", "y"));
                    }
                    // The order of the ends is another one than that of the beginnings.
                    std::thread::yield_now();
                    Ok(job)
                },
                |job| {
                    seen.push(job);
                    Ok(())
                },
            );
            assert_eq!(outcome.is_err(), fail_at.is_some());
            let until = fail_at.unwrap_or(100);
            assert_eq!(seen, (0..until).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_consumer_that_fails_stops_the_rest_and_a_cancelled_one_too() {
        let endless = || Ok(Some(1u8));
        let outcome = run_in_order(
            2,
            &CancelToken::new(),
            endless,
            || (),
            |(), job| Ok(job),
            |_| Err(DeltaError::damaged("x", "full")),
        );
        assert!(outcome.unwrap_err().to_string().contains("full"));
        let cancel = CancelToken::new();
        cancel.cancel();
        let outcome = run_in_order(2, &cancel, endless, || (), |(), job| Ok(job), |_| Ok(()));
        assert!(matches!(outcome, Err(DeltaError::Block(BlockError::Cancelled))));
    }
}
