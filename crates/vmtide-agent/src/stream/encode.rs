//! From parts of a disk to the bytes that are sent, in one buffer.

use super::error::StreamError;
use super::frame::{self, FrameHeader, FrameKind, HEADER_BYTES};
use super::plan::{MAX_PARTS, Part};
use vmtide_block::{AlignedBuffer, BlockDevice, ByteRange, is_zero};

/// The grain at which zeros inside of data are looked for in framed streams. Finer grains find little more,
/// and cost a header each.
const GRAIN_BYTES: usize = 64 << 10;

/// The level of compression of content. Higher ones cost a multiple of the time for a few percent.
const ZSTD_LEVEL: i32 = 1;

/// The form in which content is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// The bytes, concatenated.
    Plain,
    /// Zstd frames of pieces of the bytes, one after the other, which any zstd reader takes for one stream.
    Zstd,
    /// [`frame`]s, compressed where that makes them smaller.
    Ranges {
        /// Whether data frames are compressed.
        compress: bool,
    },
}

impl Encoding {
    /// Whether it is frames with offsets.
    pub const fn is_framed(self) -> bool {
        matches!(self, Self::Ranges { .. })
    }

    /// How long a buffer must be for a piece of `piece_bytes` in the worst case.
    pub(super) fn buffer_bytes(self, piece_bytes: usize) -> usize {
        match self {
            Self::Plain => piece_bytes,
            Self::Zstd => zstd::zstd_safe::compress_bound(piece_bytes),
            Self::Ranges { .. } => piece_bytes + (MAX_PARTS + 2) * HEADER_BYTES,
        }
    }
}

/// Fills buffers for one reader.
pub(super) struct Encoder {
    encoding: Encoding,
    piece_bytes: usize,
    /// Content before it is compressed.
    content: Option<AlignedBuffer>,
    compressor: Option<zstd::bulk::Compressor<'static>>,
}

impl Encoder {
    pub(super) const fn new(encoding: Encoding, piece_bytes: usize) -> Self {
        Self { encoding, piece_bytes, content: None, compressor: None }
    }

    /// Reads `parts` and writes their form into `out`, which is as long as
    /// [`buffer_bytes`](Encoding::buffer_bytes) says; the number of bytes written.
    pub(super) fn encode(
        &mut self,
        device: &dyn BlockDevice,
        parts: &[Part],
        out: &mut [u8],
    ) -> Result<usize, StreamError> {
        match self.encoding {
            Encoding::Plain => read_parts(device, parts, out),
            Encoding::Zstd => {
                let content =
                    self.content.get_or_insert_with(|| AlignedBuffer::new(self.piece_bytes));
                let length = read_parts(device, parts, content)?;
                if length == 0 {
                    return Ok(0);
                }
                let content = content.get(..length).unwrap_or_default();
                compress(&mut self.compressor, content, out).map_err(StreamError::Compress)
            }
            Encoding::Ranges { compress } => {
                let mut at = 0;
                for part in parts {
                    at += self.encode_part(
                        device,
                        *part,
                        compress,
                        out.get_mut(at..).unwrap_or_default(),
                    )?;
                }
                Ok(at)
            }
        }
    }

    fn encode_part(
        &mut self,
        device: &dyn BlockDevice,
        part: Part,
        compress: bool,
        out: &mut [u8],
    ) -> Result<usize, StreamError> {
        match part {
            Part::Head => Ok(put(out, 0, &frame::head())),
            Part::Zero(range) => Ok(put(out, 0, &zero_header(range))),
            Part::End(position) => {
                let kind = FrameKind::End;
                let (payload_bytes, offset, checksum) = (0, 0, 0);
                let header =
                    FrameHeader { kind, payload_bytes, offset, length: position, checksum };
                Ok(put(out, 0, &header.to_bytes()))
            }
            Part::Data(range) if compress => self.compressed_frames(device, range, out),
            Part::Data(range) => data_frames(device, range, out),
        }
    }

    /// The frames of one range, each compressed where that makes it smaller.
    fn compressed_frames(
        &mut self,
        device: &dyn BlockDevice,
        range: ByteRange,
        out: &mut [u8],
    ) -> Result<usize, StreamError> {
        let content = self.content.get_or_insert_with(|| AlignedBuffer::new(self.piece_bytes));
        let content = slice(content, length_of(range))?;
        device.read_at(content, range.offset)?;
        let mut at = 0;
        for (run, zero) in runs(content) {
            let offset = range.offset + run.start as u64;
            let data = content.get(run).unwrap_or_default();
            if zero {
                at += put(out, at, &zero_header(ByteRange::new(offset, data.len() as u64)));
                continue;
            }
            // Room for less than the content: what does not fit is not worth it.
            let room = at + HEADER_BYTES..at + HEADER_BYTES + data.len().saturating_sub(1);
            let payload = out.get_mut(room).unwrap_or_default();
            let packed = compress(&mut self.compressor, data, payload).ok();
            let header = FrameHeader {
                kind: if packed.is_some() { FrameKind::Zstd } else { FrameKind::Data },
                payload_bytes: u32_of(packed.unwrap_or(data.len())),
                offset,
                length: data.len() as u64,
                checksum: crc32c::crc32c(data),
            };
            at += put(out, at, &header.to_bytes());
            at += match packed {
                Some(length) => length,
                None => put(out, at, data),
            };
        }
        Ok(at)
    }
}

/// The data of all parts, one after the other.
fn read_parts(
    device: &dyn BlockDevice,
    parts: &[Part],
    out: &mut [u8],
) -> Result<usize, StreamError> {
    let mut at = 0;
    for part in parts {
        if let Part::Data(range) = part {
            let length = length_of(*range);
            device.read_at(slice(out.get_mut(at..).unwrap_or_default(), length)?, range.offset)?;
            at += length;
        }
    }
    Ok(at)
}

/// The frames of one range, read right to where it is sent from: the payload of a single frame stays where it
/// was read. Where there are zeros in it, what comes after them moves up; a header fits into every run of
/// zeros but the last, which has room after it.
fn data_frames(
    device: &dyn BlockDevice,
    range: ByteRange,
    out: &mut [u8],
) -> Result<usize, StreamError> {
    let length = length_of(range);
    let content = slice(out.get_mut(HEADER_BYTES..).unwrap_or_default(), length)?;
    device.read_at(content, range.offset)?;
    // At most 16 runs, as a piece is at most a megabyte.
    let runs: Vec<_> = runs(content).collect();
    let mut at = 0;
    for (run, zero) in runs {
        let offset = range.offset + run.start as u64;
        if zero {
            at += put(out, at, &zero_header(ByteRange::new(offset, run.len() as u64)));
            continue;
        }
        let read_at = HEADER_BYTES + run.start..HEADER_BYTES + run.end;
        if read_at.start != at + HEADER_BYTES && read_at.end <= out.len() {
            out.copy_within(read_at, at + HEADER_BYTES);
        }
        let payload = at + HEADER_BYTES..at + HEADER_BYTES + run.len();
        let header = FrameHeader {
            kind: FrameKind::Data,
            payload_bytes: u32_of(run.len()),
            offset,
            length: run.len() as u64,
            checksum: crc32c::crc32c(out.get(payload).unwrap_or_default()),
        };
        at += put(out, at, &header.to_bytes()) + run.len();
    }
    Ok(at)
}

/// The runs of zeros and of others in `content`, at grains.
fn runs(content: &[u8]) -> impl Iterator<Item = (std::ops::Range<usize>, bool)> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        let mut grains = content.get(at..)?.chunks(GRAIN_BYTES);
        let first = grains.next()?;
        let zero = is_zero(first);
        let same = grains.take_while(|grain| is_zero(grain) == zero).map(<[u8]>::len);
        let run = at..at + first.len() + same.sum::<usize>();
        at = run.end;
        Some((run, zero))
    })
}

fn zero_header(range: ByteRange) -> [u8; HEADER_BYTES] {
    let ByteRange { offset, length } = range;
    let (kind, payload_bytes, checksum) = (FrameKind::Zero, 0, 0);
    FrameHeader { kind, payload_bytes, offset, length, checksum }.to_bytes()
}

/// Compresses with a compressor that is made when it is first needed.
fn compress(
    compressor: &mut Option<zstd::bulk::Compressor<'static>>,
    content: &[u8],
    out: &mut [u8],
) -> std::io::Result<usize> {
    let compressor = match compressor {
        Some(compressor) => compressor,
        empty => empty.insert(zstd::bulk::Compressor::new(ZSTD_LEVEL)?),
    };
    compressor.compress_to_buffer(content, out)
}

/// Copies `bytes` to `at`; their length. What would not fit is a mistake of the plan, which the checksums show.
fn put(out: &mut [u8], at: usize, bytes: &[u8]) -> usize {
    if let Some(place) = out.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
    bytes.len()
}

/// The first `length` bytes.
fn slice(memory: &mut [u8], length: usize) -> Result<&mut [u8], StreamError> {
    let room = memory.len() as u64;
    memory
        .get_mut(..length)
        .ok_or(StreamError::WrongLength { sent_bytes: room, expected_bytes: length as u64 })
}

fn length_of(range: ByteRange) -> usize {
    usize::try_from(range.length).unwrap_or(usize::MAX)
}

fn u32_of(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::frame::{Frame, FrameReader};
    use super::*;
    use proptest::prelude::*;
    use vmtide_block::MemoryDevice;

    const PIECE: usize = 256 << 10;

    /// Encodes and decodes `parts`; what the frames say, laid out like the disk, and how long they were.
    fn through_frames(disk: &[u8], ranges: &[ByteRange], compress: bool) -> (Vec<u8>, usize) {
        let device = MemoryDevice::from_bytes(disk.to_vec());
        let encoding = Encoding::Ranges { compress };
        let mut parts = vec![Part::Head];
        parts.extend(ranges.iter().map(|range| Part::Data(*range)));
        parts.push(Part::End(ranges.iter().map(|range| range.length).sum()));
        let mut out = vec![0xEE; encoding.buffer_bytes(PIECE)];
        let mut encoder = Encoder::new(encoding, PIECE);
        let length = encoder.encode(&device, &parts, &mut out).unwrap();
        let mut reader = FrameReader::new(&out[..length], 0).unwrap();
        let mut got = vec![0xAA; disk.len()];
        loop {
            match reader.next_frame().unwrap() {
                Frame::Data { offset, content } => {
                    let at = usize::try_from(offset).unwrap();
                    got[at..at + content.len()].copy_from_slice(content);
                }
                Frame::Zero(range) => {
                    let at = usize::try_from(range.offset).unwrap();
                    got[at..at + length_of(range)].fill(0);
                }
                Frame::End(_) => return (got, length),
            }
        }
    }

    fn expected(disk: &[u8], ranges: &[ByteRange]) -> Vec<u8> {
        let mut expected = vec![0xAA; disk.len()];
        for range in ranges {
            let at = usize::try_from(range.offset).unwrap();
            expected[at..at + length_of(*range)].copy_from_slice(&disk[at..at + length_of(*range)]);
        }
        expected
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn frames_say_what_the_disk_holds(
            grains in prop::collection::vec(0..3u8, 6), tail in 1..GRAIN_BYTES, start in 0..5000usize,
            compress: bool,
        ) {
            let mut disk = vec![0u8; 6 * GRAIN_BYTES];
            for (grain, kind) in disk.chunks_mut(GRAIN_BYTES).zip(grains) {
                let mut seed = 1u32;
                grain.fill_with(|| match kind {
                    0 => 0,
                    1 => 7,
                    _ => {
                        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                        seed.to_le_bytes()[3]
                    }
                });
            }
            let ranges = [
                ByteRange::new(start as u64, (2 * GRAIN_BYTES + tail) as u64),
                ByteRange::new(4 * GRAIN_BYTES as u64, 512),
                ByteRange::new((5 * GRAIN_BYTES + 512) as u64, 1),
            ];
            let (got, _) = through_frames(&disk, &ranges, compress);
            prop_assert!(got == expected(&disk, &ranges));
        }
    }

    #[test]
    fn zeros_are_headers_and_compression_is_used_where_it_helps() {
        let whole = [ByteRange::new(0, PIECE as u64)];
        let overhead = 16 + 2 * HEADER_BYTES;
        assert_eq!(through_frames(&vec![0; PIECE], &whole, false).1, overhead);
        assert_eq!(through_frames(&vec![1; PIECE], &whole, false).1, overhead + PIECE);
        assert!(through_frames(&vec![1; PIECE], &whole, true).1 < overhead + 1000);
    }

    #[test]
    fn compressed_pieces_are_one_zstd_stream() {
        let disk: Vec<u8> = (0..PIECE).map(|at| u8::try_from(at % 251).unwrap()).collect();
        let device = MemoryDevice::from_bytes(disk.clone());
        let mut encoder = Encoder::new(Encoding::Zstd, PIECE);
        let mut stream = Vec::new();
        for at in [0, PIECE / 2] {
            let parts = [Part::Data(ByteRange::new(at as u64, PIECE as u64 / 2))];
            let mut out = vec![0; Encoding::Zstd.buffer_bytes(PIECE)];
            let length = encoder.encode(&device, &parts, &mut out).unwrap();
            stream.extend_from_slice(&out[..length]);
        }
        assert!(zstd::decode_all(&stream[..]).unwrap() == disk);
    }
}
