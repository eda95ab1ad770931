//! Raw disks: plain files (sparse where the file system can) and block devices.
//!
//! Holes are found with `SEEK_HOLE`/`SEEK_DATA` (lseek(2)) and made with
//! `fallocate(FALLOC_FL_PUNCH_HOLE)`, which Linux also takes on block devices, where it discards
//! with a guarantee of zeros. On Windows it is `FSCTL_QUERY_ALLOCATED_RANGES` and
//! `FSCTL_SET_ZERO_DATA` on files made sparse; block devices are not opened there. A file system
//! without either still works: everything is data, and zeros are written.

use crate::direct::DirectFile;
use crate::files::{self, read_exact_at, write_all_at};
use crate::room::Room;
use crate::{
    BlockDevice, BlockError, ByteRange, Extent, ExtentKind, Result, WritableBlockDevice,
    push_extent,
};
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// The most extents one answer holds, so that a badly fragmented file does not take memory.
const MAX_EXTENTS: usize = 1 << 16;

/// The most that one write through the page cache hands to the kernel in a file without flushes. A
/// large write makes large new pieces of cache, which are cold in every processor cache and in a
/// virtual machine often not backed by the host yet: writes of 1 MiB took twice the processor time.
const CACHED_WRITE_BYTES: usize = 64 << 10;

/// The shortest write through the page cache for which blocks are set aside first: the call takes some 5 microseconds,
/// and saves some 9 for each 64 KiB.
const ROOM_BYTES: usize = 64 << 10;

/// How to open a raw disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// An existing file or block device, for reading.
    ReadOnly,
    /// An existing file or block device, for reading and writing. A block device is claimed: one
    /// that is mounted or otherwise in use is refused.
    ReadWrite,
    /// A new sparse file of this size in bytes, for its owner only; an error where the path exists.
    CreateNew {
        /// The size in bytes.
        size_bytes: u64,
    },
}

/// A raw file or a block device.
#[derive(Debug)]
pub struct RawDevice {
    pub(crate) file: File,
    /// The same file for writing past the page cache.
    direct: OnceLock<Option<DirectFile>>,
    path: PathBuf,
    size_bytes: AtomicU64,
    block_size_bytes: u32,
    pub(crate) writable: bool,
    fixed_size: bool,
    /// Of a file without flushes, whose writes go through the page cache.
    unflushed: Option<Room>,
}

impl RawDevice {
    /// Opens `path`. A directory, FIFO, socket or character device is refused.
    ///
    /// # Errors
    /// [`BlockError::Io`] with the path where it cannot be opened, of the kind `ResourceBusy` for
    /// writing to a block device in use; [`BlockError::Unsupported`] where it is no disk, and for
    /// devices on Windows.
    pub fn open(path: impl AsRef<Path>, mode: OpenMode) -> Result<Self> {
        Self::open_with(path.as_ref().to_path_buf(), mode, |path, options| options.open(path))
    }

    /// As [`open`](Self::open), for the path of a file that is there and that the caller has resolved: where a part of it is
    /// a symbolic link now, somebody exchanged it, and it is not followed. Linux looks at all parts, other Unix systems
    /// (and Linux where the call is not let through) at the last one, Windows at none.
    ///
    /// # Errors
    /// As [`open`](Self::open), and where there is a link.
    pub fn open_resolved(path: impl AsRef<Path>, mode: OpenMode) -> Result<Self> {
        Self::open_with(path.as_ref().to_path_buf(), mode, |path, options| match mode {
            // Never through a link, and never one that is there.
            OpenMode::CreateNew { .. } => options.open(path),
            OpenMode::ReadOnly => files::open_resolved(path, options, false),
            OpenMode::ReadWrite => files::open_resolved(path, options, true),
        })
    }

    fn open_with(
        path: PathBuf,
        mode: OpenMode,
        open: impl FnOnce(&Path, &OpenOptions) -> std::io::Result<File>,
    ) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(mode != OpenMode::ReadOnly);
        if matches!(mode, OpenMode::CreateNew { .. }) {
            options.create_new(true);
            files::owner_only(&mut options);
        } else {
            let is_block_device = check_is_disk(&path)?;
            if is_block_device && mode == OpenMode::ReadWrite {
                files::claim(&mut options);
            }
        }
        let file = open(&path, &options).map_err(|error| {
            let context = match files::is_in_use(&error) {
                true => format!("{} is in use ({})", path.display(), files::USERS),
                false => format!("open {}", path.display()),
            };
            BlockError::io(context, error)
        })?;
        if matches!(mode, OpenMode::CreateNew { .. }) {
            files::make_sparse(&file);
        }
        // Cutting even an empty file to nothing makes ext4 write all of it out when it is closed, in
        // case it is an old file that is being replaced.
        if let OpenMode::CreateNew { size_bytes: size_bytes @ 1.. } = mode {
            file.set_len(size_bytes).map_err(|error| {
                BlockError::io(format!("set the size of {} to {size_bytes}", path.display()), error)
            })?;
        }
        Self::from_file(file, path, mode != OpenMode::ReadOnly)
    }

    /// A device over a file that is open already, e.g. an unnamed temporary one.
    ///
    /// # Errors
    /// [`BlockError::Io`] where the size cannot be found.
    pub fn from_file(mut file: File, path: PathBuf, writable: bool) -> Result<Self> {
        use std::io::{Seek, SeekFrom};
        let context = |what: &str| format!("{what} {}", path.display());
        let metadata = file.metadata().map_err(|error| BlockError::io(context("stat"), error))?;
        // A block device has no length in its metadata, but one can seek to its end.
        let size_bytes = file
            .seek(SeekFrom::End(0))
            .map_err(|error| BlockError::io(context("find the size of"), error))?;
        let fixed_size = !metadata.is_file();
        let block_size_bytes = if fixed_size { files::logical_block_size(&file) } else { 512 };
        Ok(Self {
            file,
            direct: OnceLock::new(),
            path,
            size_bytes: AtomicU64::new(size_bytes),
            block_size_bytes,
            writable,
            fixed_size,
            unflushed: None,
        })
    }

    /// The same device, whose [`flush`](WritableBlockDevice::flush) does nothing and whose writes
    /// stay in the page cache: the operating system brings them to the medium when it likes, and a
    /// power failure before may leave any part of them. For files that can be made again.
    #[must_use]
    pub fn without_flushes(mut self) -> Self {
        self.unflushed = Some(Room::of(&self.file));
        self
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether this is a block device and not a file.
    pub fn is_block_device(&self) -> bool {
        self.fixed_size
    }

    fn io(&self, what: &str, range: ByteRange, error: std::io::Error) -> BlockError {
        BlockError::io(format!("{what} {} at {range}", self.path.display()), error)
    }

    fn check_write(&self, range: ByteRange) -> Result<()> {
        if !self.writable {
            return Err(BlockError::ReadOnly { device: self.name() });
        }
        self.check_range(range)
    }
}

/// Succeeds for a file or a block device; answers with whether it is the latter.
fn check_is_disk(path: &Path) -> Result<bool> {
    if files::names_device(path) {
        return Err(BlockError::unsupported(
            path.display().to_string(),
            "is a device, which vmtide does not open on Windows; give a disk image file",
        ));
    }
    let metadata = std::fs::metadata(path)
        .map_err(|error| BlockError::io(format!("open {}", path.display()), error))?;
    let is_block_device = files::is_block_device(&metadata);
    if metadata.is_file() || is_block_device {
        return Ok(is_block_device);
    }
    let what = if metadata.is_dir() { "a directory" } else { "neither a file nor a block device" };
    Err(BlockError::unsupported(
        path.display().to_string(),
        format!("is {what}; give a disk image file or a block device"),
    ))
}

impl BlockDevice for RawDevice {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    fn block_size_bytes(&self) -> u32 {
        self.block_size_bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        self.check_range(range)?;
        read_exact_at(&self.file, buffer, offset).map_err(|error| self.io("read", range, error))
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.check_range(range)?;
        let mut extents = Vec::new();
        if self.fixed_size {
            push_extent(&mut extents, Extent { range, kind: ExtentKind::Data });
        } else {
            files::file_extents(&self.file, range, MAX_EXTENTS, &mut extents)
                .map_err(|error| self.io("find the holes of", range, error))?;
        }
        Ok(extents)
    }
}

impl WritableBlockDevice for RawDevice {
    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        let range = ByteRange::new(offset, data.len() as u64);
        self.check_write(range)?;
        if let Some(Some(direct)) = self.direct.get()
            && direct.try_write(data, offset).map_err(|error| self.io("write", range, error))?
        {
            return Ok(());
        }
        let written = match &self.unflushed {
            None => write_all_at(&self.file, data, offset),
            Some(room) => {
                if data.len() >= ROOM_BYTES {
                    room.set_aside(&self.file, range);
                }
                write_in_pieces(&self.file, data, offset)
            }
        };
        written.map_err(|error| self.io("write", range, error))
    }

    fn expect_bulk_writes(&self) {
        if self.writable && self.unflushed.is_none() {
            self.direct.get_or_init(|| DirectFile::open(&self.file));
        }
    }

    fn expect_data(&self, range: ByteRange) {
        if let Some(Some(direct)) = self.direct.get()
            && self.check_write(range).is_ok()
        {
            direct.set_aside(range);
        }
    }

    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        self.check_write(range)?;
        if range.is_empty() || files::punch_hole(&self.file, range) {
            return Ok(());
        }
        let zeros = vec![0u8; 1 << 20];
        let mut at = range.offset;
        while at < range.end() {
            let length = zeros.len().min(usize::try_from(range.end() - at).unwrap_or(usize::MAX));
            self.write_at(&zeros[..length], at)?;
            at += length as u64;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        if self.unflushed.is_some() {
            return Ok(());
        }
        self.file
            .sync_data()
            .map_err(|error| BlockError::io(format!("flush {}", self.path.display()), error))
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        if !self.writable {
            return Err(BlockError::ReadOnly { device: self.name() });
        }
        if self.fixed_size {
            return Err(BlockError::unsupported(self.name(), "a block device has a fixed size"));
        }
        if size_bytes == self.size_bytes() {
            return Ok(());
        }
        self.file.set_len(size_bytes).map_err(|error| {
            BlockError::io(format!("resize {} to {size_bytes} bytes", self.path.display()), error)
        })?;
        self.size_bytes.store(size_bytes, Ordering::Release);
        Ok(())
    }
}

/// Writes in pieces that end at multiples of their size in the file: what crosses one takes several smaller pieces of
/// cache.
fn write_in_pieces(file: &File, data: &[u8], offset: u64) -> std::io::Result<()> {
    let (mut rest, mut at) = (data, offset);
    while !rest.is_empty() {
        #[allow(clippy::cast_possible_truncation, reason = "less than CACHED_WRITE_BYTES")]
        let into = (at % CACHED_WRITE_BYTES as u64) as usize;
        let (piece, after) = rest.split_at(rest.len().min(CACHED_WRITE_BYTES - into));
        write_all_at(file, piece, at)?;
        at += piece.len() as u64;
        rest = after;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{all_extents, is_zero};

    #[cfg(unix)]
    #[test]
    fn a_link_that_came_into_a_resolved_path_is_not_followed() {
        use std::os::unix::fs::symlink;
        let directory = tempfile::tempdir().unwrap();
        let place = std::fs::canonicalize(directory.path()).unwrap();
        std::fs::create_dir(place.join("real")).unwrap();
        std::fs::write(place.join("real/disk"), [7; 4096]).unwrap();
        symlink("real", place.join("link")).unwrap();
        symlink("disk", place.join("real/alias")).unwrap();
        for mode in [OpenMode::ReadOnly, OpenMode::ReadWrite] {
            let disk = RawDevice::open_resolved(place.join("real/disk"), mode).unwrap();
            let mut found = [0; 512];
            disk.read_at(&mut found, 512).unwrap();
            assert_eq!((found, disk.size_bytes()), ([7; 512], 4096));
            assert_eq!(disk.write_at(&[8; 512], 0).is_ok(), mode == OpenMode::ReadWrite);
            assert!(RawDevice::open_resolved(place.join("real/alias"), mode).is_err());
            #[cfg(target_os = "linux")]
            assert!(RawDevice::open_resolved(place.join("link/disk"), mode).is_err());
            assert!(RawDevice::open(place.join("link/alias"), mode).is_ok());
        }
        let new = OpenMode::CreateNew { size_bytes: 4096 };
        assert!(RawDevice::open_resolved(place.join("real/alias"), new).is_err());
        assert!(RawDevice::open_resolved(place.join("real/new"), new).is_ok());
    }

    #[test]
    fn holes_of_a_sparse_file_are_found_and_made() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        let disk = RawDevice::open(&path, OpenMode::CreateNew { size_bytes: 8 << 20 }).unwrap();
        disk.write_at(&[7; 1 << 20], 2 << 20).unwrap();
        disk.flush().unwrap();
        let kinds: Vec<_> = all_extents(&disk).unwrap();
        assert_eq!(
            kinds,
            [
                Extent::new(0, 2 << 20, ExtentKind::Unallocated),
                Extent::new(2 << 20, 1 << 20, ExtentKind::Data),
                Extent::new(3 << 20, 5 << 20, ExtentKind::Unallocated),
            ]
        );
        disk.write_zeroes(ByteRange::new(2 << 20, 1 << 20)).unwrap();
        assert_eq!(all_extents(&disk).unwrap(), [Extent::new(0, 8 << 20, ExtentKind::Unallocated)]);
        let mut block = [1; 4096];
        disk.read_at(&mut block, 2 << 20).unwrap();
        assert_eq!(block, [0; 4096]);
    }

    #[test]
    fn without_flushes_the_same_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        let mode = OpenMode::CreateNew { size_bytes: 1 << 20 };
        let disk = RawDevice::open(&path, mode).unwrap().without_flushes();
        disk.expect_bulk_writes();
        let data: Vec<u8> = (0..300_000u32).map(|at| (at % 251).to_le_bytes()[0]).collect();
        disk.write_at(&data, 700).unwrap();
        disk.flush().unwrap();
        let found = std::fs::read(&path).unwrap();
        assert!(found[700..300_700] == data[..] && is_zero(&found[300_700..]));
    }

    #[test]
    fn without_flushes_holes_stay_and_the_file_grows_as_far_as_it_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let open = |name: &str| {
            let mode = OpenMode::CreateNew { size_bytes: 2 << 20 };
            RawDevice::open(directory.path().join(name), mode).unwrap()
        };
        let (flushed, unflushed) = (open("flushed"), open("unflushed").without_flushes());
        for disk in [&flushed, &unflushed] {
            disk.write_at(&[7; 256 << 10], 1 << 20).unwrap();
            disk.write_at(&[8; 64 << 10], (2 << 20) - (64 << 10)).unwrap();
            // Past what the file has, as an image that grows is written.
            disk.resize((3 << 20) + 100).unwrap();
            disk.write_at(&[9; (64 << 10) + 100], (3 << 20) - (64 << 10)).unwrap();
            disk.write_at(&[6; 128 << 10], (1 << 20) + (128 << 10)).unwrap();
            disk.flush().unwrap();
        }
        assert_eq!(all_extents(&unflushed).unwrap(), all_extents(&flushed).unwrap());
        assert!(all_extents(&unflushed).unwrap().len() > 3);
        let read = |disk: &RawDevice| std::fs::read(disk.path()).unwrap();
        assert!(read(&unflushed) == read(&flushed));
        assert_eq!(read(&unflushed).len(), (3 << 20) + 100);
        // Blocks that are set aside and not written look like holes, but they are taken from the file system.
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            let taken = |disk: &RawDevice| std::fs::metadata(disk.path()).unwrap().blocks() * 512;
            let (expected, found) = (taken(&flushed), taken(&unflushed));
            assert!(found <= expected + (32 << 10), "{found} instead of {expected}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_new_disk_is_its_owners_alone() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        RawDevice::open(&path, OpenMode::CreateNew { size_bytes: 4096 }).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn what_is_no_disk_is_refused_with_its_path() {
        let directory = tempfile::tempdir().unwrap();
        let error = RawDevice::open(directory.path(), OpenMode::ReadOnly).unwrap_err();
        assert!(matches!(error, BlockError::Unsupported { .. }), "{error}");
        let missing = directory.path().join("missing.raw");
        let error = RawDevice::open(&missing, OpenMode::ReadOnly).unwrap_err();
        assert_eq!(error.io_kind(), Some(std::io::ErrorKind::NotFound));
        assert!(error.to_string().contains("missing.raw"));
    }

    #[test]
    fn read_only_is_read_only_and_bounds_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        std::fs::write(&path, [5; 1000]).unwrap();
        let disk = RawDevice::open(&path, OpenMode::ReadOnly).unwrap();
        assert!(matches!(disk.write_at(&[1], 0), Err(BlockError::ReadOnly { .. })));
        let mut buffer = [0; 16];
        assert!(matches!(disk.read_at(&mut buffer, 990), Err(BlockError::OutOfRange { .. })));
        assert!(matches!(disk.read_at(&mut buffer, u64::MAX), Err(BlockError::OutOfRange { .. })));
        disk.read_at(&mut buffer, 984).unwrap();
        assert_eq!(buffer, [5; 16]);
    }
}
