//! From the two files to what is known (step 1 of the protocol).

use crate::bitmap::{AtomicBitmap, Layer};
use crate::id::Series;
use crate::identity::Identity;
use crate::mrt::{self, Owner};
use crate::rct::{self, Saved};
use crate::store::{StoreFile, TrackingStore};
use crate::{Result as TrackResult, TrackError};
use std::io;
use std::sync::Arc;

/// How long after the last sign of a host its last write may be. Signs are left every few seconds, and a power failure may
/// take back the last ones (file systems write them out within half a minute); less would take sound tracking for lost.
const SIGN_PATIENCE_MS: u64 = 120_000;

/// What the files say.
pub(crate) enum Loaded {
    /// The disk is not tracked.
    Off,
    /// Another program keeps its tracking in files of these names.
    Foreign,
    /// It was, and that is no longer worth anything.
    Lost {
        /// Whose ids are lost; [`Series::ANY`] where that cannot be read.
        series: Series,
        /// How it was noticed.
        reason: String,
        /// What was lost before.
        before: Vec<(Series, String)>,
    },
    /// It is.
    On(Recovered),
}

/// Tracking that can go on.
pub(crate) struct Recovered {
    /// All that is known, the marks of a crash included.
    pub saved: Saved,
    /// Above every epoch in either file.
    pub next_epoch: u64,
    /// The `.mrt` can be used further as it is.
    pub marks_are_sound: bool,
    /// The image was closed in order: nothing is added by marks.
    pub was_closed: bool,
}

/// Reads the files of the disk that looks like `now`.
///
/// # Errors
/// Where a file cannot be read, which is not the same as one that is damaged.
pub(crate) fn load(
    store: &dyn TrackingStore,
    now: &Identity,
    size_bytes: u64,
) -> io::Result<Loaded> {
    let rct = store.read(StoreFile::Rct)?;
    let marks = store.read(StoreFile::Mrt)?;
    if is_foreign(rct.as_deref(), marks.as_deref()) {
        return Ok(Loaded::Foreign);
    }
    let Some(rct) = rct else {
        return Ok(Loaded::Off);
    };
    let saved = match Saved::decode(&rct) {
        Ok(saved) => saved,
        Err(reason) => {
            let reason = format!("the .rct file cannot be used: {reason}");
            return Ok(Loaded::Lost { series: Series::ANY, reason, before: Vec::new() });
        }
    };
    drop(rct);
    if !saved.closed
        && let (Some(changed), Some(sign)) = (now.changed_unix_ms, store.last_beat_unix_ms()?)
        && changed > sign.saturating_add(SIGN_PATIENCE_MS)
    {
        let reason = "the image was written to long after the crash of its last host".to_owned();
        return Ok(Loaded::Lost { series: saved.series, reason, before: saved.lost });
    }
    Ok(match check(saved.clone(), marks.as_deref(), now, size_bytes) {
        Ok(recovered) => Loaded::On(recovered),
        Err(reason) => Loaded::Lost { series: saved.series, reason, before: saved.lost },
    })
}

/// Whether these are another program's: Hyper-V names its files as vmtide does. A file of vmtide's own may be damaged in any
/// part, so one that bears the mark of either kind speaks for both; one that is empty or zero is nobody's.
fn is_foreign(rct: Option<&[u8]>, marks: Option<&[u8]>) -> bool {
    let files = || rct.into_iter().chain(marks);
    let is_ours = |bytes: &[u8]| {
        let begins = bytes.get(..rct::MAGIC.len()).unwrap_or(bytes);
        // Also one that is cut short within its mark.
        (!begins.is_empty() && rct::MAGIC.starts_with(begins))
            || bytes.chunks(mrt::PAGE_BYTES).any(|page| page.starts_with(&mrt::MAGIC))
    };
    files().any(|bytes| bytes.iter().any(|byte| *byte != 0)) && !files().any(is_ours)
}

/// Refuses to put files in the place of another program's, or to remove those.
///
/// # Errors
/// [`TrackError::Unsupported`], [`TrackError::Io`].
pub(crate) fn refuse_foreign(store: &dyn TrackingStore, disk: &str) -> TrackResult<()> {
    let failed = |error| TrackError::io(format!("read the change tracking of {disk}"), error);
    let rct = store.read(StoreFile::Rct).map_err(failed)?;
    let marks = store.read(StoreFile::Mrt).map_err(failed)?;
    match is_foreign(rct.as_deref(), marks.as_deref()) {
        true => Err(foreign(disk)),
        false => Ok(()),
    }
}

/// The error where another program tracks the disk.
pub(crate) fn foreign(disk: &str) -> TrackError {
    let reason = "the .rct and .mrt files beside it are another program's (Hyper-V's have these names) and are left \
                  alone: ask that program what changed, or remove them once nobody needs them";
    TrackError::unsupported(disk, reason)
}

fn check(
    mut saved: Saved,
    marks: Option<&[u8]>,
    now: &Identity,
    size_bytes: u64,
) -> Result<Recovered, String> {
    let was = saved.geometry.size_bytes;
    if was != size_bytes {
        return Err(format!("the disk has {size_bytes} bytes now and had {was}"));
    }
    if let Some(reason) = saved.identity.difference(now, saved.closed) {
        return Err(reason);
    }
    let owner = Owner { series: saved.series, geometry: saved.geometry };
    let found = marks.and_then(|marks| mrt::read(&owner, marks, saved.epoch));
    let was_closed = saved.closed;
    if !was_closed {
        let found =
            found.as_ref().ok_or("after a crash its .mrt file is missing or another disk's")?;
        add_regions(&mut saved, &found.regions);
    }
    let highest = saved.epoch.max(found.as_ref().map_or(0, |found| found.epoch));
    let next_epoch = highest.checked_add(1).ok_or("its epochs are used up")?;
    let marks_are_sound = found.is_some_and(|found| found.is_sound);
    Ok(Recovered { saved, next_epoch, marks_are_sound, was_closed })
}

/// Adds all blocks of regions to what changed since the newest id.
fn add_regions(saved: &mut Saved, regions: &[(u64, u64)]) {
    let bitmap = AtomicBitmap::new(saved.geometry.blocks());
    let each = saved.geometry.blocks_per_region();
    for (first, end) in regions {
        bitmap.set_range(first.saturating_mul(each), end.saturating_mul(each));
    }
    if let Some(newest) = saved.ids.last_mut() {
        if let Layer::Sealed(known) = &newest.changed {
            bitmap.add(known);
        }
        newest.changed = Layer::Growing(Arc::new(bitmap));
    }
}
