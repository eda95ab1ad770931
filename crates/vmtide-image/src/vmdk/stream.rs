//! Writing a stream-optimized extent (Virtual Disk Format 5.0, "Stream-Optimized Compressed Sparse
//! Extents").
//!
//! ```text
//! header · descriptor · grains of table 0 · table 0 · grains of table 1 · table 1 · … · directory · footer · end
//! ```
//!
//! Everything is appended: a grain at most once and in ascending order. The header in front says
//! that the tables are found by the footer, which comes last, so an extent that was not finished is
//! refused by every reader.

use super::hosted::{HostedHeader, SECTOR, marker};
use super::image::VmdkImage;
use crate::bytes::{length, put};
use crate::deflate::Deflater;
use crate::{CompressedCluster, CompressedWriter};
use parking_lot::Mutex;
use std::cell::RefCell;
use std::sync::{Arc, OnceLock};
use vmtide_block::{BlockDevice, BlockError, ByteRange, Result, WritableBlockDevice};

/// How hard to compress, 1 to 12. At 6 libdeflate's output is a little smaller than that of zlib at
/// its default, which is what QEMU and VMware's tools use, in half the time; lower levels make
/// larger images than theirs.
const LEVEL: i32 = 6;

/// The bytes that are collected before they are written: grains have some ten kilobytes.
const BUFFER_BYTES: usize = 1 << 20;

thread_local! {
    /// One compressor for each thread: it takes hundreds of kilobytes.
    static DEFLATER: RefCell<Deflater> = RefCell::new(Deflater::new(LEVEL));
}

/// A stream-optimized image in the making.
pub(super) struct StreamWriter {
    name: String,
    file: Arc<dyn WritableBlockDevice>,
    header: HostedHeader,
    state: Mutex<State>,
    /// The image, once it is complete.
    finished: OnceLock<VmdkImage>,
}

/// What has been appended.
struct State {
    /// Where the buffer begins in the file.
    written_bytes: u64,
    buffer: Vec<u8>,
    /// The first grain that may still be appended.
    next_grain: u64,
    /// The table being filled.
    table: Vec<u32>,
    /// The tables that are in the file; 0 for empty ones.
    directory: Vec<u32>,
    /// The grain that plain writes fill.
    open: Option<OpenGrain>,
}

/// A grain whose bytes come in pieces.
struct OpenGrain {
    grain: u64,
    bytes: Vec<u8>,
}

impl StreamWriter {
    /// Begins with these bytes: the header and the descriptor.
    pub(super) fn begin(
        file: Arc<dyn WritableBlockDevice>,
        header: HostedHeader,
        start: Vec<u8>,
    ) -> Result<Self> {
        let name = file.name();
        header.layout().validate(&name)?;
        let tables = header.layout().tables();
        if tables > u64::from(u32::MAX) / 4 {
            return Err(BlockError::unsupported(name, "is too large for a stream-optimized image"));
        }
        Ok(Self {
            name,
            file,
            state: Mutex::new(State {
                written_bytes: 0,
                buffer: start,
                next_grain: 0,
                table: vec![0; length(u64::from(header.entries_per_table))],
                directory: Vec::new(),
                open: None,
            }),
            header,
            finished: OnceLock::new(),
        })
    }

    pub(super) fn name(&self) -> String {
        self.name.clone()
    }

    pub(super) const fn size_bytes(&self) -> u64 {
        self.header.capacity * SECTOR
    }

    const fn grain_bytes(&self) -> u64 {
        self.header.grain_sectors * SECTOR
    }

    /// The image, where it is complete.
    pub(super) fn image(&self) -> Result<&VmdkImage> {
        self.finished.get().ok_or_else(|| {
            BlockError::unsupported(
                &self.name,
                "a stream-optimized image can be read only when it is finished",
            )
        })
    }

    /// Writes `data` at `offset`; only where nothing was written before, in ascending order.
    pub(super) fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        let mut state = self.state.lock();
        self.check_open()?;
        let grain_bytes = self.grain_bytes();
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let (grain, inside) = (at / grain_bytes, length(at % grain_bytes));
            let (piece, after) = rest.split_at(rest.len().min(length(grain_bytes) - inside));
            self.fill(&mut state, grain, inside, piece)?;
            at += piece.len() as u64;
            rest = after;
        }
        Ok(())
    }

    /// Makes `range` zero: nothing to do where nothing was written.
    pub(super) fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        let mut state = self.state.lock();
        self.check_open()?;
        let grain_bytes = self.grain_bytes();
        if range.offset / grain_bytes < state.next_grain {
            return Err(self.backwards(range.offset / grain_bytes, state.next_grain));
        }
        if let Some(open) = &mut state.open {
            let start = open.grain * grain_bytes;
            let inside = range.intersect(&ByteRange::new(start, open.bytes.len() as u64));
            if !inside.is_empty() {
                open.bytes[length(inside.offset - start)..length(inside.end() - start)].fill(0);
            }
        }
        Ok(())
    }

    fn check_open(&self) -> Result<()> {
        match self.finished.get() {
            None => Ok(()),
            Some(_) => Err(BlockError::ReadOnly { device: self.name.clone() }),
        }
    }

    fn backwards(&self, grain: u64, next: u64) -> BlockError {
        BlockError::unsupported(
            &self.name,
            format!(
                "a stream-optimized image is written once and in order: byte {} comes too late, \
                 {} is next; write to another kind and convert it",
                grain * self.grain_bytes(),
                next * self.grain_bytes()
            ),
        )
    }

    fn fill(&self, state: &mut State, grain: u64, inside: usize, piece: &[u8]) -> Result<()> {
        if state.open.as_ref().is_some_and(|open| open.grain < grain) {
            self.close_grain(state)?;
        }
        let start = grain * self.grain_bytes();
        let open = match &mut state.open {
            Some(open) if open.grain == grain => open,
            None if grain >= state.next_grain => {
                let bytes = vec![0; length(self.grain_bytes().min(self.size_bytes() - start))];
                state.open.insert(OpenGrain { grain, bytes })
            }
            _ => return Err(self.backwards(grain, state.next_grain)),
        };
        match open.bytes.get_mut(inside..inside + piece.len()) {
            Some(target) => target.copy_from_slice(piece),
            None => {
                let range = ByteRange::new(start + inside as u64, piece.len() as u64);
                let size_bytes = self.size_bytes();
                return Err(BlockError::OutOfRange {
                    device: self.name.clone(),
                    range,
                    size_bytes,
                });
            }
        }
        Ok(())
    }

    /// Appends the grain that plain writes filled.
    fn close_grain(&self, state: &mut State) -> Result<()> {
        match state.open.take() {
            Some(open) if !vmtide_block::is_zero(&open.bytes) => {
                let packed = self.deflate(&open.bytes)?;
                self.append_grain(state, open.grain, &packed)
            }
            _ => Ok(()),
        }
    }

    /// Compresses a grain. What the disk's end cuts off is filled with zeros: every grain of a stream
    /// is whole, and readers take one that is shorter for damage.
    fn deflate(&self, data: &[u8]) -> Result<Vec<u8>> {
        let grain_bytes = length(self.grain_bytes());
        if data.len() > grain_bytes {
            return Err(BlockError::unsupported(
                &self.name,
                format!("{} bytes are more than a grain of {grain_bytes}", data.len()),
            ));
        }
        let mut whole = Vec::new();
        let data = if data.len() == grain_bytes {
            data
        } else {
            whole.extend_from_slice(data);
            whole.resize(grain_bytes, 0);
            &whole
        };
        DEFLATER
            .with_borrow_mut(|deflater| deflater.zlib(data))
            .map_err(|detail| BlockError::unsupported(&self.name, detail))
    }

    fn append_grain(&self, state: &mut State, grain: u64, packed: &[u8]) -> Result<()> {
        if grain < state.next_grain {
            return Err(self.backwards(grain, state.next_grain));
        }
        let per_table = u64::from(self.header.entries_per_table);
        self.close_tables(state, grain / per_table)?;
        let sector = self.sector(state)?;
        if let Some(entry) = state.table.get_mut(length(grain % per_table)) {
            *entry = sector;
        }
        let size = u32::try_from(packed.len())
            .map_err(|_| BlockError::unsupported(&self.name, "a grain is too large"))?;
        state.buffer.extend((grain * self.header.grain_sectors).to_le_bytes());
        state.buffer.extend(size.to_le_bytes());
        state.buffer.extend(packed);
        pad(&mut state.buffer);
        state.next_grain = grain + 1;
        if state.buffer.len() >= BUFFER_BYTES { self.write_buffer(state) } else { Ok(()) }
    }

    /// Appends tables until the one with number `number` is being filled.
    fn close_tables(&self, state: &mut State, number: u64) -> Result<()> {
        while (state.directory.len() as u64) < number {
            if state.table.iter().all(|entry| *entry == 0) {
                state.directory.push(0);
                continue;
            }
            let bytes: Vec<u8> = state.table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
            let sector = self.append_table(state, marker::GRAIN_TABLE, &bytes)?;
            state.directory.push(sector);
            state.table.fill(0);
        }
        Ok(())
    }

    /// Appends a marker and what it announces; returns the sector of the latter.
    fn append_table(&self, state: &mut State, kind: u32, bytes: &[u8]) -> Result<u32> {
        let sectors = (bytes.len() as u64).div_ceil(SECTOR);
        let mut start = vec![0; length(SECTOR)];
        put(&mut start, 0, &sectors.to_le_bytes());
        put(&mut start, 12, &kind.to_le_bytes());
        state.buffer.extend(start);
        let sector = self.sector(state)?;
        state.buffer.extend(bytes);
        pad(&mut state.buffer);
        Ok(sector)
    }

    /// The sector that comes next.
    fn sector(&self, state: &State) -> Result<u32> {
        let sector = (state.written_bytes + state.buffer.len() as u64) / SECTOR;
        u32::try_from(sector).map_err(|_| {
            BlockError::unsupported(
                &self.name,
                "is full: a stream-optimized image ends at 2 TiB, because sectors are counted with \
                 32 bits",
            )
        })
    }

    fn write_buffer(&self, state: &mut State) -> Result<()> {
        let end = state.written_bytes + state.buffer.len() as u64;
        if self.file.size_bytes() < end {
            self.file.resize(end)?;
        }
        self.file.write_at(&state.buffer, state.written_bytes)?;
        state.written_bytes = end;
        state.buffer.clear();
        Ok(())
    }

    /// What was appended reaches the medium; a grain that plain writes still fill does not.
    pub(super) fn flush(&self) -> Result<()> {
        let mut state = self.state.lock();
        if self.finished.get().is_none() {
            self.write_buffer(&mut state)?;
        }
        self.file.flush()
    }

    /// Appends the tables that are open, the directory, the footer and the end of the stream.
    pub(super) fn finish(&self) -> Result<()> {
        let mut state = self.state.lock();
        if self.finished.get().is_some() {
            return Ok(());
        }
        let state = &mut *state;
        self.close_grain(state)?;
        self.close_tables(state, self.header.layout().tables())?;
        let bytes: Vec<u8> = state.directory.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        let sector = self.append_table(state, marker::GRAIN_DIRECTORY, &bytes)?;
        // The footer makes it an image: everything else is on the medium before.
        self.write_buffer(state)?;
        self.file.flush()?;
        let footer = HostedHeader { directory_offset: u64::from(sector), ..self.header };
        self.append_table(state, marker::FOOTER, &footer.encode())?;
        state.buffer.extend(vec![0; length(SECTOR)]);
        self.write_buffer(state)?;
        // The file was new, but a device may be larger.
        if self.file.size_bytes() > state.written_bytes {
            self.file.resize(state.written_bytes)?;
        }
        self.file.flush()?;
        let image = VmdkImage::open_device(self.file.clone(), &super::NoFiles, None)?;
        // Only one thread gets here, because of the lock.
        let _ = self.finished.set(image);
        Ok(())
    }
}

fn pad(buffer: &mut Vec<u8>) {
    buffer.resize(buffer.len().next_multiple_of(length(SECTOR)), 0);
}

impl CompressedWriter for StreamWriter {
    fn cluster_bytes(&self) -> u64 {
        self.grain_bytes()
    }

    fn compress(&self, data: &[u8]) -> Result<CompressedCluster> {
        self.deflate(data).map(CompressedCluster::Compressed)
    }

    fn append(&self, offset: u64, cluster: CompressedCluster) -> Result<()> {
        if !offset.is_multiple_of(self.grain_bytes()) || offset >= self.size_bytes() {
            return Err(BlockError::unsupported(
                &self.name,
                format!("no grain begins at byte {offset} of the disk"),
            ));
        }
        let packed = match cluster {
            CompressedCluster::Compressed(packed) => packed,
            // Every grain of a stream is compressed, also where that makes it larger.
            CompressedCluster::Plain(data) => self.deflate(&data)?,
        };
        let mut state = self.state.lock();
        self.check_open()?;
        let grain = offset / self.grain_bytes();
        if state.open.as_ref().is_some_and(|open| open.grain < grain) {
            self.close_grain(&mut state)?;
        }
        self.append_grain(&mut state, grain, &packed)
    }
}
