//! What the index of a large repository costs.

use super::Measured;
use crate::index::measure_synthetic;
use crate::keys::KdfParameters;
use crate::password::Password;
use crate::store::{ObjectStore, ScratchStore};
use crate::{InitOptions, ObjectId, Repository, Result};
use std::sync::Arc;
use vmtide_block::CancelToken;

/// What an index of many chunks costs.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct IndexMeasured {
    /// The chunks in it.
    pub entries: u64,
    /// What it takes in the store, in bytes.
    pub stored_bytes: u64,
    /// What it takes in the memory of a backup, in bytes, with the cache of pages, which has some 8 MiB
    /// however long the index is.
    pub memory_bytes: u64,
    /// Opening it, and asking it.
    pub stages: Vec<Measured>,
}

/// Writes an index of `entries` made-up chunks (24 bytes each) into a repository of its own under `bench/` in
/// the store, opens it as a backup does, and asks it `lookups` times, by one thread. Removes it.
///
/// # Errors
/// [`RepoError::Busy`](crate::RepoError::Busy) where another measurement goes on; those of the store; cancelled.
pub fn measure_index(
    store: Arc<dyn ObjectStore>,
    entries: u64,
    lookups: u64,
    cancel: &CancelToken,
) -> Result<IndexMeasured> {
    let store = ScratchStore::begin(store)?;
    let outcome = measure(&store, entries, lookups, cancel);
    let cleared = store.clear();
    let measured = outcome?;
    cleared?;
    Ok(measured)
}

fn measure(
    store: &ScratchStore,
    entries: u64,
    lookups: u64,
    cancel: &CancelToken,
) -> Result<IndexMeasured> {
    let kdf = KdfParameters { memory_kib: 64, iterations: 1, lanes: 1 };
    let init = InitOptions { kdf, ..InitOptions::default() };
    let password = Password::new(ObjectId::random()?.to_string());
    let repository = Repository::init(Arc::new(store.clone()), &init, Some(&password))?;
    let cost = measure_synthetic(repository.context(), entries, lookups, cancel)?;
    let mut stored_bytes = 0;
    store.list("index/", &mut |entry| {
        stored_bytes += entry.length_bytes;
        Ok(())
    })?;
    Ok(IndexMeasured {
        entries,
        stored_bytes,
        memory_bytes: cost.memory_bytes,
        stages: vec![
            Measured::new("open the index", stored_bytes, 1, cost.open),
            Measured::new("ask for known chunks", 0, lookups, cost.known),
            Measured::new("ask for unknown chunks", 0, lookups, cost.unknown),
        ],
    })
}
