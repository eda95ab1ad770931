//! VMDK images built from the documented layout alone, by code that shares nothing with the
//! library: the kinds of which no public sample exists, and broken ones.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};
use vmtide_block::{BlockDevice, BlockError, MemoryDevice, Result, WritableBlockDevice};
use vmtide_image::vmdk::ExtentFiles;

/// Files in memory by their names.
#[derive(Clone, Default)]
pub struct MemoryFiles(pub Arc<Mutex<BTreeMap<String, Arc<MemoryDevice>>>>);

impl MemoryFiles {
    pub fn with(self, name: &str, bytes: Vec<u8>) -> Self {
        self.put(name, Arc::new(MemoryDevice::from_bytes(bytes)));
        self
    }

    pub fn put(&self, name: &str, device: Arc<MemoryDevice>) {
        self.0.lock().unwrap().insert(name.to_owned(), device);
    }

    pub fn get(&self, name: &str) -> Arc<MemoryDevice> {
        self.0.lock().unwrap()[name].clone()
    }

    fn find(&self, name: &str) -> Result<Arc<MemoryDevice>> {
        let found = self.0.lock().unwrap().get(name).cloned();
        found.ok_or_else(|| BlockError::io(name, std::io::ErrorKind::NotFound))
    }
}

impl ExtentFiles for MemoryFiles {
    fn open(&self, name: &str) -> Result<Arc<dyn BlockDevice>> {
        Ok(self.find(name)?)
    }

    fn open_writable(&self, name: &str) -> Result<Arc<dyn WritableBlockDevice>> {
        Ok(self.find(name)?)
    }
}

/// A descriptor with these extent lines.
pub fn descriptor(kind: &str, parent: Option<(&str, &str)>, lines: &str) -> String {
    let (cid, hint) = parent.unwrap_or(("ffffffff", ""));
    let hint =
        if parent.is_some() { format!("parentFileNameHint=\"{hint}\"\n") } else { String::new() };
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=0badcafe\nparentCID={cid}\n{hint}createType=\"{kind}\"\n\
         {lines}\nddb.adapterType = \"lsilogic\"\n"
    )
}

fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn sector(bytes: &[u8]) -> u32 {
    assert_eq!(bytes.len() % 512, 0);
    u32::try_from(bytes.len() / 512).unwrap()
}

/// The pieces of a disk of this grain size; none where all is zero.
fn grains(disk: &[u8], size: usize) -> Vec<Option<Vec<u8>>> {
    disk.chunks(size)
        .map(|piece| {
            let mut piece = piece.to_vec();
            let is_zero = piece.iter().all(|byte| *byte == 0);
            piece.resize(size, 0);
            (!is_zero).then_some(piece)
        })
        .collect()
}

/// A COWD extent ("ESX Server Sparse Extents").
pub fn cowd(disk: &[u8], grain_sectors: usize) -> Vec<u8> {
    let grains = grains(disk, grain_sectors * 512);
    let tables = grains.len().div_ceil(4096);
    let mut bytes = vec![0; 2048];
    bytes[..4].copy_from_slice(b"COWD");
    for (at, value) in
        [(4, 1), (8, 3), (12, sector(disk)), (16, u32::try_from(grain_sectors).unwrap())]
    {
        put32(&mut bytes, at, value);
    }
    put32(&mut bytes, 20, 4);
    put32(&mut bytes, 24, u32::try_from(tables).unwrap());
    bytes.resize(2048 + (tables * 4).next_multiple_of(512), 0);
    for (number, table) in grains.chunks(4096).enumerate() {
        if table.iter().all(Option::is_none) {
            continue;
        }
        let at = bytes.len();
        put32(&mut bytes, 2048 + number * 4, u32::try_from(at / 512).unwrap());
        bytes.resize(at + 4096 * 4, 0);
        for (index, grain) in table.iter().enumerate() {
            if let Some(grain) = grain {
                let place = sector(&bytes);
                put32(&mut bytes, at + index * 4, place);
                bytes.extend(grain);
            }
        }
    }
    let free = sector(&bytes);
    put32(&mut bytes, 28, free);
    bytes
}

/// What a grain of a seSparse extent is, where it holds no data.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Hole {
    Unallocated,
    Unmapped,
    Zero,
}

/// A seSparse extent (as QEMU's block/vmdk.c reads them). Grains of zeros become `hole`.
pub fn sesparse(disk: &[u8], hole: Hole) -> Vec<u8> {
    let grains = grains(disk, 4096);
    let tables = grains.len().div_ceil(4096);
    let directory_sectors = (tables * 8).div_ceil(512);
    let (directory, table_area) = (4, 4 + directory_sectors);
    let grain_area = table_area + tables * 64;
    let mut bytes = vec![0; grain_area * 512];
    let header = [
        (0, 0xcafe_babe),
        (8, 0x2_0000_0001),
        (16, disk.len() as u64 / 512),
        (24, 8),
        (32, 64),
        // Volatile header, journal header, journal, directory, tables, free bitmap, back map, grains.
        (80, 1),
        (88, 1),
        (96, 2),
        (104, 1),
        (112, 3),
        (120, 1),
        (128, directory as u64),
        (136, directory_sectors as u64),
        (144, table_area as u64),
        (152, tables as u64 * 64),
        (192, grain_area as u64),
        (200, grains.len() as u64 * 8),
    ];
    for (at, value) in header {
        put64(&mut bytes, at, value);
    }
    put64(&mut bytes, 512, 0xcafe_cafe);
    let mut next = 0u64;
    // From the last to the first, so that grain numbers and disk order differ.
    for (number, grain) in grains.iter().enumerate().rev() {
        let (table, index) = (number / 4096, number % 4096);
        put64(&mut bytes, directory * 512 + table * 8, 0x1000_0000_0000_0000 | table as u64);
        let entry = match (grain, hole) {
            (Some(grain), _) => {
                bytes.extend(grain);
                next += 1;
                let number = next - 1;
                0x3000_0000_0000_0000 | (number & 0xfff) << 48 | number >> 12
            }
            (None, Hole::Unallocated) => 0,
            (None, Hole::Unmapped) => 0x1000_0000_0000_0000,
            (None, Hole::Zero) => 0x2000_0000_0000_0000,
        };
        put64(&mut bytes, (table_area + table * 64) * 512 + index * 8, entry);
    }
    bytes
}

/// How a stream is ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum StreamEnd {
    Footer,
    /// The tables, but no footer: the header in front says where they are.
    FrontDirectory,
    /// As `Footer`, but the footer is damaged.
    BadFooter,
    /// Grains and the end of the stream.
    NoTables,
    /// Cut off after the grains.
    CutOff,
}

/// A stream-optimized extent with the descriptor inside.
pub fn stream(disk: &[u8], text: &str, end: StreamEnd) -> Vec<u8> {
    let (grain_bytes, capacity) = (65536, disk.len() as u64 / 512);
    let mut header = vec![0u8; 512];
    header[..4].copy_from_slice(b"KDMV");
    for (at, value) in [(4, 3), (8, 0x3_0001), (44, 512)] {
        put32(&mut header, at, value);
    }
    for (at, value) in [(12, capacity), (20, 128), (28, 1), (36, 20), (56, u64::MAX), (64, 128)] {
        put64(&mut header, at, value);
    }
    header[73..79].copy_from_slice(b"\n \r\n\x01\0");
    let mut bytes = header.clone();
    bytes.extend(text.as_bytes());
    bytes.resize(128 * 512, 0);
    let grains = grains(disk, grain_bytes);
    let mut directory = Vec::new();
    for (number, table) in grains.chunks(512).enumerate() {
        let mut entries = vec![0u8; 2048];
        for (index, grain) in table.iter().enumerate() {
            let Some(grain) = grain else { continue };
            let number = number * 512 + index;
            // The last grain holds no more than the disk.
            let length = grain_bytes.min(disk.len() - number * grain_bytes);
            let mut encoder =
                flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::new(6));
            encoder.write_all(&grain[..length]).unwrap();
            let packed = encoder.finish().unwrap();
            put32(&mut entries, index * 4, sector(&bytes));
            bytes.extend((number as u64 * 128).to_le_bytes());
            bytes.extend(u32::try_from(packed.len()).unwrap().to_le_bytes());
            bytes.extend(packed);
            bytes.resize(bytes.len().next_multiple_of(512), 0);
        }
        if end != StreamEnd::NoTables && end != StreamEnd::CutOff {
            bytes.extend(marker(4, 1));
            directory.extend(sector(&bytes).to_le_bytes());
            bytes.extend(entries);
        }
    }
    match end {
        StreamEnd::CutOff => return bytes,
        StreamEnd::NoTables => {}
        StreamEnd::Footer | StreamEnd::BadFooter | StreamEnd::FrontDirectory => {
            directory.resize(directory.len().next_multiple_of(512), 0);
            bytes.extend(marker(directory.len() as u64 / 512, 2));
            let at = u64::from(sector(&bytes));
            put64(&mut header, 56, at);
            bytes.extend(directory);
            if end != StreamEnd::FrontDirectory {
                bytes.extend(marker(1, 3));
                header[0] ^= u8::from(end == StreamEnd::BadFooter);
                bytes.extend(&header);
            } else {
                bytes[..512].copy_from_slice(&header);
            }
        }
    }
    bytes.extend(marker(0, 0));
    bytes
}

fn marker(sectors: u64, kind: u32) -> Vec<u8> {
    let mut bytes = vec![0; 512];
    put64(&mut bytes, 0, sectors);
    put32(&mut bytes, 12, kind);
    bytes
}

pub fn write(directory: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    std::fs::write(directory.join(name), bytes).unwrap();
}
