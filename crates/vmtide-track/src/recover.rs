//! From the two files to what is known (step 1 of the protocol).

use crate::bitmap::{AtomicBitmap, Layer};
use crate::id::Series;
use crate::identity::Identity;
use crate::mrt::{self, Owner};
use crate::rct::Saved;
use crate::store::{StoreFile, TrackingStore};
use std::io;
use std::sync::Arc;

/// How long after the last sign of a host its last write may be. Signs are left every few seconds, and a power failure may
/// take back the last ones (file systems write them out within half a minute); less would take sound tracking for lost.
const SIGN_PATIENCE_MS: u64 = 120_000;

/// What the files say.
pub(crate) enum Loaded {
    /// The disk is not tracked.
    Off,
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
    let Some(rct) = store.read(StoreFile::Rct)? else {
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
    let marks = store.read(StoreFile::Mrt)?;
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
