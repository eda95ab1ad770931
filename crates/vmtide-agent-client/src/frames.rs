//! `application/vnd.vmtide.ranges`: content as frames with checksums, in which zeros take no room.
//!
//! A head of 16 bytes, then frames of a header of 32 bytes and a payload each, the last of which is the end frame;
//! `docs/agent-protocol.md` has every byte. A stream without an end frame is a part, and nothing of a frame is
//! believed before its checksums were found right.

use bytes::{Buf, Bytes, BytesMut};
use thiserror::Error;

/// The media type.
pub const MEDIA_TYPE: &str = "application/vnd.vmtide.ranges";

/// The most content and payload of one frame, in bytes.
pub const MAX_FRAME_BYTES: usize = 1 << 20;

const MAGIC: &[u8; 8] = b"VMTRANGE";
const VERSION: u16 = 1;
const HEAD_BYTES: usize = 16;
const HEADER_BYTES: usize = 32;

const DATA: u8 = 0;
const ZERO: u8 = 1;
const ZSTD: u8 = 2;
const END: u8 = 3;

/// Why a stream cannot be read on.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FrameError {
    /// A checksum does not fit: the same again may go well.
    #[error("{0}")]
    Corrupt(String),
    /// A rule is broken: whoever wrote this does not speak the protocol.
    #[error("{0}")]
    Broken(String),
}

/// A frame whose checksums were right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Content, decompressed.
    Data {
        /// Where on the disk, in bytes.
        offset: u64,
        /// 1 to [`MAX_FRAME_BYTES`] bytes.
        content: Bytes,
    },
    /// Zeros.
    Zero {
        /// Where on the disk, in bytes.
        offset: u64,
        /// How many bytes, at least 1.
        length: u64,
    },
    /// The end.
    End {
        /// The position reached: bytes of content before, with those that were skipped at the beginning.
        position: u64,
    },
}

/// Takes a stream apart as it arrives. Holds at most one frame and what was given last.
#[derive(Debug, Default)]
pub struct FrameReader {
    waiting: BytesMut,
    has_head: bool,
    ended: bool,
}

impl FrameReader {
    /// Before the first byte.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes what arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.waiting.extend_from_slice(bytes);
    }

    /// The next frame; none where more has to arrive, or after the end frame.
    ///
    /// # Errors
    /// [`FrameError`]; the stream is of no more use then.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        if self.ended {
            if self.waiting.is_empty() {
                return Ok(None);
            }
            return Err(FrameError::Broken("bytes after the end frame".into()));
        }
        if !self.has_head {
            let Some(head) = self.waiting.first_chunk::<HEAD_BYTES>() else { return Ok(None) };
            check_head(head)?;
            self.waiting.advance(HEAD_BYTES);
            self.has_head = true;
        }
        let Some(header) = self.waiting.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let header = Header::parse(header)?;
        let whole = HEADER_BYTES + header.payload_bytes;
        if self.waiting.len() < whole {
            self.waiting.reserve(whole - self.waiting.len());
            return Ok(None);
        }
        self.waiting.advance(HEADER_BYTES);
        let payload = self.waiting.split_to(header.payload_bytes).freeze();
        let frame = header.frame(payload)?;
        self.ended = matches!(frame, Frame::End { .. });
        Ok(Some(frame))
    }

    /// Whether the end frame was seen.
    pub const fn is_ended(&self) -> bool {
        self.ended
    }
}

struct Header {
    kind: u8,
    payload_bytes: usize,
    offset: u64,
    content_bytes: u64,
    checksum: u32,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |four| u32::from_le_bytes(*four))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |eight| u64::from_le_bytes(*eight))
}

fn check_head(head: &[u8; HEAD_BYTES]) -> Result<(), FrameError> {
    if !head.starts_with(MAGIC) {
        return Err(FrameError::Broken("this is no stream of frames".into()));
    }
    if u32_at(head, 12) != crc32c::crc32c(&head[..12]) {
        return Err(FrameError::Corrupt("the head of the stream has a wrong checksum".into()));
    }
    let version = u32_at(head, 8);
    if version != u32::from(VERSION) {
        return Err(FrameError::Broken(format!(
            "frames of version {version}, and this reads {VERSION}"
        )));
    }
    Ok(())
}

impl Header {
    fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        if u32_at(bytes, 28) != crc32c::crc32c(&bytes[..28]) {
            return Err(FrameError::Corrupt("the header of a frame has a wrong checksum".into()));
        }
        let [kind, reserved @ ..] = u32_at(bytes, 0).to_le_bytes();
        let header = Self {
            kind,
            payload_bytes: usize::try_from(u32_at(bytes, 4)).unwrap_or(usize::MAX),
            offset: u64_at(bytes, 8),
            content_bytes: u64_at(bytes, 16),
            checksum: u32_at(bytes, 24),
        };
        let content = usize::try_from(header.content_bytes).unwrap_or(usize::MAX);
        let short = |length: usize| (1..=MAX_FRAME_BYTES).contains(&length);
        let fits = match kind {
            DATA => short(content) && header.payload_bytes == content,
            ZSTD => short(content) && short(header.payload_bytes),
            ZERO => content > 0 && header.payload_bytes == 0 && header.checksum == 0,
            END => header.payload_bytes == 0 && header.checksum == 0 && header.offset == 0,
            _ => false,
        };
        if !fits || reserved != [0; 3] || header.offset.checked_add(header.content_bytes).is_none()
        {
            return Err(FrameError::Broken(format!(
                "a frame of kind {kind} with {} bytes of payload and {} of content at byte {}",
                header.payload_bytes, header.content_bytes, header.offset
            )));
        }
        Ok(header)
    }

    fn frame(&self, payload: Bytes) -> Result<Frame, FrameError> {
        let offset = self.offset;
        let content = match self.kind {
            ZERO => return Ok(Frame::Zero { offset, length: self.content_bytes }),
            END => return Ok(Frame::End { position: self.content_bytes }),
            ZSTD => self.decompressed(&payload)?,
            _ => payload,
        };
        if crc32c::crc32c(&content) != self.checksum {
            return Err(FrameError::Corrupt(format!(
                "the content at byte {offset} has a wrong checksum"
            )));
        }
        Ok(Frame::Data { offset, content })
    }

    fn decompressed(&self, payload: &[u8]) -> Result<Bytes, FrameError> {
        // At most a megabyte: checked with the header.
        let length = usize::try_from(self.content_bytes).unwrap_or(0).min(MAX_FRAME_BYTES);
        match zstd::bulk::decompress(payload, length) {
            Ok(content) if content.len() == length => Ok(content.into()),
            _ => Err(FrameError::Corrupt(format!(
                "the content at byte {} does not decompress",
                self.offset
            ))),
        }
    }
}

/// Builds a stream.
#[derive(Debug)]
pub struct FrameWriter {
    bytes: Vec<u8>,
    position: u64,
}

impl FrameWriter {
    /// A stream that begins at position 0, with room for so many bytes.
    pub fn with_capacity(bytes: usize) -> Self {
        let mut writer = Self { bytes: Vec::with_capacity(bytes), position: 0 };
        let mut head = [0; 12];
        head[..8].copy_from_slice(MAGIC);
        head[8..10].copy_from_slice(&VERSION.to_le_bytes());
        writer.bytes.extend_from_slice(&head);
        writer.bytes.extend_from_slice(&crc32c::crc32c(&head).to_le_bytes());
        writer
    }

    /// Adds content, in frames.
    pub fn data(&mut self, offset: u64, content: &[u8]) {
        let mut at = offset;
        for piece in content.chunks(MAX_FRAME_BYTES) {
            let length = u32::try_from(piece.len()).unwrap_or(u32::MAX);
            self.header(DATA, length, at, u64::from(length), crc32c::crc32c(piece));
            self.bytes.extend_from_slice(piece);
            at += u64::from(length);
        }
    }

    /// Adds zeros.
    pub fn zeros(&mut self, offset: u64, length: u64) {
        if length > 0 {
            self.header(ZERO, 0, offset, length, 0);
        }
    }

    /// Adds compressed content, for tests of readers.
    #[cfg(test)]
    pub(crate) fn zstd(&mut self, offset: u64, payload: &[u8], content_bytes: u64, checksum: u32) {
        self.header(
            ZSTD,
            u32::try_from(payload.len()).unwrap_or(0),
            offset,
            content_bytes,
            checksum,
        );
        self.bytes.extend_from_slice(payload);
    }

    /// How many bytes the stream has.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was added yet.
    pub fn is_empty(&self) -> bool {
        self.position == 0
    }

    /// Ends the stream.
    pub fn finish(mut self) -> Vec<u8> {
        let position = self.position;
        self.header(END, 0, 0, position, 0);
        self.bytes
    }

    fn header(
        &mut self,
        kind: u8,
        payload_bytes: u32,
        offset: u64,
        content_bytes: u64,
        checksum: u32,
    ) {
        let mut header = [0; 28];
        header[0] = kind;
        header[4..8].copy_from_slice(&payload_bytes.to_le_bytes());
        header[8..16].copy_from_slice(&offset.to_le_bytes());
        header[16..24].copy_from_slice(&content_bytes.to_le_bytes());
        header[24..28].copy_from_slice(&checksum.to_le_bytes());
        self.bytes.extend_from_slice(&header);
        self.bytes.extend_from_slice(&crc32c::crc32c(&header).to_le_bytes());
        self.position = self.position.saturating_add(content_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(stream: &[u8], step: usize) -> Result<(Vec<Frame>, bool), FrameError> {
        let mut reader = FrameReader::new();
        let mut frames = Vec::new();
        for piece in stream.chunks(step) {
            reader.push(piece);
            while let Some(frame) = reader.next_frame()? {
                frames.push(frame);
            }
        }
        Ok((frames, reader.is_ended()))
    }

    fn stream() -> Vec<u8> {
        let mut writer = FrameWriter::with_capacity(0);
        writer.data(4096, &[7; 300]);
        writer.zeros(1 << 40, 1 << 30);
        writer.data(0, &vec![1; MAX_FRAME_BYTES + 1]);
        writer.finish()
    }

    #[test]
    fn what_is_written_is_read_in_any_pieces() {
        let stream = stream();
        for step in [1, 7, 32, 4096, stream.len()] {
            let (frames, ended) = read(&stream, step).unwrap();
            assert!(ended);
            assert_eq!(frames.len(), 5);
            assert_eq!(frames[0], Frame::Data { offset: 4096, content: Bytes::from(vec![7; 300]) });
            assert_eq!(frames[1], Frame::Zero { offset: 1 << 40, length: 1 << 30 });
            assert_eq!(frames[3], Frame::Data { offset: 1 << 20, content: Bytes::from(vec![1]) });
            assert_eq!(frames[4], Frame::End { position: 300 + (1 << 30) + (1 << 20) + 1 });
        }
        let (_, ended) = read(&stream[..stream.len() - 1], 4096).unwrap();
        assert!(!ended);
    }

    #[test]
    fn compressed_content_is_bounded_and_checked() {
        let content = vec![9; 5000];
        let frame = |payload: &[u8], length: u64, checksum: u32| {
            let mut writer = FrameWriter::with_capacity(0);
            writer.zstd(512, payload, length, checksum);
            read(&writer.finish(), 100)
        };
        let packed = zstd::bulk::compress(&content, 1).unwrap();
        let checksum = crc32c::crc32c(&content);
        let (frames, _) = frame(&packed, 5000, checksum).unwrap();
        assert_eq!(frames[0], Frame::Data { offset: 512, content: content.into() });
        for (length, checksum) in [(4999, checksum), (5001, checksum), (5000, checksum ^ 1)] {
            assert!(
                matches!(frame(&packed, length, checksum), Err(FrameError::Corrupt(_))),
                "{length}"
            );
        }
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
        assert!(matches!(frame(&bomb, MAX_FRAME_BYTES as u64, 0), Err(FrameError::Corrupt(_))));
    }

    #[test]
    fn one_flipped_bit_anywhere_in_a_header_is_noticed() {
        let stream = stream();
        // The head, the first frame's header and content.
        for at in 0..HEAD_BYTES + HEADER_BYTES + 300 {
            for bit in [0, 3, 7] {
                let mut flipped = stream.clone();
                flipped[at] ^= 1 << bit;
                assert!(read(&flipped, 4096).is_err(), "byte {at} bit {bit}");
            }
        }
    }

    #[test]
    fn rules_are_kept() {
        let one = |kind, payload, offset, content, checksum| {
            let mut writer = FrameWriter::with_capacity(0);
            writer.header(kind, payload, offset, content, checksum);
            read(&writer.bytes, 10)
        };
        for (kind, payload, offset, content, checksum) in [
            (DATA, 0, 0, 0, 0),
            (DATA, 5, 0, 6, 0),
            (DATA, (1 << 20) + 1, 0, (1 << 20) + 1, 0),
            (ZSTD, 0, 0, 5, 0),
            (ZSTD, 5, 0, (1 << 20) + 1, 0),
            (ZERO, 0, 0, 0, 0),
            (ZERO, 1, 0, 1, 0),
            (ZERO, 0, 0, 1, 1),
            (ZERO, 0, u64::MAX, 2, 0),
            (END, 1, 0, 0, 0),
            (END, 0, 1, 0, 0),
            (4, 0, 0, 0, 0),
        ] {
            let error = one(kind, payload, offset, content, checksum).unwrap_err();
            assert!(matches!(error, FrameError::Broken(_)), "{kind} {payload}: {error:?}");
        }
        let mut after = stream();
        after.push(0);
        assert_eq!(read(&after, 10), Err(FrameError::Broken("bytes after the end frame".into())));
    }
}
