//! The host's files as a [`HostFiles`]: a directory, with the rules of who may open what.

use crate::changes::NoChanges;
use crate::content::Content;
use crate::images::{self, NewImage};
use crate::state::State;
use crate::tracking::{DISABLED, INVALID_ID, MISSING};
use crate::world::World;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use vmtide_block::{BlockDevice, ByteRange, Extent, RangeSet, WritableBlockDevice};
use vmtide_hyperv::{ChangePage, ChangesError, FileEntry, FrozenFile, HostFiles, NewDisk};
use vmtide_hypervisor::{HypervisorError, Result};
use vmtide_image::{Format, ImageWriter, image_info};

/// The files of a host.
pub(crate) struct WorldFiles {
    pub(crate) world: World,
}

/// A file that is open: as long as this lives, nothing is merged into it or away from it.
struct Open {
    device: Arc<dyn BlockDevice>,
    _handle: Arc<()>,
}

impl BlockDevice for Open {
    fn name(&self) -> String {
        self.device.name()
    }
    fn size_bytes(&self) -> u64 {
        self.device.size_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        self.device.read_at(buffer, offset)
    }
    fn extents(&self, range: ByteRange) -> vmtide_block::Result<Vec<Extent>> {
        self.device.extents(range)
    }
}

/// A disk that a client writes.
struct OpenWriter {
    writer: Arc<dyn ImageWriter>,
    /// The host's disk whose content this becomes when it is closed; none for a new file.
    adopt: Option<(World, u64)>,
    _handle: Arc<()>,
}

impl Drop for OpenWriter {
    fn drop(&mut self) {
        let content = self.adopt.as_ref().map(|_| Content::of(&WriterView(&*self.writer)));
        drop(self.writer.finish());
        if let (Some((world, key)), Some(content)) = (&self.adopt, content) {
            let mut state = world.lock();
            if let (Some(disk), Ok(content)) = (state.disks.get_mut(key), content) {
                disk.content = content;
            }
        }
    }
}

struct WriterView<'a>(&'a dyn ImageWriter);

impl BlockDevice for WriterView<'_> {
    fn name(&self) -> String {
        self.0.name()
    }
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        self.0.read_at(buffer, offset)
    }
}

impl BlockDevice for OpenWriter {
    fn name(&self) -> String {
        self.writer.name()
    }
    fn size_bytes(&self) -> u64 {
        self.writer.size_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        self.writer.read_at(buffer, offset)
    }
    fn extents(&self, range: ByteRange) -> vmtide_block::Result<Vec<Extent>> {
        self.writer.extents(range)
    }
}

impl WritableBlockDevice for OpenWriter {
    fn write_at(&self, data: &[u8], offset: u64) -> vmtide_block::Result<()> {
        self.writer.write_at(data, offset)
    }
    fn write_zeroes(&self, range: ByteRange) -> vmtide_block::Result<()> {
        self.writer.write_zeroes(range)
    }
    fn flush(&self) -> vmtide_block::Result<()> {
        self.writer.flush()
    }
}

impl WorldFiles {
    fn local(&self, state: &State, path: &str) -> Result<PathBuf> {
        state.local(path).ok_or_else(|| HypervisorError::NotFound {
            what: path.to_owned(),
            detail: "it is no absolute path of the host".into(),
        })
    }

    /// The file at `path`, which must be there and free to be opened.
    fn openable(&self, state: &mut State, path: &str) -> Result<PathBuf> {
        state.catch_up();
        let local = self.local(state, path)?;
        if state.faults.access_denied {
            return Err(denied(path));
        }
        if !local.is_file() {
            return Err(HypervisorError::NotFound {
                what: path.to_owned(),
                detail: "there is no such file on the host".into(),
            });
        }
        if state.faults.sharing_violation || state.faults.unopenable.contains(path) {
            return Err(busy(path, "sharing violation (0x80070020)"));
        }
        let key = state.disk_of(path);
        if let Some(key) = key.filter(|key| state.disks[key].live == path) {
            if let Some(vm) = state.user_of(key) {
                let name = vm.configuration.text("ElementName").to_owned();
                return Err(busy(path, &format!("{name} writes to it (0x80070020)")));
            }
            state.close_writer(key)?;
        }
        Ok(local)
    }

    fn handle(state: &mut State, path: &str) -> Arc<()> {
        let handle = Arc::new(());
        state.handles.push((path.to_owned(), Arc::downgrade(&handle)));
        handle
    }
}

fn busy(path: &str, detail: &str) -> HypervisorError {
    HypervisorError::Busy { vm: path.to_owned(), detail: detail.to_owned() }
}

fn denied(path: &str) -> HypervisorError {
    HypervisorError::Denied {
        what: path.to_owned(),
        detail: "access is denied (0x80070005)".into(),
    }
}

fn context(path: &str) -> impl Fn(io::Error) -> HypervisorError + '_ {
    move |error| match error.kind() {
        io::ErrorKind::PermissionDenied => denied(path),
        _ => HypervisorError::io(path, error),
    }
}

impl HostFiles for WorldFiles {
    fn open_disk(&self, path: &str) -> Result<FrozenFile> {
        let mut state = self.world.lock();
        let local = self.openable(&mut state, path)?;
        let info = image_info(&local, None)?;
        if !matches!(info.format, Format::Vhdx | Format::Vhd) {
            return Err(HypervisorError::Unsupported {
                what: path.to_owned(),
                detail: "it is no VHD or VHDX file".into(),
            });
        }
        let device = images::open(&local)?;
        let handle = Self::handle(&mut state, path);
        let is_told = !state.faults.no_most_recent_ids;
        let most_recent_tracking_id = state.most_recent_id(path).filter(|_| is_told);
        let id = info.identifiers.get("virtual_disk_id").and_then(|id| id.parse().ok());
        let block = info.block_size_bytes.and_then(|bytes| u32::try_from(bytes).ok());
        Ok(FrozenFile {
            device: Arc::new(Open { device, _handle: handle }),
            format: info.format.to_string(),
            disk_id: id,
            most_recent_tracking_id,
            subtype: info.subformat.unwrap_or_default(),
            logical_sector_bytes: info.logical_sector_bytes.unwrap_or(512),
            physical_sector_bytes: info.physical_sector_bytes.unwrap_or(512),
            block_bytes: block.unwrap_or(0),
        })
    }

    fn changes(
        &self,
        path: &str,
        tracking_id: &str,
        range: ByteRange,
    ) -> Result<ChangePage, ChangesError> {
        let mut state = self.world.lock();
        state.catch_up();
        match state.changes(path, tracking_id, range) {
            Ok(answer) => Ok(ChangePage {
                ranges: RangeSet::from(answer.ranges),
                processed_bytes: answer.processed_bytes,
            }),
            Err(NoChanges::NotFound) => Err(ChangesError::Failed(format!("{path} not found"))),
            Err(NoChanges::BadRange) => Err(ChangesError::Failed("invalid parameter (87)".into())),
            Err(NoChanges::Code(code)) => {
                let text = format!("0x{code:08X}");
                Err(match code {
                    INVALID_ID | MISSING => ChangesError::UnknownId(text),
                    DISABLED => ChangesError::NotTracked(text),
                    _ => ChangesError::Failed(text),
                })
            }
        }
    }

    fn read_file(&self, path: &str, limit_bytes: u64) -> Result<Option<Vec<u8>>> {
        let state = self.world.lock();
        let local = self.local(&state, path)?;
        if state.faults.access_denied {
            return Err(denied(path));
        }
        match std::fs::metadata(&local) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(context(path)(error)),
            Ok(found) if found.len() > limit_bytes => {
                let detail = format!("it has {} bytes, more than {limit_bytes}", found.len());
                return Err(HypervisorError::failed(format!("reading {path}"), detail));
            }
            Ok(_) => {}
        }
        std::fs::read(local).map(Some).map_err(context(path))
    }

    fn list(&self, directory: &str) -> Result<Option<Vec<FileEntry>>> {
        let state = self.world.lock();
        let local = self.local(&state, directory.trim_end_matches('\\'))?;
        if state.faults.unlistable.contains(directory) {
            return Err(denied(directory));
        }
        let entries = match std::fs::read_dir(local) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            entries => entries.map_err(context(directory))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(context(directory))?;
            let metadata = entry.metadata().map_err(context(directory))?;
            if metadata.is_file() {
                let name = entry.file_name().to_string_lossy().into_owned();
                found.push(FileEntry { name, size_bytes: metadata.len() });
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Some(found))
    }

    fn free_bytes(&self, directory: &str) -> Result<Option<u64>> {
        let state = self.world.lock();
        self.local(&state, directory)?;
        Ok(Some(state.options.free_bytes))
    }

    fn create_directory(&self, path: &str) -> Result<()> {
        let local = self.local(&self.world.lock(), path)?;
        std::fs::create_dir_all(local).map_err(context(path))
    }

    fn write_file(&self, path: &str, content: &[u8]) -> Result<()> {
        let local = self.local(&self.world.lock(), path)?;
        let mut file = std::fs::File::create_new(local).map_err(context(path))?;
        io::Write::write_all(&mut file, content).map_err(context(path))
    }

    fn create_disk(&self, path: &str, disk: &NewDisk) -> Result<Arc<dyn WritableBlockDevice>> {
        let mut state = self.world.lock();
        let local = self.local(&state, path)?;
        if local.exists() || !local.parent().is_some_and(std::path::Path::is_dir) {
            let kind = match local.exists() {
                true => io::ErrorKind::AlreadyExists,
                false => io::ErrorKind::NotFound,
            };
            return Err(context(path)(kind.into()));
        }
        let new = NewImage {
            format: if path.to_lowercase().ends_with(".vhd") { Format::Vhd } else { Format::Vhdx },
            size_bytes: disk.size_bytes,
            block_bytes: disk.block_bytes,
            logical_sector_bytes: disk.logical_sector_bytes,
            physical_sector_bytes: disk.physical_sector_bytes,
            fixed: disk.fixed,
            disk_id: Some(disk.disk_id.unwrap_or_else(|| state.random.guid())),
        };
        let writer = images::create(&local, &new)?;
        let _handle = Self::handle(&mut state, path);
        Ok(Arc::new(OpenWriter { writer, adopt: None, _handle }))
    }

    fn open_disk_writable(&self, path: &str) -> Result<Arc<dyn WritableBlockDevice>> {
        let mut state = self.world.lock();
        let local = self.openable(&mut state, path)?;
        if state.is_open(path) {
            return Err(busy(path, "it is open already (0x80070020)"));
        }
        let (writer, adopt) = match state.disk_of(path) {
            None => (images::write(&local)?, None),
            Some(key) if state.disks[&key].live != path => {
                return Err(busy(path, "it is the parent of another file (0x80070020)"));
            }
            Some(key) => (state.offline_writer(key)?, Some((self.world.clone(), key))),
        };
        let _handle = Self::handle(&mut state, path);
        Ok(Arc::new(OpenWriter { writer, adopt, _handle }))
    }

    fn remove_file(&self, path: &str) -> Result<()> {
        let mut state = self.world.lock();
        let local = self.local(&state, path)?;
        if state.is_open(path) {
            return Err(busy(path, "it is open (0x80070020)"));
        }
        let attached = state.configurations().any(|(_, _, configuration)| {
            configuration.disk_paths().any(|(_, disk)| disk.eq_ignore_ascii_case(path))
        });
        if attached {
            return Err(busy(path, "it belongs to a virtual machine (0x80070020)"));
        }
        if let Some(key) = state.disk_of(path) {
            state.disks.remove(&key);
        }
        match std::fs::remove_file(local) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(context(path)(error)),
            _ => Ok(()),
        }
    }

    fn remove_directory(&self, path: &str) -> Result<()> {
        let local = self.local(&self.world.lock(), path)?;
        // One that is gone or not empty is left.
        drop(std::fs::remove_dir(local));
        Ok(())
    }
}
