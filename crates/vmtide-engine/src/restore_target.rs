//! Where each restored disk goes: which files, what may be overwritten, and the opening and
//! closing of targets.

use crate::in_use::{Use, check_not_in_use};
use crate::peer::NbdPeer;
use crate::restore::{RestoreJob, RestoreTarget};
use crate::{EngineError, Result};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmtide_block::{BlockDevice, OpenMode, RawDevice, WritableBlockDevice, is_zero};
use vmtide_hypervisor::JobId;
use vmtide_image::qcow2::{Qcow2CreateOptions, Qcow2Writer};
use vmtide_image::{Format, OpenOptions, open_writable};
use vmtide_nbd::{NbdOptions, NbdUrl};
use vmtide_repo::{DiskRecord, RestorePoint};

/// The file beside the disks that holds the VM's configuration.
pub(crate) const CONFIG_FILE: &str = "vm-config.json";

/// How much of the beginning and the end of a device is looked at to tell whether it is in use:
/// partition tables, file system super blocks and their backups lie there.
const SIGNATURE_BYTES: u64 = 1 << 20;

/// The most bytes that the name of a VM or disk takes in a file name: two of them, a number and an
/// extension stay below the 255 that file systems allow.
const NAME_PART_BYTES: usize = 100;

/// What a restore writes.
pub(crate) struct Plan {
    /// One for each disk, in order.
    pub writes: Vec<WritePlan>,
    /// Where the VM's configuration goes.
    pub config_path: Option<PathBuf>,
}

/// Where one disk goes.
pub(crate) struct WritePlan {
    place: Place,
    /// In which format.
    pub format: Format,
    /// Whether only what differs is written.
    pub differing_only: bool,
    force: bool,
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
}

impl WritePlan {
    /// The target as a person knows it.
    pub fn name(&self) -> String {
        match &self.place {
            Place::NewFile(path) | Place::ExistingFile(path) | Place::Device(path) => {
                path.display().to_string()
            }
            Place::Nbd(url) => url.to_string(),
        }
    }

    /// Whether a failure leaves the target half old, half new.
    pub fn is_overwritten(&self) -> bool {
        !matches!(self.place, Place::NewFile(_))
    }
}

/// Decides where every disk goes, and refuses what would overwrite without being told to. Makes
/// the directory of a restore to a directory; touches nothing else.
pub(crate) fn plan(job: &RestoreJob<'_>, disks: &[&DiskRecord]) -> Result<Plan> {
    if job.in_place && job.force {
        return Err(EngineError::usage(
            "--in-place and --force exclude each other: change where it differs, or replace",
        ));
    }
    let path = match &job.target {
        RestoreTarget::Nbd(url) => {
            only_disk(disks, "an NBD export")?;
            let format = device_format(job, "an NBD export")?;
            return Ok(Plan {
                writes: vec![WritePlan {
                    place: Place::Nbd(url.clone()),
                    format,
                    differing_only: job.in_place,
                    force: job.force,
                }],
                config_path: None,
            });
        }
        RestoreTarget::Path(path) => path,
    };
    let names_directory = path.as_os_str().to_string_lossy().ends_with('/');
    let metadata = std::fs::metadata(path).ok();
    let is_directory = metadata.as_ref().is_some_and(std::fs::Metadata::is_dir);
    if is_directory || (metadata.is_none() && (names_directory || disks.len() > 1)) {
        return plan_directory(job, path, disks);
    }
    only_disk(disks, &format!("the file {}", path.display()))?;
    let write = plan_file(job, path.clone(), metadata.as_ref())?;
    Ok(Plan { writes: vec![write], config_path: None })
}

fn only_disk(disks: &[&DiskRecord], target: &str) -> Result<()> {
    if disks.len() == 1 {
        return Ok(());
    }
    let ids: Vec<_> = disks.iter().map(|disk| disk.id.as_str()).collect();
    Err(EngineError::usage(format!(
        "{} disks do not go into {target}: choose one with --disk ({}), or give a directory",
        disks.len(),
        ids.join(", ")
    )))
}

fn device_format(job: &RestoreJob<'_>, what: &str) -> Result<Format> {
    match job.format {
        None | Some(Format::Raw) => Ok(Format::Raw),
        Some(other) => Err(EngineError::usage(format!(
            "{what} takes the disk's bytes as they are (raw), not a {other} image"
        ))),
    }
}

fn plan_directory(job: &RestoreJob<'_>, directory: &Path, disks: &[&DiskRecord]) -> Result<Plan> {
    std::fs::create_dir_all(directory)
        .map_err(|error| EngineError::io(format!("create {}", directory.display()), error))?;
    let format = check_writable_format(job.format.unwrap_or(Format::Raw))?;
    let mut writes: Vec<WritePlan> = Vec::with_capacity(disks.len());
    for disk in disks {
        let stem = format!("{}-{}", file_name_of(&job.point.vm), file_name_of(&disk.id));
        let mut path = directory.join(format!("{stem}.{format}"));
        // Two ids may differ only in what a file name cannot hold.
        let mut number = 2;
        while writes.iter().any(|write| write.name() == path.display().to_string()) {
            path = directory.join(format!("{stem}-{number}.{format}"));
            number += 1;
        }
        let metadata = std::fs::metadata(&path).ok();
        writes.push(plan_file(job, path, metadata.as_ref())?);
    }
    let config_path = directory.join(CONFIG_FILE);
    if config_path.exists() && !job.force && !job.in_place {
        return Err(already_there(&config_path));
    }
    Ok(Plan { writes, config_path: Some(config_path) })
}

fn plan_file(
    job: &RestoreJob<'_>,
    path: PathBuf,
    metadata: Option<&std::fs::Metadata>,
) -> Result<WritePlan> {
    let write = |place, format, differing_only| WritePlan {
        place,
        format,
        differing_only,
        force: job.force,
    };
    let Some(metadata) = metadata else {
        let format = format_for(job, &path)?;
        // In place of nothing is a new file.
        return Ok(write(Place::NewFile(path), format, false));
    };
    if is_block_device(metadata) {
        let format = device_format(job, "a block device")?;
        return Ok(write(Place::Device(path), format, job.in_place));
    }
    if !metadata.is_file() {
        return Err(EngineError::refused(
            format!("restore to {}", path.display()),
            "it is neither a file, a directory nor a block device",
        ));
    }
    if job.force || job.in_place {
        check_not_in_use(&path, Use::Write)?;
    }
    if job.force {
        let format = format_for(job, &path)?;
        return Ok(write(Place::NewFile(path), format, false));
    }
    if !job.in_place {
        return Err(already_there(&path));
    }
    let format = match job.format {
        Some(format) => format,
        None => format_of_existing(&path)?,
    };
    let format = check_writable_format(format)?;
    Ok(write(Place::ExistingFile(path), format, true))
}

fn already_there(path: &Path) -> EngineError {
    EngineError::refused(
        format!("{} already exists", path.display()),
        "add --force to replace it, or --in-place to write only what differs",
    )
}

/// The format of a new file: as asked, else by its extension, else raw.
fn format_for(job: &RestoreJob<'_>, path: &Path) -> Result<Format> {
    if let Some(format) = job.format {
        return check_writable_format(format);
    }
    check_writable_format(format_by_extension(path).unwrap_or(Format::Raw))
}

/// The format that a file's name says, if it says any.
fn format_by_extension(path: &Path) -> Option<Format> {
    let extension = path.extension()?.to_ascii_lowercase();
    match extension.to_str()? {
        "qcow2" => Some(Format::Qcow2),
        "vhdx" => Some(Format::Vhdx),
        "vhd" => Some(Format::Vhd),
        "vmdk" => Some(Format::Vmdk),
        "raw" | "img" => Some(Format::Raw),
        _ => None,
    }
}

/// The format of a file that is changed in place. The guest of a raw disk can make it look like
/// any format, and an image taken for raw would be destroyed: name and content must agree, and a
/// file whose name says nothing counts as raw only where its content says nothing else.
fn format_of_existing(path: &Path) -> Result<Format> {
    let named = format_by_extension(path);
    let found = vmtide_image::probe(path)?;
    if found == named.unwrap_or(Format::Raw) {
        return Ok(found);
    }
    let name = named.map_or("does not say its format".to_owned(), |named| format!("says {named}"));
    Err(EngineError::refused(
        format!("restore in place to {}", path.display()),
        format!("its name {name} and its content looks like {found}: add --format"),
    ))
}

fn check_writable_format(format: Format) -> Result<Format> {
    match format {
        Format::Raw | Format::Qcow2 => Ok(format),
        other => Err(EngineError::usage(format!(
            "writing {other} images is not in this build yet: use --format raw or qcow2"
        ))),
    }
}

/// A name of a VM or disk as a part of a file name: no separators, nothing hidden, no surprises
/// for shells.
pub(crate) fn file_name_of(name: &str) -> String {
    let mut safe = String::new();
    for c in name.chars() {
        let c = if c.is_alphanumeric() || "._-+".contains(c) { c } else { '_' };
        if safe.len() + c.len_utf8() > NAME_PART_BYTES {
            break;
        }
        safe.push(c);
    }
    match safe.trim_start_matches('.') {
        "" => "disk".into(),
        name => name.into(),
    }
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

/// A target that is open for writing.
pub(crate) struct Prepared {
    /// What to write to.
    pub device: Arc<dyn WritableBlockDevice>,
    /// Whether it reads as zeros everywhere.
    pub is_zero: bool,
    temporary: Option<PathBuf>,
}

impl Prepared {
    /// Opens the target for a disk of `size_bytes`.
    pub fn open(write: &WritePlan, size_bytes: u64) -> Result<Self> {
        match &write.place {
            Place::NewFile(path) => Self::create(path, write.format, size_bytes),
            Place::ExistingFile(path) => Self::open_existing(path, write.format, size_bytes),
            Place::Device(path) => {
                let device = RawDevice::open(path, OpenMode::ReadWrite)?;
                Self::of_fixed_size(Arc::new(device), write, size_bytes)
            }
            Place::Nbd(url) => {
                let device = NbdPeer::connect(url, &NbdOptions::default())?;
                Self::of_fixed_size(Arc::new(device), write, size_bytes)
            }
        }
    }

    fn create(path: &Path, format: Format, size_bytes: u64) -> Result<Self> {
        let temporary = temporary_beside(path)?;
        let opened = match format {
            Format::Qcow2 => Qcow2Writer::create(&temporary, &Qcow2CreateOptions::new(size_bytes))
                .map(|image| Arc::new(image) as Arc<dyn WritableBlockDevice>),
            _ => RawDevice::open(&temporary, OpenMode::CreateNew { size_bytes })
                .map(|file| Arc::new(file) as Arc<dyn WritableBlockDevice>),
        };
        match opened {
            Ok(device) => Ok(Self { device, is_zero: true, temporary: Some(temporary) }),
            Err(error) => {
                // Whatever was made of it is of no use to anybody.
                let _ = std::fs::remove_file(&temporary);
                Err(error.into())
            }
        }
    }

    fn open_existing(path: &Path, format: Format, size_bytes: u64) -> Result<Self> {
        let options = OpenOptions { format: Some(format), ..OpenOptions::default() };
        let device = open_writable(path, &options)?;
        if device.size_bytes() != size_bytes {
            device.resize(size_bytes)?;
        }
        Ok(Self { device, is_zero: false, temporary: None })
    }

    fn of_fixed_size(
        device: Arc<dyn WritableBlockDevice>,
        write: &WritePlan,
        size_bytes: u64,
    ) -> Result<Self> {
        let what = || format!("restore to {}", write.name());
        if device.size_bytes() < size_bytes {
            return Err(EngineError::refused(
                what(),
                format!(
                    "it has {} bytes and the disk {size_bytes}: a larger one is needed",
                    device.size_bytes()
                ),
            ));
        }
        if !write.force && !write.differing_only && holds_something(device.as_ref())? {
            return Err(EngineError::refused(
                what(),
                "it holds data already: add --force to overwrite it, or --in-place to write only \
                 what differs",
            ));
        }
        Ok(Self { device, is_zero: false, temporary: None })
    }

    /// Everything is written and flushed: gives a new file its name.
    pub fn finish(self, write: &WritePlan) -> Result<()> {
        drop(self.device);
        let (Some(temporary), Place::NewFile(path)) = (self.temporary, &write.place) else {
            return Ok(());
        };
        publish(&temporary, path, write.force).inspect_err(|_| {
            // Without its name it is only garbage.
            let _ = std::fs::remove_file(&temporary);
        })
    }

    /// It did not come to its end: removes a new file.
    pub fn discard(self) {
        drop(self.device);
        if let Some(temporary) = self.temporary
            && let Err(error) = std::fs::remove_file(&temporary)
        {
            tracing::warn!(path = %temporary.display(), %error, "cannot remove an unfinished file");
        }
    }
}

/// A hidden name in the same directory, so that the rename at the end stays in one file system.
fn temporary_beside(path: &Path) -> Result<PathBuf> {
    let name = path
        .file_name()
        .ok_or_else(|| EngineError::usage(format!("{} does not name a file", path.display())))?;
    let job = JobId::random();
    // A long name must not become too long by what is added.
    let name: String = name.to_string_lossy().chars().take(40).collect();
    Ok(path.with_file_name(format!(".{name}.vmtide-partial-{job}")))
}

fn publish(temporary: &Path, path: &Path, replace: bool) -> Result<()> {
    let context = || format!("rename {} to {}", temporary.display(), path.display());
    rename(temporary, path, replace).map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => already_there(path),
        _ => EngineError::io(context(), error),
    })?;
    sync_directory_of(path)
}

#[cfg(target_os = "linux")]
fn rename(from: &Path, to: &Path, replace: bool) -> std::io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;
    if replace {
        return std::fs::rename(from, to);
    }
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // A file system without the flag.
        Err(Errno::INVAL | Errno::NOSYS) => link_and_unlink(from, to),
        other => Ok(other?),
    }
}

#[cfg(not(target_os = "linux"))]
fn rename(from: &Path, to: &Path, replace: bool) -> std::io::Result<()> {
    if replace { std::fs::rename(from, to) } else { link_and_unlink(from, to) }
}

/// Renames without replacing: a link is only made where the name is free.
fn link_and_unlink(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::hard_link(from, to)?;
    std::fs::remove_file(from)
}

fn sync_directory_of(path: &Path) -> Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| EngineError::io(format!("sync {}", directory.display()), error))
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

/// A new file that only its owner may read: a configuration tells much of its VM.
fn create_for_owner(path: &Path) -> std::io::Result<File> {
    let mut options = File::options();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

/// Writes the VM's configuration as readable JSON, under a temporary name first. Answers with its
/// path.
pub(crate) fn write_config(path: &Path, point: &RestorePoint, replace: bool) -> Result<String> {
    let temporary = temporary_beside(path)?;
    let write = || -> std::io::Result<()> {
        let mut file = create_for_owner(&temporary)?;
        serde_json::to_writer_pretty(&mut file, &point.config)?;
        file.write_all(b"\n")?;
        file.sync_all()
    };
    let written = write()
        .map_err(|error| EngineError::io(format!("write {}", path.display()), error))
        .and_then(|()| publish(&temporary, path, replace));
    if let Err(error) = written {
        // Without its name it is only garbage.
        let _ = std::fs::remove_file(&temporary);
        return Err(error);
    }
    Ok(path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_safe_file_names() {
        assert_eq!(file_name_of("Web Server/1"), "Web_Server_1");
        assert_eq!(file_name_of("../../etc/passwd"), "_.._etc_passwd");
        assert_eq!(file_name_of("virtio0"), "virtio0");
        assert_eq!(file_name_of("..."), "disk");
        assert_eq!(file_name_of("müller"), "müller");
        assert_eq!(file_name_of(&"x".repeat(1000)).len(), 100);
        assert_eq!(file_name_of(&"日".repeat(1000)), "日".repeat(33));
    }

    #[test]
    fn in_place_name_and_content_must_agree() {
        let directory = tempfile::tempdir().unwrap();
        let format = |name: &str, content: &[u8]| {
            let path = directory.path().join(name);
            let mut bytes = content.to_vec();
            bytes.resize(4096, 0);
            std::fs::write(&path, bytes).unwrap();
            format_of_existing(&path)
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
    fn a_link_never_replaces() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("a"), directory.path().join("b"));
        std::fs::write(&from, "new").unwrap();
        std::fs::write(&to, "old").unwrap();
        let error = link_and_unlink(&from, &to).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "old");
        std::fs::remove_file(&to).unwrap();
        link_and_unlink(&from, &to).unwrap();
        assert!(!from.exists() && std::fs::read_to_string(&to).unwrap() == "new");
    }

    #[test]
    fn a_name_taken_meanwhile_is_not_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("a"), directory.path().join("b"));
        std::fs::write(&from, "new").unwrap();
        std::fs::write(&to, "old").unwrap();
        let error = publish(&from, &to, false).unwrap_err();
        assert!(error.to_string().contains("already exists"), "{error}");
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "old");
        publish(&from, &to, true).unwrap();
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "new");
    }
}
