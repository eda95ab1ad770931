//! The functions that the daemon calls. Each looks at its pointers, finds the job, and catches what must
//! not cross into C.

use crate::abi::{
    DaemonFunctions, DaemonInfo, Event, INTERFACE_VERSION, IoPacket, LICENSE, MAGIC, PluginContext,
    PluginFunctions, PluginInfo, RestoreObjectPacket, RestorePacket, SavePacket, event, rc,
};
use crate::core::{Core, set_functions};
use crate::job::{Job, Purpose, is_cancelled, of_context, text_of};
use std::ffi::{c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;

#[allow(clippy::cast_possible_truncation, reason = "the size of a structure, held by an assertion")]
static INFO: PluginInfo = PluginInfo {
    size: size_of::<PluginInfo>() as u32,
    version: INTERFACE_VERSION,
    magic: MAGIC.as_ptr(),
    license: LICENSE.as_ptr(),
    author: c"The vmtide developers".as_ptr(),
    date: c"2026-11-21".as_ptr(),
    plugin_version: concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast(),
    description: c"Virtual machines by their changed blocks, through vmtide".as_ptr(),
};

#[allow(clippy::cast_possible_truncation, reason = "the size of a structure, held by an assertion")]
static FUNCTIONS: PluginFunctions = PluginFunctions {
    size: size_of::<PluginFunctions>() as u32,
    version: INTERFACE_VERSION,
    new_plugin,
    free_plugin,
    get_value: no_value,
    set_value: no_value,
    handle_event,
    start_backup_file,
    end_backup_file,
    start_restore_file,
    end_restore_file,
    plugin_io,
    create_file,
    set_attributes,
    optional: [std::ptr::null(); 8],
};

/// Called by the daemon once, when it starts.
///
/// # Safety
/// The daemon's calling convention: pointers to its own tables, and places for ours.
#[allow(non_snake_case, reason = "the name that the daemon looks for")]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loadPlugin(
    daemon: *mut DaemonInfo,
    functions: *mut DaemonFunctions,
    info_out: *mut *const PluginInfo,
    functions_out: *mut *const PluginFunctions,
) -> c_int {
    // SAFETY: the daemon's own tables, which are static in it.
    let (version, size) = unsafe {
        match (daemon.as_ref(), functions.as_ref()) {
            (Some(daemon), Some(functions)) => (daemon.version, functions.size),
            _ => return rc::ERROR,
        }
    };
    let is_known = version == INTERFACE_VERSION && size as usize >= size_of::<DaemonFunctions>();
    if !is_known || info_out.is_null() || functions_out.is_null() {
        return rc::ERROR;
    }
    set_functions(functions);
    // SAFETY: the daemon's places, looked at above.
    unsafe {
        *info_out = &raw const INFO;
        *functions_out = &raw const FUNCTIONS;
    }
    rc::OK
}

/// Called by the daemon once, when it ends.
#[allow(non_snake_case, reason = "the name that the daemon looks for")]
#[unsafe(no_mangle)]
pub extern "C" fn unloadPlugin() -> c_int {
    rc::OK
}

/// Does `work` for the job of a context. A panic is a failure of the job, and not of the daemon.
///
/// # Safety
/// As [`of_context`].
unsafe fn with_job(context: *mut PluginContext, work: impl FnOnce(Core, &Job) -> i32) -> c_int {
    // SAFETY: as promised by the caller.
    let Some(job) = (unsafe { of_context(context) }) else { return rc::ERROR };
    let core = Core::new(context);
    catch_unwind(AssertUnwindSafe(|| work(core, job))).unwrap_or_else(|_| {
        core.fatal("an error inside the plugin: please report it");
        rc::ERROR
    })
}

unsafe extern "C" fn new_plugin(context: *mut PluginContext) -> c_int {
    let made = catch_unwind(|| Box::into_raw(Box::new(Job::new())));
    // SAFETY: the daemon's context, for this call.
    match (unsafe { context.as_mut() }, made) {
        (Some(context), Ok(job)) => {
            context.plugin = job.cast::<c_void>();
            rc::OK
        }
        (None, Ok(job)) => {
            // SAFETY: made above and given to nobody.
            drop(unsafe { Box::from_raw(job) });
            rc::ERROR
        }
        (_, Err(_)) => rc::ERROR,
    }
}

unsafe extern "C" fn free_plugin(context: *mut PluginContext) -> c_int {
    // SAFETY: the daemon's context, for this call.
    let Some(place) = (unsafe { context.as_mut() }) else { return rc::ERROR };
    if place.plugin.is_null() {
        return rc::OK;
    }
    // SAFETY: the context is the one that the job was made for.
    unsafe {
        with_job(context, |core, job| {
            job.state().finish(core, is_cancelled(job));
            rc::OK
        });
    }
    // SAFETY: as above; nobody uses the job after this call.
    let job = unsafe { Box::from_raw(place.plugin.cast::<Job>()) };
    place.plugin = std::ptr::null_mut();
    match catch_unwind(AssertUnwindSafe(|| drop(job))) {
        Ok(()) => rc::OK,
        Err(_) => rc::ERROR,
    }
}

unsafe extern "C" fn no_value(_: *mut PluginContext, _: c_int, _: *mut c_void) -> c_int {
    rc::OK
}

unsafe extern "C" fn handle_event(
    context: *mut PluginContext,
    event: *mut Event,
    value: *mut c_void,
) -> c_int {
    // SAFETY: the daemon's event, for this call.
    let Some(kind) = (unsafe { event.as_ref() }).map(|event| event.kind) else { return rc::ERROR };
    if kind == event::CANCEL_COMMAND {
        // On another thread, while the job's own is at work: nothing but the flag is touched.
        // SAFETY: the daemon calls with the context of a job that has not ended.
        if let Some(job) = unsafe { of_context(context) } {
            job.cancelled.store(true, Ordering::Relaxed);
        }
        return rc::OK;
    }
    // SAFETY: the daemon calls with the context of a job that has not ended.
    unsafe { with_job(context, |core, job| on_event(core, job, kind, value)) }
}

fn on_event(core: Core, job: &Job, kind: u32, value: *mut c_void) -> i32 {
    let mut state = job.state();
    match kind {
        event::LEVEL => {
            let letter = u8::try_from(value as usize & 0xff).unwrap_or(0);
            state.set_level(char::from(letter));
            rc::OK
        }
        event::SINCE => {
            state.set_since(i64::try_from(value as usize).unwrap_or(0));
            rc::OK
        }
        event::BACKUP_COMMAND => {
            state.begin(core, job, Purpose::Backup, &text_of(value.cast::<c_char>()))
        }
        event::ESTIMATE_COMMAND => {
            state.begin(core, job, Purpose::Estimate, &text_of(value.cast::<c_char>()))
        }
        event::RESTORE_OBJECT => {
            // SAFETY: the daemon gives a packet, or null after the last one.
            if let Some(packet) = unsafe { value.cast::<RestoreObjectPacket>().as_ref() } {
                if packet.is_sound() {
                    state.keep_object(core, packet);
                } else {
                    core.fatal("the daemon's packet of a restore object has an unknown size");
                    return rc::ERROR;
                }
            }
            rc::OK
        }
        event::END_BACKUP_JOB | event::END_RESTORE_JOB | event::JOB_END => {
            state.finish(core, is_cancelled(job));
            rc::OK
        }
        _ => rc::OK,
    }
}

unsafe extern "C" fn start_backup_file(
    context: *mut PluginContext,
    packet: *mut SavePacket,
) -> c_int {
    // SAFETY: the daemon's packet, for this call.
    let Some(packet) = (unsafe { packet.as_mut() }) else { return rc::ERROR };
    // SAFETY: the daemon calls with the context of a job that has not ended.
    unsafe {
        with_job(context, |core, job| {
            if !packet.is_sound() {
                core.fatal("the daemon's packet of a file has an unknown size");
                return rc::ERROR;
            }
            job.state().start_backup_file(core, packet)
        })
    }
}

unsafe extern "C" fn end_backup_file(context: *mut PluginContext) -> c_int {
    // SAFETY: the daemon calls with the context of a job that has not ended.
    unsafe { with_job(context, |_, job| if is_cancelled(job) { rc::ERROR } else { rc::MORE }) }
}

unsafe extern "C" fn start_restore_file(
    context: *mut PluginContext,
    command: *mut c_char,
) -> c_int {
    // SAFETY: the daemon calls with the context of a job that has not ended.
    unsafe {
        with_job(context, |core, job| {
            // A failure here would have the daemon restore the stream as a plain file: it is told as fatal,
            // and no file is made.
            job.state().start_restore_file(core, job, &text_of(command));
            rc::OK
        })
    }
}

unsafe extern "C" fn end_restore_file(_: *mut PluginContext) -> c_int {
    rc::OK
}

unsafe extern "C" fn plugin_io(context: *mut PluginContext, packet: *mut IoPacket) -> c_int {
    // SAFETY: the daemon's packet, for this call.
    let Some(packet) = (unsafe { packet.as_mut() }) else { return rc::ERROR };
    // SAFETY: the daemon calls with the context of a job that has not ended.
    unsafe {
        with_job(context, |core, job| {
            if !packet.is_sound() {
                packet.status = -1;
                core.fatal("the daemon's packet of input and output has an unknown size");
                return rc::ERROR;
            }
            job.state().io(core, packet)
        })
    }
}

unsafe extern "C" fn create_file(context: *mut PluginContext, packet: *mut RestorePacket) -> c_int {
    // SAFETY: the daemon's packet, for this call.
    let Some(packet) = (unsafe { packet.as_mut() }) else { return rc::ERROR };
    // SAFETY: the daemon calls with the context of a job that has not ended.
    unsafe {
        with_job(context, |core, job| {
            if !packet.is_sound() {
                core.fatal("the daemon's packet of a file to restore has an unknown size");
                return rc::ERROR;
            }
            job.state().create_file(core, packet)
        })
    }
}

/// The backend sets what is to be set.
unsafe extern "C" fn set_attributes(_: *mut PluginContext, _: *mut RestorePacket) -> c_int {
    rc::OK
}
