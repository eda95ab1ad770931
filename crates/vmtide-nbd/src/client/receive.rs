//! Taking replies off the socket, by whoever holds the baton.

use super::connection::{Failure, Outcome, Pending, Shared};
use crate::proto::assembly::Next;
use crate::proto::reply::{LONGEST_REPLY_HEADER_BYTES, ReplyHeader, SHORTEST_REPLY_HEADER_BYTES};
use crate::proto::violation;
use crate::transport::ReadHalf;
use std::io::{self, Read};
use std::time::{Duration, Instant};
use vmtide_block::ByteRange;

/// How often a busy reader looks whether some other caller waits too long.
const PATIENCE_CHECK: Duration = Duration::from_millis(500);

/// The right to read the socket, with the header that was read last where its reply was not.
#[derive(Debug)]
pub(super) struct Baton {
    pub(super) half: ReadHalf,
    pub(super) header: Option<ReplyHeader>,
}

/// Where a caller wants its data: `into` holds the export's bytes from `base`.
#[derive(Debug)]
pub(super) struct Place<'a> {
    pub(super) into: &'a mut [u8],
    pub(super) base: u64,
}

/// Data kept aside for a caller that was still sending.
#[derive(Debug)]
pub(super) enum Owned {
    /// Bytes from an offset of the export.
    Data(u64, Vec<u8>),
    /// A range of zeros.
    Zero(ByteRange),
}

impl Place<'_> {
    fn slice(&mut self, range: ByteRange) -> Result<&mut [u8], Failure> {
        let start = range.offset.checked_sub(self.base);
        let end = range.end().checked_sub(self.base);
        let bounds = start
            .and_then(|start| usize::try_from(start).ok())
            .zip(end.and_then(|end| usize::try_from(end).ok()));
        // The assembly keeps every range inside its request, and requests lie inside the buffer.
        bounds
            .and_then(|(start, end)| self.into.get_mut(start..end))
            .ok_or_else(|| violation(format!("data for {range} that nobody asked for")).into())
    }

    pub(super) fn put(&mut self, owned: &Owned) -> Result<(), Failure> {
        match owned {
            Owned::Data(offset, bytes) => {
                self.slice(ByteRange::new(*offset, bytes.len() as u64))?.copy_from_slice(bytes)
            }
            Owned::Zero(range) => self.slice(*range)?.fill(0),
        }
        Ok(())
    }
}

/// The buffer of the baton's holder, or what is kept for somebody else.
enum Sink<'a, 'b> {
    Own(&'a mut Place<'b>),
    Keep(Vec<Owned>),
}

impl Shared {
    /// Reads replies until the caller `me` has all of its own, the next reply is somebody
    /// else's, or (for the pump, which is nobody) after one chunk. Passes the baton on.
    pub(super) fn receive(
        &self,
        me: Option<u64>,
        baton: Baton,
        place: &mut Place<'_>,
    ) -> Result<(), Failure> {
        let Baton { mut half, mut header } = baton;
        let mut checked = Instant::now();
        loop {
            let header = match header.take() {
                Some(header) => header,
                None => self.read_header(&mut half)?,
            };
            let cookie = header.cookie();
            let mut pending = {
                let mut guard = self.state.lock();
                let state = &mut *guard;
                let Some(pending) = state.pending.remove(&cookie) else {
                    return Err(violation(format!(
                        "a reply with the cookie {cookie:#x} of no request"
                    ))
                    .into());
                };
                let owner = state.calls.get_mut(&pending.call);
                if let Some(owner) = owner
                    && Some(pending.call) != me
                    && owner.may_take_turn()
                {
                    state.pending.insert(cookie, pending);
                    let header = Some(header);
                    owner.turn = Some(Baton { half, header });
                    owner.wake.notify_one();
                    return Ok(());
                }
                pending
            };
            let mut sink = if Some(pending.call) == me {
                Sink::Own(&mut *place)
            } else {
                Sink::Keep(Vec::new())
            };
            let next = self.take_chunk(&mut half, &header, &mut pending, &mut sink)?;
            let kept = match sink {
                Sink::Keep(kept) => kept,
                Sink::Own(_) => Vec::new(),
            };
            if self.book(me, cookie, pending, next, kept)? {
                let mut state = self.state.lock();
                self.release(&mut state, half);
                return Ok(());
            }
            if checked.elapsed() > PATIENCE_CHECK {
                self.check_patience()?;
                checked = Instant::now();
            }
        }
    }

    /// Records a chunk; says whether the reader `me` is done.
    fn book(
        &self,
        me: Option<u64>,
        cookie: u64,
        pending: Pending,
        next: Next,
        kept: Vec<Owned>,
    ) -> Result<bool, Failure> {
        let Pending { call: owner, piece, assembly } = pending;
        let mut state = self.state.lock();
        let mut outcome: Option<Outcome> = None;
        if next == Next::Reply {
            outcome = Some(assembly.finish()?);
        } else {
            let pending = Pending { call: owner, piece, assembly };
            state.pending.insert(cookie, pending);
        }
        if let Some(call) = state.calls.get_mut(&owner) {
            call.progress = Instant::now();
            call.kept.extend(kept);
            if let Some(slot) = call.outcomes.get_mut(piece)
                && outcome.is_some()
            {
                *slot = outcome;
                call.remaining = call.remaining.saturating_sub(1);
            }
            if Some(owner) != me {
                call.wake.notify_one();
            }
        }
        Ok(match me.and_then(|me| state.calls.get(&me)) {
            Some(call) => call.remaining == 0,
            None => true,
        })
    }

    /// Reads what belongs to one header.
    fn take_chunk(
        &self,
        half: &mut ReadHalf,
        header: &ReplyHeader,
        pending: &mut Pending,
        sink: &mut Sink<'_, '_>,
    ) -> Result<Next, Failure> {
        let assembly = &mut pending.assembly;
        let mut next = assembly.begin(header)?;
        loop {
            next = match next {
                Next::Chunk | Next::Reply => return Ok(next),
                Next::Payload(length) => {
                    let payload = self.read_vec(half, length)?;
                    assembly.payload(&payload)?
                }
                Next::Data(range) => {
                    match sink {
                        Sink::Own(place) => self.fill(half, place.slice(range)?)?,
                        Sink::Keep(kept) => {
                            let length = usize::try_from(range.length)
                                .map_err(|_| violation("data of an impossible length"))?;
                            kept.push(Owned::Data(range.offset, self.read_vec(half, length)?));
                        }
                    }
                    assembly.chunk_end()
                }
                Next::Zero(range) => {
                    match sink {
                        Sink::Own(place) => place.slice(range)?.fill(0),
                        Sink::Keep(kept) => kept.push(Owned::Zero(range)),
                    }
                    assembly.chunk_end()
                }
            };
        }
    }

    fn read_header(&self, half: &mut ReadHalf) -> Result<ReplyHeader, Failure> {
        let mut bytes = [0; LONGEST_REPLY_HEADER_BYTES];
        self.fill(half, &mut bytes[..SHORTEST_REPLY_HEADER_BYTES])?;
        let magic = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let length = ReplyHeader::length_by_magic(self.style, magic)?;
        self.fill(half, &mut bytes[SHORTEST_REPLY_HEADER_BYTES..length])?;
        Ok(ReplyHeader::decode(self.style, &bytes[..length])?)
    }

    /// Reads a payload whose length was checked. Memory grows with what arrives.
    fn read_vec(&self, half: &mut ReadHalf, length: usize) -> Result<Vec<u8>, Failure> {
        /// A payload up to this is allocated at once.
        const TRUSTED_BYTES: usize = 1 << 20;
        let mut bytes = Vec::new();
        while bytes.len() < length {
            let start = bytes.len();
            bytes.resize(length.min(start + TRUSTED_BYTES), 0);
            self.fill(half, &mut bytes[start..])?;
        }
        Ok(bytes)
    }

    /// Fills `buffer`, however slowly it comes, while nobody's patience ends.
    fn fill(&self, half: &mut ReadHalf, mut buffer: &mut [u8]) -> Result<(), Failure> {
        while !buffer.is_empty() {
            match half.read(buffer) {
                Ok(0) => return Err(Failure::lost("the server closed the connection")),
                Ok(count) => buffer = &mut buffer[count..],
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.check_patience()?,
                    _ => return Err(Failure::lost(format!("receiving a reply: {error}"))),
                },
            }
        }
        Ok(())
    }
}
