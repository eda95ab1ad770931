//! Damaged and hostile VHDs: an error that names the structure, never a panic, a hang or a large
//! allocation.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

use crate::support;

use std::path::Path;
use std::sync::Arc;
use support::Random;
use vmtide_block::{BlockDevice, BlockError, ByteRange, MemoryDevice, WritableBlockDevice};
use vmtide_image::vhd::{VhdCreateOptions, VhdImage, VhdKind, VhdParent, VhdWriter};
use vmtide_image::{
    BackingPolicy, DiskImage, ImageWriter, OpenOptions, Repair, check_image, image_info,
    open_read_only,
};

const SIZE: u64 = 300_032;
const HEADER: usize = 512;
const TABLE: usize = 1536;

/// The one's complement sum that footers and headers carry, put right.
fn seal(bytes: &mut [u8], start: usize, length: usize, field: usize) {
    bytes[start + field..start + field + 4].fill(0);
    let sum = bytes[start..start + length].iter().fold(0u32, |sum, byte| sum + u32::from(*byte));
    bytes[start + field..start + field + 4].copy_from_slice(&(!sum).to_be_bytes());
}

fn image(differencing: bool) -> Vec<u8> {
    let kind = match differencing {
        true => VhdKind::Differencing(VhdParent {
            name: "parent.vhd".into(),
            absolute_path: Some("C:\\parent.vhd".into()),
            identity: "5fa21a55-f394-aa4d-9958-1951a67d5540".into(),
            device: Arc::new(MemoryDevice::new(300_032)),
        }),
        false => VhdKind::Dynamic,
    };
    let options =
        VhdCreateOptions { kind, block_size_bytes: 16 << 10, ..VhdCreateOptions::new(SIZE) };
    let memory = Arc::new(MemoryDevice::new(0));
    let writer = VhdWriter::create_device(memory.clone(), &options).unwrap();
    writer.write_at(&[5; 100_000], 20_000).unwrap();
    writer.finish().unwrap();
    memory.to_bytes()
}

/// Changes the header and the footers, and puts their checksums right.
fn changed(mut bytes: Vec<u8>, change: impl Fn(&mut [u8])) -> Vec<u8> {
    change(&mut bytes);
    let end = bytes.len() - 512;
    seal(&mut bytes, HEADER, 1024, 36);
    for footer in [0, end] {
        seal(&mut bytes, footer, 512, 64);
    }
    bytes
}

/// Everything that a reader of any kind does; what comes out counts as little as whether.
fn use_all(bytes: &[u8]) -> vmtide_block::Result<()> {
    let parent: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::new(300_000));
    let file = Arc::new(MemoryDevice::from_bytes(bytes.to_vec()));
    let disk = VhdImage::open_device(file, Some(parent))?;
    let size = disk.size_bytes();
    let mut buffer = vec![0; 100_000];
    for at in [0, 13_000, 20_000, 250_000, size / 2, size.saturating_sub(100_000)] {
        let length = usize::try_from(size.saturating_sub(at)).unwrap().min(buffer.len());
        disk.read_at(&mut buffer[..length], at.min(size))?;
    }
    let near = ByteRange::new(0, size.min(1 << 30));
    disk.extents(near)?;
    disk.layout(near)?;
    Ok(())
}

fn error(bytes: &[u8]) -> String {
    let error = use_all(bytes).err().unwrap();
    assert!(matches!(error, BlockError::Damaged { .. }), "{error:?}");
    error.to_string()
}

#[test]
fn each_broken_field_is_named() {
    let good = image(false);
    assert!(use_all(&good).is_ok());
    let end = good.len() - 512;
    let put = |at: usize, value: &'static [u8]| {
        move |bytes: &mut [u8]| bytes[at..at + value.len()].copy_from_slice(value)
    };
    let both = |at: usize, value: &'static [u8]| {
        move |bytes: &mut [u8]| {
            bytes[at..at + value.len()].copy_from_slice(value);
            bytes[end + at..end + at + value.len()].copy_from_slice(value);
        }
    };
    let cases: [(&str, Vec<u8>); 12] = [
        ("disk type 9", changed(good.clone(), both(60, &[0, 0, 0, 9]))),
        ("version 0x00020000", changed(good.clone(), both(12, &[0, 2, 0, 0]))),
        ("dynamic header at 0xffff", changed(good.clone(), both(16, &[0xff; 8]))),
        ("signature", changed(good.clone(), both(16, &[0, 0, 0, 0, 0, 0, 0, 0]))),
        ("needs", changed(good.clone(), both(48, &[0, 0, 1, 0, 0, 0, 0, 0]))),
        ("cxsparse", changed(good.clone(), put(HEADER, b"CXSPARSE"))),
        ("block table", changed(good.clone(), put(HEADER + 16, &[0xff; 8]))),
        ("version 0x00000000", changed(good.clone(), put(HEADER + 24, &[0; 4]))),
        ("needs", changed(good.clone(), put(HEADER + 28, &[0, 0, 0, 1]))),
        ("block size", changed(good.clone(), put(HEADER + 32, &[0, 0, 0, 0]))),
        ("entry 1", changed(good.clone(), put(TABLE + 4, &[0, 0, 0, 0]))),
        ("past the end", changed(good.clone(), put(TABLE + 8, &[0x7f, 0xff, 0, 0]))),
    ];
    for (text, bytes) in cases {
        let found = error(&bytes);
        assert!(found.contains(text), "{text:?}: {found}");
    }
    assert!(error(&good[..300]).contains("footer"));
    let mut both_sums = good.clone();
    both_sums[70] ^= 1;
    both_sums[end + 70] ^= 1;
    let found = error(&both_sums);
    assert!(found.contains("checksum") && found.contains("copy at 0"), "{found}");
}

#[test]
fn a_fixed_disk_that_is_cut_short_is_refused() {
    let memory = Arc::new(MemoryDevice::new(0));
    let options = VhdCreateOptions { kind: VhdKind::Fixed, ..VhdCreateOptions::new(SIZE) };
    VhdWriter::create_device(memory.clone(), &options).unwrap();
    let bytes = memory.to_bytes();
    assert!(use_all(&bytes).is_ok());
    let short = [&bytes[..1000], &bytes[bytes.len() - 512..]].concat();
    assert!(error(&short).contains("truncated"));
    // Where the guest wrote a footer into its first sector, the one at the end counts.
    let mut fooled = bytes.clone();
    fooled[..512].copy_from_slice(&image(false)[..512]);
    let disk = VhdImage::open_device(Arc::new(MemoryDevice::from_bytes(fooled)), None).unwrap();
    assert_eq!(disk.size_bytes(), SIZE);
    let mut sector = [0; 8];
    disk.read_at(&mut sector, 0).unwrap();
    assert_eq!(&sector, b"conectix");
}

#[test]
fn what_a_write_would_destroy_is_not_written() {
    let good = image(false);
    let entry = |number: usize| {
        u32::from_be_bytes(good[TABLE + number * 4..TABLE + number * 4 + 4].try_into().unwrap())
    };
    for (text, value) in [
        ("shares bytes with block 1", entry(1)),
        ("shares bytes with block 1", entry(1) + 1),
        ("shares bytes with the block table", 3),
        ("shares bytes with the dynamic header", 1),
        ("shares bytes with the footer copy", 0),
        ("past the", 0xfff_ffff),
    ] {
        let bytes = changed(good.clone(), |bytes| {
            bytes[TABLE + 12..TABLE + 16].copy_from_slice(&value.to_be_bytes());
        });
        let file = Arc::new(MemoryDevice::from_bytes(bytes.clone()));
        let refused = VhdWriter::open_device(file.clone(), None).err().unwrap();
        assert!(matches!(refused, BlockError::Damaged { .. }));
        let refused = refused.to_string();
        assert!(refused.contains(text) && refused.contains("entry 3"), "{text:?}: {refused}");
        assert!(file.to_bytes() == bytes);
        let directory = tempfile::tempdir().unwrap();
        let path = support::raw_file(directory.path(), "image.vhd", &bytes);
        let report = check_image(&path, &OpenOptions::default(), Repair::All).unwrap();
        assert!(report.errors >= 1, "{report:?}");
        assert!(report.problems.iter().any(|problem| problem.detail.contains(text)));
    }
}

/// Writes to an image made of these bytes, if it opens; what it then holds must be read back.
fn write_all(bytes: &[u8]) {
    let parent: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::new(300_000));
    let memory = Arc::new(MemoryDevice::from_bytes(bytes.to_vec()));
    let Ok(writer) = VhdWriter::open_device(memory.clone(), Some(parent.clone())) else { return };
    let size = writer.size_bytes();
    // Blocks may be of 2 GiB, and fixed disks of any size: not in memory.
    let small = writer.allocation_unit_bytes().is_none_or(|bytes| bytes <= 1 << 20);
    if size < 100_000 || !small {
        return;
    }
    let data = [7; 50_000];
    for at in [0, 33_333, size - 50_000] {
        if writer.write_at(&data, at).is_err() {
            return;
        }
    }
    if writer.finish().is_err() {
        return;
    }
    let reader = VhdImage::open_device(memory, Some(parent)).unwrap();
    let mut back = [0; 50_000];
    for at in [33_333, size - 50_000] {
        reader.read_at(&mut back, at).unwrap();
        assert!(back == data, "at {at}");
    }
}

#[test]
fn random_damage_is_survived() {
    let mut random = Random(77);
    for differencing in [false, true] {
        let good = image(differencing);
        for _ in 0..1500 {
            let mut bytes = good.clone();
            let structures = [(0, 512), (HEADER, 1024), (TABLE, 200), (good.len() - 512, 512)];
            for _ in 0..=random.below(4) {
                let (start, length) = structures[usize::try_from(random.below(4)).unwrap()];
                let at = start + usize::try_from(random.below(length)).unwrap();
                bytes[at] = random.next().to_le_bytes()[0];
            }
            if random.below(4) != 0 {
                bytes = changed(bytes, |_| ());
            }
            if random.below(8) == 0 {
                bytes.truncate(usize::try_from(random.below(bytes.len() as u64)).unwrap());
            }
            let _ = use_all(&bytes);
            write_all(&bytes);
        }
    }
}

#[test]
fn paths_to_anywhere_are_followed_only_as_the_policy_says() {
    let directory = tempfile::tempdir().unwrap();
    let secret = directory.path().join("secret");
    std::fs::write(&secret, [1; 4096]).unwrap();
    let inside = directory.path().join("images");
    std::fs::create_dir(&inside).unwrap();
    let options = VhdCreateOptions {
        kind: VhdKind::Differencing(VhdParent {
            name: "../secret".into(),
            absolute_path: Some(secret.to_str().unwrap().into()),
            identity: "5fa21a55-f394-aa4d-9958-1951a67d5540".into(),
            device: Arc::new(MemoryDevice::new(300_032)),
        }),
        ..VhdCreateOptions::new(SIZE)
    };
    let path = inside.join("image.vhd");
    VhdWriter::create(&path, &options).unwrap().finish().unwrap();
    let names = image_info(&path, None).unwrap().backing.unwrap();
    assert_eq!(names.name, "..\\secret");
    for (policy, text) in [
        (BackingPolicy::Refuse, "was not opened"),
        (BackingPolicy::SameDirectory, "was not found"),
        // It is looked at, and is no VHD.
        (BackingPolicy::Allow, "no usable footer"),
    ] {
        let open = OpenOptions { backing: policy, ..OpenOptions::default() };
        let refused = open_read_only(&path, &open).err().unwrap().to_string();
        assert!(refused.contains(text), "{policy:?}: {refused}");
    }
    assert!(Path::new(&secret).exists());
}
