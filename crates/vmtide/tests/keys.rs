//! Passwords and recovery keys through the command line.

use crate::common;

use common::{Place, Run, files_below, finish};

/// Runs with another password than the place's.
fn with_password(place: &Place, password: &str, arguments: &[&str]) -> Run {
    finish(place.command(arguments).env("VMTIDE_PASSWORD", password))
}

#[test]
fn a_password_is_changed_and_keeps_its_name() {
    let place = Place::with_repository();
    std::fs::write(place.path("second"), "a second one\n").unwrap_or_default();
    let change = ["key", "rotate", "--new-password-file", "second", "--json"];
    let changed = place.run(&change).must_end_with(0).summary();
    assert_eq!(changed["label"], "first");
    place.run(&["points"]).must_end_with(4);
    let list = with_password(&place, "a second one", &["key", "list", "--json"]);
    let keys = list.must_end_with(0).summary()["keys"].clone();
    assert_eq!(keys.as_array().map(Vec::len), Some(1));
    assert_eq!((&keys[0]["id"], &keys[0]["used"]), (&changed["id"], &true.into()));
    assert_ne!(changed["id"], changed["removed"]);
    // Another than the one in use, by its id.
    let add = ["key", "add", "--new-password-command", "echo three", "--label", "other", "--json"];
    let other = with_password(&place, "a second one", &add).must_end_with(0).summary();
    let id = other["id"].as_str().unwrap_or_default().to_owned();
    let change = ["key", "rotate", &id[..8], "--new-password-command", "echo four", "--label", "x"];
    with_password(&place, "a second one", &change).must_end_with(0);
    with_password(&place, "three", &["points"]).must_end_with(4);
    with_password(&place, "four", &["points"]).must_end_with(0);
    with_password(&place, "four", &["key", "rotate", "ffff"]).must_end_with(6);
}

#[test]
fn a_recovery_key_is_shown_once_and_opens() {
    let place = Place::with_repository();
    let run = place.run(&["key", "add", "--recovery"]).must_end_with(0);
    let is_key = |line: &&str| line.trim().len() == 47 && line.trim().matches('-').count() == 7;
    let key = run.stdout.lines().find(is_key).map(str::trim).unwrap_or_default().to_owned();
    assert_eq!(key.len(), 47, "{}", run.stdout);
    with_password(&place, &key, &["points"]).must_end_with(0);
    with_password(&place, &key.to_lowercase().replace('-', ""), &["points"]).must_end_with(0);
    let wrong = key.replacen(&key[..1], if key.starts_with('0') { "2" } else { "0" }, 1);
    let run = with_password(&place, &wrong, &["points"]).must_end_with(4);
    assert!(run.stderr.contains("mistyped in group"), "{}", run.stderr);
    assert!(!run.stderr.contains(&wrong[6..]), "{}", run.stderr);
    let list = place.run(&["key", "list"]).must_end_with(0).stdout;
    assert!(list.contains("recovery key") && !list.contains(&key), "{list}");
    for file in files_below(&place.repository()) {
        let bytes = std::fs::read(&file).unwrap_or_default();
        assert!(!bytes.windows(11).any(|part| part == &key.as_bytes()[..11]), "{}", file.display());
    }
}

#[test]
fn a_recovery_key_goes_to_a_file_of_its_own_and_never_into_json() {
    let place = Place::with_repository();
    place.run(&["key", "add", "--recovery", "--json"]).must_end_with(2);
    let arguments = ["key", "add", "--recovery", "--recovery-file", "paper", "--json"];
    let run = place.run(&arguments).must_end_with(0);
    let key = std::fs::read_to_string(place.path("paper")).unwrap_or_default();
    assert!(!run.stdout.contains(key.trim()) && key.len() == 48, "{key}");
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let mode = std::fs::metadata(place.path("paper")).map(|file| file.mode() & 0o777);
        assert_eq!(mode.ok(), Some(0o600));
    }
    place.run(&arguments).must_end_with(1);
    let mut command = place.command(&["points", "--password-file", "paper"]);
    finish(command.env_remove("VMTIDE_PASSWORD")).must_end_with(0);
    let list = place.run(&["key", "list", "--json"]).must_end_with(0).summary();
    assert_eq!(list["keys"].as_array().map(Vec::len), Some(2), "the failed ones added nothing");
    place.run(&["key", "add", "--recovery", "--new-password-file", "paper"]).must_end_with(2);
    place.run(&["init", "open", "--encryption", "none"]).must_end_with(0);
    place.run(&["key", "add", "-r", "open", "--recovery"]).must_end_with(1);
    place.run(&["key", "rotate", "-r", "open"]).must_end_with(1);
}

#[cfg(unix)]
#[test]
fn a_recovery_key_that_nobody_saw_changes_nothing() {
    let place = Place::with_repository();
    for arguments in [["key", "rotate", "--recovery"], ["key", "add", "--recovery"]] {
        // A shell in between, because only it can be told where the output is to go.
        let mut command = assert_cmd::Command::new("sh");
        command
            .args(["-c", "exec \"$0\" \"$@\" > /dev/full"])
            .arg(assert_cmd::cargo::cargo_bin!("vmtide"))
            .args(arguments)
            .current_dir(place.path("."))
            .env("VMTIDE_STATE_DIR", place.path("state"))
            .env("VMTIDE_PASSWORD", common::PASSWORD)
            .env("VMTIDE_REPOSITORY", place.repository());
        let run = finish(&mut command).must_end_with(1);
        assert!(run.stderr.contains("show the recovery key"), "{}", run.stderr);
    }
    let list = place.run(&["key", "list", "--json"]).must_end_with(0).summary();
    assert_eq!(list["keys"].as_array().map(Vec::len), Some(1));
}

#[test]
fn junk_among_the_keys_is_shown_and_keeps_nobody_from_changing_them() {
    let place = Place::with_repository();
    let id = "0123456789abcdef0123456789abcdef";
    let junk = place.repository().join("keys").join(id);
    std::fs::write(&junk, "junk").unwrap_or_default();
    let run = place.run(&["key", "list"]).must_end_with(3);
    assert!(run.stderr.contains("key remove 01234567"), "{}", run.stderr);
    let listed = place.run(&["key", "list", "--json"]).must_end_with(3).summary();
    assert_eq!(listed["unreadable"][0]["id"], id);
    place.run(&["key", "rotate", "--new-password-command", "echo two"]).must_end_with(0);
    with_password(&place, "two", &["key", "remove", "0123"]).must_end_with(0);
    assert!(!junk.exists());
    let list = with_password(&place, "two", &["key", "list", "--json"]).must_end_with(0).summary();
    let only = list["keys"][0]["id"].as_str().unwrap_or_default().to_owned();
    let run = with_password(&place, "two", &["key", "remove", &only]).must_end_with(1);
    assert!(run.stderr.contains("is the last"), "{}", run.stderr);
}
