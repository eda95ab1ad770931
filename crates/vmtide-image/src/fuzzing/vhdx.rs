//! The target for VHDX's reader.

use super::{SparseFile, believe, read_everything};
use crate::bytes::le_u32;
use crate::vhdx::{self, VhdxImage};
use std::sync::Arc;
use vmtide_block::{BlockDevice, MemoryDevice, WritableBlockDevice};

/// Bits of the first byte of the input.
pub(super) const FIX_CHECKSUMS: u8 = 1;
pub(super) const WITH_PARENT: u8 = 2;
/// Where headers and region tables are, and how long they are (MS-VHDX 2.2).
const SEALED: [(u64, usize); 4] =
    [(64 << 10, 4096), (128 << 10, 4096), (192 << 10, 64 << 10), (256 << 10, 64 << 10)];
/// The first MiB of the log, where its entries get right checksums: where tools put it.
const LOG_AT: u64 = 1 << 20;
const LOG_BYTES: usize = 1 << 20;

/// An image. The first byte says whether checksums are made right, so that what is behind them is
/// reached, and whether there is a parent; the rest is a [`SparseFile`].
pub fn vhdx_read(input: &[u8]) {
    let Some((mode, bytes)) = input.split_first() else {
        return;
    };
    let file = SparseFile::parse(bytes);
    if mode & FIX_CHECKSUMS != 0 {
        fix_checksums(&file);
    }
    let _ = vhdx::identity(&file);
    let _ = vhdx::parent_link(&file);
    let _ = vhdx::info(&file);
    if let Ok(report) = vhdx::check(&file) {
        believe(&report);
    }
    let parent: Option<Arc<dyn BlockDevice>> = (mode & WITH_PARENT != 0)
        .then(|| Arc::new(MemoryDevice::from_bytes(vec![0xaa; 3 << 20])) as Arc<_>);
    if let Ok(image) = VhdxImage::open_device(Arc::new(file), parent) {
        read_everything(&image);
    }
}

pub(super) fn fix_checksums(file: &SparseFile) {
    for (at, bytes) in SEALED {
        let mut structure = vec![0; bytes];
        if file.read_at(&mut structure, at).is_ok() {
            vhdx::checksum::seal(&mut structure);
            let _ = file.write_at(&structure[..8], at);
        }
    }
    let mut log = vec![0; LOG_BYTES];
    if file.read_at(&mut log, LOG_AT).is_err() {
        return;
    }
    let mut at = 0;
    while at < log.len() {
        let entry_bytes = le_u32(&log, at + 8) as usize;
        let is_entry = log[at..].starts_with(b"loge");
        match log.get_mut(at..at.saturating_add(entry_bytes)) {
            Some(entry) if is_entry && entry.len() >= 4096 => {
                vhdx::checksum::seal(entry);
                let _ = file.write_at(&entry[..8], LOG_AT + at as u64);
                at += entry.len().next_multiple_of(4096);
            }
            _ => at += 4096,
        }
    }
}
