//! The commands on a disk image, from init to restore, and the JSON that programs rely on.

use crate::common;

use common::{Place, finish};
use serde_json::Value;

const MIB: usize = 1 << 20;

fn keys(value: &Value) -> Vec<&str> {
    let members = value.as_object().into_iter().flatten();
    let mut keys: Vec<_> = members.map(|(key, _)| key.as_str()).collect();
    keys.sort_unstable();
    keys
}

#[test]
fn the_summary_of_a_backup_is_as_documented() {
    let place = Place::with_repository();
    let image = place.image("web.raw", 4 * MIB);
    let run = place.run(&["backup", image.to_str().unwrap(), "--json", "--tag", "job=nightly"]);
    let summary = run.must_end_with(0).summary();
    assert_eq!(
        keys(&summary),
        ["consistency", "disks", "duration_ms", "level", "point", "type", "vm", "warnings"]
    );
    assert_eq!((&summary["vm"], &summary["level"]), (&"web".into(), &"full".into()));
    assert_eq!(summary["consistency"], "crash");
    assert_eq!(summary["point"].as_str().unwrap().len(), 32);
    assert!(summary["duration_ms"].is_u64());
    assert_eq!(summary["warnings"], Value::Array(Vec::new()));
    let disk = &summary["disks"][0];
    assert_eq!(
        keys(disk),
        [
            "changed_bytes",
            "id",
            "new_bytes",
            "read_bytes",
            "size_bytes",
            "stored_bytes",
            "tracking"
        ]
    );
    assert_eq!(keys(&disk["tracking"]), ["id", "reason", "used"]);
    assert_eq!(disk["size_bytes"], 4 * MIB as u64);
    assert_eq!(disk["tracking"]["used"], false);
    assert_eq!(disk["tracking"]["id"], Value::Null);

    let points = place.run(&["points", "--json"]).must_end_with(0).summary();
    assert_eq!(points["points"][0]["id"], summary["point"]);
    assert_eq!(points["points"][0]["tags"]["job"], "nightly");
    let shown = place.run(&["show", "web@latest", "--json"]).must_end_with(0).summary();
    assert_eq!(shown["config"]["disks"][0]["size_bytes"], 4 * MIB as u64);
}

#[test]
fn a_disk_goes_in_and_comes_back_byte_for_byte() {
    let place = Place::with_repository();
    let image = place.image("web.raw", 4 * MIB);
    place.run(&["backup", image.to_str().unwrap()]).must_end_with(0);
    let mut changed = std::fs::read(&image).unwrap();
    changed[100..200].fill(7);
    changed[3 * MIB..3 * MIB + 10].fill(8);
    std::fs::write(&image, &changed).unwrap();
    std::fs::write(
        place.path("changes.json"),
        format!("[{{\"offset\":100,\"length\":100}},{{\"offset\":{},\"length\":10}}]", 3 * MIB),
    )
    .unwrap();
    let run = place.run(&["backup", "web.raw", "--changes", "changes.json", "--json"]);
    let disk = run.must_end_with(0).summary()["disks"][0].clone();
    assert_eq!(disk["tracking"]["used"], true);
    let read = disk["read_bytes"].as_u64().unwrap();
    assert!((110..=2 * 65536).contains(&read), "{disk}");

    place.run(&["restore", "web@latest", "--to", "back.raw"]).must_end_with(0);
    assert_eq!(std::fs::read(place.path("back.raw")).unwrap(), changed);
    let run = place.run(&["restore", "web", "--to", "back.qcow2", "--json"]).must_end_with(0);
    assert_eq!(run.summary()["disks"][0]["format"], "qcow2");
    let compared = std::process::Command::new("qemu-img")
        .args(["compare", "-f", "raw", "-F", "qcow2", "web.raw", "back.qcow2"])
        .current_dir(place.directory.path())
        .output()
        .expect("qemu-img is needed: install qemu-utils (scripts/test.sh does)");
    assert!(compared.status.success(), "{compared:?}");

    // The qcow2 file is a source of its own.
    place.run(&["backup", "back.qcow2", "--name", "again"]).must_end_with(0);
    let points = place.run(&["points", "--vm", "web", "--json"]).must_end_with(0).summary();
    let id = |number: usize| points["points"][number]["id"].as_str().unwrap().to_owned();
    let diff = place.run(&["diff", &id(0), &id(1), "--json"]).must_end_with(0).summary();
    let disk = &diff["disks"][0];
    assert_eq!(disk["change"], "changed");
    assert_eq!(disk["ranges"][0]["offset"], 0, "{disk}");
    assert!(disk["changed_bytes"].as_u64().unwrap() < MIB as u64, "{disk}");
    let same = place.run(&["diff", &id(1), &id(1), "--json"]).must_end_with(0).summary();
    assert_eq!(same["disks"][0]["change"], "same");
    let stats = place.run(&["stats", "--json"]).must_end_with(0).summary();
    assert_eq!(stats["points"], 3);
}

#[test]
fn changes_can_come_from_standard_input_and_must_fit_the_disk() {
    let place = Place::with_repository();
    place.image("web.raw", MIB);
    place.run(&["backup", "web.raw"]).must_end_with(0);
    let mut command = place.command(&["backup", "web.raw", "--changes", "-", "--json"]);
    let run = finish(command.write_stdin("[]")).must_end_with(0);
    assert_eq!(run.summary()["disks"][0]["read_bytes"], 0);
    let mut command = place.command(&["backup", "web.raw", "--changes", "-"]);
    let run = finish(command.write_stdin("[{\"offset\":1048576,\"length\":1}]")).must_end_with(2);
    assert!(run.stderr.contains("past the end"), "{}", run.stderr);

    // Of another disk under the same name they say nothing.
    std::fs::create_dir(place.path("other")).unwrap();
    place.image("other/web.raw", MIB);
    let mut command = place.command(&["backup", "other/web.raw", "--changes", "-", "--json"]);
    let run = finish(command.write_stdin("[]")).must_end_with(3);
    assert_eq!(run.summary()["disks"][0]["tracking"]["used"], false);
}

#[test]
fn an_image_whose_only_disk_is_left_out_is_not_backed_up() {
    let place = Place::with_repository();
    place.image("web.raw", MIB);
    let run = place.run(&["backup", "web.raw", "--disk-exclude", "disk0"]).must_end_with(1);
    assert!(run.stderr.contains("no disk to back up"), "{}", run.stderr);
}

#[test]
fn a_guest_does_not_choose_which_files_are_read() {
    let place = Place::with_repository();
    std::fs::write(place.path("secret"), vec![7; MIB]).unwrap();
    let made = std::process::Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-b", "secret", "-F", "raw", "web"])
        .current_dir(place.directory.path())
        .status();
    assert!(made.is_ok_and(|status| status.success()), "qemu-img is needed");
    let run = place.run(&["backup", "web"]).must_end_with(1);
    assert!(run.stderr.contains("--backing"), "{}", run.stderr);
    place.run(&["backup", "web", "--backing", "same-directory"]).must_end_with(0);
    place.run(&["backup", "web", "--format", "qcow2"]).must_end_with(0);
    std::fs::rename(place.path("web"), place.path("web.raw")).unwrap();
    let run = place.run(&["backup", "web.raw"]).must_end_with(1);
    assert!(run.stderr.contains("--format raw"), "{}", run.stderr);
    let run = place.run(&["restore", "web", "--to", "web.raw", "--in-place"]).must_end_with(1);
    assert!(run.stderr.contains("--format"), "{}", run.stderr);
    let arguments = ["restore", "web", "--to", "web.raw", "--in-place", "--format", "raw"];
    place.run(&arguments).must_end_with(0);
    assert_eq!(std::fs::read(place.path("web.raw")).unwrap(), vec![7; MIB]);
}

#[test]
fn levels_are_what_they_say() {
    let place = Place::with_repository();
    place.image("web.raw", MIB);
    let level = |level: &str, code: i32| {
        let run = place.run(&["backup", "web.raw", "--level", level, "--json"]);
        run.must_end_with(code).summary()["level"].as_str().unwrap().to_owned()
    };
    assert_eq!(level("incremental", 3), "full", "there is nothing to compare with: a warning");
    assert_eq!(level("auto", 0), "incremental");
    assert_eq!(level("incremental", 0), "incremental");
    assert_eq!(level("differential", 0), "differential");
    assert_eq!(level("full", 0), "full");
}

#[test]
fn points_are_forgotten_by_rule_with_reasons_and_space_comes_back() {
    let place = Place::with_repository();
    for number in 0..3u8 {
        let path = place.image("web.raw", 2 * MIB);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[usize::from(number) * 65536..][..65536].fill(number + 1);
        std::fs::write(&path, bytes).unwrap();
        place.run(&["backup", "web.raw", "--tag", &format!("n={number}")]).must_end_with(0);
    }
    let dry = place.run(&["forget", "--keep-last", "1", "--dry-run", "--json"]).must_end_with(0);
    assert_eq!(dry.summary()["forgotten"].as_array().unwrap().len(), 2);
    assert_eq!(dry.summary()["decisions"][0]["reasons"][0], "last 1");
    let count = || {
        let points = place.run(&["points", "--json"]).must_end_with(0).summary();
        points["points"].as_array().unwrap().len()
    };
    assert_eq!(count(), 3, "a dry run changes nothing");
    let text = place.run(&["forget", "--keep-last", "1", "--keep-tag", "n=0"]).must_end_with(0);
    assert!(text.stdout.contains("1 restore points forgotten, 2 kept"), "{}", text.stdout);
    let run = place.run(&["forget", "web@latest", "--prune", "--json"]).must_end_with(0);
    assert!(run.summary()["prune"].is_object());
    assert_eq!(count(), 1);
    place.run(&["prune", "--json"]).must_end_with(0).summary();
    place.run(&["verify", "--read-data"]).must_end_with(0);
    place.run(&["forget"]).must_end_with(2);
    place.run(&["forget", "web", "--keep-last", "1"]).must_end_with(2);
}

#[test]
fn keys_are_added_used_and_removed() {
    let place = Place::with_repository();
    std::fs::write(place.path("second"), "a second one\n").unwrap();
    let added = place
        .run(&["key", "add", "--label", "safe", "--new-password-file", "second", "--json"])
        .must_end_with(0)
        .summary();
    let second = |arguments: &[&str]| {
        let mut command = place.command(arguments);
        command.env_remove("VMTIDE_PASSWORD");
        finish(&mut command)
    };
    second(&["points", "--password-file", "second"]).must_end_with(0);
    second(&["points", "--password-command", "cat second"]).must_end_with(0);
    second(&["points", "--password-command", "exit 9"]).must_end_with(1);
    let keys = place.run(&["key", "list", "--json"]).must_end_with(0).summary();
    assert_eq!(keys["keys"].as_array().unwrap().len(), 2);
    let first = keys["keys"].as_array().unwrap().iter().find(|key| key["id"] != added["id"]);
    let first = first.unwrap()["id"].as_str().unwrap().to_owned();
    second(&["key", "remove", &first[..12], "--password-file", "second"]).must_end_with(0);
    place.run(&["points"]).must_end_with(4);
    second(&["key", "remove", added["id"].as_str().unwrap(), "--password-file", "second"])
        .must_end_with(1);
    second(&["key", "remove", "zz", "--password-file", "second"]).must_end_with(6);
}

#[test]
fn a_source_can_be_looked_at() {
    let place = Place::with_repository();
    place.image("web.raw", MIB);
    let list = place.run(&["vm", "list", "web.raw", "--json"]).must_end_with(0).summary();
    assert_eq!(list["vms"][0]["name"], "web");
    let show = place.run(&["vm", "show", "web.raw"]).must_end_with(0);
    assert!(show.stdout.contains("disk0"), "{}", show.stdout);
    let doctor = place.run(&["doctor", "web.raw", "--json"]);
    assert!([0, 3].contains(&doctor.code), "{}", doctor.stderr);
    assert_ne!(doctor.summary()["status"], "fail");
    let doctor = place.run(&["doctor", "--json"]);
    assert_eq!(doctor.code, 3, "one key slot only is worth a remark: {}", doctor.stdout);
    place.run(&["doctor", "qemu+unix:///nonexistent.qmp"]).must_end_with(1);
}

#[test]
fn settings_give_defaults_and_mistakes_are_named() {
    let place = Place::with_repository();
    place.image("web.raw", MIB);
    let file = place.text("vmtide.toml");
    std::fs::write(&file, "json = true\n[backup]\nname = \"from-file\"\nlevel = \"full\"\n")
        .unwrap();
    let run = place.run(&["backup", "web.raw", "--config", &file]).must_end_with(0);
    assert_eq!(run.summary()["vm"], "from-file");
    std::fs::create_dir_all(place.path("config/vmtide")).unwrap();
    std::fs::write(place.path("config/vmtide/vmtide.toml"), "jsn = true\n").unwrap();
    let run = place.run(&["points"]).must_end_with(2);
    assert!(run.stderr.contains("jsn"), "{}", run.stderr);
}

#[test]
fn tracking_in_an_image_at_rest_goes_on_by_itself() {
    let place = Place::with_repository();
    place.image("web.raw", 4 * MIB);
    let tool = |program: &str, arguments: &[&str]| {
        let output = std::process::Command::new(program)
            .args(arguments)
            .current_dir(place.directory.path())
            .output()
            .unwrap_or_else(|error| {
                panic!("{program} is needed (scripts/test.sh installs it): {error}")
            });
        assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    };
    tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "web.raw", "web.qcow2"]);
    let run = place.run(&["backup", "web.raw", "--track"]).must_end_with(2);
    assert!(run.stderr.contains("qcow2"), "{}", run.stderr);
    let run = place.run(&["backup", "web.qcow2", "--track", "--disk-id", "virtio0", "--json"]);
    let first = run.must_end_with(0).summary()["disks"][0].clone();
    assert_eq!((&first["id"], &first["tracking"]["used"]), (&"virtio0".into(), &false.into()));

    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 9 2M 100k", "web.qcow2"]);
    let run = place.run(&["backup", "web.qcow2", "--json"]).must_end_with(0);
    let second = run.summary()["disks"][0].clone();
    assert_eq!((&second["id"], &second["tracking"]["used"]), (&"virtio0".into(), &true.into()));
    let read = second["read_bytes"].as_u64().unwrap();
    assert!((100 << 10..=128 << 10).contains(&read), "{second}");
    place.run(&["restore", "web", "--to", "back.raw"]).must_end_with(0);
    tool("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", "web.qcow2", "back.raw"]);
}
