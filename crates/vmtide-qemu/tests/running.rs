//! Full and incremental backups of a running VM, against what its guest wrote.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "outside of test functions too, a failure here is a failed test"
)]

use crate::support::{Guest, KIB, LINEAGE, MIB, OTHER_LINEAGE, Store, Vm, ranges_of, reason_of};
use serde_json::json;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};
use vmtide_block::ByteRange;
use vmtide_hypervisor::{
    Changes, DiskBus, DiskId, Firmware, FullReason, Hypervisor, HypervisorError,
};
use vmtide_qemu::{FreezeMethod, QemuVm};

const BOTH: [FreezeMethod; 2] = [FreezeMethod::Filter, FreezeMethod::Job];

fn vm_with(vm: &Vm, method: FreezeMethod) -> QemuVm {
    let mut target = vm.target();
    target.method = method;
    QemuVm::new(target)
}

#[test]
fn the_configuration_is_described() {
    let extra = [
        "-netdev",
        "user,id=net0",
        "-device",
        "virtio-net-pci,netdev=net0,id=nic0,mac=52:54:00:AB:CD:EF",
        "-device",
        "scsi-cd,id=cd0,bus=scsi.0",
    ];
    let vm = Vm::start_with(&[("qcow2", 8 * MIB), ("raw", 4 * MIB)], Guest::Idle, &extra);
    let hypervisor = vm.vm();
    let list = hypervisor.list().unwrap();
    assert_eq!((list[0].name.as_str(), list[0].disks), ("test-vm", 2));
    let config = hypervisor.describe("anything").unwrap();
    assert_eq!(config.memory_bytes, Some(32 * MIB));
    assert_eq!(config.processors, Some(1));
    assert_eq!(config.firmware, Some(Firmware::Bios));
    assert!(config.machine.as_ref().unwrap().contains("q35"), "{config:?}");
    assert_eq!(config.disks[0].id, DiskId("vd0".into()));
    assert_eq!(config.disks[0].bus, DiskBus::VirtioBlk);
    assert_eq!(config.disks[0].serial.as_deref(), Some("SERIAL0"));
    assert_eq!(config.disks[0].boot_index, Some(0));
    assert_eq!(config.disks[1].bus, DiskBus::Scsi);
    assert_eq!(config.disks[1].size_bytes, 4 * MIB);
    assert_eq!(config.network_adapters.len(), 1);
    assert_eq!(config.network_adapters[0].mac.as_deref(), Some("52:54:00:ab:cd:ef"));
    assert!(config.native.iter().any(|file| file.name == "query-block.json"));
}

#[test]
fn incrementals_are_exact_and_writes_during_the_backup_stay_out() {
    for method in BOTH {
        let mut vm = Vm::start(&[("qcow2", 16 * MIB), ("raw", 8 * MIB), ("qcow2", 4 * MIB)]);
        let hypervisor = vm_with(&vm, method);
        vm.write(0, 0, 3 * MIB, 1);
        vm.write(1, 5 * MIB + 512, 100 * KIB, 2);
        let mut store = Store::new(LINEAGE);
        for disk in store.backup(&hypervisor) {
            assert_eq!(reason_of(&disk), FullReason::FirstBackup);
        }
        store.assert_equals(&vm.disks, &vm.models());
        vm.assert_clean();

        for round in 0..3u8 {
            (0..3).for_each(|disk| drop(vm.take_written(disk)));
            vm.write(0, 64 * KIB * u64::from(round) + 512, 1024, 10 + round);
            vm.write(0, 7 * MIB - 512, 1024, 20 + round);
            vm.zero(0, 1024 * KIB, 128 * KIB);
            vm.write(1, 3 * MIB, 64 * KIB, 30 + round);
            let expected: Vec<_> = (0..3).map(|disk| vm.take_written(disk)).collect();
            let models = vm.models();

            let frozen = hypervisor.freeze(&store.request()).unwrap();
            vm.write(0, 0, 2 * MIB, 99);
            vm.write(0, 7 * MIB, 512, 98);
            vm.write(1, 3 * MIB, MIB, 97);
            vm.zero(2, 0, 4 * MIB);
            let found: Vec<_> = frozen.disks().iter().map(|d| ranges_of(&d.changes)).collect();
            assert_eq!(found, expected, "{method:?} round {round}");
            let next = store.read(&*frozen);
            next.assert_equals(&vm.disks, &models);
            assert_eq!(frozen.commit().unwrap(), Vec::<String>::new());
            store = next;
            vm.assert_clean();
            // The base is gone, the new one stays.
            assert_eq!(vm.tracking().iter().map(Vec::len).collect::<Vec<_>>(), [1, 1, 1]);
            store.backup(&hypervisor);
            store.assert_equals(&vm.disks, &vm.models());
        }
    }
}

#[test]
fn zeroed_ranges_are_changes_and_known_to_be_zero() {
    let mut vm = Vm::start(&[("qcow2", 8 * MIB)]);
    vm.write(0, 0, 4 * MIB, 7);
    let mut store = Store::new(LINEAGE);
    store.backup(&vm.vm());
    vm.zero(0, MIB, MIB);
    let frozen = vm.vm().freeze(&store.request()).unwrap();
    let disk = &frozen.disks()[0];
    let range = ByteRange::new(MIB, MIB);
    assert_eq!(ranges_of(&disk.changes).as_slice(), [range]);
    let extents = disk.device.extents(range).unwrap();
    assert!(extents.iter().all(|extent| extent.kind.reads_as_zero()), "{extents:?}");
    frozen.abort().unwrap();
}

/// Waits until the guest has written both disks again.
fn wait_for_writes(vm: &mut Vm) {
    let mut writes = || -> u64 {
        let disks = vm.monitor.run("query-blockstats", json!({}));
        let count = |disk: &serde_json::Value| disk["stats"]["wr_operations"].as_u64().unwrap();
        disks.as_array().unwrap().iter().map(count).sum()
    };
    let (enough, deadline) = (writes() + 4, Instant::now() + Duration::from_secs(60));
    while writes() < enough {
        assert!(Instant::now() < deadline, "the guest stands still");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn two_disks_show_one_moment_while_the_guest_writes() {
    for method in BOTH {
        let mut vm = Vm::start_with(&[("qcow2", MIB), ("raw", MIB)], Guest::Counting, &[]);
        let hypervisor = vm_with(&vm, method);
        let mut store = Store::new(LINEAGE);
        let mut last = 0;
        for _ in 0..8 {
            wait_for_writes(&mut vm);
            let frozen = hypervisor.freeze(&store.request()).unwrap();
            let next = store.read(&*frozen);
            let count = |disk: &str| {
                let image = &next.images[&DiskId(disk.into())];
                u32::from_le_bytes(image[512..516].try_into().unwrap())
            };
            let (first, second) = (count("ide0-hd0"), count("ide0-hd1"));
            // The guest writes the first disk, then the second, then counts on.
            assert!(
                first == second || first == second + 1,
                "{method:?}: disks at {first} and {second}"
            );
            assert!(first > last, "the guest stands still at {first}");
            last = first;
            frozen.commit().unwrap();
            store = next;
        }
        let pauses = vm.monitor.pauses();
        println!("{method:?}: the guest was paused for {pauses:?}");
        match method {
            FreezeMethod::Job => assert!(pauses.is_empty()),
            _ => assert_eq!(pauses.len(), 8),
        }
        assert!(pauses.iter().all(|pause| *pause < Duration::from_secs(20)));
        vm.assert_clean();
    }
}

#[test]
fn an_aborted_backup_loses_nothing() {
    for method in BOTH {
        let mut vm = Vm::start(&[("qcow2", 8 * MIB), ("raw", 4 * MIB)]);
        let hypervisor = vm_with(&vm, method);
        let mut store = Store::new(LINEAGE);
        store.backup(&hypervisor);
        let before = vm.tracking();
        (0..2).for_each(|disk| drop(vm.take_written(disk)));
        vm.write(0, 0, 512, 1);
        let frozen = hypervisor.freeze(&store.request()).unwrap();
        vm.write(0, MIB, 512, 2);
        vm.write(1, 0, 512, 3);
        frozen.abort().unwrap();
        vm.assert_clean();
        assert_eq!(vm.tracking(), before);
        vm.write(0, 2 * MIB, 512, 4);
        // Dropped without a word, which is an abort too.
        drop(hypervisor.freeze(&store.request()).unwrap());
        vm.assert_clean();
        assert_eq!(vm.tracking(), before);

        let expected: Vec<_> = (0..2).map(|disk| vm.take_written(disk)).collect();
        let changes = store.backup(&hypervisor);
        let found: Vec<_> = changes.iter().map(ranges_of).collect();
        assert_eq!(found, expected);
        store.assert_equals(&vm.disks, &vm.models());
    }
}

#[test]
fn two_lineages_do_not_disturb_each_other() {
    let mut vm = Vm::start(&[("qcow2", 8 * MIB)]);
    let hypervisor = vm.vm();
    let (mut nightly, mut hourly) = (Store::new(LINEAGE), Store::new(OTHER_LINEAGE));
    nightly.backup(&hypervisor);
    vm.write(0, 0, 512, 1);
    hourly.backup(&hypervisor);
    vm.write(0, MIB, 512, 2);
    let changes = hourly.backup(&hypervisor);
    assert_eq!(ranges_of(&changes[0]).as_slice(), [ByteRange::new(MIB, 64 * KIB)]);
    hourly.assert_equals(&vm.disks, &vm.models());
    let changes = nightly.backup(&hypervisor);
    assert_eq!(ranges_of(&changes[0]).total_bytes(), 128 * KIB);
    nightly.assert_equals(&vm.disks, &vm.models());
    assert_eq!(vm.tracking()[0].len(), 2);
    // A base of the other lineage is not believed.
    let mut stranger = nightly.clone();
    stranger.bases = hourly.bases.clone();
    let frozen = hypervisor.freeze(&stranger.request()).unwrap();
    let reason = reason_of(&frozen.disks()[0].changes);
    assert!(matches!(reason, FullReason::TrackingLost(_)), "{reason}");
    frozen.abort().unwrap();
    vm.assert_clean();
}

#[test]
fn tracking_survives_a_restart_where_the_image_can_hold_it() {
    let mut vm = Vm::start(&[("qcow2", 8 * MIB), ("raw", 4 * MIB)]);
    let mut store = Store::new(LINEAGE);
    store.backup(&vm.vm());
    vm.write(0, 0, 512, 1);
    vm.write(1, 0, 512, 1);
    vm.stop(false);
    vm.start_again();
    vm.write(0, 4 * MIB, 512, 2);
    let changes = store.backup(&vm.vm());
    assert_eq!(
        ranges_of(&changes[0]).as_slice(),
        [ByteRange::new(0, 64 * KIB), ByteRange::new(4 * MIB, 64 * KIB)]
    );
    let reason = reason_of(&changes[1]);
    assert!(
        matches!(&reason, FullReason::TrackingLost(text) if text.contains("memory")),
        "{reason}"
    );
    store.assert_equals(&vm.disks, &vm.models());
    vm.assert_clean();
}

#[test]
fn a_crash_of_qemu_costs_one_full_read_and_leaves_no_broken_bitmap() {
    let mut vm = Vm::start(&[("qcow2", 8 * MIB), ("qcow2", 4 * MIB)]);
    let mut store = Store::new(LINEAGE);
    store.backup(&vm.vm());
    // Only bitmaps that were saved once can be inconsistent.
    vm.stop(false);
    vm.start_again();
    vm.write(0, 0, 512, 1);
    vm.flush(0);
    vm.stop(true);
    vm.start_again();
    let changes = store.backup(&vm.vm());
    let reason = reason_of(&changes[0]);
    assert!(matches!(reason, FullReason::TrackingInconsistent(_)), "{reason}");
    assert!(reason.is_loss());
    store.assert_equals(&vm.disks, &vm.models());
    assert_eq!(vm.tracking()[0].len(), 1);
    vm.write(0, MIB, 512, 2);
    let changes = store.backup(&vm.vm());
    assert_eq!(ranges_of(&changes[0]).total_bytes(), 64 * KIB);
    store.assert_equals(&vm.disks, &vm.models());
    vm.assert_clean();
}

#[test]
fn doubt_about_one_disk_is_a_full_read_of_that_disk_only() {
    let mut vm = Vm::start(&[("qcow2", 8 * MIB), ("raw", 4 * MIB), ("qcow2", 4 * MIB)]);
    let mut store = Store::new(LINEAGE);
    store.backup(&vm.vm());
    // Resized.
    vm.monitor.run("block_resize", json!({"node-name": "node0", "size": 9 * MIB}));
    vm.disks[0].model.resize(9 << 20, 0);
    vm.write(0, 9 * MIB - 512, 512, 5);
    // Removed.
    let bitmap = vm.tracking()[2][0].clone();
    vm.monitor.run("block-dirty-bitmap-remove", json!({"node": "drive2", "name": bitmap}));
    vm.write(1, 0, 512, 6);
    let changes = store.backup(&vm.vm());
    assert_eq!(
        reason_of(&changes[0]),
        FullReason::Resized { from_bytes: 8 * MIB, to_bytes: 9 * MIB }
    );
    assert_eq!(ranges_of(&changes[1]).total_bytes(), 64 * KIB);
    let reason = reason_of(&changes[2]);
    assert!(matches!(reason, FullReason::TrackingLost(_)), "{reason}");
    store.assert_equals(&vm.disks, &vm.models());

    // Switched off, and made anew with another granularity under the same name.
    let names = vm.tracking();
    vm.monitor.run("block-dirty-bitmap-disable", json!({"node": "drive2", "name": names[2][0]}));
    vm.monitor.run("block-dirty-bitmap-remove", json!({"node": "drive1", "name": names[1][0]}));
    vm.monitor.run(
        "block-dirty-bitmap-add",
        json!({"node": "drive1", "name": names[1][0], "granularity": 32768}),
    );
    let mut untracked = store.clone();
    untracked.bases.get_mut(&DiskId("vd0".into())).unwrap().tracking = None;
    let frozen = vm.vm().freeze(&untracked.request()).unwrap();
    let reasons: Vec<_> = frozen.disks().iter().map(|d| reason_of(&d.changes)).collect();
    assert_eq!(reasons[0], FullReason::NoTrackingId);
    assert!(matches!(reasons[1], FullReason::TrackingLost(_)), "{}", reasons[1]);
    assert!(matches!(&reasons[2], FullReason::TrackingLost(text) if text.contains("off")));
    frozen.abort().unwrap();
    vm.assert_clean();
}

#[test]
fn disks_that_changed_places_are_read_in_full() {
    let mut vm = Vm::start(&[("qcow2", 4 * MIB), ("qcow2", 4 * MIB)]);
    vm.write(0, 0, MIB, 1);
    vm.write(1, MIB, MIB, 2);
    let mut store = Store::new(LINEAGE);
    store.backup(&vm.vm());
    vm.write(0, 2 * MIB, 512, 3);
    vm.stop(false);
    let (first, second) = vm.disks.split_at_mut(1);
    std::mem::swap(&mut first[0].path, &mut second[0].path);
    std::mem::swap(&mut first[0].model, &mut second[0].model);
    vm.start_again();
    vm.write(1, 3 * MIB, 512, 4);
    for changes in store.backup(&vm.vm()) {
        let reason = reason_of(&changes);
        assert!(matches!(reason, FullReason::DiskReplaced(_)), "{reason}");
    }
    store.assert_equals(&vm.disks, &vm.models());
    assert_eq!(vm.tracking().iter().map(Vec::len).collect::<Vec<_>>(), [1, 1]);
    vm.write(0, 0, 512, 5);
    let changes = store.backup(&vm.vm());
    let changed: Vec<_> = changes.iter().map(|disk| ranges_of(disk).total_bytes()).collect();
    assert_eq!(changed, [64 * KIB, 0]);
    store.assert_equals(&vm.disks, &vm.models());
    vm.assert_clean();
}

#[test]
fn a_view_that_somebody_took_away_is_noticed_before_the_commit() {
    for method in BOTH {
        let mut vm = Vm::start(&[("qcow2", 4 * MIB), ("raw", 4 * MIB)]);
        let hypervisor = vm_with(&vm, method);
        let frozen = hypervisor.freeze(&Store::new(LINEAGE).request()).unwrap();
        frozen.check().unwrap();
        vm.write(0, 0, MIB, 1);
        frozen.check().unwrap();
        match method {
            FreezeMethod::Job => {
                let jobs = vm.monitor.run("query-jobs", json!({}));
                assert_eq!(jobs.as_array().unwrap().len(), 2);
                vm.monitor.run("block-job-cancel", json!({"device": jobs[0]["id"], "force": true}));
                let deadline = Instant::now() + Duration::from_secs(60);
                while vm.monitor.run("query-jobs", json!({})).as_array().unwrap().len() == 2 {
                    assert!(Instant::now() < deadline, "the job does not end");
                }
            }
            _ => {
                // QEMU itself refuses to give the device its old node while the view is open.
                let device = "/machine/peripheral/vd0/virtio-backend";
                let data = json!({"path": device, "property": "drive", "value": "node0"});
                let refusal = vm.monitor.try_run("qom-set", data).unwrap_err();
                assert!(refusal.contains("Permission conflict"), "{refusal}");
                frozen.check().unwrap();
                vm.monitor.run("device_del", json!({"id": "vd1"}));
                let deadline = Instant::now() + Duration::from_secs(60);
                while vm.monitor.run("query-block", json!({})).to_string().contains("\"vd1\"") {
                    assert!(Instant::now() < deadline, "the device stays");
                }
            }
        }
        let error = frozen.check().unwrap_err().to_string();
        assert!(error.contains("frozen view of disk vd"), "{error}");
        frozen.abort().unwrap();
        vm.assert_clean();
    }
}

/// By the device's name a snapshot lands on top of our filter.
#[test]
fn an_external_snapshot_during_a_backup_keeps_its_writes() {
    let mut vm = Vm::start(&[("qcow2", 4 * MIB), ("qcow2", 4 * MIB)]);
    vm.write(1, 0, 2 * MIB, 1);
    let mut store = Store::new(LINEAGE);
    store.backup(&vm.vm());
    let frozen = vm.vm().freeze(&store.request()).unwrap();
    vm.write(1, 0, 64 * KIB, 2);
    let overlay = vm.path("overlay.qcow2");
    let data = json!({"device": "drive1", "snapshot-file": overlay, "format": "qcow2"});
    vm.monitor.run("blockdev-snapshot-sync", data);
    vm.write(1, MIB, 64 * KIB, 3);
    let error = frozen.check().unwrap_err().to_string();
    assert!(error.contains("disk vd1"), "{error}");
    frozen.abort().unwrap();
    vm.assert_clean();
    let block = vm.monitor.run("query-block", json!({})).to_string();
    assert!(block.contains("overlay.qcow2"), "{block}");
    vm.write(1, 3 * MIB, 64 * KIB, 4);
    let changes = store.backup(&vm.vm());
    assert!(ranges_of(&changes[0]).is_empty());
    assert!(matches!(reason_of(&changes[1]), FullReason::TrackingLost(_)));
    store.assert_equals(&vm.disks, &vm.models());
    vm.assert_clean();
    // The chain of files is as the snapshot made it.
    let original = vm.disks[1].path.clone();
    vm.stop(false);
    let info = crate::support::qemu_img(&["info", overlay.to_str().unwrap()]);
    assert!(info.contains(&format!("backing file: {}\n", original.display())), "{info}");
    let info = crate::support::qemu_img(&["check", overlay.to_str().unwrap()]);
    assert!(info.contains("No errors"), "{info}");
}

#[test]
fn excluded_disks_and_wrong_requests() {
    let mut vm = Vm::start(&[("qcow2", 4 * MIB), ("raw", 4 * MIB)]);
    let store = Store::new(LINEAGE);
    let mut request = store.request();
    request.exclude = vec![DiskId("vd1".into())];
    let frozen = vm.vm().freeze(&request).unwrap();
    assert_eq!(frozen.disks().len(), 1);
    assert_eq!(frozen.config().disks.len(), 1);
    // One job at a time.
    let busy = vm.vm().freeze(&store.request()).err().unwrap();
    assert!(matches!(busy, HypervisorError::Busy { .. }), "{busy}");
    assert_eq!(vm.vm().reap().unwrap().in_use.len(), 1);
    frozen.abort().unwrap();
    request.exclude.push(DiskId("vd0".into()));
    let error = vm.vm().freeze(&request).err().unwrap();
    assert!(matches!(error, HypervisorError::NotFound { .. }), "{error}");
    request.lineage = "X".into();
    assert!(vm.vm().freeze(&request).is_err());
    let mut cancelled = store.request();
    cancelled.cancel.cancel();
    assert!(vm.vm().freeze(&cancelled).is_err());
    cancelled = store.request();
    cancelled.consistency = vmtide_hypervisor::Consistency::Application;
    let error = vm.vm().freeze(&cancelled).err().unwrap();
    assert!(matches!(error, HypervisorError::ConsistencyNotReached { .. }), "{error}");
    vm.assert_clean();
}

#[test]
fn a_foreign_nbd_server_is_respected_and_named() {
    let mut vm = Vm::start(&[("qcow2", 4 * MIB), ("raw", 4 * MIB)]);
    let socket = vm.path("foreign.sock");
    vm.monitor.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}));
    vm.monitor
        .run("block-export-add", json!({"type": "nbd", "id": "theirs", "node-name": "node0"}));
    vm.monitor.run("blockdev-add", json!({"driver": "null-co", "node-name": "vmtide-backup"}));
    let error = vm.vm().freeze(&Store::new(LINEAGE).request()).err().unwrap();
    assert!(error.to_string().contains("one NBD server"), "{error}");
    assert_eq!(vm.vm().reap().unwrap().removed, Vec::<String>::new());
    let exports = vm.monitor.run("query-block-exports", json!({}));
    assert_eq!(exports[0]["id"], "theirs");
    assert!(std::os::unix::net::UnixStream::connect(&socket).is_ok());
    vm.monitor.run("block-export-del", json!({"id": "theirs", "mode": "hard"}));
    vm.monitor.run("blockdev-del", json!({"node-name": "vmtide-backup"}));
    vm.monitor.run("nbd-server-stop", json!({}));
    vm.assert_clean();
}

#[test]
fn qemu_dying_while_frozen_is_an_error_and_no_hang() {
    let mut vm = Vm::start(&[("qcow2", 8 * MIB), ("raw", 4 * MIB)]);
    vm.write(0, 0, MIB, 1);
    vm.flush(0);
    let mut store = Store::new(LINEAGE);
    store.backup(&vm.vm());
    let frozen = vm.vm().freeze(&store.request()).unwrap();
    vm.stop(true);
    let mut buffer = vec![0; 4096];
    let error = frozen.disks()[0].device.read_at(&mut buffer, 0).unwrap_err();
    assert!(matches!(error, vmtide_block::BlockError::Disconnected { .. }), "{error}");
    let error = frozen.commit().unwrap_err();
    assert!(matches!(error, HypervisorError::Unreachable { .. }), "{error}");
    let error = vm.vm().freeze(&store.request()).err().unwrap();
    assert!(matches!(error, HypervisorError::Unreachable { .. }), "{error}");
    vm.start_again();
    let changes = store.backup(&vm.vm());
    assert!(matches!(changes[0], Changes::Everything(_)));
    store.assert_equals(&vm.disks, &vm.models());
    vm.assert_clean();
}

#[test]
fn tracking_can_be_ended_for_one_lineage_or_all() {
    let mut vm = Vm::start(&[("qcow2", 4 * MIB), ("raw", 4 * MIB)]);
    Store::new(LINEAGE).backup(&vm.vm());
    Store::new(OTHER_LINEAGE).backup(&vm.vm());
    vm.monitor.run("block-dirty-bitmap-add", json!({"node": "node0", "name": "vmtide-theirs"}));
    assert_eq!(vm.vm().end_tracking(Some(LINEAGE)).unwrap().len(), 2);
    let left = vm.tracking();
    assert_eq!((left[0].len(), left[1].len()), (2, 1));
    assert!(left[1][0].contains(OTHER_LINEAGE));
    assert_eq!(vm.vm().end_tracking(None).unwrap().len(), 2);
    assert_eq!(vm.tracking(), [vec!["vmtide-theirs".to_owned()], Vec::new()]);
}

/// As an ordinary user QEMU can only be our own, and there is nothing to test.
#[test]
fn qemu_may_run_as_another_user() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    for method in BOTH {
        let guest = Guest::IdleAs(65534);
        let mut vm = Vm::start_with(&[("qcow2", 4 * MIB), ("raw", 4 * MIB)], guest, &[]);
        let private = tempfile::tempdir().unwrap();
        let only_us = std::fs::Permissions::from_mode(0o700);
        std::fs::set_permissions(private.path(), only_us).unwrap();
        let mut target = vm.target();
        target.method = method;
        target.state_directory = private.path().into();
        let mut store = Store::new(LINEAGE);
        vm.write(0, 0, MIB, 1);
        store.backup(&QemuVm::new(target.clone()));
        store.assert_equals(&vm.disks, &vm.models());
        vm.assert_clean();
        // A scratch directory that QEMU cannot enter is named.
        target.scratch_directory = None;
        let error = QemuVm::new(target).freeze(&store.request()).err().unwrap();
        assert!(matches!(error, HypervisorError::Denied { .. }), "{error}");
        assert!(error.to_string().contains("65534"), "{error}");
        vm.assert_clean();
    }
}
