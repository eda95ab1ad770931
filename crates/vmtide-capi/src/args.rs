//! Taking the arguments of a call apart: the only place where the caller's pointers are read.
//!
//! Nobody can tell whether a pointer that is not null points to what the caller says; that much is in the
//! header's contract. All that can be checked is: null, UTF-8, lengths, structure sizes, flags.

use crate::status::{Failure, Result, Status};
use std::ffi::{CStr, c_char};
use vmtide_block::{ByteRange, RangeSet};

/// A structure of options as C has it.
///
/// # Safety
/// The type is `repr(C)`, begins with a `u64` that the caller sets to the number of its bytes, and may be
/// all zeros.
pub(crate) unsafe trait Structure: Copy {
    /// The sizes that it had in released versions, in bytes, the smallest first; the last is today's. A
    /// version that adds members puts the offset of the first of them before the last. Any other
    /// size below today's is no structure of ours: it may end in the middle of a pointer.
    const SIZES_BYTES: &'static [usize] = &[size_of::<Self>()];
}

/// The longest string taken, in bytes: paths and URLs are below it, and a pointer to something that
/// is no string does not make us read for ever.
const MAX_STRING_BYTES: usize = 1 << 16;

/// The largest structure that a later version may have, in bytes.
const MAX_STRUCT_BYTES: u64 = 4096;

/// The most changed ranges taken: a table of 256 MiB. Whoever has more rounds them.
const MAX_RANGES: u64 = 1 << 24;

/// A range as C has it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Range {
    /// The first byte.
    pub offset: u64,
    /// The number of bytes.
    pub length: u64,
}

/// A string that must be there.
///
/// # Safety
/// `text` is null or points to bytes that end with a 0 and stay as they are during the call.
pub(crate) unsafe fn string(text: *const c_char, what: &str) -> Result<String> {
    // SAFETY: by this function's own contract.
    match unsafe { optional_string(text, what) }? {
        Some(text) => Ok(text),
        None => Err(Failure::invalid(format!("{what} is NULL"))),
    }
}

/// A string that may be null.
///
/// # Safety
/// As [`string`].
pub(crate) unsafe fn optional_string(text: *const c_char, what: &str) -> Result<Option<String>> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: not null, and ends with a 0 by the contract; nothing past the 0 is read.
    let bytes = unsafe { CStr::from_ptr(text) }.to_bytes();
    if bytes.len() > MAX_STRING_BYTES {
        return Err(Failure::invalid(format!("{what} has more than {MAX_STRING_BYTES} bytes")));
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(Some(text.to_owned())),
        Err(_) => Err(Failure::invalid(format!("{what} is not UTF-8"))),
    }
}

/// A structure of options that the caller's header may know in another version than ours; null is all
/// zeros.
///
/// # Safety
/// `options` is null or points to as many bytes as its first eight say, which stay as they are during
/// the call.
pub(crate) unsafe fn options<T: Structure>(options: *const T, what: &str) -> Result<T> {
    let mut ours = std::mem::MaybeUninit::<T>::zeroed();
    if !options.is_null() {
        // SAFETY: not null, and begins with its size by the contract.
        let size = unsafe { options.cast::<u64>().read_unaligned() };
        let wrong = || {
            Failure::invalid(format!("struct_size of {what} is {size}: set it to sizeof({what})"))
        };
        if size > MAX_STRUCT_BYTES {
            return Err(wrong());
        }
        let size = usize::try_from(size).map_err(|_| wrong())?;
        let known = size.min(size_of::<T>());
        if !T::SIZES_BYTES.contains(&known) {
            return Err(wrong());
        }
        // SAFETY: the caller's structure has `size` bytes by the contract.
        let theirs = unsafe { std::slice::from_raw_parts(options.cast::<u8>(), size) };
        if theirs[known..].iter().any(|byte| *byte != 0) {
            return Err(Failure::new(
                Status::Unsupported,
                format!("{what} has members that this version of libvmtide does not know"),
            ));
        }
        // SAFETY: `ours` has room for `known` bytes, and nothing else points to it.
        unsafe { std::ptr::copy_nonoverlapping(theirs.as_ptr(), ours.as_mut_ptr().cast(), known) };
    }
    // SAFETY: all zeros are a `T` by its trait, and so is what a caller put there: numbers,
    // pointers and nullable function pointers.
    Ok(unsafe { ours.assume_init() })
}

/// Refuses flags that nobody knows.
pub(crate) fn check_flags(flags: u32, known: u32, what: &str) -> Result<()> {
    match flags & !known {
        0 => Ok(()),
        unknown => Err(Failure::invalid(format!("{what} has the unknown flags {unknown:#x}"))),
    }
}

/// Where a result goes. It is set to zero at once, so that a call that fails leaves no stale one.
pub(crate) struct Out<T>(*mut T);

impl<T: Copy + Default> Out<T> {
    /// Takes the pointer.
    ///
    /// # Safety
    /// `place` is null or points to a `T` that may be written until the call ends.
    pub unsafe fn new(place: *mut T, what: &str) -> Result<Self> {
        if place.is_null() {
            return Err(Failure::invalid(format!("{what} is NULL")));
        }
        // SAFETY: not null and writable by the contract.
        unsafe { place.write_unaligned(T::default()) };
        Ok(Self(place))
    }

    /// Puts the result there.
    #[allow(clippy::needless_pass_by_value, reason = "a result is given once")]
    pub fn set(self, value: T) {
        // SAFETY: checked and promised in `new`; a call ends before its caller's place does.
        unsafe { self.0.write_unaligned(value) };
    }
}

/// Bytes that are read.
///
/// # Safety
/// `data` is null or points to `length` bytes that stay as they are during the call.
pub(crate) unsafe fn bytes<'a>(data: *const u8, length: u64, what: &str) -> Result<&'a [u8]> {
    let length = checked_length(data.is_null(), length, what)?;
    if length == 0 {
        return Ok(&[]);
    }
    // SAFETY: not null, `length` bytes by the contract, and no longer than any object can be.
    Ok(unsafe { std::slice::from_raw_parts(data, length) })
}

/// Bytes that are filled.
///
/// # Safety
/// `buffer` is null or points to `length` bytes that may be written and that nobody else looks at
/// during the call.
pub(crate) unsafe fn buffer<'a>(buffer: *mut u8, length: u64, what: &str) -> Result<&'a mut [u8]> {
    let length = checked_length(buffer.is_null(), length, what)?;
    if length == 0 {
        return Ok(&mut []);
    }
    // SAFETY: not null, `length` bytes by the contract, and no longer than any object can be. Bytes
    // that were never set are read by nobody before they are filled.
    Ok(unsafe { std::slice::from_raw_parts_mut(buffer, length) })
}

fn checked_length(is_null: bool, length: u64, what: &str) -> Result<usize> {
    if is_null && length > 0 {
        return Err(Failure::invalid(format!("{what} is NULL")));
    }
    usize::try_from(length)
        .ok()
        .filter(|length| isize::try_from(*length).is_ok())
        .ok_or_else(|| Failure::invalid(format!("{what} cannot have {length} bytes")))
}

/// Changed ranges.
///
/// # Safety
/// `ranges` is null or points to `count` ranges that stay as they are during the call.
pub(crate) unsafe fn ranges(ranges: *const Range, count: u64) -> Result<RangeSet> {
    if count > MAX_RANGES {
        return Err(Failure::invalid(format!(
            "{count} changed ranges; at most {MAX_RANGES} are taken: round them to larger ones"
        )));
    }
    let bytes = count.saturating_mul(size_of::<Range>() as u64);
    let count = checked_length(ranges.is_null(), bytes, "changes")? / size_of::<Range>();
    let mut set = Vec::with_capacity(count);
    for index in 0..count {
        // SAFETY: inside the `count` ranges of the contract.
        let range = unsafe { ranges.add(index).read_unaligned() };
        let range = ByteRange::new(range.offset, range.length);
        if range.checked_end().is_none() {
            return Err(Failure::invalid(format!(
                "the changed range {range} is larger than any disk"
            )));
        }
        set.push(range);
    }
    Ok(RangeSet::from(set))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    #[derive(Clone, Copy, Debug)]
    #[repr(C)]
    struct Sample {
        struct_size: u64,
        first: *const c_char,
        later: *const c_char,
    }

    // SAFETY: `repr(C)`, begins with its size, and numbers and pointers may be zero.
    unsafe impl Structure for Sample {
        const SIZES_BYTES: &'static [usize] =
            &[std::mem::offset_of!(Self, later), size_of::<Self>()];
    }

    #[test]
    fn only_a_size_that_was_released_is_taken_and_no_pointer_is_cut() {
        let text = c"text";
        let mut padded = [0u64; 8];
        for size in 0..=64u64 {
            let sample = Sample { struct_size: size, first: text.as_ptr(), later: text.as_ptr() };
            // SAFETY: there is room for more than a `Sample`.
            unsafe { padded.as_mut_ptr().cast::<Sample>().write(sample) };
            // SAFETY: begins with its size, and has no fewer bytes than that.
            let taken = unsafe { options(padded.as_ptr().cast::<Sample>(), "sample") };
            let today = size_of::<Sample>() as u64;
            let earlier = std::mem::offset_of!(Sample, later) as u64;
            if size != earlier && size < today {
                assert_eq!(taken.unwrap_err().status, Status::Invalid, "{size}");
                continue;
            }
            let taken = taken.unwrap();
            assert_eq!(taken.first, text.as_ptr(), "{size}");
            assert_eq!(taken.later.is_null(), size == earlier, "{size}");
        }
    }
}
