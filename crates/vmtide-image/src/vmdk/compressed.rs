//! Reading compressed grains (Virtual Disk Format 5.0, "Stream-Optimized Compressed Sparse
//! Extents"): a marker with the sector of the disk and the length, then a zlib stream (RFC 1950).

use super::hosted::{GRAIN_MARKER_BYTES, SECTOR};
use super::layout::SparseLayout;
use crate::bytes::{le_u32, le_u64, length};
use crate::deflate::Inflater;
use crate::table_cache::TableCache;
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, Result};

/// The most memory that decompressed grains take, for readers that ask for less than a grain.
const DECOMPRESSED_BYTES: u64 = 4 << 20;

/// The compressed grains of one extent.
pub(super) struct CompressedGrains {
    name: String,
    file: Arc<dyn BlockDevice>,
    grain_bytes: u64,
    markers: bool,
    /// Grains by the sector they begin at.
    decompressed: TableCache<Box<[u8]>>,
}

/// One grain to read: where it is in the file, what follows it, and where it belongs.
#[derive(Clone, Copy)]
pub(super) struct GrainPlace {
    pub(super) at: u64,
    pub(super) span: Option<u64>,
    /// The grain's first byte in the extent.
    pub(super) extent_offset: u64,
}

impl CompressedGrains {
    pub(super) fn new(file: Arc<dyn BlockDevice>, layout: &SparseLayout, share: u64) -> Self {
        let slots = length((DECOMPRESSED_BYTES / share.max(1) / layout.grain_bytes()).max(2));
        Self {
            name: file.name(),
            file,
            grain_bytes: layout.grain_bytes(),
            markers: layout.markers,
            decompressed: TableCache::new(u64::MAX, slots),
        }
    }

    /// Fills `piece` with the bytes from `inside` of a grain. A whole grain is decompressed where it
    /// is wanted; of a part, the rest is kept for the next reader.
    pub(super) fn read(
        &self,
        inflater: &mut Inflater,
        place: GrainPlace,
        inside: u64,
        piece: &mut [u8],
    ) -> Result<()> {
        if inside == 0 && piece.len() as u64 == self.grain_bytes {
            let count = self.decompress(inflater, place, piece)?;
            return self.check_length(place, count, piece.len());
        }
        let page = self.decompressed.get_or_read(place.at / SECTOR, || {
            let mut grain = vec![0; length(self.grain_bytes)];
            let count = self.decompress(inflater, place, &mut grain)?;
            grain.truncate(count);
            Ok::<_, BlockError>(grain.into_boxed_slice())
        })?;
        let start = length(inside);
        let Some(wanted) = page.entries.get(start..start + piece.len()) else {
            return self.check_length(place, page.entries.len(), start + piece.len());
        };
        piece.copy_from_slice(wanted);
        Ok(())
    }

    /// The last grain of a disk may inflate to less than a grain, but not to less than the disk.
    fn check_length(&self, place: GrainPlace, count: usize, wanted: usize) -> Result<()> {
        if count >= wanted {
            return Ok(());
        }
        Err(self.damaged(place, format!("the data ends after {count} of {wanted} bytes")))
    }

    fn damaged(&self, place: GrainPlace, detail: String) -> BlockError {
        BlockError::damaged(
            &self.name,
            format!(
                "compressed grain at {:#x} (byte {} of the extent): {detail}",
                place.at, place.extent_offset
            ),
        )
    }

    /// Inflates a grain into `target` and returns the bytes that came out.
    fn decompress(
        &self,
        inflater: &mut Inflater,
        place: GrainPlace,
        target: &mut [u8],
    ) -> Result<usize> {
        let file_bytes = self.file.size_bytes();
        let available = file_bytes.saturating_sub(place.at);
        let header = if self.markers { GRAIN_MARKER_BYTES } else { 0 };
        // Deflate never makes data much larger, so this mostly is one read.
        let usual = self.grain_bytes + self.grain_bytes / 16 + 2 * SECTOR;
        let first = place.span.unwrap_or(usual).min(usual).min(available);
        let mut bytes = vec![0; length(first)];
        self.file.read_at(&mut bytes, place.at)?;
        if self.markers {
            let size = self.check_marker(place, &bytes)?;
            let end = header as u64 + u64::from(size);
            if end > available || u64::from(size) > 2 * self.grain_bytes + SECTOR {
                return Err(self.damaged(
                    place,
                    format!(
                        "its marker says {size} bytes; the file has {available} there, and a grain \
                         has {}",
                        self.grain_bytes
                    ),
                ));
            }
            let had = bytes.len();
            bytes.resize(length(end), 0);
            if bytes.len() > had {
                self.file.read_at(&mut bytes[had..], place.at + had as u64)?;
            }
        }
        inflater
            .zlib(&bytes[header.min(bytes.len())..], target)
            .map_err(|detail| self.damaged(place, detail))
    }

    /// The length in the grain's marker, which must be the marker of this grain.
    fn check_marker(&self, place: GrainPlace, bytes: &[u8]) -> Result<u32> {
        let (sector, size) = (le_u64(bytes, 0), le_u32(bytes, 8));
        if bytes.len() < GRAIN_MARKER_BYTES || size == 0 {
            return Err(self.damaged(place, "there is no grain marker".into()));
        }
        if sector != place.extent_offset / SECTOR {
            return Err(self.damaged(
                place,
                format!(
                    "its marker says sector {sector} of the disk, the grain table {}",
                    place.extent_offset / SECTOR
                ),
            ));
        }
        Ok(size)
    }
}
