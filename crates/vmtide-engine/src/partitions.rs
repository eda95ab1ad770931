//! Which partition a byte of a disk lies in: GPT (UEFI specification 2.10, §5.3) and MBR with
//! extended partitions, read from any block device.
//!
//! For reports only: what changed, what damage touches. So a table that makes no sense is no error but
//! no table, and what a guest may have written there cannot cost more than a few hundred KiB of
//! reading: at most [`MAX_PARTITIONS`] entries and [`MAX_LOGICAL`] links are followed.

use serde::Serialize;
use vmtide_block::{BlockDevice, ByteRange, RangeSet};

/// The most GPT entries that are looked at: what the specification asks for is 128.
pub const MAX_PARTITIONS: u32 = 1024;

/// The most logical partitions of an MBR that are looked at; a circle of them ends here, too.
pub const MAX_LOGICAL: usize = 128;

/// The sector sizes that disks have, in bytes. A table does not say in which it counts.
const SECTOR_SIZES: [u64; 2] = [512, 4096];

/// The largest GPT entry, in bytes; it is 128 everywhere.
const MAX_ENTRY_BYTES: u32 = 4096;

/// A part of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Partition {
    /// Its number as Linux and Windows count, from 1.
    pub number: u32,
    /// Its bytes on the disk.
    pub range: ByteRange,
    /// What it is: a well-known name of its type, or the type's GUID or hexadecimal code.
    pub kind: String,
    /// Its name in the table; MBR has none.
    pub name: Option<String>,
}

/// The partitions of a disk, in the order of their place; none where there is no table that makes
/// sense or it cannot be read.
pub fn partitions(device: &dyn BlockDevice) -> Vec<Partition> {
    for sector_bytes in SECTOR_SIZES {
        if let Some(found) = read_gpt(device, sector_bytes) {
            return sorted(found);
        }
    }
    sorted(read_mbr(device).unwrap_or_default())
}

/// How much of `ranges` lies in each partition, and how much in none; only what is touched.
pub fn touched(partitions: &[Partition], ranges: &RangeSet) -> (Vec<(Partition, u64)>, u64) {
    let mut inside = RangeSet::new();
    let mut found = Vec::new();
    for partition in partitions {
        let part = RangeSet::from(vec![partition.range]);
        let bytes = ranges.intersect(&part).total_bytes();
        if bytes > 0 {
            found.push((partition.clone(), bytes));
        }
        inside.insert(partition.range);
    }
    (found, ranges.subtract(&inside).total_bytes())
}

fn sorted(mut found: Vec<Partition>) -> Vec<Partition> {
    found.sort_by_key(|partition| (partition.range.offset, partition.number));
    found
}

fn read<const N: usize>(device: &dyn BlockDevice, offset: u64) -> Option<[u8; N]> {
    let mut buffer = [0; N];
    let end = offset.checked_add(N as u64)?;
    (end <= device.size_bytes()).then_some(())?;
    device.read_at(&mut buffer, offset).ok()?;
    Some(buffer)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// Both copies of the table are tried: the one at the end is what is left after damage at the
/// beginning.
fn read_gpt(device: &dyn BlockDevice, sector_bytes: u64) -> Option<Vec<Partition>> {
    let last = (device.size_bytes() / sector_bytes).checked_sub(1)?;
    [1, last].into_iter().find_map(|sector| read_gpt_at(device, sector_bytes, sector))
}

fn read_gpt_at(device: &dyn BlockDevice, sector_bytes: u64, sector: u64) -> Option<Vec<Partition>> {
    let header: [u8; 512] = read(device, sector.checked_mul(sector_bytes)?)?;
    let header_bytes = u32_at(&header, 12)?;
    let is_gpt = header[..8] == *b"EFI PART" && (92..=512).contains(&header_bytes);
    if !is_gpt || u64_at(&header, 24)? != sector {
        return None;
    }
    let mut summed = header.get(..usize::try_from(header_bytes).ok()?)?.to_vec();
    summed.get_mut(16..20)?.fill(0);
    if crc32(&summed) != u32_at(&header, 16)? {
        return None;
    }
    let (first, count, entry_bytes) =
        (u64_at(&header, 72)?, u32_at(&header, 80)?, u32_at(&header, 84)?);
    if !(128..=MAX_ENTRY_BYTES).contains(&entry_bytes) || !entry_bytes.is_multiple_of(8) {
        return None;
    }
    let table = first.checked_mul(sector_bytes)?;
    let mut found = Vec::new();
    for number in 0..count.min(MAX_PARTITIONS) {
        let offset = table.checked_add(u64::from(number) * u64::from(entry_bytes))?;
        let entry: [u8; 128] = read(device, offset)?;
        found.extend(gpt_entry(&entry, number + 1, sector_bytes, device.size_bytes()));
    }
    Some(found)
}

fn gpt_entry(
    entry: &[u8; 128],
    number: u32,
    sector_bytes: u64,
    size_bytes: u64,
) -> Option<Partition> {
    let kind = entry.first_chunk::<16>().filter(|kind| kind.iter().any(|byte| *byte != 0))?;
    let (first, last) = (u64_at(entry, 32)?, u64_at(entry, 40)?);
    let range = sectors(first, last.checked_sub(first)?.checked_add(1)?, sector_bytes, size_bytes)?;
    let units: Vec<u16> = entry[56..]
        .chunks_exact(2)
        .map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
        .take_while(|unit| *unit != 0)
        .collect();
    let name: String = String::from_utf16_lossy(&units);
    // A name goes to a terminal.
    let name: String = name.chars().filter(|c| !c.is_control()).collect();
    Some(Partition {
        number,
        range,
        kind: guid_kind(kind),
        name: (!name.is_empty()).then_some(name),
    })
}

/// Sectors as bytes, as far as they lie on the disk.
fn sectors(first: u64, count: u64, sector_bytes: u64, size_bytes: u64) -> Option<ByteRange> {
    let offset = first.checked_mul(sector_bytes)?;
    let end = count.checked_mul(sector_bytes)?.checked_add(offset)?.min(size_bytes);
    (offset < end && first > 0).then(|| ByteRange::from_bounds(offset, end))
}

fn guid_kind(bytes: &[u8; 16]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let reversed = |bytes: &[u8]| hex(&bytes.iter().rev().copied().collect::<Vec<u8>>());
    let guid = format!(
        "{}-{}-{}-{}-{}",
        reversed(&bytes[..4]),
        reversed(&bytes[4..6]),
        reversed(&bytes[6..8]),
        hex(&bytes[8..10]),
        hex(&bytes[10..])
    );
    let known = match guid.as_str() {
        "c12a7328-f81f-11d2-ba4b-00a0c93ec93b" => "EFI system",
        "21686148-6449-6e6f-744e-656564454649" => "BIOS boot",
        "e3c9e316-0b5c-4db8-817d-f92df00215ae" => "Microsoft reserved",
        "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7" => "Windows data",
        "de94bba4-06d1-4d40-a16a-bfd50179d6ac" => "Windows recovery",
        "0fc63daf-8483-4772-8e79-3d69d8477de4" => "Linux",
        "4f68bce3-e8cd-4db1-96e7-fbcaf984b709" => "Linux root",
        "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f" => "Linux swap",
        "e6d6d379-f507-44c2-a23c-238f2a3df928" => "Linux LVM",
        "a19d880f-05fc-4d3b-a006-743f0f84911e" => "Linux RAID",
        "bc13c2ff-59e6-4262-a352-b275fd6f7172" => "Linux boot",
        _ => return guid,
    };
    known.into()
}

/// Primary partitions, and the logical ones of an extended one.
fn read_mbr(device: &dyn BlockDevice) -> Option<Vec<Partition>> {
    let sector: [u8; 512] = read(device, 0)?;
    let entries = mbr_entries(&sector)?;
    let mut found = Vec::new();
    for (number, entry) in (1..).zip(entries) {
        let Some(partition) = entry.partition(number, 0, device.size_bytes()) else { continue };
        if entry.is_extended() {
            read_logical(device, entry.first.into(), &mut found);
        } else {
            found.push(partition);
        }
    }
    Some(found)
}

/// Follows the chain of extended boot records that begins at sector `start`.
fn read_logical(device: &dyn BlockDevice, start: u64, found: &mut Vec<Partition>) {
    let mut at = start;
    for number in (5..).take(MAX_LOGICAL) {
        let sector: Option<[u8; 512]> = at.checked_mul(512).and_then(|offset| read(device, offset));
        let Some([here, next, ..]) = sector.and_then(|sector| mbr_entries(&sector)) else { return };
        found.extend(here.partition(number, at, device.size_bytes()));
        if !next.is_extended() || next.first == 0 {
            return;
        }
        at = start + u64::from(next.first);
    }
}

/// One entry of a partition table of four.
#[derive(Clone, Copy, Default)]
struct MbrEntry {
    kind: u8,
    first: u32,
    count: u32,
}

impl MbrEntry {
    const fn is_extended(self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }

    fn partition(self, number: u32, base: u64, size_bytes: u64) -> Option<Partition> {
        // 0xee stands for a GPT that could not be read, and covers all of the disk.
        if self.kind == 0 || self.kind == 0xee || self.count == 0 {
            return None;
        }
        let range = sectors(base + u64::from(self.first), self.count.into(), 512, size_bytes)?;
        let kind = match self.kind {
            0x07 => "Windows data".into(),
            0x0b | 0x0c | 0x0e | 0x06 => "FAT".into(),
            0x27 => "Windows recovery".into(),
            0x82 => "Linux swap".into(),
            0x83 => "Linux".into(),
            0x8e => "Linux LVM".into(),
            0xfd => "Linux RAID".into(),
            0xef => "EFI system".into(),
            other => format!("type 0x{other:02x}"),
        };
        Some(Partition { number, range, kind, name: None })
    }
}

/// The four entries of a boot sector; none where it is none. A FAT or NTFS boot sector has the same
/// signature: entries that are no entries tell it apart.
fn mbr_entries(sector: &[u8; 512]) -> Option<[MbrEntry; 4]> {
    if sector[510..] != [0x55, 0xaa] {
        return None;
    }
    let mut entries = [MbrEntry::default(); 4];
    for (entry, bytes) in entries.iter_mut().zip(sector[446..510].chunks_exact(16)) {
        if bytes[0] & 0x7f != 0 {
            return None;
        }
        *entry = MbrEntry { kind: bytes[4], first: u32_at(bytes, 8)?, count: u32_at(bytes, 12)? };
    }
    Some(entries)
}

/// CRC-32 as the specification has it (ISO-HDLC). A header has 92 bytes: no table is worth it.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::process::{Command, Stdio};
    use vmtide_block::MemoryDevice;

    const MIB: u64 = 1 << 20;

    /// A disk that sfdisk partitioned.
    fn sfdisk(size_mib: u64, script: &str) -> Vec<u8> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::fs::File::create(&path).unwrap().set_len(size_mib * MIB).unwrap();
        let mut child = Command::new("sfdisk")
            .arg("--quiet")
            .arg(&path)
            .stdin(Stdio::piped())
            .spawn()
            .expect("sfdisk is needed: install fdisk (scripts/test.sh does)");
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), script.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success());
        std::fs::read(path).unwrap()
    }

    fn found(bytes: &[u8]) -> Vec<(u32, u64, u64, String, Option<String>)> {
        let device = MemoryDevice::from_bytes(bytes.to_vec());
        let simple = |p: Partition| (p.number, p.range.offset, p.range.length, p.kind, p.name);
        partitions(&device).into_iter().map(simple).collect()
    }

    #[test]
    fn what_sfdisk_wrote_as_gpt_is_read_from_both_ends() {
        let script = "label: gpt\nstart=1MiB, size=4MiB, type=U, name=esp\n\
                      start=5MiB, size=2MiB, type=S\n";
        let mut bytes = sfdisk(16, script);
        let expected = vec![
            (1, MIB, 4 * MIB, "EFI system".to_owned(), Some("esp".to_owned())),
            (2, 5 * MIB, 2 * MIB, "Linux swap".into(), None),
        ];
        assert_eq!(found(&bytes), expected);
        bytes[..4096].fill(0);
        assert_eq!(found(&bytes), expected, "from the copy at the end");
    }

    #[test]
    fn what_sfdisk_wrote_as_mbr_is_read_with_logical_partitions() {
        let script = "label: dos\nstart=2048, size=4096, type=83\nstart=8192, type=5\n\
                      start=10240, size=2048, type=7\nstart=14336, size=2048, type=82\n";
        let kinds: Vec<_> = found(&sfdisk(16, script))
            .into_iter()
            .map(|(number, offset, length, kind, _)| (number, offset / 512, length / 512, kind))
            .collect();
        let expected = [
            (1, 2048, 4096, "Linux"),
            (5, 10240, 2048, "Windows data"),
            (6, 14336, 2048, "Linux swap"),
        ]
        .map(|(number, first, count, kind)| (number, first, count, kind.to_owned()));
        assert_eq!(kinds, expected);
    }

    #[test]
    fn bytes_are_counted_per_partition_and_outside() {
        let partition = |number, offset, length| Partition {
            number,
            range: ByteRange::new(offset, length),
            kind: "Linux".into(),
            name: None,
        };
        let table = [partition(1, 100, 100), partition(2, 300, 100)];
        let ranges = RangeSet::from(vec![ByteRange::new(50, 100), ByteRange::new(390, 20)]);
        let (inside, outside) = touched(&table, &ranges);
        let counts: Vec<_> = inside.iter().map(|(p, bytes)| (p.number, *bytes)).collect();
        assert_eq!((counts, outside), (vec![(1, 50), (2, 10)], 60));
    }

    proptest! {
        #[test]
        fn hostile_tables_are_read_within_bounds(
            noise in prop::collection::vec(any::<u8>(), 0..2048),
            size in 0..20_000usize,
            patches in prop::collection::vec((0..2048usize, any::<u8>()), 0..40),
            is_gpt in any::<bool>(),
        ) {
            let mut bytes = noise;
            bytes.resize(size.max(bytes.len()), 0);
            if is_gpt && bytes.len() >= 1024 {
                bytes[512..520].copy_from_slice(b"EFI PART");
                bytes[524..528].copy_from_slice(&92u32.to_le_bytes());
                bytes[536..544].copy_from_slice(&1u64.to_le_bytes());
                for (at, value) in &patches {
                    if let Some(byte) = bytes.get_mut(560 + at % 40) { *byte = *value; }
                }
                bytes[528..532].fill(0);
                let crc = crc32(&bytes[512..604]);
                bytes[528..532].copy_from_slice(&crc.to_le_bytes());
            } else if bytes.len() >= 512 {
                bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
                for at in [446, 462, 478, 494] { bytes[at] = 0; }
            }
            let length = bytes.len() as u64;
            for partition in partitions(&MemoryDevice::from_bytes(bytes)) {
                prop_assert!(partition.range.length > 0 && partition.range.end() <= length);
            }
        }
    }

    #[test]
    fn a_circle_of_logical_partitions_ends() {
        let mut bytes = vec![0; 64 << 10];
        for sector in [0usize, 2] {
            let at = sector * 512;
            bytes[at + 510..at + 512].copy_from_slice(&[0x55, 0xaa]);
            let entry = at + 446 + 16 * usize::from(sector > 0);
            bytes[entry + 4] = 5;
            bytes[entry + 8..entry + 12].copy_from_slice(&2u32.to_le_bytes());
            bytes[entry + 12..entry + 16].copy_from_slice(&8u32.to_le_bytes());
        }
        // The record at sector 2 names sector 2 + 2, which is none.
        assert!(found(&bytes).len() <= MAX_LOGICAL);
    }
}
