//! Reading compressed clusters.
//!
//! A writer packs them byte after byte, so the compressed bytes of neighbours on the disk are
//! neighbours in the file: a read of many clusters fetches them together and decompresses each
//! straight into the caller's buffer. A read of a part of a cluster keeps the whole of it for the
//! next one.

use super::decompress::Decompressor;
use super::header::Header;
use super::read::{Layers, Tables};
use super::table::Mapping;
use crate::Compression;
use crate::bytes::length;
use crate::table_cache::TableCache;
use std::sync::atomic::{AtomicU64, Ordering};
use vmtide_block::{BlockDevice, BlockError, Result};

/// The most memory that decompressed clusters take, for readers that ask in smaller pieces than a
/// cluster; without it a 4 KiB scan of a 64 KiB-cluster image decompresses everything 16 times.
const DECOMPRESSED_BYTES: u64 = 4 << 20;

/// The most compressed bytes fetched together. Enough that the cost of a read is nothing beside
/// that of decompressing; each reading thread takes this much memory.
const FETCH_BYTES: u64 = 1 << 20;

/// Unused bytes between two compressed clusters over which a fetch goes on.
const GAP_BYTES: u64 = 64 << 10;

/// How an image's compressed clusters are read, and those read last.
pub(super) struct Compressed {
    pub(super) method: Compression,
    /// By their place in the file.
    recent: TableCache<Recent>,
    /// How often places in the file may have got other content.
    generation: AtomicU64,
}

struct Recent {
    generation: u64,
    cluster: Vec<u8>,
}

impl Compressed {
    pub(super) fn new(header: &Header) -> Self {
        let most = length(DECOMPRESSED_BYTES / header.cluster_bytes());
        Self {
            method: header.compression,
            recent: TableCache::new(u64::MAX, most),
            generation: AtomicU64::new(0),
        }
    }

    /// Forgets what was read: places in the file may hold something else from now on.
    pub(super) fn forget(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }
}

/// One compressed cluster in the file, for a whole cluster of the disk.
#[derive(Clone, Copy)]
struct Piece {
    /// Its cluster on the disk, for messages.
    disk: u64,
    offset: u64,
    /// The most bytes it takes.
    length: u64,
}

impl Layers {
    /// Fills the beginning of `buffer`, which is the disk from `at`, from the compressed cluster in
    /// `place` (offset and length) there and those that follow it. Returns the bytes filled.
    pub(super) fn read_compressed(
        &self,
        tables: &impl Tables,
        buffer: &mut [u8],
        at: u64,
        place: (u64, u64),
    ) -> Result<u64> {
        let cluster = self.geometry.cluster_bytes();
        let inside = at % cluster;
        let first = Piece { disk: at - inside, offset: place.0, length: place.1 };
        let wanted = buffer.len() as u64;
        if inside != 0 || wanted < cluster {
            let bytes = wanted.min(cluster - inside);
            self.read_part(&first, &mut buffer[..length(bytes)], length(inside))?;
            return Ok(bytes);
        }
        let pieces = self.neighbours(tables, first, wanted / cluster)?;
        let end = pieces.iter().map(|piece| piece.offset + piece.length).max().unwrap_or(0);
        let fetched = self.fetch(&first, end)?;
        let mut decompressor = Decompressor::default();
        for (piece, target) in pieces.iter().zip(buffer.chunks_exact_mut(length(cluster))) {
            let start = length(piece.offset - first.offset).min(fetched.len());
            let stop = fetched.len().min(start.saturating_add(length(piece.length)));
            self.decompress(&mut decompressor, piece, &fetched[start..stop], target)?;
        }
        Ok(pieces.len() as u64 * cluster)
    }

    /// `first` and up to `most` clusters in all, the following of which lie close behind it in the
    /// file.
    fn neighbours(&self, tables: &impl Tables, first: Piece, most: u64) -> Result<Vec<Piece>> {
        let cluster = self.geometry.cluster_bytes();
        let mut pieces = vec![first];
        let mut last = first;
        while (pieces.len() as u64) < most {
            let disk = last.disk + cluster;
            let Mapping::Compressed { offset, length } = self.run(tables, disk, cluster)?.mapping
            else {
                break;
            };
            let close = offset >= last.offset
                && offset <= last.offset + last.length + GAP_BYTES
                && offset + length <= first.offset + FETCH_BYTES;
            if !close {
                break;
            }
            last = Piece { disk, offset, length };
            pieces.push(last);
        }
        Ok(pieces)
    }

    /// The bytes of the file from `first` to `end`. The last sector need not be there in full: the
    /// file may end with the data.
    fn fetch(&self, first: &Piece, end: u64) -> Result<Vec<u8>> {
        let size_bytes = self.file.size_bytes();
        let bytes = end.min(size_bytes).saturating_sub(first.offset);
        if bytes == 0 {
            return Err(
                self.bad_cluster(first, &format!("past the end of the file of {size_bytes} bytes"))
            );
        }
        let mut fetched = vec![0u8; length(bytes)];
        self.file.read_at(&mut fetched, first.offset)?;
        Ok(fetched)
    }

    fn read_part(&self, piece: &Piece, target: &mut [u8], inside: usize) -> Result<()> {
        let generation = self.compressed.generation.load(Ordering::Acquire);
        let read = || -> Result<Recent> {
            let compressed = self.fetch(piece, piece.offset + piece.length)?;
            let mut cluster = vec![0u8; length(self.geometry.cluster_bytes())];
            self.decompress(&mut Decompressor::default(), piece, &compressed, &mut cluster)?;
            Ok(Recent { generation, cluster })
        };
        // Offsets are often multiples of a sector: its low bits go where they do no harm.
        let key = piece.offset.rotate_right(9);
        let page = self.compressed.recent.get_or_read(key, read)?;
        let part = inside..inside + target.len();
        if page.entries.generation == generation {
            target.copy_from_slice(&page.entries.cluster[part]);
        } else {
            target.copy_from_slice(&read()?.cluster[part]);
        }
        Ok(())
    }

    fn decompress(
        &self,
        decompressor: &mut Decompressor,
        piece: &Piece,
        compressed: &[u8],
        target: &mut [u8],
    ) -> Result<()> {
        decompressor
            .decompress(self.compressed.method, compressed, target)
            .map_err(|detail| self.bad_cluster(piece, &detail))
    }

    fn bad_cluster(&self, piece: &Piece, detail: &str) -> BlockError {
        BlockError::damaged(
            &self.name,
            format!(
                "compressed cluster at {:#x} (disk offset {}): {detail}",
                piece.offset, piece.disk
            ),
        )
    }
}
