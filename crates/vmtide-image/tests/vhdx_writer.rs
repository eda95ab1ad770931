//! The VHDX writer against a byte vector, and against QEMU's tools.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

use crate::support;

use proptest::prelude::*;
use std::path::Path;
use std::sync::Arc;
use support::{
    Random, check_extents, path, pattern, qemu_img, qemu_io, raw_file, read_all, text, try_run,
};
use vmtide_block::{
    BlockDevice, ByteRange, MemoryDevice, OpenMode, RawDevice, WritableBlockDevice,
};
use vmtide_image::vhdx::{VhdxCreateOptions, VhdxImage, VhdxKind, VhdxParent, VhdxWriter};
use vmtide_image::{CreateOptions, Format, ImageWriter, create_image};

const MIB: u64 = 1 << 20;

/// Succeeds where QEMU finds the image whole and its disk equal to `expected`. Of images with 4096
/// byte sectors QEMU knows nothing.
fn check_with_qemu(image: &Path, expected: &[u8]) {
    let out = try_run("qemu-img", &["check", "-f", "vhdx", path(image)]);
    assert!(out.status.success(), "qemu-img check: {}", text(&out));
    let raw = image.with_extension("expected");
    std::fs::write(&raw, expected).unwrap();
    let compared = qemu_img(&["compare", "-f", "raw", "-F", "vhdx", path(&raw), path(image)]);
    assert!(compared.contains("identical"), "{compared}");
}

#[test]
fn qemu_reads_what_is_written() {
    let directory = tempfile::tempdir().unwrap();
    for (index, (subformat, block_mib)) in
        [("dynamic", None), ("dynamic", Some(1)), ("dynamic", Some(256)), ("fixed", None)]
            .into_iter()
            .enumerate()
    {
        let image = directory.path().join(format!("image{index}.vhdx"));
        let content = pattern(5 + index as u64, 70 << 20);
        let options = CreateOptions {
            subformat: Some(subformat.into()),
            block_size_bytes: block_mib.map(|mib: u64| mib << 20),
            ..CreateOptions::new(Format::Vhdx, content.len() as u64)
        };
        let writer = create_image(&image, &options).unwrap();
        for (index, piece) in content.chunks(3 << 20).enumerate() {
            if !vmtide_block::is_zero(piece) {
                writer.write_at(piece, index as u64 * (3 << 20)).unwrap();
            }
        }
        assert!(read_all(&*writer) == content, "{subformat} {block_mib:?}");
        check_extents(&*writer, &content);
        writer.finish().unwrap();
        drop(writer);
        check_with_qemu(&image, &content);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write {
        at: u64,
        length: u64,
        value: u8,
    },
    Zero {
        at: u64,
        length: u64,
    },
    Flush,
    Reopen,
    /// Ends without finishing, so that the next one has to replay the log.
    Leave,
    Resize(u64),
}

fn step() -> impl Strategy<Value = Step> {
    // Some as long as whole blocks, most much shorter than a sector bitmap's page covers.
    let length = prop_oneof![3 => 1..6000u64, 2 => 1..400_000u64, 1 => 1..(5 << 20) as u64];
    let place = (any::<u64>(), length);
    prop_oneof![
        6 => (place.clone(), 1..=255u8)
            .prop_map(|((at, length), value)| Step::Write { at, length, value }),
        3 => place.prop_map(|(at, length)| Step::Zero { at, length }),
        2 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        1 => Just(Step::Leave),
        1 => (1..12_000_000u64).prop_map(Step::Resize),
    ]
}

#[derive(Clone, Debug)]
struct Shape {
    block_mib: u32,
    sector_bytes: u32,
    kind: VhdxKind,
    /// The size of the parent's disk, and the sectors of the child's.
    parent: Option<u64>,
    sectors: u64,
}

fn shape() -> impl Strategy<Value = Shape> {
    let block = prop_oneof![3 => Just(1u32), 2 => Just(2), 1 => Just(8)];
    let kind = prop_oneof![3 => Just(VhdxKind::Dynamic), 1 => Just(VhdxKind::Fixed)];
    let sector = prop_oneof![Just(512u32), Just(4096)];
    (block, sector, kind, prop::option::of(0..9_000_000u64), 1..2000u64).prop_map(
        |(block_mib, sector_bytes, kind, parent, sectors)| Shape {
            block_mib,
            sector_bytes,
            kind,
            parent,
            sectors: if sector_bytes == 512 { sectors * 8 } else { sectors },
        },
    )
}

fn parent_of(device: Arc<dyn BlockDevice>) -> VhdxParent {
    VhdxParent {
        identity: "b04aefb7-d19e-4a81-b789-25b8e9445913".into(),
        disk_id: None,
        relative_path: Some("parent.vhdx".into()),
        absolute_path: None,
        volume_path: None,
        device,
    }
}

fn run_model(shape: &Shape, steps: &[Step]) -> Result<(), TestCaseError> {
    let below = shape.parent.map(|size| pattern(size + 1, usize::try_from(size).unwrap()));
    let parent = below
        .clone()
        .map(|bytes| Arc::new(MemoryDevice::from_bytes(bytes)) as Arc<dyn BlockDevice>);
    let size = shape.sectors * u64::from(shape.sector_bytes);
    let options = VhdxCreateOptions {
        block_size_bytes: Some(shape.block_mib << 20),
        logical_sector_bytes: shape.sector_bytes,
        kind: shape.kind,
        parent: parent.clone().map(parent_of),
        ..VhdxCreateOptions::new(size)
    };
    let memory = Arc::new(MemoryDevice::new(0));
    let mut writer = VhdxWriter::create_device(memory.clone(), &options).unwrap();
    let mut model = below.unwrap_or_default();
    model.resize(usize::try_from(size).unwrap(), 0);
    for step in steps {
        let size = model.len() as u64;
        let clamp = |at: u64, length: u64| {
            let at = at % size;
            let length = length.min(size - at);
            (at, usize::try_from(at).unwrap()..usize::try_from(at + length).unwrap())
        };
        match *step {
            Step::Write { at, length, value } => {
                let (at, range) = clamp(at, length);
                model[range.clone()].fill(value);
                writer.write_at(&model[range], at).unwrap();
            }
            Step::Zero { at, length } => {
                let (at, range) = clamp(at, length);
                writer.write_zeroes(ByteRange::new(at, range.len() as u64)).unwrap();
                model[range].fill(0);
            }
            Step::Flush => writer.flush().unwrap(),
            Step::Leave => {
                writer.flush().unwrap();
                let reader = VhdxImage::open_device(memory.clone(), parent.clone()).unwrap();
                prop_assert!(read_all(&reader) == model, "the reader of a live log differs");
                writer = VhdxWriter::open_device(memory.clone(), parent.clone()).unwrap();
            }
            Step::Resize(bytes) => {
                let size = bytes.next_multiple_of(u64::from(shape.sector_bytes));
                writer.resize(size).unwrap();
                model.resize(usize::try_from(size).unwrap(), 0);
            }
            Step::Reopen => {
                writer.finish().unwrap();
                writer = VhdxWriter::open_device(memory.clone(), parent.clone()).unwrap();
            }
        }
        if matches!(step, Step::Flush | Step::Reopen) {
            check_extents(&writer, &model);
        }
    }
    prop_assert!(read_all(&writer) == model, "the open writer differs");
    writer.finish().unwrap();
    let reader = VhdxImage::open_device(memory.clone(), parent.clone()).unwrap();
    prop_assert!(read_all(&reader) == model, "the reader differs");
    check_extents(&reader, &model);
    if parent.is_none() && shape.sector_bytes == 512 {
        let directory = tempfile::tempdir().unwrap();
        let image = raw_file(directory.path(), "image.vhdx", &memory.to_bytes());
        check_with_qemu(&image, &model);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn random_work_equals_a_byte_vector(
        shape in shape(),
        steps in prop::collection::vec(step(), 1..40),
    ) {
        run_model(&shape, &steps)?;
    }
}

#[test]
fn the_block_table_moves_when_it_no_longer_fits() {
    const GIB: u64 = 1 << 30;
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image.vhdx");
    // Blocks of 1 MiB: a table of 1 MiB maps 128 GiB.
    let options =
        VhdxCreateOptions { block_size_bytes: Some(1 << 20), ..VhdxCreateOptions::new(100 * GIB) };
    let writer = VhdxWriter::create(&image, &options).unwrap();
    let mut places = vec![(5 * MIB, 1u8), (60 * GIB, 2), (100 * GIB - 4096, 3)];
    let check = |disk: &dyn BlockDevice, places: &[(u64, u8)]| {
        for (at, value) in places {
            let mut bytes = [0; 8192];
            let count = usize::try_from(disk.size_bytes() - at).unwrap().min(bytes.len());
            disk.read_at(&mut bytes[..count], *at).unwrap();
            assert_eq!(bytes[..4096], [*value; 4096], "at {at}");
            assert!(vmtide_block::is_zero(&bytes[4096..]), "behind {at}");
        }
    };
    for (at, value) in &places {
        writer.write_at(&[*value; 4096], *at).unwrap();
    }
    for (gib, value) in [(130, 4), (700, 5), (650, 6), (1500, 7)] {
        writer.resize(gib * GIB).unwrap();
        assert_eq!(writer.size_bytes(), gib * GIB);
        places.retain(|(at, _)| *at < gib * GIB - 4096);
        check(&writer, &places);
        places.push((gib * GIB - 4096, value));
        writer.write_at(&[value; 4096], gib * GIB - 4096).unwrap();
        writer.write_at(&[value; 4096], (gib - 20) * GIB).unwrap();
        places.push(((gib - 20) * GIB, value));
        check(&writer, &places);
    }
    writer.finish().unwrap();
    drop(writer);
    let out = try_run("qemu-img", &["check", "-f", "vhdx", path(&image)]);
    assert!(out.status.success(), "qemu-img check: {}", text(&out));
    let reads: Vec<String> =
        places.iter().map(|(at, value)| format!("read -P {value} {at} 4096")).collect();
    let reads: Vec<&str> = reads.iter().map(String::as_str).collect();
    qemu_io(&image, &["-r", "-f", "vhdx"], &reads);
    let file = RawDevice::open(&image, OpenMode::ReadWrite).unwrap();
    check(&VhdxWriter::open_device(Arc::new(file), None).unwrap(), &places);
    // Four tables and twelve blocks, no more.
    assert!(std::fs::metadata(&image).unwrap().len() < 40 * MIB);
}

#[test]
fn threads_that_share_blocks_do_not_lose_each_others_bytes() {
    const THREADS: usize = 6;
    let below = pattern(31, 8 << 20);
    for with_parent in [false, true] {
        let parent = Arc::new(MemoryDevice::from_bytes(below.clone()));
        let options = VhdxCreateOptions {
            block_size_bytes: Some(1 << 20),
            parent: with_parent.then(|| parent_of(parent.clone())),
            ..VhdxCreateOptions::new(8 << 20)
        };
        let memory = Arc::new(MemoryDevice::new(0));
        let writer = VhdxWriter::create_device(memory.clone(), &options).unwrap();
        let mut expected = if with_parent { below.clone() } else { vec![0; 8 << 20] };
        // Thread t owns every 100th part of bytes whose number is t modulo the threads: sectors
        // are shared.
        let pieces = expected.len() as u64 / 100;
        let work: Vec<Vec<(usize, u8, bool)>> = (0..THREADS)
            .map(|thread| {
                let mut random = Random(thread as u64 + 1);
                (0..1500)
                    .map(|_| {
                        let piece = random.below(pieces / THREADS as u64);
                        let value = random.next().to_le_bytes()[2];
                        let number = usize::try_from(piece).unwrap() * THREADS + thread;
                        (number, value, random.below(5) == 0)
                    })
                    .collect()
            })
            .collect();
        for (piece, value, zero) in work.iter().flatten() {
            expected[piece * 100..(piece + 1) * 100].fill(if *zero { 0 } else { *value });
        }
        std::thread::scope(|scope| {
            for steps in &work {
                scope.spawn(|| {
                    for (index, (piece, value, zero)) in steps.iter().enumerate() {
                        let offset = *piece as u64 * 100;
                        if *zero {
                            writer.write_zeroes(ByteRange::new(offset, 100)).unwrap();
                        } else {
                            writer.write_at(&[*value; 100], offset).unwrap();
                        }
                        if index % 100 == 0 {
                            writer.flush().unwrap();
                        }
                        let mut present = [0u8; 100];
                        writer.read_at(&mut present, offset).unwrap();
                        assert_eq!(present, [if *zero { 0 } else { *value }; 100]);
                    }
                });
            }
        });
        assert!(read_all(&writer) == expected, "with parent: {with_parent}");
        writer.finish().unwrap();
        let again =
            VhdxWriter::open_device(memory, options.parent.map(|parent| parent.device)).unwrap();
        assert!(read_all(&again) == expected, "with parent: {with_parent}, reopened");
    }
}

#[test]
fn blocks_that_come_and_go_are_reused_and_never_mixed_up() {
    // Each thread fills and frees its own blocks while all flush: freed ones move between them.
    let memory = Arc::new(MemoryDevice::new(0));
    let options =
        VhdxCreateOptions { block_size_bytes: Some(1 << 20), ..VhdxCreateOptions::new(16 << 20) };
    let writer = VhdxWriter::create_device(memory.clone(), &options).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let writer = &writer;
            scope.spawn(move || {
                let base = thread * 4 * MIB;
                let mut bytes = vec![0; 3 << 20];
                for round in 0..25u8 {
                    let value = round.wrapping_mul(4) + u8::try_from(thread).unwrap() + 1;
                    writer.write_at(&vec![value; 2_500_000], base + 1000).unwrap();
                    writer.flush().unwrap();
                    writer.read_at(&mut bytes, base).unwrap();
                    assert!(vmtide_block::is_zero(&bytes[..1000]));
                    assert!(
                        bytes[1000..2_501_000].iter().all(|byte| *byte == value),
                        "thread {thread} round {round}"
                    );
                    assert!(vmtide_block::is_zero(&bytes[2_501_000..]));
                    writer.write_zeroes(ByteRange::new(base, 3 * MIB)).unwrap();
                    writer.flush().unwrap();
                    writer.read_at(&mut bytes, base).unwrap();
                    assert!(vmtide_block::is_zero(&bytes));
                }
            });
        }
    });
    writer.finish().unwrap();
    // 4 x 3 blocks at a time: without reuse it would be 300 MiB.
    assert!(memory.size_bytes() < 40 << 20, "{}", memory.size_bytes());
}
