//! Images: opening, reading, writing, extents; information; creation.

use crate::args::{self, Out, Structure};
use crate::guard::call;
use crate::handle::{self, Object, OpenImage, Writer};
use crate::status::{Failure, Result};
use std::ffi::{c_char, c_void};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmtide_block::{ByteRange, ExtentKind};
use vmtide_engine::ImageKind;
use vmtide_engine::image::create::{CreateJob, create};
use vmtide_engine::image::{DiskSpec, OpenDiskOptions, WritableDisk, open_disk};
use vmtide_engine::track::{HostOptions, host_image};
use vmtide_image::{BackingPolicy, Format, image_info};

const OPEN_WRITABLE: u32 = 1;
const OPEN_FORCE: u32 = 2;
pub(crate) const OPEN_ANY_PARENT: u32 = 4;
pub(crate) const OPEN_FOLLOW: u32 = 8;
const OPEN_TRACK: u32 = 16;
const OPEN_FLAGS: u32 = OPEN_WRITABLE | OPEN_FORCE | OPEN_ANY_PARENT | OPEN_FOLLOW | OPEN_TRACK;

pub(crate) const NEW_OVERWRITE: u32 = 1;
pub(crate) const NEW_IN_PLACE: u32 = 2;
pub(crate) const NEW_COMPRESS: u32 = 4;
pub(crate) const NEW_SYNC: u32 = 8;
pub(crate) const NEW_SALVAGE: u32 = 16;
pub(crate) const NEW_FORCE: u32 = 32;

/// The most extents that one call answers with, whatever the caller has room for.
const MAX_EXTENTS: usize = 1 << 20;

/// `vmtide_open_options`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct OpenOptions {
    pub(crate) struct_size: u64,
    pub(crate) format: *const c_char,
    snapshot: *const c_char,
    search: *const c_char,
    flags: u32,
    reserved: u32,
    backing_format: *const c_char,
}

// SAFETY: `repr(C)`, begins with its size, and numbers and pointers may be zero.
unsafe impl Structure for OpenOptions {
    const SIZES_BYTES: &'static [usize] =
        &[std::mem::offset_of!(Self, backing_format), size_of::<Self>()];
}

/// `vmtide_new_options`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct NewOptions {
    struct_size: u64,
    format: *const c_char,
    subformat: *const c_char,
    parent: *const c_char,
    block_size_bytes: u64,
    flags: u32,
    workers: u32,
}

// SAFETY: `repr(C)`, begins with its size, and numbers and pointers may be zero.
unsafe impl Structure for NewOptions {}

/// `vmtide_extent`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Extent {
    offset: u64,
    length: u64,
    kind: u32,
    reserved: u32,
}

/// A format by its name.
pub(crate) fn parse_format(name: Option<String>) -> Result<Option<Format>> {
    name.map(|name| name.parse().map_err(|error| Failure::invalid(format!("{error}")))).transpose()
}

/// How a disk is opened, and the flags.
///
/// # Safety
/// As vmtide.h says of `vmtide_open_options`.
pub(crate) unsafe fn open_options(options: *const OpenOptions) -> Result<(OpenDiskOptions, u32)> {
    // SAFETY: by this function's own contract; all members may be zero.
    let options = unsafe { args::options(options, "vmtide_open_options") }?;
    args::check_flags(options.flags, OPEN_FLAGS, "vmtide_open_options")?;
    // SAFETY: strings as the header says, by this function's own contract.
    let (format, snapshot, search, backing_format) = unsafe {
        (
            args::optional_string(options.format, "format")?,
            args::optional_string(options.snapshot, "snapshot")?,
            args::optional_string(options.search, "search")?,
            args::optional_string(options.backing_format, "backing_format")?,
        )
    };
    let open = OpenDiskOptions {
        format: parse_format(format)?,
        backing: (options.flags & OPEN_FOLLOW != 0).then_some(BackingPolicy::Allow),
        backing_format: parse_format(backing_format)?,
        search: search.into_iter().map(PathBuf::from).collect(),
        any_parent: options.flags & OPEN_ANY_PARENT != 0,
        snapshot,
    };
    Ok((open, options.flags))
}

/// What a new image is like.
pub(crate) struct New {
    pub kind: ImageKind,
    pub parent: Option<PathBuf>,
    pub flags: u32,
    pub workers: Option<usize>,
}

/// The options of a new image; `known` are the flags that make sense.
///
/// # Safety
/// As vmtide.h says of `vmtide_new_options`.
pub(crate) unsafe fn new_options(options: *const NewOptions, known: u32) -> Result<New> {
    // SAFETY: by this function's own contract; all members may be zero.
    let options = unsafe { args::options(options, "vmtide_new_options") }?;
    args::check_flags(options.flags, known, "vmtide_new_options")?;
    // SAFETY: strings as the header says, by this function's own contract.
    let (format, subformat, parent) = unsafe {
        (
            args::optional_string(options.format, "format")?,
            args::optional_string(options.subformat, "subformat")?,
            args::optional_string(options.parent, "parent")?,
        )
    };
    let kind = ImageKind {
        format: parse_format(format)?,
        subformat,
        block_size_bytes: (options.block_size_bytes != 0).then_some(options.block_size_bytes),
        compress: options.flags & NEW_COMPRESS != 0,
        ..ImageKind::default()
    };
    let parent = parent.map(PathBuf::from);
    Ok(New { kind, parent, flags: options.flags, workers: workers(options.workers) })
}

/// The number of workers that the caller wants; none suits the machine.
pub(crate) fn workers(number: u32) -> Option<usize> {
    (number != 0).then(|| usize::try_from(number).unwrap_or(usize::MAX).min(256))
}

/// Enters an open image into the table.
pub(crate) fn enter(image: OpenImage) -> u64 {
    handle::open(Object::Image(Arc::new(image)))
}

/// `vmtide_image_open`.
///
/// # Safety
/// As vmtide.h says: strings end with a 0, structures are as long as they say, and what is not null
/// may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_image_open(
    source: *const c_char,
    options: *const OpenOptions,
    image: *mut u64,
    error: *mut u64,
) -> i32 {
    call(error, || {
        // SAFETY: by this function's own contract.
        let (place, source, (options, flags)) = unsafe {
            (Out::new(image, "image")?, args::string(source, "source")?, open_options(options)?)
        };
        let spec = DiskSpec::parse(&source)?;
        let force = flags & OPEN_FORCE != 0;
        let opened = match (flags & OPEN_TRACK != 0, flags & OPEN_WRITABLE != 0, &spec) {
            (true, true, DiskSpec::Path(path)) => {
                let hosted = host_image(path, &options, force, &HostOptions::default())?;
                OpenImage::writing(Writer::Tracked(hosted))
            }
            (true, ..) => {
                return Err(Failure::invalid(
                    "VMTIDE_OPEN_TRACK is for images that are open with VMTIDE_OPEN_WRITABLE",
                ));
            }
            (false, true, spec) => {
                OpenImage::writing(Writer::Plain(WritableDisk::open(spec, &options, force)?))
            }
            (false, false, spec) => OpenImage::reading(open_disk(spec, &options)?.device, None),
        };
        place.set(enter(opened));
        Ok(())
    })
}

/// `vmtide_image_size`.
///
/// # Safety
/// As [`vmtide_image_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_image_size(
    image: u64,
    size_bytes: *mut u64,
    error: *mut u64,
) -> i32 {
    call(error, || {
        // SAFETY: by this function's own contract.
        let place = unsafe { Out::new(size_bytes, "size_bytes") }?;
        place.set(handle::image(image)?.device.size_bytes());
        Ok(())
    })
}

/// `vmtide_image_read`.
///
/// # Safety
/// As [`vmtide_image_open`]; `buffer` has `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_image_read(
    image: u64,
    offset: u64,
    buffer: *mut c_void,
    length: u64,
    error: *mut u64,
) -> i32 {
    call(error, || {
        let image = handle::image(image)?;
        // A length that is none is found before anything is believed of the buffer.
        image.device.check_range(ByteRange::new(offset, length))?;
        // SAFETY: by this function's own contract.
        let buffer = unsafe { args::buffer(buffer.cast(), length, "buffer") }?;
        Ok(image.device.read_at(buffer, offset)?)
    })
}

/// `vmtide_image_write`.
///
/// # Safety
/// As [`vmtide_image_open`]; `data` has `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_image_write(
    image: u64,
    offset: u64,
    data: *const c_void,
    length: u64,
    error: *mut u64,
) -> i32 {
    call(error, || {
        let image = handle::image(image)?;
        image.write(|writer| {
            image.device.check_range(ByteRange::new(offset, length))?;
            // SAFETY: by this function's own contract.
            let data = unsafe { args::bytes(data.cast(), length, "data") }?;
            Ok(writer.write_at(data, offset)?)
        })
    })
}

/// `vmtide_image_write_zeroes`.
///
/// # Safety
/// As [`vmtide_image_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_image_write_zeroes(
    image: u64,
    offset: u64,
    length: u64,
    error: *mut u64,
) -> i32 {
    call(error, || {
        let range = ByteRange::new(offset, length);
        handle::image(image)?.write(|writer| Ok(writer.write_zeroes(range)?))
    })
}

/// `vmtide_image_flush`.
///
/// # Safety
/// As [`vmtide_image_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_image_flush(image: u64, error: *mut u64) -> i32 {
    call(error, || handle::image(image)?.write(|writer| Ok(writer.flush()?)))
}

/// `vmtide_image_resize`.
///
/// # Safety
/// As [`vmtide_image_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_image_resize(image: u64, size_bytes: u64, error: *mut u64) -> i32 {
    call(error, || handle::image(image)?.write(|writer| Ok(writer.resize(size_bytes)?)))
}

/// `vmtide_image_extents`.
///
/// # Safety
/// As [`vmtide_image_open`]; `extents` has room for `capacity`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_image_extents(
    image: u64,
    offset: u64,
    length: u64,
    extents: *mut Extent,
    capacity: u64,
    count: *mut u64,
    error: *mut u64,
) -> i32 {
    call(error, || {
        // SAFETY: by this function's own contract.
        let place = unsafe { Out::new(count, "count") }?;
        let image = handle::image(image)?;
        let found = image.device.extents(ByteRange::new(offset, length))?;
        if extents.is_null() || capacity == 0 && !found.is_empty() {
            return Err(Failure::invalid("there is no room for any extent"));
        }
        let room = usize::try_from(capacity).unwrap_or(usize::MAX).min(MAX_EXTENTS);
        for (index, extent) in found.iter().take(room).enumerate() {
            let kind = match extent.kind {
                ExtentKind::Data => 1,
                ExtentKind::Zero => 2,
                ExtentKind::Unallocated => 3,
            };
            let (offset, length) = (extent.range.offset, extent.range.length);
            let extent = Extent { offset, length, kind, reserved: 0 };
            // SAFETY: `index` is below `capacity`, for which there is room by the contract.
            unsafe { extents.add(index).write_unaligned(extent) };
        }
        place.set(found.len().min(room) as u64);
        Ok(())
    })
}

/// `vmtide_image_info`.
///
/// # Safety
/// As [`vmtide_image_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_image_info(
    path: *const c_char,
    format: *const c_char,
    info: *mut u64,
    error: *mut u64,
) -> i32 {
    call(error, || {
        // SAFETY: by this function's own contract.
        let (place, path, format) = unsafe {
            (
                Out::new(info, "info")?,
                args::string(path, "path")?,
                args::optional_string(format, "format")?,
            )
        };
        let info = image_info(Path::new(&path), parse_format(format)?)?;
        place.set(crate::job::json(&info)?);
        Ok(())
    })
}

/// `vmtide_image_create`.
///
/// # Safety
/// As [`vmtide_image_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_image_create(
    path: *const c_char,
    size_bytes: u64,
    options: *const NewOptions,
    error: *mut u64,
) -> i32 {
    call(error, || {
        // SAFETY: by this function's own contract.
        let (path, new) = unsafe {
            (args::string(path, "path")?, new_options(options, NEW_OVERWRITE | NEW_FORCE)?)
        };
        create(&CreateJob {
            path: path.into(),
            size_bytes: (size_bytes != 0).then_some(size_bytes),
            kind: new.kind,
            parent: new.parent,
            open_parent: OpenDiskOptions::default(),
            overwrite: new.flags & NEW_OVERWRITE != 0,
            force: new.flags & NEW_FORCE != 0,
        })?;
        Ok(())
    })
}
