//! Putting damage on record, and taking off what is sound after all.

use crate::context::RepoContext;
use crate::disk::{
    DamageRecord, DamagedPart, Forwards, PackSet, Quarantine, SalvagedDisk, lost_ranges,
    write_damaged,
};
use crate::envelope::ObjectKind;
use crate::map::DiskMap;
use crate::pack::{FrameDecoder, Pack, is_media_error};
use crate::point::{DiskRecord, RestorePoint};
use crate::repository::Repository;
use crate::{BLOCK_BYTES, Location, ObjectId, RepoError, Result, record};
use std::collections::HashSet;
use std::sync::Arc;
use vmtide_block::{CancelToken, RangeSet};

impl Repository {
    /// Puts on record what readers of this repository object met damaged since the last call, so that
    /// writers store it again; `by` says who found it. Everything is read once more first: a
    /// failure that passed is no damage. Answers with what was not on record yet.
    ///
    /// The caller holds a [`lease`](Self::lease).
    ///
    /// # Errors
    /// Those of the store, as [`RepoError::Denied`] where it may only be read.
    pub fn quarantine_found(&self, by: &str) -> Result<Vec<DamagedPart>> {
        quarantine_found(self.context(), by)
    }

    /// The bytes of a stored disk that are on record as damaged and not healed, or cannot be
    /// reached. Cheap where nothing is on record.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] for the disk map; those of the store.
    pub fn damaged_ranges(&self, disk: &DiskRecord) -> Result<RangeSet> {
        let packs = PackSet::new(Arc::clone(self.context()));
        if packs.repairs()?.damaged.is_empty() {
            return Ok(RangeSet::new());
        }
        let blocks = disk.size_bytes.div_ceil(BLOCK_BYTES as u64);
        let map = DiskMap::open(self.context(), &disk.map, blocks)?;
        lost_ranges(&map, &packs, disk.size_bytes, None)
    }

    /// A disk of a restore point as far as it can be read: the rest reads as zeros, and is on a list.
    /// The caller holds a [`lease`](Self::lease).
    ///
    /// # Errors
    /// [`RepoError::NotFound`] for a disk that the point does not have; those of the store.
    pub fn salvage_disk(&self, point: &RestorePoint, disk: &str) -> Result<Arc<SalvagedDisk>> {
        let record = point.disk_record(disk).ok_or_else(|| RepoError::NotFound {
            what: format!("disk {disk:?} in restore point {}", point.id),
            hint: String::new(),
        })?;
        let name = format!("{}@{}/{disk}", point.vm, point.id);
        Ok(Arc::new(SalvagedDisk::open(self.context(), name, record)?))
    }

    /// Whether anything is on record as damaged, healed or not.
    ///
    /// # Errors
    /// Those of the store.
    pub fn has_damage_on_record(&self) -> Result<bool> {
        Ok(!Quarantine::load(self.context())?.is_empty())
    }
}

/// See [`Repository::quarantine_found`].
pub(crate) fn quarantine_found(context: &RepoContext, by: &str) -> Result<Vec<DamagedPart>> {
    let noted = context.damage.noted();
    if noted.is_empty() {
        return Ok(Vec::new());
    }
    let known = Quarantine::load(context)?;
    let mut new = Vec::new();
    for (pack, frame) in &noted {
        if let Some(part) = confirm(context, *pack, *frame)? {
            let place = Location { pack: part.pack, ordinal: part.first_block };
            let is_known = known.entry(place).is_some_and(|entry| entry.part.frame == part.frame);
            if !is_known && !new.contains(&part) {
                new.push(part);
            }
        }
    }
    context.damage.forget(&noted);
    if !new.is_empty() {
        tracing::warn!(parts = new.len(), "damage was found and is put on record");
        write_damaged(context, by, &new)?;
    }
    Ok(new)
}

/// Reads a frame, or the directory of a pack, once more; answers with what is damaged, or none where
/// all is well.
///
/// # Errors
/// Those of the store that do not mean damage.
pub(super) fn confirm(
    context: &RepoContext,
    pack: ObjectId,
    frame: Option<u32>,
) -> Result<Option<DamagedPart>> {
    let whole = |error: &RepoError| Ok(Some(DamagedPart::whole(pack, error.to_string())));
    let opened = match context.try_open_object(ObjectKind::Pack, pack) {
        Ok(Some(object)) => Pack::from_object(context, object),
        Ok(None) => match Forwards::open(context, pack) {
            Ok(_) => return Ok(None),
            Err(error) if is_media_error(&error) => return whole(&error),
            Err(error) => return Err(error),
        },
        Err(error) => Err(error),
    };
    let opened = match opened {
        Ok(opened) => opened,
        Err(error) if is_media_error(&error) => return whole(&error),
        Err(error) => return Err(error),
    };
    let number = frame.and_then(|frame| usize::try_from(frame).ok());
    let Some(number) = number.filter(|number| *number < opened.frames().len()) else {
        return Ok(None);
    };
    let mut stored = Vec::new();
    let mut content = vec![0; opened.content_length(number)];
    let mut decoder = FrameDecoder::new()?;
    let outcome = opened
        .read_stored(number..number + 1, &mut stored)
        .and_then(|stored| opened.decode_and_compare(number, stored, &mut content, &mut decoder));
    match outcome {
        Ok(()) => Ok(None),
        Err(error) if is_media_error(&error) => {
            let blocks = opened.blocks_of(number);
            let count = blocks.end - blocks.start;
            let detail = error.to_string();
            Ok(Some(DamagedPart { pack, frame, first_block: blocks.start, blocks: count, detail }))
        }
        Err(error) => Err(error),
    }
}

/// Reads once more what is on record as damaged, and takes off the record what is sound after all: a
/// cable was loose, a disk came back, a pack was put back from elsewhere. Answers with how many parts
/// that were.
///
/// # Errors
/// Those of the store that do not mean damage; cancelled.
pub(super) fn lift_sound(context: &RepoContext, cancel: &CancelToken) -> Result<u64> {
    let mut lifted = 0;
    for (id, content) in read_records(context)? {
        let before = content.parts.len();
        let mut parts = Vec::new();
        for part in &content.parts {
            cancel.check()?;
            if confirm(context, part.pack, part.frame)?.is_some() {
                parts.push(part.clone());
            }
        }
        if parts.len() < before {
            lifted += (before - parts.len()) as u64;
            replace_record(context, id, content, parts)?;
        }
    }
    Ok(lifted)
}

/// The records that count and can be read. Those that do not count any more are removed where that is
/// allowed.
pub(super) fn read_records(context: &RepoContext) -> Result<Vec<(ObjectId, DamageRecord)>> {
    let mut records = Vec::new();
    for id in record::list(context, ObjectKind::Damaged)? {
        match record::read::<DamageRecord>(context, ObjectKind::Damaged, id) {
            Ok(content) => records.push((id, content)),
            Err(error) if is_media_error(&error) => {}
            Err(error) => return Err(error),
        }
    }
    let replaced: HashSet<ObjectId> =
        records.iter().flat_map(|(_, content)| &content.replaces).copied().collect();
    let (gone, counting): (Vec<_>, Vec<_>) =
        records.into_iter().partition(|(id, _)| replaced.contains(id));
    for (id, _) in gone {
        remove_record(context, id);
    }
    Ok(counting)
}

/// Puts a record with other parts in the place of one. Where nothing may be removed both stay, and
/// only the new one counts.
pub(super) fn replace_record(
    context: &RepoContext,
    id: ObjectId,
    content: DamageRecord,
    parts: Vec<DamagedPart>,
) -> Result<()> {
    // Without parts and with nothing else to replace a record has nothing to say once the old one is gone.
    if parts.is_empty() && content.replaces.is_empty() && remove_record(context, id) {
        return Ok(());
    }
    let mut replaces = content.replaces.clone();
    replaces.push(id);
    let left = DamageRecord { parts, replaces, ..content };
    record::write(context, ObjectKind::Damaged, ObjectId::random()?, &left)?;
    remove_record(context, id);
    Ok(())
}

/// Removes a record; answers with whether that was possible.
pub(super) fn remove_record(context: &RepoContext, id: ObjectId) -> bool {
    match context.store.remove(&ObjectKind::Damaged.object_name(id)) {
        Ok(()) => true,
        Err(error) => {
            tracing::debug!(%error, "a record of damage that counts no more stays");
            false
        }
    }
}
