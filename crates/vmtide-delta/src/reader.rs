//! Reading a delta from its beginning to its end: from a pipe, or a file taken as one.

use crate::format::{
    HEAD_BYTES, INDEX_ENTRY_BYTES, Ledger, MAX_INDEX_ENTRIES, PRELUDE_BYTES, RecordHead,
    RecordKind, TRAILER_BYTES, Trailer,
};
use crate::frame::{EncodedFrame, check_body};
use crate::writer::to_hex;
use crate::{DeltaError, DeltaHeader, DeltaSummary, Result};
use std::io::{ErrorKind, Read};

/// How much of a body is allocated before its bytes have arrived. A torn stream that announces much
/// does not take more than this beyond what it sent.
const STEP_BYTES: u64 = 1 << 20;

/// A delta that is read as it comes.
///
/// Only at the end, with [`summary`](Self::summary), is it known that the stream was whole; what was
/// done with its frames before counts for nothing until then.
pub struct DeltaReader<R> {
    input: R,
    name: String,
    header: DeltaHeader,
    ledger: Ledger,
    summary: Option<DeltaSummary>,
}

impl<R: Read> DeltaReader<R> {
    /// Reads the header. `name` is what the stream is called in errors.
    ///
    /// # Errors
    /// [`DeltaError::Damaged`] where this is no delta; [`DeltaError::Unsupported`] for a later version.
    pub fn new(mut input: R, name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        let mut prelude = [0; PRELUDE_BYTES];
        fill(&mut input, &mut prelude, &name)?;
        let length = DeltaHeader::length_of(&prelude, &name)?;
        let mut bytes = prelude.to_vec();
        bytes.resize(length, 0);
        fill(&mut input, &mut bytes[PRELUDE_BYTES..], &name)?;
        let header = DeltaHeader::from_bytes(&bytes, &name)?;
        let ledger = Ledger::new(&header, &bytes);
        Ok(Self { input, name, header, ledger, summary: None })
    }

    /// What the delta says of itself.
    pub const fn header(&self) -> &DeltaHeader {
        &self.header
    }

    /// What the stream is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the delta is as a whole; none until all of it was read and found right.
    pub const fn summary(&self) -> Option<&DeltaSummary> {
        self.summary.as_ref()
    }

    /// Reads all that is left, and throws it away: checks a stream without using it.
    ///
    /// # Errors
    /// As reading its frames.
    pub fn read_to_end(&mut self) -> Result<DeltaSummary> {
        while self.next_frame()?.is_some() {}
        self.summary.clone().ok_or_else(|| DeltaError::damaged(&self.name, "has no end"))
    }

    /// The next frame, none after the last one.
    pub(crate) fn next_frame(&mut self) -> Result<Option<EncodedFrame>> {
        if self.summary.is_some() {
            return Ok(None);
        }
        let position = self.ledger.position();
        let mut bytes = [0; HEAD_BYTES];
        fill(&mut self.input, &mut bytes, &self.name)?;
        let head = RecordHead::from_bytes(&bytes, &self.name, position)?;
        let name = self.name.clone();
        let wrong = |detail: String| {
            DeltaError::damaged(&name, format!("the record at byte {position} has {detail}"))
        };
        if head.kind == RecordKind::End {
            self.read_end(&head, &bytes, position)?;
            return Ok(None);
        }
        self.ledger.add_head(&head, &bytes).map_err(wrong)?;
        let body = self.read_body(head.body_bytes())?;
        let extents = check_body(&head, &body).map_err(wrong)?;
        self.ledger.add_extents(&extents, head.stored_bytes);
        Ok(Some(EncodedFrame { head, extents, body }))
    }

    /// The body of a record whose length the header or a constant allows.
    fn read_body(&mut self, length: u64) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        let mut left = length;
        while left > 0 {
            let step = left.min(STEP_BYTES);
            let from = body.len();
            body.resize(from + usize::try_from(step).unwrap_or(0), 0);
            fill(&mut self.input, &mut body[from..], &self.name)?;
            left -= step;
        }
        Ok(body)
    }

    /// Compares the index, the trailer and the end of the stream with what went by.
    fn read_end(
        &mut self,
        head: &RecordHead,
        bytes: &[u8; HEAD_BYTES],
        position: u64,
    ) -> Result<()> {
        let damaged = |name: &str, detail: &str| DeltaError::damaged(name, detail);
        if head.body_bytes() > (MAX_INDEX_ENTRIES * INDEX_ENTRY_BYTES) as u64 {
            return Err(damaged(&self.name, "its index is longer than allowed"));
        }
        let index = self.read_body(head.body_bytes())?;
        let expected = self.ledger.index_bytes();
        if index != expected || *head != self.ledger.end_head(&expected) {
            return Err(damaged(&self.name, "its index is not that of its frames"));
        }
        self.ledger.add_head(head, bytes).map_err(|detail| damaged(&self.name, &detail))?;
        let mut trailer = [0; TRAILER_BYTES];
        fill(&mut self.input, &mut trailer, &self.name)?;
        let trailer = Trailer::from_bytes(&trailer, &self.name)?;
        if trailer != self.ledger.trailer(position) {
            return Err(damaged(&self.name, "does not match the digest and sums in its trailer"));
        }
        let mut more = [0; 1];
        if read_some(&mut self.input, &mut more, &self.name)? != 0 {
            return Err(damaged(&self.name, "goes on after its trailer"));
        }
        self.summary = Some(DeltaSummary {
            header: self.header.clone(),
            totals: trailer.totals,
            stream_bytes: self.ledger.position() + TRAILER_BYTES as u64,
            digest: to_hex(&trailer.digest),
        });
        Ok(())
    }
}

fn fill(input: &mut impl Read, buffer: &mut [u8], name: &str) -> Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        match read_some(input, &mut buffer[filled..], name)? {
            0 => return Err(DeltaError::damaged(name, "is torn: it ends before its trailer")),
            count => filled += count,
        }
    }
    Ok(())
}

fn read_some(input: &mut impl Read, buffer: &mut [u8], name: &str) -> Result<usize> {
    loop {
        match input.read(buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            other => {
                return other.map_err(|error| DeltaError::io(format!("read {name}"), error));
            }
        }
    }
}
