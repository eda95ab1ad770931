//! Faults at every call: whatever breaks wherever, the VM is complete or nothing of it is left.

use crate::fake::{FakeHost, Fault, Manners};
use crate::support::{assert_disks, config_of, origin, request, restore, restorer, target, web};
use uuid::Uuid;
use vmtide_hypervisor::{RestoreRoute, VmConfig, VmRestorer};

/// What must hold after a restore that met a fault, once the host is back and the next job has looked.
fn assert_whole_or_nothing(fake: &FakeHost, config: &VmConfig, before: &[String], what: &str) {
    let vm = fake
        .0
        .lock()
        .systems
        .iter()
        .find(|one| one.name() == "web" && !one.planned)
        .map(|one| one.id);
    match vm {
        None => assert_eq!(fake.inventory(), before, "{what}"),
        Some(id) => {
            assert_disks(fake, config, id);
            let left: Vec<_> = fake
                .inventory()
                .into_iter()
                .filter(|line| !before.contains(line))
                .filter(|line| {
                    line.contains("planned")
                        || line.contains("import")
                        || line.contains("INCOMPLETE")
                })
                .collect();
            assert_eq!(left, Vec::<String>::new(), "{what}");
            let others = before
                .iter()
                .filter(|line| line.starts_with("vm ") || line.starts_with("planned "));
            assert_eq!(fake.0.lock().systems.len(), others.count() + 1, "{what}");
        }
    }
}

fn every_call_breaks(route: RestoreRoute, fault: Fault, manners: Manners) {
    let system = web();
    let config = config_of(&system, &origin(&system));
    let mut failures = 0;
    for call in 1.. {
        let state = tempfile::tempdir().unwrap();
        let fake = target(&system);
        // Somebody else's VM and planned VM, which must stay.
        let other = Uuid::from_u128(0xBEEF);
        fake.change(|state| {
            state.systems.push(system.with_id(other));
            state.systems[0].settings.set("ElementName", "other");
            state.systems.push(system.with_id(Uuid::from_u128(0xF00D)));
            state.systems[1].planned = true;
            state.systems[1].settings.set("VirtualSystemType", "Microsoft:Hyper-V:System:Planned");
            state.manners = manners;
        });
        let before = fake.inventory();
        fake.change(|state| state.fault = Some((call, fault)));
        let outcome = restore(&restorer(&fake, state.path()), &request(&config, "web", route));
        let calls = fake.0.lock().calls;
        fake.change(|state| {
            state.dead = false;
            state.fault = None;
        });
        let what = format!(
            "{route:?} {fault:?} at call {call}: {}",
            fake.0.lock().log[call.min(calls) - 1]
        );
        let report = restorer(&fake, state.path()).reap_restores();
        let report = report.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(report.in_use, Vec::<String>::new(), "{what}");
        fake.change(|state| state.manners = Manners::default());
        assert_whole_or_nothing(&fake, &config, &before, &what);
        if outcome.is_ok() {
            assert!(
                fake.0.lock().systems.iter().any(|one| one.name() == "web" && !one.planned),
                "{what}"
            );
        } else {
            failures += 1;
        }
        if call > calls {
            assert!(outcome.is_ok(), "{what}");
            assert!(failures > 20, "{failures} of {call}");
            return;
        }
    }
}

#[test]
fn refused_calls_leave_nothing() {
    every_call_breaks(RestoreRoute::Exact, Fault::Refused, Manners::default());
    every_call_breaks(RestoreRoute::Portable, Fault::Refused, Manners::default());
    every_call_breaks(
        RestoreRoute::Auto,
        Fault::Refused,
        Manners { jobs: true, ..Manners::default() },
    );
}

#[test]
fn lost_answers_leave_nothing() {
    every_call_breaks(RestoreRoute::Exact, Fault::Lost, Manners::default());
    every_call_breaks(RestoreRoute::Portable, Fault::Lost, Manners::default());
    every_call_breaks(
        RestoreRoute::Exact,
        Fault::Lost,
        Manners { jobs: true, silent: true, text: true, ..Manners::default() },
    );
}

#[test]
fn killed_restores_are_removed_by_the_next() {
    for fault in [Fault::Dead, Fault::DeadAfter] {
        every_call_breaks(RestoreRoute::Exact, fault, Manners::default());
        every_call_breaks(RestoreRoute::Portable, fault, Manners::default());
    }
}

#[test]
fn what_somebody_uses_by_now_is_left() {
    let (system, state) = (web(), tempfile::tempdir().unwrap());
    let config = config_of(&system, &origin(&system));
    let fake = target(&system);
    fake.change(|state| state.fault = Some((30, Fault::Dead)));
    assert!(
        restore(&restorer(&fake, state.path()), &request(&config, "web", RestoreRoute::Portable))
            .is_err()
    );
    // Somebody has made a VM of the disk that the killed restore left.
    let path = r"C:\Hyper-V\web\Virtual Hard Disks\web.vhdx";
    let mut other = system.with_id(Uuid::from_u128(5));
    other.settings.set("ElementName", "rescued");
    for one in other.resources.iter_mut().filter(|one| one.value("HostResource").is_some()) {
        one.set("HostResource", vmtide_cim::CimValue::strings([path]));
    }
    fake.change(|state| {
        state.dead = false;
        state.fault = None;
        state.systems.push(other);
    });
    let report = restorer(&fake, state.path()).reap_restores().unwrap();
    assert!(report.removed.iter().any(|line| line.contains("was left")), "{report:?}");
    assert!(fake.inventory().iter().any(|line| line.contains(path)), "{:?}", fake.inventory());
}

#[test]
fn a_vm_that_is_complete_is_not_told_to_have_failed() {
    let system = web();
    let config = config_of(&system, &origin(&system));
    for route in [RestoreRoute::Exact, RestoreRoute::Portable] {
        let (fake, state) = (target(&system), tempfile::tempdir().unwrap());
        restore(&restorer(&fake, state.path()), &request(&config, "web", route)).unwrap();
        let naming = {
            let log = &fake.0.lock().log;
            log.iter().rposition(|call| call == "ModifySystemSettings").unwrap() + 1
        };
        // The answer to giving it its name is lost, and so is the look whether it has it.
        let (fake, state) = (target(&system), tempfile::tempdir().unwrap());
        fake.change(|state| {
            state.fault = Some((naming, Fault::Lost));
            state.fault_again = Some((naming + 1, Fault::Refused));
        });
        let restorer = restorer(&fake, state.path());
        let done = restore(&restorer, &request(&config, "web", route)).unwrap();
        assert!(done.warnings.iter().any(|one| one.contains("was lost")), "{:?}", done.warnings);
        assert_disks(&fake, &config, Uuid::parse_str(&done.id).unwrap());
        assert!(!fake.inventory().iter().any(|line| line.contains("INCOMPLETE")));
        assert_eq!(restorer.reap_restores().unwrap(), vmtide_hypervisor::ReapReport::default());
    }
}
