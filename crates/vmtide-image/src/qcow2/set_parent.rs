//! Giving a qcow2 image another backing file, or none.
//!
//! The name and its length are fields of the header's first sector, and so is where the name is;
//! the format is a header extension. A new first cluster is made whose bytes behind the first
//! sector are only different where the old header has nothing: they are written first, and the
//! first sector, which goes over to them, is written when they are durable. A crash leaves the old
//! name or the new one.

use super::header::{Header, MAX_NAME_BYTES, autoclear, extension, field, incompatible};
use crate::Format;
use crate::bytes::{be_u32, be_u64, length, put};
use crate::chain::LinkTarget;
use std::ops::Range;
use vmtide_block::{BlockError, Result, WritableBlockDevice};

/// What every medium writes whole or not at all.
const SECTOR: usize = 512;

/// The extension that names feature bits for people; the first to go where there is no room.
const FEATURE_NAMES: u32 = 0x6803_f857;

/// A header extension: its type and its bytes.
type Extension = (u32, Vec<u8>);

/// Lets the image name another backing file; at every moment it names the old one or the new one.
///
/// # Errors
/// [`BlockError::Unsupported`] where the image cannot have one, or its first cluster has no room
/// for both names; what the medium says.
pub(crate) fn set_parent(
    file: &dyn WritableBlockDevice,
    target: Option<&LinkTarget>,
) -> Result<()> {
    let refuse = |detail: &str| Err(BlockError::unsupported(file.name(), detail));
    let header = Header::read(file)?;
    if header.has(incompatible::CORRUPT) {
        return refuse("is marked corrupt; repair it first");
    }
    let is_raw_external = header.has(incompatible::EXTERNAL_DATA)
        && header.autoclear & autoclear::RAW_EXTERNAL_DATA != 0;
    if is_raw_external && target.is_some() {
        return refuse("has a raw external data file, which excludes a backing file");
    }
    let name = target.map_or("", |target| target.name.as_str());
    if name.len() > length(u64::from(MAX_NAME_BYTES)) {
        return refuse("cannot have a backing file whose name is longer than 1023 bytes");
    }
    let mut cluster = vec![0u8; length(header.cluster_bytes().min(file.size_bytes()))];
    file.read_at(&mut cluster, 0)?;
    let old = OldHeader::read(&cluster, header.version);
    let format = target.map(|target| format_name(target.format));
    for extensions in old.candidates(format) {
        let area = encode(&extensions);
        let end = old.start + area.len();
        for name_at in [end, old.name.end.max(end).next_multiple_of(8), old.name.start] {
            if let Some(changed) = old.changed(&cluster, &area, name, name_at) {
                return write(file, &changed, &cluster);
            }
        }
    }
    refuse("has no room in its header for the names of both backing files; convert it")
}

/// The name of a format as QEMU writes and reads it.
const fn format_name(format: Format) -> &'static str {
    match format {
        Format::Vhd => "vpc",
        other => other.name(),
    }
}

/// What of the first cluster the header uses.
struct OldHeader {
    /// Where the extensions begin.
    start: usize,
    /// Where they end, with the mark of their end.
    end: usize,
    extensions: Vec<Extension>,
    /// The backing file's name.
    name: Range<usize>,
}

impl OldHeader {
    /// Reads a header that was checked.
    fn read(cluster: &[u8], version: u32) -> Self {
        let start = if version == 2 {
            field::V2_LENGTH
        } else {
            length(u64::from(be_u32(cluster, 100))).max(field::V3_LENGTH)
        };
        let name_at = length(be_u64(cluster, 8));
        let name = name_at..name_at + length(u64::from(be_u32(cluster, 16)));
        let limit = if name_at == 0 { cluster.len() } else { cluster.len().min(name_at) };
        let mut extensions = Vec::new();
        let mut at = start;
        while at + 8 <= limit {
            let (kind, size) = (be_u32(cluster, at), length(u64::from(be_u32(cluster, at + 4))));
            at += 8;
            let Some(data) = cluster.get(at..at + size).filter(|_| kind != extension::END) else {
                break;
            };
            extensions.push((kind, data.to_vec()));
            at += size.next_multiple_of(8);
        }
        Self { start, end: at.min(limit), extensions, name }
    }

    /// The extensions with this backing format, the best first: as they are, and without the names
    /// of features, which only explain.
    fn candidates(&self, format: Option<&str>) -> Vec<Vec<Extension>> {
        let mut extensions = self.extensions.clone();
        let place = extensions.iter().position(|(kind, _)| *kind == extension::BACKING_FORMAT);
        match (place.and_then(|place| extensions.get_mut(place)), format) {
            (Some((_, data)), Some(format)) => *data = format.as_bytes().to_vec(),
            (None, Some(format)) => {
                extensions.insert(0, (extension::BACKING_FORMAT, format.as_bytes().to_vec()));
            }
            (_, None) => extensions.retain(|(kind, _)| *kind != extension::BACKING_FORMAT),
        }
        let mut short = extensions.clone();
        short.retain(|(kind, _)| *kind != FEATURE_NAMES);
        vec![extensions, short]
    }

    /// The first cluster with these extensions and this name; `None` where it does not fit, or
    /// would change a byte behind the first sector that the old header uses.
    fn changed(&self, cluster: &[u8], area: &[u8], name: &str, name_at: usize) -> Option<Vec<u8>> {
        let end = self.start + area.len();
        let fits = end <= cluster.len() && name_at + name.len() <= cluster.len() && name_at >= end;
        if !fits {
            return None;
        }
        let mut changed = cluster.to_vec();
        put(&mut changed, self.start, area);
        put(&mut changed, name_at, name.as_bytes());
        let offset = if name.is_empty() { 0 } else { name_at as u64 };
        put(&mut changed, 8, &offset.to_be_bytes());
        put(&mut changed, 16, &u32::try_from(name.len()).ok()?.to_be_bytes());
        let is_used = |at: usize| (self.start..self.end).contains(&at) || self.name.contains(&at);
        let mut behind = (SECTOR..cluster.len()).filter(|at| cluster.get(*at) != changed.get(*at));
        behind.all(|at| !is_used(at)).then_some(changed)
    }
}

/// The bytes of the extensions with the mark of their end.
fn encode(extensions: &[Extension]) -> Vec<u8> {
    let mut area = Vec::new();
    for (kind, data) in extensions {
        area.extend(kind.to_be_bytes());
        area.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
        area.extend(data);
        area.resize(area.len().next_multiple_of(8), 0);
    }
    area.extend([0; 8]);
    area
}

/// Writes what differs behind the first sector, and then that.
fn write(file: &dyn WritableBlockDevice, changed: &[u8], cluster: &[u8]) -> Result<()> {
    let differs = |at: &usize| cluster.get(*at) != changed.get(*at);
    let first = (SECTOR..cluster.len()).find(differs);
    let last = (SECTOR..cluster.len()).rev().find(differs);
    if let (Some(first), Some(last)) = (first, last)
        && let Some(bytes) = changed.get(first..=last)
    {
        file.write_at(bytes, first as u64)?;
        file.flush()?;
    }
    file.write_at(changed.get(..SECTOR.min(changed.len())).unwrap_or_default(), 0)?;
    file.flush()
}
