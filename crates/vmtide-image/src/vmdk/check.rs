//! Checking an image's tables, and repairing what can be repaired without guessing.
//!
//! | found | repaired by |
//! |---|---|
//! | the two sets of tables differ, or the second leads nowhere | the first one, which readers use, is copied over the second |
//! | the first directory leads nowhere, the second leads to a table | the first is led to that table |
//! | space at the end that no table names | it is cut off |
//! | an extent says that a writer is at work | the mark is removed, where nothing else is wrong |
//! | grains outside the file, used twice or inside tables; a compressed grain in another's place | nothing: data is lost or mixed |

use super::ExtentFiles;
use super::descriptor::{Access, ExtentLine, ExtentType};
use super::disk::Handle;
use super::grains::Grains;
use super::head::{Head, effective_header};
use super::hosted::{GRAIN_MARKER_BYTES, SECTOR, UNCLEAN_AT, flag};
use super::layout::{Grain, Kind, SparseLayout};
use super::sparse::{entry, table_in_file};
use crate::bytes::{le_u32, le_u64, length};
use crate::{CheckReport, Problem, Repair, Severity};
use std::sync::Arc;
use vmtide_block::{
    BlockDevice, ByteRange, CancelToken, Result, WritableBlockDevice, for_each_extent,
};

/// Checks all files of the image, this one first.
///
/// # Errors
/// Where there is no header or descriptor to begin with; what the medium says.
pub(crate) fn check(file: Arc<dyn BlockDevice>, files: &dyn ExtentFiles) -> Result<CheckReport> {
    check_files(&Handle::reading(file), files, Repair::Nothing)
}

/// Checks all files of the image and repairs what `repair` allows.
///
/// # Errors
/// As [`check`].
pub(crate) fn repair(
    file: Arc<dyn WritableBlockDevice>,
    files: &dyn ExtentFiles,
    repair: Repair,
) -> Result<CheckReport> {
    check_files(&Handle::writing(file), files, repair)
}

fn check_files(file: &Handle, files: &dyn ExtentFiles, repair: Repair) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let head = Head::read_image(&*file.reader)?;
    for detail in oddities(&head) {
        let detail = format!("{}: {detail}", file.reader.name());
        report.add(Problem { severity: Severity::Note, detail, repaired: false });
    }
    let lines = match &head {
        Head::Descriptor(descriptor, _) => &descriptor.extents[..],
        Head::Hosted { descriptor: Some((text, _)), .. } if text.extents.len() > 1 => &text.extents,
        _ => return check_sparse(file, repair, &mut report).map(|()| report),
    };
    let mut own = matches!(head, Head::Hosted { .. }).then(|| file.clone());
    for line in lines {
        if matches!(line.kind, ExtentType::Zero) || line.access == Access::None {
            report.size_bytes += line.sectors * SECTOR;
            continue;
        }
        let own = if line.kind == ExtentType::Sparse { own.take() } else { None };
        let opened = match (own, repair) {
            (Some(file), _) => Ok(file),
            (None, Repair::Nothing) => files.open(&line.file).map(Handle::reading),
            (None, _) => files.open_writable(&line.file).map(Handle::writing),
        };
        match opened {
            Ok(file) => check_extent(&file, line, repair, &mut report)?,
            Err(error) => {
                report.size_bytes += line.sectors * SECTOR;
                report.add(error_of(format!("extent file {:?}: {error}", line.file)));
            }
        }
    }
    Ok(report)
}

/// What is odd in what the file begins with, and harms no reader.
fn oddities(head: &Head) -> Vec<String> {
    let mut found = head.descriptor().map_or_else(Vec::new, |(text, _)| text.oddities.clone());
    if let Head::Hosted { header, .. } = head
        && let (true, Some(bytes)) = (header.has(flag::NEWLINES), header.newlines)
    {
        let detail = "flag 1 says that there are newlines";
        found.push(format!("VMDK sparse header at 0x0: bytes {bytes:02x?} at 0x49; {detail}"));
    }
    found
}

fn error_of(detail: String) -> Problem {
    Problem { severity: Severity::Error, detail, repaired: false }
}

fn check_extent(
    file: &Handle,
    line: &ExtentLine,
    repair: Repair,
    report: &mut CheckReport,
) -> Result<()> {
    if line.kind == ExtentType::Sparse {
        let before = report.size_bytes;
        match check_sparse(file, repair, report) {
            Err(error) => {
                report.add(error_of(error.to_string()));
                report.size_bytes = before + line.sectors * SECTOR;
            }
            Ok(()) if report.size_bytes - before < line.sectors * SECTOR => {
                report.add(error_of(format!(
                    "{}: the descriptor says {} sectors, the extent's header {}",
                    file.reader.name(),
                    line.sectors,
                    (report.size_bytes - before) / SECTOR
                )));
            }
            Ok(()) => report.size_bytes = before + line.sectors * SECTOR,
        }
        return Ok(());
    }
    let wanted = line.sectors * SECTOR;
    report.size_bytes += wanted;
    let size = file.reader.size_bytes();
    let start = line.offset_sectors.saturating_mul(SECTOR);
    if start.saturating_add(wanted) > size {
        report.add(error_of(format!(
            "{}: a flat extent of {} sectors from sector {} in a file of {size} bytes: it is cut off",
            file.reader.name(),
            line.sectors,
            line.offset_sectors
        )));
    }
    let range = ByteRange::from_bounds(start, start.saturating_add(wanted).min(size));
    for_each_extent(&*file.reader, range, &CancelToken::new(), |extent| {
        if !extent.kind.reads_as_zero() {
            report.allocated_bytes += extent.range.length;
        }
        Ok(())
    })
}

/// The check of one sparse extent.
struct SparseCheck<'a> {
    file: &'a Handle,
    name: String,
    file_bytes: u64,
    layout: SparseLayout,
    repair: Repair,
    report: &'a mut CheckReport,
    grains: Grains,
    /// The first byte that no table, header or descriptor has.
    metadata_end: u64,
    /// Whether something is wrong that was not repaired.
    broken: bool,
}

fn check_sparse(file: &Handle, repair: Repair, report: &mut CheckReport) -> Result<()> {
    let reader = &*file.reader;
    let (layout, descriptor) = match Head::read(reader)? {
        Head::Hosted { header, .. } => match effective_header(reader, &header)? {
            Some(found) => {
                // Where it is said to be, it is inside the file.
                let range = header.descriptor_range(reader)?.unwrap_or((0, 0));
                (found.layout(), (range.0 / SECTOR, (range.0 + range.1) / SECTOR))
            }
            None => {
                header.layout().validate(&reader.name())?;
                report.size_bytes += header.layout().size_bytes();
                report.add(error_of(format!(
                    "{}: VMDK footer: it is not at the end of the file: the stream was cut off, or \
                     can be read by its markers only",
                    reader.name()
                )));
                return Ok(());
            }
        },
        Head::Esx(layout) => (layout, (0, 0)),
        Head::Descriptor(..) => {
            report.add(error_of(format!("{}: a descriptor, not an extent", reader.name())));
            return Ok(());
        }
    };
    layout.validate(&reader.name())?;
    report.size_bytes += layout.size_bytes();
    let mut grains = Grains::new(layout.grain_sectors);
    let mut metadata_end = SECTOR;
    if descriptor.0 > layout.directory_sector && !layout.compressed {
        // It outgrew its place in front of the tables, and takes sectors among the grains.
        grains.add(descriptor.0, descriptor.1);
    } else {
        metadata_end = descriptor.1.max(1).saturating_mul(SECTOR);
    }
    let mut check = SparseCheck {
        file,
        name: reader.name(),
        file_bytes: reader.size_bytes(),
        repair,
        report,
        grains,
        layout,
        metadata_end,
        broken: false,
    };
    check.run()
}

impl SparseCheck<'_> {
    fn run(&mut self) -> Result<()> {
        let first = self.directory(self.layout.directory_sector);
        let spare = self.layout.redundant_sector.and_then(|sector| self.directory(sector));
        if first.is_none() {
            self.error(format!(
                "grain directory at sector {}: its {} entries are not inside the file of {} bytes",
                self.layout.directory_sector,
                self.layout.tables(),
                self.file_bytes
            ));
        }
        if let (Some(sector), None) = (self.layout.redundant_sector, spare) {
            self.note(format!("redundant grain directory at sector {sector}: not inside the file"));
        }
        let Some(used) = first.or(spare) else {
            return Ok(());
        };
        let page_bytes = 4096u64;
        let size = self.layout.tables() * self.layout.entry_bytes();
        let mut at = 0;
        while at < size {
            let bytes = self.read(used + at, page_bytes.min(size - at))?;
            let spares = match spare.filter(|_| first.is_some()) {
                Some(spare) => Some(self.read(spare + at, page_bytes.min(size - at))?),
                None => None,
            };
            let width = self.layout.entry_bytes();
            for index in 0..bytes.len() as u64 / width {
                let number = at / width + index;
                let spare = spares.as_ref().map(|bytes| entry(bytes, index * width, width));
                self.table(number, used, entry(&bytes, index * width, width), spare)?;
            }
            at += page_bytes;
        }
        self.use_of_space()?;
        self.unclean()
    }

    /// Where a directory is, which then is in use.
    fn directory(&mut self, sector: u64) -> Option<u64> {
        let (at, size) = self.layout.directory_range(sector, self.file_bytes)?;
        // Streams have their tables behind the grains.
        if !self.layout.compressed {
            self.metadata_end = self.metadata_end.max(at + size);
        }
        Some(at)
    }

    fn read(&self, at: u64, size: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length(size)];
        self.file.reader.read_at(&mut bytes, at)?;
        Ok(bytes)
    }

    fn locate(&self, number: u64, entry: u64) -> Result<u64, String> {
        table_in_file(&*self.file.reader, &self.layout, number, entry)
    }

    /// Checks a grain table by its entry in the directory at `directory`, and its copy.
    fn table(&mut self, number: u64, directory: u64, entry: u64, spare: Option<u64>) -> Result<()> {
        let spare_at = spare.filter(|spare| *spare != 0).map(|spare| self.locate(number, spare));
        if entry == 0 {
            if let Some(Ok(_)) = spare_at {
                self.note(format!("redundant grain table {number}: there is no first one"));
            }
            return Ok(());
        }
        let at = match (self.locate(number, entry), &spare_at) {
            (Ok(at), _) => at,
            (Err(detail), Some(Ok(spare_at))) => {
                let detail = format!("grain directory entry {number}: {entry:#x}: {detail}");
                let value = u32::try_from(spare_at / SECTOR).unwrap_or(0).to_le_bytes();
                self.mend(Severity::Error, detail, &value, directory + number * 4)?;
                *spare_at
            }
            (Err(detail), _) => {
                self.error(format!("grain directory entry {number}: {entry:#x}: {detail}"));
                return Ok(());
            }
        };
        let bytes = self.read(at, self.layout.entries_in(number) * self.layout.entry_bytes())?;
        match spare_at {
            Some(Ok(spare_at)) if spare_at != at => self.compare(number, &bytes, spare_at)?,
            Some(Err(detail)) => {
                let spare = spare.unwrap_or(0);
                self.note(format!(
                    "redundant grain directory entry {number}: {spare:#x}: {detail}"
                ));
            }
            _ => {}
        }
        if !self.layout.compressed {
            self.metadata_end = self.metadata_end.max(at + bytes.len() as u64);
        }
        let width = self.layout.entry_bytes();
        for index in 0..bytes.len() as u64 / width {
            self.grain(number, index, self::entry(&bytes, index * width, width))?;
        }
        Ok(())
    }

    fn compare(&mut self, number: u64, bytes: &[u8], spare_at: u64) -> Result<()> {
        let spare = self.read(spare_at, bytes.len() as u64)?;
        if !self.layout.compressed {
            self.metadata_end = self.metadata_end.max(spare_at + bytes.len() as u64);
        }
        let differ = bytes.chunks(4).zip(spare.chunks(4)).filter(|(a, b)| a != b).count();
        if differ == 0 {
            return Ok(());
        }
        let detail = format!(
            "redundant grain table {number} at {spare_at:#x}: {differ} entries differ from the first \
             table, which counts"
        );
        self.mend(Severity::Note, detail, bytes, spare_at)
    }

    fn grain(&mut self, table: u64, index: u64, value: u64) -> Result<()> {
        let number = table * self.layout.entries_per_table + index;
        let what = format!("grain table {table}, entry {index}: {value:#x}");
        let at = match self.layout.grain(value) {
            Ok(Grain::At(at)) => at,
            Ok(_) => return Ok(()),
            Err(detail) => {
                self.error(format!("{what}: {detail}"));
                return Ok(());
            }
        };
        let grain_bytes = self.layout.grain_bytes();
        let start = number * grain_bytes;
        let wanted = grain_bytes.min(self.layout.size_bytes() - start);
        self.report.allocated_bytes += wanted;
        let stored = if self.layout.compressed { SECTOR } else { wanted };
        if at.saturating_add(stored) > self.file_bytes {
            self.error(format!(
                "{what}: the grain at {at:#x} is past the end of the file of {} bytes",
                self.file_bytes
            ));
            return Ok(());
        }
        let mut end = at + grain_bytes;
        if self.layout.compressed {
            match self.compressed_end(at, start) {
                Ok(found) => end = found?,
                Err(detail) => {
                    self.error(format!("{what}: {detail}"));
                    return Ok(());
                }
            }
        }
        self.grains.add(at / SECTOR, end.div_ceil(SECTOR));
        Ok(())
    }

    /// Where a compressed grain ends, by its marker, or what is wrong with that.
    fn compressed_end(&self, at: u64, start: u64) -> Result<Result<u64>, String> {
        if !self.layout.markers {
            return Ok(Ok(at + SECTOR));
        }
        let bytes = match self.read(at, GRAIN_MARKER_BYTES as u64) {
            Ok(bytes) => bytes,
            Err(error) => return Ok(Err(error)),
        };
        let (sector, size) = (le_u64(&bytes, 0), u64::from(le_u32(&bytes, 8)));
        let end = at + GRAIN_MARKER_BYTES as u64 + size;
        if sector != start / SECTOR {
            return Err(format!("the marker at {at:#x} is that of sector {sector} of the disk"));
        }
        if size == 0 || end > self.file_bytes {
            return Err(format!("the marker at {at:#x} says {size} bytes: not inside the file"));
        }
        Ok(Ok(end))
    }

    fn use_of_space(&mut self) -> Result<()> {
        let found = self.grains.overlaps();
        for (first, second) in found.overlaps {
            self.error(format!("the grains at sectors {first} and {second} share their bytes"));
        }
        if !found.all_looked_at {
            self.note("too many grains to find those that are used twice".into());
        }
        if self.layout.kind != Kind::Hosted || self.layout.compressed {
            return Ok(());
        }
        if found.first.is_some_and(|first| first * SECTOR < self.metadata_end) {
            self.error(format!(
                "a grain begins at sector {}, inside the tables, which end at byte {:#x}",
                found.first.unwrap_or(0),
                self.metadata_end
            ));
            return Ok(());
        }
        if !found.all_looked_at || self.broken {
            return Ok(());
        }
        // Grains begin on a grain, so what is in front of the first one is no leak.
        let begin = self.metadata_end.next_multiple_of(self.layout.grain_bytes());
        let last = found.end.unwrap_or(0).saturating_mul(SECTOR).max(begin);
        let used = found.sectors * SECTOR;
        let inside = last.saturating_sub(begin).saturating_sub(used);
        if inside >= self.layout.grain_bytes() {
            self.add(
                Severity::Leak,
                format!("{inside} bytes between grains belong to none"),
                false,
            );
        }
        if self.file_bytes > last {
            let detail = format!(
                "{} bytes behind the last grain at {last:#x} belong to none",
                self.file_bytes - last
            );
            let writer = self.file.writer.as_ref().filter(|_| self.repair != Repair::Nothing);
            if let Some(writer) = writer {
                writer.resize(last)?;
                writer.flush()?;
            }
            let repaired = writer.is_some();
            self.add(Severity::Leak, detail, repaired);
        }
        Ok(())
    }

    fn unclean(&mut self) -> Result<()> {
        if !self.layout.unclean {
            return Ok(());
        }
        let detail = "the header says that a writer is at work, or was when it ended".to_owned();
        if self.broken {
            self.note(detail);
            return Ok(());
        }
        self.mend(Severity::Note, detail, &[0], UNCLEAN_AT)
    }

    /// Reports a problem that writing `bytes` at `at` mends, and does so where it may.
    fn mend(&mut self, severity: Severity, detail: String, bytes: &[u8], at: u64) -> Result<()> {
        let writer = self.file.writer.as_ref().filter(|_| self.repair == Repair::All);
        let repaired = writer.is_some();
        if let Some(writer) = writer {
            writer.write_at(bytes, at)?;
            writer.flush()?;
        }
        self.broken |= !repaired && severity == Severity::Error;
        self.add(severity, detail, repaired);
        Ok(())
    }

    fn error(&mut self, detail: String) {
        self.broken = true;
        self.add(Severity::Error, detail, false);
    }

    fn note(&mut self, detail: String) {
        self.add(Severity::Note, detail, false);
    }

    fn add(&mut self, severity: Severity, detail: String, repaired: bool) {
        let detail = format!("{}: VMDK {detail}", self.name);
        self.report.add(Problem { severity, detail, repaired });
    }
}
