//! Compressing and decompressing frames. One encoder or decoder per worker: each keeps zstd's
//! working memory, which is far costlier to make than a frame is to compress.

use super::Compression;
use crate::{RepoError, Result};
use zstd::bulk::{Compressor, Decompressor};

/// The bytes in the middle of a frame that are compressed quickly to see what it is like. Costs some
/// 2 % of the frame's time and decides right for nearly all; see
/// `docs/decisions/0003-frames-and-levels.md`.
const SAMPLE_BYTES: usize = 64 << 10;

/// In frames shorter than this a sample costs more than it saves.
const MIN_SAMPLED_BYTES: usize = 4 * SAMPLE_BYTES;

/// Where level 1 leaves less than this part of a sample, or more than the other, a higher level takes half
/// as long again to save next to nothing.
const WORTH_PERCENT: std::ops::Range<usize> = 2..90;

/// Compresses frames: at its level where that pays, at level 1 where it does not.
pub(crate) struct FrameEncoder {
    thorough: Option<Compressor<'static>>,
    quick: Compressor<'static>,
}

impl FrameEncoder {
    /// An encoder at zstd level `level`.
    pub(crate) fn new(level: i32) -> Result<Self> {
        let compressor = |level| {
            Compressor::new(level)
                .map_err(|error| RepoError::Invalid(format!("compression level {level}: {error}")))
        };
        let thorough = if level > 1 { Some(compressor(level)?) } else { None };
        Ok(Self { thorough, quick: compressor(level.min(1))? })
    }

    /// Puts the stored form of `content` into `out`, replacing what it held: compressed where that
    /// saves at least a 32nd, else as it is.
    pub(crate) fn encode(&mut self, content: &[u8], out: &mut Vec<u8>) -> Result<Compression> {
        let failed = |error| RepoError::Invalid(format!("compression failed: {error}"));
        out.clear();
        out.reserve(zstd::zstd_safe::compress_bound(content.len()) + crate::crypto::TAG_BYTES);
        let compressor = match &mut self.thorough {
            Some(thorough) if content.len() < MIN_SAMPLED_BYTES => thorough,
            Some(thorough) => {
                let start = (content.len() / 2).saturating_sub(SAMPLE_BYTES / 2);
                let sample = &content[start..(start + SAMPLE_BYTES).min(content.len())];
                let left = self.quick.compress_to_buffer(sample, out).map_err(failed)?;
                let percent = left * 100 / sample.len().max(1);
                if WORTH_PERCENT.contains(&percent) { thorough } else { &mut self.quick }
            }
            None => &mut self.quick,
        };
        out.clear();
        let length = compressor.compress_to_buffer(content, out).map_err(failed)?;
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
