//! Places for answers that keep a thread while their client takes them: so many of each client, so many in all.
//!
//! Content has its own places ([`transfers`](crate::transfers)), with everything that is told of a transfer. Lists
//! of changed ranges are no transfers, and yet each has a thread that waits for its client: without places, clients
//! that read nothing would take all threads of the agent. They are not taken from those of content, so that a
//! client that reads a list and content together never waits for itself.

use crate::count::{Count, Counted};
use crate::limits::Limits;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use thiserror::Error;

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NoPlace {
    /// This client has as many as it may.
    #[error("this key has {limit} such requests under way, as many as it may: wait for one to end")]
    Client {
        /// The limit.
        limit: usize,
    },
    /// All clients together have.
    #[error("the agent has {limit} such requests under way, as many as it does: ask again later")]
    Agent {
        /// The limit.
        limit: usize,
    },
}

/// All places of an agent for lists of changes.
#[derive(Debug)]
pub struct Places {
    /// The threads that make what takes a place.
    threads: Count,
    per_client: usize,
    total: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    total: usize,
    /// Clients with at least one.
    of_client: HashMap<Arc<str>, usize>,
}

impl Places {
    /// None taken yet.
    pub fn new(limits: &Limits) -> Arc<Self> {
        Self::of(limits.changes_per_client, limits.changes_total)
    }

    /// So many places of each client, and in all; none taken yet.
    pub fn of(per_client: usize, total: usize) -> Arc<Self> {
        Arc::new(Self { threads: Count::default(), per_client, total, taken: Mutex::default() })
    }

    /// Takes a place for a client.
    ///
    /// # Errors
    /// [`NoPlace`].
    pub fn take(self: &Arc<Self>, client: &Arc<str>) -> Result<Place, NoPlace> {
        let mut taken = self.taken.lock();
        if taken.total >= self.total {
            return Err(NoPlace::Agent { limit: self.total });
        }
        let own = taken.of_client.get(client).copied().unwrap_or(0);
        if own >= self.per_client {
            return Err(NoPlace::Client { limit: self.per_client });
        }
        taken.total += 1;
        taken.of_client.insert(Arc::clone(client), own + 1);
        Ok(Place { places: Arc::clone(self), client: Arc::clone(client) })
    }

    /// The threads that make answers which have a place, now.
    pub const fn threads(&self) -> &Count {
        &self.threads
    }

    /// How many are taken.
    pub fn taken(&self) -> usize {
        self.taken.lock().total
    }
}

/// One place; given back when it is dropped.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    client: Arc<str>,
}

impl Place {
    /// Counts the thread that makes the answer, as long as what is returned lives.
    pub fn thread(&self) -> Counted {
        self.places.threads.enter()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock();
        taken.total = taken.total.saturating_sub(1);
        if let Some(own) = taken.of_client.get_mut(&self.client) {
            *own = own.saturating_sub(1);
            if *own == 0 {
                taken.of_client.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_limited_and_come_back() {
        let limits = Limits { changes_per_client: 2, changes_total: 3, ..Limits::default() };
        let places = Places::new(&limits);
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let first = places.take(&a).unwrap();
        let _second = places.take(&a).unwrap();
        assert_eq!(places.take(&a).unwrap_err(), NoPlace::Client { limit: 2 });
        let third = places.take(&b).unwrap();
        assert_eq!(places.take(&b).unwrap_err(), NoPlace::Agent { limit: 3 });
        drop(first);
        let _again = places.take(&a).unwrap();
        drop(third);
        assert_eq!(places.taken(), 2);
        assert!(!places.taken.lock().of_client.contains_key(&b));
    }
}
