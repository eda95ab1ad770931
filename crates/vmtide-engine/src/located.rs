//! Where damage lies as people know a disk: in which partitions, how much of each, and in which files.

use crate::partitions::{self, Partition};
use crate::points::PartitionBytes;
use serde::Serialize;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use vmtide_block::{BlockDevice, ByteRange, CancelToken, RangeSet};
use vmtide_guestfs::{FilesAt, FoundFile, files_at};
use vmtide_repo::{Damage, DamagedPlace, ObjectId, Repository, RestorePoint};

/// One piece of [`Damage`] with the partitions and files it touches.
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

/// What a piece of damage touches on one disk of one restore point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LocatedPlace {
    /// The disk and its bytes.
    #[serde(flatten)]
    pub place: DamagedPlace,
    /// What of it they are.
    #[serde(flatten)]
    pub parts: TouchedParts,
}

/// What some bytes of a disk are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TouchedParts {
    /// The partitions they touch, with the bytes in each; none where it cannot be told which bytes of
    /// the disk are damaged, or the disk cannot be read at all.
    pub partitions: Option<Vec<LocatedPartition>>,
    /// The bytes that lie in no partition; all where the disk has no table that can be read.
    pub unpartitioned_bytes: Option<u64>,
    /// The files they touch, on a disk without partitions; see [`LocatedPartition::files`].
    pub files: Option<Vec<FilesAt>>,
}

/// What some bytes of a disk touch of one partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LocatedPartition {
    /// The partition and the bytes in it.
    #[serde(flatten)]
    pub bytes: PartitionBytes,
    /// The files, by file system: there are several where the partition is LVM's. None where there is none that is read ([`vmtide_guestfs`]), and in all but the newest of the
    /// restore points of a disk that one piece of damage touches: the others are verified by themselves to learn theirs.
    pub files: Option<Vec<FilesAt>>,
}

/// Finds the partitions and files that damage touches. Partition tables are read once for all points that share them, and
/// so are file systems. What cannot be told is left open: this is about damage, and no error adds to it. After `cancel` no
/// more files are looked for.
pub fn locate_damage(
    repository: &Repository,
    damage: &[Damage],
    cancel: &CancelToken,
) -> Vec<LocatedDamage> {
    let mut disks = Disks::new(repository, damage, cancel);
    damage
        .iter()
        .map(|damage| LocatedDamage {
            object: damage.object.clone(),
            frame: damage.frame,
            detail: damage.detail.clone(),
            points: damage.points.clone(),
            places: damage
                .places
                .iter()
                .map(|place| LocatedPlace { place: place.clone(), parts: disks.locate(place) })
                .collect(),
        })
        .collect()
}

/// The partitions and files that were lost where a restore point's disk was salvaged; none where nothing was.
pub(crate) fn locate_lost(
    repository: &Repository,
    point: &RestorePoint,
    disk: &str,
    lost: &RangeSet,
    cancel: &CancelToken,
) -> Option<TouchedParts> {
    if lost.is_empty() {
        return None;
    }
    let place = DamagedPlace {
        point: point.id,
        vm: point.vm.clone(),
        disk: disk.to_owned(),
        ranges: lost.clone(),
    };
    let mut disks = Disks::of(repository, [point.clone()], cancel);
    disks.choose(std::slice::from_ref(&place));
    Some(disks.locate(&place))
}

/// The segments of a disk's map, and the length of the disk in bytes.
type MapOfDisk = (Vec<ObjectId>, u64);

/// What is known of a disk.
#[derive(Default)]
struct Known {
    /// None where it cannot be read.
    table: Option<Vec<Partition>>,
    /// The files of its file systems that any damage touches, by where the partition begins.
    files: BTreeMap<u64, Vec<FilesAt>>,
}

/// Disks of restore points, read when they are asked for.
struct Disks<'a> {
    repository: &'a Repository,
    cancel: &'a CancelToken,
    points: BTreeMap<ObjectId, RestorePoint>,
    /// Of the disks whose files are looked for, all that is damaged.
    damaged: HashMap<MapOfDisk, RangeSet>,
    /// The point and disk of these.
    newest: HashSet<(ObjectId, String)>,
    /// By the disk's map: points often share whole maps.
    known: HashMap<MapOfDisk, Arc<Known>>,
}

impl<'a> Disks<'a> {
    fn of(
        repository: &'a Repository,
        points: impl IntoIterator<Item = RestorePoint>,
        cancel: &'a CancelToken,
    ) -> Self {
        Self {
            repository,
            cancel,
            points: points.into_iter().map(|point| (point.id, point)).collect(),
            damaged: HashMap::new(),
            newest: HashSet::new(),
            known: HashMap::new(),
        }
    }

    fn new(repository: &'a Repository, damage: &[Damage], cancel: &'a CancelToken) -> Self {
        let mut points = Vec::new();
        if damage.iter().any(|damage| !damage.places.is_empty()) {
            match repository.points() {
                Ok(list) => points = list.points,
                Err(error) => tracing::debug!(%error, "no partitions of what is damaged"),
            }
        }
        let mut disks = Self::of(repository, points, cancel);
        damage.iter().for_each(|damage| disks.choose(&damage.places));
        disks
    }

    /// Chooses the newest point of each disk: a year of daily restore points shares most data, and reading a file
    /// system takes seconds.
    fn choose(&mut self, places: &[DamagedPlace]) {
        let mut newest: BTreeMap<(&str, &str), &DamagedPlace> = BTreeMap::new();
        let time = |place: &DamagedPlace| self.points.get(&place.point).map(|point| point.time);
        for place in places.iter().filter(|place| !place.ranges.is_empty()) {
            let chosen = newest.entry((&place.vm, &place.disk)).or_insert(place);
            if time(place) > time(chosen) {
                *chosen = place;
            }
        }
        for place in newest.into_values() {
            if let Some(key) = self.key(place) {
                self.newest.insert((place.point, place.disk.clone()));
                let ranges = self.damaged.entry(key).or_default();
                *ranges = ranges.union(&place.ranges);
            }
        }
    }

    fn key(&self, place: &DamagedPlace) -> Option<MapOfDisk> {
        let record = self.points.get(&place.point)?.disk_record(&place.disk)?;
        Some((record.map.clone(), record.size_bytes))
    }

    fn locate(&mut self, place: &DamagedPlace) -> TouchedParts {
        let known = if place.ranges.is_empty() { None } else { self.disk(place) };
        let table = known.as_ref().and_then(|known| known.table.as_deref());
        let (partitions, unpartitioned_bytes) =
            table.map(|table| partitions::touched(table, &place.ranges)).unzip();
        let is_newest = self.newest.contains(&(place.point, place.disk.clone()));
        let files = |area: ByteRange| {
            let found = known.as_ref().filter(|_| is_newest)?.files.get(&area.offset)?;
            Some(only(found, &place.ranges.within(area)))
        };
        let entry = |(partition, bytes): (Partition, u64)| {
            let files = files(partition.range);
            LocatedPartition { bytes: PartitionBytes { partition, bytes }, files }
        };
        let whole = ByteRange::from_bounds(0, u64::MAX);
        TouchedParts {
            files: files(whole).filter(|_| table.is_some_and(<[Partition]>::is_empty)),
            partitions: partitions.map(|found| found.into_iter().map(entry).collect()),
            unpartitioned_bytes,
        }
    }

    fn disk(&mut self, place: &DamagedPlace) -> Option<Arc<Known>> {
        let key = self.key(place)?;
        if let Some(known) = self.known.get(&key) {
            return Some(Arc::clone(known));
        }
        let known = Arc::new(self.read(place, self.damaged.get(&key)));
        self.known.insert(key, Arc::clone(&known));
        Some(known)
    }

    /// Reads a disk's table, and the file systems that `damaged` touches.
    fn read(&self, place: &DamagedPlace, damaged: Option<&RangeSet>) -> Known {
        let mut known = Known::default();
        let Some(point) = self.points.get(&place.point) else { return known };
        let device = match self.repository.salvage_disk(point, &place.disk) {
            Ok(device) => device,
            Err(error) => {
                tracing::debug!(%error, "no partition table");
                return known;
            }
        };
        let table = partitions::partitions(device.as_ref());
        let areas: Vec<ByteRange> = match table.is_empty() {
            true => vec![ByteRange::new(0, device.size_bytes())],
            false => table.iter().map(|partition| partition.range).collect(),
        };
        for area in areas {
            let inside = damaged.map_or_else(RangeSet::new, |damaged| damaged.within(area));
            if inside.is_empty() {
                continue;
            }
            match files_at(device.as_ref(), area, &inside, self.cancel) {
                Ok(found) if found.is_empty() => {}
                Ok(found) => drop(known.files.insert(area.offset, found)),
                Err(error) => tracing::debug!(%error, "no files of what is damaged"),
            }
        }
        known.table = Some(table);
        known
    }
}

/// The files of `found` that `ranges` touch, of the file systems that they touch.
fn only(found: &[FilesAt], ranges: &RangeSet) -> Vec<FilesAt> {
    let is_touched = |file: &&FoundFile| !file.ranges.intersect(ranges).is_empty();
    let of = |found: &FilesAt| FilesAt {
        volume: found.volume.clone(),
        file_system: found.file_system,
        files: found.files.iter().filter(is_touched).cloned().collect(),
        is_complete: found.is_complete,
        area: found.area.clone(),
    };
    found.iter().filter(|found| !found.area.intersect(ranges).is_empty()).map(of).collect()
}
