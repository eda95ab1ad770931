//! The provider over image files: information, tracking, content, moments, new disks.

#![cfg(unix)]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a failed unwrap is a failed test, and the numbers here are small"
)]

use std::path::{Path, PathBuf};
use vmtide_agent::provider::{DiskProvider, FilesProvider, NewDisk, ProviderError};
use vmtide_block::{ByteRange, CancelToken};

const MIB: u64 = 1 << 20;

fn new_disk(format: &str, fixed: bool) -> NewDisk {
    NewDisk {
        format: format.into(),
        virtual_size_bytes: 8 * MIB,
        fixed,
        logical_sector_bytes: None,
        physical_sector_bytes: None,
        block_size_bytes: None,
        disk_id: None,
    }
}

fn make(directory: &Path, name: &str, format: &str, fixed: bool) -> PathBuf {
    let path = directory.join(name);
    let new = new_disk(format, fixed);
    FilesProvider::default().create(&path, &new, &CancelToken::new()).unwrap();
    path
}

#[test]
fn numbers_are_those_of_windows() {
    let directory = tempfile::tempdir().unwrap();
    let provider = FilesProvider::default();
    for (name, format, fixed, numbers) in [
        ("a.vhdx", "vhdx", false, (3, 3)),
        ("b.vhdx", "vhdx", true, (3, 2)),
        ("c.vhd", "vhd", false, (2, 3)),
        ("d.vhd", "vhd", true, (2, 2)),
        ("e.qcow2", "qcow2", false, (0, 3)),
        ("f.vmdk", "vmdk", false, (0, 3)),
        ("g.raw", "raw", false, (0, 2)),
    ] {
        let path = make(directory.path(), name, format, fixed);
        let info = provider.info(&path).unwrap();
        assert_eq!((info.virtual_storage_type, info.provider_sub_type), numbers, "{name}");
        assert_eq!(
            (info.virtual_size_bytes, info.parent_path, info.format.as_str()),
            (8 * MIB, None, format),
            "{name}"
        );
        assert_eq!(info.disk_id.is_some(), numbers.0 != 0, "{name}");
        assert_eq!(info.physical_size_bytes, std::fs::metadata(&path).unwrap().len());
        let again = provider.create(&path, &new_disk(format, fixed), &CancelToken::new());
        assert!(matches!(again, Err(ProviderError::Exists { .. })), "{again:?}");
    }
    let mut sectors = new_disk("vhdx", false);
    sectors.logical_sector_bytes = Some(4096);
    let path = directory.path().join("s.vhdx");
    provider.create(&path, &sectors, &CancelToken::new()).unwrap();
    let info = provider.info(&path).unwrap();
    assert_eq!((info.logical_sector_bytes, info.physical_sector_bytes), (4096, 4096));
    for (format, fixed) in [("iso", false), ("qcow2", true)] {
        let refused = provider.create(
            &directory.path().join("x.img"),
            &new_disk(format, fixed),
            &CancelToken::new(),
        );
        assert!(matches!(refused, Err(ProviderError::Unsupported { .. })), "{refused:?}");
    }
    assert!(!directory.path().join("x.img").exists());
}

#[test]
fn a_child_names_its_parent() {
    let directory = tempfile::tempdir().unwrap();
    let parent = make(directory.path(), "parent.vhdx", "vhdx", false);
    let child = directory.path().join("child.vhdx");
    let open = vmtide_image::OpenOptions::default();
    let device = vmtide_image::open_read_only(&parent, &open).unwrap();
    let file = vmtide_block::RawDevice::open(&parent, vmtide_block::OpenMode::ReadOnly).unwrap();
    let mut create = vmtide_image::CreateOptions::new(vmtide_image::Format::Vhdx, 8 * MIB);
    create.parent = Some(vmtide_image::CreateParent {
        name: "parent.vhdx".into(),
        absolute_path: None,
        format: vmtide_image::Format::Vhdx,
        identity: vmtide_image::identity(&file, vmtide_image::Format::Vhdx).unwrap(),
        device,
    });
    vmtide_image::create_image(&child, &create).unwrap().finish().unwrap();
    let provider = FilesProvider::default();
    let info = provider.info(&child).unwrap();
    assert_eq!(info.provider_sub_type, 4);
    assert_eq!(info.parent_path.as_deref().map(Path::new), Some(parent.as_path()));
    std::fs::remove_file(&parent).unwrap();
    let info = provider.info(&child).unwrap();
    assert!(info.parent_path.unwrap().ends_with("parent.vhdx"));
    assert!(provider.open(&child).is_err());
}

#[test]
fn what_is_no_disk_is_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let provider = FilesProvider::default();
    let missing = directory.path().join("none.vhdx");
    assert!(matches!(provider.info(&missing), Err(ProviderError::NotFound { .. })));
    assert!(matches!(provider.tracking(&missing), Err(ProviderError::NotFound { .. })));
    let text = directory.path().join("notes.txt");
    std::fs::write(&text, "not a disk, and nobody's business").unwrap();
    for result in [
        provider.info(&text).err(),
        provider.open(&text).err(),
        provider.info(directory.path()).err(),
    ] {
        assert!(matches!(result, Some(ProviderError::NotADisk { .. })), "{result:?}");
    }
    let damaged = directory.path().join("damaged.vhdx");
    std::fs::write(&damaged, [b"vhdxfile".as_slice(), &[0xee; 4096]].concat()).unwrap();
    assert!(matches!(provider.info(&damaged), Err(ProviderError::NotADisk { .. })));
    // A guest that writes a signature into its raw disk does not make it another's format.
    let forged = directory.path().join("forged.raw");
    std::fs::write(&forged, [b"QFI\xfb".as_slice(), &[0; 65532]].concat()).unwrap();
    assert_eq!(provider.info(&forged).unwrap().format, "raw");
}

#[test]
fn writes_are_tracked_and_moments_are_frozen() {
    let directory = tempfile::tempdir().unwrap();
    let provider = FilesProvider::default();
    let whole = ByteRange::new(0, 8 * MIB);
    for (name, format) in [("disk.vhdx", "vhdx"), ("disk.raw", "raw")] {
        let path = make(directory.path(), name, format, false);
        let off = provider.tracking(&path).unwrap();
        assert!(!off.enabled && off.most_recent_id.is_empty());
        let answer = provider.changes(&path, "rctX:none", whole);
        assert!(matches!(answer, Err(ProviderError::TrackingDisabled { .. })), "{answer:?}");
        provider.set_tracking(&path, true).unwrap();
        let id = provider.tracking(&path).unwrap().most_recent_id;
        let writer = provider.open_writable(&path).unwrap();
        writer.write_at(&[5; 4096], 3 * MIB).unwrap();
        writer.flush().unwrap();
        assert!(matches!(provider.open_writable(&path), Err(ProviderError::InUse { .. })));
        // While it is written here, it is read and asked through its writer.
        let mut byte = [0];
        provider.open(&path).unwrap().read_at(&mut byte, 3 * MIB).unwrap();
        assert_eq!(byte, [5]);
        let hosted = provider.freeze(std::slice::from_ref(&path)).unwrap();
        writer.write_at(&[6; 4096], 3 * MIB).unwrap();
        hosted.disks()[0].device.read_at(&mut byte, 3 * MIB).unwrap();
        assert_eq!(byte, [5]);
        let second = hosted.disks()[0].tracking_id.clone().unwrap();
        drop((hosted, writer));
        let changed = [ByteRange::new(3 * MIB, 64 << 10)];
        for id in [&id, &second] {
            let page = provider.changes(&path, id, whole).unwrap();
            assert_eq!(
                (page.ranges.as_slice(), page.processed_bytes),
                (&changed[..], whole.length),
                "{name}"
            );
        }
        let state = provider.tracking(&path).unwrap();
        assert!(state.newer_changes && state.most_recent_id == second);
        let frozen = provider.freeze(std::slice::from_ref(&path)).unwrap();
        assert!(matches!(provider.open_writable(&path), Err(ProviderError::InUse { .. })));
        let third = frozen.disks()[0].tracking_id.clone().unwrap();
        drop(frozen);
        assert!(provider.changes(&path, &third, whole).unwrap().ranges.is_empty());
        let unknown = provider.changes(&path, &"w".repeat(255), whole);
        assert!(matches!(unknown, Err(ProviderError::UnknownTrackingId { .. })), "{unknown:?}");
        std::fs::File::options().append(true).open(&path).unwrap().set_len(32 * MIB).unwrap();
        let lost = provider.changes(&path, &third, whole);
        assert!(matches!(lost, Err(ProviderError::TrackingLost { .. })), "{lost:?}");
    }
    let both =
        provider.freeze(&[directory.path().join("disk.raw"), directory.path().join("none.raw")]);
    assert!(both.is_err());
    drop(provider.open_writable(&directory.path().join("disk.raw")).unwrap());
}
