//! Giving a differencing VHD another parent, or none.
//!
//! What names a parent is spread over two sectors of the header and the texts of the locators,
//! which no write changes together. So a second header is written behind everything, and the
//! footers, one sector each, decide which one counts: first they lead to the second header, then
//! the first is rewritten and they lead back to it, and the file ends where it ended. Every step is
//! durable before the next.

use super::create::ParentNames;
use super::footer::{FOOTER_BYTES, Footer, Kind, Located, parse_id};
use super::header::{HEADER_BYTES, Header, Locator};
use super::image::{Opened, read_bitmap};
use super::writer::read_table;
use crate::Format;
use crate::bytes::length;
use crate::chain::LinkTarget;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Result, WritableBlockDevice};

/// The space for a locator that is not bounded by something behind it.
const MAX_SPACE: u64 = 64 << 10;

/// Lets the image name another parent; at every moment it names the old one or the new one. With
/// none it becomes a dynamic disk, of which what it does not hold is zero.
///
/// # Errors
/// [`BlockError::Unsupported`] where the image has no parent now, or the new one is no VHD; as
/// [`super::VhdWriter::open_device`] for images that must not be written; what the medium says.
pub(crate) fn set_parent(
    file: &dyn WritableBlockDevice,
    target: Option<&LinkTarget>,
) -> Result<()> {
    let refuse = |detail: String| Err(BlockError::unsupported(file.name(), detail));
    let located = Located::find(file)?;
    let opened = Opened::new(file, &located)?;
    let Some(header) = opened.header.clone().filter(|_| opened.kind() == Kind::Differencing) else {
        return refuse(format!(
            "is a {} VHD, and only a differencing one has a parent; make a new differencing disk",
            opened.kind().name()
        ));
    };
    let entries = read_table(file, &opened)?;
    super::check::place_blocks(file, &opened, &entries)?;
    let mut footers = Footers::ready(file, &located)?;
    let Some(target) = target else {
        complete_blocks(file, &opened, &entries)?;
        footers.footer.kind = Kind::Dynamic;
        return footers.write(file, None);
    };
    let Some(id) = target.identity.as_deref().and_then(parse_id) else {
        return refuse(format!(
            "the parent of a VHD must be a VHD; {:?} is {}",
            target.name, target.format
        ));
    };
    if target.format != Format::Vhd {
        return refuse(format!("the parent of a VHD must be a VHD, not {}", target.format));
    }
    let names = ParentNames::new(&target.name, Some(&target.absolute_path));
    let places = places(file, &opened, &header, &entries, footers.end);
    replace(file, &mut footers, &header, &places, id, &names)
}

/// The two footers of the file, and where it ends.
struct Footers {
    footer: Footer,
    /// Where the one at the end begins.
    end: u64,
}

impl Footers {
    /// Both footers, put right where they were not.
    fn ready(file: &dyn WritableBlockDevice, located: &Located) -> Result<Self> {
        let footer = located.footer.clone();
        let copy_right = matches!(&located.copy, Some(Ok(copy)) if *copy == footer);
        if !copy_right {
            file.write_at(&footer.encode(), 0)?;
            file.flush()?;
        }
        let end = located.body_bytes(file).next_multiple_of(FOOTER_BYTES);
        if located.trailer != Some(end) || end + FOOTER_BYTES != file.size_bytes() {
            file.resize(end + FOOTER_BYTES)?;
            file.write_at(&footer.encode(), end)?;
            file.flush()?;
        }
        Ok(Self { footer, end })
    }

    /// Brings the footer to both places, first the one at the end, which counts; `end` is where
    /// that is if not where it was.
    fn write(&self, file: &dyn WritableBlockDevice, end: Option<u64>) -> Result<()> {
        let bytes = self.footer.encode();
        file.write_at(&bytes, end.unwrap_or(self.end))?;
        file.flush()?;
        file.write_at(&bytes, 0)?;
        file.flush()
    }
}

/// Brings the new parent's names to the file.
fn replace(
    file: &dyn WritableBlockDevice,
    footers: &mut Footers,
    header: &Header,
    places: &[ByteRange],
    id: [u8; 16],
    names: &ParentNames,
) -> Result<()> {
    // The second header goes behind the footer, which counts until the one behind it is there.
    let second = footers.end + FOOTER_BYTES;
    let mut texts = second + HEADER_BYTES;
    let mut spare = Vec::new();
    for (_, text) in &names.texts {
        let space = (text.len() as u64).next_multiple_of(FOOTER_BYTES);
        spare.push(ByteRange::new(texts, space));
        texts += space;
    }
    file.resize(texts + FOOTER_BYTES)?;
    write_header(file, header, second, &spare, id, names)?;
    file.flush()?;
    let first = footers.footer.data_offset();
    footers.footer.set_data_offset(second);
    footers.write(file, Some(texts))?;
    write_header(file, header, first, places, id, names)?;
    file.flush()?;
    footers.footer.set_data_offset(first);
    footers.write(file, Some(texts))?;
    // The footer that stood at the end before is still there and right.
    file.resize(second)?;
    file.flush()
}

/// Writes the header for a new parent at `offset`, with as many names as there are places for; the
/// one in the header itself always has one.
fn write_header(
    file: &dyn WritableBlockDevice,
    header: &Header,
    offset: u64,
    places: &[ByteRange],
    id: [u8; 16],
    names: &ParentNames,
) -> Result<()> {
    let mut header = header.clone();
    header.set_parent(id, &names.display);
    let mut free: Vec<ByteRange> = places.to_vec();
    // The relative name is worth more than the absolute one, which the header has as well.
    for (number, (code, text)) in names.texts.iter().rev().enumerate() {
        let Some(index) = free.iter().position(|place| place.length >= text.len() as u64) else {
            continue;
        };
        let place = free.remove(index);
        let (Ok(space), Ok(text_bytes)) = (u32::try_from(place.length), u32::try_from(text.len()))
        else {
            continue;
        };
        file.write_at(text, place.offset)?;
        let locator = Locator { code: *code, space, text_bytes, offset: place.offset };
        header.set_locator(number, &locator);
    }
    file.write_at(&header.encode(), offset)
}

/// The places of the locators that the header has, up to what follows each in the file.
fn places(
    file: &dyn BlockDevice,
    opened: &Opened,
    header: &Header,
    entries: &[u32],
    end: u64,
) -> Vec<ByteRange> {
    let locators = header.locators();
    let table_end = header.table_offset + opened.entries * 4;
    let mut starts = vec![header.offset, header.table_offset, end];
    starts.extend(locators.iter().map(|(_, locator)| locator.offset));
    starts.extend(entries.iter().filter_map(|entry| header.blocks().start(*entry)).min());
    let mut places: Vec<ByteRange> = Vec::new();
    for (_, locator) in &locators {
        let start = locator.offset;
        // What the writer of the locator itself took, whatever unit it gave that in.
        let own = u64::from(locator.text_bytes.max(locator.space.min(4096)));
        let next = starts.iter().filter(|next| **next > start).min().copied().unwrap_or(end);
        let inside_other = start < FOOTER_BYTES
            || (header.offset..header.offset + HEADER_BYTES).contains(&start)
            || (header.table_offset..table_end).contains(&start)
            || entries
                .iter()
                .filter_map(|entry| header.blocks().start(*entry))
                .any(|block| (block..block + header.blocks().stored_bytes()).contains(&start));
        let space = next.saturating_sub(start).min(own).min(MAX_SPACE);
        let place = ByteRange::new(start, space);
        let is_new = !places.iter().any(|other| other.offset == start);
        if !inside_other && is_new && place.end() <= file.size_bytes() {
            places.push(place);
        }
    }
    places
}

/// Makes every block hold all of its sectors, those that it did not hold as zeros.
fn complete_blocks(file: &dyn WritableBlockDevice, opened: &Opened, entries: &[u32]) -> Result<()> {
    let shape = opened.shape();
    for (block, entry) in (0u64..).zip(entries) {
        let Some(start) = shape.start(*entry) else {
            continue;
        };
        let bitmap = read_bitmap(file, shape, block, start)?;
        let size = shape.block_bytes.min(opened.size_bytes - block * shape.block_bytes);
        let (mut at, end) = (0, size.div_ceil(512));
        let data = start + shape.bitmap_bytes;
        while at < end {
            let (own, run) = bitmap.run(at, end);
            if !own {
                let to = (data + (at + run) * 512).min(file.size_bytes());
                file.write_zeroes(ByteRange::from_bounds(data + at * 512, to))?;
            }
            at += run;
        }
    }
    file.flush()?;
    let full = vec![0xff; length(shape.bitmap_bytes)];
    for entry in entries {
        if let Some(start) = shape.start(*entry) {
            file.write_at(&full, start)?;
        }
    }
    file.flush()
}
