//! The file behind a handle: the content of the disk while it is attached.

use crate::tracking;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::os::windows::ffi::OsStrExt;
use std::os::windows::fs::FileExt;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use vmtide_block::{BlockDevice, BlockError, ByteRange, CancelToken, for_each_extent};
use vmtide_image::{BackingPolicy, OpenOptions as ImageOptions, open_read_only};
use windows_sys::Win32::Foundation::{
    ERROR_FILE_CORRUPT, ERROR_FILE_NOT_FOUND, ERROR_VHD_FORMAT_UNKNOWN, GENERIC_READ,
    GENERIC_WRITE, GetLastError, HANDLE, INVALID_HANDLE_VALUE,
};
use windows_sys::Win32::Storage::FileSystem::{
    CREATE_NEW, CreateFileW, FILE_FLAG_DELETE_ON_CLOSE, FILE_FLAG_OVERLAPPED, FILE_SHARE_DELETE,
    FILE_SHARE_READ, FILE_SHARE_WRITE,
};

/// How much is compared and copied at once, in bytes.
const PIECE_BYTES: u64 = 64 << 10;

/// Reads through parents wherever they are: the disks of a test are trusted.
pub fn image_options() -> ImageOptions {
    ImageOptions { backing: BackingPolicy::Allow, ..ImageOptions::default() }
}

/// The code that stands for an error of an image.
pub fn code_of(error: &BlockError) -> u32 {
    match error {
        BlockError::Io { source, .. } => {
            source.raw_os_error().map_or(ERROR_FILE_NOT_FOUND, i32::cast_unsigned)
        }
        BlockError::Damaged { .. } => ERROR_FILE_CORRUPT,
        _ => ERROR_VHD_FORMAT_UNKNOWN,
    }
}

/// A new empty file that goes when its handle is closed.
pub fn new_handle() -> Result<(HANDLE, PathBuf), u32> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let directory =
        std::env::var_os("VMTIDE_STANDIN_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = directory.join(format!("virtdisk-{}-{number}.content", std::process::id()));
    let wide: Vec<u16> = OsStr::new(&path).encode_wide().chain([0]).collect();
    // SAFETY: the path ends with a zero; no attributes, no template.
    let handle = unsafe {
        CreateFileW(
            wide.as_ptr(),
            GENERIC_READ | GENERIC_WRITE,
            FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE,
            ptr::null(),
            CREATE_NEW,
            FILE_FLAG_OVERLAPPED | FILE_FLAG_DELETE_ON_CLOSE,
            ptr::null_mut(),
        )
    };
    if handle == INVALID_HANDLE_VALUE {
        // SAFETY: no pointers.
        return Err(unsafe { GetLastError() });
    }
    Ok((handle, path))
}

/// Fills the file behind a handle with the content of the image.
pub fn fill(image: &Path, content: &Path) -> Result<(), u32> {
    let device = open_read_only(image, &image_options()).map_err(|error| code_of(&error))?;
    let file = OpenOptions::new().write(true).open(content).map_err(|error| io_code(&error))?;
    file.set_len(device.size_bytes()).map_err(|error| io_code(&error))?;
    let whole = ByteRange::new(0, device.size_bytes());
    let mut buffer = vec![0; 1 << 20];
    for_each_extent(&*device, whole, &CancelToken::new(), |extent| {
        if extent.kind.reads_as_zero() {
            return Ok(());
        }
        let mut at = extent.range.offset;
        while at < extent.range.end() {
            let length =
                usize::try_from(extent.range.end() - at).unwrap_or(usize::MAX).min(buffer.len());
            let piece = buffer.get_mut(..length).unwrap_or_default();
            device.read_at(piece, at)?;
            write_all(&file, piece, at).map_err(|error| BlockError::io("fill", error))?;
            at += length as u64;
        }
        Ok(())
    })
    .map_err(|error| code_of(&error))
}

/// Empties the file behind a handle: a disk that is not attached has nothing to read.
pub fn empty(content: &Path) -> Result<(), u32> {
    let file = OpenOptions::new().write(true).open(content).map_err(|error| io_code(&error))?;
    file.set_len(0).map_err(|error| io_code(&error))
}

/// Writes what differs into the image, tracked.
pub fn write_back(image: &Path, content: &Path) -> Result<(), u32> {
    let file = File::open(content).map_err(|error| io_code(&error))?;
    let disk = tracking::Writer::open(image)?;
    let size = disk.size_bytes();
    let mut at = 0;
    while at < size {
        let length = usize::try_from((size - at).min(PIECE_BYTES)).unwrap_or(0);
        let (mut new, mut old) = (vec![0; length], vec![0; length]);
        read_all(&file, &mut new, at).map_err(|error| io_code(&error))?;
        disk.read(&mut old, at)?;
        if new != old {
            disk.write(&new, at)?;
        }
        at += length as u64;
    }
    disk.close()
}

pub fn io_code(error: &std::io::Error) -> u32 {
    error.raw_os_error().map_or(ERROR_FILE_CORRUPT, i32::cast_unsigned)
}

fn write_all(file: &File, mut data: &[u8], mut at: u64) -> std::io::Result<()> {
    while !data.is_empty() {
        let moved = file.seek_write(data, at)?;
        if moved == 0 {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        data = data.get(moved..).unwrap_or_default();
        at += moved as u64;
    }
    Ok(())
}

fn read_all(file: &File, mut buffer: &mut [u8], mut at: u64) -> std::io::Result<()> {
    while !buffer.is_empty() {
        let moved = file.seek_read(buffer, at)?;
        if moved == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        buffer = buffer.get_mut(moved..).unwrap_or_default();
        at += moved as u64;
    }
    Ok(())
}
