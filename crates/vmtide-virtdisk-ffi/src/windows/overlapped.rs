//! Input and output on a handle with many requests in flight.
//!
//! Every request has an event of its own, so any number of threads read through one handle at once and the
//! storage sees all of their requests. The kernel writes to the buffer until the request is over, so nothing
//! returns before that, whatever goes wrong.
//!
//! What Windows takes or not depends on the storage: a request that is not of whole sectors, in a buffer that begins at
//! one, fails on some hosts only. Here it fails on every host, and with a stand-in, so that a mistake is found before.

use crate::SectorIo;
use std::io;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use vmtide_block::{BlockError, Result};
use windows_sys::Win32::Foundation::{
    ERROR_HANDLE_EOF, ERROR_INVALID_PARAMETER, ERROR_IO_PENDING, GetLastError, HANDLE,
    STATUS_PENDING,
};
use windows_sys::Win32::Storage::FileSystem::{FlushFileBuffers, ReadFile, WriteFile};
use windows_sys::Win32::System::IO::{
    CancelIoEx, DeviceIoControl, GetOverlappedResult, OVERLAPPED, OVERLAPPED_0, OVERLAPPED_0_0,
};
use windows_sys::Win32::System::Threading::CreateEventW;

/// The most that one request moves, in bytes: a multiple of every sector. Larger ones take kernel memory for
/// their page lists and are split by the storage anyway.
const REQUEST_BYTES: usize = 4 << 20;
/// Events kept for the next requests; more readers at once than this make and close their own.
const KEPT_EVENTS: usize = 64;
/// How long to wait before asking again whether a request is over, where waiting itself failed.
const BROKEN_WAIT: Duration = Duration::from_millis(10);

/// A handle opened for overlapped input and output.
#[derive(Debug)]
pub(super) struct OverlappedFile {
    handle: Arc<OwnedHandle>,
    name: String,
    sector_bytes: u32,
    events: Mutex<Vec<OwnedHandle>>,
}

impl OverlappedFile {
    /// Over a handle of a disk with sectors of 512 or 4096 bytes; `name` is for errors.
    pub(super) fn new(handle: Arc<OwnedHandle>, name: String, sector_bytes: u32) -> Self {
        Self { handle, name, sector_bytes, events: Mutex::default() }
    }

    /// Succeeds for whole sectors; else with the code by which Windows refuses others.
    fn check_whole(&self, buffer: &[u8], offset: u64) -> Result<(), u32> {
        let parts = [offset, buffer.len() as u64, buffer.as_ptr().addr() as u64];
        let is_whole = parts.into_iter().all(|part| part.is_multiple_of(self.sector_bytes.into()));
        if is_whole { Ok(()) } else { Err(ERROR_INVALID_PARAMETER) }
    }

    fn raw(&self) -> HANDLE {
        self.handle.as_raw_handle()
    }

    fn take_event(&self) -> Result<OwnedHandle, u32> {
        let kept = self.events.lock().unwrap_or_else(PoisonError::into_inner).pop();
        if let Some(event) = kept {
            return Ok(event);
        }
        // SAFETY: no attributes, no name; reset by hand, because the kernel resets it when a request begins.
        let event = unsafe { CreateEventW(ptr::null(), 1, 0, ptr::null()) };
        if event.is_null() {
            // SAFETY: no pointers.
            return Err(unsafe { GetLastError() });
        }
        // SAFETY: the call succeeded, so the handle is open and belongs to nobody else.
        Ok(unsafe { OwnedHandle::from_raw_handle(event) })
    }

    fn keep_event(&self, event: OwnedHandle) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() < KEPT_EVENTS {
            events.push(event);
        }
    }

    /// Begins a request at `offset` with `begin` and waits until it is over; the bytes moved, or the error code.
    fn request(
        &self,
        offset: u64,
        begin: impl FnOnce(HANDLE, *mut OVERLAPPED) -> i32,
    ) -> Result<usize, u32> {
        let event = self.take_event()?;
        let [low, high] = halves(offset);
        let mut overlapped = OVERLAPPED {
            Internal: 0,
            InternalHigh: 0,
            Anonymous: OVERLAPPED_0 { Anonymous: OVERLAPPED_0_0 { Offset: low, OffsetHigh: high } },
            hEvent: event.as_raw_handle(),
        };
        let state = &raw mut overlapped;
        if begin(self.raw(), state) == 0 {
            // SAFETY: no pointers.
            let code = unsafe { GetLastError() };
            if code != ERROR_IO_PENDING {
                self.keep_event(event);
                return Err(code);
            }
        }
        let result = self.finish(state);
        self.keep_event(event);
        result
    }

    /// Waits for a request that has begun.
    fn finish(&self, state: *mut OVERLAPPED) -> Result<usize, u32> {
        loop {
            let mut moved = 0_u32;
            // SAFETY: `state` lives in the caller, who waits for this; its event is open.
            if unsafe { GetOverlappedResult(self.raw(), state, &raw mut moved, 1) } != 0 {
                return Ok(moved as usize);
            }
            // SAFETY: no pointers.
            let code = unsafe { GetLastError() };
            // SAFETY: `state` lives; the kernel writes this word, so it is read as it is now.
            let status = unsafe { (&raw const (*state).Internal).read_volatile() };
            if status != STATUS_PENDING.cast_unsigned() as usize {
                return Err(code);
            }
            // Waiting failed, not the request, and the buffer is still the kernel's.
            // SAFETY: `state` is that of a request on this handle.
            unsafe { CancelIoEx(self.raw(), state) };
            std::thread::sleep(BROKEN_WAIT);
        }
    }

    fn failed(&self, what: &str, offset: u64, length: usize, code: u32) -> BlockError {
        let context = format!("{what} {length} bytes at {offset} of {}", self.name);
        BlockError::io(context, io::Error::from_raw_os_error(code.cast_signed()))
    }

    /// Puts what was written on stable storage; the error code where that cannot be asked for.
    pub(super) fn flush(&self) -> Result<(), u32> {
        // SAFETY: the handle is open.
        if unsafe { FlushFileBuffers(self.raw()) } != 0 {
            return Ok(());
        }
        // SAFETY: no pointers.
        Err(unsafe { GetLastError() })
    }

    /// A control request with `input` and no answer.
    pub(super) fn control<T: Copy>(&self, control: u32, input: &T) -> Result<(), u32> {
        let bytes = u32::try_from(size_of::<T>()).unwrap_or(u32::MAX);
        self.request(0, |handle, state| {
            // SAFETY: `input` lives until the request is over and is as long as said; there is no output.
            unsafe {
                DeviceIoControl(
                    handle,
                    control,
                    ptr::from_ref(input).cast(),
                    bytes,
                    ptr::null_mut(),
                    0,
                    ptr::null_mut(),
                    state,
                )
            }
        })
        .map(|_| ())
    }
}

impl SectorIo for OverlappedFile {
    fn read_sectors(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let (mut rest, mut at) = (buffer, offset);
        while !rest.is_empty() {
            let length = rest.len().min(REQUEST_BYTES);
            let whole = self.check_whole(rest, at);
            let target = rest.as_mut_ptr();
            let moved = whole.and_then(|()| {
                self.request(at, |handle, state| {
                    // SAFETY: `target` is writable for `length` bytes and stays so until the request is over.
                    unsafe { ReadFile(handle, target, as_u32(length), ptr::null_mut(), state) }
                })
            });
            let moved = match moved {
                Ok(0) => Err(ERROR_HANDLE_EOF),
                other => other,
            };
            let moved = moved.map_err(|code| self.failed("read", at, length, code))?.min(length);
            at = at.saturating_add(moved as u64);
            rest = rest.get_mut(moved..).unwrap_or_default();
        }
        Ok(())
    }

    fn write_sectors(&self, data: &[u8], offset: u64) -> Result<()> {
        let (mut rest, mut at) = (data, offset);
        while !rest.is_empty() {
            let length = rest.len().min(REQUEST_BYTES);
            let source = rest.as_ptr();
            let whole = self.check_whole(rest, at);
            let moved = whole.and_then(|()| {
                self.request(at, |handle, state| {
                    // SAFETY: `source` is readable for `length` bytes and stays so until the request is over.
                    unsafe { WriteFile(handle, source, as_u32(length), ptr::null_mut(), state) }
                })
            });
            let moved = match moved {
                Ok(0) => Err(ERROR_HANDLE_EOF),
                other => other,
            };
            let moved = moved.map_err(|code| self.failed("write", at, length, code))?.min(length);
            at = at.saturating_add(moved as u64);
            rest = rest.get(moved..).unwrap_or_default();
        }
        Ok(())
    }
}

fn halves(offset: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = offset.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}

/// A length that is at most [`REQUEST_BYTES`].
fn as_u32(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}
