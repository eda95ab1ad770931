//! One moment of several images, whoever hosts them.

#[cfg(unix)]
use crate::control::{HeldFreeze, RemoteHost};
use crate::offline::{OfflineTracking, keep_writers_off};
use crate::{Result, TrackError};
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
/// with `open`.
///
/// # Errors
/// [`TrackError::InUse`] where a program without tracking has one; those of `open` and of the hosts. What was
/// frozen until then is let go.
pub fn freeze_images(
    paths: &[PathBuf],
    open: &dyn Fn(&Path) -> Result<Arc<dyn BlockDevice>>,
) -> Result<Vec<FrozenImage>> {
    // Everybody in the same order: of two moments at a time one waits for the other.
    let mut order: Vec<usize> = (0..paths.len()).collect();
    order.sort_by_key(|index| paths.get(*index));
    let mut frozen: Vec<(usize, FrozenImage)> = Vec::new();
    #[cfg(unix)]
    let mut held: Vec<(usize, HeldFreeze)> = Vec::new();
    for index in order {
        let Some(path) = paths.get(index) else {
            continue;
        };
        #[cfg(unix)]
        if let Some(host) = RemoteHost::connect(path)? {
            held.push((index, host.freeze_held()?));
            continue;
        }
        frozen.push((index, freeze_offline(path, open)?));
    }
    #[cfg(unix)]
    {
        for (_, disk) in &mut held {
            disk.release()?;
        }
        for (index, disk) in held {
            let disk = disk.finish()?;
            let tracking_id = disk.id().map(ToOwned::to_owned);
            let path = paths.get(index).cloned().unwrap_or_default();
            frozen.push((index, FrozenImage { path, device: Arc::new(disk), tracking_id }));
        }
    }
    frozen.sort_by_key(|(index, _)| *index);
    Ok(frozen.into_iter().map(|(_, image)| image).collect())
}

fn freeze_offline(
    path: &Path,
    open: &dyn Fn(&Path) -> Result<Arc<dyn BlockDevice>>,
) -> Result<FrozenImage> {
    // Asked before the lock is there, for what Windows needs.
    let durable = cfg!(windows) && OfflineTracking::open(path)?.state().enabled;
    let lock = keep_writers_off(path, durable)?;
    let mut offline = OfflineTracking::open(path)?;
    let tracking_id = match offline.checkpoint_locked(&lock) {
        Ok(id) => Some(id.to_string()),
        Err(TrackError::Disabled { .. } | TrackError::Lost { .. }) => None,
        Err(error) => return Err(error),
    };
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
