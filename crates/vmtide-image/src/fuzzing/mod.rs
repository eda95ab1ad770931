//! Entry points for fuzzing: hostile bytes in, nothing but a return out.
//!
//! Each function is one target of the `fuzz` package and is also run over a small corpus by the
//! tests. None may panic, allocate by a length that was not checked, or run without an end.

mod qcow2;
mod sparse;
mod vhd;
mod vhdx;
mod vhdx_write;
mod vmdk;

pub use qcow2::{qcow2_read, qcow2_write};
pub use sparse::{SparseFile, pack};
pub use vhd::{vhd_read, vhd_write};
pub use vhdx::vhdx_read;
pub use vhdx_write::vhdx_write;
pub use vmdk::{vmdk_read, vmdk_write};

use crate::{CheckReport, DiskImage};
use vmtide_block::{ByteRange, ExtentKind};

/// The most of one disk that is read, in bytes.
const READ_BYTES: u64 = 4 << 20;
/// The most times that extents and layout are asked for.
const QUESTIONS: usize = 4;

/// Reads what a reader of the whole disk would, within bounds, and holds the answers against each
/// other: zeros where extents say zeros, and answers that cover what was asked.
///
/// # Panics
/// Where the image contradicts itself: that is a finding.
pub fn read_everything(image: &dyn DiskImage) {
    let size_bytes = image.size_bytes();
    let mut buffer = vec![0x55; 64 << 10];
    for offset in [0, size_bytes / 2, size_bytes.saturating_sub(buffer.len() as u64)] {
        let length = crate::bytes::length(size_bytes - offset).min(buffer.len());
        // The outcome is either; what matters is that there is one.
        let _ = image.read_at(&mut buffer[..length], offset);
    }
    let (mut at, mut left) = (0, READ_BYTES);
    for _ in 0..QUESTIONS {
        let range = ByteRange::from_bounds(at, size_bytes);
        let Ok(extents) = image.extents(range) else { break };
        for extent in extents {
            assert!(extent.range.offset == at && !extent.range.is_empty(), "{extent:?} at {at}");
            at = extent.range.end();
            let length = buffer.len().min(crate::bytes::length(extent.range.length.min(left)));
            left -= length as u64;
            let piece = &mut buffer[..length];
            let is_zero = extent.kind != ExtentKind::Data;
            if image.read_at(piece, extent.range.offset).is_ok() && is_zero {
                assert!(vmtide_block::is_zero(piece), "{extent:?} is not zeros");
            }
        }
        assert!(at <= size_bytes && (at > range.offset || range.is_empty()), "no answer at {at}");
    }
    let mut at = 0;
    for _ in 0..QUESTIONS {
        let Ok(placements) = image.layout(ByteRange::from_bounds(at, size_bytes)) else { break };
        for placement in placements {
            assert!(placement.range.offset == at, "{placement:?} at {at}");
            at = placement.range.end();
        }
    }
}

/// Holds a report's figures against each other.
///
/// # Panics
/// Where they contradict each other: that is a finding.
pub fn believe(report: &CheckReport) {
    let counted = report.errors + report.leaks + report.repaired;
    let listed = report.problems.len() as u64;
    assert!(listed >= counted.min(1000), "{counted} problems, {listed} listed");
}
