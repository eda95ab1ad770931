//! Broken and hostile images: an error that names structure, offset and value, and nothing else.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

use crate::support;

use std::sync::Arc;
use support::{Random, path, qemu_img, qemu_io};
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, CancelToken, MemoryDevice, WritableBlockDevice,
    for_each_extent,
};
use vmtide_image::qcow2::{Companions, Qcow2Image, Qcow2Writer};

/// A small image with data, a zero cluster, a compressed cluster, a snapshot and a bitmap.
fn sample(options: &str) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path(&image), "1M"]);
    qemu_io(&image, &["-f", "qcow2"], &["write -P 1 0 10k", "write -c -P 2 128k 64k"]);
    qemu_img(&["snapshot", "-c", "first", path(&image)]);
    if !options.contains("0.10") {
        qemu_img(&["bitmap", "--add", path(&image), "bits"]);
        qemu_io(&image, &["-f", "qcow2"], &["write -z 256k 64k"]);
    }
    qemu_io(&image, &["-f", "qcow2"], &["write -P 3 300k 10k"]);
    std::fs::read(&image).unwrap()
}

fn be_u64(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap()
}

fn put_u32(at: usize, value: u32) -> impl Fn(&mut Vec<u8>) {
    move |bytes| bytes[at..at + 4].copy_from_slice(&value.to_be_bytes())
}

fn put_u64(at: usize, value: u64) -> impl Fn(&mut Vec<u8>) {
    move |bytes| bytes[at..at + 8].copy_from_slice(&value.to_be_bytes())
}

/// Opens the image and uses all of it.
fn use_all(bytes: Vec<u8>) -> Result<(), BlockError> {
    let image =
        Qcow2Image::open_device(Arc::new(MemoryDevice::from_bytes(bytes)), Companions::default())?;
    read_everything(&image)?;
    for snapshot in image.snapshots()?.iter().take(4) {
        read_everything(&image.open_snapshot(&snapshot.id)?)?;
    }
    for bitmap in image.bitmaps()?.iter().take(4) {
        image.read_bitmap(&bitmap.name)?;
    }
    Ok(())
}

/// Reads at most the first megabytes, and all extents of at most as many.
fn read_everything(disk: &dyn BlockDevice) -> Result<(), BlockError> {
    let size = disk.size_bytes().min(4 << 20);
    for_each_extent(disk, ByteRange::new(0, size), &CancelToken::new(), |_| Ok(()))?;
    let mut buffer = vec![0; 100_000];
    let mut at = 0;
    while at < size {
        let length = usize::try_from((size - at).min(100_000)).unwrap();
        disk.read_at(&mut buffer[..length], at)?;
        at += length as u64;
    }
    Ok(())
}

type Break = Box<dyn Fn(&mut Vec<u8>)>;

#[test]
#[allow(clippy::too_many_lines, reason = "a table, one case a row")]
fn every_broken_field_is_named_with_its_offset_and_value() {
    let good = sample("compat=1.1");
    use_all(good.clone()).unwrap();
    let l1 = be_u64(&good, 40);
    let l2 = be_u64(&good, l1) & 0x00ff_ffff_ffff_fe00;
    let snapshots = be_u64(&good, 64);
    let extension = good.windows(4).position(|w| w == [0x23, 0x85, 0x28, 0x75]).unwrap();
    let directory = be_u64(&good, extension + 8 + 16);
    let bitmap_table = be_u64(&good, directory);
    let compressed = be_u64(&good, l2 + 16) & 0x3f_ffff_ffff_ffff;
    let cases: Vec<(&str, Break, &[&str])> = vec![
        ("magic", Box::new(put_u32(0, 0x514649fa)), &["header at 0", "0x514649fa"]),
        ("version", Box::new(put_u32(4, 4)), &["header at 4", "version 4"]),
        (
            "backing name too long",
            Box::new(|b| {
                put_u64(8, 500)(b);
                put_u32(16, 1024)(b);
            }),
            &["header at 8", "1024"],
        ),
        (
            "backing name outside",
            Box::new(|b| {
                put_u64(8, 1 << 40)(b);
                put_u32(16, 10)(b);
            }),
            &["header at 8", "0x10000000000"],
        ),
        ("cluster bits small", Box::new(put_u32(20, 8)), &["header at 20", "cluster_bits is 8"]),
        ("cluster bits large", Box::new(put_u32(20, 63)), &["header at 20", "cluster_bits is 63"]),
        ("size", Box::new(put_u64(24, u64::MAX)), &["header at 24", "18446744073709551615"]),
        ("size beyond L1", Box::new(put_u64(24, 1 << 40)), &["header at 36", "1099511627776"]),
        ("encryption AES", Box::new(put_u32(32, 1)), &["AES-encrypted"]),
        ("encryption unknown", Box::new(put_u32(32, 3)), &["header at 32", "method 3"]),
        ("L1 size", Box::new(put_u32(36, u32::MAX)), &["header at 36", "4294967295"]),
        ("L1 size past the file", Box::new(put_u32(36, 1 << 20)), &["header at 40", "8388608"]),
        ("L1 offset unaligned", Box::new(put_u64(40, 0x30008)), &["header at 40", "0x30008"]),
        (
            "L1 offset past the end",
            Box::new(put_u64(40, 1 << 60)),
            &["header at 40", "0x1000000000000000"],
        ),
        ("L1 offset 0", Box::new(put_u64(40, 0)), &["header at 40", "0x0"]),
        ("refcount table unaligned", Box::new(put_u64(48, 1)), &["header at 48", "0x1"]),
        ("refcount table large", Box::new(put_u32(56, 1 << 20)), &["header at 48", "1048576"]),
        ("snapshot count", Box::new(put_u32(60, 65_537)), &["header at 60", "65537"]),
        (
            "snapshot table outside",
            Box::new(put_u64(64, 1 << 50)),
            &["header at 64", "0x4000000000000"],
        ),
        ("unknown incompatible", Box::new(put_u64(72, 1 << 7)), &["header at 72", "0x80"]),
        ("external data without file", Box::new(put_u64(72, 4)), &["external file"]),
        (
            "compression flag without type",
            Box::new(put_u64(72, 8)),
            &["header at 104", "feature bit is set"],
        ),
        (
            "compression type unknown",
            Box::new(|b| {
                put_u64(72, 8)(b);
                b[104] = 9;
            }),
            &["header at 104", "compression_type 9"],
        ),
        ("refcount order", Box::new(put_u32(96, 7)), &["header at 96", "refcount_order is 7"]),
        ("header length", Box::new(put_u32(100, 105)), &["header at 100", "header_length is 105"]),
        (
            "header length short",
            Box::new(put_u32(100, 72)),
            &["header at 100", "header_length is 72"],
        ),
        (
            "extension length",
            Box::new(move |b| put_u32(extension + 4, u32::MAX)(b)),
            &["header extension 0x23852875", "4294967295"],
        ),
        (
            "bitmaps extension length",
            Box::new(move |b| put_u32(extension + 4, 16)(b)),
            &["bitmaps extension", "16 bytes"],
        ),
        (
            "L1 entry unaligned",
            Box::new(move |b| put_u64(l1, 0x200)(b)),
            &["L1 table, entry 0", "0x0000000000000200"],
        ),
        (
            "L1 entry past the end",
            Box::new(move |b| put_u64(l1, 1 << 50)(b)),
            &["L1 table, entry 0", "0x0004000000000000"],
        ),
        (
            "L2 entry unaligned",
            Box::new(move |b| put_u64(l2, 0x8000_0000_0000_0200)(b)),
            &["entry 0", "0x8000000000000200", "not cluster-aligned"],
        ),
        (
            "L2 entry past the end",
            Box::new(move |b| put_u64(l2, 0x8000_1000_0000_0000)(b)),
            &["data cluster at 0x100000000000", "past the end"],
        ),
        (
            "compressed reserved",
            Box::new(move |b| put_u64(l2 + 16, (1 << 62) | (1 << 56) | (1 << 55))(b)),
            &["compressed cluster at"],
        ),
        (
            "compressed past the end",
            Box::new(move |b| put_u64(l2 + 16, (1 << 62) | (1 << 50))(b)),
            &["compressed cluster at 0x4000000000000", "past the end"],
        ),
        (
            "compressed garbage",
            Box::new(move |b| b[compressed..compressed + 8].fill(0xff)),
            &["compressed cluster at", "deflate"],
        ),
        (
            "snapshot extra data",
            Box::new(move |b| put_u32(snapshots + 36, 1 << 30)(b)),
            &["snapshot table at", "1073741824"],
        ),
        (
            "snapshot L1 unaligned",
            Box::new(move |b| put_u64(snapshots, 8)(b)),
            &["snapshot table at", "0x8"],
        ),
        (
            "snapshot L1 outside",
            Box::new(move |b| put_u64(snapshots, 1 << 50)(b)),
            &["L1 table at 0x4000000000000"],
        ),
        (
            "snapshot L1 size",
            Box::new(move |b| put_u32(snapshots + 8, u32::MAX)(b)),
            &["L1 table at", "4294967295"],
        ),
        (
            "snapshot L1 too small",
            Box::new(move |b| put_u32(snapshots + 8, 0)(b)),
            &["snapshot", "0 entries"],
        ),
        (
            "bitmap directory outside",
            Box::new(move |b| put_u64(extension + 24, 1 << 50)(b)),
            &["bitmap directory at 0x4000000000000"],
        ),
        (
            "bitmap directory short",
            Box::new(move |b| put_u64(extension + 16, 8)(b)),
            &["bitmap directory", "entry 0", "past the end"],
        ),
        (
            "bitmap count",
            Box::new(move |b| put_u32(extension + 8, u32::MAX)(b)),
            &["bitmap directory", "4294967295"],
        ),
        ("bitmap type", Box::new(move |b| b[directory + 16] = 2), &["bitmap directory", "type 2"]),
        (
            "bitmap granularity",
            Box::new(move |b| b[directory + 17] = 63),
            &["bitmap directory", "granularity_bits is 63"],
        ),
        (
            "bitmap table size",
            Box::new(move |b| put_u32(directory + 8, 77)(b)),
            &["bitmap \"bits\"", "77 entries"],
        ),
        (
            "bitmap table entry",
            Box::new(move |b| put_u64(bitmap_table, 0x201)(b)),
            &["bitmap \"bits\"", "0x0000000000000201"],
        ),
        (
            "bitmap in use",
            Box::new(move |b| b[directory + 15] |= 1),
            &["bitmap \"bits\"", "whole disk"],
        ),
        ("truncated to nothing", Box::new(|b| b.truncate(10)), &["header", "10 bytes"]),
        ("truncated header", Box::new(|b| b.truncate(90)), &["header at"]),
        ("truncated data", Box::new(|b| b.truncate(5 << 16)), &["at 0x"]),
    ];
    for (name, damage, words) in cases {
        let mut bytes = good.clone();
        damage(&mut bytes);
        let error = match use_all(bytes) {
            Ok(()) => panic!("{name}: no error"),
            Err(error) => error,
        };
        assert!(
            matches!(error, BlockError::Damaged { .. } | BlockError::Unsupported { .. }),
            "{name}: {error:?}"
        );
        let text = error.to_string();
        assert!(!text.contains('\n'), "{name}: {text}");
        for word in words {
            assert!(text.contains(word), "{name}: {word:?} is not in {text:?}");
        }
    }
}

#[test]
fn version_2_and_extended_images_have_their_own_rules() {
    let good = sample("compat=0.10");
    use_all(good.clone()).unwrap();
    let l2 = be_u64(&good, be_u64(&good, 40)) & 0x00ff_ffff_ffff_fe00;
    let mut bytes = good;
    bytes[l2 + 7] |= 1;
    let text = use_all(bytes).unwrap_err().to_string();
    assert!(text.contains("zero cluster, which version 2 does not have"), "{text}");

    let good = sample("extended_l2=on");
    use_all(good.clone()).unwrap();
    let l2 = be_u64(&good, be_u64(&good, 40)) & 0x00ff_ffff_ffff_fe00;
    let mut bytes = good.clone();
    bytes[l2 + 8..l2 + 16].fill(0xff);
    let text = use_all(bytes).unwrap_err().to_string();
    assert!(text.contains("both allocated and zero"), "{text}");
    let mut bytes = good;
    bytes[l2..l2 + 8].fill(0);
    let text = use_all(bytes).unwrap_err().to_string();
    assert!(text.contains("no cluster"), "{text}");
}

#[test]
fn damaged_metadata_never_panics_hangs_or_allocates_without_bound() {
    for (seed, options) in [
        "compat=1.1",
        "extended_l2=on",
        "compat=0.10,cluster_size=512",
        "compression_type=zstd,cluster_size=4096",
    ]
    .into_iter()
    .enumerate()
    {
        let good = sample(options);
        let cluster = 1usize << good[23];
        let mut random = Random(seed as u64 * 77 + 1);
        for round in 0..400 {
            let mut bytes = good.clone();
            for _ in 0..=random.below(4) {
                // The header more often than the tables, the tables more often than data.
                let limit = [112, 112, cluster * 6, good.len()][round % 4].min(good.len());
                let at = usize::try_from(random.below(limit as u64)).unwrap();
                bytes[at] = match random.below(3) {
                    0 => 0,
                    1 => 0xff,
                    _ => random.next().to_le_bytes()[0],
                };
            }
            let _ = use_all(bytes.clone());
            let memory = Arc::new(MemoryDevice::from_bytes(bytes));
            if let Ok(writer) = Qcow2Writer::open_device(memory, None, None)
                && writer.size_bytes() < 1 << 30
            {
                let end = writer.size_bytes().min(1 << 20);
                let _ = writer.write_at(&[7; 5000], end.saturating_sub(7000));
                let _ = writer.write_zeroes(ByteRange::new(0, end));
                let _ = writer.flush();
            }
        }
    }
}

#[test]
fn a_backing_file_that_was_not_given_is_an_error_that_names_it() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image.qcow2");
    qemu_img(&[
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-b",
        "/etc/shadow",
        "-F",
        "raw",
        path(&image),
        "1M",
    ]);
    let text = use_all(std::fs::read(&image).unwrap()).unwrap_err().to_string();
    assert!(text.contains("\"/etc/shadow\"") && text.contains("not opened"), "{text}");
}

#[test]
fn a_data_cluster_that_lies_in_a_table_is_not_written() {
    let good = sample("compat=1.1");
    let l1 = be_u64(&good, 40);
    let l2 = be_u64(&good, l1) & 0x00ff_ffff_ffff_fe00;
    for (target, what) in [(l1, "the L1 table"), (be_u64(&good, 48), "the refcount table")] {
        let mut bytes = good.clone();
        put_u64(l2 + 9 * 8, target as u64 | 1 << 63)(&mut bytes);
        let memory = Arc::new(MemoryDevice::from_bytes(bytes));
        let writer = Qcow2Writer::open_device(memory.clone(), None, None).unwrap();
        let before = memory.to_bytes()[..l1 + 8].to_vec();
        let error = writer.write_at(&[7; 512], 9 << 16).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
        assert_eq!(memory.to_bytes()[..l1], before[..l1]);
    }
}
