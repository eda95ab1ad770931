//! A new refcount structure.

use super::super::header::{Header, MAX_REFCOUNT_TABLE_BYTES, field};
use super::super::refcount::set_count;
use crate::bytes::{encode_table, length, put};
use std::collections::BTreeSet;
use vmtide_block::{BlockError, Result, WritableBlockDevice};

/// Writes `counts` as a new refcount structure behind the file's end and makes the header lead to
/// it. Its own clusters are added to the counts.
pub(super) fn write(
    file: &dyn WritableBlockDevice,
    header: &Header,
    counts: &mut Vec<u16>,
) -> Result<()> {
    let cluster = header.cluster_bytes();
    let entries = (cluster * 8) >> header.refcount_order;
    let first = counts.len() as u64;
    // The blocks for what is in use, and for the blocks and the table themselves.
    let mut needed: BTreeSet<u64> = counts
        .chunks(length(entries))
        .zip(0u64..)
        .filter(|(part, _)| part.iter().any(|count| *count > 0))
        .map(|(_, index)| index)
        .collect();
    let table_clusters = loop {
        let last_index = needed.last().copied().unwrap_or(0);
        let table_clusters = ((last_index + 1) * 8).div_ceil(cluster);
        let end = first + needed.len() as u64 + table_clusters;
        let before = needed.len();
        needed.extend(first / entries..=(end - 1) / entries);
        if needed.len() == before {
            break table_clusters;
        }
    };
    if table_clusters * cluster > MAX_REFCOUNT_TABLE_BYTES.max(cluster) {
        return Err(BlockError::unsupported(
            file.name(),
            "is too large for a new refcount table; copy it to a new image",
        ));
    }
    let end = first + needed.len() as u64 + table_clusters;
    counts.resize(length(end), 1);
    file.resize(end * cluster)?;
    let mut table = vec![0u64; length(table_clusters * cluster / 8)];
    for (index, place) in needed.iter().zip(first..) {
        let mut bytes = vec![0u8; length(cluster)];
        let part = counts.iter().skip(length(index * entries)).take(length(entries));
        for (entry, count) in (0u64..).zip(part) {
            set_count(&mut bytes, header.refcount_order, entry, u64::from(*count));
        }
        file.write_at(&bytes, place * cluster)?;
        if let Some(slot) = table.get_mut(length(*index)) {
            *slot = place * cluster;
        }
    }
    let table_offset = (end - table_clusters) * cluster;
    file.write_at(&encode_table(&table), table_offset)?;
    file.flush()?;
    let mut fields = [0u8; 12];
    put(&mut fields, 0, &table_offset.to_be_bytes());
    put(&mut fields, 8, &u32::try_from(table_clusters).unwrap_or(u32::MAX).to_be_bytes());
    file.write_at(&fields, field::REFCOUNT_TABLE_OFFSET as u64)?;
    file.flush()
}
