//! One moment of several images, whoever hosts them.

use crate::Result;
#[cfg(unix)]
use crate::control::{HeldFreeze, RemoteDisk, RemoteHost};
use crate::offline::{OfflineTracking, keep_writers_off};
#[cfg(unix)]
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmtide_block::{BlockDevice, ByteRange, Extent};
use vmtide_image::ImageLock;

/// One image of a moment. Dropping all of its references ends the moment.
#[derive(Clone)]
pub struct FrozenImage {
    /// The path asked for.
    pub path: PathBuf,
    /// Its disk at the moment.
    pub device: Arc<dyn BlockDevice>,
    /// The tracking id of the moment; none where the disk is not tracked.
    pub tracking_id: Option<String>,
}

/// Fixes one moment of all of these images. Those that a process of this host has open are frozen there, writes to
/// all of them being held until the last one is; those that nobody has are locked against writers, and opened
/// with `open`. Paths that lead to one image give the same moment.
///
/// # Errors
/// [`TrackError::InUse`] where a program without tracking has one; those of `open` and of the hosts. What was
/// frozen until then is let go.
pub fn freeze_images(
    paths: &[PathBuf],
    open: &dyn Fn(&Path) -> Result<Arc<dyn BlockDevice>>,
) -> Result<Vec<FrozenImage>> {
    let mut frozen: Vec<(usize, FrozenImage)> = Vec::new();
    #[cfg(unix)]
    let mut hosted: BTreeMap<PathBuf, Hosted> = BTreeMap::new();
    for (index, path) in paths.iter().enumerate() {
        #[cfg(unix)]
        {
            let real = path.canonicalize().unwrap_or_else(|_| path.clone());
            if let Some(known) = hosted.get_mut(&real) {
                known.indices.push(index);
                continue;
            }
            if let Some(host) = RemoteHost::connect(path)? {
                hosted.insert(real, Hosted { indices: vec![index], host });
                continue;
            }
        }
        // Before any writes are held: sealing waits for the medium, and what is locked does not change any more.
        frozen.push((index, freeze_offline(path, open)?));
    }
    #[cfg(unix)]
    for (index, disk) in freeze_hosted(hosted.into_values().collect())? {
        let path = paths.get(index).cloned().unwrap_or_default();
        let tracking_id = disk.id().map(ToOwned::to_owned);
        frozen.push((index, FrozenImage { path, device: disk, tracking_id }));
    }
    frozen.sort_by_key(|(index, _)| *index);
    Ok(frozen.into_iter().map(|(_, image)| image).collect())
}

/// An image that a process of this host has open.
#[cfg(unix)]
struct Hosted {
    /// Which of the paths asked for lead to it. It is frozen once: a second time would wait for the first, whose writes
    /// are held.
    indices: Vec<usize>,
    host: RemoteHost,
}

/// Holds the writes to all of these until the last one is frozen. They are in the order of their paths, as everybody has
/// them: of two moments at a time one waits for the other.
#[cfg(unix)]
fn freeze_hosted(hosted: Vec<Hosted>) -> Result<Vec<(usize, Arc<RemoteDisk>)>> {
    let mut held: Vec<(Vec<usize>, HeldFreeze)> = Vec::new();
    for Hosted { indices, host } in hosted {
        held.push((indices, host.freeze_held()?));
    }
    for (_, disk) in &mut held {
        disk.release()?;
    }
    let mut frozen = Vec::new();
    for (indices, disk) in held {
        let disk = Arc::new(disk.finish()?);
        frozen.extend(indices.into_iter().map(|index| (index, Arc::clone(&disk))));
    }
    Ok(frozen)
}

fn freeze_offline(
    path: &Path,
    open: &dyn Fn(&Path) -> Result<Arc<dyn BlockDevice>>,
) -> Result<FrozenImage> {
    // Asked before the lock is there, for what Windows needs.
    let durable = cfg!(windows) && OfflineTracking::open(path)?.state().enabled;
    let lock = keep_writers_off(path, durable)?;
    let tracking_id = OfflineTracking::open(path)?.moment(&lock)?.map(|id| id.to_string());
    let device = Arc::new(Locked { device: open(path)?, _lock: lock });
    Ok(FrozenImage { path: path.to_owned(), device, tracking_id })
}

/// An image that nobody writes to while it is read.
struct Locked {
    device: Arc<dyn BlockDevice>,
    _lock: ImageLock,
}

impl BlockDevice for Locked {
    fn name(&self) -> String {
        self.device.name()
    }
    fn size_bytes(&self) -> u64 {
        self.device.size_bytes()
    }
    fn block_size_bytes(&self) -> u32 {
        self.device.block_size_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        self.device.read_at(buffer, offset)
    }
    fn extents(&self, range: ByteRange) -> vmtide_block::Result<Vec<Extent>> {
        self.device.extents(range)
    }
}
