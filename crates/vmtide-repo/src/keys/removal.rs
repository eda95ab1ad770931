//! Removing a key slot, so that one is always left, whoever removes others at the same moment.
//!
//! Whoever removes a slot first announces it by an object with a name of its own under
//! `removing/SLOT/`, and only then looks which slots are left. Of two that remove the last two slots at
//! once, at least one sees the announcement of the other, and steps back. An interrupted removal
//! leaves its announcement, which costs nothing but that its slot is not relied on any more.
//!
//! Left means: opened before the eyes of whoever removes. A slot that can merely be read may be junk that
//! opens with nothing; anybody who can write to the store can put one there.

use super::{PREFIX, object_name, read_slots, repository_of};
use crate::store::ObjectStore;
use crate::{ObjectId, RepoError, Result};
use std::collections::BTreeSet;

const ANNOUNCEMENTS: &str = "removing/";

/// What is put to see whether it can be removed; `probe` is no id, so that it announces nothing.
const PROBES: &str = "removing/probe/";

const PROBE_CONTENT: &[u8] = b"vmtide: whether this can be removed\n";

/// What an announcement holds, for people who find one.
const CONTENT: &[u8] = b"vmtide: this key slot is being removed\n";

/// Removes a slot, readable or not, while one of those `opened` is left, which a password was seen to
/// open. Its own password opens nothing any more; who has the master key from before keeps it.
///
/// # Errors
/// [`RepoError::NotFound`] where there is no such slot, [`RepoError::Invalid`] where none would be left;
/// [`RepoError::Denied`] where this credential may not remove; those of the store.
pub(crate) fn remove(store: &dyn ObjectStore, id: ObjectId, opened: &[ObjectId]) -> Result<()> {
    let name = object_name(id);
    // Only whether it is there: a damaged one can be removed too.
    match store.open(&name) {
        Err(RepoError::NotFound { .. }) => {
            return Err(RepoError::NotFound {
                what: format!("key {id} in {}", store.location()),
                hint: "`vmtide key list` shows those there are".into(),
            });
        }
        Err(RepoError::Denied { context, source }) => {
            return Err(RepoError::Denied { context, source });
        }
        _ => {}
    }
    let announcement = format!("{ANNOUNCEMENTS}{id}/{}", ObjectId::random()?);
    probe(store, &announcement).map_err(|error| may_not(error, id))?;
    store.put(&announcement, CONTENT)?;
    if let Err(error) = check_others(store, id, opened) {
        let _ = store.remove(&announcement);
        return Err(error);
    }
    store.remove(&name).map_err(|error| {
        // After any other error it may still be removed, by a request that was given up: it stays announced.
        if matches!(error, RepoError::Denied { .. } | RepoError::Locked { .. }) {
            let _ = store.remove(&announcement);
        }
        may_not(error, id)
    })?;
    // The slot is gone: what is left of its announcements is only untidy.
    if let Err(error) = forget_announcements(store, id) {
        tracing::info!(%error, "the announcement that key {id} is removed was left");
    }
    Ok(())
}

/// A store that denies removing says so here, before a slot is announced that would stay so for ever.
fn probe(store: &dyn ObjectStore, announcement: &str) -> Result<()> {
    // Most say it of what is not there, so that nothing is left in them.
    store.remove(announcement)?;
    let probe = format!("{PROBES}{}", ObjectId::random()?);
    store.put(&probe, PROBE_CONTENT)?;
    match store.remove(&probe) {
        // Kept for a time, as all that is new in a store may be. The slot may be old enough.
        Err(RepoError::Locked { .. }) => Ok(()),
        outcome => outcome,
    }
}

/// Checks that a slot is left that was opened and that nobody removes.
fn check_others(store: &dyn ObjectStore, id: ObjectId, opened: &[ObjectId]) -> Result<()> {
    let mut announced = BTreeSet::new();
    store.list(ANNOUNCEMENTS, &mut |entry| {
        let slot = entry.name.strip_prefix(ANNOUNCEMENTS).and_then(|rest| rest.split('/').next());
        announced.extend(slot.and_then(|slot| slot.parse::<ObjectId>().ok()));
        Ok(())
    })?;
    let slots = read_slots(store, repository_of(store)?)?.readable;
    let others: Vec<ObjectId> =
        slots.iter().map(|slot| slot.info.id).filter(|other| *other != id).collect();
    let is_opened = |other: &&ObjectId| opened.contains(other);
    if others.iter().filter(is_opened).any(|other| !announced.contains(other)) {
        return Ok(());
    }
    let location = store.location();
    Err(RepoError::Invalid(match (others.iter().find(is_opened), others.is_empty()) {
        (_, true) => format!("key {id} is the last that opens {location}; add another first"),
        (Some(other), false) => format!(
            "of the keys that open {location}, {other} is being removed (or was, and the removal was \
             interrupted: remove it again), and {id} is the last beside it; add another first"
        ),
        (None, false) => format!(
            "key {id} is the one that opened {location} now; that any other opens it is not known: give the \
             password that is to stay, or change this one with `vmtide key rotate`"
        ),
    }))
}

fn forget_announcements(store: &dyn ObjectStore, id: ObjectId) -> Result<()> {
    let mut names = Vec::new();
    store.list(&format!("{ANNOUNCEMENTS}{id}/"), &mut |entry| {
        names.push(entry.name);
        Ok(())
    })?;
    names.iter().try_for_each(|name| store.remove(name))
}

fn may_not(error: RepoError, id: ObjectId) -> RepoError {
    match error {
        RepoError::Denied { source, .. } => RepoError::Denied {
            context: format!(
                "remove {PREFIX}{id}: this user or credential may not remove objects, so its password goes \
                 on opening the repository; use one that may"
            ),
            source,
        },
        other => other,
    }
}
