//! What the interoperability tests share: QEMU's tools, patterns, comparison.
#![allow(dead_code, reason = "each test program uses a part of what they share")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test"
)]

pub mod crash;
pub mod vhdx;
pub mod vmdk;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use vmtide_block::{BlockDevice, ByteRange, CancelToken, for_each_extent};

/// Runs a tool that must be installed (`scripts/test.sh` installs all) and must succeed.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = try_run(program, arguments);
    assert!(
        output.status.success(),
        "{program} {arguments:?} failed: {}\n{}",
        output.status,
        text(&output)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a tool that must be installed.
pub fn try_run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program} cannot be run ({error}): install QEMU's tools"))
}

pub fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

pub fn qemu_img(arguments: &[&str]) -> String {
    run("qemu-img", arguments)
}

/// Runs qemu-io commands on an image.
pub fn qemu_io(image: &Path, options: &[&str], commands: &[&str]) -> String {
    let mut arguments: Vec<&str> = options.to_vec();
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(path(image));
    let out = run("qemu-io", &arguments);
    assert!(!out.contains("rror"), "{commands:?}: {out}");
    out
}

pub fn path(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

/// Succeeds where `qemu-img check` finds neither errors nor leaks.
pub fn check_clean(image: &Path) {
    let out = try_run("qemu-img", &["check", "-f", "qcow2", path(image)]);
    assert!(out.status.success(), "qemu-img check: {}", text(&out));
}

/// Succeeds where `qemu-img check` finds at most leaks.
pub fn check_no_damage(image: &Path) {
    let out = try_run("qemu-img", &["check", "-f", "qcow2", path(image)]);
    // 0: clean; 3: leaked clusters only (qemu-img(1)).
    assert!(matches!(out.status.code(), Some(0 | 3)), "qemu-img check: {}", text(&out));
}

/// The whole disk, read in pieces of odd sizes.
pub fn read_all(disk: &dyn BlockDevice) -> Vec<u8> {
    let size = usize::try_from(disk.size_bytes()).unwrap();
    let mut bytes = vec![0xaa; size];
    let mut at = 0;
    let mut step = 1;
    while at < size {
        let end = (at + step).min(size);
        disk.read_at(&mut bytes[at..end], at as u64).unwrap();
        at = end;
        step = (step * 7 + 13) % 700_001 + 1;
    }
    bytes
}

/// Succeeds where every extent that claims zeros is zero in `expected`.
pub fn check_extents(disk: &dyn BlockDevice, expected: &[u8]) {
    let whole = ByteRange::new(0, disk.size_bytes());
    for_each_extent(disk, whole, &CancelToken::new(), |extent| {
        if extent.kind.reads_as_zero() {
            let start = usize::try_from(extent.range.offset).unwrap();
            let end = usize::try_from(extent.range.end()).unwrap();
            assert!(vmtide_block::is_zero(&expected[start..end]), "{extent:?} is not zero");
        }
        Ok(())
    })
    .unwrap();
}

/// A small reproducible generator of pseudo-random numbers (xorshift64*).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next().to_le_bytes()[3]).collect()
    }
}

/// Whether the sector bitmap of every block of a dynamic VHD says that all its sectors are present (Microsoft's "Virtual
/// Hard Disk Image Format Specification", "Block Allocation Table and Data Blocks"). True for other VHDs.
pub fn vhd_bitmaps_are_whole(image: &[u8]) -> bool {
    const DYNAMIC: usize = 3;
    let number = |at: usize| {
        usize::try_from(u32::from_be_bytes(image[at..at + 4].try_into().unwrap())).unwrap()
    };
    if !image.starts_with(b"conectix") || number(60) != DYNAMIC {
        return true;
    }
    // The low halves of the header's and the table's place: both are near the start of the file.
    let header = number(20);
    let (table, entries, block_bytes) =
        (number(header + 20), number(header + 28), number(header + 32));
    let bitmap_bytes = (block_bytes / 512).div_ceil(8).next_multiple_of(512);
    let block = |entry: usize| number(table + entry * 4);
    (0..entries).map(block).filter(|sector| *sector != 0xffff_ffff).all(|sector| {
        let bitmap = &image[sector * 512..sector * 512 + bitmap_bytes];
        bitmap[..(block_bytes / 512).div_ceil(8)].iter().all(|byte| *byte == 0xff)
    })
}

/// A disk of `size` bytes with runs of data, zeros and repeated bytes, some of them short.
pub fn pattern(seed: u64, size: usize) -> Vec<u8> {
    let mut random = Random(seed | 1);
    let mut bytes = Vec::with_capacity(size);
    while bytes.len() < size {
        let length = usize::try_from(random.below(200_000) + 1).unwrap();
        match random.below(4) {
            0 => bytes.extend(random.bytes(length)),
            1 => bytes.extend(std::iter::repeat_n(random.next().to_le_bytes()[0], length)),
            _ => bytes.resize(bytes.len() + length, 0),
        }
    }
    bytes.truncate(size);
    bytes
}

/// A directory and a raw file with this content in it.
pub fn raw_file(directory: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}
