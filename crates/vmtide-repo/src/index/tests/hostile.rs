//! Segments whose bytes were changed or cut.

use super::*;
use crate::index::segment::{IndexCache, IndexSegment};
use crate::{RepoError, Result};

const COUNT: u64 = 400;

fn sample(sealed: bool) -> (MemoryStore, Arc<RepoContext>, ObjectId) {
    let store = MemoryStore::default();
    let ctx = context(&store, sealed);
    add_segment(&ctx, 0..COUNT);
    let id = ChunkIndex::list(&ctx).unwrap()[0];
    (store, ctx, id)
}

/// Looks up everything in the one segment.
fn read(ctx: &RepoContext, id: ObjectId) -> Result<()> {
    let segment = IndexSegment::open(ctx, id)?;
    let cache = IndexCache::new(16);
    for number in 0..COUNT {
        assert_eq!(segment.lookup(&key(number), &cache, 0)?, Some(place(number)));
    }
    Ok(())
}

fn is_refusal(error: &RepoError) -> bool {
    matches!(error, RepoError::Damaged { .. } | RepoError::Unsupported { .. })
}

#[test]
fn every_changed_byte_is_found() {
    for sealed in [false, true] {
        let (store, ctx, id) = sample(sealed);
        read(&ctx, id).unwrap();
        let name = ObjectKind::IndexSegment.object_name(id);
        let good = store.bytes(&name).unwrap();
        for at in 0..good.len() {
            let mut bad = good.to_vec();
            bad[at] ^= 1 << (at % 8);
            store.replace(&name, &bad);
            let error = read(&ctx, id).expect_err("a changed byte went unnoticed");
            assert!(is_refusal(&error), "byte {at}: {error}");
        }
    }
}

#[test]
fn every_cut_is_found() {
    for sealed in [false, true] {
        let (store, ctx, id) = sample(sealed);
        let name = ObjectKind::IndexSegment.object_name(id);
        let good = store.bytes(&name).unwrap();
        for length in 0..good.len() {
            store.replace(&name, &good[..length]);
            assert!(is_refusal(&read(&ctx, id).unwrap_err()), "cut to {length}");
        }
    }
}

#[test]
fn a_damaged_segment_costs_deduplication_and_nothing_else() {
    let (store, ctx, id) = sample(true);
    add_segment(&ctx, 1000..1400);
    let name = ObjectKind::IndexSegment.object_name(id);
    let good = store.bytes(&name).unwrap();
    // Its directory: passed over when opened.
    let mut bad = good.to_vec();
    *bad.last_mut().unwrap() ^= 1;
    store.replace(&name, &bad);
    let index = ChunkIndex::open(&ctx).unwrap();
    assert_eq!(index.skipped().len(), 1);
    assert_eq!(index.skipped()[0].0, id);
    assert_knows(&index, 1000..1400);
    assert_eq!(index.lookup(&key(3)).unwrap(), None);
    // A page: found when it is read; what other segments know is still known.
    let mut bad = good.to_vec();
    bad[70] ^= 1;
    store.replace(&name, &bad);
    let index = ChunkIndex::open(&ctx).unwrap();
    assert!(index.skipped().is_empty());
    let known = (0..COUNT).filter(|&n| index.lookup(&key(n)).unwrap().is_some()).count();
    assert!(known < 400);
    assert_knows(&index, 1000..1400);
    // And merged away: what was before the damage, here nothing, and all of the others.
    for part in 0..32 {
        add_segment(&ctx, 2000 + part * 100..2100 + part * 100);
    }
    let index = ChunkIndex::open(&ctx).unwrap();
    index.compact().unwrap().unwrap();
    let index = ChunkIndex::open(&ctx).unwrap();
    assert!(index.superseded().contains(&id));
    assert_knows(&index, 1000..1400);
    assert_knows(&index, 2000..5200);
    assert_eq!(index.lookup(&key(3)).unwrap(), None);
}

#[test]
fn a_page_moved_or_a_segment_renamed_is_found() {
    let (store, ctx, id) = sample(true);
    let name = ObjectKind::IndexSegment.object_name(id);
    let good = store.bytes(&name).unwrap();
    // The same bytes under another name.
    let other = ObjectId([0xab; 16]);
    store.replace(&ObjectKind::IndexSegment.object_name(other), &good);
    assert!(read(&ctx, other).unwrap_err().is_damage());
    // Two whole pages exchanged.
    let mut bad = good.to_vec();
    bad.copy_within(64..64 + 4096, 64 + 4096);
    bad[64..64 + 4096].copy_from_slice(&good[64 + 4096..64 + 8192]);
    store.replace(&name, &bad);
    assert!(read(&ctx, id).unwrap_err().is_damage());
}
