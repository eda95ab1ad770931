//! What a chain consists of.

use super::link::link_of;
use crate::parent::{Search, find_named, look_for_parent, real_path};
use crate::{
    Format, MAX_CHAIN_DEPTH, OpenOptions, ParentLink, identity, image_info_device, probe_file,
};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use vmtide_block::{BlockError, OpenMode, Result};

/// One image of a chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainLayer {
    /// Where it is.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Its kind within the format, by its usual name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subformat: Option<String>,
    /// The size of its disk in bytes.
    pub size_bytes: u64,
    /// The size of its file in bytes, holes included.
    pub file_size_bytes: u64,
    /// What it says of itself, by which its children know it ([`crate::identity`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    /// Its parent; none for the base of the chain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<ChainParent>,
}

/// The parent that an image of a chain wants, and what was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainParent {
    /// Its name as the image stores it, the one that is tried first.
    pub name: String,
    /// The other names that the image stores.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub other_names: Vec<String>,
    /// Its format, where the image says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// What it must say of itself, one of these; empty where the format knows no such thing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub expected: Vec<String>,
    /// Whether it was found.
    pub state: ParentState,
    /// The file that was found, or the first of those that are not it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// What that file says of itself, or why that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found: Option<String>,
}

/// Whether a parent was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ParentState {
    /// It is there, and says of itself what its child wants, where the format knows such a thing.
    Ok,
    /// There is no file under any of its names.
    Missing,
    /// There are files under its names, but none says of itself what the child wants: it was
    /// changed or replaced.
    Mismatch,
    /// The policy forbids to look for it.
    NotLookedFor,
}

/// Lists the chain of the image at `path`: the image itself first, the base last, or the last one
/// whose parent is not there or is not the right one. Opens no disk, so it also works where the
/// chain does not open. With [`OpenOptions::any_parent`] it goes on past a wrong parent.
///
/// # Errors
/// Where an image of the chain cannot be read or is damaged, or the chain comes back to itself or
/// has more than [`MAX_CHAIN_DEPTH`] images.
pub fn list_chain(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Vec<ChainLayer>> {
    let mut layers: Vec<ChainLayer> = Vec::new();
    let mut seen: Vec<PathBuf> = Vec::new();
    let mut next = Some((path.as_ref().to_path_buf(), options.format));
    while let Some((path, format)) = next.take() {
        let real = real_path(&path)?;
        let name = path.display().to_string();
        if seen.contains(&real) {
            return Err(BlockError::damaged(name, "the chain comes back to this image"));
        }
        if seen.len() >= MAX_CHAIN_DEPTH {
            let detail = format!("the chain has more than {MAX_CHAIN_DEPTH} images");
            return Err(BlockError::damaged(name, detail));
        }
        seen.push(real);
        let (layer, parent_format) = read_layer(&path, format, options)?;
        next = layer.parent.as_ref().and_then(|parent| {
            let goes_on = parent.state == ParentState::Ok;
            parent.path.clone().filter(|_| goes_on).map(|path| (path, parent_format))
        });
        layers.push(layer);
    }
    Ok(layers)
}

/// One layer, and the format to open its parent in.
fn read_layer(
    path: &Path,
    format: Option<Format>,
    options: &OpenOptions,
) -> Result<(ChainLayer, Option<Format>)> {
    let file = options.file(path, OpenMode::ReadOnly)?;
    let format = format.map_or_else(|| probe_file(path, &file), Ok)?;
    let info = image_info_device(&file, Some(format))?;
    let link = link_of(&file, format)?;
    let parent = link.map(|link| find_link(path, link, format, options)).transpose()?;
    let parent_format = parent.as_ref().and_then(|parent| parent.format);
    let layer = ChainLayer {
        path: path.to_path_buf(),
        format,
        subformat: info.subformat,
        size_bytes: info.size_bytes,
        file_size_bytes: info.file_size_bytes,
        identity: identity(&file, format)?,
        parent,
    };
    Ok((layer, parent_format.or(options.backing_format)))
}

pub(super) fn find_link(
    child: &Path,
    link: ParentLink,
    format: Format,
    options: &OpenOptions,
) -> Result<ChainParent> {
    let search = if format == Format::Qcow2 {
        find_by_name(child, &link, options)?
    } else {
        look_for_parent(child, &link, options)?
    };
    let (state, path, found) = match search {
        Search::Found(path) => {
            let device = options.file(&path, OpenMode::ReadOnly)?;
            let found = link.format.map(|format| identity(&device, format)).transpose()?.flatten();
            (ParentState::Ok, Some(path), found)
        }
        Search::Refused => (ParentState::NotLookedFor, None, None),
        Search::Missing => (ParentState::Missing, None, None),
        Search::Others(others) => {
            let (path, found) = others.into_iter().next().unzip();
            (ParentState::Mismatch, path, found)
        }
    };
    let mut names = link.names.into_iter();
    Ok(ChainParent {
        name: names.next().unwrap_or_default(),
        other_names: names.collect(),
        format: link.format,
        expected: link.identities,
        state,
        path,
        found,
    })
}

/// qcow2 knows its parent by its path alone.
fn find_by_name(child: &Path, link: &ParentLink, options: &OpenOptions) -> Result<Search> {
    let name = link.names.first().map_or("", String::as_str);
    match find_named(options, child, "backing file", name) {
        Ok(Some(path)) => Ok(Search::Found(path)),
        Ok(None) => Ok(Search::Refused),
        Err(error) if error.io_kind() == Some(std::io::ErrorKind::NotFound) => Ok(Search::Missing),
        Err(error) => Err(error),
    }
}
