//! The directory of an index segment, and where it says things are (format §8).

use super::filter::LINE_BYTES;
use super::{ENTRIES_PER_PAGE, ENTRY_BYTES, PAGE_BYTES};
use crate::context::{DIRECTORY_SECTION, NewObject, OpenObject, StoredSection};
use crate::envelope::HEADER_BYTES;
use crate::{ObjectId, RepoError, Result};

/// The most lines in a section of the filter: 1 MiB.
pub(super) const SECTION_LINES: usize = (1 << 20) / LINE_BYTES;

/// The number of the filter's first section; pages are counted by a u32 and stay below.
pub(super) const FILTER_SECTION: u64 = 1 << 32;

/// What the directory of an index segment says.
#[derive(Debug, Default)]
pub(super) struct Directory {
    pub entries: u64,
    pub filter_lines: u64,
    /// The first eight bytes of each page's first key.
    pub fences: Vec<u64>,
    pub page_checksums: Vec<[u8; 16]>,
    pub filter_checksums: Vec<[u8; 16]>,
    pub superseded: Vec<ObjectId>,
    pub packs: Vec<ObjectId>,
}

/// Where a stored section lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub offset: u64,
    pub stored_bytes: u64,
}

impl Directory {
    /// The bytes, its pack table sealed and bound to the rest.
    ///
    /// # Errors
    /// [`RepoError::Invalid`] for too many superseded segments; those of sealing.
    pub fn encode(&self, object: &NewObject) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(self.fences.len() * 24 + self.packs.len() * 16 + 4096);
        bytes.extend_from_slice(&self.entries.to_le_bytes());
        bytes.extend_from_slice(&self.filter_lines.to_le_bytes());
        bytes.extend(self.fences.iter().flat_map(|fence| fence.to_be_bytes()));
        bytes.extend(self.page_checksums.iter().flatten());
        bytes.extend(self.filter_checksums.iter().flatten());
        let superseded = u32::try_from(self.superseded.len())
            .map_err(|_| RepoError::Invalid("too many index segments to supersede".into()))?;
        bytes.extend_from_slice(&superseded.to_le_bytes());
        bytes.extend(self.superseded.iter().flat_map(|id| id.0));
        let binding = *blake3::hash(&bytes).as_bytes();
        let mut table: Vec<u8> = self.packs.iter().flat_map(|pack| pack.0).collect();
        object.cipher.seal(DIRECTORY_SECTION, &binding, &mut table)?;
        bytes.append(&mut table);
        Ok(bytes)
    }

    /// Takes the directory out of `object`, parses and checks it: counts that fit each other and
    /// the object's length, fences in order.
    ///
    /// # Errors
    /// [`RepoError::Damaged`].
    pub fn parse(object: &mut OpenObject) -> Result<Self> {
        let bytes = std::mem::take(&mut object.directory);
        let Some((directory, pack_table)) = parse_fields(&bytes, object.trailer.first_count) else {
            return Err(object.damaged("its directory does not fit its counts"));
        };
        let overhead = object.cipher.overhead_bytes() as u64;
        let pack_bytes = u64::from(object.trailer.second_count) * 16;
        if pack_table.len() as u64 != pack_bytes + overhead {
            return Err(object.damaged("its pack table does not fit its count"));
        }
        if directory.end_of_filter(overhead) != Some(object.trailer.directory_offset) {
            return Err(
                object.damaged("its pages and filter do not end where its directory begins")
            );
        }
        if !directory.fences.is_sorted() {
            return Err(object.damaged("its pages are out of order"));
        }
        let binding = *blake3::hash(&bytes[..bytes.len() - pack_table.len()]).as_bytes();
        let mut sealed = pack_table.to_vec();
        let content = object.cipher.open(DIRECTORY_SECTION, &binding, &mut sealed)?;
        let (ids, _) = content.as_chunks::<16>();
        Ok(Self { packs: ids.iter().map(|&id| ObjectId(id)).collect(), ..directory })
    }

    /// How many entries the page holds.
    pub fn page_entries(&self, page: usize) -> usize {
        let before = page as u64 * ENTRIES_PER_PAGE as u64;
        let left = self.entries.saturating_sub(before).min(ENTRIES_PER_PAGE as u64);
        usize::try_from(left).unwrap_or(ENTRIES_PER_PAGE)
    }

    /// Where the page lies.
    pub fn page_place(&self, page: usize, overhead: u64) -> Place {
        Place {
            offset: HEADER_BYTES as u64 + page as u64 * (PAGE_BYTES as u64 + overhead),
            stored_bytes: (self.page_entries(page) * ENTRY_BYTES) as u64 + overhead,
        }
    }

    /// Where section `section` of the filter lies, counted from 0.
    pub fn filter_place(&self, section: usize, overhead: u64) -> Place {
        let pages = self.page_place(self.fences.len().saturating_sub(1), overhead);
        let before = section as u64 * SECTION_LINES as u64;
        let lines = self.filter_lines.saturating_sub(before).min(SECTION_LINES as u64);
        let whole = (SECTION_LINES * LINE_BYTES) as u64 + overhead;
        Place {
            offset: pages.offset + pages.stored_bytes + section as u64 * whole,
            stored_bytes: lines * LINE_BYTES as u64 + overhead,
        }
    }

    /// Where the filter ends; `None` where numbers overflow.
    fn end_of_filter(&self, overhead: u64) -> Option<u64> {
        let pages = self.page_place(self.fences.len().saturating_sub(1), overhead);
        let sections = self.filter_checksums.len() as u64;
        let filter = self.filter_lines.checked_mul(LINE_BYTES as u64)?;
        let filter = filter.checked_add(sections.checked_mul(overhead)?)?;
        pages.offset.checked_add(pages.stored_bytes)?.checked_add(filter)
    }
}

/// Where the pages and the filter of a segment lie, without its key.
///
/// # Errors
/// [`RepoError::Damaged`].
pub(crate) fn stored_pages(object: &OpenObject) -> Result<Vec<StoredSection>> {
    let overhead = object.cipher.overhead_bytes() as u64;
    let parsed = parse_fields(&object.directory, object.trailer.first_count);
    let Some((directory, _)) = parsed.filter(|(directory, _)| {
        directory.end_of_filter(overhead) == Some(object.trailer.directory_offset)
    }) else {
        return Err(object.damaged("its directory does not fit its counts"));
    };
    let section = |place: Place, checksum: &[u8; 16]| StoredSection {
        offset: place.offset,
        stored_bytes: place.stored_bytes,
        checksum: *checksum,
    };
    let pages = directory.page_checksums.iter().enumerate();
    let pages =
        pages.map(|(page, checksum)| section(directory.page_place(page, overhead), checksum));
    let filter = directory.filter_checksums.iter().enumerate();
    let filter =
        filter.map(|(part, checksum)| section(directory.filter_place(part, overhead), checksum));
    Ok(pages.chain(filter).collect())
}

/// Everything but the pack table, and the rest of the bytes, which is that. `None` where counts and
/// lengths do not fit.
fn parse_fields(bytes: &[u8], pages: u32) -> Option<(Directory, &[u8])> {
    let mut rest = bytes;
    let entries = take_u64(&mut rest)?;
    let filter_lines = take_u64(&mut rest)?;
    if pages == 0
        || filter_lines == 0
        || entries.div_ceil(ENTRIES_PER_PAGE as u64) != u64::from(pages)
    {
        return None;
    }
    let pages = pages as usize;
    let sections = usize::try_from(filter_lines.div_ceil(SECTION_LINES as u64)).ok()?;
    let (fences, _) = rest.split_off(..pages.checked_mul(8)?)?.as_chunks::<8>();
    let page_checksums = take_16(&mut rest, pages)?;
    let filter_checksums = take_16(&mut rest, sections)?;
    let superseded = rest.split_off(..4)?;
    let superseded = u32::from_le_bytes(superseded.try_into().ok()?) as usize;
    let superseded = take_16(&mut rest, superseded)?;
    let directory = Directory {
        entries,
        filter_lines,
        fences: fences.iter().map(|&fence| u64::from_be_bytes(fence)).collect(),
        page_checksums,
        filter_checksums,
        superseded: superseded.into_iter().map(ObjectId).collect(),
        packs: Vec::new(),
    };
    Some((directory, rest))
}

fn take_u64(bytes: &mut &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.split_off(..8)?.try_into().ok()?))
}

fn take_16(bytes: &mut &[u8], count: usize) -> Option<Vec<[u8; 16]>> {
    let (items, _) = bytes.split_off(..count.checked_mul(16)?)?.as_chunks::<16>();
    Some(items.to_vec())
}
