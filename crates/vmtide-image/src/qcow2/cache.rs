//! Bounded caches of an image that is open for reading: L2 tables and decompressed clusters.
//!
//! Both are split into shards with a lock each, held for a hash-map lookup and never across I/O:
//! two readers that miss the same table both read it, which is cheaper than either waiting.

use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// The shards of a cache. Enough that a dozen readers seldom meet; more only split the memory.
const SHARDS: usize = 16;

/// A bounded map with second-chance replacement: an entry used since it last came up stays.
pub(crate) struct Cache<V> {
    shards: Vec<Mutex<Shard<V>>>,
    shard_capacity: usize,
}

struct Shard<V> {
    entries: HashMap<u64, (Arc<V>, bool)>,
    queue: VecDeque<u64>,
}

impl<V> Cache<V> {
    /// A cache of as many entries of `entry_bytes` as fit `limit_bytes`, at least one a shard.
    pub(crate) fn new(limit_bytes: u64, entry_bytes: u64) -> Self {
        let entries = crate::bytes::length(limit_bytes / entry_bytes.max(1));
        let shards = SHARDS.min(entries).max(1);
        Self {
            shard_capacity: (entries / shards).max(1),
            shards: (0..shards)
                .map(|_| Mutex::new(Shard { entries: HashMap::new(), queue: VecDeque::new() }))
                .collect(),
        }
    }

    fn shard(&self, key: u64) -> &Mutex<Shard<V>> {
        // Keys are multiples of a cluster size: mix the high bits down (Fibonacci hashing).
        let mixed = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        &self.shards[crate::bytes::length(mixed) % self.shards.len()]
    }

    pub(crate) fn get(&self, key: u64) -> Option<Arc<V>> {
        let mut shard = self.shard(key).lock();
        let (value, used) = shard.entries.get_mut(&key)?;
        *used = true;
        Some(value.clone())
    }

    pub(crate) fn insert(&self, key: u64, value: Arc<V>) {
        let mut shard = self.shard(key).lock();
        let Shard { entries, queue } = &mut *shard;
        if entries.insert(key, (value, false)).is_none() {
            queue.push_back(key);
        }
        while entries.len() > self.shard_capacity {
            let Some(oldest) = queue.pop_front() else {
                break;
            };
            match entries.get_mut(&oldest) {
                Some((_, used)) if *used => {
                    *used = false;
                    queue.push_back(oldest);
                }
                _ => {
                    entries.remove(&oldest);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stays_within_its_bound_and_keeps_what_is_used() {
        let cache = Cache::new(64 * 16, 16);
        for key in 0..10_000u64 {
            cache.insert(key, Arc::new(key));
            assert_eq!(cache.get(0).as_deref(), Some(&0), "after {key}");
        }
        let held: usize = cache.shards.iter().map(|s| s.lock().entries.len()).sum();
        assert!(held <= 64, "{held}");
        let queued: usize = cache.shards.iter().map(|s| s.lock().queue.len()).sum();
        assert_eq!(held, queued);
    }
}
