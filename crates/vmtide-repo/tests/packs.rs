//! Packs end when they are full, however the new data lies on the disk.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use crate::common;

use common::{Disk, repository, store_point};
use std::sync::Arc;
use vmtide_block::BlockDevice;
use vmtide_repo::{ChangedRanges, DiskPlan, Level, MemoryStore, ObjectStore};

const ISLANDS: usize = 64;
const ISLAND_BYTES: usize = 64 << 10;
/// Farther than what counts as written together.
const DISTANCE_BYTES: usize = 2 << 20;

/// Bytes that do not compress, the same for the same seed.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect()
}

#[test]
fn scattered_data_fills_packs_too() {
    let mut content = vec![0; ISLANDS * DISTANCE_BYTES];
    for island in 0..ISLANDS {
        let start = island * DISTANCE_BYTES;
        content[start..start + ISLAND_BYTES]
            .copy_from_slice(&noise(island as u64 + 1, ISLAND_BYTES));
    }
    let store: Arc<dyn ObjectStore> = Arc::new(MemoryStore::new());
    let repository = repository(&store, true);
    let plan = DiskPlan { id: "disk".into(), base: None, changed: ChangedRanges::Everything };
    let point = store_point(&repository, &Disk::new(content.clone()), &plan, Level::Full).unwrap();

    let mut packs = Vec::new();
    store
        .list("packs/", &mut |entry| {
            packs.push(entry.length_bytes);
            Ok(())
        })
        .unwrap();
    // The tests' packs are full at 256 KiB; the chunk that finds a pack full still goes into it.
    let longest = packs.iter().max().copied().unwrap();
    assert!(longest <= (256 + 2 * 64 + 16) << 10, "a pack of {longest} bytes among {packs:?}");
    assert!(packs.len() >= ISLANDS * ISLAND_BYTES / (512 << 10), "only {} packs", packs.len());

    let disk = repository.open_disk(&point, "disk").unwrap();
    let mut read = vec![0; content.len()];
    disk.read_at(&mut read, 0).unwrap();
    assert!(read == content, "what was read differs");
}
