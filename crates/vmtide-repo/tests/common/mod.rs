//! What the tests of the repository share.

#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

pub mod every_kind;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vmtide_block::{BlockDevice, ByteRange, CancelToken, Extent, MemoryDevice, Progress};
use vmtide_repo::{
    BackupOptions, BackupSession, DiskDraft, DiskPlan, Encryption, InitOptions, KdfParameters,
    Level, ObjectStore, Password, PointDraft, RepoError, Repository, RestorePoint, StoredDisk,
    TrackingRecord,
};

/// A disk in memory that counts what is read.
pub struct Disk {
    inner: MemoryDevice,
    read: AtomicU64,
}

impl Disk {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { inner: MemoryDevice::from_bytes(bytes), read: AtomicU64::new(0) }
    }

    pub fn read_bytes(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }
}

impl BlockDevice for Disk {
    fn name(&self) -> String {
        "test disk".into()
    }
    fn size_bytes(&self) -> u64 {
        self.inner.size_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        self.read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        self.inner.read_at(buffer, offset)
    }
    fn extents(&self, range: ByteRange) -> vmtide_block::Result<Vec<Extent>> {
        self.inner.extents(range)
    }
}

pub const PASSWORD: &str = "correct horse";

pub fn init_options(encrypted: bool) -> InitOptions {
    InitOptions {
        encryption: if encrypted { Encryption::Aes256Gcm } else { Encryption::None },
        // As cheap as it gets: these tests are not about guessing passwords.
        kdf: KdfParameters { memory_kib: 64, iterations: 1, lanes: 1 },
        ..InitOptions::default()
    }
}

pub fn repository(store: &Arc<dyn ObjectStore>, encrypted: bool) -> Repository {
    let password = Password::new(PASSWORD);
    Repository::init(Arc::clone(store), &init_options(encrypted), Some(&password)).unwrap()
}

pub fn reopen(store: &Arc<dyn ObjectStore>) -> Result<Repository, RepoError> {
    Repository::open(Arc::clone(store), &mut || Ok(Password::new(PASSWORD)))
}

/// Small packs, so that small disks have several.
pub fn fast_options() -> BackupOptions {
    BackupOptions { workers: 2, pack_size_bytes: 256 << 10, ..BackupOptions::default() }
}

pub fn store_point(
    repository: &Repository,
    source: &dyn BlockDevice,
    plan: &DiskPlan<'_>,
    level: Level,
) -> Result<RestorePoint, RepoError> {
    let session = repository.begin_backup(&fast_options())?;
    let disk = session.store_disk(source, plan, &Progress::new(), &CancelToken::new())?;
    commit(session, vec![disk], level)
}

pub fn commit(
    session: BackupSession,
    disks: Vec<StoredDisk>,
    level: Level,
) -> Result<RestorePoint, RepoError> {
    let disks = disks
        .into_iter()
        .map(|stored| DiskDraft {
            stored,
            tracking: TrackingRecord::default(),
            changed_bytes: None,
        })
        .collect();
    session.commit(PointDraft {
        vm: "vm".into(),
        level,
        parent: None,
        consistency: "crash".into(),
        tags: BTreeMap::new(),
        host: "host".into(),
        source: "test".into(),
        started: "2026-11-20T03:00:00Z".parse().unwrap(),
        config: serde_json::Value::Null,
        warnings: Vec::new(),
        disks,
    })
}

/// Makes the files in a directory look as if nobody had written to them for two days.
pub fn make_older(directory: &std::path::Path) {
    let time = std::time::SystemTime::now() - std::time::Duration::from_secs(48 * 3600);
    for entry in std::fs::read_dir(directory).unwrap() {
        let file = std::fs::File::options().write(true).open(entry.unwrap().path()).unwrap();
        file.set_modified(time).unwrap();
    }
}
