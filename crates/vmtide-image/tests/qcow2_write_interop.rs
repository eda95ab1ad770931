//! Images that vmtide writes, read and checked by QEMU.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use crate::support;

use std::sync::Arc;
use support::{check_clean, check_extents, path, pattern, qemu_img, raw_file, read_all};
use vmtide_block::{
    BlockDevice, CancelToken, CopyOptions, MemoryDevice, Progress, WritableBlockDevice, copy_device,
};
use vmtide_image::qcow2::{CreateBacking, Qcow2CreateOptions, Qcow2Version, Qcow2Writer};
use vmtide_image::{
    BackingPolicy, CompressedCluster, Compression, CreateOptions, Format, ImageWriter, OpenOptions,
    create_image, open_read_only, open_writable,
};

fn copy_into(writer: &Qcow2Writer, bytes: &[u8], target_is_zero: bool) {
    let options = CopyOptions { workers: 3, target_is_zero, ..CopyOptions::default() };
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

/// Appends all clusters of `bytes` that are not zero; the parts are compressed by several threads.
fn append_all(writer: &dyn ImageWriter, bytes: &[u8]) -> usize {
    let compressed = writer.compressed().unwrap();
    let cluster = usize::try_from(compressed.cluster_bytes()).unwrap();
    let clusters: Vec<(usize, &[u8])> = bytes
        .chunks(cluster)
        .enumerate()
        .filter(|(_, data)| data.iter().any(|byte| *byte != 0))
        .collect();
    let mut packed = 0;
    for group in clusters.chunks(64) {
        let done: Vec<CompressedCluster> = std::thread::scope(|scope| {
            let threads: Vec<_> = group
                .chunks(16)
                .map(|part| {
                    scope.spawn(move || {
                        let compress = |(_, data): &(usize, &[u8])| compressed.compress(data);
                        part.iter().map(|entry| compress(entry).unwrap()).collect::<Vec<_>>()
                    })
                })
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        for ((index, _), cluster_data) in group.iter().zip(done) {
            packed += usize::from(matches!(cluster_data, CompressedCluster::Compressed(_)));
            compressed.append((index * cluster) as u64, cluster_data).unwrap();
        }
    }
    packed
}

#[test]
fn compressed_clusters_of_every_size_are_identical_and_clean_for_qemu() {
    let directory = tempfile::tempdir().unwrap();
    let size = (5 << 20) + 1536;
    // Zeros, repeated bytes, noise, and text between them.
    let mut bytes = pattern(11, size);
    for (at, byte) in bytes.iter_mut().enumerate() {
        if at % 300_000 < 100_000 {
            *byte = b"what a disk is full of: words, words, words "[at * at / 7 % 44];
        }
    }
    let raw = raw_file(directory.path(), "disk.raw", &bytes);
    for bits in [9u32, 10, 12, 14, 16, 18, 21] {
        for compression in [Compression::Zlib, Compression::Zstd] {
            let image = directory.path().join(format!("{bits}-{compression:?}.qcow2"));
            let options = CreateOptions {
                block_size_bytes: Some(1 << bits),
                compress: true,
                compression: Some(compression),
                ..CreateOptions::new(Format::Qcow2, size as u64)
            };
            let writer = create_image(&image, &options).unwrap();
            assert!(append_all(&*writer, &bytes) > 0, "{bits} bits {compression:?}");
            assert_eq!(read_all(&*writer), bytes, "{bits} bits {compression:?}");
            writer.finish().unwrap();
            drop(writer);
            check_clean(&image);
            let compare = ["compare", "-f", "raw", "-F", "qcow2", path(&raw), path(&image)];
            assert!(qemu_img(&compare).contains("identical"));
            let reader = open_read_only(&image, &OpenOptions::default()).unwrap();
            assert_eq!(read_all(&*reader), bytes);
            check_extents(&*reader, &bytes);
            overwrite_parts(&image, &bytes);
            std::fs::remove_file(&image).unwrap();
        }
    }
}

/// Compressed clusters are overwritten by copies of their own; the rest of what they shared stays.
fn overwrite_parts(image: &std::path::Path, bytes: &[u8]) {
    let mut expected = bytes.to_vec();
    let writer = open_writable(image, &OpenOptions::default()).unwrap();
    for step in 0..12usize {
        let at = step * 431_007;
        writer.write_at(&[0xee; 5000], at as u64).unwrap();
        expected[at..at + 5000].fill(0xee);
        if step % 4 == 3 {
            writer.flush().unwrap();
        }
    }
    writer.finish().unwrap();
    assert_eq!(read_all(&*writer), expected);
    drop(writer);
    check_clean(image);
    let reader = open_read_only(image, &OpenOptions::default()).unwrap();
    assert_eq!(read_all(&*reader), expected);
}

#[test]
fn only_images_created_for_it_take_compressed_clusters() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("plain.qcow2");
    let writer = create_image(&image, &CreateOptions::new(Format::Qcow2, 1 << 20)).unwrap();
    assert!(writer.compressed().is_none());
    let memory = Arc::new(MemoryDevice::new(0));
    let options = Qcow2CreateOptions { compress: true, ..Qcow2CreateOptions::new(1 << 20) };
    let writer = Qcow2Writer::create_device(memory.clone(), &options).unwrap();
    let compressed = writer.compressed().unwrap();
    assert_eq!(compressed.cluster_bytes(), 65_536);
    assert!(compressed.compress(&vec![1; 65_537]).is_err());
    let noise: Vec<u8> = support::Random(5).bytes(65_536);
    assert_eq!(compressed.compress(&noise).unwrap(), CompressedCluster::Plain(noise.clone()));
    let packed = compressed.compress(&vec![7; 65_536]).unwrap();
    for (offset, reason) in [(512, "0x200"), (1 << 20, "1048576")] {
        let error = compressed.append(offset, packed.clone()).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    let options =
        Qcow2CreateOptions { version: Qcow2Version::V2, compression: Compression::Zstd, ..options };
    assert!(Qcow2Writer::create_device(memory, &options).is_err());
}

#[test]
fn versions_and_extended_entries_are_made_by_their_names() {
    let directory = tempfile::tempdir().unwrap();
    let bytes = pattern(17, (3 << 20) + 512);
    let raw = raw_file(directory.path(), "disk.raw", &bytes);
    for (name, said) in
        [("v3", "compat: 1.1"), ("v2", "compat: 0.10"), ("extended-l2", "extended l2: true")]
    {
        let image = directory.path().join(format!("{name}.qcow2"));
        let options = CreateOptions {
            subformat: Some(name.into()),
            ..CreateOptions::new(Format::Qcow2, bytes.len() as u64)
        };
        let writer = create_image(&image, &options).unwrap();
        writer.write_at(&bytes, 0).unwrap();
        writer.finish().unwrap();
        check_clean(&image);
        assert!(qemu_img(&["info", path(&image)]).contains(said), "{name}");
        let compare = ["compare", "-f", "raw", "-F", "qcow2", path(&raw), path(&image)];
        assert!(qemu_img(&compare).contains("identical"), "{name}");
    }
    let unknown = CreateOptions {
        subformat: Some("v4".into()),
        ..CreateOptions::new(Format::Qcow2, 1 << 20)
    };
    let error = create_image(directory.path().join("v4.qcow2"), &unknown).err().unwrap();
    assert!(error.to_string().contains("v3, v2, extended-l2"), "{error}");
}
