//! Putting a reply together, and refusing one that is not what was asked for.
//!
//! A structured reply is a series of chunks in any order: data, holes, status, errors. The
//! [`Assembly`] of one request knows what was asked for and says, chunk by chunk, what the bytes
//! that follow are; the transport moves them. At the end it proves that every byte that was asked
//! for was delivered exactly once: a server that forgets some would otherwise make a backup with
//! stale bytes in it.

use super::constants::{MAX_STRING_BYTES, chunk};
use super::errno::{EINVAL, ServerError};
use super::reply::ReplyHeader;
use super::status::{StatusExtent, check_chunk_length, decode_chunk};
use super::wire::{Fields, printable};
use super::{ProtocolError, violation};
use vmtide_block::{ByteRange, RangeSet};

/// The chunks a reply may always have, whatever its length.
const FREE_CHUNKS: u64 = 1024;
/// Beyond them, the bytes of a request that allow one more chunk. Servers cut at sectors; finer
/// cuts only cost us time.
const BYTES_PER_CHUNK: u64 = 256;

/// What a request asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// Success or an error, nothing else.
    Nothing,
    /// The bytes of the range.
    Data,
    /// The status of the range in these contexts.
    Status(Vec<u32>),
}

/// What the transport does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Reads this many bytes and hands them to [`Assembly::payload`]. Bounded: at most the
    /// largest status chunk.
    Payload(usize),
    /// Reads the bytes of this range of the export to where the caller wants them, then calls
    /// [`Assembly::chunk_end`]. Always inside the request.
    Data(ByteRange),
    /// Makes this range zero where the caller wants it, then calls [`Assembly::chunk_end`].
    Zero(ByteRange),
    /// The chunk ended; more follow.
    Chunk,
    /// The reply ended: [`Assembly::finish`] has the outcome.
    Reply,
}

/// What a whole reply said: the status of each context, or nothing.
pub(crate) type Statuses = Vec<(u32, Vec<StatusExtent>)>;

/// A reply in the making.
#[derive(Debug)]
pub(crate) struct Assembly {
    range: ByteRange,
    expected: Expected,
    covered: RangeSet,
    statuses: Statuses,
    error: Option<ServerError>,
    chunk: Option<Chunk>,
    chunks: u64,
}

#[derive(Clone, Copy, Debug)]
struct Chunk {
    kind: u16,
    length: u64,
    extended: bool,
    last: bool,
}

impl Assembly {
    /// For a request over `range`.
    pub(crate) fn new(range: ByteRange, expected: Expected) -> Self {
        Self {
            range,
            expected,
            covered: RangeSet::new(),
            statuses: Vec::new(),
            error: None,
            chunk: None,
            chunks: 0,
        }
    }

    /// Takes in the header of a simple reply or of a chunk.
    pub(crate) fn begin(&mut self, header: &ReplyHeader) -> Result<Next, ProtocolError> {
        let chunk = match *header {
            ReplyHeader::Simple { error, .. } => return self.begin_simple(error),
            ReplyHeader::Chunk { kind, offset, length, .. } => {
                if offset.is_some_and(|offset| offset != self.range.offset) {
                    return Err(violation("a reply names another offset than its request"));
                }
                Chunk { kind, length, extended: offset.is_some(), last: header.is_last() }
            }
        };
        self.chunks += 1;
        if self.chunks > FREE_CHUNKS + self.range.length / BYTES_PER_CHUNK {
            return Err(violation("a reply has too many chunks"));
        }
        self.chunk = Some(chunk);
        let wants_data = self.expected == Expected::Data;
        let wants_status = matches!(self.expected, Expected::Status(_));
        match chunk.kind {
            chunk::NONE if chunk.length == 0 && chunk.last => Ok(self.chunk_end()),
            chunk::NONE => Err(violation("an empty chunk has a payload or is not the last")),
            chunk::OFFSET_DATA if wants_data => match chunk.length.checked_sub(8) {
                Some(length) if length > 0 && length <= self.range.length => Ok(Next::Payload(8)),
                _ => Err(bad_length("a data chunk", chunk.length)),
            },
            chunk::OFFSET_HOLE if wants_data => match chunk.length {
                12 => Ok(Next::Payload(12)),
                other => Err(bad_length("a hole chunk", other)),
            },
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT if wants_status => {
                if chunk.extended != (chunk.kind == chunk::BLOCK_STATUS_EXT) {
                    return Err(violation("a status chunk is of the other header style"));
                }
                check_chunk_length(chunk.extended, chunk.length)?;
                payload_of(chunk.length)
            }
            kind if kind & chunk::ERROR_BIT != 0 => {
                // Error, message length, message, and whatever the type adds: an offset today.
                if !(6..=MAX_STRING_BYTES as u64 + 64).contains(&chunk.length) {
                    return Err(bad_length("an error chunk", chunk.length));
                }
                payload_of(chunk.length)
            }
            kind => {
                Err(violation(format!("a chunk of type {kind} does not answer what was asked")))
            }
        }
    }

    fn begin_simple(&mut self, error: u32) -> Result<Next, ProtocolError> {
        if self.chunks > 0 {
            return Err(violation("a simple reply follows chunks"));
        }
        if error != 0 {
            self.error = Some(ServerError { code: error, message: String::new() });
            return Ok(Next::Reply);
        }
        match self.expected {
            Expected::Nothing => Ok(Next::Reply),
            Expected::Data => {
                self.covered.insert(self.range);
                Ok(Next::Data(self.range))
            }
            Expected::Status(_) => Err(violation("a simple reply answers a block status request")),
        }
    }

    /// Takes in the payload that [`Next::Payload`] asked for.
    pub(crate) fn payload(&mut self, payload: &[u8]) -> Result<Next, ProtocolError> {
        let Some(chunk) = self.chunk else {
            return Err(violation("a payload without a chunk"));
        };
        let mut fields = Fields::new("a chunk", payload);
        match chunk.kind {
            chunk::OFFSET_DATA => {
                let range = ByteRange::new(fields.u64()?, chunk.length.saturating_sub(8));
                self.cover(range)?;
                Ok(Next::Data(range))
            }
            chunk::OFFSET_HOLE => {
                let range = ByteRange::new(fields.u64()?, fields.u32()?.into());
                if range.is_empty() {
                    return Err(violation("a hole chunk without a length"));
                }
                self.cover(range)?;
                Ok(Next::Zero(range))
            }
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => {
                let (context, extents) = decode_chunk(chunk.extended, payload, self.range)?;
                self.add_status(context, extents)?;
                Ok(self.chunk_end())
            }
            _ => {
                let code = match fields.u32()? {
                    0 => EINVAL,
                    code => code,
                };
                let length = fields.u16()?;
                let message = printable(fields.bytes(length.into())?);
                if self.error.is_none() {
                    self.error = Some(ServerError { code, message });
                }
                Ok(self.chunk_end())
            }
        }
    }

    fn cover(&mut self, range: ByteRange) -> Result<(), ProtocolError> {
        let inside = range
            .checked_end()
            .is_some_and(|end| range.offset >= self.range.offset && end <= self.range.end());
        if !inside {
            return Err(violation(format!(
                "a chunk for {range} lies outside the request for {}",
                self.range
            )));
        }
        if !self.covered.within(range).is_empty() {
            return Err(violation(format!("bytes of {range} arrive twice")));
        }
        self.covered.insert(range);
        Ok(())
    }

    fn add_status(
        &mut self,
        context: u32,
        extents: Vec<StatusExtent>,
    ) -> Result<(), ProtocolError> {
        let Expected::Status(wanted) = &self.expected else {
            return Err(violation("a status chunk answers something else"));
        };
        if !wanted.contains(&context) {
            return Err(violation(format!(
                "a status chunk names the context {context} that was not agreed on"
            )));
        }
        if self.statuses.iter().any(|(known, _)| *known == context) {
            return Err(violation(format!("two status chunks for the context {context}")));
        }
        self.statuses.push((context, extents));
        Ok(())
    }

    /// Ends a chunk (or a simple reply) whose data or zeros are where they belong.
    pub(crate) fn chunk_end(&mut self) -> Next {
        match self.chunk.take() {
            Some(chunk) if !chunk.last => Next::Chunk,
            _ => Next::Reply,
        }
    }

    /// What the whole reply said, after [`Next::Reply`]: the server's error, or the statuses.
    ///
    /// # Errors
    /// A reply that claims success but does not answer the whole request.
    pub(crate) fn finish(self) -> Result<Result<Statuses, ServerError>, ProtocolError> {
        if let Some(error) = self.error {
            return Ok(Err(error));
        }
        match &self.expected {
            Expected::Nothing => {}
            Expected::Data => {
                let covered = self.covered.total_bytes();
                if covered != self.range.length {
                    return Err(violation(format!(
                        "the reply to a read of {} holds {covered} of its {} bytes",
                        self.range, self.range.length
                    )));
                }
            }
            Expected::Status(wanted) => {
                let answered = |id: &u32| self.statuses.iter().any(|(known, _)| known == id);
                if let Some(missing) = wanted.iter().find(|id| !answered(id)) {
                    return Err(violation(format!(
                        "the reply to a block status request lacks the context {missing}"
                    )));
                }
            }
        }
        Ok(Ok(self.statuses))
    }
}

fn bad_length(what: &'static str, found: u64) -> ProtocolError {
    ProtocolError::Length { what, found, rule: "which its request does not allow" }
}

/// A payload whose length was checked against its limit.
fn payload_of(length: u64) -> Result<Next, ProtocolError> {
    usize::try_from(length).map(Next::Payload).map_err(|_| bad_length("a chunk", length))
}
