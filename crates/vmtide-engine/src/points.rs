//! Looking at restore points: lists, one point, and the difference of two.

use crate::partitions::{self, Partition};
use crate::{EngineError, Result};
use serde::Serialize;
use std::collections::BTreeMap;
use vmtide_block::RangeSet;
use vmtide_repo::{
    ForgetReport, ObjectId, PointList, Purpose, RepoError, Repository, RestorePoint,
};

/// The restore points of one VM, or of all, oldest first; with those that cannot be read.
///
/// # Errors
/// Those of the repository. [`EngineError::NotFound`] where a VM is named that has none.
pub fn points(repository: &Repository, vm: Option<&str>) -> Result<PointList> {
    let mut list = repository.points()?;
    let Some(vm) = vm else {
        return Ok(list);
    };
    list.points.retain(|point| point.vm == vm);
    if list.points.is_empty() && list.unreadable.is_empty() {
        return Err(EngineError::NotFound {
            what: format!("a restore point of {vm} in {}", repository.location()),
            hint: "see `vmtide points` for all".into(),
        });
    }
    Ok(list)
}

/// The restore point that `spec` names: its id, the first digits of it, `VM@latest`, `VM` or
/// `VM@TIME`. The caller holds a lease where the point must stay.
///
/// A point that cannot be read may be of any VM and any time. While there is one, "the latest" is
/// not known, and an older point in its place would be a silent loss; so only ids are answered.
///
/// # Errors
/// As [`Repository::resolve`]; [`RepoError::Damaged`] where only an id would do.
pub fn resolve(repository: &Repository, spec: &str) -> Result<RestorePoint> {
    let resolved = repository.resolve(spec);
    match &resolved {
        Ok(point) if point.id.to_string().starts_with(&spec.to_ascii_lowercase()) => {}
        Ok(_) | Err(RepoError::NotFound { .. }) => {
            if let Some((object, error)) = repository.points()?.unreadable.into_iter().next() {
                return Err(doubtful(spec, &object, error));
            }
        }
        Err(_) => {}
    }
    Ok(resolved?)
}

fn doubtful(spec: &str, object: &str, error: RepoError) -> EngineError {
    if !error.is_damage() {
        return error.into();
    }
    let detail = format!(
        "{object} cannot be read and may be what {spec} names: name an older restore point by its \
         id (see `vmtide points`), and run `vmtide verify` ({error})"
    );
    RepoError::damaged(format!("restore point {spec}"), detail).into()
}

/// How one disk differs between two restore points.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiskDifference {
    /// The disk.
    pub id: String,
    /// What became of it.
    pub change: DiskChange,
    /// Its size in the first point, in bytes; none where it is not there.
    pub from_size_bytes: Option<u64>,
    /// Its size in the second point, in bytes; none where it is not there.
    pub to_size_bytes: Option<u64>,
    /// The bytes of the disk that are stored differently, in whole blocks of 4 KiB.
    pub changed_bytes: u64,
    /// Where these are.
    pub ranges: RangeSet,
    /// How many of them are in each partition of the disk as it is in the second point; only those
    /// that differ. Empty where there is no partition table.
    pub partitions: Vec<PartitionBytes>,
    /// How many of them are in no partition.
    pub unpartitioned_bytes: u64,
}

/// So many bytes of a partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PartitionBytes {
    /// The partition.
    #[serde(flatten)]
    pub partition: Partition,
    /// The bytes.
    pub bytes: u64,
}

/// Which partitions of a stored disk `ranges` lie in, and how many bytes in none. A table that cannot
/// be read, because it is damaged, is none.
///
/// # Errors
/// Those of the repository other than damage.
fn partitions_touched(
    repository: &Repository,
    point: &RestorePoint,
    disk: &str,
    ranges: &RangeSet,
) -> Result<(Vec<PartitionBytes>, u64)> {
    if ranges.is_empty() {
        return Ok((Vec::new(), 0));
    }
    let device = repository.salvage_disk(point, disk)?;
    let table = partitions::partitions(device.as_ref());
    let (inside, outside) = partitions::touched(&table, ranges);
    let entry = |(partition, bytes)| PartitionBytes { partition, bytes };
    Ok((inside.into_iter().map(entry).collect(), outside))
}

/// How many bytes of restore points are damaged, as far as is on record; only those that are.
///
/// # Errors
/// Those of the repository.
pub fn damaged_bytes(
    repository: &Repository,
    points: &[RestorePoint],
) -> Result<BTreeMap<ObjectId, u64>> {
    let mut found = BTreeMap::new();
    if !repository.has_damage_on_record()? {
        return Ok(found);
    }
    // Points often share whole maps.
    let mut known: BTreeMap<(&[ObjectId], u64), u64> = BTreeMap::new();
    for point in points {
        for disk in &point.disks {
            let key = (disk.map.as_slice(), disk.size_bytes);
            let bytes = match known.get(&key) {
                Some(bytes) => *bytes,
                None => match repository.damaged_ranges(disk) {
                    Ok(ranges) => ranges.total_bytes(),
                    // Of a map that cannot be read nothing is known.
                    Err(error) if error.is_damage() => disk.size_bytes,
                    Err(error) => return Err(error.into()),
                },
            };
            known.insert(key, bytes);
            if bytes > 0 {
                *found.entry(point.id).or_default() += bytes;
            }
        }
    }
    Ok(found)
}

/// What became of a disk between two restore points.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskChange {
    /// The same bytes.
    Same,
    /// Other bytes.
    Changed,
    /// Only in the second.
    Added,
    /// Only in the first.
    Removed,
}

/// The differences of all disks of two restore points, found in the disk maps; of the data only the
/// partition tables are read.
///
/// # Errors
/// Those of reading disk maps.
pub fn diff(
    repository: &Repository,
    from: &RestorePoint,
    to: &RestorePoint,
) -> Result<Vec<DiskDifference>> {
    let _lease = repository.lease(Purpose::Read)?;
    let mut differences = Vec::new();
    for new in &to.disks {
        let old = from.disk_record(&new.id);
        let ranges = match old {
            Some(old) => repository.changed_between(old, new)?,
            None => RangeSet::full(new.size_bytes),
        };
        let (partitions, unpartitioned_bytes) =
            partitions_touched(repository, to, &new.id, &ranges)?;
        let same_size = old.is_some_and(|old| old.size_bytes == new.size_bytes);
        differences.push(DiskDifference {
            id: new.id.clone(),
            change: match old {
                None => DiskChange::Added,
                Some(_) if ranges.is_empty() && same_size => DiskChange::Same,
                Some(_) => DiskChange::Changed,
            },
            from_size_bytes: old.map(|old| old.size_bytes),
            to_size_bytes: Some(new.size_bytes),
            changed_bytes: ranges.total_bytes(),
            ranges,
            partitions,
            unpartitioned_bytes,
        });
    }
    for old in &from.disks {
        if to.disk_record(&old.id).is_none() {
            differences.push(DiskDifference {
                id: old.id.clone(),
                change: DiskChange::Removed,
                from_size_bytes: Some(old.size_bytes),
                to_size_bytes: None,
                changed_bytes: 0,
                ranges: RangeSet::new(),
                partitions: Vec::new(),
                unpartitioned_bytes: 0,
            });
        }
    }
    Ok(differences)
}

/// Forgets restore points, but for those that are held.
///
/// # Errors
/// Those of the repository. Points forgotten before the error stay forgotten.
pub fn forget(repository: &Repository, points: &[ObjectId]) -> Result<ForgetReport> {
    if points.is_empty() {
        return Ok(ForgetReport::default());
    }
    Ok(repository.forget(points)?)
}

#[cfg(test)]
pub(crate) mod tests {
    use jiff::Timestamp;
    use std::collections::BTreeMap;
    use vmtide_repo::{DiskRecord, Level, ObjectId, RestorePoint};

    /// A restore point of one disk, as far as unit tests look at it.
    pub fn point_with(disk: DiskRecord) -> RestorePoint {
        RestorePoint {
            id: ObjectId([7; 16]),
            vm: "web".into(),
            time: Timestamp::UNIX_EPOCH,
            started: Timestamp::UNIX_EPOCH,
            level: Level::Full,
            parent: None,
            consistency: "crash".into(),
            tags: BTreeMap::new(),
            host: String::new(),
            source: String::new(),
            config: serde_json::Value::Null,
            warnings: Vec::new(),
            disks: vec![disk],
            program: String::new(),
            origin: None,
            lease: None,
            immutable: None,
        }
    }
}
