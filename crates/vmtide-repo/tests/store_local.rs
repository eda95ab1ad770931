//! The local store and the file system below it.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test: what fails here fails the test"
)]

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;
use vmtide_repo::{LocalStore, ObjectStore, RepoError, read_small};

fn new_store() -> (TempDir, LocalStore) {
    let directory = tempfile::tempdir().unwrap();
    let store = LocalStore::create(directory.path().join("r")).unwrap();
    store.put("vmtide.repo", b"{}").unwrap();
    (directory, store)
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn files_in(path: &Path) -> usize {
    fs::read_dir(path).unwrap().count()
}

#[test]
fn an_object_is_a_file_of_its_name_that_only_the_owner_reads() {
    let (directory, store) = new_store();
    let root = directory.path().join("r");
    store.put("packs/ab/ab12", b"content").unwrap();
    assert_eq!(fs::read(root.join("packs/ab/ab12")).unwrap(), b"content");
    assert_eq!(mode(&root.join("packs/ab/ab12")), 0o600);
    for path in ["", "packs", "packs/ab", "tmp"] {
        assert_eq!(mode(&root.join(path)), 0o700, "{path:?}");
    }
    assert_eq!(files_in(&root.join("tmp")), 0);
    assert_eq!(store.location(), root.to_str().unwrap());
}

#[test]
fn create_makes_missing_directories_and_takes_an_empty_one() {
    let directory = tempfile::tempdir().unwrap();
    LocalStore::create(directory.path().join("a/b/c")).unwrap();
    fs::create_dir(directory.path().join("a/b/c/lost+found")).unwrap();
    fs::write(directory.path().join("a/b/c/.snapshot"), b"").unwrap();
    fs::create_dir(directory.path().join("a/b/c/keys")).unwrap();
    fs::write(directory.path().join("a/b/c/keys/0123"), b"").unwrap();
    LocalStore::create(directory.path().join("a/b/c")).unwrap();
    fs::create_dir(directory.path().join("a/b/c/packs")).unwrap();
    LocalStore::create(directory.path().join("a/b/c")).unwrap_err();
}

#[test]
fn create_refuses_what_is_not_empty() {
    let (directory, _store) = new_store();
    let error = LocalStore::create(directory.path().join("r")).unwrap_err();
    assert!(matches!(error, RepoError::AlreadyExists { .. }));
    assert!(error.to_string().contains("a repository at"), "{error}");
    let error = LocalStore::create(directory.path()).unwrap_err();
    assert!(matches!(error, RepoError::AlreadyExists { .. }));
    assert!(error.to_string().contains("empty directory"), "{error}");
}

#[test]
fn what_is_no_repository_is_said_to_be_none() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, b"").unwrap();
    for error in [LocalStore::open(&file).unwrap_err(), LocalStore::create(&file).unwrap_err()] {
        assert!(matches!(error, RepoError::Invalid(_)), "{error}");
        assert!(error.to_string().contains("is a file"), "{error}");
    }
    for path in [directory.path().to_owned(), directory.path().join("absent"), file.join("x")] {
        let error = LocalStore::open(&path).unwrap_err();
        assert!(matches!(error, RepoError::NotFound { .. }), "{error}");
        assert!(error.to_string().contains("vmtide init"), "{error}");
    }
}

#[test]
fn a_dropped_writer_leaves_nothing_and_a_killed_one_leaves_what_prune_removes() {
    let (directory, store) = new_store();
    let tmp = directory.path().join("r/tmp");
    let mut writer = store.create("packs/ab/x").unwrap();
    writer.write(&[1; 1 << 20]).unwrap();
    assert_eq!(files_in(&tmp), 1);
    drop(writer);
    assert_eq!(files_in(&tmp), 0);
    let mut killed = store.create("packs/ab/x").unwrap();
    killed.write(&[1; 1 << 20]).unwrap();
    std::mem::forget(killed);
    assert_eq!(store.remove_unfinished().unwrap(), 0, "its writer may go on");
    common::make_older(&tmp);
    fs::write(tmp.join("not-ours"), b"x").unwrap();
    assert_eq!(store.remove_unfinished().unwrap(), 1 << 20);
    assert_eq!(store.remove_unfinished().unwrap(), 0);
    assert_eq!(files_in(&tmp), 1, "what is not ours is left alone");
    store.put("packs/ab/x", b"again").unwrap();
}

#[test]
fn a_writer_does_without_its_directory_in_tmp() {
    let (directory, store) = new_store();
    fs::remove_dir(directory.path().join("r/tmp")).unwrap();
    assert_eq!(store.remove_unfinished().unwrap(), 0);
    store.put("points/a", b"x").unwrap();
}

#[test]
fn listing_leaves_alone_what_no_store_wrote() {
    let (directory, store) = new_store();
    store.put("packs/ab/x", b"x").unwrap();
    let packs = directory.path().join("r/packs");
    fs::write(packs.join(".nfs0001"), b"").unwrap();
    fs::write(packs.join("ab/name with spaces"), b"").unwrap();
    symlink(&packs, packs.join("circle")).unwrap();
    symlink("/nowhere", packs.join("ab/dangling")).unwrap();
    let mut names = Vec::new();
    store
        .list("packs/", &mut |entry| {
            names.push(entry.name);
            Ok(())
        })
        .unwrap();
    names.sort();
    assert_eq!(names, ["packs/ab/x", "packs/circle/ab/x"]);
}

#[test]
fn the_directory_of_one_lease_goes_with_its_last_object_while_others_write_there() {
    let (directory, store) = new_store();
    let one = directory.path().join("r/leases/00000000000000000000000000000001");
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let store = store.clone();
            scope.spawn(move || {
                for number in 0..100 {
                    let name = format!(
                        "leases/00000000000000000000000000000001/{writer:016x}{number:016x}"
                    );
                    let mut object = store.create(&name).unwrap();
                    object.write(b"x").unwrap();
                    object.finish().unwrap();
                    assert_eq!(store.open(&name).unwrap().length_bytes(), 1);
                    store.remove(&name).unwrap();
                }
            });
        }
    });
    assert!(!one.exists(), "its directory is left behind");
    assert!(one.parent().unwrap().exists());
}

#[test]
fn a_pipe_or_a_directory_in_place_of_an_object_is_an_error_and_no_hang() {
    let (directory, store) = new_store();
    let points = directory.path().join("r/points");
    fs::create_dir_all(points.join("directory")).unwrap();
    let made = Command::new("mkfifo").arg(points.join("pipe")).status();
    assert!(made.expect("mkfifo of coreutils is needed").success());
    for name in ["points/pipe", "points/directory"] {
        let error = store.open(name).map(drop).unwrap_err();
        assert!(matches!(error, RepoError::Io { .. }), "{error}");
        assert!(error.to_string().contains("not a regular file"), "{error}");
    }
}

#[test]
fn an_object_cut_while_it_is_open_is_damage() {
    let (directory, store) = new_store();
    store.put("packs/ab/x", &[1; 10_000]).unwrap();
    let reader = store.open("packs/ab/x").unwrap();
    let path = directory.path().join("r/packs/ab/x");
    fs::OpenOptions::new().write(true).open(path).unwrap().set_len(5000).unwrap();
    let error = reader.read_at(&mut [0; 1000], 4500).unwrap_err();
    assert!(error.is_damage(), "{error}");
}

/// `/dev/full` for a whole file system: a small tmpfs needs rights to mount, a file size limit none.
#[test]
fn a_full_disk_says_what_was_written_and_that_nothing_is_lost() {
    let (directory, store) = new_store();
    store.put("points/kept", b"kept").unwrap();
    let root = directory.path().join("r");
    let output = Command::new("bash")
        .args([
            "-c",
            "ulimit -f 64; trap '' XFSZ; exec \"$0\" --exact write_a_large_pack --ignored",
        ])
        .arg(std::env::current_exe().unwrap())
        .env("VMTIDE_TEST_ROOT", &root)
        .output()
        .expect("bash is needed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(read_small(&store, "points/kept", 10).unwrap(), b"kept");
    assert_eq!(files_in(&root.join("tmp")), 0);
    assert!(!root.join("packs/ab/large").exists());
}

#[test]
#[ignore = "run by a_full_disk_says_what_was_written_and_that_nothing_is_lost"]
fn write_a_large_pack() {
    let root = std::env::var_os("VMTIDE_TEST_ROOT").unwrap();
    let store = LocalStore::open(root).unwrap();
    let mut writer = store.create("packs/ab/large").unwrap();
    let error = loop {
        if let Err(error) = writer.write(&[1; 100_000]) {
            break error;
        }
    };
    let text = error.to_string();
    assert!(matches!(error, RepoError::Io { .. }), "{text}");
    assert!(text.contains("write packs/ab/large in "), "{text}");
    assert!(text.contains("every finished restore point is untouched"), "{text}");
}

/// Runs the test `name` of this file as a user without rights, also where this one is root.
fn run_as_nobody(name: &str, root: &Path) {
    use std::os::unix::process::CommandExt;
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = directory.path().join("test");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let mut command = Command::new(&program);
    command.args(["--exact", name, "--ignored"]).env("VMTIDE_TEST_ROOT", root);
    if fs::read("/etc/shadow").is_ok() {
        command.uid(65534).gid(65534);
    }
    let output = command.current_dir("/").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
fn without_permission_it_is_said_to_be_denied() {
    let (directory, store) = new_store();
    let root = directory.path().join("r");
    store.put("points/secret", b"x").unwrap();
    let set = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    set(directory.path(), 0o755);
    set(&root, 0o000);
    run_as_nobody("all_is_denied", &root);
    // Everything readable, nothing writable: as on a read-only share.
    for path in ["", "points", "tmp"] {
        set(&root.join(path), 0o555);
    }
    for path in ["vmtide.repo", "points/secret"] {
        set(&root.join(path), 0o444);
    }
    run_as_nobody("reading_works_and_writing_is_denied", &root);
    for path in ["", "points", "tmp"] {
        set(&root.join(path), 0o755);
    }
}

#[test]
#[ignore = "run by without_permission_it_is_said_to_be_denied"]
fn all_is_denied() {
    let root = std::env::var_os("VMTIDE_TEST_ROOT").unwrap();
    for error in [
        LocalStore::open(&root).unwrap_err(),
        LocalStore::create(Path::new(&root).join("new")).unwrap_err(),
    ] {
        assert!(matches!(error, RepoError::Denied { .. }), "{error}");
        assert!(error.to_string().contains("permission denied"), "{error}");
    }
}

#[test]
#[ignore = "run by without_permission_it_is_said_to_be_denied"]
fn reading_works_and_writing_is_denied() {
    let root = std::env::var_os("VMTIDE_TEST_ROOT").unwrap();
    let store = LocalStore::open(root).unwrap();
    assert_eq!(read_small(&store, "points/secret", 10).unwrap(), b"x");
    for error in
        [store.put("points/new", b"x").unwrap_err(), store.remove("points/secret").unwrap_err()]
    {
        assert!(matches!(error, RepoError::Denied { .. }), "{error}");
    }
}
