//! Compressing and decompressing frames. One encoder or decoder per worker: each keeps zstd's
//! working memory, which is far costlier to make than a frame is to compress.

use super::{Compression, MAX_FRAME_BYTES};
use crate::{RepoError, Result};
use zstd::bulk::Compressor;
use zstd::zstd_safe::{
    CParameter, DCtx, DParameter, InBuffer, OutBuffer, ResetDirective, Strategy,
};

/// The bytes in the middle of a frame that are compressed quickly to see what it is like. Costs some
/// 2 % of the frame's time and decides right for most; see
/// `docs/decisions/0003-frames-and-levels.md`.
const SAMPLE_BYTES: usize = 64 << 10;

/// In frames shorter than this a sample costs more than it saves.
const MIN_SAMPLED_BYTES: usize = 4 * SAMPLE_BYTES;

/// Where the quick search leaves less than this part of a sample, or more than the other, a better one takes half
/// as long again, or twice as long, to save next to nothing.
const WORTH_PERCENT: std::ops::Range<usize> = 2..90;

/// How zstd looks for what repeats: the logarithms of its tables' lengths (one table or two), the shortest match. The
/// window is the whole frame. zstd's own levels 1 and 3 have tables and windows for data of any length; these
/// were measured on frames, and fit a core's own cache. Decoders do not care.
#[derive(Clone, Copy)]
enum Search {
    /// One table.
    Fast { hash_log: u32, min_match: u32 },
    /// One table for long matches and one for short ones.
    Double { hash_log: u32, chain_log: u32, min_match: u32 },
    /// What zstd takes at this level.
    Level(i32),
}

/// zstd's level 1 takes an eighth less time and stores 4 % more.
const QUICKEST: Search = Search::Fast { hash_log: 15, min_match: 6 };

/// What is taken beside a better search where that would not pay.
const QUICK: Search = Search::Fast { hash_log: 16, min_match: 6 };

/// Stores 3 % less than [`QUICK`] in a third more time.
const GOOD: Search = Search::Double { hash_log: 16, chain_log: 15, min_match: 5 };

/// zstd's own choice: stores 0.9 % less than [`GOOD`], and 1 to 2 % less of what hardly compresses, in an eighth more time.
const BETTER: Search = Search::Level(3);

impl Search {
    fn compressor(self) -> std::io::Result<Compressor<'static>> {
        let (level, hash_log, chain_log, min_match, strategy) = match self {
            Self::Level(level) => return Compressor::new(level),
            Self::Fast { hash_log, min_match } => {
                (1, hash_log, None, min_match, Strategy::ZSTD_fast)
            }
            Self::Double { hash_log, chain_log, min_match } => {
                (3, hash_log, Some(chain_log), min_match, Strategy::ZSTD_dfast)
            }
        };
        let mut compressor = Compressor::new(level)?;
        compressor.set_parameter(CParameter::WindowLog(WINDOW_LOG))?;
        compressor.set_parameter(CParameter::HashLog(hash_log))?;
        compressor.set_parameter(CParameter::MinMatch(min_match))?;
        compressor.set_parameter(CParameter::Strategy(strategy))?;
        if let Some(chain_log) = chain_log {
            compressor.set_parameter(CParameter::ChainLog(chain_log))?;
        }
        Ok(compressor)
    }
}

/// 2 MiB, a frame. Larger frames look back so far and no further; a decoder's memory is that of the frame in any case.
const WINDOW_LOG: u32 = 21;

/// Compresses frames: quickly, and better where that pays.
pub(crate) struct FrameEncoder {
    quick: Compressor<'static>,
    /// Better searches, each with the part of a sample, in percent, from which on it pays; these ascend.
    better: Vec<(usize, Compressor<'static>)>,
}

impl FrameEncoder {
    /// An encoder at level `level`: 1 is quick; 2 takes a better search where it saves most, 3 wherever it saves enough, and from 4 on
    /// it is zstd's own level.
    pub(crate) fn new(level: i32) -> Result<Self> {
        let (quick, better): (_, &[(usize, Search)]) = match level {
            ..1 => (Search::Level(level), &[]),
            1 => (QUICKEST, &[]),
            2 => (QUICK, &[(35, GOOD)]),
            3 => (QUICK, &[(0, GOOD), (40, BETTER)]),
            _ => (QUICK, &[(0, Search::Level(level))]),
        };
        let compressor = |search: Search| {
            search
                .compressor()
                .map_err(|error| RepoError::Invalid(format!("compression level {level}: {error}")))
        };
        let better = better.iter().map(|&(from, search)| Ok((from, compressor(search)?)));
        Ok(Self { quick: compressor(quick)?, better: better.collect::<Result<_>>()? })
    }

    /// Puts the stored form of `content` into `out`, replacing what it held: compressed where that
    /// saves at least a 32nd, else as it is.
    pub(crate) fn encode(&mut self, content: &[u8], out: &mut Vec<u8>) -> Result<Compression> {
        let failed = |error| RepoError::Invalid(format!("compression failed: {error}"));
        out.clear();
        out.reserve(zstd::zstd_safe::compress_bound(content.len()) + crate::crypto::TAG_BYTES);
        let choice = self.choose(content, out).map_err(failed)?;
        let better = choice.and_then(|number| self.better.get_mut(number));
        let compressor = better.map_or(&mut self.quick, |(_, compressor)| compressor);
        out.clear();
        let length = compressor.compress_to_buffer(content, out).map_err(failed)?;
        if length <= content.len() - content.len() / 32 {
            return Ok(Compression::Zstd);
        }
        out.clear();
        out.extend_from_slice(content);
        Ok(Compression::None)
    }

    /// Which of the better searches to take for the content, judged by what the quick one leaves of a sample; none for the
    /// quick one. What `out` holds afterwards means nothing.
    fn choose(&mut self, content: &[u8], out: &mut Vec<u8>) -> std::io::Result<Option<usize>> {
        if self.better.is_empty() || content.len() < MIN_SAMPLED_BYTES {
            return Ok(self.better.len().checked_sub(1));
        }
        let start = content.len() / 2 - SAMPLE_BYTES / 2;
        let sample = &content[start..start + SAMPLE_BYTES];
        let left = self.quick.compress_to_buffer(sample, out)?;
        let percent = left * 100 / SAMPLE_BYTES;
        if !WORTH_PERCENT.contains(&percent) {
            return Ok(None);
        }
        Ok(self.better.iter().rposition(|(from, _)| *from <= percent))
    }
}

/// Decompresses frames.
pub(crate) struct FrameDecoder {
    context: DCtx<'static>,
}

impl FrameDecoder {
    /// A decoder.
    pub(crate) fn new() -> Result<Self> {
        let failed = || RepoError::Invalid("cannot set up zstd".into());
        let mut context = DCtx::try_create().ok_or_else(failed)?;
        // Only who decompresses a part has memory for a window; there is none larger than a frame.
        let window = DParameter::WindowLogMax(MAX_FRAME_BYTES.ilog2());
        context.set_parameter(window).map_err(|_| failed())?;
        Ok(Self { context })
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
                let length = self.context.decompress(out, stored).ok()?;
                (length == out.len()).then_some(())
            }
        }
    }

    /// As [`decode`](Self::decode), but only the beginning, as much as `out` has room for. That what comes after it is
    /// well formed, and as long as it should be, is not looked at.
    pub(crate) fn decode_beginning(
        &mut self,
        compression: Compression,
        stored: &[u8],
        out: &mut [u8],
    ) -> Option<()> {
        if compression == Compression::None {
            out.copy_from_slice(stored.get(..out.len())?);
            return Some(());
        }
        self.context.reset(ResetDirective::SessionOnly).ok()?;
        let wanted = out.len();
        let mut output = OutBuffer::around(out);
        let mut input = InBuffer::around(stored);
        while output.pos() < wanted {
            let before = (output.pos(), input.pos());
            let left = self.context.decompress_stream(&mut output, &mut input).ok()?;
            // The end of the frame: what may follow it in `stored` is none of it.
            if output.pos() < wanted && (left == 0 || (output.pos(), input.pos()) == before) {
                return None;
            }
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made-up words, short ones often.
    fn text(bytes: usize) -> Vec<u8> {
        let mut random = 1_u64;
        let mut content = Vec::with_capacity(bytes + 16);
        while content.len() < bytes {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            // Small numbers are frequent, as in a language.
            let word = (random >> 40) % (1 + (random >> 33) % 4000);
            content.extend_from_slice(format!("{:x} ", word.wrapping_mul(0x9E37)).as_bytes());
        }
        content.truncate(bytes);
        content
    }

    fn noise(bytes: usize) -> Vec<u8> {
        let mut content = vec![0; bytes];
        blake3::Hasher::new().finalize_xof().fill(&mut content);
        content
    }

    #[test]
    fn every_level_gives_back_every_kind_of_content() {
        let mixed = [text(700_000), noise(900_000), vec![0; 400_000], text(97)].concat();
        let kinds = [text(2 << 20), noise(2 << 20), vec![0; 2 << 20], mixed, text(4096)];
        let mut decoder = FrameDecoder::new().unwrap();
        for level in [-1, 1, 2, 3, 6] {
            let mut encoder = FrameEncoder::new(level).unwrap();
            let mut stored = Vec::new();
            for content in &kinds {
                let compression = encoder.encode(content, &mut stored).unwrap();
                let mut back = vec![0; content.len()];
                decoder.decode(compression, &stored, &mut back).unwrap();
                assert!(back == *content, "level {level}");
                for length in [0, 1, 4096, content.len() / 2 + 77, content.len()] {
                    back.fill(7);
                    let part = &mut back[..length];
                    decoder.decode_beginning(compression, &stored, part).unwrap();
                    assert!(*part == content[..length], "level {level}");
                    assert!(back[length..].iter().all(|byte| *byte == 7));
                }
                let mut more = vec![0; content.len() + 1];
                assert!(decoder.decode_beginning(compression, &stored, &mut more).is_none());
                stored.truncate(stored.len() / 2);
                assert!(decoder.decode_beginning(compression, &stored, &mut back).is_none());
                // An error is no hindrance for the next.
                assert!(decoder.decode(compression, &stored, &mut back).is_none());
                let is_noise = content[..32] == kinds[1][..32];
                assert_eq!(compression == Compression::None, is_noise, "level {level}");
                assert!(stored.len() <= content.len());
            }
        }
    }

    #[test]
    fn a_better_search_is_taken_where_it_pays_and_nowhere_else() {
        let mut out = Vec::with_capacity(2 * SAMPLE_BYTES);
        let mut choice = |level, content: &[u8]| {
            FrameEncoder::new(level).unwrap().choose(content, &mut out).unwrap()
        };
        let text = text(2 << 20);
        assert_eq!(choice(1, &text), None, "the quick level is quick");
        assert!(choice(3, &text).is_some());
        assert_eq!(choice(3, &noise(2 << 20)), None);
        assert_eq!(choice(3, &vec![0; 2 << 20]), None, "a few bytes are left in any case");
        assert_eq!(choice(3, &text[..4096]), Some(1), "too short for a sample");
    }
}
