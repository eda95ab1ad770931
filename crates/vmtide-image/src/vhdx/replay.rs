//! Replaying the log: in memory for readers, on the file for writers (MS-VHDX 2.3.3).
//!
//! A reader must not change the file, so [`Replayed`] lays the log's changes over it. Pages are not
//! copied: each stays in the log, where it is read when it is asked for, so a log takes a hundredth
//! of its size in memory. A writer makes the changes in the file with [`replay_onto`].

use super::guid::Guid;
use super::header::Headers;
use super::log::{ActiveLog, LoggedChange};
use super::log_entry::{LOG_SECTOR_BYTES, PageEnds};
use crate::bytes::length;
use std::collections::BTreeMap;
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, Extent, ExtentKind, Result, WritableBlockDevice,
    push_extent,
};

/// The most separate changes that are laid over a file, some 25 MiB of memory. A log of pages that
/// holds more has a gigabyte, a hundred times what hypervisors make; a writer can replay it all the
/// same.
const MAX_PATCHES: usize = 1 << 18;

/// A file as it is once its log has been replayed.
///
/// Any number of threads may read; there are no locks.
pub(crate) struct Replayed<D> {
    file: D,
    /// The changes by the byte they begin at; they do not overlap.
    patches: BTreeMap<u64, Patch>,
    size_bytes: u64,
}

/// What a range of the file is instead of what is stored there.
#[derive(Clone, Copy)]
struct Patch {
    end: u64,
    kind: PatchKind,
}

#[derive(Clone, Copy)]
enum PatchKind {
    Zero,
    /// A page with these ends, whose middle is in the data sector at this byte of the file.
    Page {
        ends: PageEnds,
        data_at: u64,
    },
}

impl<D: BlockDevice> Replayed<D> {
    /// Lays the changes of the log over `file`. Where the log is empty there are none, and reading
    /// through this costs a comparison.
    ///
    /// # Errors
    /// As [`ActiveLog::find`] and [`ActiveLog::for_each_change`]; [`BlockError::Unsupported`] for a
    /// log of more than 262,144 changes.
    pub(crate) fn open(file: D, headers: &Headers) -> Result<Self> {
        let Some(log) = ActiveLog::find(&file, &headers.current)? else {
            let size_bytes = file.size_bytes();
            return Ok(Self { file, patches: BTreeMap::new(), size_bytes });
        };
        let mut patches = BTreeMap::new();
        log.for_each_change(&file, |change| {
            match change {
                LoggedChange::Zero(range) => lay(&mut patches, range, PatchKind::Zero),
                LoggedChange::Page { offset, ends, data_at } => {
                    let range = ByteRange::new(offset, LOG_SECTOR_BYTES as u64);
                    lay(&mut patches, range, PatchKind::Page { ends, data_at });
                }
            }
            if patches.len() > MAX_PATCHES {
                return Err(BlockError::unsupported(
                    file.name(),
                    "its log holds too many changes to replay in memory; open it for writing \
                     (check --repair) to replay the log on disk",
                ));
            }
            Ok(())
        })?;
        let size_bytes = log.file_size_bytes(&file);
        Ok(Self { file, patches, size_bytes })
    }

    /// Whether nothing differs from the file, which can then be read without this.
    pub(crate) fn is_unchanged(&self) -> bool {
        self.patches.is_empty() && self.size_bytes == self.file.size_bytes()
    }

    /// The file as it is stored.
    pub(crate) fn into_file(self) -> D {
        self.file
    }

    /// Reads what is stored; past the end of the file are zeros.
    fn read_stored(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let stored = length(self.file.size_bytes().saturating_sub(offset)).min(buffer.len());
        let (stored, missing) = buffer.split_at_mut(stored);
        missing.fill(0);
        if stored.is_empty() { Ok(()) } else { self.file.read_at(stored, offset) }
    }

    fn read_patch(&self, kind: PatchKind, inside: u64, piece: &mut [u8]) -> Result<()> {
        match kind {
            PatchKind::Zero => piece.fill(0),
            PatchKind::Page { ends, data_at } => {
                let mut sector = [0; LOG_SECTOR_BYTES];
                self.file.read_at(&mut sector, data_at)?;
                let start = length(inside);
                piece.copy_from_slice(&ends.page(&sector)[start..start + piece.len()]);
            }
        }
        Ok(())
    }

    /// The patch that `at` is in, or else how far it is to the next one.
    fn patch_at(&self, at: u64) -> Result<(u64, Patch), u64> {
        match self.patches.range(..=at).next_back() {
            Some((start, patch)) if patch.end > at => Ok((*start, *patch)),
            _ => Err(self.patches.range(at..).next().map_or(u64::MAX, |(start, _)| start - at)),
        }
    }
}

/// Puts a change over those before it.
fn lay(patches: &mut BTreeMap<u64, Patch>, range: ByteRange, kind: PatchKind) {
    if range.is_empty() {
        return;
    }
    let end = range.end();
    if let Some((start, patch)) = patches.range(..range.offset).next_back()
        && patch.end > range.offset
    {
        // Only ranges of zeros are longer than the page that is the unit of all changes.
        let (start, patch) = (*start, *patch);
        patches.insert(start, Patch { end: range.offset, ..patch });
        if patch.end > end {
            patches.insert(end, patch);
        }
    }
    while let Some((start, patch)) = patches.range(range.offset..end).next() {
        let (start, patch) = (*start, *patch);
        patches.remove(&start);
        if patch.end > end {
            patches.insert(end, patch);
        }
    }
    patches.insert(range.offset, Patch { end, kind });
}

impl<D: BlockDevice> BlockDevice for Replayed<D> {
    fn name(&self) -> String {
        self.file.name()
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.check_range(ByteRange::new(offset, buffer.len() as u64))?;
        let (mut rest, mut at) = (buffer, offset);
        while !rest.is_empty() {
            let (patch, bytes) = match self.patch_at(at) {
                Ok((start, patch)) => (Some((start, patch.kind)), patch.end - at),
                Err(bytes) => (None, bytes),
            };
            let (piece, after) = rest.split_at_mut(length(bytes).min(rest.len()));
            match patch {
                Some((start, kind)) => self.read_patch(kind, at - start, piece)?,
                None => self.read_stored(piece, at)?,
            }
            at += piece.len() as u64;
            rest = after;
        }
        Ok(())
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.check_range(range)?;
        let stored = ByteRange::from_bounds(range.offset, range.end().min(self.file.size_bytes()));
        let is_patched = match self.patch_at(range.offset) {
            Ok(_) => true,
            Err(bytes) => bytes < range.length,
        };
        if !is_patched && !stored.is_empty() {
            return self.file.extents(stored);
        }
        let mut extents = Vec::new();
        push_extent(&mut extents, Extent { range, kind: ExtentKind::Data });
        Ok(extents)
    }
}

/// Replays the log on the file, where it is not empty, and empties it; answers with whether there
/// was anything to do. A crash on the way is repaired by doing it again, because the log stays
/// live until all its changes are on stable storage. The file gets a new FileWriteGuid.
///
/// # Errors
/// As [`ActiveLog::find`] and [`ActiveLog::for_each_change`]; what the medium says.
pub(crate) fn replay_onto(file: &dyn WritableBlockDevice, headers: &mut Headers) -> Result<bool> {
    let Some(log) = ActiveLog::find(file, &headers.current)? else {
        return Ok(false);
    };
    // Nothing is changed before it is known that everything can be.
    let mut size_bytes = log.file_size_bytes(file);
    log.for_each_change(file, |change| {
        size_bytes = size_bytes.max(match change {
            LoggedChange::Zero(range) => range.end(),
            LoggedChange::Page { offset, .. } => offset + LOG_SECTOR_BYTES as u64,
        });
        Ok(())
    })?;
    let file_write_guid = Guid::random()?;
    headers.update(file, |header| header.file_write_guid = file_write_guid)?;
    if file.size_bytes() < size_bytes {
        file.resize(size_bytes)?;
    }
    let mut sector = [0; LOG_SECTOR_BYTES];
    log.for_each_change(file, |change| match change {
        LoggedChange::Zero(range) => file.write_zeroes(range),
        LoggedChange::Page { offset, ends, data_at } => {
            file.read_at(&mut sector, data_at)?;
            file.write_at(&ends.page(&sector), offset)
        }
    })?;
    file.flush()?;
    headers.update(file, |header| header.log_guid = Guid::NIL)?;
    Ok(true)
}
