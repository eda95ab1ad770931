//! What changed, as far as the answer can be believed.
//!
//! A backup that misses a changed range is a backup that is silently wrong, so an answer counts only where
//! nothing speaks against it: it came to its end, every page moved on, and every range lies on the disk.
//! Everything else is a doubt, and a doubt is answered by reading the disk in full, never by an error and never
//! by fewer ranges.

use crate::{AgentError, Result};
use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor};
use std::fmt;
use vmtide_block::{ByteRange, RangeSet};

/// The most ranges that one disk's answer may have. At the 64 KiB that tracking counts by, four million are
/// 256 GiB changed in the worst pattern; more is read in full at less cost than asking for each.
pub const MAX_RANGES: usize = 4 << 20;

/// Why changes are not known. Each means: read the disk in full.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// Writes to this disk are not tracked.
    Disabled(String),
    /// The agent does not know this id of this disk, or lost what it knew.
    Lost(String),
    /// The answer breaks its own rules.
    Broken(String),
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disabled(text) | Self::Lost(text) | Self::Broken(text) => f.write_str(text),
        }
    }
}

/// The ranges changed, or why they are not known.
pub type Changes = std::result::Result<RangeSet, Doubt>;

/// Gathers the pages of an answer.
pub(crate) struct Gathering {
    size_bytes: u64,
    ranges: Vec<ByteRange>,
    cursor: Option<u64>,
}

impl Gathering {
    pub fn new(size_bytes: u64) -> Self {
        Self { size_bytes, ranges: Vec::new(), cursor: None }
    }

    /// Takes a page, which says that the next one is at `next_cursor`, or that it is the last.
    pub fn page(
        &mut self,
        page: Vec<ByteRange>,
        next_cursor: Option<u64>,
    ) -> std::result::Result<(), Doubt> {
        let broken = |what: String| Err(Doubt::Broken(what));
        for range in &page {
            if range.checked_end().is_none() || range.offset >= self.size_bytes && !range.is_empty()
            {
                return broken(format!(
                    "the changed range {range} is not on a disk of {} bytes",
                    self.size_bytes
                ));
            }
        }
        if self.ranges.len().saturating_add(page.len()) > MAX_RANGES {
            return broken(format!("more than {MAX_RANGES} changed ranges"));
        }
        // A page that does not move on would be asked for until the end of time.
        if let Some(next) = next_cursor {
            if next <= self.cursor.unwrap_or(0) {
                return broken(format!("the page of changes after {next} covers nothing"));
            }
            self.cursor = Some(next);
        }
        self.ranges.extend(page.into_iter().filter(|range| !range.is_empty()));
        Ok(())
    }

    /// All of it: sorted, joined, and cut at the end of the disk.
    pub fn finish(self) -> RangeSet {
        RangeSet::from(self.ranges).clamp(self.size_bytes)
    }
}

/// What an error of asking for changes means.
///
/// # Errors
/// What has nothing to do with changes: the agent is gone, or denies it.
pub(crate) fn doubt_of(error: AgentError) -> Result<Doubt> {
    match &error {
        AgentError::NotFound { code, detail, .. } | AgentError::Refused { code, detail, .. } => {
            let text = if detail.is_empty() { error.to_string() } else { detail.clone() };
            Ok(if code == "tracking_disabled" { Doubt::Disabled(text) } else { Doubt::Lost(text) })
        }
        AgentError::Protocol { detail, .. } | AgentError::Corrupt { detail, .. } => {
            Ok(Doubt::Broken(detail.clone()))
        }
        _ => Err(error),
    }
}

/// A list of ranges in JSON, taken in without more memory than its ranges need.
#[derive(Debug, Default)]
pub(crate) struct RangeList(pub Vec<ByteRange>);

impl<'de> Deserialize<'de> for RangeList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Ranges;
        impl<'de> Visitor<'de> for Ranges {
            type Value = RangeList;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of {offset, length}")
            }

            fn visit_seq<A: SeqAccess<'de>>(
                self,
                mut list: A,
            ) -> std::result::Result<RangeList, A::Error> {
                let mut ranges: Vec<ByteRange> = Vec::new();
                while let Some(range) = list.next_element::<ByteRange>()? {
                    if ranges.len() >= MAX_RANGES {
                        return Err(serde::de::Error::custom(format!(
                            "more than {MAX_RANGES} ranges"
                        )));
                    }
                    ranges.push(range);
                }
                Ok(RangeList(ranges))
            }
        }
        deserializer.deserialize_seq(Ranges)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ranges, and where the next page is.
    type Page<'a> = (&'a [(u64, u64)], Option<u64>);

    fn gather(size_bytes: u64, pages: &[Page<'_>]) -> Changes {
        let mut gathering = Gathering::new(size_bytes);
        for (ranges, next) in pages {
            let ranges =
                ranges.iter().map(|&(offset, length)| ByteRange::new(offset, length)).collect();
            gathering.page(ranges, *next)?;
        }
        Ok(gathering.finish())
    }

    #[test]
    fn pages_are_joined_sorted_and_cut() {
        let changes = gather(
            1000,
            &[(&[(500, 10), (0, 100), (50, 60)], Some(600)), (&[(590, 20), (990, 100)], None)],
        );
        assert_eq!(
            changes.unwrap().as_slice(),
            [
                ByteRange::new(0, 110),
                ByteRange::new(500, 10),
                ByteRange::new(590, 20),
                ByteRange::new(990, 10)
            ]
        );
        assert!(gather(0, &[(&[], None)]).unwrap().is_empty());
    }

    #[test]
    fn every_trap_is_a_doubt() {
        for (pages, word) in [
            (&[(&[(0, 10)][..], Some(0))][..], "covers nothing"),
            (&[(&[], Some(500)), (&[], Some(500))], "covers nothing"),
            (&[(&[(1000, 1)], None)], "not on a disk"),
            (&[(&[(1, u64::MAX)], None)], "not on a disk"),
        ] {
            match gather(1000, pages) {
                Err(Doubt::Broken(text)) => assert!(text.contains(word), "{text}"),
                other => panic!("{word}: {other:?}"),
            }
        }
    }

    #[test]
    fn lists_are_parsed_and_bounded() {
        let list: RangeList =
            serde_json::from_str(r#"[{"offset":1,"length":2},{"length":4,"offset":3}]"#).unwrap();
        assert_eq!(list.0, [ByteRange::new(1, 2), ByteRange::new(3, 4)]);
        for bad in [
            "{}",
            "[1]",
            r#"[{"offset":-1,"length":2}]"#,
            r#"[{"offset":1}]"#,
            "[{\"offset\":1,\"length\":2}",
        ] {
            assert!(serde_json::from_str::<RangeList>(bad).is_err(), "{bad}");
        }
    }
}
