//! VHDX images that break the specification: each field that matters, what is said of it, and what
//! a check finds.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

use crate::support;
use crate::support::vhdx;

use std::sync::Arc;
use vhdx::{BAT_AT, FULL, Image, KIB, METADATA_AT, MIB, PARTIAL, ZERO, put, seal};
use vmtide_block::{BlockDevice, BlockError, MemoryDevice, WritableBlockDevice};
use vmtide_image::vhdx::VhdxImage;
use vmtide_image::{
    BackingPolicy, CheckReport, Format, OpenOptions, Repair, Severity, check_image, identity,
    image_info, open_read_only,
};

/// A disk of four blocks, of which the first is in the file.
fn image() -> Image {
    let mut image = Image::new(4 * MIB, MIB);
    let at = image.payload_at();
    image.block(0, FULL, at);
    image.data.push((at, vec![0x5a; 1 << 20]));
    image
}

fn open(file: Arc<MemoryDevice>) -> Result<VhdxImage, BlockError> {
    VhdxImage::open_device(file, None)
}

/// Opens the image after its bytes were changed; copies of headers and tables are sealed again.
fn changed(image: &Image, sealed: bool, changes: &[(u64, &[u8])]) -> Result<VhdxImage, BlockError> {
    let mut bytes = image.in_memory().to_bytes();
    for (at, value) in changes {
        put(&mut bytes, *at, value);
    }
    if sealed {
        for (start, end) in [(64, 68), (128, 132), (192, 256), (256, 320)] {
            seal(&mut bytes[start << 10..end << 10]);
        }
    }
    open(Arc::new(MemoryDevice::from_bytes(bytes)))
}

fn error(result: Result<VhdxImage, BlockError>) -> String {
    let error = result.err().unwrap();
    assert!(matches!(error, BlockError::Damaged { .. } | BlockError::Unsupported { .. }));
    error.to_string()
}

#[test]
fn each_field_of_the_header_section() {
    const BOTH: [u64; 2] = [64 * KIB, 128 * KIB];
    const TABLES: [u64; 2] = [192 * KIB, 256 * KIB];
    let huge = u32::MAX.to_le_bytes();
    for (starts, at, value, texts) in [
        (BOTH, 0, b"hade".as_slice(), ["header 1 at 0x10000", "\"hade\", must be \"head\""]),
        (BOTH, 66, &[2, 0], ["header 2 at 0x20000", "the version is 2"]),
        (TABLES, 0, b"rege", ["region table 1 at 0x30000", "\"rege\", must be \"regi\""]),
        (TABLES, 8, &huge, ["region table 2 at 0x40000", "4294967295 entries"]),
        (TABLES, 8, &[1], ["region table 1 at 0x30000", "no metadata region"]),
        (TABLES, 16, &[0], ["region table 1 at 0x30000", "is required and unknown"]),
        (TABLES, 32, &[0; 8], ["region table 1 at 0x30000", "overlaps"]),
        (TABLES, 32, &[0xff; 8], ["region table 1 at 0x30000", "at 0xffffffffffffffff"]),
        (TABLES, 34, &[0x20], ["region table 1 at 0x30000", "overlaps"]),
        (TABLES, 40, &[0; 4], ["region table 1 at 0x30000", "must not be empty"]),
    ] {
        let changes: Vec<(u64, &[u8])> = starts.iter().map(|start| (start + at, value)).collect();
        let error = error(changed(&image(), true, &changes));
        assert!(texts.iter().all(|text| error.contains(text)), "{error}");
    }
    let identifier = error(changed(&image(), false, &[(0, b"vhdxfire")]));
    assert!(identifier.contains("file identifier at 0x0"), "{identifier}");
    let checksums = error(changed(&image(), false, &[(64 * KIB + 9, &[1]), (128 * KIB + 9, &[1])]));
    assert!(checksums.contains("header 1 at 0x10000: the checksum is"), "{checksums}");
}

#[test]
fn one_bad_copy_is_enough_to_live_on() {
    let good = open(image().in_memory()).unwrap();
    let mut expected = vec![0; 4 << 20];
    good.read_at(&mut expected, 0).unwrap();
    for at in [64, 128, 192, 256] {
        let disk = changed(&image(), false, &[(at * KIB + 20, &[0xff; 4])]).unwrap();
        assert!(support::read_all(&disk) == expected, "copy at {at} KiB");
    }
    // The newer header rules, wherever it is.
    for sequences in [[5, 6], [7, 6], [1, u64::MAX]] {
        let mut image = image();
        image.sequences = sequences;
        let mut other = image.clone();
        other.data_write_guid = vhdx::guid("AAAAAAAA-2222-3333-4444-555555555555");
        let newer = usize::from(sequences[1] > sequences[0]);
        let header = other.header(sequences[newer]);
        let file = image.in_memory();
        file.write_at(&header, [64 * KIB, 128 * KIB][newer]).unwrap();
        let found = identity(&*file, Format::Vhdx).unwrap().unwrap();
        assert_eq!(found, "aaaaaaaa-2222-3333-4444-555555555555");
        open(file).unwrap();
    }
    // Two headers of one number are one header, or a contradiction.
    let mut same = image();
    same.sequences = [1, 1];
    open(same.in_memory()).unwrap();
    let file = same.in_memory();
    same.log_bytes = 2 << 20;
    file.write_at(&same.header(1), 128 * KIB).unwrap();
    let error = error(open(file));
    assert!(error.contains("both have the sequence number 1"), "{error}");
}

#[test]
fn each_field_of_the_metadata() {
    let entry = |index: u64| METADATA_AT + 32 + index * 32;
    let item = |index: u64| METADATA_AT + 65536 + index * 1024;
    let far = (2u32 << 20).to_le_bytes();
    for (at, value, texts) in [
        (METADATA_AT, b"Metadata".as_slice(), ["metadata table at 0x200000", "\"Metadata\""]),
        (METADATA_AT + 10, &[0xff, 0xff], ["metadata table at 0x200000", "65535 entries"]),
        (METADATA_AT + 10, &[4], ["metadata table at 0x200000", "PhysicalSectorSize"]),
        (METADATA_AT + 10, &[6], ["metadata table at 0x200000", "VirtualDiskSize"]),
        (entry(0), &[0], ["metadata table at 0x200000", "is required and unknown"]),
        (entry(1) + 16, &far, ["metadata table at 0x200000", "inside the region of 1048576"]),
        (entry(1) + 16, &[0, 0, 0, 0], ["metadata table at 0x200000", "8 bytes at 0x0"]),
        (entry(1) + 20, &far, ["metadata table at 0x200000", "2097152 bytes"]),
        (entry(1) + 20, &[7], ["VirtualDiskSize at 0x210400", "7 bytes, must be at least 8"]),
        (item(0), &[1], ["FileParameters at 0x210000", "the block size is 1048577"]),
        (item(0) + 4, &[2], ["metadata table at 0x200000", "ParentLocator"]),
        (item(1), &[1], ["VirtualDiskSize at 0x210400", "4194305 bytes"]),
        (item(1) + 7, &[1], ["VirtualDiskSize at 0x210400", "at most 64 TiB"]),
        (item(3), &[1], ["LogicalSectorSize at 0x210c00", "513 bytes, must be"]),
        (item(4), &[1], ["PhysicalSectorSize at 0x211000", "4097 bytes, must be"]),
        // 32 TiB of 1 MiB blocks need more table than there is.
        (item(1) + 5, &[0x20], ["BAT at 0x300000", "needs 268501024 bytes of table"]),
    ] {
        let result = changed(&image(), false, &[(at, value)]);
        if at == METADATA_AT + 10 && value == [6] {
            // One entry more than there is: all zeros, optional and empty.
            assert!(result.is_ok());
            continue;
        }
        let error = error(result);
        assert!(texts.iter().all(|text| error.contains(text)), "{error}");
    }
}

#[test]
fn unknown_items_and_regions() {
    let id = "12345678-0000-0000-0000-000000000001".to_owned();
    for (flags, is_refused) in [(0, false), (1, false), (2, false), (4, true), (5, true), (6, true)]
    {
        let mut image = image();
        image.items.push((id.clone(), flags, vec![1; 300]));
        let result = open(image.in_memory());
        assert_eq!(result.is_err(), is_refused, "flags {flags}");
        if is_refused {
            let error = error(result);
            assert!(error.contains("12345678-0000-0000-0000-000000000001"), "{error}");
        }
    }
    for (flags, is_refused) in [(0, false), (1, true)] {
        let mut image = image();
        image.regions.push((id.clone(), 50 * MIB, 1 << 20, flags));
        assert_eq!(open(image.in_memory()).is_err(), is_refused);
    }
}

#[test]
fn parent_locators() {
    let child = |locator: &[(&str, &str)]| {
        let mut image = Image::child(4 * MIB, 2 * MIB);
        image.locator =
            locator.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        image
    };
    let parent: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::new(4 << 20));
    let good = child(&[("parent_linkage", "{11111111-2222-3333-4444-555555555555}")]);
    VhdxImage::open_device(good.in_memory(), Some(parent.clone())).unwrap();
    let without = error(open(good.in_memory()));
    assert!(without.contains("depends on the parent"), "{without}");
    let item = METADATA_AT + 65536 + 5 * 1024;
    for (at, value, text) in [
        (0, [0u8; 4].as_slice(), "the type is"),
        (18, &[0xff, 0xff], "65535 entries do not fit"),
        (20, &[0xff; 4], "the key of entry 0"),
        (24, &[0xff; 4], "the value of entry 0"),
        (28, &[27], "the key of entry 0"),
        (30, &[0, 0], "the value of entry 0"),
    ] {
        let error = error(changed(&good, false, &[(item + at, value)]));
        assert!(error.contains("ParentLocator at 0x211400") && error.contains(text), "{error}");
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("child.vhdx");
    let named = child(&[
        ("absolute_win32_path", r"C:\p.vhdx"),
        ("parent_linkage2", "{00000000-0000-0000-0000-000000000000}"),
        ("parent_linkage", "{ABCDEFAB-2222-3333-4444-555555555555}"),
        ("relative_path", r"..\p.vhdx"),
        ("volume_path", r"\\?\Volume{1}\p.vhdx"),
    ]);
    named.in_file(&path);
    let backing = image_info(&path, None).unwrap().backing.unwrap();
    assert_eq!(backing.name, r"..\p.vhdx");
    assert_eq!(backing.other_names, [r"\\?\Volume{1}\p.vhdx", r"C:\p.vhdx"]);
    assert_eq!(backing.identity.as_deref(), Some("abcdefab-2222-3333-4444-555555555555"));
}

#[test]
fn chains_that_come_back_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let beside = OpenOptions { backing: BackingPolicy::SameDirectory, ..OpenOptions::default() };
    let write = |name: &str, parent: &str| {
        let mut image = Image::child(4 * MIB, MIB);
        image.locator[1].1 = format!(r".\{parent}");
        let path = directory.path().join(name);
        image.in_file(&path);
        path
    };
    // All of these say the identity that all of these want.
    write("b.vhdx", "c.vhdx");
    write("c.vhdx", "a.vhdx");
    let ring = open_read_only(write("a.vhdx", "b.vhdx"), &beside).err().unwrap().to_string();
    assert!(ring.contains("the backing chain comes back to this image"), "{ring}");
    let own = open_read_only(write("own.vhdx", "own.vhdx"), &beside).err().unwrap().to_string();
    assert!(own.contains("was not found beside it"), "{own}");
}

#[test]
fn a_file_of_any_length_is_no_panic() {
    let bytes = image().in_memory().to_bytes();
    for length in [0, 1, 8, 511, 520, 65536, 69632, 1 << 20, 2 << 20, (2 << 20) + 1, 3 << 20] {
        let result = open(Arc::new(MemoryDevice::from_bytes(bytes[..length].to_vec())));
        assert!(result.is_err(), "{length} bytes");
    }
    // Enough for the table, not for the block.
    let short = open(Arc::new(MemoryDevice::from_bytes(bytes[..(3 << 20) + 32].to_vec()))).unwrap();
    assert!(short.read_at(&mut [0; 512], 0).is_err());
    short.read_at(&mut [0; 512], MIB).unwrap();
    assert!(open(Arc::new(MemoryDevice::from_bytes(bytes[..(3 << 20) + 31].to_vec()))).is_err());
}

/// What a check of the image finds, and what is left after repairing it.
fn check(image: &Image, changes: &[(u64, &[u8])]) -> (CheckReport, CheckReport) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.vhdx");
    let file = image.in_memory();
    for (at, value) in changes {
        file.write_at(value, *at).unwrap();
    }
    std::fs::write(&path, file.to_bytes()).unwrap();
    let before = check_image(&path, &OpenOptions::default(), Repair::Nothing).unwrap();
    assert!(std::fs::read(&path).unwrap() == file.to_bytes(), "the check changed the file");
    let repaired = check_image(&path, &OpenOptions::default(), Repair::All).unwrap();
    let gone = repaired.problems.iter().filter(|problem| problem.repaired).count();
    assert_eq!(u64::try_from(gone).unwrap(), repaired.repaired);
    (before, check_image(&path, &OpenOptions::default(), Repair::Nothing).unwrap())
}

fn found(report: &CheckReport, severity: Severity, text: &str) -> bool {
    report
        .problems
        .iter()
        .any(|problem| problem.severity == severity && problem.detail.contains(text))
}

#[test]
fn a_check_finds_and_repairs_bad_copies() {
    let (clean, _) = check(&image(), &[]);
    assert_eq!((clean.errors, clean.leaks, clean.problems.len()), (0, 0, 0), "{clean:?}");
    assert_eq!((clean.allocated_bytes, clean.size_bytes), (MIB, 4 * MIB));
    for (at, text) in [
        (64, "header 1 at 0x10000: the checksum"),
        (128, "header 2 at 0x20000: the checksum"),
        (192, "region table 1 at 0x30000: the checksum"),
        (256, "region table 2 at 0x40000: the checksum"),
    ] {
        let (before, after) = check(&image(), &[(at * KIB + 20, &[0xff; 4])]);
        assert!(found(&before, Severity::Note, text), "{before:?}");
        assert_eq!(before.errors, 0);
        assert!(after.problems.is_empty(), "{after:?}");
    }
    let mut log = image();
    log.log_guid = vhdx::guid("0A0B0C0D-1111-2222-3333-444455556666");
    let page = [0; 4096];
    let entry = vhdx::Entry {
        guid: log.log_guid,
        sequence: 1,
        tail: 0,
        flushed: 0,
        last: 0,
        pages: &[(BAT_AT + 4096, page)],
        zeros: &[],
    };
    log.log = vec![(0, entry.bytes())];
    let (before, after) = check(&log, &[]);
    assert!(found(&before, Severity::Note, "log at 0x100000: 1 entries"), "{before:?}");
    assert!(after.problems.is_empty(), "{after:?}");
}

#[test]
fn a_check_finds_what_is_wrong_in_the_bat() {
    let at = image().payload_at();
    for (block, entry, text) in [
        (1, 4, "payload block 1 has the state 4"),
        (1, at | FULL, "the file's 0x400000 is in use"),
        (2, MIB | FULL, "payload block 2 at 0x100000: the file's 0x100000 is in use"),
        (2, (2 * MIB) | FULL, "the file's 0x200000 is in use"),
        (2, (3 * MIB) | FULL, "the file's 0x300000 is in use"),
        (2, FULL, "payload block 2 at 0x0 is not behind the first MiB"),
        (3, (at + MIB) | FULL, "is not behind the first MiB and inside the file"),
        (3, (u64::MAX << 20) | FULL, "is not behind the first MiB and inside the file"),
        (3, (at + MIB) | PARTIAL, "payload block 3 is partially present: no parent"),
        (3, 8, "0x0000000000000008 has reserved bits set, 0x8"),
        (3, (1 << 19) | ZERO, "has reserved bits set, 0x80000"),
    ] {
        let mut image = image();
        image.bat.insert(block, entry);
        let (before, after) = check(&image, &[]);
        assert!(found(&before, Severity::Error, text), "{before:?}");
        let place = format!("BAT entry {block} at {:#x}", BAT_AT + block * 8);
        assert!(found(&before, Severity::Error, &place), "{before:?}");
        assert_eq!(before.errors, after.errors, "nothing can be repaired without guessing");
    }
    // A place kept for a block that is not there, space that nobody uses.
    let mut image = image();
    image.block(1, ZERO, at + MIB);
    image.file_bytes = at + 5 * MIB;
    let (report, _) = check(&image, &[]);
    assert_eq!((report.errors, report.leaks), (0, 0));
    assert!(found(&report, Severity::Note, "3 MiB of the file are not in use"), "{report:?}");
}

#[test]
fn where_an_empty_log_is_matters_to_a_check_only() {
    for log_bytes in [0, 4096, 3 << 20] {
        let mut image = image();
        image.log_bytes = log_bytes;
        let disk = open(image.in_memory()).unwrap();
        let mut byte = [0];
        disk.read_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [0x5a]);
        let path = tempfile::tempdir().unwrap();
        let path = path.path().join("image.vhdx");
        image.in_file(&path);
        let report = check_image(&path, &OpenOptions::default(), Repair::Nothing).unwrap();
        assert!(found(&report, Severity::Error, "the log of"), "{report:?}");
    }
}

#[test]
fn a_check_of_a_child_counts_its_sectors() {
    let mut image = Image::child(5 * MIB, 2 * MIB);
    let at = image.payload_at();
    image.block(0, PARTIAL, at + MIB);
    image.block(2, PARTIAL, at + 3 * MIB);
    image.bitmap(0, FULL, at);
    let mut bitmap = vec![0; 1 << 20];
    bitmap[0] = 0b1000_0001;
    bitmap[511] = 0xff;
    // Sectors past the end of the disk do not count.
    bitmap[1024..1536].fill(0xff);
    image.data = vec![(at, bitmap), (at + 5 * MIB - 1, vec![0])];
    let (report, _) = check(&image, &[]);
    assert_eq!(report.errors, 0, "{report:?}");
    assert_eq!(report.allocated_bytes, 10 * 512 + MIB);
    image.bitmap(0, 0, 0);
    let (report, _) = check(&image, &[]);
    assert!(found(&report, Severity::Error, "is not present, but 2 blocks need it"), "{report:?}");
    image.bitmap(0, 4, at);
    let (report, _) = check(&image, &[]);
    assert!(found(&report, Severity::Error, "has the state 4"), "{report:?}");
}
