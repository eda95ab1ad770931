//! A bounded cache of decoded pages, in shards so that threads rarely meet at a lock.
//!
//! Each shard keeps its pages in a ring and gives every page that was used since the hand last
//! passed a second chance (the CLOCK approximation of least-recently-used): a hit costs one lock of
//! one shard and no list surgery.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;

/// How many shards: a few times the threads that read one disk. Fewer makes threads wait for each
/// other; more makes shards so small that eviction becomes random.
const SHARDS: usize = 16;

/// Names a page: which segment of the owner's list, which page in it.
pub(crate) type PageKey = (u32, u32);

/// A cache of at most a fixed number of pages.
pub(crate) struct PageCache<V> {
    shards: Vec<Mutex<Shard<V>>>,
    shard_pages: usize,
}

struct Shard<V> {
    places: HashMap<PageKey, usize>,
    ring: Vec<Slot<V>>,
    hand: usize,
}

struct Slot<V> {
    key: PageKey,
    value: Arc<V>,
    used: bool,
}

impl<V> PageCache<V> {
    /// An empty cache of at most `pages` pages, rounded up to a multiple of the shards.
    pub fn new(pages: usize) -> Self {
        let shard = || Mutex::new(Shard { places: HashMap::new(), ring: Vec::new(), hand: 0 });
        Self {
            shards: (0..SHARDS).map(|_| shard()).collect(),
            shard_pages: pages.div_ceil(SHARDS).max(1),
        }
    }

    /// The most pages it will hold.
    pub fn capacity(&self) -> usize {
        self.shard_pages * SHARDS
    }

    /// The pages it holds.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().ring.len()).sum()
    }

    /// The page, from the cache or from `load`, which runs without any lock held (two threads may
    /// load the same page; the page is immutable, so either will do).
    ///
    /// # Errors
    /// Those of `load`; nothing is cached then.
    pub fn get_or_load<E>(
        &self,
        key: PageKey,
        load: impl FnOnce() -> Result<V, E>,
    ) -> Result<Arc<V>, E> {
        let mixed = key.0.wrapping_mul(0x9e37_79b1).wrapping_add(key.1);
        let shard = &self.shards[mixed as usize % SHARDS];
        if let Some(found) = shard.lock().get(key) {
            return Ok(found);
        }
        let value = Arc::new(load()?);
        shard.lock().insert(key, &value, self.shard_pages);
        Ok(value)
    }
}

impl<V> Shard<V> {
    fn get(&mut self, key: PageKey) -> Option<Arc<V>> {
        let slot = &mut self.ring[*self.places.get(&key)?];
        slot.used = true;
        Some(Arc::clone(&slot.value))
    }

    fn insert(&mut self, key: PageKey, value: &Arc<V>, limit: usize) {
        if self.places.contains_key(&key) {
            return;
        }
        let slot = Slot { key, value: Arc::clone(value), used: false };
        if self.ring.len() < limit {
            self.places.insert(key, self.ring.len());
            self.ring.push(slot);
            return;
        }
        // Ends after at most two rounds: the first clears every `used`.
        while self.ring[self.hand].used {
            self.ring[self.hand].used = false;
            self.hand = (self.hand + 1) % self.ring.len();
        }
        self.places.remove(&self.ring[self.hand].key);
        self.places.insert(key, self.hand);
        self.ring[self.hand] = slot;
        self.hand = (self.hand + 1) % self.ring.len();
    }
}

impl<V> std::fmt::Debug for PageCache<V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageCache")
            .field("pages", &self.len())
            .field("capacity", &self.capacity())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    #[test]
    fn stays_within_its_bound_and_answers_right() {
        let cache = PageCache::new(64);
        for round in 0..3u32 {
            for page in 0..1000 {
                let value = cache.get_or_load((1, page), || Ok::<_, Infallible>(page * 7));
                assert_eq!(*value.unwrap(), page * 7, "round {round}");
            }
        }
        assert_eq!(cache.len(), cache.capacity());
        assert_eq!(cache.capacity(), 64);
    }

    #[test]
    fn what_is_used_survives_what_is_not() {
        let cache = PageCache::new(SHARDS * 4);
        let get = |page: u32| {
            let mut loaded = false;
            let _ = cache.get_or_load((0, page), || {
                loaded = true;
                Ok::<_, Infallible>(page)
            });
            loaded
        };
        // All of these fall into one shard of four pages.
        let pages: Vec<u32> = (0..40).map(|n| n * u32::try_from(SHARDS).unwrap()).collect();
        assert!(get(pages[0]));
        for &page in &pages[1..] {
            assert!(get(page));
            assert!(!get(pages[0]), "evicted by page {page} though in use");
        }
    }

    #[test]
    fn a_failed_load_leaves_nothing() {
        let cache = PageCache::<u32>::new(16);
        assert_eq!(cache.get_or_load((0, 0), || Err("no")), Err("no"));
        assert_eq!(cache.len(), 0);
        assert_eq!(cache.get_or_load((0, 0), || Ok::<_, &str>(5)), Ok(Arc::new(5)));
    }
}
