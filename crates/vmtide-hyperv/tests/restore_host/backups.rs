//! Both routes, and what backups make of a VM that is not complete.

use crate::support::{assert_holds, freeze, host, in_place, request, restore, source, try_freeze};
use std::collections::BTreeMap;
use uuid::Uuid;
use vmtide_block::BlockDevice;
use vmtide_hyperv::HypervRestorer;
use vmtide_hypervisor::{RestoreRoute, VmRestorer};
use vmtide_standin_hyperv_host::{AnswerForm, VmSpec, World, WorldOptions};

#[test]
fn what_was_backed_up_on_one_host_is_restored_on_another_by_both_routes() {
    for form in [AnswerForm::Typed, AnswerForm::Texts] {
        for route in [RestoreRoute::Exact, RestoreRoute::Portable] {
            let directory = tempfile::tempdir().unwrap();
            let (origin, vm, contents) = source(&directory.path().join("origin"));
            let frozen = freeze(&origin, &directory.path().join("state1"));
            for (disk, content) in frozen.disks().iter().zip(&contents) {
                content.compare(&*disk.device).unwrap();
            }
            let target = World::new(directory.path().join("target"), WorldOptions::default());
            target.add_switch("Lab");
            let there = host(&target, form);
            let restorer =
                HypervRestorer::new(there.clone(), target.files(), directory.path().join("state2"));
            let mut request = request(&*frozen, "web", route);
            request.networks.map.insert("External".into(), "Lab".into());
            let done = restore(&restorer, &request, &contents).unwrap();
            let what = format!("{route:?} {form:?}");
            assert_eq!(done.route, Some(route), "{what}");
            assert_eq!(done.same_id, route == RestoreRoute::Exact, "{what}");
            let id = Uuid::parse_str(&done.id).unwrap();
            assert_eq!(id == vm, done.same_id);
            let record = there.vm(id).unwrap();
            let now = there.configuration(&record, &record.settings).unwrap().config;
            let was = frozen.config();
            assert_eq!(
                (&now.name, now.firmware, now.processors, now.memory_bytes, &now.notes),
                (&was.name, was.firmware, was.processors, was.memory_bytes, &was.notes),
                "{what}"
            );
            assert_eq!((&now.controllers, now.secure_boot), (&was.controllers, was.secure_boot));
            let networks: Vec<_> =
                now.network_adapters.iter().map(|one| one.network.as_deref()).collect();
            assert_eq!(networks, [Some("Lab")], "{what}");
            assert_holds(&target, id, &contents, &what);
            assert_eq!(target.vms(), [id], "{what}");
            let files = target.all_files();
            let is_temporary = |name: &&String| name.contains("INCOMPLETE");
            assert_eq!(files.iter().filter(is_temporary).count(), 0, "{what}: {files:?}");
            frozen.abort().unwrap();
        }
    }
}

#[test]
fn a_copy_lives_beside_its_original() {
    let directory = tempfile::tempdir().unwrap();
    let (world, vm, contents) = source(&directory.path().join("host"));
    let state = directory.path().join("state");
    let frozen = freeze(&world, &state);
    let there = host(&world, AnswerForm::Typed);
    let restorer = HypervRestorer::new(there.clone(), world.files(), &state);
    let before: Vec<_> = world.all_files();
    let request = request(&*frozen, "web-copy", RestoreRoute::Auto);
    let done = restore(&restorer, &request, &contents).unwrap();
    assert!(!done.same_id);
    let copy = there.find("web-copy").unwrap();
    let disks = there.disks(&copy.settings).unwrap();
    for (index, (disk, content)) in disks.iter().zip(&contents).enumerate() {
        let file = world.files().open_disk(&disk.host_resource).unwrap();
        content.compare(&*file.device).unwrap();
        assert_ne!(file.disk_id, Some(world.disk_id(vm, index)), "its own id");
        assert_eq!(file.device.size_bytes(), content.size_bytes());
    }
    let config = there.configuration(&copy, &copy.settings).unwrap().config;
    assert!(config.network_adapters.iter().all(|one| one.network.is_none()));
    frozen.abort().unwrap();
    world.settle();
    assert!(before.iter().filter(|name| name.contains("VMs")).all(|name| {
        name.contains("avhdx") || name.contains("Snapshots") || world.all_files().contains(name)
    }));
}

#[test]
fn disks_between_two_moments_are_never_backed_up_whatever_the_vm_is_called() {
    for name in ["x".repeat(90), "web".to_owned()] {
        let directory = tempfile::tempdir().unwrap();
        let world = World::new(directory.path().join("host"), WorldOptions::default());
        let mut spec = VmSpec::new(&name, &[1 << 20]);
        spec.running = false;
        let vm = world.add_vm(&spec);
        let state = directory.path().join("state");
        let there = host(&world, AnswerForm::Typed);
        let frozen = try_freeze(&world, &state, &name).unwrap();
        let request = in_place(&*frozen, &name, &BTreeMap::new());
        frozen.abort().unwrap();
        world.settle();
        let restorer = HypervRestorer::new(there.clone(), world.files(), &state);
        restorer.begin_in_place(&request).unwrap().abort().unwrap();
        let marked = there.vm(vm).unwrap();
        if marked.name != name {
            there.rename(&marked.settings, &name).unwrap();
        }
        let error = try_freeze(&world, &state, &name).map(drop).unwrap_err();
        assert!(error.to_string().contains("was not finished"), "{error}");
        restorer.begin_in_place(&request).unwrap().finish(false).unwrap();
        try_freeze(&world, &state, &name).unwrap().abort().unwrap();
    }
}
