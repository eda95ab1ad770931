//! The metadata region (MS-VHDX 2.6): a table of items, and the items that make the disk.
//!
//! The first 64 KiB are the table; the items lie behind it in the same region. Items that are not
//! known here are never touched: a writer changes only the bytes of the items it knows, so what
//! other programs keep in an image stays.

use super::guid::Guid;
use super::locator::ParentLocator;
use crate::bytes::{le_u16, le_u32, le_u64, length, put};
use vmtide_block::{BlockDevice, BlockError, ByteRange, Result};

/// The bytes of the table; items begin behind it.
pub(crate) const METADATA_TABLE_BYTES: usize = 64 << 10;
/// The most items a table holds.
pub(crate) const MAX_ITEMS: u16 = 2047;
/// The most bytes of one item.
pub(crate) const MAX_ITEM_BYTES: u32 = 1 << 20;
/// The sizes a block may have, powers of two.
pub(crate) const BLOCK_BYTES: std::ops::RangeInclusive<u32> = 1 << 20..=256 << 20;
/// The largest disk.
pub(crate) const MAX_DISK_BYTES: u64 = 64 << 40;

/// Block size and kind of image.
pub(crate) const FILE_PARAMETERS: Guid =
    Guid::new(0xcaa1_6737, 0xfa36, 0x4d43, [0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b]);
/// The size of the disk.
pub(crate) const VIRTUAL_DISK_SIZE: Guid =
    Guid::new(0x2fa5_4224, 0xcd1b, 0x4876, [0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8]);
/// The disk's identity towards the guest (SCSI page 83).
pub(crate) const VIRTUAL_DISK_ID: Guid =
    Guid::new(0xbeca_12ab, 0xb2e6, 0x4523, [0x93, 0xef, 0xc3, 0x09, 0xe0, 0x00, 0xc7, 0x46]);
/// The sector size that the guest addresses the disk by.
pub(crate) const LOGICAL_SECTOR_SIZE: Guid =
    Guid::new(0x8141_bf1d, 0xa96f, 0x4709, [0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f]);
/// The sector size that the guest is told the medium has.
pub(crate) const PHYSICAL_SECTOR_SIZE: Guid =
    Guid::new(0xcda3_48c7, 0x445d, 0x4471, [0x9c, 0xc9, 0xe9, 0x88, 0x52, 0x51, 0xc5, 0x56]);
/// The parent of a differencing image.
pub(crate) const PARENT_LOCATOR: Guid =
    Guid::new(0xa8d3_5f2d, 0xb30b, 0x454d, [0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c]);

/// The flags of an item.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct ItemFlags(pub(crate) u32);

impl ItemFlags {
    const USER: u32 = 1;
    const VIRTUAL_DISK: u32 = 2;
    const REQUIRED: u32 = 4;

    /// A required system item of the file: file parameters, parent locator.
    pub(crate) const FILE: Self = Self(Self::REQUIRED);
    /// A required system item of the virtual disk: sizes and the disk's id.
    pub(crate) const DISK: Self = Self(Self::REQUIRED | Self::VIRTUAL_DISK);

    /// Whether it belongs to a user and not to the format.
    pub(crate) const fn is_user(self) -> bool {
        self.0 & Self::USER != 0
    }

    /// Whether who does not know it must not open the file.
    pub(crate) const fn is_required(self) -> bool {
        self.0 & Self::REQUIRED != 0
    }
}

/// One entry of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MetadataEntry {
    /// What the item is.
    pub(crate) id: Guid,
    /// Where its bytes are in the *file*; empty where the item is.
    pub(crate) range: ByteRange,
    /// Its flags.
    pub(crate) flags: ItemFlags,
}

/// The table of a metadata region.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct MetadataTable {
    /// The entries in the order of the file.
    pub(crate) entries: Vec<MetadataEntry>,
}

impl MetadataTable {
    /// Decodes the table at the head of `region`; `Err` says what is wrong with it, to follow
    /// "metadata table at OFFSET: ".
    pub(crate) fn decode(bytes: &[u8], region: ByteRange) -> Result<Self, String> {
        if bytes.len() < METADATA_TABLE_BYTES {
            return Err(format!("only {} of {METADATA_TABLE_BYTES} bytes", bytes.len()));
        }
        if !bytes.starts_with(b"metadata") {
            let found = String::from_utf8_lossy(&bytes[..8]);
            return Err(format!("the signature is {found:?}, must be \"metadata\""));
        }
        let count = le_u16(bytes, 10);
        if count > MAX_ITEMS {
            return Err(format!("{count} entries, at most {MAX_ITEMS} are allowed"));
        }
        let mut entries = Vec::with_capacity(usize::from(count));
        let mut seen = std::collections::HashSet::with_capacity(usize::from(count));
        for entry in bytes[32..].chunks_exact(32).take(usize::from(count)) {
            let (id, offset, bytes) = (Guid::at(entry, 0), le_u32(entry, 16), le_u32(entry, 20));
            let flags = ItemFlags(le_u32(entry, 24));
            let end = u64::from(offset) + u64::from(bytes);
            let misplaced = (offset as usize) < METADATA_TABLE_BYTES || end > region.length;
            if bytes > MAX_ITEM_BYTES || (misplaced && bytes > 0) {
                return Err(format!(
                    "the item {id} of {bytes} bytes at {offset:#x} of the region must be at most \
                     {MAX_ITEM_BYTES} bytes, behind the table's {METADATA_TABLE_BYTES} and inside \
                     the region of {} bytes",
                    region.length
                ));
            }
            if !seen.insert((id, flags.is_user())) {
                return Err(format!("the item {id} is listed twice"));
            }
            // The region's own end was checked, so this cannot overflow.
            let start = region.offset.saturating_add(u64::from(offset));
            entries.push(MetadataEntry {
                id,
                range: ByteRange::new(start, u64::from(bytes)),
                flags,
            });
        }
        Ok(Self { entries })
    }

    /// The system item with this id.
    pub(crate) fn find(&self, id: Guid) -> Option<&MetadataEntry> {
        self.entries.iter().find(|entry| entry.id == id && !entry.flags.is_user())
    }
}

/// One item to be laid out in a new metadata region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MetadataItem {
    /// What it is.
    pub(crate) id: Guid,
    /// Its flags.
    pub(crate) flags: ItemFlags,
    /// Its content.
    pub(crate) bytes: Vec<u8>,
}

/// The bytes of a metadata region with these items: the table and, behind it, each item on a
/// boundary of 8 bytes. `Err` where they are too many or too long.
pub(crate) fn encode_region(items: &[MetadataItem]) -> Result<Vec<u8>, String> {
    let count =
        u16::try_from(items.len()).ok().filter(|count| *count <= MAX_ITEMS).ok_or_else(|| {
            format!("{} metadata items, at most {MAX_ITEMS} are allowed", items.len())
        })?;
    let mut region = vec![0; METADATA_TABLE_BYTES];
    put(&mut region, 0, b"metadata");
    put(&mut region, 10, &count.to_le_bytes());
    for (index, item) in items.iter().enumerate() {
        let too_long = || format!("the metadata item {} is too long for the region", item.id);
        let bytes = u32::try_from(item.bytes.len()).map_err(|_| too_long())?;
        let offset = u32::try_from(region.len()).map_err(|_| too_long())?;
        if bytes > MAX_ITEM_BYTES {
            return Err(too_long());
        }
        let at = 32 + index * 32;
        put(&mut region, at, &item.id.to_bytes());
        // The specification wants the offset of an item without bytes to be zero.
        put(&mut region, at + 16, &if bytes == 0 { 0 } else { offset }.to_le_bytes());
        put(&mut region, at + 20, &bytes.to_le_bytes());
        put(&mut region, at + 24, &item.flags.0.to_le_bytes());
        region.extend_from_slice(&item.bytes);
        region.resize(region.len().next_multiple_of(8), 0);
    }
    Ok(region)
}

/// What the known items say: all of an image that is not data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Metadata {
    /// The bytes of a block.
    pub(crate) block_size_bytes: u32,
    /// The image is fixed: its blocks stay allocated.
    pub(crate) leave_blocks_allocated: bool,
    /// The image is differencing.
    pub(crate) has_parent: bool,
    /// The bytes of the disk.
    pub(crate) disk_size_bytes: u64,
    /// What the guest knows the disk by.
    pub(crate) disk_id: Guid,
    /// 512 or 4096.
    pub(crate) logical_sector_bytes: u32,
    /// 512 or 4096.
    pub(crate) physical_sector_bytes: u32,
    /// The parent, of a differencing image.
    pub(crate) parent_locator: Option<ParentLocator>,
}

impl Metadata {
    /// The known items, ready for [`encode_region`]; `Err` where the parent locator is too long.
    pub(crate) fn items(&self) -> Result<Vec<MetadataItem>, String> {
        let flags = u32::from(self.leave_blocks_allocated) | u32::from(self.has_parent) << 1;
        let parameters = [self.block_size_bytes.to_le_bytes(), flags.to_le_bytes()].concat();
        let item = |id, flags, bytes| MetadataItem { id, flags, bytes };
        let disk = |id, bytes: &[u8]| item(id, ItemFlags::DISK, bytes.to_vec());
        let mut items = vec![
            item(FILE_PARAMETERS, ItemFlags::FILE, parameters),
            disk(VIRTUAL_DISK_SIZE, &self.disk_size_bytes.to_le_bytes()),
            disk(VIRTUAL_DISK_ID, &self.disk_id.to_bytes()),
            disk(LOGICAL_SECTOR_SIZE, &self.logical_sector_bytes.to_le_bytes()),
            disk(PHYSICAL_SECTOR_SIZE, &self.physical_sector_bytes.to_le_bytes()),
        ];
        if let Some(locator) = &self.parent_locator {
            items.push(item(PARENT_LOCATOR, ItemFlags::FILE, locator.encode()?));
        }
        Ok(items)
    }

    /// Reads the table and the known items of the metadata region at `region`.
    ///
    /// # Errors
    /// [`BlockError::Damaged`] for values that the specification forbids;
    /// [`BlockError::Unsupported`] where an unknown item is required.
    pub(crate) fn read(file: &dyn BlockDevice, region: ByteRange) -> Result<(Self, MetadataTable)> {
        let name = file.name();
        let at = region.offset;
        let damaged = |detail: String| {
            BlockError::damaged(&name, format!("metadata table at {at:#x}: {detail}"))
        };
        let table_range = ByteRange::new(at, METADATA_TABLE_BYTES as u64);
        if table_range.length > region.length || table_range.end() > file.size_bytes() {
            return Err(damaged(format!(
                "its {METADATA_TABLE_BYTES} bytes do not fit the region of {} bytes or the file \
                 of {} bytes",
                region.length,
                file.size_bytes()
            )));
        }
        let mut bytes = vec![0; METADATA_TABLE_BYTES];
        file.read_at(&mut bytes, at)?;
        let table = MetadataTable::decode(&bytes, region).map_err(damaged)?;
        refuse_unknown(&name, at, &table)?;
        let items = Items { file, name: &name, at, table: &table };
        let metadata = items.metadata()?;
        Ok((metadata, table))
    }
}

fn refuse_unknown(name: &str, at: u64, table: &MetadataTable) -> Result<()> {
    const KNOWN: [Guid; 6] = [
        FILE_PARAMETERS,
        VIRTUAL_DISK_SIZE,
        VIRTUAL_DISK_ID,
        LOGICAL_SECTOR_SIZE,
        PHYSICAL_SECTOR_SIZE,
        PARENT_LOCATOR,
    ];
    let unknown = table.entries.iter().find(|entry| {
        entry.flags.is_required() && (entry.flags.is_user() || !KNOWN.contains(&entry.id))
    });
    match unknown {
        Some(entry) => Err(BlockError::unsupported(
            name,
            format!(
                "metadata table at {at:#x}: the item {} is required and unknown; a newer program \
                 wrote this image",
                entry.id
            ),
        )),
        None => Ok(()),
    }
}

/// The items of one region while they are read.
struct Items<'a> {
    file: &'a dyn BlockDevice,
    name: &'a str,
    /// Where the table is.
    at: u64,
    table: &'a MetadataTable,
}

impl Items<'_> {
    fn damaged(&self, what: &str, at: u64, detail: &str) -> BlockError {
        BlockError::damaged(self.name, format!("metadata item {what} at {at:#x}: {detail}"))
    }

    /// Where a known item of at least `least` bytes is.
    fn range(&self, what: &str, id: Guid, least: u64) -> Result<ByteRange> {
        let entry = self.table.find(id).ok_or_else(|| {
            BlockError::damaged(
                self.name,
                format!("metadata table at {:#x}: the item {what} ({id}) is missing", self.at),
            )
        })?;
        if entry.range.length < least || entry.range.end() > self.file.size_bytes() {
            let detail = format!(
                "{} bytes, must be at least {least} inside the file of {} bytes",
                entry.range.length,
                self.file.size_bytes()
            );
            return Err(self.damaged(what, entry.range.offset, &detail));
        }
        Ok(entry.range)
    }

    fn fixed<const N: usize>(&self, what: &str, id: Guid) -> Result<([u8; N], u64)> {
        let range = self.range(what, id, N as u64)?;
        let mut bytes = [0; N];
        self.file.read_at(&mut bytes, range.offset)?;
        Ok((bytes, range.offset))
    }

    fn sector_size(&self, what: &str, id: Guid) -> Result<u32> {
        let (bytes, at) = self.fixed(what, id)?;
        match u32::from_le_bytes(bytes) {
            size @ (512 | 4096) => Ok(size),
            size => Err(self.damaged(what, at, &format!("{size} bytes, must be 512 or 4096"))),
        }
    }

    /// The physical sector size, which the guest is only told: other powers of two, and none, count as
    /// 4096.
    fn physical_sector_size(&self) -> Result<u32> {
        let (bytes, _) = self.fixed("PhysicalSectorSize", PHYSICAL_SECTOR_SIZE)?;
        match u32::from_le_bytes(bytes) {
            size if size == 0 || (size.is_power_of_two() && size > 4096) => Ok(4096),
            _ => self.sector_size("PhysicalSectorSize", PHYSICAL_SECTOR_SIZE),
        }
    }

    fn metadata(&self) -> Result<Metadata> {
        let (parameters, at) = self.fixed::<8>("FileParameters", FILE_PARAMETERS)?;
        let (block_size_bytes, flags) = (le_u32(&parameters, 0), le_u32(&parameters, 4));
        if !block_size_bytes.is_power_of_two() || !BLOCK_BYTES.contains(&block_size_bytes) {
            let detail = format!(
                "the block size is {block_size_bytes} bytes, must be a power of two from 1 MiB to \
                 256 MiB"
            );
            return Err(self.damaged("FileParameters", at, &detail));
        }
        let logical_sector_bytes = self.sector_size("LogicalSectorSize", LOGICAL_SECTOR_SIZE)?;
        let (size, at) = self.fixed::<8>("VirtualDiskSize", VIRTUAL_DISK_SIZE)?;
        let disk_size_bytes = le_u64(&size, 0);
        if disk_size_bytes > MAX_DISK_BYTES
            || !disk_size_bytes.is_multiple_of(u64::from(logical_sector_bytes))
        {
            let detail = format!(
                "{disk_size_bytes} bytes, must be a multiple of the sector size \
                 {logical_sector_bytes} and at most 64 TiB"
            );
            return Err(self.damaged("VirtualDiskSize", at, &detail));
        }
        let has_parent = flags & 2 != 0;
        Ok(Metadata {
            block_size_bytes,
            leave_blocks_allocated: flags & 1 != 0,
            has_parent,
            disk_size_bytes,
            disk_id: Guid::at(&self.fixed::<16>("VirtualDiskId", VIRTUAL_DISK_ID)?.0, 0),
            logical_sector_bytes,
            physical_sector_bytes: self.physical_sector_size()?,
            parent_locator: if has_parent { Some(self.parent_locator()?) } else { None },
        })
    }

    fn parent_locator(&self) -> Result<ParentLocator> {
        let range = self.range("ParentLocator", PARENT_LOCATOR, 20)?;
        let mut bytes = vec![0; length(range.length)];
        self.file.read_at(&mut bytes, range.offset)?;
        ParentLocator::decode(&bytes)
            .map_err(|fault| self.damaged("ParentLocator", range.offset, &fault))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtide_block::MemoryDevice;

    const REGION: ByteRange = ByteRange::new(0, 1 << 20);

    fn metadata() -> Metadata {
        let entries = vec![("parent_linkage".to_owned(), "{}".to_owned())];
        Metadata {
            block_size_bytes: 32 << 20,
            leave_blocks_allocated: false,
            has_parent: true,
            disk_size_bytes: 10 << 30,
            disk_id: Guid::random().unwrap(),
            logical_sector_bytes: 512,
            physical_sector_bytes: 4096,
            parent_locator: Some(ParentLocator { entries }),
        }
    }

    fn read(items: &[MetadataItem]) -> Result<(Metadata, MetadataTable)> {
        let mut bytes = encode_region(items).unwrap();
        bytes.resize(1 << 20, 0);
        Metadata::read(&MemoryDevice::from_bytes(bytes), REGION)
    }

    #[test]
    fn metadata_comes_back_with_unknown_items_beside_it() {
        let mut items = metadata().items().unwrap();
        let optional = Guid::random().unwrap();
        let flags = ItemFlags(ItemFlags::USER);
        items.push(MetadataItem { id: optional, flags, bytes: vec![7; 5] });
        items.push(MetadataItem { id: optional, flags: ItemFlags(0), bytes: vec![] });
        // A user item with a system item's id is another item.
        items.insert(0, MetadataItem { id: VIRTUAL_DISK_ID, flags, bytes: vec![9; 16] });
        let expected = Metadata { disk_id: Guid::at(&items[3].bytes, 0), ..metadata() };
        let (found, table) = read(&items).unwrap();
        assert_eq!(found, expected);
        assert_eq!(table.entries.len(), 9);
        assert_eq!(table.entries[7].range.length, 5);
    }

    /// Changes the bytes of one item and says what reading gives.
    fn broken(id: Guid, bytes: &[u8]) -> String {
        let mut items = metadata().items().unwrap();
        for item in &mut items {
            if item.id == id {
                item.bytes = bytes.to_vec();
            }
        }
        read(&items).unwrap_err().to_string()
    }

    #[test]
    fn impossible_values_are_refused() {
        for (id, value, text) in [
            (FILE_PARAMETERS, 3u64 << 20, "block size is 3145728"),
            (FILE_PARAMETERS, 1 << 19, "block size is 524288"),
            (FILE_PARAMETERS, 1 << 29, "block size is 536870912"),
            (FILE_PARAMETERS, 0, "block size is 0"),
            (VIRTUAL_DISK_SIZE, 513, "513 bytes"),
            (VIRTUAL_DISK_SIZE, (64 << 40) + 512, "at most 64 TiB"),
            (LOGICAL_SECTOR_SIZE, 1024, "1024 bytes, must be 512 or 4096"),
            (PHYSICAL_SECTOR_SIZE, 513, "513 bytes, must be 512 or 4096"),
        ] {
            let error = broken(id, &value.to_le_bytes());
            assert!(error.contains(text) && error.contains("at 0x10"), "{error}");
        }
        assert!(broken(FILE_PARAMETERS, &[0; 7]).contains("7 bytes, must be at least 8"));
        assert!(broken(PARENT_LOCATOR, &[0; 20]).contains("the type is"));
    }

    #[test]
    fn missing_double_and_unknown_required_items_are_refused() {
        let items = metadata().items().unwrap();
        for index in 0..items.len() {
            let mut fewer = items.clone();
            fewer.remove(index);
            assert!(read(&fewer).unwrap_err().to_string().contains("is missing"));
            let mut more = items.clone();
            more.push(items[index].clone());
            assert!(read(&more).unwrap_err().to_string().contains("listed twice"));
        }
        for flags in [ItemFlags::FILE, ItemFlags(ItemFlags::REQUIRED | ItemFlags::USER)] {
            let mut more = items.clone();
            more.push(MetadataItem { id: Guid::random().unwrap(), flags, bytes: vec![1] });
            let error = read(&more).unwrap_err();
            assert!(matches!(error, BlockError::Unsupported { .. }), "{error}");
        }
    }

    #[test]
    fn a_table_that_cannot_be_is_refused() {
        let good = encode_region(&metadata().items().unwrap()).unwrap();
        let with = |at: usize, value: &[u8]| {
            let mut bytes = good.clone();
            bytes[at..at + value.len()].copy_from_slice(value);
            MetadataTable::decode(&bytes, REGION).unwrap_err()
        };
        assert!(with(0, b"M").contains("signature"));
        assert!(with(10, &2048u16.to_le_bytes()).contains("2048 entries"));
        assert!(with(32 + 16, &0xffffu32.to_le_bytes()).contains("behind the table"));
        assert!(with(32 + 16, &u32::MAX.to_le_bytes()).contains("inside the region"));
        assert!(with(32 + 20, &u32::MAX.to_le_bytes()).contains("must be at most"));
        let short = Metadata::read(&MemoryDevice::new(1000), REGION).unwrap_err();
        assert!(short.to_string().contains("the file of 1000 bytes"), "{short}");
    }
}
