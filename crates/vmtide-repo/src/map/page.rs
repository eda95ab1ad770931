//! The page of a map segment: up to 4096 runs as LEB128 numbers (format §7).

use super::{MapRun, RUNS_PER_PAGE, Target};
use crate::{ObjectId, leb128};

/// A run as a page holds it: 24 bytes, its pack by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageRun {
    pub first_block: u64,
    pub count: u64,
    /// The pack's number plus one, or 0 for zeros.
    pub pack: u32,
    pub ordinal: u32,
}

impl PageRun {
    pub const fn end(&self) -> u64 {
        self.first_block + self.count
    }

    /// The run with its pack by name. A number without a pack cannot be: pages are checked.
    pub fn resolve(&self, packs: &[ObjectId]) -> MapRun {
        let pack = (self.pack as usize).checked_sub(1).and_then(|number| packs.get(number));
        MapRun {
            first_block: self.first_block,
            count: self.count,
            target: pack.map_or(Target::Zero, |&pack| Target::Data { pack, ordinal: self.ordinal }),
        }
    }
}

/// What the page table says about a page, which its runs must fit exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageBounds {
    pub first_block: u64,
    pub end_block: u64,
    pub runs: u32,
}

/// Appends a run to an encoded page whose last run ended at `previous_end`.
pub(super) fn encode_run(run: &PageRun, previous_end: u64, out: &mut Vec<u8>) {
    leb128::write(run.first_block - previous_end, out);
    leb128::write(run.count, out);
    leb128::write(u64::from(run.pack), out);
    if run.pack != 0 {
        leb128::write(u64::from(run.ordinal), out);
    }
}

/// Decodes a page and checks everything in it: exactly the runs and blocks that the page table
/// says, in order, pack numbers that exist, ordinals that fit 32 bits, nothing left over.
///
/// # Errors
/// What is wrong, for the error message.
pub(crate) fn parse_map_page(
    mut bytes: &[u8],
    bounds: PageBounds,
    packs: usize,
) -> Result<Vec<PageRun>, &'static str> {
    if bounds.runs as usize > RUNS_PER_PAGE {
        return Err("too many runs");
    }
    let mut runs = Vec::with_capacity(bounds.runs as usize);
    let mut position = bounds.first_block;
    for index in 0..bounds.runs {
        let run = parse_run(&mut bytes, position, bounds.end_block, packs)?;
        if index == 0 && run.first_block != bounds.first_block {
            return Err("the first run does not begin where the page does");
        }
        position = run.end();
        runs.push(run);
    }
    if position != bounds.end_block {
        return Err("the last run does not end where the page does");
    }
    if !bytes.is_empty() {
        return Err("bytes after the last run");
    }
    Ok(runs)
}

fn parse_run(
    bytes: &mut &[u8],
    position: u64,
    end: u64,
    packs: usize,
) -> Result<PageRun, &'static str> {
    let mut number = || leb128::read(bytes).ok_or("a number is cut or too large");
    let gap = number()?;
    let count = number()?;
    let pack = number()?;
    let room = end - position;
    if gap > room || count > room - gap {
        return Err("a run leaves the page's blocks");
    }
    if count == 0 {
        return Err("an empty run");
    }
    if pack > packs as u64 {
        return Err("a pack number without a pack");
    }
    let ordinal = if pack == 0 { 0 } else { number()? };
    if pack != 0 && ordinal.checked_add(count).is_none_or(|end| end > 1 << 32) {
        return Err("ordinals above 32 bits");
    }
    Ok(PageRun {
        first_block: position + gap,
        count,
        pack: u32::try_from(pack).map_err(|_| "a pack number above 32 bits")?,
        ordinal: u32::try_from(ordinal).map_err(|_| "ordinals above 32 bits")?,
    })
}
