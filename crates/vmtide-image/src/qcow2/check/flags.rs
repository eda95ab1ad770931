//! The flag "the count is exactly one" and the reserved bits of the disk's L1 and L2 entries. Those
//! of snapshots are not looked at, because nobody writes through them.

use super::super::header::{COMPRESSED, COPIED, Header, OFFSET_MASK};
use super::super::image::read_l1;
use super::super::table::{Geometry, L2Table};
use super::counts::Ones;
use super::references::{L1_RESERVED, L2_RESERVED};
use super::{Checker, error};
use crate::CheckReport;
use vmtide_block::Result;

impl Checker<'_> {
    pub(super) fn check_flags(
        &self,
        header: &Header,
        ones: &Ones,
        report: &mut CheckReport,
    ) -> Result<()> {
        let geometry = Geometry::of(header);
        let Ok(l1) = read_l1(self.file, header.l1_offset, header.l1_entries) else {
            return Ok(());
        };
        for (index, entry) in (0u64..).zip(l1) {
            let offset = entry & OFFSET_MASK;
            let inside = offset.checked_add(geometry.cluster_bytes());
            let usable = offset != 0
                && offset.is_multiple_of(geometry.cluster_bytes())
                && inside.is_some_and(|end| end <= self.file.size_bytes());
            let place = header.l1_offset + index * 8;
            let right = match offset {
                0 => 0,
                _ if usable => {
                    entry & OFFSET_MASK | copied(ones.has(offset >> geometry.cluster_bits))
                }
                _ => entry & !L1_RESERVED,
            };
            if let Some(right) = self.put_right("L1", place, entry, right, report) {
                self.write(place, right)?;
            }
            if usable {
                self.check_l2_flags(&geometry, offset, ones, report)?;
            }
        }
        Ok(())
    }

    fn check_l2_flags(
        &self,
        geometry: &Geometry,
        offset: u64,
        ones: &Ones,
        report: &mut CheckReport,
    ) -> Result<()> {
        let mut table = L2Table::read(self.file, geometry, offset)?;
        let mut changed = false;
        for index in 0..geometry.l2_entries() {
            let (entry, bitmap) = table.entry(geometry, index);
            if entry == 0 {
                continue;
            }
            let right = match entry & COMPRESSED {
                0 => right_entry(geometry, entry, ones),
                // QEMU never sets it on compressed clusters, whatever their count.
                _ => entry & !COPIED,
            };
            let place = offset + index * 8 * geometry.words();
            if let Some(right) = self.put_right("L2", place, entry, right, report) {
                table.set_entry(geometry, index, right, bitmap);
                changed = true;
            }
        }
        if changed && let Some(file) = self.writable {
            file.write_at(&table.to_bytes(), offset)?;
        }
        Ok(())
    }

    /// Reports an entry that is not `right`; the right one where it shall be written.
    fn put_right(
        &self,
        what: &str,
        place: u64,
        entry: u64,
        right: u64,
        report: &mut CheckReport,
    ) -> Option<u64> {
        if entry == right {
            return None;
        }
        let repaired = self.repairs_all().is_some();
        let detail = format!(
            "{what} entry at {place:#x}: {entry:#018x} should be {right:#018x} (bit 63 means a \
             reference count of one; reserved bits are clear)"
        );
        report.add(error(detail, repaired));
        repaired.then_some(right)
    }

    fn write(&self, place: u64, entry: u64) -> Result<()> {
        match self.writable {
            Some(file) => file.write_at(&entry.to_be_bytes(), place),
            None => Ok(()),
        }
    }
}

fn copied(is_one: bool) -> u64 {
    if is_one { COPIED } else { 0 }
}

fn right_entry(geometry: &Geometry, entry: u64, ones: &Ones) -> u64 {
    let offset = entry & OFFSET_MASK;
    let present = offset != 0 || (geometry.external_data && entry & COPIED != 0);
    let flag = match (present, geometry.external_data) {
        // Nothing else can refer to the data file.
        (true, true) => COPIED,
        (true, false) if offset.is_multiple_of(geometry.cluster_bytes()) => {
            copied(ones.has(offset >> geometry.cluster_bits))
        }
        _ => entry & COPIED,
    };
    entry & !L2_RESERVED & !COPIED | flag
}
