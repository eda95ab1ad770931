//! The export as a block device.

use super::connect::connect;
use super::connection::{Connection, Outcome, Piece};
use crate::options::NbdOptions;
use crate::proto::assembly::Expected;
use crate::proto::constants::{DEFAULT_MAX_PAYLOAD_BYTES, cmd, cmd_flag};
use crate::proto::errno::{EINVAL, ENOTSUP, EOVERFLOW, ServerError};
use crate::proto::export_info::{ExportInfo, TransmissionFlags};
use crate::proto::meta_context::MetaContext;
use crate::proto::request::HeaderStyle;
use crate::url::NbdUrl;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use vmtide_block::{BlockDevice, BlockError, ByteRange, Extent, Result, WritableBlockDevice};

/// The most requests one call has under way. Requests without payload must fit a socket's buffer
/// together (see [`connection`](super::connection)): 16 take 512 bytes.
const REQUESTS_PER_CALL: usize = 16;

/// The longest range of one trim or zero request: servers serve these piece by piece, and a
/// 32-bit header holds no more than 4 GiB.
const MAX_EFFECT_BYTES: u64 = 1 << 30;

/// The zeros that are sent where a server cannot make them by itself.
static ZEROS: [u8; 256 << 10] = [0; 256 << 10];

/// How [`NbdDevice::write_zeroes_with`] makes zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroMode {
    /// Keeps the storage allocated (`NBD_CMD_FLAG_NO_HOLE`), so that later writes cannot run
    /// out of space.
    pub allocate: bool,
    /// Fails with [`BlockError::Unsupported`] where zeroing is no faster than writing
    /// (`NBD_CMD_FLAG_FAST_ZERO`): for zeroing a whole target before writing its data.
    pub fast_only: bool,
}

/// An export of an NBD server, open over one or several connections.
///
/// Any number of threads use it at once; their requests share the connections and do not wait
/// for one another. A connection that fails takes its requests with it
/// ([`BlockError::Disconnected`]); later requests go over the connections that are left. Dropping
/// the device says goodbye to the server. What the server claims is checked: a reply that breaks
/// the protocol or does not cover its request is [`BlockError::Damaged`].
#[derive(Debug)]
pub struct NbdDevice {
    pub(super) name: String,
    url: NbdUrl,
    pub(super) info: ExportInfo,
    pub(super) style: HeaderStyle,
    pub(super) contexts: Vec<MetaContext>,
    connections: Vec<Connection>,
    next: AtomicUsize,
    request_bytes: usize,
    read_only: bool,
    /// Held across the read and the write of a block of which only a part is written, so that
    /// two such writes to one block do not undo each other.
    partial_block: Mutex<()>,
}

impl NbdDevice {
    /// Opens the export at `url`.
    ///
    /// # Errors
    /// [`BlockError::Io`] where the server cannot be reached, has no such export (kind
    /// `NotFound`) or refuses it (`PermissionDenied`); [`BlockError::Damaged`] where it does not
    /// speak NBD; [`BlockError::Unsupported`] where it cannot do what the URL demands.
    pub fn connect(url: &NbdUrl, options: &NbdOptions) -> Result<Self> {
        let (connection, agreement) = connect(url, options)?;
        let info = agreement.info;
        let mut connections = vec![connection];
        if info.flags.can_multi_conn() {
            while connections.len() < options.connections {
                let (connection, other) = match connect(url, options) {
                    Ok(pair) => pair,
                    // A server may limit its connections; those there are suffice.
                    Err(error) => {
                        tracing::debug!(%error, "no further NBD connection");
                        break;
                    }
                };
                let same = other.info == info
                    && other.style == agreement.style
                    && other.contexts == agreement.contexts;
                if !same {
                    return Err(BlockError::damaged(
                        format!("connect to {url}"),
                        "two connections to the export were told different things of it",
                    ));
                }
                connections.push(connection);
            }
        }
        let name = url.to_string();
        let maximum = info.block_sizes.maximum_payload;
        let request_bytes = options.request_bytes.min(maximum).max(info.block_sizes.minimum);
        let request_bytes = request_bytes - request_bytes % info.block_sizes.minimum;
        Ok(Self {
            name,
            url: url.clone(),
            read_only: options.read_only || info.flags.is_read_only(),
            info,
            style: agreement.style,
            contexts: agreement.contexts,
            connections,
            next: AtomicUsize::new(0),
            request_bytes: usize::try_from(request_bytes.min(DEFAULT_MAX_PAYLOAD_BYTES))
                .unwrap_or(1 << 20),
            partial_block: Mutex::new(()),
        })
    }

    /// Where the export is.
    pub const fn url(&self) -> &NbdUrl {
        &self.url
    }

    /// What the server said of the export.
    pub const fn info(&self) -> &ExportInfo {
        &self.info
    }

    /// Whether writes are refused, by the server or by the options.
    pub const fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The number of connections that were made.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// The headers that were agreed on.
    pub const fn header_style(&self) -> HeaderStyle {
        self.style
    }

    pub(super) const fn flags(&self) -> TransmissionFlags {
        self.info.flags
    }

    /// The live connection with the fewest calls under way, by turns where they are equal.
    fn pick(&self) -> Result<&Connection> {
        let start = self.next.fetch_add(1, Ordering::Relaxed);
        let count = self.connections.len();
        (0..count)
            .filter_map(|step| self.connections.get(start.wrapping_add(step) % count))
            .filter(|connection| !connection.is_dead())
            .min_by_key(|connection| connection.active_calls())
            .or_else(|| self.connections.first())
            .ok_or_else(|| BlockError::disconnected(self.name(), "there is no connection"))
    }

    /// Sends one request and returns the server's answer to it.
    pub(super) fn ask(&self, what: &str, piece: Piece<'_>) -> Result<Outcome> {
        let context = || format!("{what} {} of {}", piece.range, self.name);
        let connection = self.pick()?;
        let mut outcomes = connection
            .call(std::slice::from_ref(&piece), &mut [], 0)
            .map_err(|failure| failure.into_block_error(context()))?;
        outcomes.pop().ok_or_else(|| BlockError::damaged(context(), "there is no answer"))
    }

    fn ask_plain(&self, what: &str, command: u16, flags: u16, range: ByteRange) -> Result<()> {
        let piece = plain(command, flags, range, &[]);
        self.ask(what, piece)?
            .map(drop)
            .map_err(|error| error.into_block_error(format!("{what} {range} of {}", self.name)))
    }

    /// Reads a range whose bounds are multiples of the minimum block size.
    fn read_aligned(&self, mut buffer: &mut [u8], mut offset: u64) -> Result<()> {
        while !buffer.is_empty() {
            let round = buffer.len().min(self.request_bytes * REQUESTS_PER_CALL);
            let (head, rest) = buffer.split_at_mut(round);
            let range = ByteRange::new(offset, round as u64);
            let pieces: Vec<_> = cut(range, self.request_bytes)
                .map(|range| Piece {
                    command: cmd::READ,
                    flags: 0,
                    range,
                    payload: &[],
                    expected: Expected::Data,
                })
                .collect();
            self.run("read", range, &pieces, head)?;
            offset += round as u64;
            buffer = rest;
        }
        Ok(())
    }

    /// Makes a call and turns the first error among its answers into ours.
    fn run(
        &self,
        what: &str,
        range: ByteRange,
        pieces: &[Piece<'_>],
        into: &mut [u8],
    ) -> Result<()> {
        let context = |range: ByteRange| format!("{what} {range} of {}", self.name);
        let outcomes = self
            .pick()?
            .call(pieces, into, range.offset)
            .map_err(|failure| failure.into_block_error(context(range)))?;
        for (piece, outcome) in pieces.iter().zip(outcomes) {
            outcome.map_err(|error| error.into_block_error(context(piece.range)))?;
        }
        Ok(())
    }

    fn write_aligned(&self, data: &[u8], offset: u64, flags: u16) -> Result<()> {
        let round_bytes = self.request_bytes * REQUESTS_PER_CALL;
        for (data, at) in data.chunks(round_bytes).zip((offset..).step_by(round_bytes)) {
            let range = ByteRange::new(at, data.len() as u64);
            let pieces: Vec<_> = cut(range, self.request_bytes)
                .zip(data.chunks(self.request_bytes))
                .map(|(range, data)| plain(cmd::WRITE, flags, range, data))
                .collect();
            self.run("write", range, &pieces, &mut [])?;
        }
        Ok(())
    }

    /// `range` grown to multiples of the minimum block size.
    ///
    /// # Errors
    /// Where a size that is no multiple leaves the last bytes out of reach, as the specification
    /// (section "Size constraints") has it.
    pub(super) fn align(&self, range: ByteRange) -> Result<ByteRange> {
        let block = u64::from(self.info.block_sizes.minimum);
        if block <= 1 || range.is_empty() {
            return Ok(range);
        }
        let aligned = range.align_outward(block, u64::MAX);
        if aligned.end() > self.info.size_bytes {
            return Err(BlockError::unsupported(
                self.name(),
                format!(
                    "the last {} bytes cannot be accessed: the server insists on blocks of {block} bytes",
                    self.info.size_bytes % block
                ),
            ));
        }
        Ok(aligned)
    }

    fn check_write(&self, range: ByteRange) -> Result<()> {
        if self.read_only {
            return Err(BlockError::ReadOnly { device: self.name() });
        }
        self.check_range(range)
    }

    /// Writes all of `data` at `offset`, and to stable storage where `durable`.
    ///
    /// # Errors
    /// As [`WritableBlockDevice::write_at`].
    pub fn write_with(&self, data: &[u8], offset: u64, durable: bool) -> Result<()> {
        let range = ByteRange::new(offset, data.len() as u64);
        self.check_write(range)?;
        let by_flag = durable && self.flags().can_fua();
        let flags = if by_flag { cmd_flag::FUA } else { 0 };
        let aligned = self.align(range)?;
        if aligned == range {
            self.write_aligned(data, offset, flags)?;
        } else {
            self.write_partial_blocks(data, range, aligned, flags)?;
        }
        if durable && !by_flag {
            self.flush()?;
        }
        Ok(())
    }

    /// Reads the blocks at the edges, puts `data` into them, and writes whole blocks.
    fn write_partial_blocks(
        &self,
        data: &[u8],
        range: ByteRange,
        aligned: ByteRange,
        flags: u16,
    ) -> Result<()> {
        let _alone = self.partial_block.lock();
        let mut at = aligned.offset;
        while at < aligned.end() {
            let window =
                ByteRange::from_bounds(at, aligned.end().min(at + (self.request_bytes as u64)));
            let inside = window.intersect(&range);
            let mut block = vec![0; to_usize(window.length)];
            self.read_aligned(&mut block, at)?;
            let to = to_usize(inside.offset - at)..to_usize(inside.end() - at);
            let from =
                to_usize(inside.offset - range.offset)..to_usize(inside.end() - range.offset);
            block[to].copy_from_slice(&data[from]);
            self.write_aligned(&block, at, flags)?;
            at = window.end();
        }
        Ok(())
    }

    /// Makes `range` zero in the way `mode` says.
    ///
    /// # Errors
    /// [`BlockError::Unsupported`] where `fast_only` cannot be kept; otherwise as
    /// [`WritableBlockDevice::write_at`].
    pub fn write_zeroes_with(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.check_write(range)?;
        let flags = self.flags();
        if mode.fast_only && !(flags.can_write_zeroes() && flags.can_fast_zero()) {
            return Err(BlockError::unsupported(self.name(), "the server has no fast zeroes"));
        }
        let mut request_flags = 0;
        if mode.allocate {
            request_flags |= cmd_flag::NO_HOLE;
        }
        if mode.fast_only {
            request_flags |= cmd_flag::FAST_ZERO;
        }
        let block = u64::from(self.info.block_sizes.minimum);
        // Whole blocks by command; the bytes beside them as data.
        let start = range.offset.next_multiple_of(block).min(range.end());
        let end = (range.end() - range.end() % block).max(start);
        let inner = ByteRange::from_bounds(start, end);
        if !flags.can_write_zeroes() {
            return self.send_zeros(range);
        }
        self.send_zeros(ByteRange::from_bounds(range.offset, start))?;
        for piece in cut(inner, to_usize(MAX_EFFECT_BYTES)) {
            self.zero_piece(piece, request_flags, mode)?;
        }
        self.send_zeros(ByteRange::from_bounds(end, range.end()))
    }

    fn zero_piece(&self, range: ByteRange, flags: u16, mode: ZeroMode) -> Result<()> {
        match self.ask("zero", plain(cmd::WRITE_ZEROES, flags, range, &[]))? {
            Ok(_) => Ok(()),
            Err(ServerError { code, .. })
                if !mode.fast_only && matches!(code, ENOTSUP | EOVERFLOW | EINVAL) =>
            {
                self.send_zeros(range)
            }
            Err(error) => Err(error.into_block_error(format!("zero {range} of {}", self.name))),
        }
    }

    fn send_zeros(&self, range: ByteRange) -> Result<()> {
        for piece in cut(range, ZEROS.len()) {
            self.write_with(&ZEROS[..to_usize(piece.length)], piece.offset, false)?;
        }
        Ok(())
    }

    /// Tells the server that the content of `range` is not needed. It may then read as anything.
    /// Does nothing where the server has no trim.
    ///
    /// # Errors
    /// As [`WritableBlockDevice::write_at`].
    pub fn trim(&self, range: ByteRange) -> Result<()> {
        self.check_write(range)?;
        if !self.flags().can_trim() {
            return Ok(());
        }
        let block = u64::from(self.info.block_sizes.minimum);
        let start = range.offset.next_multiple_of(block);
        let end = range.end() - range.end() % block;
        for piece in cut(ByteRange::from_bounds(start, end), to_usize(MAX_EFFECT_BYTES)) {
            self.ask_plain("trim", cmd::TRIM, 0, piece)?;
        }
        Ok(())
    }
}

fn plain(command: u16, flags: u16, range: ByteRange, payload: &[u8]) -> Piece<'_> {
    Piece { command, flags, range, payload, expected: Expected::Nothing }
}

/// The range in pieces of at most `size` bytes.
fn cut(range: ByteRange, size: usize) -> impl Iterator<Item = ByteRange> {
    let size = size.max(1);
    (range.offset..range.end())
        .step_by(size)
        .map(move |at| ByteRange::from_bounds(at, range.end().min(at + size as u64)))
}

/// For lengths that are bounded by a buffer in memory.
fn to_usize(length: u64) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}

impl BlockDevice for NbdDevice {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn size_bytes(&self) -> u64 {
        self.info.size_bytes
    }

    fn block_size_bytes(&self) -> u32 {
        self.info.block_sizes.minimum.max(512)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        self.check_range(range)?;
        let aligned = self.align(range)?;
        if aligned == range {
            return self.read_aligned(buffer, offset);
        }
        let mut at = aligned.offset;
        while at < aligned.end() {
            let window =
                ByteRange::from_bounds(at, aligned.end().min(at + (self.request_bytes as u64)));
            let inside = window.intersect(&range);
            let mut block = vec![0; to_usize(window.length)];
            self.read_aligned(&mut block, at)?;
            let from = to_usize(inside.offset - at)..to_usize(inside.end() - at);
            let to = to_usize(inside.offset - offset)..to_usize(inside.end() - offset);
            buffer[to].copy_from_slice(&block[from]);
            at = window.end();
        }
        Ok(())
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.check_range(range)?;
        self.allocation(range)
    }
}

impl WritableBlockDevice for NbdDevice {
    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.write_with(data, offset, false)
    }

    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        self.write_zeroes_with(range, ZeroMode::default())
    }

    /// One flush covers the writes of all connections: several are only made where the server
    /// says so. A server without flush has no cache to flush.
    fn flush(&self) -> Result<()> {
        if !self.flags().can_flush() || self.read_only {
            return Ok(());
        }
        self.ask_plain("flush", cmd::FLUSH, 0, ByteRange::new(0, 0))
    }
}
