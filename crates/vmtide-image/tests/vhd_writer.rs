//! The VHD writer against a byte vector, and against QEMU, libvhdi, 7-Zip and dissect.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

use crate::support;

use proptest::prelude::*;
use std::path::Path;
use std::sync::Arc;
use support::{Random, check_extents, path, pattern, qemu_img, qemu_io, raw_file, read_all, run};
use vmtide_block::{BlockDevice, BlockError, ByteRange, MemoryDevice, WritableBlockDevice};
use vmtide_image::vhd::{
    MAX_DISK_BYTES, VhdCreateOptions, VhdImage, VhdKind, VhdParent, VhdWriter,
};
use vmtide_image::{
    BackingPolicy, CreateOptions, CreateParent, Format, ImageWriter, OpenOptions, Repair,
    check_image, create_image, identity, image_info, open_read_only, open_writable,
};

/// Any identity: what is tested over memory has no parent to find.
const PARENT_ID: &str = "5fa21a55-f394-aa4d-9958-1951a67d5540";

#[derive(Clone, Debug)]
enum Step {
    Write { at: u64, length: u64, value: u8 },
    Zero { at: u64, length: u64 },
    Flush,
    Finish,
    Reopen,
    Grow(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let length = prop_oneof![1..3000u64, 1..400_000u64];
    let place = (any::<u64>(), length);
    prop_oneof![
        6 => (place.clone(), 1..=255u8).prop_map(|((at, length), value)| Step::Write { at, length, value }),
        3 => place.prop_map(|(at, length)| Step::Zero { at, length }),
        2 => Just(Step::Flush),
        1 => Just(Step::Finish),
        1 => Just(Step::Reopen),
        1 => (0..2000u64).prop_map(Step::Grow),
    ]
}

fn kind(below: Option<&Vec<u8>>, fixed: bool) -> VhdKind {
    match below {
        Some(bytes) => VhdKind::Differencing(VhdParent {
            name: "parent.vhd".into(),
            absolute_path: Some("/disks/parent.vhd".into()),
            identity: PARENT_ID.into(),
            device: Arc::new(MemoryDevice::from_bytes(bytes.clone())),
        }),
        None if fixed => VhdKind::Fixed,
        None => VhdKind::Dynamic,
    }
}

/// Writes the image to a file and checks it; one that grew may have left its old table behind.
fn clean(directory: &Path, memory: &MemoryDevice, grew: bool) -> std::path::PathBuf {
    let image = raw_file(directory, "image.vhd", &memory.to_bytes());
    let report = check_image(&image, &OpenOptions::default(), Repair::Nothing).unwrap();
    assert!(report.errors == 0 && (grew || report.leaks == 0), "{report:?}");
    image
}

fn run_model(
    block_bits: u32,
    fixed: bool,
    below: Option<u64>,
    sectors: u64,
    steps: &[Step],
) -> Result<(), TestCaseError> {
    let below = below.map(|size| pattern(size, usize::try_from(size).unwrap()));
    let parent =
        below.clone().map(|b| Arc::new(MemoryDevice::from_bytes(b)) as Arc<dyn BlockDevice>);
    let options = VhdCreateOptions {
        kind: kind(below.as_ref(), fixed),
        block_size_bytes: 1 << block_bits,
        ..VhdCreateOptions::new(sectors * 512)
    };
    let memory = Arc::new(MemoryDevice::new(0));
    let mut writer = VhdWriter::create_device(memory.clone(), &options).unwrap();
    let mut model = below.unwrap_or_default();
    model.resize(usize::try_from(sectors * 512).unwrap(), 0);
    for step in steps {
        let size = model.len() as u64;
        let clamp = |at: u64, length: u64| (at % size, length.min(size - at % size));
        match *step {
            Step::Write { at, length, value } => {
                let (at, length) = clamp(at, length);
                let start = usize::try_from(at).unwrap();
                let target = &mut model[start..start + usize::try_from(length).unwrap()];
                target.fill(value);
                writer.write_at(target, at).unwrap();
            }
            Step::Zero { at, length } => {
                let (at, length) = clamp(at, length);
                writer.write_zeroes(ByteRange::new(at, length)).unwrap();
                let start = usize::try_from(at).unwrap();
                model[start..start + usize::try_from(length).unwrap()].fill(0);
            }
            Step::Flush => writer.flush().unwrap(),
            Step::Finish => writer.finish().unwrap(),
            Step::Reopen => {
                writer.flush().unwrap();
                writer = VhdWriter::open_device(memory.clone(), parent.clone()).unwrap();
            }
            Step::Grow(_) if fixed => {
                prop_assert!(writer.resize(size).is_ok());
                prop_assert!(writer.resize(size + 512).is_err());
            }
            Step::Grow(more) => {
                writer.resize(size + more * 512).unwrap();
                model.resize(model.len() + usize::try_from(more * 512).unwrap(), 0);
            }
        }
        if matches!(step, Step::Flush | Step::Reopen) {
            check_extents(&writer, &model);
        }
    }
    prop_assert!(read_all(&writer) == model, "the open writer differs");
    writer.finish().unwrap();
    let reader = VhdImage::open_device(memory.clone(), parent.clone()).unwrap();
    prop_assert!(read_all(&reader) == model, "the reader differs");
    check_extents(&reader, &model);
    let directory = tempfile::tempdir().unwrap();
    let image = clean(directory.path(), &memory, model.len() as u64 > sectors * 512);
    if parent.is_none() {
        let raw = raw_file(directory.path(), "model.raw", &model);
        let compare = ["compare", "-f", "raw", "-F", "vpc", path(&raw), path(&image)];
        prop_assert!(qemu_img(&compare).contains("identical"));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn random_work_equals_a_byte_vector(
        block_bits in prop_oneof![Just(12u32), Just(14), Just(16), Just(19), Just(21)],
        fixed in prop::bool::weighted(0.1),
        below in prop::option::of(0..3_000_000u64),
        sectors in 1..6000u64,
        steps in prop::collection::vec(step(), 1..40),
    ) {
        run_model(block_bits, fixed && below.is_none(), below, sectors, &steps)?;
    }
}

#[test]
fn every_tool_sees_the_disk_that_was_written() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    for (subformat, size) in [("dynamic", 9_000_448), ("fixed", 4 << 20), ("dynamic", 40 << 20)] {
        let content = pattern(size, usize::try_from(size).unwrap());
        let image = at(&format!("{subformat}{size}.vhd"));
        let options = CreateOptions {
            subformat: Some(subformat.into()),
            ..CreateOptions::new(Format::Vhd, size)
        };
        let writer = create_image(&image, &options).unwrap();
        for (index, piece) in content.chunks(1_000_003).enumerate() {
            writer.write_at(piece, index as u64 * 1_000_003).unwrap();
        }
        writer.finish().unwrap();
        let raw = raw_file(directory.path(), "content.raw", &content);
        let compare = ["compare", "-f", "raw", "-F", "vpc", path(&raw), path(&image)];
        // "Identical" is said also where one disk is longer by zeros: the size is compared apart.
        assert!(qemu_img(&compare).contains("Images are identical"));
        let info = qemu_img(&["info", "-f", "vpc", "--output=json", path(&image)]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["virtual-size"], size, "{subformat}");
        let said = run("vhdiinfo", &[path(&image)]);
        assert!(said.contains(&format!("({size} bytes)")), "{said}");
        let id = &image_info(&image, None).unwrap().identifiers["unique_id"];
        assert!(said.contains(id.as_str()), "{said}");
        let read = run_bytes("7zz", &["x", "-so", "-tVHD", path(&image)]);
        assert!(read == content, "7zz reads {} bytes of {subformat}", read.len());
        let read = dissect(&image, size);
        assert!(read == content, "dissect reads {} bytes of {subformat}", read.len());
    }
}

/// The output of a tool that must be installed and succeed.
fn run_bytes(program: &str, arguments: &[&str]) -> Vec<u8> {
    let output = support::try_run(program, arguments);
    assert!(output.status.success(), "{program} {arguments:?}: {}", support::text(&output));
    output.stdout
}

/// The disk as the Python package dissect.hypervisor reads it.
fn dissect(image: &Path, size: u64) -> Vec<u8> {
    const SCRIPT: &str = "import sys\n\
        from dissect.hypervisor.disk.vhd import VHD\n\
        disk = VHD(open(sys.argv[1], 'rb'))\n\
        sys.stdout.buffer.write(disk.read(int(sys.argv[2])))";
    let python = std::env::var("VMTIDE_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    run_bytes(&python, &["-c", SCRIPT, path(image), &size.to_string()])
}

#[test]
fn a_chain_is_found_by_name_and_read_by_7_zip() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let trusting = OpenOptions { backing: BackingPolicy::Allow, ..OpenOptions::default() };
    let mut content = pattern(3, 5 << 20);
    let base = create_image(at("base.vhd"), &CreateOptions::new(Format::Vhd, 5 << 20)).unwrap();
    base.write_at(&content, 0).unwrap();
    base.finish().unwrap();
    drop(base);
    let mut below = at("base.vhd");
    for depth in 0..3u64 {
        let name = format!("child{depth}.vhd");
        let file = vmtide_block::RawDevice::open(&below, vmtide_block::OpenMode::ReadOnly).unwrap();
        let options = CreateOptions {
            parent: Some(CreateParent {
                name: below.file_name().unwrap().to_str().unwrap().into(),
                absolute_path: Some(path(&below).into()),
                format: Format::Vhd,
                identity: identity(&file, Format::Vhd).unwrap(),
                device: open_read_only(&below, &trusting).unwrap(),
            }),
            ..CreateOptions::new(Format::Vhd, 5 << 20)
        };
        let child = create_image(at(&name), &options).unwrap();
        let mut random = Random(depth + 1);
        for _ in 0..20 {
            let start = usize::try_from(random.below(5 << 20)).unwrap();
            let end = (start + usize::try_from(random.below(9000)).unwrap()).min(content.len());
            content[start..end].fill(random.next().to_le_bytes()[0]);
            child.write_at(&content[start..end], start as u64).unwrap();
        }
        child.finish().unwrap();
        drop(child);
        below = at(&name);
        let disk = open_read_only(&below, &trusting).unwrap();
        assert!(read_all(&*disk) == content, "depth {depth}");
        let read = run_bytes("7zz", &["x", "-so", "-tVHD", path(&below)]);
        assert!(read == content, "7zz, depth {depth}");
    }
    // The names are relative to the child: the chain can be moved as a whole.
    let moved = directory.path().join("moved");
    std::fs::create_dir(&moved).unwrap();
    for name in ["base.vhd", "child0.vhd", "child1.vhd", "child2.vhd"] {
        std::fs::rename(at(name), moved.join(name)).unwrap();
    }
    let beside = OpenOptions { backing: BackingPolicy::SameDirectory, ..OpenOptions::default() };
    assert!(read_all(&*open_read_only(moved.join("child2.vhd"), &beside).unwrap()) == content);
}

#[test]
fn images_of_qemu_are_changed_and_read_by_it() {
    let directory = tempfile::tempdir().unwrap();
    for (index, options) in [
        "subformat=dynamic",
        "subformat=dynamic,force_size=on",
        "subformat=fixed",
        "subformat=fixed,force_size=on",
    ]
    .into_iter()
    .enumerate()
    {
        let image = directory.path().join(format!("image{index}.vhd"));
        qemu_img(&["create", "-q", "-f", "vpc", "-o", options, path(&image), "10M"]);
        qemu_io(&image, &["-f", "vpc"], &["write -P 7 1M 3M", "write -P 9 9M 512"]);
        let info = qemu_img(&["info", "-f", "vpc", "--output=json", path(&image)]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        let disk = open_writable(&image, &OpenOptions::default()).unwrap();
        assert_eq!(info["virtual-size"], disk.size_bytes(), "{options}");
        let mut expected = vec![0; usize::try_from(disk.size_bytes()).unwrap()];
        expected[1 << 20..4 << 20].fill(7);
        expected[9 << 20..(9 << 20) + 512].fill(9);
        let mut random = Random(5);
        for round in 0..40 {
            let at = random.below(disk.size_bytes() - 1);
            let length = (random.below(300_000) + 1).min(disk.size_bytes() - at);
            let range = usize::try_from(at).unwrap()..usize::try_from(at + length).unwrap();
            if round % 4 == 3 {
                disk.write_zeroes(ByteRange::new(at, length)).unwrap();
                expected[range].fill(0);
            } else {
                expected[range.clone()].fill(round + 1);
                disk.write_at(&expected[range], at).unwrap();
            }
        }
        disk.finish().unwrap();
        drop(disk);
        qemu_io(&image, &["-f", "vpc"], &["write -P 5 6M 64k"]);
        expected[6 << 20..(6 << 20) + (64 << 10)].fill(5);
        let raw = raw_file(directory.path(), "expected.raw", &expected);
        let compare = ["compare", "-f", "raw", "-F", "vpc", path(&raw), path(&image)];
        assert!(qemu_img(&compare).contains("Images are identical"), "{options}");
        let disk = open_read_only(&image, &OpenOptions::default()).unwrap();
        assert!(read_all(&*disk) == expected, "{options}");
    }
}

#[test]
fn what_a_vhd_cannot_be_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image.vhd");
    let error = |options: CreateOptions| {
        let error = create_image(&image, &options).err().unwrap();
        assert!(!image.exists(), "{error}");
        error.to_string()
    };
    let new = |size| CreateOptions::new(Format::Vhd, size);
    let text = error(new(MAX_DISK_BYTES + 1));
    assert!(text.contains("2040 GiB") && text.contains("VHDX"), "{text}");
    assert!(error(new(u64::MAX)).contains("2040 GiB"));
    assert!(error(CreateOptions { block_size_bytes: Some(3 << 20), ..new(1) }).contains("power"));
    assert!(error(CreateOptions { logical_sector_bytes: Some(4096), ..new(1) }).contains("512"));
    assert!(error(CreateOptions { compress: true, ..new(1) }).contains("compressed"));
    let subformat = Some("differencing".to_owned());
    assert!(error(CreateOptions { subformat, ..new(1) }).contains("parent"));
    // The largest one is a small file, and quickly made and opened.
    let writer = create_image(&image, &new(MAX_DISK_BYTES)).unwrap();
    writer.write_at(&[7; 512], MAX_DISK_BYTES - 512).unwrap();
    writer.finish().unwrap();
    drop(writer);
    assert!(std::fs::metadata(&image).unwrap().len() < 8 << 20);
    let disk = open_read_only(&image, &OpenOptions::default()).unwrap();
    assert_eq!(disk.size_bytes(), MAX_DISK_BYTES);
    let found = vmtide_block::all_extents(&*disk).unwrap();
    assert!(found.len() <= 3, "{found:?}");
    let info = qemu_img(&["info", "-f", "vpc", "--output=json", path(&image)]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["virtual-size"], MAX_DISK_BYTES);
}

#[test]
fn sizes_are_rounded_up_to_sectors_and_the_disk_grows_past_its_table() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image.vhd");
    let options =
        CreateOptions { block_size_bytes: Some(4096), ..CreateOptions::new(Format::Vhd, 1000) };
    let disk = create_image(&image, &options).unwrap();
    assert_eq!(disk.size_bytes(), 1024);
    disk.write_at(&[1; 1024], 0).unwrap();
    assert!(matches!(disk.resize(512), Err(BlockError::Unsupported { .. })));
    assert!(matches!(disk.resize(10_000), Err(BlockError::Unsupported { .. })));
    assert!(matches!(disk.resize(MAX_DISK_BYTES + 512), Err(BlockError::Unsupported { .. })));
    disk.resize(64 << 20).unwrap();
    disk.write_at(&[2; 1024], (64 << 20) - 1024).unwrap();
    disk.finish().unwrap();
    drop(disk);
    let mut expected = vec![0; 64 << 20];
    expected[..1024].fill(1);
    expected[(64 << 20) - 1024..].fill(2);
    let raw = raw_file(directory.path(), "expected.raw", &expected);
    let compare = ["compare", "-f", "raw", "-F", "vpc", path(&raw), path(&image)];
    assert!(qemu_img(&compare).contains("identical"));
    let report = check_image(&image, &OpenOptions::default(), Repair::Nothing).unwrap();
    assert_eq!((report.errors, report.allocated_bytes), (0, 8192), "{report:?}");
}

#[test]
fn threads_that_share_sectors_and_blocks_do_not_lose_each_others_bytes() {
    const THREADS: usize = 6;
    for differencing in [false, true] {
        let mut expected = vec![0; 4 << 20];
        if differencing {
            expected = pattern(31, 4 << 20);
        }
        let options = VhdCreateOptions {
            kind: kind(differencing.then_some(&expected), false),
            block_size_bytes: 16 << 10,
            ..VhdCreateOptions::new(4 << 20)
        };
        let memory = Arc::new(MemoryDevice::new(0));
        let writer = VhdWriter::create_device(memory.clone(), &options).unwrap();
        // Thread t owns every 100-byte piece whose number is t modulo the threads.
        let work: Vec<Vec<(usize, u8, bool)>> = (0..THREADS)
            .map(|thread| {
                let mut random = Random(thread as u64 + 1);
                (0..2000)
                    .map(|_| {
                        let pieces = (4 << 20) / 100 / THREADS as u64;
                        let piece = usize::try_from(random.below(pieces)).unwrap();
                        let value = random.next().to_le_bytes()[2];
                        (piece * THREADS + thread, value, random.below(5) == 0)
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
            scope.spawn(|| (0..50).for_each(|_| writer.flush().unwrap()));
        });
        assert!(read_all(&writer) == expected);
        writer.finish().unwrap();
        let parent = match options.kind {
            VhdKind::Differencing(parent) => Some(parent.device),
            _ => None,
        };
        let reader = VhdImage::open_device(memory.clone(), parent).unwrap();
        assert!(read_all(&reader) == expected, "differencing: {differencing}");
        assert!(differencing || support::vhd_bitmaps_are_whole(&memory.to_bytes()));
        clean(tempfile::tempdir().unwrap().path(), &memory, false);
    }
}

#[test]
fn the_bitmaps_of_a_huge_child_take_bounded_memory() {
    let below: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::new(0));
    let parent = VhdParent {
        name: "parent.vhd".into(),
        absolute_path: None,
        identity: PARENT_ID.into(),
        device: below.clone(),
    };
    // Every block here has a bitmap of 16 KiB.
    let options = VhdCreateOptions {
        kind: VhdKind::Differencing(parent),
        block_size_bytes: 64 << 20,
        ..VhdCreateOptions::new(1 << 40)
    };
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("huge.vhd");
    let writer = VhdWriter::create(&image, &options).unwrap();
    for block in 0..1100u64 {
        writer.write_at(&block.to_be_bytes(), block * (64 << 20) + 7000).unwrap();
        assert!(writer.held_bitmap_bytes() <= 17 << 20, "{} held", writer.held_bitmap_bytes());
    }
    writer.finish().unwrap();
    drop(writer);
    let file =
        Arc::new(vmtide_block::RawDevice::open(&image, vmtide_block::OpenMode::ReadOnly).unwrap());
    let reader = VhdImage::open_device(file, Some(below)).unwrap();
    for block in 0..1100u64 {
        let mut bytes = [0; 8];
        reader.read_at(&mut bytes, block * (64 << 20) + 7000).unwrap();
        assert_eq!(u64::from_be_bytes(bytes), block);
    }
}
