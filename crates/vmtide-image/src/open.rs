//! Opening an image with all the files it consists of.
//!
//! An image names its backing file and its external data file, and whoever wrote the image chose
//! those names. Following them blindly lets a guest or an uploader read any file of the host
//! through its own disk, so it happens only by an explicit [`BackingPolicy`]; and the format of a
//! backing file is taken from the image's header or from the caller, never probed.

use crate::format::{Format, probe_device};
use crate::qcow2::header::{Header, incompatible};
use crate::qcow2::{Companions, Qcow2Image, Qcow2Writer};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, OpenMode, RawDevice, Result, WritableBlockDevice};

/// The most images in one chain. QEMU has no limit and a stack to lose; nobody has chains this long.
pub const MAX_CHAIN_DEPTH: usize = 64;

/// Whether the files that an image names are opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackingPolicy {
    /// Never: an image that needs another file is refused. The right choice for images from
    /// anywhere else.
    #[default]
    Refuse,
    /// Only plain files in the directory of the image that names them, and not through symbolic
    /// links.
    SameDirectory,
    /// Any file the process can open. For images whose every writer is trusted.
    Allow,
}

/// How to open an image.
#[derive(Clone, Default)]
pub struct OpenOptions {
    /// The format; probed by content where it is not given. Give it for a disk whose guest is not
    /// trusted: the guest of a raw disk can write any signature.
    pub format: Option<Format>,
    /// Whether the files the image names are opened, down the whole chain.
    pub backing: BackingPolicy,
    /// The format of backing files whose image does not give it (old images do not).
    pub backing_format: Option<Format>,
    /// What to use as the backing disk of the image instead of the file it names; the policy is
    /// not asked.
    pub backing_device: Option<Arc<dyn BlockDevice>>,
}

/// Opens the image at `path` for reading, with its backing chain.
///
/// # Errors
/// [`BlockError::Damaged`] and [`BlockError::Unsupported`] as the format's reader says, and where
/// the policy, a missing backing format, a loop or a chain of more than [`MAX_CHAIN_DEPTH`] images
/// forbids it.
pub fn open_read_only(
    path: impl AsRef<Path>,
    options: &OpenOptions,
) -> Result<Arc<dyn BlockDevice>> {
    Chain::new(options).open(path.as_ref(), options.format, options.backing_device.clone())
}

/// Opens the image at `path` for writing; its backing chain is opened for reading. Nothing else
/// may have it open.
///
/// # Errors
/// As [`open_read_only`], and where the image must be repaired before it is written.
pub fn open_writable(
    path: impl AsRef<Path>,
    options: &OpenOptions,
) -> Result<Arc<dyn WritableBlockDevice>> {
    let path = path.as_ref();
    let file = RawDevice::open(path, OpenMode::ReadWrite)?;
    match options.format.map_or_else(|| probe_device(&file), Ok)? {
        Format::Raw => Ok(Arc::new(file)),
        Format::Qcow2 => {
            let mut chain = Chain::new(options);
            chain.enter(path)?;
            let header = Header::read(&file)?;
            let backing = match &options.backing_device {
                Some(device) => Some(device.clone()),
                None => chain.backing(path, &header)?,
            };
            let data_file = match chain.data_file_path(path, &header)? {
                Some(path) => Some(Arc::new(RawDevice::open(path, OpenMode::ReadWrite)?)
                    as Arc<dyn WritableBlockDevice>),
                None => None,
            };
            let writer = Qcow2Writer::open_device(Arc::new(file), backing, data_file)?;
            Ok(Arc::new(writer))
        }
        other => Err(other.not_supported(path.display().to_string())),
    }
}

/// The state of opening one chain.
struct Chain<'a> {
    options: &'a OpenOptions,
    /// The real paths on the way down, for finding loops.
    seen: Vec<PathBuf>,
}

impl<'a> Chain<'a> {
    fn new(options: &'a OpenOptions) -> Self {
        Self { options, seen: Vec::new() }
    }

    fn open(
        &mut self,
        path: &Path,
        format: Option<Format>,
        backing_device: Option<Arc<dyn BlockDevice>>,
    ) -> Result<Arc<dyn BlockDevice>> {
        self.enter(path)?;
        let file = RawDevice::open(path, OpenMode::ReadOnly)?;
        match format.map_or_else(|| probe_device(&file), Ok)? {
            Format::Raw => Ok(Arc::new(file)),
            Format::Qcow2 => {
                let header = Header::read(&file)?;
                let backing = match backing_device {
                    Some(device) => Some(device),
                    None => self.backing(path, &header)?,
                };
                let data_file = match self.data_file_path(path, &header)? {
                    Some(path) => Some(Arc::new(RawDevice::open(path, OpenMode::ReadOnly)?)
                        as Arc<dyn BlockDevice>),
                    None => None,
                };
                let companions = Companions { backing, data_file };
                Ok(Arc::new(Qcow2Image::open_device(Arc::new(file), companions)?))
            }
            other => Err(other.not_supported(path.display().to_string())),
        }
    }

    fn enter(&mut self, path: &Path) -> Result<()> {
        let real = real_path(path)?;
        let refuse = |detail: String| Err(BlockError::damaged(path.display().to_string(), detail));
        if self.seen.contains(&real) {
            return refuse("the backing chain comes back to this image".into());
        }
        if self.seen.len() >= MAX_CHAIN_DEPTH {
            return refuse(format!("the backing chain has more than {MAX_CHAIN_DEPTH} images"));
        }
        self.seen.push(real);
        Ok(())
    }

    /// Opens the backing file that `header` names, where the policy allows; `None` where there is
    /// none or the policy refuses (the reader then says what is missing).
    fn backing(&mut self, overlay: &Path, header: &Header) -> Result<Option<Arc<dyn BlockDevice>>> {
        let Some(name) = &header.backing_name else {
            return Ok(None);
        };
        let Some(path) = self.resolve(overlay, "backing file", name)? else {
            return Ok(None);
        };
        let format = match (&header.backing_format, self.options.backing_format) {
            (Some(format), _) => format.parse()?,
            (None, Some(format)) => format,
            (None, None) => {
                return Err(BlockError::unsupported(
                    overlay.display().to_string(),
                    format!(
                        "does not say the format of its backing file {name:?}, and probing it \
                         would trust a guest; give the format"
                    ),
                ));
            }
        };
        self.open(&path, Some(format), None).map(Some)
    }

    fn data_file_path(&self, image: &Path, header: &Header) -> Result<Option<PathBuf>> {
        match &header.data_file_name {
            Some(name) if header.has(incompatible::EXTERNAL_DATA) => {
                self.resolve(image, "data file", name)
            }
            _ => Ok(None),
        }
    }

    /// The path that `name` in `image` means, where the policy allows to open it. Relative names
    /// start at the image's directory; QEMU does so for backing files but takes data files from
    /// its working directory, which for a file inside an image means something else every time.
    fn resolve(&self, image: &Path, what: &str, name: &str) -> Result<Option<PathBuf>> {
        let refuse = |detail: &str| {
            Err(BlockError::unsupported(
                image.display().to_string(),
                format!("names the {what} {name:?}, {detail}"),
            ))
        };
        if self.options.backing == BackingPolicy::Refuse {
            return Ok(None);
        }
        let plain = name.strip_prefix("file:").unwrap_or(name);
        // QEMU takes a colon before the first slash as a protocol: nbd://, json:{...}, rbd:...
        if plain.split('/').next().is_some_and(|head| head.contains(':')) {
            return refuse("which is not a plain path");
        }
        let directory = real_path(image)?.parent().map_or_else(PathBuf::new, Path::to_path_buf);
        let path = directory.join(plain);
        if self.options.backing == BackingPolicy::SameDirectory {
            // A symbolic link is followed by `real_path` and then no longer lies where it was.
            let real = real_path(&path)?;
            if real.parent() != Some(directory.as_path()) || real.file_name() != path.file_name() {
                return refuse("which is not a plain file in the image's own directory");
            }
        }
        Ok(Some(path))
    }
}

fn real_path(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path)
        .map_err(|error| BlockError::io(format!("open {}", path.display()), error))
}
