//! Reading an open disk: what the reader and the writer share.

use super::compressed::GrainPlace;
use super::disk::{Disk, Part};
use super::hosted::SECTOR;
use super::map::{Mapping, Run};
use crate::bytes::length;
use crate::deflate::Inflater;
use crate::image::{Placement, push_placement};
use vmtide_block::{BlockDevice, BlockError, ByteRange, Extent, ExtentKind, Result, push_extent};

/// The most extents in one answer.
const MAX_EXTENTS: usize = 1 << 16;

/// The most grains one answer looks at, so that the caller can cancel within milliseconds.
const MAX_WORK: u64 = 1 << 20;

impl Disk {
    /// Fills `buffer` from `offset`; the caller has checked the range.
    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let mut inflater = None;
        let mut rest = buffer;
        let mut at = offset;
        while !rest.is_empty() {
            let (part, run) = self.run(at, at + rest.len() as u64)?;
            let (piece, after) = rest.split_at_mut(length(run.length));
            self.read_run(part, run.mapping, piece, at, &mut inflater)?;
            at += run.length;
            rest = after;
        }
        Ok(())
    }

    /// The run at byte `at` of the disk, up to `end` at most.
    fn run(&self, at: u64, end: u64) -> Result<(&Part, Run)> {
        let part = self.part(at)?;
        let limit = part.range.end().min(end) - at;
        Ok((part, part.map.run(at - part.range.offset, limit)?))
    }

    fn read_run(
        &self,
        part: &Part,
        mapping: Mapping,
        piece: &mut [u8],
        at: u64,
        inflater: &mut Option<Inflater>,
    ) -> Result<()> {
        match (mapping, &part.file, &part.compressed) {
            (Mapping::Absent, ..) => read_parent(self.parent.as_deref(), piece, at),
            (Mapping::Data(offset), Some(file), _) => read_stored(&*file.reader, piece, offset),
            (Mapping::Compressed { at: marker, span }, _, Some(grains)) => {
                let extent_offset = at - part.range.offset;
                let inside = extent_offset % part.map.unit_bytes();
                let place = GrainPlace { at: marker, span, extent_offset: extent_offset - inside };
                grains.read(inflater.get_or_insert_with(Inflater::new), place, inside, piece)
            }
            (Mapping::Forbidden, ..) => Err(BlockError::unsupported(
                &self.name,
                format!(
                    "byte {at} of the disk lies in an extent that says NOACCESS, so that its bytes are not known; to \
                     read zeros there, change that line to \"NOACCESS {} ZERO\" in a copy of the descriptor",
                    part.range.length / SECTOR
                ),
            )),
            _ => {
                piece.fill(0);
                Ok(())
            }
        }
    }

    /// What `range` holds, merged through the chain; the caller has checked the range.
    pub(super) fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        let mut extents = Vec::new();
        self.walk(range, |part, run, at| {
            let range = ByteRange::new(at, run.length);
            match (run.mapping, &self.parent) {
                (Mapping::Absent, Some(parent)) => {
                    let below = range.intersect(&ByteRange::new(0, parent.size_bytes()));
                    if below.is_empty() || below.offset != at {
                        push_extent(&mut extents, Extent { range, kind: ExtentKind::Unallocated });
                    } else {
                        let covered = shifted(&**parent, below, at, |extent| {
                            push_extent(&mut extents, extent);
                        })?;
                        return Ok((covered, extents.len()));
                    }
                }
                (Mapping::Data(offset), _) if part.flat => {
                    let covered = self.flat_extents(part, offset, range, |extent| {
                        push_extent(&mut extents, extent);
                    })?;
                    return Ok((covered, extents.len()));
                }
                (mapping, _) => push_extent(&mut extents, Extent { range, kind: kind(mapping) }),
            }
            Ok((run.length, extents.len()))
        })?;
        Ok(extents)
    }

    /// Where the bytes of `range` are in this image; the caller has checked the range.
    pub(super) fn layout(&self, range: ByteRange) -> Result<Vec<Placement>> {
        let mut placements = Vec::new();
        self.walk(range, |part, run, at| {
            let range = ByteRange::new(at, run.length);
            let compressed = matches!(run.mapping, Mapping::Compressed { .. });
            if let Mapping::Data(offset) = run.mapping
                && part.flat
            {
                let covered = self.flat_extents(part, offset, range, |extent| {
                    let (range, kind) = (extent.range, extent.kind);
                    let place = Placement { range, kind, file_offset: None, compressed };
                    push_placement(&mut placements, place);
                })?;
                return Ok((covered, placements.len()));
            }
            let file_offset = match run.mapping {
                Mapping::Data(offset) if part.in_main_file => Some(offset),
                _ => None,
            };
            let kind = kind(run.mapping);
            push_placement(&mut placements, Placement { range, kind, file_offset, compressed });
            Ok((run.length, placements.len()))
        })?;
        Ok(placements)
    }

    /// Gives the runs of `range` to `visit`, which answers with the bytes it dealt with and the
    /// length of its answer, until there is enough.
    fn walk(
        &self,
        range: ByteRange,
        mut visit: impl FnMut(&Part, Run, u64) -> Result<(u64, usize)>,
    ) -> Result<()> {
        let mut at = range.offset;
        let mut work = 0u64;
        while at < range.end() && work < MAX_WORK {
            let (part, run) = self.run(at, range.end())?;
            work = work.saturating_add(run.length / part.map.unit_bytes() + 1);
            let (covered, answers) = visit(part, run, at)?;
            at += covered;
            if answers >= MAX_EXTENTS {
                break;
            }
        }
        Ok(())
    }

    /// The holes of a flat extent's file, as extents of the disk.
    fn flat_extents(
        &self,
        part: &Part,
        offset: u64,
        range: ByteRange,
        mut push: impl FnMut(Extent),
    ) -> Result<u64> {
        let Some(file) = &part.file else {
            push(Extent { range, kind: ExtentKind::Zero });
            return Ok(range.length);
        };
        let inside = ByteRange::new(offset, range.length);
        shifted(&*file.reader, inside, range.offset, |mut extent| {
            if extent.kind != ExtentKind::Data {
                // The file's own: no parent shines through a hole.
                extent.kind = ExtentKind::Zero;
            }
            push(extent);
        })
    }
}

/// Gives the extents of `range` of a device below to `push`, moved to byte `at`, and returns the
/// bytes they cover.
fn shifted(
    device: &dyn BlockDevice,
    range: ByteRange,
    at: u64,
    mut push: impl FnMut(Extent),
) -> Result<u64> {
    let mut covered = 0;
    for extent in device.extents(range)? {
        if extent.range.offset != range.offset + covered || extent.range.end() > range.end() {
            return Err(BlockError::damaged(
                device.name(),
                format!("extent {} does not continue the answer", extent.range),
            ));
        }
        push(Extent::new(at + covered, extent.range.length, extent.kind));
        covered += extent.range.length;
    }
    if covered == 0 {
        return Err(BlockError::damaged(device.name(), format!("no extents reported for {range}")));
    }
    Ok(covered)
}

fn kind(mapping: Mapping) -> ExtentKind {
    match mapping {
        Mapping::Absent => ExtentKind::Unallocated,
        Mapping::Zero => ExtentKind::Zero,
        // What may not be read is no zero: the reader shall see the error.
        Mapping::Data(_) | Mapping::Compressed { .. } | Mapping::Forbidden => ExtentKind::Data,
    }
}

/// Fills `piece` with the parent's bytes from `at`; past its end and without one there are zeros.
pub(super) fn read_parent(
    parent: Option<&dyn BlockDevice>,
    piece: &mut [u8],
    at: u64,
) -> Result<()> {
    let Some(parent) = parent else {
        piece.fill(0);
        return Ok(());
    };
    let present = piece.len().min(length(parent.size_bytes().saturating_sub(at)));
    let (stored, missing) = piece.split_at_mut(present);
    missing.fill(0);
    if stored.is_empty() {
        return Ok(());
    }
    parent.read_at(stored, at)
}

/// Reads grains as they are; a file that ends within one was cut off.
fn read_stored(file: &dyn BlockDevice, piece: &mut [u8], offset: u64) -> Result<()> {
    let end = offset.checked_add(piece.len() as u64);
    if end.is_none_or(|end| end > file.size_bytes()) {
        return Err(BlockError::damaged(
            file.name(),
            format!(
                "VMDK grain data of {} bytes at {offset:#x} is past the end of the file of {} bytes: \
                 the extent is cut off",
                piece.len(),
                file.size_bytes()
            ),
        ));
    }
    file.read_at(piece, offset)
}
