//! An open image: its extents one after the other, each with its file and its map.

use super::ExtentFiles;
use super::compressed::CompressedGrains;
use super::descriptor::{Access, Descriptor, ExtentLine, ExtentType};
use super::head::{Head, effective_header};
use super::hosted::{HostedHeader, SECTOR};
use super::layout::SparseLayout;
use super::map::{Map, Mapping, Uniform};
use super::scan::scan;
use super::sparse::{ScannedMap, SparseMap};
use super::sparse_writer::SparseWriter;
use super::tables::MAX_TABLES;
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Result, WritableBlockDevice};

/// A file of the image, open for reading and perhaps for writing.
#[derive(Clone)]
pub(super) struct Handle {
    pub(super) reader: Arc<dyn BlockDevice>,
    pub(super) writer: Option<Arc<dyn WritableBlockDevice>>,
}

impl Handle {
    pub(super) fn reading(reader: Arc<dyn BlockDevice>) -> Self {
        Self { reader, writer: None }
    }

    pub(super) fn writing(writer: Arc<dyn WritableBlockDevice>) -> Self {
        Self { reader: writer.clone(), writer: Some(writer) }
    }
}

/// One extent of an open disk.
pub(super) struct Part {
    /// The bytes of the disk.
    pub(super) range: ByteRange,
    pub(super) access: Access,
    pub(super) file: Option<Handle>,
    /// Whether its bytes lie in the file that the image was opened by.
    pub(super) in_main_file: bool,
    /// Whether the file holds the bytes as they are.
    pub(super) flat: bool,
    pub(super) map: Arc<dyn Map>,
    pub(super) compressed: Option<CompressedGrains>,
    /// The map again, where it may be changed.
    pub(super) sparse_writer: Option<Arc<SparseWriter>>,
}

/// An open disk.
pub(super) struct Disk {
    pub(super) name: String,
    pub(super) parts: Vec<Part>,
    pub(super) size_bytes: u64,
    pub(super) parent: Option<Arc<dyn BlockDevice>>,
    /// The descriptor and where it begins in the main file.
    pub(super) descriptor: Option<(Descriptor, u64)>,
}

impl Disk {
    /// Opens all files of an image.
    pub(super) fn open(
        file: Handle,
        files: &dyn ExtentFiles,
        parent: Option<Arc<dyn BlockDevice>>,
    ) -> Result<Self> {
        let name = file.reader.name();
        let head = Head::read_image(&*file.reader)?;
        let descriptor = head.descriptor().map(|(text, at)| (text.clone(), at));
        check_parent(&name, descriptor.as_ref().map(|(text, _)| text), parent.is_some())?;
        let mut opening = Opening {
            files,
            parent: parent.clone(),
            is_writable: file.writer.is_some(),
            share: 1,
            tables: 0,
            parts: Vec::new(),
            at: 0,
        };
        match &head {
            Head::Descriptor(descriptor, _) => opening.lines(descriptor, None)?,
            Head::Hosted { descriptor: Some((descriptor, _)), .. }
                if descriptor.extents.len() > 1 =>
            {
                opening.lines(descriptor, Some(&file))?;
            }
            Head::Hosted { header, descriptor } => {
                let access = descriptor
                    .as_ref()
                    .and_then(|(text, _)| text.extents.first())
                    .map_or(Access::ReadWrite, |line| line.access);
                opening.sparse(file, access, header.capacity, true)?;
            }
            Head::Esx(layout) => {
                opening.sparse(file, Access::ReadWrite, layout.capacity_sectors, true)?;
            }
        }
        Ok(Self { name, size_bytes: opening.at, parts: opening.parts, parent, descriptor })
    }

    /// The part that holds byte `at`, which is inside the disk.
    pub(super) fn part(&self, at: u64) -> Result<&Part> {
        let after = self.parts.partition_point(|part| part.range.offset <= at);
        self.parts.get(after.wrapping_sub(1)).filter(|part| part.range.contains(at)).ok_or_else(
            || BlockError::damaged(&self.name, format!("no extent holds byte {at} of the disk")),
        )
    }
}

/// Succeeds where the image can be read with the parent given.
fn check_parent(name: &str, descriptor: Option<&Descriptor>, is_given: bool) -> Result<()> {
    match descriptor {
        Some(descriptor) if descriptor.parent_cid.is_some() && !is_given => {
            Err(BlockError::unsupported(
                name,
                format!(
                    "depends on the parent {:?}, which was not opened; allow it (backing policy) \
                     if you trust the image",
                    descriptor.parent_hint.as_deref().unwrap_or("(not named)")
                ),
            ))
        }
        _ => Ok(()),
    }
}

/// The work of opening the extents.
struct Opening<'a> {
    files: &'a dyn ExtentFiles,
    parent: Option<Arc<dyn BlockDevice>>,
    is_writable: bool,
    /// How many sparse extents share the memory for tables.
    share: u64,
    /// The grain tables of all extents that are written so far.
    tables: u64,
    parts: Vec<Part>,
    /// Where the next extent begins on the disk.
    at: u64,
}

impl Opening<'_> {
    /// Opens the extents of a descriptor; the first sparse one is `own`, where the descriptor is
    /// embedded in it.
    fn lines(&mut self, descriptor: &Descriptor, own: Option<&Handle>) -> Result<()> {
        let sparse = |line: &&ExtentLine| line.kind == ExtentType::Sparse;
        self.share = descriptor.extents.iter().filter(sparse).count() as u64;
        let mut uses = Uses::new(self.files.place(None));
        let mut own = own.cloned();
        for line in &descriptor.extents {
            if line.sectors == 0 {
                continue;
            }
            let own = if line.kind == ExtentType::Sparse { own.take() } else { None };
            let is_own = own.is_some();
            match (line.access, line.kind) {
                (_, ExtentType::RawDevice) => return Err(raw_device(line)),
                (_, ExtentType::Zero) => self.uniform(line, Mapping::Zero, None),
                (Access::None, _) => self.uniform(line, Mapping::Forbidden, None),
                (_, kind) => {
                    let writes = self.is_writable && line.access == Access::ReadWrite;
                    let file = match own {
                        Some(file) => file,
                        None if writes => Handle::writing(self.files.open_writable(&line.file)?),
                        None => Handle::reading(self.files.open(&line.file)?),
                    };
                    if self.is_writable && !is_own {
                        uses.add(self.files.place(Some(&line.file)), line, writes)?;
                    }
                    match kind {
                        ExtentType::Flat => self.flat(line, file)?,
                        _ => self.sparse(file, line.access, line.sectors, is_own)?,
                    }
                }
            }
        }
        Ok(())
    }

    fn push(&mut self, part: Part) {
        self.at += part.range.length;
        self.parts.push(part);
    }

    fn range(&self, sectors: u64) -> ByteRange {
        // The descriptor's sum was checked, and a header's capacity has the same limit.
        ByteRange::new(self.at, sectors * SECTOR)
    }

    fn uniform(&mut self, line: &ExtentLine, mapping: Mapping, file: Option<Handle>) {
        self.push(Part {
            range: self.range(line.sectors),
            access: line.access,
            flat: file.is_some(),
            file,
            in_main_file: false,
            map: Arc::new(Uniform(mapping)),
            compressed: None,
            sparse_writer: None,
        });
    }

    fn flat(&mut self, line: &ExtentLine, file: Handle) -> Result<()> {
        let size = file.reader.size_bytes();
        let start = line.offset_sectors.checked_mul(SECTOR);
        let end = start.and_then(|start| start.checked_add(line.sectors * SECTOR));
        match (start, end) {
            (Some(start), Some(end)) if end <= size => {
                self.uniform(line, Mapping::Data(start), Some(file));
                Ok(())
            }
            _ => Err(BlockError::damaged(
                file.reader.name(),
                format!(
                    "VMDK flat extent: the descriptor says {} sectors from sector {}, but the file \
                     has {size} bytes: it is cut off or another file",
                    line.sectors, line.offset_sectors
                ),
            )),
        }
    }

    /// Counts the tables of an extent that is to be written: those of all extents together are
    /// bounded, because the directories are in memory.
    fn count_tables(&mut self, layout: &SparseLayout, name: &str) -> Result<()> {
        layout.validate(name)?;
        self.tables = self.tables.saturating_add(layout.tables());
        if self.tables > MAX_TABLES {
            return Err(BlockError::unsupported(
                name,
                format!(
                    "VMDK sparse header: with it the extents have {} grain tables, more than \
                     {MAX_TABLES}; convert the image to write",
                    self.tables
                ),
            ));
        }
        Ok(())
    }

    fn sparse(&mut self, file: Handle, access: Access, sectors: u64, is_main: bool) -> Result<()> {
        let share = self.share;
        let mut sparse_writer = None;
        let (layout, map): (SparseLayout, Arc<dyn Map>) = match Head::read(&*file.reader)? {
            Head::Hosted { header, .. } => match &file.writer {
                Some(writer) if access == Access::ReadWrite => {
                    self.count_tables(&header.layout(), &writer.name())?;
                    let made = SparseWriter::open(
                        writer.clone(),
                        &header,
                        self.parent.clone(),
                        ByteRange::new(self.at, sectors * SECTOR),
                        share,
                    )?;
                    let made = Arc::new(made);
                    sparse_writer = Some(made.clone());
                    (header.layout(), made)
                }
                _ => hosted_map(&file.reader, &header, share)?,
            },
            Head::Esx(_) if file.writer.is_some() => return Err(esx_writing(&*file.reader)),
            Head::Esx(layout) => {
                let map = SparseMap::open(file.reader.clone(), layout.clone(), share)?;
                (layout, Arc::new(map))
            }
            Head::Descriptor(..) => {
                return Err(BlockError::damaged(
                    file.reader.name(),
                    "VMDK sparse extent: it is a descriptor, not an extent",
                ));
            }
        };
        if sectors > layout.capacity_sectors {
            return Err(BlockError::damaged(
                file.reader.name(),
                format!(
                    "VMDK sparse extent: the descriptor says {sectors} sectors, its header {}",
                    layout.capacity_sectors
                ),
            ));
        }
        let compressed =
            layout.compressed.then(|| CompressedGrains::new(file.reader.clone(), &layout, share));
        self.push(Part {
            range: self.range(sectors),
            access,
            file: Some(file),
            in_main_file: is_main,
            flat: false,
            map,
            compressed,
            sparse_writer,
        });
        Ok(())
    }
}

/// The files that the extents of a disk take, and which parts of them: where two extents had the
/// same bytes, writing one would change the other.
struct Uses {
    /// What a file is known by, the bytes, and whether they are written.
    taken: Vec<(String, ByteRange, bool)>,
}

impl Uses {
    /// Begins with the file that the image was opened by, which holds the descriptor.
    fn new(main: Option<String>) -> Self {
        Self { taken: main.into_iter().map(|main| (main, EVERYTHING, true)).collect() }
    }

    /// Takes what an extent uses of the file that is known by `place`.
    ///
    /// # Errors
    /// [`BlockError::Damaged`] where something else uses it as well and either is written.
    fn add(&mut self, place: Option<String>, line: &ExtentLine, writes: bool) -> Result<()> {
        let Some(place) = place else {
            return Ok(());
        };
        let range = match line.kind {
            ExtentType::Flat => ByteRange::new(
                line.offset_sectors.saturating_mul(SECTOR),
                line.sectors.saturating_mul(SECTOR),
            ),
            _ => EVERYTHING,
        };
        let shares = |(other, taken, written): &(String, ByteRange, bool)| {
            (writes || *written) && *other == place && !taken.intersect(&range).is_empty()
        };
        if self.taken.iter().any(shares) {
            return Err(BlockError::damaged(
                &line.file,
                "VMDK extent: another extent, or the descriptor, has the same bytes of the same \
                 file; it must not be written: read what is there into a new image",
            ));
        }
        self.taken.push((place, range, writes));
        Ok(())
    }
}

/// All of a file, whatever its size.
const EVERYTHING: ByteRange = ByteRange::new(0, u64::MAX);

/// The map of a hosted extent; by its markers where its tables are of no use.
fn hosted_map(
    file: &Arc<dyn BlockDevice>,
    header: &HostedHeader,
    share: u64,
) -> Result<(SparseLayout, Arc<dyn Map>)> {
    let effective = effective_header(&**file, header)?;
    let layout = effective.as_ref().unwrap_or(header).layout();
    layout.validate(&file.name())?;
    if layout.compressed && effective.unwrap_or(*header).compression != 1 {
        return Err(BlockError::unsupported(
            file.name(),
            format!(
                "VMDK sparse header: compression method {}; only 1 (deflate) is known",
                effective.unwrap_or(*header).compression
            ),
        ));
    }
    let opened = match effective {
        Some(_) => SparseMap::open(file.clone(), layout.clone(), share).map(Some),
        None => Ok(None),
    };
    match opened {
        Ok(Some(map)) => Ok((layout, Arc::new(map))),
        Err(error) if !(layout.compressed && layout.markers) => Err(error),
        _ => {
            let grains = scan(&**file, header)?;
            Ok((layout.clone(), Arc::new(ScannedMap { layout, grains })))
        }
    }
}

fn raw_device(line: &ExtentLine) -> BlockError {
    BlockError::unsupported(
        &line.file,
        "is a raw device mapping: the data is on a disk of the storage network and not in this \
         file; read it from that disk, or clone the virtual disk in vSphere first",
    )
}

fn esx_writing(file: &dyn BlockDevice) -> BlockError {
    BlockError::unsupported(
        file.name(),
        "is one of ESX's snapshot formats (vmfsSparse, seSparse), which are only read; convert it \
         to another format to write",
    )
}
