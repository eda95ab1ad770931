//! The target for VHDX's writer.

use super::vhdx::{FIX_CHECKSUMS, WITH_PARENT, fix_checksums};
use super::{SparseFile, believe};
use crate::ImageWriter;
use crate::bytes::{le_u16, le_u32, length};
use crate::vhdx::{self, VhdxCreateOptions, VhdxImage, VhdxKind, VhdxParent, VhdxWriter};
use std::sync::Arc;
use vmtide_block::{BlockDevice, ByteRange, MemoryDevice, RangeSet, WritableBlockDevice};

/// A bit of the first byte of the input: the image is new, and not what the input holds.
const CREATE: u8 = 4;
/// The most operations of one input.
const MAX_OPERATIONS: usize = 24;
/// The bytes of one operation.
const OPERATION_BYTES: usize = 8;
/// The longest range that is made zero: each block in it costs a look at its entry.
const MAX_ZEROED_BYTES: u64 = 1 << 30;
/// The largest disk that is made; a fixed one gets a table entry for each block.
const MAX_GROWN_BYTES: u64 = 64 << 30;

/// An image and what is done to it. The first byte says as for [`super::vhdx_read`], and whether
/// the image is new; the second how many operations follow, eight bytes each; the rest is a
/// [`SparseFile`], or what the new image is like.
///
/// # Panics
/// Where what was written is not there: that is a finding.
pub fn vhdx_write(input: &[u8]) {
    let [mode, count, rest @ ..] = input else {
        return;
    };
    let count = usize::from(*count).min(MAX_OPERATIONS).min(rest.len() / OPERATION_BYTES);
    let (operations, bytes) = rest.split_at(count * OPERATION_BYTES);
    let parent: Option<Arc<dyn BlockDevice>> = (mode & WITH_PARENT != 0)
        .then(|| Arc::new(MemoryDevice::from_bytes(vec![0xaa; 3 << 20])) as Arc<_>);
    let file = if mode & CREATE != 0 {
        match create(bytes, parent.as_ref()) {
            Some(file) => file,
            None => return,
        }
    } else {
        let file = SparseFile::parse(bytes);
        if mode & FIX_CHECKSUMS != 0 {
            fix_checksums(&file);
        }
        Arc::new(file)
    };
    let Ok(writer) = VhdxWriter::open_device(file.clone(), parent.clone()) else {
        return;
    };
    let mut model = Model { known: RangeSet::default(), content: SparseFile::new() };
    let _ = model.content.resize(writer.size_bytes());
    for operation in operations.chunks_exact(OPERATION_BYTES) {
        model.apply(&writer, operation);
    }
    model.compare(&writer);
    if writer.finish().is_err() {
        return;
    }
    drop(writer);
    let image = VhdxImage::open_device(file.clone(), parent);
    assert!(image.is_ok(), "a finished image does not open: {:?}", image.err());
    if let Ok(image) = image {
        model.compare(&image);
    }
    if let Ok(report) = vhdx::check(&*file) {
        believe(&report);
        assert!(mode & CREATE == 0 || report.errors == 0, "damaged: {:?}", report.problems);
    }
}

/// A new image; `None` where it cannot be.
fn create(bytes: &[u8], parent: Option<&Arc<dyn BlockDevice>>) -> Option<Arc<SparseFile>> {
    let [shape, sectors @ ..] = bytes else {
        return None;
    };
    let sector_bytes = if shape & 16 != 0 { 4096 } else { 512 };
    let options = VhdxCreateOptions {
        block_size_bytes: Some(1 << (20 + (shape & 15).min(9))),
        logical_sector_bytes: sector_bytes,
        kind: if shape & 32 != 0 { VhdxKind::Fixed } else { VhdxKind::Dynamic },
        parent: parent.map(|device| VhdxParent {
            identity: "b04aefb7-d19e-4a81-b789-25b8e9445913".into(),
            disk_id: None,
            relative_path: Some("parent.vhdx".into()),
            absolute_path: None,
            volume_path: None,
            device: device.clone(),
        }),
        ..VhdxCreateOptions::new(
            u64::from(le_u32(sectors, 0)) % (1 << 24) * u64::from(sector_bytes),
        )
    };
    let file = Arc::new(SparseFile::new());
    VhdxWriter::create_device(file.clone(), &options).ok()?;
    Some(file)
}

/// What is known of the disk.
struct Model {
    /// Ranges that were written.
    known: RangeSet,
    /// What they must hold.
    content: SparseFile,
}

impl Model {
    /// Does one operation: kind, value, place in 1/65536 of the disk and then bytes, length.
    fn apply(&mut self, writer: &VhdxWriter, operation: &[u8]) {
        let size_bytes = writer.size_bytes();
        let [kind, value, ..] = operation else {
            return;
        };
        let (place, fine) = (u64::from(le_u16(operation, 2)), u64::from(le_u16(operation, 4)));
        let at = (size_bytes / 65_536 * place + fine).min(size_bytes);
        let count = u64::from(le_u16(operation, 6));
        match kind % 8 {
            0..=2 => {
                let data = vec![*value; length(count.min(size_bytes - at))];
                let range = ByteRange::new(at, data.len() as u64);
                let result = writer.write_at(&data, at);
                let _ = self.content.write_at(&data, at);
                self.learn(range, result.is_ok());
            }
            3 | 4 => {
                // Whole blocks now and then.
                let factor = if value & 1 == 0 { 1 } else { 4096 };
                let longest = MAX_ZEROED_BYTES.min(size_bytes - at);
                let range = ByteRange::new(at, (count * factor).min(longest));
                let result = writer.write_zeroes(range);
                let _ = self.content.write_zeroes(range);
                self.learn(range, result.is_ok());
            }
            5 => {
                let sector_bytes = u64::from(BlockDevice::block_size_bytes(writer));
                let size = (u64::from(le_u32(operation, 4)) << (value % 16)) * sector_bytes;
                self.resize(writer, size % (MAX_GROWN_BYTES + 1));
            }
            6 => drop(writer.flush()),
            _ => self.compare(writer),
        }
    }

    fn learn(&mut self, range: ByteRange, is_there: bool) {
        if is_there {
            self.known.insert(range);
        } else {
            let mut lost = RangeSet::default();
            lost.insert(range);
            self.known = self.known.subtract(&lost);
        }
    }

    fn resize(&mut self, writer: &VhdxWriter, size_bytes: u64) {
        let old_bytes = writer.size_bytes();
        let result = writer.resize(size_bytes);
        let now_bytes = writer.size_bytes();
        assert!(now_bytes == if result.is_ok() { size_bytes } else { now_bytes });
        self.known = self.known.clamp(now_bytes);
        let _ = self.content.resize(now_bytes);
        if result.is_ok() && now_bytes > old_bytes {
            self.known.insert(ByteRange::from_bounds(old_bytes, now_bytes.min(old_bytes + 9000)));
        }
    }

    /// Holds the disk against what is known.
    fn compare(&self, disk: &dyn BlockDevice) {
        for range in self.known.iter() {
            // Long ranges are zeros that need not be read from end to end.
            let piece = range.length.min(32 << 10);
            for at in [range.offset, range.end() - piece] {
                let (mut found, mut expected) = (vec![0; length(piece)], vec![0; length(piece)]);
                let (read, model) =
                    (disk.read_at(&mut found, at), self.content.read_at(&mut expected, at));
                assert!(read.is_ok() && model.is_ok(), "{at}+{piece}: {read:?}");
                assert!(found == expected, "other bytes than were written in {piece} at {at}");
            }
        }
    }
}
