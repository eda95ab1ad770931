//! Internal snapshots (qcow2 specification, "Snapshots").

use super::header::Header;
use crate::SnapshotInfo;
use crate::bytes::{be_u16, be_u32, be_u64, length};
use vmtide_block::{BlockDevice, BlockError, Result};

/// The most bytes of extra data in one entry, as in QEMU.
const MAX_EXTRA_BYTES: u32 = 1024;
/// The bytes of an entry before its variable part.
const FIXED_BYTES: u64 = 40;

/// One entry of the snapshot table.
pub(crate) struct SnapshotEntry {
    pub(crate) info: SnapshotInfo,
    pub(crate) l1_offset: u64,
    pub(crate) l1_entries: u32,
    /// The bytes of the entry, padding included.
    table_bytes: u64,
}

/// The bytes of the whole snapshot table.
pub(crate) fn table_bytes(entries: &[SnapshotEntry]) -> u64 {
    entries.iter().map(|entry| entry.table_bytes).sum()
}

/// Reads the snapshot table.
pub(crate) fn read_snapshots(
    file: &dyn BlockDevice,
    header: &Header,
) -> Result<Vec<SnapshotEntry>> {
    let mut entries = Vec::new();
    let mut at = header.snapshots_offset;
    for index in 0..header.snapshot_count {
        let entry = read_entry(file, header, index, at)?;
        at += entry.table_bytes;
        entries.push(entry);
    }
    Ok(entries)
}

fn read_entry(
    file: &dyn BlockDevice,
    header: &Header,
    index: u32,
    at: u64,
) -> Result<SnapshotEntry> {
    let damaged = |detail: String| {
        BlockError::damaged(
            file.name(),
            format!("snapshot table at {at:#x}, entry {index}: {detail}"),
        )
    };
    let read = |offset: u64, size: u64| -> Result<Vec<u8>> {
        let inside = offset.checked_add(size).is_some_and(|end| end <= file.size_bytes());
        if !inside {
            return Err(damaged(format!(
                "its {size} bytes at {offset:#x} are past the end of the file"
            )));
        }
        let mut bytes = vec![0u8; length(size)];
        file.read_at(&mut bytes, offset)?;
        Ok(bytes)
    };
    let fixed = read(at, FIXED_BYTES)?;
    let extra_bytes = be_u32(&fixed, 36);
    if extra_bytes > MAX_EXTRA_BYTES {
        return Err(damaged(format!(
            "{extra_bytes} bytes of extra data, at most {MAX_EXTRA_BYTES} are allowed"
        )));
    }
    let (id_bytes, name_bytes) = (be_u16(&fixed, 12), be_u16(&fixed, 14));
    let variable_bytes = u64::from(extra_bytes) + u64::from(id_bytes) + u64::from(name_bytes);
    let variable = read(at + FIXED_BYTES, variable_bytes)?;
    let (extra, names) = variable.split_at(length(u64::from(extra_bytes)));
    let (id, name) = names.split_at(usize::from(id_bytes));
    let l1_offset = be_u64(&fixed, 0);
    if !l1_offset.is_multiple_of(header.cluster_bytes()) {
        return Err(damaged(format!("its L1 table at {l1_offset:#x} is not cluster-aligned")));
    }
    let size_bytes = if extra.len() >= 16 { be_u64(extra, 8) } else { header.size_bytes };
    if size_bytes > i64::MAX as u64 {
        return Err(damaged(format!("a disk of {size_bytes} bytes")));
    }
    let vm_state_bytes =
        if extra.len() >= 8 { be_u64(extra, 0) } else { u64::from(be_u32(&fixed, 32)) };
    let entry = SnapshotEntry {
        info: SnapshotInfo {
            id: String::from_utf8_lossy(id).into_owned(),
            name: String::from_utf8_lossy(name).into_owned(),
            size_bytes,
            created_unix_seconds: be_u32(&fixed, 16),
            vm_state_bytes,
        },
        l1_offset,
        l1_entries: be_u32(&fixed, 8),
        table_bytes: (FIXED_BYTES + variable_bytes).next_multiple_of(8),
    };
    Ok(entry)
}
