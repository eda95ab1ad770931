//! The file daemon's plugin interface, version 23, as facts: names, order, widths, numbers.
//!
//! Everything is laid out for 64-bit Linux; the assertions at the end hold the sizes and offsets against those that
//! the daemon's own compiler gives, so that a slip does not compile. What the daemon hands over carries its size at
//! both ends, which is looked at again at run time ([`SavePacket::is_sound`] and its like).

use std::ffi::{c_char, c_int, c_void};

/// The version of the plugin interface: that of the community edition, 15.x.
pub const INTERFACE_VERSION: u32 = 23;

/// What every packet of plugin information begins with.
pub const MAGIC: &std::ffi::CStr = c"*FDPluginData*";

/// The licence that the daemon asks for, which is this crate's.
pub const LICENSE: &std::ffi::CStr = c"AGPLv3";

/// What a call to a plugin answers.
pub mod rc {
    /// Done.
    pub const OK: i32 = 0;
    /// Something went wrong.
    pub const ERROR: i32 = 2;
    /// There is another file.
    pub const MORE: i32 = 3;
    /// There are no more files.
    pub const MAX: i32 = 9999;
}

/// Events, of which the daemon tells all plugins.
pub mod event {
    /// A connection for a job ends.
    pub const JOB_END: u32 = 2;
    /// A backup job has begun.
    pub const START_BACKUP_JOB: u32 = 3;
    /// A backup job ends, also after a failure.
    pub const END_BACKUP_JOB: u32 = 4;
    /// A restore job ends.
    pub const END_RESTORE_JOB: u32 = 6;
    /// Back up what the string says.
    pub const BACKUP_COMMAND: u32 = 9;
    /// What follows was backed up by this string.
    pub const RESTORE_COMMAND: u32 = 10;
    /// Estimate what the string says.
    pub const ESTIMATE_COMMAND: u32 = 11;
    /// The level; the value is the letter.
    pub const LEVEL: u32 = 12;
    /// When the previous job began; the value is the time.
    pub const SINCE: u32 = 13;
    /// The job is cancelled: told on another thread.
    pub const CANCEL_COMMAND: u32 = 14;
    /// An object of an earlier backup, before a restore; a null value ends them.
    pub const RESTORE_OBJECT: u32 = 18;
    /// A plugin line of the file set, when it is read.
    pub const PLUGIN_COMMAND: u32 = 20;
}

/// What the daemon can be asked.
pub mod variable {
    /// The number of the job (`i32`).
    pub const JOB_ID: i32 = 1;
    /// The unique name of the job (string).
    pub const JOB_NAME: i32 = 6;
    /// The state of the job, a letter (`i32`).
    pub const JOB_STATUS: i32 = 7;
    /// Whether the job is in accurate mode (`i32`).
    pub const ACCURATE: i32 = 9;
    /// The daemon's working directory (string).
    pub const WORKING_DIRECTORY: i32 = 13;
    /// The directory of plugins (string).
    pub const PLUGIN_DIRECTORY: i32 = 14;
    /// Where to restore (string).
    pub const WHERE: i32 = 15;
    /// The expression that renames what is restored (string).
    pub const REGEX_WHERE: i32 = 16;
    /// The unique name of the job that this one is relative to (string).
    pub const PREVIOUS_JOB_NAME: i32 = 20;
    /// What becomes of files that are there, a letter (`i32`).
    pub const REPLACE: i32 = 24;
}

/// Types of files.
pub mod file_type {
    /// A regular file.
    pub const REGULAR: i32 = 3;
    /// An object for restores, delivered before the files.
    pub const RESTORE_FIRST: i32 = 25;
    /// A form of options that a restore can fill in.
    pub const PLUGIN_CONFIG: i32 = 27;
    /// The same, filled in.
    pub const PLUGIN_CONFIG_FILLED: i32 = 28;
    /// A row of the catalogue's table of objects.
    pub const PLUGIN_OBJECT: i32 = 29;
}

/// Options of a file that a plugin may set.
pub mod option {
    /// It holds what differs from the previous version.
    pub const DELTA: u64 = 1 << 28;
    /// Every block has its offset.
    pub const OFFSETS: u64 = 1 << 30;
}

/// What a plugin makes of a file to restore.
pub mod create {
    /// Leave it out.
    pub const SKIP: i32 = 1;
    /// It cannot be made.
    pub const ERROR: i32 = 2;
    /// The plugin takes its data.
    pub const EXTRACT: i32 = 3;
}

/// Kinds of job messages.
pub mod message {
    /// The job has failed.
    pub const FATAL: i32 = 4;
    /// An error; the job goes on.
    pub const ERROR: i32 = 5;
    /// A warning.
    pub const WARNING: i32 = 6;
    /// Information.
    pub const INFO: i32 = 7;
}

/// What [`IoPacket::func`] asks for.
pub mod io {
    /// Open the file.
    pub const OPEN: i32 = 1;
    /// Read the next block.
    pub const READ: i32 = 2;
    /// Write a block.
    pub const WRITE: i32 = 3;
    /// Close the file.
    pub const CLOSE: i32 = 4;
    /// Go on elsewhere.
    pub const SEEK: i32 = 5;
}

/// One job's connection of daemon and plugin.
#[repr(C)]
pub struct PluginContext {
    /// The daemon's.
    pub daemon: *mut c_void,
    /// Ours.
    pub plugin: *mut c_void,
}

/// What the daemon says of itself when it loads a plugin.
#[repr(C)]
pub struct DaemonInfo {
    /// Its size.
    pub size: u32,
    /// The interface's version.
    pub version: u32,
}

/// What a plugin says of itself.
#[repr(C)]
pub struct PluginInfo {
    /// Its size.
    pub size: u32,
    /// The interface's version.
    pub version: u32,
    /// [`MAGIC`].
    pub magic: *const c_char,
    /// The licence.
    pub license: *const c_char,
    /// The authors.
    pub author: *const c_char,
    /// The date.
    pub date: *const c_char,
    /// The plugin's version.
    pub plugin_version: *const c_char,
    /// What it is for.
    pub description: *const c_char,
}

// SAFETY: points to constants only and is never changed.
unsafe impl Sync for PluginInfo {}

/// An event.
#[repr(C)]
pub struct Event {
    /// See [`event`].
    pub kind: u32,
}

/// A file's attributes, as stat(2) of 64-bit Linux gives them.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Stat {
    /// The device; here what a delta builds on.
    pub device: u64,
    /// The inode; here the first half of the moment.
    pub inode: u64,
    /// Number of links.
    pub links: u64,
    /// Type and permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    pub(crate) padding: u32,
    /// The device that a special file is; here the second half of the moment.
    pub special_device: u64,
    /// Size in bytes.
    pub size: i64,
    /// Preferred size of a transfer.
    pub block_size: i64,
    /// Units of 512 bytes in use.
    pub blocks: i64,
    /// Seconds and nanoseconds of the last access, change of content and change of attributes.
    pub times: [[i64; 2]; 3],
    pub(crate) reserved: [i64; 3],
}

impl Stat {
    /// One with all fields zero.
    pub const fn zeroed() -> Self {
        Self {
            device: 0,
            inode: 0,
            links: 0,
            mode: 0,
            uid: 0,
            gid: 0,
            padding: 0,
            special_device: 0,
            size: 0,
            block_size: 0,
            blocks: 0,
            times: [[0; 2]; 3],
            reserved: [0; 3],
        }
    }
}

/// An object for restores, inside [`SavePacket`].
#[repr(C)]
pub struct RestoreObject {
    /// Its name.
    pub name: *mut c_char,
    /// Its content.
    pub object: *mut c_char,
    /// The length of that.
    pub length: i32,
    /// Its place in the order.
    pub index: i32,
    /// How it is compressed.
    pub compression: i32,
}

/// A row of the catalogue's table of objects, inside [`SavePacket`].
#[repr(C)]
pub struct PluginObject {
    /// The path of the files it stands for.
    pub path: *mut c_char,
    /// The plugin.
    pub plugin_name: *mut c_char,
    /// The category.
    pub category: *mut c_char,
    /// The type.
    pub kind: *mut c_char,
    /// The name.
    pub name: *mut c_char,
    /// Where it came from.
    pub source: *mut c_char,
    /// Its id.
    pub uuid: *mut c_char,
    /// Its size in bytes.
    pub size: u64,
    /// Its state, a letter.
    pub status: i32,
    /// Number of parts.
    pub count: u32,
}

/// A file to back up.
#[repr(C)]
pub struct SavePacket {
    /// Its size.
    pub packet_size: i32,
    /// The file's name.
    pub file_name: *mut c_char,
    snapshot_name: *mut c_char,
    unused: i32,
    /// What a link points to.
    pub link: *mut c_char,
    /// The attributes.
    pub attributes: Stat,
    /// See [`file_type`].
    pub kind: i32,
    /// See [`option`].
    pub flags: u64,
    /// Whether there is no data to read.
    pub no_read: u8,
    /// Whether the data is the same on all systems.
    pub portable: u8,
    /// Whether the previous job had the file.
    pub accurate_found: u8,
    deduplicate: u8,
    update_attributes: u8,
    /// The plugin line.
    pub command: *mut c_char,
    /// An object for restores.
    pub restore_object: RestoreObject,
    /// A row of the catalogue.
    pub plugin_object: PluginObject,
    metadata: *mut c_void,
    /// The number of the previous version in its row of deltas.
    pub delta_sequence: u32,
    link_index: i32,
    /// The size again.
    pub packet_end: i32,
}

/// A file to restore.
#[repr(C)]
pub struct RestorePacket {
    /// Its size.
    pub packet_size: i32,
    unused: i32,
    /// The stream.
    pub stream: i32,
    /// The stream of data.
    pub data_stream: i32,
    /// See [`file_type`].
    pub kind: i32,
    /// Its number in the job.
    pub file_index: i32,
    link_index: i32,
    uid: u32,
    /// The attributes, as they were saved.
    pub attributes: Stat,
    extended_attributes: *const c_char,
    /// Where it shall be.
    pub output_name: *const c_char,
    output_link: *const c_char,
    /// The prefix of [`output_name`](Self::output_name).
    pub prefix: *const c_char,
    regex_where: *const c_char,
    /// What becomes of a file that is there, a letter.
    pub replace: i32,
    /// See [`create`].
    pub create_status: i32,
    /// The number in its row of deltas.
    pub delta_sequence: u32,
    /// The size again.
    pub packet_end: i32,
}

/// Input and output.
#[repr(C)]
pub struct IoPacket {
    /// Its size.
    pub packet_size: i32,
    /// See [`io`].
    pub func: i32,
    /// Bytes to transfer.
    pub count: i32,
    /// Flags of open(2).
    pub flags: i32,
    mode: u32,
    /// The bytes.
    pub buffer: *mut c_char,
    file_name: *const c_char,
    /// Bytes transferred, or negative.
    pub status: i32,
    /// The error number.
    pub io_errno: i32,
    /// The error number of Windows.
    pub windows_error: i32,
    /// As lseek(2) has it.
    pub whence: i32,
    /// Where.
    pub offset: i64,
    /// Whether the error is one of Windows.
    pub is_windows_error: u8,
    /// The size again.
    pub packet_end: i32,
}

/// An object of an earlier backup, before a restore.
#[repr(C)]
pub struct RestoreObjectPacket {
    /// Its size.
    pub packet_size: i32,
    /// Its name.
    pub object_name: *const c_char,
    /// Its content.
    pub object: *const c_char,
    /// The plugin line that made it.
    pub plugin_name: *const c_char,
    /// See [`file_type`].
    pub object_type: i32,
    /// The length of the content.
    pub object_length: i32,
    object_full_length: i32,
    object_index: i32,
    object_compression: i32,
    stream: i32,
    /// The job that made it.
    pub job_id: u32,
    /// The size again.
    pub packet_end: i32,
}

/// What the previous job knew of a file.
#[repr(C)]
pub struct AccurateAttributes {
    /// The file.
    pub file_name: *mut c_char,
    /// Its attributes then.
    pub attributes: Stat,
    /// Its checksum then; the daemon's memory.
    pub checksum: *mut c_char,
    /// Its number in the row of deltas.
    pub delta_sequence: i32,
    /// Whether it was seen in this job.
    pub seen: u8,
}

/// Any call that this crate does not make.
pub type Unused = *const c_void;

/// A job message: context, file, line, kind, time, format, argument.
pub type JobMessage = unsafe extern "C" fn(
    *mut PluginContext,
    *const c_char,
    c_int,
    c_int,
    i64,
    *const c_char,
    ...
) -> c_int;

/// What the daemon can do for a plugin.
#[repr(C)]
pub struct DaemonFunctions {
    /// Its size.
    pub size: u32,
    /// The interface's version.
    pub version: u32,
    /// Asks for events; only those of verification need it.
    pub register_events: Unused,
    /// Answers what [`variable`] names.
    pub get_value: Option<unsafe extern "C" fn(*mut PluginContext, c_int, *mut c_void) -> c_int>,
    /// Sets it.
    pub set_value: Unused,
    /// Writes to the job's report.
    pub job_message: Option<JobMessage>,
    /// Writes to the daemon's trace.
    pub debug_message: Unused,
    /// The daemon's memory.
    pub malloc: Unused,
    /// Gives the daemon's memory back.
    pub free: Option<unsafe extern "C" fn(*mut PluginContext, *const c_char, c_int, *mut c_void)>,
    /// Changes of the file set, eight of them.
    pub file_set: [Unused; 8],
    /// Holds a file against the previous job.
    pub check_changes: Option<unsafe extern "C" fn(*mut PluginContext, *mut SavePacket) -> c_int>,
    /// Whether the file set takes a file.
    pub accept_file: Unused,
    /// What the previous job knew of a file.
    pub accurate_attributes:
        Option<unsafe extern "C" fn(*mut PluginContext, *mut AccurateAttributes) -> c_int>,
    /// Adds a plugin line.
    pub add_plugin: Unused,
    /// Writes a file event.
    pub add_file_event: Unused,
}

type OfContext = unsafe extern "C" fn(*mut PluginContext) -> c_int;
type OfText = unsafe extern "C" fn(*mut PluginContext, *mut c_char) -> c_int;
type OfValue = unsafe extern "C" fn(*mut PluginContext, c_int, *mut c_void) -> c_int;
type OfRestore = unsafe extern "C" fn(*mut PluginContext, *mut RestorePacket) -> c_int;

/// What a plugin can do for the daemon.
#[repr(C)]
pub struct PluginFunctions {
    /// Its size.
    pub size: u32,
    /// The interface's version.
    pub version: u32,
    /// Begins a context.
    pub new_plugin: OfContext,
    /// Ends it.
    pub free_plugin: OfContext,
    /// Never called.
    pub get_value: OfValue,
    /// Never called.
    pub set_value: OfValue,
    /// Something happens.
    pub handle_event: unsafe extern "C" fn(*mut PluginContext, *mut Event, *mut c_void) -> c_int,
    /// The next file to back up.
    pub start_backup_file: unsafe extern "C" fn(*mut PluginContext, *mut SavePacket) -> c_int,
    /// It is done.
    pub end_backup_file: OfContext,
    /// The next file to restore.
    pub start_restore_file: OfText,
    /// It is done.
    pub end_restore_file: OfContext,
    /// Its data.
    pub plugin_io: unsafe extern "C" fn(*mut PluginContext, *mut IoPacket) -> c_int,
    /// Makes a file to restore.
    pub create_file: OfRestore,
    /// Sets its attributes.
    pub set_attributes: OfRestore,
    /// Optional calls, which this plugin does without.
    pub optional: [Unused; 8],
}

// SAFETY: holds functions and null pointers only and is never changed.
unsafe impl Sync for PluginFunctions {}

/// Whether both ends of a packet say the size that this interface gives it.
const fn has_size(begin: i32, end: i32, size: usize) -> bool {
    begin == end && begin > 0 && begin.unsigned_abs() as usize == size
}

macro_rules! sound {
    ($packet:ty) => {
        impl $packet {
            /// Whether the packet has the size that this interface gives it, at both ends.
            pub const fn is_sound(&self) -> bool {
                has_size(self.packet_size, self.packet_end, size_of::<Self>())
            }
        }
    };
}

sound!(SavePacket);
sound!(RestorePacket);
sound!(IoPacket);
sound!(RestoreObjectPacket);

#[cfg(target_pointer_width = "64")]
const _: () = {
    use std::mem::{offset_of, size_of};
    assert!(size_of::<PluginContext>() == 16);
    assert!(size_of::<PluginInfo>() == 56);
    assert!(size_of::<Stat>() == 144);
    assert!(offset_of!(Stat, special_device) == 40);
    assert!(offset_of!(Stat, size) == 48);
    assert!(offset_of!(Stat, times) == 72);
    assert!(size_of::<RestoreObject>() == 32);
    assert!(size_of::<PluginObject>() == 72);
    assert!(size_of::<SavePacket>() == 344);
    assert!(offset_of!(SavePacket, attributes) == 40);
    assert!(offset_of!(SavePacket, kind) == 184);
    assert!(offset_of!(SavePacket, flags) == 192);
    assert!(offset_of!(SavePacket, command) == 208);
    assert!(offset_of!(SavePacket, restore_object) == 216);
    assert!(offset_of!(SavePacket, plugin_object) == 248);
    assert!(offset_of!(SavePacket, metadata) == 320);
    assert!(offset_of!(SavePacket, delta_sequence) == 328);
    assert!(offset_of!(SavePacket, packet_end) == 336);
    assert!(size_of::<RestorePacket>() == 232);
    assert!(offset_of!(RestorePacket, attributes) == 32);
    assert!(offset_of!(RestorePacket, output_name) == 184);
    assert!(offset_of!(RestorePacket, create_status) == 220);
    assert!(size_of::<IoPacket>() == 72);
    assert!(offset_of!(IoPacket, buffer) == 24);
    assert!(offset_of!(IoPacket, offset) == 56);
    assert!(offset_of!(IoPacket, packet_end) == 68);
    assert!(size_of::<RestoreObjectPacket>() == 64);
    assert!(offset_of!(RestoreObjectPacket, job_id) == 56);
    assert!(size_of::<AccurateAttributes>() == 168);
    assert!(offset_of!(AccurateAttributes, delta_sequence) == 160);
    assert!(size_of::<PluginFunctions>() == 168);
    assert!(offset_of!(PluginFunctions, plugin_io) == 80);
    assert!(offset_of!(PluginFunctions, optional) == 104);
    assert!(size_of::<DaemonFunctions>() == 168);
    assert!(offset_of!(DaemonFunctions, job_message) == 32);
    assert!(offset_of!(DaemonFunctions, free) == 56);
    assert!(offset_of!(DaemonFunctions, check_changes) == 128);
    assert!(offset_of!(DaemonFunctions, accurate_attributes) == 144);
};
