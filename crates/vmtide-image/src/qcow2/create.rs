//! Creating an image.

use super::compress::Compressor;
use super::header::{
    CLUSTER_BITS, Header, MAGIC, MAX_L1_BYTES, MAX_NAME_BYTES, extension, incompatible,
};
use super::metadata::Metadata;
use super::refcount::Refcounts;
use super::table::Geometry;
use super::writer::Qcow2Writer;
use crate::Compression;
use crate::bytes::{length, put};
use crate::create::new_file;
use crate::format::Format;
use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, Result, WritableBlockDevice};

/// The version of a new image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Qcow2Version {
    /// Version 2, QEMU's `compat=0.10`: for readers of before 2013. Has no zero clusters.
    V2,
    /// Version 3, QEMU's `compat=1.1`.
    #[default]
    V3,
}

/// The backing file of a new image.
#[derive(Clone)]
pub struct CreateBacking {
    /// The name to store: a path, absolute or relative to the new image's directory.
    pub name: String,
    /// Its format, which is stored, too.
    pub format: Format,
    /// The opened disk, for the parts of clusters that a write leaves alone.
    pub device: Arc<dyn BlockDevice>,
}

/// What a new image is like.
#[derive(Clone)]
pub struct Qcow2CreateOptions {
    /// The size of the disk in bytes.
    pub size_bytes: u64,
    /// The cluster size in bytes: a power of two from 512 to 2 MiB.
    pub cluster_size_bytes: u32,
    /// The version of the format.
    pub version: Qcow2Version,
    /// Whether clusters have 32 subclusters (needs version 3 and clusters of at least 16 KiB).
    pub extended_l2: bool,
    /// How compressed clusters are compressed. Zstandard needs version 3.
    pub compression: Compression,
    /// Whether the writer offers to write compressed clusters
    /// ([`ImageWriter::compressed`](crate::ImageWriter::compressed)).
    pub compress: bool,
    /// Whether nothing of what is written need be on the medium when it is done
    /// ([`RawDevice::without_flushes`](vmtide_block::RawDevice::without_flushes)): for images that can
    /// be made again.
    pub without_flushes: bool,
    /// What unallocated clusters read as.
    pub backing: Option<CreateBacking>,
}

impl Qcow2CreateOptions {
    /// An empty disk of this size with QEMU's defaults: version 3, clusters of 64 KiB.
    pub const fn new(size_bytes: u64) -> Self {
        Self {
            size_bytes,
            cluster_size_bytes: 64 << 10,
            version: Qcow2Version::V3,
            extended_l2: false,
            compression: Compression::Zlib,
            compress: false,
            without_flushes: false,
            backing: None,
        }
    }
}

impl Qcow2Writer {
    /// Creates an image at `path`, which must not exist.
    ///
    /// # Errors
    /// [`BlockError::Unsupported`] for options the format does not allow; [`BlockError::Io`] where
    /// the file cannot be made.
    pub fn create(path: impl AsRef<Path>, options: &Qcow2CreateOptions) -> Result<Self> {
        let path = path.as_ref();
        let plan = Plan::new(&path.display().to_string(), options)?;
        let file = new_file(path, 0, options.without_flushes)?;
        plan.create(Arc::new(file), options)
    }

    /// Creates an image on a device, whose content is lost. A file is cut to nothing first.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn create_device(
        file: Arc<dyn WritableBlockDevice>,
        options: &Qcow2CreateOptions,
    ) -> Result<Self> {
        let plan = Plan::new(&file.name(), options)?;
        if file.size_bytes() > 0 {
            file.resize(0)?;
        }
        plan.create(file, options)
    }
}

/// Checked options.
struct Plan {
    header: Header,
    extensions: Vec<u8>,
}

impl Plan {
    fn new(name: &str, options: &Qcow2CreateOptions) -> Result<Self> {
        let refuse = |detail: String| Err(BlockError::unsupported(name, detail));
        let cluster = options.cluster_size_bytes;
        let bits = cluster.trailing_zeros();
        if !cluster.is_power_of_two() || !CLUSTER_BITS.contains(&bits) {
            return refuse(format!(
                "cluster size {cluster} is not a power of two from 512 to 2097152"
            ));
        }
        let version = match options.version {
            Qcow2Version::V2 => 2,
            Qcow2Version::V3 => 3,
        };
        if options.extended_l2 && (version < 3 || bits < 14) {
            return refuse(
                "extended L2 entries need version 3 and clusters of at least 16384 bytes".into(),
            );
        }
        let mut header = Header::empty(version, bits, options.size_bytes);
        if options.extended_l2 {
            header.incompatible |= incompatible::EXTENDED_L2;
        }
        if options.compression == Compression::Zstd {
            if version < 3 {
                return refuse("Zstandard clusters need version 3".into());
            }
            header.compression = Compression::Zstd;
            header.incompatible |= incompatible::COMPRESSION_TYPE;
        }
        let entries = options.size_bytes.div_ceil(Geometry::of(&header).l2_span());
        if options.size_bytes > i64::MAX as u64 || entries * 8 > MAX_L1_BYTES {
            return refuse(format!(
                "a disk of {} bytes is too large for clusters of {cluster} bytes",
                options.size_bytes
            ));
        }
        // QEMU expects an L1 table even for an empty disk.
        header.l1_entries = u32::try_from(entries.max(1)).unwrap_or(u32::MAX);
        let mut extensions = Vec::new();
        if let Some(backing) = &options.backing {
            let format = match backing.format {
                Format::Vhd => "vpc",
                other => other.name(),
            };
            extensions.extend(extension::BACKING_FORMAT.to_be_bytes());
            extensions.extend(u32::try_from(format.len()).unwrap_or(0).to_be_bytes());
            extensions.extend(format.as_bytes());
            extensions.resize(extensions.len().next_multiple_of(8), 0);
            header.backing_name = Some(backing.name.clone());
        }
        extensions.extend([0u8; 8]);
        let name_bytes = header.backing_name.as_ref().map_or(0, String::len);
        if name_bytes > MAX_NAME_BYTES as usize
            || HEADER_BYTES + extensions.len() + name_bytes > length(u64::from(cluster))
        {
            return refuse(format!(
                "the backing file's name of {name_bytes} bytes does not fit the header"
            ));
        }
        Ok(Self { header, extensions })
    }

    fn create(
        mut self,
        file: Arc<dyn WritableBlockDevice>,
        options: &Qcow2CreateOptions,
    ) -> Result<Qcow2Writer> {
        let header = &mut self.header;
        let cluster = header.cluster_bytes();
        let mut refcounts =
            Refcounts::new(file.name(), header.cluster_bits, header.refcount_order)?;
        let l1_bytes = u64::from(header.l1_entries) * 8;
        let l1 = refcounts.claim_exact(&*file, l1_bytes.div_ceil(cluster))?;
        header.l1_offset = l1.first << header.cluster_bits;
        header.refcount_table_offset = refcounts.table_offset;
        header.refcount_table_clusters =
            u32::try_from(refcounts.table_clusters).unwrap_or(u32::MAX);
        // The L1 table is a hole in a file that grows; a block device must be written.
        file.resize(refcounts.end_bytes()).or_else(|error| {
            match file.size_bytes() >= refcounts.end_bytes() {
                true => Ok(()),
                false => Err(error),
            }
        })?;
        file.write_at(&vec![0u8; length(l1_bytes)], header.l1_offset)?;
        let metadata = Metadata {
            geometry: Geometry::of(header),
            l1: vec![0; length(u64::from(header.l1_entries))],
            l1_offset: header.l1_offset,
            l1_dirty: BTreeSet::new(),
            header_dirty: false,
            tables: HashMap::new(),
            packed_end: 0,
            refcounts,
        };
        let backing = options.backing.as_ref().map(|b| b.device.clone());
        let bytes = self.header_bytes();
        let mut writer = Qcow2Writer::assemble(file, None, backing, self.header, metadata);
        writer.compressor = options.compress.then(|| Compressor::new(options.compression));
        // All that the header leads to is durable before there is a header: until then the file
        // is no image. (The flush patches header fields that are written in full right after.)
        writer.flush()?;
        writer.file.write_at(&bytes, 0)?;
        writer.file.flush()?;
        Ok(writer)
    }

    fn header_bytes(&self) -> Vec<u8> {
        let header = &self.header;
        let v3 = header.version >= 3;
        let fixed = if v3 { HEADER_BYTES } else { 72 };
        let mut bytes = vec![0u8; fixed];
        let name = header.backing_name.as_deref().unwrap_or_default();
        if !name.is_empty() {
            let offset = (fixed + self.extensions.len()) as u64;
            put(&mut bytes, 8, &offset.to_be_bytes());
            let size = u32::try_from(name.len()).unwrap_or(0);
            put(&mut bytes, 16, &size.to_be_bytes());
        }
        put(&mut bytes, 0, &MAGIC.to_be_bytes());
        put(&mut bytes, 4, &header.version.to_be_bytes());
        put(&mut bytes, 20, &header.cluster_bits.to_be_bytes());
        put(&mut bytes, 24, &header.size_bytes.to_be_bytes());
        put(&mut bytes, 36, &header.l1_entries.to_be_bytes());
        put(&mut bytes, 40, &header.l1_offset.to_be_bytes());
        put(&mut bytes, 48, &header.refcount_table_offset.to_be_bytes());
        put(&mut bytes, 56, &header.refcount_table_clusters.to_be_bytes());
        if v3 {
            put(&mut bytes, 72, &header.incompatible.to_be_bytes());
            put(&mut bytes, 96, &header.refcount_order.to_be_bytes());
            let header_length = u32::try_from(HEADER_BYTES).unwrap_or(0);
            put(&mut bytes, 100, &header_length.to_be_bytes());
            put(&mut bytes, 104, &[u8::from(header.compression == Compression::Zstd)]);
        }
        bytes.extend_from_slice(&self.extensions);
        bytes.extend_from_slice(name.as_bytes());
        bytes
    }
}

/// The length of a version 3 header up to and with the compression type and its padding.
const HEADER_BYTES: usize = 112;
