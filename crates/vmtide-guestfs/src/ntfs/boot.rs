//! The boot sector.

use crate::bytes::{u16_at, u64_at};
use crate::volume::Volume;
use vmtide_block::Result;

/// The longest cluster: 2 MiB, since Windows 10.
const MAX_CLUSTER_BYTES: u32 = 2 << 20;

/// What is needed of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Boot {
    pub(super) cluster_bytes: u32,
    pub(super) record_bytes: u32,
    pub(super) table_cluster: u64,
    pub(super) mirror_cluster: u64,
}

impl Boot {
    /// Reads it, or the copy in the last sector; none where neither makes sense.
    pub(super) fn read(volume: &Volume<'_>) -> Result<Option<Self>> {
        let mut sector = [0; 512];
        for offset in [Some(0), (volume.size_bytes() / 512 * 512).checked_sub(512)] {
            if let Some(offset) = offset
                && volume.read(&mut sector, offset)?
                && let Some(boot) = Self::parse(&sector)
            {
                return Ok(Some(boot));
            }
        }
        Ok(None)
    }

    fn parse(sector: &[u8; 512]) -> Option<Self> {
        if sector[3..11] != *b"NTFS    " {
            return None;
        }
        let sector_bytes = u32::from(u16_at(sector, 11)?);
        let cluster_bytes = sectors_per_cluster(sector[13])?.checked_mul(sector_bytes)?;
        let record_bytes = record_bytes(sector[0x40].cast_signed(), cluster_bytes)?;
        let makes_sense = (256..=4096).contains(&sector_bytes)
            && sector_bytes.is_power_of_two()
            && cluster_bytes.is_power_of_two()
            && (sector_bytes..=MAX_CLUSTER_BYTES).contains(&cluster_bytes)
            && record_bytes.is_power_of_two()
            && (512..=65536).contains(&record_bytes);
        makes_sense.then_some(Self {
            cluster_bytes,
            record_bytes,
            table_cluster: u64_at(sector, 0x30)?,
            mirror_cluster: u64_at(sector, 0x38)?,
        })
    }
}

/// Sectors to a cluster: a count up to 128, above the negative of a power of two.
fn sectors_per_cluster(number: u8) -> Option<u32> {
    match number {
        0..=128 => Some(number.into()),
        _ => 1_u32.checked_shl(number.wrapping_neg().into()),
    }
}

/// The length of a file record: a count of clusters, or below zero the negative of a power of two in bytes.
fn record_bytes(number: i8, cluster_bytes: u32) -> Option<u32> {
    match u32::try_from(number) {
        Ok(clusters) => clusters.checked_mul(cluster_bytes),
        Err(_) => 1_u32.checked_shl(number.unsigned_abs().into()),
    }
}
