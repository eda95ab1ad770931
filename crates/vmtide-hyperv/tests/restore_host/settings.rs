//! Settings that older hosts do not know, and those of adapters that are not connected.

use crate::support::{assert_holds, freeze, host, request, restore, restorer, source_of};
use uuid::Uuid;
use vmtide_hypervisor::RestoreRoute;
use vmtide_standin_hyperv_host::{AnswerForm, World, WorldOptions};

#[test]
fn a_host_of_an_older_version_gets_what_it_knows() {
    for unknown in [&["UserSnapshotType"][..], &["TargetMemoryBuffer", "AutomaticShutdownAction"]] {
        let directory = tempfile::tempdir().unwrap();
        let options = WorldOptions::default();
        let (origin, _, contents) = source_of(&directory.path().join("origin"), options, |_| {});
        let frozen = freeze(&origin, &directory.path().join("origin-state"));
        let wanted = request(&*frozen, "web", RestoreRoute::Portable);
        for name in unknown {
            let mut files = wanted.config.native.iter();
            assert!(files.any(|file| file.content.contains(name)), "the newer host tells {name}");
        }
        let world = World::new(directory.path().join("host"), WorldOptions::default());
        world.faults(|faults| {
            faults.unknown_properties = unknown.iter().map(|one| (*one).to_owned()).collect();
        });
        let restorer = restorer(&world, &directory.path().join("state"));
        let done = restore(&restorer, &wanted, &contents).unwrap();
        for name in unknown {
            let told = done.warnings.iter().filter(|one| one.contains(name)).count();
            assert_eq!(told, 1, "{name}: {:?}", done.warnings);
        }
        let id = Uuid::parse_str(&done.id).unwrap();
        assert_holds(&world, id, &contents, "on an older host");
        // What it knows it has.
        let there = host(&world, AnswerForm::Typed);
        let record = there.vm(id).unwrap();
        let now = there.configuration(&record, &record.settings).unwrap().config;
        let was = frozen.config();
        assert_eq!(
            (now.processors, now.memory_bytes, &now.notes, now.secure_boot),
            (was.processors, was.memory_bytes, &was.notes, was.secure_boot)
        );
        assert_eq!(world.vms(), [id]);
        frozen.abort().unwrap();
    }
}

#[test]
fn an_adapter_that_is_left_disconnected_is_in_its_vlan_when_it_is_connected() {
    for form in [AnswerForm::Typed, AnswerForm::Texts] {
        for (connect, network) in [(false, None), (true, Some("External"))] {
            for route in [RestoreRoute::Portable, RestoreRoute::Exact] {
                let directory = tempfile::tempdir().unwrap();
                let options = WorldOptions::default();
                let (origin, _, contents) =
                    source_of(&directory.path().join("origin"), options, |spec| {
                        spec.adapters[0].vlan = Some(20);
                    });
                let frozen = freeze(&origin, &directory.path().join("origin-state"));
                assert_eq!(frozen.config().network_adapters[0].vlan, Some(20));
                let mut wanted = request(&*frozen, "web", route);
                wanted.networks.connect = connect;
                let world = World::new(directory.path().join("host"), WorldOptions::default());
                world.add_switch("External");
                let there = host(&world, form);
                let restorer = vmtide_hyperv::HypervRestorer::new(
                    there.clone(),
                    world.files(),
                    directory.path().join("state"),
                );
                let done = restore(&restorer, &wanted, &contents).unwrap();
                let record = there.vm(Uuid::parse_str(&done.id).unwrap()).unwrap();
                let now = there.configuration(&record, &record.settings).unwrap().config;
                let adapter = &now.network_adapters[0];
                assert_eq!(
                    (adapter.vlan, adapter.network.as_deref()),
                    (Some(20), network),
                    "{route:?} {form:?}: {:?}",
                    done.warnings
                );
                frozen.abort().unwrap();
            }
        }
    }
}
