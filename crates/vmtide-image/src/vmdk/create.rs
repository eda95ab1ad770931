//! Making a new VMDK.
//!
//! **The files and their names.** `monolithicSparse` and `streamOptimized` are one file. The others
//! are a descriptor and extents beside it, whose names are the descriptor's without its extension
//! and `-flat.vmdk`, `-s001.vmdk`, … or `-f001.vmdk`, …; the descriptor says these names, so all
//! files must keep them, relative to each other: to publish a new image at once, make it in a
//! directory of its own under its final name and move the files, the descriptor last. The extents
//! are made first and the descriptor when they are on the medium, so what opens is complete; where
//! making fails, the files that were made are removed.

use super::ExtentFiles;
use super::describe::{NewExtent, VmdkKind, Words, describe, plan};
use super::descriptor::NO_PARENT;
use super::hosted::{HostedHeader, IN_FOOTER, SECTOR, flag};
use super::stream::StreamWriter;
use super::writer::VmdkWriter;
use crate::bytes::length;
use crate::create::new_file;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, Result, WritableBlockDevice};

/// The entries of a hosted grain table.
const ENTRIES_PER_TABLE: u32 = 512;

/// The sectors of an embedded descriptor: VMware's 10 KiB, more only where the text needs it.
const DESCRIPTOR_SECTORS: u64 = 20;

/// The grain of a new image in bytes, VMware's own.
pub(super) const DEFAULT_GRAIN_BYTES: u64 = 64 << 10;

/// What a new VMDK is like.
#[derive(Clone)]
pub struct VmdkCreateOptions {
    /// The size of the disk in bytes; rounded up to whole sectors of 512 bytes.
    pub size_bytes: u64,
    /// The kind of disk.
    pub kind: VmdkKind,
    /// The grain of sparse kinds in bytes: a power of two from 4 KiB to 2 MiB.
    pub grain_size_bytes: u64,
    /// The disk controller the image is made for: `lsilogic`, `buslogic`, `ide` or `legacyESX`.
    pub adapter: String,
    /// Whether nothing of what is written need be on the medium when it is done
    /// ([`RawDevice::without_flushes`](vmtide_block::RawDevice::without_flushes)): for images that can
    /// be made again.
    pub without_flushes: bool,
    /// The parent, for a child. Only `monolithicSparse` and `twoGbMaxExtentSparse` can have one.
    pub parent: Option<VmdkParent>,
}

/// The parent of a new child.
#[derive(Clone)]
pub struct VmdkParent {
    /// Its path as the child shall find it, relative to the child's directory or absolute.
    pub hint: String,
    /// Its content id ([`super::identity`]).
    pub content_id: String,
    /// Its disk.
    pub device: Arc<dyn BlockDevice>,
}

impl VmdkCreateOptions {
    /// A `monolithicSparse` disk with VMware's grain, for an LSI Logic controller.
    pub fn new(size_bytes: u64) -> Self {
        Self {
            size_bytes,
            kind: VmdkKind::default(),
            grain_size_bytes: DEFAULT_GRAIN_BYTES,
            adapter: "lsilogic".into(),
            without_flushes: false,
            parent: None,
        }
    }

    /// The names of the files that an image called `name` will have besides that one.
    ///
    /// # Errors
    /// [`BlockError::Unsupported`] where the name or the size is impossible.
    pub fn extent_files(&self, name: &str) -> Result<Vec<String>> {
        let extents = plan(self.kind, name, self.sectors())?;
        let beside = extents.into_iter().filter(|_| !self.kind.is_embedded());
        Ok(beside.map(|extent| extent.file).collect())
    }

    const fn sectors(&self) -> u64 {
        self.size_bytes.div_ceil(SECTOR)
    }

    fn check(&self, name: &str) -> Result<()> {
        let refuse = |detail: String| Err(BlockError::unsupported(name, detail));
        if self.sectors() > super::MAX_SECTORS {
            return refuse(format!("a disk of {} bytes is too large", self.size_bytes));
        }
        let grain = self.grain_size_bytes;
        if !grain.is_power_of_two() || !(4 << 10..=2 << 20).contains(&grain) {
            return refuse(format!(
                "a grain of {grain} bytes; powers of two from 4 KiB to 2 MiB exist"
            ));
        }
        if !["lsilogic", "buslogic", "ide", "legacyESX"].contains(&self.adapter.as_str()) {
            return refuse(format!(
                "adapter {:?}; known are lsilogic, buslogic, ide and legacyESX",
                self.adapter
            ));
        }
        match &self.parent {
            Some(_) if self.kind.is_flat() || self.kind == VmdkKind::StreamOptimized => {
                refuse(format!(
                    "a {} image cannot have a parent; use monolithicSparse or twoGbMaxExtentSparse",
                    self.kind.name()
                ))
            }
            Some(parent) if parent.hint.contains(['"', '\n', '\r', '\0']) => {
                refuse(format!("the parent's path {:?} cannot stand in a descriptor", parent.hint))
            }
            _ => Ok(()),
        }
    }
}

impl VmdkWriter {
    /// Makes an image at `path`, with its extents beside it. None of the files may exist.
    ///
    /// # Errors
    /// [`BlockError::Unsupported`] for options that cannot be; [`BlockError::Io`] where a file cannot
    /// be made. What was made is removed then.
    pub fn create(path: impl AsRef<Path>, options: &VmdkCreateOptions) -> Result<Self> {
        let path = path.as_ref();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            return Err(BlockError::unsupported(
                path.display().to_string(),
                "is no file name in UTF-8, which a VMDK descriptor needs",
            ));
        };
        let mut made = Vec::new();
        let created = Self::create_files(name, options, &mut |name| {
            let path = path.with_file_name(name);
            let file = new_file(&path, 0, options.without_flushes)?;
            made.push(path);
            Ok(Arc::new(file))
        });
        if created.is_err() {
            for path in made {
                // The error of making it is the one that counts.
                let _ = std::fs::remove_file(path);
            }
        }
        created
    }

    /// Makes an image called `name` in files that `create` makes by their names: new and empty. The
    /// file `name` comes last.
    ///
    /// # Errors
    /// As [`create`](Self::create); the caller removes what it made.
    pub fn create_files(
        name: &str,
        options: &VmdkCreateOptions,
        create: &mut dyn FnMut(&str) -> Result<Arc<dyn WritableBlockDevice>>,
    ) -> Result<Self> {
        options.check(name)?;
        let extents = plan(options.kind, name, options.sectors())?;
        let (cid, random) = random_ids(name)?;
        let parent = match &options.parent {
            Some(parent) => Some((parent_cid(name, parent)?, parent.hint.as_str())),
            None => None,
        };
        let words = Words { kind: options.kind, cid, parent, adapter: &options.adapter, random };
        let text = describe(&words, &extents);
        let device = options.parent.as_ref().map(|parent| parent.device.clone());
        let files = NewFiles::default();
        if options.kind.is_embedded() {
            let file = create(name)?;
            if options.kind == VmdkKind::StreamOptimized {
                return Ok(Self::streaming(begin_stream(file, options, &text)?));
            }
            write_sparse(&*file, options, options.sectors(), Some(&text))?;
            return Self::open_created(file, &files, device);
        }
        for extent in &extents {
            let file = create(&extent.file)?;
            make_extent(&*file, options, extent)?;
            files.0.lock().insert(extent.file.clone(), file);
        }
        let file = create(name)?;
        file.resize(text.len() as u64)?;
        file.write_at(text.as_bytes(), 0)?;
        file.flush()?;
        Self::open_created(file, &files, device)
    }
}

fn make_extent(
    file: &dyn WritableBlockDevice,
    options: &VmdkCreateOptions,
    extent: &NewExtent,
) -> Result<()> {
    if options.kind.is_flat() {
        file.resize(extent.sectors * SECTOR)?;
        return file.flush();
    }
    write_sparse(file, options, extent.sectors, None)
}

/// The extents that were just made, by their names.
#[derive(Default)]
struct NewFiles(Mutex<BTreeMap<String, Arc<dyn WritableBlockDevice>>>);

impl ExtentFiles for NewFiles {
    fn open(&self, name: &str) -> Result<Arc<dyn BlockDevice>> {
        Ok(self.open_writable(name)?)
    }

    fn open_writable(&self, name: &str) -> Result<Arc<dyn WritableBlockDevice>> {
        let found = self.0.lock().get(name).cloned();
        found.ok_or_else(|| BlockError::io(name, std::io::ErrorKind::NotFound))
    }
}

fn parent_cid(name: &str, parent: &VmdkParent) -> Result<u32> {
    u32::from_str_radix(&parent.content_id, 16).map_err(|_| {
        BlockError::unsupported(
            name,
            format!("the parent's content id {:?} is no hexadecimal number", parent.content_id),
        )
    })
}

/// A new content id, which is none that means something else, and bytes for the other ids.
pub(super) fn random_ids(name: &str) -> Result<(u32, [u8; 28])> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|error| {
        BlockError::io(format!("{name}: random numbers"), std::io::Error::other(error))
    })?;
    let (cid, rest) = bytes.split_at(4);
    let mut random = [0; 28];
    random.copy_from_slice(rest);
    let cid = u32::from_le_bytes([cid[0], cid[1], cid[2], cid[3]]);
    // All ones mean no parent, and QEMU takes one less for a disk that was never written.
    Ok((cid.clamp(1, NO_PARENT - 2), random))
}

/// Lays out a sparse extent: header, descriptor, redundant directory and tables, directory and
/// tables, and then grains. The tables are there from the start, as holes.
fn write_sparse(
    file: &dyn WritableBlockDevice,
    options: &VmdkCreateOptions,
    sectors: u64,
    descriptor: Option<&str>,
) -> Result<()> {
    let grain_sectors = options.grain_size_bytes / SECTOR;
    let tables = sectors.div_ceil(grain_sectors).div_ceil(u64::from(ENTRIES_PER_TABLE));
    let table_sectors = u64::from(ENTRIES_PER_TABLE) * 4 / SECTOR;
    let directory_sectors = (tables * 4).div_ceil(SECTOR);
    let descriptor_sectors = descriptor.map_or(0, descriptor_sectors);
    let redundant = 1 + descriptor_sectors;
    let first = redundant + directory_sectors + tables * table_sectors;
    let end = first + directory_sectors + tables * table_sectors;
    let overhead = end.next_multiple_of(grain_sectors);
    if overhead > u64::from(u32::MAX) {
        return Err(BlockError::unsupported(
            file.name(),
            format!(
                "a sparse extent of {sectors} sectors needs tables of more than 2 TiB; use a larger \
                 grain or a flat image"
            ),
        ));
    }
    let header = HostedHeader {
        version: 1,
        flags: flag::NEWLINES | flag::REDUNDANT,
        capacity: sectors,
        grain_sectors,
        descriptor_offset: u64::from(descriptor.is_some()),
        descriptor_sectors,
        entries_per_table: ENTRIES_PER_TABLE,
        redundant_offset: redundant,
        directory_offset: first,
        overhead,
        unclean: false,
        compression: 0,
        newlines: None,
    };
    file.resize(overhead * SECTOR)?;
    if let Some(text) = descriptor {
        file.write_at(text.as_bytes(), SECTOR)?;
    }
    for start in [redundant, first] {
        let sector = |table| start + directory_sectors + table * table_sectors;
        let entries = (0..tables).map(|table| u32::try_from(sector(table)).unwrap_or(u32::MAX));
        let bytes: Vec<u8> = entries.flat_map(u32::to_le_bytes).collect();
        file.write_at(&bytes, start * SECTOR)?;
    }
    file.flush()?;
    // Without a header it is no image, so what opens is complete.
    file.write_at(&header.encode(), 0)?;
    file.flush()
}

fn descriptor_sectors(text: &str) -> u64 {
    (text.len() as u64 + 1).div_ceil(SECTOR).max(DESCRIPTOR_SECTORS)
}

fn begin_stream(
    file: Arc<dyn WritableBlockDevice>,
    options: &VmdkCreateOptions,
    text: &str,
) -> Result<StreamWriter> {
    let descriptor_sectors = descriptor_sectors(text);
    let grain_sectors = options.grain_size_bytes / SECTOR;
    let header = HostedHeader {
        version: 3,
        flags: flag::NEWLINES | flag::COMPRESSED | flag::MARKERS,
        capacity: options.sectors(),
        grain_sectors,
        descriptor_offset: 1,
        descriptor_sectors,
        entries_per_table: ENTRIES_PER_TABLE,
        redundant_offset: 0,
        directory_offset: IN_FOOTER,
        overhead: (1 + descriptor_sectors).next_multiple_of(grain_sectors),
        unclean: false,
        compression: 1,
        newlines: None,
    };
    let mut start = vec![0; length(header.overhead * SECTOR)];
    crate::bytes::put(&mut start, 0, &header.encode());
    crate::bytes::put(&mut start, length(SECTOR), text.as_bytes());
    StreamWriter::begin(file, header, start)
}
