//! Our server against the clients of QEMU and libnbd.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed unwrap is a failed test, and the numbers here are small"
)]

use crate::support;

use std::sync::Arc;
use support::{Lab, noise, run, tool};
use vmtide_block::{BlockDevice, ByteRange, MemoryDevice, OpenMode, RangeSet, RawDevice};
use vmtide_nbd::{Export, NbdServer, ServerHandle, ServerOptions};

const MIB: u64 = 1 << 20;

/// A sparse disk of 12 MiB: data in the first and the last 2 MiB.
fn sparse_disk(lab: &Lab) -> Arc<RawDevice> {
    use vmtide_block::WritableBlockDevice;
    let mode = OpenMode::CreateNew { size_bytes: 12 * MIB };
    let disk = RawDevice::open(lab.path("disk.raw"), mode).unwrap();
    disk.write_at(&noise(2 << 20, 3), 0).unwrap();
    disk.write_at(&noise(2 << 20, 4), 10 * MIB).unwrap();
    Arc::new(disk)
}

fn serve(lab: &Lab, export: Export) -> ServerHandle {
    NbdServer::new().export(export).listen_unix(lab.path("s")).unwrap()
}

#[test]
fn nbdinfo_sees_what_the_export_is() {
    let lab = Lab::new();
    let export = Export::writable(sparse_disk(&lab))
        .named("vda")
        .described("a disk")
        .with_dirty_bitmap("b0", RangeSet::new());
    let server = serve(&lab, export);
    let text = run(tool("nbdinfo").args(["--json", &server.url().to_string()]));
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["protocol"], "newstyle-fixed");
    assert_eq!(json["structured"], true);
    let export = &json["exports"][0];
    assert_eq!(export["export-name"], "vda");
    assert_eq!(export["description"], "a disk");
    assert_eq!(export["export-size"], 12 * MIB);
    for flag in ["can_multi_conn", "can_flush", "can_fua", "can_trim", "can_zero", "can_df"] {
        assert_eq!(export[flag], true, "{flag}");
    }
    assert_eq!(export["is_read_only"], false);
    let contexts = export["contexts"].as_array().unwrap();
    assert_eq!(contexts.len(), 2);
    assert_eq!(contexts[1], "qemu:dirty-bitmap:b0");
}

#[test]
fn nbdinfo_lists_all_exports() {
    let lab = Lab::new();
    let disk = sparse_disk(&lab);
    let server = NbdServer::new()
        .export(Export::read_only(disk.clone()).named("a"))
        .export(Export::read_only(disk).named("b"))
        .listen_tcp("127.0.0.1:0")
        .unwrap();
    let url = server.url_of("").to_string();
    let text = run(tool("nbdinfo").args(["--list", "--json", &url]));
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let names: Vec<_> = json["exports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|export| export["export-name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["a", "b"]);
}

#[test]
fn nbdinfo_maps_holes_and_dirty_bitmaps() {
    let lab = Lab::new();
    let changed = RangeSet::from(vec![ByteRange::new(MIB, 65536), ByteRange::new(11 * MIB, MIB)]);
    let export = Export::read_only(sparse_disk(&lab)).with_dirty_bitmap("b0", changed);
    let server = serve(&lab, export);
    let map = |context: &str| -> Vec<(u64, u64, u64)> {
        let map = format!("--map={context}");
        let text = run(tool("nbdinfo").args([&map, "--json", &server.url().to_string()]));
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let number = |value: &serde_json::Value| value.as_u64().unwrap();
        json.as_array()
            .unwrap()
            .iter()
            .map(|e| (number(&e["offset"]), number(&e["length"]), number(&e["type"])))
            .collect()
    };
    assert_eq!(
        map("base:allocation"),
        [(0, 2 * MIB, 0), (2 * MIB, 8 * MIB, 3), (10 * MIB, 2 * MIB, 0)]
    );
    assert_eq!(
        map("qemu:dirty-bitmap:b0"),
        [(0, MIB, 0), (MIB, 65536, 1), (MIB + 65536, 10 * MIB - 65536, 0), (11 * MIB, MIB, 1)]
    );
}

#[test]
fn nbdcopy_reads_and_writes_every_byte() {
    let lab = Lab::new();
    let disk = sparse_disk(&lab);
    let target = Arc::new(MemoryDevice::new(12 << 20));
    let server = NbdServer::new()
        .export(Export::read_only(disk.clone()).named("from"))
        .export(Export::writable(target.clone()).named("to"))
        .listen_unix(lab.path("s"))
        .unwrap();
    let (from, to) = (server.url_of("from").to_string(), server.url_of("to").to_string());
    run(tool("nbdcopy").args([&from, &to]));
    let mut expected = vec![0; 12 << 20];
    disk.read_at(&mut expected, 0).unwrap();
    assert!(target.to_bytes() == expected);
    let out = lab.text("out.raw");
    run(tool("nbdcopy").args([&from, &out]));
    assert!(std::fs::read(out).unwrap() == expected);
}

#[test]
fn qemu_img_compares_converts_and_maps() {
    let lab = Lab::new();
    let disk = sparse_disk(&lab);
    let server = NbdServer::new()
        .export(Export::read_only(disk).named("from"))
        .export(Export::writable(Arc::new(MemoryDevice::new(12 << 20))).named("to"))
        .listen_unix(lab.path("s"))
        .unwrap();
    let (from, to) = (server.url_of("from").to_string(), server.url_of("to").to_string());
    let raw = lab.text("disk.raw");
    let compare = |a: &str, b: &str| {
        run(tool("qemu-img").args(["compare", "-f", "raw", "-F", "raw", a, b]));
    };
    compare(&raw, &from);
    run(tool("qemu-img").args(["convert", "-n", "-f", "raw", "-O", "raw", &raw, &to]));
    compare(&raw, &to);
    let map = run(tool("qemu-img").args(["map", "--output=json", "-f", "raw", &from]));
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    assert_eq!(map[1]["zero"], true);
    assert_eq!(map[1]["start"], 2 * MIB);
    assert_eq!(map[1]["length"], 8 * MIB);
}

#[test]
fn qemu_io_writes_zeroes_and_flushes() {
    let lab = Lab::new();
    let memory = Arc::new(MemoryDevice::from_bytes(vec![9; 4 << 20]));
    let server = serve(&lab, Export::writable(memory.clone()).with_fast_zeroes());
    let commands = [
        "write -P 7 1000 70000",
        "write -z 1M 64k",
        "write -z -u 2M 64k",
        "write -z -u -n 2621440 64k",
        "discard 3M 64k",
        "write -f -P 5 4194303 1",
        "flush",
        "read -P 7 1000 70000",
        "read -P 0 1M 64k",
    ];
    let mut qemu_io = tool("qemu-io");
    qemu_io.args(["-f", "raw"]);
    for command in commands {
        qemu_io.args(["-c", command]);
    }
    let text = run(qemu_io.arg(server.url().to_string()));
    assert!(!text.contains("failed"), "{text}");
    let bytes = memory.to_bytes();
    assert!(bytes[1000..71000].iter().all(|byte| *byte == 7));
    for start in [1 << 20, 2 << 20, 2_621_440, 3 << 20] {
        assert!(bytes[start..start + 65536].iter().all(|byte| *byte == 0), "{start}");
    }
    assert_eq!(bytes[4_194_303], 5);
    assert_eq!(bytes[1 << 19], 9);
}

#[test]
fn clients_beyond_the_limit_are_hung_up_on() {
    let lab = Lab::new();
    let options = ServerOptions { max_connections: 1, ..ServerOptions::default() };
    let server = NbdServer::new()
        .options(options)
        .export(Export::read_only(sparse_disk(&lab)))
        .listen_unix(lab.path("s"))
        .unwrap();
    let first = lab.connect("");
    assert_eq!((first.connections(), server.connections()), (1, 1));
    let text = tool("nbdinfo").arg(server.url().to_string()).output().unwrap();
    assert!(!text.status.success());
}
