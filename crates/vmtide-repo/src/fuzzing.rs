//! Ways in for the fuzz targets: hostile bytes to each parser, past the hashes that would stop
//! nearly every mutation. Not a public interface.
//!
//! The unkeyed hashes of an unencrypted object can be made right by anybody who can write to the
//! repository, so what is behind them must stand any bytes as well. None of these may panic, hang
//! or take memory beyond a small multiple of the input.

use crate::context::{OpenObject, RepoContext};
use crate::crypto::{MasterKey, checksum};
use crate::envelope::{HEADER_BYTES, ObjectKind, Trailer};
use crate::index::fuzz_segment;
use crate::map::page::{PageBounds, parse_map_page};
use crate::map::{MAX_BLOCKS, MapSegment};
use crate::store::{MemoryStore, ObjectStore};
use crate::{ObjectId, Result};
use std::sync::Arc;

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
    let Some(object) = forge(ObjectKind::MapSegment, input) else { return };
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
    if let Some(object) = forge(ObjectKind::IndexSegment, input) {
        fuzz_segment(object, input);
    }
}

/// An object whose envelope is right, made of hostile bytes: first count u32, second count u32,
/// length of the directory u16, then everything between header and trailer. Checksums at their
/// usual places are made right.
fn forge(kind: ObjectKind, input: &[u8]) -> Option<OpenObject> {
    let (head, body) = input.split_first_chunk::<10>()?;
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let directory_length = usize::from(u16::from_le_bytes([head[8], head[9]])).min(body.len());
    let (pages, directory) = body.split_at(body.len() - directory_length);
    let mut directory = directory.to_vec();
    match kind {
        ObjectKind::IndexSegment => mend_index(pages, &mut directory, word(0) as usize),
        _ => mend(&mut directory, 32, pages),
    }
    let store = MemoryStore::new();
    let ctx = context(&store);
    let id = ObjectId([1; 16]);
    let header = ctx.header(kind, id);
    let trailer = Trailer {
        directory_offset: (HEADER_BYTES + pages.len()) as u64,
        directory_length: directory.len() as u64,
        first_count: word(0),
        second_count: word(4),
    };
    let end = trailer.encode(&header, &directory);
    let bytes = [&header.encode()[..], pages, &directory, &end].concat();
    store.put(&header.object_name(), &bytes).ok()?;
    ctx.open_object(kind, id).ok()
}

/// Makes the checksum at `at` that of `stored`.
fn mend(directory: &mut [u8], at: usize, stored: &[u8]) {
    if let Some(place) = directory.get_mut(at..).and_then(<[u8]>::first_chunk_mut) {
        *place = checksum(stored);
    }
}

/// Makes the checksums of an index segment's pages and its one filter section right.
fn mend_index(body: &[u8], directory: &mut [u8], pages: usize) {
    let entries = directory.first_chunk().map_or(0, |&entries| u64::from_le_bytes(entries));
    let end = usize::try_from(entries).unwrap_or(0).saturating_mul(24).min(body.len());
    let checksums = pages.saturating_mul(8).saturating_add(16);
    for (number, page) in body[..end].chunks(4080).take(pages).enumerate() {
        mend(directory, checksums.saturating_add(number * 16), page);
    }
    mend(directory, checksums.saturating_add(pages.saturating_mul(16)), &body[end..]);
}

fn context(store: &MemoryStore) -> RepoContext {
    RepoContext {
        store: Arc::new(store.clone()),
        subkeys: MasterKey::from_bytes([0; 32]).subkeys(),
        repository: ObjectId([2; 16]),
        chunk_size_bytes: 65536,
        sealed: false,
    }
}

/// A small object as the writers make it, turned into an input of [`forge`]: the seed of a corpus.
///
/// # Errors
/// Those of writing to memory, which do not happen.
pub fn seed(index: bool) -> Result<Vec<u8>> {
    let store = MemoryStore::new();
    let ctx = Arc::new(context(&store));
    let kind = if index { ObjectKind::IndexSegment } else { ObjectKind::MapSegment };
    if index {
        crate::index::write_sample(&ctx)?;
    } else {
        crate::map::write_sample(&ctx)?;
    }
    let name = store.names().pop().unwrap_or_default();
    let bytes = store.bytes(&name).unwrap_or_default();
    let id = name.rsplit('/').next().unwrap_or_default().parse()?;
    let opened = ctx.open_object(kind, id)?;
    let mut input = opened.trailer.first_count.to_le_bytes().to_vec();
    input.extend_from_slice(&opened.trailer.second_count.to_le_bytes());
    input.extend(u16::try_from(opened.directory.len()).unwrap_or(0).to_le_bytes());
    input.extend_from_slice(&bytes[HEADER_BYTES..bytes.len() - crate::envelope::TRAILER_BYTES]);
    Ok(input)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Mutated seeds, so that the targets themselves are known to reach behind the hashes.
    #[test]
    fn seeds_are_sound_and_their_mutations_harmless() {
        for index in [false, true] {
            let seed = seed(index).unwrap();
            let kind = if index { ObjectKind::IndexSegment } else { ObjectKind::MapSegment };
            let object = forge(kind, &seed).unwrap();
            if index {
                assert_eq!(fuzz_segment(object, &seed), 400);
            } else {
                let segment = MapSegment::from_object(object).unwrap();
                assert_eq!(segment.run_count(), 85);
                segment.for_each_run(&mut |_| Ok(())).unwrap();
            }
            let target = if index { index_segment } else { map_segment };
            for at in 0..seed.len() {
                let mut bytes = seed.clone();
                for value in [0, 1, 0x7f, 0xff] {
                    bytes[at] = value;
                    target(&bytes);
                }
                if at % 16 == 0 {
                    target(&seed[..at]);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_harmless(input in prop::collection::vec(any::<u8>(), 0..400)) {
            map_segment(&input);
            index_segment(&input);
        }
    }
}
