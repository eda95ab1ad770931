//! Where damage lies as people know a disk: in which partitions, and how much of each.

use crate::partitions::{self, Partition};
use crate::points::PartitionBytes;
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use vmtide_repo::{Damage, DamagedPlace, ObjectId, Repository, RestorePoint};

/// One piece of [`Damage`] with the partitions it touches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LocatedDamage {
    /// The object's name in the repository.
    pub object: String,
    /// The number of the frame, where one of a pack is damaged and not the whole.
    pub frame: Option<u32>,
    /// What is wrong with it.
    pub detail: String,
    /// The restore points that need it.
    pub points: Vec<ObjectId>,
    /// Which bytes of their disks it is.
    pub places: Vec<LocatedPlace>,
}

/// What a piece of damage touches on one disk of one restore point, by partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LocatedPlace {
    /// The disk and its bytes.
    #[serde(flatten)]
    pub place: DamagedPlace,
    /// The partitions it touches, with the bytes in each; none where it cannot be told which bytes of
    /// the disk are damaged, or the disk cannot be read at all.
    pub partitions: Option<Vec<PartitionBytes>>,
    /// The bytes that lie in no partition; all where the disk has no table that can be read.
    pub unpartitioned_bytes: Option<u64>,
}

/// Finds the partitions that damage touches. Only partition tables are read, each once for all points
/// that share it. What cannot be told is left open: this is about damage, and no error adds to it.
pub fn locate_damage(repository: &Repository, damage: &[Damage]) -> Vec<LocatedDamage> {
    let mut tables = Tables::new(repository, damage);
    damage
        .iter()
        .map(|damage| LocatedDamage {
            object: damage.object.clone(),
            frame: damage.frame,
            detail: damage.detail.clone(),
            points: damage.points.clone(),
            places: damage.places.iter().map(|place| tables.locate(place)).collect(),
        })
        .collect()
}

/// The segments of a disk's map, and the length of the disk in bytes.
type MapOfDisk = (Vec<ObjectId>, u64);

/// Partition tables of disks, read when they are asked for.
struct Tables<'a> {
    repository: &'a Repository,
    points: BTreeMap<ObjectId, RestorePoint>,
    /// By the disk's map: points often share whole maps.
    known: HashMap<MapOfDisk, Option<Arc<Vec<Partition>>>>,
}

impl<'a> Tables<'a> {
    fn new(repository: &'a Repository, damage: &[Damage]) -> Self {
        let mut points = BTreeMap::new();
        if damage.iter().any(|damage| !damage.places.is_empty()) {
            match repository.points() {
                Ok(list) => points.extend(list.points.into_iter().map(|point| (point.id, point))),
                Err(error) => tracing::debug!(%error, "no partitions of what is damaged"),
            }
        }
        Self { repository, points, known: HashMap::new() }
    }

    fn locate(&mut self, place: &DamagedPlace) -> LocatedPlace {
        let table = if place.ranges.is_empty() { None } else { self.table(place) };
        let touched = table.map(|table| partitions::touched(&table, &place.ranges));
        let (partitions, unpartitioned_bytes) = touched.unzip();
        let entry = |(partition, bytes)| PartitionBytes { partition, bytes };
        LocatedPlace {
            place: place.clone(),
            partitions: partitions.map(|found| found.into_iter().map(entry).collect()),
            unpartitioned_bytes,
        }
    }

    fn table(&mut self, place: &DamagedPlace) -> Option<Arc<Vec<Partition>>> {
        let point = self.points.get(&place.point)?;
        let record = point.disk_record(&place.disk)?;
        let repository = self.repository;
        let read = || match repository.salvage_disk(point, &place.disk) {
            Ok(device) => Some(Arc::new(partitions::partitions(device.as_ref()))),
            Err(error) => {
                tracing::debug!(%error, "no partition table");
                None
            }
        };
        let key = (record.map.clone(), record.size_bytes);
        self.known.entry(key).or_insert_with(read).clone()
    }
}
