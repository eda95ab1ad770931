//! The targets for VMDK.

use super::{SparseFile, believe, read_everything};
use crate::bytes::{le_u16, le_u32, length};
use crate::vmdk::{
    self, ExtentFiles, VmdkCreateOptions, VmdkImage, VmdkKind, VmdkParent, VmdkWriter,
};
use crate::{ImageWriter, Repair};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use vmtide_block::{BlockDevice, ByteRange, MemoryDevice, Result, WritableBlockDevice};

/// Bits of the first byte of the input.
const PLAIN_BYTES: u8 = 1;
const WITH_PARENT: u8 = 2;
const WITH_DESCRIPTOR: u8 = 4;
const CREATE: u8 = 8;

/// The largest disk that is created.
const CREATED_BYTES: u64 = 1 << 20;
/// The most steps of one workload.
const STEPS: usize = 64;

/// The files of an image; every name that is not there is the extent.
struct Files {
    main: Arc<dyn WritableBlockDevice>,
    extent: Arc<dyn WritableBlockDevice>,
}

impl Files {
    /// The first byte says what follows: the file as it is or as a [`SparseFile`], or a descriptor
    /// (its length as `u16`) and then the file of all its extents.
    fn parse(mode: u8, input: &[u8]) -> Self {
        let file = |bytes: &[u8]| -> Arc<dyn WritableBlockDevice> {
            match mode & PLAIN_BYTES {
                0 => Arc::new(SparseFile::parse(bytes)),
                _ => Arc::new(MemoryDevice::from_bytes(bytes.to_vec())),
            }
        };
        if mode & WITH_DESCRIPTOR == 0 {
            let main = file(input);
            return Self { extent: main.clone(), main };
        }
        let text = usize::from(le_u16(input, 0));
        let rest = input.get(2..).unwrap_or_default();
        let (text, extent) = rest.split_at(text.min(rest.len()));
        let main = Arc::new(MemoryDevice::from_bytes(text.to_vec()));
        Self { main, extent: file(extent) }
    }
}

impl ExtentFiles for Files {
    fn open(&self, _name: &str) -> Result<Arc<dyn BlockDevice>> {
        Ok(self.extent.clone())
    }

    fn open_writable(&self, _name: &str) -> Result<Arc<dyn WritableBlockDevice>> {
        Ok(self.extent.clone())
    }
}

fn parent(mode: u8) -> Option<Arc<dyn BlockDevice>> {
    let bytes = vec![0xaa; 300_000];
    (mode & WITH_PARENT != 0).then(|| Arc::new(MemoryDevice::from_bytes(bytes)) as Arc<_>)
}

/// An image, described as in the head of this file: opened, read, checked.
pub fn vmdk_read(input: &[u8]) {
    let Some((mode, bytes)) = input.split_first() else {
        return;
    };
    let files = Files::parse(*mode, bytes);
    let main: Arc<dyn BlockDevice> = files.main.clone();
    let _ = vmdk::identity(&*main);
    let _ = vmdk::parent_link(&*main);
    let _ = vmdk::info(&*main);
    if let Ok(report) = vmdk::check(main.clone(), &files) {
        believe(&report);
    }
    if let Ok(image) = VmdkImage::open_device(main, &files, parent(*mode)) {
        read_everything(&image);
    }
}

/// An image as in [`vmdk_read`], repaired and written; or, by the first byte, a new image and a
/// workload, which is held against a byte vector.
///
/// # Panics
/// Where a new image does not hold what was written: that is a finding.
pub fn vmdk_write(input: &[u8]) {
    let Some((mode, bytes)) = input.split_first() else {
        return;
    };
    if mode & CREATE != 0 {
        return created(*mode, bytes);
    }
    let files = Files::parse(*mode, bytes);
    if let Ok(report) = vmdk::repair(files.main.clone(), &files, Repair::All) {
        believe(&report);
    }
    let Ok(writer) = VmdkWriter::open_device(files.main.clone(), &files, parent(*mode)) else {
        return;
    };
    let size_bytes = writer.size_bytes();
    for offset in [0, size_bytes / 2, size_bytes.saturating_sub(5000)] {
        let room = length(size_bytes - offset).min(5000);
        let _ = writer.write_at(&[7; 5000][..room], offset);
        let _ = writer.write_zeroes(ByteRange::new(offset, room as u64 / 2));
        let _ = writer.flush();
    }
    let _ = writer.finish();
    let _ = VmdkImage::open_device(files.main.clone(), &files, parent(*mode));
}

/// The files of a new image.
#[derive(Default)]
struct NewFiles(Mutex<BTreeMap<String, Arc<MemoryDevice>>>);

impl NewFiles {
    fn get(&self, name: &str) -> Arc<MemoryDevice> {
        self.0.lock().entry(name.to_owned()).or_default().clone()
    }
}

impl ExtentFiles for NewFiles {
    fn open(&self, name: &str) -> Result<Arc<dyn BlockDevice>> {
        Ok(self.get(name))
    }

    fn open_writable(&self, name: &str) -> Result<Arc<dyn WritableBlockDevice>> {
        Ok(self.get(name))
    }
}

/// Makes an image as the input says and works on it.
fn created(mode: u8, input: &[u8]) {
    let kind = VmdkKind::ALL[usize::from(le_u16(input, 0)) % VmdkKind::ALL.len()];
    let device = parent(mode).filter(|_| matches!(kind, VmdkKind::MonolithicSparse));
    let options = VmdkCreateOptions {
        kind,
        grain_size_bytes: 4096 << (le_u16(input, 2) % 5),
        parent: device.clone().map(|device| VmdkParent {
            hint: "parent".into(),
            content_id: "1".into(),
            device,
        }),
        ..VmdkCreateOptions::new(u64::from(le_u32(input, 4)) % CREATED_BYTES + 1)
    };
    let files = NewFiles::default();
    let made = VmdkWriter::create_files("x.vmdk", &options, &mut |name| Ok(files.get(name)));
    let Ok(writer) = made else {
        return;
    };
    let mut model = vec![0; length(writer.size_bytes())];
    if let Some(device) = &device {
        let present = model.len().min(length(device.size_bytes()));
        let _ = device.read_at(&mut model[..present], 0);
    }
    for step in input.get(8..).unwrap_or_default().chunks_exact(6).take(STEPS) {
        work(&writer, &mut model, step);
    }
    assert!(writer.finish().is_ok(), "finishing a new image");
    let image = VmdkImage::open_device(files.get("x.vmdk"), &files, device);
    let Ok(image) = image else {
        assert!(image.is_ok(), "a new image does not open");
        return;
    };
    let mut disk = vec![0x55; model.len()];
    assert!(image.read_at(&mut disk, 0).is_ok(), "a new image cannot be read");
    assert!(disk == model, "a new image holds something else");
    read_everything(&image);
    let report = vmdk::check(files.get("x.vmdk"), &files);
    assert!(report.is_ok_and(|report| report.errors == 0), "a new image is damaged");
}

/// One step: what it does (`u8`), a value (`u8`), where (`u16`) and how much (`u16`), in pieces of
/// 16 and of 3 bytes.
fn work(writer: &VmdkWriter, model: &mut [u8], step: &[u8]) {
    let size = model.len();
    let at = usize::from(le_u16(step, 2)) * 16 % size;
    let end = (at + usize::from(le_u16(step, 4)) * 3).min(size);
    match step[0] % 4 {
        0 => {
            if writer.write_zeroes(ByteRange::from_bounds(at as u64, end as u64)).is_ok() {
                model[at..end].fill(0);
            }
        }
        1 => assert!(writer.flush().is_ok(), "flushing"),
        _ => {
            let data = vec![step[1]; end - at];
            if writer.write_at(&data, at as u64).is_ok() {
                model[at..end].copy_from_slice(&data);
            }
        }
    }
}
