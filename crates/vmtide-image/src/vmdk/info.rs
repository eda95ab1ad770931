//! What an image says of itself, by its first file alone.

use super::descriptor::{Descriptor, ExtentType};
use super::head::{Head, effective_header};
use super::hosted::{SECTOR, flag};
use super::layout::{Kind, SparseLayout};
use super::set_parent::NEXT_PARENT_CID;
use crate::{BackingInfo, Format, ImageInfo, ParentLink};
use vmtide_block::{BlockDevice, BlockError, Result};

/// How the image at `file` names its parent; none where it has none.
///
/// # Errors
/// Where the file is no VMDK or its descriptor is damaged.
pub fn parent_link(file: &dyn BlockDevice) -> Result<Option<ParentLink>> {
    let head = Head::read_image(file)?;
    Ok(head.descriptor().and_then(|(descriptor, _)| link(descriptor)))
}

fn link(descriptor: &Descriptor) -> Option<ParentLink> {
    let cid = descriptor.parent_cid?;
    let mut identities = vec![content_id(cid)];
    // The parent was being written when this was: it has the one or the other.
    identities.extend(descriptor.entries.get(NEXT_PARENT_CID).cloned());
    Some(ParentLink {
        names: descriptor.parent_hint.iter().cloned().collect(),
        format: Some(Format::Vmdk),
        identities,
    })
}

/// The content id as children remember it: eight hexadecimal digits in lower case.
///
/// # Errors
/// Where the file is no VMDK, its descriptor is damaged or missing, or has no content id.
pub fn identity(file: &dyn BlockDevice) -> Result<String> {
    let head = Head::read_image(file)?;
    let cid = head.descriptor().and_then(|(descriptor, _)| descriptor.cid);
    cid.map(content_id).ok_or_else(|| {
        BlockError::unsupported(
            file.name(),
            "has no content id (CID): it is an extent without its descriptor, give the descriptor",
        )
    })
}

pub(super) fn content_id(cid: u32) -> String {
    format!("{cid:08x}")
}

/// What the image says of itself. Of an image in several files only this one is looked at, so the
/// size is what the descriptor says.
///
/// # Errors
/// Where the file is no VMDK, or its header or descriptor is damaged.
pub fn info(file: &dyn BlockDevice) -> Result<ImageInfo> {
    let head = Head::read_image(file)?;
    let mut info = ImageInfo::new(Format::Vmdk, 0, file.size_bytes());
    match &head {
        Head::Descriptor(descriptor, _) => info.size_bytes = descriptor.sectors() * SECTOR,
        Head::Hosted { header, descriptor } => {
            let layout = effective_header(file, header)?.unwrap_or(*header).layout();
            layout.validate(&file.name())?;
            describe_sparse(&mut info, &layout);
            if header.has(flag::REDUNDANT) {
                info.features.push("redundant-tables".into());
            }
            match descriptor {
                Some((text, _)) if text.extents.len() > 1 => {
                    info.size_bytes = text.sectors() * SECTOR;
                }
                Some(_) => {}
                None => info.features.push("no-descriptor".into()),
            }
        }
        Head::Esx(layout) => {
            describe_sparse(&mut info, layout);
            info.features.push("no-descriptor".into());
        }
    }
    if let Some((descriptor, _)) = head.descriptor() {
        describe(&mut info, descriptor, matches!(head, Head::Hosted { .. }));
    }
    Ok(info)
}

fn describe_sparse(info: &mut ImageInfo, layout: &SparseLayout) {
    info.size_bytes = layout.size_bytes();
    info.block_size_bytes = Some(layout.grain_bytes());
    info.version = Some(layout.version);
    info.dirty = layout.unclean;
    info.subformat = Some(
        match layout.kind {
            Kind::Hosted if layout.compressed => "streamOptimized",
            Kind::Hosted => "monolithicSparse",
            Kind::Cowd => "vmfsSparse",
            Kind::SeSparse => "seSparse",
        }
        .into(),
    );
    for (on, name) in [
        (layout.compressed, "compressed"),
        (layout.markers, "markers"),
        (layout.zero_grains && layout.kind == Kind::Hosted, "zero-grains"),
    ] {
        if on {
            info.features.push(name.into());
        }
    }
}

fn describe(info: &mut ImageInfo, descriptor: &Descriptor, is_embedded: bool) {
    if let Some(kind) = &descriptor.create_type {
        info.subformat = Some(kind.clone());
    }
    let entry = |key: &str| descriptor.entries.get(key).cloned();
    if info.version.is_none() {
        info.version = entry("version").and_then(|version| version.parse().ok());
    }
    info.change_tracking_file = entry("changetrackpath");
    let ids = [
        ("cid", descriptor.cid.map(content_id)),
        ("parent_cid", descriptor.parent_cid.map(content_id)),
        ("long_content_id", entry("ddb.longcontentid")),
        ("uuid", entry("ddb.uuid")),
        ("adapter_type", entry("ddb.adaptertype")),
    ];
    for (name, value) in ids {
        if let Some(value) = value {
            info.identifiers.insert(name.into(), value);
        }
    }
    // An embedded descriptor's one extent is this file, whatever name it had when it was written.
    let other_files = !is_embedded || descriptor.extents.len() > 1;
    for line in descriptor.extents.iter().filter(|_| other_files) {
        if line.kind != ExtentType::Zero && !info.extent_files.contains(&line.file) {
            info.extent_files.push(line.file.clone());
        }
    }
    if let Some(link) = link(descriptor) {
        info.backing = Some(BackingInfo {
            name: link.names.first().cloned().unwrap_or_default(),
            format: Some("vmdk".into()),
            other_names: Vec::new(),
            identity: link.identities.first().cloned(),
        });
    }
}
