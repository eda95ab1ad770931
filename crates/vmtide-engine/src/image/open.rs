//! Opening what a user names as a disk to read: an image of any format with its chain, a block
//! device, or an NBD export.
//!
//! The guest of a raw disk can write any signature into it, and an image names other files. So the
//! format that is found by content is believed only as far as the file's name agrees: an image
//! whose format is given or said by its name too may have its parents opened from its own
//! directory, any other may not unless the user says so.

use crate::in_use::{Use, check_not_in_use};
use crate::peer::NbdPeer;
use crate::source::SourceSpec;
use crate::{EngineError, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError};
use vmtide_image::{
    BackingPolicy, Format, Layer, OpenOptions, format_by_name, open_chain, open_snapshot,
};
use vmtide_nbd::{NbdOptions, NbdUrl};

/// A disk as the user wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskSpec {
    /// A disk image file or a block device.
    Path(PathBuf),
    /// An NBD export.
    Nbd(NbdUrl),
}

impl DiskSpec {
    /// Understands a path, a `file:///` URL or an NBD URL.
    ///
    /// # Errors
    /// [`EngineError::Usage`] for anything else.
    pub fn parse(text: &str) -> Result<Self> {
        match SourceSpec::parse(text)? {
            SourceSpec::Image(path) => Ok(Self::Path(path)),
            SourceSpec::Nbd(url) => Ok(Self::Nbd(url)),
            SourceSpec::Qemu(url) => Err(EngineError::usage(format!(
                "{url} is a virtual machine: give a disk image, a block device or an nbd:// or \
                 nbd+unix:// URL"
            ))),
            spec @ (SourceSpec::Hyperv(_) | SourceSpec::Winrm(_)) => {
                Err(EngineError::usage(format!(
                    "{} is a virtual machine: give a disk image, a block device or an nbd:// or nbd+unix:// URL",
                    spec.display()
                )))
            }
            SourceSpec::Agent(url) => Err(EngineError::usage(format!(
                "{url} is a disk of an agent, which `vmtide backup`, `restore`, `vm` and `info` take: give a disk \
                 image, a block device or an nbd:// or nbd+unix:// URL"
            ))),
        }
    }

    /// The disk as a person knows it.
    pub fn display(&self) -> String {
        match self {
            Self::Path(path) => path.display().to_string(),
            Self::Nbd(url) => url.to_string(),
        }
    }
}

/// How to open a disk.
#[derive(Clone, Debug, Default)]
pub struct OpenDiskOptions {
    /// The format of an image; none finds it by content.
    pub format: Option<Format>,
    /// Which files an image may name. None, where the user said nothing: those in its own directory
    /// if its format is certain, else none.
    pub backing: Option<BackingPolicy>,
    /// The format of parents whose child does not say it.
    pub backing_format: Option<Format>,
    /// Directories in which parents are looked for as well.
    pub search: Vec<PathBuf>,
    /// Takes a parent that is not the one the child was made from.
    pub any_parent: bool,
    /// An internal snapshot of a qcow2 image, by id or name, instead of the present.
    pub snapshot: Option<String>,
}

/// A disk that is open for reading.
pub struct OpenDisk {
    /// Its bytes.
    pub device: Arc<dyn BlockDevice>,
    /// Its format; [`Format::Raw`] for an export.
    pub format: Format,
    /// The images it consists of, the top first; empty for an export and a snapshot.
    pub layers: Vec<Layer>,
    /// As a person knows it.
    pub name: String,
}

/// Opens a disk for reading.
///
/// # Errors
/// What opening the image or connecting says; [`EngineError::Refused`] where a running QEMU writes
/// to it, or its format is in doubt.
pub fn open_disk(spec: &DiskSpec, options: &OpenDiskOptions) -> Result<OpenDisk> {
    let name = spec.display();
    let path = match spec {
        DiskSpec::Path(path) => path,
        DiskSpec::Nbd(url) => {
            check_options_of_export(url, options)?;
            let connect = NbdOptions { read_only: true, ..NbdOptions::default() };
            let device = Arc::new(NbdPeer::connect(url, &connect)?);
            return Ok(OpenDisk { device, format: Format::Raw, layers: Vec::new(), name });
        }
    };
    check_not_in_use(path, Use::Read)?;
    crate::delta::check_complete(path)?;
    let (open, format) = image_options(path, options)?;
    if let Some(snapshot) = &options.snapshot {
        let device = open_snapshot(path, &open, snapshot)
            .map_err(|error| hint(error, path, options, format))?;
        return Ok(OpenDisk { device, format, layers: Vec::new(), name });
    }
    let layers = open_chain(path, &open).map_err(|error| hint(error, path, options, format))?;
    let Some(top) = layers.first() else {
        return Err(EngineError::refused(format!("open {name}"), "it has no layers"));
    };
    Ok(OpenDisk { device: top.image.clone(), format, layers, name })
}

fn check_options_of_export(url: &NbdUrl, options: &OpenDiskOptions) -> Result<()> {
    if options.format.is_some_and(|format| format != Format::Raw) || options.snapshot.is_some() {
        return Err(EngineError::usage(format!(
            "{url} is an NBD export, whose bytes are the disk's: formats and snapshots do not apply"
        )));
    }
    Ok(())
}

/// The options to open the image at `path` with, and its format.
///
/// # Errors
/// [`EngineError::Refused`] where its format is in doubt; where it cannot be read.
pub(crate) fn image_options(
    path: &Path,
    options: &OpenDiskOptions,
) -> Result<(OpenOptions, Format)> {
    let format = match options.format {
        Some(format) => format,
        None => probe_format(path)?,
    };
    let backing = options.backing.unwrap_or_else(|| default_policy(path, format, options.format));
    let open = OpenOptions {
        format: Some(format),
        backing,
        backing_format: options.backing_format,
        search: options.search.clone(),
        any_parent: options.any_parent,
        ..OpenOptions::default()
    };
    Ok((open, format))
}

/// The format of an image by its content, which its name may not contradict. What can only be a raw disk by its
/// name or kind, and looks like something else, was made so by its guest or is misnamed: the user has to say.
pub(crate) fn probe_format(path: &Path) -> Result<Format> {
    let found = vmtide_image::probe(path)?;
    // Many programs name an image of any format .img.
    let is_img = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("img"));
    let is_raw_by_name = format_by_name(path) == Some(Format::Raw) && !is_img;
    // Anything but a file that can be probed is a block device, all bytes of which are a guest's.
    if found == Format::Raw || (path.is_file() && !is_raw_by_name) {
        return Ok(found);
    }
    Err(EngineError::refused(
        format!("read {}", path.display()),
        format!(
            "it should be raw and looks like {found}, which a guest can forge: add --format raw \
             or --format {found}"
        ),
    ))
}

/// Which files an image may name where the user said nothing.
pub(crate) fn default_policy(path: &Path, found: Format, given: Option<Format>) -> BackingPolicy {
    if given.is_some() || format_by_name(path) == Some(found) {
        BackingPolicy::SameDirectory
    } else {
        BackingPolicy::Refuse
    }
}

/// An error of opening an image, with what to do where the policy is why.
pub(crate) fn hint(
    error: BlockError,
    path: &Path,
    options: &OpenDiskOptions,
    format: Format,
) -> EngineError {
    let refused = options.backing.is_none()
        && default_policy(path, format, options.format) == BackingPolicy::Refuse;
    match error {
        BlockError::Unsupported { context, detail } if refused && format != Format::Raw => {
            BlockError::Unsupported {
                context,
                detail: format!(
                    "{detail}: add --backing same-directory (its format was only found by its \
                     content, which a guest can forge)"
                ),
            }
            .into()
        }
        other => other.into(),
    }
}
