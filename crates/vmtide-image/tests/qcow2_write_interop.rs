//! Images that vmtide writes, read and checked by QEMU.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod support;

use std::sync::Arc;
use support::{check_clean, check_extents, path, pattern, qemu_img, raw_file, read_all};
use vmtide_block::{
    BlockDevice, CancelToken, CopyOptions, MemoryDevice, Progress, WritableBlockDevice, copy_device,
};
use vmtide_image::qcow2::{CreateBacking, Qcow2CreateOptions, Qcow2Version, Qcow2Writer};
use vmtide_image::{BackingPolicy, Format, OpenOptions, open_read_only};

fn copy_into(writer: &Qcow2Writer, bytes: &[u8], target_is_zero: bool) {
    let options = CopyOptions { workers: 3, target_is_zero, differing_only: false };
    copy_device(
        &MemoryDevice::from_bytes(bytes.to_vec()),
        writer,
        &options,
        &Progress::new(),
        &CancelToken::new(),
    )
    .unwrap();
}

#[test]
fn every_cluster_size_and_version_is_identical_and_clean_for_qemu() {
    let directory = tempfile::tempdir().unwrap();
    let size = (9 << 20) + 1536;
    let bytes = pattern(7, size);
    let raw = raw_file(directory.path(), "disk.raw", &bytes);
    for bits in 9..=21u32 {
        for (version, extended_l2) in
            [(Qcow2Version::V2, false), (Qcow2Version::V3, false), (Qcow2Version::V3, true)]
        {
            if extended_l2 && bits < 14 {
                continue;
            }
            let image = directory.path().join(format!("{bits}-{version:?}-{extended_l2}"));
            let options = Qcow2CreateOptions {
                cluster_size_bytes: 1 << bits,
                version,
                extended_l2,
                ..Qcow2CreateOptions::new(size as u64)
            };
            let writer = Qcow2Writer::create(&image, &options).unwrap();
            copy_into(&writer, &bytes, true);
            assert_eq!(read_all(&writer), bytes, "{}", image.display());
            check_extents(&writer, &bytes);
            drop(writer);
            check_clean(&image);
            let compare = ["compare", "-f", "raw", "-F", "qcow2", path(&raw), path(&image)];
            assert!(qemu_img(&compare).contains("identical"), "{}", image.display());
            let reader = open_read_only(&image, &OpenOptions::default()).unwrap();
            assert_eq!(read_all(&*reader), bytes);
            std::fs::remove_file(&image).unwrap();
        }
    }
}

#[test]
fn an_overlay_of_ours_reads_the_same_in_qemu() {
    let directory = tempfile::tempdir().unwrap();
    let below = pattern(3, 5 << 20);
    raw_file(directory.path(), "base.raw", &below);
    let mut expected = below.clone();
    expected.resize(6 << 20, 0);
    let image = directory.path().join("overlay.qcow2");
    let options = Qcow2CreateOptions {
        backing: Some(CreateBacking {
            name: "base.raw".into(),
            format: Format::Raw,
            device: Arc::new(MemoryDevice::from_bytes(below)),
        }),
        ..Qcow2CreateOptions::new(6 << 20)
    };
    let writer = Qcow2Writer::create(&image, &options).unwrap();
    for (at, length, value) in [(100, 5000, 1u8), (70_000, 300_000, 2), (4_999_999, 700_000, 3)] {
        writer.write_at(&vec![value; length], at as u64).unwrap();
        expected[at..at + length].fill(value);
    }
    writer.write_zeroes(vmtide_block::ByteRange::new(1 << 20, 1_000_001)).unwrap();
    expected[1 << 20..(1 << 20) + 1_000_001].fill(0);
    writer.flush().unwrap();
    assert_eq!(read_all(&writer), expected);
    check_extents(&writer, &expected);
    drop(writer);
    check_clean(&image);
    let raw = raw_file(directory.path(), "expected.raw", &expected);
    qemu_img(&["compare", "-f", "raw", "-F", "qcow2", path(&raw), path(&image)]);
    let options = OpenOptions { backing: BackingPolicy::SameDirectory, ..OpenOptions::default() };
    let reader = open_read_only(&image, &options).unwrap();
    assert_eq!(reader.size_bytes(), 6 << 20);
    assert_eq!(read_all(&*reader), expected);
    check_extents(&*reader, &expected);
}
