//! The qcow2 writer against a byte vector, and against QEMU's own images and checks.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use crate::support;

use proptest::prelude::*;
use std::path::Path;
use std::sync::Arc;
use support::{
    Random, check_clean, check_extents, path, pattern, qemu_img, qemu_io, raw_file, read_all,
};
use vmtide_block::{BlockDevice, ByteRange, MemoryDevice, WritableBlockDevice};
use vmtide_image::qcow2::{
    Companions, CreateBacking, Qcow2CreateOptions, Qcow2Image, Qcow2Version, Qcow2Writer,
};
use vmtide_image::{
    BackingPolicy, BitmapState, Format, OpenOptions, image_info, open_read_only, open_writable,
};

#[derive(Clone, Debug)]
enum Step {
    Write { at: u64, length: u64, value: u8 },
    Zero { at: u64, length: u64 },
    Flush,
    Reopen,
    Grow(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let place = (any::<u64>(), 1..400_000u64);
    prop_oneof![
        6 => (place.clone(), 1..=255u8).prop_map(|((at, length), value)| Step::Write { at, length, value }),
        3 => place.prop_map(|(at, length)| Step::Zero { at, length }),
        2 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        1 => (0..600_000u64).prop_map(Step::Grow),
    ]
}

#[derive(Clone, Debug)]
struct Shape {
    bits: u32,
    version: Qcow2Version,
    extended: bool,
    backing: Option<u64>,
    size: u64,
}

fn shape() -> impl Strategy<Value = Shape> {
    let bits = prop_oneof![Just(9u32), Just(12), Just(14), Just(16), Just(18)];
    (bits, any::<bool>(), any::<bool>(), prop::option::of(0..3_000_000u64), 1..2_500_000u64)
        .prop_map(|(bits, v2, extended, backing, size)| Shape {
            bits,
            version: if v2 { Qcow2Version::V2 } else { Qcow2Version::V3 },
            extended: extended && !v2 && bits >= 14,
            backing,
            size,
        })
}

fn run_model(shape: &Shape, steps: &[Step]) -> Result<(), TestCaseError> {
    let directory = tempfile::tempdir().unwrap();
    let below = shape.backing.map(|size| pattern(size, usize::try_from(size).unwrap()));
    let backing = below.as_ref().map(|bytes| {
        raw_file(directory.path(), "base.raw", bytes);
        CreateBacking {
            name: "base.raw".into(),
            format: Format::Raw,
            device: Arc::new(MemoryDevice::from_bytes(bytes.clone())),
        }
    });
    let options = Qcow2CreateOptions {
        cluster_size_bytes: 1 << shape.bits,
        version: shape.version,
        extended_l2: shape.extended,
        backing: backing.clone(),
        ..Qcow2CreateOptions::new(shape.size)
    };
    let memory = Arc::new(MemoryDevice::new(0));
    let mut writer = Qcow2Writer::create_device(memory.clone(), &options).unwrap();
    let mut model = below.clone().unwrap_or_default();
    model.resize(usize::try_from(shape.size).unwrap(), 0);
    for step in steps {
        let size = model.len() as u64;
        let clamp = |at: u64, length: u64| {
            let at = at % size;
            (at, length.min(size - at))
        };
        match *step {
            Step::Write { at, length, value } => {
                let (at, length) = clamp(at, length);
                let data = vec![value; usize::try_from(length).unwrap()];
                writer.write_at(&data, at).unwrap();
                let start = usize::try_from(at).unwrap();
                model[start..start + data.len()].fill(value);
            }
            Step::Zero { at, length } => {
                let (at, length) = clamp(at, length);
                writer.write_zeroes(ByteRange::new(at, length)).unwrap();
                let start = usize::try_from(at).unwrap();
                model[start..start + usize::try_from(length).unwrap()].fill(0);
            }
            Step::Flush => writer.flush().unwrap(),
            Step::Reopen => {
                writer.flush().unwrap();
                let device = backing.as_ref().map(|b| b.device.clone());
                writer = Qcow2Writer::open_device(memory.clone(), device, None).unwrap();
            }
            Step::Grow(more) => {
                writer.resize(size + more).unwrap();
                model.resize(model.len() + usize::try_from(more).unwrap(), 0);
            }
        }
        if matches!(step, Step::Flush | Step::Reopen) {
            check_extents(&writer, &model);
        }
    }
    prop_assert!(read_all(&writer) == model, "the open writer differs");
    writer.flush().unwrap();
    let companions = Companions { backing: backing.map(|b| b.device), data_file: None };
    let reader = Qcow2Image::open_device(memory.clone(), companions).unwrap();
    prop_assert!(read_all(&reader) == model, "the reader differs");
    check_extents(&reader, &model);
    let image = raw_file(directory.path(), "image.qcow2", &memory.to_bytes());
    check_clean(&image);
    let raw = raw_file(directory.path(), "model.raw", &model);
    qemu_img(&["compare", "-f", "raw", "-F", "qcow2", path(&raw), path(&image)]);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn random_work_equals_a_byte_vector(
        shape in shape(),
        steps in prop::collection::vec(step(), 1..40),
    ) {
        // QEMU compares images whose size is not a multiple of 512 by padding: keep it simple.
        let shape = Shape { size: shape.size.next_multiple_of(512), backing: shape.backing.map(|b| b.next_multiple_of(512)), ..shape };
        let steps: Vec<Step> = steps.into_iter().map(|s| match s { Step::Grow(n) => Step::Grow(n / 512 * 512), s => s }).collect();
        run_model(&shape, &steps)?;
    }
}

#[test]
fn small_clusters_grow_the_refcount_table() {
    // 512-byte clusters: a refcount table of one cluster counts 8 MiB of file.
    let size = 20 << 20;
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image.qcow2");
    let options = Qcow2CreateOptions { cluster_size_bytes: 512, ..Qcow2CreateOptions::new(size) };
    let writer = Qcow2Writer::create(&image, &options).unwrap();
    let bytes = Random(9).bytes(usize::try_from(size).unwrap());
    for (index, piece) in bytes.chunks(700_001).enumerate() {
        writer.write_at(piece, index as u64 * 700_001).unwrap();
        if index % 5 == 0 {
            writer.flush().unwrap();
        }
    }
    writer.flush().unwrap();
    drop(writer);
    check_clean(&image);
    let disk = open_read_only(&image, &OpenOptions::default()).unwrap();
    assert!(read_all(&*disk) == bytes);
}

/// Writes of every kind through our writer onto an image of QEMU's; `expected` follows.
fn change(image: &Path, expected: &mut [u8]) {
    let options = OpenOptions { backing: BackingPolicy::Allow, ..OpenOptions::default() };
    let disk = open_writable(image, &options).unwrap();
    let mut random = Random(expected.len() as u64);
    for round in 0..60 {
        let at = random.below(expected.len() as u64 - 1);
        let length = (random.below(150_000) + 1).min(expected.len() as u64 - at);
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
    disk.flush().unwrap();
    assert!(read_all(&*disk) == expected, "open writer, {}", image.display());
    check_extents(&*disk, expected);
    drop(disk);
    check_clean(image);
    let raw = image.with_extension("expected");
    std::fs::write(&raw, &*expected).unwrap();
    let compare = ["compare", "-f", "raw", "-F", "qcow2", path(&raw), path(image)];
    assert!(qemu_img(&compare).contains("identical"), "{}", image.display());
}

#[test]
fn images_of_qemu_with_snapshots_and_compression_are_changed_by_copy_on_write() {
    let directory = tempfile::tempdir().unwrap();
    let first = pattern(4, 4 << 20);
    let raw = raw_file(directory.path(), "disk.raw", &first);
    for (index, (options, compressed)) in [
        ("compat=0.10,cluster_size=4096", false),
        ("compat=1.1", true),
        ("compat=1.1,compression_type=zstd,cluster_size=131072", true),
        ("extended_l2=on", true),
        ("extended_l2=on,cluster_size=16384,refcount_bits=64", false),
        ("preallocation=metadata,refcount_bits=8", false),
        ("cluster_size=512,refcount_bits=2", false),
    ]
    .into_iter()
    .enumerate()
    {
        let image = directory.path().join(format!("image{index}.qcow2"));
        let mut convert = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
        if compressed {
            convert.push("-c");
        }
        convert.extend([path(&raw), path(&image)]);
        qemu_img(&convert);
        let mut expected = first.clone();
        change(&image, &mut expected);
        qemu_img(&["snapshot", "-c", "kept", path(&image)]);
        qemu_io(&image, &["-f", "qcow2"], &["write -P 3 100k 100k"]);
        let kept = expected.clone();
        expected[100 << 10..200 << 10].fill(3);
        change(&image, &mut expected);
        change(&image, &mut expected);
        let file = vmtide_block::RawDevice::open(&image, vmtide_block::OpenMode::ReadOnly).unwrap();
        let disk = Qcow2Image::open_device(Arc::new(file), Companions::default()).unwrap();
        assert!(read_all(&disk.open_snapshot("kept").unwrap()) == kept, "{options}");
        qemu_img(&["snapshot", "-a", "kept", path(&image)]);
        let raw = directory.path().join("kept.raw");
        std::fs::write(&raw, &kept).unwrap();
        qemu_img(&["compare", "-f", "raw", "-F", "qcow2", path(&raw), path(&image)]);
        check_clean(&image);
    }
}

#[test]
fn external_data_files_are_written() {
    let directory = tempfile::tempdir().unwrap();
    for (index, (raw, extra)) in
        [("off", ""), ("on", ""), ("off", ",extended_l2=on"), ("on", ",extended_l2=on")]
            .into_iter()
            .enumerate()
    {
        let image = directory.path().join(format!("image{index}.qcow2"));
        let data = directory.path().join(format!("data{index}"));
        let options = format!("data_file={},data_file_raw={raw}{extra}", path(&data));
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, path(&image), "3000k"]);
        let created = std::fs::metadata(&data).unwrap().len();
        let mut expected = vec![0u8; 3000 << 10];
        change(&image, &mut expected);
        if raw == "on" {
            let stored = std::fs::read(&data).unwrap();
            let differs = stored.iter().zip(&expected).position(|(a, b)| a != b);
            assert_eq!(differs, None, "{options}");
            // QEMU may make the file a whole number of clusters long; we add nothing.
            assert_eq!(stored.len() as u64, created, "{options}");
            assert!(vmtide_block::is_zero(&stored[expected.len()..]));
        }
    }
}

#[test]
fn recording_bitmaps_are_no_longer_trusted_after_a_write() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", path(&image), "10M"]);
    qemu_img(&["bitmap", "--add", path(&image), "on"]);
    qemu_img(&["bitmap", "--add", "--disable", path(&image), "off"]);
    let states = || -> Vec<BitmapState> {
        image_info(&image, None).unwrap().bitmaps.iter().map(|b| b.state).collect()
    };
    let disk = open_writable(&image, &OpenOptions::default()).unwrap();
    assert_eq!(states(), [BitmapState::Usable, BitmapState::Usable]);
    disk.write_at(&[1; 512], 0).unwrap();
    assert_eq!(states(), [BitmapState::InUse, BitmapState::Usable]);
    let error = disk.resize(20 << 20).unwrap_err().to_string();
    assert!(error.contains("dirty bitmaps"), "{error}");
    disk.flush().unwrap();
    drop(disk);
    check_clean(&image);
    let json = qemu_img(&["info", "--output=json", path(&image)]);
    assert!(json.contains("in-use"), "{json}");
}

#[test]
fn threads_that_share_clusters_do_not_lose_each_others_sectors() {
    const THREADS: usize = 6;
    let below = pattern(31, 8 << 20);
    let options = Qcow2CreateOptions {
        backing: Some(CreateBacking {
            name: "base.raw".into(),
            format: Format::Raw,
            device: Arc::new(MemoryDevice::from_bytes(below.clone())),
        }),
        ..Qcow2CreateOptions::new(8 << 20)
    };
    let memory = Arc::new(MemoryDevice::new(0));
    let writer = Qcow2Writer::create_device(memory.clone(), &options).unwrap();
    // Thread t owns every sector whose number is t modulo the threads.
    let mut expected = below;
    let work: Vec<Vec<(usize, u8, bool)>> = (0..THREADS)
        .map(|thread| {
            let mut random = Random(thread as u64 + 1);
            (0..1500)
                .map(|_| {
                    let sector = usize::try_from(random.below(16384 / THREADS as u64)).unwrap();
                    let value = random.next().to_le_bytes()[2];
                    (sector * THREADS + thread, value, random.below(5) == 0)
                })
                .filter(|(sector, _, _)| *sector < 16384)
                .collect()
        })
        .collect();
    for (sector, value, zero) in work.iter().flatten() {
        let value = if *zero { 0 } else { *value };
        expected[sector * 512..(sector + 1) * 512].fill(value);
    }
    std::thread::scope(|scope| {
        for steps in &work {
            scope.spawn(|| {
                for (index, (sector, value, zero)) in steps.iter().enumerate() {
                    let offset = *sector as u64 * 512;
                    if *zero {
                        writer.write_zeroes(ByteRange::new(offset, 512)).unwrap();
                    } else {
                        writer.write_at(&[*value; 512], offset).unwrap();
                    }
                    if index % 100 == 0 {
                        writer.flush().unwrap();
                    }
                    let mut present = [0u8; 512];
                    writer.read_at(&mut present, offset).unwrap();
                    assert_eq!(present[7], if *zero { 0 } else { *value });
                }
            });
        }
        // Whole clusters come and go beside them, in the same L2 table.
        scope.spawn(|| {
            for _ in 0..50 {
                writer.flush().unwrap();
            }
        });
    });
    assert!(read_all(&writer) == expected);
    writer.flush().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let image = raw_file(directory.path(), "image.qcow2", &memory.to_bytes());
    raw_file(directory.path(), "base.raw", &expected);
    check_clean(&image);
}

#[test]
fn clusters_that_come_and_go_are_reused_and_never_mixed_up() {
    // Each thread fills and frees its own clusters while all flush: freed ones move between them.
    let memory = Arc::new(MemoryDevice::new(0));
    let options =
        Qcow2CreateOptions { cluster_size_bytes: 4096, ..Qcow2CreateOptions::new(4 << 20) };
    let writer = Qcow2Writer::create_device(memory.clone(), &options).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let writer = &writer;
            scope.spawn(move || {
                let base = thread << 20;
                for round in 0..40u8 {
                    let value = round.wrapping_mul(4) + u8::try_from(thread).unwrap() + 1;
                    writer.write_at(&vec![value; 300_000], base + 1000).unwrap();
                    writer.flush().unwrap();
                    let mut bytes = vec![0; 300_000];
                    writer.read_at(&mut bytes, base + 1000).unwrap();
                    assert!(
                        bytes.iter().all(|byte| *byte == value),
                        "thread {thread} round {round}"
                    );
                    writer.write_zeroes(ByteRange::new(base, 1 << 20)).unwrap();
                    writer.flush().unwrap();
                    writer.read_at(&mut bytes, base + 1000).unwrap();
                    assert!(vmtide_block::is_zero(&bytes));
                }
            });
        }
    });
    writer.flush().unwrap();
    // 4 x 300 kB at a time: without reuse it would be 48 MB.
    assert!(memory.size_bytes() < 6 << 20, "{}", memory.size_bytes());
    let directory = tempfile::tempdir().unwrap();
    check_clean(&raw_file(directory.path(), "image.qcow2", &memory.to_bytes()));
}

#[test]
fn what_must_be_repaired_first_is_refused_for_writing() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image.qcow2");
    for (bit, word) in [(1u8, "dirty"), (2, "corrupt")] {
        let _ = std::fs::remove_file(&image);
        qemu_img(&["create", "-q", "-f", "qcow2", path(&image), "1M"]);
        let mut bytes = std::fs::read(&image).unwrap();
        bytes[79] |= bit;
        std::fs::write(&image, bytes).unwrap();
        let error = open_writable(&image, &OpenOptions::default()).err().unwrap().to_string();
        assert!(error.contains(word) && error.contains("repair"), "{error}");
        assert!(open_read_only(&image, &OpenOptions::default()).is_ok());
    }
}
