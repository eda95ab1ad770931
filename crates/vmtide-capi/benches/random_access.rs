//! Random reads of a restore point through the C interface, beside the same reads through the Rust interface that stands
//! behind it.
//!
//! ```text
//! cargo bench -p vmtide-capi --bench random_access            a disk of 256 MiB; --mib N for another
//! ```
//!
//! One disk of random bytes is backed up, and opened twice, so that each way has caches of its own. Reads of one length begin
//! anywhere in the disk, the same places in the same order both ways, by one thread and by four. They take turns (A B B A …);
//! the first round warms up. The last column is the median of the rounds' ratios: the C interface's rate over that of Rust.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed measurement")]
#![allow(clippy::cast_precision_loss, reason = "rates are for people")]

use std::ffi::{CString, c_char};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use vmtide::{
    vmtide_backup, vmtide_close, vmtide_image_read, vmtide_repository_init, vmtide_repository_open,
    vmtide_repository_open_disk,
};
use vmtide_block::BlockDevice;
use vmtide_repo::{LocalStore, Repository};

/// Reads of one length in one round, by each thread.
const ROUND_BYTES: u64 = 64 << 20;

/// The most reads of one round, for short ones.
const MOST_READS: u64 = 4_000;

const ROUNDS: usize = 7;

/// Bytes that no program compresses (xorshift).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// `vmtide_backup_options` of vmtide.h: only where state is kept is said.
#[repr(C)]
struct BackupOptions {
    struct_size: u64,
    name: *const c_char,
    format: *const c_char,
    state_directory: *const c_char,
    unused: [u64; 5],
}

fn text(path: &Path) -> CString {
    CString::new(path.to_str().unwrap()).unwrap()
}

/// Makes a repository with one restore point of a disk of this size.
fn back_up(directory: &Path, size_bytes: u64) {
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    let words = (0..size_bytes / 8).flat_map(|_| noise.next().to_le_bytes());
    std::fs::write(directory.join("disk.raw"), words.collect::<Vec<u8>>()).unwrap();
    let (location, disk) = (text(&directory.join("repository")), text(&directory.join("disk.raw")));
    let state = text(&directory.join("state"));
    let options = BackupOptions {
        struct_size: size_of::<BackupOptions>() as u64,
        name: std::ptr::null(),
        format: std::ptr::null(),
        state_directory: state.as_ptr(),
        unused: [0; 5],
    };
    let (null, mut repository, mut summary) = (std::ptr::null_mut(), 0, 0);
    // SAFETY: strings end with a 0, the structure is that of the header, what is to be written may be, the rest is null.
    unsafe {
        assert_eq!(vmtide_repository_init(location.as_ptr(), std::ptr::null(), 0, null), 0);
        let opened = vmtide_repository_open(
            location.as_ptr(),
            std::ptr::null(),
            0,
            &raw mut repository,
            null,
        );
        assert_eq!(opened, 0);
        let made = vmtide_backup(
            repository,
            disk.as_ptr(),
            (&raw const options).cast(),
            std::ptr::null(),
            &raw mut summary,
            null,
        );
        assert_eq!(made, 0);
        assert_eq!(vmtide_close(summary, null), 0);
        assert_eq!(vmtide_close(repository, null), 0);
    }
}

/// The disk of the newest restore point, as a C program has it.
fn open_in_c(directory: &Path) -> u64 {
    let location = text(&directory.join("repository"));
    let point: *const c_char = c"disk@latest".as_ptr();
    let (null, mut repository, mut image) = (std::ptr::null_mut(), 0, 0);
    // SAFETY: as above.
    unsafe {
        let opened = vmtide_repository_open(
            location.as_ptr(),
            std::ptr::null(),
            0,
            &raw mut repository,
            null,
        );
        assert_eq!(opened, 0);
        let opened =
            vmtide_repository_open_disk(repository, point, std::ptr::null(), &raw mut image, null);
        assert_eq!(opened, 0);
    }
    image
}

/// The same, as a Rust program has it.
fn open_in_rust(directory: &Path) -> Arc<dyn BlockDevice> {
    let store = Arc::new(LocalStore::open(directory.join("repository")).unwrap());
    let mut no_password = || -> Result<_, _> { panic!("the repository is not encrypted") };
    let repository = Repository::open(store, &mut no_password).unwrap();
    let point = vmtide_engine::resolve(&repository, "disk@latest").unwrap();
    repository.open_disk(&point, &point.disks[0].id).unwrap()
}

/// Bytes a second of `threads` threads that each read at the same number of places of their own.
fn rate(
    threads: u64,
    size_bytes: u64,
    length: usize,
    seed: u64,
    read: &(impl Fn(&mut [u8], u64) + Sync),
) -> f64 {
    let reads = (ROUND_BYTES / length as u64).min(MOST_READS);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                let mut places = Noise(seed.wrapping_mul(2).wrapping_add(thread * 977 + 1));
                let mut buffer = vec![0; length];
                for _ in 0..reads {
                    let last = (size_bytes - length as u64) / 512;
                    read(&mut buffer, places.next() % (last + 1) * 512);
                }
            });
        }
    });
    (threads * reads * length as u64) as f64 / begun.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let given = words.iter().position(|word| word == "--mib").and_then(|at| words.get(at + 1));
    let size_bytes = given.map_or(256, |mib| mib.parse::<u64>().unwrap()) << 20;
    let directory = tempfile::tempdir().unwrap();
    back_up(directory.path(), size_bytes);
    let (image, device) = (open_in_c(directory.path()), open_in_rust(directory.path()));
    let in_c = |buffer: &mut [u8], offset: u64| {
        let null = std::ptr::null_mut();
        // SAFETY: the buffer has as many bytes as is said.
        let status = unsafe {
            vmtide_image_read(image, offset, buffer.as_mut_ptr().cast(), buffer.len() as u64, null)
        };
        assert_eq!(status, 0);
    };
    let in_rust = |buffer: &mut [u8], offset: u64| device.read_at(buffer, offset).unwrap();
    println!(
        "{:>8} {:>7} {:>12} {:>12} {:>6}",
        "length", "threads", "C MB/s", "Rust MB/s", "ratio"
    );
    for length in [4 << 10, 64 << 10, 1 << 20] {
        for threads in [1, 4] {
            let (mut c, mut rust, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
            for round in 0..=ROUNDS {
                let seed = round as u64 + 1;
                let (first, second);
                if round % 2 == 0 {
                    first = rate(threads, size_bytes, length, seed, &in_c);
                    second = rate(threads, size_bytes, length, seed, &in_rust);
                } else {
                    second = rate(threads, size_bytes, length, seed, &in_rust);
                    first = rate(threads, size_bytes, length, seed, &in_c);
                }
                if round > 0 {
                    c.push(first / 1e6);
                    rust.push(second / 1e6);
                    ratios.push(first / second);
                }
            }
            let (c, rust, ratio) = (median(c), median(rust), median(ratios));
            println!("{length:>8} {threads:>7} {c:>12.0} {rust:>12.0} {ratio:>6.3}");
        }
    }
}
