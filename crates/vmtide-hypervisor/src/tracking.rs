//! What changed on a disk since when, and why that is not known when it is not.

use serde::{Deserialize, Serialize};
use std::fmt;
use vmtide_block::RangeSet;

/// Names a disk of a VM, stable from backup to backup: the attachment point (`virtio0`, a qdev
/// id, `scsi0:1`), never a file name, which changes with every snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DiskId(pub String);

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The opaque token by which a platform names a moment of a disk: an RCT id, a CBT change id, the
/// name of a dirty bitmap. Kept in the restore point and handed back at the next freeze.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TrackingId(pub String);

impl fmt::Display for TrackingId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a backup has to look at on one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Changes {
    /// Everything: no base was given, or the answer of change tracking cannot be trusted.
    Everything(FullReason),
    /// Only these bytes may differ from the base; clamped to the disk. Never fewer than the truth.
    Ranges(RangeSet),
}

/// Why a disk has to be read in full. Shown to the user and recorded in the restore point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "code", content = "detail")]
pub enum FullReason {
    /// The user asked for a full backup.
    Requested,
    /// The repository has no earlier restore point of this disk.
    FirstBackup,
    /// This source has no change tracking; the text says what lacks it.
    NoTracking(String),
    /// The earlier restore point has no tracking id for this disk.
    NoTrackingId,
    /// The platform does not know the tracking id any more; the text says what it answered.
    TrackingLost(String),
    /// The platform says its tracking is not trustworthy (a bitmap marked inconsistent, an RCT
    /// file that does not match its disk).
    TrackingInconsistent(String),
    /// The disk has another size than at the base.
    Resized {
        /// The size at the base, in bytes.
        from_bytes: u64,
        /// The size now, in bytes.
        to_bytes: u64,
    },
    /// Another disk stands where the base's disk was.
    DiskReplaced(String),
    /// The platform's answer breaks its own rules, so it may also be incomplete.
    AnswerDoubtful(String),
}

impl fmt::Display for FullReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Requested => write!(f, "full backup requested"),
            Self::FirstBackup => write!(f, "first backup of this disk"),
            Self::NoTracking(what) => write!(f, "no change tracking: {what}"),
            Self::NoTrackingId => write!(f, "the previous restore point has no tracking id"),
            Self::TrackingLost(what) => write!(f, "change tracking lost: {what}"),
            Self::TrackingInconsistent(what) => write!(f, "change tracking inconsistent: {what}"),
            Self::Resized { from_bytes, to_bytes } => {
                write!(f, "disk resized from {from_bytes} to {to_bytes} bytes")
            }
            Self::DiskReplaced(what) => write!(f, "another disk: {what}"),
            Self::AnswerDoubtful(what) => write!(f, "change tracking answered in doubt: {what}"),
        }
    }
}

impl FullReason {
    /// Whether this is a loss that the user should be warned of, and not the normal course.
    pub const fn is_loss(&self) -> bool {
        matches!(
            self,
            Self::TrackingLost(_)
                | Self::TrackingInconsistent(_)
                | Self::DiskReplaced(_)
                | Self::AnswerDoubtful(_)
                | Self::Resized { .. }
        )
    }
}
