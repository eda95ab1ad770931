//! `application/vnd.vmtide.ranges`: content in frames that say where they belong and prove that they are whole.
//!
//! Byte for byte in `docs/agent-protocol.md`. The reader here takes what clients send for writing; its bytes are
//! hostile: it never holds more than one frame, and believes no length before it was checked.

use std::io::Read;
use thiserror::Error;
use vmtide_block::{AlignedBuffer, ByteRange};

/// The media type of framed content.
pub const CONTENT_TYPE: &str = "application/vnd.vmtide.ranges";

/// Bytes of the head of a stream.
pub const HEAD_BYTES: usize = 16;

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 32;

/// The most content of a data or zstd frame, and the most payload of any: what a reader has to hold in memory.
pub const MAX_CONTENT_BYTES: usize = 1 << 20;

const MAGIC: &[u8; 8] = b"VMTRANGE";
const VERSION: u16 = 1;

/// Why a framed stream is refused.
#[derive(Debug, Error)]
pub enum FrameError {
    /// It could not be received to its end.
    #[error("the stream ended before its end frame: {0}")]
    Receive(#[from] std::io::Error),
    /// A rule of the format is broken.
    #[error("frame {number}: {what}")]
    Damaged {
        /// Which frame, from 1; 0 is the head of the stream.
        number: u64,
        /// Which rule.
        what: &'static str,
    },
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// The payload is the content.
    Data,
    /// The content is zeros, and there is no payload.
    Zero,
    /// The payload is a zstd frame of the content.
    Zstd,
    /// The last frame; its length is the position reached.
    End,
}

/// The header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// What follows.
    pub kind: FrameKind,
    /// Bytes of the payload.
    pub payload_bytes: u32,
    /// Where on the disk the content belongs.
    pub offset: u64,
    /// Bytes of content; in an end frame the position.
    pub length: u64,
    /// CRC-32C of the content; 0 where there is no payload.
    pub checksum: u32,
}

/// The head of a stream.
pub fn head() -> [u8; HEAD_BYTES] {
    let mut bytes = [0; HEAD_BYTES];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
    let checksum = crc32c::crc32c(&bytes[..12]);
    bytes[12..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

impl FrameHeader {
    /// The header as it is sent.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = match self.kind {
            FrameKind::Data => 0,
            FrameKind::Zero => 1,
            FrameKind::Zstd => 2,
            FrameKind::End => 3,
        };
        bytes[4..8].copy_from_slice(&self.payload_bytes.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.offset.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.length.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.checksum.to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[..28]);
        bytes[28..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads a header, and refuses one that breaks a rule of its kind.
    ///
    /// # Errors
    /// The rule.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, &'static str> {
        if crc32c::crc32c(&bytes[..28]) != u32_at(bytes, 28) {
            return Err("the checksum of its header is wrong");
        }
        let kind = match bytes[0] {
            0 => FrameKind::Data,
            1 => FrameKind::Zero,
            2 => FrameKind::Zstd,
            3 => FrameKind::End,
            _ => return Err("its kind is not known"),
        };
        let header = Self {
            kind,
            payload_bytes: u32_at(bytes, 4),
            offset: u64_at(bytes, 8),
            length: u64_at(bytes, 16),
            checksum: u32_at(bytes, 24),
        };
        if bytes[1..4] != [0; 3] {
            return Err("reserved bytes are not 0");
        }
        header.check().map(|()| header)
    }

    fn check(&self) -> Result<(), &'static str> {
        const MOST: u64 = MAX_CONTENT_BYTES as u64;
        let payload = u64::from(self.payload_bytes);
        let sound = match self.kind {
            FrameKind::Data => payload == self.length && (1..=MOST).contains(&payload),
            FrameKind::Zstd => (1..=MOST).contains(&payload) && (1..=MOST).contains(&self.length),
            FrameKind::Zero => payload == 0 && self.length > 0 && self.checksum == 0,
            FrameKind::End => payload == 0 && self.offset == 0 && self.checksum == 0,
        };
        if !sound {
            return Err("its lengths or its checksum do not fit its kind");
        }
        match self.offset.checked_add(self.length) {
            Some(_) => Ok(()),
            None => Err("it leaves the range of offsets"),
        }
    }
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(value)
}

fn u64_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

/// A frame whose checksum was right.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// This content belongs at this offset.
    Data {
        /// Where on the disk.
        offset: u64,
        /// What.
        content: &'a [u8],
    },
    /// This range is zeros.
    Zero(ByteRange),
    /// The stream is whole, and reached this position.
    End(u64),
}

/// Reads frames one by one.
pub struct FrameReader<R> {
    source: R,
    position: u64,
    number: u64,
    payload: Vec<u8>,
    content: AlignedBuffer,
    decompressor: Option<zstd::bulk::Decompressor<'static>>,
}

impl<R: Read> FrameReader<R> {
    /// Reads the head of a stream whose first content is at position `from`.
    ///
    /// # Errors
    /// [`FrameError::Damaged`] where this is another format or version, [`FrameError::Receive`].
    pub fn new(mut source: R, from: u64) -> Result<Self, FrameError> {
        let mut bytes = [0; HEAD_BYTES];
        source.read_exact(&mut bytes)?;
        if bytes != head() {
            let what = "this is not a stream of ranges of version 1";
            return Err(FrameError::Damaged { number: 0, what });
        }
        Ok(Self {
            source,
            position: from,
            number: 0,
            payload: Vec::new(),
            content: AlignedBuffer::new(MAX_CONTENT_BYTES),
            decompressor: None,
        })
    }

    /// The position after the last frame that was read.
    pub const fn position(&self) -> u64 {
        self.position
    }

    /// Succeeds where the source ends after the end frame.
    ///
    /// # Errors
    /// [`FrameError::Damaged`] where something follows, [`FrameError::Receive`].
    pub fn expect_nothing_more(&mut self) -> Result<(), FrameError> {
        let mut byte = [0];
        loop {
            match self.source.read(&mut byte) {
                Ok(0) => return Ok(()),
                Ok(_) => {
                    let what = "something follows the end frame";
                    return Err(FrameError::Damaged { number: self.number, what });
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The next frame. After [`Frame::End`] there is none.
    ///
    /// # Errors
    /// [`FrameError`]; nothing of a frame that is not sound is ever handed out.
    pub fn next_frame(&mut self) -> Result<Frame<'_>, FrameError> {
        self.number += 1;
        let number = self.number;
        let damaged = |what| FrameError::Damaged { number, what };
        let mut bytes = [0; HEADER_BYTES];
        self.source.read_exact(&mut bytes)?;
        let header = FrameHeader::parse(&bytes).map_err(damaged)?;
        if header.kind == FrameKind::End {
            return match header.length == self.position {
                true => Ok(Frame::End(self.position)),
                false => Err(damaged("the end is not where the frames before it end")),
            };
        }
        let position = self.position.checked_add(header.length);
        self.position = position.ok_or_else(|| damaged("the position is too large"))?;
        if header.kind == FrameKind::Zero {
            return Ok(Frame::Zero(ByteRange::new(header.offset, header.length)));
        }
        let length = usize::try_from(header.length).unwrap_or(usize::MAX);
        let space =
            self.content.get_mut(..length).ok_or_else(|| damaged("its content is too long"))?;
        if header.kind == FrameKind::Data {
            self.source.read_exact(space)?;
        } else {
            self.payload.resize(usize::try_from(header.payload_bytes).unwrap_or_default(), 0);
            self.source.read_exact(&mut self.payload)?;
            let decompressor = match &mut self.decompressor {
                Some(decompressor) => decompressor,
                empty => empty.insert(zstd::bulk::Decompressor::new()?),
            };
            match decompressor.decompress_to_buffer(&self.payload, space) {
                Ok(filled) if filled == length => {}
                _ => return Err(damaged("its content does not decompress to its length")),
            }
        }
        if crc32c::crc32c(space) != header.checksum {
            return Err(damaged("the checksum of its content is wrong"));
        }
        Ok(Frame::Data { offset: header.offset, content: space })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn data_frame(offset: u64, content: &[u8]) -> Vec<u8> {
        let header = FrameHeader {
            kind: FrameKind::Data,
            payload_bytes: u32::try_from(content.len()).unwrap(),
            offset,
            length: content.len() as u64,
            checksum: crc32c::crc32c(content),
        };
        [&header.to_bytes()[..], content].concat()
    }

    fn bare(kind: FrameKind, offset: u64, length: u64) -> Vec<u8> {
        FrameHeader { kind, payload_bytes: 0, offset, length, checksum: 0 }.to_bytes().to_vec()
    }

    /// Everything of a stream, and how it ended.
    fn read_all(stream: &[u8]) -> Result<Vec<(u64, Vec<u8>)>, FrameError> {
        let mut reader = FrameReader::new(stream, 0)?;
        let mut got = Vec::new();
        loop {
            match reader.next_frame()? {
                Frame::Data { offset, content } => got.push((offset, content.to_vec())),
                Frame::Zero(range) => got.push((range.offset, Vec::new())),
                Frame::End(_) => return Ok(got),
            }
        }
    }

    #[test]
    fn checksums_are_those_of_the_document() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(&head()[..12], b"VMTRANGE\x01\0\0\0");
        assert_eq!(bare(FrameKind::Zero, 0x0102, 3)[..24], {
            let mut expected = [0u8; 24];
            (expected[0], expected[8], expected[9], expected[16]) = (1, 2, 1, 3);
            expected
        });
    }

    fn sound_stream() -> Vec<u8> {
        let content = vec![7u8; 5000];
        let payload = zstd::bulk::compress(&content, 1).unwrap();
        let compressed = FrameHeader {
            kind: FrameKind::Zstd,
            payload_bytes: u32::try_from(payload.len()).unwrap(),
            offset: 1 << 40,
            length: 5000,
            checksum: crc32c::crc32c(&content),
        };
        let mut stream = head().to_vec();
        stream.extend(data_frame(512, b"content"));
        stream.extend(bare(FrameKind::Zero, 4096, 1 << 30));
        stream.extend(compressed.to_bytes());
        stream.extend(payload);
        stream.extend(bare(FrameKind::End, 0, 7 + (1 << 30) + 5000));
        stream
    }

    #[test]
    fn a_stream_is_read_whole() {
        let got = read_all(&sound_stream()).unwrap();
        assert_eq!(got[0], (512, b"content".to_vec()));
        assert_eq!((got[1].0, got[2].0, got[2].1.len()), (4096, 1 << 40, 5000));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let stream = sound_stream();
        for at in 0..stream.len() {
            for bit in [0, 3, 7] {
                let mut bad = stream.clone();
                bad[at] ^= 1 << bit;
                assert!(read_all(&bad).is_err(), "bit {bit} of byte {at}");
            }
            assert!(matches!(read_all(&stream[..at]), Err(FrameError::Receive(_))), "{at}");
        }
    }

    #[test]
    fn headers_that_break_a_rule_are_refused() {
        let header = |kind, payload_bytes, offset, length, checksum| {
            let header = FrameHeader { kind, payload_bytes, offset, length, checksum };
            FrameHeader::parse(&header.to_bytes())
        };
        assert!(header(FrameKind::Data, 1 << 20, 0, 1 << 20, 0).is_ok());
        assert!(header(FrameKind::Data, (1 << 20) + 1, 0, (1 << 20) + 1, 0).is_err());
        assert!(header(FrameKind::Data, 0, 0, 0, 0).is_err());
        assert!(header(FrameKind::Data, 5, 0, 6, 0).is_err());
        assert!(header(FrameKind::Data, 5, u64::MAX - 4, 5, 0).is_err());
        assert!(header(FrameKind::Zstd, 0, 0, 6, 0).is_err());
        assert!(header(FrameKind::Zstd, u32::MAX, 0, 6, 0).is_err());
        assert!(header(FrameKind::Zstd, 6, 0, 1 << 40, 0).is_err());
        assert!(header(FrameKind::Zero, 0, 5, 0, 0).is_err());
        assert!(header(FrameKind::Zero, 0, 5, 1, 1).is_err());
        assert!(header(FrameKind::Zero, 1, 5, 1, 0).is_err());
        assert!(header(FrameKind::End, 0, 1, 1, 0).is_err());
    }

    proptest! {
        #[test]
        fn bytes_of_any_kind_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read_all(&bytes);
            let mut stream = head().to_vec();
            stream.extend(bytes);
            let _ = read_all(&stream);
        }
    }
}
