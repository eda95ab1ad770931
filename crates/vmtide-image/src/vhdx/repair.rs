//! Repairing what can be repaired without guessing: the log is replayed, and a damaged copy of a
//! header or of the region table is made again from the good one.

use super::check::check;
use super::header::{HEADER_BYTES, HEADER_OFFSETS, Header, Headers};
use super::region::{REGION_TABLE_BYTES, REGION_TABLE_OFFSETS, RegionTable, Regions};
use super::replay::replay_onto;
use crate::{CheckReport, Problem, Repair};
use vmtide_block::{Result, WritableBlockDevice};

/// Checks the image and repairs what `repair` allows. An image has no leaks: space that nothing
/// uses is free for new blocks.
///
/// # Errors
/// As [`check`]; what the medium says.
pub(crate) fn repair(file: &dyn WritableBlockDevice, repair: Repair) -> Result<CheckReport> {
    let before = check(file)?;
    if repair != Repair::All {
        return Ok(before);
    }
    let mut headers = Headers::read(file)?;
    replay_onto(file, &mut headers)?;
    repair_header(file, &mut headers)?;
    repair_region_table(file, &headers)?;
    let mut after = check(file)?;
    let is_left = |problem: &Problem| after.problems.iter().any(|left| left == problem);
    let gone: Vec<Problem> =
        before.problems.into_iter().filter(|problem| !is_left(problem)).collect();
    for problem in gone {
        after.add(Problem { repaired: true, ..problem });
    }
    Ok(after)
}

/// Makes the two headers differ in their sequence numbers alone.
fn repair_header(file: &dyn WritableBlockDevice, headers: &mut Headers) -> Result<()> {
    let mut bytes = vec![0; HEADER_BYTES];
    file.read_at(&mut bytes, HEADER_OFFSETS[1 - headers.slot])?;
    match Header::decode(&bytes) {
        Ok(other) if other.sequence_number != headers.current.sequence_number => Ok(()),
        _ => headers.update(file, |_| ()),
    }
}

/// Copies the region table that is used over the other one, where that is none. Of two that are
/// valid and differ nobody knows which is right.
fn repair_region_table(file: &dyn WritableBlockDevice, headers: &Headers) -> Result<()> {
    let regions = Regions::read(file, headers.current.log)?;
    let other_at = REGION_TABLE_OFFSETS[1 - regions.copy];
    let mut bytes = vec![0; REGION_TABLE_BYTES];
    file.read_at(&mut bytes, other_at)?;
    if RegionTable::decode(&bytes).is_ok() {
        return Ok(());
    }
    // The bytes and not what was understood of them.
    file.read_at(&mut bytes, REGION_TABLE_OFFSETS[regions.copy])?;
    file.write_at(&bytes, other_at)?;
    file.flush()
}
