//! Whoever reads much from a store over a network has many requests on their way at once.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use crate::common;

use common::{Disk, reopen, repository, store_point};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use vmtide_block::{CancelToken, Progress};
use vmtide_repo::{
    ChangedRanges, DiskPlan, Level, MemoryStore, ObjectEntry, ObjectReader, ObjectStore,
    ObjectWriter, ReadData, Result, VerifyOptions,
};

/// How many reads are under way, and how many there were at most.
#[derive(Default)]
struct Reads {
    now: AtomicUsize,
    most: AtomicUsize,
}

/// A store that takes its time to answer.
struct SlowStore {
    inner: MemoryStore,
    is_distant: bool,
    reads: Arc<Reads>,
}

struct SlowReader {
    inner: Box<dyn ObjectReader>,
    reads: Arc<Reads>,
}

impl ObjectReader for SlowReader {
    fn length_bytes(&self) -> u64 {
        self.inner.length_bytes()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let now = self.reads.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.reads.most.fetch_max(now, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(10));
        self.reads.now.fetch_sub(1, Ordering::SeqCst);
        self.inner.read_at(buffer, offset)
    }
}

impl ObjectStore for SlowStore {
    fn location(&self) -> String {
        self.inner.location()
    }

    fn is_distant(&self) -> bool {
        self.is_distant
    }

    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        self.inner.create(name)
    }

    fn open(&self, name: &str) -> Result<Box<dyn ObjectReader>> {
        let reads = Arc::clone(&self.reads);
        Ok(Box::new(SlowReader { inner: self.inner.open(name)?, reads }))
    }

    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectEntry) -> Result<()>) -> Result<()> {
        self.inner.list(prefix, visit)
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.inner.remove(name)
    }

    fn remove_unfinished(&self) -> Result<u64> {
        self.inner.remove_unfinished()
    }
}

/// How many reads a verification has under way at most.
fn reads_at_once(is_distant: bool) -> usize {
    let inner = MemoryStore::new();
    let plain: Arc<dyn ObjectStore> = Arc::new(inner.clone());
    // Sixteen packs: in the tests, one ends with each frame of 2 MiB.
    let mut content = vec![0; 32 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut content);
    let plan = DiskPlan { id: "disk".into(), base: None, changed: ChangedRanges::Everything };
    store_point(&repository(&plain, true), &Disk::new(content), &plan, Level::Full).unwrap();
    let reads = Arc::new(Reads::default());
    let slow: Arc<dyn ObjectStore> =
        Arc::new(SlowStore { inner, is_distant, reads: Arc::clone(&reads) });
    let repository = reopen(&slow).unwrap();
    let options = VerifyOptions { points: Vec::new(), read: ReadData::All, seed: None };
    let report = repository.verify(&options, &Progress::new(), &CancelToken::new()).unwrap();
    assert!(report.damage.is_empty());
    assert!(repository.readers(3) >= 3);
    reads.most.load(Ordering::SeqCst)
}

#[test]
fn a_distant_store_is_asked_for_more_at_once_than_there_are_cores() {
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    // One more for who looks after the lease.
    assert!(reads_at_once(false) <= cores + 1, "a disk is read by as many as can work");
    let most = reads_at_once(true);
    assert!(most >= 6, "only {most} at once");
}
