//! Disks that go back to a restore point: what every backup must know of it, and VMs that are not the point's.

use crate::support::{
    assert_holds, commit, freeze, freeze_from, host, in_place, request, restore, restorer, source,
    source_of, write,
};
use std::collections::BTreeMap;
use uuid::Uuid;
use vmtide_block::ByteRange;
use vmtide_hypervisor::{Changes, FullReason, RestoreRoute, VmRestorer};
use vmtide_standin_hyperv_host::{AnswerForm, WorldOptions};

/// Two installations of vmtide back up one VM, each to its own repository and with its own state directory. One restores
/// the VM in place: it cannot know the other's reference point, and the host still answers for it.
#[test]
fn no_backup_of_any_installation_builds_on_what_was_before_a_restore_in_place() {
    let directory = tempfile::tempdir().unwrap();
    let options = WorldOptions {
        ids_last: true,
        ids_survive_offline_writes: true,
        ..WorldOptions::default()
    };
    let (world, vm, contents) = source_of(&directory.path().join("host"), options, |_| {});
    let [ours, theirs] = ["ours", "theirs"].map(|name| directory.path().join(name));
    let (our_line, their_line) = ("0123456789abcdef", "fedcba9876543210");
    let freeze_of = |state, line, bases| freeze_from(&world, state, "web", line, bases).unwrap();
    let frozen = freeze_of(&ours, our_line, BTreeMap::new());
    let mut wanted = in_place(&*frozen, "web", &BTreeMap::new());
    let our_bases = commit(frozen);
    world.settle();
    world.power(vm, true);
    world.write(vm, 0, 1 << 20, &[0xEE; 300_000]);
    world.power(vm, false);
    let their_bases = commit(freeze_of(&theirs, their_line, BTreeMap::new()));
    world.settle();
    assert_eq!(world.leftovers().reference_points.len(), 2);

    // Back to the first moment, which undoes what the guest wrote since.
    for disk in &mut wanted.disks {
        disk.tracking = our_bases[&disk.id].tracking.clone();
    }
    wanted.known_tracking = our_bases.values().filter_map(|base| base.tracking.clone()).collect();
    let restoring = restorer(&world, &ours).begin_in_place(&wanted).unwrap();
    assert!(restoring.warnings().iter().any(|one| one.contains("1 reference point")));
    write(&*restoring, &contents).unwrap();
    restoring.finish(false).unwrap();
    assert_holds(&world, vm, &contents, "restored in place");

    // The host would tell them that nothing changed.
    let (_, path) = world.disks(vm).remove(0);
    let token = their_bases.values().next().unwrap().tracking.clone().unwrap();
    let token: serde_json::Value = serde_json::from_str(&token.0).unwrap();
    let id = token["rct"].as_str().unwrap();
    let answer = world.files().changes(&path, id, ByteRange::new(0, 8 << 20)).unwrap();
    assert!(answer.ranges.is_empty(), "{answer:?}");

    let frozen = freeze_of(&theirs, their_line, their_bases);
    for disk in frozen.disks() {
        let Changes::Everything(FullReason::TrackingLost(why)) = &disk.changes else {
            panic!("{:?}", disk.changes)
        };
        assert!(why.contains("restore in place"), "{why}");
    }
    let their_bases = commit(frozen);
    world.settle();
    // What was made since is believed again, although the note still lies there.
    assert!(world.all_files().iter().any(|name| name.contains("vmtide restored VM")));
    let frozen = freeze_of(&theirs, their_line, their_bases);
    assert!(frozen.disks().iter().all(|disk| matches!(disk.changes, Changes::Ranges(_))));
    frozen.abort().unwrap();
    world.settle();
    // The next restore finds none but its own points, and nothing to note.
    let restoring = restorer(&world, &theirs).begin_in_place(&wanted).unwrap();
    restoring.finish(false).unwrap();
    let notes = |name: &&String| name.contains("vmtide restored VM");
    assert_eq!(world.all_files().iter().filter(notes).count(), 0, "{:?}", world.all_files());
}

#[test]
fn another_vm_is_overwritten_only_where_somebody_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let (world, vm, contents) = source(&directory.path().join("host"));
    let state = directory.path().join("state");
    let frozen = freeze(&world, &state);
    let (copy, mut wanted) = (
        request(&*frozen, "web-test", RestoreRoute::Auto),
        in_place(&*frozen, "web-test", &BTreeMap::new()),
    );
    frozen.abort().unwrap();
    world.settle();
    let restorer = restorer(&world, &state);
    let copy = restore(&restorer, &copy, &contents).unwrap();
    let copy = Uuid::parse_str(&copy.id).unwrap();
    world.power(copy, true);
    world.write(copy, 0, 0, &[0x11; 70_000]);
    world.write(copy, 1, 0, &[0x22; 70_000]);
    world.power(copy, false);
    world.power(vm, true);
    world.write(vm, 0, 2 << 20, b"the original goes on");
    world.power(vm, false);
    let original = [world.content(vm, 0), world.content(vm, 1)];

    let error = restorer.begin_in_place(&wanted).map(drop).unwrap_err().to_string();
    assert!(error.contains("not the VM") && error.contains("--into-other-vm"), "{error}");
    wanted.into_other_vm = true;
    let restoring = restorer.begin_in_place(&wanted).unwrap();
    assert_eq!(restoring.warnings(), Vec::<String>::new(), "it was asked for");
    write(&*restoring, &contents).unwrap();
    let done = restoring.finish(false).unwrap();
    assert_eq!((done.name.as_str(), done.warnings.len()), ("web-test", 0));
    assert_holds(&world, copy, &contents, "refreshed");
    assert_holds(&world, vm, &original, "the original");
}

#[test]
fn a_disk_that_has_grown_keeps_its_end_and_somebody_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let (world, _, contents) = source(&directory.path().join("host"));
    let state = directory.path().join("state");
    let frozen = freeze(&world, &state);
    let mut wanted = in_place(&*frozen, "web", &BTreeMap::new());
    frozen.abort().unwrap();
    world.settle();
    // As if it had been smaller then.
    wanted.disks[0].size_bytes -= 1 << 20;
    let restoring = restorer(&world, &state).begin_in_place(&wanted).unwrap();
    let grown: Vec<_> =
        restoring.warnings().iter().filter(|one| one.contains("has grown")).collect();
    assert_eq!(grown.len(), 1, "{:?}", restoring.warnings());
    assert!(grown[0].contains("1048576"), "{grown:?}");
    assert_eq!(contents.len(), restoring.disks().len());
    restoring.finish(false).unwrap();
}

#[test]
fn a_living_restore_in_place_is_nobodys_leftover() {
    let directory = tempfile::tempdir().unwrap();
    let name = "x".repeat(90);
    let change = |spec: &mut vmtide_standin_hyperv_host::VmSpec| spec.name.clone_from(&name);
    let (world, vm, _) = source_of(&directory.path().join("host"), WorldOptions::default(), change);
    let state = directory.path().join("state");
    let frozen = freeze_from(&world, &state, &name, "0123456789abcdef", BTreeMap::new()).unwrap();
    let wanted = in_place(&*frozen, &name, &BTreeMap::new());
    frozen.abort().unwrap();
    world.settle();
    let restoring = restorer(&world, &state).begin_in_place(&wanted).unwrap();
    let there = host(&world, AnswerForm::Typed);
    let checks = vmtide_hyperv::doctor::examine(&there, Some(&*world.files()), None);
    assert!(checks.iter().any(|one| one.name == "restores" && one.detail.contains("in place")));
    // Somebody takes the file away that says so, which is all that this VM can be marked by.
    let mark = world.all_files().into_iter().find(|one| one.contains("INCOMPLETE")).unwrap();
    world.files().remove_file(&mark).unwrap();
    let report = restorer(&world, &state).reap_restores().unwrap();
    assert_eq!((report.removed.len(), report.in_use.len()), (0, 1), "{report:?}");
    let journals = std::fs::read_dir(state.join("journal")).unwrap().count();
    assert_eq!(journals, 1, "its journal stands");
    restoring.finish(false).unwrap();
    assert_eq!(host(&world, AnswerForm::Typed).vm(vm).unwrap().name, name);
}
