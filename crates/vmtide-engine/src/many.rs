//! Many VMs of one host: several at a time, but not so many on one volume that they stand in each other's way.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, PoisonError};
use vmtide_block::CancelToken;

/// How many jobs may run at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// On the host; at least 1.
    pub parallel: usize,
    /// On any one volume; none for no limit of its own.
    pub per_volume: Option<usize>,
}

/// Runs `work` on every item, in their order as far as the limits allow, each on one thread. `volumes` of an item are
/// those it works on. When `cancel` is set no more begin; those that run are waited for.
///
/// Answers with what came of each; none for one that was not begun.
pub fn run_limited<T: Sync, R: Send>(
    items: &[T],
    volumes: impl Fn(&T) -> Vec<String>,
    limits: Limits,
    cancel: &CancelToken,
    work: impl Fn(&T) -> R + Sync,
) -> Vec<Option<R>> {
    let queue = Queue {
        volumes: items.iter().map(volumes).collect(),
        limit: limits.per_volume.unwrap_or(usize::MAX).max(1),
        state: Mutex::new(State { pending: (0..items.len()).collect(), busy: HashMap::new() }),
        freed: Condvar::new(),
    };
    let results = Mutex::new(items.iter().map(|_| None).collect::<Vec<_>>());
    std::thread::scope(|scope| {
        for _ in 0..limits.parallel.clamp(1, items.len().max(1)) {
            scope.spawn(|| {
                while let Some((index, _place)) = queue.next(cancel) {
                    let Some(item) = items.get(index) else { return };
                    let result = work(item);
                    let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(slot) = results.get_mut(index) {
                        *slot = Some(result);
                    }
                }
            });
        }
    });
    results.into_inner().unwrap_or_else(PoisonError::into_inner)
}

struct Queue {
    volumes: Vec<Vec<String>>,
    limit: usize,
    state: Mutex<State>,
    freed: Condvar,
}

struct State {
    pending: Vec<usize>,
    busy: HashMap<String, usize>,
}

impl Queue {
    /// The next item whose volumes have room, with its place on them; waits for one. None when there is no more.
    fn next(&self, cancel: &CancelToken) -> Option<(usize, Place<'_>)> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if cancel.is_cancelled() || state.pending.is_empty() {
                return None;
            }
            let has_room = |index: &usize| {
                let volumes = self.volumes.get(*index).map_or(&[][..], Vec::as_slice);
                volumes
                    .iter()
                    .all(|volume| state.busy.get(volume).copied().unwrap_or_default() < self.limit)
            };
            if let Some(at) = state.pending.iter().position(has_room) {
                let index = state.pending.remove(at);
                for volume in self.volumes.get(index).into_iter().flatten() {
                    *state.busy.entry(volume.clone()).or_default() += 1;
                }
                return Some((index, Place { queue: self, index }));
            }
            state = self.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// What an item takes of its volumes until it is dropped.
struct Place<'a> {
    queue: &'a Queue,
    index: usize,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut state = self.queue.state.lock().unwrap_or_else(PoisonError::into_inner);
        for volume in self.queue.volumes.get(self.index).into_iter().flatten() {
            if let Some(busy) = state.busy.get_mut(volume) {
                *busy = busy.saturating_sub(1);
            }
        }
        self.queue.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// The most that ran at once, on all volumes and on each.
    fn most_at_once(limits: Limits, items: &[(usize, &str)]) -> (usize, BTreeMap<String, usize>) {
        let running = Mutex::new((0, 0, BTreeMap::<String, (usize, usize)>::new()));
        let done = run_limited(
            items,
            |(_, volume)| vec![(*volume).to_owned()],
            limits,
            &CancelToken::new(),
            |(number, volume)| {
                {
                    let mut running = running.lock().unwrap();
                    running.0 += 1;
                    running.1 = running.1.max(running.0);
                    let entry = running.2.entry((*volume).to_owned()).or_default();
                    entry.0 += 1;
                    entry.1 = entry.1.max(entry.0);
                }
                std::thread::sleep(std::time::Duration::from_millis(2));
                let mut running = running.lock().unwrap();
                running.0 -= 1;
                running.2.get_mut(*volume).unwrap().0 -= 1;
                *number
            },
        );
        let expected: Vec<_> = items.iter().map(|(number, _)| Some(*number)).collect();
        assert_eq!(done, expected);
        let running = running.into_inner().unwrap();
        (running.1, running.2.into_iter().map(|(name, (_, most))| (name, most)).collect())
    }

    #[test]
    fn limits_of_host_and_volumes_hold_and_everything_is_done() {
        let items: Vec<(usize, &str)> =
            (0..40).map(|n| (n, if n < 30 { "c:" } else { "d:" })).collect();
        let (all, _) = most_at_once(Limits { parallel: 4, per_volume: None }, &items);
        assert!((2..=4).contains(&all), "{all}");
        let (all, each) = most_at_once(Limits { parallel: 8, per_volume: Some(2) }, &items);
        assert!(all <= 4 && each.values().all(|most| *most <= 2), "{all} {each:?}");
        let (all, _) = most_at_once(Limits { parallel: 0, per_volume: Some(0) }, &items);
        assert_eq!(all, 1);
    }

    #[test]
    fn a_cancelled_run_begins_no_more() {
        let cancel = CancelToken::new();
        let begun = AtomicUsize::new(0);
        let limits = Limits { parallel: 1, per_volume: None };
        let done = run_limited(
            &[1, 2, 3],
            |_| Vec::new(),
            limits,
            &cancel,
            |number| {
                begun.fetch_add(1, Ordering::SeqCst);
                cancel.cancel();
                *number
            },
        );
        assert_eq!((done, begun.into_inner()), (vec![Some(1), None, None], 1));
        let nothing: Vec<Option<()>> =
            run_limited(&[] as &[u8], |_| Vec::new(), limits, &CancelToken::new(), |_| ());
        assert!(nothing.is_empty());
    }
}
