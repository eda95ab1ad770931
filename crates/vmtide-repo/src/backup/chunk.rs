//! Cutting a stretch of data into chunks where its content says so (format §6.1).
//!
//! Boundaries depend on the blocks around them and not on their position, so that the same file is
//! cut the same way wherever it lies, on this disk or on another. Blocks of 4 KiB are the grain,
//! because file systems place files on them; a rolling hash over bytes would find nothing more in a
//! disk and cost ten times as much.

use crate::BLOCK_BYTES;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// This many zero blocks in a row are no data. Shorter runs cost less inside a chunk than the
/// entries of another one.
const MIN_ZERO_BLOCKS: usize = 4;

/// The most blocks in a chunk, whatever the configuration says (format §6.1).
const MAX_BLOCKS: usize = 1024;

/// A piece of a stretch, in blocks from its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Zeros.
    Zero { first: usize, count: usize },
    /// One chunk.
    Chunk { first: usize, count: usize },
}

/// Decides where chunks end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunker {
    seed: u64,
    average_blocks: usize,
}

impl Chunker {
    /// A chunker for chunks of `chunk_size_bytes` on average.
    pub(crate) const fn new(chunk_size_bytes: u32, seed: u64) -> Self {
        Self { seed, average_blocks: chunk_size_bytes as usize / BLOCK_BYTES }
    }

    /// Cuts `content`, whole blocks, into pieces that follow each other from its beginning. They cover it where nothing more of the stretch
    /// follows. Otherwise they end where what is left is too short to tell where a piece ends, whatever follows: that belongs in front of
    /// what follows, and is then cut as if all of it had been there at once. Answers with how many blocks were cut.
    pub(crate) fn cut(
        self,
        content: &[u8],
        more_follows: bool,
        mut emit: impl FnMut(Cut) -> crate::Result<()>,
    ) -> crate::Result<usize> {
        let zeros = zero_runs(content);
        let needed = if more_follows { self.needed_blocks() } else { 1 };
        let mut first = 0;
        while zeros.len() - first >= needed {
            if zeros[first] >= MIN_ZERO_BLOCKS {
                let is_open = more_follows && first + zeros[first] == zeros.len();
                // What is left of an open run is long enough to be known as one.
                let count = zeros[first] - if is_open { MIN_ZERO_BLOCKS } else { 0 };
                emit(Cut::Zero { first, count })?;
                first += count;
                continue;
            }
            let count = self.chunk_length(&content[first * BLOCK_BYTES..], &zeros[first..]);
            // What is left of zeros at the edge of a change.
            let is_zero = zeros[first] >= count;
            emit(if is_zero { Cut::Zero { first, count } } else { Cut::Chunk { first, count } })?;
            first += count;
        }
        Ok(first)
    }

    /// The blocks to be seen from where a piece begins, to know where it ends whatever follows.
    fn needed_blocks(self) -> usize {
        self.max_blocks() + MIN_ZERO_BLOCKS
    }

    fn max_blocks(self) -> usize {
        (self.average_blocks * 4).clamp(1, MAX_BLOCKS)
    }

    fn boundary_hash(self, block: &[u8]) -> u64 {
        xxh3_64_with_seed(&block[..HASHED_BYTES.min(block.len())], self.seed)
    }

    /// The length in blocks of the chunk that begins here.
    fn chunk_length(self, content: &[u8], zeros: &[usize]) -> usize {
        let max = self.max_blocks();
        let min = (self.average_blocks / 4).max(1);
        let modulus = self.average_blocks.max(1) as u64;
        for (index, block) in content.chunks_exact(BLOCK_BYTES).enumerate().take(max) {
            if zeros[index] >= MIN_ZERO_BLOCKS {
                return index;
            }
            let length = index + 1;
            if length >= min && self.boundary_hash(block).is_multiple_of(modulus) {
                return length;
            }
        }
        max.min(zeros.len())
    }
}

/// The bytes of a block that the boundary hash looks at. A whole block costs eight times as much and
/// places boundaries no better.
const HASHED_BYTES: usize = 512;

/// For each block, how many blocks from it on are zero.
fn zero_runs(content: &[u8]) -> Vec<usize> {
    let mut runs: Vec<usize> = content
        .chunks_exact(BLOCK_BYTES)
        .map(|block| usize::from(vmtide_block::is_zero(block)))
        .collect();
    for index in (0..runs.len().saturating_sub(1)).rev() {
        if runs[index] > 0 {
            runs[index] += runs[index + 1];
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cuts(content: &[u8], chunk_size: u32) -> Vec<Cut> {
        let mut cuts = Vec::new();
        Chunker::new(chunk_size, 42)
            .cut(content, false, |cut| {
                cuts.push(cut);
                Ok(())
            })
            .unwrap();
        cuts
    }

    /// What [`cuts`] finds, the content given in steps of so many blocks; neighbouring zeros joined.
    fn cuts_in_steps(content: &[u8], chunk_size: u32, steps: &[usize]) -> Vec<Cut> {
        let chunker = Chunker::new(chunk_size, 42);
        let (mut cuts, mut begin, mut end) = (Vec::<Cut>::new(), 0, 0);
        for step in steps.iter().cycle() {
            end = (end + step * BLOCK_BYTES).min(content.len());
            let more_follows = end < content.len();
            let base = begin / BLOCK_BYTES;
            let done = chunker.cut(&content[begin..end], more_follows, |cut| {
                match (cut, cuts.last_mut()) {
                    (Cut::Zero { count: more, .. }, Some(Cut::Zero { count, .. })) => {
                        *count += more
                    }
                    (Cut::Zero { first, count }, _) => {
                        cuts.push(Cut::Zero { first: base + first, count })
                    }
                    (Cut::Chunk { first, count }, _) => {
                        cuts.push(Cut::Chunk { first: base + first, count });
                    }
                }
                Ok(())
            });
            begin += done.unwrap() * BLOCK_BYTES;
            if !more_follows {
                assert_eq!(begin, end);
                return cuts;
            }
            assert!(end - begin < chunker.needed_blocks() * BLOCK_BYTES);
        }
        cuts
    }

    fn noise(blocks: usize, seed: u64) -> Vec<u8> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        let mut bytes = vec![0; blocks * BLOCK_BYTES];
        hasher.finalize_xof().fill(&mut bytes);
        bytes
    }

    /// Zeros, equal bytes and noise in turn, each so many blocks long.
    fn content_of(layout: &[(u8, usize)]) -> Vec<u8> {
        let mut content = Vec::new();
        for (number, (kind, blocks)) in layout.iter().enumerate() {
            match kind {
                0 => content.resize(content.len() + blocks * BLOCK_BYTES, 0),
                1 => content.resize(content.len() + blocks * BLOCK_BYTES, 9),
                _ => content.extend(noise(*blocks, number as u64)),
            }
        }
        content
    }

    proptest! {
        #[test]
        fn cuts_cover_everything_within_their_limits(
            layout in prop::collection::vec((0..3u8, 1..60usize), 1..12),
            shift in 14..21u32,
        ) {
            let content = content_of(&layout);
            let average = 1usize << (shift - 12);
            let mut next = 0;
            for cut in cuts(&content, 1 << shift) {
                let (Cut::Zero { first, count } | Cut::Chunk { first, count }) = cut;
                prop_assert_eq!(first, next);
                prop_assert!(count > 0);
                next += count;
                let bytes = &content[first * BLOCK_BYTES..next * BLOCK_BYTES];
                match cut {
                    Cut::Zero { .. } => prop_assert!(vmtide_block::is_zero(bytes)),
                    Cut::Chunk { .. } => {
                        prop_assert!(!vmtide_block::is_zero(bytes));
                        prop_assert!(count <= (4 * average).min(MAX_BLOCKS));
                    }
                }
            }
            prop_assert_eq!(next * BLOCK_BYTES, content.len());
        }
    }

    proptest! {
        #[test]
        fn content_in_steps_is_cut_like_content_at_once(
            layout in prop::collection::vec((0..3u8, 1..60usize), 1..12),
            steps in prop::collection::vec(1..80usize, 1..5),
            shift in 12..19u32,
        ) {
            let content = content_of(&layout);
            let whole = cuts(&content, 1 << shift).into_iter().fold(Vec::new(), |mut joined, cut| {
                match (cut, joined.last_mut()) {
                    (Cut::Zero { count: more, .. }, Some(Cut::Zero { count, .. })) => *count += more,
                    _ => joined.push(cut),
                }
                joined
            });
            prop_assert_eq!(cuts_in_steps(&content, 1 << shift, &steps), whole);
        }
    }

    #[test]
    fn the_same_file_elsewhere_is_cut_the_same_way() {
        let file = noise(600, 1);
        let chunk = |content: &[u8], cut: &Cut| match cut {
            Cut::Chunk { first, count } => {
                Some(blake3::hash(&content[first * BLOCK_BYTES..(first + count) * BLOCK_BYTES]))
            }
            Cut::Zero { .. } => None,
        };
        let ids = |content: &[u8]| -> std::collections::HashSet<_> {
            cuts(content, 65_536).iter().filter_map(|cut| chunk(content, cut)).collect()
        };
        let alone = ids(&file);
        let elsewhere = ids(&[noise(37, 2), file.clone(), noise(11, 3)].concat());
        let shared = alone.intersection(&elsewhere).count();
        assert!(alone.len() > 15, "{} chunks", alone.len());
        assert!(shared + 4 >= alone.len(), "{shared} of {} shared", alone.len());
        let average = 600 / alone.len();
        assert!((10..=28).contains(&average), "chunks of {average} blocks on average");
    }
}
