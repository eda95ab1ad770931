//! What must not be written: images in which it would destroy something else, and media that have
//! failed once.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use crate::support;
use crate::support::vhdx as vhdx_image;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use support::vmdk::{MemoryFiles, descriptor};
use support::{Random, pattern, read_all};
use vhdx_image::{FULL, Image, KIB, METADATA_AT, MIB, put, seal};
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, MemoryDevice, OpenMode, RawDevice, Result,
    WritableBlockDevice,
};
use vmtide_image::qcow2::{Qcow2CreateOptions, Qcow2Writer};
use vmtide_image::vhd::{VhdCreateOptions, VhdWriter};
use vmtide_image::vhdx::{VhdxImage, VhdxWriter};
use vmtide_image::vmdk::{VmdkCreateOptions, VmdkImage, VmdkKind, VmdkWriter};
use vmtide_image::{
    BackingPolicy, CreateOptions, CreateParent, Format, ImageWriter, NewParent, OpenOptions,
    RebaseOptions, create_image, find_children, identity, open_read_only, rebase_image,
};

/// A medium of which one flush fails; the one after it succeeds, as Linux has it.
struct Failing {
    memory: Arc<MemoryDevice>,
    /// The flushes before the one that fails.
    left: AtomicI64,
    /// How large it can be.
    limit_bytes: AtomicU64,
}

impl Failing {
    fn new(memory: Arc<MemoryDevice>, left: i64) -> Arc<Self> {
        Arc::new(Self { memory, left: AtomicI64::new(left), limit_bytes: AtomicU64::new(u64::MAX) })
    }
}

impl BlockDevice for Failing {
    fn name(&self) -> String {
        self.memory.name()
    }

    fn size_bytes(&self) -> u64 {
        self.memory.size_bytes()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.memory.read_at(buffer, offset)
    }
}

impl WritableBlockDevice for Failing {
    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.memory.write_at(data, offset)
    }

    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        self.memory.write_zeroes(range)
    }

    fn flush(&self) -> Result<()> {
        match self.left.fetch_sub(1, Ordering::Relaxed) {
            0 => Err(BlockError::io("flush", std::io::ErrorKind::StorageFull)),
            _ => self.memory.flush(),
        }
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        if size_bytes > self.limit_bytes.load(Ordering::Relaxed) {
            return Err(BlockError::io("resize", std::io::ErrorKind::StorageFull));
        }
        self.memory.resize(size_bytes)
    }
}

/// A child of this image, which it names by its absolute path.
fn child_of(parent: &Path, format: Format) -> CreateOptions {
    let device = open_read_only(parent, &OpenOptions::default()).unwrap();
    let name = parent.to_str().unwrap().to_owned();
    let options = CreateOptions::new(format, device.size_bytes());
    let file = RawDevice::open(parent, OpenMode::ReadOnly).unwrap();
    let identity = identity(&file, format).unwrap();
    CreateOptions {
        parent: Some(CreateParent {
            absolute_path: Some(name.clone()),
            name,
            format,
            identity,
            device,
        }),
        ..options
    }
}

fn message<T>(result: Result<T>) -> String {
    let error = result.err().unwrap();
    assert!(matches!(error, BlockError::Damaged { .. } | BlockError::Unsupported { .. }));
    error.to_string()
}

/// Four blocks of 1 MiB, the first of them there.
fn vhdx() -> Image {
    let mut image = Image::new(4 * MIB, MIB);
    let at = image.payload_at();
    image.block(0, FULL, at);
    image.data.push((at, vec![0x5a; 1 << 20]));
    image
}

/// The image with its log somewhere else.
fn vhdx_with_log(offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = vhdx().in_memory().to_bytes();
    for header in [64 * KIB, 128 * KIB] {
        put(&mut bytes, header + 68, &length.to_le_bytes());
        put(&mut bytes, header + 72, &offset.to_le_bytes());
        let at = usize::try_from(header).unwrap();
        seal(&mut bytes[at..at + 4096]);
    }
    bytes
}

#[test]
fn a_vhdx_whose_empty_log_lies_on_something_is_only_read() {
    let payload = vhdx().payload_at();
    for (offset, length) in [
        (0, 1 << 20),
        (METADATA_AT, 1 << 20),
        (payload, 1 << 20),
        (payload + MIB, 1 << 20),
        (MIB + 4096, 1 << 20),
        (MIB, 0),
        (MIB, 8192),
        (u64::MAX - MIB + 1, 1 << 20),
    ] {
        let bytes = vhdx_with_log(offset, length);
        let file = Arc::new(MemoryDevice::from_bytes(bytes.clone()));
        let disk = VhdxImage::open_device(file.clone(), None).unwrap();
        assert_eq!(read_all(&disk)[0], 0x5a, "{offset:#x}");
        let written = VhdxWriter::open_device(file.clone(), None).and_then(|writer| {
            writer.write_at(&[1; 512], 2 * MIB)?;
            writer.flush()
        });
        let error = message(written);
        assert!(file.to_bytes() == bytes, "{offset:#x}, {length}: {error}");
    }
}

#[test]
fn a_vhdx_whose_log_lies_on_a_block_is_not_relinked() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    create_image(at("base.vhdx"), &CreateOptions::new(Format::Vhdx, 4 * MIB))
        .and_then(|writer| writer.finish())
        .unwrap();
    let options =
        CreateOptions { block_size_bytes: Some(MIB), ..child_of(&at("base.vhdx"), Format::Vhdx) };
    let child = create_image(at("child.vhdx"), &options).unwrap();
    child.write_at(&vec![7; 1 << 20], 0).unwrap();
    child.finish().unwrap();
    drop(child);
    let mut bytes = std::fs::read(at("child.vhdx")).unwrap();
    let block = bytes.windows(4096).position(|window| window == [7; 4096]).unwrap() as u64;
    for header in [64 * KIB, 128 * KIB] {
        put(&mut bytes, header + 72, &block.to_le_bytes());
        let at = usize::try_from(header).unwrap();
        seal(&mut bytes[at..at + 4096]);
    }
    std::fs::write(at("child.vhdx"), &bytes).unwrap();
    std::fs::rename(at("base.vhdx"), at("moved.vhdx")).unwrap();
    let open = OpenOptions { backing: BackingPolicy::Allow, ..OpenOptions::default() };
    let parent = Some(NewParent { path: at("moved.vhdx"), format: None, stored_name: None });
    let options = RebaseOptions { open, parent, relink_only: true, ..RebaseOptions::default() };
    let (progress, cancel) = (vmtide_block::Progress::new(), vmtide_block::CancelToken::new());
    let error = message(rebase_image(at("child.vhdx"), &options, &progress, &cancel));
    assert!(error.contains("lies on"), "{error}");
    assert!(std::fs::read(at("child.vhdx")).unwrap() == bytes, "nothing is written");
}

#[test]
fn a_log_is_of_the_version_of_its_entries_once_it_is_used() {
    let mut image = vhdx();
    image.log_version = 7;
    let file = image.in_memory();
    let writer = VhdxWriter::open_device(file.clone(), None).unwrap();
    writer.write_at(&[1; 512], 2 * MIB).unwrap();
    writer.flush().unwrap();
    drop(writer);
    let disk = VhdxImage::open_device(file, None).unwrap();
    let mut found = [0; 512];
    disk.read_at(&mut found, 2 * MIB).unwrap();
    assert_eq!(found, [1; 512]);
}

#[test]
fn after_a_failed_flush_a_vmdk_is_not_written() {
    for kind in [VmdkKind::MonolithicSparse, VmdkKind::MonolithicFlat] {
        let files = MemoryFiles::default();
        let options = VmdkCreateOptions { kind, ..VmdkCreateOptions::new(4 << 20) };
        let mut failing = Vec::new();
        let writer = VmdkWriter::create_files("disk.vmdk", &options, &mut |name| {
            let memory = Arc::new(MemoryDevice::new(0));
            files.put(name, memory.clone());
            let device = Failing::new(memory, -1);
            failing.push(device.clone());
            Ok(device)
        })
        .unwrap();
        writer.write_at(&[1; 70_000], 100).unwrap();
        for device in &failing {
            device.left.store(0, Ordering::Relaxed);
        }
        writer.flush().unwrap_err();
        for device in &failing {
            device.left.store(-1, Ordering::Relaxed);
        }
        let error = message(writer.flush());
        assert!(error.contains("an earlier flush failed"), "{error}");
        message(writer.write_at(&[2; 512], 0));
        message(writer.finish());
        if kind == VmdkKind::MonolithicSparse {
            let disk = VmdkImage::open_device(files.get("disk.vmdk"), &files, None).unwrap();
            assert!(vmtide_block::is_zero(&read_all(&disk)), "entries to lost grains");
        }
    }
}

#[test]
fn two_extents_of_a_vmdk_that_share_bytes_are_only_read() {
    let writable = |main: &str, lines: &str| {
        let text = descriptor(main, None, lines);
        let files = MemoryFiles::default()
            .with("disk.vmdk", text.into_bytes())
            .with("a", pattern(1, 128 << 9))
            .with("b", pattern(2, 128 << 9));
        let file = files.get("disk.vmdk");
        VmdkImage::open_device(file.clone(), &files, None).unwrap();
        VmdkWriter::open_device(file, &files, None).map(drop)
    };
    writable("twoGbMaxExtentFlat", "RW 128 FLAT \"a\" 0\nRW 128 FLAT \"b\" 0").unwrap();
    writable("twoGbMaxExtentFlat", "RW 64 FLAT \"a\" 0\nRW 64 FLAT \"a\" 64").unwrap();
    writable(
        "twoGbMaxExtentFlat",
        "RDONLY 64 FLAT \"a\" 0\nRDONLY 64 FLAT \"a\" 0\nRW 8 FLAT \"b\" 0",
    )
    .unwrap();
    for lines in [
        "RW 128 FLAT \"a\" 0\nRW 128 FLAT \"a\" 0",
        "RW 64 FLAT \"a\" 0\nRW 64 FLAT \"a\" 63",
        "RW 64 FLAT \"a\" 0\nRDONLY 64 FLAT \"a\" 32",
        "RDONLY 64 FLAT \"a\" 0\nRW 64 FLAT \"a\" 32",
    ] {
        let error = message(writable("twoGbMaxExtentFlat", lines));
        assert!(error.contains("the same bytes of the same file"), "{error}");
    }
}

#[test]
fn one_file_by_two_names_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    std::fs::write(at("a"), vec![0; 1 << 16]).unwrap();
    std::fs::hard_link(at("a"), at("b")).unwrap();
    let lines = "RW 128 FLAT \"a\" 0\nRW 128 FLAT \"b\" 0";
    std::fs::write(at("disk.vmdk"), descriptor("twoGbMaxExtentFlat", None, lines)).unwrap();
    let options = OpenOptions { backing: BackingPolicy::SameDirectory, ..OpenOptions::default() };
    let result = vmtide_image::open_writable(at("disk.vmdk"), &options);
    // Other systems know a file by its path alone.
    if cfg!(unix) {
        let error = message(result);
        assert!(error.contains("the same bytes of the same file"), "{error}");
    }
}

#[test]
fn huge_grains_are_only_read() {
    let files = MemoryFiles::default();
    let writer =
        VmdkWriter::create_files("disk.vmdk", &VmdkCreateOptions::new(1 << 20), &mut |name| {
            let memory = Arc::new(MemoryDevice::new(0));
            files.put(name, memory.clone());
            Ok(memory)
        })
        .unwrap();
    writer.finish().unwrap();
    let file = files.get("disk.vmdk");
    file.write_at(&(1u64 << 21).to_le_bytes(), 20).unwrap();
    VmdkImage::open_device(file.clone(), &files, None).unwrap();
    let error = message(VmdkWriter::open_device(file, &files, None));
    assert!(error.contains("more than 16 MiB"), "{error}");
}

/// A dynamic VHD of 128 blocks of 4 KiB, all of them there, whose header claims room for more.
fn vhd_with_room(entries: u32) -> (Arc<MemoryDevice>, Vec<u8>) {
    let content = pattern(9, 128 * 4096);
    let options = VhdCreateOptions { block_size_bytes: 4096, ..VhdCreateOptions::new(128 * 4096) };
    let memory = Arc::new(MemoryDevice::new(0));
    let writer = VhdWriter::create_device(memory.clone(), &options).unwrap();
    for (number, piece) in content.chunks(4096).enumerate() {
        let mut piece = piece.to_vec();
        piece[0] = 1;
        writer.write_at(&piece, number as u64 * 4096).unwrap();
    }
    writer.finish().unwrap();
    let disk = read_all(&writer);
    let mut header = [0; 1024];
    memory.read_at(&mut header, 512).unwrap();
    header[28..32].copy_from_slice(&entries.to_be_bytes());
    header[36..40].fill(0);
    let sum = header.iter().fold(0u32, |sum, byte| sum + u32::from(*byte));
    header[36..40].copy_from_slice(&(!sum).to_be_bytes());
    memory.write_at(&header, 512).unwrap();
    (memory, disk)
}

#[test]
fn a_vhd_grows_around_blocks_where_its_header_claims_room() {
    let (memory, mut disk) = vhd_with_room(4096);
    let writer = VhdWriter::open_device(memory.clone(), None).unwrap();
    writer.resize(4096 * 4096).unwrap();
    disk.resize(4096 * 4096, 0);
    assert!(read_all(&writer) == disk);
    writer.finish().unwrap();
    let again = VhdWriter::open_device(memory, None).unwrap();
    assert!(read_all(&again) == disk);
}

#[test]
fn a_vhd_that_could_not_grow_is_as_large_as_before() {
    let (memory, disk) = vhd_with_room(128);
    for failing_flush in 0..6 {
        let memory = Arc::new(MemoryDevice::from_bytes(memory.to_bytes()));
        let device = Failing::new(memory.clone(), failing_flush);
        let writer = VhdWriter::open_device(device, None).unwrap();
        if writer.resize(200 * 4096).is_ok() {
            assert!(failing_flush > 1, "growing flushes at least twice");
            return;
        }
        assert_eq!(writer.size_bytes(), disk.len() as u64);
        assert!(read_all(&writer) == disk);
        message(writer.write_at(&[1], 0));
        message(writer.flush());
        let again = VhdWriter::open_device(memory, None).unwrap();
        assert!(read_all(&again)[..disk.len()] == disk);
    }
    unreachable!("growing takes fewer flushes");
}

#[test]
fn a_stream_of_an_odd_size_is_whole_at_its_end() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("odd.vmdk");
    for size in [100_000usize, 65_537, 131_071, 300] {
        let content = Random(3).bytes(size);
        let options = CreateOptions {
            subformat: Some("streamOptimized".into()),
            ..CreateOptions::new(Format::Vmdk, size as u64)
        };
        let writer = create_image(&image, &options).unwrap();
        let compressed = writer.compressed().unwrap();
        let mut at = 0;
        for piece in content.chunks(usize::try_from(compressed.cluster_bytes()).unwrap()) {
            if !vmtide_block::is_zero(piece) {
                compressed.append(at, compressed.compress(piece).unwrap()).unwrap();
            }
            at += piece.len() as u64;
        }
        writer.finish().unwrap();
        drop(writer);
        let disk = open_read_only(&image, &OpenOptions::default()).unwrap();
        let found = read_all(&*disk);
        assert!(found[..size] == content && vmtide_block::is_zero(&found[size..]), "{size}");
        std::fs::remove_file(&image).unwrap();
    }
}

#[cfg(unix)]
#[test]
fn children_are_found_behind_links() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().canonicalize().unwrap().join(name);
    std::fs::create_dir(at("elsewhere")).unwrap();
    create_image(at("base.qcow2"), &CreateOptions::new(Format::Qcow2, MIB)).unwrap();
    create_image(at("elsewhere/child.qcow2"), &child_of(&at("base.qcow2"), Format::Qcow2)).unwrap();
    assert!(find_children(at("base.qcow2"), &[]).unwrap().is_empty());
    std::os::unix::fs::symlink(at("elsewhere/child.qcow2"), at("seen.qcow2")).unwrap();
    std::os::unix::fs::symlink(at("base.qcow2"), at("itself.qcow2")).unwrap();
    let children = find_children(at("base.qcow2"), &[]).unwrap();
    assert_eq!(children, [at("elsewhere/child.qcow2")]);
}

#[test]
fn what_cannot_be_relinked_is_not_copied_into_first() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    for (format, name) in [
        (Format::Qcow2, Some("x".repeat(2000))),
        (Format::Vmdk, Some("x".repeat(60_000))),
        (Format::Vhdx, Some("x".repeat(60_000))),
        // A differencing VHDX stays one.
        (Format::Vhdx, None),
    ] {
        for image in ["base", "other"] {
            let _ = std::fs::remove_file(at(image));
            let options = CreateOptions::new(format, 4 * MIB);
            let writer = create_image(at(image), &options).unwrap();
            writer.write_at(&[7; 100_000], 0).unwrap();
            writer.finish().unwrap();
        }
        let _ = std::fs::remove_file(at("child"));
        let child = create_image(at("child"), &child_of(&at("base"), format)).unwrap();
        child.finish().unwrap();
        drop(child);
        let before = std::fs::read(at("child")).unwrap();
        let open = OpenOptions { backing: BackingPolicy::Allow, ..OpenOptions::default() };
        let parent =
            name.map(|name| NewParent { path: at("other"), format: None, stored_name: Some(name) });
        let options = RebaseOptions { open, parent, ..RebaseOptions::default() };
        let (progress, cancel) = (vmtide_block::Progress::new(), vmtide_block::CancelToken::new());
        let error = message(rebase_image(at("child"), &options, &progress, &cancel));
        assert!(std::fs::read(at("child")).unwrap() == before, "{format}: {error}");
    }
}

#[test]
fn a_qcow2_that_could_not_hide_a_longer_backing_disk_does_not_show_it() {
    let backing = Arc::new(MemoryDevice::from_bytes(vec![0xbb; 8 << 20]));
    let memory = Arc::new(MemoryDevice::new(0));
    // Small clusters: what is hidden needs tables that the image does not have.
    let options =
        Qcow2CreateOptions { cluster_size_bytes: 512, ..Qcow2CreateOptions::new(64 << 10) };
    Qcow2Writer::create_device(memory.clone(), &options).unwrap().finish().unwrap();
    let device = Failing::new(memory.clone(), -1);
    let writer = Qcow2Writer::open_device(device.clone(), Some(backing.clone()), None).unwrap();
    // Enough for the larger table of tables and not for the tables.
    device.limit_bytes.store(memory.size_bytes() + (8 << 10), Ordering::Relaxed);
    writer.resize(8 << 20).unwrap_err();
    assert_eq!(writer.size_bytes(), 64 << 10);
    writer.flush().unwrap();
    drop(writer);
    let writer = Qcow2Writer::open_device(memory.clone(), Some(backing.clone()), None).unwrap();
    assert_eq!(writer.size_bytes(), 64 << 10, "as large as before");
    writer.resize(8 << 20).unwrap();
    let disk = read_all(&writer);
    assert!(disk[..64 << 10].iter().all(|byte| *byte == 0xbb));
    assert!(vmtide_block::is_zero(&disk[64 << 10..]));
}
