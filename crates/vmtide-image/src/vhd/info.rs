//! What a VHD says of itself.

use super::footer::{Kind, Located, id_text};
use super::image::Opened;
use super::parent::link_of;
use crate::{BackingInfo, Format, ImageInfo};
use vmtide_block::{BlockDevice, Result};

/// The footer's unique id, by which children know the image: a GUID in lower case, in the order of
/// its bytes.
pub(crate) fn identity(file: &dyn BlockDevice) -> Result<String> {
    Ok(id_text(Located::find(file)?.footer.unique_id()))
}

/// What the image says of itself.
pub(crate) fn info(file: &dyn BlockDevice) -> Result<ImageInfo> {
    let located = Located::find(file)?;
    let opened = Opened::new(file, &located)?;
    let mut info = ImageInfo::new(Format::Vhd, opened.size_bytes, file.size_bytes());
    info.subformat = Some(opened.kind().name().to_owned());
    info.logical_sector_bytes = Some(512);
    info.creator = Some(opened.footer.creator());
    info.version = Some(1);
    // Without a footer at the end the last writer did not come to its end.
    info.dirty = located.trailer.is_none();
    info.identifiers.insert("unique_id".into(), id_text(opened.footer.unique_id()));
    if let Some(header) = &opened.header {
        info.block_size_bytes = Some(header.block_bytes);
        if opened.kind() == Kind::Differencing {
            let link = link_of(file, header)?;
            info.identifiers.insert("parent_unique_id".into(), id_text(header.parent_id()));
            let mut names = link.names.into_iter();
            info.backing = Some(BackingInfo {
                name: names.next().unwrap_or_default(),
                format: Some(Format::Vhd.name().to_owned()),
                other_names: names.collect(),
                identity: link.identities.into_iter().next(),
            });
        }
    }
    Ok(info)
}
