//! Giving a differencing VHDX another parent.
//!
//! The parent locator is one metadata item. It is changed through the log, with the table entry
//! that says where it is and how long, so a crash leaves the old one or the new one.

use super::bat::{BITMAP_BLOCK_BYTES, BatEntry, BatIndex, BitmapBlockState, ENTRY_BYTES, EntryOf};
use super::create::windows_spelling;
use super::guid::Guid;
use super::header::{Headers, MIB};
use super::locator::{
    ABSOLUTE_WIN32_PATH, PARENT_LINKAGE, PARENT_LINKAGE_2, ParentLocator, RELATIVE_PATH,
};
use super::log_entry::LOG_SECTOR_BYTES;
use super::log_write::Journal;
use super::metadata::{MAX_ITEM_BYTES, MetadataEntry, PARENT_LOCATOR};
use super::replay::replay_onto;
use super::tables::Tables;
use super::write::is_present;
use crate::Format;
use crate::bytes::{le_u64, length, put};
use crate::chain::LinkTarget;
use std::collections::BTreeMap;
use std::sync::Arc;
use vmtide_block::{BlockError, ByteRange, Result, WritableBlockDevice};

/// The page in which the log records changes.
const PAGE_BYTES: u64 = LOG_SECTOR_BYTES as u64;

/// Lets the image name another parent; at every moment it names the old one or the new one. A log
/// that is not empty is replayed first. The disk, and with it what the image's own children know it
/// by, stays what it is.
///
/// # Errors
/// [`BlockError::Unsupported`] where the image has no parent now, the new one is none or no VHDX, or
/// its names do not fit; as [`super::VhdxWriter::open_device`]; what the medium says.
pub(crate) fn set_parent(
    file: &dyn WritableBlockDevice,
    target: Option<&LinkTarget>,
) -> Result<()> {
    let refuse = |detail: String| BlockError::unsupported(file.name(), detail);
    let Some(target) = target else {
        return Err(refuse(
            "a differencing VHDX cannot be made independent in place; convert it".into(),
        ));
    };
    if target.format != Format::Vhdx {
        return Err(refuse(format!("the parent of a VHDX must be a VHDX, not {}", target.format)));
    }
    let locator = locator(target).map_err(refuse)?.encode().map_err(refuse)?;
    let mut headers = Headers::read(file)?;
    replay_onto(file, &mut headers)?;
    let tables = Tables::read(file, headers)?;
    let mut journal = Journal::open(file, tables.headers.clone(), &tables.regions.table)?;
    refuse_shared_blocks(file, &tables)?;
    let entry = tables.items.entries.iter().position(|entry| entry.id == PARENT_LOCATOR);
    let (Some(index), true) = (entry, tables.metadata.has_parent) else {
        return Err(refuse(
            "has no parent, and only a differencing VHDX has one; make a new differencing disk"
                .into(),
        ));
    };
    let region = tables.regions.metadata;
    let place = place(region, &tables.items.entries, index, locator.len() as u64)
        .filter(|_| locator.len() <= MAX_ITEM_BYTES as usize)
        .ok_or_else(|| refuse("its metadata has no room for the names of the parent".into()))?;
    let mut pages = Pages { file, changed: BTreeMap::new() };
    let entry_at = region.offset + 32 + index as u64 * 32;
    let fields = [place.offset - region.offset, place.length]
        .map(|value| u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes());
    pages.put(entry_at + 16, &fields.concat())?;
    pages.put(place.offset, &locator)?;
    let pages: Vec<(u64, Arc<[u8; LOG_SECTOR_BYTES]>)> =
        pages.changed.into_iter().map(|(at, page)| (at, Arc::new(page))).collect();
    if pages.len() as u64 > journal.entry_pages() {
        return Err(refuse("its log has no room for the names of the parent".into()));
    }
    journal.renew_file_guid(file)?;
    journal.commit(file, &pages, file.size_bytes())?;
    journal.empty(file)?;
    Ok(())
}

/// Succeeds where no block lies on what is about to be written: the log and the metadata.
fn refuse_shared_blocks(file: &dyn WritableBlockDevice, tables: &Tables) -> Result<()> {
    let (bat, geometry) = (tables.bat(), tables.geometry);
    let written = [ByteRange::new(0, MIB), tables.headers.current.log, tables.regions.metadata];
    let mut piece = vec![0; length(bat.length.min(MIB))];
    let mut at = 0;
    while at < bat.length {
        let bytes = &mut piece[..length((bat.length - at).min(MIB))];
        file.read_at(bytes, bat.offset + at)?;
        for (index, entry) in (at / ENTRY_BYTES..).zip(bytes.chunks_exact(8)) {
            let entry = BatEntry(le_u64(entry, 0));
            let block_bytes = match geometry.entry_at(BatIndex(index)) {
                EntryOf::Payload(_) if is_present(entry) => geometry.block_bytes(),
                EntryOf::Bitmap(_) if entry.bitmap_state() == Some(BitmapBlockState::Present) => {
                    BITMAP_BLOCK_BYTES
                }
                _ => continue,
            };
            let place = ByteRange::new(entry.offset(), block_bytes);
            if let Some(part) = written.iter().find(|part| !part.intersect(&place).is_empty()) {
                return Err(BlockError::damaged(
                    file.name(),
                    format!(
                        "BAT entry {index} at {:#x}: the block at {:#x} lies on the {} bytes at \
                         {:#x}, which are something else; it must not be written: read what is \
                         there into a new image",
                        bat.offset + index * ENTRY_BYTES,
                        place.offset,
                        part.length,
                        part.offset
                    ),
                ));
            }
        }
        at += bytes.len() as u64;
    }
    Ok(())
}

/// The locator of a parent.
fn locator(target: &LinkTarget) -> Result<ParentLocator, String> {
    let guid = |text: &str| {
        let guid: Result<Guid, _> = text.parse();
        guid.map_err(|_| format!("the parent's identity {text:?} is no GUID"))
    };
    let braces = |guid: Guid| format!("{{{guid}}}");
    let identity = target.identity.as_deref().ok_or("the parent says nothing of itself")?;
    let mut entries = vec![(PARENT_LINKAGE.to_owned(), braces(guid(identity)?))];
    if let Some(next) = &target.next_identity {
        entries.push((PARENT_LINKAGE_2.to_owned(), braces(guid(next)?)));
    }
    let name = windows_spelling(&target.name);
    let absolute = windows_spelling(&target.absolute_path);
    if name != absolute {
        let name = if name.starts_with('.') { name } else { format!(".\\{name}") };
        entries.push((RELATIVE_PATH.to_owned(), name));
    }
    entries.push((ABSOLUTE_WIN32_PATH.to_owned(), absolute));
    Ok(ParentLocator { entries })
}

/// Where the item with this index can be when it has so many bytes: where it is, or behind all
/// items.
fn place(
    region: ByteRange,
    items: &[MetadataEntry],
    index: usize,
    bytes: u64,
) -> Option<ByteRange> {
    let own = items.get(index)?.range;
    if bytes <= own.length {
        return Some(ByteRange::new(own.offset, bytes));
    }
    let behind = items.iter().map(|item| item.range.end()).max()?.next_multiple_of(8);
    let others_before = items
        .iter()
        .enumerate()
        .all(|(other, item)| other == index || item.range.end() <= own.offset);
    // The last one can grow where it is.
    let start = if others_before { own.offset } else { behind };
    let place = ByteRange::new(start, bytes);
    (place.end() <= region.end()).then_some(place)
}

/// Pages of the file with what is to change in them.
struct Pages<'a> {
    file: &'a dyn WritableBlockDevice,
    changed: BTreeMap<u64, [u8; LOG_SECTOR_BYTES]>,
}

impl Pages<'_> {
    fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let (mut rest, mut at) = (bytes, offset);
        while !rest.is_empty() {
            let start = at - at % PAGE_BYTES;
            let page = match self.changed.entry(start) {
                std::collections::btree_map::Entry::Occupied(page) => page.into_mut(),
                std::collections::btree_map::Entry::Vacant(place) => {
                    let mut page = [0; LOG_SECTOR_BYTES];
                    self.file.read_at(&mut page, start)?;
                    place.insert(page)
                }
            };
            let inside = length(at - start);
            let (now, after) = rest.split_at(rest.len().min(LOG_SECTOR_BYTES - inside));
            put(page, inside, now);
            at += now.len() as u64;
            rest = after;
        }
        Ok(())
    }
}
