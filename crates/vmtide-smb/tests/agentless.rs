//! A VM backed up with nothing installed on its host: control from the stand-in host, disks from a real Samba that serves
//! the stand-in's files.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use support::{Samba, pattern};
use uuid::Uuid;
use vmtide_block::{BlockDevice, CancelToken, MemoryDevice, WritableBlockDevice};
use vmtide_hyperv::{Clock, Host, HostOptions, HypervHypervisor, HypervOptions};
use vmtide_hypervisor::{
    Base, Changes, Consistency, DiskId, FreezeRequest, FrozenDisk, FrozenVm, Hypervisor, JobId,
    TrackingId,
};
use vmtide_smb::{Mapping, PathMap, SmbClient, SmbFiles};
use vmtide_standin_hyperv_host::{VmSpec, World, WorldOptions};

const MIB: u64 = 1 << 20;

/// The host's own time: waiting lets it go on.
struct WorldClock(World);

impl Clock for WorldClock {
    fn now_ms(&self) -> u64 {
        self.0.now_ms()
    }
    fn sleep_ms(&self, ms: u64) {
        self.0.advance(ms);
    }
}

/// A host whose `C:` is a share, and a VM on it.
struct Bench {
    _samba: Samba,
    _state: tempfile::TempDir,
    world: World,
    vm: Uuid,
    client: Arc<SmbClient>,
    hypervisor: HypervHypervisor,
}

impl Bench {
    fn new(disks: &[u64]) -> Self {
        let samba = Samba::start();
        let state = tempfile::tempdir().unwrap();
        let world = World::new(samba.path("vms"), WorldOptions::default());
        let vm = world.add_vm(&VmSpec::new("web", disks));
        let clock = Arc::new(WorldClock(world.clone()));
        let host = Host::new(world.cim(), HostOptions { clock, ..HostOptions::default() });
        let mut map = PathMap::new("127.0.0.1");
        map.mappings.push(r"C:=\\127.0.0.1\vms\C".parse::<Mapping>().unwrap());
        let client = samba.client();
        let asked = host.clone();
        let ask = Arc::new(move |path: &str, id: &str, range| {
            asked.virtual_disk_changes(path, id, range)
        });
        let files = Arc::new(SmbFiles::new(client.clone(), map, ask));
        let hypervisor =
            HypervHypervisor::new(host, files, HypervOptions::new(state.path().join("state")));
        Self { _samba: samba, _state: state, world, vm, client, hypervisor }
    }

    fn freeze(&self, bases: BTreeMap<DiskId, Base>) -> Box<dyn FrozenVm> {
        let request = FreezeRequest {
            vm: "web".into(),
            job: JobId::random(),
            lineage: "0123456789abcdef".into(),
            consistency: Consistency::Application,
            allow_downgrade: false,
            bases,
            exclude: Vec::new(),
            cancel: CancelToken::new(),
        };
        self.hypervisor.freeze(&request).unwrap()
    }
}

/// Brings a copy up to a frozen disk by what is said to have changed; answers with the bytes that were read.
fn apply(copy: &MemoryDevice, disk: &FrozenDisk) -> u64 {
    let whole = vmtide_block::ByteRange::new(0, disk.device.size_bytes());
    let ranges: Vec<_> = match &disk.changes {
        Changes::Everything(_) => vec![whole],
        Changes::Ranges(ranges) => ranges.iter().collect(),
    };
    let mut read = 0;
    for range in ranges {
        let mut at = range.offset;
        while at < range.end() {
            let mut piece = vec![0; usize::try_from((range.end() - at).min(MIB)).unwrap()];
            disk.device.read_at(&mut piece, at).unwrap();
            copy.write_at(&piece, at).unwrap();
            read += piece.len() as u64;
            at += piece.len() as u64;
        }
    }
    read
}

/// Ends a backup as a job does; answers with the bases of the next.
fn end(mut frozen: Box<dyn FrozenVm>) -> BTreeMap<DiskId, Base> {
    frozen.check().unwrap();
    let sizes: Vec<_> =
        frozen.disks().iter().map(|disk| (disk.id.clone(), disk.device.size_bytes())).collect();
    let sealed = frozen.seal().unwrap();
    let base = |(id, size_bytes): (DiskId, u64)| {
        let tracking: Option<TrackingId> = sealed.tracking.get(&id).cloned();
        assert!(tracking.is_some(), "{id} has no tracking id: {:?}", sealed.warnings);
        (id, Base { tracking, size_bytes })
    };
    let bases = sizes.into_iter().map(base).collect();
    let left = frozen.commit().unwrap();
    assert!(left.is_empty(), "{left:?}");
    bases
}

#[test]
fn a_vm_is_backed_up_in_full_and_then_by_what_changed() {
    let bench = Bench::new(&[48 * MIB, 96 * MIB]);
    for (disk, seed) in [(0, 1), (1, 2)] {
        bench.world.write(bench.vm, disk, 3 * MIB + 512, &pattern(seed, 20 << 20));
    }
    let copies = [MemoryDevice::new(48 << 20), MemoryDevice::new(96 << 20)];
    let compare = |bench: &Bench, frozen: &dyn FrozenVm| {
        // The guest goes on while the disks are read.
        bench.world.write(bench.vm, 0, 5 * MIB, &pattern(9, 1 << 20));
        let wanted = bench.world.frozen_content(bench.vm).unwrap();
        let mut read = 0;
        for (number, (copy, disk)) in copies.iter().zip(frozen.disks()).enumerate() {
            read += apply(copy, disk);
            wanted[&bench.world.disk_id(bench.vm, number)].compare(copy).unwrap();
        }
        read
    };
    let frozen = bench.freeze(BTreeMap::new());
    assert_eq!(frozen.consistency(), Consistency::Application);
    assert_eq!(compare(&bench, &*frozen), 144 * MIB);
    let bases = end(frozen);

    // 128 pieces of 64 KiB, spread.
    let changed = 128 * (64 << 10);
    for number in 0..128u64 {
        let at = 24 * MIB + number * 131 % 128 * (512 << 10);
        bench.world.write(bench.vm, 1, at, &pattern(number, 64 << 10));
    }
    let before = bench.client.traffic();
    let frozen = bench.freeze(bases);
    for disk in frozen.disks() {
        assert!(matches!(disk.changes, Changes::Ranges(_)), "{}: {:?}", disk.id, disk.changes);
    }
    let opened = bench.client.traffic().received_bytes - before.received_bytes;
    let read = compare(&bench, &*frozen);
    let received = bench.client.traffic().received_bytes - before.received_bytes;
    // What the guest wrote while the first backup was read has changed, too.
    let wanted = changed + MIB;
    assert!(read >= wanted && read * 10 <= wanted * 11, "{read} read for {wanted}");
    let data = received - opened;
    assert!(data * 10 <= wanted * 11, "{data} received for {wanted}, and {opened} of metadata");
    assert!(opened < 8 * MIB, "{opened} bytes of metadata");
    end(frozen);

    let left = bench.world.leftovers();
    assert!(left.recovery_snapshots.is_empty(), "{left:?}");
    assert_eq!(left.reference_points.len(), 1, "{left:?}");
    bench.world.settle();
    assert!(bench.world.leftovers().unmerged_files.is_empty());
}

#[test]
fn a_backup_that_is_given_up_leaves_nothing() {
    let bench = Bench::new(&[16 * MIB]);
    bench.world.write(bench.vm, 0, 0, &pattern(1, 4 << 20));
    let frozen = bench.freeze(BTreeMap::new());
    let mut piece = [0; 4096];
    frozen.disks()[0].device.read_at(&mut piece, MIB).unwrap();
    frozen.abort().unwrap();
    bench.world.settle();
    let left = bench.world.leftovers();
    assert!(left.recovery_snapshots.is_empty() && left.reference_points.is_empty(), "{left:?}");
    assert!(left.unmerged_files.is_empty(), "{left:?}");
}
