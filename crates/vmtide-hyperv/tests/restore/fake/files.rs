//! The files of the host.

use super::{Content, FakeHost, File, State};
use std::sync::Arc;
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, Extent, MemoryDevice, Result as BlockResult,
    WritableBlockDevice,
};
use vmtide_hyperv::{ChangePage, ChangesError, FileEntry, FrozenFile, HostFiles, NewDisk};
use vmtide_hypervisor::{HypervisorError, Result};

fn key(path: &str) -> String {
    path.replace('/', r"\").trim_end_matches('\\').to_lowercase()
}

fn parent(path: &str) -> String {
    let key = key(path);
    key.rsplit_once('\\').map_or_else(String::new, |(parent, _)| parent.to_owned())
}

fn not_found(path: &str) -> HypervisorError {
    HypervisorError::NotFound { what: path.into(), detail: "no file".into() }
}

/// A disk that is open for writing.
struct Open {
    host: FakeHost,
    path: String,
    device: Arc<MemoryDevice>,
    _open: Arc<()>,
}

impl Open {
    fn gate(&self, what: &str) -> BlockResult<()> {
        let what = format!("{what} {}", self.path);
        let refused = || BlockError::damaged(self.path.clone(), "switched on");
        match self.host.begin(&what) {
            Ok(None) => Ok(()),
            _ => Err(refused()),
        }
    }
}

impl BlockDevice for Open {
    fn name(&self) -> String {
        self.path.clone()
    }
    fn size_bytes(&self) -> u64 {
        self.device.size_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> BlockResult<()> {
        self.device.read_at(buffer, offset)
    }
    fn extents(&self, range: ByteRange) -> BlockResult<Vec<Extent>> {
        self.device.extents(range)
    }
}

impl WritableBlockDevice for Open {
    fn write_at(&self, data: &[u8], offset: u64) -> BlockResult<()> {
        self.gate("write")?;
        self.device.write_at(data, offset)
    }
    fn write_zeroes(&self, range: ByteRange) -> BlockResult<()> {
        self.gate("zero")?;
        self.device.write_zeroes(range)
    }
    fn flush(&self) -> BlockResult<()> {
        self.gate("flush")?;
        self.device.flush()
    }
}

impl FakeHost {
    fn open(&self, path: &str) -> Result<Arc<dyn WritableBlockDevice>> {
        let state = self.0.lock();
        let file = state.files.get(&key(path)).ok_or_else(|| not_found(path))?;
        let Content::Disk { device, open, .. } = &file.content else { return Err(not_found(path)) };
        Ok(Arc::new(Open {
            host: self.clone(),
            path: file.path.clone(),
            device: device.clone(),
            _open: open.clone(),
        }))
    }
}

fn insert(state: &mut State, path: &str, content: Content) -> Result<()> {
    if !state.directories.contains(&parent(path))
        && !state.directories.contains(&format!(r"{}\", parent(path)))
    {
        return Err(not_found(&parent(path)));
    }
    if state.files.contains_key(&key(path)) {
        return Err(HypervisorError::failed(format!("make {path}"), "it is there already"));
    }
    state.files.insert(key(path), File { path: path.to_owned(), content });
    Ok(())
}

impl HostFiles for FakeHost {
    fn open_disk(&self, path: &str) -> Result<FrozenFile> {
        self.file(&format!("open {path}"), |state| {
            let file = state.files.get(&key(path)).ok_or_else(|| not_found(path))?;
            let Content::Disk { device, new, .. } = &file.content else {
                return Err(not_found(path));
            };
            Ok(FrozenFile {
                device: device.clone(),
                format: "vhdx".into(),
                disk_id: new.disk_id,
                most_recent_tracking_id: None,
                subtype: "dynamic".into(),
                logical_sector_bytes: new.logical_sector_bytes,
                physical_sector_bytes: new.physical_sector_bytes,
                block_bytes: new.block_bytes,
            })
        })
    }

    fn changes(&self, path: &str, _id: &str, range: ByteRange) -> Result<ChangePage, ChangesError> {
        let state = self.0.lock();
        match &state.changes {
            Some(changes) => {
                Ok(ChangePage { ranges: changes.within(range), processed_bytes: range.length })
            }
            None => Err(ChangesError::UnknownId(path.into())),
        }
    }

    fn read_file(&self, path: &str, _limit: u64) -> Result<Option<Vec<u8>>> {
        self.file(&format!("read {path}"), |state| {
            Ok(match state.files.get(&key(path)).map(|file| &file.content) {
                Some(Content::Bytes(bytes)) => Some(bytes.clone()),
                _ => None,
            })
        })
    }

    fn list(&self, directory: &str) -> Result<Option<Vec<FileEntry>>> {
        self.file(&format!("list {directory}"), |state| {
            if !state.directories.contains(&key(directory)) {
                return Ok(None);
            }
            let inside = state.files.values().filter(|file| parent(&file.path) == key(directory));
            let entry = |file: &File| FileEntry {
                name: file.path.rsplit('\\').next().unwrap().to_owned(),
                size_bytes: 1,
            };
            Ok(Some(inside.map(entry).collect()))
        })
    }

    fn free_bytes(&self, _directory: &str) -> Result<Option<u64>> {
        self.file("free bytes", |state| Ok(Some(state.space_bytes)))
    }

    fn create_directory(&self, path: &str) -> Result<()> {
        self.file(&format!("make {path}"), |state| {
            let mut so_far = String::new();
            for part in key(path).split('\\') {
                so_far =
                    if so_far.is_empty() { part.to_owned() } else { format!(r"{so_far}\{part}") };
                if !so_far.ends_with(':') {
                    state.directories.insert(so_far.clone());
                }
            }
            Ok(())
        })
    }

    fn write_file(&self, path: &str, content: &[u8]) -> Result<()> {
        self.file(&format!("make {path}"), |state| {
            insert(state, path, Content::Bytes(content.to_vec()))
        })
    }

    fn create_disk(&self, path: &str, new: &NewDisk) -> Result<Arc<dyn WritableBlockDevice>> {
        self.file(&format!("make {path}"), |state| {
            let content = Content::Disk {
                device: Arc::new(MemoryDevice::new(usize::try_from(new.size_bytes).unwrap())),
                new: new.clone(),
                open: Arc::new(()),
            };
            insert(state, path, content)
        })?;
        self.open(path)
    }

    fn open_disk_writable(&self, path: &str) -> Result<Arc<dyn WritableBlockDevice>> {
        self.file(&format!("open {path} for writing"), |_| Ok(()))?;
        self.open(path)
    }

    fn remove_file(&self, path: &str) -> Result<()> {
        self.file(&format!("remove {path}"), |state| {
            state.files.remove(&key(path));
            Ok(())
        })
    }

    fn remove_directory(&self, path: &str) -> Result<()> {
        self.file(&format!("remove {path}"), |state| {
            let path = key(path);
            let below = format!(r"{path}\");
            let is_used =
                state.files.keys().chain(&state.directories).any(|one| one.starts_with(&below));
            if !is_used {
                state.directories.remove(&path);
            }
            Ok(())
        })
    }
}
