//! Which format an image is in.

use crate::bytes::length;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use vmtide_block::{BlockDevice, BlockError, OpenMode, RawDevice, Result};

/// The format of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The bytes of the virtual disk and nothing else: a file or a block device.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3 (docs/interop/qcow2 of QEMU).
    Qcow2,
    /// Hyper-V's current format (MS-VHDX). Recognised only.
    Vhdx,
    /// Hyper-V's and Azure's older format. Recognised only.
    Vhd,
    /// VMware's format (Virtual Disk Format 5.0).
    Vmdk,
}

impl Format {
    /// The lower-case name, as on the command line and in a qcow2 header.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vhdx => "vhdx",
            Self::Vhd => "vhd",
            Self::Vmdk => "vmdk",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = BlockError;

    /// Takes vmtide's names and QEMU's where they differ (`vpc` is VHD; `file` and `host_device`
    /// are what QEMU writes for raw now and then).
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "raw" | "file" | "host_device" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            "vhdx" => Ok(Self::Vhdx),
            "vhd" | "vpc" => Ok(Self::Vhd),
            "vmdk" => Ok(Self::Vmdk),
            other => Err(BlockError::unsupported(
                "disk image format",
                format!("{other:?} is unknown; known are raw, qcow2, vhdx, vhd and vmdk"),
            )),
        }
    }
}

/// The format of the image at `path`, by content: whatever has no known signature is raw.
///
/// Only for images that a *user* names. The format of a backing file is never probed, because the
/// guest of a raw disk can write any signature into its first sector.
///
/// # Errors
/// Where the file cannot be opened or read.
pub fn probe(path: impl AsRef<Path>) -> Result<Format> {
    probe_device(&RawDevice::open(path, OpenMode::ReadOnly)?)
}

/// As [`probe`], for an image that is open already.
///
/// # Errors
/// Where the device cannot be read.
pub fn probe_device(device: &dyn BlockDevice) -> Result<Format> {
    // A VMDK descriptor may have comments before the line it is known by.
    let mut head = [0u8; 512];
    let size_bytes = device.size_bytes();
    let present = length(size_bytes.min(head.len() as u64));
    device.read_at(&mut head[..present], 0)?;
    let format = if head.starts_with(b"QFI\xfb") {
        Format::Qcow2
    } else if head.starts_with(b"vhdxfile") {
        Format::Vhdx
    } else if head.starts_with(b"KDMV")
        || head.starts_with(b"COWD")
        || head.starts_with(SESPARSE_START)
        || is_vmdk_descriptor(&head[..present])
    {
        Format::Vmdk
    } else if head.starts_with(b"conectix") || has_vhd_footer(device, size_bytes)? {
        Format::Vhd
    } else {
        Format::Raw
    };
    Ok(format)
}

/// The first 16 bytes of ESXi's seSparse extents: magic and version.
const SESPARSE_START: &[u8] = b"\xbe\xba\xfe\xca\0\0\0\0\x01\0\0\0\x02\0\0\0";

/// Whether these bytes begin a VMDK descriptor: its title, or after any comments its version.
fn is_vmdk_descriptor(head: &[u8]) -> bool {
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head);
    if text.starts_with(b"# Disk DescriptorFile") {
        return true;
    }
    let mut lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let first = lines.find(|line| !line.is_empty() && !line.starts_with(b"#"));
    first.is_some_and(|line| matches!(line, b"version=1" | b"version=2" | b"version=3"))
}

/// A fixed VHD carries its signature in the last 512 bytes only (VHD specification, "Hard Disk
/// Footer Format"); old ones in the last 511.
fn has_vhd_footer(device: &dyn BlockDevice, size_bytes: u64) -> Result<bool> {
    const COOKIE: &[u8; 8] = b"conectix";
    let Some(start) = size_bytes.checked_sub(512) else {
        return Ok(false);
    };
    let mut footer = [0u8; 512];
    device.read_at(&mut footer, start)?;
    Ok(footer.starts_with(COOKIE) || footer[1..].starts_with(COOKIE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtide_block::MemoryDevice;

    #[test]
    fn signatures_are_recognised_and_all_else_is_raw() {
        let probe_bytes = |bytes: &[u8]| {
            let mut image = bytes.to_vec();
            image.resize(4096, 0);
            probe_device(&MemoryDevice::from_bytes(image)).unwrap()
        };
        assert_eq!(probe_bytes(b"QFI\xfb\0\0\0\x03"), Format::Qcow2);
        assert_eq!(probe_bytes(b"vhdxfileQ\0"), Format::Vhdx);
        assert_eq!(probe_bytes(b"conectix"), Format::Vhd);
        assert_eq!(probe_bytes(b"KDMV"), Format::Vmdk);
        assert_eq!(probe_bytes(b"# Disk DescriptorFile\n"), Format::Vmdk);
        assert_eq!(probe_bytes(b"\r\n# made by x\r\nversion=1\r\nCID=1\r\n"), Format::Vmdk);
        assert_eq!(probe_bytes(b"# a script\nversion=1.2\n"), Format::Raw);
        assert_eq!(probe_bytes(b"QFI\xfa"), Format::Raw);
        let mut fixed_vhd = vec![0; 8192];
        fixed_vhd[8192 - 512..8192 - 504].copy_from_slice(b"conectix");
        assert_eq!(probe_device(&MemoryDevice::from_bytes(fixed_vhd)).unwrap(), Format::Vhd);
        for size in [0, 3, 63, 511] {
            let device = MemoryDevice::new(size);
            assert_eq!(probe_device(&device).unwrap(), Format::Raw);
        }
    }
}
