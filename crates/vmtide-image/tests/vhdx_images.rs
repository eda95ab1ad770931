//! VHDX images that hypervisors and tools made, by the digest of what their guests see.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

use crate::support;

use ring::digest::{Context, SHA256};
use std::path::{Path, PathBuf};
use support::check_extents;
use vmtide_block::{BlockDevice, ByteRange, CancelToken, for_each_extent};
use vmtide_image::{
    BackingPolicy, Format, LogState, OpenOptions, image_info, open_read_only, probe,
};

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

/// Unpacks all sample VHDX images into a new directory.
fn unpack(images: &Path) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(images.join("vhdx")).unwrap() {
        let path = entry.unwrap().path();
        let target = directory.path().join(path.file_stem().unwrap());
        let packed = std::fs::File::open(&path).unwrap();
        let mut file = std::fs::File::create(target).unwrap();
        zstd::stream::copy_decode(packed, &mut file).unwrap();
    }
    directory
}

/// SHA-256 over the offsets and bytes of all 64 KiB chunks that are not zero, and the size.
fn digest(disk: &dyn BlockDevice) -> String {
    const CHUNK: u64 = 64 << 10;
    let mut context = Context::new(&SHA256);
    let mut buffer = vec![0u8; 64 << 10];
    let mut next = 0;
    let whole = ByteRange::new(0, disk.size_bytes());
    for_each_extent(disk, whole, &CancelToken::new(), |extent| {
        if extent.kind.reads_as_zero() {
            return Ok(());
        }
        let mut at = (extent.range.offset / CHUNK * CHUNK).max(next);
        while at < extent.range.end() {
            let length = usize::try_from(CHUNK.min(disk.size_bytes() - at)).unwrap();
            disk.read_at(&mut buffer[..length], at)?;
            if !vmtide_block::is_zero(&buffer[..length]) {
                context.update(&at.to_le_bytes());
                context.update(&buffer[..length]);
            }
            at += CHUNK;
        }
        next = at;
        Ok(())
    })
    .unwrap();
    context.update(&disk.size_bytes().to_le_bytes());
    context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn beside() -> OpenOptions {
    OpenOptions { backing: BackingPolicy::SameDirectory, ..OpenOptions::default() }
}

#[test]
fn every_sample_yields_its_recorded_digest() {
    let Some(images) = images() else { return };
    let directory = unpack(&images);
    let manifest = std::fs::read_to_string(images.join("MANIFEST.tsv")).unwrap();
    let mut seen = 0;
    for line in manifest.lines().filter(|line| line.starts_with("vhdx/")) {
        let columns: Vec<&str> = line.split('\t').collect();
        let image = directory.path().join(columns[0].trim_start_matches("vhdx/"));
        assert_eq!(probe(&image).unwrap(), Format::Vhdx);
        let before = std::fs::read(&image).unwrap();
        let disk = open_read_only(&image, &beside()).unwrap();
        assert_eq!(disk.size_bytes().to_string(), columns[3], "{}", columns[0]);
        assert_eq!(digest(&*disk), columns[5], "{}", columns[0]);
        if disk.size_bytes() <= 4 << 20 {
            let mut bytes = vec![0; usize::try_from(disk.size_bytes()).unwrap()];
            disk.read_at(&mut bytes, 0).unwrap();
            check_extents(&*disk, &bytes);
        }
        assert!(std::fs::read(&image).unwrap() == before, "{} was changed", columns[0]);
        seen += 1;
    }
    assert!(seen >= 8, "only {seen} VHDX images in the manifest");
}

#[test]
fn what_samples_say_of_themselves() {
    let Some(images) = images() else { return };
    let directory = unpack(&images);
    let info = |name: &str| image_info(directory.path().join(name), None).unwrap();
    let dirty = info("iotest-dirtylog-10G-4M.vhdx");
    assert_eq!((dirty.log, dirty.dirty), (Some(LogState::Dirty), true));
    assert_eq!(dirty.block_size_bytes, Some(1 << 20));
    let fixed = info("ntfs-fixed.vhdx");
    assert_eq!(fixed.subformat.as_deref(), Some("fixed"));
    assert_eq!(fixed.log, Some(LogState::Empty));
    assert_eq!(fixed.block_size_bytes, Some(2 << 20));
    let (child, parent) = (info("fat-differential.vhdx"), info("fat-parent.vhdx"));
    assert_eq!(child.subformat.as_deref(), Some("differencing"));
    assert_eq!(parent.subformat.as_deref(), Some("fixed"));
    assert_eq!(child.identifiers["virtual_disk_id"], parent.identifiers["virtual_disk_id"]);
    let backing = child.backing.unwrap();
    assert_eq!(backing.identity.as_ref(), Some(&parent.identifiers["data_write_guid"]));
    assert!(backing.name.starts_with(r".\"), "{backing:?}");
    assert!(parent.creator.unwrap().contains("Windows"));
}

#[test]
fn a_child_without_its_parent_is_refused() {
    let Some(images) = images() else { return };
    let directory = unpack(&images);
    let child = directory.path().join("fat-differential.vhdx");
    let refused = open_read_only(&child, &OpenOptions::default()).err().unwrap().to_string();
    assert!(refused.contains("depends on the parent"), "{refused}");
    let parent = directory.path().join("fat-parent.vhdx");
    // A child that does not say which file its parent is takes none, wherever it lies.
    let mut bytes = std::fs::read(&child).unwrap();
    let key: Vec<u8> = "parent_linkage".encode_utf16().flat_map(u16::to_le_bytes).collect();
    for at in 0..bytes.len() - key.len() {
        if bytes[at..].starts_with(&key) {
            bytes[at] = b'q';
        }
    }
    let nameless = directory.path().join("nameless.vhdx");
    std::fs::write(&nameless, bytes).unwrap();
    let refused = open_read_only(&nameless, &beside()).err().unwrap().to_string();
    assert!(refused.contains("which the locator lacks"), "{refused}");
    std::fs::remove_file(&parent).unwrap();
    let missing = open_read_only(&child, &beside()).err().unwrap().to_string();
    assert!(missing.contains("was not found"), "{missing}");
    std::fs::copy(directory.path().join("ext2.vhdx"), parent).unwrap();
    let wrong = open_read_only(&child, &beside()).err().unwrap().to_string();
    assert!(wrong.contains("the parent must be"), "{wrong}");
}
