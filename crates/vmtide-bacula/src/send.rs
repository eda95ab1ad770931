//! One disk on its way to Bacula: which blocks go, and what is noted for the next job.

use crate::Result;
use crate::digests::{DIGEST_BLOCK_BYTES, DigestReader, DigestWriter, ZERO_DIGEST};
use crate::link::Link;
use crate::read::{Note, Part, Want, read_disk};
use crate::stream::{BLOCK_BYTES, MomentId, Record, Records, Tally};
use std::path::PathBuf;
use vmtide_block::{BlockDevice, ByteRange, RangeSet};

/// The most bytes in one frame of data: some of the daemon's blocks, so that it asks for few heads of frames, and
/// none of its blocks is cut. Larger frames are looked at and sent when they have left the processor's cache.
const FRAME_BYTES: usize = 8 * BLOCK_BYTES;

/// What of a disk is sent.
pub enum Selection {
    /// Everything that is not zero.
    Whole,
    /// What differs from a moment: these ranges.
    Ranges(RangeSet),
    /// What differs from a moment: these ranges, and what the digests of the newest moment show.
    Compared(RangeSet),
}

/// How to send a disk.
pub struct SendPlan {
    /// What.
    pub selection: Selection,
    /// The moment that a delta builds on.
    pub base: Option<MomentId>,
    /// The moment of the disk.
    pub moment: MomentId,
    /// Where to write digests, for a source without tracking.
    pub new_digests: Option<PathBuf>,
    /// The digests of the newest moment, where there are any.
    pub old_digests: Option<PathBuf>,
}

/// What was sent.
#[derive(Debug)]
pub struct Sent {
    /// Bytes of data.
    pub data_bytes: u64,
    /// What differs from the digests of the newest moment; none where nothing was compared.
    pub changed: Option<RangeSet>,
}

/// Sends a disk, up to the trailer. `check` is asked when all is read whether it still is what it was.
///
/// # Errors
/// Those of the disk, of the digests and of the link.
pub fn send_disk(
    link: &mut Link,
    device: &dyn BlockDevice,
    plan: &SendPlan,
    check: &dyn Fn() -> Result<()>,
) -> Result<Sent> {
    let size_bytes = device.size_bytes();
    let writer = match &plan.new_digests {
        Some(path) => Some(DigestWriter::create(path, size_bytes)?),
        None => None,
    };
    let reader = match &plan.old_digests {
        Some(path) if writer.is_some() => DigestReader::open(path, size_bytes),
        _ => None,
    };
    let nothing = RangeSet::new();
    let (whole, forced) = match &plan.selection {
        Selection::Whole => (true, &nothing),
        Selection::Ranges(ranges) | Selection::Compared(ranges) => (false, ranges),
    };
    let is_compared = reader.is_some();
    let cancel = link.cancel.clone();
    let mut sending = Sending {
        link,
        size_bytes,
        whole,
        everything: matches!(plan.selection, Selection::Ranges(_)) || whole,
        forced,
        reader,
        writer,
        changed: RangeSet::new(),
        records: Records::default(),
        tally: Tally::default(),
        position: None,
    };
    sending.record(&Record::header(size_bytes, plan.moment, plan.base))?;
    let want = match &plan.selection {
        Selection::Ranges(ranges) if sending.writer.is_none() => Want::Ranges(ranges),
        _ => Want::Whole { digests: sending.writer.is_some() },
    };
    read_disk(device, want, &cancel, &mut |part| sending.take(&part))?;
    check()?;
    sending.finish(is_compared)
}

struct Sending<'a> {
    link: &'a mut Link,
    size_bytes: u64,
    /// Whether zeros are left out, because the target begins as zeros.
    whole: bool,
    /// Whether all that is read is sent.
    everything: bool,
    /// What is sent in any case.
    forced: &'a RangeSet,
    reader: Option<DigestReader>,
    writer: Option<DigestWriter>,
    changed: RangeSet,
    records: Records,
    tally: Tally,
    position: Option<u64>,
}

impl Sending<'_> {
    fn take(&mut self, part: &Part<'_>) -> Result<()> {
        self.link.alive()?;
        match part {
            Part::Zero(range) if self.writer.is_none() => self.zero(*range),
            Part::Zero(range) => self.zero_blocks(*range),
            Part::Data { offset, bytes, notes } => self.data(*offset, bytes, notes),
        }
    }

    /// Zeros where digests are kept: block by block.
    fn zero_blocks(&mut self, range: ByteRange) -> Result<()> {
        let forced = self.forced.within(range);
        let note = Note { is_zero: true, digest: ZERO_DIGEST };
        let mut at = range.offset;
        let mut count = 0u64;
        while at < range.end() {
            let block = ByteRange::from_bounds(at, (at + DIGEST_BLOCK_BYTES).min(range.end()));
            let differs = self.compare(block, note)?;
            if self.is_wanted(block, differs, &forced) {
                self.zero(block)?;
            }
            at = block.end();
            count += 1;
            if count.is_multiple_of(1 << 16) {
                self.link.alive()?;
            }
        }
        Ok(())
    }

    fn data(&mut self, offset: u64, bytes: &[u8], notes: &[Note]) -> Result<()> {
        let piece = ByteRange::new(offset, bytes.len() as u64);
        let forced = if self.everything { RangeSet::new() } else { self.forced.within(piece) };
        // Blocks that go are sent together, as far as they follow each other.
        let (mut begun, mut at) = (0, 0);
        for (block, note) in bytes.chunks(BLOCK_BYTES).zip(notes) {
            let range = ByteRange::new(offset + at as u64, block.len() as u64);
            let end = at + block.len();
            let differs = self.compare(range, *note)?;
            let wanted = self.is_wanted(range, differs, &forced);
            if !wanted || note.is_zero {
                self.put_run(offset + begun as u64, bytes.get(begun..at).unwrap_or_default())?;
                begun = end;
                if wanted {
                    self.zero(range)?;
                }
            }
            at = end;
        }
        self.put_run(offset + begun as u64, bytes.get(begun..at).unwrap_or_default())
    }

    /// Sends data that follow each other.
    fn put_run(&mut self, offset: u64, run: &[u8]) -> Result<()> {
        let mut at = offset;
        for piece in run.chunks(FRAME_BYTES) {
            self.tally.data(at, piece);
            self.go_to(at, piece.len())?;
            self.link.send_data(piece)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Takes note of a block's digest; answers whether it differs from the newest moment.
    fn compare(&mut self, block: ByteRange, note: Note) -> Result<bool> {
        let Some(writer) = &mut self.writer else { return Ok(true) };
        writer.push(&note.digest)?;
        let Some(reader) = &mut self.reader else { return Ok(true) };
        let differs = reader.next_digest()? != note.digest;
        if differs {
            self.changed.insert(block);
        }
        Ok(differs)
    }

    fn is_wanted(&self, block: ByteRange, differs: bool, forced: &RangeSet) -> bool {
        self.everything || differs || forced.iter().any(|range| !range.intersect(&block).is_empty())
    }

    fn zero(&mut self, range: ByteRange) -> Result<()> {
        if self.whole || range.is_empty() {
            return Ok(());
        }
        self.tally.zero(range);
        match self.records.add_zero(range) {
            Some(record) => self.record(&record),
            None => Ok(()),
        }
    }

    fn record(&mut self, record: &Record) -> Result<()> {
        let (offset, block) = self.records.block(record)?;
        self.go_to(offset, block.len())?;
        self.link.send_data(&block)
    }

    /// Says where the next bytes belong, unless they continue the last ones.
    fn go_to(&mut self, offset: u64, length: usize) -> Result<()> {
        if self.position != Some(offset) {
            self.link.command(&format!("At {offset}"))?;
        }
        self.position = offset.checked_add(length as u64);
        Ok(())
    }

    fn finish(mut self, is_compared: bool) -> Result<Sent> {
        debug_assert!(self.size_bytes <= crate::stream::CONTROL_OFFSET);
        if let Some(reader) = self.reader.take() {
            reader.finish()?;
        }
        if let Some(writer) = self.writer.take() {
            writer.finish()?;
        }
        if let Some(record) = self.records.last_zeros() {
            self.record(&record)?;
        }
        let trailer = self.tally.trailer();
        self.record(&Record::Trailer(trailer))?;
        self.link.end()?;
        let changed = is_compared.then_some(self.changed);
        Ok(Sent { data_bytes: self.tally.data_bytes(), changed })
    }
}
