//! Cylinders, heads and sectors (specification, appendix "CHS Calculation").
//!
//! No guest has needed them for twenty years, but old Virtual PC took the size of the disk from
//! them, so they are written as the specification computes them and read where the creator of an
//! image meant them.

/// The geometry that says "too large to be described": the size is in the footer's `CurrentSize`.
pub(crate) const MAX_SECTORS: u64 = 65535 * 16 * 255;

/// The geometry of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) cylinders: u16,
    pub(crate) heads: u8,
    pub(crate) sectors_per_track: u8,
}

impl Geometry {
    /// The sectors that it describes.
    pub(crate) const fn sectors(self) -> u64 {
        self.cylinders as u64 * self.heads as u64 * self.sectors_per_track as u64
    }

    /// The specification's geometry for a disk of so many sectors; it describes at most as many.
    pub(crate) fn for_sectors(sectors: u64) -> Self {
        let sectors = sectors.min(MAX_SECTORS);
        let (sectors_per_track, heads) =
            if sectors >= 65535 * 16 * 63 { (255, 16) } else { small_disk(sectors) };
        let cylinders = sectors / sectors_per_track / heads;
        Self {
            cylinders: u16::try_from(cylinders).unwrap_or(u16::MAX),
            heads: u8::try_from(heads).unwrap_or(u8::MAX),
            sectors_per_track: u8::try_from(sectors_per_track).unwrap_or(u8::MAX),
        }
    }
}

/// Sectors per track and heads of a disk below 32 GiB: the first of 17, 31 and 63 sectors per
/// track that leaves at most 1023 cylinders per head.
fn small_disk(sectors: u64) -> (u64, u64) {
    let tracks = sectors / 17;
    let heads = tracks.div_ceil(1024).max(4);
    if tracks < heads * 1024 && heads <= 16 {
        return (17, heads);
    }
    if sectors / 31 < 16 * 1024 { (31, 16) } else { (63, 16) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometries_are_those_of_real_images() {
        for (sectors, cylinders, heads, per_track) in [
            // Hyper-V, 4 MiB and 127 GiB (disk footers of Windows 10 and Server 2012 R2).
            (8192, 0x78, 4, 0x11),
            (0x1f_c000_0000 / 512, 0xfefe, 0x10, 0xff),
            // QEMU's 4 MiB, which it rounds up to whole cylinders.
            (8228, 0x79, 4, 0x11),
            (0, 0, 4, 17),
            (u64::MAX, 65535, 16, 255),
        ] {
            let geometry = Geometry::for_sectors(sectors);
            let expected = Geometry { cylinders, heads, sectors_per_track: per_track };
            assert_eq!(geometry, expected, "{sectors} sectors");
            assert!(geometry.sectors() <= sectors);
        }
    }

    #[test]
    fn no_geometry_describes_more_than_the_disk_or_loses_more_than_a_cylinder() {
        for sectors in (0..40_000_000).step_by(7919) {
            let geometry = Geometry::for_sectors(sectors);
            let cylinder = u64::from(geometry.heads) * u64::from(geometry.sectors_per_track);
            assert!(geometry.sectors() <= sectors);
            assert!(sectors - geometry.sectors() < cylinder + 17, "{sectors}: {geometry:?}");
        }
    }
}
