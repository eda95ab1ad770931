//! A host's files through a real Samba: frozen chains, disks that a restore writes, changes in slices.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

mod support;

use std::process::Command;
use std::sync::{Arc, Mutex};
use support::{Samba, map, pattern};
use vmtide_block::{BlockDevice, ByteRange, MemoryDevice, RangeSet, WritableBlockDevice};
use vmtide_hyperv::{ChangePage, ChangesError, FileEntry, HostFiles, NewDisk};
use vmtide_hypervisor::HypervisorError;
use vmtide_image::vhdx::{VhdxCreateOptions, VhdxParent, VhdxWriter};
use vmtide_image::{Format, ImageWriter, identity};
use vmtide_smb::{AskChanges, SmbFiles};

const MIB: u64 = 1 << 20;
const ID: &str = "5c39b92d-1d5a-4cc6-a8c5-3d9a7c1f9b10";

fn no_changes() -> AskChanges {
    Arc::new(|_, _, _| Err(ChangesError::NotTracked("not asked here".into())))
}

fn files(samba: &Samba) -> SmbFiles {
    SmbFiles::new(samba.client(), map(), no_changes())
}

/// Makes a disk of 64 MiB with these pieces in it; answers with its identity.
fn image(
    samba: &Samba,
    name: &str,
    parent: Option<(&str, String)>,
    pieces: &[(u64, &[u8])],
) -> String {
    let path = samba.path("vms").join(name);
    let parent = parent.map(|(path, identity)| VhdxParent {
        identity,
        disk_id: Some(ID.into()),
        relative_path: None,
        absolute_path: Some(path.into()),
        volume_path: None,
        device: Arc::new(MemoryDevice::new(64 << 20)),
    });
    let options = VhdxCreateOptions {
        parent,
        disk_id: Some(ID.into()),
        block_size_bytes: Some(2 << 20),
        ..VhdxCreateOptions::new(64 * MIB)
    };
    let writer = VhdxWriter::create(&path, &options).unwrap();
    for (offset, data) in pieces {
        writer.write_at(data, *offset).unwrap();
    }
    writer.finish().unwrap();
    drop(writer);
    let file = vmtide_block::RawDevice::open(&path, vmtide_block::OpenMode::ReadOnly).unwrap();
    identity(&file, Format::Vhdx).unwrap().unwrap()
}

#[test]
fn a_frozen_chain_is_read_and_only_what_is_asked_crosses_the_network() {
    let samba = Samba::start();
    let (below, above) = (pattern(1, 16 << 20), pattern(2, 3 << 20));
    let base = image(&samba, "web.vhdx", None, &[(0, &below)]);
    image(
        &samba,
        "web_A1.avhdx",
        Some((r"C:\VMs\web.vhdx", base)),
        &[(5 * MIB + 512, &above), (40 * MIB, b"end of disk"), (60 * MIB, &[7; 4096])],
    );
    let files = files(&samba);
    let disk = files.open_disk(r"C:\VMs\web_A1.avhdx").unwrap();
    assert_eq!((disk.format.as_str(), disk.subtype.as_str()), ("vhdx", "differencing"));
    assert_eq!(disk.disk_id, Some(ID.parse().unwrap()));
    assert_eq!((disk.logical_sector_bytes, disk.block_bytes), (512, 2 << 20));
    let mut model = vec![0; 64 << 20];
    model[..below.len()].copy_from_slice(&below);
    model[(5 << 20) + 512..][..above.len()].copy_from_slice(&above);
    model[40 << 20..][..11].copy_from_slice(b"end of disk");
    model[60 << 20..][..4096].fill(7);
    let mut found = vec![0; model.len()];
    disk.device.read_at(&mut found, 0).unwrap();
    assert!(found == model);

    // An incremental: 64 pieces of 64 KiB. What is received is that, the tables and the messages' own bytes.
    let before = files.client().traffic();
    let mut piece = vec![0; 64 << 10];
    for number in 0..64 {
        let at = number * 4099 * 4096 % (15 * MIB);
        disk.device.read_at(&mut piece, at).unwrap();
        assert!(piece == model[usize::try_from(at).unwrap()..][..piece.len()]);
    }
    let received = files.client().traffic().received_bytes - before.received_bytes;
    let wanted = 64 * (64 << 10);
    assert!(received >= wanted && received * 10 <= wanted * 11, "{received} for {wanted}");
}

#[test]
fn a_disk_that_somebody_writes_or_that_was_changed_is_not_read() {
    let samba = Samba::start();
    let base = image(&samba, "web.vhdx", None, &[(0, b"x")]);
    image(&samba, "child.avhdx", Some((r"C:\VMs\web.vhdx", base.clone())), &[]);
    image(&samba, "evil.avhdx", Some((r"\\10.9.8.7\share\web2.vhdx", base)), &[]);
    let files = files(&samba);
    let writer = files.open_disk_writable(r"C:\VMs\web.vhdx").unwrap();
    for path in [r"C:\VMs\web.vhdx", r"C:\VMs\child.avhdx"] {
        let error = files.open_disk(path).err().unwrap();
        assert!(matches!(error, HypervisorError::Busy { .. }), "{error}");
    }
    // Who writes a parent breaks its children.
    writer.write_at(b"y", 0).unwrap();
    writer.flush().unwrap();
    drop(writer);
    let error = files.open_disk(r"C:\VMs\child.avhdx").err().unwrap();
    assert!(error.to_string().contains("changed or replaced"), "{error}");
    // The name in the image is not followed to another machine; nothing beside has it.
    let error = files.open_disk(r"C:\VMs\evil.avhdx").err().unwrap();
    assert!(matches!(error, HypervisorError::NotFound { .. }), "{error}");
    let error = files.open_disk(r"C:\VMs\none.vhdx").err().unwrap();
    assert!(matches!(error, HypervisorError::NotFound { .. }), "{error}");
    let error = files.open_disk(r"E:\web.vhdx").err().unwrap();
    assert!(matches!(error, HypervisorError::Denied { .. }), "{error}");
    std::fs::write(samba.path("vms/raw.vhdx"), [1; 4096]).unwrap();
    assert!(files.open_disk(r"C:\VMs\raw.vhdx").is_err());
}

#[test]
fn a_restore_writes_disks_and_files() {
    let samba = Samba::start();
    let files = files(&samba);
    files.create_directory(r"C:\VMs\restored\disks").unwrap();
    files.create_directory(r"C:\VMs\restored\disks").unwrap();
    let disk = NewDisk {
        size_bytes: 48 * MIB,
        disk_id: Some(ID.parse().unwrap()),
        logical_sector_bytes: 512,
        physical_sector_bytes: 4096,
        block_bytes: 0,
        fixed: false,
    };
    let path = r"C:\VMs\restored\disks\web.vhdx";
    let writer = files.create_disk(path, &disk).unwrap();
    writer.expect_bulk_writes();
    let data = pattern(3, 10 << 20);
    writer.write_at(&data, 33 * MIB).unwrap();
    writer.write_zeroes(ByteRange::new(34 * MIB, MIB)).unwrap();
    writer.flush().unwrap();
    drop(writer);
    let mut model = vec![0; 48 << 20];
    model[33 << 20..][..data.len()].copy_from_slice(&data);
    model[34 << 20..35 << 20].fill(0);
    // An independent reader: it refuses a log that is not empty.
    let raw = samba.path("restored.raw");
    let local = samba.path("vms/restored/disks/web.vhdx");
    let converted = Command::new("qemu-img")
        .args(["convert", "-f", "vhdx", "-O", "raw"])
        .args([&local, &raw])
        .output()
        .expect("qemu-img is missing: install the package qemu-utils");
    assert!(converted.status.success(), "{}", String::from_utf8_lossy(&converted.stderr));
    assert!(std::fs::read(&raw).unwrap() == model);
    let opened = files.open_disk(path).unwrap();
    assert_eq!(opened.disk_id, Some(ID.parse().unwrap()));
    drop(opened);

    // In place: what is there stays but for what is written.
    let writer = files.open_disk_writable(path).unwrap();
    writer.write_at(b"changed", 5 * MIB).unwrap();
    writer.flush().unwrap();
    drop(writer);
    let mut found = [0; 7];
    files.open_disk(path).unwrap().device.read_at(&mut found, 5 * MIB).unwrap();
    assert_eq!(&found, b"changed");

    let fixed = NewDisk { fixed: true, size_bytes: 8 * MIB, ..disk.clone() };
    files.create_disk(r"C:\VMs\restored\fixed.vhdx", &fixed).unwrap().flush().unwrap();
    assert!(std::fs::metadata(samba.path("vms/restored/fixed.vhdx")).unwrap().len() > 8 * MIB);
    assert!(files.create_disk(path, &disk).is_err(), "it was replaced");
    assert!(files.create_disk(r"C:\VMs\restored\x.vhd", &disk).is_err());

    files.write_file(r"C:\VMs\restored\web.vmcx", b"configuration").unwrap();
    assert!(files.write_file(r"C:\VMs\restored\web.vmcx", b"another").is_err());
    let read = files.read_file(r"C:\VMs\restored\web.vmcx", 100).unwrap();
    assert_eq!(read.as_deref(), Some(&b"configuration"[..]));
    assert!(files.read_file(r"C:\VMs\restored\web.vmcx", 5).is_err());
    assert_eq!(files.read_file(r"C:\VMs\restored\none", 5).unwrap(), None);
    let mut listed = files.list(r"C:\VMs\restored").unwrap().unwrap();
    listed.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(listed.len(), 2, "{listed:?}");
    assert_eq!(listed[1], FileEntry { name: "web.vmcx".into(), size_bytes: 13 });
    assert_eq!(files.list(r"C:\VMs\none").unwrap(), None);
    assert!(files.free_bytes(r"C:\VMs").unwrap().unwrap() > MIB);
    files.remove_file(r"C:\VMs\restored\web.vmcx").unwrap();
    files.remove_file(r"C:\VMs\restored\web.vmcx").unwrap();
    assert!(!samba.path("vms/restored/web.vmcx").exists());

    files.create_directory(r"C:\VMs\restored\Virtual Machines").unwrap();
    files.remove_directory(r"C:\VMs\restored\Virtual Machines").unwrap();
    files.remove_directory(r"C:\VMs\restored\Virtual Machines").unwrap();
    assert!(!samba.path("vms/restored/Virtual Machines").exists());
    // One with files in it stays.
    files.remove_directory(r"C:\VMs\restored").unwrap();
    assert!(samba.path("vms/restored/fixed.vhdx").exists());
}

#[test]
fn a_directory_of_many_files_is_listed_whole() {
    let samba = Samba::start();
    for number in 0..3000 {
        std::fs::write(samba.path(&format!("vms/a file with a long name {number:05}")), b"")
            .unwrap();
    }
    let listed = files(&samba).list(r"C:\VMs").unwrap().unwrap();
    let names: std::collections::BTreeSet<_> = listed.iter().map(|file| &file.name).collect();
    assert_eq!((listed.len(), names.len()), (3000, 3000));
}

#[test]
fn changes_are_asked_in_slices_that_fit_an_answer() {
    const GIB: u64 = 1 << 30;
    let samba = Samba::start();
    let asked: Arc<Mutex<Vec<ByteRange>>> = Arc::default();
    let log = asked.clone();
    // This host answers for at most 4 GiB.
    let ask: AskChanges = Arc::new(move |path, id, range| {
        assert_eq!((path, id), (r"C:\VMs\web.vhdx", "rctX:1"));
        log.lock().unwrap().push(range);
        if range.length > 4 * GIB {
            return Err(ChangesError::TooLarge("153600 bytes".into()));
        }
        let ranges = RangeSet::from(vec![ByteRange::new(range.offset, 4096)]);
        Ok(ChangePage { ranges, processed_bytes: range.length })
    });
    let files = SmbFiles::new(samba.client(), map(), ask);
    let size = 130 * GIB;
    let mut at = 0;
    let mut covered = 0;
    while at < size {
        let range = ByteRange::from_bounds(at, size);
        let page = files.changes(r"C:\VMs\web.vhdx", "rctX:1", range).unwrap();
        assert!(page.processed_bytes > 0 && page.processed_bytes <= 4 * GIB);
        covered += 1;
        at += page.processed_bytes;
    }
    assert!(covered >= 33, "{covered}");
    let asked = asked.lock().unwrap();
    assert!(asked.len() < 60, "too many questions: {}", asked.len());
    let error: AskChanges = Arc::new(|_, _, _| Err(ChangesError::TooLarge("always".into())));
    let files = SmbFiles::new(samba.client(), map(), error);
    let asked = files.changes("x", "y", ByteRange::new(0, size));
    assert!(matches!(asked, Err(ChangesError::TooLarge(_))));
}
