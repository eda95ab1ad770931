//! Which earlier restore points a backup builds on.
//!
//! Two different questions are answered here. *What may differ?* is asked of change tracking since
//! the **newest** restore point, whatever the level: its base is the latest, so the answer is the
//! smallest correct one. *What is the level?* only says what the restore point is compared with
//! for people: a differential names the last full one as its parent and counts its changes since
//! that, though it is stored like an incremental. Every restore point is complete on its own.

use crate::identity::VmLine;
use crate::{LevelChoice, Result};
use std::collections::BTreeMap;
use vmtide_hypervisor::{Base, DiskId, TrackingId};
use vmtide_repo::{BackupSession, DiskRecord, Level, Repository, RestorePoint};

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
    /// What the user should know: why the level is not the one asked for, and which restore points
    /// cannot be read.
    pub notes: Vec<String>,
    /// Why ranges that only name "the previous restore point" must not be trusted.
    pub doubt: Option<String>,
    /// Disks that stood in another place of the VM at the newest restore point: where they are now, and what they
    /// are called there.
    pub moved: BTreeMap<DiskId, DiskId>,
}

/// Finds them for a backup of `vm` in `session`, which has begun, so that what is found stays.
///
/// Change tracking names the moment that it counts from, so [`BaseChoice::newest`] may be any point
/// that can be read. A list of ranges from outside does not: `outside` is then the source, which
/// must be that of the newest point, and no point may be unreadable, because it may be the newest.
pub(crate) fn choose(
    repository: &Repository,
    session: &BackupSession,
    vm: &VmLine,
    wanted: LevelChoice,
    outside: Option<&str>,
) -> Result<BaseChoice> {
    let list = repository.points()?;
    let mut notes: Vec<String> = list
        .unreadable
        .iter()
        .map(|(object, error)| {
            format!("restore point {object} cannot be read; run `vmtide verify` ({error})")
        })
        .collect();
    notes.extend(vm.confusion(&list.points));
    let mut points: Vec<RestorePoint> =
        list.points.into_iter().filter(|point| vm.is_of(point)).collect();
    let last_full = points.iter().rfind(|point| point.level == Level::Full).cloned();
    let newest = points.pop().filter(|_| wanted != LevelChoice::Full);
    let is_first = newest.is_none();
    let newest = usable(session, sound(repository, newest, &mut notes)?, &mut notes)?;
    let (level, parent, newest) = match (wanted, newest, last_full) {
        (LevelChoice::Full, ..) | (LevelChoice::Auto, None, _) => (Level::Full, None, None),
        (_, None, _) if !is_first => (Level::Full, None, None),
        (_, None, _) => {
            notes.push(format!(
                "full backup: the repository has no restore point of {} yet",
                vm.name
            ));
            (Level::Full, None, None)
        }
        (LevelChoice::Differential, Some(_), None) => {
            notes.push(format!(
                "full backup: the repository has no full restore point of {} to compare with",
                vm.name
            ));
            (Level::Full, None, None)
        }
        (LevelChoice::Differential, newest, full) => (Level::Differential, full, newest),
        (LevelChoice::Auto | LevelChoice::Incremental, newest, _) => {
            (Level::Incremental, newest.clone(), newest)
        }
    };
    let doubt = newest.as_ref().zip(outside).and_then(|(newest, source)| {
        if let Some((object, _)) = list.unreadable.first() {
            return Some(format!("{object} cannot be read and may be the previous restore point"));
        }
        (newest.source != source)
            .then(|| format!("the previous restore point is of another source, {}", newest.source))
    });
    Ok(BaseChoice {
        level,
        parent,
        newest,
        full_requested: wanted == LevelChoice::Full,
        notes,
        doubt,
        moved: BTreeMap::new(),
    })
}

/// The newest point, if its disk maps can be read. If not it is no base: the disks are read in full,
/// instead of every backup failing until somebody looks.
fn sound(
    repository: &Repository,
    newest: Option<RestorePoint>,
    notes: &mut Vec<String>,
) -> Result<Option<RestorePoint>> {
    let Some(point) = newest else { return Ok(None) };
    for disk in &point.disks {
        match repository.open_disk(&point, &disk.id) {
            Ok(_) => {}
            Err(error) if error.is_damage() => {
                notes.push(format!(
                    "full backup: the previous restore point {} is damaged; run `vmtide verify` \
                     ({error})",
                    point.id
                ));
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Some(point))
}

/// The newest point without the disks that nothing may be built on, because a prune is about to
/// remove something they need: those are read in full, once.
fn usable(
    session: &BackupSession,
    newest: Option<RestorePoint>,
    notes: &mut Vec<String>,
) -> Result<Option<RestorePoint>> {
    let Some(mut point) = newest else { return Ok(None) };
    for disk in std::mem::take(&mut point.disks) {
        match session.why_unusable(&disk)? {
            None => point.disks.push(disk),
            Some(reason) => notes.push(format!("disk {} is read in full: {reason}", disk.id)),
        }
    }
    Ok(Some(point))
}

impl BaseChoice {
    /// The choice without the newest restore point, the map of which turned out damaged while it was
    /// read: all disks are read in full.
    pub fn without_damaged(&self, object: &str) -> Self {
        Self {
            level: Level::Full,
            parent: None,
            newest: None,
            full_requested: self.full_requested,
            notes: Vec::new(),
            doubt: Some(format!("{object} of the previous restore point is damaged")),
            moved: BTreeMap::new(),
        }
    }

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
        self.newest.as_ref()?.disk_record(self.id_in_base(disk))
    }

    /// What the disk is called in the restore points that it builds on.
    pub fn id_in_base<'a>(&'a self, disk: &'a DiskId) -> &'a str {
        &self.moved.get(disk).unwrap_or(disk).0
    }
}
