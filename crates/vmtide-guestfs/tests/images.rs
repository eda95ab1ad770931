//! Files in images that others made: known content leads to the file that has it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

use std::path::{Path, PathBuf};
use std::process::Command;
use vmtide_block::{BlockDevice, ByteRange, CancelToken, OpenMode, RangeSet, RawDevice};
use vmtide_guestfs::files_at;

/// The directory of the sample images; a notice and nothing where it is absent.
fn images() -> Option<PathBuf> {
    let directory = std::env::var_os("VMTIDE_TEST_IMAGES").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/images"),
        PathBuf::from,
    );
    if directory.join("MANIFEST.tsv").is_file() {
        return Some(directory);
    }
    println!("NOTICE: no sample images at {}: nothing was tested", directory.display());
    None
}

#[test]
fn known_content_leads_to_its_file() {
    let Some(images) = images() else { return };
    let directory = tempfile::tempdir().unwrap();
    // Image, partition's offset, volume, file system.
    let samples = [
        ("ext2.raw", None, "ext2"),
        ("ext4.raw", None, "ext4"),
        ("xfs.raw", None, "xfs"),
        ("lvm.raw", Some("test_volume_group/test_logical_volume1"), "ext2"),
    ];
    for (name, volume, kind) in samples {
        let path = directory.path().join(name);
        let packed = images.join("fs").join(format!("{name}.zst"));
        let unpacked = Command::new("zstd").arg("-qdo").arg(&path).arg(&packed).status().unwrap();
        assert!(unpacked.success(), "{}", packed.display());
        let bytes = std::fs::read(&path).unwrap();
        let text = b"place,user,password";
        let offset = bytes.windows(text.len()).position(|window| window == text).unwrap() as u64;
        let device = RawDevice::open(&path, OpenMode::ReadOnly).unwrap();
        let whole = ByteRange::new(0, device.size_bytes());
        let asked = RangeSet::from(vec![ByteRange::new(offset, 1)]);
        let found = files_at(&device, whole, &asked, &CancelToken::new()).unwrap();
        let [found] = &found[..] else { panic!("{name}: {found:?}") };
        assert_eq!((found.volume.as_deref(), found.file_system), (volume, kind), "{name}");
        let paths: Vec<_> = found.files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(paths, ["/passwords.txt"], "{name}");
    }
}
