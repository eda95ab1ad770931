//! Merging an image into its parent.
//!
//! The parent gets what the child holds of its own; the child stays as it is and reads the same at
//! every moment, because what it holds is now also below it. So a merge that was cut off is simply
//! run again, and after one the child may be deleted.
//!
//! A parent that says something of itself for its children (VHDX, VMDK) says something else once it
//! is written. The child is told before that it will, and takes both until the merge is done.

use super::children::find_children;
use super::link::{LinkTarget, set_parent, stored_name};
use super::list::{ChainLayer, list_chain};
use crate::parent::real_path;
use crate::{DiskImage, ImageWriter, OpenOptions, identity, open_chain, open_writable};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, CancelToken, Extent, ExtentKind, OpenMode, Progress,
    RawDevice, Result, WritableBlockDevice,
};

/// The size of one read and one write.
const BUFFER_BYTES: u64 = 4 << 20;

/// How to merge.
#[derive(Clone, Default)]
pub struct CommitOptions {
    /// How the chain is opened. Children that would break are looked for in its search
    /// directories, too.
    pub open: OpenOptions,
    /// Merges even where other images read through the parent: they are broken by it.
    pub force: bool,
}

/// What a merge did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitSummary {
    /// The parent.
    pub parent: PathBuf,
    /// What it says of itself now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_identity: Option<String>,
    /// The bytes of data that were written to it.
    pub written_bytes: u64,
    /// The bytes of it that were made zero.
    pub zeroed_bytes: u64,
    /// The size of its disk, where it had to grow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grown_to_bytes: Option<u64>,
    /// Other images that read through the parent, which this has broken.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub broken_children: Vec<PathBuf>,
}

/// Writes what the image at `path` holds of its own into its parent, which grows where it is
/// smaller. The image itself is not changed but for what it insists on in its parent: it reads the
/// same, and may then be deleted. Progress counts bytes of its disk.
///
/// Whatever cuts the merge off, the image reads as before and the merge can be run again.
///
/// # Errors
/// As [`open_chain`] where the chain is not whole; [`BlockError::Unsupported`] where the image has
/// no parent, its parent cannot be written, or other images read through the parent and `force` is
/// not given.
pub fn commit_image(
    path: impl AsRef<Path>,
    options: &CommitOptions,
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<CommitSummary> {
    let path = path.as_ref();
    // Opening says best what is wrong with a chain.
    drop(open_chain(path, &options.open)?);
    let layers = list_chain(path, &options.open)?;
    let (child, parent) = match layers.as_slice() {
        [child, parent, ..] => (child, parent),
        _ => {
            let detail = "has no parent to be merged into";
            return Err(BlockError::unsupported(path.display().to_string(), detail));
        }
    };
    let broken_children = other_children(parent, path, options)?;
    let writer = open_parent(parent, options)?;
    let mut link = None;
    if let Some(next) = writer.next_identity()? {
        let target = link_target(path, parent, Some(next))?;
        set_parent(path, child.format, Some(&target))?;
        link = Some(target);
    }
    let image = open_alone(path, child, options)?;
    let mut grown_to_bytes = None;
    if writer.size_bytes() < image.size_bytes() {
        writer.resize(image.size_bytes())?;
        grown_to_bytes = Some(image.size_bytes());
    }
    let (written_bytes, zeroed_bytes) = merge(&*image, &*writer, progress, cancel)?;
    writer.finish()?;
    drop((writer, image));
    let parent_identity =
        identity(&RawDevice::open(&parent.path, OpenMode::ReadOnly)?, parent.format)?;
    if let Some(mut target) = link {
        target.identity.clone_from(&parent_identity);
        target.next_identity = None;
        set_parent(path, child.format, Some(&target))?;
    }
    Ok(CommitSummary {
        parent: parent.path.clone(),
        parent_identity,
        written_bytes,
        zeroed_bytes,
        grown_to_bytes,
        broken_children,
    })
}

/// The other children of the parent, which must be none unless the user says so.
fn other_children(
    parent: &ChainLayer,
    path: &Path,
    options: &CommitOptions,
) -> Result<Vec<PathBuf>> {
    let real = real_path(path)?;
    let mut others = find_children(&parent.path, &options.open.search)?;
    others.retain(|other| *other != real);
    if others.is_empty() || options.force {
        return Ok(others);
    }
    let names: Vec<String> = others.iter().map(|other| other.display().to_string()).collect();
    Err(BlockError::unsupported(
        parent.path.display().to_string(),
        format!(
            "is the parent of {}, too, which writing to it would break; merge or rebase them \
             first, or say that they may break (--force)",
            names.join(", ")
        ),
    ))
}

fn open_parent(parent: &ChainLayer, options: &CommitOptions) -> Result<Arc<dyn ImageWriter>> {
    let open =
        OpenOptions { format: Some(parent.format), backing_device: None, ..options.open.clone() };
    open_writable(&parent.path, &open)
}

/// The child without its parent: only what it holds of its own is read.
fn open_alone(
    path: &Path,
    child: &ChainLayer,
    options: &CommitOptions,
) -> Result<Arc<dyn DiskImage>> {
    let nothing = Arc::new(NothingBelow { size_bytes: child.size_bytes });
    let open = OpenOptions {
        format: Some(child.format),
        backing_device: Some(nothing),
        ..options.open.clone()
    };
    let layers = open_chain(path, &open)?;
    match layers.into_iter().next() {
        Some(layer) => Ok(layer.image),
        None => Err(BlockError::damaged(path.display().to_string(), "it has no layers")),
    }
}

/// How the child is to name its parent.
fn link_target(
    path: &Path,
    parent: &ChainLayer,
    next_identity: Option<String>,
) -> Result<LinkTarget> {
    let (name, absolute_path) = stored_name(path, &parent.path)?;
    Ok(LinkTarget {
        name,
        absolute_path,
        format: parent.format,
        identity: parent.identity.clone(),
        next_identity,
    })
}

/// Copies the image's own ranges; answers with the bytes written and the bytes zeroed.
fn merge(
    image: &dyn DiskImage,
    writer: &dyn WritableBlockDevice,
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<(u64, u64)> {
    let size_bytes = image.size_bytes();
    progress.add_total(size_bytes);
    let (mut written, mut zeroed, mut at) = (0, 0, 0);
    let mut buffer = vec![0u8; crate::bytes::length(BUFFER_BYTES.min(size_bytes))];
    while at < size_bytes {
        cancel.check()?;
        let placements = image.layout(ByteRange::from_bounds(at, size_bytes))?;
        if placements.is_empty() {
            let detail = format!("no layout reported at byte {at}");
            return Err(BlockError::damaged(image.name(), detail));
        }
        for placement in placements {
            let range = placement.range;
            match placement.kind {
                ExtentKind::Unallocated => {}
                ExtentKind::Zero => {
                    writer.write_zeroes(range)?;
                    zeroed += range.length;
                }
                ExtentKind::Data => {
                    copy(image, writer, range, &mut buffer, cancel)?;
                    written += range.length;
                    progress.add_transferred(range.length);
                }
            }
            progress.add_done(range.length);
            at = range.end();
        }
    }
    Ok((written, zeroed))
}

fn copy(
    image: &dyn DiskImage,
    writer: &dyn WritableBlockDevice,
    range: ByteRange,
    buffer: &mut [u8],
    cancel: &CancelToken,
) -> Result<()> {
    let mut at = range.offset;
    while at < range.end() {
        cancel.check()?;
        let length = crate::bytes::length(range.end() - at).min(buffer.len());
        let Some(piece) = buffer.get_mut(..length).filter(|piece| !piece.is_empty()) else {
            break;
        };
        image.read_at(piece, at)?;
        writer.write_at(piece, at)?;
        at += length as u64;
    }
    Ok(())
}

/// What stands in for the parent while only the child's own ranges are read.
struct NothingBelow {
    size_bytes: u64,
}

impl BlockDevice for NothingBelow {
    fn name(&self) -> String {
        "the parent".into()
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, _buffer: &mut [u8], offset: u64) -> Result<()> {
        // Its layout said that the child holds this itself.
        Err(BlockError::damaged(
            self.name(),
            format!("would be read at byte {offset}, which the child should hold itself"),
        ))
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        Ok(vec![Extent { range, kind: ExtentKind::Unallocated }])
    }
}
