//! The fuzz target over its seeds and mutations of them. With `VMTIDE_WRITE_SEEDS=1` the seeds are made anew, by the makers of
//! the file systems.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed unwrap is a failed test")]

use std::path::{Path, PathBuf};
use std::process::Command;
use vmtide_guestfs::fuzzing::{SECTOR_BYTES, file_system};

fn home() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/guestfs")
}

/// The sectors of an image that are not zeros, with their numbers; not more than enough for a seed.
fn sectors(image: &[u8]) -> Vec<u8> {
    let mut seed = Vec::new();
    for (number, sector) in (0_u16..).zip(image.chunks_exact(SECTOR_BYTES)) {
        if sector.iter().any(|byte| *byte != 0) && seed.len() < 48 << 10 {
            seed.extend(number.to_le_bytes());
            seed.extend(sector);
        }
    }
    seed
}

fn make(name: &str, program: &str, options: &[&str], bytes: u64) {
    let directory = tempfile::tempdir().unwrap();
    let (root, image) = (directory.path().join("root"), directory.path().join("image"));
    std::fs::create_dir_all(root.join("some/where")).unwrap();
    std::fs::write(root.join("some/where/file"), [7; 20_000]).unwrap();
    std::fs::hard_link(root.join("some/where/file"), root.join("other")).unwrap();
    std::fs::File::create(&image).unwrap().set_len(bytes).unwrap();
    let mut command = Command::new(program);
    command.args(options);
    if program.ends_with("mke2fs") {
        command.arg("-d").arg(&root);
    }
    assert!(command.arg(&image).status().unwrap().success(), "{command:?}");
    if program.ends_with("mkntfs") {
        let mut copy = Command::new("/sbin/ntfscp");
        copy.arg("-q").arg(&image).arg(root.join("other")).arg("other");
        assert!(copy.status().unwrap().success());
    }
    std::fs::create_dir_all(home()).unwrap();
    std::fs::write(home().join(name), sectors(&std::fs::read(&image).unwrap())).unwrap();
}

/// A file system in a logical volume of two segments; needs root, for a loop device.
fn make_in_lvm(name: &str) {
    const KIB: usize = 1 << 10;
    let directory = tempfile::tempdir().unwrap();
    let (image, inner) = (directory.path().join("image"), directory.path().join("inner"));
    std::fs::File::create(&image).unwrap().set_len(2 << 20).unwrap();
    let run = |program: &str, words: &[&str]| {
        let done = Command::new(program).args(words).output().unwrap();
        assert!(done.status.success(), "{program} {words:?}: {done:?}");
        String::from_utf8(done.stdout).unwrap().trim().to_owned()
    };
    run("/sbin/mke2fs", &["-q", "-F", "-b", "1024", "-N", "32", inner.to_str().unwrap(), "512"]);
    let device = run("/sbin/losetup", &["--show", "-f", image.to_str().unwrap()]);
    let config = format!(
        "devices{{use_devicesfile=0 filter=[\"a|{device}|\",\"r|.*|\"]}} backup{{backup=0 archive=0}} global{{activation=0}}"
    );
    let lvm = |words: &[&str]| run("/sbin/lvm", &[words, &["--config", &config]].concat());
    lvm(&["pvcreate", "--metadatasize", "64k", "--dataalignment", "64k", &device]);
    lvm(&["vgcreate", "-s", "64k", "group", &device]);
    let create = |name| lvm(&["lvcreate", "-an", "-Zn", "-Wn", "-l", "4", "-n", name, "group"]);
    create("first");
    create("second");
    lvm(&["lvextend", "-l", "+4", "group/first"]);
    run("/sbin/losetup", &["-d", &device]);
    let (mut disk, inner) = (std::fs::read(&image).unwrap(), std::fs::read(&inner).unwrap());
    disk[128 * KIB..384 * KIB].copy_from_slice(&inner[..256 * KIB]);
    disk[640 * KIB..896 * KIB].copy_from_slice(&inner[256 * KIB..]);
    std::fs::write(home().join(name), sectors(&disk)).unwrap();
}

/// The beginning of a file system that is larger than the fuzzer's disk: all that leads to its inodes.
fn make_xfs(name: &str, metadata: &str) {
    let directory = tempfile::tempdir().unwrap();
    let (image, plan) = (directory.path().join("image"), directory.path().join("plan"));
    let file = directory.path().join("file");
    std::fs::write(&file, [7; 20_000]).unwrap();
    let line = |name: &str| format!("{name} ---644 0 0 {}\n", file.display());
    let many: String = (0..9).map(|number| line(&format!("a-file-{number}"))).collect();
    let plan_text = format!("/boot\n0 0\nd--755 0 0\n{many}d d--755 0 0\n{}$\n$\n", line("one"));
    std::fs::write(&plan, plan_text).unwrap();
    std::fs::File::create(&image).unwrap().set_len(320 << 20).unwrap();
    let mut command = Command::new("/sbin/mkfs.xfs");
    command.args(["-q", "-f", "-i", "sparse=0", "-m", metadata, "-p"]).arg(&plan).arg(&image);
    assert!(command.status().unwrap().success(), "{command:?}");
    std::fs::write(home().join(name), sectors(&std::fs::read(&image).unwrap()[..2 << 20])).unwrap();
}

fn write_seeds() {
    let ext = |name, options: &[&str]| {
        make(
            name,
            "/sbin/mke2fs",
            &[&["-q", "-F", "-b", "1024", "-N", "32"], options].concat(),
            400 << 10,
        );
    };
    ext("ext2", &["-t", "ext2"]);
    ext("ext4", &["-t", "ext4", "-O", "^has_journal,^resize_inode"]);
    ext("ext4-meta-bg", &["-t", "ext4", "-O", "^has_journal,^resize_inode,meta_bg", "-I", "128"]);
    make("ntfs", "/sbin/mkntfs", &["-q", "-F", "-f", "-c", "512"], 2 << 20);
    make_in_lvm("lvm");
    make_xfs("xfs", "crc=1");
    make_xfs("xfs-4", "crc=0,finobt=0,rmapbt=0,reflink=0");
}

#[test]
fn seeds_and_mutations_of_them_end() {
    if std::env::var_os("VMTIDE_WRITE_SEEDS").is_some() {
        write_seeds();
    }
    let mut state = 0x5EED_u64;
    let mut next = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below as u64).unwrap()
    };
    let mut seeds = 0;
    for entry in std::fs::read_dir(home()).unwrap() {
        let path = entry.unwrap().path();
        let seed = std::fs::read(&path).unwrap();
        seeds += 1;
        assert!(file_system(&seed) > 1, "{}", path.display());
        for _ in 0..150 {
            let mut mutated = seed.clone();
            for _ in 0..=next(6) {
                let at = next(mutated.len());
                mutated[at] = [0, 1, 0x7F, 0x80, 0xFF, mutated[at] ^ 1 << next(8)][next(6)];
            }
            file_system(&mutated);
        }
    }
    assert!(seeds >= 4, "{seeds}");
}
