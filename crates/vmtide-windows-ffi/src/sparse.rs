//! Files with holes: `FSCTL_SET_SPARSE`, `FSCTL_SET_ZERO_DATA`, `FSCTL_QUERY_ALLOCATED_RANGES`
//! (Windows documentation, "Sparse Files").

use std::ffi::c_void;
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::windows::io::AsRawHandle;
use windows_sys::Win32::Foundation::ERROR_MORE_DATA;
use windows_sys::Win32::System::IO::DeviceIoControl;
use windows_sys::Win32::System::Ioctl::{
    FILE_ALLOCATED_RANGE_BUFFER, FILE_ZERO_DATA_INFORMATION, FSCTL_QUERY_ALLOCATED_RANGES,
    FSCTL_SET_SPARSE, FSCTL_SET_ZERO_DATA,
};

/// How many ranges one call to the system answers with, at most: 16 KiB of them.
const RANGES_AT_ONCE: usize = 1024;

/// Makes a file sparse: what was never written, and what is zeroed from now on, takes no space.
///
/// # Errors
/// Where the file system has no sparse files (FAT, some shares); the file then stays as it is.
pub fn set_sparse(file: &File) -> Result<()> {
    control::<(), ()>(file, FSCTL_SET_SPARSE, None, &mut []).map(drop)
}

/// Makes `length` bytes from `offset` read as zeros; in a sparse file they become a hole where whole
/// clusters lie in them. The file keeps its size.
///
/// # Errors
/// `InvalidInput` where the range passes what Windows can name; what the file system says. What is in
/// the range is not known then.
pub fn zero(file: &File, offset: u64, length: u64) -> Result<()> {
    let end = offset.checked_add(length).ok_or(ErrorKind::InvalidInput)?;
    let range =
        FILE_ZERO_DATA_INFORMATION { FileOffset: signed(offset)?, BeyondFinalZero: signed(end)? };
    control::<_, ()>(file, FSCTL_SET_ZERO_DATA, Some(&range), &mut []).map(drop)
}

/// The parts of `length` bytes from `offset` that take space, each as its offset and length, in order:
/// the first ones, as many as one call of the system gives. The rest is asked for from the end of the
/// last one. What lies between them is a hole and reads as zeros. Answers also with whether there may
/// be more.
///
/// # Errors
/// `InvalidInput` where the range passes what Windows can name; where the file system cannot tell,
/// what it says.
pub fn allocated(file: &File, offset: u64, length: u64) -> Result<(Vec<(u64, u64)>, bool)> {
    let query =
        FILE_ALLOCATED_RANGE_BUFFER { FileOffset: signed(offset)?, Length: signed(length)? };
    let mut found = vec![FILE_ALLOCATED_RANGE_BUFFER::default(); RANGES_AT_ONCE];
    let (count, more) = control(file, FSCTL_QUERY_ALLOCATED_RANGES, Some(&query), &mut found)?;
    let unsigned = |range: &FILE_ALLOCATED_RANGE_BUFFER| {
        let pair = u64::try_from(range.FileOffset).ok().zip(u64::try_from(range.Length).ok());
        pair.ok_or_else(|| Error::new(ErrorKind::InvalidData, "a range with a negative offset"))
    };
    let ranges = found.iter().take(count).map(unsigned).collect::<Result<_>>()?;
    Ok((ranges, more))
}

fn signed(offset: u64) -> Result<i64> {
    i64::try_from(offset).map_err(|_| ErrorKind::InvalidInput.into())
}

/// Asks the file system. Answers with how many elements of `output` it filled, and whether it had more.
///
/// Private, and only called with plain C structures: any bytes are a value of `O`.
fn control<I, O: Copy>(
    file: &File,
    code: u32,
    input: Option<&I>,
    output: &mut [O],
) -> Result<(usize, bool)> {
    let size =
        |bytes: usize| u32::try_from(bytes).map_err(|_| Error::from(ErrorKind::InvalidInput));
    let input_bytes = size(if input.is_some() { size_of::<I>() } else { 0 })?;
    let output_bytes = size(size_of_val(output))?;
    let mut filled_bytes = 0_u32;
    // SAFETY: the handle is open while `file` is borrowed. Both pointers are to live memory of the
    // lengths given with them (or null or dangling with a length of 0), the output is borrowed
    // exclusively and takes any bytes, and without OVERLAPPED the call is over when it returns: std
    // opens files for synchronous use.
    let done = unsafe {
        DeviceIoControl(
            file.as_raw_handle(),
            code,
            input.map_or(std::ptr::null(), |input| std::ptr::from_ref(input).cast::<c_void>()),
            input_bytes,
            output.as_mut_ptr().cast::<c_void>(),
            output_bytes,
            &raw mut filled_bytes,
            std::ptr::null_mut(),
        )
    };
    let more = match super::check(done) {
        Ok(()) => false,
        Err(error) if is_code(&error, ERROR_MORE_DATA) => true,
        Err(error) => return Err(error),
    };
    let filled = usize::try_from(filled_bytes).unwrap_or(0) / size_of::<O>().max(1);
    Ok((filled.min(output.len()), more))
}

fn is_code(error: &Error, code: u32) -> bool {
    error.raw_os_error().is_some_and(|found| u32::try_from(found) == Ok(code))
}
