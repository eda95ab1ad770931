//! Checking a VHD: footers, header, and that no two things share bytes of the file.

use super::footer::{FOOTER_BYTES, Footer, Kind, Located};
use super::header::{HEADER_BYTES, Header};
use super::image::{Opened, read_bitmap};
use super::writer::read_table;
use crate::check::MAX_LISTED;
use crate::{CheckReport, Problem, Repair, Severity};
use vmtide_block::{BlockDevice, BlockError, Result, WritableBlockDevice};

/// A block by its place in the file: the table's entry, then the block's number.
type Placed = (u32, u32);

/// Checks the image: footers, header, block table.
///
/// # Errors
/// [`BlockError::Damaged`] where footer and header are so damaged that nothing more can be said.
pub(crate) fn check(file: &dyn BlockDevice) -> Result<CheckReport> {
    Ok(examine(file)?.report)
}

/// Checks the image and repairs what can be without guessing: footers from each other, and the file
/// is cut off behind its last block.
///
/// # Errors
/// As [`check`], and what the medium says.
pub(crate) fn repair(file: &dyn WritableBlockDevice, repair: Repair) -> Result<CheckReport> {
    let mut found = examine(file)?;
    if repair == Repair::All && (found.bad_copy || found.bad_trailer) {
        let bytes = found.footer.encode();
        if found.has_copy {
            // The copy first: it is what counts while the one at the end is written.
            file.write_at(&bytes, 0)?;
            file.flush()?;
        }
        if found.bad_trailer {
            write_trailer(file, found.used, &bytes)?;
        }
        let count = u64::from(found.bad_copy) + u64::from(found.bad_trailer);
        found.bad_trailer = false;
        found.mark_repaired(Severity::Error, FOOTER_PROBLEM, count);
    }
    if repair != Repair::Nothing && found.tail_leaked && !found.bad_trailer {
        // Where a footer was written just now the file is cut off already, and stays so.
        write_trailer(file, found.used, &found.footer.encode())?;
        found.mark_repaired(Severity::Leak, TAIL_PROBLEM, 1);
    }
    Ok(found.report)
}

/// The bytes that writers leave between blocks for the sake of alignment.
const MAX_PADDING: u64 = 4096;

/// How the problems begin that are repaired.
const FOOTER_PROBLEM: &str = "footer";
const TAIL_PROBLEM: &str = "tail";

/// Writes a footer at `end` and lets the file end behind it.
fn write_trailer(file: &dyn WritableBlockDevice, end: u64, bytes: &[u8]) -> Result<()> {
    if file.size_bytes() < end + FOOTER_BYTES {
        file.resize(end + FOOTER_BYTES)?;
    }
    file.write_at(bytes, end)?;
    file.flush()?;
    file.resize(end + FOOTER_BYTES)?;
    file.flush()
}

/// What a check found.
struct Examined {
    report: CheckReport,
    footer: Footer,
    /// Whether the image has a footer at its start.
    has_copy: bool,
    bad_copy: bool,
    bad_trailer: bool,
    /// Everything before is in use.
    used: u64,
    tail_leaked: bool,
}

impl Examined {
    fn add(&mut self, severity: Severity, detail: String) {
        self.report.add(Problem { severity, detail, repaired: false });
    }

    /// Counts so many problems as repaired, and those that are listed.
    fn mark_repaired(&mut self, severity: Severity, prefix: &str, count: u64) {
        self.report.repaired += count;
        match severity {
            Severity::Error => self.report.errors -= count,
            Severity::Leak => self.report.leaks -= count,
            Severity::Note => {}
        }
        for problem in &mut self.report.problems {
            problem.repaired |= problem.severity == severity && problem.detail.starts_with(prefix);
        }
    }
}

fn examine(file: &dyn BlockDevice) -> Result<Examined> {
    let located = Located::find(file)?;
    let opened = Opened::new(file, &located)?;
    let mut found = Examined {
        report: CheckReport { size_bytes: opened.size_bytes, ..CheckReport::default() },
        footer: located.footer.clone(),
        has_copy: located.copy.is_some(),
        bad_copy: false,
        bad_trailer: located.trailer.is_none(),
        used: 0,
        tail_leaked: false,
    };
    if let Some(problem) = &located.trailer_problem {
        let detail = format!("footer at the end of {} bytes: {problem}", file.size_bytes());
        found.add(Severity::Error, detail);
    }
    match &located.copy {
        Some(Err(problem)) => {
            found.bad_copy = true;
            found.add(Severity::Error, format!("footer copy at 0: {problem}"));
        }
        Some(Ok(copy)) if copy.encode() != located.footer.encode() => {
            found.bad_copy = true;
            found.add(Severity::Error, "footer copy at 0: differs from the one at the end".into());
        }
        _ => {}
    }
    if opened.kind() == Kind::Fixed {
        found.report.allocated_bytes = opened.size_bytes;
        return Ok(found);
    }
    let entries = read_table(file, &opened)?;
    let errors_before = found.report.errors;
    let last_end = walk_blocks(file, &opened, &entries, |problem| {
        // What is not listed needs no words: a table can be nothing but damage.
        let is_listed = found.report.problems.len() < MAX_LISTED;
        let detail = if is_listed { problem.to_string() } else { String::new() };
        found.add(problem.severity(), detail);
        Ok(())
    })?;
    let last_end = last_end.next_multiple_of(FOOTER_BYTES);
    found.used = last_end;
    let tail = located.body_bytes(file).saturating_sub(last_end);
    if tail >= opened.shape().stored_bytes() + MAX_PADDING {
        found.tail_leaked = true;
        found.add(
            Severity::Leak,
            format!("{TAIL_PROBLEM}: nothing refers to the {tail} bytes from {last_end:#x} on"),
        );
    }
    // Only of blocks that share nothing there are no more bitmaps than the file has bytes.
    let is_sound = found.report.errors == errors_before;
    found.report.allocated_bytes = allocated(file, &opened, &entries, is_sound)?;
    Ok(found)
}

/// The bytes of disk that the blocks store; whole blocks unless their bitmaps are to be read.
fn allocated(
    file: &dyn BlockDevice,
    opened: &Opened,
    entries: &[u32],
    with_bitmaps: bool,
) -> Result<u64> {
    let shape = opened.shape();
    let mut bytes = 0;
    for (block, entry) in (0u64..).zip(entries) {
        let Some(start) = shape.start(*entry) else {
            continue;
        };
        let size = shape.block_bytes.min(opened.size_bytes - block * shape.block_bytes);
        if opened.kind() == Kind::Dynamic || !with_bitmaps {
            bytes += size;
            continue;
        }
        let bitmap = read_bitmap(file, shape, block, start)?;
        let (mut at, end) = (0, size.div_ceil(512));
        while at < end {
            let (own, run) = bitmap.run(at, end);
            bytes += if own { (run * 512).min(size - at * 512) } else { 0 };
            at += run;
        }
    }
    Ok(bytes)
}

/// Something wrong with the place of a block.
enum BlockProblem {
    /// What two things share bytes of the file.
    Overlap { block: u32, start: u64, other: String },
    /// The block's data ends after the file.
    Truncated { block: u32, start: u64, end: u64, file_bytes: u64 },
    /// Space that nothing refers to.
    Gap { from: u64, to: u64 },
}

impl BlockProblem {
    const fn severity(&self) -> Severity {
        match self {
            Self::Gap { .. } => Severity::Leak,
            _ => Severity::Error,
        }
    }
}

impl std::fmt::Display for BlockProblem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Overlap { block, start, other } => write!(
                f,
                "block table, entry {block}: the block at {start:#x} shares bytes with {other}"
            ),
            Self::Truncated { block, start, end, file_bytes } => write!(
                f,
                "block table, entry {block}: the block at {start:#x} would end at {end:#x}, past \
                 the {file_bytes} bytes of the file in front of its footer"
            ),
            Self::Gap { from, to } => {
                write!(f, "gap: nothing refers to the bytes from {from:#x} to {to:#x}")
            }
        }
    }
}

/// Succeeds where no block shares bytes with another or with the header, and all are inside the
/// file: only such an image is written. Answers with the end of what is in use.
pub(super) fn place_blocks(
    file: &dyn BlockDevice,
    opened: &Opened,
    entries: &[u32],
) -> Result<u64> {
    walk_blocks(file, opened, entries, |problem| match problem.severity() {
        Severity::Error => Err(BlockError::damaged(
            file.name(),
            format!("{problem}; it must not be written: read what is there into a new image"),
        )),
        _ => Ok(()),
    })
}

/// Looks at all blocks in the order of the file; answers with the end of what is in use.
fn walk_blocks(
    file: &dyn BlockDevice,
    opened: &Opened,
    entries: &[u32],
    mut report: impl FnMut(BlockProblem) -> Result<()>,
) -> Result<u64> {
    let Some(header) = &opened.header else {
        return Ok(opened.size_bytes);
    };
    let shape = opened.shape();
    let fixed = fixed_regions(header, opened.entries, file.size_bytes());
    let mut placed: Vec<Placed> = (0u32..)
        .zip(entries)
        .filter(|(_, entry)| shape.start(**entry).is_some())
        .map(|(block, entry)| (*entry, block))
        .collect();
    placed.sort_unstable();
    let used = fixed.iter().map(|(_, _, end)| *end).max().unwrap_or(FOOTER_BYTES);
    // Nothing is missed in front of the first block: what is there is small and belongs together.
    let mut stored_to = placed.first().map_or(0, |(entry, _)| u64::from(*entry) * 512);
    let mut before: Option<(u32, u64)> = None;
    let file_bytes = file.size_bytes();
    for (entry, block) in placed {
        let start = u64::from(entry) * 512;
        let on_disk = opened.size_bytes - u64::from(block) * shape.block_bytes;
        let needed = start + shape.bitmap_bytes + shape.block_bytes.min(on_disk);
        if needed > file_bytes {
            report(BlockProblem::Truncated { block, start, end: needed, file_bytes })?;
        }
        if let Some((other, end)) = before
            && start < end
        {
            report(BlockProblem::Overlap { block, start, other: format!("block {other}") })?;
        }
        if let Some((name, _, _)) = fixed.iter().find(|(_, from, to)| start < *to && *from < needed)
        {
            report(BlockProblem::Overlap { block, start, other: (*name).to_owned() })?;
        }
        if start.saturating_sub(stored_to) >= shape.stored_bytes() + MAX_PADDING
            && !fixed.iter().any(|(_, from, to)| stored_to < *to && *from < start)
        {
            report(BlockProblem::Gap { from: stored_to, to: start })?;
        }
        before = Some((block, before.map_or(needed, |(_, end)| end.max(needed))));
        stored_to = stored_to.max(start + shape.stored_bytes());
    }
    Ok(used.max(stored_to))
}

/// What has its place in the file beside the blocks: name, first byte, end.
pub(super) fn fixed_regions(
    header: &Header,
    entries: u64,
    file_bytes: u64,
) -> Vec<(&'static str, u64, u64)> {
    let mut regions = vec![
        ("the footer copy", 0, FOOTER_BYTES),
        ("the dynamic header", header.offset, header.offset + HEADER_BYTES),
        ("the block table", header.table_offset, header.table_offset + entries * 4),
    ];
    for (_, locator) in header.locators() {
        let end = locator.offset.saturating_add(u64::from(locator.text_bytes));
        if end <= file_bytes {
            regions.push(("a parent locator", locator.offset, end));
        }
    }
    regions
}
