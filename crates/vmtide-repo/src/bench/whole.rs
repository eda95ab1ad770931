//! The store's part, and all of it together.

use super::Measured;
use super::disk::SampleDisk;
use super::work::{Done, repeat};
use crate::backup::{BackupOptions, ChangedRanges, DiskDraft, DiskPlan, PointDraft};
use crate::config::Encryption;
use crate::keys::KdfParameters;
use crate::password::Password;
use crate::point::{Level, RestorePoint, TrackingRecord};
use crate::store::{ObjectStore, ScratchStore};
use crate::{InitOptions, ObjectId, Repository, Result};
use jiff::Timestamp;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vmtide_block::{BlockDevice, CancelToken, Progress};

/// The bytes that one ranged read of a restore asks for.
const FETCH_BYTES: usize = 4 << 20;

/// Small reads: what a mount or a served disk asks for.
const SMALL_BYTES: usize = 64 << 10;

/// How many small reads are measured, and how many small objects are put: enough for a 99th percentile.
const REQUESTS: u64 = 200;

/// What one stage may take on a slow store.
const STAGE_LIMIT: Duration = Duration::from_secs(20);

/// What to measure of a store.
pub struct StoreBench<'a> {
    /// The store; what is measured with lies under `bench/` in it.
    pub store: Arc<dyn ObjectStore>,
    /// Some tens of MiB of what is to be backed up.
    pub sample: &'a [u8],
    /// How much is backed up and restored, in bytes.
    pub size_bytes: u64,
    /// How backups are made: workers, level, size of packs.
    pub options: BackupOptions,
}

/// Measures the store, and a backup and a restore with it. Removes all it made, also after an error.
///
/// # Errors
/// [`RepoError::Busy`](crate::RepoError::Busy) where another measurement goes on; those of the
/// store; cancelled.
pub fn measure_store(bench: &StoreBench<'_>, cancel: &CancelToken) -> Result<Vec<Measured>> {
    let store = ScratchStore::begin(Arc::clone(&bench.store))?;
    let outcome = bench.run(&store, cancel);
    let cleared = store.clear();
    let measured = outcome?;
    cleared?;
    Ok(measured)
}

impl StoreBench<'_> {
    fn run(&self, store: &ScratchStore, cancel: &CancelToken) -> Result<Vec<Measured>> {
        let mut measured = self.objects(store, cancel)?;
        measured.extend(self.whole(store, cancel)?);
        Ok(measured)
    }

    /// Objects of a pack's size, small ones, reads of both kinds, a listing.
    fn objects(&self, store: &ScratchStore, cancel: &CancelToken) -> Result<Vec<Measured>> {
        let (threads, pack_bytes) = (self.options.workers.max(1), self.options.pack_size_bytes);
        let count = (self.size_bytes / pack_bytes.max(1)).clamp(2, 64);
        let seed = ObjectId::random()?;
        let mut noise = vec![0; 1 << 20];
        blake3::Hasher::new().update(&seed.0).finalize_xof().fill(&mut noise);
        let pieces = pack_bytes.div_ceil(noise.len() as u64);
        let pack_bytes = pieces * noise.len() as u64;
        let name = |number: u64| format!("packs/{number:02x}/{seed}");
        let put = repeat(count, threads, STAGE_LIMIT, cancel, &|number| {
            let mut writer = store.create(&name(number))?;
            (0..pieces).try_for_each(|_| writer.write(&noise))?;
            writer.finish()
        })?;
        let packs = put.count;
        let mut measured = vec![of("put packs", put, pack_bytes, threads)];
        let fetches = packs * pack_bytes / FETCH_BYTES as u64;
        let get = repeat(fetches, threads, STAGE_LIMIT, cancel, &|number| {
            let mut buffer = vec![0; FETCH_BYTES];
            let reader = store.open(&name(number % packs))?;
            let places = (pack_bytes / FETCH_BYTES as u64).max(1);
            reader.read_at(&mut buffer, number / packs % places * FETCH_BYTES as u64)
        })?;
        measured.push(of("get 4 MiB of packs", get, FETCH_BYTES as u64, threads));
        let get = repeat(REQUESTS, 1, STAGE_LIMIT, cancel, &|number| {
            let mut buffer = [0; SMALL_BYTES];
            let places = pack_bytes / SMALL_BYTES as u64;
            // A stride that is prime to the number of places jumps through all of them.
            let place = number.wrapping_mul(2_654_435_761) % places;
            let reader = store.open(&name(number % packs))?;
            reader.read_at(&mut buffer, place * SMALL_BYTES as u64)
        })?;
        measured.push(of("get 64 KiB of packs", get, SMALL_BYTES as u64, 1));
        let put = repeat(REQUESTS, 1, STAGE_LIMIT, cancel, &|number| {
            store.put(&format!("maps/{number:04x}{seed}"), &noise[..4096])
        })?;
        let small = put.count;
        measured.push(of("put objects of 4 KiB", put, 4096, 1));
        let list = repeat(5, 1, STAGE_LIMIT, cancel, &|_| {
            store
                .list("maps/", &mut |_| Ok(()))
                .and_then(|()| store.list("packs/", &mut |_| Ok(())))
        })?;
        let mut list = of("list", list, 0, 1);
        list.operations *= small + packs;
        measured.push(list);
        Ok(measured)
    }

    /// A backup of a disk made of the sample into a repository of its own, and its restore to nowhere.
    fn whole(&self, store: &ScratchStore, cancel: &CancelToken) -> Result<Vec<Measured>> {
        store.clear()?;
        let init = InitOptions {
            encryption: Encryption::Aes256Gcm,
            kdf: KdfParameters { memory_kib: 64, iterations: 1, lanes: 1 },
            ..InitOptions::default()
        };
        let password = Password::new(ObjectId::random()?.to_string());
        let repository = Repository::init(Arc::new(store.clone()), &init, Some(&password))?;
        let disk = SampleDisk::new(self.sample, self.size_bytes);
        let (first, point) = self.backup(&repository, &disk, "backup, everything new", cancel)?;
        let (second, _) = self.backup(&repository, &disk, "backup, nothing new", cancel)?;
        let begun = Instant::now();
        let restored = AtomicU64::new(0);
        let source = repository.open_disk(&point, "disk0")?;
        if let Some(storage) = source.storage_order() {
            storage.read_all(self.options.workers, cancel, &|data, _| {
                restored.fetch_add(data.len() as u64, Ordering::Relaxed);
                Ok(())
            })?;
        }
        let third = Measured::new("restore to nowhere", restored.into_inner(), 1, begun.elapsed())
            .by(self.options.workers);
        Ok(vec![first, second, third])
    }

    #[allow(clippy::cast_precision_loss, reason = "a share needs no more than 53 bits")]
    fn backup(
        &self,
        repository: &Repository,
        disk: &SampleDisk<'_>,
        stage: &str,
        cancel: &CancelToken,
    ) -> Result<(Measured, RestorePoint)> {
        let begun = Instant::now();
        let session = repository.begin_backup(&self.options)?;
        let changed = ChangedRanges::Everything;
        let plan = DiskPlan { id: "disk0".into(), base: None, changed };
        let stored = session.store_disk(disk, &plan, &Progress::new(), cancel)?;
        let counts = stored.counts();
        let tracking = TrackingRecord::default();
        let point = session.commit(PointDraft {
            vm: "benchmark".into(),
            level: Level::Full,
            parent: None,
            consistency: "crash".into(),
            tags: BTreeMap::new(),
            host: String::new(),
            source: disk.name(),
            started: Timestamp::now(),
            config: serde_json::Value::Null,
            warnings: Vec::new(),
            disks: vec![DiskDraft { stored, tracking, changed_bytes: None }],
        })?;
        let mut measured = Measured::new(stage, disk.size_bytes(), 1, begun.elapsed());
        measured.left = Some(counts.stored_bytes as f64 / disk.size_bytes().max(1) as f64);
        Ok((measured.by(self.options.workers), point))
    }
}

/// Repetitions that each moved so many bytes.
fn of(stage: &str, done: Done, each_bytes: u64, threads: usize) -> Measured {
    Measured::new(stage, done.count * each_bytes, done.count, done.time)
        .by(threads)
        .with_latency(done.times)
}
