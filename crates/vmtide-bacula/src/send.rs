//! One disk on its way to Bacula: which blocks go, and what is noted for the next job.

use crate::Result;
use crate::digests::{DIGEST_BLOCK_BYTES, DigestReader, DigestWriter, ZERO_DIGEST};
use crate::link::Link;
use crate::read::{Note, Part, Want, read_disk};
use crate::stream::{BLOCK_BYTES, MomentId, Record, Records, Tally};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use vmtide_block::{BlockDevice, ByteRange, RangeSet};
use vmtide_memory_ffi::Slot;

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
    let memory = link.memory().cloned();
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
    read_disk(device, want, memory.as_ref(), &cancel, &mut |part| sending.take(&part))?;
    check()?;
    sending.finish(is_compared)
}

/// What was read of the disk at a time.
struct Piece<'a> {
    offset: u64,
    bytes: &'a [u8],
    slot: Option<&'a Arc<Slot>>,
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
            Part::Data { offset, bytes, slot, notes } => {
                let piece = Piece { offset: *offset, bytes, slot: *slot };
                self.data(&piece, notes)
            }
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

    fn data(&mut self, piece: &Piece<'_>, notes: &[Note]) -> Result<()> {
        let range = ByteRange::new(piece.offset, piece.bytes.len() as u64);
        let forced = if self.everything { RangeSet::new() } else { self.forced.within(range) };
        // Blocks that go are sent together, as far as they follow each other.
        let (mut begun, mut at) = (0, 0);
        for (block, note) in piece.bytes.chunks(BLOCK_BYTES).zip(notes) {
            let range = ByteRange::new(piece.offset + at as u64, block.len() as u64);
            let end = at + block.len();
            let differs = self.compare(range, *note)?;
            let wanted = self.is_wanted(range, differs, &forced);
            if !wanted || note.is_zero {
                self.put_run(piece, begun..at)?;
                begun = end;
                if wanted {
                    self.zero(range)?;
                }
            }
            at = end;
        }
        self.put_run(piece, begun..at)
    }

    /// Sends a part of a piece.
    fn put_run(&mut self, piece: &Piece<'_>, part: Range<usize>) -> Result<()> {
        let mut at = part.start;
        for bytes in piece.bytes.get(part).unwrap_or_default().chunks(FRAME_BYTES) {
            let (offset, end) = (piece.offset + at as u64, at + bytes.len());
            self.tally.data(offset, bytes);
            self.go_to(offset, bytes.len())?;
            match piece.slot {
                Some(slot) => self.link.lend(slot, at..end)?,
                None => self.link.send_data(bytes)?,
            }
            at = end;
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

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;
    use crate::frame::{HEADER_BYTES, Header, Kind};
    use crate::link::testing;
    use crate::read::PIECE_BYTES;
    use std::fs::File;
    use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
    use std::os::unix::fs::FileExt;
    use vmtide_block::{CancelToken, MemoryDevice};

    const MIB: usize = 1 << 20;

    /// Bytes with the offset that they are for.
    type Blocks = Vec<(u64, Vec<u8>)>;

    /// What a plugin makes of a disk: its blocks with their offsets, where they follow each other together; and how
    /// many came through the memory. Gives up after `patience` of these.
    fn take(
        mut input: PipeReader,
        mut output: PipeWriter,
        memory: Option<&File>,
        patience: usize,
    ) -> (Blocks, usize) {
        let (mut blocks, mut places): (Blocks, usize) = (Vec::new(), 0);
        let mut offset = None;
        loop {
            let mut header = [0; HEADER_BYTES];
            input.read_exact(&mut header).unwrap();
            let header = Header::parse(header).unwrap();
            let mut payload = vec![0; header.length];
            input.read_exact(&mut payload).unwrap();
            let text = String::from_utf8_lossy(&payload).into_owned();
            match header.kind {
                Kind::Command => offset = text.strip_prefix("At ").map(|at| at.parse().unwrap()),
                Kind::End => return (blocks, places),
                Kind::Place => {
                    if places == patience {
                        return (blocks, places);
                    }
                    places += 1;
                    let (at, length) = text.split_once(' ').unwrap();
                    payload = vec![0; length.parse().unwrap()];
                    memory.unwrap().read_exact_at(&mut payload, at.parse().unwrap()).unwrap();
                    // A backend that has said all may be gone: nothing here goes on after one disk.
                    let _ = output.write_all(b"R000000\n");
                }
                Kind::Data => {}
                Kind::Alive => continue,
                other => panic!("{other:?}"),
            }
            if !matches!(header.kind, Kind::Command) {
                match offset.take() {
                    Some(offset) => blocks.push((offset, payload)),
                    None => blocks.last_mut().unwrap().1.extend_from_slice(&payload),
                }
            }
        }
    }

    /// Sends a disk to such a plugin.
    fn send(
        bytes: &[u8],
        selection: Selection,
        slots: usize,
        patience: usize,
    ) -> (Result<Sent>, Blocks, usize) {
        let device = MemoryDevice::from_bytes(bytes.to_vec());
        let (from_backend, to_plugin) = pipe().unwrap();
        let (from_plugin, to_backend) = pipe().unwrap();
        let memory = (slots > 0).then(|| testing::memory(slots, PIECE_BYTES));
        let directory = tempfile::tempdir().unwrap();
        let base = matches!(selection, Selection::Ranges(_)).then(|| MomentId(7, 8));
        let new_digests = base.is_none().then(|| directory.path().join("digests"));
        let plan =
            SendPlan { selection, base, moment: MomentId(5, 6), new_digests, old_digests: None };
        let mut link = Link::new(Box::new(from_plugin), Box::new(to_plugin), CancelToken::new());
        if let Some((_, memory)) = &memory {
            link.share(memory.clone());
        }
        let file = memory.as_ref().map(|(file, _)| file);
        std::thread::scope(|scope| {
            let plugin = scope.spawn(move || take(from_backend, to_backend, file, patience));
            let sent = send_disk(&mut link, &device, &plan, &|| Ok(()));
            drop(link);
            let (blocks, places) = plugin.join().unwrap();
            if let Some((_, memory)) = &memory {
                // All of them are free again.
                let slots: Vec<_> = (0..memory.slots()).map(|_| memory.wait()).collect();
                assert_eq!(slots.len(), memory.slots());
            }
            (sent, blocks, places)
        })
    }

    /// Noise with holes, at odd places.
    fn disk() -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..21 * MIB + 512)
            .map(|at: usize| (at.wrapping_mul(0x9e37_79b9) >> 13).to_le_bytes()[0] | 1)
            .collect();
        for hole in [MIB..2 * MIB, 5 * MIB + 4096..5 * MIB + 400_000, 20 * MIB..20 * MIB + 70_000] {
            bytes[hole].fill(0);
        }
        bytes
    }

    fn ranges() -> Selection {
        Selection::Ranges(RangeSet::from(vec![
            ByteRange::new(7, 3),
            ByteRange::new(1 << 19, 3 << 20),
            ByteRange::new(20 << 20, (1 << 20) + 512),
        ]))
    }

    #[test]
    fn a_disk_is_the_same_through_the_memory_and_through_the_pipe() {
        let bytes = disk();
        let selections: [fn() -> Selection; 2] = [|| Selection::Whole, ranges];
        for selection in selections {
            let (sent, expected, places) = send(&bytes, selection(), 0, 0);
            assert_eq!(places, 0);
            let sent = sent.unwrap();
            for slots in [4, 5, 12] {
                let (again, blocks, places) = send(&bytes, selection(), slots, usize::MAX);
                assert!(places > 0);
                assert_eq!(again.unwrap().data_bytes, sent.data_bytes);
                assert!(blocks == expected, "with {slots} slots");
            }
        }
    }

    #[test]
    fn a_plugin_that_goes_in_the_middle_ends_the_sending() {
        let bytes = disk();
        for patience in [0, 1, 5] {
            let (sent, _, places) = send(&bytes, Selection::Whole, 4, patience);
            assert!(matches!(sent, Err(crate::BackendError::Gone)), "{sent:?}");
            assert_eq!(places, patience);
        }
    }
}
