//! Compressing and decompressing frames. One encoder or decoder per worker: each keeps zstd's
//! working memory, which is far costlier to make than a frame is to compress.

use super::{Compression, MAX_FRAME_BYTES};
use crate::{RepoError, Result};
use zstd::bulk::Compressor;
use zstd::zstd_safe::{
    CParameter, DCtx, DParameter, InBuffer, OutBuffer, ResetDirective, Strategy,
};

/// The bytes in the middle of a frame that are compressed quickly to see what it is like. Costs some
/// 3 % of the frame's time and decides right for most; see
/// `docs/decisions/0003-frames-and-levels.md`.
const SAMPLE_BYTES: usize = 64 << 10;

/// In frames shorter than this a sample costs more than it saves.
const MIN_SAMPLED_BYTES: usize = 4 * SAMPLE_BYTES;

/// How zstd looks for what repeats: the logarithms of its tables' lengths (one table or two), the shortest match. The
/// window is the whole frame. zstd's own levels 1 and 3 have tables and windows for data of any length; these
/// were measured on frames, and fit a core's own cache. Decoders do not care.
#[derive(Clone, Copy)]
enum Search {
    /// One table.
    Fast { hash_log: u32, min_match: u32 },
    /// One table, shortest matches of 7; after so many bytes without a match the next place is looked at, and what does not
    /// repeat is left as it is. Few matches are found, and every byte that is not looked at is time.
    Skipping { hash_log: u32, step: u32 },
    /// One table for long matches and one for short ones.
    Double { hash_log: u32, chain_log: u32, min_match: u32 },
    /// What zstd takes at this level.
    Level(i32),
}

/// zstd's level 1, with its table of half the length, takes 4 % less time and stores 2 to 3 % more; matches from 6 on store 1.4 %
/// less in 5 % more time.
const QUICKEST: Search = Search::Fast { hash_log: 15, min_match: 7 };

/// What is taken beside a better search where that would not pay.
const QUICK: Search = Search::Fast { hash_log: 16, min_match: 6 };

/// Of what compresses well it stores 2.4 % less than [`QUICK`] in a twelfth more time; of other content it takes a third more.
const EASY: Search = Search::Double { hash_log: 15, chain_log: 14, min_match: 5 };

/// Stores 3 % less than [`QUICK`] in a third more time.
const GOOD: Search = Search::Double { hash_log: 16, chain_log: 15, min_match: 5 };

/// zstd's own choice: stores 0.9 % less than [`GOOD`], and 1 to 2 % less of what hardly compresses, in an eighth more time.
const BETTER: Search = Search::Level(3);

impl Search {
    fn compressor(self) -> std::io::Result<Compressor<'static>> {
        let (level, hash_log, extra, min_match, strategy) = match self {
            Self::Level(level) => return Compressor::new(level),
            Self::Fast { hash_log, min_match } => {
                (1, hash_log, None, min_match, Strategy::ZSTD_fast)
            }
            // With a target length zstd's quick strategy steps, and does not compress literals.
            Self::Skipping { hash_log, step } => {
                (1, hash_log, Some(CParameter::TargetLength(step)), 7, Strategy::ZSTD_fast)
            }
            Self::Double { hash_log, chain_log, min_match } => (
                3,
                hash_log,
                Some(CParameter::ChainLog(chain_log)),
                min_match,
                Strategy::ZSTD_dfast,
            ),
        };
        let mut compressor = Compressor::new(level)?;
        compressor.set_parameter(CParameter::WindowLog(WINDOW_LOG))?;
        compressor.set_parameter(CParameter::HashLog(hash_log))?;
        compressor.set_parameter(CParameter::MinMatch(min_match))?;
        compressor.set_parameter(CParameter::Strategy(strategy))?;
        if let Some(extra) = extra {
            compressor.set_parameter(extra)?;
        }
        Ok(compressor)
    }
}

/// 2 MiB, a frame. Larger frames look back so far and no further; a decoder's memory is that of the frame in any case.
const WINDOW_LOG: u32 = 21;

/// Which search to take for a frame, by what is expected to be left of it.
struct Rule {
    searches: Vec<Search>,
    /// From so many percent on, this search, by its number; ascending, from 0 on. At the lower end and at the upper one a
    /// better search takes half as long again, or twice as long, to save next to nothing.
    choices: &'static [(usize, usize)],
    judge: Judge,
}

/// What tells how much will be left of a frame.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Judge {
    /// What the first search makes of its middle; frames too short for that get the last search.
    Sample,
    /// What was left of the frame before it, which mostly lies beside it on the disk: costs nothing, and decides nearly as well.
    Previous,
}

/// The searches of a level below 0: for frames of which less than half is left, and for others, where a match is a rare thing and
/// more can be passed over. In the same size as zstd's own levels below 0 they take 2 % less time at -1 and 11 % less at
/// -7; see `docs/decisions/0003-frames-and-levels.md`.
fn skipping(level: i32) -> [Search; 2] {
    let (hash_log, steps) = match level {
        -1.. => (14, [1, 1]),
        -2 => (14, [1, 3]),
        -3 => (13, [2, 3]),
        -4 => (13, [2, 5]),
        -5 => (13, [3, 6]),
        -6 => (13, [4, 8]),
        _ => (13, [4, 12]),
    };
    steps.map(|step| Search::Skipping { hash_log, step })
}

impl Rule {
    fn of(level: i32) -> Self {
        let (searches, choices, judge): (_, &[_], _) = match level {
            0 => (Vec::new(), &[], Judge::Previous),
            ..0 => (Vec::from(skipping(level)), &[(0, 0), (50, 1)], Judge::Previous),
            1 => (vec![QUICKEST], &[(0, 0)], Judge::Previous),
            2 => (vec![QUICK, EASY], &[(0, 1), (40, 0)], Judge::Previous),
            3 => {
                let choices = &[(0, 0), (2, 1), (40, 2), (90, 0)];
                (vec![QUICK, GOOD, BETTER], choices, Judge::Sample)
            }
            _ => (vec![QUICK, Search::Level(level)], &[(0, 0), (2, 1), (90, 0)], Judge::Sample),
        };
        Self { searches, choices, judge }
    }

    /// The search for a frame of which `percent` are expected to be left.
    fn choose(&self, percent: usize) -> usize {
        let choice = self.choices.iter().rfind(|(from, _)| *from <= percent);
        choice.map_or(0, |&(_, search)| search)
    }
}

/// Compresses frames: quickly, and better where that pays.
pub(crate) struct FrameEncoder {
    rule: Rule,
    /// In the order of the rule.
    compressors: Vec<Compressor<'static>>,
    /// What was left of the previous frame.
    left_percent: usize,
}

impl FrameEncoder {
    /// An encoder at level `level`: 1 is quick; 2 takes a better search where that hardly takes longer, 3 wherever it saves enough, and
    /// from 4 on it is zstd's own level. Below 0 it is quicker than 1 and leaves more. 0 compresses nothing.
    pub(crate) fn new(level: i32) -> Result<Self> {
        let failed = |error| RepoError::Invalid(format!("compression level {level}: {error}"));
        let rule = Rule::of(level);
        let compressors = rule.searches.iter().map(|search| search.compressor());
        let compressors = compressors.collect::<std::io::Result<_>>().map_err(failed)?;
        Ok(Self { compressors, rule, left_percent: 50 })
    }

    /// Puts the stored form of `content` into `out`, replacing what it held: compressed where that
    /// saves at least a 32nd, else as it is.
    pub(crate) fn encode(&mut self, content: &[u8], out: &mut Vec<u8>) -> Result<Compression> {
        let failed = |error| RepoError::Invalid(format!("compression failed: {error}"));
        out.clear();
        out.reserve(zstd::zstd_safe::compress_bound(content.len()) + crate::crypto::TAG_BYTES);
        if self.compressors.is_empty() {
            out.extend_from_slice(content);
            return Ok(Compression::None);
        }
        let search = self.choose(content, out).map_err(failed)?;
        out.clear();
        let length = self.compress(search, content, out).map_err(failed)?;
        self.left_percent = length * 100 / content.len().max(1);
        if length <= content.len() - content.len() / 32 {
            return Ok(Compression::Zstd);
        }
        out.clear();
        out.extend_from_slice(content);
        Ok(Compression::None)
    }

    /// Which of the searches to take for the content. What `out` holds afterwards means nothing.
    fn choose(&mut self, content: &[u8], out: &mut Vec<u8>) -> std::io::Result<usize> {
        if self.rule.judge == Judge::Previous {
            return Ok(self.rule.choose(self.left_percent));
        }
        if content.len() < MIN_SAMPLED_BYTES {
            return Ok(self.compressors.len() - 1);
        }
        let start = content.len() / 2 - SAMPLE_BYTES / 2;
        let left = self.compress(0, &content[start..start + SAMPLE_BYTES], out)?;
        Ok(self.rule.choose(left * 100 / SAMPLE_BYTES))
    }

    /// Compresses with one of the searches; the length.
    fn compress(
        &mut self,
        search: usize,
        content: &[u8],
        out: &mut Vec<u8>,
    ) -> std::io::Result<usize> {
        self.compressors[search].compress_to_buffer(content, out)
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
        for level in [-7, -1, 0, 1, 2, 3, 6] {
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
                let is_left = compression == Compression::None;
                match level {
                    -7 if *content == kinds[2] => assert!(!is_left),
                    // It finds nothing in some of the texts.
                    -7 => assert!(is_left || !is_noise),
                    0 => assert!(is_left),
                    _ => assert_eq!(is_left, is_noise, "level {level}"),
                }
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
        assert_eq!(choice(1, &text), 0, "the quick level is quick");
        assert_ne!(choice(3, &text), 0);
        assert_eq!(choice(3, &noise(2 << 20)), 0);
        assert_eq!(choice(3, &vec![0; 2 << 20]), 0, "a few bytes are left in any case");
        assert_eq!(choice(3, &text[..4096]), 2, "too short for a sample");
        assert_eq!(choice(6, &noise(2 << 20)), 0);
        assert_eq!(choice(6, &text), 1);
    }

    #[test]
    fn at_level_2_a_frame_is_taken_for_what_the_one_before_it_was() {
        let mut encoder = FrameEncoder::new(2).unwrap();
        let mut out = Vec::new();
        let (zeros, noise) = (vec![0; 1 << 20], noise(1 << 20));
        let mut next = |content: &[u8]| {
            let choice = encoder.choose(content, &mut out).unwrap();
            encoder.encode(content, &mut out).unwrap();
            choice
        };
        let choices = [&zeros, &zeros, &noise, &noise, &zeros, &zeros].map(|content| next(content));
        assert_eq!(choices, [0, 1, 1, 0, 0, 1]);
    }
}
