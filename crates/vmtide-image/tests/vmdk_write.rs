//! VMDK images that vmtide writes: against a byte vector, and read by QEMU, libvmdk, 7-Zip and
//! dissect.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use crate::support;

use proptest::prelude::*;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use support::vmdk::{MemoryFiles, descriptor};
use support::{Random, check_extents, path, pattern, qemu_img, qemu_io, raw_file, read_all, run};
use vmtide_block::{BlockDevice, ByteRange, MemoryDevice, WritableBlockDevice, is_zero};
use vmtide_image::vmdk::{
    VmdkCreateOptions, VmdkImage, VmdkKind, VmdkParent, VmdkWriter, identity, info,
};
use vmtide_image::{
    BackingPolicy, CreateOptions, CreateParent, Format, ImageWriter, OpenOptions, create_image,
    image_info, open_read_only, open_writable,
};

fn allowed() -> OpenOptions {
    OpenOptions { backing: BackingPolicy::SameDirectory, ..OpenOptions::default() }
}

/// Makes an image in memory, and how to reach its files.
fn create(options: &VmdkCreateOptions) -> (MemoryFiles, VmdkWriter) {
    let files = MemoryFiles::default();
    let writer = VmdkWriter::create_files("disk.vmdk", options, &mut |name| {
        let device = Arc::new(MemoryDevice::new(0));
        files.put(name, device.clone());
        Ok(device)
    });
    (files, writer.unwrap())
}

fn reopen(files: &MemoryFiles, parent: Option<Arc<dyn BlockDevice>>) -> VmdkImage {
    VmdkImage::open_device(files.get("disk.vmdk"), files, parent).unwrap()
}

#[derive(Clone, Debug)]
enum Step {
    Write { at: u64, length: u64, value: u8 },
    Zero { at: u64, length: u64 },
    Flush,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let place = (any::<u64>(), 1..400_000u64);
    prop_oneof![
        6 => (place.clone(), 1..=255u8).prop_map(|((at, length), value)| Step::Write { at, length, value }),
        3 => place.prop_map(|(at, length)| Step::Zero { at, length }),
        2 => Just(Step::Flush),
        1 => Just(Step::Reopen),
    ]
}

#[derive(Clone, Debug)]
struct Shape {
    kind: VmdkKind,
    grain: u64,
    parent: Option<u64>,
    zero_grains: bool,
    sectors: u64,
}

fn shape() -> impl Strategy<Value = Shape> {
    let kind = prop::sample::select(vec![
        VmdkKind::MonolithicSparse,
        VmdkKind::MonolithicSparse,
        VmdkKind::MonolithicFlat,
        VmdkKind::TwoGbMaxExtentSparse,
        VmdkKind::Vmfs,
    ]);
    let grain = prop::sample::select(vec![4096u64, 65536, 1 << 20]);
    let parent = prop::option::of(0..3_000_000u64);
    (kind, grain, parent, any::<bool>(), 1..6000u64).prop_map(
        |(kind, grain, parent, zero_grains, sectors)| Shape {
            kind,
            grain,
            parent,
            zero_grains,
            sectors,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn the_writer_is_a_byte_vector(shape in shape(), steps in prop::collection::vec(step(), 1..24)) {
        let size = usize::try_from(shape.sectors * 512).unwrap();
        let below = shape.parent.filter(|_| !shape.kind.is_flat())
            .map(|length| pattern(length, usize::try_from(length).unwrap()));
        let device = below.clone().map(|bytes| Arc::new(MemoryDevice::from_bytes(bytes)) as Arc<dyn BlockDevice>);
        let options = VmdkCreateOptions {
            kind: shape.kind,
            grain_size_bytes: shape.grain,
            parent: device.clone().map(|device| VmdkParent {
                hint: "p.vmdk".into(), content_id: "0000002a".into(), device,
            }),
            ..VmdkCreateOptions::new(size as u64)
        };
        let (files, mut writer) = create(&options);
        if shape.zero_grains && shape.kind == VmdkKind::MonolithicSparse {
            writer.finish().unwrap();
            let file = files.get("disk.vmdk");
            file.write_at(&[2], 4).unwrap();
            file.write_at(&[7], 8).unwrap();
            writer = VmdkWriter::open_device(file, &files, device.clone()).unwrap();
        }
        let mut model = below.unwrap_or_default();
        model.resize(size, 0);
        for step in steps {
            match step {
                Step::Write { at, length, value } => {
                    let at = usize::try_from(at % size as u64).unwrap();
                    let end = size.min(at + usize::try_from(length).unwrap());
                    model[at..end].fill(value);
                    writer.write_at(&model[at..end], at as u64).unwrap();
                }
                Step::Zero { at, length } => {
                    let at = usize::try_from(at % size as u64).unwrap();
                    let end = size.min(at + usize::try_from(length).unwrap());
                    model[at..end].fill(0);
                    writer.write_zeroes(ByteRange::from_bounds(at as u64, end as u64)).unwrap();
                }
                Step::Flush => {
                    writer.flush().unwrap();
                    // What is flushed is in the file, whatever the writer has in memory.
                    prop_assert!(read_all(&reopen(&files, device.clone())) == model);
                }
                Step::Reopen => {
                    writer.finish().unwrap();
                    writer = VmdkWriter::open_device(files.get("disk.vmdk"), &files, device.clone()).unwrap();
                }
            }
        }
        prop_assert!(read_all(&writer) == model);
        check_extents(&writer, &model);
        writer.finish().unwrap();
        let image = reopen(&files, device);
        prop_assert!(read_all(&image) == model);
        check_extents(&image, &model);
        prop_assert!(!info(&*files.get("disk.vmdk")).unwrap().dirty);
    }

    #[test]
    fn a_stream_holds_what_was_written_in_order(
        pieces in prop::collection::vec((0..200_000u64, 1..300_000usize, any::<bool>()), 0..20),
        rest in 0..100_000u64,
    ) {
        let mut disk = Vec::new();
        let mut writes = Vec::new();
        for (number, (gap, length, by_compress)) in pieces.into_iter().enumerate() {
            let at = disk.len() + usize::try_from(gap).unwrap();
            let at = if by_compress { at.next_multiple_of(65536) } else { at };
            let length = if by_compress { 65536 } else { length };
            disk.resize(at, 0);
            disk.extend(pattern(number as u64 + 1, length));
            writes.push((at, length, by_compress));
        }
        disk.resize((disk.len() + usize::try_from(rest).unwrap() + 1).next_multiple_of(512), 0);
        let options = VmdkCreateOptions {
            kind: VmdkKind::StreamOptimized,
            ..VmdkCreateOptions::new(disk.len() as u64)
        };
        let (files, writer) = create(&options);
        for (at, length, by_compress) in writes {
            let data = &disk[at..at + length];
            if by_compress {
                let compressed = writer.compressed().unwrap();
                compressed.append(at as u64, compressed.compress(data).unwrap()).unwrap();
            } else {
                writer.write_at(data, at as u64).unwrap();
            }
        }
        prop_assert!(VmdkImage::open_device(files.get("disk.vmdk"), &files, None).is_err());
        writer.finish().unwrap();
        prop_assert!(read_all(&writer) == disk);
        let image = reopen(&files, None);
        prop_assert!(read_all(&image) == disk);
        check_extents(&image, &disk);
    }
}

#[test]
fn a_stream_takes_nothing_out_of_order_and_is_no_image_before_its_end() {
    let options =
        VmdkCreateOptions { kind: VmdkKind::StreamOptimized, ..VmdkCreateOptions::new(10 << 20) };
    let (files, writer) = create(&options);
    writer.write_at(&[1; 200_000], 65_536).unwrap();
    writer.write_zeroes(ByteRange::new(300_000, 1 << 20)).unwrap();
    let error = writer.write_at(&[1], 0).unwrap_err().to_string();
    assert!(error.contains("written once and in order"), "{error}");
    assert!(writer.write_zeroes(ByteRange::new(0, 10)).is_err());
    assert!(writer.read_at(&mut [0], 0).is_err());
    writer.flush().unwrap();
    assert!(VmdkImage::open_device(files.get("disk.vmdk"), &files, None).is_err());
    writer.finish().unwrap();
    writer.finish().unwrap();
    assert!(writer.write_at(&[1], 5 << 20).is_err());
    let file = files.get("disk.vmdk");
    let error = VmdkWriter::open_device(file, &files, None).err().unwrap().to_string();
    assert!(error.contains("convert it"), "{error}");
}

#[test]
fn the_first_write_changes_the_content_id_and_nothing_else_does() {
    let text = "# Disk DescriptorFile\nversion=1\nCID=0badcafe\nparentCID=ffffffff\ncreateType=\"vmfs\"\n\
                RW 8 VMFS \"flat\"\nchangeTrackPath=\"disk-ctk.vmdk\"\n\
                ddb.longContentID = \"93c81ebf7f4ff21b2ba0ae120badcafe\"\n";
    let files = MemoryFiles::default()
        .with("disk.vmdk", text.as_bytes().to_vec())
        .with("flat", vec![0; 4096]);
    let main = files.get("disk.vmdk");
    let id = || identity(&*main).unwrap();
    let open = || VmdkWriter::open_device(files.get("disk.vmdk"), &files, None).unwrap();
    let writer = open();
    writer.flush().unwrap();
    writer.finish().unwrap();
    assert_eq!(id(), "0badcafe");
    assert!(info(&*main).unwrap().change_tracking_file.is_some());
    let writer = open();
    writer.write_at(&[1], 7).unwrap();
    let changed = id();
    assert_ne!(changed, "0badcafe");
    let found = info(&*main).unwrap();
    assert_eq!(found.change_tracking_file, None);
    let long = &found.identifiers["long_content_id"];
    assert!(long.ends_with(&changed) && !long.starts_with("93c81ebf"), "{long}");
    writer.write_at(&[1], 9).unwrap();
    assert_eq!(id(), changed);
    assert_eq!(main.to_bytes().len(), text.len());
    let writer = open();
    writer.write_zeroes(ByteRange::new(0, 1)).unwrap();
    assert_ne!(id(), changed);
}

#[test]
fn what_may_not_be_written_is_not() {
    let lines = "RW 1 FLAT \"a\" 0\nRDONLY 1 FLAT \"b\" 0\nRW 1 ZERO";
    let files = MemoryFiles::default()
        .with("disk.vmdk", descriptor("custom", None, lines).into_bytes())
        .with("a", vec![0; 512])
        .with("b", vec![7; 512]);
    let writer = VmdkWriter::open_device(files.get("disk.vmdk"), &files, None).unwrap();
    writer.write_at(&[1; 512], 0).unwrap();
    assert!(writer.write_at(&[1], 600).is_err());
    assert!(writer.write_at(&[1], 1100).is_err());
    assert!(writer.write_at(&[1], 1536).is_err());
    writer.write_zeroes(ByteRange::new(1024, 512)).unwrap();
    assert_eq!(files.get("b").to_bytes(), [7; 512]);
    let files = MemoryFiles::default()
        .with("disk.vmdk", descriptor("x", None, "RDONLY 1 FLAT \"b\" 0").into_bytes())
        .with("b", vec![7; 512]);
    assert!(VmdkWriter::open_device(files.get("disk.vmdk"), &files, None).is_err());
}

#[test]
fn many_writers_in_one_grain_lose_nothing() {
    let (files, writer) = create(&VmdkCreateOptions {
        grain_size_bytes: 1 << 20,
        ..VmdkCreateOptions::new(32 << 20)
    });
    std::thread::scope(|scope| {
        for worker in 0..4u64 {
            let writer = &writer;
            scope.spawn(move || {
                let value = u8::try_from(worker + 1).unwrap();
                for step in 0..512 {
                    let at = (step * 4 + worker) * 16384;
                    writer.write_at(&[value; 16384], at).unwrap();
                    if step % 100 == worker {
                        writer.flush().unwrap();
                    }
                }
            });
        }
    });
    writer.finish().unwrap();
    let disk = read_all(&reopen(&files, None));
    for (piece, bytes) in disk.chunks(16384).enumerate() {
        assert!(bytes.iter().all(|byte| usize::from(*byte) == piece % 4 + 1), "piece {piece}");
    }
}

#[test]
fn tables_that_are_not_there_are_made() {
    // The directory of an image that allocates its tables late, as some programs write.
    let (files, writer) = create(&VmdkCreateOptions::new(100 << 20));
    writer.finish().unwrap();
    let file = files.get("disk.vmdk");
    let bytes = file.to_bytes();
    for at in [48, 56] {
        let sector = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        file.write_at(&[0; 16], sector * 512).unwrap();
    }
    let writer = VmdkWriter::open_device(file.clone(), &files, None).unwrap();
    writer.write_at(&[5; 100_000], 40 << 20).unwrap();
    writer.finish().unwrap();
    let mut expected = vec![0; 100 << 20];
    expected[40 << 20..(40 << 20) + 100_000].fill(5);
    assert!(read_all(&reopen(&files, None)) == expected);
    // The redundant tables say the same.
    let damaged = file.to_bytes();
    let sector = u64::from_le_bytes(damaged[56..64].try_into().unwrap());
    file.write_at(&[0xff; 4], sector * 512 + 4).unwrap();
    assert!(read_all(&reopen(&files, None)) == expected);
}

fn write_pattern(writer: &dyn ImageWriter, content: &[u8]) {
    for (number, piece) in content.chunks(300_032).enumerate() {
        if !is_zero(piece) {
            writer.write_at(piece, number as u64 * 300_032).unwrap();
        }
    }
    writer.finish().unwrap();
}

fn made(directory: &Path, kind: VmdkKind, content: &[u8]) -> PathBuf {
    let image = directory.join(format!("{}.vmdk", kind.name()));
    let options = CreateOptions {
        subformat: Some(kind.name().into()),
        ..CreateOptions::new(Format::Vmdk, content.len() as u64)
    };
    write_pattern(&*create_image(&image, &options).unwrap(), content);
    image
}

#[test]
fn qemu_reads_and_writes_what_we_make() {
    let directory = tempfile::tempdir().unwrap();
    let mut content = pattern(7, 70_000_128);
    let raw = raw_file(directory.path(), "disk.raw", &content);
    for kind in VmdkKind::ALL {
        let image = made(directory.path(), kind, &content);
        qemu_img(&["compare", "-f", "vmdk", "-F", "raw", path(&image), path(&raw)]);
        assert!(qemu_img(&["info", "-f", "vmdk", path(&image)]).contains(kind.name()));
        if kind.is_embedded() {
            qemu_img(&["check", "-f", "vmdk", path(&image)]);
        }
        assert_eq!(image_info(&image, None).unwrap().subformat.as_deref(), Some(kind.name()));
        assert!(create_image(&image, &CreateOptions::new(Format::Vmdk, 512)).is_err());
    }
    // Both write the same image in turn.
    let image = directory.path().join("monolithicSparse.vmdk");
    qemu_io(&image, &["-f", "vmdk"], &["write -P 9 1M 3M", "write -P 8 40M 100k"]);
    content[1 << 20..4 << 20].fill(9);
    content[40 << 20..(40 << 20) + 102_400].fill(8);
    let writer = open_writable(&image, &allowed()).unwrap();
    writer.write_at(&[3; 70_000], 41_990_000).unwrap();
    writer.finish().unwrap();
    content[41_990_000..42_060_000].fill(3);
    std::fs::write(&raw, &content).unwrap();
    qemu_img(&["compare", "-f", "vmdk", "-F", "raw", path(&image), path(&raw)]);
    qemu_img(&["check", "-f", "vmdk", path(&image)]);
}

#[test]
fn a_child_we_make_is_qemus_child_too() {
    let directory = tempfile::tempdir().unwrap();
    let mut content = pattern(8, 5_000_192);
    let base = made(directory.path(), VmdkKind::MonolithicSparse, &content);
    let id = image_info(&base, None).unwrap().identifiers["cid"].clone();
    for kind in [VmdkKind::MonolithicSparse, VmdkKind::TwoGbMaxExtentSparse] {
        let child = directory.path().join(format!("child-{}.vmdk", kind.name()));
        let options = CreateOptions {
            subformat: Some(kind.name().into()),
            parent: Some(CreateParent {
                name: "monolithicSparse.vmdk".into(),
                absolute_path: None,
                format: Format::Vmdk,
                identity: Some(id.clone()),
                device: open_read_only(&base, &allowed()).unwrap(),
            }),
            ..CreateOptions::new(Format::Vmdk, content.len() as u64)
        };
        let writer = create_image(&child, &options).unwrap();
        writer.write_at(&[6; 100_000], 77_777).unwrap();
        writer.write_zeroes(ByteRange::new(1_000_000, 300_000)).unwrap();
        writer.finish().unwrap();
        content[77_777..177_777].fill(6);
        content[1_000_000..1_300_000].fill(0);
        let raw = raw_file(directory.path(), "disk.raw", &content);
        assert!(read_all(&*open_read_only(&child, &allowed()).unwrap()) == content);
        qemu_img(&["compare", "-f", "vmdk", "-F", "raw", path(&child), path(&raw)]);
        assert!(qemu_img(&["info", path(&child)]).contains("backing file: monolithicSparse.vmdk"));
    }
    let flat = CreateOptions {
        subformat: Some("vmfs".into()),
        parent: Some(CreateParent {
            name: "x".into(),
            absolute_path: None,
            format: Format::Vmdk,
            identity: Some(id),
            device: Arc::new(MemoryDevice::new(512)),
        }),
        ..CreateOptions::new(Format::Vmdk, 512)
    };
    assert!(create_image(directory.path().join("no.vmdk"), &flat).is_err());
    assert!(!directory.path().join("no.vmdk").exists());
}

#[test]
fn other_programs_read_what_we_make() {
    let directory = tempfile::tempdir().unwrap();
    // Whole grains: dissect fails at the end of disks of other sizes.
    let content = pattern(17, 1069 << 16);
    let raw = raw_file(directory.path(), "disk.raw", &content);
    let script = raw_file(directory.path(), "read.py", DISSECT.as_bytes());
    for kind in VmdkKind::ALL {
        let image = made(directory.path(), kind, &content);
        let out = run("vmdkinfo", &[path(&image)]);
        assert!(out.contains("70057984"), "{}: {out}", kind.name());
        run("python3", &[path(&script), path(&image), path(&raw)]);
    }
    // 7-Zip takes VMDKs of one extent.
    for kind in [VmdkKind::MonolithicSparse, VmdkKind::StreamOptimized] {
        let image = directory.path().join(format!("{}.vmdk", kind.name()));
        let out = directory.path().join(format!("out-{}", kind.name()));
        std::fs::create_dir(&out).unwrap();
        run("7zz", &["x", "-tVMDK", &format!("-o{}", path(&out)), path(&image)]);
        let file = std::fs::read_dir(&out).unwrap().next().unwrap().unwrap().path();
        assert!(std::fs::read(file).unwrap() == content, "7zz on {}", kind.name());
    }
}

/// Reads a VMDK with dissect.hypervisor and compares it with a raw file.
const DISSECT: &str = "
import sys
from pathlib import Path
from dissect.hypervisor.disk.vmdk import VMDK
disk = VMDK(Path(sys.argv[1]))
stream = disk.open() if hasattr(disk, 'open') else disk
expected = open(sys.argv[2], 'rb').read()
assert stream.size == len(expected), (stream.size, len(expected))
at = 0
while at < len(expected):
    data = stream.read(1 << 20)
    assert data == expected[at:at + len(data)] and data, at
    at += len(data)
";

#[test]
fn large_disks_are_made_and_written_at_their_end() {
    let directory = tempfile::tempdir().unwrap();
    for (kind, size) in [
        (VmdkKind::MonolithicSparse, 60u64 << 40),
        (VmdkKind::StreamOptimized, 2 << 40),
        (VmdkKind::TwoGbMaxExtentSparse, 50 << 30),
        (VmdkKind::Vmfs, 8 << 40),
    ] {
        let image = directory.path().join(format!("{}.vmdk", kind.name()));
        let options = CreateOptions {
            subformat: Some(kind.name().into()),
            ..CreateOptions::new(Format::Vmdk, size)
        };
        let writer = create_image(&image, &options).unwrap();
        writer.write_at(&[4; 4096], size - 4096).unwrap();
        writer.finish().unwrap();
        let disk = open_read_only(&image, &allowed()).unwrap();
        let mut bytes = [0; 8192];
        disk.read_at(&mut bytes, size - 8192).unwrap();
        assert_eq!((&bytes[..4096], &bytes[4096..]), (&[0; 4096][..], &[4; 4096][..]));
        let mut random = Random(5);
        for _ in 0..100 {
            disk.read_at(&mut bytes, random.below(size - 16384)).unwrap();
        }
    }
}

#[test]
fn impossible_wishes_are_refused() {
    let wish = |change: &dyn Fn(&mut VmdkCreateOptions)| {
        let mut options = VmdkCreateOptions::new(1 << 20);
        change(&mut options);
        let mut made = 0;
        let result = VmdkWriter::create_files("x.vmdk", &options, &mut |_| {
            made += 1;
            Ok(Arc::new(MemoryDevice::new(0)))
        });
        assert_eq!(made, 0);
        result.err().unwrap().to_string()
    };
    assert!(wish(&|o| o.grain_size_bytes = 5000).contains("grain"));
    assert!(wish(&|o| o.grain_size_bytes = 1 << 30).contains("grain"));
    assert!(wish(&|o| o.size_bytes = u64::MAX).contains("too large"));
    assert!(wish(&|o| o.adapter = "scsi\"".into()).contains("adapter"));
}
