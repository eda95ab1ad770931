//! Powered-off VMs: the incremental chain goes on over them, and nothing is left running.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "outside of test functions too, a failure here is a failed test"
)]

use crate::support::{KIB, LINEAGE, MIB, OTHER_LINEAGE, Store, Vm, qemu_img, ranges_of, reason_of};
use std::path::Path;
use std::time::{Duration, Instant};
use vmtide_block::ByteRange;
use vmtide_hypervisor::{
    Changes, Consistency, DiskId, FrozenVm, FullReason, Hypervisor, HypervisorError, Result,
};
use vmtide_qemu::OfflineImage;

fn offline(vm: &Vm, disk: usize) -> OfflineImage {
    OfflineImage::new(&vm.disks[disk].path, vm.path("state"))
        .with_name("test-vm")
        .with_disk_id(DiskId(vm.disks[disk].id.clone()))
}

/// One whole backup of the image.
fn backup(store: &mut Store, image: &OfflineImage) -> Changes {
    let frozen = image.freeze(&store.request()).unwrap();
    let changes = frozen.disks()[0].changes.clone();
    *store = store.read(&*frozen);
    assert_eq!(frozen.commit().unwrap(), Vec::<String>::new());
    changes
}

fn bitmaps(path: &Path) -> Vec<String> {
    let info = qemu_img(&["info", "--output=json", path.to_str().unwrap()]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let list = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
    list.iter().map(|bitmap| bitmap["name"].as_str().unwrap().to_owned()).collect()
}

/// Only locks and the empty journal are left, and no server of ours.
fn assert_clean(vm: &Vm) {
    for directory in ["state", "state/journal"] {
        for item in std::fs::read_dir(vm.path(directory)).unwrap() {
            let name = item.unwrap().file_name().into_string().unwrap();
            assert!(["locks", "journal"].contains(&name.as_str()), "{directory}/{name} is left");
        }
    }
    let own = vm.path("state").display().to_string();
    assert!(!servers().iter().any(|line| line.contains(&own)), "a server is left");
}

fn servers() -> Vec<String> {
    let mut lines = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        if let Ok(line) = std::fs::read(entry.path().join("cmdline")) {
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if line.starts_with("qemu-nbd") {
                lines.push(line);
            }
        }
    }
    lines
}

#[test]
fn the_chain_goes_on_while_the_vm_is_off_and_on_again() {
    let mut vm = Vm::start(&[("qcow2", 8 * MIB)]);
    let mut store = Store::new(LINEAGE);
    vm.write(0, 0, MIB, 1);
    store.backup(&vm.vm());
    vm.write(0, 2 * MIB, 512, 2);
    vm.stop(false);

    let image = offline(&vm, 0);
    let changes = backup(&mut store, &image);
    assert_eq!(ranges_of(&changes).as_slice(), [ByteRange::new(2 * MIB, 64 * KIB)]);
    store.assert_equals(&vm.disks, &vm.models());
    assert_eq!(bitmaps(&vm.disks[0].path).len(), 1);
    assert_clean(&vm);
    // Nothing changed since.
    let changes = backup(&mut store, &image);
    assert!(ranges_of(&changes).is_empty());

    vm.start_again();
    vm.write(0, 4 * MIB, 512, 3);
    let changes = store.backup(&vm.vm());
    assert_eq!(ranges_of(&changes[0]).as_slice(), [ByteRange::new(4 * MIB, 64 * KIB)]);
    store.assert_equals(&vm.disks, &vm.models());
    vm.assert_clean();
}

#[test]
fn a_first_backup_offline_starts_the_tracking() {
    let mut vm = Vm::start(&[("qcow2", 4 * MIB)]);
    vm.write(0, 0, MIB, 1);
    vm.stop(false);
    let image = offline(&vm, 0);
    let config = image.describe("").unwrap();
    assert_eq!((config.name.as_str(), config.disks[0].size_bytes), ("test-vm", 4 * MIB));
    assert_eq!(image.list().unwrap()[0].state, "shut off");
    let (mut store, mut other) = (Store::new(LINEAGE), Store::new(OTHER_LINEAGE));
    assert_eq!(reason_of(&backup(&mut store, &image)), FullReason::FirstBackup);
    backup(&mut other, &image);
    assert_eq!(bitmaps(&vm.disks[0].path).len(), 2);
    vm.start_again();
    vm.write(0, 3 * MIB, 512, 4);
    for store in [&mut store, &mut other] {
        let changes = store.backup(&vm.vm());
        assert_eq!(ranges_of(&changes[0]).total_bytes(), 64 * KIB);
        store.assert_equals(&vm.disks, &vm.models());
    }
}

#[test]
fn an_abort_and_a_drop_lose_nothing() {
    let mut vm = Vm::start(&[("qcow2", 4 * MIB)]);
    let mut store = Store::new(LINEAGE);
    store.backup(&vm.vm());
    vm.write(0, MIB, 512, 1);
    vm.stop(false);
    let before = bitmaps(&vm.disks[0].path);
    let image = offline(&vm, 0);
    image.freeze(&store.request()).unwrap().abort().unwrap();
    assert_eq!(bitmaps(&vm.disks[0].path), before);
    let frozen = image.freeze(&store.request()).unwrap();
    // A reader that is still there does not keep the image locked.
    let reader = std::sync::Arc::clone(&frozen.disks()[0].device);
    drop(frozen);
    assert!(reader.read_at(&mut [0; 512], 0).is_err());
    assert_eq!(bitmaps(&vm.disks[0].path), before);
    assert_clean(&vm);
    assert_eq!(ranges_of(&backup(&mut store, &image)).total_bytes(), 64 * KIB);
    store.assert_equals(&vm.disks, &vm.models());
}

#[test]
fn a_running_vm_is_refused_with_the_way_out() {
    let vm = Vm::start(&[("qcow2", 4 * MIB)]);
    let refuse = |outcome: Result<Box<dyn FrozenVm>>| {
        let error = outcome.err().unwrap();
        assert!(matches!(error, HypervisorError::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains("qemu+unix://"), "{error}");
    };
    refuse(offline(&vm, 0).freeze(&Store::new(LINEAGE).request()));
    let error = offline(&vm, 0).list().unwrap_err();
    assert!(error.to_string().contains("qemu+unix://"), "{error}");
    let gone = OfflineImage::new(vm.path("gone.qcow2"), vm.path("state"));
    let error = gone.freeze(&Store::new(LINEAGE).request()).err().unwrap();
    assert!(matches!(error, HypervisorError::NotFound { .. }), "{error}");
}

#[test]
fn images_without_trustworthy_bitmaps_are_read_in_full() {
    let mut vm = Vm::start(&[("qcow2", 4 * MIB), ("raw", 4 * MIB)]);
    let mut store = Store::new(LINEAGE);
    store.backup(&vm.vm());
    vm.stop(false);
    vm.start_again();
    vm.write(0, 0, 512, 1);
    vm.write(1, 0, 512, 2);
    vm.flush(0);
    vm.stop(true);
    let mut first = store.clone();
    let reason = reason_of(&backup(&mut first, &offline(&vm, 0)));
    assert!(matches!(reason, FullReason::TrackingInconsistent(_)), "{reason}");
    assert_eq!(bitmaps(&vm.disks[0].path).len(), 1);
    let mut second = store.clone();
    let raw = offline(&vm, 1).with_format("raw");
    let reason = reason_of(&backup(&mut second, &raw));
    assert!(matches!(reason, FullReason::NoTracking(_)), "{reason}");
    assert_eq!(second.bases[&DiskId("vd1".into())].tracking, None);
    first.assert_equals(&vm.disks[..1], &vm.models()[..1]);
    second.assert_equals(&vm.disks[1..], &vm.models()[1..]);
    let mut request = store.request();
    request.consistency = Consistency::FileSystem;
    let error = raw.freeze(&request).err().unwrap();
    assert!(error.to_string().contains("powered off"), "{error}");
    assert_clean(&vm);
}

const JOB: &str = "VMTIDE_TEST_OFFLINE_JOB";

/// Not a test: a job that holds an image until it is killed.
#[test]
fn job_process() {
    if let Ok(text) = std::env::var(JOB) {
        let job: serde_json::Value = serde_json::from_str(&text).unwrap();
        let image =
            OfflineImage::new(job["image"].as_str().unwrap(), job["state"].as_str().unwrap())
                .with_disk_id(DiskId("vd0".into()));
        let _frozen = image.freeze(&Store::new(LINEAGE).request()).unwrap();
        println!("\nheld");
        std::thread::sleep(Duration::from_secs(60));
    }
}

#[test]
fn a_killed_job_takes_its_server_along() {
    use std::io::{BufRead, BufReader};
    let mut vm = Vm::start(&[("qcow2", 4 * MIB)]);
    let mut store = Store::new(LINEAGE);
    store.backup(&vm.vm());
    vm.write(0, 0, 512, 7);
    vm.stop(false);
    let image = offline(&vm, 0);
    let job = serde_json::json!({"image": vm.disks[0].path, "state": vm.path("state")});
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "offline::job_process", "--nocapture"])
        .env(JOB, job.to_string())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "held"));
    let error = image.freeze(&store.request()).err().unwrap();
    assert!(matches!(error, HypervisorError::Busy { .. }), "{error}");
    assert_eq!(image.reap().unwrap().in_use.len(), 1);
    let own = vm.path("state").display().to_string();
    assert!(servers().iter().any(|line| line.contains(&own)));
    child.kill().unwrap();
    child.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while servers().iter().any(|line| line.contains(&own)) {
        assert!(Instant::now() < deadline, "the server outlives its job");
        std::thread::sleep(Duration::from_millis(20));
    }
    // The killed job's bitmap is of no use and goes with the next backup.
    assert_eq!(bitmaps(&vm.disks[0].path).len(), 2);
    assert!(!image.reap().unwrap().removed.is_empty());
    assert_eq!(ranges_of(&backup(&mut store, &image)).total_bytes(), 64 * KIB);
    store.assert_equals(&vm.disks, &vm.models());
    assert_eq!(bitmaps(&vm.disks[0].path).len(), 1);
    assert_clean(&vm);
}
