//! A file record and its attributes.

use crate::bytes::{index, u16_at, u32_at, u64_at};

/// A record in use.
const FLAG_IN_USE: u16 = 1;
/// A record of a directory.
const FLAG_DIRECTORY: u16 = 2;

/// `$FILE_NAME`.
const FILE_NAME: u32 = 0x30;
/// `$DATA`.
const DATA: u32 = 0x80;
/// What ends the list of attributes.
const END: u32 = 0xFFFF_FFFF;

/// The name space of the second, short name that DOS wants.
const DOS_NAMES: u8 = 2;

/// What record numbers have in a reference; above is how often the record was used anew.
const NUMBER: u64 = (1 << 48) - 1;

/// Which bytes end with the update sequence number, to tell records that were half written.
const STRIDE: usize = 512;

/// A record in use, its update sequence undone.
pub(super) struct Record<'a> {
    bytes: &'a [u8],
    flags: u16,
    base: Option<u64>,
    first_attribute: usize,
}

/// A name of a file and the directory it is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) parent: u64,
    pub(super) name: String,
}

impl<'a> Record<'a> {
    /// One in use that is whole, as far as can be told.
    pub(super) fn parse(bytes: &'a mut [u8]) -> Option<Self> {
        if bytes.get(..4)? != b"FILE" {
            return None;
        }
        let flags = u16_at(bytes, 0x16)?;
        if flags & FLAG_IN_USE == 0 {
            return None;
        }
        undo_update_sequence(bytes)?;
        let first_attribute = usize::from(u16_at(bytes, 0x14)?);
        let base = Some(u64_at(bytes, 0x20)?).filter(|base| *base != 0).map(|base| base & NUMBER);
        let used = index(u32_at(bytes, 0x18)?).min(bytes.len());
        Some(Self { bytes: &bytes[..used], flags, base, first_attribute })
    }

    pub(super) const fn is_directory(&self) -> bool {
        self.flags & FLAG_DIRECTORY != 0
    }

    /// The record that this one has more attributes of; none for the first record of a file.
    pub(super) const fn base(&self) -> Option<u64> {
        self.base
    }

    pub(super) fn attributes(&self) -> impl Iterator<Item = Attribute<'a>> {
        let mut rest = self.bytes.get(self.first_attribute..).unwrap_or_default();
        std::iter::from_fn(move || {
            let kind = u32_at(rest, 0).filter(|kind| *kind != END)?;
            let length = u32_at(rest, 4).map(index).filter(|length| *length >= 24)?;
            let (bytes, after) = rest.split_at_checked(length)?;
            rest = after;
            Some(Attribute { kind, bytes })
        })
    }

    /// Its names, but for those made up for DOS.
    pub(super) fn links(&self) -> impl Iterator<Item = Link> {
        self.attributes().filter(|attribute| attribute.kind == FILE_NAME).filter_map(|attribute| {
            let value = attribute.value()?;
            let parent = u64_at(value, 0)? & NUMBER;
            let (length, space) = (usize::from(*value.get(0x40)?), *value.get(0x41)?);
            let name = utf16(value.get(0x42..0x42 + 2 * length)?);
            (space != DOS_NAMES).then_some(Link { parent, name })
        })
    }
}

/// An attribute of a record.
pub(super) struct Attribute<'a> {
    kind: u32,
    bytes: &'a [u8],
}

impl<'a> Attribute<'a> {
    /// Whether it is content of a file, as programs read it.
    pub(super) const fn is_data(&self) -> bool {
        self.kind == DATA
    }

    /// The stream's name; empty for the one that every file has.
    pub(super) fn name(&self) -> String {
        let length = 2 * self.bytes.get(9).map_or(0, |length| usize::from(*length));
        let begin = u16_at(self.bytes, 10).map_or(0, usize::from);
        self.bytes.get(begin..).and_then(|rest| rest.get(..length)).map(utf16).unwrap_or_default()
    }

    fn is_resident(&self) -> bool {
        self.bytes.get(8) == Some(&0)
    }

    /// Its value, where that is in the record.
    fn value(&self) -> Option<&'a [u8]> {
        let (length, begin) = (u32_at(self.bytes, 0x10)?, u16_at(self.bytes, 0x14)?);
        let value = self.bytes.get(usize::from(begin)..)?.get(..index(length))?;
        self.is_resident().then_some(value)
    }

    /// The first cluster of the stream that [`mapping`](Self::mapping) tells of.
    pub(super) fn first_cluster(&self) -> Option<u64> {
        u64_at(self.bytes, 0x10).filter(|_| !self.is_resident())
    }

    /// Where it lies, as it is encoded; none where it is in the record.
    pub(super) fn mapping(&self) -> Option<&'a [u8]> {
        let begin = u16_at(self.bytes, 0x20)?;
        self.bytes.get(usize::from(begin)..).filter(|_| !self.is_resident())
    }
}

/// Puts back the bytes that the update sequence number took the place of; none where the record was half written.
fn undo_update_sequence(bytes: &mut [u8]) -> Option<()> {
    let (begin, count) = (usize::from(u16_at(bytes, 4)?), usize::from(u16_at(bytes, 6)?));
    let sequence = bytes.get(begin..begin + 2 * count)?.to_vec();
    let (number, originals) = sequence.split_first_chunk::<2>()?;
    for (stride, original) in bytes.chunks_exact_mut(STRIDE).zip(originals.chunks_exact(2)) {
        let end = stride.last_chunk_mut::<2>()?;
        if end != number {
            return None;
        }
        end.copy_from_slice(original);
    }
    Some(())
}

fn utf16(bytes: &[u8]) -> String {
    let units: Vec<u16> =
        bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
    String::from_utf16_lossy(&units)
}
