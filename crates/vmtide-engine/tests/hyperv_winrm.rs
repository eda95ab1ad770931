//! `hyperv+winrm://` from the URL to the restore point: the stand-in host behind the stand-in for WinRM, its disks on a
//! real Samba.

#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[path = "../../vmtide-smb/tests/support/mod.rs"]
mod samba;
use crate::support;

use samba::{PASSWORD, Samba, pattern};
use std::path::PathBuf;
use std::sync::Arc;
use support::{TestRepository, job, run};
use uuid::Uuid;
use vmtide_engine::doctor::{CheckStatus, check_source};
use vmtide_engine::hyperv::{Authentication, HypervAccess};
use vmtide_engine::source::{OpenSource, SourceOptions, SourceSpec};
use vmtide_engine::{BackupSummary, EngineError};
use vmtide_hypervisor::HypervisorError;
use vmtide_repo::Level;
use vmtide_standin_hyperv_host::{VmSpec, World, WorldOptions};
use wsman_server::{Server, ServerOptions, User};
use zeroize::Zeroizing;

const MIB: u64 = 1 << 20;

struct Lab {
    samba: Samba,
    world: World,
    vm: Uuid,
    server: Server,
    target: TestRepository,
}

impl Lab {
    fn new() -> Self {
        let samba = Samba::start();
        // Nobody lets its time go on but those who ask it.
        let options = WorldOptions { tick_ms: 1000, ..WorldOptions::default() };
        let world = World::new(samba.path("vms"), options);
        let vm = world.add_vm(&VmSpec::new("Büro & Co", &[24 * MIB, 40 * MIB]));
        world.write(vm, 0, 0, &pattern(1, 9 << 20));
        world.write(vm, 1, 11 * MIB, &pattern(2, 13 << 20));
        let user = samba.login().user;
        let users = vec![User::new(&user, PASSWORD), User::without_rights("nobody", "P4ssw0rd!")];
        let options = ServerOptions { users, ..ServerOptions::default() };
        let server =
            Server::start(options, world.cim(), Arc::new(hyperv_winrm::HostSchema)).unwrap();
        Self { samba, world, vm, server, target: TestRepository::new() }
    }

    fn url(&self, vm: &str) -> String {
        format!("hyperv+winrm://127.0.0.1:{}/{vm}", self.server.address().port())
    }

    fn options(&self) -> SourceOptions {
        SourceOptions {
            state_directory: self.state_directory(),
            hyperv: HypervAccess {
                login: Some(self.samba.login()),
                authentication: Authentication::Ntlm,
                smb_port: Some(self.samba.port),
                smb_mappings: vec![r"C:=\\127.0.0.1\vms\C".parse().unwrap()],
                ..HypervAccess::default()
            },
            ..SourceOptions::default()
        }
    }

    fn state_directory(&self) -> PathBuf {
        self.target.path("state")
    }

    fn open(&self) -> OpenSource {
        let spec = SourceSpec::parse(&self.url("B%C3%BCro & Co")).unwrap();
        assert!(!spec.display().contains(PASSWORD));
        spec.open(&self.options()).unwrap()
    }

    fn backup(&self) -> BackupSummary {
        let source = self.open();
        let mut job = job(&self.target.repository, source.hypervisor.as_ref());
        job.vm.clone_from(&source.vm);
        job.source.clone_from(&source.display);
        run(&job).unwrap()
    }

    /// Holds the disks of a restore point against what the guest had written.
    fn compare(&self, summary: &BackupSummary) {
        let repository = &self.target.repository;
        let point = repository.resolve(&summary.point.to_string()).unwrap();
        for (number, disk) in point.disks.iter().enumerate() {
            let restored = repository.open_disk(&point, &disk.id).unwrap();
            self.world.content(self.vm, number).compare(restored.as_ref()).unwrap();
        }
    }
}

#[test]
fn a_vm_of_a_host_without_anything_installed_is_backed_up() {
    let lab = Lab::new();
    let listed = SourceSpec::parse(&lab.url("")).unwrap().open(&lab.options()).unwrap();
    let vms = listed.hypervisor.list().unwrap();
    assert_eq!((vms.len(), vms[0].name.as_str(), vms[0].disks), (1, "Büro & Co", 2));
    let config = lab.open().hypervisor.describe("Büro & Co").unwrap();
    assert_eq!(config.disks.len(), 2);

    let first = lab.backup();
    assert_eq!((first.level, first.vm.as_str()), (Level::Full, "Büro & Co"));
    assert_eq!(first.consistency, "app");
    lab.compare(&first);

    lab.world.write(lab.vm, 1, 30 * MIB, &pattern(3, 300_000));
    let second = lab.backup();
    assert_eq!(second.level, Level::Incremental);
    assert!(second.disks.iter().all(|disk| disk.tracking.used), "{:?}", second.disks);
    assert_eq!(second.disks[0].counts.read_bytes, 0);
    let read = second.disks[1].counts.read_bytes;
    assert!((300_000..=(300_000 + 2 * 65536)).contains(&read), "{read}");
    lab.compare(&second);
    lab.world.settle();
    let left = lab.world.leftovers();
    assert!(left.recovery_snapshots.is_empty() && left.unmerged_files.is_empty(), "{left:?}");
}

#[test]
fn what_is_wrong_at_a_host_is_told_apart() {
    let lab = Lab::new();
    let asked = |url: &str, options: &SourceOptions| {
        let source = SourceSpec::parse(url).unwrap().open(options)?;
        source.hypervisor.describe("Büro & Co").map(drop).map_err(EngineError::from)
    };
    let with = |user: &str, password: &str| {
        let mut options = lab.options();
        let mut login = lab.samba.login();
        login.user = user.into();
        login.password = Zeroizing::new(password.into());
        options.hyperv.login = Some(login);
        options
    };
    let user = lab.samba.login().user;
    for options in [with(&user, "wrong"), with("nobody", "P4ssw0rd!")] {
        let error = asked(&lab.url("web"), &options).unwrap_err();
        let is_denied = matches!(error, EngineError::Hypervisor(HypervisorError::Denied { .. }));
        assert!(is_denied, "{error:?}");
        assert!(!error.to_string().contains("P4ssw0rd!"), "{error}");
    }
    let error = asked("hyperv+winrm://127.0.0.1:1/web", &lab.options()).unwrap_err();
    let is_down = matches!(error, EngineError::Hypervisor(HypervisorError::Unreachable { .. }));
    assert!(is_down, "{error:?}");

    let spec = SourceSpec::parse(&lab.url("B%C3%BCro & Co")).unwrap();
    let checks = check_source(&spec, &lab.options());
    let failed: Vec<_> = checks.iter().filter(|check| check.status == CheckStatus::Fail).collect();
    assert!(failed.is_empty(), "{failed:?}");
    assert!(checks.iter().any(|check| check.name == "host"), "{checks:?}");
    let checks = check_source(&spec, &with(&user, "wrong"));
    assert!(checks.iter().any(|check| check.status == CheckStatus::Fail), "{checks:?}");
}
