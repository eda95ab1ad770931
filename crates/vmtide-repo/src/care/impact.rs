//! What damage touches: restore points, disks, ranges of bytes.

use super::read_frames::BadFrame;
use super::verify::{Damage, DamagedPlace};
use crate::context::RepoContext;
use crate::disk::{PackSet, Quarantined, for_each_place};
use crate::envelope::ObjectKind;
use crate::map::DiskMap;
use crate::pack::is_media_error;
use crate::point::{DiskRecord, RestorePoint};
use crate::{BLOCK_BYTES, ObjectId, RepoError, Result};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use vmtide_block::{ByteRange, CancelToken, RangeSet};

const BLOCK: u64 = BLOCK_BYTES as u64;

/// Damage by object, frame and what is wrong.
#[derive(Default)]
pub(super) struct Impact(BTreeMap<(String, Option<u32>, String), Touched>);

/// What one piece of damage touches.
#[derive(Default)]
struct Touched {
    points: BTreeSet<ObjectId>,
    /// By point and disk.
    places: BTreeMap<(ObjectId, String), (String, RangeSet)>,
}

/// The disk of a restore point, and the bytes of it where they are known.
type Where<'a> = (&'a RestorePoint, &'a DiskRecord, Option<ByteRange>);

impl Impact {
    /// Adds damage as it is.
    pub fn add(&mut self, damage: Damage) {
        let touched = self.0.entry((damage.object, damage.frame, damage.detail)).or_default();
        touched.points.extend(damage.points);
    }

    /// Adds an error that means damage; anything else (no rights, cancelled) comes back.
    ///
    /// # Errors
    /// What is no damage.
    pub fn note(&mut self, place: Option<Where<'_>>, error: RepoError) -> Result<()> {
        let (object, detail) = match error {
            RepoError::Damaged { object, detail } => (object, detail),
            RepoError::Unsupported { object, what } => (object, format!("unsupported {what}")),
            RepoError::Io { ref context, ref source } if is_media_error(&error) => {
                (context.clone(), format!("cannot be read: {source}"))
            }
            other => return Err(other),
        };
        self.touch((object, None, detail), place);
        Ok(())
    }

    /// Adds damage that is on record.
    pub fn add_known(
        &mut self,
        point: &RestorePoint,
        disk: &DiskRecord,
        bytes: ByteRange,
        entry: &Quarantined,
    ) {
        let part = &entry.part;
        let object = ObjectKind::Pack.object_name(part.pack);
        let detail = format!(
            "{} (on record since {}, found by {})",
            part.detail,
            entry.found.strftime("%Y-%m-%d %H:%M UTC"),
            entry.by
        );
        self.touch((object, part.frame, detail), Some((point, disk, Some(bytes))));
    }

    fn touch(&mut self, key: (String, Option<u32>, String), place: Option<Where<'_>>) {
        let touched = self.0.entry(key).or_default();
        if let Some((point, disk, bytes)) = place {
            touched.points.insert(point.id);
            let place = touched.places.entry((point.id, disk.id.clone()));
            let (_, ranges) = place.or_insert_with(|| (point.vm.clone(), RangeSet::new()));
            if let Some(bytes) = bytes {
                ranges.insert(bytes);
            }
        }
    }

    /// Adds frames that could not be read, and finds out what they touch: walks all maps again, which
    /// is worth it as damage is rare.
    ///
    /// # Errors
    /// Those of the store other than damage; cancelled.
    pub fn add_frames(
        &mut self,
        context: &Arc<RepoContext>,
        points: &[RestorePoint],
        frames: Vec<BadFrame>,
        cancel: &CancelToken,
    ) -> Result<()> {
        if frames.is_empty() {
            return Ok(());
        }
        let mut by_pack: HashMap<ObjectId, Vec<BadFrame>> = HashMap::new();
        for frame in frames {
            self.0.entry(frame.key()).or_default();
            by_pack.entry(frame.pack).or_default().push(frame);
        }
        let packs = PackSet::new(Arc::clone(context));
        for point in points {
            for disk in &point.disks {
                cancel.check()?;
                let blocks = disk.size_bytes.div_ceil(BLOCK);
                // What is wrong with the map itself was reported before.
                let Ok(map) = DiskMap::open(context, &disk.map, blocks) else { continue };
                let walked = for_each_place(&map, &packs, 0..blocks, &mut |run| {
                    let Ok((pack, ordinal)) = &run.place else { return Ok(()) };
                    for frame in by_pack.get(&pack.id()).into_iter().flatten() {
                        let first = frame.first_block.max(*ordinal);
                        let end = frame.end().min(ordinal.saturating_add(run.count));
                        if first < end {
                            let start = (run.first_block + u64::from(first - ordinal)) * BLOCK;
                            let stop = start + u64::from(end - first) * BLOCK;
                            let bytes = ByteRange::from_bounds(start, stop.min(disk.size_bytes));
                            self.touch(frame.key(), Some((point, disk, Some(bytes))));
                        }
                    }
                    Ok(())
                });
                if let Err(error) = walked {
                    self.note(Some((point, disk, None)), error)?;
                }
            }
        }
        Ok(())
    }

    /// All of it.
    pub fn into_damage(self) -> Vec<Damage> {
        let damage =
            |((object, frame, detail), touched): ((String, Option<u32>, String), Touched)| {
                let place =
                    |((point, disk), (vm, ranges))| DamagedPlace { point, vm, disk, ranges };
                Damage {
                    object,
                    frame,
                    detail,
                    points: touched.points.into_iter().collect(),
                    places: touched.places.into_iter().map(place).collect(),
                }
            };
        self.0.into_iter().map(damage).collect()
    }
}
