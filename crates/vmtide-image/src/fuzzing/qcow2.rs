//! The targets for qcow2.

use super::{SparseFile, believe, read_everything};
use crate::bytes::{le_u16, le_u32, length};
use crate::qcow2::{
    self, Companions, CreateBacking, Qcow2CreateOptions, Qcow2Image, Qcow2Version, Qcow2Writer,
};
use crate::{Compression, Format, ImageWriter, Repair};
use std::sync::Arc;
use vmtide_block::{BlockDevice, ByteRange, MemoryDevice, WritableBlockDevice};

/// Bits of the first byte of the input.
const PLAIN_BYTES: u8 = 1;
const WITH_BACKING: u8 = 2;
const WITH_DATA_FILE: u8 = 4;
const CREATE: u8 = 8;

/// The largest disk that is created.
const CREATED_BYTES: u64 = 1 << 20;
/// The most steps of one workload.
const STEPS: usize = 64;
/// The most snapshots and bitmaps of one image that are read.
const MOST_READ: usize = 3;

/// The image: as it is, or as a [`SparseFile`].
fn file(mode: u8, bytes: &[u8]) -> Arc<dyn WritableBlockDevice> {
    match mode & PLAIN_BYTES {
        0 => Arc::new(SparseFile::parse(bytes)),
        _ => Arc::new(MemoryDevice::from_bytes(bytes.to_vec())),
    }
}

fn memory(wanted: bool) -> Option<Arc<MemoryDevice>> {
    wanted.then(|| Arc::new(MemoryDevice::from_bytes(vec![0xaa; 300_000])))
}

fn companions(mode: u8) -> Companions {
    let device = |bit: u8| memory(mode & bit != 0).map(|device| device as Arc<dyn BlockDevice>);
    Companions { backing: device(WITH_BACKING), data_file: device(WITH_DATA_FILE) }
}

/// An image, which the first byte of the input describes: opened, read with its snapshots and
/// bitmaps, checked.
pub fn qcow2_read(input: &[u8]) {
    let Some((mode, bytes)) = input.split_first() else {
        return;
    };
    let file: Arc<dyn BlockDevice> = file(*mode, bytes);
    let _ = crate::info::qcow2(&*file);
    if let Ok(report) = qcow2::check(&*file) {
        believe(&report);
    }
    let Ok(image) = Qcow2Image::open_device(file, companions(*mode)) else {
        return;
    };
    read_everything(&image);
    for snapshot in image.snapshots().into_iter().flatten().take(MOST_READ) {
        if let Ok(snapshot) = image.open_snapshot(&snapshot.id) {
            read_everything(&snapshot);
        }
    }
    for bitmap in image.bitmaps().into_iter().flatten().take(MOST_READ) {
        let _ = image.read_bitmap(&bitmap.name);
    }
}

/// An image as in [`qcow2_read`], repaired and written; or, by the first byte, a new image and a
/// workload, which is held against a byte vector.
///
/// # Panics
/// Where a new image does not hold what was written: that is a finding.
pub fn qcow2_write(input: &[u8]) {
    let Some((mode, bytes)) = input.split_first() else {
        return;
    };
    if mode & CREATE != 0 {
        return created(*mode, bytes);
    }
    let file = file(*mode, bytes);
    if let Ok(report) = qcow2::repair(&*file, Repair::All) {
        believe(&report);
    }
    let backing = companions(*mode).backing;
    let data_file = memory(mode & WITH_DATA_FILE != 0).map(|device| device as Arc<_>);
    let Ok(writer) = Qcow2Writer::open_device(file.clone(), backing, data_file) else {
        return;
    };
    let size_bytes = writer.size_bytes();
    for offset in [0, size_bytes / 2, size_bytes.saturating_sub(5000)] {
        let room = length(size_bytes - offset).min(5000);
        let _ = writer.write_at(&[7; 5000][..room], offset);
        let _ = writer.write_zeroes(ByteRange::new(offset, room as u64 / 2));
        let _ = writer.flush();
    }
    let _ = writer.resize(size_bytes.saturating_add(70_000));
    let _ = writer.finish();
    let _ = Qcow2Image::open_device(file, companions(*mode));
}

/// Makes an image as the input says and works on it.
fn created(mode: u8, input: &[u8]) {
    let backing = memory(mode & WITH_BACKING != 0);
    let shape = le_u16(input, 0);
    let options = Qcow2CreateOptions {
        cluster_size_bytes: 512 << (shape % 8),
        version: if shape & 0x100 != 0 { Qcow2Version::V2 } else { Qcow2Version::V3 },
        extended_l2: shape & 0x200 != 0,
        compress: true,
        compression: if shape & 0x400 != 0 { Compression::Zstd } else { Compression::Zlib },
        backing: backing.clone().map(|device| CreateBacking {
            name: "backing".into(),
            format: Format::Raw,
            device,
        }),
        ..Qcow2CreateOptions::new(u64::from(le_u32(input, 2)) % CREATED_BYTES + 1)
    };
    let file = Arc::new(MemoryDevice::new(0));
    let Ok(writer) = Qcow2Writer::create_device(file.clone(), &options) else {
        return;
    };
    let mut model = backing.as_ref().map_or_else(Vec::new, |device| device.to_bytes());
    model.resize(length(options.size_bytes), 0);
    for step in input.get(6..).unwrap_or_default().chunks_exact(6).take(STEPS) {
        work(&writer, &mut model, step);
    }
    assert!(writer.finish().is_ok(), "finishing a new image");
    drop(writer);
    let backing = backing.map(|device| device as Arc<dyn BlockDevice>);
    let image = Qcow2Image::open_device(file.clone(), Companions { backing, data_file: None });
    let Ok(image) = image else {
        assert!(image.is_ok(), "a new image does not open");
        return;
    };
    let mut disk = vec![0x55; model.len()];
    assert!(image.read_at(&mut disk, 0).is_ok(), "a new image cannot be read");
    assert!(disk == model, "a new image holds something else");
    read_everything(&image);
    let report = qcow2::check(&file);
    assert!(report.is_ok_and(|report| report.problems.is_empty()), "a new image is damaged");
}

/// One step: what it does (`u8`), a value (`u8`), where (`u16`) and how much (`u16`), in pieces of
/// 16 and of 3 bytes.
fn work(writer: &Qcow2Writer, model: &mut [u8], step: &[u8]) {
    let size = model.len();
    let at = usize::from(le_u16(step, 2)) * 16 % size;
    let end = (at + usize::from(le_u16(step, 4)) * 3).min(size);
    match step[0] % 5 {
        0 => {
            let range = ByteRange::from_bounds(at as u64, end as u64);
            assert!(writer.write_zeroes(range).is_ok(), "writing zeros");
            model[at..end].fill(0);
        }
        1 => assert!(writer.flush().is_ok(), "flushing"),
        2 => {
            let Some(compressed) = writer.compressed() else { return };
            let cluster = length(compressed.cluster_bytes());
            let start = at - at % cluster;
            let end = (start + cluster).min(size);
            for (index, byte) in model[start..end].iter_mut().enumerate() {
                *byte = step[1].wrapping_add(index.to_le_bytes()[0] & step[5]);
            }
            let packed = compressed.compress(&model[start..end]);
            let appended = packed.and_then(|packed| compressed.append(start as u64, packed));
            assert!(appended.is_ok(), "appending");
        }
        _ => {
            model[at..end].fill(step[1]);
            assert!(writer.write_at(&model[at..end], at as u64).is_ok(), "writing");
        }
    }
}
