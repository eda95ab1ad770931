//! What no platform can make, told before any is asked: the limits of the formats.

use super::NewDisk;
use vmtide_image::Format;

/// The largest VHD (its footer and the field of its size allow no more), and the largest VHDX (MS-VHDX 2.6.2.2).
const MAX_VHD_BYTES: u64 = 2040 << 30;
const MAX_VHDX_BYTES: u64 = 64 << 40;

impl NewDisk {
    /// Succeeds where there can be such a disk. How large disks of formats that Windows does not know may be is left
    /// to who makes them.
    ///
    /// # Errors
    /// What is wrong, and what would be right.
    pub fn check(&self) -> Result<(), String> {
        let sectors = [self.logical_sector_bytes, self.physical_sector_bytes];
        if let Some(wrong) =
            sectors.into_iter().flatten().find(|bytes| !matches!(bytes, 512 | 4096))
        {
            return Err(format!("sectors have 512 or 4096 bytes, not {wrong}"));
        }
        let sector_bytes = self.logical_sector_bytes.unwrap_or(512);
        let size_bytes = self.virtual_size_bytes;
        // A raw disk is a file of any length, and one that is restored has that of the one that was backed up.
        let is_raw = matches!(self.format.parse(), Ok(Format::Raw));
        if size_bytes == 0 || !is_raw && !size_bytes.is_multiple_of(sector_bytes.into()) {
            return Err(format!(
                "{size_bytes} bytes are no size of a disk: it is a multiple of its sector of {sector_bytes} bytes"
            ));
        }
        match self.format.as_str() {
            "vhd" => self.check_vhd(),
            "vhdx" => self.check_vhdx(),
            _ => Ok(()),
        }
    }

    fn check_vhd(&self) -> Result<(), String> {
        self.check_size(MAX_VHD_BYTES)?;
        if self.logical_sector_bytes.is_some_and(|bytes| bytes != 512) {
            return Err("a vhd has logical sectors of 512 bytes; a vhdx can have 4096".into());
        }
        if self.disk_id.is_some() {
            return Err("a vhd has no disk id; a vhdx has".into());
        }
        match self.block_size_bytes {
            None | Some(0x8_0000 | 0x20_0000) => Ok(()),
            Some(wrong) => {
                Err(format!("blocks of a vhd have 524288 or 2097152 bytes, not {wrong}"))
            }
        }
    }

    fn check_vhdx(&self) -> Result<(), String> {
        self.check_size(MAX_VHDX_BYTES)?;
        match self.block_size_bytes {
            Some(bytes) if !(bytes.is_power_of_two() && (1 << 20..=256 << 20).contains(&bytes)) => {
                Err(format!("blocks of a vhdx have 1 MiB to 256 MiB, a power of two, not {bytes}"))
            }
            _ => Ok(()),
        }
    }

    fn check_size(&self, most: u64) -> Result<(), String> {
        let (size_bytes, format) = (self.virtual_size_bytes, &self.format);
        if size_bytes <= most {
            return Ok(());
        }
        Err(format!("a {format} has {most} bytes at most, not {size_bytes}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(format: &str, virtual_size_bytes: u64) -> NewDisk {
        NewDisk {
            format: format.into(),
            virtual_size_bytes,
            fixed: false,
            logical_sector_bytes: None,
            physical_sector_bytes: None,
            block_size_bytes: None,
            disk_id: None,
        }
    }

    #[test]
    fn limits_of_the_formats_are_kept() {
        for (format, size_bytes, good) in [
            ("vhd", MAX_VHD_BYTES, true),
            ("vhd", MAX_VHD_BYTES + 512, false),
            ("vhdx", MAX_VHDX_BYTES, true),
            ("vhdx", MAX_VHDX_BYTES + 512, false),
            ("vhdx", (64 << 20) + 1, false),
            ("vhd", 1_000_001, false),
            ("raw", 512, true),
            ("raw", 1_000_001, true),
            ("raw", 0, false),
            ("qcow2", 1_000_001, false),
            ("qcow2", 0, false),
            ("vhdx", u64::MAX, false),
        ] {
            assert_eq!(disk(format, size_bytes).check().is_ok(), good, "{format} {size_bytes}");
        }
        let with = |format: &str, change: fn(&mut NewDisk)| {
            let mut disk = disk(format, 64 << 20);
            change(&mut disk);
            disk.check().is_ok()
        };
        assert!(with("vhdx", |disk| disk.logical_sector_bytes = Some(4096)));
        assert!(!with("vhd", |disk| disk.logical_sector_bytes = Some(4096)));
        assert!(!with("vhdx", |disk| disk.physical_sector_bytes = Some(520)));
        assert!(with("vhdx", |disk| disk.block_size_bytes = Some(256 << 20)));
        assert!(!with("vhdx", |disk| disk.block_size_bytes = Some(3 << 20)));
        assert!(!with("vhd", |disk| disk.block_size_bytes = Some(1 << 20)));
        assert!(!with("vhd", |disk| disk.disk_id = Some(String::new())));
    }
}
