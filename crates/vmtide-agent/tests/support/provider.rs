//! A stand-in for a platform: disks in memory, found by the names of files, with faults that can be switched on.
//!
//! The files themselves are empty: they are there so that the agent finds something inside its roots.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use vmtide_agent::provider::{
    ChangePage, DiskInfo, DiskProvider, FilesProvider, FrozenDisk, FrozenDisks, NewDisk, OpenDisks,
    ProviderError, Result, TrackingState,
};
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, CancelToken, Extent, ExtentKind, MemoryDevice,
    WritableBlockDevice, push_extent,
};

/// What can be wrong with a disk; all of it can be changed while it is used.
#[derive(Debug, Default)]
pub struct Faults {
    /// Questions about changes are answered for no byte.
    pub processed_zero: AtomicBool,
    /// Questions about changes are answered for so many bytes only; 0 for all.
    pub page_bytes: AtomicU64,
    /// Questions about changes fail from this offset on; 0 for never.
    pub changes_fail_from: AtomicU64,
    /// Reads at and beyond this offset fail; 0 for never.
    pub reads_fail_from: AtomicU64,
    /// Every read takes so long, in milliseconds.
    pub read_delay_ms: AtomicU64,
    /// Writes fail.
    pub writes_fail: AtomicBool,
    /// Opening fails as of a disk that a VM holds.
    pub in_use: AtomicBool,
}

/// Content that is made when it is read, so that a disk can be of any size: every sector is filled with one byte
/// that its number gives. Of every 16 MiB the last 4 MiB are zeros, and known to be.
pub struct Pattern {
    pub size_bytes: u64,
}

pub const PATTERN_UNIT: u64 = 16 << 20;
pub const PATTERN_DATA: u64 = 12 << 20;

/// The byte of a pattern at an offset.
pub fn pattern_byte(offset: u64) -> u8 {
    let sector = offset / 512;
    match offset % PATTERN_UNIT < PATTERN_DATA {
        true => u8::try_from((sector ^ (sector >> 8) ^ (sector >> 16)) % 255).unwrap() + 1,
        false => 0,
    }
}

impl BlockDevice for Pattern {
    fn name(&self) -> String {
        "pattern".into()
    }
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        self.check_range(ByteRange::new(offset, buffer.len() as u64))?;
        let mut at = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            let length = usize::try_from(512 - at % 512).unwrap().min(rest.len());
            let (sector, more) = rest.split_at_mut(length);
            sector.fill(pattern_byte(at));
            at += length as u64;
            rest = more;
        }
        Ok(())
    }
    fn extents(&self, range: ByteRange) -> vmtide_block::Result<Vec<Extent>> {
        self.check_range(range)?;
        let mut extents = Vec::new();
        let mut at = range.offset;
        while at < range.end() && extents.len() < 1000 {
            let unit = at - at % PATTERN_UNIT;
            let (end, kind) = match at < unit + PATTERN_DATA {
                true => (unit + PATTERN_DATA, ExtentKind::Data),
                false => (unit + PATTERN_UNIT, ExtentKind::Zero),
            };
            let end = end.min(range.end());
            push_extent(&mut extents, Extent::new(at, end - at, kind));
            at = end;
        }
        Ok(extents)
    }
}

impl WritableBlockDevice for Pattern {
    fn write_at(&self, _: &[u8], _: u64) -> vmtide_block::Result<()> {
        Err(BlockError::ReadOnly { device: self.name() })
    }
    fn write_zeroes(&self, _: ByteRange) -> vmtide_block::Result<()> {
        Err(BlockError::ReadOnly { device: self.name() })
    }
    fn flush(&self) -> vmtide_block::Result<()> {
        Ok(())
    }
}

/// One disk.
pub struct TestDisk {
    pub content: Arc<dyn WritableBlockDevice>,
    pub sector_bytes: u32,
    pub faults: Faults,
    pub tracking: Mutex<Option<Tracking>>,
    /// What it names as its parent.
    pub parent: Mutex<Option<String>>,
    /// How many handles there are now.
    pub handles: AtomicUsize,
    pub flushes: AtomicUsize,
}

/// Change tracking of a disk: the ranges since each id.
#[derive(Default)]
pub struct Tracking {
    pub ids: Vec<(String, Vec<ByteRange>)>,
    pub sealed: usize,
}

impl TestDisk {
    pub fn new(content: Arc<dyn WritableBlockDevice>) -> Arc<Self> {
        Arc::new(Self {
            content,
            sector_bytes: 512,
            faults: Faults::default(),
            tracking: Mutex::new(Some(Tracking::default())),
            parent: Mutex::default(),
            handles: AtomicUsize::new(0),
            flushes: AtomicUsize::new(0),
        })
    }

    pub fn memory(bytes: Vec<u8>) -> Arc<Self> {
        Self::new(Arc::new(MemoryDevice::from_bytes(bytes)))
    }

    pub fn pattern(size_bytes: u64) -> Arc<Self> {
        Self::new(Arc::new(Pattern { size_bytes }))
    }

    /// Names a moment, since which these ranges have changed.
    pub fn changed_since(&self, id: &str, ranges: Vec<ByteRange>) {
        let mut tracking = self.tracking.lock();
        tracking.get_or_insert_default().ids.push((id.into(), ranges));
    }
}

/// A handle of a disk: counts itself.
struct Handle(Arc<TestDisk>);

impl Handle {
    fn new(disk: &Arc<TestDisk>) -> Arc<Self> {
        disk.handles.fetch_add(1, Ordering::SeqCst);
        Arc::new(Self(Arc::clone(disk)))
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.handles.fetch_sub(1, Ordering::SeqCst);
    }
}

impl BlockDevice for Handle {
    fn name(&self) -> String {
        self.0.content.name()
    }
    fn size_bytes(&self) -> u64 {
        self.0.content.size_bytes()
    }
    fn block_size_bytes(&self) -> u32 {
        self.0.sector_bytes
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        let faults = &self.0.faults;
        let delay = faults.read_delay_ms.load(Ordering::SeqCst);
        if delay > 0 {
            std::thread::sleep(Duration::from_millis(delay));
        }
        let from = faults.reads_fail_from.load(Ordering::SeqCst);
        if from > 0 && offset + buffer.len() as u64 > from {
            let error = std::io::Error::other("the medium failed");
            return Err(BlockError::io(format!("read at {offset}"), error));
        }
        self.0.content.read_at(buffer, offset)
    }
    fn extents(&self, range: ByteRange) -> vmtide_block::Result<Vec<Extent>> {
        self.0.content.extents(range)
    }
}

impl WritableBlockDevice for Handle {
    fn write_at(&self, data: &[u8], offset: u64) -> vmtide_block::Result<()> {
        if self.0.faults.writes_fail.load(Ordering::SeqCst) {
            let error = std::io::Error::other("no space left");
            return Err(BlockError::io(format!("write at {offset}"), error));
        }
        self.0.content.write_at(data, offset)
    }
    fn write_zeroes(&self, range: ByteRange) -> vmtide_block::Result<()> {
        self.0.content.write_zeroes(range)
    }
    fn flush(&self) -> vmtide_block::Result<()> {
        self.0.flushes.fetch_add(1, Ordering::SeqCst);
        self.0.content.flush()
    }
}

/// Disks by the names of their files.
#[derive(Default)]
pub struct TestProvider {
    pub disks: Mutex<HashMap<String, Arc<TestDisk>>>,
    /// How many freezes are held now.
    pub frozen: Arc<AtomicUsize>,
}

impl TestProvider {
    pub fn new(disks: &[(&str, Arc<TestDisk>)]) -> Arc<Self> {
        let disks = disks.iter().map(|(name, disk)| ((*name).to_owned(), Arc::clone(disk)));
        Arc::new(Self { disks: Mutex::new(disks.collect()), frozen: Arc::default() })
    }

    fn find(&self, path: &Path) -> Result<Arc<TestDisk>> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let path = path.display().to_string();
        match self.disks.lock().get(&*name) {
            Some(disk) if disk.faults.in_use.load(Ordering::SeqCst) => {
                Err(ProviderError::InUse { path, reason: "a virtual machine holds it".into() })
            }
            Some(disk) => Ok(Arc::clone(disk)),
            None => Err(ProviderError::NotADisk { path, reason: "no disk of the test".into() }),
        }
    }
}

/// Disks of the test are empty files.
fn is_image(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|file| file.len() > 0)
}

impl DiskProvider for TestProvider {
    fn info(&self, path: &Path) -> Result<DiskInfo> {
        let disk = match self.find(path) {
            // An image of a stand-in host.
            Err(ProviderError::NotADisk { .. }) if is_image(path) => {
                return FilesProvider::default().info(path);
            }
            found => found?,
        };
        Ok(DiskInfo {
            virtual_size_bytes: disk.content.size_bytes(),
            physical_size_bytes: 0,
            block_size_bytes: 32 << 20,
            logical_sector_bytes: disk.sector_bytes,
            physical_sector_bytes: 4096,
            parent_path: disk.parent.lock().clone(),
            virtual_storage_type: 3,
            provider_sub_type: 3,
            format: "vhdx".into(),
            disk_id: Some("12345678-0000-0000-0000-000000000000".into()),
        })
    }

    fn tracking(&self, path: &Path) -> Result<TrackingState> {
        let disk = self.find(path)?;
        let tracking = disk.tracking.lock();
        let ids = tracking.as_ref().map(|tracking| &tracking.ids);
        let last = ids.and_then(|ids| ids.last());
        Ok(TrackingState {
            enabled: tracking.is_some(),
            newer_changes: last.is_some_and(|(_, ranges)| !ranges.is_empty()),
            most_recent_id: last.map(|(id, _)| id.clone()).unwrap_or_default(),
        })
    }

    fn set_tracking(&self, path: &Path, enabled: bool) -> Result<()> {
        let disk = self.find(path)?;
        let mut tracking = disk.tracking.lock();
        match (enabled, tracking.is_some()) {
            (true, false) => *tracking = Some(Tracking::default()),
            (false, true) => *tracking = None,
            _ => {}
        }
        Ok(())
    }

    fn changes(&self, path: &Path, id: &str, range: ByteRange) -> Result<ChangePage> {
        let disk = self.find(path)?;
        let shown = || path.display().to_string();
        let tracking = disk.tracking.lock();
        let Some(tracking) = &*tracking else {
            return Err(ProviderError::TrackingDisabled { path: shown() });
        };
        let Some((_, ranges)) = tracking.ids.iter().find(|(known, _)| known == id) else {
            return Err(ProviderError::UnknownTrackingId { path: shown(), id: id.into() });
        };
        let fail_from = disk.faults.changes_fail_from.load(Ordering::SeqCst);
        if fail_from > 0 && range.offset >= fail_from {
            return Err(ProviderError::Failed { path: shown(), reason: "error 0xC03A0029".into() });
        }
        let page_bytes = match disk.faults.page_bytes.load(Ordering::SeqCst) {
            0 => range.length,
            bytes => bytes.min(range.length),
        };
        let page = ByteRange::new(range.offset, page_bytes);
        let first = ranges.partition_point(|range| range.end() <= page.offset);
        let inside = ranges[first..].iter().take_while(|range| range.offset < page.end());
        let processed_bytes =
            if disk.faults.processed_zero.load(Ordering::SeqCst) { 0 } else { page_bytes };
        Ok(ChangePage {
            ranges: inside.map(|range| range.intersect(&page)).collect(),
            processed_bytes,
        })
    }

    fn open(&self, path: &Path) -> Result<Arc<dyn BlockDevice>> {
        Ok(Handle::new(&self.find(path)?))
    }

    fn open_writable(&self, path: &Path) -> Result<Arc<dyn WritableBlockDevice>> {
        Ok(Handle::new(&self.find(path)?))
    }

    fn create(&self, path: &Path, disk: &NewDisk, _: &CancelToken) -> Result<()> {
        if disk.format != "vhdx" {
            let reason = format!("no disks of the format {} are made here", disk.format);
            return Err(ProviderError::Unsupported { path: path.display().to_string(), reason });
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        std::fs::write(path, "").unwrap();
        let size = usize::try_from(disk.virtual_size_bytes).unwrap();
        self.disks.lock().insert(name, TestDisk::memory(vec![0; size]));
        Ok(())
    }

    fn open_disks(&self) -> OpenDisks {
        let open = self.disks.lock().values().map(|disk| disk.handles.load(Ordering::SeqCst)).sum();
        OpenDisks { open, attached: 0 }
    }

    fn freeze(&self, paths: &[PathBuf]) -> Result<Box<dyn FrozenDisks>> {
        let mut disks = Vec::new();
        for path in paths {
            let disk = self.find(path)?;
            let mut tracking = disk.tracking.lock();
            let tracking_id = tracking.as_mut().map(|tracking| {
                tracking.sealed += 1;
                let id = format!("rctX:0:{:08}", tracking.sealed);
                tracking.ids.push((id.clone(), Vec::new()));
                id
            });
            drop(tracking);
            let size = disk.content.size_bytes();
            // A copy is a moment; patterns never change.
            let device: Arc<dyn BlockDevice> = match usize::try_from(size) {
                Ok(size) if size <= 64 << 20 => {
                    let mut bytes = vec![0; size];
                    disk.content.read_at(&mut bytes, 0).unwrap();
                    Arc::new(MemoryDevice::from_bytes(bytes))
                }
                _ => Handle::new(&disk),
            };
            disks.push(FrozenDisk { path: path.clone(), device, tracking_id });
        }
        self.frozen.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(Frozen { disks, frozen: Arc::clone(&self.frozen) }))
    }
}

struct Frozen {
    disks: Vec<FrozenDisk>,
    frozen: Arc<AtomicUsize>,
}

impl FrozenDisks for Frozen {
    fn disks(&self) -> &[FrozenDisk] {
        &self.disks
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.frozen.fetch_sub(1, Ordering::SeqCst);
    }
}
