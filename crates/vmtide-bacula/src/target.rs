//! A disk that is being restored: an image that gets its name when all of it is there, or a block device.

use crate::job::Replace;
use crate::object::{Destination, PointObject, RestoreOptions};
use crate::{BackendError, Result, names};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;
use vmtide_block::{ByteRange, OpenMode, RawDevice, WritableBlockDevice};
use vmtide_engine::ImageKind;
use vmtide_engine::image::StagedImage;
use vmtide_image::{CreateOptions, Format};

/// What is written at a time: blocks of a stream that continue each other are joined up to this.
const WRITE_BYTES: usize = 1 << 20;

/// Where a disk goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// An image at this path, in this format.
    Image(PathBuf, Format),
    /// A block device.
    Device(PathBuf),
}

/// Where the disk that Bacula calls `output` goes.
///
/// # Errors
/// Where it shall replace the VM's own image and that is not known.
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
        Destination::Original => {
            let stem = output.file_stem().unwrap_or_default().to_string_lossy();
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
            Ok(Place::Image(path, options.format.or(its_format).unwrap_or(Format::Raw)))
        }
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
    /// Where it is, for people.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    buffer: Vec<u8>,
    buffer_offset: u64,
}

impl Target {
    /// Makes a disk of zeros.
    ///
    /// # Errors
    /// Where it cannot be made; where a block device is too small.
    pub fn create(place: &Place, size_bytes: u64) -> Result<Self> {
        match place {
            Place::Image(path, format) => {
                make_directory_of(path)?;
                let size = ImageKind::default().disk_size(*format, size_bytes);
                let options = CreateOptions::new(*format, size);
                let staged = StagedImage::create(path, &options, path.symlink_metadata().is_ok())?;
                let device: Arc<dyn WritableBlockDevice> = staged.image.clone();
                let name = path.display().to_string();
                Ok(Self::new(device, Some(staged), name, size_bytes))
            }
            Place::Device(path) => {
                let device: Arc<dyn WritableBlockDevice> =
                    Arc::new(RawDevice::open(path, OpenMode::ReadWrite)?);
                if device.size_bytes() < size_bytes {
                    return Err(BackendError::Refused(format!(
                        "{} has {} bytes and the disk {size_bytes}: a larger one is needed",
                        path.display(),
                        device.size_bytes()
                    )));
                }
                device.write_zeroes(ByteRange::new(0, size_bytes))?;
                Ok(Self::new(device, None, path.display().to_string(), size_bytes))
            }
        }
    }

    fn new(
        device: Arc<dyn WritableBlockDevice>,
        staged: Option<StagedImage>,
        name: String,
        size_bytes: u64,
    ) -> Self {
        device.expect_bulk_writes();
        Self { device, staged, name, size_bytes, buffer: Vec::new(), buffer_offset: 0 }
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
        Ok(self.name)
    }
}

/// A small file that gets its name when all of it is there.
pub struct PlainFile {
    path: PathBuf,
    temporary: PathBuf,
    file: File,
}

impl PlainFile {
    /// Begins a file.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn create(path: PathBuf) -> Result<Self> {
        make_directory_of(&path)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let temporary = path.with_file_name(format!(".{name}.vmtide-partial"));
        let file = File::create(&temporary)
            .map_err(|error| BackendError::io(format!("create {}", temporary.display()), error))?;
        Ok(Self { path, temporary, file })
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
    pub fn publish(self) -> Result<()> {
        std::fs::rename(&self.temporary, &self.path)
            .map_err(|error| BackendError::io(format!("name {}", self.path.display()), error))
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
