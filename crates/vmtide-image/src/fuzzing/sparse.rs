//! A file that is mostly holes, in memory: disk images keep a few small structures megabytes apart,
//! and a fuzzer needs them close together.
//!
//! As input of a target: the file's size in MiB (`u16`), then pieces, each the number of its 512
//! byte sector (`u32`), its length (`u16`) and its bytes. All little-endian; what does not fit ends
//! the list.

use crate::bytes::{le_u16, le_u32, length};
use parking_lot::RwLock;
use std::collections::BTreeMap;
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, Extent, ExtentKind, Result, WritableBlockDevice, is_zero,
    push_extent,
};

const PAGE: u64 = 4096;
type Page = Box<[u8; 4096]>;
const SECTOR: u64 = 512;
/// The most of the file that is stored; writing more is an error.
const MOST_PAGES: usize = 16 << 10;
/// The largest file.
const MOST_BYTES: u64 = 1 << 48;

/// A file that is mostly holes, in memory.
pub struct SparseFile(RwLock<Content>);

struct Content {
    size_bytes: u64,
    pages: BTreeMap<u64, Page>,
}

impl SparseFile {
    /// An empty file.
    pub fn new() -> Self {
        Self(RwLock::new(Content { size_bytes: 0, pages: BTreeMap::new() }))
    }

    /// The file that a fuzzer's input describes.
    pub fn parse(input: &[u8]) -> Self {
        let file = Self::new();
        file.0.write().size_bytes = u64::from(le_u16(input, 0)) << 20;
        let mut rest = input.get(2..).unwrap_or_default();
        while rest.len() > 6 {
            let (offset, bytes) = (u64::from(le_u32(rest, 0)) * SECTOR, le_u16(rest, 4));
            let end = rest.len().min(6 + usize::from(bytes));
            // Pieces outside the file are none.
            let _ = file.write_at(&rest[6..end], offset);
            rest = &rest[end..];
        }
        file
    }
}

impl Default for SparseFile {
    fn default() -> Self {
        Self::new()
    }
}

/// The input that describes a file: its sectors that are not zero. Sizes are rounded up to MiB.
///
/// # Errors
/// Those of reading it.
pub fn pack(file: &dyn BlockDevice) -> Result<Vec<u8>> {
    let mebibytes = u16::try_from(file.size_bytes().div_ceil(1 << 20)).unwrap_or(u16::MAX);
    let mut out = mebibytes.to_le_bytes().to_vec();
    let mut buffer = vec![0; 32 << 10];
    let mut at = 0;
    while at < file.size_bytes() {
        let piece = &mut buffer[..length((file.size_bytes() - at).min(32 << 10))];
        file.read_at(piece, at)?;
        let sectors: Vec<&[u8]> = piece.chunks(length(SECTOR)).collect();
        let mut first = 0;
        while first < sectors.len() {
            let run = sectors[first..].iter().take_while(|sector| !is_zero(sector)).count();
            if run > 0 {
                let bytes = sectors[first..first + run].concat();
                let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
                let sector = u32::try_from(at / SECTOR).unwrap_or(u32::MAX);
                let sector = sector.saturating_add(u32::try_from(first).unwrap_or(u32::MAX));
                out.extend(sector.to_le_bytes());
                out.extend(u16::try_from(used).unwrap_or(u16::MAX).to_le_bytes());
                out.extend(&bytes[..used]);
            }
            first += run.max(1);
        }
        at += piece.len() as u64;
    }
    Ok(out)
}

/// The pieces of a range in single pages: the page, where in it, and how many bytes.
fn pieces(range: ByteRange) -> impl Iterator<Item = (u64, usize, usize)> {
    let mut at = range.offset;
    std::iter::from_fn(move || {
        let inside = at % PAGE;
        let bytes = (PAGE - inside).min(range.end().saturating_sub(at));
        let piece = (at / PAGE, length(inside), length(bytes));
        at += bytes;
        (bytes > 0).then_some(piece)
    })
}

impl BlockDevice for SparseFile {
    fn name(&self) -> String {
        "fuzz".into()
    }

    fn size_bytes(&self) -> u64 {
        self.0.read().size_bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        self.check_range(range)?;
        let content = self.0.read();
        let mut rest = buffer;
        for (page, inside, bytes) in pieces(range) {
            let (piece, after) = rest.split_at_mut(bytes);
            match content.pages.get(&page) {
                Some(page) => piece.copy_from_slice(&page[inside..inside + bytes]),
                None => piece.fill(0),
            }
            rest = after;
        }
        Ok(())
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.check_range(range)?;
        let content = self.0.read();
        let mut extents = Vec::new();
        let mut at = range.offset;
        for page in content.pages.range(range.offset / PAGE..range.end().div_ceil(PAGE)) {
            let page = ByteRange::new(page.0 * PAGE, PAGE).intersect(&range);
            push_extent(&mut extents, Extent::new(at, page.offset - at, ExtentKind::Unallocated));
            push_extent(&mut extents, Extent { range: page, kind: ExtentKind::Data });
            at = page.end();
        }
        push_extent(&mut extents, Extent::new(at, range.end() - at, ExtentKind::Unallocated));
        Ok(extents)
    }
}

impl WritableBlockDevice for SparseFile {
    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        let range = ByteRange::new(offset, data.len() as u64);
        self.check_range(range)?;
        let mut content = self.0.write();
        let mut rest = data;
        for (page, inside, bytes) in pieces(range) {
            if content.pages.len() >= MOST_PAGES && !content.pages.contains_key(&page) {
                return Err(BlockError::unsupported("fuzz", "no space left"));
            }
            let page = content.pages.entry(page).or_insert_with(|| Box::new([0; 4096]));
            page[inside..inside + bytes].copy_from_slice(&rest[..bytes]);
            rest = &rest[bytes..];
        }
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        self.check_range(range)?;
        let mut content = self.0.write();
        let first = range.offset / PAGE;
        let touched: Vec<u64> =
            content.pages.range(first..range.end().div_ceil(PAGE)).map(|(page, _)| *page).collect();
        for page in touched {
            let inside = ByteRange::new(page * PAGE, PAGE).intersect(&range);
            if inside.length == PAGE {
                content.pages.remove(&page);
            } else if let Some(bytes) = content.pages.get_mut(&page) {
                let start = length(inside.offset - page * PAGE);
                bytes[start..start + length(inside.length)].fill(0);
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        if size_bytes > MOST_BYTES {
            return Err(BlockError::unsupported("fuzz", "no file is as large"));
        }
        let old_bytes = self.size_bytes();
        if size_bytes < old_bytes {
            self.write_zeroes(ByteRange::from_bounds(size_bytes, old_bytes))?;
        }
        self.0.write().size_bytes = size_bytes;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packed_file_is_the_file() {
        let file = SparseFile::parse(&[3, 0]);
        file.write_at(&[1; 10_000], 512 * 7).unwrap();
        file.write_at(&[2; 3], (3 << 20) - 3).unwrap();
        file.write_zeroes(ByteRange::new(5000, 4500)).unwrap();
        let again = SparseFile::parse(&pack(&file).unwrap());
        let read = |file: &SparseFile| {
            let mut bytes = vec![0xee; 3 << 20];
            file.read_at(&mut bytes, 0).unwrap();
            bytes
        };
        assert!(read(&file) == read(&again));
        assert_eq!(read(&file)[512 * 7], 1);
        assert_eq!(read(&file)[5000], 0);
        file.resize(5000).unwrap();
        file.resize(3 << 20).unwrap();
        assert!(read(&file)[5000..].iter().all(|byte| *byte == 0));
        assert!(file.resize(u64::MAX).is_err());
        SparseFile::parse(&[1, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 7]);
        SparseFile::parse(&[]);
    }
}
