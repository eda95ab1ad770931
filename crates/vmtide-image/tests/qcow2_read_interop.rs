//! Images that QEMU writes, read by vmtide.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use crate::support;

use std::path::{Path, PathBuf};
use support::{check_extents, path, pattern, qemu_img, qemu_io, raw_file, read_all};
use vmtide_block::{BlockDevice, ByteRange, ExtentKind, RangeSet, all_extents};
use vmtide_image::qcow2::{Companions, Qcow2Image};
use vmtide_image::{
    BackingPolicy, BitmapState, Format, OpenOptions, image_info, open_read_only, probe,
};

const ALLOW: OpenOptions = OpenOptions {
    format: None,
    backing: BackingPolicy::Allow,
    backing_format: None,
    backing_device: None,
    search: Vec::new(),
    any_parent: false,
    no_links: false,
};

fn qcow2(path: &Path) -> Qcow2Image {
    let file = vmtide_block::RawDevice::open(path, vmtide_block::OpenMode::ReadOnly).unwrap();
    Qcow2Image::open_device(std::sync::Arc::new(file), Companions::default()).unwrap()
}

/// Our extents say exactly what `qemu-img map` says.
fn check_map(image: &Path, disk: &dyn BlockDevice) {
    let json = qemu_img(&["map", "-f", "qcow2", "--output=json", path(image)]);
    let entries: Vec<serde_json::Value> = serde_json::from_str(&json).unwrap();
    let mut data = RangeSet::new();
    let mut zero = RangeSet::new();
    for entry in entries {
        let range =
            ByteRange::new(entry["start"].as_u64().unwrap(), entry["length"].as_u64().unwrap());
        if entry["data"].as_bool().unwrap() {
            data.insert(range);
        } else if entry["present"].as_bool().unwrap() {
            zero.insert(range);
        }
    }
    let (mut our_data, mut our_zero) = (RangeSet::new(), RangeSet::new());
    for extent in all_extents(disk).unwrap() {
        match extent.kind {
            ExtentKind::Data => our_data.insert(extent.range),
            ExtentKind::Zero => our_zero.insert(extent.range),
            ExtentKind::Unallocated => {}
        }
    }
    assert_eq!(our_data, data, "data of {}", image.display());
    assert_eq!(our_zero, zero, "zeros of {}", image.display());
}

fn convert(raw: &Path, image: &Path, options: &str, compressed: bool) {
    let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
    if compressed {
        arguments.push("-c");
    }
    arguments.extend([path(raw), path(image)]);
    qemu_img(&arguments);
}

#[test]
fn every_cluster_size_version_and_compression() {
    let directory = tempfile::tempdir().unwrap();
    let bytes = pattern(11, (6 << 20) + 512 * 3);
    let raw = raw_file(directory.path(), "disk.raw", &bytes);
    for bits in 9..=21u32 {
        let size = 1 << bits;
        let mut variants = vec![
            (format!("compat=0.10,cluster_size={size}"), false),
            (format!("compat=1.1,cluster_size={size}"), false),
            (format!("compat=1.1,cluster_size={size}"), true),
            (format!("compat=1.1,compression_type=zstd,cluster_size={size}"), true),
        ];
        if bits >= 14 {
            variants.push((format!("extended_l2=on,cluster_size={size}"), false));
            variants.push((format!("extended_l2=on,cluster_size={size}"), true));
        }
        for (options, compressed) in variants {
            let image = directory.path().join("image.qcow2");
            convert(&raw, &image, &options, compressed);
            assert_eq!(probe(&image).unwrap(), Format::Qcow2);
            let disk = open_read_only(&image, &OpenOptions::default()).unwrap();
            assert!(read_all(&*disk) == bytes, "{options} {compressed}");
            check_extents(&*disk, &bytes);
            check_map(&image, &*disk);
            std::fs::remove_file(&image).unwrap();
        }
    }
}

#[test]
fn preallocated_zero_and_partly_written_clusters() {
    let directory = tempfile::tempdir().unwrap();
    for options in [
        "preallocation=metadata",
        "preallocation=falloc,refcount_bits=1",
        "preallocation=off,lazy_refcounts=on,refcount_bits=64",
        "extended_l2=on,preallocation=metadata",
        "extended_l2=on",
    ] {
        let image = directory.path().join("image.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path(&image), "5000k"]);
        qemu_io(
            &image,
            &["-f", "qcow2"],
            &[
                "write -P 1 3k 1k",
                "write -P 2 100k 300k",
                "write -z 128k 128k",
                "write -z -u 256k 64k",
                "write -z 70k 2k",
                "discard 320k 64k",
                "write -P 3 4999k 1k",
                "write -P 4 1000k 2k",
                "write -P 5 1006k 2k",
            ],
        );
        let mut expected = vec![0u8; 5000 << 10];
        for (start, end, value) in [
            (3, 4, 1),
            (100, 128, 2),
            (384, 400, 2),
            (4999, 5000, 3),
            (1000, 1002, 4),
            (1006, 1008, 5),
        ] {
            expected[start << 10..end << 10].fill(value);
        }
        let disk = open_read_only(&image, &OpenOptions::default()).unwrap();
        assert!(read_all(&*disk) == expected, "{options}");
        check_extents(&*disk, &expected);
        std::fs::remove_file(&image).unwrap();
    }
}

/// A chain of three: raw, v2 with another cluster size, compressed v3; each larger than the last.
fn chain(directory: &Path) -> (PathBuf, Vec<u8>) {
    let mut expected = pattern(5, 3 << 20);
    raw_file(directory, "base.raw", &expected);
    let (middle, top) = (directory.join("middle.qcow2"), directory.join("top.qcow2"));
    let create = |image: &Path, options: &str, base: &str, format: &str, size: &str| {
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            options,
            "-b",
            base,
            "-F",
            format,
            path(image),
            size,
        ]);
    };
    let v2 = "compat=0.10,cluster_size=4096";
    create(&middle, v2, path(&directory.join("base.raw")), "raw", "4M");
    qemu_io(&middle, &["-f", "qcow2"], &["write -P 9 1000k 500k", "write -P 8 3500k 100k"]);
    create(&top, "extended_l2=on", "middle.qcow2", "qcow2", "5M");
    qemu_io(
        &top,
        &["-f", "qcow2"],
        &["write -z 1100k 200k", "write -P 7 4500k 3k", "write -P 6 0 1k", "write -z 3550k 2k"],
    );
    expected.resize(5 << 20, 0);
    for (start, end, value) in [
        (1000, 1500, 9),
        (3500, 3600, 8),
        (1100, 1300, 0),
        (4500, 4503, 7),
        (0, 1, 6),
        (3550, 3552, 0),
    ] {
        expected[start << 10..end << 10].fill(value);
    }
    (top, expected)
}

#[test]
fn a_backing_chain_merges_data_and_extents() {
    let directory = tempfile::tempdir().unwrap();
    let (top, expected) = chain(directory.path());
    let disk = open_read_only(&top, &ALLOW).unwrap();
    assert!(read_all(&*disk) == expected);
    check_extents(&*disk, &expected);
    let info = image_info(&top, None).unwrap();
    let backing = info.backing.unwrap();
    assert_eq!((backing.name.as_str(), backing.format.as_deref()), ("middle.qcow2", Some("qcow2")));
    assert_eq!(info.features, ["extended-l2"]);
    let same_directory =
        OpenOptions { backing: BackingPolicy::SameDirectory, ..OpenOptions::default() };
    // base.raw is named by its absolute path, but it lies in the same directory.
    assert!(read_all(&*open_read_only(&top, &same_directory).unwrap()) == expected);
}

#[test]
fn other_files_are_opened_only_as_far_as_the_policy_allows() {
    let directory = tempfile::tempdir().unwrap();
    let inner = directory.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    raw_file(directory.path(), "secret.raw", &[1; 1 << 20]);
    raw_file(&inner, "beside.raw", &[2; 1 << 20]);
    std::os::unix::fs::symlink("../secret.raw", inner.join("link.raw")).unwrap();
    let image = inner.join("image.qcow2");
    let attempt = |backing: &str, format: Option<&str>, policy: BackingPolicy| {
        let _ = std::fs::remove_file(&image);
        qemu_img(&["create", "-q", "-u", "-f", "qcow2", path(&image), "1M"]);
        let mut rebase = vec!["rebase", "-u", "-b", backing];
        if let Some(format) = format {
            rebase.extend(["-F", format]);
        }
        rebase.push(path(&image));
        let done = support::try_run("qemu-img", &rebase);
        if !done.status.success() {
            // New QEMU demands a format; an old image without one is made by cutting it out.
            assert!(format.is_none(), "{}", support::text(&done));
            qemu_img(&["rebase", "-u", "-b", backing, "-F", "raw", path(&image)]);
            let mut bytes = std::fs::read(&image).unwrap();
            let at = bytes[..4096].windows(4).position(|w| w == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
            bytes[at] = 0;
            std::fs::write(&image, bytes).unwrap();
        }
        let options = OpenOptions { backing: policy, ..OpenOptions::default() };
        open_read_only(&image, &options)
            .map(|disk| read_all(&*disk)[0])
            .map_err(|error| error.to_string())
    };
    use BackingPolicy::{Allow, Refuse, SameDirectory};
    let refused = |result: Result<u8, String>, why: &str| {
        let error = result.unwrap_err();
        assert!(error.contains(why), "{error}");
    };
    refused(attempt("beside.raw", Some("raw"), Refuse), "which was not opened");
    assert_eq!(attempt("beside.raw", Some("raw"), SameDirectory), Ok(2));
    assert_eq!(attempt("../secret.raw", Some("raw"), Allow), Ok(1));
    refused(attempt("../secret.raw", Some("raw"), SameDirectory), "image's own directory");
    refused(attempt("link.raw", Some("raw"), SameDirectory), "image's own directory");
    refused(attempt("/etc/passwd", Some("raw"), SameDirectory), "image's own directory");
    refused(attempt("nbd://127.0.0.1:1/x", Some("raw"), Allow), "not a plain path");
    refused(attempt("json:{\"driver\":\"raw\"}", Some("raw"), Allow), "not a plain path");
    refused(attempt("beside.raw", None, Allow), "give the format");
    refused(attempt("beside.raw", Some("vmdk"), Allow), "VMDK");
    refused(attempt("image.qcow2", Some("qcow2"), Allow), "comes back");
    refused(attempt("missing.raw", Some("raw"), SameDirectory), "missing.raw");
}

#[test]
fn external_data_files_are_read_and_need_permission() {
    let directory = tempfile::tempdir().unwrap();
    for (raw, extra) in [("off", ""), ("on", ""), ("off", ",extended_l2=on")] {
        let image = directory.path().join("image.qcow2");
        let data = directory.path().join("data.bin");
        // By its full path: QEMU takes a relative one from where it was started.
        let options = format!("data_file={},data_file_raw={raw}{extra}", path(&data));
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, path(&image), "3M"]);
        qemu_io(
            &image,
            &["-f", "qcow2"],
            &["write -P 1 0 100k", "write -P 2 1M 64k", "write -z 16k 64k", "write -P 3 3071k 1k"],
        );
        let mut expected = vec![0u8; 3 << 20];
        expected[..100 << 10].fill(1);
        expected[1 << 20..(1 << 20) + (64 << 10)].fill(2);
        expected[16 << 10..80 << 10].fill(0);
        expected[3071 << 10..].fill(3);
        let disk = open_read_only(&image, &ALLOW).unwrap();
        assert!(read_all(&*disk) == expected, "{options}");
        check_extents(&*disk, &expected);
        let error = open_read_only(&image, &OpenOptions::default()).err().unwrap();
        assert!(error.to_string().contains("external file \""), "{error}");
        std::fs::remove_file(&image).unwrap();
        std::fs::remove_file(&data).unwrap();
    }
}

#[test]
fn internal_snapshots_are_listed_and_read() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image.qcow2");
    let first = pattern(21, 2 << 20);
    let raw = raw_file(directory.path(), "disk.raw", &first);
    convert(&raw, &image, "compat=1.1", true);
    qemu_img(&["snapshot", "-c", "monday", path(&image)]);
    qemu_io(&image, &["-f", "qcow2"], &["write -P 77 300k 500k"]);
    qemu_img(&["snapshot", "-c", "tuesday", path(&image)]);
    qemu_img(&["resize", "-q", path(&image), "3M"]);
    qemu_io(&image, &["-f", "qcow2"], &["write -P 78 0 400k", "write -P 79 2500k 10k"]);
    let mut second = first.clone();
    second[300 << 10..800 << 10].fill(77);
    let mut last = second.clone();
    last[..400 << 10].fill(78);
    last.resize(3 << 20, 0);
    last[2500 << 10..2510 << 10].fill(79);
    let disk = qcow2(&image);
    assert!(read_all(&disk) == last);
    let listed = disk.snapshots().unwrap();
    let names: Vec<_> =
        listed.iter().map(|s| (s.id.as_str(), s.name.as_str(), s.size_bytes)).collect();
    assert_eq!(names, [("1", "monday", 2 << 20), ("2", "tuesday", 2 << 20)]);
    assert!(listed[0].created_unix_seconds > 1_600_000_000);
    for (name, expected) in [("monday", &first), ("1", &first), ("tuesday", &second)] {
        let snapshot = disk.open_snapshot(name).unwrap();
        assert!(read_all(&snapshot) == *expected, "{name}");
        check_extents(&snapshot, expected);
    }
    let error = disk.open_snapshot("friday").err().unwrap();
    assert!(error.to_string().contains("no internal snapshot \"friday\""), "{error}");
    assert_eq!(image_info(&image, None).unwrap().snapshots, listed);
}

#[test]
fn persistent_bitmaps_give_their_ranges_or_the_reason_why_not() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", path(&image), "100000k"]);
    let bitmap = |arguments: &[&str]| qemu_img(&[&["bitmap"], arguments].concat());
    bitmap(&["--add", path(&image), "plain"]);
    bitmap(&["--add", "-g", "4096", path(&image), "fine"]);
    qemu_io(&image, &["-f", "qcow2"], &["write 1M 64k", "write 99999k 1k", "write 5000k 3k"]);
    bitmap(&["--disable", path(&image), "fine"]);
    qemu_io(&image, &["-f", "qcow2"], &["write 50M 20M"]);
    let disk = qcow2(&image);
    let listed = disk.bitmaps().unwrap();
    let flags: Vec<_> = listed
        .iter()
        .map(|b| (b.name.as_str(), b.granularity_bytes, b.recording, b.state))
        .collect();
    assert_eq!(
        flags,
        [("plain", 65536, true, BitmapState::Usable), ("fine", 4096, false, BitmapState::Usable)]
    );
    let size = 100_000 << 10;
    let expected = |granularity: u64, ranges: &[(u64, u64)]| {
        let set: RangeSet = ranges
            .iter()
            .map(|(at, len)| ByteRange::new(at << 10, len << 10))
            .collect::<Vec<_>>()
            .into();
        set.align_outward(granularity, size)
    };
    let early = [(1024, 64), (99_999, 1), (5000, 3)];
    let late = [(1024, 64), (99_999, 1), (5000, 3), (50 << 10, 20 << 10)];
    assert_eq!(disk.read_bitmap("plain").unwrap(), expected(65536, &late));
    assert_eq!(disk.read_bitmap("fine").unwrap(), expected(4096, &early));
    assert!(disk.read_bitmap("none").is_err());
    assert_eq!(image_info(&image, None).unwrap().bitmaps, listed);

    // A program that does not know bitmaps clears the autoclear bit.
    let mut bytes = std::fs::read(&image).unwrap();
    assert_eq!(bytes[95] & 1, 1);
    bytes[95] &= !1;
    std::fs::write(&image, &bytes).unwrap();
    let disk = qcow2(&image);
    assert_eq!(disk.bitmaps().unwrap()[0].state, BitmapState::Inconsistent);
    let error = disk.read_bitmap("plain").unwrap_err().to_string();
    assert!(error.contains("stale") && error.contains("whole disk"), "{error}");
}

#[test]
fn a_bitmap_in_use_by_a_killed_qemu_is_not_trusted() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", path(&image), "10M"]);
    qemu_img(&["bitmap", "--add", path(&image), "b"]);
    // qemu-io aborts: the bitmap is marked in use and never stored.
    let out = support::try_run(
        "qemu-io",
        &["-f", "qcow2", "-c", "write 0 64k", "-c", "flush", "-c", "abort", path(&image)],
    );
    assert!(!out.status.success());
    let disk = qcow2(&image);
    assert_eq!(disk.bitmaps().unwrap()[0].state, BitmapState::InUse);
    assert!(disk.read_bitmap("b").is_err());
}

#[test]
fn encrypted_images_are_refused_but_described() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image.qcow2");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "--object",
        "secret,id=s,data=x",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        path(&image),
        "1M",
    ]);
    let error = open_read_only(&image, &OpenOptions::default()).err().unwrap();
    assert!(error.to_string().contains("LUKS-encrypted"), "{error}");
    assert_eq!(image_info(&image, None).unwrap().features, ["luks"]);
}

#[test]
fn sample_images_yield_their_recorded_digests() {
    let variable = std::env::var_os("VMTIDE_TEST_IMAGES").or(std::env::var_os("VMTIDE_IMAGES"));
    let folder = variable.map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/images"),
        PathBuf::from,
    );
    let Ok(manifest) = std::fs::read_to_string(folder.join("MANIFEST.tsv")) else {
        println!(
            "NOTE: no sample images at {} (set VMTIDE_TEST_IMAGES): skipped",
            folder.display()
        );
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let mut seen = 0;
    for line in manifest.lines() {
        let columns: Vec<&str> = line.split('\t').collect();
        let supported = columns[0].starts_with("qcow2/") || columns[0].starts_with("fs/");
        if !supported {
            continue;
        }
        let packed = std::fs::read(folder.join(format!("{}.zst", columns[0]))).unwrap();
        let image = directory.path().join("image");
        std::fs::write(&image, zstd::decode_all(&packed[..]).unwrap()).unwrap();
        let disk = open_read_only(&image, &OpenOptions::default()).unwrap();
        assert_eq!(disk.size_bytes().to_string(), columns[3], "{}", columns[0]);
        let digest = ring::digest::digest(&ring::digest::SHA256, &read_all(&*disk));
        let hex: String = digest.as_ref().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, columns[4], "{}", columns[0]);
        seen += 1;
    }
    assert!(seen > 0, "the manifest lists no image we read");
}
