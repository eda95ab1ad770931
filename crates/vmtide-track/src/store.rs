//! Where the two files of tracking are.

use crate::id::Series;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};
use vmtide_block::files::open_file;

/// The largest file that is read: more than all bitmaps of the largest disk with many ids take; a larger one is
/// nobody's tracking.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// One of the two files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StoreFile {
    /// Everything, replaced as a whole.
    Rct,
    /// The marks of regions, changed in place.
    Mrt,
}

impl StoreFile {
    /// The extension that Hyper-V uses.
    pub const fn extension(self) -> &'static str {
        match self {
            Self::Rct => "rct",
            Self::Mrt => "mrt",
        }
    }
}

/// Where the files of tracking are kept: beside the image, or in memory for tests that enumerate crashes.
///
/// What a method did is on the medium when it returns. A crash within [`replace`](Self::replace) leaves the old file or the
/// new one; within [`update`](Self::update), any mixture.
pub trait TrackingStore: Send + Sync {
    /// A file's bytes; none where there is no file.
    ///
    /// # Errors
    /// What the medium says.
    fn read(&self, file: StoreFile) -> io::Result<Option<Vec<u8>>>;

    /// Puts a new file in the place of the old one, if there is one.
    ///
    /// # Errors
    /// What the medium says; either file may be there then.
    fn replace(&self, file: StoreFile, bytes: &[u8]) -> io::Result<()>;

    /// Writes pieces (offset, bytes) into an existing file, and waits once for all of them.
    ///
    /// # Errors
    /// What the medium says; what the file holds is then not known.
    fn update(&self, file: StoreFile, pieces: &[(u64, &[u8])]) -> io::Result<()>;

    /// Removes a file; nothing where there is none.
    ///
    /// # Errors
    /// What the medium says.
    fn remove(&self, file: StoreFile) -> io::Result<()>;

    /// Leaves a sign that the host is alive, without waiting for the medium.
    ///
    /// # Errors
    /// What the medium says.
    fn beat(&self) -> io::Result<()> {
        Ok(())
    }

    /// When the last sign was left, in milliseconds since 1970; none where signs are not kept.
    ///
    /// # Errors
    /// What the medium says.
    fn last_beat_unix_ms(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }
}

/// A time as the milliseconds since 1970.
pub(crate) fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The file of tracking that lies beside the image at `image`: its name with `.rct` or `.mrt` behind it.
pub fn tracking_path(image: &Path, file: StoreFile) -> PathBuf {
    with_suffix(image, file.extension())
}

/// `path` with `.` and `suffix` behind it.
pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".");
    name.push(suffix);
    name.into()
}

/// The files beside an image.
#[derive(Debug)]
pub struct FileStore {
    image: PathBuf,
    /// The `.mrt`, open since its first change. Replacing it makes this one stale.
    marks: Mutex<Option<File>>,
}

impl FileStore {
    /// The files beside the image at `image`, which need not exist.
    pub fn new(image: impl Into<PathBuf>) -> Self {
        Self { image: image.into(), marks: Mutex::new(None) }
    }

    fn path(&self, file: StoreFile) -> PathBuf {
        tracking_path(&self.image, file)
    }
}

impl TrackingStore for FileStore {
    fn read(&self, file: StoreFile) -> io::Result<Option<Vec<u8>>> {
        let path = self.path(file);
        let open = match open_file(&path, OpenOptions::new().read(true)) {
            Ok(open) => open,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(named(&path, error)),
        };
        let mut bytes = Vec::new();
        open.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(|error| named(&path, error))?;
        Ok(Some(bytes))
    }

    fn replace(&self, file: StoreFile, bytes: &[u8]) -> io::Result<()> {
        let path = self.path(file);
        let mut marks = self.marks.lock();
        if file == StoreFile::Mrt {
            *marks = None;
        }
        // A random name: two that begin at the same moment do not write into one file.
        let random = Series::random()?;
        let random: String = random.0.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        let temporary = with_suffix(&path, &format!("{random}.new"));
        let written =
            write_new(&temporary, bytes).and_then(|()| std::fs::rename(&temporary, &path));
        if let Err(error) = written {
            // The first error is the one to tell.
            let _ = std::fs::remove_file(&temporary);
            return Err(named(&path, error));
        }
        sync_directory(&path).map_err(|error| named(&path, error))
    }

    fn update(&self, file: StoreFile, pieces: &[(u64, &[u8])]) -> io::Result<()> {
        let path = self.path(file);
        let mut marks = self.marks.lock();
        let opened;
        let open = match (&mut *marks, file) {
            (Some(open), StoreFile::Mrt) => open,
            (empty, _) => {
                let file_now = open_file(&path, OpenOptions::new().write(true));
                let file_now = file_now.map_err(|error| named(&path, error))?;
                match file {
                    StoreFile::Mrt => empty.insert(file_now),
                    StoreFile::Rct => {
                        opened = file_now;
                        &opened
                    }
                }
            }
        };
        for (offset, bytes) in pieces {
            write_all_at(open, bytes, *offset).map_err(|error| named(&path, error))?;
        }
        open.sync_data().map_err(|error| named(&path, error))
    }

    fn remove(&self, file: StoreFile) -> io::Result<()> {
        let path = self.path(file);
        if file == StoreFile::Mrt {
            *self.marks.lock() = None;
        }
        match std::fs::remove_file(&path) {
            Ok(()) => sync_directory(&path).map_err(|error| named(&path, error)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(named(&path, error)),
        }
    }

    /// The time of change of `.mrt`: a journal keeps it in order with that of the image.
    fn beat(&self) -> io::Result<()> {
        let path = self.path(StoreFile::Mrt);
        let file = open_file(&path, OpenOptions::new().write(true));
        file.and_then(|file| file.set_modified(SystemTime::now()))
            .map_err(|error| named(&path, error))
    }

    fn last_beat_unix_ms(&self) -> io::Result<Option<u64>> {
        match std::fs::metadata(self.path(StoreFile::Mrt)) {
            Ok(metadata) => Ok(metadata.modified().ok().map(unix_ms)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The error with the file's name.
fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        // What changes on a disk is its owner's business.
        options.mode(0o600);
    }
    let mut file = options.open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Makes a name durable: on Unix a directory is a file that is synced.
#[cfg(unix)]
fn sync_directory(of: &Path) -> io::Result<()> {
    let directory = match of.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(directory)?.sync_all()
}

/// Windows has no such call; NTFS writes names through its log in order.
#[cfg(not(unix))]
fn sync_directory(_of: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(unix)]
fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(windows)]
fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !bytes.is_empty() {
        let count = file.seek_write(bytes, offset)?;
        if count == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = bytes.get(count..).unwrap_or_default();
        offset += count as u64;
    }
    Ok(())
}

#[cfg(all(test, target_os = "linux"))]
#[allow(clippy::unwrap_used, reason = "a test that panics has failed")]
mod tests {
    use super::*;
    use rustix::fs::{CWD, FileType, Mode, mknodat};

    /// Whoever may make files beside an image could let an agent wait for ever for the other end of a pipe.
    #[test]
    fn a_pipe_in_place_of_a_tracking_file_is_refused_and_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let store = FileStore::new(directory.path().join("disk.vhdx"));
        for file in [StoreFile::Rct, StoreFile::Mrt] {
            mknodat(CWD, store.path(file), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
            let of_file = store.path(file).display().to_string();
            let refused = [store.read(file).unwrap_err(), store.update(file, &[]).unwrap_err()];
            for error in refused {
                assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
                assert!(error.to_string().contains(&of_file), "{error}");
            }
        }
        assert_eq!(store.beat().unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
