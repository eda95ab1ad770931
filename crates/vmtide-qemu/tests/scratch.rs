//! Scratch space that runs out hurts the backup and never the guest.
//!
//! Each test runs again inside a mount namespace of its own, where it may mount a small tmpfs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "outside of test functions too, a failure here is a failed test"
)]

use crate::support::{LINEAGE, MIB, Store, Vm, ranges_of};
use serde_json::json;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use vmtide_hypervisor::Hypervisor;
use vmtide_qemu::{FreezeMethod, QemuVm};

const INSIDE: &str = "VMTIDE_TEST_INSIDE_NAMESPACE";

/// Runs the test `name` again where it may mount. Answers whether this is that run.
fn inside_namespace(name: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let output = Command::new("unshare")
        .args(["--map-root-user", "--mount", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &format!("scratch::{name}"), "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("unshare is needed: install util-linux");
    assert!(
        output.status.success(),
        "{name} needs mount namespaces (unshare --map-root-user --mount): {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    false
}

fn mount(directory: &Path, size_bytes: u64) {
    std::fs::create_dir_all(directory).unwrap();
    let status = Command::new("mount")
        .args(["-t", "tmpfs", "-o", &format!("size={size_bytes}"), "tmpfs"])
        .arg(directory)
        .status()
        .unwrap();
    assert!(status.success(), "mount a tmpfs of {size_bytes} bytes");
}

fn fill(directory: &Path) {
    let mut file = std::fs::File::create(directory.join("ballast")).unwrap();
    while file.write_all(&[0xaa; 4096]).is_ok() {}
}

fn setup(method: FreezeMethod, scratch_bytes: u64, reserve_bytes: u64) -> (Vm, QemuVm) {
    let mut vm = Vm::start(&[("qcow2", 8 * MIB), ("raw", 4 * MIB)]);
    vm.write(0, 0, 8 * MIB, 1);
    vm.write(1, 0, 4 * MIB, 2);
    mount(&vm.path("scratch"), scratch_bytes);
    let mut target = vm.target();
    target.method = method;
    target.scratch_reserve_bytes = reserve_bytes;
    let hypervisor = QemuVm::new(target);
    (vm, hypervisor)
}

#[test]
fn a_full_scratch_disk_breaks_the_backup_and_not_the_guest() {
    if !inside_namespace("a_full_scratch_disk_breaks_the_backup_and_not_the_guest") {
        return;
    }
    let (mut vm, hypervisor) = setup(FreezeMethod::Filter, 2 * MIB, 0);
    let mut store = Store::new(LINEAGE);
    store.backup(&hypervisor);
    vm.take_written(0);
    let frozen = hypervisor.freeze(&store.request()).unwrap();
    // Each write is checked to have worked.
    for offset in (0..8).map(|number| number * MIB) {
        vm.write(0, offset, MIB, 9);
    }
    assert_eq!(vm.monitor.status(), "running");
    let mut buffer = vec![0; 4096];
    let disk = &frozen.disks()[0];
    assert!(disk.device.read_at(&mut buffer, 0).is_err(), "a broken view must not be readable");
    frozen.abort().unwrap();
    vm.assert_clean();
    let changes = store.backup(&hypervisor);
    assert_eq!(ranges_of(&changes[0]).total_bytes(), 8 * MIB);
    store.assert_equals(&vm.disks, &vm.models());
}

#[test]
fn the_job_method_reserves_its_scratch_space_or_refuses() {
    if !inside_namespace("the_job_method_reserves_its_scratch_space_or_refuses") {
        return;
    }
    let (mut vm, hypervisor) = setup(FreezeMethod::Job, 6 * MIB, 0);
    let error = hypervisor.freeze(&Store::new(LINEAGE).request()).err().unwrap();
    assert!(error.to_string().contains("reserve scratch space"), "{error}");
    vm.assert_clean();
    mount(&vm.path("scratch"), 24 * MIB);
    let mut store = Store::new(LINEAGE);
    store.backup(&hypervisor);
    let frozen = hypervisor.freeze(&store.request()).unwrap();
    let models = vm.models();
    fill(&vm.path("scratch"));
    vm.write(0, 0, 8 * MIB, 3);
    vm.write(1, 0, 4 * MIB, 4);
    assert_eq!(vm.monitor.status(), "running");
    let mut full = store.clone();
    full.bases.clear();
    let view = full.read(&*frozen);
    for (disk, (frozen_disk, model)) in vm.disks.iter().zip(frozen.disks().iter().zip(&models)) {
        let mut image = vec![0; model.len()];
        frozen_disk.device.read_at(&mut image, 0).unwrap();
        assert!(image == *model, "{} changed under the backup", disk.id);
    }
    view.assert_equals(&vm.disks, &models);
    std::fs::remove_file(vm.path("scratch/ballast")).unwrap();
    frozen.commit().unwrap();
    vm.assert_clean();
}

#[test]
fn the_reserve_stays_free_for_images_on_the_same_file_system() {
    if !inside_namespace("the_reserve_stays_free_for_images_on_the_same_file_system") {
        return;
    }
    let (mut vm, hypervisor) = setup(FreezeMethod::Filter, 8 * MIB, 6 * MIB);
    let mut store = Store::new(LINEAGE);
    store.backup(&hypervisor);
    let frozen = hypervisor.freeze(&store.request()).unwrap();
    vm.write(0, 0, 4 * MIB, 9);
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let nodes = vm.monitor.run("query-named-block-nodes", json!({"flat": true})).to_string();
        if !nodes.contains("vmtide-") || !nodes.contains("copy-before-write") {
            break;
        }
        assert!(Instant::now() < deadline, "the reserve was not defended");
        std::thread::sleep(Duration::from_millis(50));
    }
    vm.write(0, 0, 8 * MIB, 10);
    let mut buffer = vec![0; 4096];
    assert!(frozen.disks()[0].device.read_at(&mut buffer, 0).is_err());
    frozen.abort().unwrap();
    vm.assert_clean();
    store.backup(&hypervisor);
    store.assert_equals(&vm.disks, &vm.models());

    fill(&vm.path("scratch"));
    let error = hypervisor.freeze(&store.request()).err().unwrap();
    assert!(error.to_string().contains("must stay free"), "{error}");
    std::fs::remove_file(vm.path("scratch/ballast")).unwrap();
    vm.assert_clean();
}
