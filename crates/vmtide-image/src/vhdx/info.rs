//! What a VHDX says of itself.

use super::header::read_creator;
use super::tables::Tables;
use crate::{BackingInfo, Format, ImageInfo, LogState};
use std::collections::BTreeMap;
use vmtide_block::{BlockDevice, Result};

/// What the image says of itself; its log is replayed in memory where it is not empty.
///
/// # Errors
/// As opening it.
pub(crate) fn info(file: &dyn BlockDevice) -> Result<ImageInfo> {
    let creator = read_creator(file)?;
    let (tables, _) = Tables::replayed(file)?;
    let (metadata, header) = (&tables.metadata, &tables.headers.current);
    let subformat = match (metadata.has_parent, metadata.leave_blocks_allocated) {
        (true, _) => "differencing",
        (false, true) => "fixed",
        (false, false) => "dynamic",
    };
    let identifiers = [
        ("virtual_disk_id", metadata.disk_id),
        ("data_write_guid", header.data_write_guid),
        ("file_write_guid", header.file_write_guid),
    ];
    let is_dirty = header.is_log_dirty();
    let backing = tables.parent_link().map(|link| {
        let mut names = link.names.into_iter();
        BackingInfo {
            name: names.next().unwrap_or_default(),
            format: Some(Format::Vhdx.to_string()),
            other_names: names.collect(),
            identity: link.identities.into_iter().next(),
        }
    });
    Ok(ImageInfo {
        subformat: Some(subformat.into()),
        block_size_bytes: Some(tables.geometry.block_bytes()),
        logical_sector_bytes: Some(metadata.logical_sector_bytes),
        physical_sector_bytes: Some(metadata.physical_sector_bytes),
        creator,
        identifiers: identifiers
            .into_iter()
            .map(|(name, guid)| (name.to_owned(), guid.to_string()))
            .collect::<BTreeMap<_, _>>(),
        log: Some(if is_dirty { LogState::Dirty } else { LogState::Empty }),
        version: Some(1),
        backing,
        dirty: is_dirty,
        ..ImageInfo::new(Format::Vhdx, metadata.disk_size_bytes, file.size_bytes())
    })
}
