//! File systems made by their own programs, and images of real machines: every block of every file is found to be that file's,
//! by what `debugfs` and `ntfsinfo` say of the same image.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test"
)]

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;
use vmtide_block::{BlockDevice, ByteRange, CancelToken, OpenMode, RangeSet, RawDevice};
use vmtide_guestfs::{FilesAt, FoundFile, files_at};

/// The shortest block of any file system here.
const PIECE: usize = 512;

fn run(command: &mut Command) -> String {
    let found = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(found.status.success(), "{command:?}: {}", String::from_utf8_lossy(&found.stderr));
    String::from_utf8(found.stdout).unwrap()
}

fn open(path: &Path) -> RawDevice {
    RawDevice::open(path, OpenMode::ReadOnly).unwrap()
}

fn look(device: &dyn BlockDevice, ranges: Vec<ByteRange>) -> FilesAt {
    let whole = ByteRange::new(0, device.size_bytes());
    let mut found = files_at(device, whole, &RangeSet::from(ranges), &CancelToken::new()).unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

/// Some bytes that no two places share: SplitMix64 of numbers that are never the same.
fn content(seed: u64, length: usize) -> Vec<u8> {
    let word = |number: u64| {
        let mut mixed = (seed << 40 | number).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ mixed >> 31
    };
    (0..).flat_map(|number| word(number).to_le_bytes()).take(length).collect()
}

/// A tree of files of many lengths, with their content by path.
fn tree(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for (number, length) in [(1, 5000), (2, 70_000), (3, 3_000_000), (4, 9_000_000)] {
        files.insert(format!("/f{number}"), content(number, length));
        files.insert(format!("/deep/er/than that/ü{number}"), content(100 + number, length));
    }
    for number in 0..400_u64 {
        let path = format!("/many/a file with a rather long name {number:05}");
        files.insert(path, content(1000 + number, 4096));
    }
    for (path, bytes) in &files {
        let path = root.join(&path[1..]);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    files
}

/// Where the pieces of a disk lie that are of one of the files, by their content; a piece at the end is left out.
fn places(disk: &[u8], files: &BTreeMap<String, Vec<u8>>) -> BTreeMap<u64, String> {
    let by_content: BTreeMap<&[u8], &String> = files
        .iter()
        .flat_map(|(path, bytes)| bytes.chunks_exact(PIECE).map(move |piece| (piece, path)))
        .collect();
    let mut found = BTreeMap::new();
    for (number, piece) in disk.chunks_exact(PIECE).enumerate() {
        if let Some(path) = by_content.get(piece) {
            found.insert((number * PIECE) as u64, (*path).clone());
        }
    }
    found
}

/// Every piece of every file leads to that file, and pieces of many to all of them.
fn check(image: &Path, files: &BTreeMap<String, Vec<u8>>, kind: &str) {
    let device = open(image);
    let places = places(&std::fs::read(image).unwrap(), files);
    for (path, bytes) in files {
        let on_disk = places.values().filter(|found| *found == path).count();
        assert_eq!(on_disk, bytes.len() / PIECE, "pieces of {path} on the disk");
    }
    let whole = look(&device, vec![ByteRange::new(0, device.size_bytes())]);
    assert_eq!(whole.file_system, kind);
    assert!(!whole.is_complete, "its own tables were asked for, too");
    let by_path: BTreeMap<&str, &FoundFile> =
        whole.files.iter().map(|file| (file.path.as_str(), file)).collect();
    assert_eq!(by_path.len(), whole.files.len(), "each file once");
    for (offset, path) in &places {
        let file = by_path.get(path.as_str()).unwrap_or_else(|| panic!("{path} is not found"));
        assert!(!file.is_directory);
        assert!(
            file.ranges.contains_range(&ByteRange::new(*offset, PIECE as u64)),
            "{path} at {offset}"
        );
    }
    // No piece is in two files.
    let all: u64 = whole.files.iter().map(|file| file.ranges.total_bytes()).sum();
    let union = whole.files.iter().fold(RangeSet::new(), |all, file| all.union(&file.ranges));
    assert_eq!(all, union.total_bytes());
    // Single bytes, as damage asks for them.
    for (offset, path) in places.iter().step_by(1371) {
        let found = look(&device, vec![ByteRange::new(offset + 511, 1)]);
        let paths: Vec<_> = found.files.iter().map(|file| &file.path).collect();
        assert_eq!(paths, [path], "at {offset}");
        assert!(found.is_complete);
        assert_eq!(found.files[0].ranges.as_slice(), [ByteRange::new(offset + 511, 1)]);
    }
}

fn scratch() -> (TempDir, PathBuf, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let (root, image) = (directory.path().join("tree"), directory.path().join("image"));
    std::fs::create_dir(&root).unwrap();
    (directory, root, image)
}

/// `mke2fs` with `options` and a tree in it.
fn ext(options: &[&str], kind: &str) {
    let (_directory, root, image) = scratch();
    let files = tree(&root);
    let mut command = Command::new("/sbin/mke2fs");
    command.args(["-q", "-F", "-d"]).arg(&root).args(options).arg(&image).arg("100M");
    run(&mut command);
    check(&image, &files, kind);
    // What the makers' own program says of any block.
    let device = open(&image);
    let block_bytes = run(Command::new("/sbin/dumpe2fs").arg("-h").arg(&image))
        .lines()
        .find_map(|line| line.strip_prefix("Block size:")?.trim().parse::<u64>().ok())
        .unwrap();
    let blocks = device.size_bytes() / block_bytes;
    let asked: Vec<u64> = (0..150).map(|number| 1 + (number * 17_393) % (blocks - 1)).collect();
    let request = |list: &[u64]| list.iter().map(u64::to_string).collect::<Vec<_>>().join(" ");
    let told = run(Command::new("/sbin/debugfs")
        .arg("-R")
        .arg(format!("icheck {}", request(&asked)))
        .arg(&image));
    for line in told.lines().skip(1) {
        let (block, inode) = line.split_once('\t').unwrap();
        let block: u64 = block.parse().unwrap();
        let found = look(&device, vec![ByteRange::new(block * block_bytes, block_bytes)]);
        let Ok(inode) = inode.parse::<u64>() else {
            assert_eq!(found.files, [], "block {block}: {line}");
            continue;
        };
        let [file] = &found.files[..] else { panic!("block {block}: {line}: {found:?}") };
        let names =
            run(Command::new("/sbin/debugfs").arg("-R").arg(format!("ncheck {inode}")).arg(&image));
        match names.lines().nth(1).and_then(|line| line.split_once('\t')) {
            Some((_, path)) => assert_eq!(file.path.replace("//", "/"), path.replace("//", "/")),
            None => assert!(file.path.starts_with('['), "block {block}: {line}: {}", file.path),
        }
    }
}

#[test]
fn ext4_as_it_is_made() {
    ext(&["-t", "ext4", "-b", "4096"], "ext4");
}

#[test]
fn ext4_with_small_blocks() {
    ext(&["-t", "ext4", "-b", "1024", "-O", "^64bit"], "ext4");
}

#[test]
fn ext4_with_descriptors_beside_their_groups() {
    ext(&["-t", "ext4", "-b", "1024", "-O", "meta_bg,^resize_inode", "-I", "128"], "ext4");
}

#[test]
fn ext3_with_lists_of_blocks() {
    ext(&["-t", "ext3"], "ext3");
}

#[test]
fn ext2_with_small_blocks() {
    ext(&["-t", "ext2", "-b", "1024"], "ext2");
}

/// A file in the holes that others left, so that its tree is deep.
#[test]
fn ext4_with_a_file_in_a_thousand_pieces() {
    let (directory, root, image) = scratch();
    let (small, large) = (directory.path().join("small"), directory.path().join("large"));
    let files = BTreeMap::from([("/large".to_owned(), content(7, 2_000_000))]);
    std::fs::write(&small, content(8, 1024)).unwrap();
    std::fs::write(&large, &files["/large"]).unwrap();
    let mut script: Vec<_> = (0..3000).map(|n| format!("write {} s{n}", small.display())).collect();
    script.extend((0..3000).step_by(2).map(|n| format!("rm s{n}")));
    script.push(format!("write {} large", large.display()));
    std::fs::write(directory.path().join("script"), script.join("\n")).unwrap();
    run(Command::new("/sbin/mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-b", "1024", "-N", "4000", "-d"])
        .arg(&root)
        .arg(&image)
        .arg("30M"));
    run(Command::new("/sbin/debugfs")
        .args(["-w", "-f"])
        .arg(directory.path().join("script"))
        .arg(&image));
    check(&image, &files, "ext4");
    let device = open(&image);
    let whole = look(&device, vec![ByteRange::new(0, device.size_bytes())]);
    let large = whole.files.iter().find(|file| file.path == "/large").unwrap();
    assert!(large.ranges.as_slice().len() > 1000, "{}", large.ranges.as_slice().len());
}

/// Damage to the beginning, where the superblock and all group descriptors are, leaves the copies in the second group.
#[test]
fn ext4_without_its_beginning() {
    for options in [&["-O", "^metadata_csum"][..], &["-O", "meta_bg,^resize_inode"]] {
        let (_directory, root, image) = scratch();
        let files = tree(&root);
        let mut command = Command::new("/sbin/mke2fs");
        command.args(["-q", "-F", "-t", "ext4", "-b", "1024", "-d"]).arg(&root).args(options);
        run(command.arg(&image).arg("100M"));
        let mut bytes = std::fs::read(&image).unwrap();
        let places = places(&bytes, &files);
        // The superblock and the descriptors; not the tables of the first group.
        bytes[..5 * 1024].fill(0);
        std::fs::write(&image, &bytes).unwrap();
        let found = look(&open(&image), vec![ByteRange::new(0, bytes.len() as u64)]);
        assert!(!found.is_complete);
        let (offset, path) = places.iter().nth(places.len() / 2).unwrap();
        let at = ByteRange::new(*offset, PIECE as u64);
        let of = found.files.iter().find(|file| file.ranges.contains_range(&at));
        assert_eq!(of.map(|file| &file.path), Some(path));
    }
}

#[test]
fn directories_and_hard_links_have_their_names() {
    let (_directory, root, image) = scratch();
    std::fs::create_dir(root.join("here")).unwrap();
    std::fs::write(root.join("here/one"), content(1, 8192)).unwrap();
    std::fs::hard_link(root.join("here/one"), root.join("two")).unwrap();
    run(Command::new("/sbin/mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .arg(&root)
        .arg(&image)
        .arg("20M"));
    let device = open(&image);
    let whole = look(&device, vec![ByteRange::new(0, device.size_bytes())]);
    let of = |path: &str| whole.files.iter().find(|file| file.path == path);
    assert!(of("/").is_some_and(|file| file.is_directory));
    assert!(of("/here").is_some_and(|file| file.is_directory));
    assert!(of("[journal]").is_some());
    let one = of("/two").or(of("/here/one")).unwrap();
    let names = [one.path.as_str(), one.other_paths[0].as_str()];
    assert!(names == ["/here/one", "/two"] || names == ["/two", "/here/one"], "{names:?}");
}

/// A command of LVM that sees the loop device only, and has nothing to do with the kernel.
fn lvm(command: &str, device: &str, words: &[&str]) {
    let config = format!(
        "devices{{use_devicesfile=0 filter=[\"a|{device}|\",\"r|.*|\"]}} backup{{backup=0 archive=0}} global{{activation=0}}"
    );
    let mut lvm = Command::new("/sbin/lvm");
    run(lvm.arg(command).args(["-q", "-q", "--config", &config]).args(words));
}

/// A file system in a logical volume of two segments with another volume between them, made by LVM's own programs.
#[test]
fn a_logical_volume_in_two_segments() {
    if run(Command::new("id").arg("-u")).trim() != "0" {
        eprintln!("NOTE: only root has loop devices: skipped");
        return;
    }
    const MIB: usize = 1 << 20;
    let (directory, root, image) = scratch();
    let files = BTreeMap::from([
        ("/first".to_owned(), content(1, 5_000_000)),
        ("/second".to_owned(), content(2, 8_000_000)),
    ]);
    for (path, bytes) in &files {
        std::fs::write(root.join(&path[1..]), bytes).unwrap();
    }
    let file_system = directory.path().join("file system");
    run(Command::new("/sbin/mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .arg(&root)
        .arg(&file_system)
        .arg("16M"));
    RawDevice::open(&image, OpenMode::CreateNew { size_bytes: 40 << 20 }).unwrap();
    let device = run(Command::new("/sbin/losetup").args(["--show", "-f"]).arg(&image));
    let device = device.trim();
    let made = std::panic::catch_unwind(|| {
        lvm("pvcreate", device, &[device]);
        lvm("vgcreate", device, &["-s", "4M", "group", device]);
        let create =
            |name| lvm("lvcreate", device, &["-an", "-Zn", "-Wn", "-l", "2", "-n", name, "group"]);
        create("root");
        create("other-1");
        lvm("lvextend", device, &["-l", "+2", "group/root"]);
    });
    run(Command::new("/sbin/losetup").args(["-d", device]));
    made.unwrap();
    // The first extent begins after 1 MiB; the other volume has the third and fourth.
    let (source, mut disk) = (std::fs::read(&file_system).unwrap(), std::fs::read(&image).unwrap());
    disk[MIB..9 * MIB].copy_from_slice(&source[..8 * MIB]);
    disk[17 * MIB..25 * MIB].copy_from_slice(&source[8 * MIB..]);
    std::fs::write(&image, &disk).unwrap();
    check(&image, &files, "ext4");
    let found = look(&open(&image), vec![ByteRange::new(0, 40 << 20)]);
    assert_eq!(found.volume.as_deref(), Some("group/root"));
    let mib = |first: u64, last: u64| ByteRange::from_bounds(first << 20, last << 20);
    assert_eq!(found.area.as_slice(), [mib(1, 9), mib(17, 25)]);
    // Bytes of the other volume are no part of it.
    let other = RangeSet::from(vec![mib(10, 12)]);
    let whole = ByteRange::new(0, 40 << 20);
    assert_eq!(files_at(&open(&image), whole, &other, &CancelToken::new()).unwrap(), []);
}

/// An NTFS file system made with `options`, and what `fill` puts in it while it is mounted, which only root can do: answers
/// with whether it was.
fn ntfs(image: &Path, options: &[&str], mib: u64, fill: &dyn Fn(&Path)) -> bool {
    if run(Command::new("id").arg("-u")).trim() != "0" {
        eprintln!("NOTE: only root can mount NTFS: skipped");
        return false;
    }
    RawDevice::open(image, OpenMode::CreateNew { size_bytes: mib << 20 }).unwrap();
    run(Command::new("/sbin/mkntfs").args(["-q", "-F", "-f"]).args(options).arg(image));
    let target = image.with_file_name("mounted");
    std::fs::create_dir(&target).unwrap();
    run(Command::new("/bin/ntfs-3g").arg(image).arg(&target));
    let filled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| fill(&target)));
    run(Command::new("umount").arg(&target));
    filled.unwrap();
    true
}

/// NTFS, by ntfs-3g's programs.
#[test]
fn ntfs_as_it_is_made() {
    for options in [&[][..], &["-c", "512"], &["-c", "65536"], &["-s", "4096", "-c", "4096"]] {
        let (_directory, root, image) = scratch();
        let files = tree(&root);
        let fill = |target: &Path| {
            run(Command::new("cp").arg("-r").arg(root.join(".")).arg(target));
        };
        if !ntfs(&image, options, 100, &fill) {
            return;
        }
        check(&image, &files, "ntfs");
        let device = open(&image);
        let whole = look(&device, vec![ByteRange::new(0, device.size_bytes())]);
        for own in ["/$MFT", "/$LogFile", "/$Bitmap"] {
            assert!(whole.files.iter().any(|file| file.path == own), "{own}");
        }
        assert!(whole.files.iter().any(|file| file.path == "/many" && file.is_directory));
    }
}

/// Files that grew in turn, whose runs fill several records, and one with more names than its first record has.
#[test]
fn ntfs_with_files_in_hundreds_of_pieces() {
    let (_directory, _, image) = scratch();
    let paths = ["/dir/large", "/other"];
    let files: BTreeMap<String, Vec<u8>> =
        (7..).zip(paths).map(|(seed, path)| (path.to_owned(), content(seed, 6_000_000))).collect();
    let fill = |target: &Path| {
        std::fs::create_dir(target.join("dir")).unwrap();
        let create = |path: &str| std::fs::File::create(target.join(&path[1..])).unwrap();
        let mut growing = paths.map(create);
        for at in (0..6_000_000).step_by(4096) {
            for (file, path) in growing.iter_mut().zip(paths) {
                file.write_all(&files[path][at..(at + 4096).min(6_000_000)]).unwrap();
            }
        }
        for number in 0..40 {
            let name = format!("dir/one of many names {number}");
            std::fs::hard_link(target.join("other"), target.join(name)).unwrap();
        }
    };
    if !ntfs(&image, &["-c", "4096"], 32, &fill) {
        return;
    }
    check(&image, &files, "ntfs");
    let device = open(&image);
    let whole = look(&device, vec![ByteRange::new(0, device.size_bytes())]);
    let large = whole.files.iter().find(|file| file.path == "/dir/large").unwrap();
    assert!(large.ranges.as_slice().len() > 250, "{}", large.ranges.as_slice().len());
    let told = run(Command::new("/bin/ntfsinfo").args(["-F", "/dir/large"]).arg(&image));
    assert!(told.contains("$ATTRIBUTE_LIST"), "it has more than one record");
    let other = whole.files.iter().find(|file| file.path == "/other").unwrap();
    assert_eq!(other.other_paths.len(), 3, "{:?}", other.other_paths);
}

/// XFS as `mkfs.xfs` makes it, filled while it is mounted, which only root can do: with directories of all forms, and a file in
/// a thousand pieces, whose extents need a tree.
fn xfs(options: &[&str]) {
    if run(Command::new("id").arg("-u")).trim() != "0" {
        eprintln!("NOTE: only root can mount XFS: skipped");
        return;
    }
    let (_directory, root, image) = scratch();
    let mut files = tree(&root);
    let sparse = content(9, 8 << 20);
    RawDevice::open(&image, OpenMode::CreateNew { size_bytes: 320 << 20 }).unwrap();
    run(Command::new("/sbin/mkfs.xfs").args(["-q", "-f"]).args(options).arg(&image));
    let target = image.with_file_name("mounted");
    std::fs::create_dir(&target).unwrap();
    run(Command::new("mount").args(["-t", "xfs", "-o", "loop"]).arg(&image).arg(&target));
    let filled = std::panic::catch_unwind(|| {
        run(Command::new("cp").arg("-r").arg(root.join(".")).arg(&target));
        let file = std::fs::File::create(target.join("sparse")).unwrap();
        for (number, piece) in sparse.chunks(8192).enumerate() {
            file.write_all_at(&piece[..4096], number as u64 * 8192).unwrap();
        }
        for number in 0..3000 {
            std::fs::write(target.join(format!("deep/a name among thousands {number}")), "")
                .unwrap();
        }
        file.sync_all().unwrap();
    });
    run(Command::new("umount").arg(&target));
    filled.unwrap();
    files.insert(
        "/sparse".to_owned(),
        sparse.chunks(8192).flat_map(|piece| &piece[..4096]).copied().collect(),
    );
    check(&image, &files, "xfs");
    // Without its first superblock.
    let mut bytes = std::fs::read(&image).unwrap();
    let places = places(&bytes, &files);
    bytes[..512].fill(0);
    std::fs::write(&image, &bytes).unwrap();
    let (offset, path) = places.iter().nth(places.len() / 2).unwrap();
    let found = look(&open(&image), vec![ByteRange::new(*offset, 1)]);
    assert_eq!(found.files.iter().map(|file| &file.path).collect::<Vec<_>>(), [path]);
}

#[test]
fn xfs_as_it_is_made() {
    xfs(&[]);
}

#[test]
fn xfs_with_small_blocks_and_large_directories() {
    xfs(&["-b", "size=1024", "-n", "size=8192"]);
}

/// Version 4, which Linux no longer mounts: `mkfs.xfs` itself puts the files there.
#[test]
fn xfs_of_the_version_before() {
    let (directory, root, image) = scratch();
    let mut files = BTreeMap::new();
    let mut plan = String::from("/boot\n0 0\nd--755 0 0\n");
    for number in 0..300 {
        let (name, bytes) = (format!("file-{number:03}-with-a-name"), content(number, 9000));
        std::fs::write(root.join(&name), &bytes).unwrap();
        plan += &format!("{name} ---644 0 0 {}\n", root.join(&name).display());
        files.insert(format!("/{name}"), bytes);
    }
    plan += "small d--755 0 0\n";
    plan += &format!("one ---600 0 0 {}\n$\n$\n", root.join("file-000-with-a-name").display());
    let plan_file = directory.path().join("plan");
    std::fs::write(&plan_file, plan).unwrap();
    RawDevice::open(&image, OpenMode::CreateNew { size_bytes: 320 << 20 }).unwrap();
    let options = ["-q", "-f", "-m", "crc=0,finobt=0,rmapbt=0,reflink=0", "-i", "sparse=0"];
    run(Command::new("/sbin/mkfs.xfs").args(options).arg("-p").arg(&plan_file).arg(&image));
    // The content of the first is there twice.
    files.remove("/file-000-with-a-name");
    check(&image, &files, "xfs");
    let found = look(&open(&image), vec![ByteRange::new(0, 320 << 20)]);
    for path in ["/file-000-with-a-name", "/small/one", "[log]"] {
        assert!(found.files.iter().any(|file| file.path == path), "{path}");
    }
}

#[test]
fn what_is_no_file_system_has_no_files() {
    let (_directory, _, image) = scratch();
    let device = RawDevice::open(&image, OpenMode::CreateNew { size_bytes: 1 << 20 }).unwrap();
    let whole = ByteRange::new(0, 1 << 20);
    let asked = RangeSet::from(vec![whole]);
    assert_eq!(files_at(&device, whole, &asked, &CancelToken::new()).unwrap(), []);
}
