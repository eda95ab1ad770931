//! Writes an index segment from sorted entries, holding one page and the filter.

use super::directory::{Directory, FILTER_SECTION, SECTION_LINES};
use super::filter::Filter;
use super::{Key, PAGE_BYTES, leading};
use crate::context::{NewObject, RepoContext};
use crate::envelope::ObjectKind;
use crate::{Location, ObjectId, RepoError, Result};
use std::collections::HashMap;

/// Writes one index segment. Dropped before [`finish`](Self::finish), it never was.
pub(super) struct IndexSegmentWriter {
    object: NewObject,
    directory: Directory,
    filter: Filter,
    pack_numbers: HashMap<ObjectId, u32>,
    page: Vec<u8>,
    last_key: Option<Key>,
}

impl IndexSegmentWriter {
    /// Begins a segment of at most `expected_entries` entries (more make its filter worse, nothing
    /// else) that takes the place of `superseded`.
    ///
    /// # Errors
    /// Those of the store.
    pub fn create(
        ctx: &RepoContext,
        expected_entries: u64,
        superseded: Vec<ObjectId>,
    ) -> Result<Self> {
        Ok(Self {
            object: ctx.create_object(ObjectKind::IndexSegment, ObjectId::random()?)?,
            directory: Directory { superseded, ..Directory::default() },
            filter: Filter::for_keys(expected_entries),
            pack_numbers: HashMap::new(),
            page: Vec::with_capacity(PAGE_BYTES + crate::crypto::TAG_BYTES),
            last_key: None,
        })
    }

    /// Appends an entry; one with the same key as the last is dropped: one place is enough.
    ///
    /// # Errors
    /// [`RepoError::Invalid`] where keys do not ascend; those of the store.
    pub fn push(&mut self, key: &Key, location: Location) -> Result<()> {
        match &self.last_key {
            Some(last) if last == key => return Ok(()),
            Some(last) if last > key => {
                return Err(RepoError::Invalid("index entries out of order".into()));
            }
            _ => {}
        }
        self.last_key = Some(*key);
        if self.page.is_empty() {
            self.directory.fences.push(leading(key));
        }
        let pack = self.pack_number(location.pack)?;
        self.page.extend_from_slice(key);
        self.page.extend_from_slice(&pack.to_le_bytes());
        self.page.extend_from_slice(&location.ordinal.to_le_bytes());
        self.filter.insert(key);
        self.directory.entries += 1;
        if self.page.len() == PAGE_BYTES {
            self.flush()?;
        }
        Ok(())
    }

    /// Writes what is left and makes the segment visible. `None`, and no segment, where no entry
    /// was appended.
    ///
    /// # Errors
    /// [`RepoError::Invalid`] for more entries than a directory holds; those of the store.
    pub fn finish(mut self) -> Result<Option<ObjectId>> {
        if self.directory.entries == 0 {
            return Ok(None);
        }
        self.flush()?;
        for (section, mut part) in (FILTER_SECTION..).zip(self.filter.encode_parts(SECTION_LINES)) {
            let checksum = self.object.write_section(section, &[], &mut part)?;
            self.directory.filter_checksums.push(checksum);
        }
        self.directory.filter_lines = self.filter.line_count() as u64;
        let id = self.object.header.id;
        let directory = self.directory.encode(&self.object)?;
        let pages = count(self.directory.fences.len())?;
        let packs = count(self.directory.packs.len())?;
        self.object.finish(&directory, pages, packs)?;
        Ok(Some(id))
    }

    fn flush(&mut self) -> Result<()> {
        if self.page.is_empty() {
            return Ok(());
        }
        let section = self.directory.page_checksums.len() as u64;
        let checksum = self.object.write_section(section, &[], &mut self.page)?;
        self.directory.page_checksums.push(checksum);
        self.page.clear();
        Ok(())
    }

    fn pack_number(&mut self, pack: ObjectId) -> Result<u32> {
        if let Some(&number) = self.pack_numbers.get(&pack) {
            return Ok(number);
        }
        let number = count(self.directory.packs.len())?;
        self.directory.packs.push(pack);
        self.pack_numbers.insert(pack, number);
        Ok(number)
    }
}

fn count(value: usize) -> Result<u32> {
    u32::try_from(value)
        .map_err(|_| RepoError::Invalid("an index segment of more than 2³² parts".into()))
}

/// Writes a segment of entries in any order. `None` where there are none.
///
/// # Errors
/// Those of the store.
pub(super) fn write_unsorted(
    ctx: &RepoContext,
    mut entries: Vec<(Key, Location)>,
    superseded: Vec<ObjectId>,
) -> Result<Option<ObjectId>> {
    entries.sort_unstable_by_key(|entry| entry.0);
    let mut writer = IndexSegmentWriter::create(ctx, entries.len() as u64, superseded)?;
    entries.iter().try_for_each(|(key, location)| writer.push(key, *location))?;
    writer.finish()
}
