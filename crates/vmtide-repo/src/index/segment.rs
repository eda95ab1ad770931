//! An index segment, opened: filter and fences in memory, pages read when needed.

use super::directory::{Directory, FILTER_SECTION, SECTION_LINES};
use super::filter::Filter;
use super::{ENTRY_BYTES, Key, leading, scale};
use crate::context::{OpenObject, RepoContext};
use crate::envelope::ObjectKind;
use crate::page_cache::PageCache;
use crate::{Location, ObjectId, Result};
use std::ops::Range;

/// The entries of one page, checked.
pub(super) type Page = Vec<Entry>;

/// One entry as it is stored.
pub(super) type Entry = [u8; ENTRY_BYTES];

/// Pages of all segments of an index, by the segment's number in it.
pub(super) type IndexCache = PageCache<Page>;

/// Pages that a merge reads at once from one segment: 64 KiB. A merge of a thousand batches holds
/// 64 MiB so; fewer pages make more requests.
const PAGES_AT_ONCE: usize = 16;

/// A segment whose directory was verified and whose filter is not read yet: enough to know what it
/// supersedes and to read it through.
#[derive(Debug)]
pub(super) struct SegmentHead {
    object: OpenObject,
    directory: Directory,
}

impl SegmentHead {
    pub fn open(ctx: &RepoContext, id: ObjectId) -> Result<Self> {
        Self::from_object(ctx.open_object(ObjectKind::IndexSegment, id)?)
    }

    pub fn from_object(mut object: OpenObject) -> Result<Self> {
        let directory = Directory::parse(&mut object)?;
        Ok(Self { object, directory })
    }

    pub const fn id(&self) -> ObjectId {
        self.object.header.id
    }

    pub const fn entries(&self) -> u64 {
        self.directory.entries
    }

    pub fn packs(&self) -> &[ObjectId] {
        &self.directory.packs
    }

    pub fn superseded(&self) -> &[ObjectId] {
        &self.directory.superseded
    }

    fn overhead(&self) -> u64 {
        self.object.cipher.overhead_bytes() as u64
    }

    fn read_filter(&self) -> Result<Filter> {
        // Sound: as many bytes are in the object, its directory was checked for that.
        let lines = usize::try_from(self.directory.filter_lines).unwrap_or(0);
        let mut filter = Filter::with_room_for(lines);
        for (number, checksum) in self.directory.filter_checksums.iter().enumerate() {
            let place = self.directory.filter_place(number, self.overhead());
            let section = FILTER_SECTION + number as u64;
            filter.extend(&self.object.read_section(
                section,
                &[],
                place.offset,
                place.stored_bytes,
                checksum,
            )?);
        }
        debug_assert_eq!(
            filter.line_count().div_ceil(SECTION_LINES),
            self.directory.filter_checksums.len()
        );
        Ok(filter)
    }

    fn read_page(&self, page: usize) -> Result<Page> {
        let place = self.directory.page_place(page, self.overhead());
        let checksum = &self.directory.page_checksums[page];
        let content = self.object.read_section(
            page as u64,
            &[],
            place.offset,
            place.stored_bytes,
            checksum,
        )?;
        self.check_page(page, &content)
    }

    /// Reads neighbouring pages in one request.
    fn read_pages(&self, pages: Range<usize>) -> Result<Page> {
        let overhead = self.overhead();
        let place = |page| self.directory.page_place(page, overhead);
        let from = place(pages.start).offset;
        let end = place(pages.end - 1);
        let length = usize::try_from(end.offset + end.stored_bytes - from).unwrap_or(0);
        let mut stored = vec![0; length];
        self.object.reader.read_at(&mut stored, from)?;
        let mut rest = &stored[..];
        let mut entries = Page::with_capacity(pages.len() * super::ENTRIES_PER_PAGE);
        for page in pages {
            let place = place(page);
            let length = usize::try_from(place.stored_bytes).unwrap_or(0);
            let (bytes, after) = rest.split_at(length);
            rest = after;
            let content = self.object.open_section(
                page as u64,
                &[],
                bytes.to_vec(),
                place.offset,
                &self.directory.page_checksums[page],
            )?;
            entries.append(&mut self.check_page(page, &content)?);
        }
        Ok(entries)
    }

    fn check_page(&self, page: usize, content: &[u8]) -> Result<Page> {
        let (entries, _) = content.as_chunks::<ENTRY_BYTES>();
        let packs = self.directory.packs.len();
        let sound = entries.len() == self.directory.page_entries(page)
            && entries.is_sorted_by(|a, b| a[..16] < b[..16])
            && entries.iter().all(|entry| (pack_number(entry) as usize) < packs)
            && entries
                .first()
                .is_some_and(|first| leading(&key_of(first)) == self.directory.fences[page]);
        if !sound {
            return Err(self.object.damaged(format!("the entries of page {page} are impossible")));
        }
        Ok(entries.to_vec())
    }

    fn location(&self, entry: &Entry) -> Location {
        let ordinal = u32::from_le_bytes([entry[20], entry[21], entry[22], entry[23]]);
        // Checked when the page was read.
        let pack = self.directory.packs.get(pack_number(entry) as usize);
        Location { pack: pack.copied().unwrap_or(ObjectId([0; 16])), ordinal }
    }

    /// All entries in order.
    pub fn entries_in_order(&self) -> Entries<'_> {
        Entries { head: self, next_page: 0, batch: Vec::new().into_iter() }
    }
}

/// Walks a segment's entries in order.
pub(super) struct Entries<'a> {
    head: &'a SegmentHead,
    next_page: usize,
    batch: std::vec::IntoIter<Entry>,
}

impl Entries<'_> {
    /// The next entry.
    ///
    /// # Errors
    /// [`RepoError::Damaged`](crate::RepoError::Damaged), `Io`.
    pub fn next_entry(&mut self) -> Result<Option<(Key, Location)>> {
        let pages = self.head.directory.fences.len();
        if self.batch.len() == 0 && self.next_page < pages {
            let end = (self.next_page + PAGES_AT_ONCE).min(pages);
            self.batch = self.head.read_pages(self.next_page..end)?.into_iter();
            self.next_page = end;
        }
        Ok(self.batch.next().map(|entry| (key_of(&entry), self.head.location(&entry))))
    }
}

/// An index segment ready for lookups. Shared by threads.
pub(crate) struct IndexSegment {
    pub(super) head: SegmentHead,
    filter: Filter,
}

impl IndexSegment {
    /// Opens a segment and reads its filter.
    ///
    /// # Errors
    /// Those of [`RepoContext::open_object`].
    #[cfg(test)]
    pub fn open(ctx: &RepoContext, id: ObjectId) -> Result<Self> {
        Self::from_head(SegmentHead::open(ctx, id)?)
    }

    /// As [`open`](Self::open), of an object whose envelope was verified.
    ///
    /// # Errors
    /// [`RepoError::Damaged`](crate::RepoError::Damaged), `Io`.
    pub fn from_object(object: OpenObject) -> Result<Self> {
        Self::from_head(SegmentHead::from_object(object)?)
    }

    pub(super) fn from_head(head: SegmentHead) -> Result<Self> {
        Ok(Self { filter: head.read_filter()?, head })
    }

    /// How many entries it holds.
    pub const fn entries(&self) -> u64 {
        self.head.entries()
    }

    /// What it keeps in memory.
    pub fn memory_bytes(&self) -> usize {
        let directory = &self.head.directory;
        self.filter.memory_bytes()
            + directory.fences.capacity() * 8
            + (directory.page_checksums.capacity() + directory.filter_checksums.capacity()) * 16
            + (directory.superseded.capacity() + directory.packs.capacity()) * 16
    }

    /// Where the chunk is, if this segment knows. Reads at most one page, or the few that begin
    /// with the same eight bytes.
    ///
    /// # Errors
    /// [`RepoError::Damaged`](crate::RepoError::Damaged), `Io`.
    pub(super) fn lookup(
        &self,
        key: &Key,
        cache: &IndexCache,
        number: u32,
    ) -> Result<Option<Location>> {
        if !self.filter.may_contain(key) {
            return Ok(None);
        }
        for page in self.pages_of(leading(key)) {
            // Pages are counted by a u32 in the trailer.
            let name = (number, u32::try_from(page).unwrap_or(u32::MAX));
            let entries = cache.get_or_load(name, || self.head.read_page(page))?;
            let found = entries.binary_search_by(|entry| entry[..16].cmp(key));
            if let Some(entry) = found.ok().and_then(|at| entries.get(at)) {
                return Ok(Some(self.head.location(entry)));
            }
        }
        Ok(None)
    }

    /// The pages that may hold keys that begin with these eight bytes.
    fn pages_of(&self, leading: u64) -> Range<usize> {
        let fences = &self.head.directory.fences;
        let from = interpolated_partition_point(fences, leading);
        let same = fences[from..].iter().take_while(|&&fence| fence == leading).count();
        from.saturating_sub(1)..from + same
    }
}

/// How many fences are below `value`. Keys are evenly spread, so the place is guessed and the
/// neighbourhood widened until it holds the answer; whatever the fences are, that ends after a
/// logarithmic number of steps.
fn interpolated_partition_point(fences: &[u64], value: u64) -> usize {
    let guess = scale(value, fences.len());
    let (mut low, mut high, mut step) = (guess, guess, 8);
    while low > 0 && fences[low - 1] >= value {
        low = low.saturating_sub(step);
        step *= 2;
    }
    while high < fences.len() && fences[high] < value {
        high = (high + step).min(fences.len());
        step *= 2;
    }
    low + fences[low..high].partition_point(|&fence| fence < value)
}

fn key_of(entry: &Entry) -> Key {
    let mut key = [0; 16];
    key.copy_from_slice(&entry[..16]);
    key
}

fn pack_number(entry: &Entry) -> u32 {
    u32::from_le_bytes([entry[16], entry[17], entry[18], entry[19]])
}
