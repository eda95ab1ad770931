//! L1 and L2 tables: from a place on the disk to where its bytes are (qcow2 specification,
//! "Cluster mapping", "Extended L2 Entries").

use super::header::{COMPRESSED, COPIED, Header, OFFSET_MASK, incompatible};
use crate::bytes::{decode_table, encode_table, length};
use vmtide_block::{BlockDevice, BlockError, Result};

/// The subclusters of a cluster where L2 entries are extended.
pub(crate) const SUBCLUSTERS: u64 = 32;

/// The bytes of an L2 table that readers keep as one.
const SLICE_BYTES: u64 = 4096;

/// What an open image's geometry is: constants that all lookups share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub(crate) cluster_bits: u32,
    pub(crate) extended: bool,
    pub(crate) version: u32,
    pub(crate) external_data: bool,
}

impl Geometry {
    pub(crate) fn of(header: &Header) -> Self {
        Self {
            cluster_bits: header.cluster_bits,
            extended: header.has(incompatible::EXTENDED_L2),
            version: header.version,
            external_data: header.has(incompatible::EXTERNAL_DATA),
        }
    }

    pub(crate) const fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The `u64` words of one L2 entry.
    pub(crate) const fn words(&self) -> u64 {
        if self.extended { 2 } else { 1 }
    }

    /// The clusters one L2 table maps.
    pub(crate) const fn l2_entries(&self) -> u64 {
        self.cluster_bytes() / 8 / self.words()
    }

    /// The bytes of disk one L2 table maps.
    pub(crate) const fn l2_span(&self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// The bytes of a table that are read as one: QEMU's default, too. A random read of a disk
    /// whose tables do not fit the cache costs one of these; larger ones would cost more there and
    /// save little elsewhere.
    pub(crate) const fn slice_bytes(&self) -> u64 {
        if self.cluster_bytes() < SLICE_BYTES { self.cluster_bytes() } else { SLICE_BYTES }
    }

    /// The entries of a slice.
    pub(crate) const fn slice_entries(&self) -> u64 {
        self.slice_bytes() / 8 / self.words()
    }

    /// The bytes that are mapped as one: a subcluster, or a cluster where there are none.
    pub(crate) const fn unit_bytes(&self) -> u64 {
        if self.extended { self.cluster_bytes() / SUBCLUSTERS } else { self.cluster_bytes() }
    }

    /// The L1 index of a disk offset, and the index of its cluster in the L2 table.
    pub(crate) const fn indices(&self, offset: u64) -> (u64, u64) {
        let cluster = offset >> self.cluster_bits;
        (cluster / self.l2_entries(), cluster % self.l2_entries())
    }
}

/// Where the bytes of one unit are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// In the backing file, or zero where there is none.
    Unallocated,
    /// Nowhere: they are zero.
    Zero,
    /// At this offset in the image or its data file.
    Data(u64),
    /// In this many bytes at this offset, compressed, together with the rest of their cluster.
    Compressed {
        /// The first byte.
        offset: u64,
        /// The most bytes of compressed data; it may end earlier.
        length: u64,
    },
}

/// A contiguous range of the disk with one mapping; [`Mapping::Data`] is where it starts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub(crate) mapping: Mapping,
    pub(crate) length: u64,
}

/// One L2 table in memory, or a slice of one.
#[derive(Clone, Debug)]
pub(crate) struct L2Table {
    /// Where the whole table is in the file, for error messages.
    pub(crate) offset: u64,
    /// The index of the first entry that is here.
    first: u64,
    /// The entries, one or two words each.
    words: Vec<u64>,
}

impl L2Table {
    pub(crate) fn empty(geometry: &Geometry, offset: u64) -> Self {
        Self { offset, first: 0, words: vec![0; length(geometry.cluster_bytes() / 8)] }
    }

    /// Reads the table at `offset`, which the caller has checked.
    pub(crate) fn read(file: &dyn BlockDevice, geometry: &Geometry, offset: u64) -> Result<Self> {
        let mut bytes = vec![0u8; length(geometry.cluster_bytes())];
        file.read_at(&mut bytes, offset)?;
        Ok(Self { offset, first: 0, words: decode_table(&bytes) })
    }

    /// Reads the slice with this index of the table at `offset`, which the caller has checked.
    pub(crate) fn read_slice(
        file: &dyn BlockDevice,
        geometry: &Geometry,
        offset: u64,
        slice: u64,
    ) -> Result<Self> {
        let mut bytes = vec![0u8; length(geometry.slice_bytes())];
        file.read_at(&mut bytes, offset + slice * geometry.slice_bytes())?;
        let first = slice * geometry.slice_entries();
        Ok(Self { offset, first, words: decode_table(&bytes) })
    }

    /// Whether the entry for the disk at `offset` of this table's span is here.
    pub(crate) fn maps(&self, geometry: &Geometry, offset: u64) -> bool {
        (self.first..self.end(geometry)).contains(&geometry.indices(offset).1)
    }

    /// The index of the entry after the last that is here.
    fn end(&self, geometry: &Geometry) -> u64 {
        self.first + self.words.len() as u64 / geometry.words()
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        encode_table(&self.words)
    }

    /// The entry and, where entries are extended, the subcluster bitmap (zero where not).
    pub(crate) fn entry(&self, geometry: &Geometry, index: u64) -> (u64, u64) {
        let at = length(index.wrapping_sub(self.first).saturating_mul(geometry.words()));
        let word = |at: usize| self.words.get(at).copied().unwrap_or(0);
        (word(at), if geometry.extended { word(at.saturating_add(1)) } else { 0 })
    }

    pub(crate) fn set_entry(&mut self, geometry: &Geometry, index: u64, entry: u64, bitmap: u64) {
        let at = length(index.wrapping_sub(self.first).saturating_mul(geometry.words()));
        if let Some(word) = self.words.get_mut(at) {
            *word = entry;
        }
        if geometry.extended
            && let Some(word) = self.words.get_mut(at.saturating_add(1))
        {
            *word = bitmap;
        }
    }

    /// The mapping of one unit: subcluster `sub` (0 where there are none) of cluster `index`,
    /// which lies at `disk_offset`. The error text names the entry and its value.
    pub(crate) fn mapping(
        &self,
        name: &str,
        geometry: &Geometry,
        index: u64,
        sub: u64,
        disk_offset: u64,
    ) -> Result<Mapping> {
        let (entry, bitmap) = self.entry(geometry, index);
        let damaged = |what: &str| {
            Err(BlockError::damaged(
                name,
                format!("L2 table at {:#x}, entry {index}: {entry:#018x} {what}", self.offset),
            ))
        };
        if entry & COMPRESSED != 0 {
            if geometry.external_data {
                return damaged("is compressed, but the data is in an external file");
            }
            return match compressed(geometry.cluster_bits, entry) {
                Some(mapping) => Ok(mapping),
                None => damaged("has reserved bits of a compressed cluster set"),
            };
        }
        let host = entry & OFFSET_MASK;
        if !host.is_multiple_of(geometry.cluster_bytes()) {
            return damaged("points to an offset that is not cluster-aligned");
        }
        let present = host != 0 || (geometry.external_data && entry & COPIED != 0);
        let cluster_start = disk_offset & !(geometry.cluster_bytes() - 1);
        if present && geometry.external_data && host != cluster_start {
            return damaged("does not match its own place, as an external data file demands");
        }
        if geometry.extended {
            let allocated = bitmap >> sub & 1 != 0;
            let zero = bitmap >> (sub + SUBCLUSTERS) & 1 != 0;
            return match (allocated, zero) {
                (true, true) => damaged("has a subcluster that is both allocated and zero"),
                (true, false) if !present => damaged("has an allocated subcluster but no cluster"),
                (true, false) => Ok(Mapping::Data(host + sub * geometry.unit_bytes())),
                (false, true) => Ok(Mapping::Zero),
                (false, false) => Ok(Mapping::Unallocated),
            };
        }
        if entry & 1 != 0 {
            if geometry.version < 3 {
                return damaged("is a zero cluster, which version 2 does not have");
            }
            return Ok(Mapping::Zero);
        }
        Ok(if present { Mapping::Data(host) } else { Mapping::Unallocated })
    }

    /// The longest run from `offset`, which lies in this table, at most `limit` bytes and not past
    /// the table's end.
    pub(crate) fn run(
        &self,
        name: &str,
        geometry: &Geometry,
        offset: u64,
        limit: u64,
    ) -> Result<Run> {
        let unit = geometry.unit_bytes();
        let at = |offset: u64| {
            let index = geometry.indices(offset).1;
            let sub = offset % geometry.cluster_bytes() / unit;
            self.mapping(name, geometry, index, sub, offset)
        };
        let inside = offset % unit;
        let first = match at(offset)? {
            Mapping::Data(host) => Mapping::Data(host + inside),
            mapping @ Mapping::Compressed { .. } => {
                let rest = geometry.cluster_bytes() - offset % geometry.cluster_bytes();
                return Ok(Run { mapping, length: rest.min(limit) });
            }
            mapping => mapping,
        };
        let end = self.end(geometry) << geometry.cluster_bits;
        let limit = limit.min(end - offset % geometry.l2_span());
        let mut run = unit - inside;
        if !geometry.extended {
            run +=
                self.like_the_first(geometry, geometry.indices(offset).1) << geometry.cluster_bits;
        }
        while run < limit {
            let next = at(offset + run)?;
            let continues = match (first, next) {
                (Mapping::Data(start), Mapping::Data(host)) => host == start + run,
                (Mapping::Zero, Mapping::Zero) | (Mapping::Unallocated, Mapping::Unallocated) => {
                    true
                }
                _ => false,
            };
            if !continues {
                break;
            }
            run += unit;
        }
        Ok(Run { mapping: first, length: run.min(limit) })
    }

    /// How many entries after the standard one at `index`, which was found sound, go on as it does
    /// by their very words: the next cluster of the file, or the same where it has none. What
    /// differs in a flag is left to a closer look.
    fn like_the_first(&self, geometry: &Geometry, index: u64) -> u64 {
        let at = length(index.wrapping_sub(self.first));
        let Some((first, rest)) = self.words.get(at..).and_then(<[u64]>::split_first) else {
            return 0;
        };
        let is_data = first & OFFSET_MASK != 0 && first & 1 == 0;
        let step = if is_data { geometry.cluster_bytes() } else { 0 };
        // The masked bits end where the sum of any sound offset and all steps would carry.
        let room = (OFFSET_MASK - (first & OFFSET_MASK)) >> geometry.cluster_bits;
        let mut next = *first;
        let goes_on = |word: &&u64| {
            next = next.wrapping_add(step);
            **word == next
        };
        rest.iter().take(length(room)).take_while(goes_on).count() as u64
    }
}

/// Decodes a compressed cluster's descriptor (specification, "Compressed Clusters Descriptor").
fn compressed(cluster_bits: u32, entry: u64) -> Option<Mapping> {
    let shift = 62 - (cluster_bits - 8);
    let offset = entry & ((1 << shift) - 1);
    let sectors = (entry & !COPIED & !COMPRESSED) >> shift;
    (offset < 1 << 56)
        .then_some(Mapping::Compressed { offset, length: (sectors + 1) * 512 - offset % 512 })
}

/// The offset in a checked L1 entry: `None` where there is no L2 table.
pub(crate) fn l2_offset(
    name: &str,
    geometry: &Geometry,
    l1_index: u64,
    entry: u64,
    file_bytes: u64,
) -> Result<Option<u64>> {
    let offset = entry & OFFSET_MASK;
    if offset == 0 {
        return Ok(None);
    }
    let cluster = geometry.cluster_bytes();
    let inside = offset.checked_add(cluster).is_some_and(|end| end <= file_bytes);
    if !offset.is_multiple_of(cluster) || !inside {
        return Err(BlockError::damaged(
            name,
            format!(
                "L1 table, entry {l1_index}: {entry:#018x} is not a cluster-aligned offset inside \
                 the file of {file_bytes} bytes"
            ),
        ));
    }
    Ok(Some(offset))
}
