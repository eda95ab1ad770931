//! Objects whose envelope and checksums are right and whose content is hostile.

use crate::ObjectId;
use crate::context::{DamageLog, OpenObject, RepoContext};
use crate::crypto::{MasterKey, checksum};
use crate::envelope::{HEADER_BYTES, ObjectKind, Trailer};
use crate::store::{MemoryStore, ObjectStore};
use std::sync::Arc;

/// The id of every forged object. Restore points carry it in their JSON too.
pub(super) const FORGED: ObjectId = ObjectId([1; 16]);

/// A forged object in a store of its own.
pub(super) struct Forged {
    /// The repository it is in.
    pub context: RepoContext,
    kind: ObjectKind,
}

impl Forged {
    /// The object, opened; none where the envelope cannot be right.
    pub fn open(&self) -> Option<OpenObject> {
        self.context.open_object(self.kind, FORGED).ok()
    }
}

/// An object whose envelope is right, made of hostile bytes: first count u32, second count u32,
/// length of the directory u16, then everything between header and trailer. Checksums at their
/// usual places are made right.
pub(super) fn forge(kind: ObjectKind, input: &[u8]) -> Option<Forged> {
    let (head, body) = input.split_first_chunk::<10>()?;
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let directory_length = usize::from(u16::from_le_bytes([head[8], head[9]])).min(body.len());
    let (sections, directory) = body.split_at(body.len() - directory_length);
    let mut directory = directory.to_vec();
    match kind {
        ObjectKind::MapSegment => mend(&mut directory, 32, sections),
        ObjectKind::IndexSegment => mend_index(sections, &mut directory, word(0) as usize),
        ObjectKind::Pack => mend_frames(sections, &mut directory, word(0) as usize),
        // One section, its checksum after its length.
        _ => {
            let hash = *blake3::hash(sections).as_bytes();
            if let Some(place) = directory.get_mut(8..40) {
                place.copy_from_slice(&hash);
            }
        }
    }
    put(kind, sections, &directory, (word(0), word(4)))
}

/// Puts an object of these parts into a store of its own.
pub(super) fn put(
    kind: ObjectKind,
    sections: &[u8],
    directory: &[u8],
    counts: (u32, u32),
) -> Option<Forged> {
    let store = MemoryStore::new();
    let context = context(&store);
    let header = context.header(kind, FORGED);
    let trailer = Trailer {
        directory_offset: (HEADER_BYTES + sections.len()) as u64,
        directory_length: directory.len() as u64,
        first_count: counts.0,
        second_count: counts.1,
    };
    let end = trailer.encode(&header, directory);
    let bytes = [&header.encode()[..], sections, directory, &end].concat();
    store.put(&header.object_name(), &bytes).ok()?;
    Some(Forged { context, kind })
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

/// Makes the checksums of a pack's frames right, where the frames lie in the object.
fn mend_frames(sections: &[u8], directory: &mut [u8], frames: usize) {
    for entry in directory.as_chunks_mut::<32>().0.iter_mut().take(frames) {
        let offset = u64::from_le_bytes([
            entry[0], entry[1], entry[2], entry[3], entry[4], entry[5], entry[6], entry[7],
        ]);
        let length = u32::from_le_bytes([entry[8], entry[9], entry[10], entry[11]]) as usize;
        let stored = usize::try_from(offset)
            .ok()
            .and_then(|offset| offset.checked_sub(HEADER_BYTES))
            .and_then(|at| sections.get(at..at.checked_add(length)?));
        if let Some(stored) = stored {
            entry[16..].copy_from_slice(&checksum(stored));
        }
    }
}

pub(super) fn context(store: &MemoryStore) -> RepoContext {
    RepoContext {
        store: Arc::new(store.clone()),
        subkeys: MasterKey::from_bytes([0; 32]).subkeys(),
        repository: ObjectId([2; 16]),
        chunk_size_bytes: 65536,
        sealed: false,
        retention: None,
        damage: DamageLog::default(),
        points: crate::point_list::PointCache::default(),
    }
}
