//! Key slots (format §5): several passwords, any of which opens the master key.
//!
//! A slot is bound to the bytes of the configuration, so that nobody who can write to the store can
//! change these behind the owner's back: no slot would open then.

mod care;
mod kdf;
mod recovery;
mod removal;
mod slot;

pub use care::RotatedKey;
pub use kdf::KdfParameters;
pub use recovery::RecoveryKey;
pub use slot::KeySlotInfo;

pub(crate) use removal::remove;

use crate::config::{self, RepositoryConfig};
use crate::crypto::MasterKey;
use crate::document;
use crate::password::Password;
use crate::store::ObjectStore;
use crate::{ObjectId, RepoError, Result};
use recovery::Recognised;
use slot::Slot;

const PREFIX: &str = "keys/";

/// The most slots that are read. People have a handful; somebody who can write to the store could
/// have readers look through any number, each at the price of [`KdfParameters`]' limits. Where there are
/// more, those are read that the store has had longest, so that adding some closes the repository to
/// nobody.
const MAX_SLOTS: usize = 64;

fn object_name(id: ObjectId) -> String {
    format!("{PREFIX}{id}")
}

/// Adds a slot that opens with `password`. `config_bytes` are those of `vmtide.repo`, which need not
/// be in the store yet.
///
/// # Errors
/// [`RepoError::Invalid`] for an empty password, parameters or a label that cannot be, or where there are
/// [`MAX_SLOTS`] already; those of the store.
pub(crate) fn create_slot(
    store: &dyn ObjectStore,
    config_bytes: &[u8],
    master: &MasterKey,
    label: &str,
    password: &Password,
    kdf: &KdfParameters,
) -> Result<KeySlotInfo> {
    let repository = RepositoryConfig::decode(config_bytes)?.id;
    let (ids, more) = slot_ids(store)?;
    if ids.len() + more.len() >= MAX_SLOTS {
        return Err(RepoError::Invalid(format!(
            "{} has {} objects under {PREFIX}, of which no more than {MAX_SLOTS} are read: remove some \
             (`vmtide key list`, `vmtide key remove`) before another is added",
            store.location(),
            ids.len() + more.len()
        )));
    }
    let slot = Slot::seal(repository, config_bytes, master, label, password, kdf)?;
    store.put(&object_name(slot.info.id), &slot.encode()?)?;
    Ok(slot.info)
}

/// The master key, from the first slot that opens with `password`, and that slot; the cheapest is
/// tried first. A recovery key may be written in any way its letters can be told from.
///
/// # Errors
/// [`RepoError::WrongPassword`] where no slot opens; [`RepoError::Damaged`] where there is none that
/// could be tried; those of the store.
pub(crate) fn unlock(
    store: &dyn ObjectStore,
    config_bytes: &[u8],
    password: &Password,
) -> Result<(MasterKey, ObjectId)> {
    let Slots { mut readable, unreadable } =
        read_slots(store, RepositoryConfig::decode(config_bytes)?.id)?;
    let written = recovery::recognise(password);
    // A hostile slot that takes minutes must not stand before an honest one.
    readable.sort_by_key(|slot| slot.info.kdf.cost());
    for slot in &readable {
        if let Some(master) = slot.open(config_bytes, password)? {
            return Ok((master, slot.info.id));
        }
    }
    let mut repository = store.location();
    match unreadable.into_iter().next() {
        Some((_, error)) if readable.is_empty() => return Err(error),
        None if readable.is_empty() => return Err(no_slot()),
        Some((id, _)) => {
            repository
                .push_str(&format!(" ({} cannot be read and was not tried)", object_name(id)));
        }
        None => {}
    }
    if let Recognised::Mistyped(groups) = written {
        repository.push_str(&format!(" (this looks like a recovery key mistyped in {groups})"));
    }
    Err(RepoError::WrongPassword { repository })
}

/// The key slots of a repository.
#[derive(Debug, Default)]
pub struct KeyList {
    /// Those that can be read, oldest first. None of them is sure to open with anything: whoever can write
    /// to the store can put a slot there.
    pub keys: Vec<KeySlotInfo>,
    /// Those that cannot, and why; no password is tried on them.
    pub unreadable: Vec<(ObjectId, RepoError)>,
}

/// The slots, oldest first.
///
/// # Errors
/// Those of the store; [`RepoError::Damaged`] for the configuration. A slot that cannot be read is not an
/// error here: it is listed.
pub(crate) fn list(store: &dyn ObjectStore) -> Result<KeyList> {
    let Slots { readable, unreadable } = read_slots(store, repository_of(store)?)?;
    let mut keys: Vec<KeySlotInfo> = readable.into_iter().map(|slot| slot.info).collect();
    keys.sort_by_key(|info| (info.created, info.id));
    Ok(KeyList { keys, unreadable })
}

/// The slots that cannot be read, and why.
///
/// # Errors
/// Those of the store; [`RepoError::Damaged`] for the configuration.
pub(crate) fn unreadable(store: &dyn ObjectStore) -> Result<Vec<(ObjectId, RepoError)>> {
    Ok(read_slots(store, repository_of(store)?)?.unreadable)
}

/// The slots of one repository.
struct Slots {
    readable: Vec<Slot>,
    unreadable: Vec<(ObjectId, RepoError)>,
}

/// The ids of the slots that are read, and of those that are too many.
fn slot_ids(store: &dyn ObjectStore) -> Result<(Vec<ObjectId>, Vec<ObjectId>)> {
    let mut found = Vec::new();
    store.list(PREFIX, &mut |entry| {
        let id = entry.name.strip_prefix(PREFIX).and_then(|id| id.parse::<ObjectId>().ok());
        found.extend(id.map(|id| (entry.modified, id)));
        Ok(())
    })?;
    found.sort_unstable();
    let mut ids: Vec<ObjectId> = found.into_iter().map(|(_, id)| id).collect();
    let more = ids.split_off(ids.len().min(MAX_SLOTS));
    Ok((ids, more))
}

/// Reads the slots of a repository. Those of another, left by an interrupted `init`, are passed over.
fn read_slots(store: &dyn ObjectStore, repository: ObjectId) -> Result<Slots> {
    let (ids, more) = slot_ids(store)?;
    let mut slots = Slots { readable: Vec::new(), unreadable: Vec::new() };
    for id in ids {
        let slot =
            document::read(store, &object_name(id)).and_then(|bytes| Slot::decode(id, &bytes));
        match slot {
            Ok(slot) if slot.repository == repository => slots.readable.push(slot),
            // Of another repository, or removed since it was listed.
            Ok(_) | Err(RepoError::NotFound { .. }) => {}
            Err(error) => slots.unreadable.push((id, error)),
        }
    }
    slots.unreadable.extend(more.into_iter().map(|id| (id, too_many(id))));
    Ok(slots)
}

fn too_many(id: ObjectId) -> RepoError {
    let detail =
        format!("one of more than {MAX_SLOTS} key slots, and newer than those that are read");
    RepoError::damaged(object_name(id), detail)
}

fn repository_of(store: &dyn ObjectStore) -> Result<ObjectId> {
    Ok(RepositoryConfig::decode(&config::read(store)?)?.id)
}

/// Reads a slot made of hostile bytes. What is taken must be within the limits of what a reader
/// spends on it, and come back the same when it is written again. Answers whether it was taken.
#[allow(clippy::expect_used, reason = "a failure is what the fuzz target is there to find")]
pub(crate) fn fuzz_slot(bytes: &[u8]) -> bool {
    let id = ObjectId([1; 16]);
    let Ok(slot) = Slot::decode(id, bytes) else { return false };
    assert_eq!(slot.info.kdf.check(), Ok(()), "a slot that costs too much was taken");
    let again = slot.encode().and_then(|bytes| Slot::decode(id, &bytes));
    let again = again.expect("what was read can be written and read again");
    assert_eq!((again.info, again.repository), (slot.info, slot.repository));
    true
}

/// The bytes of a sound slot with the cheapest parameters, the seed of a corpus.
///
/// # Errors
/// Those of sealing, which do not happen.
pub(crate) fn sample_slot() -> Result<Vec<u8>> {
    let kdf = KdfParameters { memory_kib: 8, iterations: 1, lanes: 1 };
    let master = MasterKey::from_bytes([3; 32]);
    let password = Password::new("seed");
    let mut slot = Slot::seal(ObjectId([2; 16]), b"", &master, "laptop", &password, &kdf)?;
    slot.info.id = ObjectId([1; 16]);
    slot.encode()
}

fn no_slot() -> RepoError {
    RepoError::damaged(PREFIX, "no key slot is left: nothing can open this repository")
}

#[cfg(test)]
mod tests;
