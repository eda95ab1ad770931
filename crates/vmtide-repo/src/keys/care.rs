//! Changing the keys of an open repository.

use super::{
    KdfParameters, KeyList, KeySlotInfo, RecoveryKey, create_slot, list, read_slots, remove,
};
use crate::config::Encryption;
use crate::repository::Repository;
use crate::{ObjectId, Password, RepoError, Result};

/// A password that was changed.
#[derive(Debug)]
pub struct RotatedKey {
    /// The new slot. Its password opens the repository.
    pub key: KeySlotInfo,
    /// Why the old slot is still there, where it is; its password opens the repository, too.
    pub old_left: Option<RepoError>,
}

impl Repository {
    /// The key slot that it was opened with; none without encryption.
    pub const fn opened_with(&self) -> Option<ObjectId> {
        self.slot
    }

    /// The key slots.
    ///
    /// # Errors
    /// Those of the store. A slot that cannot be read is not an error here: it is listed.
    pub fn keys(&self) -> Result<KeyList> {
        list(&*self.context.store)
    }

    /// Adds a password: makes a slot for it, reads it back and opens it.
    ///
    /// # Errors
    /// [`RepoError::Invalid`] in a repository without encryption, and where there are 64 slots; those of the
    /// store.
    pub fn add_key(
        &self,
        label: &str,
        password: &Password,
        kdf: &KdfParameters,
    ) -> Result<KeySlotInfo> {
        if self.config.encryption == Encryption::None {
            return Err(RepoError::Invalid(
                "this repository is not encrypted: it has no keys".into(),
            ));
        }
        let store = &*self.context.store;
        let key = create_slot(store, &self.config_bytes, &self.master, label, password, kdf)?;
        self.check_opens(key.id, password)?;
        self.opened.lock().push(key.id);
        Ok(key)
    }

    /// Removes a key slot, readable or not; its password opens nothing any more. One stays that was seen to
    /// open: the one this was opened with, or one that was added since.
    ///
    /// # Errors
    /// [`RepoError::Invalid`] where none would stay, [`RepoError::NotFound`]; those of the store.
    pub fn remove_key(&self, id: ObjectId) -> Result<()> {
        let opened = self.opened.lock().clone();
        remove(&*self.context.store, id, &opened)
    }

    /// Adds a recovery key: a password made here, to be written down. Answers with it; it is stored
    /// nowhere.
    ///
    /// # Errors
    /// As [`add_key`](Self::add_key).
    pub fn add_recovery_key(
        &self,
        label: &str,
        kdf: &KdfParameters,
    ) -> Result<(KeySlotInfo, RecoveryKey)> {
        let key = RecoveryKey::random()?;
        Ok((self.add_key(label, &key.password(), kdf)?, key))
    }

    /// Changes a password: [adds](Self::add_key) the new one, and only then removes the slot `old`. Interrupted anywhere, the old or both passwords open the repository.
    ///
    /// The master key stays the same. Who has had it, or a copy of the repository with the old slot and its
    /// password, can read what is stored now and later; a new master key takes a copy to a new repository.
    ///
    /// # Errors
    /// [`RepoError::NotFound`] where there is no slot `old`; those of [`add_key`](Self::add_key), after which
    /// nothing is changed. That `old` could not be removed is not an error but told.
    pub fn rotate_key(
        &self,
        old: ObjectId,
        label: &str,
        password: &Password,
        kdf: &KdfParameters,
    ) -> Result<RotatedKey> {
        let store = &*self.context.store;
        if self.config.encryption != Encryption::None
            && matches!(store.open(&super::object_name(old)), Err(RepoError::NotFound { .. }))
        {
            return Err(RepoError::NotFound {
                what: format!("key {old} in {}", store.location()),
                hint: "`vmtide key list` shows those there are".into(),
            });
        }
        let key = self.add_key(label, password, kdf)?;
        Ok(RotatedKey { key, old_left: self.remove_key(old).err() })
    }

    /// Reads a slot back and opens it.
    fn check_opens(&self, id: ObjectId, password: &Password) -> Result<()> {
        let slots = read_slots(&*self.context.store, self.config.id)?;
        let name = super::object_name(id);
        let slot = slots.readable.iter().find(|slot| slot.info.id == id);
        let slot = slot.ok_or_else(|| RepoError::damaged(&name, "it cannot be read back"))?;
        match slot.open(&self.config_bytes, password)? {
            Some(master) if master.as_bytes() == self.master.as_bytes() => Ok(()),
            _ => Err(RepoError::damaged(&name, "it does not open with its password")),
        }
    }
}
