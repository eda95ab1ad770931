//! LVM2: the logical volumes of a volume group, as far as they lie on one disk (lvm2, `lib/format_text/layout.h` and `man
//! vgcfgbackup`). Linear volumes, of any number of segments; those that stripe, mirror or are thin are left out.

mod text;

use crate::bytes::{u32_at, u64_at};
use crate::found::printable;
use crate::volume::{Piece, Volume};
use text::Section;
use vmtide_block::{ByteRange, Result};

/// What sizes are counted in.
const SECTOR: u64 = 512;

/// The sectors that the label may be in.
const LABEL_SECTORS: u64 = 4;

/// The longest description of a volume group that is read: some hundred volumes take 100 KiB.
const MAX_TEXT_BYTES: u64 = 4 << 20;

/// `FMTT_MAGIC`.
const MAGIC: &[u8; 16] = b" LVM2 x[5A%r0N*>";

/// The header of an area of metadata has this length; the text begins behind it.
const HEADER_BYTES: u64 = 512;

/// The most areas of metadata that are looked for.
const MAX_AREAS: usize = 16;

/// The logical volumes with segments in `volume`, by name; none where that is no physical volume.
pub(crate) fn volumes<'a>(volume: &Volume<'a>) -> Result<Vec<(String, Volume<'a>)>> {
    let Some((id, areas)) = label(volume)? else { return Ok(Vec::new()) };
    for (offset, length) in areas {
        let Some(text) = metadata(volume, offset, length)? else { continue };
        let Some(root) = text::parse(&text) else { continue };
        return Ok(group(volume, &id, &root));
    }
    Ok(Vec::new())
}

/// The id of the physical volume, and where the group is described.
type Label = (String, Vec<(u64, u64)>);

fn label(volume: &Volume<'_>) -> Result<Option<Label>> {
    let mut bytes = [0; 512];
    for sector in 0..LABEL_SECTORS {
        if volume.read(&mut bytes, sector * SECTOR)?
            && bytes[..8] == *b"LABELONE"
            && bytes[24..32] == *b"LVM2 001"
        {
            return Ok(parse_label(&bytes));
        }
    }
    Ok(None)
}

fn parse_label(bytes: &[u8; 512]) -> Option<Label> {
    let header = bytes.get(crate::bytes::index(u32_at(bytes, 20)?)..)?;
    let id = String::from_utf8(header.get(..32)?.to_vec()).ok()?;
    // The areas of data end with one of zeros, and so do those of metadata after them.
    let area = |number: usize| {
        Some((u64_at(header, 40 + 16 * number)?, u64_at(header, 48 + 16 * number)?))
    };
    let first = (0..MAX_AREAS).find(|number| area(*number) == Some((0, 0)))? + 1;
    let areas = (first..first + MAX_AREAS).map_while(area);
    Some((id, areas.take_while(|area| *area != (0, 0)).collect()))
}

/// The text of the group in an area: in a ring behind the header.
fn metadata(volume: &Volume<'_>, offset: u64, length: u64) -> Result<Option<String>> {
    let mut header = [0; 512];
    if !volume.read(&mut header, offset)? || header[4..20] != *MAGIC {
        return Ok(None);
    }
    let (Some(begin), Some(size)) = (u64_at(&header, 40), u64_at(&header, 48)) else {
        return Ok(None);
    };
    let Some(ring) = length.checked_sub(HEADER_BYTES) else { return Ok(None) };
    let makes_sense = (HEADER_BYTES..length).contains(&begin) && size <= ring.min(MAX_TEXT_BYTES);
    let Some(from) = offset.checked_add(begin).filter(|_| makes_sense) else { return Ok(None) };
    let mut text = vec![0; usize::try_from(size).unwrap_or(0)];
    let straight = usize::try_from(size.min(length - begin)).unwrap_or(0);
    let (first, wrapped) = text.split_at_mut(straight);
    let is_read = volume.read(first, from)?
        && (wrapped.is_empty() || volume.read(wrapped, offset + HEADER_BYTES)?);
    Ok(if is_read { String::from_utf8(text).ok() } else { None })
}

/// The volumes of the group that `root` describes.
fn group<'a>(volume: &Volume<'a>, id: &str, root: &Section) -> Vec<(String, Volume<'a>)> {
    let mut found = Vec::new();
    // The group is the one section beside some facts about the text.
    for (name, group) in root.sections() {
        let (Some(extent), Some(disks)) =
            (group.number("extent_size"), group.section("physical_volumes"))
        else {
            continue;
        };
        let is_ours = |disk: &Section| {
            disk.text("id").is_some_and(|other| other.chars().filter(|c| *c != '-').eq(id.chars()))
        };
        let Some((ours, disk)) = disks.sections().find(|(_, disk)| is_ours(disk)) else { continue };
        let Some(begin) = disk.number("pe_start") else { continue };
        let place = Place { disk: ours, begin, extent };
        let Some(volumes) = group.section("logical_volumes") else { continue };
        for (logical, section) in volumes.sections() {
            let pieces =
                if section.lists("status", "VISIBLE") { place.pieces(section) } else { None };
            // A segment is a part of the physical volume, and that a part of the disk.
            let on_disk = pieces.and_then(|pieces| volume.inside(&pieces));
            if let Some(logical_volume) = on_disk {
                found.push((printable(&format!("{name}/{logical}")), logical_volume));
            }
        }
    }
    found
}

/// Where extents lie on a physical volume. In sectors.
struct Place<'a> {
    disk: &'a str,
    begin: u64,
    extent: u64,
}

impl Place<'_> {
    /// The segments of a logical volume on this disk; none where one is of a kind that is not read.
    fn pieces(&self, logical: &Section) -> Option<Vec<Piece>> {
        let mut pieces = Vec::new();
        for (_, segment) in logical.sections().filter(|(name, _)| name.starts_with("segment")) {
            if segment.text("type") != Some("striped") || segment.number("stripe_count") != Some(1)
            {
                return None;
            }
            let (disk, extent) = segment.stripe()?;
            if disk != self.disk {
                continue;
            }
            let bytes = |extents: u64| extents.checked_mul(self.extent)?.checked_mul(SECTOR);
            let offset = self.begin.checked_mul(SECTOR)?.checked_add(bytes(extent)?)?;
            let length = bytes(segment.number("extent_count")?)?;
            offset.checked_add(length)?;
            let at = bytes(segment.number("start_extent")?)?;
            pieces.push(Piece { at, range: ByteRange::new(offset, length) });
        }
        Some(pieces)
    }
}
