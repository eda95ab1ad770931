//! Whether an earlier restore point can be built on.
//!
//! A restore point that shares the map of an earlier one needs what that needs. So the earlier one
//! must be there after the lease of the job can be seen (then nothing of it is removed but what was
//! condemned before), and nothing of what it needs may be condemned: what is decided on a condemned
//! list does not wait for this job. A pack that is condemned because its chunks were moved does no
//! harm where the forwards lead to what is not condemned.

use crate::condemned::Condemned;
use crate::context::RepoContext;
use crate::disk::{Forwards, MAX_FORWARDS};
use crate::envelope::ObjectKind;
use crate::map::{DiskMap, Target};
use crate::point::DiskRecord;
use crate::point_list::{self, Reading};
use crate::{BLOCK_BYTES, Location, ObjectId, Result};
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, OnceLock};

/// What a job knows about earlier restore points. Everything is looked at when first needed, and so
/// after the lease can be seen.
#[derive(Default)]
pub(super) struct Bases {
    maps: OnceLock<HashSet<Vec<ObjectId>>>,
    packs: OnceLock<HashSet<ObjectId>>,
    forwards: Mutex<HashMap<ObjectId, Option<Arc<Forwards>>>>,
}

impl Bases {
    /// Why a disk of an earlier restore point cannot be built on; none where it can.
    ///
    /// # Errors
    /// [`RepoError::Damaged`](crate::RepoError::Damaged); those of the store.
    pub(super) fn why_unusable(
        &self,
        context: &Arc<RepoContext>,
        condemned: &Condemned,
        base: &DiskRecord,
    ) -> Result<Option<String>> {
        #[cfg(feature = "simulation")]
        if crate::simulation::is_weak(crate::simulation::Weakness::BaseUnchecked) {
            return Ok(None);
        }
        if !base.map.is_empty() && !self.is_there(context, base)? {
            return Ok(Some("its restore point is not there any more".into()));
        }
        if base.map.iter().any(|id| condemned.has_map(*id)) {
            return Ok(Some("a prune is about to remove a part of its disk map".into()));
        }
        if !condemned.concerns_packs() {
            return Ok(None);
        }
        let blocks = base.size_bytes.div_ceil(BLOCK_BYTES as u64);
        let mut doubtful = None;
        DiskMap::open(context, &base.map, blocks)?.for_each_run(0..blocks, &mut |run| {
            let Target::Data { pack, ordinal } = run.target else { return Ok(()) };
            let count = u32::try_from(run.count).unwrap_or(u32::MAX);
            let mut done = 0;
            while doubtful.is_none() && done < count {
                let at = Location { pack, ordinal: ordinal.saturating_add(done) };
                match self.stays(context, condemned, at, count - done, MAX_FORWARDS)? {
                    Some(stays) => done += stays.max(1),
                    None => doubtful = Some(pack),
                }
            }
            Ok(())
        })?;
        Ok(doubtful.map(|pack| format!("a prune is about to remove pack {pack}, which it needs")))
    }

    /// Whether a restore point with this map is there and counts.
    fn is_there(&self, context: &RepoContext, base: &DiskRecord) -> Result<bool> {
        if let Some(maps) = self.maps.get() {
            return Ok(maps.contains(&base.map));
        }
        let points = point_list::load(context, Reading::Remembered)?.points;
        let disks = points.into_iter().flat_map(|point| point.disks);
        let maps = disks.map(|disk| disk.map).collect::<HashSet<_>>();
        Ok(self.maps.get_or_init(|| maps).contains(&base.map))
    }

    /// For how many blocks from `at` on (at most `count`) what a map says leads to what stays; none
    /// where that is not certain.
    fn stays(
        &self,
        context: &RepoContext,
        condemned: &Condemned,
        at: Location,
        count: u32,
        forwards_left: usize,
    ) -> Result<Option<u32>> {
        if self.packs(context)?.contains(&at.pack) && !condemned.has_pack(at.pack) {
            return Ok(Some(count));
        }
        let Some(left) = forwards_left.checked_sub(1) else { return Ok(None) };
        let Some(forwards) = self.forwards(context, at.pack)? else { return Ok(None) };
        for (id, next, run) in forwards.over(at.ordinal, count) {
            if !condemned.has_forward(id)
                && let Some(run) = self.stays(context, condemned, next, run, left)?
            {
                return Ok(Some(run));
            }
        }
        Ok(None)
    }

    /// The packs that are there.
    fn packs(&self, context: &RepoContext) -> Result<&HashSet<ObjectId>> {
        if let Some(packs) = self.packs.get() {
            return Ok(packs);
        }
        let mut packs = HashSet::new();
        context.store.list(ObjectKind::Pack.prefix(), &mut |entry| {
            packs.extend(entry.name.rsplit('/').next().and_then(|id| id.parse::<ObjectId>().ok()));
            Ok(())
        })?;
        Ok(self.packs.get_or_init(|| packs))
    }

    /// The forwards of a pack; none where there are none.
    fn forwards(&self, context: &RepoContext, pack: ObjectId) -> Result<Option<Arc<Forwards>>> {
        if let Some(known) = self.forwards.lock().get(&pack) {
            return Ok(known.clone());
        }
        let opened = match Forwards::open(context, pack) {
            Ok(forwards) => Some(Arc::new(forwards)),
            Err(error) if error.is_damage() => None,
            Err(error) => return Err(error),
        };
        self.forwards.lock().insert(pack, opened.clone());
        Ok(opened)
    }
}
