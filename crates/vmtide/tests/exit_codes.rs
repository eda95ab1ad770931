//! The table of bad input: the exit code, one clear line, and nothing lost.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "helpers of tests: a failed unwrap is a failed test"
)]

use crate::common;

use common::{PASSWORD, Place, Run, files_below, finish};
use std::os::unix::fs::PermissionsExt;

const MIB: usize = 1 << 20;

/// A repository with one restore point of `web`.
fn with_a_point() -> Place {
    let place = Place::with_repository();
    place.image("web.raw", 2 * MIB);
    place.run(&["backup", "web.raw"]).must_end_with(0);
    place
}

/// One line that begins with `error:` and holds `word`.
fn one_clear_line(run: &Run, word: &str) {
    let errors: Vec<_> = run.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{}", run.stderr);
    assert!(errors[0].contains(word), "{word}: {}", run.stderr);
}

#[test]
fn what_does_not_exist_is_6() {
    let place = with_a_point();
    for (arguments, word) in [
        (&["points", "-r", "nowhere"][..], "nowhere"),
        (&["backup", "nowhere.raw"], "nowhere.raw"),
        (&["show", "db@latest"], "db"),
        (&["show", "ffffffff"], "ffffffff"),
        (&["points", "--vm", "db"], "db"),
        (&["restore", "web", "--to", "x.raw", "--disk", "d9"], "d9"),
        (&["points", "--config", "nowhere.toml"], "nowhere.toml"),
        (&["points", "--password-file", "nowhere.txt"], "nowhere.txt"),
    ] {
        one_clear_line(&place.run(arguments).must_end_with(6), word);
    }
}

#[test]
fn wrong_usage_is_2() {
    let place = with_a_point();
    for arguments in [
        &["frobnicate"][..],
        &["points", "--frobnicate"],
        &["backup"],
        &["backup", "vsphere://host/vm"],
        &["backup", "http://host/vm"],
        &["backup", "web.raw", "--level", "half"],
        &["backup", "web.raw", "--allow-downgrade"],
        &["backup", "web.raw", "--limit-rate", "fast"],
        &["backup", "web.raw", "--compression", "99"],
        &["points", "-r", "ftp://bucket/prefix"],
        &["restore", "web", "--to", "s3://bucket/x"],
        &["verify", "--read-data=101"],
        &["init", "x", "--encryption", "rot13"],
    ] {
        let run = place.run(arguments).must_end_with(2);
        assert!(run.stderr.starts_with("error: "), "{arguments:?}: {}", run.stderr);
    }
    let run = place.run(&["points", "--frobnicate", "--json"]).must_end_with(2);
    let event = &run.events()[0];
    assert_eq!((&event["type"], &event["exit_code"]), (&"error".into(), &2.into()));
}

#[test]
fn a_wrong_password_is_4_and_none_is_2() {
    let place = with_a_point();
    let with = |password: Option<&str>| {
        let mut command = place.command(&["points", "--json"]);
        match password {
            Some(password) => command.env("VMTIDE_PASSWORD", password),
            None => command.env_remove("VMTIDE_PASSWORD"),
        };
        finish(&mut command)
    };
    let run = with(Some("wrong")).must_end_with(4);
    one_clear_line(&run, "wrong password");
    let events = run.events();
    let last = events.last().unwrap();
    assert_eq!((&last["type"], &last["exit_code"]), (&"error".into(), &4.into()));
    one_clear_line(&with(None).must_end_with(2), "VMTIDE_PASSWORD");
    one_clear_line(&with(Some("")).must_end_with(2), "empty");
    with(Some(PASSWORD)).must_end_with(0);
}

#[test]
fn what_is_no_repository_is_refused() {
    let place = Place::new();
    std::fs::write(place.path("file"), "x").unwrap();
    let run = place.run(&["points", "-r", "file"]);
    assert!([1, 6].contains(&run.code), "{}: {}", run.code, run.stderr);
    one_clear_line(&run, "file");
    std::fs::create_dir(place.path("empty")).unwrap();
    one_clear_line(&place.run(&["points", "-r", "empty"]).must_end_with(6), "empty");
    let run = place.run(&["init", "file"]);
    assert_eq!(run.code, 1, "{}", run.stderr);
    assert_eq!(std::fs::read(place.path("file")).unwrap(), b"x");
}

#[test]
fn a_repository_is_not_made_twice() {
    let place = with_a_point();
    let run = place.run(&["init", place.repository().to_str().unwrap()]);
    assert_eq!(run.code, 1, "{}", run.stderr);
    place.run(&["verify", "--read-data"]).must_end_with(0);
}

#[test]
fn no_permission_is_4() {
    if rustix::process::geteuid().is_root() {
        // Root may everything, so what is tried is what even root may not: reading a directory of
        // the proc file system that belongs to nobody is no test. The mapping itself is proven in
        // src/exit.rs; here the whole way is, as another user.
        return as_nobody();
    }
    let place = with_a_point();
    let path = place.repository().join("vmtide.repo");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o000)).unwrap();
    one_clear_line(&place.run(&["points"]).must_end_with(4), "ermission denied");
}

/// Runs the program as the user `nobody` on a repository that only root may read.
fn as_nobody() {
    let place = with_a_point();
    let binary = place.path("vmtide");
    std::fs::copy(assert_cmd::cargo::cargo_bin!("vmtide"), &binary).unwrap();
    let mode = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    };
    mode(place.directory.path(), 0o755);
    mode(&binary, 0o755);
    mode(&place.repository(), 0o755);
    mode(&place.repository().join("vmtide.repo"), 0o600);
    let output = std::process::Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
        .arg(&binary)
        .arg("points")
        .arg("-r")
        .arg(place.repository())
        .env("VMTIDE_PASSWORD", PASSWORD)
        .output()
        .expect("setpriv is needed: install util-linux (scripts/test.sh does)");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(4), "{stderr}");
    assert!(stderr.contains("ermission denied"), "{stderr}");
}

#[test]
fn damage_is_5_wherever_it_is_and_other_points_stay() {
    let place = with_a_point();
    let objects: Vec<_> = files_below(&place.repository())
        .into_iter()
        .filter(|path| !path.to_string_lossy().contains("lock"))
        .collect();
    assert!(objects.len() >= 4, "{objects:?}");
    let mut kinds = std::collections::BTreeSet::new();
    for object in objects {
        let original = std::fs::read(&object).unwrap();
        if original.is_empty() {
            continue;
        }
        let relative = object.strip_prefix(place.repository()).unwrap();
        kinds.insert(relative.components().next().unwrap().as_os_str().to_owned());
        let permissions = std::fs::metadata(&object).unwrap().permissions();
        std::fs::set_permissions(&object, PermissionsExt::from_mode(0o644)).unwrap();
        let mut flipped = original.clone();
        let middle = flipped.len() / 2;
        flipped[middle] ^= 0x10;
        std::fs::write(&object, &flipped).unwrap();
        if relative.starts_with("index") {
            // It only finds duplicates: no restore point needs it, and so none may fail for it.
            let restored = ["restore", "web", "--to", "back.raw", "--force"];
            place.run(&restored).must_end_with(0);
        }
        let run = place.run(&["verify", "--read-data", "--json"]);
        // A flipped bit in a key slot looks like another password.
        assert!([4, 5].contains(&run.code), "{object:?}: {} {}", run.code, run.stderr);
        std::fs::write(&object, &original[..original.len() - 1]).unwrap();
        let run = place.run(&["verify", "--read-data"]);
        assert!([4, 5].contains(&run.code), "cut {object:?}: {} {}", run.code, run.stderr);
        assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
        std::fs::write(&object, &original).unwrap();
        std::fs::set_permissions(&object, permissions).unwrap();
    }
    assert!(kinds.len() >= 4, "{kinds:?}");
    place.run(&["verify", "--read-data"]).must_end_with(0);
}

#[test]
fn a_damaged_pack_fails_the_restore_and_leaves_no_file() {
    let place = with_a_point();
    let pack = files_below(&place.repository().join("packs")).remove(0);
    let original = std::fs::read(&pack).unwrap();
    std::fs::set_permissions(&pack, PermissionsExt::from_mode(0o644)).unwrap();
    let mut flipped = original.clone();
    flipped[original.len() / 3] ^= 1;
    std::fs::write(&pack, flipped).unwrap();
    place.run(&["restore", "web", "--to", "back.raw"]).must_end_with(5);
    assert!(!place.path("back.raw").exists());
    let left = std::fs::read_dir(place.directory.path()).unwrap();
    let partial = left
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().contains("partial"));
    assert_eq!(partial.count(), 0);
    std::fs::write(&pack, original).unwrap();
    place.run(&["restore", "web", "--to", "back.raw"]).must_end_with(0);
}

#[test]
fn an_interrupted_backup_is_130_and_leaves_no_point() {
    let place = Place::with_repository();
    place.image("web.raw", 8 * MIB);
    let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin!("vmtide"));
    let mut child = command
        .args(["backup", "web.raw", "--limit-rate", "512KiB", "--json"])
        .current_dir(place.directory.path())
        .env("VMTIDE_PASSWORD", PASSWORD)
        .env("VMTIDE_REPOSITORY", place.repository())
        .env("XDG_STATE_HOME", place.path("state"))
        .env("XDG_CONFIG_HOME", place.path("config"))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // The first progress event says that the job is under way and signals are handled.
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        assert_ne!(std::io::BufRead::read_line(&mut out, &mut line).unwrap(), 0, "{lines:?}");
        lines.push(line.clone());
        if line.contains("\"progress\"") {
            break;
        }
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut out, &mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest}");
    let last: serde_json::Value = serde_json::from_str(rest.lines().last().unwrap()).unwrap();
    assert_eq!((&last["type"], &last["exit_code"]), (&"error".into(), &130.into()));
    let points = place.run(&["points", "--json"]).must_end_with(0).summary();
    assert_eq!(points["points"].as_array().unwrap().len(), 0);
    // And it blocks nothing.
    place.run(&["backup", "web.raw"]).must_end_with(0);
}

/// A small file system that only the processes of this test see, full in the middle of a backup.
#[test]
fn a_full_disk_is_1_and_nothing_is_lost() {
    let place = Place::new();
    place.image("small.raw", MIB);
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(16 * MIB)
    .collect();
    std::fs::write(place.path("large.raw"), noise).unwrap();
    std::fs::create_dir(place.repository()).unwrap();
    let script = "set -e
        mount -t tmpfs -o size=4m tmpfs \"$VMTIDE_REPOSITORY\"
        $VMTIDE init \"$VMTIDE_REPOSITORY\"
        $VMTIDE backup small.raw
        code=0; $VMTIDE backup large.raw || code=$?
        echo \"code $code\"
        $VMTIDE prune
        $VMTIDE points --vm small
        $VMTIDE verify --read-data";
    let output = std::process::Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", script])
        .current_dir(place.directory.path())
        .env("VMTIDE", assert_cmd::cargo::cargo_bin!("vmtide"))
        .env("VMTIDE_PASSWORD", PASSWORD)
        .env("VMTIDE_REPOSITORY", place.repository())
        .env("XDG_STATE_HOME", place.path("state"))
        .env("XDG_CONFIG_HOME", place.path("config"))
        .output()
        .expect("unshare is needed: install util-linux (scripts/test.sh does)");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{stdout}\n{stderr}");
    assert!(stdout.contains("code 1\n"), "{stdout}\n{stderr}");
    assert!(stderr.contains("No space left"), "{stderr}");
    assert!(stdout.contains("no damage: 1 restore points"), "{stdout}");
}

#[test]
fn warnings_are_3() {
    let place = Place::with_repository();
    place.image("web.raw", MIB);
    let arguments = ["backup", "web.raw", "--consistency", "fs"];
    place.run(&arguments).must_end_with(1);
    let run =
        place.run(&[&arguments[..], &["--allow-downgrade", "--json"]].concat()).must_end_with(3);
    let warnings = run.summary()["warnings"].clone();
    assert!(
        warnings[0].as_str().unwrap().contains("crash consistency instead of fs"),
        "{warnings}"
    );
    assert!(run.events().iter().any(|event| event["type"] == "warning"));
}

#[test]
fn a_peer_that_talks_nonsense_is_1() {
    use std::io::Write;
    let place = Place::with_repository();
    let socket = place.path("nonsense.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            // The peer may have hung up already; then it has what it came for.
            let _ =
                stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n\r\n\r\n");
        }
    });
    let nbd = format!("nbd+unix:///disk?socket={}", socket.display());
    let run = place.run(&["backup", &nbd]).must_end_with(1);
    one_clear_line(&run, "nonsense.sock");
    let qemu = format!("qemu+unix://{}", socket.display());
    let run = place.run(&["backup", &qemu]).must_end_with(1);
    one_clear_line(&run, "nonsense.sock");
    place.image("web.raw", MIB);
    place.run(&["backup", "web.raw"]).must_end_with(0);
    let run = place.run(&["restore", "web", "--to", &nbd]).must_end_with(1);
    one_clear_line(&run, "nonsense.sock");
}

#[test]
fn missing_tools_of_qemu_are_1_with_what_to_install() {
    let place = with_a_point();
    place.run(&["restore", "web", "--to", "web.qcow2"]).must_end_with(0);
    let mut command = place.command(&["backup", "web.qcow2", "--track"]);
    let run = finish(command.env("PATH", place.directory.path())).must_end_with(1);
    one_clear_line(&run, "install qemu-utils");
    // Nobody needs them who does not ask for tracking.
    let mut command = place.command(&["backup", "web.qcow2"]);
    finish(command.env("PATH", place.directory.path())).must_end_with(0);
}

#[test]
fn an_unreadable_point_is_not_passed_over() {
    let place = with_a_point();
    place.run(&["backup", "web.raw"]).must_end_with(0);
    let points = place.run(&["points", "--json"]).must_end_with(0).summary();
    let id = |number: usize| points["points"][number]["id"].as_str().unwrap().to_owned();
    let newest = files_below(&place.repository().join("points"))
        .into_iter()
        .find(|path| path.to_string_lossy().contains(&id(1)))
        .unwrap();
    let mut bytes = std::fs::read(&newest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::remove_file(&newest).unwrap();
    std::fs::write(&newest, bytes).unwrap();
    let run = place.run(&["restore", "web@latest", "--to", "back.raw"]).must_end_with(5);
    one_clear_line(&run, "by its id");
    assert!(!place.path("back.raw").exists());
    place.run(&["forget", "web"]).must_end_with(5);
    place.run(&["restore", &id(0), "--to", "back.raw"]).must_end_with(0);
    let run = place.run(&["backup", "web.raw"]).must_end_with(3);
    assert!(run.stderr.contains("vmtide verify"), "{}", run.stderr);
}

#[test]
fn secrets_are_never_shown() {
    let place = with_a_point();
    for arguments in [
        &["points", "-vvv", "--json"][..],
        &["key", "list", "-vvv"],
        &["backup", "web.raw", "-vvv", "--log-format", "json"],
        &["--help"],
        &["backup", "--help"],
    ] {
        let run = place.run(arguments).must_end_with(0);
        assert!(!run.stdout.contains(PASSWORD), "{arguments:?}");
        assert!(!run.stderr.contains(PASSWORD), "{arguments:?}");
    }
    for file in files_below(place.directory.path()) {
        let bytes = std::fs::read(&file).unwrap();
        let found = bytes.windows(PASSWORD.len()).any(|window| window == PASSWORD.as_bytes());
        assert!(!found, "{}", file.display());
    }
}
