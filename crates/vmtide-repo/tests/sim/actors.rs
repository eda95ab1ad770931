//! What the simulated processes do: the real code, as its users call it.

use super::random::Random;
use super::world::World;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use vmtide_block::{BlockDevice, CancelToken, MemoryDevice, Progress};
use vmtide_repo::{
    BackupOptions, ChangedRanges, DiskDraft, DiskPlan, Level, ObjectId, PointDraft, PruneOptions,
    Purpose, RepoError, Repository, RestorePoint, Result, TrackingRecord,
};

/// Blocks of a disk: enough for several chunks of four blocks, few enough to be quick.
pub const BLOCKS: u64 = 20;

/// What is known from outside about what must be there.
#[derive(Default)]
pub struct Ledger {
    /// What disks held, by number.
    pub contents: Vec<Vec<u8>>,
    /// Restore points that were reported done, with the number of their content.
    pub done: BTreeMap<ObjectId, usize>,
    /// Those that somebody tried to forget.
    pub doomed: BTreeSet<ObjectId>,
    /// What went wrong, and must not.
    pub failures: Vec<String>,
    pub pruned: u64,
    pub voided: u64,
    pub revoked: u64,
}

pub type Book = Arc<Mutex<Ledger>>;

#[derive(Clone, Copy, Debug)]
pub enum Role {
    Writer { vm: u64 },
    Reader,
    Forgetter,
    Pruner { beside_others: bool },
}

pub struct Actor {
    pub world: Arc<World>,
    pub process: usize,
    pub role: Role,
    pub random: Random,
    pub book: Book,
    pub rounds: u64,
}

impl Actor {
    pub fn run(mut self) {
        let store = self.world.store(self.process);
        let open = || Repository::open(Arc::clone(&store), &mut || Err(invalid("no password")));
        for _ in 0..self.rounds {
            let outcome = open().and_then(|repository| match self.role {
                Role::Writer { vm } => self.back_up(&repository, vm),
                Role::Reader => self.read(&repository),
                Role::Forgetter => self.forget(&repository),
                Role::Pruner { beside_others } => self.prune(&repository, beside_others),
            });
            if self.world.is_dead(self.process) {
                return;
            }
            match outcome {
                Ok(()) | Err(RepoError::Busy { .. }) => {}
                // Nothing was done to it: then it must not fail.
                Err(error) if !self.world.is_disturbed(self.process) => {
                    let failure = format!("{:?} {} fails: {error}", self.role, self.process);
                    self.book.lock().failures.push(failure);
                }
                Err(_) => {}
            }
        }
    }

    fn back_up(&mut self, repository: &Repository, vm: u64) -> Result<()> {
        let session = repository.begin_backup(&options())?;
        let vm = format!("vm{vm}");
        let points = repository.points()?.points;
        let newest = points.iter().rfind(|point| point.vm == vm);
        let mut content = newest.map_or_else(
            || vec![0; BLOCKS as usize * 4096],
            |point| self.book.lock().contents[number_of(point)].clone(),
        );
        change(&mut content, &mut self.random);
        let number = {
            let mut book = self.book.lock();
            book.contents.push(content.clone());
            book.contents.len() - 1
        };
        let base = newest.map(|point| point.disks[0].clone());
        let base = match base {
            Some(base) if session.why_unusable(&base)?.is_none() => Some(base),
            _ => None,
        };
        let point = store(session, &vm, number, content, base.as_ref())?;
        self.book.lock().done.insert(point.id, number);
        Ok(())
    }

    fn read(&mut self, repository: &Repository) -> Result<()> {
        let lease = repository.lease(Purpose::Read)?;
        let points = repository.points()?.points;
        if points.is_empty() {
            return Ok(());
        }
        let point = &points[self.random.below(points.len() as u64) as usize];
        let outcome = read_back(repository, point);
        match outcome {
            Ok(content) => {
                if content != self.book.lock().contents[number_of(point)] {
                    let failure = format!("wrong bytes from restore point {}", point.id);
                    self.book.lock().failures.push(failure);
                }
                Ok(())
            }
            // Taken for dead: it is told that something is missing, and the program then says why.
            Err(_) if lease.id().is_some_and(|id| self.is_revoked(id)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn is_revoked(&self, lease: ObjectId) -> bool {
        let prefix = format!("revoked/{lease}/");
        self.world.memory.names().iter().any(|name| name.starts_with(&prefix))
    }

    fn forget(&mut self, repository: &Repository) -> Result<()> {
        let points = repository.points()?.points;
        if points.len() < 2 {
            return Ok(());
        }
        let point = &points[self.random.below(points.len() as u64) as usize];
        // Whatever comes of it, it may be gone from here on.
        self.book.lock().doomed.insert(point.id);
        repository.forget(&[point.id]).map(drop)
    }

    fn prune(&mut self, repository: &Repository, beside_others: bool) -> Result<()> {
        let options = PruneOptions {
            repack_below_percent: [0, 50, 100][self.random.below(3) as usize],
            beside_others,
            ..prune_options()
        };
        let report = repository.prune(&options, &Progress::new(), &CancelToken::new())?;
        let mut book = self.book.lock();
        book.pruned += report.packs_removed + report.maps_removed;
        book.voided += report.void_points;
        book.revoked += report.leases_revoked;
        Ok(())
    }
}

pub fn invalid(text: &str) -> RepoError {
    RepoError::Invalid(text.into())
}

pub fn options() -> BackupOptions {
    BackupOptions {
        workers: 1,
        compression_level: 1,
        pack_size_bytes: 1,
        ..BackupOptions::default()
    }
}

pub fn prune_options() -> PruneOptions {
    PruneOptions { pack_size_bytes: 20_000, ..PruneOptions::default() }
}

/// Writes some stretches of a disk, with content that other disks have, too.
pub fn change(content: &mut [u8], random: &mut Random) {
    for _ in 0..1 + random.below(3) {
        let first = random.below(BLOCKS) as usize;
        let count = 1 + random.below(6) as usize;
        let kind = random.below(5);
        for block in first..(first + count).min(BLOCKS as usize) {
            let bytes = &mut content[block * 4096..(block + 1) * 4096];
            if kind == 0 {
                bytes.fill(0);
                continue;
            }
            // The same kind at the same place is the same content, on whatever disk.
            bytes.fill(0x11 * kind as u8);
            bytes[..8].copy_from_slice(&((block as u64) << 8 | kind).to_le_bytes());
        }
    }
}

/// The number of a restore point's content.
pub fn number_of(point: &RestorePoint) -> usize {
    point.source.parse().expect("the source is the number of the content")
}

pub fn read_back(repository: &Repository, point: &RestorePoint) -> Result<Vec<u8>> {
    let disk = repository.open_disk(point, "disk")?;
    let mut content = vec![0xEE; usize::try_from(disk.size_bytes()).expect("small")];
    disk.read_at(&mut content, 0)?;
    Ok(content)
}

pub fn store(
    session: vmtide_repo::BackupSession,
    vm: &str,
    number: usize,
    content: Vec<u8>,
    base: Option<&vmtide_repo::DiskRecord>,
) -> Result<RestorePoint> {
    let source = MemoryDevice::from_bytes(content);
    let plan = DiskPlan { id: "disk".into(), base, changed: ChangedRanges::Everything };
    let stored = session.store_disk(&source, &plan, &Progress::new(), &CancelToken::new())?;
    session.commit(PointDraft {
        vm: vm.into(),
        level: Level::Incremental,
        parent: None,
        consistency: "crash".into(),
        tags: BTreeMap::new(),
        host: "host".into(),
        source: number.to_string(),
        started: jiff::Timestamp::UNIX_EPOCH,
        config: serde_json::Value::Null,
        warnings: Vec::new(),
        disks: vec![DiskDraft { stored, tracking: TrackingRecord::default(), changed_bytes: None }],
    })
}
