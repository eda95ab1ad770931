//! A small repository that has objects of every kind.

use super::{Disk, commit, fast_options, reopen, repository};
use std::sync::Arc;
use vmtide_block::{BlockDevice, ByteRange, CancelToken, Progress, RangeSet};
use vmtide_repo::{
    BackupOptions, ChangedRanges, DenyStore, DiskPlan, HoldOptions, KdfParameters, Level,
    MemoryStore, ObjectStore, Password, PruneOptions, Purpose, ReadData, Repository, RestorePoint,
    VerifyOptions,
};

const BLOCK: usize = 4096;

/// The prefixes of the objects that [`every_kind`] makes.
pub const KINDS: [&str; 12] = [
    "vmtide.repo",
    "keys/",
    "packs/",
    "maps/",
    "index/",
    "points/",
    "forward/",
    "holds/",
    "damaged/",
    "healed/",
    "leases/",
    "condemned/",
];

/// Blocks of text that compress to little, no two of them the same.
pub fn text(blocks: usize, seed: usize) -> Vec<u8> {
    let block = |number: usize| {
        let line = format!("block {number} of text {seed}, counted from zero\n");
        line.into_bytes().into_iter().cycle().take(BLOCK)
    };
    (0..blocks).flat_map(block).collect()
}

/// What the disks of the restore points in [`every_kind`] hold, oldest first.
pub fn contents() -> Vec<Vec<u8>> {
    let mut changed = text(256, 1);
    changed[..200 * BLOCK].copy_from_slice(&text(200, 2));
    let third = text(100, 3);
    // Nothing changed: what is damaged of the third is still on the disk, all of it.
    vec![changed, third.clone(), third]
}

fn store(
    repository: &Repository,
    content: &[u8],
    base: Option<(&RestorePoint, usize)>,
) -> RestorePoint {
    // Of several workers, each fills a pack: which blocks come together would be a matter of chance, and so whether `prune`
    // finds one to repack.
    let options = BackupOptions { workers: 1, ..fast_options() };
    let session = repository.begin_backup(&options).unwrap();
    let plan = DiskPlan {
        id: "disk0".into(),
        base: base.map(|(point, _)| &point.disks[0]),
        changed: base.map_or(ChangedRanges::Everything, |(_, changed_blocks)| {
            let length = (changed_blocks * BLOCK) as u64;
            ChangedRanges::Only(RangeSet::from(vec![ByteRange::new(0, length)]))
        }),
    };
    let source = Disk::new(content.to_vec());
    let disk = session.store_disk(&source, &plan, &Progress::new(), &CancelToken::new()).unwrap();
    let level = if base.is_some() { Level::Incremental } else { Level::Full };
    commit(session, vec![disk], level).unwrap()
}

fn packs(memory: &MemoryStore) -> Vec<String> {
    memory.names().into_iter().filter(|name| name.starts_with("packs/")).collect()
}

/// Fills `memory` with an encrypted repository of three restore points, whose disks hold
/// [`contents`]: one that was moved by `prune` and leads through a forward, and is held; one with a
/// damaged frame that the next one healed. Its passwords are [`PASSWORD`](super::PASSWORD) and
/// `another`. Answers with the name of the damaged pack.
pub fn every_kind(memory: &Arc<MemoryStore>) -> String {
    let shared: Arc<dyn ObjectStore> = memory.clone();
    let repository = repository(&shared, true);
    let cheap = KdfParameters { memory_kib: 64, iterations: 1, lanes: 1 };
    repository.add_key("another", &Password::new("another"), &cheap).unwrap();
    let contents = contents();
    // Zeros end a chunk, whatever the repository's seed: what the second point goes on needing is
    // in chunks of its own, at most 14 of four blocks, and the rest of the pack, 25 chunks of four blocks, is dead.
    let mut oldest = text(256, 1);
    for zeros in (4..200).step_by(8) {
        oldest[zeros * BLOCK..(zeros + 4) * BLOCK].fill(0);
    }
    let first = store(&repository, &oldest, None);
    let held = store(&repository, &contents[0], Some((&first, 200)));
    repository.forget(&[first.id]).unwrap();
    let (progress, cancel) = (Progress::new(), CancelToken::new());
    repository.prune(&PruneOptions::default(), &progress, &cancel).unwrap();
    let before = packs(memory);
    let third = store(&repository, &contents[1], None);
    let victim = packs(memory).into_iter().find(|name| !before.contains(name)).unwrap();
    let mut bytes = memory.bytes(&victim).unwrap().to_vec();
    bytes[80] ^= 1;
    memory.replace(&victim, &bytes);
    let options = VerifyOptions { points: Vec::new(), read: ReadData::All, seed: None };
    assert_eq!(repository.verify(&options, &progress, &cancel).unwrap().quarantined, 1);
    store(&reopen(&shared).unwrap(), &contents[2], Some((&third, 1)));
    // A prune that has to wait for a reader leaves its list.
    let dead = store(&repository, &text(20, 9), None);
    let _reader = repository.lease(Purpose::Read).unwrap();
    repository.forget(&[dead.id]).unwrap();
    repository.prune(&PruneOptions::default(), &progress, &cancel).unwrap();
    let options = HoldOptions { reason: "kept".into(), ..HoldOptions::default() };
    repository.hold(held.id, &options).unwrap();
    let released = repository.hold(held.id, &options).unwrap();
    let denying: Arc<dyn ObjectStore> = Arc::new(DenyStore::new(Arc::clone(&shared)));
    reopen(&denying).unwrap().release_hold(released.id).unwrap();
    victim
}

/// All restore points are what they were, and nothing that is needed is damaged.
pub fn check(repository: &Repository) {
    let list = repository.points().unwrap();
    assert!(list.unreadable.is_empty() && list.unreadable_holds.is_empty(), "{list:?}");
    assert_eq!(list.holds.len(), 1);
    let contents = contents();
    assert_eq!(list.points.len(), contents.len());
    for (point, content) in list.points.iter().zip(contents) {
        let mut back = vec![0; content.len()];
        repository.open_disk(point, "disk0").unwrap().read_at(&mut back, 0).unwrap();
        assert!(back == content, "{}", point.id);
    }
    let options = VerifyOptions { points: Vec::new(), read: ReadData::All, seed: None };
    let report = repository.verify(&options, &Progress::new(), &CancelToken::new()).unwrap();
    assert_eq!(report.damage, []);
}
