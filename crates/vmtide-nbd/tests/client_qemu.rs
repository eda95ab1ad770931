//! Our client against QEMU's servers.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed unwrap is a failed test, and the numbers here are small"
)]

use crate::support;

use support::{Lab, noise, run, tool};
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, CancelToken, Extent, ExtentKind, WritableBlockDevice,
    all_extents,
};
use vmtide_nbd::{HeaderStyle, NbdDevice, NbdOptions, list_exports, probe_export};

const MIB: u64 = 1 << 20;

/// A raw image of 16 MiB: noise in the first 5 MiB, then a hole, then noise in the last MiB.
fn raw_image(lab: &Lab) -> Vec<u8> {
    let mut bytes = noise(5 << 20, 1);
    bytes.resize(15 << 20, 0);
    bytes.extend(noise(1 << 20, 2));
    let file = std::fs::File::create(lab.path("disk.raw")).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    use std::os::unix::fs::FileExt;
    file.write_all_at(&bytes[..5 << 20], 0).unwrap();
    file.write_all_at(&bytes[15 << 20..], 15 << 20).unwrap();
    bytes
}

#[test]
fn every_byte_of_a_raw_image_is_read() {
    let lab = Lab::new();
    let bytes = raw_image(&lab);
    let _server = lab.qemu_nbd("disk.raw", "raw", &["-r"]);
    let disk = lab.connect("");
    assert_eq!(disk.size_bytes(), bytes.len() as u64);
    assert_eq!(disk.header_style(), HeaderStyle::Extended);
    let mut got = vec![1; bytes.len()];
    disk.read_at(&mut got, 0).unwrap();
    assert!(got == bytes);
    for (offset, length) in [(0, 1), (511, 2), (4095, 70_000), (bytes.len() - 7, 7), (5, 0)] {
        let mut got = vec![1; length];
        disk.read_at(&mut got, offset as u64).unwrap();
        assert!(got == bytes[offset..offset + length], "{offset}+{length}");
    }
}

#[test]
fn older_header_styles_read_the_same() {
    let lab = Lab::new();
    let bytes = raw_image(&lab);
    let _server = lab.qemu_nbd("disk.raw", "raw", &["-r"]);
    for (structured_replies, style) in
        [(true, HeaderStyle::Structured), (false, HeaderStyle::Simple)]
    {
        let options =
            NbdOptions { structured_replies, extended_headers: false, ..NbdOptions::default() };
        let disk = NbdDevice::connect(&lab.url(""), &options).unwrap();
        assert_eq!(disk.header_style(), style);
        let mut got = vec![1; bytes.len()];
        disk.read_at(&mut got, 0).unwrap();
        assert!(got == bytes, "{style:?}");
    }
}

#[test]
fn holes_are_reported() {
    let lab = Lab::new();
    raw_image(&lab);
    let _server = lab.qemu_nbd("disk.raw", "raw", &["-r"]);
    let expected = [
        Extent::new(0, 5 * MIB, ExtentKind::Data),
        Extent::new(5 * MIB, 10 * MIB, ExtentKind::Unallocated),
        Extent::new(15 * MIB, MIB, ExtentKind::Data),
    ];
    assert_eq!(all_extents(&lab.connect("")).unwrap(), expected);
    let options = NbdOptions { extended_headers: false, ..NbdOptions::default() };
    let disk = NbdDevice::connect(&lab.url(""), &options).unwrap();
    assert_eq!(all_extents(&disk).unwrap(), expected);
}

#[test]
fn many_threads_share_the_connections() {
    let lab = Lab::new();
    let bytes = raw_image(&lab);
    let _server = lab.qemu_nbd("disk.raw", "raw", &["-r"]);
    for connections in [1, 4] {
        let options = NbdOptions { connections, request_bytes: 64 << 10, ..NbdOptions::default() };
        let disk = NbdDevice::connect(&lab.url(""), &options).unwrap();
        assert_eq!(disk.connections(), connections);
        std::thread::scope(|scope| {
            for thread in 0..6u64 {
                let (disk, bytes) = (&disk, &bytes);
                scope.spawn(move || {
                    for step in 0..60u64 {
                        let at = (thread * 7919 + step * 1_000_003) % (15 * MIB);
                        let length = 1 + ((step * 77_777) % (900 << 10)) as usize;
                        let mut got = vec![1; length];
                        disk.read_at(&mut got, at).unwrap();
                        let at = at as usize;
                        assert!(got == bytes[at..at + length], "{at}+{length}");
                    }
                });
            }
        });
    }
}

#[test]
fn readers_and_writers_on_one_connection_do_not_block_each_other() {
    let lab = Lab::new();
    raw_image(&lab);
    let _server = lab.qemu_nbd("disk.raw", "raw", &[]);
    let options = NbdOptions { connections: 1, ..NbdOptions::default() };
    let disk = NbdDevice::connect(&lab.url(""), &options).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..6u64 {
            let disk = &disk;
            scope.spawn(move || {
                let base = thread * 2 * MIB;
                for step in 0..20 {
                    let data = noise(2 << 20, thread * 100 + step);
                    disk.write_at(&data, base).unwrap();
                    let mut got = vec![0; data.len()];
                    disk.read_at(&mut got, base).unwrap();
                    assert!(got == data);
                }
            });
        }
    });
}

#[test]
fn writes_zeroes_and_trims_arrive() {
    let lab = Lab::new();
    let mut bytes = raw_image(&lab);
    let server = lab.qemu_nbd("disk.raw", "raw", &["--discard=unmap"]);
    let disk = lab.connect("");
    let data = noise(3_000_001, 9);
    disk.write_at(&data, 777).unwrap();
    bytes[777..777 + data.len()].copy_from_slice(&data);
    disk.write_zeroes(ByteRange::new(4 * MIB + 5, 100_000)).unwrap();
    bytes[(4 << 20) + 5..][..100_000].fill(0);
    disk.write_with(b"durable", 15 * MIB, true).unwrap();
    bytes[15 << 20..][..7].copy_from_slice(b"durable");
    disk.trim(ByteRange::new(8 * MIB, MIB)).unwrap();
    disk.flush().unwrap();
    drop(disk);
    drop(server);
    assert!(std::fs::read(lab.path("disk.raw")).unwrap() == bytes);
}

#[test]
fn a_read_only_export_refuses_writes() {
    let lab = Lab::new();
    raw_image(&lab);
    let _server = lab.qemu_nbd("disk.raw", "raw", &["-r"]);
    let disk = lab.connect("");
    assert!(disk.is_read_only());
    let error = disk.write_at(&[1], 0).unwrap_err();
    assert!(matches!(error, BlockError::ReadOnly { .. }), "{error}");
    let error = disk.read_at(&mut [0; 2], 16 * MIB - 1).unwrap_err();
    assert!(matches!(error, BlockError::OutOfRange { .. }), "{error}");
}

#[test]
fn exports_are_listed_and_probed() {
    let lab = Lab::new();
    raw_image(&lab);
    let _server = lab.qemu_nbd("disk.raw", "raw", &["-r", "-x", "vda", "-D", "the disk"]);
    let listed = list_exports(&lab.url(""), &NbdOptions::default()).unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].name.as_str(), listed[0].description.as_str()), ("vda", "the disk"));
    let probed = probe_export(&lab.url("vda"), &NbdOptions::default()).unwrap();
    assert_eq!(probed.info.size_bytes, 16 * MIB);
    assert_eq!(probed.info.description.as_deref(), Some("the disk"));
    assert_eq!(probed.contexts, ["base:allocation"]);
    let error = NbdDevice::connect(&lab.url("vdb"), &NbdOptions::default()).unwrap_err();
    assert_eq!(error.io_kind(), Some(std::io::ErrorKind::NotFound), "{error}");
}

#[test]
fn dirty_bitmaps_are_read_to_their_end() {
    let lab = Lab::new();
    let image = lab.text("disk.qcow2");
    run(tool("qemu-img").args(["create", "-q", "-f", "qcow2", &image, "64M"]));
    for bitmap in ["b0", "b1"] {
        run(tool("qemu-img").args(["bitmap", "--add", "-g", "64k", &image, bitmap]));
        let write = if bitmap == "b0" { "write 1M 128k" } else { "write -z -u 40M 2M" };
        run(tool("qemu-io").args(["-f", "qcow2", "-c", write, &image]));
    }
    let _server = lab.qemu_nbd("disk.qcow2", "qcow2", &["-r", "-B", "b0", "-B", "b1"]);
    let options = NbdOptions::default().with_dirty_bitmap("b0").with_dirty_bitmap("b1");
    let disk = NbdDevice::connect(&lab.url(""), &options).unwrap();
    let whole = ByteRange::new(0, disk.size_bytes());
    let cancel = CancelToken::new();
    let first = ByteRange::new(MIB, 128 << 10);
    let second = ByteRange::new(40 * MIB, 2 * MIB);
    let dirty = disk.dirty_ranges("b0", whole, &cancel).unwrap();
    assert_eq!(dirty.as_slice(), [first, second]);
    let dirty = disk.dirty_ranges("b1", whole, &cancel).unwrap();
    assert_eq!(dirty.as_slice(), [second]);
    let all = disk.dirty_ranges_of_all(&["b1", "b0"], whole, &cancel).unwrap();
    assert_eq!(all.as_slice(), [first, second]);
    let mut zero = Vec::new();
    disk.for_each_changed_extent(&all, &cancel, |extent| {
        if extent.kind.reads_as_zero() {
            zero.push(extent.range);
        }
        Ok(())
    })
    .unwrap();
    assert_eq!(zero, [second]);
    let error = disk.dirty_ranges("b2", whole, &cancel).unwrap_err();
    assert!(matches!(error, BlockError::Unsupported { .. }), "{error}");
}
