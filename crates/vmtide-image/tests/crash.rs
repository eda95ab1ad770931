//! Every moment at which a writer can be cut off leaves a valid image with all flushed data.
//!
//! A workload runs over a device that records each write, resize and flush. Then the file is
//! rebuilt as a crash could leave it: after every single operation, with any part of what was not
//! flushed missing or torn at a sector. Each rebuilt file is opened, read and compared, and a
//! sample of them is checked by qemu-img, which may find leaked clusters but nothing worse.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

mod support;

use std::path::Path;
use std::sync::{Arc, Mutex};
use support::{Random, check_no_damage, path, pattern, qemu_img, qemu_io, raw_file};
use vmtide_block::{BlockDevice, ByteRange, Extent, MemoryDevice, Result, WritableBlockDevice};
use vmtide_image::Format;
use vmtide_image::qcow2::{
    Companions, CreateBacking, Qcow2CreateOptions, Qcow2Image, Qcow2Version, Qcow2Writer,
};

#[derive(Clone)]
enum Operation {
    Write(u64, Vec<u8>),
    Resize(u64),
    Flush,
}

/// A device in memory that remembers what was done to it.
struct Recorder {
    memory: MemoryDevice,
    log: Mutex<Vec<Operation>>,
}

impl Recorder {
    fn new(bytes: Vec<u8>) -> Self {
        Self { memory: MemoryDevice::from_bytes(bytes), log: Mutex::new(Vec::new()) }
    }

    fn record(&self, operation: Operation) {
        self.log.lock().unwrap().push(operation);
    }

    fn operations(&self) -> usize {
        self.log.lock().unwrap().len()
    }
}

impl BlockDevice for Recorder {
    fn name(&self) -> String {
        "recorder".into()
    }
    fn size_bytes(&self) -> u64 {
        self.memory.size_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.memory.read_at(buffer, offset)
    }
    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.memory.extents(range)
    }
}

impl WritableBlockDevice for Recorder {
    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.record(Operation::Write(offset, data.to_vec()));
        self.memory.write_at(data, offset)
    }
    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        let zeros = vec![0; usize::try_from(range.length).unwrap()];
        self.write_at(&zeros, range.offset)
    }
    fn flush(&self) -> Result<()> {
        self.record(Operation::Flush);
        Ok(())
    }
    fn resize(&self, size_bytes: u64) -> Result<()> {
        self.record(Operation::Resize(size_bytes));
        self.memory.resize(size_bytes)
    }
}

/// What the disk must hold: `base` was flushed, `after` may be there or not.
struct Expected {
    base: Vec<u8>,
    after: Vec<(usize, Vec<u8>)>,
}

impl Expected {
    /// Succeeds where each byte is the flushed one or one of those written since.
    fn check(&self, disk: &[u8], moment: &str) {
        let mut accepted = self.base.clone();
        for (at, data) in &self.after {
            for (index, byte) in (*at..).zip(data) {
                if disk[index] == *byte {
                    accepted[index] = *byte;
                }
            }
        }
        if disk == accepted {
            return;
        }
        let wrong = disk.iter().zip(&accepted).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "{moment}: first wrong byte of the disk");
    }
}

/// One thing the workload did: where the log stood before, and what it was.
enum Event {
    Write(usize, usize, Vec<u8>),
    Flushed(usize),
}

struct Workload {
    start: Vec<u8>,
    log: Vec<Operation>,
    events: Vec<Event>,
    content: Vec<u8>,
    backing: Option<Vec<u8>>,
}

fn run_workload(
    start: Vec<u8>,
    content: Vec<u8>,
    backing: Option<Vec<u8>>,
    seed: u64,
    steps: usize,
) -> Workload {
    let device = backing
        .clone()
        .map(|bytes| Arc::new(MemoryDevice::from_bytes(bytes)) as Arc<dyn BlockDevice>);
    let recorder = Arc::new(Recorder::new(start.clone()));
    let writer = Qcow2Writer::open_device(recorder.clone(), device, None).unwrap();
    let mut random = Random(seed);
    let mut events = Vec::new();
    for _ in 0..steps {
        let at = random.below(content.len() as u64 - 1);
        let length = (random.below(20_000) + 1).min(content.len() as u64 - at);
        let start = usize::try_from(at).unwrap();
        let before = recorder.operations();
        match random.below(5) {
            0 => {
                writer.flush().unwrap();
                events.push(Event::Flushed(recorder.operations()));
            }
            1 => {
                writer.write_zeroes(ByteRange::new(at, length)).unwrap();
                let zeros = vec![0; usize::try_from(length).unwrap()];
                events.push(Event::Write(before, start, zeros));
            }
            _ => {
                let value = random.next().to_le_bytes()[1] | 1;
                let data = vec![value; usize::try_from(length).unwrap()];
                writer.write_at(&data, at).unwrap();
                events.push(Event::Write(before, start, data));
            }
        }
    }
    writer.flush().unwrap();
    events.push(Event::Flushed(recorder.operations()));
    let log = recorder.log.lock().unwrap().clone();
    Workload { start, log, events, content, backing }
}

impl Workload {
    fn expected(&self, cut: usize) -> Expected {
        let mut base = self.content.clone();
        let mut after: Vec<(usize, Vec<u8>)> = Vec::new();
        for event in &self.events {
            match event {
                Event::Write(begun, at, data) if *begun < cut => after.push((*at, data.clone())),
                Event::Flushed(done) if *done <= cut => {
                    for (at, data) in after.drain(..) {
                        base[at..at + data.len()].copy_from_slice(&data);
                    }
                }
                _ => {}
            }
        }
        Expected { base, after }
    }

    /// The file after the first `cut` operations; `loss` says which of the writes since the last
    /// flush are missing or torn.
    fn file(&self, cut: usize, mut loss: Option<&mut Random>) -> Vec<u8> {
        let durable = self.log[..cut]
            .iter()
            .rposition(|operation| matches!(operation, Operation::Flush))
            .unwrap_or(0);
        let mut bytes = self.start.clone();
        for (index, operation) in self.log[..cut].iter().enumerate() {
            match operation {
                Operation::Write(offset, data) => {
                    let mut keep = data.len();
                    if index > durable
                        && let Some(random) = loss.as_deref_mut()
                    {
                        match random.below(3) {
                            0 => keep = 0,
                            1 => {
                                let sectors = random.below(data.len() as u64 / 512 + 1);
                                keep = usize::try_from(sectors * 512).unwrap();
                            }
                            _ => {}
                        }
                    }
                    let at = usize::try_from(*offset).unwrap();
                    if bytes.len() < at + keep {
                        bytes.resize(at + keep, 0);
                    }
                    bytes[at..at + keep].copy_from_slice(&data[..keep]);
                }
                Operation::Resize(size) => bytes.resize(usize::try_from(*size).unwrap(), 0),
                Operation::Flush => {}
            }
        }
        bytes
    }

    fn check(&self, cut: usize, bytes: Vec<u8>, qemu: Option<&Path>, moment: &str) {
        if let Some(directory) = qemu {
            check_no_damage(&raw_file(directory, "crashed.qcow2", &bytes));
        }
        let backing = self
            .backing
            .clone()
            .map(|bytes| Arc::new(MemoryDevice::from_bytes(bytes)) as Arc<dyn BlockDevice>);
        let companions = Companions { backing, data_file: None };
        let image = Qcow2Image::open_device(Arc::new(MemoryDevice::from_bytes(bytes)), companions)
            .unwrap_or_else(|error| panic!("{moment}: {error}"));
        let mut disk = vec![0; self.content.len()];
        image.read_at(&mut disk, 0).unwrap_or_else(|error| panic!("{moment}: {error}"));
        self.expected(cut).check(&disk, moment);
    }

    /// Checks every prefix, and losses within the last flush window of every prefix.
    fn enumerate(&self, name: &str) {
        let directory = tempfile::tempdir().unwrap();
        if let Some(backing) = &self.backing {
            raw_file(directory.path(), "base.raw", backing);
        }
        let mut random = Random(99);
        for cut in 0..=self.log.len() {
            let qemu = (cut % 8 == 0).then_some(directory.path());
            self.check(cut, self.file(cut, None), qemu, &format!("{name}, first {cut}"));
            for variant in 0..3 {
                let qemu = (variant == 0 && cut % 8 == 4).then_some(directory.path());
                let moment = format!("{name}, first {cut} with loss {variant}");
                self.check(cut, self.file(cut, Some(&mut random)), qemu, &moment);
            }
        }
    }
}

fn created(options: &Qcow2CreateOptions) -> Vec<u8> {
    let memory = Arc::new(MemoryDevice::new(0));
    drop(Qcow2Writer::create_device(memory.clone(), options).unwrap());
    memory.to_bytes()
}

#[test]
fn a_new_image_survives_every_cut() {
    // 512-byte clusters: refcount blocks and the refcount table grow during the work.
    for (bits, version, extended_l2) in
        [(9, Qcow2Version::V2, false), (12, Qcow2Version::V3, false), (14, Qcow2Version::V3, true)]
    {
        let options = Qcow2CreateOptions {
            cluster_size_bytes: 1 << bits,
            version,
            extended_l2,
            ..Qcow2CreateOptions::new(120_000)
        };
        let work = run_workload(created(&options), vec![0; 120_000], None, 7 + bits, 16);
        work.enumerate(&format!("{bits} bits"));
    }
}

#[test]
fn the_refcount_table_moves_safely() {
    let options =
        Qcow2CreateOptions { cluster_size_bytes: 512, ..Qcow2CreateOptions::new(9 << 20) };
    let memory = Arc::new(MemoryDevice::new(0));
    let writer = Qcow2Writer::create_device(memory.clone(), &options).unwrap();
    let mut content = vec![5u8; 8_100_000];
    writer.write_at(&content, 0).unwrap();
    writer.flush().unwrap();
    drop(writer);
    content.resize(9 << 20, 0);
    // The next writes pass 8 MiB of file, which is what a table of one cluster counts.
    let recorder = Arc::new(Recorder::new(memory.to_bytes()));
    let writer = Qcow2Writer::open_device(recorder.clone(), None, None).unwrap();
    let mut events = Vec::new();
    for step in 0..4usize {
        let (at, data) = (8_200_000 + step * 200_000, vec![9u8; 150_000]);
        events.push(Event::Write(recorder.operations(), at, data.clone()));
        writer.write_at(&data, at as u64).unwrap();
        writer.flush().unwrap();
        events.push(Event::Flushed(recorder.operations()));
    }
    let start_table = memory.to_bytes()[48..56].to_vec();
    assert_ne!(recorder.memory.to_bytes()[48..56], start_table, "the table must have moved");
    let log = recorder.log.lock().unwrap().clone();
    let work = Workload { start: memory.to_bytes(), log, events, content, backing: None };
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random(3);
    for cut in 0..=work.log.len() {
        // Most operations are data; the interesting ones are near flushes.
        let near_flush = work.log[cut.saturating_sub(3)..(cut + 3).min(work.log.len())]
            .iter()
            .any(|operation| matches!(operation, Operation::Flush));
        if near_flush {
            let moment = format!("table move, first {cut}");
            work.check(cut, work.file(cut, None), Some(directory.path()), &moment);
            let lossy = work.file(cut, Some(&mut random));
            work.check(cut, lossy, None, &format!("{moment} with loss"));
        }
    }
}

#[test]
fn an_overlay_survives_every_cut() {
    let below = pattern(2, 90_000);
    let options = Qcow2CreateOptions {
        cluster_size_bytes: 4096,
        backing: Some(CreateBacking {
            name: "base.raw".into(),
            format: Format::Raw,
            device: Arc::new(MemoryDevice::from_bytes(below.clone())),
        }),
        ..Qcow2CreateOptions::new(120_000)
    };
    let mut content = below.clone();
    content.resize(120_000, 0);
    let work = run_workload(created(&options), content, Some(below), 5, 16);
    work.enumerate("overlay");
}

#[test]
fn an_image_with_a_snapshot_and_compression_survives_every_cut() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image.qcow2");
    let mut content = pattern(8, 122_880);
    let raw = raw_file(directory.path(), "disk.raw", &content);
    qemu_img(&[
        "convert",
        "-c",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-o",
        "cluster_size=4096",
        path(&raw),
        path(&image),
    ]);
    qemu_img(&["snapshot", "-c", "kept", path(&image)]);
    qemu_io(&image, &["-f", "qcow2"], &["write -P 3 30k 20k"]);
    content[30 << 10..50 << 10].fill(3);
    let work = run_workload(std::fs::read(&image).unwrap(), content, None, 6, 16);
    work.enumerate("snapshot");
}
