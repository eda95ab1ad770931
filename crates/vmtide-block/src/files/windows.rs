//! Windows. What needs foreign functions is in `vmtide-windows-ffi`.

use crate::{ByteRange, Extent, ExtentKind, push_extent};
use std::fs::{File, Metadata, OpenOptions};
use std::io::{ErrorKind, Result};
use std::os::windows::fs::{FileExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf, Prefix};
use vmtide_windows_ffi::{files, names, sparse};

/// `FILE_FLAG_BACKUP_SEMANTICS`: without it no directory can be opened.
const OPEN_DIRECTORY: u32 = 0x0200_0000;

/// `GENERIC_WRITE`, which flushing needs.
const GENERIC_WRITE: u32 = 0x4000_0000;

/// The codes of data that is lost: a wrong checksum (23), a sector that is not found (27), a device that
/// cannot read (30), a device that fails (1117), a file or disk structure that is damaged (1392, 1393).
pub(super) const MEDIA_ERRORS: &[i32] = &[23, 27, 30, 1117, 1392, 1393];

/// What a flush of a directory answers where the file system or the rights of the user have none: access
/// denied (5), and that there is no such function (1), handle (6), support (50), parameter (87).
const CANNOT_FLUSH: &[i32] = &[1, 5, 6, 50, 87];

/// Longer paths need the prefix `\\?\`: 260 with the final zero, of which a directory leaves 12 for a
/// name.
const LONG_PATH: usize = 247;

/// The codes of a file that somebody has opened for himself alone (32), or locked (33).
const IN_USE: &[i32] = &[32, 33];

/// Who has what is in use.
pub(crate) const USERS: &str = "a running VM or another program has it open";

pub(super) fn read_exact_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> Result<()> {
    while !buffer.is_empty() {
        match file.seek_read(buffer, offset) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                buffer = buffer.get_mut(count..).unwrap_or_default();
                offset += count as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

pub(super) fn write_all_at(file: &File, mut data: &[u8], mut offset: u64) -> Result<()> {
    while !data.is_empty() {
        match file.seek_write(data, offset) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => {
                data = data.get(count..).unwrap_or_default();
                offset += count as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

pub(super) fn sync_directory(path: &Path) -> Result<()> {
    let opened = OpenOptions::new()
        .access_mode(GENERIC_WRITE)
        .custom_flags(OPEN_DIRECTORY)
        .open(path)
        .and_then(|directory| directory.sync_all());
    match opened {
        Err(error) if error.raw_os_error().is_some_and(|code| CANNOT_FLUSH.contains(&code)) => {
            // One that is not there is an error all the same.
            std::fs::metadata(path).map(drop)
        }
        result => result,
    }
}

pub(super) fn rename_new(from: &Path, to: &Path) -> Result<()> {
    names::move_new(from, to)
}

pub(super) fn file_identity(path: &Path) -> Option<String> {
    // Without any right: what a file is may be asked even of one that somebody has for himself.
    let options = OpenOptions::new().access_mode(0).custom_flags(OPEN_DIRECTORY).open(path);
    let found = files::identity(&options.ok()?).ok()?;
    Some(format!("{:x}:{:x}", found.volume, found.file))
}

pub(super) fn open_resolved(path: &Path, options: &OpenOptions, _: bool) -> Result<File> {
    options.open(path)
}

pub(super) fn open_file(path: &Path, options: &OpenOptions) -> Result<File> {
    options.open(path)
}

pub(super) fn allocated_bytes(path: &Path) -> Option<u64> {
    files::allocated_bytes(path).ok()
}

pub(super) fn free_bytes(directory: &Path) -> Result<u64> {
    files::free_bytes(directory)
}

pub(super) fn canonical(path: &Path) -> Result<PathBuf> {
    let real = std::fs::canonicalize(path)?;
    // Without its prefix a longer one could not be opened by others.
    let Some(text) = real.to_str().filter(|text| text.len() < LONG_PATH) else {
        return Ok(real);
    };
    let plain = match text.strip_prefix(r"\\?\UNC\") {
        Some(share) => format!(r"\\{share}"),
        None => match text.strip_prefix(r"\\?\") {
            Some(rest) if rest.as_bytes().get(1) == Some(&b':') => rest.to_owned(),
            _ => return Ok(real),
        },
    };
    // Without the prefix Windows reads some names differently: `NUL`, `a.`.
    let plain = PathBuf::from(plain);
    let is_same = std::fs::canonicalize(&plain).is_ok_and(|again| again == real);
    Ok(if is_same { plain } else { real })
}

pub(super) fn check_writable(directory: &Path) -> Result<()> {
    OpenOptions::new()
        .access_mode(GENERIC_WRITE)
        .custom_flags(OPEN_DIRECTORY)
        .open(directory)
        .map(drop)
}

pub(super) fn is_in_use(error: &std::io::Error) -> bool {
    error.raw_os_error().is_some_and(|code| IN_USE.contains(&code))
}

pub(super) fn host_name() -> String {
    std::env::var("COMPUTERNAME").unwrap_or_default()
}

/// A new file gets the access list of its directory: that is where Windows says who may read.
pub(crate) fn owner_only(_options: &mut OpenOptions) {}

/// Lets a new file have holes. Where the file system has none, it takes all its space.
pub(crate) fn make_sparse(file: &File) {
    let _ = sparse::set_sparse(file);
}

/// There is nothing to claim: block devices are not opened here.
pub(crate) fn claim(_options: &mut OpenOptions) {}

/// They have paths of their own, which [`names_device`] knows.
pub(crate) fn is_block_device(_metadata: &Metadata) -> bool {
    false
}

/// Whether this is a path like `\\.\PhysicalDrive0`.
pub(crate) fn names_device(path: &Path) -> bool {
    let first = path.components().next();
    matches!(first, Some(Component::Prefix(prefix)) if matches!(prefix.kind(), Prefix::DeviceNS(_)))
}

pub(crate) fn logical_block_size(_file: &File) -> u32 {
    512
}

/// Whether the range reads as zeros now; in a sparse file it is a hole.
pub(crate) fn punch_hole(file: &File, range: ByteRange) -> bool {
    sparse::zero(file, range.offset, range.length).is_ok()
}

/// Walks data and holes, `max` of them at most and some more. A file that has no holes, or a file system
/// that cannot tell, is all data.
pub(crate) fn file_extents(
    file: &File,
    range: ByteRange,
    max: usize,
    out: &mut Vec<Extent>,
) -> Result<()> {
    let mut at = range.offset;
    while at < range.end() && out.len() < max {
        let Ok((allocated, more)) = sparse::allocated(file, at, range.end() - at) else {
            push_extent(out, Extent::new(at, range.end() - at, ExtentKind::Data));
            return Ok(());
        };
        let before = at;
        for (offset, length) in allocated {
            let start = offset.clamp(at, range.end());
            let end = offset.saturating_add(length).clamp(start, range.end());
            push_extent(out, Extent::new(at, start - at, ExtentKind::Unallocated));
            push_extent(out, Extent::new(start, end - start, ExtentKind::Data));
            at = end;
        }
        let kind = match more {
            false => ExtentKind::Unallocated,
            // An answer that does not get on: nothing is known of the rest.
            true if at == before => ExtentKind::Data,
            true => continue,
        };
        push_extent(out, Extent::new(at, range.end() - at, kind));
        return Ok(());
    }
    Ok(())
}
