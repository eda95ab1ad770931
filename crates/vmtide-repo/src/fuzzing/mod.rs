//! Ways in for the fuzz targets: hostile bytes to each parser, past the hashes that would stop
//! nearly every mutation. Not a public interface.
//!
//! The unkeyed hashes of an unencrypted object can be made right by anybody who can write to the
//! repository, so what is behind them must stand any bytes as well. None of these may panic, hang
//! or take memory beyond a small multiple of the input. [`seeds`] makes what a run begins with.

mod forge;
mod sections;
mod seed;

pub use sections::{forward, pack, restore_point};
pub use seed::{Seed, seeds};

use crate::config::RepositoryConfig;
use crate::crypto::checksum;
use crate::envelope::ObjectKind;
use crate::id::to_hex;
use crate::index::fuzz_segment;
use crate::map::page::{PageBounds, parse_map_page};
use crate::map::{MAX_BLOCKS, MapSegment};
use forge::forge;

/// One page of a disk map as it is after decompression. The input begins with what the page table
/// says: first block u16, length u32, runs u16, packs u8; the page follows.
pub fn parse_map_page_bytes(input: &[u8]) {
    let Some((head, page)) = input.split_first_chunk::<9>() else { return };
    let first_block = u64::from(u16::from_le_bytes([head[0], head[1]]));
    let length = u64::from(u32::from_le_bytes([head[2], head[3], head[4], head[5]]));
    let runs = u32::from(u16::from_le_bytes([head[6], head[7]]));
    let end_block = (first_block + length.max(1)).min(MAX_BLOCKS);
    let bounds = PageBounds { first_block, end_block, runs: runs.max(1) };
    if let Ok(runs) = parse_map_page(page, bounds, usize::from(head[8])) {
        let sorted = runs.windows(2).all(|pair| pair[0].end() <= pair[1].first_block);
        assert!(sorted, "a page with overlapping runs was taken");
    }
}

/// A whole map segment without encryption: see [`forge`] for the input. Every run is walked.
pub fn map_segment(input: &[u8]) {
    parse_map_page_bytes(input);
    let Some(object) = forge(ObjectKind::MapSegment, input).and_then(|forged| forged.open()) else {
        return;
    };
    if let Ok(segment) = MapSegment::from_object(object) {
        let mut position = 0;
        let _ = segment.for_each_run(&mut |run| {
            assert!(run.first_block >= position && run.end() <= MAX_BLOCKS, "runs out of order");
            position = run.end();
            Ok(())
        });
    }
}

/// A whole index segment without encryption: see [`forge`] for the input. Looked up in and walked.
pub fn index_segment(input: &[u8]) {
    if let Some(object) = forge(ObjectKind::IndexSegment, input).and_then(|forged| forged.open()) {
        fuzz_segment(object, input);
    }
}

/// The configuration `vmtide.repo`: the input as it is, and with a right checksum after it. What
/// is taken must come back the same when it is written again.
#[allow(clippy::expect_used, reason = "a failure is what the fuzz target is there to find")]
pub fn config(input: &[u8]) {
    let _ = RepositoryConfig::decode(input);
    if let Ok(config) = RepositoryConfig::decode(&with_checksum(input)) {
        assert!((16 << 10..=1 << 20).contains(&config.chunk_size_bytes), "a hostile chunk size");
        let again = config.encode().and_then(|bytes| RepositoryConfig::decode(&bytes));
        let again = again.expect("what was read can be written and read again");
        assert_eq!(
            (again.id, again.created, again.chunk_size_bytes, again.encryption),
            (config.id, config.created, config.chunk_size_bytes, config.encryption),
        );
    }
}

/// A key slot: as [`config`]. No key is derived, so that a run is quick; what deriving one would
/// cost is checked against the limits instead.
pub fn key_slot(input: &[u8]) {
    crate::keys::fuzz_slot(input);
    crate::keys::fuzz_slot(&with_checksum(input));
}

/// A JSON document whose last brace is replaced by the checksum that belongs there.
fn with_checksum(document: &[u8]) -> Vec<u8> {
    let body = document.strip_suffix(b"}").unwrap_or(document);
    let sum = to_hex(&checksum(body));
    [body, br#","checksum":""#, sum.as_bytes(), br#""}"#].concat()
}

#[cfg(test)]
mod tests;
