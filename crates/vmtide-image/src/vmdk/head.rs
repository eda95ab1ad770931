//! What stands at the start of a file: a descriptor, or a sparse extent's header.

use super::descriptor::Descriptor;
use super::hosted::{HostedHeader, IN_FOOTER, SECTOR, marker};
use super::layout::SparseLayout;
use super::{cowd, hosted, sesparse};
use crate::bytes::{le_u32, le_u64, length};
use vmtide_block::{BlockDevice, BlockError, Result};

/// How far from the end a footer is looked for: exporters that pack into archives pad with zeros.
const FOOTER_SEARCH_BYTES: u64 = 64 << 10;

/// What a file of an image begins with.
pub(super) enum Head {
    /// A descriptor of other files, which begins at this byte.
    Descriptor(Descriptor, u64),
    /// A hosted sparse extent with the descriptor inside it, where there is one.
    Hosted { header: HostedHeader, descriptor: Option<(Descriptor, u64)> },
    /// One of ESX's sparse extents.
    Esx(SparseLayout),
}

impl Head {
    pub(super) fn read(file: &dyn BlockDevice) -> Result<Self> {
        let name = file.name();
        let mut bytes = vec![0; length(file.size_bytes().min(SECTOR))];
        file.read_at(&mut bytes, 0)?;
        if bytes.starts_with(hosted::MAGIC) {
            let header = HostedHeader::parse(&bytes, &name, 0)?;
            let descriptor = match header.descriptor_range(file)? {
                Some((at, size)) => Some((Descriptor::read(file, at, size)?, at)),
                None => None,
            };
            // A header without a disk of its own only carries the descriptor.
            return Ok(match descriptor {
                Some((descriptor, at))
                    if header.capacity == 0 && !descriptor.extents.is_empty() =>
                {
                    Self::Descriptor(descriptor, at)
                }
                _ if header.capacity == 0 => {
                    return Err(BlockError::damaged(
                        name,
                        "VMDK sparse header at 0x0: capacity 0 at byte 12, and no descriptor with \
                         extents: there is no disk",
                    ));
                }
                descriptor => Self::Hosted { header, descriptor },
            });
        }
        if bytes.starts_with(cowd::MAGIC) {
            return Ok(Self::Esx(cowd::parse(&bytes, &name)?));
        }
        if le_u64(&bytes, 0) == sesparse::MAGIC {
            return Ok(Self::Esx(sesparse::parse(&bytes, file)?));
        }
        let descriptor = Descriptor::read_file(file)?;
        if descriptor.extents.is_empty() {
            return Err(BlockError::damaged(
                name,
                "VMDK descriptor: it has no extents, and there is no sparse header either",
            ));
        }
        Ok(Self::Descriptor(descriptor, 0))
    }

    /// As [`read`](Self::read), of the file that stands for the whole image and not of one extent of it. Its descriptor must
    /// say something: where it was wiped out nobody knows whether the disk has a parent, and without it a child reads as zeros
    /// where it has nothing of its own.
    pub(super) fn read_image(file: &dyn BlockDevice) -> Result<Self> {
        match Self::read(file)? {
            Self::Hosted { descriptor: Some((descriptor, at)), header }
                if descriptor.says_nothing() =>
            {
                let name = file.name();
                let base = name.rsplit(['/', '\\']).next().unwrap_or_default();
                Err(BlockError::damaged(
                    &name,
                    format!(
                        "VMDK descriptor at {at:#x}: it says nothing, not even whether the disk has a parent; if it \
                         has none, open a file beside it with the lines # Disk DescriptorFile and RW {} SPARSE \
                         \"{base}\"",
                        header.capacity
                    ),
                ))
            }
            head => Ok(head),
        }
    }

    /// The descriptor, with where it begins in the file.
    pub(super) fn descriptor(&self) -> Option<(&Descriptor, u64)> {
        match self {
            Self::Descriptor(descriptor, at) => Some((descriptor, *at)),
            Self::Hosted { descriptor, .. } => descriptor.as_ref().map(|(text, at)| (text, *at)),
            Self::Esx(_) => None,
        }
    }
}

/// The header that says where the tables are: the footer's where the first one says so; `None`
/// where the footer is missing.
pub(super) fn effective_header(
    file: &dyn BlockDevice,
    header: &HostedHeader,
) -> Result<Option<HostedHeader>> {
    if header.directory_offset != IN_FOOTER {
        return Ok(Some(*header));
    }
    let size = file.size_bytes();
    let end = size - size % SECTOR;
    let start = end.saturating_sub(FOOTER_SEARCH_BYTES);
    let mut bytes = vec![0; length(end - start)];
    file.read_at(&mut bytes, start)?;
    for (index, sector) in bytes.chunks_exact(length(SECTOR)).enumerate().rev() {
        let at = start + index as u64 * SECTOR;
        if sector.starts_with(hosted::MAGIC) {
            if at == 0 || !follows_marker(&bytes, index) {
                return Ok(None);
            }
            let footer = HostedHeader::parse(sector, &file.name(), at)?;
            let usable = footer.directory_offset != IN_FOOTER
                && footer.capacity == header.capacity
                && footer.grain_sectors == header.grain_sectors;
            return Ok(usable.then_some(footer));
        }
        // Only the end of the stream and padding may stand behind the footer, both all zeros.
        if !vmtide_block::is_zero(sector) {
            return Ok(None);
        }
    }
    Ok(None)
}

/// Whether the sector in front of sector `index` is a footer's marker.
fn follows_marker(bytes: &[u8], index: usize) -> bool {
    let sector = length(SECTOR);
    index
        .checked_sub(1)
        .and_then(|before| bytes.get(before * sector..(before + 1) * sector))
        .is_some_and(|before| le_u32(before, 8) == 0 && le_u32(before, 12) == marker::FOOTER)
}
