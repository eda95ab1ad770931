//! What was found.

use serde::Serialize;
use std::collections::BTreeMap;
use vmtide_block::RangeSet;

/// The most files that are found: who has more damaged than these restores the disk.
pub const MAX_FILES: usize = 20_000;

/// The most names of one file (hard links) that are told.
pub const MAX_NAMES: usize = 4;

/// The most pieces of damage that are told apart in all; beyond, files are still found.
const MAX_PIECES: usize = 1 << 18;

/// The files that lie at places of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FilesAt {
    /// The logical volume that the file system is in, as `GROUP/VOLUME`; none where it has the partition or disk to itself.
    pub volume: Option<String>,
    /// `ext2`, `ext3`, `ext4`, `xfs` or `ntfs`.
    pub file_system: &'static str,
    /// The files, by path.
    pub files: Vec<FoundFile>,
    /// Whether these are all: not where they are more than [`MAX_FILES`], or the places asked for have inodes or file
    /// records themselves, so that damage there hides files.
    pub is_complete: bool,
    /// Where the file system lies, in bytes of the disk.
    #[serde(skip)]
    pub area: RangeSet,
}

/// A file with bytes at the places that were asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FoundFile {
    /// Its path in the file system, with `/` between names; a stream of NTFS after `:`. What is no file has a name in
    /// brackets, and what has lost its name its number.
    pub path: String,
    /// More names of it, at most [`MAX_NAMES`] with the first.
    pub other_paths: Vec<String>,
    /// Whether it is a directory.
    pub is_directory: bool,
    /// The bytes of the disk.
    #[serde(skip)]
    pub ranges: RangeSet,
}

/// What is touched, by the number that a file system gives its files, and the stream.
#[derive(Default)]
pub(crate) struct Touched {
    pub(crate) files: BTreeMap<(u64, String), RangeSet>,
    pub(crate) is_cut: bool,
    pieces: usize,
}

impl Touched {
    /// Adds bytes of a file; nothing where there are none.
    pub(crate) fn add(&mut self, number: u64, stream: &str, found: &RangeSet) {
        if found.is_empty() {
            return;
        }
        let key = (number, stream.to_owned());
        if self.pieces >= MAX_PIECES
            || (self.files.len() >= MAX_FILES && !self.files.contains_key(&key))
        {
            self.is_cut = true;
            return;
        }
        self.pieces += found.as_slice().len();
        let ranges = self.files.entry(key).or_default();
        found.as_slice().iter().for_each(|range| ranges.insert(*range));
    }
}

/// A name as it goes to a terminal.
pub(crate) fn printable(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
