//! The targets for VHD.

use super::{SparseFile, believe, read_everything};
use crate::bytes::{be_u64, le_u16, le_u32, length};
use crate::chain::LinkTarget;
use crate::vhd::{self, VhdCreateOptions, VhdImage, VhdKind, VhdParent, VhdWriter};
use crate::{Format, ImageWriter, Repair};
use std::sync::Arc;
use vmtide_block::{BlockDevice, ByteRange, MemoryDevice, WritableBlockDevice};

/// Bits of the first byte of the input.
const FIX_CHECKSUMS: u8 = 1;
const WITH_PARENT: u8 = 2;
const PLAIN_BYTES: u8 = 4;
const CREATE: u8 = 8;

/// The largest disk that is created.
const CREATED_BYTES: u64 = 1 << 20;
/// The most steps of one workload.
const STEPS: usize = 64;
/// The parent's id, where there is one.
const PARENT_ID: &str = "5fa21a55-f394-aa4d-9958-1951a67d5540";

/// The file that the input describes: as it is, or as a [`SparseFile`]; with right checksums where
/// that is asked for, so that what is behind them is reached.
fn parse(mode: u8, input: &[u8]) -> Arc<SparseFile> {
    let file = if mode & PLAIN_BYTES == 0 {
        SparseFile::parse(input)
    } else {
        let file = SparseFile::new();
        let _ = file.resize(input.len() as u64);
        let _ = file.write_at(input, 0);
        file
    };
    if mode & FIX_CHECKSUMS != 0 {
        let end = file.size_bytes().saturating_sub(512);
        for footer in [0, end] {
            seal(&file, footer, 512, 64);
        }
        let mut offset = [0; 8];
        if file.read_at(&mut offset, 16).is_ok() {
            seal(&file, be_u64(&offset, 0), 1024, 36);
        }
    }
    Arc::new(file)
}

/// Puts the checksum of a structure right, where it is one.
fn seal(file: &SparseFile, at: u64, bytes: usize, field: usize) {
    let mut structure = vec![0; bytes];
    let is_one = file.read_at(&mut structure, at).is_ok()
        && (structure.starts_with(b"conectix") || structure.starts_with(b"cxsparse"));
    if is_one {
        let sum = vhd::checksum(&structure, field);
        let _ = file.write_at(&sum.to_be_bytes(), at + field as u64);
    }
}

fn parent(mode: u8) -> Option<Arc<dyn BlockDevice>> {
    let bytes = vec![0xaa; 300_000];
    (mode & WITH_PARENT != 0).then(|| Arc::new(MemoryDevice::from_bytes(bytes)) as Arc<_>)
}

/// An image, described as in the head of this file: opened, read, checked.
pub fn vhd_read(input: &[u8]) {
    let Some((mode, bytes)) = input.split_first() else {
        return;
    };
    let file = parse(*mode, bytes);
    let _ = vhd::identity(&*file);
    let _ = vhd::parent_link(&*file);
    let _ = vhd::info(&*file);
    if let Ok(report) = vhd::check(&*file) {
        believe(&report);
    }
    if let Ok(image) = VhdImage::open_device(file, parent(*mode)) {
        read_everything(&image);
    }
}

/// An image as in [`vhd_read`], repaired, written, grown and given another parent; or, by the first
/// byte, a new image and a workload, which is held against a byte vector.
///
/// # Panics
/// Where an image does not hold what was written: that is a finding.
pub fn vhd_write(input: &[u8]) {
    let Some((mode, bytes)) = input.split_first() else {
        return;
    };
    if mode & CREATE != 0 {
        return created(*mode, bytes);
    }
    let file = parse(*mode, bytes);
    if let Ok(report) = vhd::repair(&*file, Repair::All) {
        believe(&report);
    }
    if let Ok(writer) = VhdWriter::open_device(file.clone(), parent(*mode)) {
        write_everywhere(&file, &writer, *mode);
    }
    let target = LinkTarget {
        name: "../somewhere else/parent.vhd".into(),
        absolute_path: "/somewhere else/parent.vhd".into(),
        format: Format::Vhd,
        identity: Some(PARENT_ID.into()),
        next_identity: None,
    };
    if vhd::set_parent(&*file, Some(&target)).is_ok() {
        let link = vhd::parent_link(&*file);
        let is_it = link.is_ok_and(|link| link.is_some_and(|it| it.identities == [PARENT_ID]));
        assert!(is_it, "another parent was named");
        assert!(vhd::set_parent(&*file, None).is_ok(), "a parent that was named can be left");
    }
}

/// Writes here and there; an image that takes all of it gives it back.
fn write_everywhere(file: &Arc<SparseFile>, writer: &VhdWriter, mode: u8) {
    let size_bytes = writer.size_bytes();
    let offsets = [0, size_bytes / 2, size_bytes.saturating_sub(5000)];
    let mut is_whole = true;
    for offset in offsets {
        let room = length(size_bytes - offset).min(5000);
        is_whole &= writer.write_at(&[7; 5000][..room], offset).is_ok();
        let _ = writer.flush();
    }
    let _ = writer.resize(size_bytes.saturating_add(5120) & !511);
    let _ = writer.write_zeroes(ByteRange::new(size_bytes / 4, size_bytes / 8));
    is_whole &= writer.finish().is_ok();
    if !is_whole || size_bytes < 30_000 {
        return;
    }
    let image = VhdImage::open_device(file.clone(), parent(mode));
    let Ok(image) = image else {
        assert!(image.is_ok(), "a written image does not open");
        return;
    };
    let mut back = [0; 5000];
    for offset in offsets {
        assert!(image.read_at(&mut back, offset).is_ok(), "what was written cannot be read");
        assert!(back == [7; 5000], "something else was written at {offset}");
    }
}

/// Makes an image as the input says and works on it.
fn created(mode: u8, input: &[u8]) {
    let device = parent(mode);
    let kind = match (&device, le_u16(input, 0) % 3) {
        (Some(device), _) => VhdKind::Differencing(VhdParent {
            name: "parent.vhd".into(),
            absolute_path: None,
            identity: PARENT_ID.into(),
            device: device.clone(),
        }),
        (None, 0) => VhdKind::Fixed,
        (None, _) => VhdKind::Dynamic,
    };
    let options = VhdCreateOptions {
        kind,
        block_size_bytes: 4096 << (le_u16(input, 2) % 5),
        ..VhdCreateOptions::new(u64::from(le_u32(input, 4)) % CREATED_BYTES + 1)
    };
    let memory = Arc::new(MemoryDevice::new(0));
    let Ok(mut writer) = VhdWriter::create_device(memory.clone(), &options) else {
        return;
    };
    let mut model = vec![0; length(writer.size_bytes())];
    if let Some(device) = &device {
        let present = model.len().min(length(device.size_bytes()));
        let _ = device.read_at(&mut model[..present], 0);
    }
    for step in input.get(8..).unwrap_or_default().chunks_exact(6).take(STEPS) {
        if step[0] % 8 == 7 {
            assert!(writer.flush().is_ok(), "flushing");
            let again = VhdWriter::open_device(memory.clone(), device.clone());
            let Ok(again) = again else {
                assert!(again.is_ok(), "a flushed image does not open");
                return;
            };
            writer = again;
        }
        work(&writer, &mut model, step);
    }
    assert!(writer.finish().is_ok(), "finishing a new image");
    let image = VhdImage::open_device(memory.clone(), device);
    let Ok(image) = image else {
        assert!(image.is_ok(), "a new image does not open");
        return;
    };
    let mut disk = vec![0x55; model.len()];
    assert!(image.size_bytes() == disk.len() as u64, "a new image has another size");
    assert!(image.read_at(&mut disk, 0).is_ok(), "a new image cannot be read");
    assert!(disk == model, "a new image holds something else");
    read_everything(&image);
    let report = vhd::check(&*memory);
    assert!(report.is_ok_and(|report| report.errors == 0), "a new image is damaged");
}

/// One step: what it does (`u8`), a value (`u8`), where (`u16`) and how much (`u16`), in pieces of
/// 16 and of 3 bytes.
fn work(writer: &VhdWriter, model: &mut Vec<u8>, step: &[u8]) {
    let size = model.len();
    let at = usize::from(le_u16(step, 2)) * 16 % size;
    let end = (at + usize::from(le_u16(step, 4)) * 3).min(size);
    match step[0] % 8 {
        0 | 1 => {
            if writer.write_zeroes(ByteRange::from_bounds(at as u64, end as u64)).is_ok() {
                model[at..end].fill(0);
            }
        }
        2 => assert!(writer.flush().is_ok(), "flushing"),
        3 => {
            let more = usize::from(step[1]) * 512;
            if size + more <= length(CREATED_BYTES) && writer.resize((size + more) as u64).is_ok() {
                model.resize(size + more, 0);
            }
        }
        _ => {
            let data = vec![step[1]; end - at];
            if writer.write_at(&data, at as u64).is_ok() {
                model[at..end].copy_from_slice(&data);
            }
        }
    }
}
