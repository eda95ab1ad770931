//! Lists of ranges as clients ask for them: checked once, walked many times.

use thiserror::Error;
use vmtide_block::ByteRange;

/// Why a list of ranges is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RangeError {
    /// The text is not `OFFSET:LENGTH,OFFSET:LENGTH`.
    #[error("range {number}: give OFFSET:LENGTH in decimal, ranges separated by commas")]
    Syntax {
        /// Which one, from 1.
        number: usize,
    },
    /// A range leaves the disk.
    #[error("range {number} ({range}) is not inside the disk of {size_bytes} bytes")]
    OutOfRange {
        /// Which one, from 1.
        number: usize,
        /// The range.
        range: ByteRange,
        /// The size of the disk.
        size_bytes: u64,
    },
    /// Overlapping ranges add up to more than can be counted.
    #[error("the ranges add up to more than 2^64 bytes: ask for them in several requests")]
    TooLong,
    /// More ranges than one request may have.
    #[error("more than {most} ranges: ask for them in several requests")]
    TooMany {
        /// The limit.
        most: usize,
    },
}

/// Parses the `ranges` parameter of a query, `OFFSET:LENGTH,OFFSET:LENGTH,…`.
///
/// # Errors
/// [`RangeError::Syntax`], [`RangeError::TooMany`].
pub fn parse_range_list(text: &str, most: usize) -> Result<Vec<ByteRange>, RangeError> {
    let mut ranges = Vec::new();
    for (index, item) in text.split(',').enumerate() {
        if index >= most {
            return Err(RangeError::TooMany { most });
        }
        let number = index + 1;
        let (offset, length) = item.trim().split_once(':').ok_or(RangeError::Syntax { number })?;
        let parse = |digits: &str| -> Result<u64, RangeError> {
            // `parse` alone would take a sign.
            match digits.bytes().all(|byte| byte.is_ascii_digit()) {
                true => digits.parse().map_err(|_| RangeError::Syntax { number }),
                false => Err(RangeError::Syntax { number }),
            }
        };
        ranges.push(ByteRange::new(parse(offset)?, parse(length)?));
    }
    Ok(ranges)
}

/// Ranges of one disk, all inside of it, in the order in which they were asked for.
#[derive(Debug)]
pub struct RangeList {
    ranges: Vec<ByteRange>,
    total_bytes: u64,
    /// Gives the memory back to the server's account, when the list goes.
    _memory: Option<super::receive::HeldMemory>,
}

impl RangeList {
    /// Checks `ranges` against a disk of `size_bytes`. They need not be sorted and may overlap; empty ones are
    /// allowed and give nothing.
    ///
    /// # Errors
    /// [`RangeError::OutOfRange`], [`RangeError::TooLong`].
    pub fn new(ranges: Vec<ByteRange>, size_bytes: u64) -> Result<Self, RangeError> {
        let mut total_bytes = 0u64;
        for (index, range) in ranges.iter().enumerate() {
            if range.checked_end().is_none_or(|end| end > size_bytes) {
                let number = index + 1;
                return Err(RangeError::OutOfRange { number, range: *range, size_bytes });
            }
            total_bytes = total_bytes.checked_add(range.length).ok_or(RangeError::TooLong)?;
        }
        Ok(Self { ranges, total_bytes, _memory: None })
    }

    /// All of a disk.
    pub fn whole(size_bytes: u64) -> Self {
        let ranges = vec![ByteRange::new(0, size_bytes)];
        Self { ranges, total_bytes: size_bytes, _memory: None }
    }

    /// The same list, which gives `memory` back when it goes.
    #[must_use]
    pub fn with_memory(mut self, memory: super::receive::HeldMemory) -> Self {
        self._memory = Some(memory);
        self
    }

    /// The sum of the lengths.
    pub const fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// The ranges.
    pub fn as_slice(&self) -> &[ByteRange] {
        &self.ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_in_queries_are_read_strictly() {
        let parsed = parse_range_list("0:512, 1024:0,18446744073709551615:1", 10).unwrap();
        assert_eq!(parsed.len(), 3);
        assert_eq!(parsed[2], ByteRange::new(u64::MAX, 1));
        for bad in
            ["", "1", "1:", ":1", "+1:2", "-1:2", "1:2,", "1:2:3", "0x1:2", "1:2;3:4", "１:2"]
        {
            assert!(matches!(parse_range_list(bad, 10), Err(RangeError::Syntax { .. })), "{bad}");
        }
        assert!(parse_range_list("18446744073709551616:1", 10).is_err());
        assert_eq!(parse_range_list("1:1,1:1,1:1", 2), Err(RangeError::TooMany { most: 2 }));
    }

    #[test]
    fn ranges_outside_the_disk_are_refused() {
        for range in [
            ByteRange::new(0, 101),
            ByteRange::new(100, 1),
            ByteRange::new(u64::MAX, 2),
            ByteRange::new(2, u64::MAX),
        ] {
            let refused = RangeList::new(vec![ByteRange::new(0, 100), range], 100);
            assert!(matches!(refused, Err(RangeError::OutOfRange { number: 2, .. })), "{range}");
        }
        let list = RangeList::new(vec![ByteRange::new(100, 0), ByteRange::new(5, 20)], 100);
        assert_eq!(list.unwrap().total_bytes(), 20);
    }

    #[test]
    fn sums_that_overflow_are_refused() {
        let huge = vec![ByteRange::new(0, u64::MAX), ByteRange::new(0, u64::MAX)];
        assert!(matches!(RangeList::new(huge, u64::MAX), Err(RangeError::TooLong)));
    }
}
