//! The directory of a map segment: its page table, then its sealed pack table (format §7).

use super::page::PageBounds;
use super::{MAX_BLOCKS, MAX_STORED_PAGE_BYTES, RUNS_PER_PAGE};
use crate::context::{DIRECTORY_SECTION, NewObject, OpenObject, StoredSection};
use crate::envelope::HEADER_BYTES;
use crate::{ObjectId, Result};

/// The length of a page table entry.
const ENTRY_BYTES: usize = 48;

/// One page as the page table has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageEntry {
    pub bounds: PageBounds,
    pub offset: u64,
    pub stored_bytes: u32,
    pub checksum: [u8; 16],
}

impl PageEntry {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.bounds.first_block.to_le_bytes());
        out.extend_from_slice(&self.bounds.end_block.to_le_bytes());
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.extend_from_slice(&self.stored_bytes.to_le_bytes());
        out.extend_from_slice(&self.bounds.runs.to_le_bytes());
        out.extend_from_slice(&self.checksum);
    }

    fn decode(bytes: &[u8; ENTRY_BYTES]) -> Self {
        let u64_at = |at: usize| {
            let mut field = [0; 8];
            field.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(field)
        };
        let u32_at = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let mut checksum = [0; 16];
        checksum.copy_from_slice(&bytes[32..]);
        Self {
            bounds: PageBounds { first_block: u64_at(0), end_block: u64_at(8), runs: u32_at(28) },
            offset: u64_at(16),
            stored_bytes: u32_at(24),
            checksum,
        }
    }
}

/// Encodes the directory: the pack table is sealed bound to the BLAKE3 of the page table, so that
/// nobody without the key can drop, move or relabel a page.
///
/// # Errors
/// Those of sealing.
pub(super) fn encode(
    object: &NewObject,
    pages: &[PageEntry],
    packs: &[ObjectId],
) -> Result<Vec<u8>> {
    let mut directory = Vec::with_capacity(pages.len() * ENTRY_BYTES + packs.len() * 16 + 16);
    for page in pages {
        page.encode(&mut directory);
    }
    let binding = *blake3::hash(&directory).as_bytes();
    let mut table: Vec<u8> = packs.iter().flat_map(|pack| pack.0).collect();
    object.cipher.seal(DIRECTORY_SECTION, &binding, &mut table)?;
    directory.extend_from_slice(&table);
    Ok(directory)
}

/// Takes the directory out of `object`, parses it and checks it: pages back to back between header
/// and directory, their blocks in order and below 2⁴⁸, sizes in bounds.
///
/// # Errors
/// [`RepoError::Damaged`](crate::RepoError::Damaged).
pub(super) fn parse(object: &mut OpenObject) -> Result<(Vec<PageEntry>, Vec<ObjectId>)> {
    let directory = std::mem::take(&mut object.directory);
    let page_count = object.trailer.first_count as usize;
    let table_bytes = page_count.checked_mul(ENTRY_BYTES);
    let pack_bytes = (object.trailer.second_count as usize).checked_mul(16);
    let (Some(table_bytes), Some(pack_bytes)) = (table_bytes, pack_bytes) else {
        return Err(object.damaged("its counts are impossible"));
    };
    let expected = table_bytes
        .checked_add(pack_bytes)
        .and_then(|sum| sum.checked_add(object.cipher.overhead_bytes()));
    if expected != Some(directory.len()) || page_count == 0 {
        return Err(object.damaged(format!(
            "its directory of {} bytes does not fit {page_count} pages and {} packs",
            directory.len(),
            object.trailer.second_count
        )));
    }
    let (table, sealed_packs) = directory.split_at(table_bytes);
    let (entries, _) = table.as_chunks::<ENTRY_BYTES>();
    let pages: Vec<PageEntry> = entries.iter().map(PageEntry::decode).collect();
    check(object, &pages)?;
    let packs = open_pack_table(object, blake3::hash(table).as_bytes(), sealed_packs)?;
    Ok((pages, packs))
}

/// Opens a sealed pack table, bound to the hash of the rest of its directory.
///
/// # Errors
/// [`RepoError::Damaged`](crate::RepoError::Damaged).
fn open_pack_table(
    object: &OpenObject,
    binding: &[u8; 32],
    sealed: &[u8],
) -> Result<Vec<ObjectId>> {
    let mut sealed = sealed.to_vec();
    let content = object.cipher.open(DIRECTORY_SECTION, binding, &mut sealed)?;
    let (ids, _) = content.as_chunks::<16>();
    Ok(ids.iter().map(|&id| ObjectId(id)).collect())
}

/// Where the pages of a segment lie, without its key.
///
/// # Errors
/// [`RepoError::Damaged`](crate::RepoError::Damaged).
pub(crate) fn stored_pages(object: &OpenObject) -> Result<Vec<StoredSection>> {
    let pages = object.trailer.first_count as usize;
    let table = pages.checked_mul(ENTRY_BYTES).and_then(|end| object.directory.get(..end));
    let table = table.ok_or_else(|| object.damaged("its page table is cut"))?;
    let pages: Vec<PageEntry> =
        table.as_chunks::<ENTRY_BYTES>().0.iter().map(PageEntry::decode).collect();
    check(object, &pages)?;
    let section = |page: &PageEntry| StoredSection {
        offset: page.offset,
        stored_bytes: u64::from(page.stored_bytes),
        checksum: page.checksum,
    };
    Ok(pages.iter().map(section).collect())
}

fn check(object: &OpenObject, pages: &[PageEntry]) -> Result<()> {
    let mut offset = HEADER_BYTES as u64;
    let mut block = 0;
    for (number, page) in pages.iter().enumerate() {
        let bounds = page.bounds;
        let sound = page.offset == offset
            && page.stored_bytes <= MAX_STORED_PAGE_BYTES
            && bounds.first_block >= block
            && bounds.end_block > bounds.first_block
            && bounds.end_block <= MAX_BLOCKS
            && (1..=RUNS_PER_PAGE).contains(&(bounds.runs as usize));
        if !sound {
            return Err(object.damaged(format!(
                "page {number} in its directory is impossible: blocks {} to {} in {} runs at \
                 {}+{}",
                bounds.first_block, bounds.end_block, bounds.runs, page.offset, page.stored_bytes
            )));
        }
        offset += u64::from(page.stored_bytes);
        block = bounds.end_block;
    }
    if offset != object.trailer.directory_offset {
        return Err(object.damaged("its pages do not end where its directory begins"));
    }
    Ok(())
}
