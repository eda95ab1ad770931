//! Finding the grains of a stream-optimized extent by their markers, where its tables are missing
//! or lead out of the file.
//!
//! A stream is written from front to back and each grain says where it belongs, so the tables at
//! the end are a convenience. What a scan cannot tell is whether the stream is complete: the end of
//! the stream is a sector of zeros, which a download that was cut off has as well. So the marker of
//! what comes last, the footer or else the directory, must have been passed before it; otherwise
//! the extent is refused, because what is missing would read as zeros.

use super::hosted::{GRAIN_MARKER_BYTES, HostedHeader, IN_FOOTER, SECTOR, marker};
use crate::bytes::{le_u32, le_u64};
use vmtide_block::{BlockDevice, BlockError, Result};

/// The most grains that are remembered: 256 GiB of data in 64 MiB of memory.
const MAX_GRAINS: usize = 1 << 22;

/// Grains by their number, with the sector of their marker.
pub(super) struct Scanned {
    grains: Vec<(u64, u64)>,
}

impl Scanned {
    /// The sector of a grain's marker, or else the number of the next grain there is.
    pub(super) fn find(&self, grain: u64) -> Result<u64, Option<u64>> {
        match self.grains.binary_search_by_key(&grain, |(number, _)| *number) {
            Ok(index) => self.grains.get(index).map(|(_, sector)| *sector).ok_or(None),
            Err(index) => Err(self.grains.get(index).map(|(number, _)| *number)),
        }
    }
}

/// Walks the markers of `file` from the end of the overhead to the end of the stream.
pub(super) fn scan(file: &dyn BlockDevice, header: &HostedHeader) -> Result<Scanned> {
    let damaged = |sector: u64, detail: String| {
        Err(BlockError::damaged(
            file.name(),
            format!(
                "VMDK grain directory is missing or damaged, and the markers do not help: marker at \
                 sector {sector}: {detail}"
            ),
        ))
    };
    let sectors = file.size_bytes() / SECTOR;
    let mut sector = start(header);
    let mut grains = Vec::new();
    let last = match header.directory_offset {
        IN_FOOTER => marker::FOOTER,
        _ => marker::GRAIN_DIRECTORY,
    };
    let mut is_complete = false;
    loop {
        if sector >= sectors {
            return damaged(sector, "the file ends without the end of the stream".into());
        }
        let mut bytes = [0; GRAIN_MARKER_BYTES + 4];
        file.read_at(&mut bytes, sector * SECTOR)?;
        let (value, size, kind) = (le_u64(&bytes, 0), le_u32(&bytes, 8), le_u32(&bytes, 12));
        if size == 0 {
            match kind {
                marker::END_OF_STREAM if value == 0 && is_complete => break,
                marker::END_OF_STREAM if value == 0 => {
                    return damaged(
                        sector,
                        "the stream ends without its tables: it was cut off".into(),
                    );
                }
                marker::GRAIN_TABLE | marker::GRAIN_DIRECTORY | marker::FOOTER => {
                    is_complete |= kind == last;
                }
                other => {
                    return damaged(sector, format!("type {other} of {value} sectors is unknown"));
                }
            }
            sector = sector.saturating_add(1).saturating_add(value);
            continue;
        }
        if value % header.grain_sectors != 0 || value >= header.capacity {
            return damaged(
                sector,
                format!("a grain for sector {value} of the disk is impossible"),
            );
        }
        if grains.len() >= MAX_GRAINS {
            return damaged(sector, format!("more than {MAX_GRAINS} grains to find"));
        }
        grains.push((value / header.grain_sectors, sector));
        sector += (GRAIN_MARKER_BYTES as u64 + u64::from(size)).div_ceil(SECTOR);
    }
    // The later of two grains for one place is the one that was meant.
    grains.reverse();
    grains.sort_by_key(|(grain, _)| *grain);
    grains.dedup_by_key(|(grain, _)| *grain);
    Ok(Scanned { grains })
}

fn start(header: &HostedHeader) -> u64 {
    let after_descriptor = header.descriptor_offset.saturating_add(header.descriptor_sectors);
    header.overhead.max(after_descriptor).max(1)
}
