//! The header of a qcow2 image and its extensions (qcow2 specification, "Header", "Header
//! extensions"), checked field by field before anything is followed.

use super::table::Geometry;
use crate::Compression;
use crate::bytes::{be_u32, be_u64, length};
use vmtide_block::{BlockDevice, BlockError, ByteRange, Result};

/// `QFI\xfb`.
pub(crate) const MAGIC: u32 = 0x5146_49fb;
/// The most bytes of an L1 table, as in QEMU. An L1 table is held in memory while an image is open.
pub(crate) const MAX_L1_BYTES: u64 = 32 << 20;
/// The most bytes of a refcount table, as in QEMU.
pub(crate) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// The most internal snapshots, as in QEMU.
pub(crate) const MAX_SNAPSHOTS: u32 = 65_536;
/// The most bytes of a backing file's name (specification, byte 16 of the header).
pub(crate) const MAX_NAME_BYTES: u32 = 1023;
/// Smaller and larger clusters are not in the specification or not in QEMU.
pub(crate) const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Bits 9 to 55 of L1, L2 and bitmap table entries: an offset in the file.
pub(crate) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 63 of L1 and L2 entries: the target's reference count is exactly one.
pub(crate) const COPIED: u64 = 1 << 63;
/// Bit 62 of L2 entries: a compressed cluster.
pub(crate) const COMPRESSED: u64 = 1 << 62;

/// The offsets of the header fields a writer changes; all lie in the first sector, so that a
/// change is atomic on every medium.
pub(crate) mod field {
    pub(crate) const SIZE: usize = 24;
    pub(crate) const L1_SIZE: usize = 36;
    pub(crate) const L1_OFFSET: usize = 40;
    pub(crate) const REFCOUNT_TABLE_OFFSET: usize = 48;
    pub(crate) const REFCOUNT_TABLE_CLUSTERS: usize = 56;
    pub(crate) const INCOMPATIBLE: usize = 72;
    pub(crate) const AUTOCLEAR: usize = 88;
    pub(crate) const V2_LENGTH: usize = 72;
    pub(crate) const V3_LENGTH: usize = 104;
}

/// Incompatible feature bits (specification, bytes 72 to 79).
pub(crate) mod incompatible {
    pub(crate) const DIRTY: u64 = 1;
    pub(crate) const CORRUPT: u64 = 1 << 1;
    pub(crate) const EXTERNAL_DATA: u64 = 1 << 2;
    pub(crate) const COMPRESSION_TYPE: u64 = 1 << 3;
    pub(crate) const EXTENDED_L2: u64 = 1 << 4;
    pub(crate) const KNOWN: u64 = (1 << 5) - 1;
}

/// Autoclear feature bits (specification, bytes 88 to 95).
pub(crate) mod autoclear {
    pub(crate) const BITMAPS: u64 = 1;
    pub(crate) const RAW_EXTERNAL_DATA: u64 = 1 << 1;
    pub(crate) const KNOWN: u64 = (1 << 2) - 1;
}

/// The compatible feature bit of lazy reference counts.
pub(crate) const LAZY_REFCOUNTS: u64 = 1;

/// Header extension types.
pub(crate) mod extension {
    pub(crate) const END: u32 = 0;
    pub(crate) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(crate) const BITMAPS: u32 = 0x2385_2875;
    pub(crate) const DATA_FILE: u32 = 0x4441_5441;
}

/// Where the bitmap directory is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BitmapsExtension {
    pub(crate) count: u32,
    pub(crate) directory: ByteRange,
}

/// A checked header.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    pub(crate) size_bytes: u64,
    pub(crate) encryption: u32,
    pub(crate) l1_entries: u32,
    pub(crate) l1_offset: u64,
    pub(crate) refcount_table_offset: u64,
    pub(crate) refcount_table_clusters: u32,
    pub(crate) snapshot_count: u32,
    pub(crate) snapshots_offset: u64,
    pub(crate) incompatible: u64,
    pub(crate) compatible: u64,
    pub(crate) autoclear: u64,
    pub(crate) refcount_order: u32,
    pub(crate) compression: Compression,
    pub(crate) backing_name: Option<String>,
    pub(crate) backing_format: Option<String>,
    pub(crate) bitmaps: Option<BitmapsExtension>,
    pub(crate) data_file_name: Option<String>,
}

impl Header {
    /// Reads and checks the header of `file`.
    pub(crate) fn read(file: &dyn BlockDevice) -> Result<Self> {
        let name = file.name();
        let check = Check { name: &name };
        let file_bytes = file.size_bytes();
        let mut fixed = [0u8; 112];
        let present = length(file_bytes.min(fixed.len() as u64));
        if present < field::V2_LENGTH {
            return Err(check.damaged(format!(
                "header: the file has {file_bytes} bytes, a header has at least {}",
                field::V2_LENGTH
            )));
        }
        file.read_at(&mut fixed[..present], 0)?;
        let mut header = check.fixed_fields(&fixed[..present])?;
        check.features(&header)?;
        check.tables(&header, file_bytes)?;
        let header_length = if header.version == 2 {
            field::V2_LENGTH as u64
        } else {
            u64::from(be_u32(&fixed, 100))
        };
        let mut cluster = vec![0u8; length(header.cluster_bytes().min(file_bytes))];
        file.read_at(&mut cluster, 0)?;
        let backing_offset = be_u64(&cluster, 8);
        header.backing_name = check.backing_name(&cluster, backing_offset, be_u32(&cluster, 16))?;
        let end = if backing_offset == 0 {
            cluster.len()
        } else {
            cluster.len().min(length(backing_offset))
        };
        check.extensions(&mut header, &cluster[..end], length(header_length))?;
        if header.incompatible & incompatible::EXTERNAL_DATA != 0
            && header.autoclear & autoclear::RAW_EXTERNAL_DATA != 0
            && header.backing_name.is_some()
        {
            return Err(check.damaged(
                "header: a raw external data file and a backing file exclude each other",
            ));
        }
        Ok(header)
    }

    /// The header of an empty image; tables are not placed yet.
    pub(crate) const fn empty(version: u32, cluster_bits: u32, size_bytes: u64) -> Self {
        Self {
            version,
            cluster_bits,
            size_bytes,
            encryption: 0,
            l1_entries: 0,
            l1_offset: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            snapshot_count: 0,
            snapshots_offset: 0,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            compression: Compression::Zlib,
            backing_name: None,
            backing_format: None,
            bitmaps: None,
            data_file_name: None,
        }
    }

    pub(crate) const fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(crate) const fn has(&self, incompatible_bit: u64) -> bool {
        self.incompatible & incompatible_bit != 0
    }
}

struct Check<'a> {
    name: &'a str,
}

impl Check<'_> {
    fn damaged(&self, detail: impl Into<String>) -> BlockError {
        BlockError::damaged(self.name, detail)
    }

    fn unsupported(&self, detail: impl Into<String>) -> BlockError {
        BlockError::unsupported(self.name, detail)
    }

    fn fixed_fields(&self, bytes: &[u8]) -> Result<Header> {
        let magic = be_u32(bytes, 0);
        if magic != MAGIC {
            return Err(self
                .damaged(format!("header at 0: magic is {magic:#010x}, qcow2 has {MAGIC:#010x}")));
        }
        let version = be_u32(bytes, 4);
        if !(2..=3).contains(&version) {
            return Err(self.unsupported(format!(
                "header at 4: qcow2 version {version} is unknown; versions 2 and 3 are read"
            )));
        }
        let cluster_bits = be_u32(bytes, 20);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(self.damaged(format!(
                "header at 20: cluster_bits is {cluster_bits}, not one of 9 to 21"
            )));
        }
        let v3 = version == 3;
        if v3 {
            let header_length = be_u32(bytes, 100);
            if bytes.len() < field::V3_LENGTH
                || header_length < 104
                || !header_length.is_multiple_of(8)
                || u64::from(header_length) > 1 << cluster_bits
            {
                return Err(self.damaged(format!(
                    "header at 100: header_length is {header_length}, must be a multiple of 8 \
                     from 104 up to the cluster size, in a file of as many bytes"
                )));
            }
        }
        let v3_u64 = |at| if v3 { be_u64(bytes, at) } else { 0 };
        let has_compression_type = v3 && be_u32(bytes, 100) > 104;
        let compression_type =
            if has_compression_type { bytes.get(104).copied().unwrap_or(0) } else { 0 };
        Ok(Header {
            version,
            cluster_bits,
            size_bytes: be_u64(bytes, field::SIZE),
            encryption: be_u32(bytes, 32),
            l1_entries: be_u32(bytes, field::L1_SIZE),
            l1_offset: be_u64(bytes, field::L1_OFFSET),
            refcount_table_offset: be_u64(bytes, field::REFCOUNT_TABLE_OFFSET),
            refcount_table_clusters: be_u32(bytes, field::REFCOUNT_TABLE_CLUSTERS),
            snapshot_count: be_u32(bytes, 60),
            snapshots_offset: be_u64(bytes, 64),
            incompatible: v3_u64(72),
            compatible: v3_u64(80),
            autoclear: v3_u64(field::AUTOCLEAR),
            refcount_order: if v3 { be_u32(bytes, 96) } else { 4 },
            compression: self.compression(compression_type, v3_u64(72))?,
            backing_name: None,
            backing_format: None,
            bitmaps: None,
            data_file_name: None,
        })
    }

    fn compression(&self, value: u8, incompatible_bits: u64) -> Result<Compression> {
        let flagged = incompatible_bits & incompatible::COMPRESSION_TYPE != 0;
        match (value, flagged) {
            (0, false) => Ok(Compression::Zlib),
            (1, true) => Ok(Compression::Zstd),
            (0 | 1, _) => Err(self.damaged(format!(
                "header at 104: compression_type is {value} but the compression type feature bit \
                 is {}",
                if flagged { "set" } else { "clear" }
            ))),
            _ => Err(self.unsupported(format!(
                "header at 104: compression_type {value} is unknown; 0 (zlib) and 1 (zstd) are read"
            ))),
        }
    }

    fn features(&self, header: &Header) -> Result<()> {
        let unknown = header.incompatible & !incompatible::KNOWN;
        if unknown != 0 {
            return Err(self.unsupported(format!(
                "header at 72: unknown incompatible feature bits {unknown:#x}; a newer program \
                 wrote this image"
            )));
        }
        if header.refcount_order > 6 {
            return Err(self.damaged(format!(
                "header at 96: refcount_order is {}, at most 6 is allowed",
                header.refcount_order
            )));
        }
        if header.has(incompatible::EXTENDED_L2) && header.cluster_bits < 14 {
            return Err(self.damaged(format!(
                "header at 20: cluster_bits is {} but extended L2 entries need at least 14",
                header.cluster_bits
            )));
        }
        Ok(())
    }

    /// Succeeds where a table lies cluster-aligned inside the file.
    fn table(
        &self,
        what: &str,
        at: usize,
        header: &Header,
        range: ByteRange,
        file_bytes: u64,
    ) -> Result<()> {
        let inside = range.checked_end().is_some_and(|end| end <= file_bytes);
        if range.offset == 0 || !range.offset.is_multiple_of(header.cluster_bytes()) || !inside {
            return Err(self.damaged(format!(
                "header at {at}: {what} of {} bytes at {:#x} is not cluster-aligned inside the \
                 file of {file_bytes} bytes",
                range.length, range.offset
            )));
        }
        Ok(())
    }

    fn tables(&self, header: &Header, file_bytes: u64) -> Result<()> {
        if header.size_bytes > i64::MAX as u64 {
            return Err(self.damaged(format!(
                "header at 24: the disk has {} bytes, more than 2^63",
                header.size_bytes
            )));
        }
        let l1_bytes = u64::from(header.l1_entries) * 8;
        let needed = header.size_bytes.div_ceil(Geometry::of(header).l2_span());
        if l1_bytes > MAX_L1_BYTES || u64::from(header.l1_entries) < needed {
            return Err(self.damaged(format!(
                "header at 36: the L1 table has {} entries; a disk of {} bytes needs {needed} and \
                 at most {} are allowed",
                header.l1_entries,
                header.size_bytes,
                MAX_L1_BYTES / 8
            )));
        }
        if l1_bytes > 0 {
            let range = ByteRange::new(header.l1_offset, l1_bytes);
            self.table("the L1 table", field::L1_OFFSET, header, range, file_bytes)?;
        }
        let refcount_bytes = u64::from(header.refcount_table_clusters) << header.cluster_bits;
        if !header.refcount_table_offset.is_multiple_of(header.cluster_bytes())
            || refcount_bytes > MAX_REFCOUNT_TABLE_BYTES.max(header.cluster_bytes())
        {
            return Err(self.damaged(format!(
                "header at 48: the refcount table of {} clusters at {:#x} is not cluster-aligned \
                 or larger than {MAX_REFCOUNT_TABLE_BYTES} bytes",
                header.refcount_table_clusters, header.refcount_table_offset
            )));
        }
        if header.snapshot_count > MAX_SNAPSHOTS {
            return Err(self.damaged(format!(
                "header at 60: {} snapshots, at most {MAX_SNAPSHOTS} are allowed",
                header.snapshot_count
            )));
        }
        if header.snapshot_count > 0 {
            // An entry has at least 40 bytes.
            let range =
                ByteRange::new(header.snapshots_offset, u64::from(header.snapshot_count) * 40);
            self.table("the snapshot table", 64, header, range, file_bytes)?;
        }
        Ok(())
    }

    fn backing_name(&self, cluster: &[u8], offset: u64, size: u32) -> Result<Option<String>> {
        if offset == 0 {
            return Ok(None);
        }
        let start = length(offset);
        let name = (size <= MAX_NAME_BYTES)
            .then(|| cluster.get(start..start.checked_add(length(u64::from(size)))?))
            .flatten()
            .ok_or_else(|| {
                self.damaged(format!(
                    "header at 8: the backing file's name of {size} bytes at {offset:#x} is \
                     longer than {MAX_NAME_BYTES} bytes or not in the first cluster"
                ))
            })?;
        if name.is_empty() {
            return Ok(None);
        }
        self.text("the backing file's name", offset, name).map(Some)
    }

    fn text(&self, what: &str, at: u64, bytes: &[u8]) -> Result<String> {
        match std::str::from_utf8(bytes) {
            Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
            _ => Err(self.damaged(format!("header: {what} at {at:#x} is not UTF-8 text"))),
        }
    }

    fn extensions(&self, header: &mut Header, area: &[u8], start: usize) -> Result<()> {
        let mut at = start;
        while at.checked_add(8).is_some_and(|end| end <= area.len()) {
            let (kind, size) = (be_u32(area, at), be_u32(area, at + 4));
            if kind == extension::END {
                break;
            }
            let data = (at + 8)
                .checked_add(length(u64::from(size)))
                .and_then(|end| area.get(at + 8..end))
                .ok_or_else(|| {
                    self.damaged(format!(
                        "header extension {kind:#010x} at {at:#x}: its {size} bytes do not fit \
                         the header's area of {} bytes",
                        area.len()
                    ))
                })?;
            match kind {
                extension::BACKING_FORMAT => {
                    header.backing_format =
                        Some(self.text("the backing file's format", at as u64, data)?);
                }
                extension::DATA_FILE => {
                    header.data_file_name =
                        Some(self.text("the data file's name", at as u64, data)?);
                }
                extension::BITMAPS => header.bitmaps = Some(self.bitmaps(at, data)?),
                _ => {}
            }
            at += 8 + data.len().next_multiple_of(8);
        }
        Ok(())
    }

    fn bitmaps(&self, at: usize, data: &[u8]) -> Result<BitmapsExtension> {
        if data.len() != 24 {
            return Err(self.damaged(format!(
                "bitmaps extension at {at:#x}: {} bytes long, must be 24",
                data.len()
            )));
        }
        Ok(BitmapsExtension {
            count: be_u32(data, 0),
            directory: ByteRange::new(be_u64(data, 16), be_u64(data, 8)),
        })
    }
}
