//! Requests of any offset and length over a medium that takes whole sectors only.
//!
//! A virtual disk read through its handle, or through its physical drive, takes offsets, lengths and, depending
//! on the storage below, addresses in memory that are multiples of the sector. A request that has all three
//! right goes to the medium as it is. Others go through an aligned buffer: reads are rounded outward; writes
//! read the sectors that they only touch, alone, so that what others write into these sectors meanwhile is kept.

use std::sync::{PoisonError, RwLock};
use vmtide_block::{AlignedBuffer, BlockError, ByteRange, Result};

/// The most that goes through an aligned buffer at once, in bytes: bounds memory per request.
const BOUNCE_BYTES: u64 = 1 << 20;

/// A medium that takes whole sectors.
pub trait SectorIo: Send + Sync {
    /// Fills `buffer` from `offset`; both are multiples of the sector, and so is the buffer's address.
    ///
    /// # Errors
    /// What the medium says.
    fn read_sectors(&self, buffer: &mut [u8], offset: u64) -> Result<()>;

    /// Writes all of `data` at `offset`; aligned as above.
    ///
    /// # Errors
    /// What the medium says.
    fn write_sectors(&self, data: &[u8], offset: u64) -> Result<()>;
}

/// Requests of any offset and length over `T`.
#[derive(Debug)]
pub struct SectorDevice<T> {
    io: T,
    sector_bytes: u32,
    size_bytes: u64,
    /// Held alone by writes that begin or end inside a sector, from its reading to its writing; together by all others.
    writes: RwLock<()>,
}

impl<T: SectorIo> SectorDevice<T> {
    /// Over `io`, of `size_bytes`, which are whole sectors of `sector_bytes`; `name` is for the error.
    ///
    /// # Errors
    /// [`BlockError::Unsupported`] for sectors of another size than 512 and 4096, and for sizes that are not
    /// whole sectors.
    pub fn new(io: T, name: &str, size_bytes: u64, sector_bytes: u32) -> Result<Self> {
        let whole = size_bytes.is_multiple_of(u64::from(sector_bytes.max(1)));
        if !matches!(sector_bytes, 512 | 4096) || !whole {
            let detail = format!("{size_bytes} bytes in sectors of {sector_bytes}");
            return Err(BlockError::unsupported(name, detail));
        }
        Ok(Self { io, sector_bytes, size_bytes, writes: RwLock::new(()) })
    }

    /// The medium.
    pub fn io(&self) -> &T {
        &self.io
    }

    /// The size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The sector in bytes.
    pub fn sector_bytes(&self) -> u32 {
        self.sector_bytes
    }

    fn sector(&self) -> u64 {
        u64::from(self.sector_bytes)
    }

    fn is_aligned(&self, bytes: &[u8], offset: u64) -> bool {
        let address = bytes.as_ptr().addr() as u64;
        (offset | bytes.len() as u64 | address).is_multiple_of(self.sector())
    }

    /// Fills `buffer` from `offset`. The range must lie inside the device.
    ///
    /// # Errors
    /// What the medium says.
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        if buffer.is_empty() {
            return Ok(());
        }
        if self.is_aligned(buffer, offset) {
            return self.io.read_sectors(buffer, offset);
        }
        let window = self.window(offset, buffer.len());
        let mut bounce = AlignedBuffer::new(as_length(window.length.min(BOUNCE_BYTES)));
        for piece in pieces(window) {
            let Some(bounce) = bounce.get_mut(..as_length(piece.length)) else { continue };
            self.io.read_sectors(bounce, piece.offset)?;
            let (wanted, from) = overlap(piece, offset, buffer.len());
            if let (Some(target), Some(source)) = (buffer.get_mut(wanted), bounce.get(from)) {
                target.copy_from_slice(source);
            }
        }
        Ok(())
    }

    /// Writes all of `data` at `offset`. The range must lie inside the device.
    ///
    /// # Errors
    /// What the medium says.
    pub fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let partial = !(offset | data.len() as u64).is_multiple_of(self.sector());
        let (_alone, _together) = match partial {
            true => (Some(self.writes.write().unwrap_or_else(PoisonError::into_inner)), None),
            false => (None, Some(self.writes.read().unwrap_or_else(PoisonError::into_inner))),
        };
        if self.is_aligned(data, offset) {
            return self.io.write_sectors(data, offset);
        }
        let window = self.window(offset, data.len());
        let mut bounce = AlignedBuffer::new(as_length(window.length.min(BOUNCE_BYTES)));
        for piece in pieces(window) {
            let Some(bounce) = bounce.get_mut(..as_length(piece.length)) else { continue };
            self.fill_edges(bounce, piece, ByteRange::new(offset, data.len() as u64))?;
            let (wanted, to) = overlap(piece, offset, data.len());
            if let (Some(source), Some(target)) = (data.get(wanted), bounce.get_mut(to)) {
                target.copy_from_slice(source);
            }
            self.io.write_sectors(bounce, piece.offset)?;
        }
        Ok(())
    }

    /// Reads the first and the last sector of a piece where the write does not cover them.
    fn fill_edges(&self, bounce: &mut [u8], piece: ByteRange, write: ByteRange) -> Result<()> {
        let sector = as_length(self.sector());
        if piece.offset < write.offset
            && let Some(first) = bounce.get_mut(..sector)
        {
            self.io.read_sectors(first, piece.offset)?;
        }
        if piece.end() > write.end() {
            let start = bounce.len().saturating_sub(sector);
            if let Some(last) = bounce.get_mut(start..) {
                self.io.read_sectors(last, piece.end() - self.sector())?;
            }
        }
        Ok(())
    }

    fn window(&self, offset: u64, length: usize) -> ByteRange {
        ByteRange::new(offset, length as u64).align_outward(self.sector(), self.size_bytes)
    }
}

/// A length that is at most [`BOUNCE_BYTES`] or a sector.
fn as_length(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

fn pieces(window: ByteRange) -> impl Iterator<Item = ByteRange> {
    let mut at = window.offset;
    std::iter::from_fn(move || {
        let piece = ByteRange::from_bounds(at, at.saturating_add(BOUNCE_BYTES).min(window.end()));
        at = piece.end();
        (!piece.is_empty()).then_some(piece)
    })
}

/// Which bytes of the request `offset .. offset + length`, and which of the piece, are in both.
fn overlap(
    piece: ByteRange,
    offset: u64,
    length: usize,
) -> (std::ops::Range<usize>, std::ops::Range<usize>) {
    let both = piece.intersect(&ByteRange::new(offset, length as u64));
    let within = |start: u64| {
        let from = as_length(both.offset.saturating_sub(start));
        from..from.saturating_add(as_length(both.length))
    };
    (within(offset), within(piece.offset))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Mutex;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;

    /// One sector whose first reader says so and gives others time to write.
    struct Slow {
        bytes: Mutex<Vec<u8>>,
        reading: Mutex<Option<Sender<()>>>,
    }

    impl SectorIo for Slow {
        fn read_sectors(&self, buffer: &mut [u8], _: u64) -> Result<()> {
            buffer.copy_from_slice(&self.bytes.lock().unwrap());
            if let Some(reading) = self.reading.lock().unwrap().take() {
                reading.send(()).unwrap();
                std::thread::sleep(Duration::from_millis(200));
            }
            Ok(())
        }

        fn write_sectors(&self, data: &[u8], _: u64) -> Result<()> {
            self.bytes.lock().unwrap().copy_from_slice(data);
            Ok(())
        }
    }

    #[test]
    fn a_part_of_a_sector_does_not_undo_a_whole_one() {
        let (sender, reading): (Sender<()>, Receiver<()>) = channel();
        let io = Slow { bytes: Mutex::new(vec![0; 512]), reading: Mutex::new(Some(sender)) };
        let device = SectorDevice::new(io, "slow", 512, 512).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| device.write(&[1; 16], 0).unwrap());
            reading.recv().unwrap();
            device.write(&[2; 512], 0).unwrap();
        });
        // The part came first or last; what it does not cover is the whole one's in any case.
        assert!(device.io().bytes.lock().unwrap()[16..].iter().all(|byte| *byte == 2));
    }

    /// Bytes in memory that refuse what is not whole, aligned sectors.
    struct Strict {
        bytes: Mutex<Vec<u8>>,
        sector: u64,
    }

    impl Strict {
        fn check(&self, bytes: &[u8], offset: u64) -> std::ops::Range<usize> {
            let address = bytes.as_ptr().addr() as u64;
            assert!((offset | bytes.len() as u64 | address).is_multiple_of(self.sector));
            assert!(!bytes.is_empty());
            let from = usize::try_from(offset).unwrap();
            from..from + bytes.len()
        }
    }

    impl SectorIo for Strict {
        fn read_sectors(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
            let at = self.check(buffer, offset);
            buffer.copy_from_slice(&self.bytes.lock().unwrap()[at]);
            Ok(())
        }

        fn write_sectors(&self, data: &[u8], offset: u64) -> Result<()> {
            let at = self.check(data, offset);
            self.bytes.lock().unwrap()[at].copy_from_slice(data);
            Ok(())
        }
    }

    const SIZE: usize = 3 << 20;

    fn device(sector_bytes: u32) -> SectorDevice<Strict> {
        let bytes = (0..SIZE).map(|at| u8::try_from(at % 251).unwrap()).collect();
        let io = Strict { bytes: Mutex::new(bytes), sector: u64::from(sector_bytes) };
        SectorDevice::new(io, "strict", SIZE as u64, sector_bytes).unwrap()
    }

    /// Places near sectors, near the size of the buffer, and anywhere.
    fn any_range() -> impl Strategy<Value = (usize, usize)> {
        let near = prop_oneof![Just(0), Just(4096), Just(1 << 20), Just(2 << 20), 0..SIZE];
        let length = prop_oneof![1..2000usize, Just(4096), Just(1 << 20), 0..SIZE];
        (near, 0..3usize, length).prop_map(|(at, off, length)| {
            let start = (at + off).min(SIZE);
            (start, length.min(SIZE - start))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn any_request_is_as_if_there_were_no_sectors(
            big in any::<bool>(),
            requests in prop::collection::vec((any_range(), any::<u8>(), 0..2usize), 1..6),
        ) {
            let device = device(if big { 4096 } else { 512 });
            let mut model = device.io().bytes.lock().unwrap().clone();
            for ((start, length), fill, shift) in requests {
                let mut memory = AlignedBuffer::new(length + shift);
                memory.fill(fill);
                device.write(&memory[shift..], start as u64).unwrap();
                model[start..start + length].fill(fill);
                let read_from = start.saturating_sub(777);
                let mut read = vec![0; (length + 1999).min(SIZE - read_from)];
                device.read(&mut read, read_from as u64).unwrap();
                prop_assert!(read == model[read_from..read_from + read.len()]);
            }
            prop_assert!(*device.io().bytes.lock().unwrap() == model);
        }
    }

    #[test]
    fn two_writers_in_one_sector_keep_both() {
        let device = device(4096);
        std::thread::scope(|scope| {
            for writer in 0..4u64 {
                let device = &device;
                scope.spawn(move || {
                    for round in 0..200u64 {
                        let byte = u8::try_from(writer).unwrap();
                        device.write(&[byte; 16], round * 64 + writer * 16).unwrap();
                    }
                });
            }
        });
        let bytes = device.io().bytes.lock().unwrap();
        for (at, byte) in bytes.iter().enumerate().take(200 * 64) {
            assert_eq!(usize::from(*byte), at / 16 % 4, "byte {at}");
        }
    }

    #[test]
    fn sizes_that_are_not_whole_sectors_are_refused() {
        for (size, sector) in [(4608, 4096), (513, 512), (4096, 0), (4096, 1024)] {
            let io = Strict { bytes: Mutex::default(), sector: 512 };
            assert!(SectorDevice::new(io, "strict", size, sector).is_err(), "{size} {sector}");
        }
    }
}
