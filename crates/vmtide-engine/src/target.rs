//! Where one disk is written: a new image that gets its name when it is complete, an image or a
//! device that is changed in place, an NBD export or an agent's disk; what may be overwritten; and the writing.

use crate::compressed::copy_compressed;
use crate::image::files::{check_no_children, files_of};
use crate::image::open::OpenDiskOptions;
use crate::image::staged::StagedImage;
use crate::in_use::{Use, check_not_in_use};
use crate::lock::ImageLock;
use crate::peer::NbdPeer;
use crate::{EngineError, JobContext, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmtide_agent_client::{AgentClient, AgentError, AgentOptions, AgentUrl};
use vmtide_block::{
    BlockDevice, CancelToken, CopyOptions, CopySummary, OpenMode, RawDevice, WritableBlockDevice,
    copy_device, is_zero,
};
use vmtide_image::{
    BackingPolicy, Compression, CreateOptions, Format, ImageWriter, OpenOptions, format_by_name,
    open_writable, probe_device,
};
use vmtide_nbd::{NbdOptions, NbdUrl};

/// How much of the beginning and the end of a device is looked at to tell whether it is in use:
/// partition tables, file system super blocks and their backups lie there.
const SIGNATURE_BYTES: u64 = 1 << 20;

/// What is read and written at a time where both are files in the page cache: it stays in the
/// processor's own cache in between.
const CACHED_PIECE_BYTES: usize = 512 << 10;

/// The size that disks of all formats but raw are a multiple of, in bytes: their sector.
const SECTOR_BYTES: u64 = 512;

/// What a new image is like; what is not given is the format's default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageKind {
    /// The format; none goes by the target's extension.
    pub format: Option<Format>,
    /// The kind within the format; see [`vmtide_image::subformats`].
    pub subformat: Option<String>,
    /// The unit of allocation in bytes.
    pub block_size_bytes: Option<u64>,
    /// The logical sector size in bytes (VHDX).
    pub logical_sector_bytes: Option<u32>,
    /// Whether its data is compressed (qcow2; streamOptimized VMDK always is).
    pub compress: bool,
    /// How, where the format has a choice (qcow2).
    pub compression: Option<Compression>,
}

impl ImageKind {
    /// The size of a disk in this format that has room for `size_bytes`: disks of all formats but
    /// raw consist of whole sectors, so an odd size is rounded up, and what is added reads as zeros.
    pub fn disk_size(&self, format: Format, size_bytes: u64) -> u64 {
        match format {
            Format::Raw => size_bytes,
            _ => size_bytes.next_multiple_of(
                self.logical_sector_bytes.map_or(SECTOR_BYTES, u64::from).max(SECTOR_BYTES),
            ),
        }
    }

    pub(crate) fn create_options(&self, format: Format, size_bytes: u64) -> CreateOptions {
        CreateOptions {
            subformat: self.subformat.clone(),
            block_size_bytes: self.block_size_bytes,
            logical_sector_bytes: self.logical_sector_bytes,
            compress: self.compress,
            compression: self.compression,
            ..CreateOptions::new(format, self.disk_size(format, size_bytes))
        }
    }

    fn is_plain(&self) -> bool {
        *self == Self { format: self.format, ..Self::default() }
    }
}

/// Whether a job ends when what it wrote is on the medium.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// Everything but a new file that replaces nothing: it can be made again from its source, and the
    /// operating system brings it to the medium soon. What was overwritten cannot be.
    #[default]
    Replaced,
    /// Always; a new file has its name only when all of it is on the medium.
    Always,
    /// Never for new files, even where one replaces another. What is changed in place always is.
    Never,
}

/// The rules of one job for its targets.
#[derive(Clone)]
pub(crate) struct TargetRules {
    /// What the job does, for errors: `restore`, `convert`.
    pub verb: &'static str,
    /// The option that allows to replace what is there: `--force`.
    pub replace_option: &'static str,
    /// Change an existing target where it differs, and nowhere else.
    pub in_place: bool,
    /// Replace an existing target.
    pub replace: bool,
    /// Change or replace an image even where other images read through it.
    pub force: bool,
    /// What new images are like.
    pub kind: ImageKind,
    /// Whether new images are on the medium before they get their names.
    pub durability: Durability,
    /// How an image that is changed in place is opened: its parents.
    pub open: OpenDiskOptions,
    /// The format where neither the user nor the extension says one; none refuses then.
    pub default_format: Option<Format>,
}

/// What is known of a source beside its bytes.
#[derive(Default)]
pub(crate) struct SourceHints {
    /// What it decodes at once, 0 where it decodes nothing; none where it is not in files.
    pub unit_bytes: Option<u64>,
    /// The file that holds the disk as it is, and nothing else.
    pub raw_file: Option<PathBuf>,
}

/// Where one disk goes.
pub(crate) struct WritePlan {
    place: Place,
    /// In which format.
    pub format: Format,
    /// Whether only what differs is written.
    pub differing_only: bool,
    rules: TargetRules,
}

enum Place {
    /// A file that does not exist, or is replaced as a whole.
    NewFile(PathBuf),
    /// A file that is changed in place.
    ExistingFile(PathBuf),
    /// A block device.
    Device(PathBuf),
    /// An NBD export.
    Nbd(NbdUrl),
    /// A disk of an agent.
    Agent(AgentUrl, AgentClient),
}

impl TargetRules {
    /// Refuses what cannot be together.
    pub fn check(&self) -> Result<()> {
        if self.in_place && self.replace {
            return Err(EngineError::usage(format!(
                "--in-place and {} exclude each other: change where it differs, or replace",
                self.replace_option
            )));
        }
        Ok(())
    }

    /// The plan for an NBD export.
    pub fn plan_nbd(&self, url: &NbdUrl) -> Result<WritePlan> {
        let format = self.device_format("an NBD export")?;
        Ok(self.plan(Place::Nbd(url.clone()), format, self.in_place))
    }

    /// The plan for a disk of an agent, which is made where it is not there.
    pub fn plan_agent(&self, url: &AgentUrl, options: &AgentOptions) -> Result<WritePlan> {
        if !self.kind.is_plain() {
            return Err(EngineError::usage(format!(
                "{url}: subformat, block and sector size and compression are for images that vmtide makes itself"
            )));
        }
        let path = url.paths().first().map_or_else(PathBuf::new, PathBuf::from);
        let format = self.format_for(&path)?;
        let client = AgentClient::new(url, options)?;
        Ok(self.plan(Place::Agent(url.clone(), client), format, self.in_place))
    }

    /// The plan for a file or a block device, which is refused where it would overwrite something
    /// without being told to. Touches nothing.
    pub fn plan_path(&self, path: PathBuf) -> Result<WritePlan> {
        let Ok(metadata) = std::fs::metadata(&path) else {
            let format = self.format_for(&path)?;
            // In place of nothing is a new file.
            return Ok(self.plan(Place::NewFile(path), format, false));
        };
        if is_block_device(&metadata) {
            let format = self.device_format("a block device")?;
            return Ok(self.plan(Place::Device(path), format, self.in_place));
        }
        if !metadata.is_file() {
            return Err(EngineError::refused(
                format!("{} to {}", self.verb, path.display()),
                "it is neither a file nor a block device",
            ));
        }
        if self.replace || self.in_place {
            check_not_in_use(&path, Use::Write)?;
            for file in files_of(&path) {
                check_not_in_use(&file, Use::Write)?;
            }
        }
        if self.replace {
            let format = self.format_for(&path)?;
            if !self.force {
                check_no_children(&path, &self.open.search, "replace")?;
            }
            return Ok(self.plan(Place::NewFile(path), format, false));
        }
        if !self.in_place {
            return Err(self.already_there(&path));
        }
        if !self.kind.is_plain() {
            return Err(EngineError::usage(
                "--in-place writes into the image as it is: subformat, block and sector size and \
                 compression are for new images",
            ));
        }
        if !self.force {
            let what = format!("{} in place to", self.verb);
            check_no_children(&path, &self.open.search, &what)?;
        }
        let format = match self.kind.format {
            Some(format) => format,
            None => format_of_existing(&path, self.verb)?,
        };
        Ok(self.plan(Place::ExistingFile(path), format, true))
    }

    fn plan(&self, place: Place, format: Format, differing_only: bool) -> WritePlan {
        WritePlan { place, format, differing_only, rules: self.clone() }
    }

    /// The format of a new file.
    fn format_for(&self, path: &Path) -> Result<Format> {
        let by_name = || format_by_name(path).or(self.default_format);
        self.kind.format.or_else(by_name).ok_or_else(|| {
            EngineError::usage(format!(
                "the name of {} does not say its format: end it in .vhdx, .vhd, .vmdk, .qcow2, .raw \
                 or .img, or give the format (--to)",
                path.display()
            ))
        })
    }

    fn device_format(&self, what: &str) -> Result<Format> {
        match self.kind.format {
            None | Some(Format::Raw) if self.kind.is_plain() => Ok(Format::Raw),
            None | Some(Format::Raw) => Err(EngineError::usage(format!(
                "{what} takes the disk's bytes as they are: subformat, block and sector size and \
                 compression are for images"
            ))),
            Some(other) => Err(EngineError::usage(format!(
                "{what} takes the disk's bytes as they are (raw), not a {other} image"
            ))),
        }
    }

    pub fn already_there(&self, path: &Path) -> EngineError {
        EngineError::refused(
            format!("{} already exists", path.display()),
            format!(
                "add {} to replace it, or --in-place to write only what differs",
                self.replace_option
            ),
        )
    }
}

impl WritePlan {
    /// The target as a person knows it.
    pub fn name(&self) -> String {
        match &self.place {
            Place::NewFile(path) | Place::ExistingFile(path) | Place::Device(path) => {
                path.display().to_string()
            }
            Place::Nbd(url) => url.to_string(),
            Place::Agent(url, _) => url.to_string(),
        }
    }

    /// The path, where it is one.
    pub fn path(&self) -> Option<&Path> {
        match &self.place {
            Place::NewFile(path) | Place::ExistingFile(path) | Place::Device(path) => Some(path),
            Place::Nbd(_) | Place::Agent(..) => None,
        }
    }

    /// Whether what is written is on the medium at the end.
    pub fn is_durable(&self) -> bool {
        match (&self.place, self.rules.durability) {
            (Place::NewFile(path), Durability::Replaced) => path.symlink_metadata().is_ok(),
            (Place::NewFile(_), Durability::Never) => false,
            _ => true,
        }
    }

    /// Writes the disk: opens the target, copies, and ends it. `workers` are those of the user;
    /// `hints` say what is known of the source.
    ///
    /// # Errors
    /// A new file is then not there; of what was overwritten, [`EngineError::Incomplete`] tells.
    pub fn write(
        &self,
        source: &dyn BlockDevice,
        workers: Option<usize>,
        hints: &SourceHints,
        context: JobContext<'_>,
    ) -> Result<CopySummary> {
        let is_durable = self.is_durable();
        let target = self.open(source.size_bytes(), is_durable, context.cancel)?;
        let mut options =
            CopyOptions { differing_only: self.differing_only, ..CopyOptions::default() };
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        if !is_durable && hints.unit_bytes.is_some_and(|unit| unit <= CACHED_PIECE_BYTES as u64) {
            options.piece_bytes = CACHED_PIECE_BYTES;
            // Nobody waits for a medium, and one file takes one writer at a time.
            options.workers = cores.clamp(2, 4);
        }
        options.workers = workers.unwrap_or(options.workers).max(1);
        let (progress, cancel) = (context.progress, context.cancel);
        let written = match target {
            Target::New(staged) => {
                options.target_is_zero = true;
                if let Some(raw_file) = &hints.raw_file
                    && !self.rules.kind.compress
                    && staged.image.share_blocks_of(raw_file)?
                {
                    progress.add_done(source.size_bytes());
                    staged.publish()?;
                    return Ok(CopySummary::default());
                }
                let compressed = staged.image.compressed();
                if self.rules.kind.compress && compressed.is_none() {
                    return Err(EngineError::usage(format!(
                        "{} images of this kind cannot be compressed: use qcow2, or VMDK's \
                         streamOptimized",
                        self.format
                    )));
                }
                let copied = match compressed {
                    Some(compressed) => {
                        // These are bound by compressing, and add workers of their own.
                        copy_compressed(
                            source,
                            compressed,
                            workers.unwrap_or(cores),
                            progress,
                            cancel,
                        )
                    }
                    None => copy_device(source, &*staged.image, &options, progress, cancel),
                };
                copied.map_err(EngineError::from).and_then(|summary| {
                    staged.publish()?;
                    Ok(summary)
                })
            }
            Target::Image(image, _lock) => copy_device(source, &*image, &options, progress, cancel)
                .and_then(|summary| image.finish().map(|()| summary))
                .inspect(|_| self.path().into_iter().for_each(crate::delta::forget))
                .map_err(EngineError::from),
            Target::Blank(device) => {
                options.target_is_zero = true;
                copy_device(source, &*device, &options, progress, cancel).map_err(EngineError::from)
            }
            Target::Device(device) => {
                copy_device(source, &*device, &options, progress, cancel).map_err(EngineError::from)
            }
        };
        written.map_err(|error| match self.place {
            Place::NewFile(_) => error,
            _ => EngineError::Incomplete { target: self.name(), source: Box::new(error) },
        })
    }

    fn open(&self, size_bytes: u64, is_durable: bool, cancel: &CancelToken) -> Result<Target> {
        match &self.place {
            Place::NewFile(path) => {
                let create = CreateOptions {
                    without_flushes: !is_durable,
                    ..self.rules.kind.create_options(self.format, size_bytes)
                };
                Ok(Target::New(StagedImage::create(path, &create, self.rules.replace)?))
            }
            Place::ExistingFile(path) => self.open_existing(path, size_bytes),
            Place::Device(path) => self
                .of_fixed_size(Arc::new(RawDevice::open(path, OpenMode::ReadWrite)?), size_bytes),
            Place::Nbd(url) => {
                let device = NbdPeer::connect(url, &NbdOptions::default())?;
                self.of_fixed_size(Arc::new(device), size_bytes)
            }
            Place::Agent(url, client) => self.open_agent(url, client, size_bytes, cancel),
        }
    }

    /// Opens a disk of an agent, or makes it there.
    fn open_agent(
        &self,
        url: &AgentUrl,
        client: &AgentClient,
        size_bytes: u64,
        cancel: &CancelToken,
    ) -> Result<Target> {
        let path = url.paths().first().map_or("", String::as_str);
        let is_there = match client.info(path, cancel) {
            Ok(_) => true,
            Err(AgentError::NotFound { .. }) => false,
            Err(error) => return Err(error.into()),
        };
        if is_there {
            return self.of_fixed_size(Arc::new(client.open_writable(path, cancel)?), size_bytes);
        }
        let size_bytes = self.rules.kind.disk_size(self.format, size_bytes);
        client.create(path, &self.format.to_string(), size_bytes, cancel)?;
        Ok(Target::Blank(Arc::new(client.open_writable(path, cancel)?)))
    }

    fn open_existing(&self, path: &Path, size_bytes: u64) -> Result<Target> {
        let given = &self.rules.open;
        let options = OpenOptions {
            format: Some(self.format),
            // Its format is certain, or it would not be changed in place.
            backing: given.backing.unwrap_or(BackingPolicy::SameDirectory),
            backing_format: given.backing_format,
            search: given.search.clone(),
            any_parent: given.any_parent,
            ..OpenOptions::default()
        };
        let lock = ImageLock::take(path)?;
        let image = open_writable(path, &options)?;
        let wanted = self.rules.kind.disk_size(self.format, size_bytes);
        if image.size_bytes() != wanted {
            image.resize(wanted)?;
        }
        Ok(Target::Image(image, lock))
    }

    fn of_fixed_size(
        &self,
        device: Arc<dyn WritableBlockDevice>,
        size_bytes: u64,
    ) -> Result<Target> {
        let what = || format!("{} to {}", self.rules.verb, self.name());
        if device.size_bytes() < size_bytes {
            return Err(EngineError::refused(
                what(),
                format!(
                    "it has {} bytes and the disk {size_bytes}: a larger one is needed",
                    device.size_bytes()
                ),
            ));
        }
        if !self.rules.replace && !self.differing_only && holds_something(device.as_ref())? {
            return Err(EngineError::refused(
                what(),
                format!(
                    "it holds data already: add {} to overwrite it, or --in-place to write only \
                     what differs",
                    self.rules.replace_option
                ),
            ));
        }
        Ok(Target::Device(device))
    }
}

/// A target that is open for writing.
enum Target {
    /// A new image, all zeros.
    New(StagedImage),
    /// An image that is changed in place.
    Image(Arc<dyn ImageWriter>, ImageLock),
    /// A new disk of an agent, all zeros.
    Blank(Arc<dyn WritableBlockDevice>),
    /// A block device, an export or an agent's disk.
    Device(Arc<dyn WritableBlockDevice>),
}

/// The format of a file that is changed in place. The guest of a raw disk can make it look like
/// any format, and an image taken for raw would be destroyed: name and content must agree, and a
/// file whose name says nothing counts as raw only where its content says nothing else.
pub(crate) fn format_of_existing(path: &Path, verb: &str) -> Result<Format> {
    let named = format_by_name(path);
    let found = probe_device(&RawDevice::open(path, OpenMode::ReadOnly)?)?;
    if found == named.unwrap_or(Format::Raw) {
        return Ok(found);
    }
    let name = named.map_or("does not say its format".to_owned(), |named| format!("says {named}"));
    let option = if verb == "convert" { "--to" } else { "--format" };
    Err(EngineError::refused(
        format!("{verb} in place to {}", path.display()),
        format!("its name {name} and its content looks like {found}: add {option}"),
    ))
}

#[cfg(unix)]
fn is_block_device(metadata: &std::fs::Metadata) -> bool {
    use std::os::unix::fs::FileTypeExt;
    metadata.file_type().is_block_device()
}

#[cfg(not(unix))]
fn is_block_device(_metadata: &std::fs::Metadata) -> bool {
    false
}

/// Whether the beginning or the end of a device holds anything but zeros.
fn holds_something(device: &dyn WritableBlockDevice) -> Result<bool> {
    let size_bytes = device.size_bytes();
    let length = size_bytes.min(SIGNATURE_BYTES);
    let mut buffer = vec![0; usize::try_from(length).unwrap_or(0)];
    for offset in [0, size_bytes - length] {
        device.read_at(&mut buffer, offset)?;
        if !is_zero(&buffer) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_place_name_and_content_must_agree() {
        let directory = tempfile::tempdir().unwrap();
        let format = |name: &str, content: &[u8]| {
            let path = directory.path().join(name);
            let mut bytes = content.to_vec();
            bytes.resize(4096, 0);
            std::fs::write(&path, bytes).unwrap();
            format_of_existing(&path, "restore")
        };
        assert_eq!(format("a.raw", b"").unwrap(), Format::Raw);
        assert_eq!(format("a", b"").unwrap(), Format::Raw);
        assert_eq!(format("a.qcow2", b"QFI\xfb\0\0\0\x03").unwrap(), Format::Qcow2);
        for (name, content) in
            [("b.raw", &b"QFI\xfb"[..]), ("b.img", b"QFI\xfb"), ("b", b"QFI\xfb"), ("b.qcow2", b"")]
        {
            let error = format(name, content).unwrap_err();
            assert!(matches!(error, EngineError::Refused { .. }), "{name}: {error:?}");
            assert!(error.to_string().contains("--format"), "{error}");
        }
    }

    #[test]
    fn odd_sizes_are_rounded_up_except_for_raw() {
        let kind = ImageKind::default();
        assert_eq!(kind.disk_size(Format::Raw, 1000), 1000);
        assert_eq!(kind.disk_size(Format::Qcow2, 1000), 1024);
        assert_eq!(kind.disk_size(Format::Vhdx, 0), 0);
        let large = ImageKind { logical_sector_bytes: Some(4096), ..ImageKind::default() };
        assert_eq!(large.disk_size(Format::Vhdx, 4097), 8192);
    }
}
