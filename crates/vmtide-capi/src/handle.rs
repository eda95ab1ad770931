//! The table of what is open.
//!
//! A handle is a number that is given out once: a counter above, the kind in the lowest bits. So a
//! handle that was closed, was never given out or is of another kind is told from a good one by a look
//! into the table, and no pointer of the caller's is ever believed to be one of ours.
//!
//! A call takes a clone of what the handle stands for. Closing removes the table's own; what calls
//! under way hold goes with the last of them. Only an image that is open for writing has closing wait,
//! for the calls that write to it.

use crate::args::Range;
use crate::status::{Failure, Result, Status};
use parking_lot::RwLock;
use std::collections::HashMap;
use std::ffi::CString;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use vmtide_block::{BlockDevice, CancelToken, WritableBlockDevice};
use vmtide_engine::image::WritableDisk;
use vmtide_engine::track::HostedImage;
use vmtide_repo::{Lease, Repository};

/// How many of the lowest bits say the kind.
const KIND_BITS: u32 = 4;

/// An image that is open.
pub(crate) struct OpenImage {
    pub device: Arc<dyn BlockDevice>,
    /// Where it is open for writing. Calls that write hold it shared, closing takes it for itself: so
    /// what a call answered with success is in the image, and nothing is written to one that is closed.
    writer: Option<RwLock<Option<Writer>>>,
    /// Keeps the restore point while one of its disks is read.
    _lease: Option<Lease>,
}

/// What writes to an image.
pub(crate) enum Writer {
    Plain(WritableDisk),
    /// With its changes tracked.
    Tracked(Arc<HostedImage>),
}

impl OpenImage {
    /// An image that is only read.
    pub fn reading(device: Arc<dyn BlockDevice>, lease: Option<Lease>) -> Self {
        Self { device, writer: None, _lease: lease }
    }

    /// An image that is written, too.
    pub fn writing(writer: Writer) -> Self {
        let device: Arc<dyn BlockDevice> = match &writer {
            Writer::Plain(disk) => disk.image.clone(),
            Writer::Tracked(image) => image.disk().clone(),
        };
        Self { device, writer: Some(RwLock::new(Some(writer))), _lease: None }
    }

    /// Calls `work` with what writes to the image, which stays open until that ends.
    ///
    /// # Errors
    /// `Unsupported` where it is open for reading only; `BadHandle` where it was closed since the
    /// handle was looked up; those of `work`.
    pub fn write<T>(&self, work: impl FnOnce(&dyn WritableBlockDevice) -> Result<T>) -> Result<T> {
        let Some(writer) = &self.writer else {
            return Err(Failure::new(
                Status::Unsupported,
                format!(
                    "{} is open for reading only: open it with VMTIDE_OPEN_WRITABLE",
                    self.device.name()
                ),
            ));
        };
        match writer.read().as_ref() {
            Some(writer) => work(writer.device()),
            None => Err(Failure::new(
                Status::BadHandle,
                format!("{} was closed by another thread", self.device.name()),
            )),
        }
    }

    /// Ends the writing, if it is open for that, after the calls that write.
    ///
    /// # Errors
    /// Those of bringing it to the medium.
    pub fn close(&self) -> Result<()> {
        let writer = self.writer.as_ref().and_then(|writer| writer.write().take());
        writer.map_or(Ok(()), |writer| writer.finish())
    }
}

impl Writer {
    /// Where writes go.
    fn device(&self) -> &dyn WritableBlockDevice {
        match self {
            Self::Plain(disk) => disk.image.as_ref(),
            Self::Tracked(image) => image.disk().as_ref(),
        }
    }

    /// Ends the writing.
    fn finish(&self) -> Result<()> {
        match self {
            Self::Plain(disk) => Ok(disk.image.finish()?),
            Self::Tracked(image) => Ok(image.close().map_err(vmtide_engine::EngineError::from)?),
        }
    }
}

/// An error, as a text with a number.
pub(crate) struct OpenError {
    pub status: Status,
    pub message: CString,
}

/// What a handle stands for.
#[derive(Clone)]
pub(crate) enum Object {
    Error(Arc<OpenError>),
    Text(Arc<CString>),
    Cancel(CancelToken),
    Image(Arc<OpenImage>),
    Repository(Arc<Repository>),
    Ranges(Arc<Vec<Range>>),
}

impl Object {
    const fn kind(&self) -> u64 {
        match self {
            Self::Error(_) => 1,
            Self::Text(_) => 2,
            Self::Cancel(_) => 3,
            Self::Image(_) => 4,
            Self::Repository(_) => 5,
            Self::Ranges(_) => 6,
        }
    }
}

static OBJECTS: LazyLock<RwLock<HashMap<u64, Object>>> = LazyLock::new(RwLock::default);
static NEXT: AtomicU64 = AtomicU64::new(1);

/// Enters an object into the table.
pub(crate) fn open(object: Object) -> u64 {
    let handle = NEXT.fetch_add(1, Ordering::Relaxed) << KIND_BITS | object.kind();
    OBJECTS.write().insert(handle, object);
    handle
}

/// Takes an object out of the table.
pub(crate) fn close(handle: u64) -> Result<Object> {
    OBJECTS.write().remove(&handle).ok_or_else(|| bad(handle, "anything that is open"))
}

/// What a handle stands for.
pub(crate) fn get(handle: u64) -> Option<Object> {
    OBJECTS.read().get(&handle).cloned()
}

/// The number of handles that are open.
pub(crate) fn count() -> u64 {
    OBJECTS.read().len() as u64
}

fn bad(handle: u64, wanted: &str) -> Failure {
    let is = match handle & ((1 << KIND_BITS) - 1) {
        _ if handle == 0 => "is 0",
        1 => "is, or was, an error",
        2 => "is, or was, a text",
        3 => "is, or was, a cancel flag",
        4 => "is, or was, an image",
        5 => "is, or was, a repository",
        6 => "is, or was, a list of ranges",
        _ => "was never given out",
    };
    Failure::new(Status::BadHandle, format!("the handle {handle:#x} {is}; {wanted} is needed"))
}

/// The image that a handle stands for.
pub(crate) fn image(handle: u64) -> Result<Arc<OpenImage>> {
    match get(handle) {
        Some(Object::Image(image)) => Ok(image),
        _ => Err(bad(handle, "an open image")),
    }
}

/// The repository that a handle stands for.
pub(crate) fn repository(handle: u64) -> Result<Arc<Repository>> {
    match get(handle) {
        Some(Object::Repository(repository)) => Ok(repository),
        _ => Err(bad(handle, "an open repository")),
    }
}

/// The cancel flag that a handle stands for.
pub(crate) fn cancel(handle: u64) -> Result<CancelToken> {
    match get(handle) {
        Some(Object::Cancel(cancel)) => Ok(cancel),
        _ => Err(bad(handle, "a cancel flag")),
    }
}

/// A text for the caller. Zero bytes, which C takes as the end, become spaces.
pub(crate) fn new_text(text: &str) -> u64 {
    open(Object::Text(Arc::new(c_string(text))))
}

pub(crate) fn c_string(text: &str) -> CString {
    CString::new(text.replace('\0', " ")).unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;
    use std::time::Duration;
    use vmtide_engine::image::create::{CreateJob, create};
    use vmtide_engine::image::{DiskSpec, OpenDiskOptions, open_disk};

    #[test]
    fn closing_waits_for_a_write_and_lets_none_begin_after_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.vhdx");
        create(&CreateJob {
            path: path.clone(),
            size_bytes: Some(64 << 20),
            kind: vmtide_engine::ImageKind::default(),
            parent: None,
            open_parent: OpenDiskOptions::default(),
            overwrite: false,
            force: false,
        })
        .unwrap();
        let (spec, open_options) = (DiskSpec::Path(path), OpenDiskOptions::default());
        let disk = WritableDisk::open(&spec, &open_options, false).unwrap();
        let handle = open(Object::Image(Arc::new(OpenImage::writing(Writer::Plain(disk)))));
        let held = image(handle).unwrap();
        let (begun, wait) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                held.write(|writer| {
                    begun.send(()).unwrap();
                    while image(handle).is_ok() {
                        std::thread::yield_now();
                    }
                    // Closing has begun: time for it to end before this write, were it not to wait.
                    std::thread::sleep(Duration::from_millis(200));
                    Ok(writer.write_at(&[7; 4096], 33 << 20)?)
                })
                .unwrap();
            });
            wait.recv().unwrap();
            // SAFETY: nowhere to put an error.
            assert_eq!(unsafe { crate::vmtide_close(handle, std::ptr::null_mut()) }, 0);
        });
        let late = held.write(|writer| Ok(writer.write_at(&[8; 512], 0)?));
        assert_eq!(late.unwrap_err().status, Status::BadHandle);
        drop(held);
        let mut found = [0; 4096];
        open_disk(&spec, &open_options).unwrap().device.read_at(&mut found, 33 << 20).unwrap();
        assert_eq!(found, [7; 4096], "a write that was answered with success is not in the file");
    }
}
