//! A real QEMU with a guest that does nothing, whose disks are written through a second monitor,
//! and the model of what those disks must hold.

#![allow(dead_code, reason = "each test file uses its own part of the support")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "outside of test functions too, a failure here is a failed test"
)]

pub mod agent;
pub mod proxy;

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vmtide_block::{BlockDevice, ByteRange, CancelToken, RangeSet, for_each_extent};
use vmtide_hypervisor::{
    Base, Changes, Consistency, DiskId, FreezeRequest, FrozenVm, FullReason, JobId, TrackingId,
};
use vmtide_qemu::{QemuTarget, QemuVm};

pub const KIB: u64 = 1024;
pub const MIB: u64 = 1024 * KIB;
pub const LINEAGE: &str = "00000000000000aa";
pub const OTHER_LINEAGE: &str = "00000000000000bb";

/// `cli; hlt; jmp -3` at the reset vector: a guest that costs no processor time.
const IDLE: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];

/// Writes a rising counter to sector 1 of both IDE disks of the first channel in turn, by
/// programmed input and output; assembled from:
/// `cli; xor ecx,ecx; next: inc ecx; mov bl,0xe0; call write; mov bl,0xf0; call write; jmp next;`
/// `write:` select drive `bl`, wait for BSY to clear, one sector at LBA 1, command 0x30, wait for
/// DRQ, 128 times the counter, wait for BSY to clear, `ret`.
const COUNTING: [u8; 88] = [
    0xfa, 0x66, 0x31, 0xc9, 0x66, 0x41, 0xb3, 0xe0, 0xe8, 0x07, 0x00, 0xb3, 0xf0, 0xe8, 0x02, 0x00,
    0xeb, 0xf2, 0xba, 0xf6, 0x01, 0x88, 0xd8, 0xee, 0xe8, 0x34, 0x00, 0xba, 0xf2, 0x01, 0xb0, 0x01,
    0xee, 0x42, 0xee, 0x42, 0x30, 0xc0, 0xee, 0x42, 0xee, 0xba, 0xf7, 0x01, 0xb0, 0x30, 0xee, 0xec,
    0xa8, 0x80, 0x75, 0xfb, 0xa8, 0x08, 0x74, 0xf7, 0xba, 0xf0, 0x01, 0xbe, 0x80, 0x00, 0x89, 0xc8,
    0xef, 0x66, 0x89, 0xc8, 0x66, 0xc1, 0xe8, 0x10, 0xef, 0x4e, 0x75, 0xf2, 0xba, 0xf7, 0x01, 0xba,
    0xf7, 0x01, 0xec, 0xa8, 0x80, 0x75, 0xfb, 0xc3,
];

/// What the guest does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    Idle,
    /// Needs exactly two disks, as IDE.
    Counting,
    /// Idle, and QEMU runs as this user, who owns the VM's directory. Needs root.
    IdleAs(u32),
}

/// A monitor of our own, for playing the guest and looking at what is left.
pub struct Monitor {
    reader: BufReader<UnixStream>,
    /// The events seen so far.
    pub events: Vec<Value>,
}

impl Monitor {
    pub fn connect(path: &Path) -> Self {
        let deadline = Instant::now() + Duration::from_secs(60);
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => assert!(
                    Instant::now() < deadline,
                    "{}: {error}; is qemu-system-x86 installed?",
                    path.display()
                ),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut monitor = Self { reader: BufReader::new(stream), events: Vec::new() };
        let mut greeting = String::new();
        monitor.reader.read_line(&mut greeting).unwrap();
        monitor.run("qmp_capabilities", json!({}));
        monitor
    }

    pub fn try_run(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        let stream = self.reader.get_mut();
        stream.write_all(line.as_bytes()).map_err(|e| e.to_string())?;
        loop {
            let mut line = String::new();
            if self.reader.read_line(&mut line).map_err(|e| e.to_string())? == 0 {
                return Err("closed".into());
            }
            let mut answer: Value = serde_json::from_str(&line).unwrap();
            if answer.get("event").is_some() {
                self.events.push(answer);
                continue;
            }
            if let Some(error) = answer.get("error") {
                return Err(error.to_string());
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    pub fn run(&mut self, command: &str, arguments: Value) -> Value {
        self.try_run(command, arguments).unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// How long each pause of the guest lasted, by QEMU's own clock.
    pub fn pauses(&mut self) -> Vec<Duration> {
        self.status();
        let time_of = |event: &Value| {
            let stamp = &event["timestamp"];
            Duration::from_secs(stamp["seconds"].as_u64().unwrap())
                + Duration::from_micros(stamp["microseconds"].as_u64().unwrap())
        };
        let of = |name: &str| {
            let named = self.events.iter().filter(|event| event["event"] == name);
            named.map(time_of).collect::<Vec<_>>()
        };
        let (stops, resumes) = (of("STOP"), of("RESUME"));
        let pairs = stops.iter().filter_map(|stop| {
            let resume = resumes.iter().find(|resume| *resume >= stop)?;
            Some(*resume - *stop)
        });
        pairs.collect()
    }

    pub fn status(&mut self) -> String {
        self.run("query-status", json!({}))["status"].as_str().unwrap().to_owned()
    }
}

/// One disk of the test VM.
#[derive(Clone)]
pub struct TestDisk {
    pub id: String,
    pub path: PathBuf,
    pub format: &'static str,
    /// What the guest must see.
    pub model: Vec<u8>,
    /// 64 KiB blocks written since the last [`Vm::take_written`].
    pub written: RangeSet,
}

/// The test VM.
pub struct Vm {
    pub directory: tempfile::TempDir,
    pub disks: Vec<TestDisk>,
    pub monitor: Monitor,
    guest: Guest,
    extra: Vec<String>,
    child: Child,
}

impl Vm {
    /// A VM of virtio-blk, virtio-scsi and further virtio-blk disks of the given formats and
    /// sizes.
    pub fn start(disks: &[(&'static str, u64)]) -> Self {
        Self::start_with(disks, Guest::Idle, &[])
    }

    pub fn start_with(disks: &[(&'static str, u64)], guest: Guest, extra: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let disks: Vec<TestDisk> = disks
            .iter()
            .enumerate()
            .map(|(index, (format, size))| {
                let path = directory.path().join(format!("disk{index}.{format}"));
                qemu_img(&[
                    "create",
                    "-q",
                    "-f",
                    format,
                    path.to_str().unwrap(),
                    &size.to_string(),
                ]);
                let id = match guest {
                    Guest::Idle | Guest::IdleAs(_) => format!("vd{index}"),
                    Guest::Counting => format!("ide0-hd{index}"),
                };
                TestDisk {
                    id,
                    path,
                    format,
                    model: vec![0; usize::try_from(*size).unwrap()],
                    written: RangeSet::new(),
                }
            })
            .collect();
        let extra: Vec<String> = extra.iter().map(ToString::to_string).collect();
        let (child, monitor) = launch(directory.path(), &disks, guest, &extra);
        Self { directory, disks, monitor, guest, extra, child }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// Ends QEMU the orderly way or by SIGKILL.
    pub fn stop(&mut self, kill: bool) {
        if kill {
            self.child.kill().unwrap();
        } else {
            let _ = self.monitor.try_run("quit", json!({}));
        }
        self.child.wait().unwrap();
    }

    pub fn start_again(&mut self) {
        let (child, monitor) = launch(self.directory.path(), &self.disks, self.guest, &self.extra);
        self.child = child;
        self.monitor = monitor;
    }

    fn qdev(&mut self, disk: usize) -> String {
        let block = self.monitor.run("query-block", json!({}));
        let id = self.disks[disk].id.clone();
        block
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|entry| entry["qdev"].as_str())
            .find(|qdev| *qdev == id || qdev.contains(&format!("/{id}/")))
            .unwrap_or_else(|| panic!("no device {id}"))
            .to_owned()
    }

    fn guest_io(&mut self, disk: usize, command: &str) -> String {
        let qdev = self.qdev(disk);
        let line = format!("qemu-io -d {qdev} \"{command}\"");
        let output = self.path("qemu.out");
        let before = std::fs::read_to_string(&output).unwrap().len();
        self.monitor.run("human-monitor-command", json!({"command-line": line}));
        // The outcome goes to QEMU's own output.
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let answer = std::fs::read_to_string(&output).unwrap().split_off(before);
            if answer.contains("ops/sec") || answer.contains("failed") {
                return answer;
            }
            assert!(Instant::now() < deadline, "{line}: no outcome, only {answer:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn note(&mut self, disk: usize, offset: u64, length: u64) {
        let size = self.disks[disk].model.len() as u64;
        let blocks = ByteRange::new(offset, length).align_outward(64 * KIB, size);
        self.disks[disk].written.insert(blocks);
    }

    /// The guest writes `length` bytes of `pattern`.
    pub fn write(&mut self, disk: usize, offset: u64, length: u64, pattern: u8) {
        let answer = self.guest_io(disk, &format!("write -P {pattern} {offset} {length}"));
        assert!(answer.contains("wrote"), "the guest cannot write: {answer}");
        self.note(disk, offset, length);
        let range = usize::try_from(offset).unwrap()..usize::try_from(offset + length).unwrap();
        self.disks[disk].model[range].fill(pattern);
    }

    /// The guest zeroes and unmaps `length` bytes.
    pub fn zero(&mut self, disk: usize, offset: u64, length: u64) {
        let answer = self.guest_io(disk, &format!("write -z -u {offset} {length}"));
        assert!(answer.contains("wrote"), "the guest cannot zero: {answer}");
        self.note(disk, offset, length);
        let range = usize::try_from(offset).unwrap()..usize::try_from(offset + length).unwrap();
        self.disks[disk].model[range].fill(0);
    }

    /// The guest flushes its disk, so that a crash loses nothing.
    pub fn flush(&mut self, disk: usize) {
        let qdev = self.qdev(disk);
        let line = format!("qemu-io -d {qdev} flush");
        self.monitor.run("human-monitor-command", json!({"command-line": line}));
    }

    /// What was written since the last call, in whole 64 KiB blocks.
    pub fn take_written(&mut self, disk: usize) -> RangeSet {
        std::mem::take(&mut self.disks[disk].written)
    }

    pub fn models(&self) -> Vec<Vec<u8>> {
        self.disks.iter().map(|disk| disk.model.clone()).collect()
    }

    pub fn target(&self) -> QemuTarget {
        let mut target = QemuTarget::new(self.path("vm.qmp"), self.path("state"));
        target.scratch_directory = Some(self.path("scratch"));
        target.scratch_reserve_bytes = 0;
        target
    }

    pub fn vm(&self) -> QemuVm {
        QemuVm::new(self.target())
    }

    /// Names of the tracking bitmaps per disk.
    pub fn tracking(&mut self) -> Vec<Vec<String>> {
        let block = self.monitor.run("query-named-block-nodes", json!({}));
        let paths: Vec<String> =
            self.disks.iter().map(|disk| disk.path.display().to_string()).collect();
        paths
            .iter()
            .map(|path| {
                let nodes = block.as_array().unwrap().iter();
                nodes
                    .filter(|node| node["image"]["filename"] == path.as_str())
                    .flat_map(|node| node["dirty-bitmaps"].as_array().cloned().unwrap_or_default())
                    .filter_map(|bitmap| bitmap["name"].as_str().map(str::to_owned))
                    .collect()
            })
            .collect()
    }

    /// Fails where anything of ours but tracking bitmaps is left in QEMU or in files.
    pub fn assert_clean(&mut self) {
        let nodes = self.monitor.run("query-named-block-nodes", json!({"flat": true}));
        for node in nodes.as_array().unwrap() {
            let name = node["node-name"].as_str().unwrap();
            assert!(!name.starts_with("vmtide-"), "node {name} is left");
        }
        assert_eq!(self.monitor.run("query-block-exports", json!({})), json!([]));
        assert_eq!(self.monitor.run("query-jobs", json!({})), json!([]));
        assert_eq!(self.monitor.status(), "running");
        let stopped = self.monitor.try_run("nbd-server-stop", json!({}));
        assert!(stopped.is_err(), "the NBD server still ran");
        for disk in self.tracking() {
            for name in disk {
                assert_eq!(name.len(), 57, "bitmap {name} is left");
            }
        }
        for directory in ["scratch", "state", "state/journal"] {
            let Ok(listing) = std::fs::read_dir(self.path(directory)) else {
                continue;
            };
            for item in listing {
                let name = item.unwrap().file_name().into_string().unwrap();
                let known = ["locks", "journal"].contains(&name.as_str());
                assert!(known, "{directory}/{name} is left");
            }
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It may have been stopped by the test.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn launch(
    directory: &Path,
    disks: &[TestDisk],
    guest: Guest,
    extra: &[String],
) -> (Child, Monitor) {
    let bios = directory.join("bios.bin");
    write_bios(&bios, guest);
    for name in ["vm.qmp", "own.qmp"] {
        let _ = std::fs::remove_file(directory.join(name));
    }
    let output = std::fs::File::create(directory.join("qemu.out")).unwrap();
    // Without it QEMU's output would come only when its buffer is full.
    let mut command = Command::new("stdbuf");
    if let Guest::IdleAs(user) = guest {
        let user = user.to_string();
        chown(directory, &user);
        command = Command::new("setpriv");
        command.args(["--reuid", &user, "--regid", &user, "--clear-groups", "stdbuf"]);
    }
    let machine = match guest {
        Guest::Idle | Guest::IdleAs(_) => "q35,accel=tcg",
        Guest::Counting => "pc,accel=tcg",
    };
    command
        .args(["-oL", "qemu-system-x86_64"])
        .args(["-machine", machine, "-m", "32", "-nodefaults"])
        .args(["-display", "none", "-name", "test-vm", "-bios"])
        .arg(&bios)
        .args(["-device", "virtio-scsi-pci,id=scsi"]);
    for name in ["vm.qmp", "own.qmp"] {
        let path = directory.join(name);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", path.display()));
    }
    for (index, disk) in disks.iter().enumerate() {
        add_disk(&mut command, index, disk, guest);
    }
    command.args(extra).stdin(Stdio::null()).stdout(output);
    let child = command.spawn().expect("stdbuf is needed: install coreutils");
    let monitor = Monitor::connect(&directory.join("own.qmp"));
    (child, monitor)
}

fn chown(directory: &Path, user: &str) {
    let status = Command::new("chown").args(["-R", user]).arg(directory).status().unwrap();
    assert!(status.success(), "chown {user}");
}

fn add_disk(command: &mut Command, index: usize, disk: &TestDisk, guest: Guest) {
    let (path, format, id) = (disk.path.display(), disk.format, &disk.id);
    if guest == Guest::Counting {
        let drive = format!("file={path},format={format},if=ide,index={index}");
        command.args(["-drive", &drive]);
        return;
    }
    let drive = format!("file={path},format={format},if=none,id=drive{index}");
    match index {
        // The modern way, with a node name of the administrator's.
        0 => {
            let node = format!(
                "driver={format},node-name=node0,discard=unmap,file.driver=file,file.filename={path}"
            );
            command.args(["-blockdev", &node]);
            let device = format!("virtio-blk-pci,drive=node0,id={id},serial=SERIAL0,bootindex=0");
            command.args(["-device", &device]);
        }
        1 => {
            command.args(["-drive", &drive]);
            let device = format!("scsi-hd,drive=drive1,bus=scsi.0,id={id}");
            command.args(["-device", &device]);
        }
        _ => {
            command.args(["-drive", &drive]);
            let device = format!("virtio-blk-pci,drive=drive{index},id={id}");
            command.args(["-device", &device]);
        }
    }
}

fn write_bios(path: &Path, guest: Guest) {
    let mut rom = vec![0u8; 64 * 1024];
    match guest {
        Guest::Idle | Guest::IdleAs(_) => rom[0xfff0..0xfff4].copy_from_slice(&IDLE),
        Guest::Counting => {
            rom[0xfe00..0xfe00 + COUNTING.len()].copy_from_slice(&COUNTING);
            // jmp 0xf000:0xfe00
            rom[0xfff0..0xfff5].copy_from_slice(&[0xea, 0x00, 0xfe, 0x00, 0xf0]);
        }
    }
    std::fs::write(path, rom).unwrap();
}

pub fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img")
        .args(arguments)
        .output()
        .expect("qemu-img is needed: install qemu-utils");
    assert!(output.status.success(), "qemu-img {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What a repository keeps of the VM: its last restore point.
#[derive(Clone)]
pub struct Store {
    pub lineage: &'static str,
    pub images: BTreeMap<DiskId, Vec<u8>>,
    pub bases: BTreeMap<DiskId, Base>,
}

impl Store {
    pub fn new(lineage: &'static str) -> Self {
        Self { lineage, images: BTreeMap::new(), bases: BTreeMap::new() }
    }

    pub fn request(&self) -> FreezeRequest {
        FreezeRequest {
            vm: "test-vm".into(),
            job: JobId::random(),
            lineage: self.lineage.into(),
            consistency: Consistency::Crash,
            allow_downgrade: false,
            bases: self.bases.clone(),
            exclude: Vec::new(),
            cancel: CancelToken::new(),
        }
    }

    /// Reads what changed into a copy of the last restore point, as a backup does.
    pub fn read(&self, frozen: &dyn FrozenVm) -> Self {
        let mut next = self.clone();
        for disk in frozen.disks() {
            let size = disk.device.size_bytes();
            let old = self.images.get(&disk.id).cloned().unwrap_or_default();
            let (mut image, ranges) = match &disk.changes {
                Changes::Everything(_) => {
                    (vec![0xee; usize::try_from(size).unwrap()], RangeSet::full(size))
                }
                Changes::Ranges(ranges) => (old, ranges.clone()),
            };
            read_ranges(&*disk.device, &ranges, &mut image);
            next.images.insert(disk.id.clone(), image);
            let base = Base { tracking: disk.tracking.clone(), size_bytes: size };
            next.bases.insert(disk.id.clone(), base);
        }
        next
    }

    /// One whole backup; answers the changes of each disk.
    pub fn backup(&mut self, vm: &QemuVm) -> Vec<Changes> {
        use vmtide_hypervisor::Hypervisor;
        let frozen = vm.freeze(&self.request()).unwrap();
        let changes = frozen.disks().iter().map(|d| d.changes.clone()).collect();
        *self = self.read(&*frozen);
        assert_eq!(frozen.commit().unwrap(), Vec::<String>::new());
        changes
    }

    /// Fails where the restore point differs from the models.
    pub fn assert_equals(&self, disks: &[TestDisk], models: &[Vec<u8>]) {
        for (disk, model) in disks.iter().zip(models) {
            let image = &self.images[&DiskId(disk.id.clone())];
            assert_eq!(image.len(), model.len(), "size of {}", disk.id);
            let differs = image.iter().zip(model).position(|(a, b)| a != b);
            assert_eq!(differs, None, "first different byte of {}", disk.id);
        }
    }

    pub fn tracking(&self, disk: &str) -> TrackingId {
        self.bases[&DiskId(disk.into())].tracking.clone().unwrap()
    }
}

fn read_ranges(device: &dyn BlockDevice, ranges: &RangeSet, image: &mut [u8]) {
    for range in ranges.iter() {
        for_each_extent(device, range, &CancelToken::new(), |extent| {
            let at = usize::try_from(extent.range.offset).unwrap();
            let part = &mut image[at..at + usize::try_from(extent.range.length).unwrap()];
            if extent.kind.reads_as_zero() {
                part.fill(0);
                return Ok(());
            }
            device.read_at(part, extent.range.offset)
        })
        .unwrap();
    }
}

pub fn ranges_of(changes: &Changes) -> RangeSet {
    match changes {
        Changes::Ranges(ranges) => ranges.clone(),
        Changes::Everything(reason) => panic!("everything: {reason}"),
    }
}

pub fn reason_of(changes: &Changes) -> FullReason {
    match changes {
        Changes::Everything(reason) => reason.clone(),
        Changes::Ranges(ranges) => panic!("ranges: {ranges:?}"),
    }
}
