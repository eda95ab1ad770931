//! Applying a delta to a disk in place.
//!
//! From a file in two passes: [`ApplyPlan::prepare`] reads all of the delta, and of the target where
//! the delta says what the base holds, and refuses what does not fit with the target untouched;
//! [`ApplyPlan::write`] then writes. From a pipe there is one pass only, and the target has changed
//! before the end of the stream is known: [`apply_stream`] is for targets that can be thrown away.

use crate::create::read_base;
use crate::format::{HEAD_BYTES, RecordHead, shorten};
use crate::frame::{Decoder, EncodedFrame, for_each};
use crate::page_buffer::PageBuffer;
use crate::pipeline::{MAX_WORKERS, default_workers, run_in_order};
use crate::{DeltaError, DeltaFile, DeltaHeader, DeltaReader, DeltaSummary, Result};
use serde::Serialize;
use std::io::Read;
use vmtide_block::{BlockDevice, CancelToken, Extent, ExtentKind, Progress, WritableBlockDevice};

/// The sector that images of all formats but raw are a multiple of, in bytes: a target may be larger
/// than the base by less than this.
const SECTOR_BYTES: u64 = 512;

/// How much of a base is read at a time to hold it against its digests, in bytes: what is read is still in the
/// core's own cache when it is hashed.
const CHECK_BYTES: usize = 256 << 10;

/// How to apply a delta.
#[derive(Clone, Debug)]
pub struct ApplyOptions {
    /// The number of workers; each holds a frame in two forms.
    pub workers: usize,
    /// Whether to hold the target against the digests of the base that the delta has.
    pub check_base: bool,
    /// The moment that the target is known to be at; it must be the delta's base id.
    pub target_id: Option<String>,
    /// Whether this very delta was applied to the target before, and interrupted: what the target
    /// holds is then not looked at, and its size may be that of either moment.
    pub resuming: bool,
}

impl Default for ApplyOptions {
    fn default() -> Self {
        // Two more than the cores: one that waits for the medium leaves its core to another that decompresses.
        let workers = (default_workers() + 2).min(MAX_WORKERS);
        Self { workers, check_base: true, target_id: None, resuming: false }
    }
}

impl ApplyOptions {
    const fn looks_at_target(&self) -> bool {
        self.check_base && !self.resuming
    }
}

/// What applying a delta did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ApplySummary {
    /// The delta.
    #[serde(flatten)]
    pub delta: DeltaSummary,
    /// The bytes of data written.
    pub written_bytes: u64,
    /// The bytes made zero.
    pub zeroed_bytes: u64,
}

/// A delta that was found whole and right for its target.
pub struct ApplyPlan<'a> {
    delta: &'a DeltaFile,
    options: &'a ApplyOptions,
    summary: DeltaSummary,
}

impl<'a> ApplyPlan<'a> {
    /// Checks all of the delta, and the target against it. Writes nothing. Progress counts bytes of
    /// the file.
    ///
    /// # Errors
    /// [`DeltaError::Damaged`] where the delta is torn or altered; [`DeltaError::WrongBase`] where the
    /// target is not its base; what reading says.
    pub fn prepare(
        delta: &'a DeltaFile,
        target: &dyn BlockDevice,
        options: &'a ApplyOptions,
        progress: &Progress,
        cancel: &CancelToken,
    ) -> Result<Self> {
        check_target(delta.header(), delta.name(), target, options)?;
        progress.add_total(delta.summary().stream_bytes);
        let also = |buffer: &mut Vec<u8>, head: &RecordHead, extents: &[Extent]| -> Result<()> {
            match options.looks_at_target() {
                true => check_base(delta.name(), head, extents, target, buffer),
                false => Ok(()),
            }
        };
        let summary = delta.verify_with(options.workers, progress, cancel, Vec::new, &also)?;
        Ok(Self { delta, options, summary })
    }

    /// Gives the target the size that the disk has afterwards, which [`write`](Self::write) does by
    /// itself: for a caller who wants to know whether it can before anything else is changed.
    ///
    /// # Errors
    /// [`vmtide_block::BlockError::Unsupported`] where its format cannot; it is then as it was.
    pub fn fit_size(&self, target: &dyn WritableBlockDevice) -> Result<()> {
        fit_size(self.delta.header(), target)
    }

    /// Writes the changes into the target and flushes it. Progress counts bytes of the file.
    ///
    /// # Errors
    /// What the target says; [`vmtide_block::BlockError::Cancelled`]; [`DeltaError::Damaged`] where the file
    /// has changed since it was checked. The target is then a mixture, and the caller says so. To
    /// apply the same delta again makes it right.
    pub fn write(
        &self,
        target: &dyn WritableBlockDevice,
        progress: &Progress,
        cancel: &CancelToken,
    ) -> Result<ApplySummary> {
        let header = self.delta.header();
        progress.add_total(self.summary.stream_bytes);
        target.expect_bulk_writes();
        fit_size(header, target)?;
        let mut position = self.delta.first_position();
        let mut done = Written::default();
        run_in_order(
            self.options.workers,
            cancel,
            || {
                let frame = self.delta.frame_at(position)?.map(|(frame, _)| frame);
                if let Some(frame) = &frame {
                    position += HEAD_BYTES as u64 + frame.head.body_bytes();
                }
                Ok(frame)
            },
            || (PageBuffer::default(), Decoder::new(), PageBuffer::default()),
            |(body, decoder, memory), place| {
                let extents = self.delta.read_body(&place, body)?;
                let data = usable(decoder)?
                    .data_at_page(&place.head, body.bytes(), memory)
                    .map_err(|detail| self.delta.wrong(&place, &detail))?;
                let written = write_frame(&extents, data, header.size_bytes, target)?;
                progress.add_done(HEAD_BYTES as u64 + place.head.body_bytes());
                progress.add_transferred(written.data_bytes);
                Ok(written)
            },
            |written| {
                done.add(written);
                Ok(())
            },
        )?;
        target.flush()?;
        Ok(done.summary(self.summary.clone()))
    }
}

/// Applies a delta as it comes. The target is changed before it is known whether the stream is whole,
/// so it must be one that is thrown away after an error. Progress counts bytes of disk.
///
/// # Errors
/// As [`ApplyPlan::prepare`] and [`ApplyPlan::write`]; the target is then a mixture.
pub fn apply_stream<R: Read + Send>(
    delta: &mut DeltaReader<R>,
    target: &dyn WritableBlockDevice,
    options: &ApplyOptions,
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<ApplySummary> {
    let (header, name) = (delta.header().clone(), delta.name().to_owned());
    check_target(&header, &name, target, options)?;
    target.expect_bulk_writes();
    fit_size(&header, target)?;
    let mut done = Written::default();
    run_in_order(
        options.workers,
        cancel,
        || delta.next_frame(),
        || (Decoder::new(), PageBuffer::default(), Vec::new()),
        |(decoder, memory, present), encoded: EncodedFrame| {
            let head = encoded.head;
            if options.looks_at_target() {
                check_base(&name, &head, &encoded.extents, target, present)?;
            }
            let data = usable(decoder)?
                .data_at_page(&head, &encoded.body, memory)
                .map_err(|detail| DeltaError::damaged(&name, format!("a frame has {detail}")))?;
            let written = write_frame(&encoded.extents, data, header.size_bytes, target)?;
            progress.add_done(written.data_bytes + written.zeroed_bytes);
            progress.add_transferred(written.data_bytes);
            Ok(written)
        },
        |written| {
            done.add(written);
            Ok(())
        },
    )?;
    let summary = delta.read_to_end()?;
    target.flush()?;
    Ok(done.summary(summary))
}

fn usable(decoder: &mut Result<Decoder>) -> Result<&mut Decoder> {
    decoder.as_mut().map_err(|_| {
        DeltaError::unsupported("a delta", "zstd cannot be prepared: too little memory")
    })
}

#[derive(Clone, Copy, Default)]
struct Written {
    data_bytes: u64,
    zeroed_bytes: u64,
}

impl Written {
    fn add(&mut self, other: Self) {
        self.data_bytes += other.data_bytes;
        self.zeroed_bytes += other.zeroed_bytes;
    }

    const fn summary(self, delta: DeltaSummary) -> ApplySummary {
        ApplySummary { delta, written_bytes: self.data_bytes, zeroed_bytes: self.zeroed_bytes }
    }
}

/// Refuses a target that cannot be the base: of another size, or at another moment.
fn check_target(
    header: &DeltaHeader,
    delta: &str,
    target: &dyn BlockDevice,
    options: &ApplyOptions,
) -> Result<()> {
    let refuse = |detail: String| {
        Err(DeltaError::WrongBase { delta: delta.to_owned(), target: target.name(), detail })
    };
    let size_bytes = target.size_bytes();
    let base = header.base_size_bytes;
    let is_of = |disk: u64| size_bytes == disk || size_bytes == disk.next_multiple_of(SECTOR_BYTES);
    if options.resuming && is_of(header.size_bytes) {
        return Ok(());
    }
    if !is_of(base) {
        return refuse(format!("it has {size_bytes} bytes, and the delta's base has {base}"));
    }
    match &options.target_id {
        Some(id) if *id != header.base_id && !options.resuming => refuse(format!(
            "it is at {id:?}, and the delta begins at {:?}: apply what lies between first",
            header.base_id
        )),
        _ => Ok(()),
    }
}

/// Holds what the target has where a frame brings data against the frame's digest of the base. `buffer` is empty at first, and
/// kept from frame to frame.
fn check_base(
    delta: &str,
    head: &RecordHead,
    extents: &[Extent],
    target: &dyn BlockDevice,
    buffer: &mut Vec<u8>,
) -> Result<()> {
    let Some(expected) = head.base_digest else {
        return Ok(());
    };
    let mut hasher = blake3::Hasher::new();
    if buffer.is_empty() {
        buffer.resize(CHECK_BYTES, 0);
    }
    for extent in extents.iter().filter(|extent| extent.kind == ExtentKind::Data) {
        let mut at = extent.range.offset;
        while at < extent.range.end() {
            let left = usize::try_from(extent.range.end() - at).unwrap_or(CHECK_BYTES);
            let piece = &mut buffer[..left.min(CHECK_BYTES)];
            read_base(target, piece, at)?;
            hasher.update(piece);
            at += piece.len() as u64;
        }
    }
    if shorten(&hasher.finalize()) == expected {
        return Ok(());
    }
    Err(DeltaError::WrongBase {
        delta: delta.to_owned(),
        target: target.name(),
        detail: format!(
            "between bytes {} and {} it holds something else than the delta's base",
            head.first, head.end
        ),
    })
}

/// Gives the target the size of the disk afterwards, as its format counts: a target that is larger than
/// the base because its disks consist of whole sectors gets whole sectors.
fn fit_size(header: &DeltaHeader, target: &dyn WritableBlockDevice) -> Result<()> {
    let (is, wanted) = (target.size_bytes(), header.size_bytes);
    if header.size_bytes == header.base_size_bytes || is == wanted {
        return Ok(());
    }
    let rounded = wanted.next_multiple_of(SECTOR_BYTES);
    let has_sectors = is != header.base_size_bytes || target.resize(wanted).is_err();
    if has_sectors && is != rounded {
        target.resize(rounded)?;
    }
    Ok(())
}

fn write_frame(
    extents: &[Extent],
    data: &[u8],
    size_bytes: u64,
    target: &dyn WritableBlockDevice,
) -> Result<Written> {
    let mut written = Written::default();
    for_each(extents, data, |extent, data| {
        if extent.range.end() > size_bytes {
            // Checked already by whoever read the head; nothing is written past the disk in any case.
            return Err(DeltaError::damaged("a delta", "an extent past the end of its disk"));
        }
        match extent.kind {
            ExtentKind::Data => {
                target.write_at(data, extent.range.offset)?;
                written.data_bytes += extent.range.length;
            }
            ExtentKind::Zero | ExtentKind::Unallocated => {
                target.write_zeroes(extent.range)?;
                written.zeroed_bytes += extent.range.length;
            }
        }
        Ok(())
    })?;
    Ok(written)
}
