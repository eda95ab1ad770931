//! Restores by chance: routes, names, hosts that answer late, refuse, lose answers, or whose callers die, one after the
//! other on one host. Whatever comes, a VM is complete or not there, what is not ours stays as it is, and in the end
//! nothing is left.
//!
//! `cargo test -p vmtide-hyperv --release --test restore_host -- --ignored` runs 10,000 of them, for about an hour; a range of them
//! with `VMTIDE_SEED=FIRST` and `VMTIDE_RUNS=COUNT`.

use crate::support::{WorldClock, assert_holds, freeze, host, in_place, request, source_of, write};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;
use vmtide_block::CancelToken;
use vmtide_hyperv::{Host, HostOptions, HypervRestorer};
use vmtide_hypervisor::{
    InPlaceRequest, JobId, NewVmRequest, RestoreRoute, Result, VmIdentity, VmRestorer,
};
use vmtide_standin_hyperv_host::{
    AnswerForm, Content, DiskSpec, FaultPlan, Random, VmSpec, When, World, WorldOptions,
};

/// Two restore points of one VM, and what they hold.
struct Points {
    new: NewVmRequest,
    in_place: InPlaceRequest,
    contents: Vec<Content>,
}

const MIB: u64 = 1 << 20;

fn points() -> Points {
    let directory = tempfile::tempdir().unwrap();
    let small = |spec: &mut VmSpec| {
        spec.disks = vec![DiskSpec::scsi(0, 6 * MIB), DiskSpec::scsi(1, 4 * MIB)];
    };
    let options = WorldOptions { seed: 77, ..WorldOptions::default() };
    let (world, _, contents) = source_of(&directory.path().join("host"), options, small);
    let frozen = freeze(&world, &directory.path().join("state"));
    let new = request(&*frozen, "web", RestoreRoute::Auto);
    let in_place = in_place(&*frozen, "web", &BTreeMap::new());
    frozen.abort().unwrap();
    Points { new, in_place, contents }
}

struct Run<'a> {
    seed: u64,
    points: &'a Points,
    random: Random,
    world: World,
    state: std::path::PathBuf,
    /// A VM that has nothing to do with it, and what it holds.
    other: (Uuid, Vec<Content>),
    /// Names of VMs whose guests have written since they were restored.
    dirty: BTreeSet<&'static str>,
    story: Vec<String>,
}

const NAMES: [&str; 2] = ["web", "web-test"];

impl<'a> Run<'a> {
    fn new(seed: u64, directory: &Path, points: &'a Points) -> Self {
        let options = WorldOptions { seed, ..WorldOptions::default() };
        let world = World::new(directory.join("host"), options);
        world.add_switch("External");
        let mut spec = VmSpec::new("other", &[2 * MIB]);
        spec.directory = r"C:\VMs\other".into();
        let vm = world.add_vm(&spec);
        world.write(vm, 0, 4096, b"somebody's");
        world.power(vm, false);
        let other = (vm, vec![world.content(vm, 0)]);
        let random = Random::new(seed);
        let state = directory.join("state");
        Self {
            seed,
            points,
            random,
            world,
            state,
            other,
            dirty: BTreeSet::new(),
            story: Vec::new(),
        }
    }

    fn what(&self) -> String {
        format!("repeat it with VMTIDE_SEED={}: {:#?}", self.seed, self.story)
    }

    fn restorer(&self, plan: &FaultPlan, form: AnswerForm) -> HypervRestorer {
        let clock = Arc::new(WorldClock(self.world.clone()));
        let options = HostOptions { clock, ..HostOptions::default() };
        let host = Host::new(plan.cim(self.world.cim_in(form)), options);
        HypervRestorer::new(host, plan.files(self.world.files()), &self.state)
    }

    fn vm_of(&self, name: &str) -> Option<Uuid> {
        let host = host(&self.world, AnswerForm::Typed);
        host.vms().unwrap().into_iter().find(|vm| vm.name == name).map(|vm| vm.id)
    }

    /// What a job does on the host, under a plan.
    fn attempt(&mut self, plan: &FaultPlan) -> (String, Result<()>) {
        let form = if self.random.one_in(2) { AnswerForm::Typed } else { AnswerForm::Texts };
        let restorer = self.restorer(plan, form);
        let name = NAMES[usize::try_from(self.random.below(2)).unwrap()];
        let exists = self.vm_of(name).is_some();
        let marked = self.vm_of(&format!("{name} (restore incomplete)")).is_some();
        if let Some(vm) = self.vm_of(name).filter(|_| self.random.one_in(2)) {
            self.world.power(vm, true);
            let (at, bytes) = (self.random.below(3 * MIB), self.random.bytes(5000));
            self.world.write(vm, 0, at, &bytes);
            self.world.power(vm, false);
            self.dirty.insert(name);
        }
        if exists || marked {
            let mut wanted = self.points.in_place.clone();
            wanted.vm = name.into();
            wanted.job = JobId::random();
            wanted.cancel = CancelToken::new();
            wanted.into_other_vm = true;
            let done = restorer.begin_in_place(&wanted).and_then(|vm| {
                match write(&*vm, &self.points.contents) {
                    Ok(()) => vm.finish(false).map(drop),
                    Err(error) => vm.abort().and(Err(error.into())),
                }
            });
            if done.is_ok() {
                self.dirty.remove(name);
            }
            return (format!("{name} in place {form:?}"), done);
        }
        let mut wanted = self.points.new.clone();
        wanted.name = name.into();
        wanted.job = JobId::random();
        wanted.cancel = CancelToken::new();
        wanted.route = *self
            .random
            .choose(&[RestoreRoute::Auto, RestoreRoute::Exact, RestoreRoute::Portable])
            .unwrap();
        wanted.identity = if self.random.one_in(3) { VmIdentity::New } else { VmIdentity::Auto };
        let what = format!("{name} new {:?} {:?} {form:?}", wanted.route, wanted.identity);
        let done = crate::support::restore(&restorer, &wanted, &self.points.contents).map(drop);
        (what, done)
    }

    fn step(&mut self) {
        // More calls than the longest has, so that some go through.
        let at = 1 + self.random.below(140);
        let when = if self.random.one_in(2) { When::Before } else { When::After };
        let plan = match self.random.below(5) {
            0 => FaultPlan::none(),
            1 => FaultPlan::lose_at(at, when),
            _ => FaultPlan::kill_at(at, when),
        };
        let late = self.random.one_in(4).then(|| {
            let methods = [
                "ImportSystemDefinition",
                "RealizePlannedSystem",
                "DefineSystem",
                "AddResourceSettings",
                "ModifySystemSettings",
            ];
            let method = *self.random.choose(&methods).unwrap();
            (method.to_owned(), (5 + self.random.below(40)) * 60 * 1000)
        });
        let (vanish, synchronous) = (self.random.one_in(8), self.random.one_in(6));
        self.world.faults(|faults| {
            faults.late.clone_from(&late);
            faults.jobs_vanish = vanish;
            faults.synchronous = synchronous;
        });
        let (what, done) = self.attempt(&plan);
        self.story.push(format!(
            "{what}: {plan} late {late:?} vanish {vanish} synchronous {synchronous}: {done:?}",
            plan = if plan.has_struck() {
                format!("struck at {at} {when:?}")
            } else {
                "not struck".into()
            }
        ));
        self.world.faults(|faults| {
            faults.late = None;
            faults.jobs_vanish = false;
            faults.synchronous = false;
        });
        if done.is_ok() {
            self.check();
        }
        if self.random.one_in(2) {
            self.world.advance(self.random.below(60) * 60 * 1000);
        }
        if self.random.one_in(3) {
            let restorer = self.restorer(&FaultPlan::none(), AnswerForm::Typed);
            let report = restorer.reap_restores();
            self.story.push(format!("reaped: {report:?}"));
            report.unwrap_or_else(|error| panic!("{error}: {}", self.what()));
        }
    }

    /// Whatever has its name holds what it should; what is not ours is as it was.
    fn check(&self) {
        let what = self.what();
        assert_holds(&self.world, self.other.0, &self.other.1, &what);
        for name in NAMES.iter().filter(|name| !self.dirty.contains(*name)) {
            if let Some(vm) = self.vm_of(name) {
                assert_holds(&self.world, vm, &self.points.contents, &what);
            }
        }
    }

    /// The host is well again, and so are the jobs.
    fn end(mut self) {
        self.world.advance(60 * 60 * 1000);
        self.world.settle();
        for name in NAMES {
            if self.vm_of(&format!("{name} (restore incomplete)")).is_none() {
                continue;
            }
            let mut wanted = self.points.in_place.clone();
            (wanted.vm, wanted.job) = (name.into(), JobId::random());
            wanted.into_other_vm = true;
            let restorer = self.restorer(&FaultPlan::none(), AnswerForm::Typed);
            let vm = restorer
                .begin_in_place(&wanted)
                .unwrap_or_else(|error| panic!("{error}: {}", self.what()));
            write(&*vm, &self.points.contents).unwrap();
            vm.finish(false).unwrap();
            self.dirty.remove(name);
            self.story.push(format!("{name} made whole"));
        }
        let restorer = self.restorer(&FaultPlan::none(), AnswerForm::Typed);
        for days in [0, 2] {
            self.world.advance(days * 24 * 3600 * 1000);
            let report = restorer.reap_restores();
            let report = report.unwrap_or_else(|error| panic!("{error}: {}", self.what()));
            assert_eq!(report.in_use, Vec::<String>::new(), "{}", self.what());
        }
        self.check();
        let journals = std::fs::read_dir(self.state.join("journal"));
        let journals = journals.map_or(0, Iterator::count);
        assert_eq!(journals, 0, "journals are left: {}", self.what());
        let mut expected = vec![self.other.0];
        expected.extend(NAMES.iter().filter_map(|name| self.vm_of(name)));
        expected.sort();
        let mut there = self.world.vms();
        there.sort();
        assert_eq!(there, expected, "VMs are left: {}", self.what());
        let disks: Vec<_> =
            there.iter().flat_map(|vm| self.world.disks(*vm)).map(|(_, path)| path).collect();
        let is_known = |file: &String| {
            disks.contains(file)
                || there.iter().any(|vm| file.to_lowercase().contains(&vm.to_string()))
        };
        let left: Vec<_> =
            self.world.all_files().into_iter().filter(|file| !is_known(file)).collect();
        assert_eq!(left, Vec::<String>::new(), "files are left: {}", self.what());
    }
}

/// A number in the environment.
fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

fn run(count: u64) {
    let points = points();
    let first = from_environment("VMTIDE_SEED").unwrap_or(1);
    let count = from_environment("VMTIDE_RUNS").unwrap_or(count);
    for seed in first..first + count {
        if (seed - first).is_multiple_of(100) {
            println!("{} of {count} runs are done", seed - first);
        }
        let directory = tempfile::tempdir().unwrap();
        let mut run = Run::new(seed, directory.path(), &points);
        for _ in 0..1 + run.random.below(5) {
            run.step();
        }
        run.end();
    }
    println!("{count} runs from seed {first}: all are whole or nothing");
}

#[test]
fn restores_by_chance_are_whole_or_nothing() {
    run(60);
}

#[test]
#[ignore = "an hour: see the head of this file"]
fn ten_thousand_restores_by_chance() {
    run(10_000);
}
