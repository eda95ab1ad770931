//! What a killed job's journal says of the guest is believed only while it can be true, and is in
//! no later job's way.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "outside of test functions too, a failure here is a failed test"
)]

use crate::support::agent::{Behaviour, FakeAgent};
use crate::support::{LINEAGE, MIB, Store, Vm};
use serde_json::{Value, json};
use std::time::Duration;
use vmtide_hypervisor::{Hypervisor, JobId, Journal};
use vmtide_qemu::Address;
use vmtide_qemu::agent::GuestAgent;

/// Another process than the one that runs.
const ANOTHER: &str = "1:1:00000000-0000-0000-0000-000000000000";

/// The journal of a job that was killed after `steps`.
fn leave(vm: &Vm, steps: &[Value]) -> Journal {
    let target = std::fs::canonicalize(vm.path("vm.qmp")).unwrap();
    let target = target.to_str().unwrap();
    let mut journal = Journal::begin(&vm.path("state"), JobId::random(), target).unwrap();
    for step in steps {
        journal.record(step.clone()).unwrap();
    }
    journal
}

fn journals(vm: &Vm) -> Vec<Journal> {
    let target = std::fs::canonicalize(vm.path("vm.qmp")).unwrap();
    Journal::leftovers(&vm.path("state"), target.to_str().unwrap()).unwrap()
}

/// What a job writes down about the QEMU that runs.
fn process_step(vm: &Vm) -> Value {
    let frozen = vm.vm().freeze(&Store::new(LINEAGE).request()).unwrap();
    let journal = journals(vm).remove(0);
    let steps = journal.entry().steps.iter();
    let process = steps.clone().find(|step| step["step"] == "process").cloned();
    frozen.abort().unwrap();
    process.expect("no process in the journal")
}

fn frozen_step(vm: &Vm) -> Value {
    json!({"step": "frozen", "agent": vm.path("agent.sock"), "unix": true})
}

/// One backup; answers its warnings about freezing.
fn warnings(vm: &Vm) -> Vec<String> {
    let frozen = vm.vm().freeze(&Store::new(LINEAGE).request()).unwrap();
    let about = frozen.warnings().iter().filter(|text| text.contains("frozen"));
    let about = about.cloned().collect();
    frozen.commit().unwrap();
    about
}

#[test]
fn an_agent_that_is_gone_is_a_warning_until_the_guest_answers() {
    let mut vm = Vm::start(&[("qcow2", MIB)]);
    let process = process_step(&vm);
    leave(&vm, &[process, frozen_step(&vm)]);
    for _ in 0..2 {
        let texts = warnings(&vm);
        assert!(texts.len() == 1 && texts[0].contains("agent.sock"), "{texts:?}");
        // It may be frozen as long as this QEMU runs.
        assert_eq!(journals(&vm).len(), 1);
    }
    let agent = FakeAgent::start(&vm.path("agent.sock"), Behaviour::Good);
    let timeout = Duration::from_secs(5);
    let address = Address::Unix(vm.path("agent.sock"));
    GuestAgent::connect(&address, timeout).unwrap().freeze(timeout).unwrap();
    assert!(agent.is_frozen());
    assert_eq!(warnings(&vm), Vec::<String>::new());
    assert!(!agent.is_frozen());
    vm.assert_clean();
}

#[test]
fn a_record_without_a_process_is_tried_once() {
    let mut vm = Vm::start(&[("qcow2", MIB)]);
    leave(&vm, &[frozen_step(&vm)]);
    assert_eq!(warnings(&vm).len(), 1);
    assert_eq!(warnings(&vm), Vec::<String>::new());
    vm.assert_clean();
}

#[test]
fn what_was_held_in_another_qemu_process_is_over() {
    let mut vm = Vm::start(&[("qcow2", MIB)]);
    let another = json!({"step": "process", "identity": ANOTHER});
    leave(&vm, &[another, json!({"step": "paused"}), frozen_step(&vm)]);
    vm.monitor.run("stop", json!({}));
    assert_eq!(warnings(&vm), Vec::<String>::new());
    // Somebody else paused it.
    assert_eq!(vm.monitor.status(), "paused");
    vm.monitor.run("cont", json!({}));
    vm.assert_clean();
}

#[test]
fn a_pause_is_ended_unless_the_guardian_has_ended_it() {
    let mut vm = Vm::start(&[("qcow2", MIB)]);
    let process = process_step(&vm);
    for (released, status) in [(false, "running"), (true, "paused")] {
        let journal = leave(&vm, &[process.clone(), json!({"step": "paused"})]);
        if released {
            std::fs::write(journal.released_mark(), "").unwrap();
        }
        vm.monitor.run("stop", json!({}));
        vm.vm().reap().unwrap();
        assert_eq!(vm.monitor.status(), status);
        vm.monitor.run("cont", json!({}));
        vm.assert_clean();
    }
}
