//! Which layer of a chain each byte of a disk comes from, and where it lies in that layer's file.

use super::open::OpenDisk;
use crate::Result;
use serde::Serialize;
use std::path::Path;
use vmtide_block::{ByteRange, CancelToken, ExtentKind, for_each_extent};
use vmtide_image::{Layer, Placement};

/// The bytes that a layer is asked for at a time: its answer may end earlier.
const STEP_BYTES: u64 = 64 << 30;

/// A range of a disk that lies in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MapExtent<'a> {
    /// The first byte.
    pub start: u64,
    /// The number of bytes.
    pub length: u64,
    /// The layer that says what is there: 0 is the image itself, 1 its parent. None where no layer
    /// does, and the disk reads zeros.
    pub depth: Option<usize>,
    /// Data, known zeros, or never allocated (which reads as zeros).
    pub kind: ExtentKind,
    /// Whether it is stored compressed.
    pub compressed: bool,
    /// Where it begins in the file; none for what is not stored as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// The file of the layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<&'a Path>,
}

/// Calls `visit` with every extent of the disk, in order.
///
/// # Errors
/// What the layers say; those of `visit`.
pub fn map_disk(
    disk: &OpenDisk,
    cancel: &CancelToken,
    visit: &mut dyn FnMut(MapExtent<'_>) -> Result<()>,
) -> Result<()> {
    let mut joined = Joined { last: None, visit };
    let whole = ByteRange::new(0, disk.device.size_bytes());
    if disk.layers.is_empty() {
        let mut visited = Ok(());
        for_each_extent(disk.device.as_ref(), whole, cancel, |extent| {
            let found = Placement {
                range: extent.range,
                kind: extent.kind,
                file_offset: None,
                compressed: false,
            };
            visited = joined.push(found, Some(0), None);
            match visited {
                Ok(()) => Ok(()),
                Err(_) => Err(vmtide_block::BlockError::Cancelled),
            }
        })
        .or_else(|error| if visited.is_err() { Ok(()) } else { Err(error) })?;
        visited?;
        return joined.end();
    }
    map_layers(&disk.layers, 0, whole, cancel, &mut joined)?;
    joined.end()
}

/// Visits what `layers` from `depth` down hold of `range`. The depth of the recursion is that of the
/// chain, which is bounded where it is opened.
fn map_layers<'a>(
    layers: &'a [Layer],
    depth: usize,
    range: ByteRange,
    cancel: &CancelToken,
    joined: &mut Joined<'a, '_>,
) -> Result<()> {
    let nothing = |range| Placement {
        range,
        kind: ExtentKind::Unallocated,
        file_offset: None,
        compressed: false,
    };
    let Some(layer) = layers.get(depth) else {
        return joined.push(nothing(range), None, None);
    };
    // A parent may be smaller than its child; past its end it has nothing.
    let end = range.end().min(layer.image.size_bytes());
    let mut at = range.offset;
    while at < end {
        cancel.check()?;
        let step = ByteRange::from_bounds(at, end.min(at.saturating_add(STEP_BYTES)));
        let before = at;
        for found in layer.image.layout(step)? {
            if found.range.offset != at || found.range.is_empty() || found.range.end() > end {
                return Err(vmtide_block::BlockError::damaged(
                    layer.path.display().to_string(),
                    format!("placement {} does not continue the answer at byte {at}", found.range),
                )
                .into());
            }
            at = found.range.end();
            if found.kind == ExtentKind::Unallocated {
                map_layers(layers, depth + 1, found.range, cancel, joined)?;
            } else {
                joined.push(found, Some(depth), Some(&layer.path))?;
            }
        }
        if at == before {
            return Err(vmtide_block::BlockError::damaged(
                layer.path.display().to_string(),
                format!("no placement reported at byte {at}"),
            )
            .into());
        }
    }
    match ByteRange::from_bounds(at.max(range.offset), range.end()) {
        rest if rest.is_empty() => Ok(()),
        rest => joined.push(nothing(rest), None, None),
    }
}

/// Joins neighbours that continue each other, on the disk and in the file, before they are shown.
struct Joined<'a, 'v> {
    last: Option<MapExtent<'a>>,
    visit: &'v mut dyn FnMut(MapExtent<'_>) -> Result<()>,
}

impl<'a> Joined<'a, '_> {
    fn push(
        &mut self,
        found: Placement,
        depth: Option<usize>,
        file: Option<&'a Path>,
    ) -> Result<()> {
        let next = MapExtent {
            start: found.range.offset,
            length: found.range.length,
            depth,
            kind: found.kind,
            compressed: found.compressed,
            offset: found.file_offset,
            file,
        };
        if let Some(last) = &mut self.last {
            let goes_on = last.offset.map(|offset| offset + last.length) == next.offset;
            let alike =
                (last.depth, last.kind, last.compressed) == (depth, next.kind, next.compressed);
            if alike && goes_on {
                last.length += next.length;
                return Ok(());
            }
        }
        match self.last.replace(next) {
            Some(extent) => (self.visit)(extent),
            None => Ok(()),
        }
    }

    fn end(self) -> Result<()> {
        match self.last {
            Some(extent) => (self.visit)(extent),
            None => Ok(()),
        }
    }
}
