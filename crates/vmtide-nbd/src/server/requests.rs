//! What a request may be, and its answer: the server's transmission phase without sockets.

use super::export::Export;
use super::handshake::Agreed;
use crate::proto::constants::{MAX_STRING_BYTES, REPLY_FLAG_DONE, chunk, cmd, cmd_flag};
use crate::proto::errno::{EINVAL, ENOSPC, ENOTSUP, EOVERFLOW, EPERM, code_of};
use crate::proto::meta_context::{MetaContext, decode_status_filter};
use crate::proto::reply::ReplyHeader;
use crate::proto::request::{HeaderStyle, RequestHeader};
use crate::proto::status::encode_chunk;
use crate::proto::{ProtocolError, violation};
use std::io;
use vmtide_block::{BlockError, ByteRange};

/// The shortest run of zeros that becomes a hole in a read's reply; a chunk of its own for less
/// costs more than the zeros.
const MIN_HOLE_BYTES: u64 = 16 << 10;

/// The most chunks of one read; what comes after is sent as data.
const MAX_READ_CHUNKS: usize = 256;

/// The most that a worker's buffer keeps between requests. Memory of this size that is given back goes
/// back to the system, which then has to clear every page of it again for the next read.
const KEPT_BUFFER_BYTES: usize = 1 << 20;

/// The zeros written where a client wants them allocated.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// What follows a request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Demand {
    /// The payload that follows, in bytes.
    pub(crate) payload_bytes: u64,
    /// The memory the request needs, in bytes, the payload included.
    pub(crate) memory_bytes: u64,
}

/// What a request brings, by its header.
///
/// # Errors
/// A payload over the limit, which is where a server hangs up.
pub(crate) fn demand(
    style: HeaderStyle,
    header: &RequestHeader,
    max_payload_bytes: u32,
) -> Result<Demand, ProtocolError> {
    // A write always brings its data. QEMU 10 as a client does not set the payload flag that the
    // extended style demands for it, so the flag cannot be the criterion.
    let flagged = style == HeaderStyle::Extended && header.flags & cmd_flag::PAYLOAD_LEN != 0;
    let has_payload = flagged || header.command == cmd::WRITE;
    let most = u64::from(max_payload_bytes);
    if has_payload {
        if header.length > most {
            return Err(ProtocolError::Length {
                what: "a request's payload",
                found: header.length,
                rule: "more than the server takes",
            });
        }
        return Ok(Demand { payload_bytes: header.length, memory_bytes: header.length });
    }
    let reads = header.command == cmd::READ && header.length <= most;
    Ok(Demand { payload_bytes: 0, memory_bytes: if reads { header.length } else { 0 } })
}

/// An answer that is an error value, with words.
struct Failed {
    code: u32,
    text: String,
}

impl Failed {
    fn new(code: u32, text: impl Into<String>) -> Self {
        let text = text.into();
        Self { code, text }
    }
}

impl From<BlockError> for Failed {
    fn from(error: BlockError) -> Self {
        Self::new(code_of(&error), error.to_string())
    }
}

/// Where replies go: each call is one message that must not be torn by another.
pub(crate) trait Replies {
    /// Sends a header and what belongs to it.
    fn send(&self, header: &[u8], payload: &[u8]) -> io::Result<()>;
}

/// A worker's memory for the data of reads, used again by the next one.
#[derive(Debug, Default)]
pub(crate) struct ReadBuffer(Vec<u8>);

impl ReadBuffer {
    /// Memory of this length, with anything in it.
    fn of_length(&mut self, length: usize) -> &mut [u8] {
        if self.0.len() < length {
            self.0.resize(length, 0);
        }
        &mut self.0[..length]
    }

    /// Gives back what one long read took.
    fn shrink(&mut self) {
        if self.0.len() > KEPT_BUFFER_BYTES {
            self.0 = Vec::new();
        }
    }
}

/// A connection's view of its export.
pub(crate) struct Service<'a, R> {
    pub(crate) export: &'a Export,
    pub(crate) agreed: &'a Agreed,
    pub(crate) max_payload_bytes: u32,
    pub(crate) replies: R,
}

impl<R: Replies> Service<'_, R> {
    /// Does what a request asks and sends the reply.
    ///
    /// # Errors
    /// Only those of sending; whatever is wrong with the request or the device is a reply.
    pub(crate) fn serve(
        &self,
        header: &RequestHeader,
        payload: &[u8],
        buffer: &mut ReadBuffer,
    ) -> io::Result<()> {
        let answered = match header.command {
            cmd::READ => {
                let answered = self.read(header, buffer);
                buffer.shrink();
                answered
            }
            cmd::BLOCK_STATUS => self.block_status(header, payload),
            _ => match self.change(header, payload) {
                Ok(()) => Ok(Ok(self.succeed(header)?)),
                Err(failed) => Ok(Err(failed)),
            },
        };
        match answered? {
            Ok(()) => Ok(()),
            Err(failed) => self.fail(header, &failed),
        }
    }

    fn chunk(&self, header: &RequestHeader, kind: u16, last: bool, length: u64) -> ReplyHeader {
        ReplyHeader::Chunk {
            flags: if last { REPLY_FLAG_DONE } else { 0 },
            kind,
            cookie: header.cookie,
            offset: (self.agreed.style == HeaderStyle::Extended).then_some(header.offset),
            length,
        }
    }

    /// Sends a chunk whose payload starts with `fields`.
    fn send_chunk(&self, reply: &ReplyHeader, fields: &[u8], data: &[u8]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(48);
        reply
            .encode(&mut bytes)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        bytes.extend(fields);
        self.replies.send(&bytes, data)
    }

    fn succeed(&self, header: &RequestHeader) -> io::Result<()> {
        let cookie = header.cookie;
        let reply = match self.agreed.style {
            HeaderStyle::Extended => self.chunk(header, chunk::NONE, true, 0),
            _ => ReplyHeader::Simple { error: 0, cookie },
        };
        self.send_chunk(&reply, &[], &[])
    }

    fn fail(&self, header: &RequestHeader, failed: &Failed) -> io::Result<()> {
        tracing::debug!(code = failed.code, text = %failed.text, "NBD request failed");
        if self.agreed.style == HeaderStyle::Simple {
            let reply = ReplyHeader::Simple { error: failed.code, cookie: header.cookie };
            return self.send_chunk(&reply, &[], &[]);
        }
        let mut end = failed.text.len().min(MAX_STRING_BYTES / 4);
        while !failed.text.is_char_boundary(end) {
            end -= 1;
        }
        let text = &failed.text.as_bytes()[..end];
        let mut fields = failed.code.to_be_bytes().to_vec();
        fields.extend(u16::try_from(text.len()).unwrap_or(0).to_be_bytes());
        fields.extend(text);
        let reply = self.chunk(header, chunk::ERROR, true, fields.len() as u64);
        self.send_chunk(&reply, &fields, &[])
    }

    /// The range of a request, inside the export and on its blocks. `outside` is the error value
    /// for one that is not.
    fn range(
        &self,
        header: &RequestHeader,
        length: u64,
        outside: u32,
    ) -> Result<ByteRange, Failed> {
        let range = ByteRange::new(header.offset, length);
        let size = self.export.device().size_bytes();
        if range.checked_end().is_none_or(|end| end > size) {
            let text = format!("{range} is outside the export of {size} bytes");
            return Err(Failed::new(outside, text));
        }
        let block = u64::from(self.export.block_sizes().minimum);
        if !range.offset.is_multiple_of(block) || !range.length.is_multiple_of(block) {
            let text = format!("{range} is not on blocks of {block} bytes");
            return Err(Failed::new(EINVAL, text));
        }
        Ok(range)
    }

    /// Refuses flags that a command does not have. Force unit access means nothing for commands
    /// that change nothing, and is passed over there.
    fn check_flags(&self, header: &RequestHeader) -> Result<(), Failed> {
        let mut known = cmd_flag::FUA;
        known |= match header.command {
            cmd::READ if self.agreed.style != HeaderStyle::Simple => cmd_flag::DF,
            cmd::WRITE if self.agreed.style == HeaderStyle::Extended => cmd_flag::PAYLOAD_LEN,
            cmd::WRITE_ZEROES if self.export.flags().can_fast_zero() => {
                cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO
            }
            cmd::WRITE_ZEROES => cmd_flag::NO_HOLE,
            cmd::BLOCK_STATUS if self.agreed.style == HeaderStyle::Extended => {
                cmd_flag::REQ_ONE | cmd_flag::PAYLOAD_LEN
            }
            cmd::BLOCK_STATUS => cmd_flag::REQ_ONE,
            _ => 0,
        };
        if header.flags & !known == 0 {
            return Ok(());
        }
        let text = format!("flags {:#x} do not go with command {}", header.flags, header.command);
        Err(Failed::new(EINVAL, text))
    }

    /// Commands whose success has no payload.
    fn change(&self, header: &RequestHeader, payload: &[u8]) -> Result<(), Failed> {
        self.check_flags(header)?;
        match header.command {
            cmd::FLUSH => {
                if let Ok(device) = self.export.target() {
                    device.flush()?;
                }
                return Ok(());
            }
            cmd::CACHE => return self.range(header, header.length, EINVAL).map(drop),
            cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES => {}
            other => return Err(Failed::new(EINVAL, format!("unknown command {other}"))),
        }
        let device = self.export.target().map_err(|error| Failed::new(EPERM, error.to_string()))?;
        let outside = if header.command == cmd::TRIM { EINVAL } else { ENOSPC };
        let range = self.range(header, header.length, outside)?;
        match header.command {
            cmd::WRITE => {
                if payload.len() as u64 != header.length {
                    return Err(Failed::new(EINVAL, "a write without its payload"));
                }
                device.write_at(payload, range.offset)?;
            }
            cmd::WRITE_ZEROES if header.flags & cmd_flag::NO_HOLE != 0 => {
                if header.flags & cmd_flag::FAST_ZERO != 0 {
                    let text = "allocated zeroes are written";
                    return Err(Failed::new(ENOTSUP, text));
                }
                let mut at = range.offset;
                while at < range.end() {
                    let length = (range.end() - at).min(ZEROS.len() as u64);
                    let length = usize::try_from(length).unwrap_or(ZEROS.len());
                    device.write_at(&ZEROS[..length], at)?;
                    at += length as u64;
                }
            }
            _ => device.write_zeroes(range)?,
        }
        if header.flags & cmd_flag::FUA != 0 {
            device.flush()?;
        }
        Ok(())
    }

    fn read(
        &self,
        header: &RequestHeader,
        buffer: &mut ReadBuffer,
    ) -> io::Result<Result<(), Failed>> {
        let checked =
            self.check_flags(header).and_then(|()| self.range(header, header.length, EINVAL));
        let range = match checked {
            Ok(range) => range,
            Err(failed) => return Ok(Err(failed)),
        };
        if range.length > u64::from(self.max_payload_bytes) {
            let text = format!("a read of {} bytes is too long", range.length);
            return Ok(Err(Failed::new(EOVERFLOW, text)));
        }
        if self.agreed.style == HeaderStyle::Simple {
            let data = buffer.of_length(usize::try_from(range.length).unwrap_or(0));
            if let Err(error) = self.export.device().read_at(data, range.offset) {
                return Ok(Err(error.into()));
            }
            let reply = ReplyHeader::Simple { error: 0, cookie: header.cookie };
            return self.send_chunk(&reply, &[], data).map(Ok);
        }
        if range.is_empty() {
            let reply = self.chunk(header, chunk::NONE, true, 0);
            return self.send_chunk(&reply, &[], &[]).map(Ok);
        }
        let whole = header.flags & cmd_flag::DF != 0;
        let parts = self.parts(range, whole);
        for (index, (part, zero)) in parts.iter().enumerate() {
            let last = index + 1 == parts.len();
            let mut fields = part.offset.to_be_bytes().to_vec();
            if *zero {
                // A read is shorter than 32 MiB, and so is each of its parts.
                fields.extend(u32::try_from(part.length).unwrap_or(0).to_be_bytes());
                let reply = self.chunk(header, chunk::OFFSET_HOLE, last, 12);
                self.send_chunk(&reply, &fields, &[])?;
                continue;
            }
            let data = buffer.of_length(usize::try_from(part.length).unwrap_or(0));
            if let Err(error) = self.export.device().read_at(data, part.offset) {
                return Ok(Err(error.into()));
            }
            let reply = self.chunk(header, chunk::OFFSET_DATA, last, part.length + 8);
            self.send_chunk(&reply, &fields, data)?;
        }
        Ok(Ok(()))
    }

    /// A read's range as data (false) and holes (true).
    fn parts(&self, range: ByteRange, whole: bool) -> Vec<(ByteRange, bool)> {
        let mut parts: Vec<(ByteRange, bool)> = Vec::new();
        let mut at = range.offset;
        let extents = if whole || range.length < MIN_HOLE_BYTES {
            Vec::new()
        } else {
            // Holes only save work: a device that cannot tell is read.
            self.export.device().extents(range).unwrap_or_default()
        };
        for extent in extents {
            if extent.range.offset != at || parts.len() >= MAX_READ_CHUNKS {
                break;
            }
            at = extent.range.end().min(range.end());
            let piece = ByteRange::from_bounds(extent.range.offset, at);
            let zero = extent.kind.reads_as_zero() && piece.length >= MIN_HOLE_BYTES;
            match parts.last_mut() {
                Some((last, kind)) if *kind == zero => last.length += piece.length,
                _ => parts.push((piece, zero)),
            }
        }
        let rest = ByteRange::from_bounds(at, range.end());
        if !rest.is_empty() {
            match parts.last_mut() {
                Some((last, false)) => last.length += rest.length,
                _ => parts.push((rest, false)),
            }
        }
        parts
    }

    fn status_request(
        &self,
        header: &RequestHeader,
        payload: &[u8],
    ) -> Result<(ByteRange, Vec<&MetaContext>), Failed> {
        self.check_flags(header)?;
        let all = &self.agreed.contexts;
        if all.is_empty() {
            return Err(Failed::new(EINVAL, "no metadata context was agreed on"));
        }
        let mut length = header.length;
        let mut contexts: Vec<_> = all.iter().collect();
        if header.flags & cmd_flag::PAYLOAD_LEN != 0 {
            let (effect, ids) = decode_status_filter(payload)
                .map_err(|error| Failed::new(EINVAL, error.to_string()))?;
            length = effect;
            contexts.retain(|context| ids.contains(&context.id));
            if ids.is_empty() || contexts.len() != ids.len() {
                let text = "an unknown or repeated metadata context";
                return Err(Failed::new(EINVAL, text));
            }
        }
        let range = self.range(header, length, EINVAL)?;
        if range.is_empty() {
            return Err(Failed::new(EINVAL, "a block status request of no length"));
        }
        Ok((range, contexts))
    }

    fn block_status(
        &self,
        header: &RequestHeader,
        payload: &[u8],
    ) -> io::Result<Result<(), Failed>> {
        let (range, contexts) = match self.status_request(header, payload) {
            Ok(request) => request,
            Err(failed) => return Ok(Err(failed)),
        };
        let extended = self.agreed.style == HeaderStyle::Extended;
        let mut chunks = Vec::new();
        for context in contexts {
            let mut extents = match self.export.status(&context.name, range) {
                Ok(extents) => extents,
                Err(error) => return Ok(Err(error.into())),
            };
            if extents.is_empty() {
                let text = format!("nothing is known of {range} in {}", context.name);
                return Ok(Err(violation(text).into()));
            }
            if header.flags & cmd_flag::REQ_ONE != 0 {
                extents.truncate(1);
            }
            chunks.push(encode_chunk(extended, context.id, &extents));
        }
        let kind = if extended { chunk::BLOCK_STATUS_EXT } else { chunk::BLOCK_STATUS };
        let count = chunks.len();
        for (index, data) in chunks.into_iter().enumerate() {
            let reply = self.chunk(header, kind, index + 1 == count, data.len() as u64);
            self.send_chunk(&reply, &[], &data)?;
        }
        Ok(Ok(()))
    }
}

impl From<ProtocolError> for Failed {
    fn from(error: ProtocolError) -> Self {
        Self::new(crate::proto::errno::EIO, error.to_string())
    }
}
