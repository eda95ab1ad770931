//! The text of a new descriptor, such as VMware's own programs write it.

use super::descriptor::NO_PARENT;
use super::hosted::SECTOR;
use std::fmt::Write as _;
use vmtide_block::{BlockError, Result};

/// The kinds of disk that are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VmdkKind {
    /// One growing file with everything in it. Workstation and QEMU run machines from it.
    #[default]
    MonolithicSparse,
    /// A descriptor and one file of the disk's bytes.
    MonolithicFlat,
    /// A descriptor and growing files of 2047 MiB of disk each.
    TwoGbMaxExtentSparse,
    /// A descriptor and files of 2047 MiB of the disk's bytes each.
    TwoGbMaxExtentFlat,
    /// One compressed file, written once from front to back: what OVA archives carry.
    StreamOptimized,
    /// As monolithicFlat, in the words of ESXi.
    Vmfs,
}

impl VmdkKind {
    /// All kinds, the default first.
    pub const ALL: [Self; 6] = [
        Self::MonolithicSparse,
        Self::MonolithicFlat,
        Self::TwoGbMaxExtentSparse,
        Self::TwoGbMaxExtentFlat,
        Self::StreamOptimized,
        Self::Vmfs,
    ];

    /// The name in a descriptor's `createType`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::MonolithicSparse => "monolithicSparse",
            Self::MonolithicFlat => "monolithicFlat",
            Self::TwoGbMaxExtentSparse => "twoGbMaxExtentSparse",
            Self::TwoGbMaxExtentFlat => "twoGbMaxExtentFlat",
            Self::StreamOptimized => "streamOptimized",
            Self::Vmfs => "vmfs",
        }
    }

    /// The kind of this name, in any case of letters.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name().eq_ignore_ascii_case(name))
    }

    /// Whether the bytes of the disk are stored as they are, with no tables.
    pub const fn is_flat(self) -> bool {
        matches!(self, Self::MonolithicFlat | Self::TwoGbMaxExtentFlat | Self::Vmfs)
    }

    /// Whether the descriptor is in the one extent's file.
    pub const fn is_embedded(self) -> bool {
        matches!(self, Self::MonolithicSparse | Self::StreamOptimized)
    }
}

/// The sectors of disk in one file of the kinds that are split: VMware's 2047 MiB, so that a sparse
/// file with its tables stays below 2 GiB.
const SPLIT_SECTORS: u64 = 4_192_256;

/// The most files of one disk; see the descriptor's reader.
const MAX_FILES: u64 = 4096;

/// One extent of a new disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NewExtent {
    pub(super) file: String,
    pub(super) sectors: u64,
}

/// The extents of a new disk whose descriptor will be called `name`.
pub(super) fn plan(kind: VmdkKind, name: &str, sectors: u64) -> Result<Vec<NewExtent>> {
    if name.contains(['"', '\n', '\r', '\0', '/']) || name.is_empty() {
        return Err(BlockError::unsupported(
            name,
            "is no file name that a VMDK descriptor can hold; leave out quotation marks and line ends",
        ));
    }
    let stem = match name.rsplit_once('.') {
        Some((stem, _)) if !stem.is_empty() => stem,
        _ => name,
    };
    let letter = match kind {
        VmdkKind::MonolithicSparse | VmdkKind::StreamOptimized => {
            return Ok(vec![NewExtent { file: name.to_owned(), sectors }]);
        }
        VmdkKind::MonolithicFlat | VmdkKind::Vmfs => {
            return Ok(vec![NewExtent { file: format!("{stem}-flat.vmdk"), sectors }]);
        }
        VmdkKind::TwoGbMaxExtentSparse => 's',
        VmdkKind::TwoGbMaxExtentFlat => 'f',
    };
    let count = sectors.div_ceil(SPLIT_SECTORS).max(1);
    if count > MAX_FILES {
        return Err(BlockError::unsupported(
            name,
            format!(
                "a disk of {sectors} sectors would need {count} files; {MAX_FILES} are allowed"
            ),
        ));
    }
    let extent = |number: u64| NewExtent {
        file: format!("{stem}-{letter}{:03}.vmdk", number + 1),
        sectors: (sectors - number * SPLIT_SECTORS).min(SPLIT_SECTORS),
    };
    Ok((0..count).map(extent).collect())
}

/// What a new descriptor says besides its extents.
pub(super) struct Words<'a> {
    pub(super) kind: VmdkKind,
    pub(super) cid: u32,
    /// The parent's content id and path.
    pub(super) parent: Option<(u32, &'a str)>,
    pub(super) adapter: &'a str,
    /// 28 random bytes for the ids.
    pub(super) random: [u8; 28],
}

/// The descriptor's text.
pub(super) fn describe(words: &Words<'_>, extents: &[NewExtent]) -> String {
    let kind = words.kind;
    let parent_cid = words.parent.map_or(NO_PARENT, |(cid, _)| cid);
    let sectors: u64 = extents.iter().map(|extent| extent.sectors).sum();
    let mut text = format!(
        "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID={:08x}\nparentCID={parent_cid:08x}\n\
         createType=\"{}\"\n",
        words.cid,
        kind.name()
    );
    if let Some((_, hint)) = words.parent {
        let _ = writeln!(text, "parentFileNameHint=\"{hint}\"");
    }
    text.push_str("\n# Extent description\n");
    for NewExtent { file, sectors } in extents {
        let (access, word, end) = match kind {
            VmdkKind::StreamOptimized => ("RDONLY", "SPARSE", ""),
            VmdkKind::Vmfs => ("RW", "VMFS", ""),
            kind if kind.is_flat() => ("RW", "FLAT", " 0"),
            _ => ("RW", "SPARSE", ""),
        };
        let _ = writeln!(text, "{access} {sectors} {word} \"{file}\"{end}");
    }
    let (cylinders, heads, sectors_per_track) = geometry(words.adapter, sectors);
    let hex = |bytes: &[u8]| -> String { bytes.iter().map(|byte| format!("{byte:02x}")).collect() };
    let (uuid, long) = words.random.split_at(16);
    let mut uuid = uuid.to_vec();
    // VMware's prefix for the ids of virtual disks.
    let prefix = [0x60, 0x00, 0xc2, 0x90 | (uuid[3] & 0xf)];
    uuid[..4].copy_from_slice(&prefix);
    let spaced: Vec<String> = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    let _ = write!(
        text,
        "\n# The Disk Data Base\n#DDB\n\nddb.adapterType = \"{}\"\n\
         ddb.geometry.cylinders = \"{cylinders}\"\nddb.geometry.heads = \"{heads}\"\n\
         ddb.geometry.sectors = \"{sectors_per_track}\"\nddb.longContentID = \"{}{:08x}\"\n\
         ddb.uuid = \"{}-{}\"\nddb.virtualHWVersion = \"8\"\n",
        words.adapter,
        hex(long),
        words.cid,
        spaced[..8].join(" "),
        spaced[8..].join(" "),
    );
    text
}

/// Cylinders, heads and sectors per track, as VMware gives them: 16 × 63 for IDE; for SCSI 64 × 32
/// up to 1 GiB, 128 × 32 up to 2 GiB, 255 × 63 above.
fn geometry(adapter: &str, sectors: u64) -> (u64, u64, u64) {
    let gibibytes = sectors.saturating_mul(SECTOR).div_ceil(1 << 30);
    let (heads, per_track, most) = match (adapter, gibibytes) {
        ("ide", _) => (16, 63, 16383),
        (_, 0..=1) => (64, 32, 65535),
        (_, 2) => (128, 32, 65535),
        _ => (255, 63, u64::from(u32::MAX)),
    };
    ((sectors / (heads * per_track)).clamp(1, most), heads, per_track)
}

#[cfg(test)]
mod tests {
    use super::super::descriptor::Descriptor;
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let sectors = 2 * SPLIT_SECTORS + 77;
        for kind in VmdkKind::ALL {
            assert_eq!(VmdkKind::from_name(kind.name()), Some(kind));
            let extents = plan(kind, "a b.vmdk", sectors).unwrap();
            let words = Words {
                kind,
                cid: 0xabc,
                parent: Some((7, "p.vmdk")),
                adapter: "lsilogic",
                random: [9; 28],
            };
            let found = Descriptor::parse(describe(&words, &extents).as_bytes()).unwrap();
            assert_eq!(found.sectors(), sectors);
            assert_eq!((found.cid, found.parent_cid), (Some(0xabc), Some(7)));
            assert_eq!(found.create_type.as_deref(), Some(kind.name()));
            let names: Vec<_> = found.extents.iter().map(|extent| extent.file.as_str()).collect();
            let expected: &[&str] = match kind {
                VmdkKind::MonolithicSparse | VmdkKind::StreamOptimized => &["a b.vmdk"],
                VmdkKind::MonolithicFlat | VmdkKind::Vmfs => &["a b-flat.vmdk"],
                VmdkKind::TwoGbMaxExtentSparse => {
                    &["a b-s001.vmdk", "a b-s002.vmdk", "a b-s003.vmdk"]
                }
                VmdkKind::TwoGbMaxExtentFlat => {
                    &["a b-f001.vmdk", "a b-f002.vmdk", "a b-f003.vmdk"]
                }
            };
            assert_eq!(names, expected);
            assert!(found.entries["ddb.longcontentid"].ends_with("00000abc"));
            assert_eq!(found.entries["ddb.uuid"].len(), 47);
        }
        assert!(plan(VmdkKind::Vmfs, "a\"b.vmdk", 1).is_err());
        assert!(plan(VmdkKind::TwoGbMaxExtentFlat, "a.vmdk", u64::MAX / 512).is_err());
    }

    #[test]
    fn the_geometry_is_vmwares() {
        assert_eq!(geometry("lsilogic", 4096), (2, 64, 32));
        assert_eq!(geometry("lsilogic", 20 << 21), (2610, 255, 63));
        assert_eq!(geometry("ide", 8192), (8, 16, 63));
        assert_eq!(geometry("ide", 1 << 40), (16383, 16, 63));
    }
}
