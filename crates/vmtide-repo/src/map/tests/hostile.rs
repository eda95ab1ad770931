//! Segments whose bytes were changed, cut or made up.

use super::*;
use crate::RepoError;
use crate::map::MAX_BLOCKS;
use crate::map::page::{PageBounds, parse_map_page};
use proptest::prelude::*;

fn sample(sealed: bool) -> (MemoryStore, Arc<RepoContext>, ObjectId, Vec<MapRun>) {
    let store = MemoryStore::default();
    let ctx = context(&store, sealed);
    let runs: Vec<_> = (0..40).map(|n| data(u64::from(n) * 3, 2, (n % 3) as u8, n * 7)).collect();
    let ids = write(&ctx, BaseMap::default(), &runs, 120).unwrap();
    let found = DiskMap::open(&ctx, &ids, 120).unwrap().lookup(0..120);
    (store, ctx, ids[0], found.unwrap())
}

fn read(ctx: &RepoContext, id: ObjectId) -> Result<Vec<MapRun>> {
    DiskMap::open(ctx, &[id], 120)?.lookup(0..120)
}

fn is_refusal(error: &RepoError) -> bool {
    matches!(error, RepoError::Damaged { .. } | RepoError::Unsupported { .. })
}

#[test]
fn every_flipped_bit_is_found() {
    for sealed in [false, true] {
        let (store, ctx, id, _) = sample(sealed);
        let name = format!("maps/{id}");
        let good = store.bytes(&name).unwrap();
        for at in 0..good.len() {
            for bit in [1, 0x80] {
                let mut bad = good.to_vec();
                bad[at] ^= bit;
                store.replace(&name, &bad);
                let error = read(&ctx, id).expect_err("byte {at} changed unnoticed");
                assert!(is_refusal(&error), "byte {at}: {error}");
            }
        }
    }
}

#[test]
fn every_cut_and_every_tail_is_found() {
    for sealed in [false, true] {
        let (store, ctx, id, _) = sample(sealed);
        let name = format!("maps/{id}");
        let good = store.bytes(&name).unwrap();
        for length in 0..good.len() {
            store.replace(&name, &good[..length]);
            assert!(is_refusal(&read(&ctx, id).unwrap_err()), "cut to {length}");
        }
        store.replace(&name, &[&good[..], &[0]].concat());
        assert!(is_refusal(&read(&ctx, id).unwrap_err()));
    }
}

#[test]
fn a_page_dropped_or_relabelled_without_the_key_is_found() {
    // Who can write to the repository can make the unkeyed hashes right, but not the sealed tables.
    let store = MemoryStore::default();
    let ctx = context(&store, true);
    let runs: Vec<_> = (0..5000).map(|n| data(u64::from(n) * 2, 1, 1, n * 3)).collect();
    let id = write(&ctx, BaseMap::default(), &runs, 10_000).unwrap()[0];
    let kind = crate::envelope::ObjectKind::MapSegment;
    let name = kind.object_name(id);
    let good = store.bytes(&name).unwrap();
    let opened = ctx.open_object(kind, id).unwrap();
    assert_eq!(opened.trailer.first_count, 2);
    let body_end = usize::try_from(opened.trailer.directory_offset).unwrap();
    let forge = |directory: &[u8], body_end: usize, pages: u32| {
        let trailer = crate::envelope::Trailer {
            directory_offset: body_end as u64,
            directory_length: directory.len() as u64,
            first_count: pages,
            second_count: 1,
        };
        let tail = trailer.encode(&opened.header, directory);
        store.replace(&name, &[&good[..body_end], directory, &tail].concat());
        DiskMap::open(&ctx, &[id], 10_000).and_then(|map| map.lookup(0..10_000))
    };
    assert_eq!(forge(&opened.directory, body_end, 2).unwrap().len(), 10_000);
    let second =
        usize::try_from(u64::from_le_bytes(opened.directory[64..72].try_into().unwrap())).unwrap();
    let mut dropped = opened.directory.clone();
    dropped.drain(48..96);
    assert!(forge(&dropped, second, 1).unwrap_err().is_damage());
    let mut moved = opened.directory.clone();
    moved[48] += 1;
    moved[56] += 1;
    assert!(forge(&moved, body_end, 2).unwrap_err().is_damage());
}

#[test]
fn impossible_pages_are_refused() {
    let bounds = |first_block, end_block, runs| PageBounds { first_block, end_block, runs };
    let numbers = |values: &[u64]| {
        let mut bytes = Vec::new();
        values.iter().for_each(|&v| crate::leb128::write(v, &mut bytes));
        bytes
    };
    let parse = |values: &[u64], bounds| parse_map_page(&numbers(values), bounds, 2);
    assert!(parse(&[0, 5, 1, 0, 0, 5, 0], bounds(10, 20, 2)).is_ok());
    let refused: [(&[u64], PageBounds); 11] = [
        (&[1, 4, 1, 0, 0, 5, 0], bounds(10, 20, 2)),
        (&[0, 5, 1, 0, 0, 6, 0], bounds(10, 20, 2)),
        (&[0, 5, 1, 0, 0, 4, 0], bounds(10, 20, 2)),
        (&[0, 5, 1, 0, 0, 5, 0, 0], bounds(10, 20, 2)),
        (&[0, 5, 1, 0, 0, 5], bounds(10, 20, 2)),
        (&[0, 0, 1, 0, 0, 10, 0], bounds(10, 20, 2)),
        (&[0, 10, 3, 0], bounds(10, 20, 1)),
        (&[0, 10, u64::MAX, 0], bounds(10, 20, 1)),
        (&[0, 10, 1, u64::from(u32::MAX) - 8], bounds(10, 20, 1)),
        (&[0, 10, 1, u64::MAX], bounds(10, 20, 1)),
        (&[0, u64::MAX, 0], bounds(10, MAX_BLOCKS, 1)),
    ];
    for (values, bounds) in refused {
        assert!(parse(values, bounds).is_err(), "{values:?} in {bounds:?}");
    }
    assert!(parse(&[0, 10, 1, u64::from(u32::MAX) - 9], bounds(10, 20, 1)).is_ok());
    assert!(parse_map_page(&[0x80; 100], bounds(0, 5, 4097), 1).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_page_makes_the_parser_panic(
        bytes in prop::collection::vec(prop_oneof![0u8..4, any::<u8>()], 0..200),
        first in 0u64..100, length in 1u64..500, runs in 1u32..40,
    ) {
        let bounds = PageBounds { first_block: first, end_block: first + length, runs };
        if let Ok(runs) = parse_map_page(&bytes, bounds, 2) {
            prop_assert_eq!(runs.first().unwrap().first_block, first);
            prop_assert_eq!(runs.last().unwrap().end(), first + length);
        }
    }
}
