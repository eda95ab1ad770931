//! A delta in a file: what it says of itself in three reads, its frames by many threads, and any place
//! of it by its index.

use crate::format::{
    DeltaTotals, HEAD_BYTES, INDEX_ENTRY_BYTES, Ledger, MAX_INDEX_ENTRIES, PRELUDE_BYTES,
    RecordHead, RecordKind, TRAILER_BYTES, Trailer,
};
use crate::frame::{check_body, table_bytes};
use crate::page_buffer::PageBuffer;
use crate::pipeline::run_in_order;
use crate::writer::to_hex;
use crate::{DeltaError, DeltaHeader, DeltaSummary, Result};
use std::sync::Arc;
use vmtide_block::{BlockDevice, ByteRange, CancelToken, Extent, Progress};

/// A delta in a file. Any number of threads may use one.
///
/// Opening it checks the header and that the trailer is there; [`verify`](Self::verify) checks all.
pub struct DeltaFile {
    file: Arc<dyn BlockDevice>,
    name: String,
    header: DeltaHeader,
    header_bytes: Vec<u8>,
    trailer: Trailer,
}

/// One frame of a file, before its body is read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FrameRef {
    pub position: u64,
    pub head: RecordHead,
}

/// What [`DeltaFile::verify_with`] shows every frame to.
pub(crate) type Look<'a, S> = dyn Fn(&mut S, &RecordHead, &[Extent]) -> Result<()> + Sync + 'a;

impl DeltaFile {
    /// Opens the delta whose bytes `file` has.
    ///
    /// # Errors
    /// [`DeltaError::Damaged`] where this is no delta, or one that is torn;
    /// [`DeltaError::Unsupported`] for a later version; what reading says.
    pub fn open(file: Arc<dyn BlockDevice>) -> Result<Self> {
        let name = file.name();
        let size_bytes = file.size_bytes();
        if size_bytes < PRELUDE_BYTES as u64 {
            return Err(DeltaError::damaged(name, "is no delta: it is too short"));
        }
        let mut prelude = [0; PRELUDE_BYTES];
        file.read_at(&mut prelude, 0)?;
        let length = DeltaHeader::length_of(&prelude, &name)?;
        let torn = || DeltaError::damaged(&name, "is torn: it ends before its trailer");
        let trailer_at = size_bytes
            .checked_sub(TRAILER_BYTES as u64)
            .filter(|at| *at >= (length + HEAD_BYTES) as u64)
            .ok_or_else(torn)?;
        let mut header_bytes = vec![0; length];
        file.read_at(&mut header_bytes, 0)?;
        let header = DeltaHeader::from_bytes(&header_bytes, &name)?;
        let mut trailer = [0; TRAILER_BYTES];
        file.read_at(&mut trailer, trailer_at)?;
        let trailer = Trailer::from_bytes(&trailer, &name)?;
        let index_bytes = u64::from(trailer.index_entries) * INDEX_ENTRY_BYTES as u64;
        let fits = trailer.index_entries as usize <= MAX_INDEX_ENTRIES
            && trailer.index_stride > 0
            && trailer.end_position >= length as u64
            && trailer.end_position.checked_add(HEAD_BYTES as u64 + index_bytes)
                == Some(trailer_at);
        if !fits {
            return Err(DeltaError::damaged(name, "its trailer does not say where its index is"));
        }
        Ok(Self { file, name, header, header_bytes, trailer })
    }

    /// What the delta says of itself.
    pub const fn header(&self) -> &DeltaHeader {
        &self.header
    }

    /// The file as a person knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the delta is as a whole, as its trailer says.
    pub fn summary(&self) -> DeltaSummary {
        DeltaSummary {
            header: self.header.clone(),
            totals: self.trailer.totals,
            stream_bytes: self.file.size_bytes(),
            digest: to_hex(&self.trailer.digest),
        }
    }

    /// The frame at `position`, none where that is the end.
    pub(crate) fn frame_at(&self, position: u64) -> Result<Option<(FrameRef, [u8; HEAD_BYTES])>> {
        if position == self.trailer.end_position {
            return Ok(None);
        }
        let fits = position
            .checked_add(HEAD_BYTES as u64)
            .is_some_and(|end| end <= self.trailer.end_position);
        let torn =
            || DeltaError::damaged(&self.name, format!("the record at byte {position} is torn"));
        if !fits {
            return Err(torn());
        }
        let mut bytes = [0; HEAD_BYTES];
        self.file.read_at(&mut bytes, position)?;
        let head = RecordHead::from_bytes(&bytes, &self.name, position)?;
        let end = (position + HEAD_BYTES as u64).checked_add(head.body_bytes());
        let whole = head.kind == RecordKind::Frame
            && head.data_bytes <= u64::from(self.header.max_frame_bytes)
            && end.is_some_and(|end| end <= self.trailer.end_position);
        if whole { Ok(Some((FrameRef { position, head }, bytes))) } else { Err(torn()) }
    }

    pub(crate) const fn first_position(&self) -> u64 {
        self.header_bytes.len() as u64
    }

    /// Reads the body of a frame, so that its data begin a page, and checks it. Answers with the extents.
    pub(crate) fn read_body(&self, frame: &FrameRef, body: &mut PageBuffer) -> Result<Vec<Extent>> {
        // `frame_at` found all of it inside the file, and the parts of it below their limits.
        let length = usize::try_from(frame.head.body_bytes()).unwrap_or(0);
        let room = body.room(table_bytes(&frame.head), length);
        self.file.read_at(room, frame.position + HEAD_BYTES as u64)?;
        check_body(&frame.head, room).map_err(|detail| self.wrong(frame, &detail))
    }

    pub(crate) fn wrong(&self, frame: &FrameRef, detail: &str) -> DeltaError {
        DeltaError::damaged(
            &self.name,
            format!("the record at byte {} has {detail}", frame.position),
        )
    }

    /// Checks every byte of the file by as many workers as given. Progress counts bytes of the file.
    ///
    /// # Errors
    /// [`DeltaError::Damaged`]; [`vmtide_block::BlockError::Cancelled`].
    pub fn verify(
        &self,
        workers: usize,
        progress: &Progress,
        cancel: &CancelToken,
    ) -> Result<DeltaSummary> {
        self.verify_with(workers, progress, cancel, || (), &|(), _, _| Ok(()))
    }

    /// As [`verify`](Self::verify), and `also` looks at every frame's extents, with the state that `state` made for its thread.
    pub(crate) fn verify_with<S>(
        &self,
        workers: usize,
        progress: &Progress,
        cancel: &CancelToken,
        state: impl Fn() -> S + Sync,
        also: &Look<'_, S>,
    ) -> Result<DeltaSummary> {
        let mut ledger = Ledger::new(&self.header, &self.header_bytes);
        let mut sums = DeltaTotals::default();
        run_in_order(
            workers,
            cancel,
            || {
                let Some((frame, bytes)) = self.frame_at(ledger.position())? else {
                    return Ok(None);
                };
                ledger
                    .add_head(&frame.head, &bytes)
                    .map_err(|detail| self.wrong(&frame, &detail))?;
                Ok(Some(frame))
            },
            || (PageBuffer::default(), state()),
            |(body, state), frame| {
                let extents = self.read_body(&frame, body)?;
                also(state, &frame.head, &extents)?;
                progress.add_done(HEAD_BYTES as u64 + frame.head.body_bytes());
                Ok((extents, frame.head.stored_bytes))
            },
            |(extents, stored_bytes)| {
                sums.add(&extents, stored_bytes);
                Ok(())
            },
        )?;
        ledger.set_totals(sums);
        self.verify_end(ledger)
    }

    fn verify_end(&self, mut ledger: Ledger) -> Result<DeltaSummary> {
        let damaged = |detail: &str| DeltaError::damaged(&self.name, detail);
        let index = ledger.index_bytes();
        let expected = ledger.end_head(&index);
        let position = ledger.position();
        let mut bytes = [0; HEAD_BYTES];
        self.file.read_at(&mut bytes, self.trailer.end_position)?;
        let mut stored = vec![0; index.len()];
        let entries = u64::from(self.trailer.index_entries) * INDEX_ENTRY_BYTES as u64;
        if entries != stored.len() as u64 || bytes != expected.to_bytes() {
            return Err(damaged("its index is not that of its frames"));
        }
        self.file.read_at(&mut stored, self.trailer.end_position + HEAD_BYTES as u64)?;
        if stored != index {
            return Err(damaged("its index is not that of its frames"));
        }
        ledger.add_head(&expected, &bytes).map_err(|detail| damaged(&detail))?;
        if self.trailer != ledger.trailer(position) {
            return Err(damaged("does not match the digest and sums in its trailer"));
        }
        Ok(self.summary())
    }

    /// The positions from which to walk to meet every frame that speaks of `range`: by the index, in
    /// as many reads as its logarithm.
    pub(crate) fn position_for(&self, offset: u64) -> Result<u64> {
        let (mut low, mut high) = (0u64, u64::from(self.trailer.index_entries));
        let mut best = self.first_position();
        while low < high {
            let middle = low + (high - low) / 2;
            let mut entry = [0; INDEX_ENTRY_BYTES];
            let at =
                self.trailer.end_position + HEAD_BYTES as u64 + middle * INDEX_ENTRY_BYTES as u64;
            self.file.read_at(&mut entry, at)?;
            let mut fields = crate::format::Fields(&entry);
            let (first, position) = (fields.u64(), fields.u64());
            if first <= offset {
                if position < best || position > self.trailer.end_position {
                    return Err(DeltaError::damaged(&self.name, "its index is out of order"));
                }
                best = position;
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(best)
    }

    /// Calls `visit` with every extent that `range` meets, in order, found by the index. Reads the
    /// heads and tables of the frames, and their data with them.
    ///
    /// # Errors
    /// Those of reading and of `visit`.
    pub fn for_each_extent(
        &self,
        range: ByteRange,
        cancel: &CancelToken,
        mut visit: impl FnMut(Extent) -> Result<()>,
    ) -> Result<()> {
        let mut position = self.position_for(range.offset)?;
        let mut body = PageBuffer::default();
        while let Some((frame, _)) = self.frame_at(position)? {
            cancel.check()?;
            if frame.head.first >= range.end() {
                return Ok(());
            }
            if frame.head.end > range.offset {
                for extent in self.read_body(&frame, &mut body)? {
                    let met = extent.range.intersect(&range);
                    if !met.is_empty() {
                        visit(Extent { range: met, kind: extent.kind })?;
                    }
                }
            }
            position += HEAD_BYTES as u64 + frame.head.body_bytes();
        }
        Ok(())
    }
}
