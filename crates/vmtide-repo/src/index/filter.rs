//! The Bloom filter of a segment: says "surely not here" for most keys that are not.
//!
//! Split into lines of one cache line (Putze, Sanders, Singler: "Cache-, Hash- and Space-Efficient
//! Bloom Filters", 2007), and each line into eight words with one bit per key in each, so that a
//! lookup touches one line and the eight positions come from 48 bits without overlap. With 12 bits
//! per key about 0.6 % of absent keys pass. Keys are keyed hashes: nobody can aim at a line.

use super::Key;

/// Filter bits per key. Fewer lets more absent keys through to a page read of each of the segments (8 bits: 2.5 %, 10 bits:
/// 1.2 %), which on a distant store is a request; with more, the index of 1 TiB and the filter of a merge beside it
/// pass 64 MiB. Only the writer uses it: readers take the number of lines from the directory.
const BITS_PER_KEY: u64 = 12;

/// The length of a line: a cache line.
pub(super) const LINE_BYTES: usize = 64;

type Line = [u64; 8];

/// A filter in memory.
pub(super) struct Filter {
    lines: Vec<Line>,
}

impl Filter {
    /// An empty filter for that many keys.
    pub fn for_keys(keys: u64) -> Self {
        let bits = keys.saturating_mul(BITS_PER_KEY);
        let lines = bits.div_ceil(LINE_BYTES as u64 * 8).max(1);
        Self { lines: vec![[0; 8]; usize::try_from(lines).unwrap_or(usize::MAX)] }
    }

    /// A filter without lines yet, to be read with [`extend`](Self::extend).
    pub fn with_room_for(lines: usize) -> Self {
        Self { lines: Vec::with_capacity(lines) }
    }

    /// Adds stored lines, whole ones.
    pub fn extend(&mut self, stored: &[u8]) {
        let (lines, _) = stored.as_chunks::<LINE_BYTES>();
        self.lines.extend(lines.iter().map(|line| {
            let (words, _) = line.as_chunks::<8>();
            std::array::from_fn(|word| {
                words.get(word).map_or(0, |&bytes| u64::from_le_bytes(bytes))
            })
        }));
    }

    /// The bytes as they are stored, in parts of at most `part_lines` lines.
    pub fn encode_parts(&self, part_lines: usize) -> impl Iterator<Item = Vec<u8>> + '_ {
        self.lines
            .chunks(part_lines)
            .map(|part| part.iter().flatten().flat_map(|word| word.to_le_bytes()).collect())
    }

    /// How many lines there are.
    pub fn line_count(&self) -> usize {
        self.lines.len()
    }

    /// What it takes in memory.
    pub fn memory_bytes(&self) -> usize {
        self.lines.capacity() * LINE_BYTES
    }

    /// Adds a key.
    pub fn insert(&mut self, key: &Key) {
        let line = self.line_of(key);
        if let Some(line) = self.lines.get_mut(line) {
            for (word, bit) in line.iter_mut().zip(bits(key)) {
                *word |= bit;
            }
        }
    }

    /// Whether the key may be there; false means it is not.
    pub fn may_contain(&self, key: &Key) -> bool {
        let Some(line) = self.lines.get(self.line_of(key)) else { return false };
        // Without a branch per word: the line is there once its first word is.
        line.iter().zip(bits(key)).fold(true, |all, (word, bit)| all & (word & bit != 0))
    }

    fn line_of(&self, key: &Key) -> usize {
        super::scale(super::leading(key), self.lines.len())
    }
}

/// The bit in each word: bits 6k to 6k+5 of key bytes 8 to 15 say which in word k.
fn bits(key: &Key) -> [u64; 8] {
    let mut half = [0; 8];
    half.copy_from_slice(&key[8..]);
    let hash = u64::from_le_bytes(half);
    std::array::from_fn(|word| 1 << (hash >> (6 * word) & 63))
}
