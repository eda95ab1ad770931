//! Reading VHDX images made by hand: states, chains, sizes at the limits, and what QEMU writes.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

use crate::support;
use crate::support::vhdx;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use support::{Random, check_extents, path, pattern, qemu_img, raw_file, read_all};
use vhdx::{FULL, Image, MIB, NOT_PRESENT, PARTIAL, UNDEFINED, UNMAPPED, ZERO};
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, ExtentKind, MemoryDevice, WritableBlockDevice, all_extents,
};
use vmtide_image::vhdx::{VhdxImage, VhdxWriter};
use vmtide_image::{DiskImage, OpenOptions, image_info, open_read_only};

fn open(file: Arc<dyn BlockDevice>) -> VhdxImage {
    VhdxImage::open_device(file, None).unwrap()
}

/// A file that counts what is read of it.
struct Counted {
    file: Arc<dyn BlockDevice>,
    read_bytes: AtomicU64,
}

impl BlockDevice for Counted {
    fn name(&self) -> String {
        self.file.name()
    }

    fn size_bytes(&self) -> u64 {
        self.file.size_bytes()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        self.read_bytes.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        self.file.read_at(buffer, offset)
    }

    fn extents(&self, range: ByteRange) -> vmtide_block::Result<Vec<vmtide_block::Extent>> {
        self.file.extents(range)
    }
}

fn block_of(seed: u64) -> Vec<u8> {
    Random(seed | 1).bytes(1 << 20)
}

/// The kinds of the extents, each with its length in MiB.
fn kinds(disk: &dyn BlockDevice) -> Vec<(ExtentKind, u64)> {
    let extents = all_extents(disk).unwrap();
    extents.iter().map(|extent| (extent.kind, extent.range.length / MIB)).collect()
}

#[test]
fn every_state_without_a_parent() {
    let mut image = Image::new(8 * MIB, MIB);
    let at = image.payload_at();
    image.block(0, FULL, at + 2 * MIB);
    image.block(1, FULL, at + 3 * MIB);
    image.block(2, NOT_PRESENT, 0);
    // These keep a place in the file, and what is there is not to be read.
    image.block(3, UNDEFINED, at);
    image.block(4, ZERO, at);
    image.block(5, UNMAPPED, at);
    image.block(6, NOT_PRESENT, at);
    image.block(7, FULL, at + MIB);
    image.data = (0..4).map(|n| (at + n * MIB, block_of(n + 1))).collect();
    let disk = open(image.in_memory());
    let mut expected = vec![0; 8 << 20];
    expected[..1 << 20].copy_from_slice(&block_of(3));
    expected[1 << 20..2 << 20].copy_from_slice(&block_of(4));
    expected[7 << 20..].copy_from_slice(&block_of(2));
    assert!(read_all(&disk) == expected);
    let (data, zero, absent) = (ExtentKind::Data, ExtentKind::Zero, ExtentKind::Unallocated);
    assert_eq!(kinds(&disk), [(data, 2), (absent, 1), (zero, 3), (absent, 1), (data, 1)]);
    let layout = disk.layout(ByteRange::new(0, 8 * MIB)).unwrap();
    // Neighbours on the disk and in the file are one placement.
    assert_eq!(layout[0].range, ByteRange::new(0, 2 * MIB));
    assert_eq!(layout[0].file_offset, Some(at + 2 * MIB));
    assert_eq!(layout.last().unwrap().file_offset, Some(at + MIB));
    assert_eq!(layout.len(), 5);
}

#[test]
fn states_that_cannot_be_are_damage() {
    for (state, offset, text) in [
        (4, 0, "the state of payload block 1 is 4, which does not exist"),
        (PARTIAL, 5 * MIB, "the state of payload block 1 is 7, which needs a parent"),
        (FULL, 0, "payload block 1 at 0x0 is not behind"),
        (FULL, 500 * MIB, "payload block 1 at 0x1f400000 is not behind the first MiB and inside"),
        (FULL, u64::MAX << 20, "payload block 1 at 0xfffffffffff00000 is not"),
    ] {
        let mut image = Image::new(4 * MIB, MIB);
        image.block(1, state, offset);
        let disk = open(image.in_memory());
        disk.read_at(&mut [0; 512], 0).unwrap();
        let read = disk.read_at(&mut [0; 512], MIB).unwrap_err().to_string();
        assert!(read.contains(text) && read.contains("BAT entry 1 at 0x300008"), "{read}");
        let extents = disk.extents(ByteRange::new(0, 4 * MIB)).unwrap_err().to_string();
        assert!(extents.contains(text), "{extents}");
        assert!(disk.layout(ByteRange::new(0, 4 * MIB)).is_err());
    }
}

/// A child's sectors: present where `random` says, in runs of all lengths.
fn sparse_sectors(random: &mut Random, bitmap: &mut [u8], from: usize, count: usize) -> Vec<bool> {
    let mut present = Vec::with_capacity(count);
    while present.len() < count {
        let bit = random.below(2) == 0;
        let bits = 1 << random.below(12);
        present.resize((present.len() + bits).min(count), bit);
    }
    for (sector, _) in present.iter().enumerate().filter(|(_, bit)| **bit) {
        let bit = from + sector;
        bitmap[bit / 8] |= 1 << (bit % 8);
    }
    present
}

#[test]
fn a_child_takes_from_its_parent_what_it_does_not_have() {
    for (sector_bytes, block_mib, parent_mib) in
        [(512u64, 1, 6), (512, 2, 5), (4096, 2, 7), (512, 4, 6), (4096, 1, 9)]
    {
        let mut random = Random(sector_bytes + block_mib);
        let mut image = Image::child(6 * MIB, block_mib * MIB);
        image.sector_bytes = sector_bytes;
        let parent_bytes = pattern(block_mib, usize::try_from(parent_mib * MIB - 512).unwrap());
        let mut expected = parent_bytes.clone();
        expected.resize(6 << 20, 0);
        let bitmap_at = image.payload_at();
        let mut bitmap = vec![0; 1 << 20];
        let sectors = usize::try_from(image.block_bytes / sector_bytes).unwrap();
        let sector = usize::try_from(sector_bytes).unwrap();
        for block in 0..image.blocks() {
            let place = bitmap_at + MIB + block * image.block_bytes;
            let bytes = random.bytes(usize::try_from(image.block_bytes).unwrap());
            let start = usize::try_from(block * image.block_bytes).unwrap();
            let state = [PARTIAL, FULL, NOT_PRESENT, PARTIAL, ZERO, UNMAPPED];
            let state = state[usize::try_from((block + block_mib) % 6).unwrap()];
            image.block(block, state, if state == NOT_PRESENT { 0 } else { place });
            let from = usize::try_from(block).unwrap() * sectors;
            // The bitmap of a fully present block is not looked at.
            let present = sparse_sectors(&mut random, &mut bitmap, from, sectors);
            for (index, present) in present.into_iter().enumerate() {
                let inside = index * sector..(index + 1) * sector;
                let disk = start + inside.start..start + inside.end;
                if disk.end > expected.len() {
                    break;
                }
                match state {
                    FULL => expected[disk].copy_from_slice(&bytes[inside]),
                    PARTIAL if present => expected[disk].copy_from_slice(&bytes[inside]),
                    ZERO | UNMAPPED => expected[disk].fill(0),
                    _ => {}
                }
            }
            image.data.push((place, bytes));
        }
        image.bitmap(0, FULL, bitmap_at);
        image.data.push((bitmap_at, bitmap));
        let parent = Arc::new(MemoryDevice::from_bytes(parent_bytes));
        let disk = VhdxImage::open_device(image.in_memory(), Some(parent)).unwrap();
        assert!(read_all(&disk) == expected, "{sector_bytes} {block_mib}");
        check_extents(&disk, &expected);
        for _ in 0..2000 {
            let at = usize::try_from(random.below(6 * MIB)).unwrap();
            let length = usize::try_from(random.below(9000)).unwrap().min(expected.len() - at);
            let mut buffer = vec![0xee; length];
            disk.read_at(&mut buffer, at as u64).unwrap();
            assert!(buffer == expected[at..at + length], "{at}+{length}");
        }
    }
}

#[test]
fn a_partially_present_block_needs_its_bitmap() {
    for (state, offset, text) in [
        (NOT_PRESENT, 0, "has the state 0"),
        (3, 5 * MIB, "has the state 3"),
        (FULL, 0, "is at 0x0"),
        (FULL, 900 * MIB, "is at 0x38400000"),
    ] {
        let mut image = Image::child(4 * MIB, 2 * MIB);
        let at = image.payload_at();
        image.block(0, PARTIAL, at);
        image.bitmap(0, state, offset);
        image.data.push((at, vec![1; 2 << 20]));
        let parent = Arc::new(MemoryDevice::new(4 << 20));
        let disk = VhdxImage::open_device(image.in_memory(), Some(parent)).unwrap();
        let error = disk.read_at(&mut [0; 512], 512).unwrap_err().to_string();
        assert!(error.contains("sector bitmap of chunk 0") && error.contains(text), "{error}");
        assert!(error.contains("BAT entry 2048 at 0x304000"), "{error}");
        disk.read_at(&mut [0; 512], 2 * MIB).unwrap();
    }
}

#[test]
fn chains_of_different_block_sizes() {
    let mut below: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::from_bytes(pattern(9, 5 << 20)));
    let mut expected = pattern(9, 5 << 20);
    expected.resize(8 << 20, 0);
    for (layer, block_bytes) in [(1, MIB), (2, 8 * MIB), (3, 2 * MIB), (4, 4 * MIB), (5, MIB)] {
        let mut image = Image::child(8 * MIB, block_bytes);
        let at = image.payload_at();
        // A stripe of 64 KiB in each MiB, at another place in each layer.
        let mut bitmap = vec![0u8; 1 << 20];
        for mib in 0..8u64 {
            let first = mib * 2048 + layer * 100;
            for bit in first..first + 128 {
                bitmap[usize::try_from(bit / 8).unwrap()] |= 1 << (bit % 8);
            }
            let start = usize::try_from(first * 512).unwrap();
            expected[start..start + (64 << 10)].fill(u8::try_from(layer).unwrap());
        }
        image.data.push((at, bitmap));
        image.data.push((at + MIB, vec![u8::try_from(layer).unwrap(); 8 << 20]));
        for block in 0..image.blocks() {
            image.block(block, PARTIAL, at + MIB + block * block_bytes);
        }
        image.bitmap(0, FULL, at);
        below = Arc::new(VhdxImage::open_device(image.in_memory(), Some(below)).unwrap());
    }
    assert!(read_all(&*below) == expected);
    check_extents(&*below, &expected);
    // The extents come through all layers: what none of them has and the base does not reach.
    let extents = all_extents(&*below).unwrap();
    assert!(extents.iter().any(|extent| extent.kind == ExtentKind::Unallocated));
}

#[test]
fn several_chunks_of_the_largest_blocks_and_sectors() {
    let directory = tempfile::tempdir().unwrap();
    for (sector_bytes, block_bytes) in [(512, 256 * MIB), (4096, 256 * MIB), (4096, MIB)] {
        let chunk = (1 << 23) * sector_bytes;
        let mut image = Image::new(3 * chunk + 2 * MIB, block_bytes);
        image.sector_bytes = sector_bytes;
        let at = image.payload_at();
        let mut expected = Vec::new();
        let last = image.blocks() - 1;
        for (index, block) in
            [0, chunk / block_bytes - 1, chunk / block_bytes, last].into_iter().enumerate()
        {
            let place = at + index as u64 * block_bytes;
            image.block(block, FULL, place);
            let inside = if block == last { MIB + 4096 } else { block_bytes - 4096 };
            let inside = inside.min(block_bytes - 4096);
            let bytes = vec![u8::try_from(index + 1).unwrap(); 4096];
            image.data.push((place + inside, bytes.clone()));
            expected.push((block * block_bytes + inside, bytes));
        }
        image.file_bytes = at + 4 * block_bytes;
        let file = directory.path().join(format!("{sector_bytes}-{block_bytes}.vhdx"));
        let disk = open(image.in_file(&file));
        assert_eq!(u64::from(disk.block_size_bytes()), sector_bytes);
        for (offset, bytes) in expected {
            let mut buffer = vec![0xee; 8192];
            let start = offset - 4096;
            let length = usize::try_from((disk.size_bytes() - start).min(8192)).unwrap();
            disk.read_at(&mut buffer[..length], start).unwrap();
            assert!(buffer[4096..8192.min(length)] == bytes[..length.min(8192) - 4096]);
            assert!(buffer[..4096].iter().all(|byte| *byte == 0), "before {offset}");
        }
        std::fs::remove_file(&file).unwrap();
    }
}

#[test]
fn the_largest_disk_opens_at_once() {
    let directory = tempfile::tempdir().unwrap();
    for block_bytes in [MIB, 32 * MIB] {
        let mut image = Image::new(64 << 40, block_bytes);
        let at = image.payload_at();
        image.block(image.blocks() - 1, FULL, at);
        image.data.push((at + block_bytes - 512, vec![7; 512]));
        let file = image.in_file(&directory.path().join(format!("{block_bytes}.vhdx")));
        let counted = Arc::new(Counted { file, read_bytes: AtomicU64::new(0) });
        let disk = open(counted.clone());
        // The table of blocks has 512 and 16 MiB.
        let read_bytes = counted.read_bytes.load(Ordering::Relaxed);
        assert!(read_bytes < 4 * MIB, "opening read {read_bytes} bytes");
        let mut sector = [0; 1024];
        disk.read_at(&mut sector, (64 << 40) - 1024).unwrap();
        assert_eq!((sector[511], sector[512]), (0, 7));
        let extents = all_extents(&disk).unwrap();
        assert_eq!(extents[0].kind, ExtentKind::Unallocated);
        assert_eq!(extents[0].range.length, (64 << 40) - block_bytes);
    }
}

#[test]
fn holes_of_the_file_are_zeros() {
    let directory = tempfile::tempdir().unwrap();
    let mut image = Image::new(64 * MIB, 32 * MIB);
    image.flags = 1;
    let at = image.payload_at();
    image.block(0, FULL, at);
    image.block(1, FULL, at + 32 * MIB);
    image.data.push((at + 40 * MIB, block_of(5)));
    image.file_bytes = at + 64 * MIB;
    let disk = open(image.in_file(&directory.path().join("fixed.vhdx")));
    let (data, zero) = (ExtentKind::Data, ExtentKind::Zero);
    assert_eq!(kinds(&disk), [(zero, 40), (data, 1), (zero, 23)]);
    // Where the bytes are is another question.
    let layout = disk.layout(ByteRange::new(0, 64 * MIB)).unwrap();
    assert_eq!(layout.len(), 1);
    assert_eq!(layout[0].file_offset, Some(at));
}

#[test]
fn the_last_block_may_end_with_the_disk() {
    // The file holds no more of the last block than there is disk.
    let mut image = Image::new(MIB + 512, MIB);
    let at = image.payload_at();
    image.block(1, FULL, at);
    image.data.push((at, vec![3; 512]));
    let disk = open(image.in_memory());
    let mut buffer = [0; 512];
    disk.read_at(&mut buffer, MIB).unwrap();
    assert_eq!(buffer, [3; 512]);
    assert!(disk.read_at(&mut buffer, MIB + 1).is_err());
    // A file that ends before is truncated, and that is not zeros.
    image.data[0].1.truncate(511);
    let disk = open(image.in_memory());
    let error = disk.read_at(&mut buffer, MIB).unwrap_err().to_string();
    assert!(error.contains("payload block 1"), "{error}");
}

#[test]
fn the_writer_knows_a_cut_file_as_the_reader_does() {
    let mut image = Image::new(MIB + 512, MIB);
    let at = image.payload_at();
    image.block(1, FULL, at);
    image.data.push((at, vec![3; 512]));
    let writer = VhdxWriter::open_device(image.in_memory(), None).unwrap();
    let mut buffer = [0; 512];
    writer.read_at(&mut buffer, MIB).unwrap();
    assert_eq!(buffer, [3; 512]);
    // The block is completed with the first change, and the disk may grow into it.
    writer.write_at(&[4], 0).unwrap();
    writer.resize(2 * MIB).unwrap();
    let mut rest = vec![9; 1 << 20];
    writer.read_at(&mut rest, MIB).unwrap();
    assert!(rest[..512] == [3; 512] && rest[512..].iter().all(|byte| *byte == 0));
    image.data[0].1.truncate(511);
    let writer = VhdxWriter::open_device(image.in_memory(), None).unwrap();
    let error = writer.read_at(&mut buffer, MIB).unwrap_err();
    assert!(matches!(error, BlockError::Damaged { .. }), "{error:?}");
    assert!(error.to_string().contains("512 bytes at"), "{error}");
    // Nothing is written to it either: that would make zeros of what is missing.
    assert!(matches!(writer.write_at(&[4], 0), Err(BlockError::Damaged { .. })));
}

#[test]
fn an_empty_disk() {
    let disk = open(Image::new(0, MIB).in_memory());
    assert_eq!(disk.size_bytes(), 0);
    disk.read_at(&mut [], 0).unwrap();
    assert!(all_extents(&disk).unwrap().is_empty());
}

#[test]
fn what_qemu_makes() {
    let directory = tempfile::tempdir().unwrap();
    let bytes = pattern(21, (70 << 20) + 512 * 3);
    let raw = raw_file(directory.path(), "disk.raw", &bytes);
    for options in [
        "subformat=dynamic",
        "subformat=dynamic,block_size=1M,log_size=4M",
        "subformat=dynamic,block_size=2M,block_state_zero=off",
        "subformat=dynamic,block_size=64M",
        "subformat=dynamic,block_size=256M",
        "subformat=fixed",
        "subformat=fixed,block_size=32M",
    ] {
        let image = directory.path().join("image.vhdx");
        qemu_img(&["convert", "-f", "raw", "-O", "vhdx", "-o", options, path(&raw), path(&image)]);
        let disk = open_read_only(&image, &OpenOptions::default()).unwrap();
        assert!(read_all(&*disk) == bytes, "{options}");
        check_extents(&*disk, &bytes);
        let info = image_info(&image, None).unwrap();
        let kind = options.split(['=', ',']).nth(1);
        assert_eq!(info.subformat.as_deref(), kind);
        assert!(info.creator.unwrap().starts_with("QEMU"));
        std::fs::remove_file(&image).unwrap();
    }
}

#[test]
fn threads_share_an_image_and_its_caches() {
    // More chunks than there are places for pages of bitmaps, and one page of bitmap in each.
    let mut image = Image::child(3000 * 128 * MIB, 128 * MIB);
    image.file_bytes = image.payload_at() + 256 * MIB;
    let at = image.payload_at();
    for block in 0..3000 {
        // All blocks share one place: only the bits differ, and those of every chunk are one
        // block's, too.
        image.block(block, PARTIAL, at + 128 * MIB);
    }
    for chunk in 0..3000u64.div_ceil(image.ratio()) {
        image.bitmap(chunk, FULL, at);
    }
    image.data = vec![(at, vec![0b1010_0101; 1 << 20])];
    image.data.push((at + 128 * MIB, vec![1; 1 << 20]));
    let directory = tempfile::tempdir().unwrap();
    let file = image.in_file(&directory.path().join("child.vhdx"));
    let parent = Arc::new(MemoryDevice::from_bytes(vec![2; 1 << 20]));
    let disk = VhdxImage::open_device(file, Some(parent)).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let disk = &disk;
            scope.spawn(move || {
                let mut random = Random(thread + 1);
                let mut buffer = [0; 4096];
                for _ in 0..3000 {
                    let block = random.below(3000);
                    let inside = random.below(200) * 4096;
                    disk.read_at(&mut buffer, block * 128 * MIB + inside).unwrap();
                    let below = if block == 0 { 2 } else { 0 };
                    let sectors: Vec<u8> = buffer.chunks(512).map(|sector| sector[77]).collect();
                    assert_eq!(sectors, [1, below, 1, below, below, 1, below, 1]);
                }
            });
        }
    });
}
