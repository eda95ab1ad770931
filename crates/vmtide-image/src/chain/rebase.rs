//! Giving an image another parent.
//!
//! First the image gets a copy of all that is different in the new parent, read from the old one;
//! that changes nothing of what it reads as. When that is durable the image names the new parent,
//! in one step.

use super::children::find_children;
use super::link::{LinkTarget, can_set_parent, set_parent, stored_name};
use super::list::{ChainLayer, list_chain};
use crate::parent::real_path;
use crate::{Format, ImageWriter, OpenOptions, open_chain, open_read_only, open_writable};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, CancelToken, Extent, ExtentKind, Progress, Result, is_zero,
};

/// The size of one comparison.
const BUFFER_BYTES: u64 = 4 << 20;

/// The grain in which differences are copied. Smaller ones fragment the image, larger ones copy
/// more than is different.
const GRAIN_BYTES: u64 = 64 << 10;

/// The most ranges of the image that are held in memory before they are worked on.
const MAX_RANGES: usize = 1 << 16;

/// The parent that an image is to have.
#[derive(Clone, Debug)]
pub struct NewParent {
    /// Where it is.
    pub path: PathBuf,
    /// Its format; where it is not given it is probed, so give it where its guest is not trusted.
    pub format: Option<Format>,
    /// How the image shall name it, where that is not the path from its own directory.
    pub stored_name: Option<String>,
}

/// How to rebase.
#[derive(Clone, Default)]
pub struct RebaseOptions {
    /// How the chains are opened.
    pub open: OpenOptions,
    /// The new parent; none makes the image independent of any.
    pub parent: Option<NewParent>,
    /// Only changes the name and what the image insists on, and copies nothing: for a parent that
    /// was moved. The old one need not be there. What the image reads as changes with its parent.
    pub relink_only: bool,
    /// Rebases even where other images read through this one and would no longer know it.
    pub force: bool,
}

/// What a rebase did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RebaseSummary {
    /// The bytes of data that were copied from the old parent.
    pub copied_bytes: u64,
    /// The bytes that were made zero because the new parent has data there.
    pub zeroed_bytes: u64,
}

/// Gives the image at `path` another parent. Unless only the name is changed, it reads the same
/// afterwards, and at every moment before, whatever cuts this off. Progress counts bytes of its
/// disk.
///
/// # Errors
/// As [`open_chain`] for both chains; [`BlockError::Unsupported`] where the format cannot have this
/// parent, the new chain contains the image itself, or other images would no longer know it.
pub fn rebase_image(
    path: impl AsRef<Path>,
    options: &RebaseOptions,
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<RebaseSummary> {
    let path = path.as_ref();
    let layers = list_chain(path, &options.open)?;
    let Some(child) = layers.first() else {
        return Err(BlockError::damaged(path.display().to_string(), "it has no layers"));
    };
    if options.relink_only && options.parent.is_none() {
        return Err(BlockError::unsupported(
            path.display().to_string(),
            "would lose what it reads from its parent; rebase it without only changing the name",
        ));
    }
    let target = match &options.parent {
        Some(parent) => Some(target_of(path, parent, options)?),
        None => None,
    };
    let mut summary = RebaseSummary::default();
    if !options.relink_only {
        // Before hours of copying, not after.
        can_set_parent(path, child.format, target.as_ref())?;
        summary = copy_differences(path, child, options, progress, cancel)?;
    }
    set_parent(path, child.format, target.as_ref())?;
    Ok(summary)
}

/// What the new parent is called, and says of itself.
fn target_of(path: &Path, parent: &NewParent, options: &RebaseOptions) -> Result<LinkTarget> {
    let open = new_chain_options(parent, options);
    let layers = list_chain(&parent.path, &open)?;
    let real = real_path(path)?;
    for layer in &layers {
        if real_path(&layer.path)? == real {
            return Err(BlockError::unsupported(
                path.display().to_string(),
                format!("is part of the chain of {} itself", parent.path.display()),
            ));
        }
    }
    let (name, absolute_path) = stored_name(path, &parent.path)?;
    let Some(base) = layers.first() else {
        return Err(BlockError::damaged(parent.path.display().to_string(), "it has no layers"));
    };
    Ok(LinkTarget {
        name: parent.stored_name.clone().unwrap_or(name),
        absolute_path,
        format: base.format,
        identity: base.identity.clone(),
        next_identity: None,
    })
}

fn new_chain_options(parent: &NewParent, options: &RebaseOptions) -> OpenOptions {
    OpenOptions { format: parent.format, backing_device: None, ..options.open.clone() }
}

/// Copies into the image what it reads from its old parent and would not from the new one.
fn copy_differences(
    path: &Path,
    child: &ChainLayer,
    options: &RebaseOptions,
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<RebaseSummary> {
    let old_layers = open_chain(path, &options.open)?;
    let old = old_layers.into_iter().nth(1).map(|layer| layer.image as Arc<dyn BlockDevice>);
    let new = match &options.parent {
        Some(parent) => Some(open_read_only(&parent.path, &new_chain_options(parent, options))?),
        None => None,
    };
    let below = Arc::new(OldParent {
        device: old.unwrap_or_else(|| Arc::new(vmtide_block::MemoryDevice::new(0))),
        is_hidden: AtomicBool::new(false),
    });
    let open = OpenOptions {
        format: Some(child.format),
        backing_device: Some(below.clone()),
        ..options.open.clone()
    };
    let writer = open_writable(path, &open)?;
    refuse_if_unknown_afterwards(path, &*writer, options)?;
    let mut work = Comparison {
        writer: &*writer,
        old: below,
        new,
        summary: RebaseSummary::default(),
        buffers: (buffer(), buffer()),
    };
    let size_bytes = writer.size_bytes();
    progress.add_total(size_bytes);
    let mut at = 0;
    while at < size_bytes {
        let (ranges, end) = work.ranges_of_parent(ByteRange::from_bounds(at, size_bytes))?;
        for range in ranges {
            work.copy_range(range, cancel)?;
        }
        progress.add_done(end - at);
        at = end;
    }
    let summary = work.summary;
    progress.add_transferred(summary.copied_bytes);
    writer.finish()?;
    Ok(summary)
}

fn buffer() -> Vec<u8> {
    vec![0; crate::bytes::length(BUFFER_BYTES)]
}

/// Images that say something else of themselves once they are written lose their children.
fn refuse_if_unknown_afterwards(
    path: &Path,
    writer: &dyn ImageWriter,
    options: &RebaseOptions,
) -> Result<()> {
    if options.force || writer.next_identity()?.is_none() {
        return Ok(());
    }
    let children = find_children(path, &options.open.search)?;
    if children.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = children.iter().map(|child| child.display().to_string()).collect();
    Err(BlockError::unsupported(
        path.display().to_string(),
        format!(
            "is the parent of {}, which would no longer know it once it is written; say that they \
             may break (--force)",
            names.join(", ")
        ),
    ))
}

/// The old parent, as the writer of the image sees it.
struct OldParent {
    device: Arc<dyn BlockDevice>,
    /// Shown as nothing, so that the image says which ranges are its own; otherwise shown as data
    /// everywhere, so that the writer does not leave out zeros which only the old parent has.
    is_hidden: AtomicBool,
}

impl BlockDevice for OldParent {
    fn name(&self) -> String {
        self.device.name()
    }

    fn size_bytes(&self) -> u64 {
        self.device.size_bytes()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.device.read_at(buffer, offset)
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.check_range(range)?;
        let is_hidden = self.is_hidden.load(Ordering::Acquire);
        let kind = if is_hidden { ExtentKind::Unallocated } else { ExtentKind::Data };
        let mut extents = Vec::new();
        vmtide_block::push_extent(&mut extents, Extent { range, kind });
        Ok(extents)
    }
}

/// Comparing both parents where the image reads through.
struct Comparison<'a> {
    writer: &'a dyn ImageWriter,
    old: Arc<OldParent>,
    new: Option<Arc<dyn BlockDevice>>,
    summary: RebaseSummary,
    buffers: (Vec<u8>, Vec<u8>),
}

impl Comparison<'_> {
    /// The parts of a prefix of `range` that the image reads from its parent, and where the prefix
    /// ends.
    fn ranges_of_parent(&self, range: ByteRange) -> Result<(Vec<ByteRange>, u64)> {
        self.old.is_hidden.store(true, Ordering::Release);
        let mut ranges = Vec::new();
        let mut at = range.offset;
        while at < range.end() && ranges.len() < MAX_RANGES {
            let extents = self.writer.extents(ByteRange::from_bounds(at, range.end()))?;
            let before = at;
            for extent in extents {
                if extent.kind == ExtentKind::Unallocated {
                    ranges.push(extent.range);
                }
                at = extent.range.end();
            }
            if at <= before {
                let detail = format!("no extents reported at byte {at}");
                return Err(BlockError::damaged(self.writer.name(), detail));
            }
        }
        self.old.is_hidden.store(false, Ordering::Release);
        Ok((ranges, at))
    }

    /// Copies what is different in `range`.
    fn copy_range(&mut self, range: ByteRange, cancel: &CancelToken) -> Result<()> {
        let mut at = range.offset;
        while at < range.end() {
            cancel.check()?;
            let end = range.end().min((at / BUFFER_BYTES + 1) * BUFFER_BYTES);
            let piece = ByteRange::from_bounds(at, end);
            if !(self.is_zero_below(&*self.old.device, piece)?
                && self.new.as_deref().map_or(Ok(true), |new| self.is_zero_below(new, piece))?)
            {
                self.compare(piece)?;
            }
            at = end;
        }
        Ok(())
    }

    /// Whether a parent is known to show zeros in all of `range`.
    fn is_zero_below(&self, parent: &dyn BlockDevice, range: ByteRange) -> Result<bool> {
        let end = range.end().min(parent.size_bytes());
        if range.offset >= end {
            return Ok(true);
        }
        let extents = parent.extents(ByteRange::from_bounds(range.offset, end))?;
        let covers = extents.last().is_some_and(|last| last.range.end() >= end);
        Ok(covers && extents.iter().all(|extent| extent.kind.reads_as_zero()))
    }

    fn compare(&mut self, piece: ByteRange) -> Result<()> {
        let length = crate::bytes::length(piece.length);
        let (old, new) = &mut self.buffers;
        let (Some(old), Some(new)) = (old.get_mut(..length), new.get_mut(..length)) else {
            return Ok(());
        };
        read_below(&*self.old.device, old, piece.offset)?;
        match &self.new {
            Some(parent) => read_below(&**parent, new, piece.offset)?,
            None => new.fill(0),
        }
        let mut at = piece.offset;
        while at < piece.end() {
            let end = piece.end().min((at / GRAIN_BYTES + 1) * GRAIN_BYTES);
            let part =
                crate::bytes::length(at - piece.offset)..crate::bytes::length(end - piece.offset);
            let (wanted, present) = (old.get(part.clone()), new.get(part));
            if let (Some(wanted), Some(present)) = (wanted, present)
                && wanted != present
            {
                if is_zero(wanted) {
                    self.writer.write_zeroes(ByteRange::from_bounds(at, end))?;
                    self.summary.zeroed_bytes += end - at;
                } else {
                    self.writer.write_at(wanted, at)?;
                    self.summary.copied_bytes += end - at;
                }
            }
            at = end;
        }
        Ok(())
    }
}

/// Reads a parent as its child sees it: zeros past its end.
fn read_below(parent: &dyn BlockDevice, buffer: &mut [u8], at: u64) -> Result<()> {
    let present = crate::bytes::length(parent.size_bytes().saturating_sub(at)).min(buffer.len());
    let (stored, missing) = buffer.split_at_mut(present);
    missing.fill(0);
    if stored.is_empty() {
        return Ok(());
    }
    parent.read_at(stored, at)
}
