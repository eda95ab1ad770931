//! VHDs that real hypervisors and tools made, by the digest of what their guests see.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

use crate::support;

use ring::digest::{Context, SHA256};
use std::path::{Path, PathBuf};
use support::check_extents;
use vmtide_block::{BlockDevice, ByteRange, CancelToken, for_each_extent};
use vmtide_image::{
    BackingPolicy, Format, OpenOptions, Repair, Severity, check_image, image_info, open_chain,
    open_read_only, open_writable,
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

/// Unpacks all sample VHDs into a new directory.
fn unpack(images: &Path) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(images.join("vhd")).unwrap() {
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
    for line in manifest.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let Some(name) = fields[0].strip_prefix("vhd/") else { continue };
        let path = directory.path().join(name);
        let disk = open_read_only(&path, &beside()).unwrap();
        assert_eq!(disk.size_bytes(), fields[3].parse::<u64>().unwrap(), "{name}");
        assert_eq!(digest(&*disk), fields[5], "{name}");
        if disk.size_bytes() < 100 << 20 {
            check_extents(&*disk, &support::read_all(&*disk));
        }
        let report = check_image(&path, &OpenOptions::default(), Repair::Nothing).unwrap();
        let bad = report.problems.iter().any(|problem| problem.severity == Severity::Error);
        assert!(!bad, "{name}: {report:?}");
        // A writer opens it, and changes nothing by that.
        let writer = open_writable(&path, &beside()).unwrap();
        assert_eq!(digest(&*writer), fields[5], "{name}, writer");
        seen += 1;
    }
    assert!(seen >= 5, "the manifest lists {seen} VHDs");
}

#[test]
fn samples_say_what_they_are() {
    let Some(images) = images() else { return };
    let directory = unpack(&images);
    let info = |name: &str| image_info(directory.path().join(name), None).unwrap();
    let child = info("fat-differential.vhd");
    assert_eq!(child.format, Format::Vhd);
    assert_eq!(child.subformat.as_deref(), Some("differencing"));
    assert_eq!(child.creator.as_deref(), Some("win 10.0"));
    assert_eq!(child.block_size_bytes, Some(2 << 20));
    let parent = info("fat-parent.vhd");
    assert_eq!(child.identifiers["parent_unique_id"], parent.identifiers["unique_id"]);
    let backing = child.backing.unwrap();
    assert_eq!(backing.name, ".\\fat-parent.vhd");
    assert_eq!(backing.identity.as_ref(), parent.identifiers.get("unique_id"));
    assert!(backing.other_names[0].starts_with("C:\\"), "{backing:?}");
    assert_eq!(parent.subformat.as_deref(), Some("fixed"));
    let hyperv = info("hyperv2012r2-dynamic.vhd");
    assert_eq!((hyperv.size_bytes, hyperv.dirty), (127 << 30, false));
    assert_eq!(hyperv.creator.as_deref(), Some("win 6.3"));
    assert_eq!(info("ext2.vhd").creator.as_deref(), Some("qemu 5.3"));
}

#[test]
fn a_child_without_its_parent_is_refused() {
    let Some(images) = images() else { return };
    let directory = unpack(&images);
    let child = directory.path().join("fat-differential.vhd");
    let error = open_read_only(&child, &OpenOptions::default()).err().unwrap().to_string();
    assert!(error.contains("fat-parent.vhd") && error.contains("5fa21a55"), "{error}");
    assert_eq!(open_chain(&child, &beside()).unwrap().len(), 2);
    // Another image under the parent's name is not the parent.
    std::fs::copy(directory.path().join("ntfs-fixed.vhd"), directory.path().join("fat-parent.vhd"))
        .unwrap();
    let error = open_read_only(&child, &beside()).err().unwrap().to_string();
    assert!(error.contains("5fa21a55") && error.contains("be061b15"), "{error}");
    std::fs::remove_file(directory.path().join("fat-parent.vhd")).unwrap();
    let error = open_read_only(&child, &beside()).err().unwrap().to_string();
    assert!(error.contains("not found"), "{error}");
}
