//! The map against a plain vector of targets, and against bytes that are not what was written.

#![allow(clippy::cast_possible_truncation, reason = "small numbers, made here")]

mod hostile;
mod model;
mod speed;

use super::{BaseMap, DiskMap, MapBuilder, MapRun, Target, write_layered};
use crate::context::RepoContext;
use crate::crypto::MasterKey;
use crate::store::MemoryStore;
use crate::{ObjectId, Result};
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

fn pack(number: u8) -> ObjectId {
    ObjectId([number; 16])
}

fn data(first_block: u64, count: u64, pack_number: u8, ordinal: u32) -> MapRun {
    MapRun { first_block, count, target: Target::Data { pack: pack(pack_number), ordinal } }
}

fn write(
    ctx: &Arc<RepoContext>,
    base: BaseMap<'_>,
    runs: &[MapRun],
    blocks: u64,
) -> Result<Vec<ObjectId>> {
    let builder = MapBuilder::new(Arc::clone(ctx));
    runs.iter().try_for_each(|&run| builder.push(run))?;
    write_layered(ctx, base, builder, blocks)
}

/// The target of every block, from runs that must cover exactly `blocks`.
fn targets(runs: &[MapRun], blocks: std::ops::Range<u64>) -> Vec<Target> {
    let mut position = blocks.start;
    let mut targets = Vec::new();
    for run in runs {
        assert_eq!(run.first_block, position, "a gap or an overlap");
        assert!(run.count > 0);
        position = run.end();
        targets.extend((run.first_block..position).map(|block| run.cut(block, 1).target));
    }
    assert_eq!(position, blocks.end);
    targets
}

#[test]
fn a_map_without_segments_is_zero() {
    let store = MemoryStore::default();
    let ctx = context(&store, true);
    assert_eq!(write(&ctx, BaseMap::default(), &[], 100).unwrap(), []);
    let zeros = [MapRun::zero(0..100)];
    assert_eq!(write(&ctx, BaseMap::default(), &zeros, 100).unwrap(), []);
    let map = DiskMap::open(&ctx, &[], 100).unwrap();
    assert_eq!(map.lookup(10..20).unwrap(), [MapRun::zero(10..20)]);
    assert_eq!(map.lookup(100..100).unwrap(), []);
    assert!(map.lookup(90..101).is_err());
}

#[test]
fn neighbours_in_a_pack_become_one_run_in_whatever_order_they_come() {
    let store = MemoryStore::default();
    let ctx = context(&store, true);
    let runs = [data(32, 16, 1, 32), data(0, 16, 1, 0), data(48, 8, 2, 0), data(16, 16, 1, 16)];
    let ids = write(&ctx, BaseMap::default(), &runs, 100).unwrap();
    let map = DiskMap::open(&ctx, &ids, 100).unwrap();
    assert_eq!(map.segments()[0].run_count(), 2);
    assert_eq!(map.segments()[0].packs(), [pack(1), pack(2)]);
    assert_eq!(
        map.lookup(0..100).unwrap(),
        [data(0, 48, 1, 0), data(48, 8, 2, 0), MapRun::zero(56..100)]
    );
}

#[test]
fn an_empty_change_shares_the_base_and_writes_nothing() {
    let store = MemoryStore::default();
    let ctx = context(&store, true);
    let ids = write(&ctx, BaseMap::default(), &[data(0, 4, 1, 0)], 10).unwrap();
    let before = store.names();
    let base = BaseMap { segments: &ids, blocks: 10 };
    for blocks in [10, 5, 20] {
        assert_eq!(write(&ctx, base, &[], blocks).unwrap(), ids);
    }
    assert_eq!(store.names(), before);
}

#[test]
fn a_disk_that_shrank_and_grew_does_not_see_what_it_lost() {
    let store = MemoryStore::default();
    let ctx = context(&store, true);
    let scattered: Vec<_> = (0..50).map(|n| data(n * 2, 1, 1, 3 * n as u32)).collect();
    let full = write(&ctx, BaseMap::default(), &scattered, 100).unwrap();
    let base = |segments, blocks| BaseMap { segments, blocks };
    let shrunk = write(&ctx, base(&full, 100), &[data(3, 1, 2, 0)], 30).unwrap();
    assert_eq!(shrunk.len(), 2, "the large segment is shared");
    let grown = write(&ctx, base(&shrunk, 30), &[data(60, 1, 3, 0)], 100).unwrap();
    let map = DiskMap::open(&ctx, &grown, 100).unwrap();
    let found = map.lookup(30..100).unwrap();
    assert_eq!(found, [MapRun::zero(30..60), data(60, 1, 3, 0), MapRun::zero(61..100)]);
    // And so while the new map is being made.
    let while_growing = DiskMap::open(&ctx, &shrunk, 30).unwrap().resized(100);
    assert_eq!(while_growing.lookup(29..100).unwrap(), [MapRun::zero(29..100)]);
    let mut changed = Vec::new();
    let older = DiskMap::open(&ctx, &shrunk, 30).unwrap();
    DiskMap::diff(&older, &map, &mut |range| {
        changed.push(range);
        Ok(())
    })
    .unwrap();
    assert_eq!((changed.len(), changed.first()), (1, Some(&(60..61))));
}

#[test]
fn segments_stay_few_and_metadata_small_over_many_increments() {
    let store = MemoryStore::default();
    let ctx = context(&store, true);
    let blocks = 1 << 20;
    let scattered: Vec<_> =
        (0..50_000u32).map(|n| data(u64::from(n) * 20, 10, 1, n.wrapping_mul(77))).collect();
    let mut ids = write(&ctx, BaseMap::default(), &scattered, blocks).unwrap();
    let full_bytes = store.bytes(&format!("maps/{}", ids[0])).unwrap().len();
    let mut written = 0;
    for cycle in 0..300u64 {
        let runs: Vec<_> = (0..20)
            .map(|n| data((cycle * 7919 + n * 50_021) % blocks, 1, 2, n as u32 * 5))
            .collect();
        let base = BaseMap { segments: &ids, blocks };
        let next = write(&ctx, base, &runs, blocks).unwrap();
        assert!(next.len() <= 12, "{} segments in cycle {cycle}", next.len());
        let map = DiskMap::open(&ctx, &next, blocks).unwrap();
        for pair in map.segments().windows(2) {
            assert!(pair[1].run_count() > 2 * pair[0].run_count());
        }
        written += store.bytes(&format!("maps/{}", next[0])).unwrap().len();
        ids = next;
    }
    // 20 runs of some 8 bytes; each rewritten a few times, and the large segment left alone.
    assert!(written / 300 < 2000, "{} bytes per increment", written / 300);
    assert!(written < full_bytes * 3, "{written} against {full_bytes}");
}

#[test]
fn a_small_memory_spills_and_answers_the_same() {
    let store = MemoryStore::default();
    let ctx = context(&store, true);
    let runs: Vec<_> = (0..1000u32)
        .map(|n| {
            let n = (n * 617) % 1000;
            data(u64::from(n) * 3, 2, (n % 5) as u8, n * 9)
        })
        .collect();
    let small = MapBuilder::with_limit(Arc::clone(&ctx), 64);
    std::thread::scope(|scope| {
        for part in runs.chunks(250) {
            let small = &small;
            scope.spawn(move || part.iter().for_each(|&run| small.push(run).unwrap()));
        }
    });
    assert!(store.names().len() > 10, "it spilled");
    let spilled = write_layered(&ctx, BaseMap::default(), small, 3000).unwrap();
    assert_eq!(store.names().len(), 1, "and cleaned up");
    let whole = write(&ctx, BaseMap::default(), &runs, 3000).unwrap();
    let all = |ids: &[ObjectId]| DiskMap::open(&ctx, ids, 3000).unwrap().lookup(0..3000);
    assert_eq!(all(&spilled).unwrap(), all(&whole).unwrap());
}

#[test]
fn what_cannot_be_a_map_is_refused() {
    let store = MemoryStore::default();
    let ctx = context(&store, true);
    let refused = [
        vec![data(0, 0, 1, 0)],
        vec![data(0, 2, 1, u32::MAX)],
        vec![data(1 << 48, 1, 1, 0)],
        vec![data(0, 4, 1, 0), data(3, 1, 2, 0)],
        vec![data(9, 2, 1, 0)],
    ];
    for runs in refused {
        assert!(write(&ctx, BaseMap::default(), &runs, 10).is_err(), "{runs:?}");
    }
    assert_eq!(store.names(), Vec::<String>::new());
    let too_many = vec![ObjectId([1; 16]); 65];
    assert!(DiskMap::open(&ctx, &too_many, 10).is_err());
    let missing = DiskMap::open(&ctx, &too_many[..1], 10).unwrap_err();
    assert!(missing.is_damage() && missing.to_string().contains("missing"), "{missing}");
}
