//! A small cache of shared values by key, bounded by the bytes they take.

use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::sync::Arc;

/// Values by key, the least recently used leaving first. Shared by threads; the lock is held for
/// moments only, never while a value is made.
pub(crate) struct ByteCache<K, V: ?Sized> {
    limit_bytes: usize,
    inner: Mutex<Inner<K, V>>,
}

struct Inner<K, V: ?Sized> {
    values: HashMap<K, (Arc<V>, usize, u64)>,
    /// Keys with the stamp of a use; a key whose stamp is not its newest is stale.
    order: VecDeque<(K, u64)>,
    bytes: usize,
    stamp: u64,
}

impl<K: Hash + Eq + Clone, V: ?Sized> ByteCache<K, V> {
    /// An empty cache of at most about `limit_bytes`.
    pub(crate) fn new(limit_bytes: usize) -> Self {
        let inner = Inner { values: HashMap::new(), order: VecDeque::new(), bytes: 0, stamp: 0 };
        Self { limit_bytes, inner: Mutex::new(inner) }
    }

    /// The value, if it is here.
    pub(crate) fn get(&self, key: &K) -> Option<Arc<V>> {
        let mut inner = self.inner.lock();
        inner.stamp += 1;
        let stamp = inner.stamp;
        let entry = inner.values.get_mut(key)?;
        entry.2 = stamp;
        let value = Arc::clone(&entry.0);
        inner.order.push_back((key.clone(), stamp));
        // Many uses of few values must not grow the order without end.
        if inner.order.len() > 4 * inner.values.len() + 64 {
            let Inner { values, order, .. } = &mut *inner;
            order.retain(|(key, stamp)| values.get(key).is_some_and(|value| value.2 == *stamp));
        }
        Some(value)
    }

    /// Lets a value go.
    pub(crate) fn remove(&self, key: &K) {
        let mut inner = self.inner.lock();
        if let Some((_, bytes, _)) = inner.values.remove(key) {
            inner.bytes -= bytes;
        }
    }

    /// Keeps a value that takes `bytes`, and lets others go for it: they come back, in case their memory is of use.
    pub(crate) fn put(&self, key: K, value: Arc<V>, bytes: usize) -> Vec<Arc<V>> {
        let mut inner = self.inner.lock();
        inner.stamp += 1;
        let stamp = inner.stamp;
        let mut evicted = Vec::new();
        if let Some((old, old_bytes, _)) = inner.values.insert(key.clone(), (value, bytes, stamp)) {
            inner.bytes -= old_bytes;
            evicted.push(old);
        }
        inner.bytes += bytes;
        inner.order.push_back((key, stamp));
        while inner.bytes > self.limit_bytes {
            let Some((key, stamp)) = inner.order.pop_front() else { break };
            if inner.values.get(&key).is_some_and(|value| value.2 == stamp)
                && let Some((value, freed, _)) = inner.values.remove(&key)
            {
                inner.bytes -= freed;
                evicted.push(value);
            }
        }
        evicted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_leaves_first() {
        let cache = ByteCache::new(30);
        for key in 0..3 {
            cache.put(key, Arc::new(key), 10);
        }
        assert_eq!(cache.get(&0).as_deref(), Some(&0));
        cache.put(3, Arc::new(3), 10);
        assert!(cache.get(&1).is_none());
        assert!(cache.get(&0).is_some() && cache.get(&2).is_some() && cache.get(&3).is_some());
        cache.put(4, Arc::new(4), 40);
        assert!((0..5).all(|key| cache.get(&key).is_none()));
        cache.put(6, Arc::new(6), 10);
        cache.put(7, Arc::new(7), 20);
        let mut left: Vec<_> =
            cache.put(8, Arc::new(8), 25).into_iter().map(|value| *value).collect();
        left.sort_unstable();
        assert_eq!(left, [6, 7], "what left comes back");
        for _ in 0..10_000 {
            cache.put(5, Arc::new(5), 10);
            cache.get(&5);
        }
        assert!(cache.inner.lock().order.len() < 200);
    }
}
