//! What every object store promises, asked of those of this crate.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test: what fails here fails the test")]

#[path = "support/conformance.rs"]
mod conformance;

use conformance::{Promises, Subject};
use std::sync::Arc;
use vmtide_repo::{FaultyStore, LocalStore, MemoryStore};

fn subjects() -> Vec<Subject> {
    let directory = tempfile::tempdir().unwrap();
    let local = LocalStore::create(directory.path().join("repository")).unwrap();
    let promises = Promises::ALL;
    vec![
        Subject { store: Arc::new(MemoryStore::new()), promises, guard: None },
        Subject {
            store: Arc::new(FaultyStore::new(Arc::new(MemoryStore::new()))),
            promises,
            guard: None,
        },
        Subject { store: Arc::new(local), promises, guard: Some(Box::new(directory)) },
    ]
}

conformance_tests!(subjects);
