//! Restore points: one VM at one moment. Writing one is the commit (format §9).

use crate::Retention;
use crate::context::RepoContext;
use crate::envelope::ObjectKind;
use crate::{ObjectId, RepoError, Result, record};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

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

/// Where a restore point was backed up first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Origin {
    /// The repository's id.
    pub repository: ObjectId,
    /// The restore point's id there.
    pub point: ObjectId,
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
    /// Where it was copied from: the repository that it was backed up to, however often it was
    /// copied since. None where that is this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// The lease under which it was made; decides whether it counts where that was revoked.
    #[serde(default)]
    pub lease: Option<ObjectId>,
    /// Until when nobody can remove it, nor anything that it needs, and how firmly; none where it was
    /// not made immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub immutable: Option<Retention>,
}

impl RestorePoint {
    /// The record of one disk.
    pub fn disk_record(&self, id: &str) -> Option<&DiskRecord> {
        self.disks.iter().find(|disk| disk.id == id)
    }
}

/// Writes a restore point. Everything it refers to must be durable.
pub(crate) fn write(context: &RepoContext, point: &RestorePoint) -> Result<()> {
    record::write(context, ObjectKind::Point, point.id, point)
}

/// Reads a restore point.
pub(crate) fn read(context: &RepoContext, id: ObjectId) -> Result<RestorePoint> {
    let point: RestorePoint = record::read(context, ObjectKind::Point, id)?;
    if point.id != id {
        let name = ObjectKind::Point.object_name(id);
        return Err(RepoError::damaged(name, "it carries the id of another restore point"));
    }
    Ok(point)
}
