//! Which parts of the file are in use.
//!
//! A VHDX has no free list: what no region and no block table entry refers to is free. Everything
//! lies on 1 MiB boundaries (MS-VHDX 2.1), so one bit per MiB of the file says it all, 8 MiB of
//! memory for a 64 TiB disk. Space that became free is used again only after the change that freed
//! it is durable; the caller releases it here then.

use crate::bytes::length;
use vmtide_block::{BlockError, Result};

/// The unit of space in the file: every region, block and sector bitmap begins on a multiple of it
/// and takes a whole number of it (MS-VHDX 2.1).
pub(super) const UNIT_BYTES: u64 = 1 << 20;

/// The longest file that is written: a 64 TiB disk with its bitmaps and tables is far below, and
/// its bits take 16 MiB.
const MAX_FILE_BYTES: u64 = 128 << 40;

/// Space in the file for some blocks of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    /// Where the first block is, in bytes.
    pub(super) offset: u64,
    /// How many blocks there are, one after the other.
    pub(super) count: u64,
    /// Whether the space is new at the end of the file, so that it reads as zeros.
    pub(super) fresh: bool,
}

/// The used and free space of one file.
pub(super) struct Space {
    name: String,
    /// A bit per unit of the file, set where it is in use.
    used: Vec<u64>,
    /// The file's length in units, as far as anything was ever in use.
    end: u64,
    /// How many units before the end are free.
    free: u64,
    /// Where the next search for free units begins.
    hint: u64,
    /// There are no free runs of this many units or more.
    none_of: u64,
    /// Blocks without data keep places in the file that nothing else uses.
    anchors_trusted: bool,
}

impl Space {
    /// A file of `file_bytes` in which nothing is in use yet.
    ///
    /// # Errors
    /// [`BlockError::Unsupported`] for a file longer than any VHDX has a use for.
    pub(super) fn new(name: String, file_bytes: u64) -> Result<Self> {
        let mut space = Self {
            name,
            used: Vec::new(),
            end: 0,
            free: 0,
            hint: 0,
            none_of: u64::MAX,
            anchors_trusted: true,
        };
        space.extend(file_bytes.div_ceil(UNIT_BYTES))?;
        space.free = space.end;
        Ok(space)
    }

    /// Marks a part of the file as in use; false, with nothing changed, where some of it already
    /// is or the end of the file comes before its first byte.
    pub(super) fn mark(&mut self, offset: u64, bytes: u64) -> Result<bool> {
        let (first, past) =
            (offset / UNIT_BYTES, offset.saturating_add(bytes).div_ceil(UNIT_BYTES));
        if first >= self.end || (first..past.min(self.end)).any(|unit| self.is_used(unit)) {
            return Ok(false);
        }
        if past > self.end {
            let old = self.end;
            self.extend(past)?;
            self.free += self.end - old;
        }
        self.set(first..past, true);
        self.free -= past - first;
        Ok(true)
    }

    /// Takes space for up to `wanted` blocks of `block_bytes` each, for at least one.
    ///
    /// # Errors
    /// [`BlockError::Unsupported`] where the file would become too long.
    pub(super) fn claim(&mut self, wanted: u64, block_bytes: u64) -> Result<Claim> {
        let units = (block_bytes / UNIT_BYTES).max(1);
        if self.free >= units
            && units < self.none_of
            && let Some(first) = self.find(units)
        {
            let longest = wanted.saturating_mul(units).min(self.end - first);
            let run = (first..first + longest).take_while(|unit| !self.is_used(*unit)).count();
            let count = (run as u64 / units).max(1);
            self.set(first..first + count * units, true);
            self.free -= count * units;
            self.hint = first + count * units;
            return Ok(Claim { offset: first * UNIT_BYTES, count, fresh: false });
        }
        let first = self.end;
        self.extend(first.saturating_add(wanted.saturating_mul(units)))?;
        self.set(first..self.end, true);
        Ok(Claim { offset: first * UNIT_BYTES, count: wanted, fresh: true })
    }

    /// Gives back what [`claim`](Self::claim) or [`mark`](Self::mark) took.
    pub(super) fn release(&mut self, offset: u64, bytes: u64) {
        let first = offset / UNIT_BYTES;
        let past = (offset.saturating_add(bytes) / UNIT_BYTES).min(self.end);
        for unit in first..past {
            if self.is_used(unit) {
                self.set(unit..unit + 1, false);
                self.free += 1;
            }
        }
        self.none_of = u64::MAX;
        self.hint = self.hint.min(first);
    }

    /// Whether the places that blocks without data keep may be used for them.
    pub(super) const fn anchors_trusted(&self) -> bool {
        self.anchors_trusted
    }

    /// Some places that blocks without data keep are used by others, too.
    pub(super) const fn distrust_anchors(&mut self) {
        self.anchors_trusted = false;
    }

    /// Where the file may end, in bytes.
    pub(super) fn end_bytes(&self) -> u64 {
        self.end * UNIT_BYTES
    }

    /// Forgets the free space at the end, and says where the file may end now, in bytes.
    pub(super) fn cut(&mut self) -> u64 {
        while self.end > 0 && !self.is_used(self.end - 1) {
            self.end -= 1;
            self.free -= 1;
        }
        self.used.truncate(length(self.end.div_ceil(64)));
        self.end_bytes()
    }

    /// The first of `units` free ones in a row.
    fn find(&mut self, units: u64) -> Option<u64> {
        let found = self
            .find_in(self.hint.min(self.end), self.end, units)
            .or_else(|| self.find_in(0, self.end, units));
        if found.is_none() {
            self.none_of = units;
        }
        found
    }

    fn find_in(&self, from: u64, past: u64, units: u64) -> Option<u64> {
        let (mut at, mut run) = (from, 0);
        while at < past {
            if at.is_multiple_of(64) && self.used.get(length(at / 64)) == Some(&u64::MAX) {
                (at, run) = (at + 64, 0);
                continue;
            }
            run = if self.is_used(at) { 0 } else { run + 1 };
            at += 1;
            if run == units {
                return Some(at - units);
            }
        }
        None
    }

    fn extend(&mut self, end: u64) -> Result<()> {
        if end > MAX_FILE_BYTES / UNIT_BYTES {
            return Err(BlockError::unsupported(
                &self.name,
                format!(
                    "the file would be {end} MiB long; no VHDX is written past {} MiB",
                    MAX_FILE_BYTES / UNIT_BYTES
                ),
            ));
        }
        self.end = self.end.max(end);
        self.used.resize(length(self.end.div_ceil(64)), 0);
        Ok(())
    }

    fn is_used(&self, unit: u64) -> bool {
        self.used.get(length(unit / 64)).is_some_and(|word| word >> (unit % 64) & 1 == 1)
    }

    fn set(&mut self, units: std::ops::Range<u64>, used: bool) {
        for unit in units {
            if let Some(word) = self.used.get_mut(length(unit / 64)) {
                *word = if used { *word | 1 << (unit % 64) } else { *word & !(1 << (unit % 64)) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn claim(space: &mut Space, wanted: u64, mib: u64) -> (u64, u64, bool) {
        let claim = space.claim(wanted, mib * MIB).unwrap();
        (claim.offset / MIB, claim.count, claim.fresh)
    }

    #[test]
    fn space_is_taken_at_the_end_and_reused_where_it_fits() {
        let mut space = Space::new("test".into(), 10 * MIB).unwrap();
        assert!(space.mark(0, 4 * MIB).unwrap());
        assert!(!space.mark(3 * MIB, MIB).unwrap(), "in use");
        assert!(!space.mark(10 * MIB, MIB).unwrap(), "past the end");
        assert!(space.mark(9 * MIB, 2 * MIB).unwrap(), "a last block may be cut off");
        assert_eq!(claim(&mut space, 3, 2), (4, 2, false), "as many as fit before 9");
        assert_eq!(claim(&mut space, 1, 2), (11, 1, true));
        assert_eq!(claim(&mut space, 1, 1), (8, 1, false));
        assert_eq!(claim(&mut space, 4, 32), (13, 4, true));
        assert_eq!(space.end_bytes(), 141 * MIB);
        space.release(77 * MIB, 64 * MIB);
        space.release(4 * MIB, 2 * MIB);
        assert_eq!(claim(&mut space, 1, 4), (77, 1, false));
        assert_eq!(claim(&mut space, 2, 1), (81, 2, false), "searched from the last place on");
        assert_eq!(space.cut(), 83 * MIB);
        assert_eq!(claim(&mut space, 1, 4), (83, 1, true));
        assert_eq!(claim(&mut space, 1, 2), (4, 1, false));
        assert!(space.claim(1 << 40, 32 * MIB).is_err());
    }

    #[test]
    fn a_failed_search_is_remembered_until_space_comes_back() {
        let mut space = Space::new("test".into(), 100 * MIB).unwrap();
        for unit in (0..100).step_by(2) {
            assert!(space.mark(unit * MIB, MIB).unwrap());
        }
        assert_eq!(claim(&mut space, 1, 2), (100, 1, true));
        assert_eq!(space.none_of, 2);
        assert_eq!(claim(&mut space, 1, 1), (1, 1, false));
        space.release(2 * MIB, MIB);
        assert_eq!(claim(&mut space, 5, 2), (2, 1, false));
    }
}
