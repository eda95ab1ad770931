//! The index against an ordinary map, and against bytes that are not what was written.

#![allow(clippy::cast_possible_truncation, reason = "small numbers, made here")]

mod hostile;
mod speed;

use super::{ChunkIndex, Key};
use crate::context::RepoContext;
use crate::crypto::MasterKey;
use crate::envelope::ObjectKind;
use crate::store::{MemoryStore, ObjectStore};
use crate::{Location, ObjectId};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;

fn context(store: &MemoryStore, sealed: bool) -> Arc<RepoContext> {
    Arc::new(RepoContext {
        store: Arc::new(store.clone()),
        subkeys: MasterKey::from_bytes([7; 32]).subkeys(),
        repository: ObjectId([9; 16]),
        chunk_size_bytes: 65536,
        sealed,
        retention: None,
        damage: crate::context::DamageLog::default(),
        points: crate::point_list::PointCache::default(),
    })
}

fn key(number: u64) -> Key {
    let hash = blake3::hash(&number.to_le_bytes());
    hash.as_bytes()[..16].try_into().unwrap()
}

fn place(number: u64) -> Location {
    let pack = ObjectId([(number % 200) as u8; 16]);
    Location { pack, ordinal: (number / 200) as u32 }
}

fn entries(numbers: std::ops::Range<u64>) -> Vec<(Key, Location)> {
    numbers.map(|number| (key(number), place(number))).collect()
}

fn add_segment(ctx: &Arc<RepoContext>, numbers: std::ops::Range<u64>) {
    ChunkIndex::open(ctx).unwrap().add(entries(numbers)).unwrap();
}

fn assert_knows(index: &ChunkIndex, numbers: std::ops::Range<u64>) {
    for number in numbers {
        assert_eq!(index.lookup(&key(number)).unwrap(), Some(place(number)), "{number}");
    }
}

#[test]
fn an_empty_repository_knows_nothing() {
    let ctx = context(&MemoryStore::default(), true);
    let index = ChunkIndex::open(&ctx).unwrap();
    assert_eq!(index.lookup(&key(1)).unwrap(), None);
    index.add(Vec::new()).unwrap();
    assert_eq!(ChunkIndex::list(&ctx).unwrap(), []);
    assert_eq!(index.compact().unwrap(), None);
}

#[test]
fn what_is_added_is_known_at_once_and_later_also_between_threads() {
    let store = MemoryStore::default();
    let ctx = context(&store, true);
    let index = ChunkIndex::open(&ctx).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let index = &index;
            scope.spawn(move || {
                for part in 0..3 {
                    let from = (thread * 3 + part) * 1000;
                    index.add(entries(from..from + 1000)).unwrap();
                    assert_knows(index, from..from + 1000);
                }
            });
        }
    });
    assert_eq!(index.segment_count(), 12);
    assert_knows(&index, 0..12_000);
    let again = ChunkIndex::open(&ctx).unwrap();
    assert_eq!((again.segment_count(), again.entries()), (12, 12_000));
    assert_knows(&again, 0..12_000);
    for number in 12_000..20_000 {
        assert_eq!(again.lookup(&key(number)).unwrap(), None);
    }
}

#[test]
fn small_segments_are_merged_when_they_are_many() {
    let store = MemoryStore::default();
    let ctx = context(&store, true);
    let mut written = 0;
    let mut most = 0;
    add_segment(&ctx, 0..30_000);
    for backup in 0..100u64 {
        let index = ChunkIndex::open(&ctx).unwrap();
        let from = 30_000 + backup * 100;
        index.add(entries(from..from + 110)).unwrap();
        if let Some(id) = index.compact().unwrap() {
            let name = ObjectKind::IndexSegment.object_name(id);
            written += store.bytes(&name).unwrap().len();
        }
        most = most.max(index.segment_count());
        assert!(index.skipped().is_empty());
    }
    assert_eq!(most, 33);
    let index = ChunkIndex::open(&ctx).unwrap();
    assert!(index.segment_count() <= 32);
    assert!(!index.superseded().is_empty());
    assert_knows(&index, 0..40_010);
    // Some 26 bytes are each entry once. Three merges of some 33 segments take all of them once.
    assert!(written < 11_000 * 26 * 5 / 4, "{written} bytes for 11000 entries");
    // What is superseded is not needed.
    for id in index.superseded() {
        store.remove(&ObjectKind::IndexSegment.object_name(*id)).unwrap();
    }
    let index = ChunkIndex::open(&ctx).unwrap();
    assert!(index.superseded().is_empty());
    assert_knows(&index, 0..40_010);
}

#[test]
fn made_anew_it_takes_the_place_of_all() {
    let store = MemoryStore::default();
    let ctx = context(&store, true);
    add_segment(&ctx, 0..500);
    add_segment(&ctx, 500..900);
    store.replace("index/00000000000000000000000000000001", b"not a segment");
    store.replace("index/somebody-elses", b"left alone");
    for batch in [100, 10_000] {
        let old = ChunkIndex::list(&ctx).unwrap();
        let mut rebuild = ChunkIndex::rebuild(&ctx, batch);
        for (key, location) in entries(300..800) {
            rebuild.push(key, location).unwrap();
        }
        let id = rebuild.finish(&old).unwrap().unwrap();
        assert_eq!(ChunkIndex::list(&ctx).unwrap().len(), old.len() + 1);
        let index = ChunkIndex::open(&ctx).unwrap();
        assert_eq!(index.segment_count(), 1);
        assert_knows(&index, 300..800);
        assert_eq!(index.lookup(&key(299)).unwrap(), None);
        for old in old {
            store.remove(&ObjectKind::IndexSegment.object_name(old)).unwrap();
        }
        assert_eq!(ChunkIndex::list(&ctx).unwrap(), [id]);
        assert!(ChunkIndex::open(&ctx).unwrap().skipped().is_empty());
    }
    assert_eq!(ChunkIndex::rebuild(&ctx, 10).finish(&[]).unwrap(), None);
}

#[test]
fn memory_stays_below_64_mib_per_tib_of_unique_chunks() {
    let store = MemoryStore::default();
    let ctx = context(&store, true);
    let count = 1 << 18;
    let index = ChunkIndex::open(&ctx).unwrap();
    let empty = index.memory_bytes();
    assert!(empty < 12 << 20, "{empty} bytes without entries");
    index.add(entries(0..count)).unwrap();
    let bytes = (index.memory_bytes() - empty) as u64;
    let per_tib = bytes * (16 << 20) / count;
    assert!(per_tib + (empty as u64) < 40 << 20, "{per_tib} + {empty} bytes per TiB");
    // While segments are merged the new filter, as large as the old ones, is there too.
    assert!(2 * per_tib + (empty as u64) < 64 << 20);
    let passed =
        (count..2 * count).filter(|&number| index.lookup(&key(number)).unwrap().is_some()).count();
    assert_eq!(passed, 0);
}

#[test]
fn the_filter_lets_few_absent_keys_through() {
    let count = 200_000;
    let mut filter = super::filter::Filter::for_keys(count);
    (0..count).for_each(|number| filter.insert(&key(number)));
    assert!((0..count).all(|number| filter.may_contain(&key(number))));
    let passed = (count..2 * count).filter(|&number| filter.may_contain(&key(number))).count();
    let percent = passed as f64 * 100.0 / count as f64;
    println!("{percent:.2} % of absent keys pass");
    assert!(percent < 0.8, "{percent} % of absent keys pass");
}

#[test]
fn the_filter_is_what_the_format_says() {
    // Key bytes 0..8 big-endian choose one of the lines, bytes 8..16 little-endian the bits.
    let mut filter = super::filter::Filter::for_keys(512 * 3 / 12);
    assert_eq!(filter.line_count(), 3);
    let mut key = [0; 16];
    key[0] = 0xaa; // 0xaa… × 3 >> 64 = 1
    key[8..].copy_from_slice(&(5u64 | 63 << 6 | 1 << 42).to_le_bytes());
    filter.insert(&key);
    let bytes: Vec<u8> = filter.encode_parts(1).flatten().collect();
    let mut expected = vec![0; 192];
    let word = |k: usize| 64 + 8 * k;
    expected[word(0)] = 1 << 5;
    expected[word(1) + 7] = 0x80;
    (2..7).for_each(|k| expected[word(k)] = 1);
    expected[word(7)] = 2;
    assert_eq!(bytes, expected);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Keys that share their first bytes, as no hash would: fences alike, pages that overlap.
    #[test]
    fn an_index_is_a_map(
        segments in prop::collection::vec(prop::collection::vec((0u8..3, 0u16..900), 0..700), 1..20),
        sealed in any::<bool>(),
        compact in any::<bool>(),
    ) {
        let store = MemoryStore::default();
        let ctx = context(&store, sealed);
        let mut model: BTreeMap<Key, Vec<Location>> = BTreeMap::new();
        let crafted = |high: u8, low: u16| {
            let mut key = [0; 16];
            key[0] = high * 127;
            key[14..].copy_from_slice(&low.to_be_bytes());
            key
        };
        for (number, segment) in segments.iter().enumerate() {
            let index = ChunkIndex::open(&ctx).unwrap();
            let entries: Vec<_> = segment.iter().map(|&(high, low)| {
                (crafted(high, low), Location { pack: ObjectId([number as u8; 16]), ordinal: u32::from(low) })
            }).collect();
            for (key, place) in &entries {
                model.entry(*key).or_default().push(*place);
            }
            index.add(entries).unwrap();
            if compact {
                index.compact().unwrap();
            }
        }
        let index = ChunkIndex::open(&ctx).unwrap();
        for high in 0..3 {
            for low in 0..900 {
                let key = crafted(high, low);
                match (index.lookup(&key).unwrap(), model.get(&key)) {
                    (None, None) => {}
                    (Some(found), Some(places)) => prop_assert!(places.contains(&found)),
                    other => prop_assert!(false, "{:?}: {:?}", key, other),
                }
            }
        }
    }
}
