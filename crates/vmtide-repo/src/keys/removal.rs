//! Removing a key slot, so that one is always left, whoever removes others at the same moment.
//!
//! Whoever removes a slot first announces it by an object with a name of its own under
//! `removing/SLOT/`, and only then looks which slots are left. Of two that remove the last two slots at
//! once, at least one sees the announcement of the other, and steps back. An interrupted removal
//! leaves its announcement, which costs nothing but that its slot is not relied on any more.

use super::{PREFIX, object_name, read_slots, repository_of};
use crate::store::ObjectStore;
use crate::{ObjectId, RepoError, Result};
use std::collections::BTreeSet;

const ANNOUNCEMENTS: &str = "removing/";

/// What an announcement holds, for people who find one.
const CONTENT: &[u8] = b"vmtide: this key slot is being removed\n";

/// Removes a slot, readable or not, while another is left that can be read. Its password opens
/// nothing any more; who has the master key from before keeps it.
///
/// # Errors
/// [`RepoError::NotFound`] where there is no such slot, [`RepoError::Invalid`] for the last;
/// [`RepoError::Denied`] where this credential may not remove; those of the store.
pub(crate) fn remove(store: &dyn ObjectStore, id: ObjectId) -> Result<()> {
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
    // A store that denies removing altogether says so here, before anything is left in it.
    store.remove(&announcement).map_err(|error| may_not(error, id))?;
    store.put(&announcement, CONTENT)?;
    if let Err(error) = check_others(store, id) {
        let _ = store.remove(&announcement);
        return Err(error);
    }
    store.remove(&name).map_err(|error| {
        let _ = store.remove(&announcement);
        may_not(error, id)
    })?;
    // The slot is gone: what is left of its announcements is only untidy.
    if let Err(error) = forget_announcements(store, id) {
        tracing::info!(%error, "the announcement that key {id} is removed was left");
    }
    Ok(())
}

/// Checks that a slot is left that can be read and that nobody removes.
fn check_others(store: &dyn ObjectStore, id: ObjectId) -> Result<()> {
    let mut announced = BTreeSet::new();
    store.list(ANNOUNCEMENTS, &mut |entry| {
        let slot = entry.name.strip_prefix(ANNOUNCEMENTS).and_then(|rest| rest.split('/').next());
        announced.extend(slot.and_then(|slot| slot.parse::<ObjectId>().ok()));
        Ok(())
    })?;
    let slots = read_slots(store, repository_of(store)?)?.readable;
    let others: Vec<ObjectId> =
        slots.iter().map(|slot| slot.info.id).filter(|other| *other != id).collect();
    if others.iter().any(|other| !announced.contains(other)) {
        return Ok(());
    }
    let location = store.location();
    Err(RepoError::Invalid(match others.first() {
        None => format!("key {id} is the last that opens {location}; add another first"),
        Some(other) => format!(
            "of the keys that open {location}, {other} is being removed (or was, and the removal was \
             interrupted: remove it again), and {id} is the last beside it; add another first"
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
