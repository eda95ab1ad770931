//! `<disk>.rct`: everything that is known, at one moment. See `docs/tracking-format.md` for the bytes.
//!
//! Little-endian; a header of 128 bytes and a body, each under a CRC-32C. The file is only ever replaced as a whole,
//! so it is either one moment's or damaged, and nothing is salvaged from a damaged one.

use crate::bitmap::{Layer, PAGE_BITS, PAGE_WORDS, Page, PagedBitmap, Words, page_count};
use crate::id::{MAX_COUNTER, Series};
use crate::identity::StoredIdentity;
use crate::options::{Geometry, MAX_IDS};
use std::sync::Arc;

/// What the file begins with.
pub(crate) const MAGIC: [u8; 8] = *b"VMTIDERC";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 128;
/// Where the header's checksum is.
const HEADER_CRC: usize = HEADER_BYTES - 4;

/// The image was closed in order after the last write: the bitmaps are exact.
const FLAG_CLOSED: u16 = 1;

/// The most marks of writers that are kept.
const MAX_GENERATIONS: usize = 4;

/// The most series of ids that are remembered as lost.
pub(crate) const MAX_LOST: usize = 8;

/// How a page of a bitmap is written.
mod kind {
    pub const EMPTY: u8 = 0;
    pub const FULL: u8 = 1;
    /// 4096 bytes follow.
    pub const BITS: u8 = 2;
    /// A count (16 bits) and as many bit numbers (16 bits each), going up, follow.
    pub const LIST: u8 = 3;
}

/// The most bits that are listed one by one; more are shorter as 4096 bytes.
const MAX_LISTED: usize = 2000;

/// A length that says that there is no text.
const NO_TEXT: u16 = u16::MAX;

/// What a `.rct` holds.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    pub series: Series,
    pub geometry: Geometry,
    pub epoch: u64,
    /// Closed in order, and nothing written since.
    pub closed: bool,
    pub last_counter: u32,
    pub identity: StoredIdentity,
    /// Series that were lost, with the reason, the latest last.
    pub lost: Vec<(Series, String)>,
    /// The ids, the oldest first; never empty.
    pub ids: Vec<SavedId>,
}

/// One retained id.
#[derive(Clone, Debug)]
pub(crate) struct SavedId {
    pub counter: u32,
    pub sealed_unix_ms: u64,
    /// What was written from then until the next id, or until now.
    pub changed: Layer,
}

impl Saved {
    /// The bytes of the file.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let identity = &self.identity;
        for text in [&identity.disk_id, &identity.stamp, &identity.file_id] {
            put_text(&mut body, text.as_deref());
        }
        let generations = identity.generations.iter().take(MAX_GENERATIONS);
        put_u16(&mut body, generations.len());
        for mark in generations {
            put_text(&mut body, Some(mark));
        }
        let skipped = self.lost.len().saturating_sub(MAX_LOST);
        put_u16(&mut body, self.lost.len() - skipped);
        for (series, reason) in self.lost.iter().skip(skipped) {
            body.extend(series.0);
            put_text(&mut body, Some(reason));
        }
        let ids: Vec<_> = self.ids.iter().skip(self.ids.len().saturating_sub(MAX_IDS)).collect();
        put_u16(&mut body, ids.len());
        for id in ids {
            body.extend(id.counter.to_le_bytes());
            body.extend(id.sealed_unix_ms.to_le_bytes());
            put_bitmap(&mut body, &id.changed, self.geometry.blocks());
        }
        let mut bytes = self.header(&body);
        bytes.extend(body);
        bytes
    }

    fn header(&self, body: &[u8]) -> Vec<u8> {
        let mut header = Vec::with_capacity(HEADER_BYTES + body.len());
        header.extend(MAGIC);
        header.extend(VERSION.to_le_bytes());
        let flags = if self.closed { FLAG_CLOSED } else { 0 };
        header.extend(flags.to_le_bytes());
        header.extend(self.geometry.granularity_bytes.to_le_bytes());
        header.extend(self.geometry.size_bytes.to_le_bytes());
        header.extend(self.epoch.to_le_bytes());
        header.extend(self.series.0);
        header.extend(self.geometry.region_bytes.to_le_bytes());
        header.extend(self.last_counter.to_le_bytes());
        header.extend((body.len() as u64).to_le_bytes());
        header.extend(crc32c::crc32c(body).to_le_bytes());
        header.resize(HEADER_CRC, 0);
        header.extend(crc32c::crc32c(&header).to_le_bytes());
        header
    }

    /// Reads a file. Memory is bounded by a small multiple of the file's length.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let (header, body) = bytes.split_at_checked(HEADER_BYTES).ok_or("it is cut short")?;
        let mut fields = Reader(header);
        if fields.take(8)? != MAGIC {
            return Err("it is no tracking file of vmtide".into());
        }
        let checksum = header.get(HEADER_CRC..).and_then(|crc| crc.try_into().ok());
        let covered = header.get(..HEADER_CRC).unwrap_or_default();
        if checksum.map(u32::from_le_bytes) != Some(crc32c::crc32c(covered)) {
            return Err("its header is damaged".into());
        }
        let version = fields.u16()?;
        if version != VERSION {
            return Err(format!("its version {version} is not known, only {VERSION}"));
        }
        let flags = fields.u16()?;
        let granularity_bytes = fields.u32()?;
        let size_bytes = fields.u64()?;
        let epoch = fields.u64()?;
        let series = fields.series()?;
        let region_bytes = fields.u32()?;
        let last_counter = fields.u32()?;
        let (length, checksum) = (fields.u64()?, fields.u32()?);
        if length != body.len() as u64 || checksum != crc32c::crc32c(body) {
            return Err("its body is damaged".into());
        }
        let geometry = Geometry::new(size_bytes, granularity_bytes, region_bytes)
            .map_err(|error| error.to_string())?;
        let closed = flags & FLAG_CLOSED != 0;
        let mut saved = Self {
            series,
            geometry,
            epoch,
            closed,
            last_counter,
            identity: StoredIdentity::default(),
            lost: Vec::new(),
            ids: Vec::new(),
        };
        saved.read_body(&mut Reader(body))?;
        Ok(saved)
    }

    fn read_body(&mut self, body: &mut Reader<'_>) -> Result<(), String> {
        self.identity.disk_id = body.text()?;
        self.identity.stamp = body.text()?;
        self.identity.file_id = body.text()?;
        for _ in 0..body.count(MAX_GENERATIONS)? {
            self.identity.generations.push(body.text()?.ok_or("a mark of a writer is missing")?);
        }
        for _ in 0..body.count(MAX_LOST)? {
            self.lost.push((body.series()?, body.text()?.unwrap_or_default()));
        }
        for _ in 0..body.count(MAX_IDS)? {
            let counter = body.u32()?;
            let before = self.ids.last().map_or(0, |id| id.counter);
            if counter <= before || counter > self.last_counter {
                return Err("its ids are out of order".into());
            }
            let sealed_unix_ms = body.u64()?;
            let bitmap = body.bitmap(self.geometry.blocks())?;
            let changed = Layer::Sealed(Arc::new(bitmap));
            self.ids.push(SavedId { counter, sealed_unix_ms, changed });
        }
        if self.ids.is_empty() || self.last_counter > MAX_COUNTER || !body.0.is_empty() {
            return Err("its body does not add up".into());
        }
        Ok(())
    }
}

fn put_u16(out: &mut Vec<u8>, value: usize) {
    out.extend(u16::try_from(value).unwrap_or(u16::MAX).to_le_bytes());
}

fn put_text(out: &mut Vec<u8>, text: Option<&str>) {
    let text = crate::identity::stored(text);
    match &text {
        None => out.extend(NO_TEXT.to_le_bytes()),
        Some(text) => {
            put_u16(out, text.len());
            out.extend(text.as_bytes());
        }
    }
}

fn put_bitmap(out: &mut Vec<u8>, bitmap: &Layer, bits: u64) {
    let mut words = [0; PAGE_WORDS];
    for page in 0..page_count(bits) {
        words.fill(0);
        bitmap.or_page(page, &mut words);
        put_page(out, &words);
    }
}

fn put_page(out: &mut Vec<u8>, words: &Words) {
    let set: usize = words.iter().map(|word| word.count_ones() as usize).sum();
    if set == 0 {
        out.push(kind::EMPTY);
    } else if set == PAGE_WORDS * 64 {
        out.push(kind::FULL);
    } else if set > MAX_LISTED {
        out.push(kind::BITS);
        out.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    } else {
        out.push(kind::LIST);
        put_u16(out, set);
        for (word, base) in words.iter().zip((0usize..).step_by(64)) {
            let mut rest = *word;
            while rest != 0 {
                put_u16(out, base + rest.trailing_zeros() as usize);
                rest &= rest - 1;
            }
        }
    }
}

/// What is left to read of a buffer.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or("it is cut short")?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let taken = self.take(N)?;
        taken.try_into().map_err(|_| "it is cut short".to_owned())
    }

    fn u16(&mut self) -> Result<u16, String> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn series(&mut self) -> Result<Series, String> {
        Ok(Series(self.array()?))
    }

    fn count(&mut self, most: usize) -> Result<usize, String> {
        let count = usize::from(self.u16()?);
        if count > most {
            Err(format!("it has {count} entries where {most} are the most"))
        } else {
            Ok(count)
        }
    }

    fn text(&mut self) -> Result<Option<String>, String> {
        let length = self.u16()?;
        if length == NO_TEXT {
            return Ok(None);
        }
        let text = std::str::from_utf8(self.take(length.into())?);
        text.map(|text| Some(text.to_owned())).map_err(|_| "a text in it is no UTF-8".into())
    }

    fn bitmap(&mut self, bits: u64) -> Result<PagedBitmap, String> {
        let count = page_count(bits);
        // Each page takes a byte at least.
        if count > self.0.len() {
            return Err("a bitmap in it is cut short".into());
        }
        let mut pages = Vec::with_capacity(count);
        for _ in 0..count {
            pages.push(self.page()?);
        }
        Ok(PagedBitmap { pages })
    }

    fn page(&mut self) -> Result<Page, String> {
        let [kind] = self.array()?;
        let mut words = [0u64; PAGE_WORDS];
        match kind {
            kind::EMPTY => return Ok(Page::Empty),
            kind::FULL => return Ok(Page::Full),
            kind::BITS => {
                for word in &mut words {
                    *word = self.u64()?;
                }
            }
            kind::LIST => {
                for _ in 0..self.count(MAX_LISTED)? {
                    let bit = u64::from(self.u16()?);
                    let word = usize::try_from(bit / 64).ok().filter(|_| bit < PAGE_BITS);
                    let word = word.and_then(|index| words.get_mut(index));
                    *word.ok_or("a bitmap in it has a bit outside of its page")? |= 1 << (bit % 64);
                }
            }
            other => return Err(format!("a bitmap in it has a page of unknown kind {other}")),
        }
        Ok(Page::of(&words))
    }
}

/// Makes both checksums right, so that mutated bytes reach what stands behind them.
pub(crate) fn fix_checksums(bytes: &mut [u8]) {
    let Some((header, body)) = bytes.split_at_mut_checked(HEADER_BYTES) else {
        return;
    };
    if let Some(field) = header.get_mut(56..68) {
        let (length, checksum) = field.split_at_mut(8);
        length.copy_from_slice(&(body.len() as u64).to_le_bytes());
        checksum.copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
    }
    let (covered, checksum) = header.split_at_mut(HEADER_CRC);
    checksum.copy_from_slice(&crc32c::crc32c(covered).to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bitmap::AtomicBitmap;

    fn sample() -> Saved {
        let geometry = Geometry::new(3 * PAGE_BITS * 65536 + 1, 65536, 16 << 20).unwrap();
        let bitmap = |ranges: &[(u64, u64)]| {
            let bitmap = AtomicBitmap::new(geometry.blocks());
            ranges.iter().for_each(|(first, end)| bitmap.set_range(*first, *end));
            Layer::Growing(Arc::new(bitmap))
        };
        let id = |counter, changed| SavedId { counter, sealed_unix_ms: 7, changed };
        Saved {
            series: Series([9; 16]),
            geometry,
            epoch: 77,
            closed: true,
            last_counter: 12,
            identity: StoredIdentity {
                disk_id: Some("disk".into()),
                stamp: None,
                file_id: Some(String::new()),
                generations: vec!["a".into(), "b".into()],
            },
            lost: vec![(Series::ANY, "gone".into())],
            ids: vec![
                id(3, bitmap(&[(1, 2), (5, 9), (PAGE_BITS, 2 * PAGE_BITS)])),
                id(12, bitmap(&[(2 * PAGE_BITS, 2 * PAGE_BITS + 5000)])),
            ],
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let saved = sample();
        let bytes = saved.encode();
        assert!(bytes.len() < 6000, "{}", bytes.len());
        let read = Saved::decode(&bytes).unwrap();
        assert_eq!(read.encode(), bytes);
        assert_eq!((read.series, read.geometry, read.epoch), (saved.series, saved.geometry, 77));
        assert_eq!((read.identity, read.lost), (saved.identity, saved.lost));
        assert!(read.closed && read.last_counter == 12 && read.ids.len() == 2);
    }

    #[test]
    fn damage_anywhere_is_noticed() {
        let bytes = sample().encode();
        for length in (0..bytes.len()).step_by(7) {
            assert!(Saved::decode(&bytes[..length]).is_err(), "cut at {length}");
        }
        for at in (0..bytes.len()).filter(|at| *at < 400 || at % 13 == 0) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x20;
            assert!(Saved::decode(&damaged).is_err(), "byte {at}");
        }
    }
}
