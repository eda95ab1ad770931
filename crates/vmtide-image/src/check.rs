//! Checking an image's structure, and repairing what can be repaired without guessing.

use crate::open::extent_files;
use crate::{Format, OpenOptions, probe_file, qcow2, vhd, vhdx, vmdk};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;
use vmtide_block::{BlockDevice, OpenMode, Result};

/// How many problems a report lists; more are only counted, so that an image that is nothing but
/// damage does not take all memory.
pub(crate) const MAX_LISTED: usize = 1000;

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// The problems, in the order found; at most a thousand.
    pub problems: Vec<Problem>,
    /// How many problems mean lost or wrong data, repaired ones not counted.
    pub errors: u64,
    /// How many problems only waste space, repaired ones not counted.
    pub leaks: u64,
    /// How many problems were repaired.
    pub repaired: u64,
    /// The bytes of disk that this layer stores.
    pub allocated_bytes: u64,
    /// The bytes of the virtual disk.
    pub size_bytes: u64,
}

impl CheckReport {
    /// Adds a problem.
    pub fn add(&mut self, problem: Problem) {
        match (problem.repaired, problem.severity) {
            (true, _) => self.repaired += 1,
            (false, Severity::Error) => self.errors += 1,
            (false, Severity::Leak) => self.leaks += 1,
            (false, Severity::Note) => {}
        }
        if self.problems.len() < MAX_LISTED {
            self.problems.push(problem);
        }
    }
}

/// One thing that is not as the specification wants it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What it costs.
    pub severity: Severity,
    /// The structure, its offset in the file, the value found and what it should be, in one line.
    pub detail: String,
    /// Whether it was repaired.
    pub repaired: bool,
}

/// What a problem costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Data is lost, wrong, or will be when the image is written.
    Error,
    /// Space in the file that nothing refers to.
    Leak,
    /// Odd, harmless: for example a log that a reader has to replay.
    Note,
}

/// What a check may change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    #[default]
    Nothing,
    /// Only leaks: no reader sees a difference.
    Leaks,
    /// All that can be repaired without guessing.
    All,
}

/// Checks the structure of the image at `path`, and repairs what `repair` allows. Of a chain only
/// this image is looked at. The format is probed where the options do not give it. A raw disk has
/// no structure to check.
///
/// # Errors
/// [`vmtide_block::BlockError::Damaged`] where the image is so damaged that nothing more can be said
/// of it; what the medium says.
pub fn check_image(
    path: impl AsRef<Path>,
    options: &OpenOptions,
    repair: Repair,
) -> Result<CheckReport> {
    let path = path.as_ref();
    let mode = match repair {
        Repair::Nothing => OpenMode::ReadOnly,
        Repair::Leaks | Repair::All => OpenMode::ReadWrite,
    };
    let file = options.file(path, mode)?;
    let format = options.format.map_or_else(|| probe_file(path, &file), Ok)?;
    match (format, repair) {
        (Format::Raw, _) => Ok(CheckReport {
            size_bytes: file.size_bytes(),
            allocated_bytes: file.size_bytes(),
            ..CheckReport::default()
        }),
        (Format::Vhdx, Repair::Nothing) => vhdx::check(&file),
        (Format::Vhdx, repair) => vhdx::repair(&file, repair),
        (Format::Vhd, Repair::Nothing) => vhd::check(&file),
        (Format::Vhd, repair) => vhd::repair(&file, repair),
        (Format::Vmdk, repair) => {
            let files = extent_files(path, options);
            match repair {
                Repair::Nothing => vmdk::check(Arc::new(file), &files),
                repair => vmdk::repair(Arc::new(file), &files, repair),
            }
        }
        (Format::Qcow2, Repair::Nothing) => qcow2::check(&file),
        (Format::Qcow2, repair) => qcow2::repair(&file, repair),
    }
}
