//! VHDX images made field by field, by hand and from the specification alone: what the reader says
//! of them shares no code with what wrote them.
#![allow(dead_code, reason = "each test program uses a part of what they share")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use vmtide_block::{BlockDevice, MemoryDevice, OpenMode, RawDevice, WritableBlockDevice};

pub const MIB: u64 = 1 << 20;
pub const KIB: u64 = 1 << 10;
pub const LOG_AT: u64 = MIB;
pub const METADATA_AT: u64 = 2 * MIB;
pub const BAT_AT: u64 = 3 * MIB;

pub const NOT_PRESENT: u64 = 0;
pub const UNDEFINED: u64 = 1;
pub const ZERO: u64 = 2;
pub const UNMAPPED: u64 = 3;
pub const FULL: u64 = 6;
pub const PARTIAL: u64 = 7;

pub const BAT_REGION: &str = "2DC27766-F623-4200-9D64-115E9BFD4A08";
pub const METADATA_REGION: &str = "8B7CA206-4790-4B9A-B8FE-575F050F886E";
pub const FILE_PARAMETERS: &str = "CAA16737-FA36-4D43-B3B6-33F0AA44E76B";
pub const DISK_SIZE: &str = "2FA54224-CD1B-4876-B211-5DBED83BF4B8";
pub const DISK_ID: &str = "BECA12AB-B2E6-4523-93EF-C309E000C746";
pub const LOGICAL_SECTOR: &str = "8141BF1D-A96F-4709-BA47-F233A8FAAB5F";
pub const PHYSICAL_SECTOR: &str = "CDA348C7-445D-4471-9CC9-E9885251C556";
pub const PARENT_LOCATOR: &str = "A8D35F2D-B30B-454D-ABF7-D3D84834AB0C";
pub const LOCATOR_TYPE: &str = "B04AEFB7-D19E-4A81-B789-25B8E9445913";

/// A GUID's sixteen bytes as VHDX stores them.
pub fn guid(text: &str) -> [u8; 16] {
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let mut bytes: Vec<u8> =
        (0..16).map(|at| u8::from_str_radix(&digits[at * 2..at * 2 + 2], 16).unwrap()).collect();
    bytes[0..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes.try_into().unwrap()
}

pub fn put(bytes: &mut [u8], at: u64, value: &[u8]) {
    let at = usize::try_from(at).unwrap();
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// Puts the right CRC-32C at byte 4.
pub fn seal(bytes: &mut [u8]) {
    bytes[4..8].fill(0);
    let crc = crc32c::crc32c(bytes);
    bytes[4..8].copy_from_slice(&crc.to_le_bytes());
}

/// One log entry of pages and zero ranges.
pub struct Entry<'a> {
    pub guid: [u8; 16],
    pub sequence: u64,
    pub tail: u32,
    pub flushed: u64,
    pub last: u64,
    pub pages: &'a [(u64, [u8; 4096])],
    pub zeros: &'a [(u64, u64)],
}

impl Entry<'_> {
    pub fn bytes(&self) -> Vec<u8> {
        let count = self.pages.len() + self.zeros.len();
        let head = (64 + 32 * count).div_ceil(4096) * 4096;
        let mut entry = vec![0; head + 4096 * self.pages.len()];
        let length = u32::try_from(entry.len()).unwrap();
        put(&mut entry, 0, b"loge");
        put(&mut entry, 8, &length.to_le_bytes());
        put(&mut entry, 12, &self.tail.to_le_bytes());
        put(&mut entry, 16, &self.sequence.to_le_bytes());
        put(&mut entry, 24, &u32::try_from(count).unwrap().to_le_bytes());
        put(&mut entry, 32, &self.guid);
        put(&mut entry, 48, &self.flushed.to_le_bytes());
        put(&mut entry, 56, &self.last.to_le_bytes());
        let mut at = 64;
        for (offset, length) in self.zeros {
            put(&mut entry, at, b"zero");
            put(&mut entry, at + 8, &length.to_le_bytes());
            put(&mut entry, at + 16, &offset.to_le_bytes());
            put(&mut entry, at + 24, &self.sequence.to_le_bytes());
            at += 32;
        }
        for (index, (offset, page)) in self.pages.iter().enumerate() {
            put(&mut entry, at, b"desc");
            put(&mut entry, at + 4, &page[4092..]);
            put(&mut entry, at + 8, &page[..8]);
            put(&mut entry, at + 16, &offset.to_le_bytes());
            put(&mut entry, at + 24, &self.sequence.to_le_bytes());
            at += 32;
            let sector = (head + index * 4096) as u64;
            put(&mut entry, sector, page);
            put(&mut entry, sector, b"data");
            put(&mut entry, sector + 4, &self.sequence.to_le_bytes()[4..]);
            put(&mut entry, sector + 4092, &self.sequence.to_le_bytes()[..4]);
        }
        seal(&mut entry);
        entry
    }
}

/// An image to be made.
#[derive(Clone)]
pub struct Image {
    pub disk_bytes: u64,
    pub block_bytes: u64,
    pub sector_bytes: u64,
    /// Bit 0: fixed; bit 1: has a parent.
    pub flags: u32,
    /// Keys and values of the parent locator.
    pub locator: Vec<(String, String)>,
    /// More metadata items: id, flags, content.
    pub items: Vec<(String, u32, Vec<u8>)>,
    /// More regions: id, offset, length, flags.
    pub regions: Vec<(String, u64, u32, u32)>,
    pub sequences: [u64; 2],
    pub data_write_guid: [u8; 16],
    pub log_guid: [u8; 16],
    pub log_version: u16,
    pub log_bytes: u32,
    /// What the log holds: position and bytes, wrapping at its end.
    pub log: Vec<(u64, Vec<u8>)>,
    /// BAT entries by their place in the table.
    pub bat: BTreeMap<u64, u64>,
    /// What else is in the file.
    pub data: Vec<(u64, Vec<u8>)>,
    /// The size of the file; at least as much as is written.
    pub file_bytes: u64,
}

impl Image {
    pub fn new(disk_bytes: u64, block_bytes: u64) -> Self {
        Self {
            disk_bytes,
            block_bytes,
            sector_bytes: 512,
            flags: 0,
            locator: Vec::new(),
            items: Vec::new(),
            regions: Vec::new(),
            sequences: [5, 6],
            data_write_guid: guid("11111111-2222-3333-4444-555555555555"),
            log_guid: [0; 16],
            log_version: 0,
            log_bytes: 1 << 20,
            log: Vec::new(),
            bat: BTreeMap::new(),
            data: Vec::new(),
            file_bytes: 0,
        }
    }

    pub fn child(disk_bytes: u64, block_bytes: u64) -> Self {
        let mut image = Self::new(disk_bytes, block_bytes);
        image.flags = 2;
        image.locator = vec![
            ("parent_linkage".into(), "{11111111-2222-3333-4444-555555555555}".into()),
            ("relative_path".into(), r".\parent.vhdx".into()),
        ];
        image
    }

    pub fn ratio(&self) -> u64 {
        (1 << 23) * self.sector_bytes / self.block_bytes
    }

    pub fn blocks(&self) -> u64 {
        self.disk_bytes.div_ceil(self.block_bytes)
    }

    pub fn entries(&self) -> u64 {
        let blocks = self.blocks();
        match self.flags & 2 {
            0 => blocks + blocks.saturating_sub(1) / self.ratio(),
            _ => blocks.div_ceil(self.ratio()) * (self.ratio() + 1),
        }
    }

    pub fn bat_bytes(&self) -> u64 {
        (self.entries() * 8).next_multiple_of(MIB).max(MIB)
    }

    /// The first byte behind all tables.
    pub fn payload_at(&self) -> u64 {
        BAT_AT + self.bat_bytes()
    }

    /// Sets the BAT entry of a payload block.
    pub fn block(&mut self, number: u64, state: u64, offset: u64) {
        self.bat.insert(number + number / self.ratio(), offset | state);
    }

    /// Sets the BAT entry of a chunk's sector bitmap.
    pub fn bitmap(&mut self, chunk: u64, state: u64, offset: u64) {
        self.bat.insert(chunk * (self.ratio() + 1) + self.ratio(), offset | state);
    }

    pub fn header(&self, sequence: u64) -> Vec<u8> {
        let mut header = vec![0; 4096];
        put(&mut header, 0, b"head");
        put(&mut header, 8, &sequence.to_le_bytes());
        put(&mut header, 16, &guid("99999999-2222-3333-4444-555555555555"));
        put(&mut header, 32, &self.data_write_guid);
        put(&mut header, 48, &self.log_guid);
        put(&mut header, 64, &self.log_version.to_le_bytes());
        put(&mut header, 66, &1u16.to_le_bytes());
        put(&mut header, 68, &self.log_bytes.to_le_bytes());
        put(&mut header, 72, &LOG_AT.to_le_bytes());
        seal(&mut header);
        header
    }

    pub fn region_table(&self) -> Vec<u8> {
        let mut table = vec![0; 65536];
        put(&mut table, 0, b"regi");
        let bat_bytes = u32::try_from(self.bat_bytes()).unwrap();
        let mut regions = vec![
            (BAT_REGION.to_owned(), BAT_AT, bat_bytes, 1),
            (METADATA_REGION.to_owned(), METADATA_AT, 1 << 20, 1),
        ];
        regions.extend(self.regions.iter().cloned());
        put(&mut table, 8, &u32::try_from(regions.len()).unwrap().to_le_bytes());
        for (at, (id, offset, length, flags)) in (16..).step_by(32).zip(&regions) {
            put(&mut table, at, &guid(id));
            put(&mut table, at + 16, &offset.to_le_bytes());
            put(&mut table, at + 24, &length.to_le_bytes());
            put(&mut table, at + 28, &flags.to_le_bytes());
        }
        seal(&mut table);
        table
    }

    pub fn locator_item(&self) -> Vec<u8> {
        let mut item = vec![0; 20 + 12 * self.locator.len()];
        put(&mut item, 0, &guid(LOCATOR_TYPE));
        put(&mut item, 18, &u16::try_from(self.locator.len()).unwrap().to_le_bytes());
        for (at, (key, value)) in (20..).step_by(12).zip(&self.locator) {
            for (text, offset_at, length_at) in [(key, 0, 8), (value, 4, 10)] {
                let units: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
                let offset = u32::try_from(item.len()).unwrap();
                put(&mut item, at + offset_at, &offset.to_le_bytes());
                let length = u16::try_from(units.len()).unwrap();
                put(&mut item, at + length_at, &length.to_le_bytes());
                item.extend(units);
            }
        }
        item
    }

    /// The metadata region's first part: the table and the items from 64 KiB on, one per KiB.
    pub fn metadata(&self) -> Vec<u8> {
        let block_bytes = u32::try_from(self.block_bytes).unwrap();
        let parameters = [block_bytes.to_le_bytes(), self.flags.to_le_bytes()].concat();
        let sector_bytes = u32::try_from(self.sector_bytes).unwrap();
        let id = guid("77777777-2222-3333-4444-555555555555");
        let mut items = vec![
            (FILE_PARAMETERS.to_owned(), 4, parameters),
            (DISK_SIZE.to_owned(), 6, self.disk_bytes.to_le_bytes().to_vec()),
            (DISK_ID.to_owned(), 6, id.to_vec()),
            (LOGICAL_SECTOR.to_owned(), 6, sector_bytes.to_le_bytes().to_vec()),
            (PHYSICAL_SECTOR.to_owned(), 6, 4096u32.to_le_bytes().to_vec()),
        ];
        if !self.locator.is_empty() {
            items.push((PARENT_LOCATOR.to_owned(), 4, self.locator_item()));
        }
        items.extend(self.items.iter().cloned());
        let mut region = vec![0; 65536];
        put(&mut region, 0, b"metadata");
        put(&mut region, 10, &u16::try_from(items.len()).unwrap().to_le_bytes());
        for (at, (id, flags, bytes)) in (32..).step_by(32).zip(&items) {
            let offset = u32::try_from(region.len()).unwrap();
            put(&mut region, at, &guid(id));
            put(&mut region, at + 16, &offset.to_le_bytes());
            put(&mut region, at + 20, &u32::try_from(bytes.len()).unwrap().to_le_bytes());
            put(&mut region, at + 24, &flags.to_le_bytes());
            region.extend(bytes);
            region.resize(region.len().next_multiple_of(1024), 0);
        }
        region
    }

    /// Writes the image onto a device that is large enough or grows.
    pub fn write(&self, file: &dyn WritableBlockDevice) {
        let mut pieces: Vec<(u64, Vec<u8>)> = vec![
            (0, b"vhdxfile".to_vec()),
            (64 * KIB, self.header(self.sequences[0])),
            (128 * KIB, self.header(self.sequences[1])),
            (192 * KIB, self.region_table()),
            (256 * KIB, self.region_table()),
            (METADATA_AT, self.metadata()),
        ];
        for (position, bytes) in &self.log {
            for (sector, at) in bytes.chunks(4096).zip((*position..).step_by(4096)) {
                pieces.push((LOG_AT + at % u64::from(self.log_bytes), sector.to_vec()));
            }
        }
        for (index, entry) in &self.bat {
            pieces.push((BAT_AT + index * 8, entry.to_le_bytes().to_vec()));
        }
        pieces.extend(self.data.iter().cloned());
        let end = pieces.iter().map(|(at, bytes)| at + bytes.len() as u64).max().unwrap_or(0);
        file.resize(end.max(self.file_bytes).max(self.payload_at())).unwrap();
        for (at, bytes) in pieces {
            file.write_at(&bytes, at).unwrap();
        }
    }

    /// The image in memory.
    pub fn in_memory(&self) -> Arc<MemoryDevice> {
        let file = MemoryDevice::new(0);
        self.write(&file);
        Arc::new(file)
    }

    /// The image in a sparse file.
    pub fn in_file(&self, path: &Path) -> Arc<dyn BlockDevice> {
        let file = RawDevice::open(path, OpenMode::CreateNew { size_bytes: 0 }).unwrap();
        self.write(&file);
        Arc::new(file)
    }
}
