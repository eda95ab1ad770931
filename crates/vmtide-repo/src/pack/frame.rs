//! Compressing and decompressing frames. One encoder or decoder per worker: each keeps zstd's
//! working memory, which is far costlier to make than a frame is to compress.

use super::Compression;
use crate::{RepoError, Result};
use zstd::bulk::{Compressor, Decompressor};

/// Compresses frames at one level.
pub(crate) struct FrameEncoder {
    compressor: Compressor<'static>,
}

impl FrameEncoder {
    /// An encoder at zstd level `level`.
    pub(crate) fn new(level: i32) -> Result<Self> {
        let compressor = Compressor::new(level)
            .map_err(|error| RepoError::Invalid(format!("compression level {level}: {error}")))?;
        Ok(Self { compressor })
    }

    /// Puts the stored form of `content` into `out`, replacing what it held: compressed where that
    /// saves at least a 32nd, else as it is.
    pub(crate) fn encode(&mut self, content: &[u8], out: &mut Vec<u8>) -> Result<Compression> {
        out.clear();
        out.reserve(zstd::zstd_safe::compress_bound(content.len()) + crate::crypto::TAG_BYTES);
        let length = self
            .compressor
            .compress_to_buffer(content, out)
            .map_err(|error| RepoError::Invalid(format!("compression failed: {error}")))?;
        if length <= content.len() - content.len() / 32 {
            return Ok(Compression::Zstd);
        }
        out.clear();
        out.extend_from_slice(content);
        Ok(Compression::None)
    }
}

/// Decompresses frames.
pub(crate) struct FrameDecoder {
    decompressor: Decompressor<'static>,
}

impl FrameDecoder {
    /// A decoder.
    pub(crate) fn new() -> Result<Self> {
        let decompressor = Decompressor::new()
            .map_err(|error| RepoError::Invalid(format!("cannot set up zstd: {error}")))?;
        Ok(Self { decompressor })
    }

    /// Decompresses `stored` so that it fills `out` exactly; `None` where it does not.
    pub(crate) fn decode(
        &mut self,
        compression: Compression,
        stored: &[u8],
        out: &mut [u8],
    ) -> Option<()> {
        match compression {
            Compression::None if stored.len() == out.len() => {
                out.copy_from_slice(stored);
                Some(())
            }
            Compression::None => None,
            Compression::Zstd => {
                let length = self.decompressor.decompress_to_buffer(stored, out).ok()?;
                (length == out.len()).then_some(())
            }
        }
    }
}
