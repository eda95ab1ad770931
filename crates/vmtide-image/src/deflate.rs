//! Deflate of whole buffers, the way disk images use it: one grain or cluster at a time, into a
//! buffer whose size is known. [libdeflate](https://github.com/ebiggers/libdeflate) does that two to
//! three times as fast as a streaming zlib, because it never has to stop in the middle.

use libdeflater::{CompressionLvl, Compressor, DecompressionError, Decompressor};

/// Decompresses; one for each thread at a time.
pub(crate) struct Inflater(Decompressor);

impl Inflater {
    pub(crate) fn new() -> Self {
        Self(Decompressor::new())
    }

    /// Inflates the zlib stream (RFC 1950) at the start of `data` into `target` and returns the
    /// bytes that came out; what follows the stream is not looked at.
    pub(crate) fn zlib(&mut self, data: &[u8], target: &mut [u8]) -> Result<usize, String> {
        let room = target.len();
        self.0.zlib_decompress(data, target).map_err(|error| explain(&error, "zlib", room))
    }

    /// As [`zlib`](Self::zlib) for a raw deflate stream (RFC 1951).
    pub(crate) fn raw(&mut self, data: &[u8], target: &mut [u8]) -> Result<usize, String> {
        let room = target.len();
        self.0.deflate_decompress(data, target).map_err(|error| explain(&error, "deflate", room))
    }
}

fn explain(error: &DecompressionError, what: &str, room: usize) -> String {
    match error {
        DecompressionError::BadData => format!("bad {what} data"),
        DecompressionError::InsufficientSpace => {
            format!("the {what} data is longer than {room} bytes")
        }
    }
}

/// Compresses; one for each thread at a time, because it is a buffer of some hundred kilobytes.
pub(crate) struct Deflater(Compressor);

impl Deflater {
    /// A compressor of this level, 1 to 12; a level out of range is the default one.
    pub(crate) fn new(level: i32) -> Self {
        Self(Compressor::new(CompressionLvl::new(level).unwrap_or_default()))
    }

    /// `data` as a zlib stream.
    pub(crate) fn zlib(&mut self, data: &[u8]) -> Result<Vec<u8>, String> {
        let mut out = vec![0; self.0.zlib_compress_bound(data.len())];
        let count =
            self.0.zlib_compress(data, &mut out).map_err(|error| format!("deflate: {error}"))?;
        out.truncate(count);
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_deflated_is_inflated_and_nothing_else() {
        let data: Vec<u8> = (0..100_000u32).map(|n| (n % 251).to_le_bytes()[0]).collect();
        let mut packed = Deflater::new(6).zlib(&data).unwrap();
        let length = packed.len();
        packed.extend([0; 100]);
        let mut out = vec![0; data.len() + 10];
        let mut inflater = Inflater::new();
        assert_eq!(inflater.zlib(&packed, &mut out), Ok(data.len()));
        assert_eq!(&out[..data.len()], &data[..]);
        assert!(inflater.zlib(&packed, &mut out[..data.len() - 1]).is_err());
        assert!(inflater.zlib(&packed[..length - 5], &mut out).is_err());
        assert!(inflater.zlib(&data, &mut out).is_err());
    }
}
