//! A tracked disk against a model: sets of blocks, with seals, retirement, planned stops and crashes.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a failed unwrap is a failed test, and the numbers here are small"
)]

mod support;

use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use support::{BLOCK, Files, Log, MemoryStore, VersionDisk, changed_blocks, data};
use vmtide_block::{BlockDevice, ByteRange, WritableBlockDevice};
use vmtide_track::{Identity, Options, StoreFile, TrackError, TrackedDisk};

const BLOCKS: u64 = 200;
const MAX_IDS: usize = 4;
const MAX_AGE_MS: u64 = 1000;

/// The time of these tests, set by them alone.
static NOW_MS: AtomicU64 = AtomicU64::new(0);

fn options() -> Options {
    Options {
        granularity_bytes: BLOCK as u32,
        region_bytes: 4 * BLOCK as u32,
        max_ids: MAX_IDS,
        enable: true,
        now_unix_ms: || 1_000_000,
        ..Options::default()
    }
}

fn stamped(stamp: u64) -> Identity {
    Identity { stamp: Some(stamp.to_string()), ..Identity::default() }
}

#[derive(Clone, Debug)]
enum Step {
    Write { first: u64, count: u64 },
    Zero { first: u64, count: u64 },
    Seal,
    Freeze,
    Save,
    Stop,
    Crash,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = (0..BLOCKS, 1..20u64);
    let step = prop_oneof![
        8 => range.clone().prop_map(|(first, count)| Step::Write { first, count }),
        2 => range.prop_map(|(first, count)| Step::Zero { first, count }),
        2 => Just(Step::Seal),
        1 => Just(Step::Freeze),
        1 => Just(Step::Save),
        1 => Just(Step::Stop),
        1 => Just(Step::Crash),
    ];
    proptest::collection::vec(step, 1..60)
}

/// An id with what the model says was written since.
struct Known {
    id: String,
    since: Vec<bool>,
    /// No crash since: the answer is exactly this.
    exact: bool,
}

fn known(id: String) -> Known {
    Known { id, since: vec![false; BLOCKS as usize], exact: true }
}

fn open(device: &Arc<VersionDisk>, store: &Arc<MemoryStore>, stamp: u64) -> TrackedDisk {
    TrackedDisk::open(device.clone(), store.clone(), &stamped(stamp), options()).unwrap()
}

fn run(steps: Vec<Step>) {
    let store = Arc::new(MemoryStore::new(Files::default(), Log::default()));
    let device = Arc::new(VersionDisk::new(vec![0; BLOCKS as usize], Log::default()));
    let mut disk = open(&device, &store, 0);
    let mut ids = vec![known(disk.state().most_recent_id)];
    let (mut version, mut stamp) = (0, 0);
    for step in steps {
        version += 1;
        match step {
            Step::Write { first, count } | Step::Zero { first, count } => {
                let count = count.min(BLOCKS - first);
                match step {
                    Step::Write { .. } => {
                        disk.write_at(&data(version, count), first * BLOCK).unwrap()
                    }
                    _ => disk.write_zeroes(ByteRange::new(first * BLOCK, count * BLOCK)).unwrap(),
                }
                for known in &mut ids {
                    known.since[first as usize..(first + count) as usize].fill(true);
                }
            }
            Step::Seal => ids.push(known(disk.checkpoint().unwrap().to_string())),
            Step::Freeze => {
                let view = disk.freeze().unwrap();
                let id = view.id().unwrap().to_string();
                let newest = ids.last().unwrap();
                let again = id == newest.id;
                // The newest id again where it is of this moment, and only there; after a crash more may look written.
                assert!(!again || !newest.since.contains(&true), "{id}");
                assert!(again || !newest.exact || newest.since.contains(&true), "{id}");
                if !again {
                    ids.push(known(id));
                }
            }
            Step::Save => disk.save().unwrap(),
            Step::Stop => {
                stamp += 1;
                disk.close(|| Ok(Some(stamp.to_string()))).unwrap();
                disk = open(&device, &store, stamp);
            }
            Step::Crash => {
                drop(disk);
                disk = open(&device, &store, stamp);
                // The newest id's set is coarse from now on, and so is that of all before it.
                ids.iter_mut().for_each(|known| known.exact = false);
            }
        }
        let retired = ids.len().saturating_sub(MAX_IDS);
        for (index, known) in ids.iter().enumerate() {
            let answer = changed_blocks(&disk, &known.id);
            if index < retired {
                assert!(matches!(answer, Err(TrackError::UnknownId { .. })), "{:?}", answer);
                continue;
            }
            let changed = answer.unwrap();
            if known.exact {
                assert_eq!(changed, known.since, "{}", known.id);
            } else {
                assert!(
                    known.since.iter().zip(&changed).all(|(truth, changed)| *changed || !truth)
                );
            }
        }
        let newest = ids.last().unwrap();
        let state = disk.state();
        assert_eq!(state.most_recent_id, newest.id);
        assert!(state.newer_changes || !newest.since.contains(&true));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn the_disk_answers_as_the_model_does(steps in steps()) {
        run(steps);
    }
}

fn fresh() -> (Arc<VersionDisk>, Arc<MemoryStore>) {
    let store = Arc::new(MemoryStore::new(Files::default(), Log::default()));
    (Arc::new(VersionDisk::new(vec![0; BLOCKS as usize], Log::default())), store)
}

#[test]
fn ids_grow_old_but_the_newest_stays() {
    let (device, store) = fresh();
    let aging = Options {
        max_age_ms: Some(MAX_AGE_MS),
        now_unix_ms: || NOW_MS.load(Ordering::SeqCst),
        ..options()
    };
    let disk = TrackedDisk::open(device, store, &stamped(0), aging).unwrap();
    let first = disk.state().most_recent_id;
    NOW_MS.store(MAX_AGE_MS, Ordering::SeqCst);
    let second = disk.checkpoint().unwrap().to_string();
    assert!(changed_blocks(&disk, &first).is_ok(), "as old as it may be");
    NOW_MS.store(5 * MAX_AGE_MS, Ordering::SeqCst);
    let third = disk.checkpoint().unwrap().to_string();
    assert!(changed_blocks(&disk, &third).is_ok());
    for old in [first, second] {
        assert!(matches!(changed_blocks(&disk, &old), Err(TrackError::UnknownId { .. })));
    }
}

#[test]
fn what_is_no_id_is_unknown_and_what_is_off_says_so() {
    let (device, store) = fresh();
    let off = Options { enable: false, ..options() };
    let disk = TrackedDisk::open(device, store.clone(), &stamped(0), off).unwrap();
    let longest = "y".repeat(255);
    let garbage = ["", "x", "rctX:", "\u{0}\u{7f}é", longest.as_str()];
    for text in garbage {
        assert!(matches!(changed_blocks(&disk, text), Err(TrackError::Disabled { .. })));
    }
    assert_eq!(disk.state(), vmtide_track::TrackingState::default());
    assert!(matches!(disk.checkpoint(), Err(TrackError::Disabled { .. })));
    disk.enable().unwrap();
    let id = disk.state().most_recent_id;
    disk.enable().unwrap();
    assert_eq!(disk.state().most_recent_id, id, "what is on stays as it is");
    for text in garbage {
        let error = changed_blocks(&disk, text).unwrap_err();
        assert!(matches!(error, TrackError::UnknownId { .. }), "{error}");
        assert!(!error.to_string().contains('\u{0}') && error.to_string().len() < 250, "{error}");
    }
    let outside = disk.changes_since(&id, ByteRange::new(BLOCKS * BLOCK, 1), 1);
    assert!(outside.is_err());
    disk.disable().unwrap();
    assert!(store.files.lock().unwrap().files.is_empty());
    assert!(matches!(changed_blocks(&disk, &id), Err(TrackError::Disabled { .. })));
}

#[test]
fn a_disk_that_was_changed_offline_or_resized_has_lost_its_ids() {
    let (device, store) = fresh();
    let disk = open(&device, &store, 0);
    let id = disk.state().most_recent_id;
    disk.close(|| Ok(Some("1".into()))).unwrap();
    assert!(disk.write_at(&data(1, 1), 0).is_err(), "nothing is written after the stop");
    let lost = |disk: &TrackedDisk, word: &str| match changed_blocks(disk, &id) {
        Err(TrackError::Lost { reason, .. }) => assert!(reason.contains(word), "{reason}"),
        other => panic!("{other:?}"),
    };
    let disk = open(&device, &store, 2);
    lost(&disk, "changed or copied");
    let newer = disk.state().most_recent_id;
    assert!(changed_blocks(&disk, &newer).is_ok() && newer != id);
    disk.close(|| Ok(Some("3".into()))).unwrap();
    // The reason is kept.
    lost(&open(&device, &store, 3), "changed or copied");
    device.resize((BLOCKS + 1) * BLOCK).unwrap();
    let disk = open(&device, &store, 3);
    match changed_blocks(&disk, &newer) {
        Err(TrackError::Lost { reason, .. }) => assert!(reason.contains("bytes now"), "{reason}"),
        other => panic!("{other:?}"),
    }
    let before = disk.state().most_recent_id;
    disk.resize((BLOCKS + 2) * BLOCK).unwrap();
    assert_eq!(disk.size_bytes(), (BLOCKS + 2) * BLOCK);
    assert!(matches!(changed_blocks(&disk, &before), Err(TrackError::Lost { .. })));
    disk.write_at(&data(9, 1), (BLOCKS + 1) * BLOCK).unwrap();
    let since = changed_blocks(&disk, &disk.state().most_recent_id).unwrap();
    assert_eq!(since.iter().filter(|changed| **changed).count(), 1);
}

#[test]
fn where_nothing_can_be_marked_nothing_is_written() {
    let (device, store) = fresh();
    let disk = open(&device, &store, 0);
    let id = disk.checkpoint().unwrap().to_string();
    disk.write_at(&data(1, 1), 0).unwrap();
    *store.broken.lock().unwrap() = true;
    assert!(disk.checkpoint().is_err(), "an id that is not durable is not given out");
    assert_eq!(disk.state().most_recent_id, id);
    let changed = changed_blocks(&disk, &id).unwrap();
    assert!(changed[0], "what was written before is still known");
    // A region without a mark: neither can it be marked, nor tracking be given up.
    let far = BLOCKS - 1;
    assert!(disk.write_at(&data(2, 1), far * BLOCK).is_err());
    assert_eq!(device.blocks.lock().unwrap()[far as usize], 0);
    *store.broken.lock().unwrap() = false;
    disk.write_at(&data(3, 1), far * BLOCK).unwrap();
    assert!(changed_blocks(&disk, &id).unwrap()[far as usize]);
    let next = disk.checkpoint().unwrap().to_string();
    assert!(next > id);
    assert!(changed_blocks(&disk, &next).unwrap().iter().all(|changed| !changed));
}

#[test]
fn where_marks_fail_tracking_ends_and_the_guest_goes_on() {
    let (device, store) = fresh();
    let disk = open(&device, &store, 0);
    let id = disk.checkpoint().unwrap().to_string();
    *store.marks_broken.lock().unwrap() = true;
    disk.write_at(&data(1, 1), 0).unwrap();
    assert_eq!(device.blocks.lock().unwrap()[0], 1);
    assert!(!disk.state().enabled);
    assert!(matches!(changed_blocks(&disk, &id), Err(TrackError::Lost { .. })));
    assert!(matches!(disk.checkpoint(), Err(TrackError::Lost { .. })));
    disk.save().unwrap();
    assert!(
        !store.files.lock().unwrap().files.contains_key(&StoreFile::Rct),
        "nothing to believe is left"
    );
    *store.marks_broken.lock().unwrap() = false;
    disk.enable().unwrap();
    let newer = disk.state().most_recent_id;
    assert!(changed_blocks(&disk, &newer).is_ok());
    assert!(
        matches!(changed_blocks(&disk, &id), Err(TrackError::Lost { .. })),
        "the reason is kept"
    );
}

/// An id of the same series with another number.
fn with_counter(id: &str, counter: u32) -> String {
    format!("{}{counter:08}", &id[..id.len() - 8])
}

#[test]
fn an_id_is_nobodys_before_it_is_durable_and_names_one_moment_alone() {
    let (device, store) = fresh();
    let disk = Arc::new(open(&device, &store, 0));
    let first = disk.state().most_recent_id;
    let pending = with_counter(&first, 2);
    // What another thread sees, and what a crash leaves, while the id is not saved yet.
    let seen = Arc::new(std::sync::Mutex::new(None));
    let (to, asked, id) = (Arc::clone(&seen), Arc::downgrade(&disk), pending.clone());
    let files = Arc::downgrade(&store);
    *device.before_flush.lock().unwrap() = Some(Box::new(move || {
        let disk = asked.upgrade().unwrap();
        let left = files.upgrade().unwrap().files.lock().unwrap().clone();
        *to.lock().unwrap() = Some((disk.state(), changed_blocks(&disk, &id), left));
    }));
    disk.write_at(&data(1, 1), 0).unwrap();
    assert_eq!(disk.checkpoint().unwrap().to_string(), pending);
    *device.before_flush.lock().unwrap() = None;
    let (state, answer, left) = seen.lock().unwrap().take().unwrap();
    assert_eq!(state.most_recent_id, first);
    assert!(state.enabled && state.newer_changes);
    assert!(matches!(answer, Err(TrackError::UnknownId { .. })), "{answer:?}");
    assert_eq!(disk.state().most_recent_id, pending);
    assert!(changed_blocks(&disk, &pending).is_ok());
    // After that crash the number is left out: a medium that loses a rename may have shown it.
    let store = Arc::new(MemoryStore::new(left, Log::default()));
    let crashed = open(&device, &store, 0);
    assert!(changed_blocks(&crashed, &first).unwrap()[0]);
    let next = crashed.checkpoint().unwrap().to_string();
    assert_eq!(next, with_counter(&first, 3));
    assert!(matches!(changed_blocks(&crashed, &pending), Err(TrackError::UnknownId { .. })));
}

#[test]
fn a_seal_that_fails_retires_nothing() {
    let (device, store) = fresh();
    let one = Options { max_ids: 1, ..options() };
    let disk = TrackedDisk::open(device, store.clone(), &stamped(0), one).unwrap();
    let id = disk.state().most_recent_id;
    disk.write_at(&data(1, 1), 7 * BLOCK).unwrap();
    *store.broken.lock().unwrap() = true;
    assert!(disk.checkpoint().is_err());
    *store.broken.lock().unwrap() = false;
    assert_eq!(disk.state().most_recent_id, id);
    assert!(changed_blocks(&disk, &id).unwrap()[7]);
    let next = disk.checkpoint().unwrap().to_string();
    assert!(matches!(changed_blocks(&disk, &id), Err(TrackError::UnknownId { .. })));
    assert!(changed_blocks(&disk, &next).is_ok());
}

#[test]
fn freezes_of_a_disk_at_rest_retire_no_ids() {
    /// The time of this test.
    static NOW: AtomicU64 = AtomicU64::new(0);
    let (device, store) = fresh();
    let aging = Options {
        max_age_ms: Some(MAX_AGE_MS),
        now_unix_ms: || NOW.load(Ordering::SeqCst),
        ..options()
    };
    let disk = TrackedDisk::open(device, store, &stamped(0), aging).unwrap();
    let first = disk.state().most_recent_id;
    disk.write_at(&data(1, 1), 0).unwrap();
    let frozen = || disk.freeze().unwrap().id().unwrap().to_string();
    let second = frozen();
    assert!(second > first);
    for _ in 0..3 * MAX_IDS {
        assert_eq!(frozen(), second);
    }
    assert!(changed_blocks(&disk, &first).unwrap()[0], "not retired");
    // An id that was given out again is as young as that.
    NOW.store(5 * MAX_AGE_MS, Ordering::SeqCst);
    assert_eq!(frozen(), second);
    disk.write_at(&data(2, 1), BLOCK).unwrap();
    let third = frozen();
    assert!(third > second);
    let since = changed_blocks(&disk, &second).unwrap();
    assert!(since[1] && !since[0]);
    // A checkpoint is one of its own.
    assert!(disk.checkpoint().unwrap().to_string() > third);
}

#[test]
fn files_of_another_program_are_left_alone() {
    let foreign = Files {
        files: [(StoreFile::Rct, vec![0x5a; 5000]), (StoreFile::Mrt, b"mrt of others".to_vec())]
            .into(),
    };
    let only_marks = Files { files: [(StoreFile::Mrt, vec![7; 512])].into() };
    for files in [foreign, only_marks] {
        let (device, _) = fresh();
        let store = Arc::new(MemoryStore::new(files.clone(), Log::default()));
        let open = |enable| {
            let options = Options { enable, ..options() };
            TrackedDisk::open(device.clone(), store.clone(), &stamped(0), options)
        };
        assert!(matches!(open(true), Err(TrackError::Unsupported { .. })));
        let disk = open(false).unwrap();
        assert!(!disk.state().enabled);
        disk.write_at(&data(1, 1), 0).unwrap();
        assert!(matches!(disk.enable(), Err(TrackError::Unsupported { .. })));
        assert!(matches!(disk.disable(), Err(TrackError::Unsupported { .. })));
        assert_eq!(disk.freeze().unwrap().id(), None);
        disk.save().unwrap();
        disk.close(|| Ok(Some("1".into()))).unwrap();
        assert!(*store.files.lock().unwrap() == files && store.log.lock().unwrap().is_empty());
    }
    // Ours without a readable mark: empty, zero, or beside one that has it.
    for rct in [Vec::new(), vec![0; 300], vec![0x5a; 300]] {
        let (device, store) = fresh();
        drop(open(&device, &store, 0));
        store.files.lock().unwrap().files.insert(StoreFile::Rct, rct);
        assert!(open(&device, &store, 0).state().enabled);
    }
}
