//! Whole VMs from the command line: backed up and restored by the real program, over WinRM and SMB (the stand-in host
//! behind the stand-in for WinRM, its files on a real Samba) and by an agent on the stand-in host.

#![cfg(unix)]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::too_many_lines,
    reason = "a failed unwrap is a failed test, and one story is told in one piece"
)]

use crate::common;
#[path = "hyperv/doctor.rs"]
mod doctor;
#[path = "hyperv/errors.rs"]
mod errors;
#[path = "hyperv/many.rs"]
mod many;
#[path = "../../vmtide-smb/tests/support/mod.rs"]
mod samba;

use assert_cmd::Command;
use common::{Place, Run, finish};
use hyperv_agent::HostAgent;
use samba::{PASSWORD, Samba};
use serde_json::Value;
use std::path::PathBuf;
use std::sync::Arc;
use uuid::Uuid;
use vmtide_cim::{CimValue, ObjectPath};
use vmtide_standin_hyperv_host::{Content, Random, VmSpec, World, WorldOptions};
use wsman_server::{Server, ServerOptions, User};

const MIB: u64 = 1 << 20;

/// Users of WinRM who lack a group, with the password of the others: Hyper-V Administrators, or both.
const NO_HYPER_V: &str = "remote";
const NO_GROUP: &str = "stranger";

/// How the program gets to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Winrm,
    Agent,
}

/// A host with the VM `web`, and a repository.
struct Lab {
    place: Place,
    world: World,
    vm: Uuid,
    random: Random,
    samba: Option<Samba>,
    server: Option<Server>,
    agent: Option<HostAgent>,
}

impl Lab {
    fn new(way: Way) -> Self {
        let place = Place::with_repository();
        let samba = (way == Way::Winrm).then(Samba::start);
        let volumes = match &samba {
            Some(samba) => samba.path("vms"),
            None => place.path("volumes"),
        };
        // Nobody lets its time go on but those who ask it.
        let options = WorldOptions { tick_ms: 1000, ..WorldOptions::default() };
        let world = World::new(&volumes, options);
        world.add_switch("External");
        world.add_switch("Lab");
        let vm = world.add_vm(&VmSpec::new("web", &[12 * MIB, 6 * MIB]));
        let mut random = Random::new(7);
        world.write_around(vm, &mut random, 40);
        let server = samba.as_ref().map(|samba| {
            let users = vec![
                User::new(&samba.login().user, PASSWORD),
                User::without_hyper_v(NO_HYPER_V, PASSWORD),
                User::without_rights(NO_GROUP, PASSWORD),
            ];
            let options = ServerOptions { users, ..ServerOptions::default() };
            Server::start(options, world.cim(), Arc::new(hyperv_winrm::HostSchema)).unwrap()
        });
        let agent = (way == Way::Agent)
            .then(|| HostAgent::start(&world, &volumes, &place.path("agent")).unwrap());
        Self { place, world, vm, random, samba, server, agent }
    }

    fn url(&self, vm: &str) -> String {
        match (&self.server, &self.agent) {
            (Some(server), _) => format!("hyperv+winrm://{}/{vm}", server.address()),
            (None, Some(agent)) => format!("hyperv://{}/{vm}", agent.address),
            (None, None) => panic!("there is no way to the host"),
        }
    }

    /// Runs the program; `writes` says which of an agent's keys it gets.
    fn run_with(&self, words: &[&str], writes: bool) -> Run {
        self.finish(&mut self.command(words, writes))
    }

    /// Runs the program with other settings in its environment.
    fn run_where(&self, words: &[&str], settings: &[(&str, &str)]) -> Run {
        let mut command = self.command(words, false);
        self.finish(command.envs(settings.iter().copied()))
    }

    fn command(&self, words: &[&str], writes: bool) -> Command {
        let mut words = words.to_vec();
        if self.samba.is_some() && !words.contains(&"--smb-map") {
            words.extend(["--smb-map", r"C:=\\127.0.0.1\vms\C"]);
        }
        let mut command = self.place.command(&words);
        if let Some(samba) = &self.samba {
            command
                .env("VMTIDE_WINRM_USER", samba.login().user)
                .env("VMTIDE_WINRM_PASSWORD", PASSWORD)
                .env("VMTIDE_WINRM_AUTH", "ntlm")
                .env("VMTIDE_SMB_PORT", samba.port.to_string());
        }
        if let Some(agent) = &self.agent {
            command
                .env("VMTIDE_AGENT_KEY", if writes { &agent.writer } else { &agent.reader })
                .env("VMTIDE_AGENT_FINGERPRINT", &agent.fingerprint);
        }
        command
    }

    fn finish(&self, command: &mut Command) -> Run {
        let run = finish(command);
        for secret in [PASSWORD].into_iter().chain(self.agent.as_ref().map(|agent| &*agent.writer))
        {
            assert!(
                !run.stdout.contains(secret) && !run.stderr.contains(secret),
                "a secret is told"
            );
        }
        run
    }

    fn run(&self, words: &[&str]) -> Run {
        self.run_with(words, true)
    }

    fn backup(&self) -> Value {
        let run = self.run_with(&["backup", &self.url("web"), "--json"], false);
        self.world.settle();
        let left = self.world.leftovers();
        assert!(left.recovery_snapshots.is_empty() && left.unmerged_files.is_empty(), "{left:?}");
        assert!([0, 3].contains(&run.code), "{}", run.stderr);
        run.summary()
    }

    /// Restores the newest point of `web` to `vm`.
    fn restore(&self, vm: &str, options: &[&str]) -> Run {
        let url = self.url(vm);
        let mut words = vec!["restore", "web@latest", "--to", &url, "--json"];
        words.extend(options);
        let run = self.run(&words);
        // What came over the network the host finds in its files.
        for vm in self.world.vms() {
            if self.world.vm_state(vm) == Some((false, 3)) {
                self.world.reread(vm);
            }
        }
        run
    }

    fn content(&self, vm: Uuid) -> Vec<Content> {
        (0..self.world.disks(vm).len()).map(|disk| self.world.content(vm, disk)).collect()
    }

    /// Where the program's machine has a file of the host.
    fn local(&self, path: &str) -> PathBuf {
        let root = match &self.samba {
            Some(samba) => samba.path("vms"),
            None => self.place.path("volumes"),
        };
        path.split('\\').fold(root, |at, part| at.join(part.trim_end_matches(':')))
    }

    /// Holds the disks of a VM against `expected`, by what the host reads and by QEMU.
    fn assert_holds(&self, vm: Uuid, expected: &[Content]) {
        let disks = self.world.disks(vm);
        assert_eq!(disks.len(), expected.len());
        for (number, (content, (_, path))) in expected.iter().zip(&disks).enumerate() {
            let now = self.world.content(vm, number);
            let size = usize::try_from(content.size_bytes()).unwrap();
            assert!(now.read(0, size) == content.read(0, size), "{path}: another content");
            std::fs::write(self.place.path("expected.raw"), content.read(0, size)).unwrap();
            let file = self.local(path).to_str().unwrap().to_owned();
            common::disks::must_equal(&self.place, (&file, "vhdx"), ("expected.raw", "raw"));
        }
    }

    fn destroy(&self, vm: Uuid) {
        let cim = self.world.cim();
        let found = cim.query("", "SELECT * FROM Msvm_VirtualSystemManagementService").unwrap();
        let service = found[0].path.clone().unwrap();
        let id = vm.to_string().to_uppercase();
        let class = "Msvm_ComputerSystem";
        let path = ObjectPath::new(class, &[("CreationClassName", class), ("Name", &id)]);
        let done =
            cim.invoke(&service, "DestroySystem", &[("AffectedSystem", CimValue::Reference(path))]);
        assert!([0, 4096].contains(&done.unwrap().return_value));
        self.world.settle();
        assert_eq!(self.world.vm_state(vm), None);
    }

    fn guest_writes(&mut self) {
        self.world.power(self.vm, true);
        self.world.write_around(self.vm, &mut self.random, 12);
        self.world.power(self.vm, false);
    }
}

fn id_of(run: &Run) -> Uuid {
    run.summary()["restored"]["id"].as_str().unwrap().parse().unwrap()
}

fn sum_of(summary: &Value, name: &str) -> u64 {
    let disks = summary["disks"].as_array().unwrap();
    disks.iter().map(|disk| disk[name].as_u64().unwrap()).sum()
}

fn a_vm_comes_back_in_every_way(way: Way) {
    let mut lab = Lab::new(way);
    let first = lab.backup();
    assert_eq!((&first["level"], &first["consistency"]), (&"full".into(), &"app".into()));
    lab.world.write_around(lab.vm, &mut lab.random, 12);
    let second = lab.backup();
    assert_eq!(second["level"], "incremental", "{second}");
    assert_eq!(second["disks"][0]["tracking"]["used"], true, "{second}");
    lab.world.power(lab.vm, false);
    let expected = lab.content(lab.vm);
    assert!(expected.iter().all(|content| content.written_bytes() > 0));

    // A copy by either route, beside the original, on another network.
    for (route, name) in [("exact", "web-exact"), ("portable", "web-portable")] {
        let options = ["--new-id", "--route", route, "--network-map", "External=Lab"];
        let more = ["--directory", r"C:\Restored", "--verify", "--power-on"];
        let run = lab.restore(name, &[&options[..], &more].concat()).must_end_with(0);
        let summary = run.summary();
        let restored = &summary["restored"];
        assert_eq!((&restored["route"], &restored["name"]), (&route.into(), &name.into()));
        assert_eq!((&restored["same_id"], &restored["powered_on"]), (&false.into(), &true.into()));
        assert_eq!(summary["verified"], true);
        let copy = id_of(&run);
        assert_eq!(lab.world.vm_state(copy), Some((false, 2)), "it runs");
        lab.world.power(copy, false);
        lab.assert_holds(copy, &expected);
    }

    // In place: the guest has ruined it.
    lab.guest_writes();
    let ruined = lab.content(lab.vm);
    assert!((0..ruined.len()).any(|disk| {
        let size = usize::try_from(ruined[disk].size_bytes()).unwrap();
        ruined[disk].read(0, size) != expected[disk].read(0, size)
    }));
    if way == Way::Agent {
        let url = lab.url("web");
        let refused = lab.run_with(&["restore", "web@latest", "--to", &url, "--in-place"], false);
        assert_eq!(refused.must_end_with(4).stdout, "", "a key that only reads");
    }
    let run = lab.restore("web", &["--in-place", "--verify"]).must_end_with(0);
    let summary = run.summary();
    assert_eq!(
        (&summary["in_place"], &summary["restored"]["same_id"]),
        (&true.into(), &true.into())
    );
    let written = sum_of(&summary, "written_bytes") + sum_of(&summary, "zeroed_bytes");
    assert!(written > 0 && written < 6 * MIB, "only what differs: {written}");
    lab.assert_holds(lab.vm, &expected);
    // The backup after it reads in full, and stores next to nothing.
    let after = lab.backup();
    assert_eq!(after["disks"][0]["tracking"]["used"], false, "{after}");
    let stored = sum_of(&after, "new_bytes");
    assert!(stored < MIB, "{after}");
    lab.world.power(lab.vm, true);
    lab.world.write(lab.vm, 1, MIB, b"the guest goes on");
    let next = lab.backup();
    assert_eq!(next["disks"][0]["tracking"]["used"], true, "{next}");
    lab.world.power(lab.vm, false);
    let expected = lab.content(lab.vm);

    // A copy is refreshed in place, where somebody says so.
    let exact =
        lab.world.vms().into_iter().find(|vm| lab.world.describe(*vm).starts_with("web-exact "));
    let refused = lab.restore("web-exact", &["--in-place"]).must_end_with(1);
    assert!(refused.stderr.contains("--into-other-vm"), "{}", refused.stderr);
    lab.restore("web-exact", &["--in-place", "--into-other-vm"]).must_end_with(0);
    lab.assert_holds(exact.unwrap(), &expected);

    // The VM is lost, and comes back as itself.
    lab.destroy(lab.vm);
    let run = lab.restore("web", &["--keep-id", "--directory", r"C:\Back"]).must_end_with(0);
    let summary = run.summary();
    assert_eq!(summary["restored"]["same_id"], true, "{summary}");
    assert_eq!(id_of(&run), lab.vm);
    lab.assert_holds(lab.vm, &expected);
    let again = lab.restore("web2", &["--keep-id"]).must_end_with(1);
    assert!(again.stderr.contains("--new-id"), "{}", again.stderr);
    let after = lab.backup();
    assert_eq!(after["disks"][0]["tracking"]["used"], false, "{after}");

    let files = lab.world.all_files();
    assert!(!files.iter().any(|file| file.contains("INCOMPLETE")), "{files:?}");
    assert_eq!(lab.world.vms().len(), 3);
}

#[test]
fn over_winrm_and_smb() {
    a_vm_comes_back_in_every_way(Way::Winrm);
}

#[test]
fn by_an_agent() {
    a_vm_comes_back_in_every_way(Way::Agent);
}

#[test]
fn a_restore_that_fails_leaves_nothing_on_the_host() {
    for way in [Way::Winrm, Way::Agent] {
        let lab = Lab::new(way);
        lab.backup();
        let (files, vms) = (lab.world.all_files(), lab.world.vms());
        // Attaching the disks is refused, after all of them were written.
        lab.world.faults(|faults| faults.unknown_properties = ["HostResource".to_owned()].into());
        let failed = lab.restore("web-copy", &["--directory", r"C:\Restored", "--new-id"]);
        failed.must_end_with(1);
        lab.world.faults(|faults| faults.unknown_properties.clear());
        assert_eq!((lab.world.all_files(), lab.world.vms()), (files, vms), "{way:?}");
        assert!(!lab.local(r"C:\Restored\web-copy").exists(), "{way:?}: directories are left");
    }
}

#[test]
fn this_machine_has_no_hyper_v() {
    let place = Place::with_repository();
    for arguments in
        [&["restore", "web", "--to", "hyperv:///web"][..], &["backup", "hyperv:///web"]]
    {
        let run = place.run(arguments).must_end_with(2);
        assert!(run.stderr.contains("vmtide for Windows"), "{}", run.stderr);
    }
}
