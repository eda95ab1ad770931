//! A disk as it was at one moment, while the guest writes on.
//!
//! Before a block is overwritten it is copied into a scratch file without a name (copy before write). The view reads
//! the device, then looks which of the blocks it read were copied, and takes those from the scratch file; a
//! block that is not copied after the read was not written before it. When the scratch file is full or fails, the
//! view fails and the guest goes on.

use crate::bitmap::AtomicBitmap;
use crate::id::{Series, TrackingId};
use crate::options::Options;
use crate::{Result, TrackError};
use parking_lot::Mutex;
use std::ffi::OsString;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, CancelToken, Extent, ExtentKind, RawDevice,
    WritableBlockDevice, for_each_extent, is_zero, push_extent,
};

/// Writes longer than this look for holes before they copy: a guest that discards its whole disk would
/// otherwise have all of its zeros read.
const LOOK_FOR_HOLES_BYTES: u64 = 1 << 20;

/// What the disk and the view share.
pub(crate) struct ViewState {
    size_bytes: u64,
    granularity_bytes: u64,
    /// The blocks that the scratch file has. One that it has not been written to, but that is copied, is zero.
    copied: AtomicBitmap,
    scratch: Mutex<Option<Arc<RawDevice>>>,
    /// The bytes copied so far; held by the one copy at a time.
    copying: Mutex<u64>,
    limit_bytes: u64,
    failed: OnceLock<String>,
    ended: AtomicBool,
}

impl ViewState {
    pub fn new(size_bytes: u64, options: &Options) -> Result<Self> {
        let granularity_bytes = u64::from(options.granularity_bytes.max(512));
        let directory = options
            .scratch_directory
            .clone()
            .unwrap_or_else(|| scratch_directory(std::env::var_os("TMPDIR")));
        let scratch = unnamed_file(&directory, size_bytes)?;
        Ok(Self {
            size_bytes,
            granularity_bytes,
            copied: AtomicBitmap::new(size_bytes.div_ceil(granularity_bytes)),
            scratch: Mutex::new(Some(Arc::new(scratch))),
            copying: Mutex::new(0),
            limit_bytes: options.scratch_limit_bytes,
            failed: OnceLock::new(),
            ended: AtomicBool::new(false),
        })
    }

    pub fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire) || self.failed.get().is_some()
    }

    /// The view is worth nothing from now on.
    pub fn fail(&self, reason: &str) {
        // The first reason is the one to tell.
        let _ = self.failed.set(reason.to_owned());
        *self.scratch.lock() = None;
    }

    fn end(&self) {
        self.ended.store(true, Ordering::Release);
        *self.scratch.lock() = None;
    }

    fn check(&self, name: &str) -> vmtide_block::Result<()> {
        match self.failed.get() {
            Some(reason) => Err(BlockError::unsupported(
                name,
                format!("this moment of the disk is gone: {reason}; freeze it again"),
            )),
            None => Ok(()),
        }
    }

    /// Keeps what the blocks of `range` hold, before they are written (step 2c of the protocol).
    pub fn preserve(&self, range: ByteRange, device: &dyn BlockDevice) {
        let blocks = self.blocks_of(range);
        if self.is_ended() || self.copied.has_range(blocks.0, blocks.1) {
            return;
        }
        if let Err(error) = self.copy(range, device) {
            tracing::warn!(%error, "a frozen view of a disk fails");
            self.fail(&error.to_string());
        }
    }

    fn blocks_of(&self, range: ByteRange) -> (u64, u64) {
        (range.offset / self.granularity_bytes, range.end().div_ceil(self.granularity_bytes))
    }

    fn copy(&self, range: ByteRange, device: &dyn BlockDevice) -> vmtide_block::Result<()> {
        let mut used = self.copying.lock();
        let Some(scratch) = self.scratch.lock().clone() else {
            return Ok(());
        };
        let whole = range.align_outward(self.granularity_bytes, self.size_bytes);
        if whole.length > LOOK_FOR_HOLES_BYTES {
            for_each_extent(device, whole, &CancelToken::new(), |extent| {
                if extent.kind.reads_as_zero() {
                    // Only blocks that are zero from one end to the other.
                    let first = extent.range.offset.div_ceil(self.granularity_bytes);
                    let end = match extent.range.end() == self.size_bytes {
                        true => extent.range.end().div_ceil(self.granularity_bytes),
                        false => extent.range.end() / self.granularity_bytes,
                    };
                    self.take_zeros(first, end);
                }
                Ok(())
            })?;
        }
        let (first, end) = self.blocks_of(whole);
        let mut buffer = Vec::new();
        for block in first..end {
            if self.copied.has_range(block, block + 1) {
                continue;
            }
            let at = block * self.granularity_bytes;
            let length = self.granularity_bytes.min(self.size_bytes - at);
            buffer.resize(usize::try_from(length).unwrap_or(0), 0);
            device.read_at(&mut buffer, at)?;
            if !is_zero(&buffer) {
                *used = used.saturating_add(length);
                if *used > self.limit_bytes {
                    return Err(BlockError::unsupported(
                        "scratch file",
                        format!("more than {} bytes were overwritten", self.limit_bytes),
                    ));
                }
                scratch.write_at(&buffer, at)?;
            }
            self.copied.set_range(block, block + 1);
        }
        Ok(())
    }

    /// Blocks that are zero and not copied yet: the scratch file has a hole there already.
    fn take_zeros(&self, first: u64, end: u64) {
        // A block that was copied keeps what it has; setting its bit again changes nothing.
        self.copied.set_range(first, end);
    }

    /// The runs of copied blocks in `range`, as ranges inside it.
    fn copied_in(&self, range: ByteRange) -> Vec<ByteRange> {
        let (first, end) = self.blocks_of(range);
        let mut runs: Vec<ByteRange> = Vec::new();
        for block in first..end {
            if !self.copied.has_range(block, block + 1) {
                continue;
            }
            let run = ByteRange::new(block * self.granularity_bytes, self.granularity_bytes);
            let run = run.intersect(&range);
            match runs.last_mut() {
                Some(last) if last.end() == run.offset => last.length += run.length,
                _ => runs.push(run),
            }
        }
        runs
    }
}

/// The disk as it was when it was frozen. Dropping it ends the moment and frees what was kept for it.
///
/// Reads fail once the scratch file is full, the disk was closed or resized.
pub struct FrozenView {
    device: Arc<dyn WritableBlockDevice>,
    state: Arc<ViewState>,
    name: String,
    id: Option<TrackingId>,
}

impl FrozenView {
    pub(crate) fn new(
        device: Arc<dyn WritableBlockDevice>,
        state: Arc<ViewState>,
        disk: &str,
    ) -> Self {
        Self { device, state, name: format!("{disk} (frozen)"), id: None }
    }

    pub(crate) const fn set_id(&mut self, id: Option<TrackingId>) {
        self.id = id;
    }

    /// The tracking id of the moment; none where the disk is not tracked.
    pub const fn id(&self) -> Option<TrackingId> {
        self.id
    }
}

impl Drop for FrozenView {
    fn drop(&mut self) {
        self.state.end();
    }
}

impl BlockDevice for FrozenView {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn size_bytes(&self) -> u64 {
        self.state.size_bytes
    }

    fn block_size_bytes(&self) -> u32 {
        self.device.block_size_bytes()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        self.check_range(range)?;
        self.device.read_at(buffer, offset)?;
        for run in self.state.copied_in(range) {
            let scratch = self.state.scratch.lock().clone();
            self.state.check(&self.name)?;
            let start = usize::try_from(run.offset - offset).unwrap_or(usize::MAX);
            let end = start.saturating_add(usize::try_from(run.length).unwrap_or(usize::MAX));
            if let (Some(scratch), Some(part)) = (scratch, buffer.get_mut(start..end)) {
                scratch.read_at(part, run.offset)?;
            }
        }
        // Whatever was written past the view was written after it failed.
        self.state.check(&self.name)
    }

    fn extents(&self, range: ByteRange) -> vmtide_block::Result<Vec<Extent>> {
        self.check_range(range)?;
        let found = self.device.extents(range)?;
        let answered = found.last().map_or(range.offset, |extent| extent.range.end());
        let range = ByteRange::from_bounds(range.offset, answered);
        let copied = self.state.copied_in(range);
        self.state.check(&self.name)?;
        let mut extents = Vec::new();
        let mut copied = copied.into_iter().peekable();
        for extent in found {
            let mut at = extent.range.offset;
            while let Some(run) =
                copied.peek().copied().filter(|run| run.offset < extent.range.end())
            {
                push(&mut extents, at, run.offset, extent.kind);
                let end = run.end().min(extent.range.end());
                push(&mut extents, run.offset.max(at), end, ExtentKind::Data);
                at = at.max(end);
                if run.end() > extent.range.end() {
                    break;
                }
                copied.next();
            }
            push(&mut extents, at, extent.range.end(), extent.kind);
        }
        Ok(extents)
    }
}

fn push(extents: &mut Vec<Extent>, start: u64, end: u64, kind: ExtentKind) {
    push_extent(extents, Extent { range: ByteRange::from_bounds(start, end), kind });
}

/// Where scratch files are unless said otherwise. On Unix not in /tmp, which many systems keep in memory: a view of a disk
/// that is written much would take that of the host.
fn scratch_directory(chosen: Option<OsString>) -> PathBuf {
    /// Temporary files that may be large (hier(7)).
    const LARGE_FILES: &str = "/var/tmp";
    match chosen.filter(|chosen| !chosen.is_empty()) {
        Some(chosen) if cfg!(unix) => chosen.into(),
        None if Path::new(LARGE_FILES).is_dir() && cfg!(unix) => LARGE_FILES.into(),
        _ => std::env::temp_dir(),
    }
}

/// A sparse file of this size that is gone when it is closed, in whatever way.
fn unnamed_file(directory: &Path, size_bytes: u64) -> Result<RawDevice> {
    let failed =
        |error| TrackError::io(format!("make a scratch file in {}", directory.display()), error);
    let random = Series::random().map_err(failed)?;
    let name: String = random.0.iter().map(|byte| format!("{byte:02x}")).collect();
    let path: PathBuf = directory.join(format!("vmtide-{name}.scratch"));
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(0o600);
    }
    #[cfg(windows)]
    {
        use std::os::windows::fs::OpenOptionsExt;
        /// `FILE_FLAG_DELETE_ON_CLOSE` (`CreateFileW`).
        const DELETE_ON_CLOSE: u32 = 0x0400_0000;
        options.custom_flags(DELETE_ON_CLOSE);
    }
    let file = options.open(&path).map_err(failed)?;
    #[cfg(unix)]
    std::fs::remove_file(&path).map_err(failed)?;
    file.set_len(size_bytes).map_err(failed)?;
    Ok(RawDevice::from_file(file, path, true)?.without_flushes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn scratch_files_are_not_in_memory_unless_somebody_says_so() {
        assert_eq!(scratch_directory(Some("/some/where".into())), Path::new("/some/where"));
        for none in [None, Some(OsString::new())] {
            assert_eq!(scratch_directory(none), Path::new("/var/tmp"));
        }
    }
}
