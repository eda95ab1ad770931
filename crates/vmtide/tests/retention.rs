//! Forgetting by rules, holds, and a user who may add but not remove, through the command line.

use crate::common;

use common::{PASSWORD, Place, Run};
use serde_json::Value;

const MIB: usize = 1 << 20;

/// A repository with `count` restore points of `web`, tagged `n=0`, `n=1`, …; their ids.
fn with_points(count: usize) -> (Place, Vec<String>) {
    let place = Place::with_repository();
    place.image("web.raw", MIB);
    let ids = (0..count).map(|number| backup(&place, &format!("n={number}"))).collect();
    (place, ids)
}

fn backup(place: &Place, tag: &str) -> String {
    let run = place.run(&["backup", "web.raw", "--tag", tag, "--json"]).must_end_with(0);
    run.summary()["point"].as_str().unwrap_or_default().to_owned()
}

fn ids(place: &Place) -> Vec<String> {
    let points = place.run(&["points", "--json"]).must_end_with(0).summary();
    let points = points["points"].as_array().cloned().unwrap_or_default();
    points.iter().map(|point| point["id"].as_str().unwrap_or_default().to_owned()).collect()
}

fn reasons(run: &Run, id: &str) -> (bool, String) {
    let decisions = run.summary()["decisions"].as_array().cloned().unwrap_or_default();
    let found = decisions.iter().find(|decision| decision["point"] == id);
    let found = found.cloned().unwrap_or(Value::Null);
    (found["keep"] == true, found["reasons"].to_string())
}

#[test]
fn a_dry_run_explains_every_decision() {
    let (place, ids) = with_points(3);
    let run = place.run(&[
        "forget",
        "--keep-last",
        "1",
        "--keep-tag",
        "n=0",
        "--keep-yearly",
        "5",
        "--time-zone",
        "UTC",
        "--dry-run",
        "--json",
    ]);
    let run = run.must_end_with(0);
    let (keep, why) = reasons(&run, &ids[2]);
    assert!(keep && why.contains("last 1") && why.contains("yearly 20"), "{why}");
    assert!(reasons(&run, &ids[0]).0);
    let (keep, why) = reasons(&run, &ids[1]);
    assert!(!keep && why.contains("last: 1 are newer") && why.contains("is newer"), "{why}");
    assert!(why.contains("tag: not n=0"), "{why}");
    let text = place.run(&["forget", "--keep-last", "1", "--dry-run"]).must_end_with(0).stdout;
    assert!(text.contains("forget  ") && text.contains("last: 1 are newer"), "{text}");
    assert_eq!(self::ids(&place).len(), 3);
}

#[test]
fn rules_come_from_the_settings_file_and_points_can_be_named_beside_them() {
    let (place, ids) = with_points(4);
    let file = place.text("vmtide.toml");
    let settings = "[forget]\nkeep-last = 1\nkeep-within-daily = \"30d\"\nkeep-tag = [\"n=1\"]\n\
                    policy = [\"vm=db-*,keep-last=9\", \"tag=n=0,keep-last=unlimited\"]\n";
    std::fs::write(&file, settings).unwrap();
    let run = place.run(&["forget", "--config", &file, "--dry-run", "--json"]).must_end_with(0);
    let kept: Vec<_> = ids.iter().filter(|id| reasons(&run, id).0).collect();
    assert_eq!(kept, [&ids[0], &ids[1], &ids[3]]);
    assert!(reasons(&run, &ids[0]).1.contains("last: all"));
    // Rules of the file do not speak for a point that is named.
    place.run(&["forget", &ids[1], "--config", &file]).must_end_with(0);
    assert_eq!(self::ids(&place), [ids[0].clone(), ids[2].clone(), ids[3].clone()]);
    place.run(&["forget", &ids[0], "--keep-last", "1"]).must_end_with(2);
    for wrong in ["keep-last = \"some\"", "policy = [\"vm=x\"]", "time-zone = \"Middle/Earth\""] {
        std::fs::write(&file, format!("[forget]\n{wrong}\n")).unwrap();
        place.run(&["forget", "--keep-daily", "1", "--config", &file]).must_end_with(2);
    }
}

#[test]
fn nobody_loses_all_points_by_accident() {
    let (place, ids) = with_points(2);
    place.run(&["forget"]).must_end_with(2);
    place.run(&["forget", "--keep-last", "0"]).must_end_with(2);
    place.run(&["forget", "--allow-forget-all"]).must_end_with(2);
    place.run(&["forget", "--vm", "db*", "--keep-last", "1"]).must_end_with(6);
    place.run(&["forget", "--keep-tag", "no=such"]).must_end_with(0);
    assert_eq!(self::ids(&place), [ids[1].clone()], "the newest stays");
    place.run(&["forget", "--vm", "we*", "--tag", "n=7", "--allow-forget-all"]).must_end_with(0);
    assert_eq!(self::ids(&place).len(), 1);
    place.run(&["forget", "--vm", "we*", "--allow-forget-all"]).must_end_with(0);
    assert_eq!(self::ids(&place).len(), 0);
}

#[test]
fn held_points_stay_and_the_commands_say_why() {
    let (place, ids) = with_points(3);
    let run = place.run(&[
        "hold",
        &ids[0][..8],
        "--reason",
        "before the move",
        "--until",
        "2d",
        "--json",
    ]);
    let hold = run.must_end_with(0).summary();
    assert_eq!(
        (&hold["point"], &hold["reason"]),
        (&ids[0].clone().into(), &"before the move".into())
    );
    let run = place.run(&["forget", "--keep-last", "1", "--json"]).must_end_with(0);
    let (keep, why) = reasons(&run, &ids[0]);
    assert!(keep && why.contains("before the move") && why.contains("until"), "{why}");
    assert_eq!(self::ids(&place), [ids[0].clone(), ids[2].clone()]);
    let run = place.run(&["forget", &ids[0], &ids[2]]).must_end_with(3);
    assert!(run.stderr.contains("before the move"), "{}", run.stderr);
    assert_eq!(self::ids(&place), [ids[0].clone()]);
    let points = place.run(&["points", "--json"]).must_end_with(0).summary();
    assert_eq!(points["points"][0]["holds"][0]["reason"], "before the move");
    assert!(place.run(&["points"]).must_end_with(0).stdout.contains("until 2"));
    assert!(place.run(&["hold", "--list"]).must_end_with(0).stdout.contains("before the move"));
    place.run(&["prune"]).must_end_with(0);
    place.run(&["verify", "--read-data"]).must_end_with(0);
    place.run(&["hold", "--release", "zz"]).must_end_with(6);
    let id = hold["id"].as_str().unwrap_or_default();
    place.run(&["hold", "--remove", &id[..6]]).must_end_with(0);
    place.run(&["forget", &ids[0]]).must_end_with(0);
    assert_eq!(self::ids(&place).len(), 0);
    for wrong in [
        &["hold"][..],
        &["hold", "web", "--list"],
        &["hold", "--list", "--reason", "x"],
        &["hold", "web", "--until", "soon"],
    ] {
        place.run(wrong).must_end_with(2);
    }
    place.run(&["hold", "web"]).must_end_with(6);
}

/// The entries of the repository's directories belong to root and the directories are sticky: another
/// user adds objects there and cannot remove those of root.
#[cfg(unix)]
#[test]
fn a_user_who_may_only_add_backs_up_and_restores_and_cannot_forget() {
    use std::os::unix::fs::PermissionsExt;
    if !rustix::process::geteuid().is_root() {
        println!("left out: only root can make a directory in which another user may only add");
        return;
    }
    let (place, points) = with_points(2);
    let mode = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    };
    let binary = place.path("vmtide");
    std::fs::copy(assert_cmd::cargo::cargo_bin!("vmtide"), &binary).unwrap();
    place.run(&["key", "add", "--new-password-command", "echo two"]).must_end_with(0);
    mode(place.directory.path(), 0o1777);
    mode(&binary, 0o755);
    let mut waiting = vec![place.repository()];
    while let Some(directory) = waiting.pop() {
        mode(&directory, 0o1777);
        for entry in std::fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                waiting.push(path);
            } else {
                mode(&path, 0o644);
            }
        }
    }
    let key = place.run(&["key", "list", "--json"]).must_end_with(0).summary();
    // That which is in use would be refused, whoever asks.
    let key = key["keys"].as_array().unwrap().iter().find(|key| key["used"] == false).unwrap();
    let key = key["id"].as_str().unwrap().to_owned();
    let as_nobody = |arguments: &[&str], code: i32| {
        let output = std::process::Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
            .arg(&binary)
            .args(arguments)
            .current_dir(place.directory.path())
            .env("VMTIDE_PASSWORD", PASSWORD)
            .env("VMTIDE_REPOSITORY", place.repository())
            .env("XDG_STATE_HOME", place.path("state-of-nobody"))
            .env("XDG_CONFIG_HOME", place.path("config-of-nobody"))
            .output()
            .expect("setpriv is needed: install util-linux (scripts/test.sh does)");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        stderr
    };
    std::fs::set_permissions(place.path("web.raw"), PermissionsExt::from_mode(0o644)).unwrap();
    as_nobody(&["backup", "web.raw"], 0);
    as_nobody(&["points"], 0);
    as_nobody(&["verify", "--read-data"], 0);
    as_nobody(&["restore", &points[0], "--to", "back.raw"], 0);
    assert!(
        std::fs::read(place.path("back.raw")).unwrap()
            == std::fs::read(place.path("web.raw")).unwrap()
    );
    as_nobody(&["hold", &points[0], "--reason", "mine"], 0);
    for arguments in [&["forget", &points[1]][..], &["forget", "--keep-last", "1"]] {
        let stderr = as_nobody(arguments, 4);
        let errors: Vec<_> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "{stderr}");
        assert!(errors[0].contains("may not remove"), "{stderr}");
    }
    as_nobody(&["key", "remove", &key], 4);
    assert_eq!(ids(&place).len(), 3);
    place.run(&["verify", "--read-data"]).must_end_with(0);
}

#[test]
fn a_point_is_forgotten_by_name_where_the_time_zone_cannot_be_told() {
    let (place, points) = with_points(2);
    let lost =
        |arguments: &[&str]| common::finish(place.command(arguments).env("TZ", "Middle/Earth"));
    let run = lost(&["forget", "--keep-daily", "1"]).must_end_with(2);
    assert!(run.stderr.contains("--time-zone"), "{}", run.stderr);
    lost(&["forget", "--keep-daily", "1", "--time-zone", "UTC", "--dry-run"]).must_end_with(0);
    lost(&["forget", &points[0]]).must_end_with(0);
    assert_eq!(ids(&place).len(), 1);
}
