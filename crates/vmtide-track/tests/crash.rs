//! Crash enumeration: a workload over files and a disk that log what is done; then every prefix of the log, with what was under
//! way done, not done or torn, and what was not flushed lost in any part. Whatever a crash leaves, the answer for every id
//! that was given out holds every block that differs from what the disk held at its moment.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a failed unwrap is a failed test, and the numbers here are small"
)]

mod support;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use support::{BLOCK, Files, Log, MemoryStore, Op, Random, VersionDisk, changed_blocks, data};
use vmtide_block::{ByteRange, WritableBlockDevice};
use vmtide_track::{Identity, Options, StoreFile, TrackError, TrackedDisk};

/// Two pages of marks, the second one not full.
const BLOCKS: u64 = 3648 + 200;

fn options() -> Options {
    Options {
        granularity_bytes: BLOCK as u32,
        // The finest marks: the enumeration sees every one of them.
        region_bytes: BLOCK as u32,
        enable: true,
        max_ids: 6,
        ..Options::default()
    }
}

fn identity(stamp: &str) -> Identity {
    Identity {
        disk_id: Some("disk".into()),
        stamp: Some(stamp.into()),
        file_id: Some("7".into()),
        ..Identity::default()
    }
}

/// An id, when it was given out, and what the disk held at its moment.
struct Sealed {
    returned_at: usize,
    id: String,
    content: Vec<u64>,
}

struct Workload {
    log: Log,
    store: Arc<MemoryStore>,
    device: Arc<VersionDisk>,
    disk: Arc<TrackedDisk>,
    sealed: Vec<Sealed>,
    version: u64,
    /// What the disk held when the latest moment was sealed.
    at_seal: Arc<Mutex<Vec<u64>>>,
}

/// The version of writes that happen while a moment is saved.
static MEANWHILE: AtomicU64 = AtomicU64::new(1 << 40);

impl Workload {
    fn begin() -> Self {
        let log = Log::default();
        let store = Arc::new(MemoryStore::new(Files::default(), log.clone()));
        let device = Arc::new(VersionDisk::new(vec![0; BLOCKS as usize], log.clone()));
        let disk = open(&device, &store, "0");
        let at_seal = Arc::default();
        let mut workload =
            Self { log, store, device, disk, sealed: Vec::new(), version: 0, at_seal };
        let content = workload.device.blocks.lock().unwrap().clone();
        workload.note(workload.disk.state().most_recent_id, content);
        workload
    }

    fn note(&mut self, id: String, content: Vec<u64>) {
        let returned_at = self.log.lock().unwrap().len();
        self.sealed.push(Sealed { returned_at, id, content });
    }

    /// The guest writes while a moment is saved: after it was sealed and before the `.rct` is replaced.
    fn with_writes_meanwhile<T>(&self, seed: u64, act: impl FnOnce(&TrackedDisk) -> T) -> T {
        let write = move |disk: &Weak<TrackedDisk>| {
            let version = MEANWHILE.fetch_add(1, Ordering::SeqCst);
            let block = version.wrapping_mul(seed | 1) % BLOCKS;
            disk.upgrade().unwrap().write_at(&data(version, 1), block * BLOCK).unwrap();
        };
        let (disk, device) = (Arc::downgrade(&self.disk), Arc::downgrade(&self.device));
        let at_seal = Arc::clone(&self.at_seal);
        *self.device.before_flush.lock().unwrap() = Some(Box::new(move || {
            let content = device.upgrade().unwrap().blocks.lock().unwrap().clone();
            *at_seal.lock().unwrap() = content;
            write(&disk);
        }));
        let disk = Arc::downgrade(&self.disk);
        *self.store.before_replace.lock().unwrap() = Some(Box::new(move || write(&disk)));
        let done = act(&self.disk);
        *self.device.before_flush.lock().unwrap() = None;
        *self.store.before_replace.lock().unwrap() = None;
        done
    }

    fn step(&mut self, random: &mut Random) {
        match random.below(20) {
            0 => {
                let seed = random.next();
                let id = self.with_writes_meanwhile(seed, |disk| disk.checkpoint().unwrap());
                let content = self.at_seal.lock().unwrap().clone();
                self.note(id.to_string(), content);
            }
            1 => {
                let seed = random.next();
                self.with_writes_meanwhile(seed, |disk| disk.save().unwrap());
            }
            2 | 3 => self.disk.flush().unwrap(),
            4 => {
                let stamp = format!("stop {}", self.version);
                self.disk
                    .close(|| {
                        self.device.flush()?;
                        Ok(Some(stamp.clone()))
                    })
                    .unwrap();
                self.disk = open(&self.device, &self.store, &stamp);
            }
            5 => {
                let first = random.below(BLOCKS - 300);
                self.disk
                    .write_zeroes(ByteRange::new(first * BLOCK, (random.below(300) + 1) * BLOCK))
                    .unwrap();
            }
            6 if random.below(2) == 0 => {
                // Every other time nothing was written since the newest id, which is this moment's then.
                for _ in 0..2 {
                    let content = self.device.blocks.lock().unwrap().clone();
                    let view = self.disk.freeze().unwrap();
                    self.note(view.id().unwrap().to_string(), content);
                }
            }
            _ => {
                self.version += 1;
                let count = random.below(3) + 1;
                let first = random.below(BLOCKS - count);
                self.disk.write_at(&data(self.version, count), first * BLOCK).unwrap();
            }
        }
    }
}

fn open(device: &Arc<VersionDisk>, store: &Arc<MemoryStore>, stamp: &str) -> Arc<TrackedDisk> {
    let disk = TrackedDisk::open(device.clone(), store.clone(), &identity(stamp), options());
    Arc::new(disk.unwrap())
}

/// What a crash leaves of the disk: flushed writes, and of the later ones those blocks that `keep` says.
fn content(ops: &[Op], mut keep: impl FnMut() -> bool) -> Vec<u64> {
    let flushed = ops.iter().rposition(|op| matches!(op, Op::Flush)).map_or(0, |at| at + 1);
    let mut blocks = vec![0; BLOCKS as usize];
    for (at, op) in ops.iter().enumerate() {
        if let Op::Write { first, end, version } = op {
            for block in &mut blocks[*first..*end] {
                if at < flushed || keep() {
                    *block = *version;
                }
            }
        }
    }
    blocks
}

/// What a crash in the middle of `op` may leave of the files.
fn under_way(files: &Files, op: &Op, random: &mut Random) -> Vec<Files> {
    let mut done = files.clone();
    done.apply(op);
    let mut all = vec![files.clone(), done.clone()];
    if let Op::Update(pieces) = op {
        // Some sectors are new, some are torn in the middle, which spoils them.
        for torn in 0..3 {
            let mut mixed = files.clone();
            let mrt = mixed.files.get_mut(&StoreFile::Mrt).unwrap();
            for (at, bytes) in pieces {
                let cut = match torn {
                    0 => 0,
                    1 => 200,
                    _ => random.below(512) as usize,
                };
                let at = *at as usize;
                mrt[at..at + cut].copy_from_slice(&bytes[..cut]);
                if torn == 2 {
                    mrt[at + cut..at + 512].iter_mut().for_each(|byte| *byte ^= 0x5a);
                }
            }
            all.push(mixed);
        }
    }
    all
}

/// Every id that was given out is answered with no less than the truth.
fn check(disk: &TrackedDisk, sealed: &[Sealed], now: &[u64], moment: &str) {
    for sealed in sealed {
        let changed = match changed_blocks(disk, &sealed.id) {
            Ok(changed) => changed,
            // Retired.
            Err(TrackError::UnknownId { .. }) if sealed.id != newest_of(disk) => continue,
            Err(error) => panic!("{moment}: {}: {error}", sealed.id),
        };
        for (block, (then, now)) in sealed.content.iter().zip(now).enumerate() {
            assert!(
                then == now || changed[block],
                "{moment}: block {block} since {} is missing",
                sealed.id
            );
        }
    }
}

fn newest_of(disk: &TrackedDisk) -> String {
    disk.state().most_recent_id
}

/// Opens what a crash left, checks it, and crashes again at every point of the opening.
fn reopen(files: &Files, blocks: &[u64], sealed: &[Sealed], stamp: &str, moment: &str) {
    let log = Log::default();
    let store = Arc::new(MemoryStore::new(files.clone(), log.clone()));
    let device = Arc::new(VersionDisk::new(blocks.to_vec(), log.clone()));
    let disk = TrackedDisk::open(device, store, &identity(stamp), options()).unwrap();
    check(&disk, sealed, blocks, moment);
    drop(disk);
    let ops = log.lock().unwrap().clone();
    let mut files = files.clone();
    for op in &ops {
        files.apply(op);
        let store = Arc::new(MemoryStore::new(files.clone(), Log::default()));
        let device = Arc::new(VersionDisk::new(blocks.to_vec(), Log::default()));
        let disk = TrackedDisk::open(device, store, &identity(stamp), options()).unwrap();
        check(&disk, sealed, blocks, &format!("{moment}, and again while opening"));
    }
}

/// The stamp that the image has after these operations: that of the last planned stop, if nothing was written since.
fn stamp_of(files: &Files) -> String {
    // What a .rct that says "closed" has is what the image's files look like; nothing writes between a stop and the
    // next .rct. It is read back from the file, where it is the one text that begins so.
    let rct = files.files.get(&StoreFile::Rct).map_or(&[][..], |bytes| bytes);
    let at = rct.windows(5).position(|window| window == b"stop ");
    at.map_or_else(
        || "0".to_owned(),
        |at| {
            let length = u16::from_le_bytes([rct[at - 2], rct[at - 1]]) as usize;
            String::from_utf8(rct[at..at + length].to_vec()).unwrap()
        },
    )
}

#[test]
fn no_crash_makes_an_answer_too_small() {
    let (mut tried, mut random) = (0, Random(0x9e37_79b9_7f4a_7c15));
    for seed in 1..=3u64 {
        let mut workload = Workload::begin();
        let mut steps = Random(seed.wrapping_mul(0xd134_2543_de82_ef95) | 1);
        for _ in 0..70 {
            workload.step(&mut steps);
        }
        let ops = workload.log.lock().unwrap().clone();
        let mut files = Files::default();
        for cut in 0..ops.len() {
            let known = workload.sealed.partition_point(|sealed| sealed.returned_at <= cut);
            let sealed = &workload.sealed[..known];
            for state in under_way(&files, &ops[cut], &mut random) {
                if state.files.contains_key(&StoreFile::Rct) {
                    let stamp = stamp_of(&state);
                    // What was under way may have reached the disk, too.
                    for (with, mode) in [(cut, 0), (cut + 1, 1), (cut + 1, 2)] {
                        let keep = || mode == 1 || (mode == 2 && random.below(2) == 0);
                        let blocks = content(&ops[..with], keep);
                        reopen(
                            &state,
                            &blocks,
                            sealed,
                            &stamp,
                            &format!("seed {seed}, {cut} of {}, {mode}", ops.len()),
                        );
                        tried += 1;
                    }
                }
            }
            files.apply(&ops[cut]);
        }
    }
    println!("{tried} states tried");
    assert!(tried > 2000, "{tried}");
}

#[test]
fn a_planned_stop_is_exact() {
    let mut workload = Workload::begin();
    let mut random = Random(77);
    let mut written = vec![false; BLOCKS as usize];
    let id = workload.disk.checkpoint().unwrap().to_string();
    for round in 0..30 {
        let (first, count) = (random.below(BLOCKS - 9), random.below(8) + 1);
        workload.disk.write_at(&data(round + 1, count), first * BLOCK).unwrap();
        written[first as usize..(first + count) as usize].fill(true);
        if round % 7 == 3 {
            workload.disk.save().unwrap();
        }
        if round % 5 == 0 {
            let stamp = round.to_string();
            workload.disk.close(|| Ok(Some(stamp.clone()))).unwrap();
            workload.disk = open(&workload.device, &workload.store, &stamp);
        }
        assert_eq!(changed_blocks(&workload.disk, &id).unwrap(), written, "round {round}");
    }
}

#[test]
fn marks_of_before_a_seal_are_not_charged_after_it() {
    let workload = Workload::begin();
    for first in [0, 700, BLOCKS - 1] {
        workload.disk.write_at(&data(1, 1), first * BLOCK).unwrap();
    }
    let id = workload.disk.checkpoint().unwrap().to_string();
    workload.disk.write_at(&data(2, 1), 2000 * BLOCK).unwrap();
    let files = workload.store.files.lock().unwrap().clone();
    let changed = after(files, &identity("later"), &id).unwrap();
    let found: Vec<_> = (0..changed.len()).filter(|block| changed[*block]).collect();
    // The one that was written, and its neighbours, which were marked with it.
    assert_eq!(found, [2000, 2001, 2002, 2003]);
}

/// Files with marks and ids, as a crash leaves them, with the id and the blocks written since.
fn crashed(seed: u64) -> (Files, String, Vec<bool>) {
    let log = Log::default();
    let store = Arc::new(MemoryStore::new(Files::default(), log.clone()));
    let device = Arc::new(VersionDisk::new(vec![0; BLOCKS as usize], log));
    let disk = TrackedDisk::open(device, store.clone(), &identity("0"), options()).unwrap();
    let id = disk.checkpoint().unwrap().to_string();
    let mut written = vec![false; BLOCKS as usize];
    let mut random = Random(seed);
    for version in 1..20 {
        let first = random.below(BLOCKS);
        disk.write_at(&data(version, 1), first * BLOCK).unwrap();
        written[first as usize] = true;
    }
    let files = store.files.lock().unwrap().clone();
    (files, id, written)
}

/// The blocks that a crash leaves as changed; all of them where tracking was lost, with a reason.
fn after(files: Files, identity: &Identity, id: &str) -> Result<Vec<bool>, String> {
    let store = Arc::new(MemoryStore::new(files, Log::default()));
    let device = Arc::new(VersionDisk::new(vec![0; BLOCKS as usize], Log::default()));
    let disk = TrackedDisk::open(device, store, identity, options()).unwrap();
    assert!(disk.state().enabled && !disk.state().most_recent_id.is_empty());
    match changed_blocks(&disk, id) {
        Ok(changed) => Ok(changed),
        Err(TrackError::Lost { reason, .. }) => Err(reason),
        Err(error @ TrackError::UnknownId { .. }) => Err(error.to_string()),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn files_that_are_garbled_cut_missing_or_swapped_answer_with_no_less() {
    let (files, id, written) = crashed(5);
    let (other, _, _) = crashed(9);
    let now = identity("later");
    let covers = |answer: &Result<Vec<bool>, String>| match answer {
        Ok(changed) => written.iter().zip(changed).all(|(written, changed)| changed | !written),
        Err(_) => true,
    };
    assert!(after(files.clone(), &now, &id).is_ok_and(|changed| covers(&Ok(changed))));
    for file in [StoreFile::Rct, StoreFile::Mrt] {
        let whole = files.files[&file].clone();
        for at in 0..whole.len().min(1024) {
            let mut damaged = files.clone();
            damaged.files.get_mut(&file).unwrap()[at] ^= 0x41;
            assert!(covers(&after(damaged, &now, &id)), "{file:?} byte {at}");
        }
        for length in (0..whole.len().min(1024)).step_by(13) {
            let mut cut = files.clone();
            cut.files.get_mut(&file).unwrap().truncate(length);
            assert!(covers(&after(cut, &now, &id)), "{file:?} cut at {length}");
        }
        for filled in [0x00, 0xff] {
            let mut garbled = files.clone();
            garbled.files.get_mut(&file).unwrap().fill(filled);
            assert!(after(garbled, &now, &id).is_err(), "{file:?} of {filled}");
        }
        let mut swapped = files.clone();
        swapped.files.insert(file, other.files[&file].clone());
        assert!(after(swapped, &now, &id).is_err(), "{file:?}");
    }
    let mut without = files.clone();
    without.files.remove(&StoreFile::Mrt);
    assert!(after(without, &now, &id).unwrap_err().contains(".mrt"));
    let exchanged = Files {
        files: [
            (StoreFile::Rct, files.files[&StoreFile::Mrt].clone()),
            (StoreFile::Mrt, files.files[&StoreFile::Rct].clone()),
        ]
        .into(),
    };
    assert!(after(exchanged, &now, &id).is_err());
}

#[test]
fn after_a_crash_another_file_or_writer_is_noticed() {
    let (files, id, _) = crashed(5);
    let now = identity("later");
    for (identity, word) in [
        (Identity { disk_id: Some("other".into()), ..now.clone() }, "another disk"),
        (Identity { file_id: Some("8".into()), ..now.clone() }, "replaced or copied"),
    ] {
        let reason = after(files.clone(), &identity, &id).unwrap_err();
        assert!(reason.contains(word), "{reason}");
    }
    // The mark of the writer before, and of the one that crashed, are known; another's is not.
    let opened = Identity {
        generation: Some("one".into()),
        next_generation: Some("two".into()),
        ..identity("0")
    };
    let store = Arc::new(MemoryStore::new(Files::default(), Log::default()));
    let device = Arc::new(VersionDisk::new(vec![0; BLOCKS as usize], Log::default()));
    let disk = TrackedDisk::open(device, store.clone(), &opened, options()).unwrap();
    let id = disk.state().most_recent_id;
    drop(disk);
    let files = store.files.lock().unwrap().clone();
    for (mark, known) in [("one", true), ("two", true), ("three", false)] {
        let now = Identity { generation: Some(mark.into()), ..identity("1") };
        assert_eq!(after(files.clone(), &now, &id).is_ok(), known, "{mark}");
    }
}
