//! Hosts that go on when nobody waits any more, and forget what they were asked for.

use crate::support::{assert_holds, freeze, request, restore, restorer, source};
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;
use vmtide_block::CancelToken;
use vmtide_hyperv::{Clock, Host, HostOptions, HypervRestorer};
use vmtide_hypervisor::{HypervisorError, NewVmRequest, RestoreRoute, VmIdentity, VmRestorer};
use vmtide_standin_hyperv_host::{AnswerForm, Content, FaultPlan, When, World, WorldOptions};

/// A restore point of a VM of another host.
fn point(directory: &Path) -> (NewVmRequest, Vec<Content>) {
    let (origin, _, contents) = source(&directory.join("origin"));
    let frozen = freeze(&origin, &directory.join("origin-state"));
    let request = request(&*frozen, "web", RestoreRoute::Auto);
    frozen.abort().unwrap();
    (request, contents)
}

/// Longer than any job is waited for.
const LATE_MS: u64 = 40 * 60 * 1000;
const DAY_MS: u64 = 24 * 3600 * 1000;

/// The host's time; somebody interrupts the job while it waits for a method.
struct Interrupting(World, Option<(&'static str, CancelToken)>);

impl Clock for Interrupting {
    fn now_ms(&self) -> u64 {
        self.0.now_ms()
    }
    fn sleep_ms(&self, ms: u64) {
        if let Some((method, cancel)) = &self.1
            && self.0.events().iter().any(|event| event.contains(&format!("{method} answered")))
        {
            cancel.cancel();
        }
        self.0.advance(ms);
    }
    fn unix_s(&self) -> i64 {
        self.0.unix_s().try_into().unwrap()
    }
}

fn impatient(
    world: &World,
    state: &Path,
    interrupted: Option<(&'static str, CancelToken)>,
) -> HypervRestorer {
    let clock = Arc::new(Interrupting(world.clone(), interrupted));
    let host = Host::new(world.cim(), HostOptions { clock, ..HostOptions::default() });
    HypervRestorer::new(host, world.files(), state)
}

/// How many VMs `doctor` says that restores have not finished.
fn leftovers_told(world: &World) -> usize {
    let host = crate::support::host(world, AnswerForm::Typed);
    let checks = vmtide_hyperv::doctor::examine(&host, Some(&*world.files()), None);
    checks.iter().filter(|check| check.name == "restores").count()
}

fn journals(state: &Path) -> usize {
    std::fs::read_dir(state.join("journal")).map_or(0, Iterator::count)
}

#[test]
fn what_a_host_completes_after_it_was_given_up_is_removed_later() {
    let directory = tempfile::tempdir().unwrap();
    let (wanted, contents) = point(directory.path());
    for (route, method) in [
        (RestoreRoute::Exact, "ImportSystemDefinition"),
        (RestoreRoute::Exact, "RealizePlannedSystem"),
        (RestoreRoute::Portable, "DefineSystem"),
    ] {
        for cancels in [false, true] {
            let what = format!("{method}, cancelled: {cancels}");
            let place = tempfile::tempdir().unwrap();
            let world = World::new(place.path().join("host"), WorldOptions::default());
            let state = place.path().join("state");
            world.faults(|faults| faults.late = Some((method.into(), LATE_MS)));
            let mut late = wanted.clone();
            (late.route, late.job) = (route, vmtide_hypervisor::JobId::random());
            late.cancel = CancelToken::new();
            let vm = impatient(&world, &state, cancels.then(|| (method, late.cancel.clone())))
                .begin(&late)
                .unwrap();
            crate::support::write(&*vm, &contents).unwrap();
            let error = vm.finish(false).unwrap_err();
            match cancels {
                true => assert!(matches!(error, HypervisorError::Block(_)), "{what}: {error}"),
                false => {
                    assert!(matches!(error, HypervisorError::Timeout { .. }), "{what}: {error}")
                }
            }
            let restorer = restorer(&world, &state);
            assert_eq!(journals(&state), 1, "{what}: {error}");
            assert_eq!(world.all_files(), Vec::<String>::new(), "{what}");
            let before = world.vms().len();
            // The host is done.
            world.faults(|faults| faults.late = None);
            world.advance(LATE_MS);
            world.settle();
            // Realizing needs the disks, which are gone: what was planned was removed already.
            let came = world.vms().len() > before;
            assert_eq!(came, method != "RealizePlannedSystem", "{what}");
            let told = leftovers_told(&world);
            assert_eq!(told, usize::from(method == "DefineSystem"), "{what}: by doctor");
            let report = restorer.reap_restores().unwrap();
            assert_eq!(report.removed.len(), usize::from(came), "{what}: {report:?}");
            assert_eq!((world.vms(), world.all_files()), (vec![], vec![]), "{what}");
            assert_eq!(journals(&state), 1, "{what}: the host may be slower still");

            // Meanwhile the same restore goes through, and what it makes is not taken for what was left.
            let mut again = wanted.clone();
            (again.route, again.identity) = (route, VmIdentity::Auto);
            let done = restore(&restorer, &again, &contents).unwrap();
            assert_eq!(done.same_id, route == RestoreRoute::Exact, "{what}: {:?}", done.warnings);
            assert_eq!(done.warnings.iter().filter(|one| one.contains("still there")).count(), 0);
            restorer.reap_restores().unwrap();
            let id = Uuid::parse_str(&done.id).unwrap();
            assert_holds(&world, id, &contents, &what);
            let files = world.all_files();
            world.advance(2 * DAY_MS);
            assert_eq!(restorer.reap_restores().unwrap().removed, Vec::<String>::new());
            assert_eq!(journals(&state), 0, "{what}: it has been looked for long enough");
            assert_eq!(world.all_files(), files, "{what}");
            assert_holds(&world, id, &contents, &what);
        }
    }
}

#[test]
fn a_killed_restore_whose_host_was_slow_leaves_nothing_either() {
    let directory = tempfile::tempdir().unwrap();
    let (wanted, contents) = point(directory.path());
    let place = tempfile::tempdir().unwrap();
    let world = World::new(place.path().join("host"), WorldOptions::default());
    let state = place.path().join("state");
    world.faults(|faults| faults.late = Some(("DefineSystem".into(), LATE_MS)));
    let plan = FaultPlan::none();
    let count = |plan: &FaultPlan, state: &Path| {
        let host = Host::new(
            plan.cim(world.cim()),
            HostOptions {
                clock: Arc::new(crate::support::WorldClock(world.clone())),
                ..HostOptions::default()
            },
        );
        let restorer = HypervRestorer::new(host, plan.files(world.files()), state);
        let mut wanted = wanted.clone();
        (wanted.route, wanted.job) = (RestoreRoute::Portable, vmtide_hypervisor::JobId::random());
        restore(&restorer, &wanted, &contents).unwrap_err();
    };
    count(&plan, &place.path().join("count"));
    let at = plan.log().iter().position(|call| call == "invoke DefineSystem").unwrap() as u64 + 1;
    world.advance(LATE_MS);
    restorer(&world, &place.path().join("count")).reap_restores().unwrap();
    assert_eq!((world.vms(), world.all_files()), (vec![], vec![]));

    // Killed right after the call; the next job looks before the host is done.
    count(&FaultPlan::kill_at(at, When::After), &state);
    assert!(!world.all_files().is_empty());
    restorer(&world, &state).reap_restores().unwrap();
    assert_eq!((world.vms(), world.all_files()), (vec![], vec![]));
    world.advance(LATE_MS);
    assert_eq!(world.vms().len(), 1, "the host is done");
    let report = restorer(&world, &state).reap_restores().unwrap();
    assert_eq!(report.removed.len(), 1, "{report:?}");
    assert_eq!((world.vms(), world.all_files()), (vec![], vec![]));
}
