//! Which earlier restore points a backup builds on.
//!
//! Two different questions are answered here. *What may differ?* is asked of change tracking since
//! the **newest** restore point, whatever the level: its base is the latest, so the answer is the
//! smallest correct one. *What is the level?* only says what the restore point is compared with
//! for people: a differential names the last full one as its parent and counts its changes since
//! that, though it is stored like an incremental. Every restore point is complete on its own.

use crate::{LevelChoice, Result};
use std::collections::BTreeMap;
use vmtide_hypervisor::{Base, DiskId, TrackingId};
use vmtide_repo::{DiskRecord, Level, Repository, RestorePoint};

/// The restore points that a backup builds on.
pub(crate) struct BaseChoice {
    /// The level that comes of it.
    pub level: Level,
    /// What the level compares with.
    pub parent: Option<RestorePoint>,
    /// What changes are asked since and storing builds on: the newest restore point; none for a
    /// full backup.
    pub newest: Option<RestorePoint>,
    /// Whether the user asked for a full backup, so that missing bases need no other reason.
    pub full_requested: bool,
    /// Why the level is not the one asked for.
    pub note: Option<String>,
}

/// Finds them for a backup of `vm`.
pub(crate) fn choose(repository: &Repository, vm: &str, wanted: LevelChoice) -> Result<BaseChoice> {
    let full = |note| BaseChoice {
        level: Level::Full,
        parent: None,
        newest: None,
        full_requested: wanted == LevelChoice::Full,
        note,
    };
    if wanted == LevelChoice::Full {
        return Ok(full(None));
    }
    let Some(newest) = repository.latest(vm)? else {
        let note = (wanted != LevelChoice::Auto)
            .then(|| format!("full backup: the repository has no restore point of {vm} yet"));
        return Ok(full(note));
    };
    if wanted != LevelChoice::Differential {
        return Ok(BaseChoice {
            level: Level::Incremental,
            parent: Some(newest.clone()),
            newest: Some(newest),
            full_requested: false,
            note: None,
        });
    }
    let Some(last_full) = repository.latest_full(vm)? else {
        return Ok(full(Some(format!(
            "full backup: the repository has no full restore point of {vm} to compare with"
        ))));
    };
    Ok(BaseChoice {
        level: Level::Differential,
        parent: Some(last_full),
        newest: Some(newest),
        full_requested: false,
        note: None,
    })
}

impl BaseChoice {
    /// What the hypervisor is asked changes since.
    pub fn bases(&self) -> BTreeMap<DiskId, Base> {
        let disks = self.newest.iter().flat_map(|point| &point.disks);
        disks
            .map(|disk| {
                let base = Base {
                    tracking: disk.tracking.id.clone().map(TrackingId),
                    size_bytes: disk.size_bytes,
                };
                (DiskId(disk.id.clone()), base)
            })
            .collect()
    }

    /// The disk's record that storing builds on.
    pub fn stored_base(&self, disk: &DiskId) -> Option<&DiskRecord> {
        self.newest.as_ref()?.disk_record(&disk.0)
    }
}
