//! Checking an image's tables and reference counts, and repairing the counts.
//!
//! 1. Everything that refers to a cluster of the file is walked and counted: header, L1 and L2
//!    tables of the disk and of every internal snapshot, data, bitmaps, the refcount structure
//!    ([`references`]).
//! 2. The counts in the file are held against that: too low is an error (the cluster will be given
//!    away while in use), too high a leak ([`counts`]).
//! 3. The flag in L1 and L2 entries that says "the count is exactly one" is held against the counts
//!    ([`flags`]).
//!
//! Counts and flags follow from what refers to what, so they can be put right without guessing;
//! entries that lead nowhere cannot. Where the refcount structure itself is broken a new one is
//! written behind the file's end and the header switched to it.

mod counts;
mod flags;
mod rebuild;
mod references;

use super::header::{Header, field, incompatible};
use crate::{CheckReport, Problem, Repair, Severity};
use references::References;
use vmtide_block::{BlockDevice, BlockError, Result, WritableBlockDevice};

/// Checks the image in `file`, which is not changed.
///
/// Memory: two bytes for each cluster of the file, at most 128 MiB (4 TiB of file with clusters of
/// 64 KiB); larger ones are refused.
///
/// # Errors
/// [`BlockError::Damaged`] where the header cannot be used, [`BlockError::Unsupported`] for
/// encrypted images and files of too many clusters.
pub(crate) fn check(file: &dyn BlockDevice) -> Result<CheckReport> {
    Checker { file, writable: None, repair: Repair::Nothing }.run()
}

/// As [`check`], and repairs: leaks with [`Repair::Leaks`]; all counts, the flags that depend on
/// them, reserved bits and the dirty mark with [`Repair::All`].
///
/// # Errors
/// As [`check`], and what the medium says; the image is then no worse than before and can be
/// repaired again.
pub(crate) fn repair(file: &dyn WritableBlockDevice, repair: Repair) -> Result<CheckReport> {
    Checker { file, writable: Some(file), repair }.run()
}

struct Checker<'a> {
    file: &'a dyn BlockDevice,
    writable: Option<&'a dyn WritableBlockDevice>,
    repair: Repair,
}

impl<'a> Checker<'a> {
    fn run(&self) -> Result<CheckReport> {
        let header = Header::read(self.file)?;
        if header.encryption != 0 {
            return Err(BlockError::unsupported(
                self.file.name(),
                "is encrypted and cannot be checked; use qemu-img check",
            ));
        }
        let mut report = CheckReport { size_bytes: header.size_bytes, ..CheckReport::default() };
        let mut references = References::collect(self.file, &header, &mut report)?;
        let ones = self.check_counts(&header, &mut references, &mut report)?;
        self.check_flags(&header, &ones, &mut report)?;
        self.check_marks(&header, &mut report)?;
        if let Some(file) = self.writable {
            file.flush()?;
        }
        Ok(report)
    }

    /// The device to repair on where everything may be repaired.
    fn repairs_all(&self) -> Option<&'a dyn WritableBlockDevice> {
        self.writable.filter(|_| self.repair == Repair::All)
    }

    /// The device to repair on where at least leaks may be repaired.
    fn repairs_leaks(&self) -> Option<&'a dyn WritableBlockDevice> {
        self.writable.filter(|_| self.repair != Repair::Nothing)
    }

    /// The dirty and corrupt marks; they go once nothing is wrong any more.
    fn check_marks(&self, header: &Header, report: &mut CheckReport) -> Result<()> {
        let marks = header.incompatible & (incompatible::DIRTY | incompatible::CORRUPT);
        if marks == 0 {
            return Ok(());
        }
        let repaired = match self.repairs_all() {
            Some(file) if report.errors == 0 => {
                file.flush()?;
                let left = header.incompatible & !marks;
                file.write_at(&left.to_be_bytes(), field::INCOMPATIBLE as u64)?;
                true
            }
            _ => false,
        };
        for (mark, severity, what) in [
            (
                incompatible::DIRTY,
                Severity::Note,
                "dirty: its last writer did not close it, counts may be stale",
            ),
            // Whoever found it also refused to go on: what the guest wrote then is not here.
            (
                incompatible::CORRUPT,
                Severity::Error,
                "corrupt: a writer found damage and stopped writing",
            ),
        ] {
            if marks & mark != 0 {
                let detail = format!("header at 72: the image is marked {what}");
                report.add(Problem { severity, detail, repaired });
            }
        }
        Ok(())
    }
}

fn error(detail: String, repaired: bool) -> Problem {
    Problem { severity: Severity::Error, detail, repaired }
}
