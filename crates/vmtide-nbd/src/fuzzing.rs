//! Entry points for fuzzing: hostile bytes in, nothing but a return out.
//!
//! Each function is one target of the `fuzz` package and is also run over a small corpus by the
//! tests. None may panic, allocate by a length that was not checked, or run without an end.

use crate::client::handshake::{Wishes, greet, inform, list, negotiate, start_tls};
use crate::proto::ProtocolError;
use crate::proto::assembly::{Assembly, Expected, Next};
use crate::proto::reply::{ReplyHeader, SHORTEST_REPLY_HEADER_BYTES};
use crate::proto::request::{HeaderStyle, RequestHeader};
use crate::server::handshake::{Ended, Negotiation, greet as greet_client};
use crate::server::requests::{ReadBuffer, Replies, Service, demand};
use crate::server::{Export, ServerOptions};
use std::io::{self, Read, Write};
use std::sync::Arc;
use vmtide_block::{ByteRange, MemoryDevice, RangeSet};

/// A peer that has said all it will say, and listens to nothing.
struct Canned<'a>(&'a [u8]);

impl Read for Canned<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Canned<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A server's side of a handshake. The first byte chooses what the client wants of it.
pub fn client_handshake(input: &[u8]) {
    let Some((mode, bytes)) = input.split_first() else {
        return;
    };
    let mut server = Canned(bytes);
    let Ok(greeting) = greet(&mut server) else {
        return;
    };
    let contexts = ["qemu:dirty-bitmap:b0".to_owned()];
    let wishes = Wishes {
        export: "disk",
        contexts: &contexts,
        structured_replies: mode & 4 != 0,
        extended_headers: mode & 8 != 0,
    };
    // The outcome is either; what matters is that there is one.
    match mode & 3 {
        0 => drop(list(&mut server, greeting)),
        1 => drop(inform(&mut server, greeting, &wishes)),
        2 => drop(start_tls(&mut server, greeting)),
        _ => drop(negotiate(&mut server, greeting, &wishes)),
    }
}

fn style_of(byte: u8) -> HeaderStyle {
    match byte % 3 {
        0 => HeaderStyle::Simple,
        1 => HeaderStyle::Structured,
        _ => HeaderStyle::Extended,
    }
}

/// The replies to one request. The first byte chooses style and request.
pub fn client_replies(input: &[u8]) {
    let Some((mode, bytes)) = input.split_first() else {
        return;
    };
    let style = style_of(*mode);
    let range = ByteRange::new(4096, 8192);
    let expected = match mode >> 2 & 3 {
        0 => Expected::Nothing,
        1 => Expected::Status(vec![0, 7]),
        _ => Expected::Data,
    };
    let mut into = vec![0; 8192];
    // Either outcome will do.
    let _ = assemble(style, Assembly::new(range, expected), bytes, &mut into);
}

fn assemble(
    style: HeaderStyle,
    mut assembly: Assembly,
    mut bytes: &[u8],
    into: &mut [u8],
) -> Result<(), ProtocolError> {
    let mut take = |length: usize| -> Result<&[u8], ProtocolError> {
        let (head, rest) = bytes
            .split_at_checked(length)
            .ok_or_else(|| crate::proto::violation("the input ends"))?;
        bytes = rest;
        Ok(head)
    };
    loop {
        let start = take(SHORTEST_REPLY_HEADER_BYTES)?;
        let magic = u32::from_be_bytes([start[0], start[1], start[2], start[3]]);
        let length = ReplyHeader::length_by_magic(style, magic)?;
        let rest = take(length - SHORTEST_REPLY_HEADER_BYTES)?;
        let header = ReplyHeader::decode(style, &[start, rest].concat())?;
        let mut next = assembly.begin(&header)?;
        loop {
            // Slicing panics where a range leaves its request: that is the point.
            let place = |range: ByteRange| {
                let start = usize::try_from(range.offset - 4096).unwrap_or(usize::MAX);
                start..start + usize::try_from(range.length).unwrap_or(usize::MAX)
            };
            next = match next {
                Next::Chunk => break,
                Next::Reply => return assembly.finish().map(drop),
                Next::Payload(length) => assembly.payload(take(length)?)?,
                Next::Data(range) => {
                    let place = place(range);
                    into[place.clone()].copy_from_slice(take(place.len())?);
                    assembly.chunk_end()
                }
                Next::Zero(range) => {
                    into[place(range)].fill(0);
                    assembly.chunk_end()
                }
            };
        }
    }
}

struct Nowhere;

impl Replies for Nowhere {
    fn send(&self, _header: &[u8], _payload: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

/// A client's whole conversation: greeting, options, requests.
pub fn server_requests(input: &[u8]) {
    let options = ServerOptions { max_payload_bytes: 1 << 16, ..ServerOptions::default() };
    let disk = Arc::new(MemoryDevice::from_bytes(
        [vec![1; 9000], vec![0; 50_000], vec![2; 6000]].concat(),
    ));
    let changed = RangeSet::from(vec![ByteRange::new(512, 512), ByteRange::new(8192, 9999)]);
    let exports = [
        Export::writable(disk.clone()).with_fast_zeroes(),
        Export::read_only(disk.clone()).named("ro").with_dirty_bitmap("b", changed),
        Export::writable(disk).named("blocks").with_minimum_block(512),
    ];
    // Either outcome will do.
    let _ = converse(&exports, &options, &mut Canned(input));
}

fn converse(
    exports: &[Export],
    options: &ServerOptions,
    client: &mut Canned<'_>,
) -> io::Result<()> {
    let no_zeroes = greet_client(client)?;
    let Ended::Chosen(agreed) = Negotiation::new(exports, options, no_zeroes, false).run(client)?
    else {
        return Ok(());
    };
    let Some(export) = exports.get(agreed.export) else {
        return Ok(());
    };
    let service = Service {
        export,
        agreed: &agreed,
        max_payload_bytes: options.max_payload_bytes,
        replies: Nowhere,
    };
    let mut buffer = ReadBuffer::default();
    loop {
        let mut bytes = vec![0; agreed.style.request_header_bytes()];
        client.read_exact(&mut bytes)?;
        let invalid = |error: ProtocolError| io::Error::new(io::ErrorKind::InvalidData, error);
        let header = RequestHeader::decode(agreed.style, &bytes).map_err(invalid)?;
        let demand = demand(agreed.style, &header, options.max_payload_bytes).map_err(invalid)?;
        let mut payload = vec![0; usize::try_from(demand.payload_bytes).unwrap_or(0)];
        client.read_exact(&mut payload)?;
        service.serve(&header, &payload, &mut buffer)?;
    }
}
