//! Images that vmtide writes, read by QEMU, libvhdi and dissect; images of others, written by
//! vmtide and read by QEMU.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

use crate::support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use support::{
    Random, check_extents, path, pattern, qemu_img, qemu_io, read_all, run, text, try_run,
};
use vmtide_block::{BlockDevice, ByteRange, OpenMode, RawDevice};
use vmtide_image::{
    BackingPolicy, CreateOptions, CreateParent, Format, ImageWriter, LogState, OpenOptions,
    create_image, identity, image_info, open_read_only, open_writable,
};

const MIB: u64 = 1 << 20;

fn trusting() -> OpenOptions {
    OpenOptions { backing: BackingPolicy::Allow, ..OpenOptions::default() }
}

/// The disk as a Python script writes it to its standard output.
fn read_with_python(script: &str, arguments: &[&str]) -> Vec<u8> {
    let python = std::env::var("VMTIDE_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let output = try_run(&python, &[&["-c", script], arguments].concat());
    assert!(
        output.status.success(),
        "reading {arguments:?} (needs the Python modules pyvhdi and dissect.hypervisor): {}",
        text(&output)
    );
    output.stdout
}

/// The disk as libvhdi reads it through the chain of images, the child first.
fn libvhdi(chain: &[&Path]) -> Vec<u8> {
    const SCRIPT: &str = "
import sys, pyvhdi
images = []
for path in reversed(sys.argv[1:]):
    image = pyvhdi.file()
    image.open(path)
    if images:
        image.set_parent(images[-1])
    # An image does not keep its parent: libvhdi of 2021 closes what nothing names.
    images.append(image)
child = images[-1]
size = child.get_media_size()
for at in range(0, size, 1 << 20):
    sys.stdout.buffer.write(child.read_buffer_at_offset(min(1 << 20, size - at), at))";
    let paths: Vec<&str> = chain.iter().map(|image| path(image)).collect();
    read_with_python(SCRIPT, &paths)
}

/// The disk as dissect reads it, which finds parents by the paths in the image. It reads whole
/// blocks only.
fn dissect(image: &Path) -> Vec<u8> {
    const SCRIPT: &str = "
import sys
from pathlib import Path
from dissect.hypervisor.disk.vhdx import VHDX
disk = VHDX(Path(sys.argv[1]))
for at in range(0, disk.size, disk.block_size):
    count = min(disk.block_size, disk.size - at) // disk.sector_size
    sys.stdout.buffer.write(disk.read_sectors(at // disk.sector_size, count))";
    read_with_python(SCRIPT, &[path(image)])
}

/// Writes of every kind; `expected` follows.
fn change(disk: &dyn ImageWriter, expected: &mut [u8], seed: u64) {
    let mut random = Random(seed | 1);
    for round in 0..60 {
        let at = random.below(expected.len() as u64 - 1);
        let longest = if round % 7 == 0 { 5 << 20 } else { 150_000 };
        let length = (random.below(longest) + 1).min(expected.len() as u64 - at);
        let range = usize::try_from(at).unwrap()..usize::try_from(at + length).unwrap();
        if round % 4 == 3 {
            disk.write_zeroes(ByteRange::new(at, length)).unwrap();
            expected[range].fill(0);
        } else {
            let data = random.bytes(range.len());
            disk.write_at(&data, at).unwrap();
            expected[range].copy_from_slice(&data);
        }
        if round % 10 == 0 {
            disk.flush().unwrap();
        }
    }
}

/// Opens the image, changes it, and holds it against `expected` before and after it is closed.
fn change_image(image: &Path, expected: &mut [u8]) {
    let disk = open_writable(image, &trusting()).unwrap();
    assert!(read_all(&*disk) == expected, "before, {}", image.display());
    change(&*disk, expected, expected.len() as u64);
    assert!(read_all(&*disk) == expected, "open writer, {}", image.display());
    check_extents(&*disk, expected);
    disk.finish().unwrap();
    drop(disk);
    let disk = open_read_only(image, &trusting()).unwrap();
    assert!(read_all(&*disk) == expected, "reopened, {}", image.display());
    assert_eq!(image_info(image, None).unwrap().log, Some(LogState::Empty));
}

fn compare_with_qemu(image: &Path, expected: &[u8]) {
    let out = try_run("qemu-img", &["check", "-f", "vhdx", path(image)]);
    assert!(out.status.success(), "qemu-img check: {}", text(&out));
    let raw = image.with_extension("expected");
    std::fs::write(&raw, expected).unwrap();
    let compared = qemu_img(&["compare", "-f", "raw", "-F", "vhdx", path(&raw), path(image)]);
    assert!(compared.contains("identical"), "{compared}");
}

#[test]
fn four_independent_readers_see_the_same_disk() {
    let directory = tempfile::tempdir().unwrap();
    for (index, (subformat, block_mib, sector_bytes)) in [
        ("dynamic", None, 512),
        ("dynamic", Some(1), 4096),
        ("fixed", None, 512),
        ("fixed", Some(8), 4096),
    ]
    .into_iter()
    .enumerate()
    {
        let image = directory.path().join(format!("image{index}.vhdx"));
        let mut content = vec![0; 21 << 20];
        let options = CreateOptions {
            subformat: Some(subformat.into()),
            block_size_bytes: block_mib.map(|mib: u64| mib << 20),
            logical_sector_bytes: Some(sector_bytes),
            ..CreateOptions::new(Format::Vhdx, content.len() as u64)
        };
        create_image(&image, &options).unwrap().finish().unwrap();
        change_image(&image, &mut content);
        let size = content.len();
        if sector_bytes == 512 {
            compare_with_qemu(&image, &content);
            let converted = directory.path().join("converted.raw");
            qemu_img(&["convert", "-f", "vhdx", "-O", "raw", path(&image), path(&converted)]);
            assert!(std::fs::read(&converted).unwrap() == content);
            let info = qemu_img(&["info", "-f", "vhdx", "--output=json", path(&image)]);
            let info: serde_json::Value = serde_json::from_str(&info).unwrap();
            assert_eq!(info["virtual-size"], size);
        }
        assert!(libvhdi(&[&image]) == content, "libvhdi, {subformat}, {sector_bytes}");
        assert!(dissect(&image) == content, "dissect, {subformat}, {sector_bytes}");
        let said = run("vhdiinfo", &[path(&image)]);
        assert!(said.contains(&format!("({size} bytes)")), "{said}");
    }
}

/// A child of `below` with the usual options.
fn create_child(child: &Path, below: &Path, size: u64) -> Arc<dyn ImageWriter> {
    let file = RawDevice::open(below, OpenMode::ReadOnly).unwrap();
    let options = CreateOptions {
        parent: Some(CreateParent {
            name: below.file_name().unwrap().to_str().unwrap().into(),
            absolute_path: Some(path(below).into()),
            format: Format::Vhdx,
            identity: identity(&file, Format::Vhdx).unwrap(),
            device: open_read_only(below, &trusting()).unwrap(),
        }),
        ..CreateOptions::new(Format::Vhdx, size)
    };
    create_image(child, &options).unwrap()
}

#[test]
fn chains_are_found_by_name_and_read_by_libvhdi_and_dissect() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let mut content = pattern(3, 9 << 20);
    let size = content.len() as u64;
    let options =
        CreateOptions { block_size_bytes: Some(2 << 20), ..CreateOptions::new(Format::Vhdx, size) };
    let base = create_image(at("base.vhdx"), &options).unwrap();
    base.write_at(&content, 0).unwrap();
    base.finish().unwrap();
    drop(base);
    let mut chain: Vec<PathBuf> = vec![at("base.vhdx")];
    let base_info = image_info(&chain[0], None).unwrap();
    for depth in 0..3u64 {
        let child = at(&format!("child{depth}.vhdx"));
        let writer = create_child(&child, &chain[0], size);
        let mut random = Random(depth + 9);
        for _ in 0..30 {
            let start = usize::try_from(random.below(size)).unwrap();
            let end = (start + usize::try_from(random.below(9000)).unwrap()).min(content.len());
            content[start..end].fill(u8::try_from(depth).unwrap() + 65);
            writer.write_at(&content[start..end], start as u64).unwrap();
        }
        assert!(read_all(&*writer) == content);
        writer.finish().unwrap();
        if depth == 0 {
            // Of a parent's partially present blocks dissect reads too few bits: one child only.
            assert!(dissect(&child) == content, "dissect reads another disk");
        }
        chain.insert(0, child);
    }
    let info = image_info(&chain[0], None).unwrap();
    assert_eq!(info.identifiers["virtual_disk_id"], base_info.identifiers["virtual_disk_id"]);
    assert_ne!(info.identifiers["data_write_guid"], base_info.identifiers["data_write_guid"]);
    assert_eq!(info.backing.unwrap().name, r".\child1.vhdx");
    let chained: Vec<&Path> = chain.iter().map(PathBuf::as_path).collect();
    assert!(libvhdi(&chained) == content, "libvhdi reads another disk");
    // Whole blocks of zeros in the youngest. libvhdi reads them from the parent, though they are
    // zero by MS-VHDX 2.5.1.1.
    let writer = open_writable(&chain[0], &trusting()).unwrap();
    writer.write_zeroes(ByteRange::new(2 * MIB, 4 * MIB)).unwrap();
    content[2 << 20..6 << 20].fill(0);
    writer.finish().unwrap();
    drop(writer);
    assert!(read_all(&*open_read_only(&chain[0], &trusting()).unwrap()) == content);
    // The directory moves: the relative path counts. Then the parents are elsewhere: the absolute
    // one does.
    let moved = tempfile::tempdir().unwrap();
    for image in &chain {
        std::fs::copy(image, moved.path().join(image.file_name().unwrap())).unwrap();
    }
    let child = moved.path().join("child2.vhdx");
    let disk = open_read_only(&child, &trusting()).unwrap();
    std::fs::rename(directory.path().join("base.vhdx"), directory.path().join("gone")).unwrap();
    assert!(
        read_all(&*disk) == content
            && read_all(&*open_read_only(&child, &trusting()).unwrap()) == content
    );
    std::fs::rename(directory.path().join("gone"), directory.path().join("base.vhdx")).unwrap();
    std::fs::remove_file(moved.path().join("child1.vhdx")).unwrap();
    assert!(read_all(&*open_read_only(&child, &trusting()).unwrap()) == content);
    // A child with whole blocks of zeros.
    let child = at("zeros.vhdx");
    let writer = create_child(&child, &chain[3], size);
    let mut zeros = read_all(&*writer);
    writer.write_zeroes(ByteRange::new(2 * MIB, 4 * MIB)).unwrap();
    zeros[2 << 20..6 << 20].fill(0);
    writer.write_at(&[9; 777], 7 * MIB).unwrap();
    zeros[7 << 20..(7 << 20) + 777].fill(9);
    writer.finish().unwrap();
    assert!(dissect(&child) == zeros, "dissect reads another disk");
    // A parent that is written is no longer the one the child was made of.
    let base = open_writable(&chain[3], &trusting()).unwrap();
    base.write_at(&[1], 0).unwrap();
    base.finish().unwrap();
    let error = open_read_only(&chain[2], &trusting()).err().unwrap().to_string();
    assert!(error.contains("changed or replaced"), "{error}");
}

#[test]
fn writing_goes_on_from_program_to_program() {
    let directory = tempfile::tempdir().unwrap();
    for (index, create) in [
        "",
        "subformat=fixed",
        "block_size=1M",
        "block_size=32M",
        "block_state_zero=off,log_size=2M",
    ]
    .into_iter()
    .enumerate()
    {
        let image = directory.path().join(format!("image{index}.vhdx"));
        let mut arguments = vec!["create", "-q", "-f", "vhdx"];
        if !create.is_empty() {
            arguments.extend(["-o", create]);
        }
        arguments.extend([path(&image), "20M"]);
        qemu_img(&arguments);
        let mut expected = vec![0; 20 << 20];
        qemu_io(&image, &["-f", "vhdx"], &["write -P 7 3M 5M"]);
        expected[3 << 20..8 << 20].fill(7);
        for round in 0..2u8 {
            change_image(&image, &mut expected);
            compare_with_qemu(&image, &expected);
            let at = usize::from(round) * (6 << 20) + 4096;
            let write = format!("write -P {} {at} 1500k", round + 9);
            qemu_io(&image, &["-f", "vhdx"], &[&write]);
            expected[at..at + (1500 << 10)].fill(round + 9);
        }
        change_image(&image, &mut expected);
        compare_with_qemu(&image, &expected);
    }
}

/// The directory of the sample images; a notice and nothing where it is absent.
fn images() -> Option<PathBuf> {
    let directory = std::env::var_os("VMTIDE_TEST_IMAGES").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/images"),
        PathBuf::from,
    );
    if directory.join("MANIFEST.tsv").is_file() {
        return Some(directory);
    }
    println!("NOTICE: no sample images at {}: nothing was tested", directory.display());
    None
}

#[test]
fn samples_of_hyper_v_disk2vhd_and_qemu_are_written() {
    let Some(images) = images() else { return };
    let directory = tempfile::tempdir().unwrap();
    let unpack = |name: &str| {
        let packed = std::fs::File::open(images.join(format!("vhdx/{name}.vhdx.zst"))).unwrap();
        let image = directory.path().join(format!("{name}.vhdx"));
        zstd::stream::copy_decode(packed, std::fs::File::create(&image).unwrap()).unwrap();
        image
    };
    unpack("fat-parent");
    for name in ["fat-differential", "ext2", "ntfs-fixed"] {
        let image = unpack(name);
        let mut expected = read_all(&*open_read_only(&image, &trusting()).unwrap());
        change_image(&image, &mut expected);
        if name != "fat-differential" {
            compare_with_qemu(&image, &expected);
        }
        let disk = open_writable(&image, &trusting()).unwrap();
        disk.resize(11 << 20).unwrap();
        expected.resize(11 << 20, 0);
        assert!(read_all(&*disk) == expected);
        disk.finish().unwrap();
        drop(disk);
        change_image(&image, &mut expected);
        let chain = [image.clone(), directory.path().join("fat-parent.vhdx")];
        let chain: Vec<&Path> = chain.iter().map(PathBuf::as_path).collect();
        let count = if name == "fat-differential" { 2 } else { 1 };
        assert!(libvhdi(&chain[..count]) == expected, "libvhdi, {name}");
        std::fs::remove_file(&image).unwrap();
    }
    // Too large to be read whole: what is written is there, and what was there stays.
    for name in ["btrfs", "swap", "iotest-dynamic-1G", "iotest-dirtylog-10G-4M"] {
        let image = unpack(name);
        let before = open_read_only(&image, &trusting()).unwrap();
        let places: Vec<u64> = (0..64).map(|n| before.size_bytes() / 64 * n).collect();
        let mut model: Vec<Vec<u8>> = places
            .iter()
            .map(|at| {
                let mut bytes = vec![0; 200_000];
                before.read_at(&mut bytes, *at).unwrap();
                bytes
            })
            .collect();
        drop(before);
        let disk = open_writable(&image, &trusting()).unwrap();
        for (number, (at, bytes)) in places.iter().zip(&mut model).enumerate() {
            if number % 3 == 0 {
                disk.write_at(&[0xb7; 70_001], at + 777).unwrap();
                bytes[777..777 + 70_001].fill(0xb7);
            }
            if number % 5 == 0 {
                disk.write_zeroes(ByteRange::new(at + 5000, 100_000)).unwrap();
                bytes[5000..105_000].fill(0);
            }
        }
        disk.finish().unwrap();
        drop(disk);
        let after = open_read_only(&image, &trusting()).unwrap();
        for (at, bytes) in places.iter().zip(&model) {
            let mut read = vec![0; 200_000];
            after.read_at(&mut read, *at).unwrap();
            assert!(read == *bytes, "{name} at {at}");
        }
        let out = try_run("qemu-img", &["check", "-f", "vhdx", path(&image)]);
        assert!(out.status.success(), "{name}: {}", text(&out));
        // Written and not zeroed after.
        let read = format!("read -P 0xb7 {} 50000", places[3] + 777 + 5000);
        qemu_io(&image, &["-r", "-f", "vhdx"], &[&read]);
        std::fs::remove_file(&image).unwrap();
    }
}
