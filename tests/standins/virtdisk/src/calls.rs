//! The exported functions. All pointers come from a caller who keeps to the documentation.

use crate::faults::Faults;
use crate::registry::{self, Opened};
use crate::{content, describe, tracking};
use std::ffi::{OsString, c_void};
use std::os::windows::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use vmtide_block::ByteRange;
use vmtide_image::{CreateOptions, Format, create_image};
use windows_sys::Win32::Foundation::{
    ERROR_FILE_EXISTS, ERROR_INSUFFICIENT_BUFFER, ERROR_INVALID_PARAMETER, ERROR_IO_PENDING,
    ERROR_NOT_READY, ERROR_SUCCESS, HANDLE,
};
use windows_sys::Win32::Storage::Vhd;
use windows_sys::core::{PCWSTR, PWSTR};

/// Where the union of the information structure begins.
const PAYLOAD: usize = 8;

fn code(result: Result<(), u32>) -> u32 {
    match result {
        Ok(()) => ERROR_SUCCESS,
        Err(code) => code,
    }
}

/// # Safety
/// `text` points to UTF-16 with a zero at its end.
unsafe fn string(text: PCWSTR) -> OsString {
    let mut length = 0;
    // SAFETY: there is a zero at the end, which the loop does not pass.
    while unsafe { *text.add(length) } != 0 {
        length += 1;
    }
    // SAFETY: as many units are there.
    OsString::from_wide(unsafe { std::slice::from_raw_parts(text, length) })
}

#[unsafe(no_mangle)]
unsafe extern "system" fn OpenVirtualDisk(
    _kind: *const Vhd::VIRTUAL_STORAGE_TYPE,
    path: PCWSTR,
    access: Vhd::VIRTUAL_DISK_ACCESS_MASK,
    flags: Vhd::OPEN_VIRTUAL_DISK_FLAG,
    parameters: *const Vhd::OPEN_VIRTUAL_DISK_PARAMETERS,
    handle: *mut HANDLE,
) -> u32 {
    // SAFETY: the caller's pointers are valid; version 2, which is checked, has these fields.
    let (image, info_only, read_only) = unsafe {
        if (*parameters).Version != Vhd::OPEN_VIRTUAL_DISK_VERSION_2 || access != 0 {
            return ERROR_INVALID_PARAMETER;
        }
        let version2 = (*parameters).Anonymous.Version2;
        (PathBuf::from(string(path)), version2.GetInfoOnly != 0, version2.ReadOnly != 0)
    };
    let open = || {
        let faults = Faults::now();
        faults.code("open.error")?;
        if !read_only {
            faults.code("open.write_error")?;
        }
        let is_child = describe::info(&image)?.backing.is_some();
        let with_parents = flags & Vhd::OPEN_VIRTUAL_DISK_FLAG_NO_PARENTS == 0;
        if with_parents && is_child {
            faults.code("open.parents_error")?;
        }
        if with_parents {
            // The chain is complete, or it does not open; also for information only.
            vmtide_image::open_read_only(&image, &content::image_options())
                .map_err(|error| content::code_of(&error))?;
        }
        let (opened, content) = content::new_handle()?;
        let writable = !read_only && !info_only;
        registry::add(
            opened,
            Opened { image, content, with_parents, writable, attached: false, pending: 0 },
        );
        // SAFETY: the caller's variable.
        unsafe { *handle = opened };
        Ok(())
    };
    code(open())
}

#[unsafe(no_mangle)]
unsafe extern "system" fn GetVirtualDiskInformation(
    handle: HANDLE,
    size: *mut u32,
    info: *mut Vhd::GET_VIRTUAL_DISK_INFO,
    used: *mut u32,
) -> u32 {
    static COMPLAINED: AtomicBool = AtomicBool::new(false);
    // SAFETY: the caller's structure begins with its version.
    let version = unsafe { (*info).Version };
    let answer = || {
        let faults = Faults::now();
        let payload = describe::payload(&registry::get(handle)?, version, &faults)?;
        let length = PAYLOAD + payload.len();
        let needed = u32::try_from(length).map_err(|_| ERROR_INVALID_PARAMETER)?;
        let refuse = version == Vhd::GET_VIRTUAL_DISK_INFO_CHANGE_TRACKING_STATE
            && faults.is_on("tracking.buffer")
            && !COMPLAINED.swap(true, Ordering::SeqCst);
        // SAFETY: `size` is the caller's; it says how many bytes may be written.
        unsafe {
            if *size < needed || refuse {
                *size = needed;
                return Err(ERROR_INSUFFICIENT_BUFFER);
            }
            let target = info.cast::<u8>().add(PAYLOAD);
            target.copy_from_nonoverlapping(payload.as_ptr(), payload.len());
            if !used.is_null() {
                *used = needed;
            }
        }
        COMPLAINED.store(false, Ordering::SeqCst);
        Ok(())
    };
    code(answer())
}

#[unsafe(no_mangle)]
unsafe extern "system" fn SetVirtualDiskInformation(
    handle: HANDLE,
    info: *const Vhd::SET_VIRTUAL_DISK_INFO,
) -> u32 {
    // SAFETY: the caller's structure; version 6, which is checked, has this field.
    let enabled = unsafe {
        if (*info).Version != Vhd::SET_VIRTUAL_DISK_INFO_CHANGE_TRACKING_STATE {
            return ERROR_INVALID_PARAMETER;
        }
        (*info).Anonymous.ChangeTrackingEnabled != 0
    };
    code(registry::get(handle).and_then(|disk| tracking::set(&disk.image, enabled)))
}

/// Of every `distance` bytes the first half, as far as it begins in `asked`: at most a few more than an array takes.
fn every_other_half(asked: ByteRange, distance: u64) -> Vec<ByteRange> {
    let first = asked.offset.div_ceil(distance.max(2));
    let starts = (first..).map(|number| number.saturating_mul(distance.max(2)));
    let inside = starts.take_while(|start| *start < asked.end()).take(5000);
    inside.map(|start| ByteRange::new(start, distance / 2)).collect()
}

#[unsafe(no_mangle)]
unsafe extern "system" fn QueryChangesVirtualDisk(
    handle: HANDLE,
    id: PCWSTR,
    offset: u64,
    length: u64,
    _flags: Vhd::QUERY_CHANGES_VIRTUAL_DISK_FLAG,
    ranges: *mut Vhd::QUERY_CHANGES_VIRTUAL_DISK_RANGE,
    count: *mut u32,
    processed: *mut u64,
) -> u32 {
    let answer = || {
        let faults = Faults::now();
        faults.code("query.error")?;
        let disk = registry::get(handle)?;
        let asked = ByteRange::new(offset, length);
        // SAFETY: the caller's string.
        let id = unsafe { string(id) };
        let id = tracking::unpadded(&id.to_string_lossy(), &faults);
        let mut changed = tracking::changes(&disk.image, &id, asked)?;
        if let Some(distance) = faults.value("query.every") {
            changed = every_other_half(asked, distance);
        }
        // SAFETY: the caller's variable: the length of the array.
        let capacity = unsafe { *count } as usize;
        let capacity =
            faults.value("query.capacity").map_or(capacity, |n| capacity.min(n as usize));
        let mut done = length;
        if changed.len() > capacity {
            changed.truncate(capacity);
            done = changed.last().map_or(0, |range| range.end() - offset);
        }
        if faults.is_on("query.outside") && changed.len() < capacity {
            changed.push(ByteRange::new(1 << 60, 4096));
        }
        if faults.is_on("query.short") {
            done = done.min(length.div_ceil(2));
        }
        let done = faults.value("query.processed").unwrap_or(done);
        let filled = faults.value("query.count").unwrap_or(changed.len() as u64);
        for (index, range) in changed.iter().enumerate() {
            // SAFETY: no more elements than the caller's array has.
            unsafe {
                *ranges.add(index) = Vhd::QUERY_CHANGES_VIRTUAL_DISK_RANGE {
                    ByteOffset: range.offset,
                    ByteLength: range.length,
                    Reserved: 0,
                };
            }
        }
        // SAFETY: the caller's variables.
        unsafe {
            *count = u32::try_from(filled).unwrap_or(u32::MAX);
            *processed = done;
        }
        Ok(())
    };
    code(answer())
}

#[unsafe(no_mangle)]
unsafe extern "system" fn AttachVirtualDisk(
    handle: HANDLE,
    _security: *mut c_void,
    flags: Vhd::ATTACH_VIRTUAL_DISK_FLAG,
    _provider_flags: u32,
    _parameters: *const Vhd::ATTACH_VIRTUAL_DISK_PARAMETERS,
    _overlapped: *const c_void,
) -> u32 {
    let attach = || {
        let faults = Faults::now();
        faults.code("attach.error")?;
        let through_handle = flags & Vhd::ATTACH_VIRTUAL_DISK_FLAG_NO_LOCAL_HOST != 0;
        if through_handle {
            faults.code("attach.handle_error")?;
        }
        let disk = registry::get(handle)?;
        if !disk.writable && flags & Vhd::ATTACH_VIRTUAL_DISK_FLAG_READ_ONLY == 0 {
            return Err(ERROR_INVALID_PARAMETER);
        }
        registry::attach(handle)?;
        if through_handle && faults.is_on("attach.handle_unreadable") {
            return Ok(());
        }
        content::fill(&disk.image, &disk.content).inspect_err(|_| registry::detach(handle))
    };
    code(attach())
}

#[unsafe(no_mangle)]
unsafe extern "system" fn DetachVirtualDisk(
    handle: HANDLE,
    _flags: Vhd::DETACH_VIRTUAL_DISK_FLAG,
    _provider_flags: u32,
) -> u32 {
    let detach = || {
        let disk = registry::get(handle)?;
        if !disk.attached {
            return Err(ERROR_NOT_READY);
        }
        let written = if disk.writable && !disk_is_empty(&disk) {
            content::write_back(&disk.image, &disk.content)
        } else {
            Ok(())
        };
        let emptied = content::empty(&disk.content);
        registry::detach(handle);
        written.and(emptied)
    };
    code(detach())
}

fn disk_is_empty(disk: &Opened) -> bool {
    std::fs::metadata(&disk.content).is_ok_and(|metadata| metadata.len() == 0)
}

#[unsafe(no_mangle)]
unsafe extern "system" fn GetVirtualDiskPhysicalPath(
    handle: HANDLE,
    bytes: *mut u32,
    path: PWSTR,
) -> u32 {
    let answer = || {
        let disk = registry::get(handle)?;
        if !disk.attached {
            return Err(ERROR_NOT_READY);
        }
        let units: Vec<u16> = disk.content.as_os_str().encode_wide().chain([0]).collect();
        let needed = u32::try_from(units.len() * 2).map_err(|_| ERROR_INVALID_PARAMETER)?;
        // SAFETY: the caller's variable says how many bytes the buffer has.
        unsafe {
            if *bytes < needed {
                *bytes = needed;
                return Err(ERROR_INSUFFICIENT_BUFFER);
            }
            *bytes = needed;
            path.copy_from_nonoverlapping(units.as_ptr(), units.len());
        }
        Ok(())
    };
    code(answer())
}

#[unsafe(no_mangle)]
unsafe extern "system" fn CreateVirtualDisk(
    kind: *const Vhd::VIRTUAL_STORAGE_TYPE,
    path: PCWSTR,
    access: Vhd::VIRTUAL_DISK_ACCESS_MASK,
    _security: *mut c_void,
    flags: Vhd::CREATE_VIRTUAL_DISK_FLAG,
    _provider_flags: u32,
    parameters: *const Vhd::CREATE_VIRTUAL_DISK_PARAMETERS,
    overlapped: *const c_void,
    handle: *mut HANDLE,
) -> u32 {
    // SAFETY: the caller's pointers are valid; version 2, which is checked, has these fields.
    let (image, device, new) = unsafe {
        if (*parameters).Version != Vhd::CREATE_VIRTUAL_DISK_VERSION_2 || access != 0 {
            return ERROR_INVALID_PARAMETER;
        }
        (PathBuf::from(string(path)), (*kind).DeviceId, (*parameters).Anonymous.Version2)
    };
    let create = || {
        let faults = Faults::now();
        faults.code("create.error")?;
        let format = match device {
            Vhd::VIRTUAL_STORAGE_TYPE_DEVICE_VHD => Format::Vhd,
            Vhd::VIRTUAL_STORAGE_TYPE_DEVICE_VHDX => Format::Vhdx,
            _ => return Err(ERROR_INVALID_PARAMETER),
        };
        if image.exists() {
            return Err(ERROR_FILE_EXISTS);
        }
        let mut options = CreateOptions::new(format, new.MaximumSize);
        if flags & Vhd::CREATE_VIRTUAL_DISK_FLAG_FULL_PHYSICAL_ALLOCATION != 0 {
            options.subformat = Some("fixed".to_owned());
        }
        if new.SectorSizeInBytes != 0 && format == Format::Vhdx {
            options.logical_sector_bytes = Some(new.SectorSizeInBytes);
        }
        create_image(&image, &options)
            .and_then(|writer| writer.finish())
            .map_err(|error| content::code_of(&error))?;
        let (opened, content) = content::new_handle()?;
        let with_parents = true;
        registry::add(
            opened,
            Opened { image, content, with_parents, writable: true, attached: false, pending: 0 },
        );
        // SAFETY: the caller's variable.
        unsafe { *handle = opened };
        match faults.value("create.pending") {
            Some(looks) if !overlapped.is_null() => {
                registry::make_pending(opened, looks);
                Err(ERROR_IO_PENDING)
            }
            _ => Ok(()),
        }
    };
    code(create())
}

#[unsafe(no_mangle)]
unsafe extern "system" fn GetVirtualDiskOperationProgress(
    handle: HANDLE,
    _overlapped: *const c_void,
    progress: *mut Vhd::VIRTUAL_DISK_PROGRESS,
) -> u32 {
    let answer = || {
        let status = if registry::is_pending(handle)? { ERROR_IO_PENDING } else { ERROR_SUCCESS };
        // SAFETY: the caller's structure.
        unsafe { (*progress).OperationStatus = status };
        Ok(())
    };
    code(answer())
}
