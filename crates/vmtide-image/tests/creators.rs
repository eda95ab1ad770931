//! Images as programs write them that cannot be run here: laid out from the formats' documents by code that shares
//! nothing with the library, and read by QEMU as well.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use crate::support;

use std::path::Path;
use support::{Random, check_extents, path, pattern, qemu_img, read_all};
use vmtide_image::{
    BackingPolicy, Format, OpenOptions, Repair, check_image, image_info, open_read_only, probe,
};

const SECTOR: usize = 512;
const BLOCK: usize = 2 << 20;

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// One's complement of the sum, with the field at `at` as zero.
fn seal(bytes: &mut [u8], at: usize) {
    put(bytes, at, &[0; 4]);
    let sum = bytes.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    put(bytes, at, &(!sum).to_be_bytes());
}

/// Cylinders, heads and sectors of a small disk, as the specification calculates them.
fn geometry(sectors: u32) -> (u16, u8, u8) {
    let (mut per_track, mut tracks) = (17, sectors / 17);
    let mut heads = tracks.div_ceil(1024).max(4);
    if tracks >= heads * 1024 || heads > 16 {
        (per_track, heads) = (31, 16);
        tracks = sectors / 31;
    }
    let cylinders = u16::try_from(tracks / heads).unwrap();
    (cylinders, u8::try_from(heads).unwrap(), u8::try_from(per_track).unwrap())
}

fn vhd_footer(creator: [u8; 4], size: usize, kind: u32, header_at: u64) -> Vec<u8> {
    let mut footer = vec![0; SECTOR];
    put(&mut footer, 0, b"conectix");
    put(&mut footer, 8, &2u32.to_be_bytes());
    put(&mut footer, 12, &0x1_0000u32.to_be_bytes());
    put(&mut footer, 16, &header_at.to_be_bytes());
    put(&mut footer, 28, &creator);
    put(&mut footer, 32, &0x0005_0000u32.to_be_bytes());
    put(&mut footer, 36, b"Wi2k");
    put(&mut footer, 40, &(size as u64).to_be_bytes());
    put(&mut footer, 48, &(size as u64).to_be_bytes());
    let (cylinders, heads, sectors) = geometry(u32::try_from(size / SECTOR).unwrap());
    put(&mut footer, 56, &cylinders.to_be_bytes());
    put(&mut footer, 58, &[heads, sectors]);
    put(&mut footer, 60, &kind.to_be_bytes());
    put(&mut footer, 68, &[0x5a; 16]);
    seal(&mut footer, 64);
    footer
}

/// A dynamic VHD: blocks in any order, those that are all zero left out or not, the data of each at a multiple of
/// `alignment`, bitmaps all ones as VirtualBox and Disk2vhd write them, or only where something was written.
fn dynamic_vhd(creator: [u8; 4], disk: &[u8], alignment: usize, random: &mut Random) -> Vec<u8> {
    let blocks = disk.len().div_ceil(BLOCK);
    let mut file = vhd_footer(creator, disk.len(), 3, 512);
    let mut header = vec![0; 1024];
    put(&mut header, 0, b"cxsparse");
    put(&mut header, 8, &[0xff; 8]);
    put(&mut header, 16, &1536u64.to_be_bytes());
    put(&mut header, 24, &0x1_0000u32.to_be_bytes());
    put(&mut header, 28, &u32::try_from(blocks).unwrap().to_be_bytes());
    put(&mut header, 32, &u32::try_from(BLOCK).unwrap().to_be_bytes());
    seal(&mut header, 36);
    file.extend(header);
    file.resize(1536 + (blocks * 4).next_multiple_of(SECTOR), 0xff);
    let mut order: Vec<usize> = (0..blocks).collect();
    for last in (1..blocks).rev() {
        order.swap(last, usize::try_from(random.below(last as u64 + 1)).unwrap());
    }
    for block in order {
        let mut data = disk[block * BLOCK..disk.len().min((block + 1) * BLOCK)].to_vec();
        data.resize(BLOCK, 0);
        if data.iter().all(|byte| *byte == 0) && random.below(2) == 0 {
            continue;
        }
        // The bitmap's one sector stands in front of the data.
        let at = (file.len() + SECTOR).next_multiple_of(alignment) - SECTOR;
        put(&mut file, 1536 + block * 4, &u32::try_from(at / SECTOR).unwrap().to_be_bytes());
        file.resize(at, 0);
        file.extend([0xff; SECTOR]);
        file.extend(data);
    }
    file.extend(vhd_footer(creator, disk.len(), 3, 512));
    file
}

fn check(image: &Path, expected: &[u8]) {
    let options = OpenOptions { backing: BackingPolicy::SameDirectory, ..OpenOptions::default() };
    let disk = open_read_only(image, &options).unwrap();
    assert_eq!(disk.size_bytes(), expected.len() as u64, "{}", image.display());
    assert!(read_all(&*disk) == expected, "{}", image.display());
    check_extents(&*disk, expected);
    let report = check_image(image, &options, Repair::Nothing).unwrap();
    assert_eq!((report.errors, report.problems.len()), (0, 0), "{}: {report:?}", image.display());
}

/// Succeeds where QEMU reads this disk, too; of a VHD it is told to take the size that the footer gives.
fn check_with_qemu(image: &Path, expected: &[u8]) {
    let raw = image.with_extension("qemu.raw");
    let driver = match probe(image).unwrap() {
        Format::Vhd => "driver=vpc,force_size_calc=current_size",
        _ => "driver=vmdk",
    };
    let options = format!("{driver},file.filename={}", path(image));
    qemu_img(&["convert", "--image-opts", "-O", "raw", &options, path(&raw)]);
    assert!(std::fs::read(&raw).unwrap() == expected, "qemu-img on {}", image.display());
}

#[test]
fn vhds_of_every_creator_have_the_size_that_their_footer_gives() {
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random(3);
    let mut disk = pattern(4, 9 << 20);
    disk[2 << 20..4 << 20].fill(0);
    // Hyper-V, Disk2vhd, XenServer, its blktap, Azure's agent, QEMU with force_size, VirtualBox, and one that
    // nobody knows: QEMU cuts the last two to whole cylinders unless it is told.
    for creator in [b"win ", b"d2v ", b"CTXS", b"tap\0", b"wa\0\0", b"qem2", b"vbox", b"abcd"] {
        let image = directory.path().join("fixed.vhd");
        let mut bytes = disk.clone();
        bytes.extend(vhd_footer(*creator, disk.len(), 2, u64::MAX));
        std::fs::write(&image, &bytes).unwrap();
        check(&image, &disk);
        check_with_qemu(&image, &disk);
        assert_eq!(image_info(&image, None).unwrap().subformat.as_deref(), Some("fixed"));
        for alignment in [SECTOR, 4096] {
            let image = directory.path().join("dynamic.vhd");
            std::fs::write(&image, dynamic_vhd(*creator, &disk, alignment, &mut random)).unwrap();
            check(&image, &disk);
            check_with_qemu(&image, &disk);
        }
    }
}

/// A monolithicSparse VMDK as VirtualBox writes it: grains in the order in which the guest wrote them.
fn virtualbox_vmdk(disk: &[u8], random: &mut Random) -> Vec<u8> {
    const GRAIN: usize = 128 * SECTOR;
    const SPAN: usize = 512 * GRAIN;
    let sectors = disk.len() / SECTOR;
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=1f1f2a2b\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\n\n\
         # Extent description\nRW {sectors} SPARSE \"was called otherwise.vmdk\"\n\n# The disk Data Base \n#DDB\n\n\
         ddb.virtualHWVersion = \"4\"\nddb.adapterType=\"ide\"\nddb.geometry.cylinders=\"18\"\n\
         ddb.uuid.image=\"5f7b3c0e-1c1e-4b7e-9d9b-8a2c8a0b0c0d\"\nddb.uuid.parent=\"00000000-0000-0000-0000-000000000000\"\n\
         ddb.comment=\"\"\n"
    );
    let tables = disk.len().div_ceil(SPAN);
    let directory_sectors = (tables * 4).div_ceil(SECTOR);
    let second = 21;
    let first = second + directory_sectors + tables * 4;
    let overhead = (first + directory_sectors + tables * 4).next_multiple_of(128);
    let mut file = vec![0; overhead * SECTOR];
    put(&mut file, 0, b"KDMV");
    for (at, value) in
        [(12, sectors), (20, 128), (28, 1), (36, 20), (48, second), (56, first), (64, overhead)]
    {
        put(&mut file, at, &(value as u64).to_le_bytes());
    }
    for (at, value) in [(4, 1u32), (8, 3), (44, 512)] {
        put(&mut file, at, &value.to_le_bytes());
    }
    put(&mut file, 73, b"\n \r\n");
    put(&mut file, SECTOR, text.as_bytes());
    let table = |start: usize, number: usize| start + directory_sectors + number * 4;
    for start in [second, first] {
        for number in 0..tables {
            let sector = u32::try_from(table(start, number)).unwrap();
            put(&mut file, start * SECTOR + number * 4, &sector.to_le_bytes());
        }
    }
    let grains = disk.len().div_ceil(GRAIN);
    let mut order: Vec<usize> = (0..grains).collect();
    for last in (1..grains).rev() {
        order.swap(last, usize::try_from(random.below(last as u64 + 1)).unwrap());
    }
    for grain in order {
        let mut data = disk[grain * GRAIN..disk.len().min((grain + 1) * GRAIN)].to_vec();
        data.resize(GRAIN, 0);
        if data.iter().all(|byte| *byte == 0) {
            continue;
        }
        let sector = u32::try_from(file.len() / SECTOR).unwrap();
        for start in [second, first] {
            let at = table(start, grain / 512) * SECTOR + grain % 512 * 4;
            put(&mut file, at, &sector.to_le_bytes());
        }
        file.extend(data);
    }
    file
}

#[test]
fn grains_in_any_order_are_read_whatever_the_image_was_called() {
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random(5);
    // Two grain tables, and a last grain that is not whole.
    let mut disk = pattern(6, (40 << 20) + 3 * SECTOR);
    disk[10 << 20..30 << 20].fill(0);
    let image = directory.path().join("VirtualBox.vmdk");
    std::fs::write(&image, virtualbox_vmdk(&disk, &mut random)).unwrap();
    check(&image, &disk);
    check_with_qemu(&image, &disk);
}
