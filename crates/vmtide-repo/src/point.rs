//! Restore points: one VM at one moment. Writing one is the commit (format §9).

use crate::context::RepoContext;
use crate::envelope::{HEADER_BYTES, ObjectKind};
use crate::{ObjectId, RepoError, Result};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The most bytes of JSON a reader takes (format §9). A VM with hundreds of disks and its platform's
/// own documents stays far below. Two bytes of hostile JSON become 32 in memory, more while an
/// array grows: at this length some 200 MiB.
const MAX_JSON_BYTES: usize = 8 << 20;

/// The most JSON objects in them. The smallest, of seven bytes, becomes some 660 in memory: 40 MiB.
const MAX_JSON_OBJECTS: usize = 64 << 10;

/// Which earlier restore point a backup was compared with. Every restore point is complete on its
/// own, whatever its level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// None: everything was read.
    Full,
    /// The previous restore point of the VM.
    Incremental,
    /// The last full one.
    Differential,
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
            Self::Differential => "differential",
        })
    }
}

/// What was moved to store one disk, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskCounts {
    /// The size of the virtual disk.
    pub size_bytes: u64,
    /// What differs from the base, as change tracking or the comparison said; without a base,
    /// what is not zero.
    pub changed_bytes: u64,
    /// What was read from the source.
    pub read_bytes: u64,
    /// Chunks that the repository did not have, before compression.
    pub new_bytes: u64,
    /// What these take in the repository, compressed and sealed.
    pub stored_bytes: u64,
}

/// How change tracking took part in the backup of one disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrackingRecord {
    /// Whether only tracked changes were read.
    pub used: bool,
    /// Why not, where not.
    pub reason: Option<String>,
    /// The tracking id of this moment, for the next backup.
    pub id: Option<String>,
}

/// One disk in a restore point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// Which disk of the VM.
    pub id: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its disk map: the ids of its segments, newest first.
    pub map: Vec<ObjectId>,
    /// What storing it moved.
    pub counts: DiskCounts,
    /// Change tracking.
    pub tracking: TrackingRecord,
}

/// One VM at one moment, as kept in the repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestorePoint {
    /// Its id; also the name of its object.
    pub id: ObjectId,
    /// The VM.
    pub vm: String,
    /// When the backup was committed. Newer points of a VM have later times.
    pub time: Timestamp,
    /// When the backup began.
    pub started: Timestamp,
    /// The level.
    pub level: Level,
    /// The restore point it was compared with.
    pub parent: Option<ObjectId>,
    /// The consistency reached: `app`, `fs` or `crash`.
    pub consistency: String,
    /// The user's tags.
    pub tags: BTreeMap<String, String>,
    /// The host that made it.
    pub host: String,
    /// The source, as a URL or path without secrets.
    pub source: String,
    /// The VM's configuration, in the portable model.
    pub config: serde_json::Value,
    /// What the user was warned of.
    pub warnings: Vec<String>,
    /// The disks.
    pub disks: Vec<DiskRecord>,
    /// The program and version that wrote it.
    pub program: String,
}

impl RestorePoint {
    /// The record of one disk.
    pub fn disk_record(&self, id: &str) -> Option<&DiskRecord> {
        self.disks.iter().find(|disk| disk.id == id)
    }
}

/// Writes a restore point. Everything it refers to must be durable.
pub(crate) fn write(context: &RepoContext, point: &RestorePoint) -> Result<()> {
    let invalid = |error: &dyn std::fmt::Display| {
        RepoError::Invalid(format!("the restore point cannot be written: {error}"))
    };
    let json = serde_json::to_vec(point).map_err(|error| invalid(&error))?;
    if json.len() > MAX_JSON_BYTES {
        return Err(invalid(&format!("{} bytes of JSON, more than fits", json.len())));
    }
    let objects = count_objects(&json);
    if objects > MAX_JSON_OBJECTS {
        return Err(invalid(&format!("{objects} JSON objects, more than a reader takes")));
    }
    let mut section = zstd::bulk::compress(&json, 3).map_err(|error| invalid(&error))?;
    let mut object = context.create_object(ObjectKind::Point, point.id)?;
    object.write_section(0, &[], &mut section)?;
    let mut directory = (section.len() as u64).to_le_bytes().to_vec();
    directory.extend_from_slice(blake3::hash(&section).as_bytes());
    object.finish(&directory, 0, 0)
}

/// Reads a restore point.
pub(crate) fn read(context: &RepoContext, id: ObjectId) -> Result<RestorePoint> {
    let opened = context.open_object(ObjectKind::Point, id)?;
    let name = opened.header.object_name();
    let damaged = |detail: &str| RepoError::damaged(&name, detail);
    let length = usize::try_from(opened.trailer.directory_offset - HEADER_BYTES as u64)
        .ok()
        .filter(|length| *length <= MAX_JSON_BYTES)
        .ok_or_else(|| damaged("longer than a restore point can be"))?;
    if opened.directory.len() != 40 || opened.directory[..8] != (length as u64).to_le_bytes() {
        return Err(damaged("its directory is not that of a restore point"));
    }
    let mut section = vec![0; length];
    opened.reader.read_at(&mut section, HEADER_BYTES as u64)?;
    if blake3::hash(&section).as_bytes()[..] != opened.directory[8..] {
        return Err(damaged("its checksum does not match"));
    }
    let content = opened.cipher.open(0, &[], &mut section)?;
    let json = decompress_bounded(content, MAX_JSON_BYTES)
        .ok_or_else(|| damaged("it does not decompress"))?;
    let objects = count_objects(&json);
    if objects > MAX_JSON_OBJECTS {
        return Err(damaged(&format!("{objects} JSON objects; {MAX_JSON_OBJECTS} are possible")));
    }
    let point: RestorePoint = serde_json::from_slice(&json)
        .map_err(|error| damaged(&format!("its JSON cannot be read: {error}")))?;
    if point.id != id {
        return Err(damaged("it carries the id of another restore point"));
    }
    Ok(point)
}

/// How many objects begin in a JSON text; of what is none, any number.
fn count_objects(json: &[u8]) -> usize {
    let (mut objects, mut in_text, mut escaped) = (0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            b'{' if !in_text => objects += 1,
            _ => {}
        }
    }
    objects
}

/// Decompresses one zstd frame of at most `limit` bytes. The frame says how long it is; a frame that
/// lies is caught by the limit, one that does not say is refused.
pub(crate) fn decompress_bounded(frame: &[u8], limit: usize) -> Option<Vec<u8>> {
    let length = zstd::zstd_safe::get_frame_content_size(frame).ok()??;
    let length = usize::try_from(length).ok().filter(|length| *length <= limit)?;
    zstd::bulk::decompress(frame, length).ok().filter(|content| content.len() == length)
}

#[cfg(test)]
mod tests {
    use super::count_objects;

    #[test]
    fn objects_are_counted_outside_of_text() {
        for (json, objects) in [
            (r#"{"a":[{},{}]}"#, 3),
            (r#"["{{{",{"b":"{\"{"},"\\",{}]"#, 2),
            ("", 0),
            (r#""\"#, 0),
            ("{{{", 3),
        ] {
            assert_eq!(count_objects(json.as_bytes()), objects, "{json}");
        }
    }
}
