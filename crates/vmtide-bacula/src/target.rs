//! A disk that is being restored: an image that gets its name when all of it is there, or a block device.

use crate::job::Replace;
use crate::object::{Destination, PointObject, RestoreOptions};
use crate::stream::MomentId;
use crate::{BackendError, Result, names};
use std::fs::{File, Metadata};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;
use vmtide_block::{ByteRange, OpenMode, RawDevice, WritableBlockDevice};
use vmtide_engine::ImageKind;
use vmtide_engine::image::StagedImage;
use vmtide_image::{CreateOptions, Format};

/// What is written at a time: blocks of a stream that continue each other are joined up to this.
const WRITE_BYTES: usize = 1 << 20;

/// What of a block device is made zero at a time. A device that cannot discard is written: 25 seconds at 10 MB/s,
/// far below the silence after which the plugin gives the backend up, and soon enough for a cancelled job.
const ZERO_BYTES: u64 = 256 << 20;

/// The platforms whose disks lie on another host, where an agent or the host itself read them.
const ELSEWHERE: [&str; 2] = ["agent", "hyper-v"];

/// Where a disk goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// An image at this path, in this format.
    Image(PathBuf, Format),
    /// A block device.
    Device(PathBuf),
    /// A disk of the VM that is made on a host.
    Vm,
}

/// Where the disk that Bacula calls `output` goes.
///
/// # Errors
/// Where it shall replace the VM's own image and that is not known, not on this host, or no regular file.
pub fn place(
    output: &Path,
    options: &RestoreOptions,
    point: Option<&PointObject>,
) -> Result<Place> {
    let format = options.format.unwrap_or(Format::Raw);
    match &options.to {
        Destination::Path => Ok(Place::Image(with_extension(output, format), format)),
        Destination::Directory(directory) => {
            Ok(Place::Image(with_extension(&below(directory, output), format), format))
        }
        Destination::Device(device) => Ok(Place::Device(device.clone())),
        Destination::Vm(_) => Ok(Place::Vm),
        Destination::Original => {
            let stem = output.file_stem().unwrap_or_default().to_string_lossy();
            if point.is_some_and(|point| ELSEWHERE.contains(&point.config.platform.as_str())) {
                return Err(BackendError::Refused(format!(
                    "{}: the VM's own image is on another host, and its path means another file here; \
                     restore it to a directory, or a VM of Hyper-V to hyperv+winrm://HOST/NAME",
                    output.display()
                )));
            }
            let disks = point.map_or(&[][..], |point| &point.config.disks);
            let disk = disks.iter().find(|disk| names::component(&disk.id.0) == stem);
            let path = disk.and_then(|disk| disk.path.as_ref()).map(PathBuf::from);
            let path = path.filter(|path| path.is_absolute()).ok_or_else(|| {
                BackendError::Refused(format!(
                    "{}: the backup does not say where the VM had this disk; restore it elsewhere",
                    output.display()
                ))
            })?;
            let its_format = disk.and_then(|disk| disk.format.as_deref()?.parse().ok());
            let format = options.format.or(its_format).unwrap_or(Format::Raw);
            Ok(Place::Image(own_image(path)?, format))
        }
    }
}

/// The regular file behind the path of a VM's image, which may be gone. What else is there is not replaced: a
/// new file would take the place of a device's node and leave the device as it was.
fn own_image(path: PathBuf) -> Result<PathBuf> {
    let refused = |why: &str| {
        Err(BackendError::Refused(format!(
            "{} {why}: `original` replaces image files; turn the VM off and give the block device itself as \
             to=, one disk at a time, or restore it elsewhere",
            path.display()
        )))
    };
    match path.canonicalize() {
        Ok(real) if real.is_file() => Ok(real),
        Ok(_) => refused("is no regular file"),
        Err(_) if path.symlink_metadata().is_ok() => refused("leads to nothing"),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            if path.starts_with("/dev") {
                return refused("is a device that is not there");
            }
            Ok(path)
        }
        Err(error) => Err(BackendError::io(format!("look at {}", path.display()), error)),
    }
}

/// `VM/FILE` of a path, below a directory.
pub fn below(directory: &Path, output: &Path) -> PathBuf {
    let vm = output.parent().and_then(Path::file_name);
    let directory = vm.map_or_else(|| directory.to_path_buf(), |vm| directory.join(vm));
    directory.join(output.file_name().unwrap_or_default())
}

fn with_extension(path: &Path, format: Format) -> PathBuf {
    if format == Format::Raw { path.to_path_buf() } else { path.with_extension(format.name()) }
}

/// Whether a file from `time` (seconds since 1970) may take the name `path`.
pub fn may_take(path: &Path, replace: Replace, time: u64) -> bool {
    let Ok(metadata) = path.symlink_metadata() else { return true };
    let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let modified = modified.map_or(0, |duration| duration.as_secs());
    match replace {
        Replace::Always => true,
        Replace::IfNewer => time > modified,
        Replace::IfOlder => time < modified,
        Replace::Never => false,
    }
}

/// Makes the directory of a file.
///
/// # Errors
/// What the operating system says.
pub fn make_directory_of(path: &Path) -> Result<()> {
    let Some(directory) = path.parent() else { return Ok(()) };
    std::fs::create_dir_all(directory)
        .map_err(|error| BackendError::io(format!("create {}", directory.display()), error))
}

/// A disk in the making.
pub struct Target {
    device: Arc<dyn WritableBlockDevice>,
    staged: Option<StagedImage>,
    /// What the new image takes owner and mode from.
    owner: Option<(PathBuf, Metadata)>,
    /// Where it is, for people.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    buffer: Vec<u8>,
    buffer_offset: u64,
}

impl Target {
    /// Makes an image of zeros.
    ///
    /// # Errors
    /// Where it cannot be made.
    pub fn image(path: &Path, format: Format, size_bytes: u64) -> Result<Self> {
        make_directory_of(path)?;
        let size = ImageKind::default().disk_size(format, size_bytes);
        let options = CreateOptions::new(format, size);
        let staged = StagedImage::create(path, &options, path.symlink_metadata().is_ok())?;
        let device: Arc<dyn WritableBlockDevice> = staged.image.clone();
        Ok(Self::new(device, Some(staged), path.display().to_string(), size_bytes))
    }

    /// Makes a block device zero. Calls `alive` again and again while that takes long, and ends with its error.
    ///
    /// # Errors
    /// Where the device is too small or fails; those of `alive`.
    pub fn device(
        path: &Path,
        size_bytes: u64,
        alive: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Self> {
        let device = Arc::new(RawDevice::open(path, OpenMode::ReadWrite)?);
        let target = Self::existing(device, path.display().to_string(), size_bytes)?;
        target.clear(alive)?;
        Ok(target)
    }

    /// A disk that is there already.
    ///
    /// # Errors
    /// Where it is too small.
    pub fn existing(
        device: Arc<dyn WritableBlockDevice>,
        name: String,
        size_bytes: u64,
    ) -> Result<Self> {
        if device.size_bytes() < size_bytes {
            return Err(BackendError::Refused(format!(
                "{name} has {} bytes and the disk {size_bytes}: a larger one is needed",
                device.size_bytes()
            )));
        }
        Ok(Self::new(device, None, name, size_bytes))
    }

    /// Makes all of it zero. Calls `alive` again and again, and ends with its error.
    ///
    /// # Errors
    /// What the medium says; those of `alive`.
    pub fn clear(&self, alive: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let mut offset = 0;
        while offset < self.size_bytes {
            alive()?;
            let length = ZERO_BYTES.min(self.size_bytes - offset);
            self.device.write_zeroes(ByteRange::new(offset, length))?;
            offset += length;
        }
        Ok(())
    }

    fn new(
        device: Arc<dyn WritableBlockDevice>,
        staged: Option<StagedImage>,
        name: String,
        size_bytes: u64,
    ) -> Self {
        device.expect_bulk_writes();
        Self { device, staged, owner: None, name, size_bytes, buffer: Vec::new(), buffer_offset: 0 }
    }

    /// Has the image get owner and mode of the one that it replaces, if there is one: whoever runs the VM must be
    /// able to open it again.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn keep_owner(&mut self) -> Result<()> {
        let path = PathBuf::from(&self.name);
        self.owner = match path.symlink_metadata() {
            Ok(metadata) => Some((path, metadata)),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(BackendError::io(format!("look at {}", self.name), error)),
        };
        Ok(())
    }

    /// Writes data.
    ///
    /// # Errors
    /// [`BackendError::Damaged`] where it lies past the end; what the medium says.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.check(ByteRange::new(offset, data.len() as u64))?;
        let continues = self.buffer_offset.saturating_add(self.buffer.len() as u64) == offset;
        if !continues || self.buffer.len() + data.len() > WRITE_BYTES {
            self.write_buffer()?;
            self.buffer_offset = offset;
        }
        self.buffer.extend_from_slice(data);
        Ok(())
    }

    /// Makes a range zero.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn zero(&mut self, range: ByteRange) -> Result<()> {
        self.check(range)?;
        self.write_buffer()?;
        Ok(self.device.write_zeroes(range)?)
    }

    /// Writes what is gathered.
    ///
    /// # Errors
    /// What the medium says.
    pub fn write_buffer(&mut self) -> Result<()> {
        if !self.buffer.is_empty() {
            self.device.write_at(&self.buffer, self.buffer_offset)?;
            self.buffer.clear();
        }
        Ok(())
    }

    fn check(&self, range: ByteRange) -> Result<()> {
        match range.checked_end() {
            Some(end) if end <= self.size_bytes => Ok(()),
            _ => Err(BackendError::Damaged {
                file: self.name.clone(),
                detail: format!("data at {range} lie past its end at {}", self.size_bytes),
            }),
        }
    }

    /// All of it is there: it gets its name.
    ///
    /// # Errors
    /// What the medium says; where the name was taken meanwhile.
    pub fn publish(mut self) -> Result<String> {
        self.write_buffer()?;
        self.device.flush()?;
        drop(self.device);
        if let Some(staged) = self.staged {
            staged.publish()?;
        }
        if let Some((path, metadata)) = self.owner {
            give_to_owner(&path, &metadata).map_err(|error| {
                let context = format!("{} is restored; give it its owner and mode", path.display());
                BackendError::io(context, error)
            })?;
        }
        Ok(self.name)
    }
}

#[cfg(unix)]
fn give_to_owner(path: &Path, like: &Metadata) -> std::io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let now = path.symlink_metadata()?;
    if (now.uid(), now.gid()) != (like.uid(), like.gid()) {
        std::os::unix::fs::lchown(path, Some(like.uid()), Some(like.gid()))?;
    }
    std::fs::set_permissions(path, like.permissions())
}

#[cfg(not(unix))]
fn give_to_owner(_path: &Path, _like: &Metadata) -> std::io::Result<()> {
    Ok(())
}

/// A small file that gets its name when all of it is there. Dropping it before removes it.
pub struct PlainFile {
    path: PathBuf,
    temporary: PathBuf,
    file: File,
    is_published: bool,
}

impl PlainFile {
    /// Begins a file.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn create(path: PathBuf) -> Result<Self> {
        make_directory_of(&path)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // A name that nobody knows before, and a file that must not be there: who may write to the directory
        // could have put a link there, to any file of the daemon's user.
        let random = MomentId::random();
        let temporary = path.with_file_name(format!(".{name}.vmtide-partial-{random}"));
        let mut options = File::options();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options
            .open(&temporary)
            .map_err(|error| BackendError::io(format!("create {}", temporary.display()), error))?;
        Ok(Self { path, temporary, file, is_published: false })
    }

    /// Adds bytes.
    ///
    /// # Errors
    /// What the medium says.
    pub fn write(&mut self, data: &[u8]) -> Result<()> {
        self.file
            .write_all(data)
            .map_err(|error| BackendError::io(format!("write {}", self.path.display()), error))
    }

    /// Gives it its name.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn publish(mut self) -> Result<()> {
        self.file
            .sync_all()
            .and_then(|()| std::fs::rename(&self.temporary, &self.path))
            .map_err(|error| BackendError::io(format!("name {}", self.path.display()), error))?;
        self.is_published = true;
        Ok(())
    }
}

impl Drop for PlainFile {
    fn drop(&mut self) {
        if self.is_published {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.temporary) {
            tracing::warn!(path = %self.temporary.display(), %error, "cannot remove an unfinished file");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_find_their_places() {
        let output = Path::new("/where/@qemu/web/vda.raw");
        let place_of = |to, format| place(output, &RestoreOptions { to, format }, None);
        let image = |path: &str, format| Place::Image(path.into(), format);
        assert_eq!(
            place_of(Destination::Path, None).unwrap(),
            image("/where/@qemu/web/vda.raw", Format::Raw)
        );
        assert_eq!(
            place_of(Destination::Path, Some(Format::Vhdx)).unwrap(),
            image("/where/@qemu/web/vda.vhdx", Format::Vhdx)
        );
        assert_eq!(
            place_of(Destination::Directory("/d".into()), Some(Format::Qcow2)).unwrap(),
            image("/d/web/vda.qcow2", Format::Qcow2)
        );
        assert!(place_of(Destination::Original, None).is_err());
    }

    /// A backup of a VM on `platform` with one disk that lay at `path`.
    fn point(platform: &str, path: &Path) -> PointObject {
        let json = serde_json::json!({
            "format": 1, "moment": "", "level": "F", "consistency": "crash", "job": "", "source": "",
            "disks": {},
            "config": {
                "name": "web", "id": null, "platform": platform, "platform_version": null, "machine": null,
                "processors": null, "memory_bytes": null, "firmware": null, "secure_boot": null,
                "disks": [
                    {"id": "vda", "size_bytes": 1, "bus": "virtio-blk", "format": "qcow2", "path": path}
                ],
                "network_adapters": [], "native": []
            }
        });
        serde_json::from_value(json).unwrap()
    }

    fn place_of_original(point: &PointObject) -> Result<Place> {
        let options = RestoreOptions { to: Destination::Original, format: None };
        place(Path::new("/where/@qemu/web/vda.raw"), &options, Some(point))
    }

    #[test]
    fn a_disk_of_an_agent_has_no_original_here() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().canonicalize().unwrap().join("web.qcow2");
        let expected = Place::Image(path.clone(), Format::Qcow2);
        assert_eq!(place_of_original(&point("qemu", &path)).unwrap(), expected);
        std::fs::write(&path, "another VM of the same path").unwrap();
        assert_eq!(place_of_original(&point("qemu", &path)).unwrap(), expected);
        place_of_original(&point("agent", &path)).unwrap_err();
    }

    #[cfg(unix)]
    #[test]
    fn an_original_is_a_regular_file() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path().canonicalize().unwrap();
        let (image, link) = (directory.join("real.qcow2"), directory.join("link.qcow2"));
        std::os::unix::fs::symlink(&image, &link).unwrap();
        place_of_original(&point("qemu", &link)).unwrap_err();
        std::fs::write(&image, "").unwrap();
        assert_eq!(
            place_of_original(&point("qemu", &link)).unwrap(),
            Place::Image(image, Format::Qcow2)
        );
        for other in ["/dev/null", "/dev/no-group/no-volume"] {
            place_of_original(&point("qemu", Path::new(other))).unwrap_err();
        }
        place_of_original(&point("qemu", &directory)).unwrap_err();
    }

    #[cfg(unix)]
    #[test]
    fn a_replaced_image_keeps_its_mode() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("web.raw");
        std::fs::write(&path, "old").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
        let mut target = Target::image(&path, Format::Raw, 1 << 16).unwrap();
        target.keep_owner().unwrap();
        target.publish().unwrap();
        let metadata = path.metadata().unwrap();
        assert_eq!((metadata.len(), metadata.permissions().mode() & 0o777), (1 << 16, 0o640));
    }

    #[test]
    fn a_device_that_is_made_zero_gives_signs_of_life_and_can_be_cancelled() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("device");
        let size_bytes = 3 * ZERO_BYTES + 512;
        let file = File::create(&path).unwrap();
        file.set_len(size_bytes).unwrap();
        let mut signs = 0;
        let mut count = || {
            signs += 1;
            Ok(())
        };
        Target::device(&path, size_bytes, &mut count).unwrap();
        assert_eq!(signs, 4);
        let mut gone = || Err(BackendError::Gone);
        assert!(Target::device(&path, size_bytes, &mut gone).is_err());
    }

    #[cfg(unix)]
    #[test]
    fn a_link_under_the_old_temporary_name_is_not_followed() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("configuration.json");
        let victim = directory.path().join("victim");
        std::fs::write(&victim, "precious").unwrap();
        let trap = directory.path().join(".configuration.json.vmtide-partial");
        std::os::unix::fs::symlink(&victim, trap).unwrap();
        let mut file = PlainFile::create(path.clone()).unwrap();
        file.write(b"{}").unwrap();
        file.publish().unwrap();
        assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
        assert_eq!(std::fs::read(&path).unwrap(), b"{}");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_file_that_is_given_up_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let mut file = PlainFile::create(directory.path().join("configuration.json")).unwrap();
        file.write(b"{").unwrap();
        drop(file);
        assert_eq!(directory.path().read_dir().unwrap().count(), 0);
    }

    #[test]
    fn bacula_s_rules_of_replacing_hold() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        assert!(may_take(&path, Replace::Never, 0));
        std::fs::write(&path, "x").unwrap();
        let future = u64::MAX / 2;
        assert!(may_take(&path, Replace::Always, 0));
        assert!(!may_take(&path, Replace::Never, future));
        assert!(may_take(&path, Replace::IfNewer, future) && !may_take(&path, Replace::IfNewer, 1));
        assert!(may_take(&path, Replace::IfOlder, 1) && !may_take(&path, Replace::IfOlder, future));
    }
}
