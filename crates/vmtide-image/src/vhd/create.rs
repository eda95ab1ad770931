//! Making new VHDs.

use super::footer::{FOOTER_BYTES, Footer, Kind, new_id, parse_id};
use super::header::{DEFAULT_BLOCK_BYTES, HEADER_BYTES, Header, Locator};
use super::writer::{MAX_ENTRIES, VhdWriter};
use crate::bytes::length;
use crate::create::new_file;
use crate::{CreateOptions, Format};
use std::path::Path;
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, Result, WritableBlockDevice};

/// The largest disk, 2040 GiB: beyond, Hyper-V does not open it, and block offsets leave the 32 bits
/// that they have in sectors.
pub const MAX_DISK_BYTES: u64 = 2040 << 30;

/// The space in the file for each parent locator, what Windows gives it.
const LOCATOR_SPACE: u32 = 4096;

/// The blocks that new images may have. Smaller ones cost more than they save; larger ones are
/// copied as a whole by some programs.
const NEW_BLOCK_BYTES: std::ops::RangeInclusive<u64> = 4096..=256 << 20;

/// The kind of a new VHD.
#[derive(Clone)]
pub enum VhdKind {
    /// The bytes of the disk and a footer.
    Fixed,
    /// Blocks are allocated when they are written.
    Dynamic,
    /// What is not written is the parent's.
    Differencing(VhdParent),
}

/// The parent of a new differencing VHD, which must be a VHD, too.
#[derive(Clone)]
pub struct VhdParent {
    /// Its path from the child's directory, in this system's spelling or Windows'.
    pub name: String,
    /// Its absolute path.
    pub absolute_path: Option<String>,
    /// Its unique id as [`crate::identity`] says it.
    pub identity: String,
    /// Its disk.
    pub device: Arc<dyn BlockDevice>,
}

/// What a new VHD is like.
#[derive(Clone)]
pub struct VhdCreateOptions {
    /// The size of the disk in bytes, rounded up to whole sectors of 512; at most
    /// [`MAX_DISK_BYTES`].
    pub size_bytes: u64,
    /// The kind.
    pub kind: VhdKind,
    /// The unit of allocation in bytes, a power of two from 4 KiB to 256 MiB; Windows knows only
    /// 512 KiB and 2 MiB. Of no meaning for fixed disks.
    pub block_size_bytes: u64,
    /// Whether nothing of what is written need be on the medium when it is done
    /// ([`RawDevice::without_flushes`](vmtide_block::RawDevice::without_flushes)): for images that can
    /// be made again.
    pub without_flushes: bool,
}

impl VhdCreateOptions {
    /// An empty dynamic disk with blocks of 2 MiB.
    pub const fn new(size_bytes: u64) -> Self {
        Self {
            size_bytes,
            kind: VhdKind::Dynamic,
            block_size_bytes: DEFAULT_BLOCK_BYTES,
            without_flushes: false,
        }
    }
}

/// Succeeds for a size that a VHD can have.
pub(super) fn check_size(name: &str, size_bytes: u64) -> Result<()> {
    let detail = if size_bytes > MAX_DISK_BYTES {
        format!(
            "a disk of {size_bytes} bytes is larger than the {MAX_DISK_BYTES} (2040 GiB) that a \
             VHD can have; use VHDX"
        )
    } else if !size_bytes.is_multiple_of(FOOTER_BYTES) {
        format!("a disk of {size_bytes} bytes is no whole number of 512-byte sectors")
    } else {
        return Ok(());
    };
    Err(BlockError::unsupported(name, detail))
}

impl VhdWriter {
    /// Makes a new image at `path`, which must not exist.
    ///
    /// # Errors
    /// As [`create_device`](Self::create_device), and where the file cannot be made.
    pub fn create(path: impl AsRef<Path>, options: &VhdCreateOptions) -> Result<Self> {
        let path = path.as_ref();
        plan(&path.display().to_string(), options)?;
        let file = new_file(path, 0, options.without_flushes)?;
        Self::create_device(Arc::new(file), options)
    }

    /// Makes a new image in `file`, whose content is lost.
    ///
    /// # Errors
    /// [`BlockError::Unsupported`] for a size, a block size or a parent that a VHD cannot have.
    pub fn create_device(
        file: Arc<dyn WritableBlockDevice>,
        options: &VhdCreateOptions,
    ) -> Result<Self> {
        let plan = plan(&file.name(), options)?;
        file.resize(0)?;
        file.resize(plan.body_bytes + FOOTER_BYTES)?;
        let parent = match &options.kind {
            VhdKind::Differencing(parent) => Some(parent.device.clone()),
            _ => None,
        };
        let footer = plan.footer.encode();
        if let Some(header) = &plan.header {
            file.write_at(&header.encode(), header.offset)?;
            let table = u64::from(header.table_entries) * 4;
            let bytes = vec![0xff; length(table.next_multiple_of(FOOTER_BYTES))];
            file.write_at(&bytes, header.table_offset)?;
            for (offset, text) in &plan.locators {
                file.write_at(text, *offset)?;
            }
            // All that a footer promises is durable before there is one: until then the file is
            // no image.
            file.flush()?;
            file.write_at(&footer, 0)?;
        }
        file.write_at(&footer, plan.body_bytes)?;
        file.flush()?;
        Self::open_device(file, parent)
    }
}

/// The structures of a new image.
struct Plan {
    footer: Footer,
    header: Option<Header>,
    /// The texts of the locators with their places.
    locators: Vec<(u64, Vec<u8>)>,
    /// The bytes in front of the footer at the end.
    body_bytes: u64,
}

fn plan(name: &str, options: &VhdCreateOptions) -> Result<Plan> {
    let refuse = |detail: String| Err(BlockError::unsupported(name, detail));
    let size_bytes = options.size_bytes.checked_next_multiple_of(FOOTER_BYTES).unwrap_or(u64::MAX);
    check_size(name, size_bytes)?;
    let unique_id = new_id(name)?;
    let parent = match &options.kind {
        VhdKind::Fixed => {
            return Ok(Plan {
                footer: Footer::new(Kind::Fixed, size_bytes, unique_id),
                header: None,
                locators: Vec::new(),
                body_bytes: size_bytes,
            });
        }
        VhdKind::Dynamic => None,
        VhdKind::Differencing(parent) => Some(parent),
    };
    let block_bytes = options.block_size_bytes;
    if !block_bytes.is_power_of_two() || !NEW_BLOCK_BYTES.contains(&block_bytes) {
        return refuse(format!(
            "blocks of {block_bytes} bytes: a VHD's are a power of two from 4 KiB to 256 MiB"
        ));
    }
    let entries = size_bytes.div_ceil(block_bytes);
    let Some(entries) = u32::try_from(entries).ok().filter(|_| entries <= MAX_ENTRIES) else {
        return refuse(format!(
            "a disk of {size_bytes} bytes with blocks of {block_bytes} has {entries} of them; \
             more than {MAX_ENTRIES} are not made: use larger blocks"
        ));
    };
    let table_offset = FOOTER_BYTES + HEADER_BYTES;
    let mut header = Header::new(FOOTER_BYTES, table_offset, entries, block_bytes);
    let mut end = table_offset + (u64::from(entries) * 4).next_multiple_of(FOOTER_BYTES);
    let mut locators = Vec::new();
    if let Some(parent) = parent {
        let Some(id) = parse_id(&parent.identity) else {
            return refuse(format!("its parent's unique id {:?} is no GUID", parent.identity));
        };
        let names = ParentNames::new(&parent.name, parent.absolute_path.as_deref());
        header.set_parent(id, &names.display);
        for (number, (code, text)) in names.texts.into_iter().enumerate() {
            let Some(text_bytes) =
                u32::try_from(text.len()).ok().filter(|bytes| *bytes <= LOCATOR_SPACE)
            else {
                return refuse(format!("its parent's path is longer than {LOCATOR_SPACE} bytes"));
            };
            let locator = Locator { code, space: LOCATOR_SPACE, text_bytes, offset: end };
            header.set_locator(number, &locator);
            locators.push((end, text));
            end += u64::from(LOCATOR_SPACE);
        }
    }
    let kind = if parent.is_some() { Kind::Differencing } else { Kind::Dynamic };
    let footer = Footer::new(kind, size_bytes, unique_id);
    Ok(Plan { footer, header: Some(header), locators, body_bytes: end })
}

/// A parent's names as they are stored.
pub(super) struct ParentNames {
    /// For the field in the header that programs show.
    pub(super) display: String,
    /// For the locators: code and bytes.
    pub(super) texts: Vec<([u8; 4], Vec<u8>)>,
}

impl ParentNames {
    pub(super) fn new(name: &str, absolute_path: Option<&str>) -> Self {
        let windows = name.replace('/', "\\");
        let is_absolute = windows.starts_with('\\') || windows.as_bytes().get(1) == Some(&b':');
        let relative = match windows.starts_with(".\\") || windows.starts_with("..\\") {
            true => windows.clone(),
            false => format!(".\\{windows}"),
        };
        let absolute = match is_absolute {
            true => Some(windows.clone()),
            false => absolute_path.map(|path| path.replace('/', "\\")),
        };
        let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let mut texts = Vec::new();
        if let Some(absolute) = &absolute {
            texts.push((*b"W2ku", utf16(absolute)));
        }
        if !is_absolute {
            texts.push((*b"W2ru", utf16(&relative)));
        }
        Self { display: absolute.unwrap_or(windows), texts }
    }
}

/// Makes an image as the format-independent options want it.
pub(crate) fn create(path: &Path, options: &CreateOptions) -> Result<VhdWriter> {
    let name = path.display().to_string();
    let refuse = |detail: String| Err(BlockError::unsupported(name.clone(), detail));
    if options.compress {
        return refuse("VHD cannot store data compressed".into());
    }
    if let Some(bytes) = options.logical_sector_bytes.filter(|bytes| *bytes != 512) {
        return refuse(format!("VHD has sectors of 512 bytes; {bytes} were asked for"));
    }
    let kind = match (options.subformat.as_deref(), &options.parent) {
        (None | Some("differencing"), Some(parent)) => {
            let identity = match (&parent.identity, parent.format) {
                (Some(identity), Format::Vhd) => identity.clone(),
                _ => {
                    return refuse(format!(
                        "the parent of a VHD must be a VHD; {:?} is {}",
                        parent.name, parent.format
                    ));
                }
            };
            VhdKind::Differencing(VhdParent {
                name: parent.name.clone(),
                absolute_path: parent.absolute_path.clone(),
                identity,
                device: parent.device.clone(),
            })
        }
        (Some("differencing"), None) => return refuse("a differencing disk needs a parent".into()),
        (Some(kind), Some(_)) => return refuse(format!("a {kind} disk has no parent")),
        (Some("fixed"), None) => VhdKind::Fixed,
        (_, None) => VhdKind::Dynamic,
    };
    let create = VhdCreateOptions {
        size_bytes: options.size_bytes,
        kind,
        block_size_bytes: options.block_size_bytes.unwrap_or(DEFAULT_BLOCK_BYTES),
        without_flushes: options.without_flushes,
    };
    VhdWriter::create(path, &create)
}
