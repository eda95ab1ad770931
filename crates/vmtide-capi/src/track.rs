//! Disks of agents, and change tracking: switching it on, sealing a moment, asking what changed since.

use crate::args::{self, Out, Range, Structure};
use crate::guard::{answer, call};
use crate::handle::{self, Object, OpenImage};
use crate::image::enter;
use crate::job::json;
use crate::status::{Failure, Result, Status};
use std::ffi::{c_char, c_void};
use std::path::Path;
use std::sync::Arc;
use vmtide_agent_client::{AgentClient, AgentKey, AgentOptions, AgentUrl};
use vmtide_block::{CancelToken, RangeSet};
use vmtide_engine::track::{changed_ranges, seal_moment, set_tracking, tracking_state};

const AGENT_COMPRESS: u32 = 1;

/// The longest key taken, in bytes.
const MAX_KEY_BYTES: u64 = 4096;

/// `vmtide_agent_options`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Agent {
    struct_size: u64,
    key: *const c_void,
    key_length: u64,
    fingerprint: *const c_char,
    ca_file: *const c_char,
    flags: u32,
    reserved: u32,
}

// SAFETY: `repr(C)`, begins with its size, and numbers and pointers may be zero.
unsafe impl Structure for Agent {}

/// How an agent is reached.
///
/// # Safety
/// As vmtide.h says of `vmtide_agent_options`.
pub(crate) unsafe fn agent_options(options: *const Agent) -> Result<AgentOptions> {
    // SAFETY: by this function's own contract; all members may be zero.
    let options = unsafe { args::options(options, "vmtide_agent_options") }?;
    args::check_flags(options.flags, AGENT_COMPRESS, "vmtide_agent_options")?;
    if options.key_length > MAX_KEY_BYTES {
        return Err(Failure::invalid(format!("a key of {} bytes is none", options.key_length)));
    }
    // SAFETY: strings and bytes as the header says, by this function's own contract.
    let (key, fingerprint, ca_file) = unsafe {
        (
            args::bytes(options.key.cast(), options.key_length, "key")?,
            args::optional_string(options.fingerprint, "fingerprint")?,
            args::optional_string(options.ca_file, "ca_file")?,
        )
    };
    let key = match std::str::from_utf8(key) {
        Ok("") => None,
        Ok(key) => Some(AgentKey::new(key)?),
        Err(_) => return Err(Failure::invalid("key is not UTF-8")),
    };
    Ok(AgentOptions {
        key,
        fingerprint: fingerprint.map(|text| text.parse()).transpose()?,
        ca_file: ca_file.map(Into::into),
        compress: options.flags & AGENT_COMPRESS != 0,
        ..AgentOptions::default()
    })
}

/// Where a tracked disk is.
enum Tracked {
    /// An image on this host.
    Image(String),
    /// One disk of an agent's host.
    Agent(AgentClient, String),
}

impl Tracked {
    /// Takes a path, or the URL of one disk of an agent.
    ///
    /// # Safety
    /// As vmtide.h says of `vmtide_agent_options`; `source` is null or ends with a 0.
    unsafe fn read(source: *const c_char, agent: *const Agent) -> Result<Self> {
        // SAFETY: by this function's own contract.
        let (source, options) = unsafe { (args::string(source, "source")?, agent_options(agent)?) };
        if !AgentUrl::is_agent_url(&source) {
            return Ok(Self::Image(source));
        }
        let url = AgentUrl::parse(&source)?;
        match url.paths() {
            [path] => Ok(Self::Agent(AgentClient::new(&url, &options)?, path.clone())),
            _ => Err(Failure::invalid(
                "source names several disks: give one, each has ids of its own",
            )),
        }
    }
}

/// `vmtide_agent_open_disk`.
///
/// # Safety
/// As vmtide.h says: strings end with a 0, structures are as long as they say, and what is not null
/// may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_agent_open_disk(
    url: *const c_char,
    agent: *const Agent,
    image: *mut u64,
    error: *mut u64,
) -> i32 {
    call(error, || {
        // SAFETY: by this function's own contract.
        let (place, disk) = unsafe { (Out::new(image, "image")?, Tracked::read(url, agent)?) };
        let Tracked::Agent(client, path) = disk else {
            return Err(Failure::invalid(
                "url is none of an agent's disk: agent+https://HOST/PATH",
            ));
        };
        let device = Arc::new(client.open(&path, &CancelToken::new())?);
        place.set(enter(OpenImage::reading(device, None)));
        Ok(())
    })
}

/// `vmtide_tracking_state`.
///
/// # Safety
/// As [`vmtide_agent_open_disk`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_tracking_state(
    source: *const c_char,
    agent: *const Agent,
    state: *mut u64,
    error: *mut u64,
) -> i32 {
    call(error, || {
        // SAFETY: by this function's own contract.
        let (place, disk) = unsafe { (Out::new(state, "state")?, Tracked::read(source, agent)?) };
        place.set(match disk {
            Tracked::Image(path) => json(&tracking_state(Path::new(&path))?)?,
            Tracked::Agent(client, path) => json(&client.tracking(&path, &CancelToken::new())?)?,
        });
        Ok(())
    })
}

/// `vmtide_tracking_enable`.
///
/// # Safety
/// As [`vmtide_agent_open_disk`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_tracking_enable(
    source: *const c_char,
    agent: *const Agent,
    enable: i32,
    error: *mut u64,
) -> i32 {
    call(error, || {
        // SAFETY: by this function's own contract.
        match unsafe { Tracked::read(source, agent) }? {
            Tracked::Image(path) => set_tracking(Path::new(&path), enable != 0)?,
            Tracked::Agent(client, path) => {
                client.set_tracking(&path, enable != 0, &CancelToken::new())?;
            }
        }
        Ok(())
    })
}

/// `vmtide_tracking_checkpoint`.
///
/// # Safety
/// As [`vmtide_agent_open_disk`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_tracking_checkpoint(
    path: *const c_char,
    id: *mut u64,
    error: *mut u64,
) -> i32 {
    call(error, || {
        // SAFETY: by this function's own contract.
        let (place, path) = unsafe { (Out::new(id, "id")?, args::string(path, "path")?) };
        place.set(handle::new_text(&seal_moment(Path::new(&path))?));
        Ok(())
    })
}

/// `vmtide_tracking_changes`.
///
/// # Safety
/// As [`vmtide_agent_open_disk`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_tracking_changes(
    source: *const c_char,
    agent: *const Agent,
    since: *const c_char,
    changes: *mut u64,
    error: *mut u64,
) -> i32 {
    call(error, || {
        // SAFETY: by this function's own contract.
        let (place, disk, since) = unsafe {
            (
                Out::new(changes, "changes")?,
                Tracked::read(source, agent)?,
                args::string(since, "since")?,
            )
        };
        let ranges = match disk {
            Tracked::Image(path) => changed_ranges(Path::new(&path), &since)?,
            Tracked::Agent(client, path) => {
                let cancel = CancelToken::new();
                let size_bytes = client.info(&path, &cancel)?.virtual_size;
                client.changes(&path, &since, size_bytes, &cancel)?.map_err(|doubt| {
                    Failure::new(
                        Status::Failed,
                        format!("what changed is not known, read the disk in full: {doubt}"),
                    )
                })?
            }
        };
        place.set(new_ranges(&ranges));
        Ok(())
    })
}

/// Ranges for the caller.
pub(crate) fn new_ranges(ranges: &RangeSet) -> u64 {
    let ranges =
        ranges.iter().map(|range| Range { offset: range.offset, length: range.length }).collect();
    handle::open(Object::Ranges(Arc::new(ranges)))
}

/// `vmtide_ranges_data`.
#[unsafe(no_mangle)]
pub extern "C" fn vmtide_ranges_data(ranges: u64) -> *const Range {
    answer(std::ptr::null(), || match handle::get(ranges) {
        // The table holds them until the handle is closed.
        Some(Object::Ranges(ranges)) => ranges.as_ptr(),
        _ => std::ptr::null(),
    })
}

/// `vmtide_ranges_count`.
#[unsafe(no_mangle)]
pub extern "C" fn vmtide_ranges_count(ranges: u64) -> u64 {
    answer(0, || match handle::get(ranges) {
        Some(Object::Ranges(ranges)) => ranges.len() as u64,
        _ => 0,
    })
}
