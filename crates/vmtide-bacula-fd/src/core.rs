//! The daemon, as a plugin sees it: its values and its messages, without raw pointers outside of here.

use crate::abi::{
    AccurateAttributes, DaemonFunctions, JobMessage, PluginContext, SavePacket, Stat, message,
    variable,
};
use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

/// The daemon's functions; set once, when the plugin is loaded.
static FUNCTIONS: AtomicPtr<DaemonFunctions> = AtomicPtr::new(std::ptr::null_mut());

/// The longest job message. The daemon formats into 2,000 bytes and would cut the line feed off.
const MAX_MESSAGE_BYTES: usize = 1900;

/// Keeps the daemon's functions for all jobs.
pub fn set_functions(functions: *mut DaemonFunctions) {
    FUNCTIONS.store(functions, Ordering::Release);
}

fn functions() -> Option<&'static DaemonFunctions> {
    // SAFETY: the daemon's table is static in it and outlives the plugin.
    unsafe { FUNCTIONS.load(Ordering::Acquire).as_ref() }
}

/// The daemon, for one job.
#[derive(Clone, Copy)]
pub struct Core(*mut PluginContext);

/// What the previous job knew of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Previous {
    /// The moment that the file showed: the 128 bits kept in two fields of its attributes.
    pub moment: (u64, u64),
    /// Its size in bytes.
    pub size: i64,
    /// Its number in the row of deltas.
    pub sequence: i32,
}

impl Core {
    /// For the job of this context, which is valid for as long as the caller's call lasts.
    pub const fn new(context: *mut PluginContext) -> Self {
        Self(context)
    }

    /// A string that the daemon knows; empty where it does not.
    pub fn text(self, what: i32) -> String {
        let mut value: *const c_char = std::ptr::null();
        if !self.get(what, (&raw mut value).cast()) || value.is_null() {
            return String::new();
        }
        // SAFETY: the daemon answers with a string that lives as long as the job.
        unsafe { CStr::from_ptr(value) }.to_string_lossy().into_owned()
    }

    /// A number that the daemon knows; 0 where it does not.
    pub fn number(self, what: i32) -> i32 {
        let mut value: i32 = 0;
        if self.get(what, (&raw mut value).cast()) { value } else { 0 }
    }

    fn get(self, what: i32, value: *mut c_void) -> bool {
        let Some(get) = functions().and_then(|functions| functions.get_value) else {
            return false;
        };
        // SAFETY: `value` points to a variable of the type that the interface gives for `what`.
        unsafe { get(self.0, what, value) == crate::abi::rc::OK }
    }

    /// Whether the job has failed or was cancelled, by the letter of its state.
    pub fn job_has_failed(self) -> bool {
        let status = self.number(variable::JOB_STATUS);
        [b'E', b'f', b'A'].iter().any(|letter| i32::from(*letter) == status)
    }

    /// Writes one line to the job's report; see [`message`].
    pub fn message(self, kind: i32, text: &str) {
        let Some(function) = functions().and_then(|functions| functions.job_message) else {
            return;
        };
        let mut line: String =
            text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
        if line.len() > MAX_MESSAGE_BYTES {
            let end = (0..=MAX_MESSAGE_BYTES).rev().find(|at| line.is_char_boundary(*at));
            line.truncate(end.unwrap_or(0));
        }
        line.insert_str(0, "vmtide: ");
        line.push('\n');
        if let Ok(line) = CString::new(line) {
            say(function, self.0, kind, &line);
        }
    }

    /// Ends the job: writes why to its report.
    pub fn fatal(self, text: &str) {
        self.message(message::FATAL, text);
    }

    /// What the previous job knew of the file; none where it had none of this name.
    pub fn previous(self, file_name: &CStr) -> Option<Previous> {
        let function = functions()?.accurate_attributes?;
        let mut attributes = AccurateAttributes {
            file_name: file_name.as_ptr().cast_mut(),
            attributes: Stat::zeroed(),
            checksum: std::ptr::null_mut(),
            delta_sequence: 0,
            seen: 0,
        };
        // SAFETY: the packet is as the interface lays it out and lives through the call; the daemon
        // only reads the name.
        let found = unsafe { function(self.0, &raw mut attributes) };
        if !attributes.checksum.is_null()
            && let Some(free) = functions().and_then(|functions| functions.free)
        {
            // SAFETY: the daemon made it for us with its own allocator and never looks at it again.
            unsafe { free(self.0, c"vmtide-fd".as_ptr(), 0, attributes.checksum.cast()) };
        }
        (found == SEEN).then_some(Previous {
            moment: (attributes.attributes.inode, attributes.attributes.special_device),
            size: attributes.attributes.size,
            sequence: attributes.delta_sequence,
        })
    }

    /// Has the daemon hold a file against the previous job: it learns that the file is still there, and
    /// fills in the number of its previous version in the row of deltas.
    pub fn check_changes(self, packet: &mut SavePacket) {
        if let Some(function) = functions().and_then(|functions| functions.check_changes) {
            // SAFETY: the daemon gave us the packet for this call; its answer (changed or not) does not
            // matter, because the file is sent in any case.
            unsafe { function(self.0, packet) };
        }
    }
}

/// What the daemon answers for a file that the previous job had.
const SEEN: i32 = 5;

fn say(function: JobMessage, context: *mut PluginContext, kind: i32, line: &CStr) {
    // SAFETY: the format takes exactly one string; all arguments have the widths of the interface.
    unsafe {
        function(context, c"vmtide-fd".as_ptr(), 0, kind, 0, c"%s".as_ptr(), line.as_ptr());
    }
}
