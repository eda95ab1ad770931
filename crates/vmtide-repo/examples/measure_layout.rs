//! Measures one layout of a repository on given disks, and prints one line of JSON.
//!
//! `measure_layout CHUNK_BYTES FRAME_BYTES LEVEL SCRATCH_DIRECTORY SCENARIO` where the scenario is
//! `disks A.raw B.raw …` (backups of disks one after the other into one repository; the later ones are read whole),
//! or `writes MIB DAYS PERCENT PIECE_KIB NOISE` (a disk of which so much is written anew at random places every day, backed
//! up by a list of changes; so many bytes of each 4 KiB of it do not compress, a power of two from 8 to 2048). At the end the last
//! restore point is restored to memory's equivalent of `/dev/null`. `bench/layouts.py` runs a table of these.

#![allow(clippy::cast_precision_loss, reason = "figures for people")]

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use vmtide_block::{
    BlockDevice, ByteRange, CancelToken, Extent, OpenMode, Progress, RangeSet, RawDevice,
};
use vmtide_repo::{
    BackupOptions, ChangedRanges, DiskDraft, DiskPlan, Encryption, InitOptions, LocalStore,
    ObjectStore, PointDraft, Repository, RestorePoint, TrackingRecord,
};

/// How often the restores of a year are measured.
const RESTORES: usize = 5;

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [chunk, frame, level, scratch, scenario, rest @ ..] = &arguments[..] else {
        return Err("usage: see the head of the source".into());
    };
    let bench = Bench::new(chunk.parse()?, frame.parse()?, level.parse()?, scratch)?;
    let mut figures = match &scenario[..] {
        "disks" => bench.disks(rest)?,
        "writes" => {
            let numbers = rest.iter().map(|text| text.parse()).collect::<Result<Vec<u64>, _>>()?;
            let [mib, days, percent, piece_kib, noise] = numbers[..] else {
                return Err("writes MIB DAYS PERCENT PIECE_KIB NOISE".into());
            };
            if !noise.is_power_of_two() || !(8..=2048).contains(&noise) {
                return Err("NOISE is a power of two from 8 to 2048".into());
            }
            let disk = WrittenDisk::new(mib << 20, piece_kib << 10, usize::try_from(noise)?);
            bench.writes(&disk, days, percent)?
        }
        other => return Err(format!("no scenario {other}").into()),
    };
    figures["chunk_bytes"] = json!(chunk.parse::<u64>()?);
    figures["frame_bytes"] = json!(frame.parse::<u64>()?);
    figures["level"] = json!(level.parse::<i32>()?);
    figures["peak_bytes"] = json!(peak_bytes()?);
    println!("{figures}");
    std::fs::remove_dir_all(scratch)?;
    Ok(())
}

struct Bench {
    store: Arc<LocalStore>,
    repository: Repository,
    options: BackupOptions,
}

impl Bench {
    fn new(chunk: u32, frame: usize, level: i32, scratch: &str) -> Outcome<Self> {
        let store = Arc::new(LocalStore::create(scratch)?);
        let init = InitOptions {
            chunk_size_bytes: chunk,
            encryption: Encryption::Aes256Gcm,
            ..InitOptions::default()
        };
        let shared: Arc<dyn ObjectStore> = store.clone();
        let password = vmtide_repo::Password::new("measured");
        let repository = Repository::init(shared, &init, Some(&password))?;
        let options = BackupOptions {
            compression_level: level,
            frame_bytes: frame,
            ..BackupOptions::default()
        };
        Ok(Self { store, repository, options })
    }

    /// Backs up one disk and answers with its restore point and the processor seconds.
    fn back_up(
        &self,
        source: &dyn BlockDevice,
        base: Option<&RestorePoint>,
        changed: ChangedRanges,
    ) -> Outcome<(RestorePoint, f64)> {
        let before = processor_seconds()?;
        let session = self.repository.begin_backup(&self.options)?;
        let base = base.map(|point| &point.disks[0]);
        let plan = DiskPlan { id: "disk0".into(), base, changed };
        let stored = session.store_disk(source, &plan, &Progress::new(), &CancelToken::new())?;
        let disk = DiskDraft { stored, tracking: TrackingRecord::default(), changed_bytes: None };
        let point = session.commit(PointDraft {
            vm: "vm".into(),
            level: vmtide_repo::Level::Full,
            parent: None,
            consistency: "crash".into(),
            tags: BTreeMap::new(),
            host: "host".into(),
            source: "measured".into(),
            started: jiff::Timestamp::now(),
            config: Value::Null,
            warnings: Vec::new(),
            disks: vec![disk],
        })?;
        Ok((point, processor_seconds()? - before))
    }

    /// Bytes and number of objects by kind.
    fn objects(&self) -> Outcome<BTreeMap<&'static str, (u64, u64)>> {
        let mut kinds = BTreeMap::new();
        for kind in ["packs/", "maps/", "index/", "points/"] {
            let entry: &mut (u64, u64) = kinds.entry(kind).or_default();
            self.store.list(kind, &mut |object| {
                entry.0 += object.length_bytes;
                entry.1 += 1;
                Ok(())
            })?;
        }
        Ok(kinds)
    }

    /// Reads a restore point as a restore does; answers with bytes, seconds and processor seconds.
    fn restore(&self, point: &RestorePoint) -> Outcome<Value> {
        let disk = self.repository.open_disk(point, "disk0")?;
        let (begun, before) = (Instant::now(), processor_seconds()?);
        let bytes = AtomicU64::new(0);
        let storage = disk.storage_order().ok_or("no storage order")?;
        storage.read_all(self.options.workers, &CancelToken::new(), &|data, _| {
            bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
            Ok(())
        })?;
        let bytes = bytes.into_inner();
        let cpu = processor_seconds()? - before;
        Ok(json!({
            "bytes": bytes,
            "wall_s": begun.elapsed().as_secs_f64(),
            "cpu_s": cpu,
            "mib_per_cpu_s": bytes as f64 / cpu / 1_048_576.0,
        }))
    }

    fn disks(&self, paths: &[String]) -> Outcome<Value> {
        let mut backups = Vec::new();
        let mut last = None;
        for path in paths {
            let disk = RawDevice::open(path, OpenMode::ReadOnly)?;
            let before = self.objects()?;
            let (point, cpu) = self.back_up(&disk, None, ChangedRanges::Everything)?;
            let counts = point.disks[0].counts;
            backups.push(json!({
                "disk": path,
                "read_bytes": counts.read_bytes,
                "new_bytes": counts.new_bytes,
                "cpu_s": cpu,
                "mib_per_cpu_s": counts.read_bytes as f64 / cpu / 1_048_576.0,
                "added": added(&before, &self.objects()?),
            }));
            last = Some(point);
        }
        let last = last.ok_or("no disks")?;
        Ok(json!({ "backups": backups, "restore": self.restore(&last)? }))
    }

    fn writes(&self, disk: &WrittenDisk, days: u64, percent: u64) -> Outcome<Value> {
        let (first, full_cpu) = self.back_up(disk, None, ChangedRanges::Everything)?;
        let mut last = first.clone();
        let before = self.objects()?;
        let (mut cpu, mut changed, mut worst_metadata) = (0.0, 0, 0);
        for day in 1..=days {
            let ranges = disk.write_day(day, percent);
            changed += ranges.total_bytes();
            let before = self.metadata()?;
            let (point, seconds) = self.back_up(disk, Some(&last), ChangedRanges::Only(ranges))?;
            // Written, not kept: what an incremental supersedes stays until the next prune.
            worst_metadata = worst_metadata.max(self.metadata()? - before);
            cpu += seconds;
            last = point;
        }
        // In turn, once more than is counted: what was not in the page cache is then.
        let mut restores = Vec::new();
        for _ in 0..=RESTORES {
            restores.push(json!({ "first": self.restore(&first)?, "last": self.restore(&last)? }));
        }
        restores.remove(0);
        Ok(json!({
            "days": days,
            "changed_bytes": changed,
            "added": added(&before, &self.objects()?),
            "largest_metadata_of_a_day_bytes": worst_metadata,
            "stored_bytes": self.objects()?.values().map(|(bytes, _)| bytes).sum::<u64>(),
            "full_cpu_s": full_cpu,
            "cpu_s": cpu,
            "restores": restores,
        }))
    }

    fn metadata(&self) -> Outcome<u64> {
        let kinds = self.objects()?;
        Ok(kinds.iter().filter(|(kind, _)| **kind != "packs/").map(|(_, (bytes, _))| bytes).sum())
    }
}

fn added(
    before: &BTreeMap<&'static str, (u64, u64)>,
    after: &BTreeMap<&'static str, (u64, u64)>,
) -> Value {
    let change = |kind: &str| {
        let ((old_bytes, old_count), (bytes, count)) = (before[kind], after[kind]);
        json!({ "bytes": bytes - old_bytes, "objects": count - old_count })
    };
    json!({
        "packs": change("packs/"),
        "maps": change("maps/"),
        "index": change("index/"),
        "points": change("points/"),
    })
}

/// A disk whose content is made up when it is read: every piece by its number and the day it was
/// written last, so that no two are equal. `noise` bytes of every 4 KiB do not compress, in words of eight; what is between
/// them says nothing.
struct WrittenDisk {
    size_bytes: u64,
    piece_bytes: u64,
    noise: usize,
    written: Vec<AtomicU64>,
}

impl WrittenDisk {
    fn new(size_bytes: u64, piece_bytes: u64, noise: usize) -> Self {
        let pieces = size_bytes / piece_bytes;
        let written = (0..pieces).map(|_| AtomicU64::new(0)).collect();
        Self { size_bytes, piece_bytes, noise, written }
    }

    /// Writes so much of the disk at random places.
    fn write_day(&self, day: u64, percent: u64) -> RangeSet {
        let pieces = self.written.len() as u64;
        let mut ranges = RangeSet::new();
        let mut random = day.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        for _ in 0..pieces * percent / 100 {
            let piece = usize::try_from(step(&mut random) % pieces).unwrap_or(0);
            self.written[piece].store(day, Ordering::Relaxed);
            ranges.insert(ByteRange::new(piece as u64 * self.piece_bytes, self.piece_bytes));
        }
        ranges
    }
}

/// One step of xorshift64*: fast, and good enough to look random to a compressor.
fn step(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_F491_4F6C_DD1D)
}

impl BlockDevice for WrittenDisk {
    fn name(&self) -> String {
        "a disk that is written at random".into()
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        self.check_range(ByteRange::new(offset, buffer.len() as u64))?;
        for (number, block) in buffer.chunks_mut(4096).enumerate() {
            let at = offset / 4096 + number as u64;
            let piece = usize::try_from(at * 4096 / self.piece_bytes).unwrap_or(0);
            let day = self.written[piece].load(Ordering::Relaxed);
            let mut random = (at << 20 | (day + 1)).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
            for word in block.chunks_mut(4096 * 8 / self.noise) {
                let bytes = step(&mut random).to_le_bytes();
                let length = word.len().min(8);
                word[..length].copy_from_slice(&bytes[..length]);
                word[length..].fill(7);
            }
        }
        Ok(())
    }

    fn extents(&self, range: ByteRange) -> vmtide_block::Result<Vec<Extent>> {
        Ok(vec![Extent::new(range.offset, range.length, vmtide_block::ExtentKind::Data)])
    }
}

/// The processor time of this process, in seconds.
fn processor_seconds() -> Outcome<f64> {
    let mut nanoseconds = 0.0;
    // Threads that ended are counted in the process's own figures only, in ticks of 10 ms.
    let text = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = text.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    for field in fields.get(11..13).ok_or("stat is short")? {
        nanoseconds += field.parse::<f64>()? * 1e7;
    }
    Ok(nanoseconds / 1e9)
}

/// The most memory this process has had.
fn peak_bytes() -> Outcome<u64> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find(|line| line.starts_with("VmHWM")).ok_or("no VmHWM")?;
    Ok(line.split_whitespace().nth(1).ok_or("no figure")?.parse::<u64>()? << 10)
}
