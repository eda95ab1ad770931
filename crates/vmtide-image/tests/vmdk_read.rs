//! VMDK images of other programs, and of kinds that only this test can build, read byte for byte.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use crate::support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use support::vmdk::{Hole, MemoryFiles, StreamEnd, cowd, descriptor, sesparse, stream, write};
use support::{check_extents, path, pattern, qemu_img, qemu_io, raw_file, read_all};
use vmtide_block::{BlockDevice, ByteRange, ExtentKind, MemoryDevice, all_extents};
use vmtide_image::vmdk::VmdkImage;
use vmtide_image::{
    BackingPolicy, Format, OpenOptions, identity, image_info, open_chain, open_read_only, probe,
};

fn allowed() -> OpenOptions {
    OpenOptions { backing: BackingPolicy::SameDirectory, ..OpenOptions::default() }
}

fn check(image: &Path, expected: &[u8]) {
    let disk = open_read_only(image, &allowed()).unwrap();
    assert!(read_all(&*disk) == expected, "{}", image.display());
    check_extents(&*disk, expected);
}

/// Succeeds where qemu-img reads the same disk out of the image.
fn check_with_qemu(image: &Path, expected: &[u8]) {
    let raw = image.with_extension("qemu.raw");
    qemu_img(&["convert", "-f", "vmdk", "-O", "raw", path(image), path(&raw)]);
    assert!(std::fs::read(&raw).unwrap() == expected, "qemu-img on {}", image.display());
}

#[test]
fn sample_images_yield_their_recorded_digests() {
    let folder = std::env::var_os("VMTIDE_TEST_IMAGES").map_or_else(
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
    let rows: Vec<Vec<&str>> = manifest
        .lines()
        .map(|line| line.split('\t').collect::<Vec<_>>())
        .filter(|columns| columns[0].starts_with("vmdk/"))
        .collect();
    for columns in &rows {
        let packed = std::fs::read(folder.join(format!("{}.zst", columns[0]))).unwrap();
        let name = columns[0].trim_start_matches("vmdk/");
        write(directory.path(), name, zstd::decode_all(&packed[..]).unwrap());
    }
    let mut seen = 0;
    for columns in rows.iter().filter(|columns| columns[3] != "-") {
        let image = directory.path().join(columns[0].trim_start_matches("vmdk/"));
        assert_eq!(probe(&image).unwrap(), Format::Vmdk);
        let disk = open_read_only(&image, &allowed()).unwrap();
        assert_eq!(disk.size_bytes().to_string(), columns[3], "{}", columns[0]);
        let digest = ring::digest::digest(&ring::digest::SHA256, &read_all(&*disk));
        let hex: String = digest.as_ref().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, columns[4], "{}", columns[0]);
        assert_eq!(image_info(&image, None).unwrap().size_bytes, disk.size_bytes());
        seen += 1;
    }
    assert!(seen > 0, "the manifest lists no VMDK");
}

#[test]
fn every_kind_that_qemu_makes_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let content = pattern(4, 9_000_448);
    let raw = raw_file(directory.path(), "disk.raw", &content);
    let kinds = [
        "subformat=monolithicSparse",
        "subformat=monolithicSparse,zeroed_grain=on",
        "subformat=monolithicFlat",
        "subformat=twoGbMaxExtentSparse",
        "subformat=twoGbMaxExtentFlat",
        "subformat=streamOptimized",
        "subformat=monolithicSparse,compat6=on",
    ];
    for (number, options) in kinds.iter().enumerate() {
        let image = directory.path().join(format!("image{number}.vmdk"));
        qemu_img(&["convert", "-f", "raw", "-O", "vmdk", "-o", options, path(&raw), path(&image)]);
        check(&image, &content);
        let info = image_info(&image, None).unwrap();
        let kind = options.split(['=', ',']).nth(1).unwrap();
        assert_eq!(info.subformat.as_deref(), Some(kind));
        assert_eq!(info.size_bytes, content.len() as u64);
        let cid = identity(&*raw_device(&image), Format::Vmdk).unwrap().unwrap();
        assert_eq!(info.identifiers["cid"], cid);
        assert_eq!(cid.len(), 8);
    }
}

fn raw_device(path: &Path) -> Arc<dyn BlockDevice> {
    Arc::new(vmtide_block::RawDevice::open(path, vmtide_block::OpenMode::ReadOnly).unwrap())
}

#[test]
fn a_disk_in_several_files_is_read_across_their_borders() {
    let directory = tempfile::tempdir().unwrap();
    for kind in ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let image = directory.path().join(format!("{kind}.vmdk"));
        let option = format!("subformat={kind}");
        qemu_img(&["create", "-f", "vmdk", "-o", &option, path(&image), "5G"]);
        let commands =
            ["write -P 7 0 64k", "write -P 8 2147418112 128k", "write -P 9 5368643584 64k"];
        qemu_io(&image, &["-f", "vmdk"], &commands);
        let disk = open_read_only(&image, &allowed()).unwrap();
        let mut bytes = vec![0; 131_072];
        disk.read_at(&mut bytes, (2 << 30) - 65536).unwrap();
        assert_eq!(bytes, [8; 131_072]);
        disk.read_at(&mut bytes, (5 << 30) - 131_072).unwrap();
        assert_eq!(bytes[..65536], [0; 65536]);
        assert_eq!(bytes[65536..], [9; 65536]);
        let data: u64 = all_extents(&*disk)
            .unwrap()
            .iter()
            .filter(|extent| !extent.kind.reads_as_zero())
            .map(|extent| extent.range.length)
            .sum();
        // File systems may round to blocks of their own.
        assert!((262_144..(1 << 20)).contains(&data), "{kind}: {data}");
        assert_eq!(image_info(&image, None).unwrap().extent_files.len(), 3);
    }
}

#[test]
fn the_extents_are_opened_only_where_the_policy_allows() {
    let directory = tempfile::tempdir().unwrap();
    write(directory.path(), "disk-flat.vmdk", [5; 1024]);
    let text = descriptor("monolithicFlat", None, "RW 2 FLAT \"disk-flat.vmdk\" 0");
    write(directory.path(), "disk.vmdk", text);
    let image = directory.path().join("disk.vmdk");
    let error = open_read_only(&image, &OpenOptions::default()).err().unwrap().to_string();
    assert!(error.contains("disk-flat.vmdk") && error.contains("not opened"), "{error}");
    check(&image, &[5; 1024]);
    for outside in ["/etc/passwd", "../other-flat.vmdk", "nbd://host/export", "sub/../../x"] {
        let text = descriptor("monolithicFlat", None, &format!("RW 1 FLAT \"{outside}\" 0"));
        write(directory.path(), "evil.vmdk", text);
        open_read_only(directory.path().join("evil.vmdk"), &allowed()).err().unwrap();
    }
}

#[test]
fn extents_that_were_copied_away_are_found_beside_the_descriptor() {
    let directory = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    let content: Vec<u8> = (0..65536u32).map(|at| (at / 3 % 251).to_le_bytes()[0]).collect();
    std::fs::write(directory.path().join("a b-flat.vmdk"), &content).unwrap();
    std::fs::write(other.path().join("elsewhere.vmdk"), &content).unwrap();
    let open = |name: &str, options: &OpenOptions| {
        let image = directory.path().join("disk.vmdk");
        let text = format!("CID=1\nparentCID=ffffffff\nRW 128 FLAT \"{name}\" 0\n");
        std::fs::write(&image, format!("# Disk DescriptorFile\n{text}")).unwrap();
        let disk = open_read_only(&image, options)?;
        let mut bytes = vec![0; content.len()];
        disk.read_at(&mut bytes, 0)?;
        assert!(bytes == content, "{name}");
        Ok::<_, vmtide_block::BlockError>(())
    };
    let same = OpenOptions { backing: BackingPolicy::SameDirectory, ..OpenOptions::default() };
    for options in [&same, &allowed()] {
        for name in [
            "a b-flat.vmdk",
            "C:\\Users\\x\\a b-flat.vmdk",
            "sub\\a b-flat.vmdk",
            "/vmfs/volumes/5f0c-1/web/a b-flat.vmdk",
        ] {
            open(name, options).unwrap();
        }
        assert!(open("/vmfs/volumes/5f0c-1/web/elsewhere.vmdk", options).is_err());
        assert!(open("/vmfs/volumes/5f0c-1/web/", options).is_err());
        let search = vec![other.path().to_path_buf()];
        let options = OpenOptions { search, ..options.clone() };
        open("/vmfs/volumes/5f0c-1/web/elsewhere.vmdk", &options).unwrap();
    }
    open("/vmfs/a b-flat.vmdk", &OpenOptions::default()).unwrap_err();
}

#[test]
fn a_child_reads_through_the_parent_it_was_made_of_and_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let mut content = pattern(3, 3_000_320);
    let raw = raw_file(directory.path(), "disk.raw", &content);
    qemu_img(&["convert", "-f", "raw", "-O", "vmdk", path(&raw), path(&at("base.vmdk"))]);
    let make = |parent: &Path, child: &Path| {
        qemu_img(&["create", "-f", "vmdk", "-b", path(parent), "-F", "vmdk", path(child)]);
    };
    make(&at("base.vmdk"), &at("child.vmdk"));
    qemu_io(&at("child.vmdk"), &["-f", "vmdk"], &["write -P 77 100k 200k"]);
    content[100 << 10..300 << 10].fill(77);
    make(&at("child.vmdk"), &at("grandchild.vmdk"));
    check(&at("grandchild.vmdk"), &content);
    let layers = open_chain(at("grandchild.vmdk"), &allowed()).unwrap();
    assert_eq!(layers.len(), 3);
    let own = layers[1].image.layout(ByteRange::new(0, content.len() as u64)).unwrap();
    let of = |kind| own.iter().filter(|p| p.kind == kind).map(|p| p.range.length).sum::<u64>();
    assert_eq!(of(ExtentKind::Data), 4 * 65536);
    assert_eq!(of(ExtentKind::Unallocated), content.len() as u64 - 4 * 65536);
    let info = image_info(at("child.vmdk"), None).unwrap();
    assert_eq!(
        info.backing.unwrap().identity,
        image_info(at("base.vmdk"), None).unwrap().identifiers.get("cid").cloned()
    );
    // The base is written: its CID changes, and the child must not be read over it.
    qemu_io(&at("base.vmdk"), &["-f", "vmdk"], &["write -P 1 0 64k"]);
    let error = open_read_only(at("child.vmdk"), &allowed()).err().unwrap().to_string();
    assert!(error.contains("changed or replaced"), "{error}");
    let forced = OpenOptions { any_parent: true, ..allowed() };
    open_read_only(at("child.vmdk"), &forced).unwrap();
    let error = open_read_only(at("child.vmdk"), &OpenOptions::default()).err().unwrap();
    assert!(error.to_string().contains("base.vmdk"), "{error}");
}

#[test]
fn a_parent_named_by_a_windows_path_is_found_beside_the_child() {
    let directory = tempfile::tempdir().unwrap();
    let content = pattern(9, 300 * 512);
    let parent = descriptor("vmfs", None, "RW 300 VMFS \"base-flat.vmdk\"");
    write(directory.path(), "base-flat.vmdk", &content);
    write(directory.path(), "base.vmdk", parent);
    let child = descriptor(
        "vmfsSparse",
        Some(("0BADCAFE", "C:\\VMs\\old place\\base.vmdk")),
        "RW 300 VMFSSPARSE \"child-delta.vmdk\"",
    );
    let mut delta = vec![0; 300 * 512];
    delta[512 * 7..512 * 9].fill(3);
    write(directory.path(), "child-delta.vmdk", cowd(&delta, 1));
    write(directory.path(), "child.vmdk", child);
    let mut expected = content;
    expected[512 * 7..512 * 9].fill(3);
    check(&directory.path().join("child.vmdk"), &expected);
}

#[test]
fn esx_extents_are_read_as_qemu_reads_them() {
    let directory = tempfile::tempdir().unwrap();
    // More than one grain table of each kind: 2 MiB (COWD with grains of 512 bytes) and 16 MiB.
    let content = pattern(12, 20 << 20);
    let lines = |kind: &str| format!("RW {} {kind} \"x.bin\"", (20 << 20) / 512);
    for (kind, line, extent) in [
        ("vmfsSparse", "VMFSSPARSE", cowd(&content, 1)),
        ("vmfsSparse", "VMFSSPARSE", cowd(&content, 16)),
        ("seSparse", "SESPARSE", sesparse(&content, Hole::Unallocated)),
        ("seSparse", "SESPARSE", sesparse(&content, Hole::Unmapped)),
        ("seSparse", "SESPARSE", sesparse(&content, Hole::Zero)),
    ] {
        write(directory.path(), "x.bin", &extent);
        write(directory.path(), "x.vmdk", descriptor(kind, None, &lines(line)));
        let image = directory.path().join("x.vmdk");
        check(&image, &content);
        check_with_qemu(&image, &content);
        // The extent alone.
        let alone = directory.path().join("x.bin");
        assert_eq!(probe(&alone).unwrap(), Format::Vmdk);
        check(&alone, &content);
        assert_eq!(image_info(&alone, None).unwrap().subformat.as_deref(), Some(kind));
    }
}

#[test]
fn zeros_of_a_snapshot_hide_the_parent_and_absent_grains_do_not() {
    let parent: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::from_bytes(vec![9; 1 << 20]));
    let mut content = vec![0; 1 << 20];
    content[8192..12288].fill(1);
    for (hole, rest) in [(Hole::Unallocated, 9), (Hole::Unmapped, 0), (Hole::Zero, 0)] {
        let text = descriptor("seSparse", Some(("1", "p")), "RW 2048 SESPARSE \"x\"");
        let files = MemoryFiles::default().with("x", sesparse(&content, hole));
        let file = Arc::new(MemoryDevice::from_bytes(text.into_bytes()));
        let image = VmdkImage::open_device(file, &files, Some(parent.clone())).unwrap();
        let mut expected = vec![rest; 1 << 20];
        expected[8192..12288].fill(1);
        assert!(read_all(&image) == expected);
        check_extents(&image, &expected);
    }
}

#[test]
fn a_dirty_journal_is_refused() {
    let mut extent = sesparse(&[1; 8192], Hole::Zero);
    extent[512 + 24] = 1;
    let error = VmdkImage::open_device(
        Arc::new(MemoryDevice::from_bytes(extent)),
        &MemoryFiles::default(),
        None,
    );
    assert!(error.err().unwrap().to_string().contains("journal"));
}

#[test]
fn streams_are_read_by_their_footer_their_header_or_their_markers() {
    let directory = tempfile::tempdir().unwrap();
    // Three grain tables, the middle one empty, and a last grain that is not whole.
    let mut content = pattern(21, 80_000_000);
    content.truncate(79_999_488);
    content[33_554_432..67_108_864].fill(0);
    let text = descriptor("streamOptimized", None, "RW 156249 SPARSE \"generated-stream.vmdk\"");
    for end in [StreamEnd::Footer, StreamEnd::FrontDirectory, StreamEnd::BadFooter] {
        let mut bytes = stream(&content, &text, end);
        let image = directory.path().join("stream.vmdk");
        std::fs::write(&image, &bytes).unwrap();
        check(&image, &content);
        if end != StreamEnd::BadFooter {
            check_with_qemu(&image, &content);
        }
        // Padding at the end, as archives have it, is no reason to fail.
        bytes.resize(bytes.len() + 5000, 0);
        std::fs::write(&image, &bytes).unwrap();
        open_read_only(&image, &allowed()).unwrap().read_at(&mut [0; 100], 79_000_000).unwrap();
    }
}

#[test]
fn a_stream_that_was_cut_off_is_refused() {
    let content = pattern(22, 3 << 20);
    let text = descriptor("streamOptimized", None, "RW 6144 SPARSE \"generated-stream.vmdk\"");
    let open = |bytes: &[u8]| {
        let file = Arc::new(MemoryDevice::from_bytes(bytes.to_vec()));
        VmdkImage::open_device(file, &MemoryFiles::default(), None)
    };
    let error = open(&stream(&content, &text, StreamEnd::CutOff)).err().unwrap().to_string();
    assert!(error.contains("end of the stream"), "{error}");
    let error = open(&stream(&content, &text, StreamEnd::NoTables)).err().unwrap().to_string();
    assert!(error.contains("cut off"), "{error}");
    let whole = stream(&content, &text, StreamEnd::Footer);
    for cut in (1..=whole.len() / 512).step_by(7) {
        let bytes = &whole[..whole.len() - cut * 512];
        if let Ok(image) = open(bytes) {
            assert!(read_all(&image) == content, "cut by {cut} sectors");
        }
    }
    // A damaged grain and a grain in another's place are found.
    let mut bad = whole.clone();
    bad[128 * 512 + 12 + 20] ^= 0xff;
    let mut disk = vec![0; content.len()];
    assert!(open(&bad).unwrap().read_at(&mut disk, 0).is_err());
    let mut moved = whole;
    moved[128 * 512] ^= 0x80;
    let error = open(&moved).unwrap().read_at(&mut disk, 0).unwrap_err().to_string();
    assert!(error.contains("marker says sector"), "{error}");
}

#[test]
fn the_redundant_tables_are_used_where_the_first_lead_nowhere() {
    let directory = tempfile::tempdir().unwrap();
    let content = pattern(30, 2 << 20);
    let raw = raw_file(directory.path(), "disk.raw", &content);
    let image = directory.path().join("image.vmdk");
    qemu_img(&["convert", "-f", "raw", "-O", "vmdk", path(&raw), path(&image)]);
    let whole = std::fs::read(&image).unwrap();
    let directory_at = usize::from(whole[56]) * 512;
    let mut bytes = whole.clone();
    bytes[directory_at..directory_at + 4].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    std::fs::write(&image, &bytes).unwrap();
    check(&image, &content);
    let mut bytes = whole;
    bytes[56..64].copy_from_slice(&0x7fff_ffff_u64.to_le_bytes());
    std::fs::write(&image, &bytes).unwrap();
    check(&image, &content);
}

#[test]
fn mixed_extents_keep_their_order() {
    let sparse = {
        let directory = tempfile::tempdir().unwrap();
        let raw = raw_file(directory.path(), "disk.raw", &[6; 65536]);
        let image = directory.path().join("image.vmdk");
        qemu_img(&["convert", "-f", "raw", "-O", "vmdk", path(&raw), path(&image)]);
        std::fs::read(&image).unwrap()
    };
    let lines = "RW 2 FLAT \"flat\" 1\nRW 3 ZERO\nRW 128 SPARSE \"sparse\"\nRDONLY 1 VMFS \"flat\"\n\
                 NOACCESS 4 FLAT \"nobody\" 0";
    let text = descriptor("custom", None, lines);
    let files = MemoryFiles::default()
        .with("flat", [[1; 512], [2; 512], [3; 512]].concat())
        .with("sparse", sparse);
    let file = Arc::new(MemoryDevice::from_bytes(text.into_bytes()));
    let image = VmdkImage::open_device(file, &files, None).unwrap();
    let mut expected = [[2u8; 512], [3; 512]].concat();
    expected.resize(5 * 512, 0);
    expected.resize(133 * 512, 6);
    expected.resize(134 * 512, 1);
    assert_eq!(image.size_bytes(), 138 * 512);
    let mut bytes = vec![0; expected.len()];
    image.read_at(&mut bytes, 0).unwrap();
    assert!(bytes == expected);
    let error = image.read_at(&mut [0; 10], 135 * 512).unwrap_err();
    assert!(error.to_string().contains("NOACCESS"), "{error}");
    let raw = descriptor("vmfsRawDeviceMap", None, "RW 100 VMFSRDM \"x-rdm.vmdk\"");
    let file = Arc::new(MemoryDevice::from_bytes(raw.into_bytes()));
    let error = VmdkImage::open_device(file, &files, None).err().unwrap();
    assert!(error.to_string().contains("raw device mapping"), "{error}");
}
