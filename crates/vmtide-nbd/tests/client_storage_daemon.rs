//! Our client against qemu-storage-daemon, the way a backup of a virtual machine uses it.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed unwrap is a failed test, and the numbers here are small"
)]

use crate::support;

use support::{Lab, Running, noise, run, tool};
use vmtide_block::{BlockDevice, ByteRange, CancelToken, WritableBlockDevice};
use vmtide_nbd::{NbdDevice, NbdOptions, NbdUrl, list_exports};

const MIB: u64 = 1 << 20;

/// A daemon with a qcow2 image of 256 MiB and its bitmaps, exported as `vda` for writing.
fn daemon(lab: &Lab, bitmaps: &[&str]) -> Running {
    let image = lab.text("disk.qcow2");
    run(tool("qemu-img").args(["create", "-q", "-f", "qcow2", &image, "256M"]));
    let mut export = "type=nbd,id=e0,node-name=disk,name=vda,writable=on".to_owned();
    for (index, bitmap) in bitmaps.iter().enumerate() {
        run(tool("qemu-img").args(["bitmap", "--add", "-g", "64k", &image, bitmap]));
        export.push_str(&format!(",bitmaps.{index}={bitmap}"));
    }
    if bitmaps.is_empty() {
        export.push_str(",allocation-depth=on");
    }
    let socket = lab.text("s");
    let mut command = tool("qemu-storage-daemon");
    command.args([
        "--blockdev",
        &format!(
            "driver=qcow2,node-name=disk,discard=unmap,file.driver=file,file.filename={image}"
        ),
        "--nbd-server",
        &format!("addr.type=unix,addr.path={socket},max-connections=16"),
        "--export",
        &export,
    ]);
    lab.serve(&mut command, "s")
}

#[test]
fn a_bitmap_of_many_ranges_comes_whole() {
    let lab = Lab::new();
    let image = lab.text("big.qcow2");
    // Every other bit is set, by writes of one block each.
    run(tool("qemu-img").args(["create", "-q", "-f", "qcow2", &image, "2G"]));
    run(tool("qemu-img").args(["bitmap", "--add", "-g", "64k", &image, "b"]));
    let mut qemu_io = tool("qemu-io");
    qemu_io.args(["-f", "qcow2", "--cache=unsafe"]);
    let mut script = String::new();
    for index in 0..4000u64 {
        script.push_str(&format!("write -z -u {} 64k\n", index * 2 * 65536));
    }
    let mut child = qemu_io
        .arg(&image)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    use std::io::Write;
    child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    let _server = lab.qemu_nbd("big.qcow2", "qcow2", &["-r", "-B", "b"]);
    for extended_headers in [true, false] {
        let options =
            NbdOptions { extended_headers, ..NbdOptions::default() }.with_dirty_bitmap("b");
        let disk = NbdDevice::connect(&lab.url(""), &options).unwrap();
        let whole = ByteRange::new(0, disk.size_bytes());
        let dirty = disk.dirty_ranges("b", whole, &CancelToken::new()).unwrap();
        assert_eq!(dirty.as_slice().len(), 4000);
        for (index, range) in dirty.iter().enumerate() {
            assert_eq!(range, ByteRange::new(index as u64 * 2 * 65536, 65536));
        }
    }
}

#[test]
fn writes_show_up_in_the_bitmaps_of_a_running_export() {
    let lab = Lab::new();
    let _daemon = daemon(&lab, &["b0", "b1"]);
    let options = NbdOptions::default().with_dirty_bitmap("b0").with_dirty_bitmap("b1");
    let disk = NbdDevice::connect(&lab.url("vda"), &options).unwrap();
    assert!(disk.has_context("base:allocation") && disk.has_context("qemu:dirty-bitmap:b1"));
    let data = noise(300_000, 5);
    disk.write_at(&data, 10 * MIB + 17).unwrap();
    disk.flush().unwrap();
    let mut got = vec![0; data.len()];
    disk.read_at(&mut got, 10 * MIB + 17).unwrap();
    assert!(got == data);
    let whole = ByteRange::new(0, disk.size_bytes());
    let dirty = disk.dirty_ranges("b0", whole, &CancelToken::new()).unwrap();
    let written = ByteRange::new(10 * MIB + 17, 300_000).align_outward(65536, u64::MAX);
    assert_eq!(dirty.as_slice(), [written]);
}

#[test]
fn allocation_depth_is_told() {
    let lab = Lab::new();
    let _daemon = daemon(&lab, &[]);
    let options = NbdOptions {
        meta_contexts: vec!["qemu:allocation-depth".to_owned()],
        ..NbdOptions::default()
    };
    let disk = NbdDevice::connect(&lab.url("vda"), &options).unwrap();
    disk.write_at(&noise(65536, 1), 0).unwrap();
    let range = ByteRange::new(0, MIB);
    let extents = disk.block_status("qemu:allocation-depth", range).unwrap();
    assert_eq!((extents[0].range.length, extents[0].flags), (65536, 1));
    assert_eq!(extents[1].flags, 0);
}

#[test]
fn exports_of_a_daemon_are_listed() {
    let lab = Lab::new();
    let _daemon = daemon(&lab, &[]);
    let url = NbdUrl::unix(lab.text("s"), "");
    let names: Vec<_> = list_exports(&url, &NbdOptions::default())
        .unwrap()
        .into_iter()
        .map(|export| export.name)
        .collect();
    assert_eq!(names, ["vda"]);
}

#[test]
fn several_connections_write_to_one_export() {
    let lab = Lab::new();
    let _daemon = daemon(&lab, &[]);
    let disk = NbdDevice::connect(&lab.url("vda"), &NbdOptions::default()).unwrap();
    assert_eq!(disk.connections(), 4);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let disk = &disk;
            scope.spawn(move || {
                for step in 0..8 {
                    let at = (thread * 8 + step) * MIB;
                    disk.write_at(&noise(1 << 20, at), at).unwrap();
                }
            });
        }
    });
    disk.flush().unwrap();
    for at in (0..32 * MIB).step_by(1 << 20) {
        let mut got = vec![0; 1 << 20];
        disk.read_at(&mut got, at).unwrap();
        assert!(got == noise(1 << 20, at));
    }
}
