//! A guest in QEMU as the VM of the stand-in host: data really changes while disks are frozen, and every backup shows one
//! moment of both disks.
//!
//! The guest has no operating system: a boot sector that counts, and writes each number to the one disk and then to the
//! other. QEMU has its disks over NBD from the stand-in, which writes them into the VHDX chain that stands at that moment.
//!
//! `cargo test -p vmtide-standin-hyperv-host --test guest -- --ignored` (needs qemu-system-x86_64).

#![cfg(unix)]
#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test with small disks, which fails where it panics"
)]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;
use vmtide_block::{BlockDevice, ByteRange, CancelToken, WritableBlockDevice};
use vmtide_hyperv::{Clock, Host, HostOptions, HypervHypervisor, HypervOptions};
use vmtide_hypervisor::{
    Base, Changes, Consistency, DiskId, FreezeRequest, Hypervisor, JobId, TrackingId,
};
use vmtide_nbd::{Export, NbdServer};
use vmtide_standin_hyperv_host::{VmSpec, World, WorldOptions};

/// The size of both disks in bytes.
const SIZE: u64 = 4 << 20;

/// Where the guest always writes its newest number, in bytes: sector 1.
const NEWEST: u64 = 512;

/// How long the guest may take to do what is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// The guest, for a processor in real mode. It counts, and writes each number by the BIOS (`int 0x13`, function 0x43) to
/// sector 1 of disk 0x80, then of disk 0x81, then to one of 64 sectors behind, on both.
///
/// ```text
///       cli; xor ax,ax; mov ds,ax; mov es,ax; mov ss,ax; mov sp,0x7c00; sti
/// next: inc dword [counter]; mov eax,[counter]; mov [0x7e00],eax
///       mov dword [lba],1;   call both
///       mov eax,[counter]; and eax,63; add eax,8; mov [lba],eax;  call both
///       jmp next
/// both: mov dl,0x80; call one; mov dl,0x81
/// one:  mov si,packet; mov ax,0x4300; int 0x13; ret
/// packet: db 16,0; dw 1,0x7e00,0;  lba: dd 0,0;  counter: dd 0
/// ```
const BOOT: [u8; 96] = [
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, 0xfb, 0x66, 0xff, 0x06,
    0x5b, 0x7c, 0x66, 0xa1, 0x5b, 0x7c, 0x66, 0xa3, 0x00, 0x7e, 0x66, 0xc7, 0x06, 0x53, 0x7c, 0x01,
    0x00, 0x00, 0x00, 0xe8, 0x15, 0x00, 0x66, 0xa1, 0x5b, 0x7c, 0x66, 0x83, 0xe0, 0x3f, 0x66, 0x83,
    0xc0, 0x08, 0x66, 0xa3, 0x53, 0x7c, 0xe8, 0x02, 0x00, 0xeb, 0xd2, 0xb2, 0x80, 0xe8, 0x02, 0x00,
    0xb2, 0x81, 0xbe, 0x4b, 0x7c, 0xb8, 0x00, 0x43, 0xcd, 0x13, 0xc3, 0x10, 0x00, 0x01, 0x00, 0x00,
    0x7e, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
];

/// A disk as the guest has it.
struct GuestDisk {
    world: World,
    vm: Uuid,
    disk: usize,
}

impl BlockDevice for GuestDisk {
    fn name(&self) -> String {
        format!("disk {} of the guest", self.disk)
    }
    fn size_bytes(&self) -> u64 {
        SIZE
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        buffer.copy_from_slice(&self.world.content(self.vm, self.disk).read(offset, buffer.len()));
        Ok(())
    }
}

impl WritableBlockDevice for GuestDisk {
    fn write_at(&self, data: &[u8], offset: u64) -> vmtide_block::Result<()> {
        self.world.write(self.vm, self.disk, offset, data);
        Ok(())
    }
    fn write_zeroes(&self, range: ByteRange) -> vmtide_block::Result<()> {
        self.write_at(&vec![0; range.length as usize], range.offset)
    }
    fn flush(&self) -> vmtide_block::Result<()> {
        Ok(())
    }
}

/// A machine that ends with the test.
struct Machine(Child);

impl Machine {
    fn start(socket: &Path) -> Self {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "tcg", "-nodefaults", "-display", "none", "-m", "32"]);
        for disk in 0..2 {
            let url = format!("nbd+unix:///disk{disk}?socket={}", socket.display());
            let drive = format!("file={url},format=raw,if=ide,index={disk},cache=none");
            command.args(["-drive", &drive]);
        }
        let started = command.stdin(Stdio::null()).spawn();
        Self(started.unwrap_or_else(|error| panic!("install qemu-system-x86: {error}")))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The stand-in's own time; the guest has the real one.
struct WorldClock(World);

impl Clock for WorldClock {
    fn now_ms(&self) -> u64 {
        self.0.now_ms()
    }
    fn sleep_ms(&self, ms: u64) {
        self.0.advance(ms);
    }
}

/// The number at the beginning of a sector.
fn number(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes[..4].try_into().unwrap())
}

fn newest(world: &World, vm: Uuid) -> u32 {
    number(&world.content(vm, 0).read(NEWEST, 4))
}

/// Waits until the guest has counted on by `more`.
fn let_it_count(world: &World, vm: Uuid, more: u32) {
    let (begun, at) = (Instant::now(), newest(world, vm));
    while newest(world, vm) < at + more {
        assert!(begun.elapsed() < PATIENCE, "the guest does not count");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A restore point: the disks with their tracking.
type Point = BTreeMap<DiskId, (Vec<u8>, Option<TrackingId>)>;

/// Backs the VM up; the restore point, and how many bytes were read.
fn backup(
    hypervisor: &HypervHypervisor,
    world: &World,
    vm: Uuid,
    base: Option<&Point>,
) -> (Point, u64) {
    let bases = base.into_iter().flatten().map(|(id, (bytes, tracking))| {
        (id.clone(), Base { tracking: tracking.clone(), size_bytes: bytes.len() as u64 })
    });
    let mut frozen = hypervisor
        .freeze(&FreezeRequest {
            vm: vm.to_string(),
            job: JobId::random(),
            lineage: "0123456789abcdef".into(),
            consistency: Consistency::Application,
            allow_downgrade: true,
            bases: bases.collect(),
            exclude: Vec::new(),
            cancel: CancelToken::new(),
        })
        .unwrap();
    let truth = world.frozen_at(vm);
    // It goes on while its disks are frozen.
    let_it_count(world, vm, 20);
    let (mut point, mut read) = (Point::new(), 0);
    for disk in frozen.disks() {
        let mut bytes = vec![0; SIZE as usize];
        let ranges = match &disk.changes {
            Changes::Everything(_) => vec![ByteRange::new(0, SIZE)],
            Changes::Ranges(ranges) => {
                bytes.clone_from(&base.unwrap()[&disk.id].0);
                ranges.iter().collect()
            }
        };
        for range in ranges {
            let part = &mut bytes[range.offset as usize..range.end() as usize];
            disk.device.read_at(part, range.offset).unwrap();
            read += range.length;
        }
        let location: u32 = disk.id.0.rsplit(':').next().unwrap().parse().unwrap();
        let written = truth[&location].read(0, SIZE as usize);
        assert!(bytes == written, "disk {} is not what the guest had written", disk.id);
        point.insert(disk.id.clone(), (bytes, None));
    }
    frozen.check().unwrap();
    for (id, tracking) in frozen.seal().unwrap().tracking {
        point.get_mut(&id).unwrap().1 = Some(tracking);
    }
    assert_eq!(frozen.commit().unwrap(), Vec::<String>::new());
    (point, read)
}

#[test]
#[ignore = "boots a machine in QEMU; the command is at the top of this file"]
fn a_guest_that_writes_is_backed_up_at_one_moment() {
    let directory = tempfile::tempdir().unwrap();
    let options = WorldOptions { granularity_bytes: 512, ..WorldOptions::default() };
    let world = World::new(directory.path().join("host"), options);
    let vm = world.add_vm(&VmSpec::new("counter", &[SIZE, SIZE]));
    let mut sector = [0; 512];
    sector[..BOOT.len()].copy_from_slice(&BOOT);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    world.write(vm, 0, 0, &sector);
    let export = |disk| {
        let device = Arc::new(GuestDisk { world: world.clone(), vm, disk });
        Export::writable(device).named(format!("disk{disk}"))
    };
    let socket = directory.path().join("nbd");
    let server = NbdServer::new().export(export(0)).export(export(1)).listen_unix(&socket).unwrap();
    let machine = Machine::start(&socket);
    let_it_count(&world, vm, 100);

    let clock = Arc::new(WorldClock(world.clone()));
    let host = Host::new(world.cim(), HostOptions { clock, ..HostOptions::default() });
    let state = HypervOptions::new(directory.path().join("state"));
    let hypervisor = HypervHypervisor::new(host, world.files(), state);
    let mut base: Option<Point> = None;
    let mut counted = 0;
    for round in 0..6 {
        let_it_count(&world, vm, 10);
        let (point, read) = backup(&hypervisor, &world, vm, base.as_ref());
        let numbers: Vec<u32> =
            point.values().map(|(bytes, _)| number(&bytes[NEWEST as usize..])).collect();
        // Each number is written to the first disk and then to the second.
        assert!(matches!(numbers[0] - numbers[1], 0 | 1), "round {round}: {numbers:?}");
        assert!(numbers[0] > counted, "round {round}: the guest stood still");
        counted = numbers[0];
        // It writes 65 sectors of each disk again and again.
        assert_eq!(round == 0, read > 2 * 65 * 512, "round {round}: {read} bytes");
        base = Some(point);
    }
    drop(machine);
    server.shutdown();
    world.settle();
    let left = world.leftovers();
    assert!(left.recovery_snapshots.is_empty() && left.unmerged_files.is_empty(), "{left:?}");
    println!("the guest counted to {}, the newest restore point has {counted}", newest(&world, vm));
}
