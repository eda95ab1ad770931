//! From the disk to the file: runs of bytes that are stored in one way.

use super::layout::{Grain, SparseLayout};
use vmtide_block::Result;

/// How the bytes of a run are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mapping {
    /// Not here: the parent's, or zero.
    Absent,
    Zero,
    /// As they are, from this byte of the file.
    Data(u64),
    /// One compressed grain, whose marker is at this byte of the file; `span` bytes belong to it at
    /// most, where the next grain says so.
    Compressed {
        at: u64,
        span: Option<u64>,
    },
    /// They may not be read (`NOACCESS`).
    Forbidden,
}

/// A run of bytes that are stored in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) mapping: Mapping,
    pub(super) length: u64,
}

/// One extent's map.
pub(super) trait Map: Send + Sync {
    /// The run at byte `offset` of the extent, at most `limit` bytes and at least one.
    fn run(&self, offset: u64, limit: u64) -> Result<Run>;

    /// The unit in which runs are found, for bounding work.
    fn unit_bytes(&self) -> u64;
}

/// An extent that is one run from end to end.
pub(super) struct Uniform(pub(super) Mapping);

impl Map for Uniform {
    fn run(&self, offset: u64, limit: u64) -> Result<Run> {
        let mapping = match self.0 {
            Mapping::Data(start) => Mapping::Data(start + offset),
            other => other,
        };
        Ok(Run { mapping, length: limit })
    }

    fn unit_bytes(&self) -> u64 {
        u64::MAX
    }
}

/// The run at byte `offset` of an extent within one grain table, whose entries `grain` gives by
/// their number in the table.
pub(super) fn run_in_table(
    layout: &SparseLayout,
    grain: impl Fn(u64) -> Result<Grain>,
    offset: u64,
    limit: u64,
) -> Result<Run> {
    let grain_bytes = layout.grain_bytes();
    let mut index = offset / grain_bytes % layout.entries_per_table;
    let inside = offset % grain_bytes;
    let first = grain(index)?;
    let mut length = grain_bytes - inside;
    if layout.compressed
        && let Grain::At(at) = first
    {
        let next = (index + 1 < layout.entries_per_table).then(|| grain(index + 1).ok()).flatten();
        let span = match next {
            Some(Grain::At(next)) => next.checked_sub(at).filter(|span| *span > 0),
            _ => None,
        };
        return Ok(Run { mapping: Mapping::Compressed { at, span }, length: length.min(limit) });
    }
    let mut expected = first;
    while length < limit && index + 1 < layout.entries_per_table {
        if let Grain::At(at) = expected {
            expected = Grain::At(at.saturating_add(grain_bytes));
        }
        index += 1;
        if grain(index)? != expected {
            break;
        }
        length += grain_bytes;
    }
    let mapping = match first {
        Grain::Absent => Mapping::Absent,
        Grain::Zero => Mapping::Zero,
        Grain::At(at) => Mapping::Data(at + inside),
    };
    Ok(Run { mapping, length: length.min(limit) })
}
