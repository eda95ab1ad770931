//! How each format names a parent, and is given another one.

use super::trial::Trial;
use crate::parent::real_path;
use crate::qcow2::header::Header;
use crate::{Format, ParentLink, qcow2, vhd, vhdx, vmdk};
use std::path::{Component, Path, PathBuf};
use vmtide_block::{BlockDevice, BlockError, OpenMode, RawDevice, Result, WritableBlockDevice};

/// How the image names its parent; `None` where it has none.
pub(super) fn link_of(file: &dyn BlockDevice, format: Format) -> Result<Option<ParentLink>> {
    match format {
        Format::Raw => Ok(None),
        Format::Qcow2 => {
            let header = Header::read(file)?;
            let Some(name) = header.backing_name.clone() else {
                return Ok(None);
            };
            let format = header.backing_format.as_deref().map(str::parse).transpose()?;
            Ok(Some(ParentLink { names: vec![name], format, identities: Vec::new() }))
        }
        Format::Vhdx => vhdx::parent_link(file),
        Format::Vhd => vhd::parent_link(file),
        Format::Vmdk => vmdk::parent_link(file),
    }
}

/// The parent that an image is to name.
#[derive(Clone, Debug)]
pub(crate) struct LinkTarget {
    /// Its path from the child's directory, with slashes.
    pub(crate) name: String,
    /// Its absolute path.
    pub(crate) absolute_path: String,
    /// Its format.
    pub(crate) format: Format,
    /// What it says of itself.
    pub(crate) identity: Option<String>,
    /// What it will say of itself after a change that is about to be made; the child must take
    /// both.
    pub(crate) next_identity: Option<String>,
}

/// Lets the image at `path` name another parent, or none. At every moment, also of a crash, it
/// names the old one or the new one. The disk it holds is not looked at.
///
/// # Errors
/// [`BlockError::Unsupported`] where the format cannot have this parent; what the medium says.
pub(super) fn set_parent(path: &Path, format: Format, target: Option<&LinkTarget>) -> Result<()> {
    if format == Format::Vmdk {
        // Where the descriptor is a file of its own, another file takes its place.
        return vmdk::set_parent(path, target);
    }
    set_parent_of(&RawDevice::open(path, OpenMode::ReadWrite)?, format, target)
}

/// Succeeds where [`set_parent`] could be called, as far as that is known without changing the file.
///
/// # Errors
/// As there.
pub(super) fn can_set_parent(
    path: &Path,
    format: Format,
    target: Option<&LinkTarget>,
) -> Result<()> {
    match (format, target) {
        (Format::Vmdk, _) => vmdk::can_set_parent(path, target),
        // Without a parent its blocks are completed, which is more than names.
        (Format::Vhd, None) => Ok(()),
        _ => {
            let trial = Trial::new(RawDevice::open(path, OpenMode::ReadOnly)?);
            match set_parent_of(&trial, format, target) {
                Err(_) if trial.is_full() => Ok(()),
                result => result,
            }
        }
    }
}

fn set_parent_of(
    file: &dyn WritableBlockDevice,
    format: Format,
    target: Option<&LinkTarget>,
) -> Result<()> {
    match format {
        Format::Raw => Err(BlockError::unsupported(file.name(), "a raw disk has no parent")),
        Format::Qcow2 => qcow2::set_parent(file, target),
        Format::Vhdx => vhdx::set_parent(file, target),
        Format::Vhd => vhd::set_parent(file, target),
        Format::Vmdk => Ok(()),
    }
}

/// The name of `parent` as the image at `child` shall store it: from the child's directory where
/// both are on one file system tree, else absolute.
pub(super) fn stored_name(child: &Path, parent: &Path) -> Result<(String, String)> {
    let (child, parent) = (real_path(child)?, real_path(parent)?);
    let directory: Vec<Component<'_>> =
        child.parent().map_or_else(Vec::new, |path| path.components().collect());
    let target: Vec<Component<'_>> = parent.components().collect();
    let common = directory.iter().zip(&target).take_while(|(a, b)| a == b).count();
    let absolute = text(&parent)?;
    if common == 0 {
        return Ok((absolute.clone(), absolute));
    }
    let mut relative = PathBuf::new();
    for _ in common..directory.len() {
        relative.push("..");
    }
    relative.extend(target.iter().skip(common));
    // With slashes, which every system reads.
    Ok((text(&relative)?.replace(std::path::MAIN_SEPARATOR, "/"), absolute))
}

fn text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).ok_or_else(|| {
        BlockError::unsupported(
            path.display().to_string(),
            "its path is no Unicode text, which images cannot store; rename it",
        )
    })
}
