//! Which format an image is in.

use crate::bytes::length;
use crate::vmdk::is_descriptor;
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
    /// Hyper-V's current format (MS-VHDX).
    Vhdx,
    /// Hyper-V's and Azure's older format (Virtual Hard Disk Image Format Specification).
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

/// The format that a file's name says, if it says any. A flat extent (`web-flat.vmdk`) holds the bytes of
/// the disk and nothing else, so it is raw.
pub fn format_by_name(path: impl AsRef<Path>) -> Option<Format> {
    let path = path.as_ref();
    let extension = path.extension()?.to_ascii_lowercase();
    match extension.to_str()? {
        "qcow2" => Some(Format::Qcow2),
        // Hyper-V names the children that checkpoints make .avhdx and .avhd.
        "vhdx" | "avhdx" => Some(Format::Vhdx),
        "vhd" | "avhd" | "vpc" => Some(Format::Vhd),
        "vmdk" => {
            let stem = path.file_stem()?.to_string_lossy().to_ascii_lowercase();
            Some(if stem.ends_with("-flat") { Format::Raw } else { Format::Vmdk })
        }
        "raw" | "img" => Some(Format::Raw),
        _ => None,
    }
}

/// The format of the image at `path`, by content; its name may not contradict it, as [`probe_file`] says.
///
/// Only for images that a *user* names. The format of a backing file is never probed, because the
/// guest of a raw disk can write any signature into its first sector.
///
/// # Errors
/// Where the file cannot be opened or read, and as [`probe_file`].
pub fn probe(path: impl AsRef<Path>) -> Result<Format> {
    let path = path.as_ref();
    probe_file(path, &RawDevice::open(path, OpenMode::ReadOnly)?)
}

/// As [`probe`], for the file at `path` that is open already.
///
/// A file that is named like an image and is none is damaged, cut off or misnamed: taken as a raw disk, the bytes of
/// a container would become the disk without a word. One that looks like an image of another format may have
/// been made so by its guest.
///
/// # Errors
/// [`BlockError::Damaged`] where the name says a format and the content none, naming what was looked for and what is
/// there; [`BlockError::Unsupported`] where the two say different formats, or the name says that it is something else (an archive,
/// a compressed file, an image of a kind that is not read) and the content nothing; where it cannot be read.
pub fn probe_file(path: &Path, device: &dyn BlockDevice) -> Result<Format> {
    let found = probe_device(device)?;
    match format_by_name(path) {
        // A guest can write any signature into the first sector of a fixed VHD, none into its footer.
        Some(Format::Vhd)
            if found != Format::Vhd && has_vhd_footer(device, device.size_bytes())? =>
        {
            Ok(Format::Vhd)
        }
        Some(named) if named != Format::Raw && found == Format::Raw => {
            Err(BlockError::damaged(path.display().to_string(), no_signature(named, device)?))
        }
        Some(named) if named != Format::Raw && found != named => Err(BlockError::unsupported(
            path.display().to_string(),
            format!(
                "its name says {named}, its content {found}: add --format {found} if it is misnamed, or --format raw \
                 if these are the bytes of a disk"
            ),
        )),
        None if found == Format::Raw => match no_disk_by_name(path) {
            Some(what) => Err(BlockError::unsupported(
                path.display().to_string(),
                format!("{what}, or add --format raw if these are the bytes of a disk"),
            )),
            None => Ok(found),
        },
        _ => Ok(found),
    }
}

/// What a file is by its name that is no image which vmtide reads, and what to do. Taken as a raw disk it would be
/// converted or backed up without a word, and nothing would boot from it.
fn no_disk_by_name(path: &Path) -> Option<&'static str> {
    let extension = path.extension()?.to_ascii_lowercase();
    match extension.to_str()? {
        "ova" => {
            Some("is named like an archive of a VM; unpack it (tar -xf) and give the disk in it")
        }
        "ovf" => Some("is named like the description of a VM; give the disk that it names"),
        "gz" | "xz" | "zst" | "bz2" | "lz4" | "zip" | "7z" | "rar" => {
            Some("is named like a compressed file; unpack it first")
        }
        "vdi" | "qed" | "hds" | "dmg" | "e01" | "wim" | "vma" => Some(
            "is named like an image of a kind that vmtide does not read; convert it first (qemu-img convert -O vhdx knows some)",
        ),
        _ => None,
    }
}

/// What a file that is named like an image of `format` should have, and what it has.
fn no_signature(format: Format, device: &dyn BlockDevice) -> Result<String> {
    let size_bytes = device.size_bytes();
    let mut head = [0u8; 8];
    let present = length(size_bytes.min(head.len() as u64));
    device.read_at(&mut head[..present], 0)?;
    let wanted = match format {
        Format::Vhdx => "\"vhdxfile\" at 0x0".to_owned(),
        Format::Vhd => {
            format!("\"conectix\" at 0x0 or in the footer at {:#x}", size_bytes.saturating_sub(512))
        }
        Format::Qcow2 => "\"QFI\\xfb\" at 0x0".to_owned(),
        _ => "a descriptor's text, \"KDMV\" or \"COWD\" at 0x0".to_owned(),
    };
    let extent = match format {
        Format::Vmdk => ", or give the descriptor if it is an extent of another image",
        _ => "",
    };
    Ok(format!(
        "it is named like a {format} image, which has {wanted}, but begins with \"{}\" and has {size_bytes} bytes: \
         it is damaged, cut off or misnamed; add --format raw if these are the bytes of a disk{extent}",
        head[..present].escape_ascii()
    ))
}

/// The format by the content alone: whatever has no known signature is raw.
///
/// # Errors
/// Where the device cannot be read.
pub fn probe_device(device: &dyn BlockDevice) -> Result<Format> {
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
    {
        Format::Vmdk
    } else if head.starts_with(b"conectix") || has_vhd_footer(device, size_bytes)? {
        Format::Vhd
    } else if is_descriptor(device, &head[..present])? {
        Format::Vmdk
    } else {
        Format::Raw
    };
    Ok(format)
}

/// The first 16 bytes of ESXi's seSparse extents: magic and version.
const SESPARSE_START: &[u8] = b"\xbe\xba\xfe\xca\0\0\0\0\x01\0\0\0\x02\0\0\0";

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

    fn probe_bytes(bytes: &[u8]) -> Format {
        let mut image = bytes.to_vec();
        image.resize(bytes.len().max(4096), 0);
        probe_device(&MemoryDevice::from_bytes(image)).unwrap()
    }

    #[test]
    fn signatures_are_recognised_and_all_else_is_raw() {
        assert_eq!(probe_bytes(b"QFI\xfb\0\0\0\x03"), Format::Qcow2);
        assert_eq!(probe_bytes(b"vhdxfileQ\0"), Format::Vhdx);
        assert_eq!(probe_bytes(b"conectix"), Format::Vhd);
        assert_eq!(probe_bytes(b"KDMV"), Format::Vmdk);
        assert_eq!(probe_bytes(b"QFI\xfa"), Format::Raw);
        let mut fixed_vhd = vec![0; 8192];
        fixed_vhd[8192 - 512..8192 - 504].copy_from_slice(b"conectix");
        assert_eq!(probe_device(&MemoryDevice::from_bytes(fixed_vhd)).unwrap(), Format::Vhd);
        for size in [0, 3, 63, 511] {
            let device = MemoryDevice::new(size);
            assert_eq!(probe_device(&device).unwrap(), Format::Raw);
        }
    }

    #[test]
    fn descriptors_are_recognised_in_all_spellings_that_are_read() {
        let comments = "# a line that says nothing of what follows\n".repeat(400);
        let long = format!("{comments}version=1\nCID=1\n");
        for text in [
            "# Disk DescriptorFile\n",
            "#Disk DescriptorFile\r\nversion=1\r\n",
            "# disk descriptorfile\rversion=1\rCID=1\r",
            "\u{feff}# Disk DescriptorFile\n",
            "\n\n  \t\n# Disk DescriptorFile\n",
            "\r\n# made by x\r\nversion=1\r\nCID=1\r\n",
            "version = 1\nCID=1\n",
            "Version=1\n",
            "version=\"1\"\n",
            "VERSION=4\nRW 1 ZERO\n",
            "encoding=\"GBK\"\nversion=1\n",
            "CID=fffffffe\nparentCID=ffffffff\n",
            "createType=\"monolithicFlat\"\n",
            "RW 63 FLAT \"a.vmdk\" 0\n",
            "# x\n  rdonly  63   vmfs  a.vmdk\n",
            long.as_str(),
        ] {
            assert_eq!(probe_bytes(text.as_bytes()), Format::Vmdk, "{text:?}");
        }
        let mut binary = b"version=1\nCID=1\n".to_vec();
        binary.extend([1, 2, 0x7f, 0]);
        for bytes in [
            b"# a script\nversion=1.2\n".as_slice(),
            b"just text",
            b"RW is what this file is\n",
            b"RW 63 sheep\n",
            b"versions=1\n",
            b"version=\n",
            b"CID=of the disk\n",
            b"\0version=1\n",
            binary.as_slice(),
        ] {
            assert_eq!(probe_bytes(bytes), Format::Raw, "{:?}", bytes.escape_ascii());
        }
    }

    #[test]
    fn a_name_that_says_a_format_is_held_against_the_content() {
        let probe_as = |name: &str, start: &[u8], end: &[u8]| {
            let mut image = start.to_vec();
            image.resize(8192 - 512, 0);
            image.extend(end);
            image.resize(8192, 0);
            probe_file(Path::new(name), &MemoryDevice::from_bytes(image))
        };
        for (name, wanted) in [
            ("a.vhdx", "\"vhdxfile\" at 0x0"),
            ("a.AVHDX", "\"vhdxfile\" at 0x0"),
            ("a.vhd", "\"conectix\" at 0x0 or in the footer at 0x1e00"),
            ("a.avhd", "conectix"),
            ("a.qcow2", "QFI\\xfb"),
            ("a.vmdk", "KDMV"),
            ("a-s001.vmdk", "KDMV"),
            ("a-f001.vmdk", "KDMV"),
        ] {
            let error = probe_as(name, b"vhdxfilf", b"").unwrap_err();
            assert!(matches!(error, BlockError::Damaged { .. }), "{name}: {error:?}");
            let text = error.to_string();
            assert!(text.contains(wanted) && text.contains("begins with \"vhdxfilf\""), "{text}");
        }
        for name in ["a", "a.raw", "a.img", "a.bin", "a-flat.vmdk", "A-FLAT.VMDK"] {
            assert_eq!(probe_as(name, b"x", b"").unwrap(), Format::Raw, "{name}");
        }
        for (name, what) in [
            ("a.ova", "tar -xf"),
            ("a.OVF", "the disk that it names"),
            ("a.vhdx.gz", "unpack"),
            ("a.img.xz", "unpack"),
            ("a.raw.zst", "unpack"),
            ("a.zip", "unpack"),
            ("a.vdi", "qemu-img convert"),
        ] {
            let error = probe_as(name, b"x", b"").unwrap_err();
            assert!(matches!(error, BlockError::Unsupported { .. }), "{name}: {error:?}");
            let text = error.to_string();
            assert!(text.contains(what) && text.contains("--format raw"), "{text}");
            assert_eq!(probe_as(name, b"QFI\xfb", b"").unwrap(), Format::Qcow2, "{name}");
        }
        assert_eq!(probe_as("a.img", b"QFI\xfb", b"").unwrap(), Format::Qcow2);
        assert_eq!(probe_as("a.vhd", b"QFI\xfb", b"conectix").unwrap(), Format::Vhd);
        let error = probe_as("a.vhd", b"vhdxfile", b"").unwrap_err();
        assert!(matches!(error, BlockError::Unsupported { .. }), "{error:?}");
        assert!(error.to_string().contains("--format vhdx"), "{error}");
    }
}
