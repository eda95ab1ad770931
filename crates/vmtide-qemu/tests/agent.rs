//! File-system consistency through the guest agent, and that the guest is always thawed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "outside of test functions too, a failure here is a failed test"
)]

use crate::support::agent::{Behaviour, FakeAgent};
use crate::support::{Guest, LINEAGE, MIB, Store, Vm};
use std::time::{Duration, Instant};
use vmtide_hypervisor::{Consistency, FreezeRequest, FrozenVm, Hypervisor, HypervisorError};
use vmtide_qemu::{Address, QemuVm};

struct Case {
    vm: Vm,
    agent: FakeAgent,
    hypervisor: QemuVm,
}

fn case(behaviour: Behaviour) -> Case {
    let vm = Vm::start(&[("qcow2", 4 * MIB), ("raw", 4 * MIB)]);
    let socket = vm.path("agent.sock");
    // Only this one lets the time run out.
    let freeze_timeout_s = if behaviour == Behaviour::FreezeHangs { 1 } else { 20 };
    let agent = FakeAgent::start(&socket, behaviour);
    let mut target = vm.target();
    target.agent = Some(Address::Unix(socket));
    target.freeze_timeout = Duration::from_secs(freeze_timeout_s);
    Case { hypervisor: QemuVm::new(target), vm, agent }
}

fn request(consistency: Consistency, allow_downgrade: bool) -> FreezeRequest {
    FreezeRequest { consistency, allow_downgrade, ..Store::new(LINEAGE).request() }
}

fn freeze(case: &Case, wanted: Consistency, downgrade: bool) -> Result<Box<dyn FrozenVm>, String> {
    let outcome = case.hypervisor.freeze(&request(wanted, downgrade));
    if let Err(error) = &outcome {
        assert!(matches!(error, HypervisorError::ConsistencyNotReached { .. }), "{error}");
    }
    outcome.map_err(|error| error.to_string())
}

#[test]
fn a_good_agent_freezes_and_thaws() {
    let mut case = case(Behaviour::Good);
    let frozen = freeze(&case, Consistency::FileSystem, false).unwrap();
    assert!(case.agent.was_frozen() && !case.agent.is_frozen());
    assert_eq!(frozen.consistency(), Consistency::FileSystem);
    assert_eq!(frozen.downgrade_reason(), None);
    frozen.commit().unwrap();
    let frozen = freeze(&case, Consistency::Application, true).unwrap();
    assert_eq!(frozen.consistency(), Consistency::FileSystem);
    assert!(frozen.downgrade_reason().unwrap().contains("applications"));
    frozen.commit().unwrap();
    assert!(!case.agent.is_frozen());
    case.vm.assert_clean();
}

/// Every way to fail is an error without, and a stated downgrade with permission, and never
/// leaves the guest frozen.
#[test]
fn agents_that_fail_are_named_and_the_guest_is_thawed() {
    for (behaviour, word) in [
        (Behaviour::FreezeFails, "a hook said no"),
        (Behaviour::FreezeHangs, "did not answer guest-fsfreeze-freeze within 1000 ms"),
        (Behaviour::FreezeDies, "closed"),
        (Behaviour::ThawsItself, "too early"),
        (Behaviour::FreezesNothing, "no file system"),
    ] {
        let mut case = case(behaviour);
        let error = freeze(&case, Consistency::FileSystem, false).err().unwrap();
        assert!(error.contains(word) && error.contains("--allow-downgrade"), "{error}");
        assert!(!case.agent.is_frozen(), "{word}");
        case.vm.assert_clean();
        let frozen = freeze(&case, Consistency::FileSystem, true).unwrap();
        assert_eq!(frozen.consistency(), Consistency::Crash);
        assert!(frozen.downgrade_reason().unwrap().contains(word));
        assert!(!case.agent.is_frozen(), "{word}");
        assert!(case.agent.log().contains(&"guest-fsfreeze-thaw".to_owned()));
        frozen.commit().unwrap();
        case.vm.assert_clean();
    }
}

#[test]
fn no_agent_or_a_silent_one_is_found_out_soon() {
    // QEMU itself tells the agent's socket; nobody is in the guest to answer.
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("qga.sock");
    let chardev = format!("socket,id=qga0,path={},server=on,wait=off", socket.display());
    let extra = [
        "-chardev",
        &chardev,
        "-device",
        "virtio-serial-pci",
        "-device",
        "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0",
    ];
    let mut vm = Vm::start_with(&[("qcow2", 4 * MIB)], Guest::Idle, &extra);
    let begun = Instant::now();
    let frozen = vm.vm().freeze(&request(Consistency::FileSystem, true)).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(60));
    let reason = frozen.downgrade_reason().unwrap().to_owned();
    assert!(reason.contains("did not answer") && reason.contains("qga.sock"), "{reason}");
    frozen.abort().unwrap();
    vm.assert_clean();

    let mut vm = Vm::start(&[("qcow2", 4 * MIB)]);
    let error = vm.vm().freeze(&request(Consistency::FileSystem, false)).err().unwrap();
    assert!(error.to_string().contains("org.qemu.guest_agent.0"), "{error}");
    vm.assert_clean();
}

#[test]
fn a_guest_that_somebody_else_froze_stays_theirs() {
    let mut case = case(Behaviour::Good);
    let address = Address::Unix(case.vm.path("agent.sock"));
    let timeout = Duration::from_secs(5);
    let mut theirs = vmtide_qemu::agent::GuestAgent::connect(&address, timeout).unwrap();
    theirs.freeze(timeout).unwrap();
    drop(theirs);
    let error = freeze(&case, Consistency::FileSystem, false).err().unwrap();
    assert!(error.contains("somebody else"), "{error}");
    assert!(case.agent.is_frozen());
    case.vm.assert_clean();
}
