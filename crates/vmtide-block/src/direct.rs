//! Writing past the page cache, for large writes that nobody reads again soon.
//!
//! A restore writes every byte once. Through the page cache each of them is copied by the processor,
//! under a lock of the file that makes writers wait spinning, and pushes out a page that somebody
//! else may have wanted; with `O_DIRECT` (open(2)) the device takes it from the buffer. Measured on
//! two cores this is the difference between a restore bound by copying and one bound by decoding
//! (docs/benchmarks.md).
//!
//! Where what will be written is known before, its blocks are set aside first, in large pieces (`room.rs`).

use crate::ByteRange;
use crate::room::Room;
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};

/// What length, offset and memory address must be a multiple of. Enough for devices of 512 and 4096
/// byte sectors; others answer `EINVAL` and are then written through the cache.
const ALIGNMENT: usize = 4096;

/// The shortest write that goes past the cache: each waits for the device, so small ones are
/// better gathered by the cache.
const SHORTEST_BYTES: usize = 64 << 10;

/// A file open for writing past the page cache.
#[derive(Debug)]
pub(crate) struct DirectFile {
    file: File,
    /// The file system refused one such write: it will refuse the next.
    refused: AtomicBool,
    room: Room,
}

impl DirectFile {
    /// Opens the file that `open` is, or answers `None` where the system cannot. Its path is not used: whatever is there
    /// now, another file, a pipe, a device, is not touched.
    #[cfg(target_os = "linux")]
    pub(crate) fn open(open: &File) -> Option<Self> {
        use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
        let flags = rustix::fs::OFlags::DIRECT.bits().cast_signed();
        let mut options = std::fs::OpenOptions::new();
        options.write(true).custom_flags(flags);
        let file = crate::files::reopen(open, &options).ok()?;
        let (ours, theirs) = (file.metadata().ok()?, open.metadata().ok()?);
        let is_same = (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino());
        let room = Room::of(&file);
        is_same.then_some(Self { file, refused: AtomicBool::new(false), room })
    }

    #[cfg(not(target_os = "linux"))]
    pub(crate) fn open(_open: &File) -> Option<Self> {
        None
    }

    /// Sets blocks aside for `range` of the file, where that helps.
    pub(crate) fn set_aside(&self, range: ByteRange) {
        self.room.set_aside(&self.file, range);
    }

    /// Writes `data` where that is possible past the cache, and answers whether it did. After
    /// `false` nothing is known to be written and the caller writes all of it.
    pub(crate) fn try_write(&self, data: &[u8], offset: u64) -> std::io::Result<bool> {
        let aligned = data.len().is_multiple_of(ALIGNMENT)
            && offset.is_multiple_of(ALIGNMENT as u64)
            && data.as_ptr().align_offset(ALIGNMENT) == 0;
        if !aligned || data.len() < SHORTEST_BYTES || self.refused.load(Ordering::Relaxed) {
            return Ok(false);
        }
        match crate::files::write_all_at(&self.file, data, offset) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => {
                self.refused.store(true, Ordering::Relaxed);
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::DirectFile;
    use crate::{
        AlignedBuffer, BlockDevice, ByteRange, OpenMode, RawDevice, WritableBlockDevice, is_zero,
    };
    use rustix::fs::{CWD, FileType, Mode, mknodat};

    #[test]
    fn what_took_the_path_of_an_open_disk_is_not_opened() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        std::fs::write(at("other"), [7; 128 << 10]).unwrap();
        std::os::unix::fs::symlink("other", at("link")).unwrap();
        mknodat(CWD, at("pipe"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let mut buffer = AlignedBuffer::new(128 << 10);
        buffer.fill(9);
        // The pipe has no reader: whoever opens it for writing waits for ever.
        for name in ["link", "pipe"] {
            let path = at("disk");
            let disk =
                RawDevice::open(&path, OpenMode::CreateNew { size_bytes: 128 << 10 }).unwrap();
            let can = DirectFile::open(&disk.file).is_some();
            std::fs::rename(&path, at("moved")).unwrap();
            std::fs::rename(at(name), &path).unwrap();
            disk.expect_bulk_writes();
            disk.write_at(&buffer, 0).unwrap();
            disk.flush().unwrap();
            assert_eq!(DirectFile::open(&disk.file).is_some(), can, "by what it is");
            assert!(std::fs::read(at("moved")).unwrap().iter().all(|byte| *byte == 9));
            assert!(std::fs::read(at("other")).unwrap().iter().all(|byte| *byte == 7));
            std::fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn what_was_expected_and_not_written_reads_as_zeros() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let disk = RawDevice::open(&path, OpenMode::CreateNew { size_bytes: 4 << 20 }).unwrap();
        disk.expect_data(ByteRange::new(0, 1 << 20));
        disk.expect_bulk_writes();
        disk.expect_data(ByteRange::new(1 << 20, 2 << 20));
        disk.expect_data(ByteRange::new(3 << 20, 2 << 20));
        let mut buffer = AlignedBuffer::new(1 << 20);
        buffer.fill(9);
        disk.write_at(&buffer, 2 << 20).unwrap();
        disk.flush().unwrap();
        let found = std::fs::read(&path).unwrap();
        assert_eq!(found.len(), 4 << 20);
        assert!(is_zero(&found[..2 << 20]) && is_zero(&found[3 << 20..]));
        assert!(found[2 << 20..3 << 20].iter().all(|byte| *byte == 9));
    }

    #[test]
    fn writes_of_any_alignment_give_the_same_bytes() {
        let directory = tempfile::tempdir().unwrap();
        let size_bytes = (1 << 20) + 700;
        let open = |name: &str| {
            let path = directory.path().join(name);
            RawDevice::open(path, OpenMode::CreateNew { size_bytes }).unwrap()
        };
        let (direct, cached) = (open("direct"), open("cached"));
        direct.expect_bulk_writes();
        let mut buffer = AlignedBuffer::new(256 << 10);
        for (index, byte) in buffer.iter_mut().enumerate() {
            *byte = u8::try_from(index % 251).unwrap();
        }
        let writes: [(usize, usize, u64); 6] = [
            (0, 256 << 10, 0),
            (4096, 128 << 10, 512 << 10),
            (1, 64 << 10, 300 << 10),
            (0, 64 << 10, (700 << 10) + 512),
            (0, 4096, 768 << 10),
            (0, (200 << 10) + 700, (1 << 20) - (200 << 10)),
        ];
        for (start, length, offset) in writes {
            for disk in [&direct, &cached] {
                disk.write_at(&buffer[start..start + length], offset).unwrap();
            }
        }
        direct.flush().unwrap();
        let read = |disk: &RawDevice| {
            let mut bytes = vec![0; usize::try_from(size_bytes).unwrap()];
            disk.read_at(&mut bytes, 0).unwrap();
            bytes
        };
        assert!(read(&direct) == read(&cached));
    }
}
