//! One frame in memory: extents with their data, and the same as it stands in a stream.

use crate::format::{
    EXTENT_BYTES, Encoding, RecordHead, RecordKind, ShortDigest, decode_extents, encode_extents,
    short_digest,
};
use crate::page_buffer::{PageBuffer, begins_page};
use crate::{DeltaError, Result};
use vmtide_block::{ByteRange, Extent, ExtentKind, push_extent};

/// Extents in ascending order, and the data of those that have any, one after the other.
#[derive(Clone, Debug, Default)]
pub(crate) struct Frame {
    pub extents: Vec<Extent>,
    pub data: Vec<u8>,
    pub base_digest: Option<ShortDigest>,
}

impl Frame {
    /// Appends a range that holds `data`.
    pub fn push_data(&mut self, offset: u64, data: &[u8]) {
        push_extent(&mut self.extents, Extent::new(offset, data.len() as u64, ExtentKind::Data));
        self.data.extend_from_slice(data);
    }

    /// Appends a range without data.
    pub fn push_empty(&mut self, range: ByteRange, kind: ExtentKind) {
        push_extent(&mut self.extents, Extent { range, kind });
    }
}

/// Calls `visit` with every extent of a frame and its data, which is empty where it has none.
pub(crate) fn for_each<E>(
    extents: &[Extent],
    data: &[u8],
    mut visit: impl FnMut(Extent, &[u8]) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let mut rest = data;
    for extent in extents {
        let length = match extent.kind {
            ExtentKind::Data => {
                usize::try_from(extent.range.length).unwrap_or(usize::MAX).min(rest.len())
            }
            ExtentKind::Zero | ExtentKind::Unallocated => 0,
        };
        let (data, after) = rest.split_at(length);
        rest = after;
        visit(*extent, data)?;
    }
    Ok(())
}

/// A frame as it stands in a stream.
#[derive(Clone, Debug)]
pub(crate) struct EncodedFrame {
    pub head: RecordHead,
    pub extents: Vec<Extent>,
    /// All that follows the head.
    pub body: Vec<u8>,
}

/// Turns frames into bytes; one for each thread.
pub(crate) struct Encoder {
    compressor: Option<zstd::bulk::Compressor<'static>>,
    scratch: Vec<u8>,
}

impl Encoder {
    /// Compresses at this level of zstd, or not at all.
    pub fn new(level: Option<i32>) -> Result<Self> {
        let compressor = level.map(new_compressor).transpose()?;
        Ok(Self { compressor, scratch: Vec::new() })
    }

    /// Encodes a frame that has extents.
    pub fn encode(&mut self, frame: &Frame) -> Result<EncodedFrame> {
        let compressed = match &mut self.compressor {
            Some(compressor) if !frame.data.is_empty() => {
                self.scratch.clear();
                // No room for more than the data has: what would grow is stored as it is.
                self.scratch.reserve(frame.data.len());
                compressor.compress_to_buffer(&frame.data, &mut self.scratch).is_ok()
                    && self.scratch.len() < frame.data.len()
            }
            _ => false,
        };
        let (encoding, stored) = match compressed {
            true => (Encoding::Zstd, self.scratch.as_slice()),
            false => (Encoding::Plain, frame.data.as_slice()),
        };
        let mut body = Vec::with_capacity(frame.extents.len() * EXTENT_BYTES + stored.len());
        encode_extents(&frame.extents, &mut body);
        body.extend_from_slice(stored);
        let limit = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        let head = RecordHead {
            kind: RecordKind::Frame,
            encoding,
            extent_count: limit(frame.extents.len()),
            stored_bytes: limit(stored.len()),
            first: frame.extents.first().map_or(0, |extent| extent.range.offset),
            end: frame.extents.last().map_or(0, |extent| extent.range.end()),
            data_bytes: frame.data.len() as u64,
            body_digest: short_digest(&[&body]),
            base_digest: frame.base_digest,
        };
        Ok(EncodedFrame { head, extents: frame.extents.clone(), body })
    }
}

fn new_compressor(level: i32) -> Result<zstd::bulk::Compressor<'static>> {
    let failed = |error| DeltaError::io(format!("compress with zstd at level {level}"), error);
    let mut compressor = zstd::bulk::Compressor::new(level).map_err(failed)?;
    // What comes out of a decompressor is then checked as well, end to end.
    compressor.include_checksum(true).map_err(failed)?;
    Ok(compressor)
}

/// Turns the bodies of records back into frames; one for each thread.
pub(crate) struct Decoder {
    decompressor: zstd::bulk::Decompressor<'static>,
}

impl Decoder {
    pub fn new() -> Result<Self> {
        let decompressor = zstd::bulk::Decompressor::new()
            .map_err(|error| DeltaError::io("prepare to decompress with zstd", error))?;
        Ok(Self { decompressor })
    }

    /// Decodes into `frame`. `body` is the body of `head`, whose digest was checked; `limit_bytes` is
    /// the most data that the delta's header allows in a frame, and is checked against the head.
    pub fn decode(
        &mut self,
        head: &RecordHead,
        extents: Vec<Extent>,
        body: &[u8],
        frame: &mut Frame,
    ) -> Result<(), String> {
        frame.extents = extents;
        frame.base_digest = head.base_digest;
        frame.data.clear();
        let stored = stored_part(head, body);
        let length = usize::try_from(head.data_bytes).unwrap_or(usize::MAX);
        match head.encoding {
            Encoding::Plain => frame.data.extend_from_slice(stored),
            Encoding::Zstd => {
                frame.data.reserve(length);
                self.decompressor
                    .decompress_to_buffer(stored, &mut frame.data)
                    .map_err(|error| format!("data that zstd refuses: {error}"))?;
            }
        }
        check_length(frame.data.len(), length)
    }

    /// The data of a frame, beginning at a page: what stands in `body` where that does already, otherwise in
    /// `memory`. As for [`decode`](Self::decode) both were checked.
    pub fn data_at_page<'a>(
        &mut self,
        head: &RecordHead,
        body: &'a [u8],
        memory: &'a mut PageBuffer,
    ) -> Result<&'a [u8], String> {
        let stored = stored_part(head, body);
        let length = usize::try_from(head.data_bytes).unwrap_or(usize::MAX);
        match head.encoding {
            Encoding::Plain => {
                check_length(stored.len(), length)?;
                if begins_page(stored) {
                    return Ok(stored);
                }
                memory.room(0, length).copy_from_slice(stored);
            }
            Encoding::Zstd => {
                let count = self
                    .decompressor
                    .decompress_to_buffer(stored, memory.room(0, length))
                    .map_err(|error| format!("data that zstd refuses: {error}"))?;
                check_length(count, length)?;
            }
        }
        Ok(memory.bytes())
    }
}

fn check_length(found: usize, expected: usize) -> Result<(), String> {
    if found == expected {
        return Ok(());
    }
    Err(format!("{found} bytes of data instead of {expected}"))
}

/// The bytes of a frame's table, which stands before its data.
pub(crate) fn table_bytes(head: &RecordHead) -> usize {
    usize::try_from(head.extent_count).unwrap_or(usize::MAX).saturating_mul(EXTENT_BYTES)
}

fn stored_part<'a>(head: &RecordHead, body: &'a [u8]) -> &'a [u8] {
    body.get(table_bytes(head)..).unwrap_or_default()
}

/// Checks the body of a frame against its head. Answers with the extents.
pub(crate) fn check_body(head: &RecordHead, body: &[u8]) -> Result<Vec<Extent>, String> {
    if body.len() as u64 != head.body_bytes() {
        return Err("a body that is torn".into());
    }
    if short_digest(&[body]) != head.body_digest {
        return Err("a body that does not match its digest".into());
    }
    let table = body.len() - stored_part(head, body).len();
    decode_extents(&body[..table], head)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(noise: bool) -> Frame {
        let mut frame = Frame::default();
        let mut state = 1u32;
        let data: Vec<u8> = (0..70_000)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                if noise { state.to_le_bytes()[3] } else { 5 }
            })
            .collect();
        frame.push_data(4096, &data[..60_000]);
        frame.push_empty(ByteRange::new(1 << 20, 1 << 40), ExtentKind::Zero);
        frame.push_data(2 << 40, &data[60_000..]);
        frame
    }

    #[test]
    fn frames_come_back_as_they_were() {
        for (noise, level) in [(true, Some(1)), (false, Some(1)), (false, None)] {
            let frame = frame(noise);
            let encoded = Encoder::new(level).unwrap().encode(&frame).unwrap();
            let plain = noise || level.is_none();
            assert_eq!(encoded.head.encoding == Encoding::Plain, plain);
            let extents = check_body(&encoded.head, &encoded.body).unwrap();
            let mut back = Frame::default();
            let mut decoder = Decoder::new().unwrap();
            decoder.decode(&encoded.head, extents, &encoded.body, &mut back).unwrap();
            assert_eq!((&back.extents, &back.data), (&frame.extents, &frame.data));
            // From wherever the body stands.
            let mut memory = PageBuffer::default();
            for page_at in [table_bytes(&encoded.head), 1] {
                let mut body = PageBuffer::default();
                body.room(page_at, encoded.body.len()).copy_from_slice(&encoded.body);
                let data = decoder.data_at_page(&encoded.head, body.bytes(), &mut memory).unwrap();
                assert!(begins_page(data) && data == frame.data);
            }
            let mut torn = encoded.body.clone();
            torn.pop();
            check_body(&encoded.head, &torn).unwrap_err();
            let last = torn.len() - 1;
            let mut altered = encoded.body.clone();
            altered[last] ^= 1;
            check_body(&encoded.head, &altered).unwrap_err();
        }
    }
}
