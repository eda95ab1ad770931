//! Logs made by hand: what is live in them, and what it does to the image.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

use crate::support;
use crate::support::vhdx;

use std::path::Path;
use std::sync::Arc;
use support::crash::{Files, Recording, Sampling, Subject, ValidFrom};
use support::{path, qemu_img, read_all, text, try_run};
use vhdx::{BAT_AT, Entry, FULL, Image, KIB, LOG_AT, METADATA_AT, MIB, guid, put};
use vmtide_block::{BlockDevice, MemoryDevice, OpenMode, RawDevice, Result, WritableBlockDevice};
use vmtide_image::ImageWriter;
use vmtide_image::vhdx::{VhdxImage, VhdxWriter};

const LIVE: &str = "0A0B0C0D-1111-2222-3333-444455556666";
const STALE: &str = "FFFFFFFF-1111-2222-3333-444455556666";

/// An image of four blocks of 1 MiB, each with its number in the file; none is in the BAT yet.
fn image() -> Image {
    let mut image = Image::new(4 * MIB, MIB);
    image.log_guid = guid(LIVE);
    let at = image.payload_at();
    for block in 0..4u8 {
        image.data.push((at + u64::from(block) * MIB, vec![block + 1; 1 << 20]));
    }
    image
}

/// A page of the BAT in which block `n` of the disk is block `places[n]` of the payload.
fn bat_page(image: &Image, places: [Option<u64>; 4]) -> (u64, [u8; 4096]) {
    let mut page = [0; 4096];
    for (block, place) in places.into_iter().enumerate() {
        if let Some(place) = place {
            let entry = (image.payload_at() + place * MIB) | FULL;
            put(&mut page, block as u64 * 8, &entry.to_le_bytes());
        }
    }
    (BAT_AT, page)
}

fn entry<'a>(sequence: u64, tail: u32, pages: &'a [(u64, [u8; 4096])]) -> Entry<'a> {
    Entry { guid: guid(LIVE), sequence, tail, flushed: 0, last: 0, pages, zeros: &[] }
}

/// The first bytes of the four blocks, read without changing the file and by a writer, which must
/// say the same.
fn blocks(image: &Image) -> [u8; 4] {
    let file = image.in_memory();
    let before = file.to_bytes();
    let read_only = firsts(&VhdxImage::open_device(file.clone(), None).unwrap());
    assert!(file.to_bytes() == before, "reading changed the file");
    let writer = VhdxWriter::open_device(file.clone(), None).unwrap();
    assert_eq!(firsts(&writer), read_only, "replayed on disk");
    writer.finish().unwrap();
    drop(writer);
    // The log is empty now: its GUID is gone from both headers, and nothing of it is needed.
    file.write_at(&vec![0xee; 1 << 20], LOG_AT).unwrap();
    for header_at in [64 * KIB, 128 * KIB] {
        let mut log_guid = [0xee; 16];
        file.read_at(&mut log_guid, header_at + 48).unwrap();
        assert_eq!(log_guid, [0; 16]);
    }
    assert_eq!(firsts(&VhdxImage::open_device(file, None).unwrap()), read_only);
    read_only
}

fn firsts(disk: &dyn BlockDevice) -> [u8; 4] {
    let mut found = [0xee; 4];
    for (block, first) in (0..).zip(&mut found) {
        disk.read_at(std::slice::from_mut(first), block * MIB).unwrap();
    }
    found
}

fn refused(image: &Image) -> String {
    let file = image.in_memory();
    let before = file.to_bytes();
    let error = VhdxImage::open_device(file.clone(), None).err().unwrap().to_string();
    let writer = VhdxWriter::open_device(file.clone(), None).err().unwrap().to_string();
    assert_eq!(error, writer);
    assert!(file.to_bytes() == before, "what cannot be replayed was changed");
    error
}

#[test]
fn one_entry() {
    let mut image = image();
    let pages = [bat_page(&image, [Some(2), None, Some(0), None])];
    image.log = vec![(0, entry(1, 0, &pages).bytes())];
    assert_eq!(blocks(&image), [3, 0, 1, 0]);
    // An empty log is not looked at.
    image.log_guid = [0; 16];
    assert_eq!(blocks(&image), [0, 0, 0, 0]);
}

#[test]
fn replay_begins_at_the_heads_tail() {
    let mut image = image();
    let old = [bat_page(&image, [Some(3), Some(3), Some(3), Some(3)])];
    let middle = [(BAT_AT + 4096, [9; 4096])];
    let new = [bat_page(&image, [Some(1), None, None, None])];
    // Sectors 0-1: an entry that is done with; 2-3 and 4-5 are live.
    image.log = vec![
        (0, entry(70, 0, &old).bytes()),
        (8192, entry(71, 8192, &middle).bytes()),
        (16384, entry(72, 8192, &new).bytes()),
    ];
    assert_eq!(blocks(&image), [2, 0, 0, 0]);
    // Were the first one live as well, the others would still come after it.
    image.log[2].1 = entry(72, 0, &new).bytes();
    assert_eq!(blocks(&image), [2, 0, 0, 0]);
    // An entry without changes only moves the tail.
    image.log.push((24576, entry(73, 24576, &[]).bytes()));
    assert_eq!(blocks(&image), [0, 0, 0, 0]);
}

#[test]
fn the_highest_complete_sequence_counts() {
    let mut image = image();
    let (old, new) = (
        [bat_page(&image, [Some(0), None, None, None])],
        [bat_page(&image, [Some(1), None, None, None])],
    );
    // Two sequences with a gap between them; the later one stands before the earlier.
    image.log =
        vec![(64 * KIB, entry(10, 64 << 10, &old).bytes()), (0, entry(900, 0, &new).bytes())];
    assert_eq!(blocks(&image), [2, 0, 0, 0]);
    // Its tail is not in it, so it is not complete: the earlier one counts.
    image.log[1].1 = entry(900, 4096, &new).bytes();
    assert_eq!(blocks(&image), [1, 0, 0, 0]);
    // Entries in a row whose numbers are not are two sequences.
    image.log = vec![(0, entry(5, 0, &old).bytes()), (8192, entry(7, 8192, &new).bytes())];
    assert_eq!(blocks(&image), [2, 0, 0, 0]);
    image.log = vec![(0, entry(5, 0, &old).bytes()), (8192, entry(6, 16384, &new).bytes())];
    assert!(refused(&image).contains("no sequence is complete"));
}

#[test]
fn an_entry_may_wrap_and_a_sequence_too() {
    let mut image = image();
    let first = [bat_page(&image, [Some(0), Some(0), None, None])];
    let second = [bat_page(&image, [Some(3), None, None, Some(1)])];
    let last_sector = (1 << 20) - 4096;
    image.log = vec![
        (u64::from(last_sector - 8192), entry(40, last_sector - 8192, &first).bytes()),
        (u64::from(last_sector), entry(41, last_sector - 8192, &second).bytes()),
    ];
    assert_eq!(blocks(&image), [4, 0, 0, 2]);
    let third = [bat_page(&image, [None, None, Some(2), None])];
    image.log.push((4096, entry(42, last_sector, &third).bytes()));
    assert_eq!(blocks(&image), [0, 0, 3, 0]);
}

#[test]
fn what_a_crash_tore_is_left_out() {
    let image = image();
    let old = [bat_page(&image, [Some(0), None, None, None])];
    let new = [bat_page(&image, [Some(1), None, None, None])];
    let whole = entry(2, 0, &new).bytes();
    for at in [0, 8, 16, 40, 64, 64 + 24, 100, 4096, 4100, 5000, 8191] {
        let mut torn = whole.clone();
        torn[at] ^= 0x40;
        let mut image = image.clone();
        image.log = vec![(0, entry(1, 0, &old).bytes()), (8192, torn)];
        assert_eq!(blocks(&image), [1, 0, 0, 0], "byte {at}");
    }
    // The second half of an entry never came: there stands what was there before.
    let mut image = image.clone();
    image.log = vec![(0, entry(1, 0, &old).bytes()), (8192, whole[..4096].to_vec())];
    assert_eq!(blocks(&image), [1, 0, 0, 0]);
}

#[test]
fn entries_of_other_logs_mean_nothing() {
    let mut image = image();
    let stale = [bat_page(&image, [Some(3), Some(3), Some(3), Some(3)])];
    let live = [bat_page(&image, [Some(1), None, None, None])];
    let other = |sequence| Entry { guid: guid(STALE), ..entry(sequence, 0, &stale) };
    image.log = vec![
        (0, other(99).bytes()),
        (8192, entry(7, 8192, &live).bytes()),
        (16384, other(8).bytes()),
    ];
    assert_eq!(blocks(&image), [2, 0, 0, 0]);
    image.log.remove(1);
    let error = refused(&image);
    assert!(error.contains("log at 0x100000") && error.contains("of 0 valid"), "{error}");
}

#[test]
fn ranges_of_zeros_and_pages_over_each_other() {
    let mut image = image();
    let at = image.payload_at();
    for block in 0..4 {
        image.block(block, FULL, at + block * MIB);
    }
    let page = [(at + MIB + 8192, [0x77; 4096]), (at + 3 * MIB, [0x78; 4096])];
    let over = [(at + 4096, [0x79; 4096])];
    let first = Entry { zeros: &[(at, 2 * MIB)], ..entry(1, 0, &page) };
    let second =
        Entry { zeros: &[(at + MIB + 4096, 4096), (at + 3 * MIB, 8192)], ..entry(2, 0, &over) };
    let second_at = first.bytes().len() as u64;
    image.log = vec![(0, first.bytes()), (second_at, second.bytes())];
    let mut expected: Vec<u8> = (1..=4u8).flat_map(|n| vec![n; 1 << 20]).collect();
    expected[..2 << 20].fill(0);
    expected[4096..8192].fill(0x79);
    expected[(1 << 20) + 8192..(1 << 20) + 12288].fill(0x77);
    expected[3 << 20..(3 << 20) + 8192].fill(0);
    let file = image.in_memory();
    let disk = VhdxImage::open_device(file.clone(), None).unwrap();
    assert!(read_all(&disk) == expected);
    support::check_extents(&disk, &expected);
    let writer = VhdxWriter::open_device(file, None).unwrap();
    assert!(read_all(&writer) == expected);
}

#[test]
fn everything_but_the_headers_may_be_in_the_log() {
    let mut image = image();
    let at = image.payload_at();
    image.block(2, FULL, at + MIB);
    // The metadata table, its items and both region tables are damaged; the log repairs them.
    let metadata = image.metadata();
    let regions = image.region_table();
    let page = |bytes: &[u8]| <[u8; 4096]>::try_from(bytes).unwrap();
    let mut pages = vec![(METADATA_AT, page(&metadata[..4096]))];
    pages.push((METADATA_AT + 65536, page(&metadata[65536..69632])));
    pages.push((192 * KIB, page(&regions[..4096])));
    let file = image.in_memory();
    file.write_at(&[0xdd; 4096], METADATA_AT).unwrap();
    file.write_at(&[0xdd; 4096], METADATA_AT + 65536).unwrap();
    file.write_at(&[0xdd; 4096], 192 * KIB).unwrap();
    file.write_at(&[0xdd; 4096], 256 * KIB).unwrap();
    file.write_at(&entry(3, 0, &pages).bytes(), LOG_AT).unwrap();
    let disk = VhdxImage::open_device(file.clone(), None).unwrap();
    assert_eq!(firsts(&disk), [0, 0, 2, 0]);
    assert_eq!(firsts(&VhdxWriter::open_device(file, None).unwrap()), [0, 0, 2, 0]);
}

#[test]
fn the_file_is_as_long_as_the_head_says() {
    let mut image = image();
    let at = image.payload_at();
    let pages = [bat_page(&image, [Some(0), None, None, Some(5)])];
    let end = at + 6 * MIB;
    image.log =
        vec![(0, Entry { last: end, flushed: at + 4 * MIB, ..entry(1, 0, &pages) }.bytes())];
    assert_eq!(blocks(&image), [1, 0, 0, 0]);
    let file = image.in_memory();
    VhdxWriter::open_device(file.clone(), None).unwrap().finish().unwrap();
    assert!(file.size_bytes() >= end, "{} bytes", file.size_bytes());
    // A file shorter than what was flushed is not all there.
    image.log =
        vec![(0, Entry { last: end, flushed: at + 4 * MIB + 1, ..entry(1, 0, &pages) }.bytes())];
    let error = refused(&image);
    assert!(error.contains("log entry at 0x100000: FlushedFileOffset is"), "{error}");
    assert!(error.contains("truncated copy"), "{error}");
    image.log = vec![(0, Entry { last: u64::MAX, ..entry(1, 0, &pages) }.bytes())];
    assert!(refused(&image).contains("LastFileOffset is 18446744073709551615"));
}

#[test]
fn changes_where_none_can_be_are_refused() {
    let image = image();
    let end = image.payload_at() + 4 * MIB;
    let page = [7; 4096];
    for (pages, zeros, text) in [
        (vec![(0, page)], vec![], "descriptor 0 changes 4096 bytes at 0x0"),
        (vec![(128 * KIB, page)], vec![], "at 0x20000"),
        (vec![(LOG_AT + 4096, page)], vec![], "at 0x101000"),
        (vec![(METADATA_AT + 1, page)], vec![], "at 0x200001"),
        (vec![(end, page)], vec![], "changes 4096 bytes"),
        (vec![(u64::MAX - 4095, page)], vec![], "at 0xfffffffffffff000"),
        (vec![], vec![(METADATA_AT, 4097)], "changes 4097 bytes"),
        (vec![], vec![(METADATA_AT, u64::MAX - 4095)], "changes 18446744073709547520 bytes"),
        (vec![], vec![(64 * KIB, 4096)], "at 0x10000"),
        (vec![], vec![(192 * KIB, MIB)], "changes 1048576 bytes at 0x30000"),
    ] {
        let mut image = image.clone();
        let bad = Entry { zeros: &zeros, ..entry(1, 0, &pages) };
        image.log = vec![(0, bad.bytes())];
        let error = refused(&image);
        assert!(error.contains(text), "{error}");
        assert!(error.contains("log entry at 0x100000"), "{error}");
    }
}

#[test]
fn logs_that_cannot_be_are_refused() {
    let mut image = image();
    let pages = [bat_page(&image, [None; 4])];
    image.log = vec![(0, entry(0, 0, &pages).bytes())];
    assert!(refused(&image).contains("of 0 valid"), "a sequence number of 0");
    image.log = vec![(0, entry(1, 0, &pages).bytes())];
    image.log_version = 1;
    assert!(refused(&image).contains("the log has the version 1"));
    image.log_version = 0;
    image.log_bytes = 0;
    image.log.clear();
    assert!(refused(&image).contains("the log of 0 bytes at 0x100000"));
    image.log_bytes = 4097;
    assert!(refused(&image).contains("the log of 4097 bytes at 0x100000"));
    image.log_bytes = u32::MAX;
    assert!(refused(&image).contains("inside the file of"));
}

/// Lengths and counts that a forged entry can say, with a right checksum where there can be one.
#[test]
fn forged_lengths_and_counts_are_no_entries() {
    let image = image();
    let pages = [bat_page(&image, [Some(1), None, None, None])];
    for (at, value) in [
        (8, 0u32),
        (8, 4096),
        (8, 12288),
        (8, 4095),
        (8, u32::MAX),
        (8, u32::MAX - 4095),
        (12, 1),
        (12, 1 << 20),
        (12, u32::MAX),
        (24, 0x7fff_ffff),
        (24, u32::MAX),
        (24, 200),
        (24, 2),
    ] {
        let mut forged = entry(1, 0, &pages).bytes();
        put(&mut forged, at, &value.to_le_bytes());
        vhdx::seal(&mut forged);
        let mut image = image.clone();
        image.log = vec![(0, forged)];
        assert!(refused(&image).contains("no sequence"), "{value} at {at}");
    }
}

/// A log in which every sector begins an entry that claims the whole log.
#[test]
fn a_log_of_nothing_but_heads_is_looked_at_once() {
    let mut image = image();
    image.log_bytes = 32 << 20;
    // The log is moved behind everything else, where it has room.
    let file = Arc::new(MemoryDevice::new(0));
    image.write(&*file);
    let log_at = file.size_bytes().next_multiple_of(MIB);
    file.resize(log_at + (32 << 20)).unwrap();
    let mut head = entry(1, 0, &[]).bytes();
    put(&mut head, 8, &(32u32 << 20).to_le_bytes());
    for position in (0..32 << 20).step_by(4096) {
        file.write_at(&head, log_at + position).unwrap();
    }
    for (header_at, sequence) in [(64 * KIB, 5u64), (128 * KIB, 6)] {
        let mut header = image.header(sequence);
        put(&mut header, 72, &log_at.to_le_bytes());
        vhdx::seal(&mut header);
        file.write_at(&header, header_at).unwrap();
    }
    let before = std::time::Instant::now();
    let error = VhdxImage::open_device(file, None).err().unwrap().to_string();
    assert!(error.contains("no sequence is complete"), "{error}");
    // Each time anew would be hours.
    assert!(before.elapsed().as_secs() < 300, "{:?}", before.elapsed());
}

/// QEMU replays the log of a copy and then reads what vmtide reads from the image itself.
fn check_with_qemu(image: &Path) {
    let (copy, raw) = (image.with_extension("copy.vhdx"), image.with_extension("raw"));
    std::fs::copy(image, &copy).unwrap();
    let out = try_run("qemu-img", &["check", "-f", "vhdx", "-r", "all", path(&copy)]);
    assert!(out.status.success(), "qemu-img check: {}", text(&out));
    qemu_img(&["convert", "-f", "vhdx", "-O", "raw", path(&copy), path(&raw)]);
    let file = Arc::new(RawDevice::open(image, OpenMode::ReadOnly).unwrap());
    let disk = read_all(&VhdxImage::open_device(file, None).unwrap());
    assert!(std::fs::read(&raw).unwrap() == disk, "QEMU reads another disk");
}

#[test]
fn a_replay_that_is_cut_off_is_done_again() {
    let mut image = Image::new(2 * MIB, MIB);
    image.log_guid = guid(LIVE);
    let at = image.payload_at();
    image.block(1, FULL, at);
    image.data.push((at, vec![7; 1 << 20]));
    let mut page = [0; 4096];
    put(&mut page, 0, &((at + MIB) | FULL).to_le_bytes());
    put(&mut page, 8, &(at | FULL).to_le_bytes());
    let (pages, zeros) = ([(BAT_AT, page), (at + 8192, [9; 4096])], [(at + 65536, 8192)]);
    let end = at + 2 * MIB;
    // QEMU makes the file no longer where LastFileOffset is a multiple of 1 MiB, as it always is.
    image.file_bytes = end;
    let first = Entry { last: end, ..entry(3, 0, &pages) };
    let second = Entry { last: end, zeros: &zeros, ..entry(4, 0, &[]) };
    let second_at = first.bytes().len() as u64;
    image.log = vec![(0, first.bytes()), (second_at, second.bytes())];
    let mut content = vec![0; 2 << 20];
    content[1 << 20..].fill(7);
    content[(1 << 20) + 8192..(1 << 20) + 12288].fill(9);
    content[(1 << 20) + 65536..(1 << 20) + 65536 + 8192].fill(0);
    let subject = Subject {
        name: "replay".into(),
        start: vec![("image.vhdx".into(), image.in_memory().to_bytes())],
        content,
        valid_from: ValidFrom::Start,
        write: &|files: &Files| -> Result<Arc<dyn ImageWriter>> {
            Ok(Arc::new(VhdxWriter::open_device(files.main(), None)?))
        },
        read: &|files: &Files| -> Result<Arc<dyn BlockDevice>> {
            Ok(Arc::new(VhdxImage::open_device(files.main(), None)?))
        },
        rewrite: Some(&|files: &Files| -> Result<Arc<dyn ImageWriter>> {
            Ok(Arc::new(VhdxWriter::open_device(files.main(), None)?))
        }),
        beside: Vec::new(),
        check: Some(&check_with_qemu),
    };
    let mut recording = Recording::begin(&subject);
    recording.write(5000, &[1; 9000]);
    recording.finish();
    let sampling = Sampling { check_every: 10, rewrite_every: 7, ..Sampling::default() };
    assert!(recording.enumerate(&sampling) > 50);
}

#[test]
fn more_changes_than_are_kept_in_memory_are_a_writers() {
    let mut image = image();
    image.log_bytes = 12 << 20;
    // The metadata and the BAT stand where this log would: it goes behind everything.
    let directory = tempfile::tempdir().unwrap();
    let at = image.payload_at();
    image.block(1, FULL, at + MIB);
    image.file_bytes = 4096 * MIB;
    let zeros: Vec<(u64, u64)> =
        (0..(1 << 18) + 1).map(|n| (at + 8 * MIB + n * 8192, 4096)).collect();
    let entry = Entry { zeros: &zeros, ..entry(1, 0, &[]) }.bytes();
    let path = directory.path().join("image.vhdx");
    let file = RawDevice::open(&path, OpenMode::CreateNew { size_bytes: 0 }).unwrap();
    image.write(&file);
    let log_at = 4096 * MIB;
    file.resize(log_at + (12 << 20)).unwrap();
    file.write_at(&entry, log_at).unwrap();
    for (header_at, sequence) in [(64 * KIB, 5u64), (128 * KIB, 6)] {
        let mut header = image.header(sequence);
        put(&mut header, 72, &log_at.to_le_bytes());
        vhdx::seal(&mut header);
        file.write_at(&header, header_at).unwrap();
    }
    let file = Arc::new(file);
    let error = VhdxImage::open_device(file.clone(), None).err().unwrap().to_string();
    assert!(error.contains("too many changes to replay in memory"), "{error}");
    drop(VhdxWriter::open_device(file.clone(), None).unwrap());
    assert_eq!(firsts(&VhdxImage::open_device(file, None).unwrap()), [0, 2, 0, 0]);
}
