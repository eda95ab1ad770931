//! Merges segments into one, streaming.

use super::Key;
use super::chunk_index::is_gone;
use super::segment::{Entries, SegmentHead};
use super::writer::IndexSegmentWriter;
use crate::context::RepoContext;
use crate::{Location, ObjectId, Result};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Writes one segment with the entries of `segments`, which supersedes them and `superseded`. Of
/// entries with the same key the one of the earlier segment stays. What a damaged segment still
/// has after its damage is lost to the index, with a warning; that is better than never merging.
/// Memory: 64 KiB per segment, and the new filter.
///
/// # Errors
/// `Io` and the other errors of the store, but not damage.
pub(super) fn merge(
    ctx: &RepoContext,
    segments: &[&SegmentHead],
    superseded: &[ObjectId],
) -> Result<Option<ObjectId>> {
    let ids = segments.iter().map(|segment| segment.id());
    let superseded = ids.chain(superseded.iter().copied()).collect();
    let expected = segments.iter().map(|segment| segment.entries()).sum();
    let mut writer = IndexSegmentWriter::create(ctx, expected, superseded)?;
    let mut sources: Vec<Source<'_>> =
        segments.iter().map(|segment| Source::new(segment)).collect();
    let mut heads = BinaryHeap::new();
    for (number, source) in sources.iter_mut().enumerate() {
        heads.extend(source.advance()?.map(|key| Reverse((key, number))));
    }
    while let Some(Reverse((key, number))) = heads.pop() {
        let Some(source) = sources.get_mut(number) else { break };
        if let Some((_, location)) = source.next {
            writer.push(&key, location)?;
        }
        heads.extend(source.advance()?.map(|key| Reverse((key, number))));
    }
    writer.finish()
}

struct Source<'a> {
    id: ObjectId,
    entries: Entries<'a>,
    next: Option<(Key, Location)>,
}

impl<'a> Source<'a> {
    fn new(segment: &'a SegmentHead) -> Self {
        Self { id: segment.id(), entries: segment.entries_in_order(), next: None }
    }

    /// Takes the next entry and answers with its key.
    fn advance(&mut self) -> Result<Option<Key>> {
        self.next = match self.entries.next_entry() {
            Err(error) if error.is_damage() || is_gone(&error) => {
                tracing::warn!(segment = %self.id, %error, "the rest of a damaged index segment is left out");
                None
            }
            other => other?,
        };
        Ok(self.next.map(|(key, _)| key))
    }
}
