//! Broken and hostile VMDK images: an error that names the structure, quickly, and no memory by
//! numbers that nobody checked.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use crate::support;

use std::sync::Arc;
use support::vmdk::{Hole, MemoryFiles, StreamEnd, cowd, descriptor, sesparse, stream};
use support::{Random, pattern};
use vmtide_block::{BlockDevice, BlockError, ByteRange, MemoryDevice};
use vmtide_image::DiskImage;
use vmtide_image::vmdk::VmdkImage;

fn open(bytes: Vec<u8>) -> Result<VmdkImage, BlockError> {
    let file = Arc::new(MemoryDevice::from_bytes(bytes));
    VmdkImage::open_device(file, &MemoryFiles::default(), None)
}

/// A hosted sparse header and nothing else, with these fields changed.
fn header(fields: &[(usize, u64, usize)]) -> Vec<u8> {
    let mut bytes = vec![0u8; 65536];
    bytes[..4].copy_from_slice(b"KDMV");
    let usual = [(4, 1, 4), (8, 3, 4), (12, 1 << 21, 8), (20, 128, 8), (44, 512, 4), (56, 21, 8)];
    for (at, value, width) in usual.iter().chain(fields) {
        bytes[*at..at + width].copy_from_slice(&value.to_le_bytes()[..*width]);
    }
    bytes[73..77].copy_from_slice(b"\n \r\n");
    bytes
}

#[test]
fn impossible_headers_are_named() {
    open(header(&[])).unwrap();
    for (fields, word) in [
        (&[(4, 9, 4)][..], "version 9"),
        (&[(4, 0, 4)], "version 0"),
        (&[(12, u64::MAX, 8)], "capacity"),
        (&[(20, 0, 8)], "grain size"),
        (&[(20, 1 << 40, 8)], "grain size"),
        (&[(20, 1 << 20, 8), (8, 0x1_0001, 4)], "grain size"),
        (&[(44, 0, 4)], "entries of a grain table"),
        (&[(44, 0xffff_ffff, 4)], "entries of a grain table"),
        (&[(56, 1 << 60, 8)], "grain directory"),
        (&[(56, 0, 8)], "grain directory"),
        // The directory of the largest disk, in a file of 64 KiB.
        (&[(12, (i64::MAX as u64) / 512, 8), (20, 1, 8), (44, 1, 4)], "grain directory"),
        (&[(28, 1, 8), (36, 1 << 50, 8)], "descriptor"),
        (&[(12, 0, 8)], "capacity 0 at byte 12"),
        (&[(12, 0, 8), (28, 60, 8), (36, 1, 8)], "capacity 0 at byte 12"),
        (&[(8, 0x3_0001, 4), (77, 7, 2)], "compression method 7"),
    ] {
        let error = open(header(fields)).err().unwrap().to_string();
        assert!(error.contains(word), "{error}");
    }
    // What each way of a copy in text mode makes of the newlines.
    for bytes in [b"\r\n \r", b"\n \n\0", b"\r \r\r", b"\n \n\n", b"\r \r\n"] {
        let mut text_mode = header(&[]);
        text_mode[73..77].copy_from_slice(bytes);
        assert!(open(text_mode).err().unwrap().to_string().contains("text mode"), "{bytes:?}");
    }
    for bytes in [[0u8; 4], [0xff; 4], *b"\0\n \r"] {
        let mut never_there = header(&[]);
        never_there[73..77].copy_from_slice(&bytes);
        open(never_there).unwrap();
    }
    assert!(open(vec![]).is_err());
    assert!(
        open(b"# Disk DescriptorFile\n".to_vec()).err().unwrap().to_string().contains("extents")
    );
    assert!(open(vec![0; 2 << 20]).err().unwrap().to_string().contains("descriptor"));
}

#[test]
fn entries_that_lead_out_of_the_file_are_named() {
    let mut bytes = header(&[]);
    bytes[21 * 512..21 * 512 + 4].copy_from_slice(&0x00ff_ffff_u32.to_le_bytes());
    let image = open(bytes).unwrap();
    let error = image.read_at(&mut [0; 512], 0).unwrap_err().to_string();
    assert!(error.contains("grain directory entry 0: 0xffffff"), "{error}");
    image.read_at(&mut [0; 512], 32 << 20).unwrap();
    let mut bytes = header(&[]);
    bytes[21 * 512] = 22;
    bytes[22 * 512 + 4..22 * 512 + 8].copy_from_slice(&0x0fff_ffff_u32.to_le_bytes());
    let image = open(bytes).unwrap();
    image.read_at(&mut [0; 512], 0).unwrap();
    let error = image.read_at(&mut [0; 512], 65536).unwrap_err().to_string();
    assert!(error.contains("grain table 0, entry 1"), "{error}");
    assert!(image.extents(ByteRange::new(65536, 65536)).is_err());
}

#[test]
fn a_second_directory_counts_only_where_the_flag_says_that_it_is_one() {
    // The first directory leads nowhere, the second to a table without grains.
    let mut bytes = header(&[(56, 1 << 40, 8), (48, 30, 8)]);
    bytes[30 * 512] = 40;
    open(bytes.clone()).unwrap().read_at(&mut [0; 512], 0).unwrap();
    bytes[8] = 1;
    let error = open(bytes).err().unwrap().to_string();
    assert!(error.contains("grain directory"), "{error}");
}

#[test]
fn what_is_not_known_is_told_from_what_is_broken() {
    let open_text = |lines: &str| {
        let text = descriptor("custom", None, lines);
        open(text.into_bytes()).err().unwrap()
    };
    let error = open_text("RW 1 VSANSPARSE \"vsan://x\"");
    assert!(matches!(error, BlockError::Unsupported { .. }), "{error:?}");
    assert!(error.to_string().contains("VSANSPARSE"), "{error}");
    let error = open_text("RW many FLAT \"x\" 0");
    assert!(matches!(error, BlockError::Damaged { .. }), "{error:?}");
}

#[test]
fn a_sparse_disk_whose_descriptor_was_wiped_out_is_not_taken_for_one_without_a_parent() {
    // One grain table with nothing in it: where it had a parent, zeros would be read in place of the parent's data.
    let at = [(28, 1, 8), (36, 20, 8), (12, 128, 8)];
    let with_text = |text: &[u8]| {
        let mut bytes = header(&at);
        bytes[512..512 + text.len()].copy_from_slice(text);
        bytes
    };
    for text in [&b""[..], b"\n", b"\0# Disk DescriptorFile\nCID=1\n", b"# Disk DescriptorFile\n"] {
        let error = open(with_text(text)).err().unwrap();
        assert!(matches!(error, BlockError::Damaged { .. }), "{error:?}");
        assert!(error.to_string().contains("RW 128 SPARSE"), "{error}");
        let file = MemoryDevice::from_bytes(with_text(text));
        assert!(vmtide_image::vmdk::info(&file).is_err());
        assert!(vmtide_image::vmdk::parent_link(&file).is_err());
    }
    for text in [&b"CID=1\n"[..], b"parentCID=ffffffff\n", b"RW 128 SPARSE \"x\"\n"] {
        assert_eq!(open(with_text(text)).unwrap().size_bytes(), 65536);
    }
    // By a descriptor of its own, as the error says, and as an extent among others it needs none.
    let text = "# Disk DescriptorFile\nRW 128 SPARSE \"disk.vmdk\"\nRW 1 ZERO\n";
    let files = MemoryFiles::default().with("disk.vmdk", with_text(b""));
    let file = Arc::new(MemoryDevice::from_bytes(text.as_bytes().to_vec()));
    let image = VmdkImage::open_device(file, &files, None).unwrap();
    image.read_at(&mut [0; 65536], 512).unwrap();
}

#[test]
fn an_extent_that_may_not_be_read_is_an_error_only_where_it_is_read() {
    let text = descriptor("custom", None, "RW 1 ZERO\nNOACCESS 4 FLAT \"x\" 0\nRW 1 ZERO");
    let image = open(text.into_bytes()).unwrap();
    image.read_at(&mut [0; 512], 0).unwrap();
    image.read_at(&mut [0; 512], 5 * 512).unwrap();
    let error = image.read_at(&mut [0; 512], 512).unwrap_err().to_string();
    assert!(error.contains("\"NOACCESS 4 ZERO\""), "{error}");
    let text = descriptor("custom", None, "RW 1 ZERO\nNOACCESS 4 ZERO\nRW 1 ZERO");
    let image = open(text.into_bytes()).unwrap();
    image.read_at(&mut [0; 3072], 0).unwrap();
}

#[test]
fn a_short_flat_file_is_refused() {
    let text = descriptor("monolithicFlat", None, "RW 3 FLAT \"f\" 0");
    let files = MemoryFiles::default().with("f", vec![0; 1024]);
    let file = Arc::new(MemoryDevice::from_bytes(text.into_bytes()));
    let error = VmdkImage::open_device(file, &files, None).err().unwrap().to_string();
    assert!(error.contains("3 sectors") && error.contains("1024 bytes"), "{error}");
}

#[test]
fn damage_at_random_never_panics_or_hangs() {
    let content = pattern(2, 300_032);
    let text = descriptor("streamOptimized", None, "RW 586 SPARSE \"x\"");
    let seeds = [
        stream(&content, &text, StreamEnd::Footer),
        stream(&content, &text, StreamEnd::BadFooter),
        cowd(&content, 1),
        sesparse(&content, Hole::Zero),
        header(&[]),
    ];
    let mut random = Random(77);
    let mut buffer = vec![0; 1 << 20];
    for seed in &seeds {
        for _ in 0..400 {
            let mut bytes = seed.clone();
            for _ in 0..=random.below(6) {
                // Mostly where the structures are.
                let most = if random.below(3) == 0 { bytes.len() } else { 2048 };
                let at = usize::try_from(random.below(most as u64)).unwrap();
                bytes[at] = random.next().to_le_bytes()[2];
            }
            if random.below(4) == 0 {
                let length = usize::try_from(random.below(bytes.len() as u64)).unwrap();
                bytes.truncate(length);
            }
            let Ok(image) = open(bytes) else { continue };
            let size = image.size_bytes();
            for at in [0, size / 2, size.saturating_sub(1 << 20)] {
                let length = usize::try_from((size - at).min(1 << 20)).unwrap();
                let _ = image.read_at(&mut buffer[..length], at);
                let _ = image.extents(ByteRange::from_bounds(at, size));
                let _ = image.layout(ByteRange::from_bounds(at, size));
            }
        }
    }
}
