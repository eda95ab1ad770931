//! Repositories of every version of the format, as they were written then, are opened for ever.
//!
//! `fixtures/v1` has objects of every kind of version 1. It was made by the ignored test here, which
//! writes a new one where the format changes before its first release:
//!
//! ```text
//! cargo test -p vmtide-repo --test all old_versions -- --ignored
//! ```
//!
//! After a release its fixture is never made again; a new version gets a folder of its own.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests: a failed unwrap is a failed test"
)]

use crate::common;

use common::every_kind::{KINDS, check, contents, every_kind};
use common::{Disk, reopen, store_point};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmtide_block::{CancelToken, Progress};
use vmtide_repo::{
    ChangedRanges, DiskPlan, Level, LocalStore, MemoryStore, ObjectStore, Password, PruneOptions,
    Repository, check_integrity,
};

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v1")
}

/// All files below a directory, with their names from there.
fn files(root: &Path) -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    let mut waiting = vec![root.to_path_buf()];
    while let Some(directory) = waiting.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                waiting.push(path);
                continue;
            }
            let name = path.strip_prefix(root).unwrap().to_str().unwrap();
            found.push((name.replace(std::path::MAIN_SEPARATOR, "/"), path));
        }
    }
    found
}

/// The fixture in a place where it can be written to.
fn copy(to: &Path) -> Arc<dyn ObjectStore> {
    for (name, path) in files(&fixture()) {
        let target = to.join(name);
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::write(&target, std::fs::read(path).unwrap()).unwrap();
    }
    Arc::new(LocalStore::open(to).unwrap())
}

#[test]
fn a_repository_of_version_1_is_read_checked_and_written_to() {
    let directory = tempfile::tempdir().unwrap();
    let store = copy(directory.path());
    let report = check_integrity(&store, &Progress::new(), &CancelToken::new()).unwrap();
    // The one frame that was damaged on purpose.
    assert_eq!(report.damage.len(), 1, "{report:?}");
    assert!(report.objects_checked >= 15 && report.unknown == 0, "{report:?}");

    let repository = reopen(&store).unwrap();
    check(&repository);
    let newest = repository.points().unwrap().points.pop().unwrap();
    let plan = DiskPlan {
        id: "disk0".into(),
        base: Some(&newest.disks[0]),
        changed: ChangedRanges::Everything,
    };
    let source = Disk::new(contents().pop().unwrap());
    let point = store_point(&repository, &source, &plan, Level::Incremental).unwrap();
    assert_eq!(point.disks[0].counts.new_bytes, 0, "all is known");
    repository.forget(&[point.id]).unwrap();
    repository.prune(&PruneOptions::default(), &Progress::new(), &CancelToken::new()).unwrap();
    check(&reopen(&store).unwrap());
}

#[test]
fn every_password_of_then_opens_it() {
    let directory = tempfile::tempdir().unwrap();
    let store = copy(directory.path());
    for (password, opens) in [(common::PASSWORD, true), ("another", true), ("wrong", false)] {
        let opened = Repository::open(Arc::clone(&store), &mut || Ok(Password::new(password)));
        assert_eq!(opened.is_ok(), opens, "{password}");
    }
}

#[test]
fn the_fixture_has_every_kind_of_object() {
    let names: Vec<String> = files(&fixture()).into_iter().map(|(name, _)| name).collect();
    for kind in KINDS.iter().chain(&["released/"]) {
        assert!(names.iter().any(|name| name.starts_with(kind)), "no {kind} in {names:?}");
    }
}

#[test]
#[ignore = "writes the fixture of the current format anew"]
fn make_fixture() {
    let memory = Arc::new(MemoryStore::new());
    every_kind(&memory);
    let root = fixture();
    if root.exists() {
        std::fs::remove_dir_all(&root).unwrap();
    }
    for name in memory.names() {
        let path = root.join(&name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, memory.bytes(&name).unwrap()).unwrap();
    }
}
