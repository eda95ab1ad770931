//! What the tests of tracking share: files of tracking in memory, a disk that is a version for each block, and a log of
//! all that was done to either, from which any moment's crash can be rebuilt.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "shared by test programs that each use a part of it; a failed unwrap is a failed test"
)]

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};
use vmtide_block::{BlockDevice, ByteRange, WritableBlockDevice};
use vmtide_track::{StoreFile, TrackingStore};

/// The bytes of a block here.
pub const BLOCK: u64 = 4096;

/// What was done, in order; each noted when it begins.
#[derive(Clone, Debug)]
pub enum Op {
    /// Blocks `first..end` became this version.
    Write {
        first: usize,
        end: usize,
        version: u64,
    },
    Flush,
    Replace(StoreFile, Vec<u8>),
    Update(Vec<(u64, Vec<u8>)>),
    Remove(StoreFile),
}

pub type Log = Arc<Mutex<Vec<Op>>>;

/// The two files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Files {
    pub files: HashMap<StoreFile, Vec<u8>>,
}

impl Files {
    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::Replace(file, bytes) => drop(self.files.insert(*file, bytes.clone())),
            Op::Remove(file) => drop(self.files.remove(file)),
            Op::Update(pieces) => {
                let mrt = self.files.get_mut(&StoreFile::Mrt).unwrap();
                for (at, bytes) in pieces {
                    let at = *at as usize;
                    mrt[at..at + bytes.len()].copy_from_slice(bytes);
                }
            }
            Op::Write { .. } | Op::Flush => {}
        }
    }
}

/// What other threads do in the middle of a call, done by the one thread there is.
pub type Meanwhile = Mutex<Option<Box<dyn Fn() + Send>>>;

fn meanwhile(hook: &Meanwhile) {
    // Taken out while it runs, for it comes back here.
    let taken = hook.lock().unwrap().take();
    if let Some(run) = taken {
        run();
        hook.lock().unwrap().get_or_insert(run);
    }
}

/// The files of tracking in memory.
#[derive(Default)]
pub struct MemoryStore {
    pub files: Mutex<Files>,
    pub log: Log,
    /// Called before the `.rct` is replaced.
    pub before_replace: Meanwhile,
    /// Fails everything from now on.
    pub broken: Mutex<bool>,
    /// Fails changes of marks from now on.
    pub marks_broken: Mutex<bool>,
}

impl MemoryStore {
    pub fn new(files: Files, log: Log) -> Self {
        Self { files: Mutex::new(files), log, ..Self::default() }
    }

    fn act(&self, op: Op) -> io::Result<()> {
        if *self.broken.lock().unwrap() {
            return Err(io::Error::other("the medium is gone"));
        }
        self.files.lock().unwrap().apply(&op);
        self.log.lock().unwrap().push(op);
        Ok(())
    }
}

impl TrackingStore for MemoryStore {
    fn read(&self, file: StoreFile) -> io::Result<Option<Vec<u8>>> {
        Ok(self.files.lock().unwrap().files.get(&file).cloned())
    }
    fn replace(&self, file: StoreFile, bytes: &[u8]) -> io::Result<()> {
        if file == StoreFile::Rct {
            meanwhile(&self.before_replace);
        }
        self.act(Op::Replace(file, bytes.to_vec()))
    }
    fn update(&self, file: StoreFile, pieces: &[(u64, &[u8])]) -> io::Result<()> {
        assert_eq!(file, StoreFile::Mrt, "only marks are changed in place");
        if *self.marks_broken.lock().unwrap() {
            return Err(io::Error::other("marks cannot be written"));
        }
        self.act(Op::Update(pieces.iter().map(|(at, bytes)| (*at, bytes.to_vec())).collect()))
    }
    fn remove(&self, file: StoreFile) -> io::Result<()> {
        self.act(Op::Remove(file))
    }
}

/// A disk that remembers of each block only which write was its last. Writes are of whole blocks, and carry the version in
/// their first bytes.
pub struct VersionDisk {
    pub blocks: Mutex<Vec<u64>>,
    pub log: Log,
    /// Called before a flush.
    pub before_flush: Meanwhile,
}

impl VersionDisk {
    pub fn new(blocks: Vec<u64>, log: Log) -> Self {
        Self { blocks: Mutex::new(blocks), log, before_flush: Mutex::new(None) }
    }

    fn set(&self, range: ByteRange, version: u64) {
        assert!(range.offset.is_multiple_of(BLOCK) && range.length.is_multiple_of(BLOCK));
        let (first, end) = ((range.offset / BLOCK) as usize, (range.end() / BLOCK) as usize);
        self.blocks.lock().unwrap()[first..end].fill(version);
        self.log.lock().unwrap().push(Op::Write { first, end, version });
    }
}

impl BlockDevice for VersionDisk {
    fn name(&self) -> String {
        "disk".into()
    }
    fn size_bytes(&self) -> u64 {
        self.blocks.lock().unwrap().len() as u64 * BLOCK
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        self.check_range(ByteRange::new(offset, buffer.len() as u64))?;
        let blocks = self.blocks.lock().unwrap();
        for (index, byte) in buffer.iter_mut().enumerate() {
            let at = offset + index as u64;
            let version = blocks[(at / BLOCK) as usize].to_le_bytes();
            *byte = version.get((at % BLOCK) as usize).copied().unwrap_or(0);
        }
        Ok(())
    }
}

impl WritableBlockDevice for VersionDisk {
    fn write_at(&self, data: &[u8], offset: u64) -> vmtide_block::Result<()> {
        let version = u64::from_le_bytes(data[..8].try_into().unwrap());
        self.set(ByteRange::new(offset, data.len() as u64), version);
        Ok(())
    }
    fn write_zeroes(&self, range: ByteRange) -> vmtide_block::Result<()> {
        self.set(range, 0);
        Ok(())
    }
    fn flush(&self) -> vmtide_block::Result<()> {
        meanwhile(&self.before_flush);
        self.log.lock().unwrap().push(Op::Flush);
        Ok(())
    }
    fn resize(&self, size_bytes: u64) -> vmtide_block::Result<()> {
        self.blocks.lock().unwrap().resize((size_bytes / BLOCK) as usize, 0);
        Ok(())
    }
}

/// The data of a write of `count` blocks.
pub fn data(version: u64, count: u64) -> Vec<u8> {
    let mut data = vec![0; (count * BLOCK) as usize];
    data[..8].copy_from_slice(&version.to_le_bytes());
    data
}

/// Xorshift: the same numbers at every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// All blocks of an answer, asked for in pages.
pub fn changed_blocks(
    disk: &vmtide_track::TrackedDisk,
    id: &str,
) -> vmtide_track::Result<Vec<bool>> {
    let size = disk.size_bytes();
    let mut changed = vec![false; (size / BLOCK) as usize];
    let mut at = 0;
    while at < size {
        let page = disk.changes_since(id, ByteRange::from_bounds(at, size), 7)?;
        for range in &page.ranges {
            assert!(range.offset >= at && !range.is_empty() && range.end() <= size);
            changed[(range.offset / BLOCK) as usize..range.end().div_ceil(BLOCK) as usize]
                .fill(true);
        }
        assert!(page.processed_bytes > 0);
        at += page.processed_bytes;
    }
    Ok(changed)
}
