//! Errors of the interface: one table of all codes, and the type that names call, disk and code.
//!
//! Functions of virtdisk.dll return a `WIN32_ERROR` by value, neither an `HRESULT` nor through `GetLastError`.
//! Their own codes are `0xC03A00xx` (winerror.h, facility virtual storage).

use std::fmt;
use thiserror::Error;

/// What a caller reacts to differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no such file or directory.
    NotFound,
    /// The file to be made is there.
    Exists,
    /// The account may not, or lacks a privilege.
    Denied,
    /// Somebody else holds the disk.
    InUse,
    /// The file is no virtual disk, or a damaged one.
    Damaged,
    /// A parent of a differencing disk is missing or is not the one it was made from.
    Parent,
    /// The platform, the volume or the format does not have this.
    Unsupported,
    /// The tracking id names no moment of this disk: read it in full.
    UnknownTrackingId,
    /// Writes of this disk are not tracked: read it in full.
    TrackingDisabled,
    /// There was tracking, and it cannot be relied on: read the disk in full.
    TrackingLost,
    /// The volume or the disk is full.
    NoSpace,
    /// The buffer was too small; handled inside this crate.
    Buffer,
    /// The request itself is wrong.
    Invalid,
    /// It was given up, as its caller wished.
    Cancelled,
    /// Anything else.
    Other,
}

/// A code that is known, with what to tell a person.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownError {
    /// The `WIN32_ERROR`.
    pub code: u32,
    /// Its name in winerror.h.
    pub name: &'static str,
    /// Its class.
    pub kind: ErrorKind,
    /// What it means.
    pub meaning: &'static str,
    /// What to do.
    pub mend: &'static str,
}

/// The buffer given was too small for the answer.
pub const ERROR_INSUFFICIENT_BUFFER: u32 = 122;
/// A parent location was asked of a disk that has none, and other requests that do not fit the type of a disk.
pub const ERROR_VHD_INVALID_TYPE: u32 = 0xC03A_001B;
/// The request was given up.
pub const ERROR_OPERATION_ABORTED: u32 = 995;
/// The account has no such privilege, or has not switched it on.
pub const ERROR_PRIVILEGE_NOT_HELD: u32 = 1314;

const fn known(
    code: u32,
    name: &'static str,
    kind: ErrorKind,
    meaning: &'static str,
    mend: &'static str,
) -> KnownError {
    KnownError { code, name, kind, meaning, mend }
}

const FULL: &str = "read the disk in full";
const REBUILD: &str = "restore the file from a backup, or try a repair with vmtide check --repair";
const CHAIN: &str =
    "put the parent back where the child names it, or name its place with vmtide rebase";

/// Every code of the interface, and the plain ones that its functions are documented or known to return, sorted.
#[rustfmt::skip]
static KNOWN: &[KnownError] = {
    use ErrorKind::{
        Buffer, Cancelled, Damaged, Denied, Exists, InUse, Invalid, NoSpace, NotFound, Parent, TrackingDisabled,
        TrackingLost, UnknownTrackingId, Unsupported,
    };
    &[
        known(1, "ERROR_INVALID_FUNCTION", Unsupported, "the system does not have this function for the disk", "use a newer version of Windows"),
        known(2, "ERROR_FILE_NOT_FOUND", NotFound, "there is no such file", "check the path"),
        known(3, "ERROR_PATH_NOT_FOUND", NotFound, "there is no such directory", "check the path"),
        known(5, "ERROR_ACCESS_DENIED", Denied, "access is denied", "give the account of the service rights on the file"),
        known(13, "ERROR_INVALID_DATA", Damaged, "the file holds invalid data", REBUILD),
        known(19, "ERROR_WRITE_PROTECT", Denied, "the disk is attached read-only", "open it for writing"),
        known(21, "ERROR_NOT_READY", InUse, "the disk is not ready", "try again"),
        known(32, "ERROR_SHARING_VIOLATION", InUse, "another process holds the file", "read the frozen parent of a checkpoint, or stop the virtual machine"),
        known(33, "ERROR_LOCK_VIOLATION", InUse, "another process has locked the file", "wait until it is done"),
        known(38, "ERROR_HANDLE_EOF", Damaged, "the disk ends before the range", "compare the size of the disk"),
        known(39, "ERROR_HANDLE_DISK_FULL", NoSpace, "the volume is full", "free some space"),
        known(50, "ERROR_NOT_SUPPORTED", Unsupported, "the system or the volume does not support this", "use a newer version of Windows or another volume"),
        known(80, "ERROR_FILE_EXISTS", Exists, "the file exists", "choose another name"),
        known(87, "ERROR_INVALID_PARAMETER", Invalid, "the parameters do not fit together", "report this with the command used"),
        known(112, "ERROR_DISK_FULL", NoSpace, "the volume is full", "free some space"),
        known(120, "ERROR_CALL_NOT_IMPLEMENTED", Unsupported, "this system has no such function", "use Windows 10, Windows Server 2016 or newer"),
        known(ERROR_INSUFFICIENT_BUFFER, "ERROR_INSUFFICIENT_BUFFER", Buffer, "the answer does not fit its buffer", "report this with the path of the disk"),
        known(123, "ERROR_INVALID_NAME", NotFound, "the name is not one of a file", "check the path"),
        known(161, "ERROR_BAD_PATHNAME", NotFound, "the path is not one of a file", "check the path"),
        known(170, "ERROR_BUSY", InUse, "the disk is busy", "try again"),
        known(183, "ERROR_ALREADY_EXISTS", Exists, "the file exists", "choose another name"),
        known(206, "ERROR_FILENAME_EXCED_RANGE", NotFound, "the name is too long", "use a shorter path"),
        known(267, "ERROR_DIRECTORY", NotFound, "the path leads through something that is no directory", "check the path"),
        known(618, "ERROR_UNSUPPORTED_COMPRESSION", Unsupported, "the file lies on a compressed volume", "switch off NTFS compression of the file and its directory"),
        known(665, "ERROR_FILE_SYSTEM_LIMITATION", Unsupported, "the path leads through a share of this same host", "use the local path"),
        known(ERROR_OPERATION_ABORTED, "ERROR_OPERATION_ABORTED", Cancelled, "the request was given up", "ask again"),
        known(1117, "ERROR_IO_DEVICE", ErrorKind::Other, "the storage reports an error", "check the disk that holds the file"),
        known(ERROR_PRIVILEGE_NOT_HELD, "ERROR_PRIVILEGE_NOT_HELD", Denied, "the account lacks a privilege", "run the service as LocalSystem, or give its account the right \"Perform volume maintenance tasks\""),
        known(1392, "ERROR_FILE_CORRUPT", Damaged, "the file or directory is corrupt", "check the volume with chkdsk"),
        known(6002, "ERROR_FILE_ENCRYPTED", Unsupported, "the file is encrypted (EFS)", "decrypt it with cipher /d"),
        known(0x803A_0001, "ERROR_QUERY_STORAGE_ERROR", ErrorKind::Other, "the storage below the disk could not be asked", "check the volume that holds the file"),
        known(0xC03A_0001, "ERROR_VHD_DRIVE_FOOTER_MISSING", Damaged, "the footer of the VHD is missing", REBUILD),
        known(0xC03A_0002, "ERROR_VHD_DRIVE_FOOTER_CHECKSUM_MISMATCH", Damaged, "the checksum of the VHD's footer is wrong", REBUILD),
        known(0xC03A_0003, "ERROR_VHD_DRIVE_FOOTER_CORRUPT", Damaged, "the footer of the VHD is corrupt", REBUILD),
        known(0xC03A_0004, "ERROR_VHD_FORMAT_UNKNOWN", Damaged, "the format of the file is not known", "check that the path is that of a VHD or VHDX"),
        known(0xC03A_0005, "ERROR_VHD_FORMAT_UNSUPPORTED_VERSION", Unsupported, "the version of the format is not supported", "use a newer version of Windows, or vmtide convert"),
        known(0xC03A_0006, "ERROR_VHD_SPARSE_HEADER_CHECKSUM_MISMATCH", Damaged, "the checksum of the VHD's dynamic header is wrong", REBUILD),
        known(0xC03A_0007, "ERROR_VHD_SPARSE_HEADER_UNSUPPORTED_VERSION", Unsupported, "the version of the VHD's dynamic header is not supported", "use vmtide convert"),
        known(0xC03A_0008, "ERROR_VHD_SPARSE_HEADER_CORRUPT", Damaged, "the dynamic header of the VHD is corrupt", REBUILD),
        known(0xC03A_0009, "ERROR_VHD_BLOCK_ALLOCATION_FAILURE", NoSpace, "a new block could not be allocated", "free some space on the volume"),
        known(0xC03A_000A, "ERROR_VHD_BLOCK_ALLOCATION_TABLE_CORRUPT", Damaged, "the block allocation table is corrupt", REBUILD),
        known(0xC03A_000B, "ERROR_VHD_INVALID_BLOCK_SIZE", Invalid, "the block size is not valid", "leave the block size to the format"),
        known(0xC03A_000C, "ERROR_VHD_BITMAP_MISMATCH", Damaged, "the bitmap of a block does not fit its parent", REBUILD),
        known(0xC03A_000D, "ERROR_VHD_PARENT_VHD_NOT_FOUND", Parent, "the parent of the disk was not found", CHAIN),
        known(0xC03A_000E, "ERROR_VHD_CHILD_PARENT_ID_MISMATCH", Parent, "the parent is not the one the disk was made from", CHAIN),
        known(0xC03A_000F, "ERROR_VHD_CHILD_PARENT_TIMESTAMP_MISMATCH", Parent, "the parent was changed after the disk was made from it", CHAIN),
        known(0xC03A_0010, "ERROR_VHD_METADATA_READ_FAILURE", Damaged, "the metadata of the disk cannot be read", REBUILD),
        known(0xC03A_0011, "ERROR_VHD_METADATA_WRITE_FAILURE", ErrorKind::Other, "the metadata of the disk cannot be written", "check the volume that holds the file"),
        known(0xC03A_0012, "ERROR_VHD_INVALID_SIZE", Invalid, "the size of the disk is not valid", "use a multiple of the sector, up to 2040 GiB for VHD and 64 TiB for VHDX"),
        known(0xC03A_0013, "ERROR_VHD_INVALID_FILE_SIZE", Damaged, "the file is not as long as the disk needs", REBUILD),
        known(0xC03A_0014, "ERROR_VIRTDISK_PROVIDER_NOT_FOUND", Unsupported, "no provider for this kind of disk is installed", "check that the path is that of a VHD or VHDX"),
        known(0xC03A_0015, "ERROR_VIRTDISK_NOT_VIRTUAL_DISK", Damaged, "the object is no virtual disk", "check that the path is that of a VHD or VHDX"),
        known(0xC03A_0016, "ERROR_VHD_PARENT_VHD_ACCESS_DENIED", Denied, "access to the parent of the disk is denied", "give the account of the service rights on the parent"),
        known(0xC03A_0017, "ERROR_VHD_CHILD_PARENT_SIZE_MISMATCH", Parent, "the parent has another size than the disk", CHAIN),
        known(0xC03A_0018, "ERROR_VHD_DIFFERENCING_CHAIN_CYCLE_DETECTED", Parent, "the chain of parents is a circle", CHAIN),
        known(0xC03A_0019, "ERROR_VHD_DIFFERENCING_CHAIN_ERROR_IN_PARENT", Parent, "a parent of the disk cannot be opened", CHAIN),
        known(0xC03A_001A, "ERROR_VIRTUAL_DISK_LIMITATION", Unsupported, "the disk does not fit the volume or is compressed or sparse there", "move it to an NTFS or ReFS volume without compression"),
        known(ERROR_VHD_INVALID_TYPE, "ERROR_VHD_INVALID_TYPE", Unsupported, "this cannot be done with a disk of this type", "check the type of the disk"),
        known(0xC03A_001C, "ERROR_VHD_INVALID_STATE", InUse, "this cannot be done in the disk's present state", "detach the disk and try again"),
        known(0xC03A_001D, "ERROR_VIRTDISK_UNSUPPORTED_DISK_SECTOR_SIZE", Unsupported, "the sector size of the disk below is not supported", "move the file to another volume"),
        known(0xC03A_001E, "ERROR_VIRTDISK_DISK_ALREADY_OWNED", InUse, "the disk belongs to another owner", "detach it there"),
        known(0xC03A_001F, "ERROR_VIRTDISK_DISK_ONLINE_AND_WRITABLE", InUse, "the disk is online and writable", "take it offline"),
        known(0xC03A_0020, "ERROR_CTLOG_TRACKING_NOT_INITIALIZED", TrackingDisabled, "change tracking is not initialised", FULL),
        known(0xC03A_0021, "ERROR_CTLOG_LOGFILE_SIZE_EXCEEDED_MAXSIZE", TrackingLost, "the log of changes grew past its limit", FULL),
        known(0xC03A_0022, "ERROR_CTLOG_VHD_CHANGED_OFFLINE", TrackingLost, "the disk was changed while it was not tracked", FULL),
        known(0xC03A_0023, "ERROR_CTLOG_INVALID_TRACKING_STATE", TrackingLost, "change tracking is in no valid state", FULL),
        known(0xC03A_0024, "ERROR_CTLOG_INCONSISTENT_TRACKING_FILE", TrackingLost, "the tracking file contradicts the disk", FULL),
        known(0xC03A_0025, "ERROR_VHD_RESIZE_WOULD_TRUNCATE_DATA", Invalid, "the new size would cut off data", "shrink the partitions first"),
        known(0xC03A_0026, "ERROR_VHD_COULD_NOT_COMPUTE_MINIMUM_VIRTUAL_SIZE", ErrorKind::Other, "the smallest safe size cannot be found", "give a size"),
        known(0xC03A_0027, "ERROR_VHD_ALREADY_AT_OR_BELOW_MINIMUM_VIRTUAL_SIZE", Invalid, "the disk has its smallest size already", "nothing is to be done"),
        known(0xC03A_0028, "ERROR_VHD_METADATA_FULL", NoSpace, "the disk has no room for more metadata", "remove metadata or convert the disk"),
        known(0xC03A_0029, "ERROR_VHD_INVALID_CHANGE_TRACKING_ID", UnknownTrackingId, "the tracking id is not known for this disk", FULL),
        known(0xC03A_002A, "ERROR_VHD_CHANGE_TRACKING_DISABLED", TrackingDisabled, "change tracking is off for this disk", FULL),
        known(0xC03A_0030, "ERROR_VHD_MISSING_CHANGE_TRACKING_INFORMATION", TrackingLost, "the record of changes since this tracking id is missing", FULL),
        known(0xC03A_0034, "ERROR_VHD_UNEXPECTED_ID", Parent, "the disk has another id than expected", "check that it is the same disk"),
        known(0xC05C_FF0A, "ERROR_VHD_SHARED", Unsupported, "the disk is shared between virtual machines", "back it up through the machines' collection, or exclude it"),
        known(0xC05C_FF0C, "ERROR_VHDSET_BACKING_STORAGE_NOT_FOUND", NotFound, "the file that holds the VHD set's data was not found", "put the .avhdx file back"),
    ]
};

/// What is known of a code; `None` for all that the interface is not documented to return.
pub fn known_error(code: u32) -> Option<&'static KnownError> {
    let index = KNOWN.binary_search_by_key(&code, |known| known.code).ok()?;
    KNOWN.get(index)
}

/// All known codes, in ascending order.
pub fn known_errors() -> &'static [KnownError] {
    KNOWN
}

/// Why a call failed: one line with the call, the disk, what happened and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum VirtdiskError {
    /// Windows said no.
    #[error("{operation} {path}: {}", Described(.code))]
    Call {
        /// What was being done, as in "open".
        operation: &'static str,
        /// The disk.
        path: String,
        /// The `WIN32_ERROR`.
        code: u32,
    },
    /// Windows said yes, but the answer contradicts itself and cannot be used.
    #[error("{operation} {path}: the answer of Windows cannot be used: {problem}")]
    Answer {
        /// What was being done.
        operation: &'static str,
        /// The disk.
        path: String,
        /// What is wrong with the answer.
        problem: String,
        /// What a caller makes of it: [`ErrorKind::TrackingLost`] for an answer about changes.
        kind: ErrorKind,
    },
    /// The request cannot be put to Windows at all.
    #[error("{path}: {problem}")]
    Request {
        /// The disk.
        path: String,
        /// What is wrong with the request.
        problem: String,
        /// Its class: [`ErrorKind::UnknownTrackingId`] for an id that no disk can have.
        kind: ErrorKind,
    },
}

impl VirtdiskError {
    /// An error code returned by `operation` on the disk at `path`.
    pub fn call(operation: &'static str, path: impl Into<String>, code: u32) -> Self {
        Self::Call { operation, path: path.into(), code }
    }

    /// What a caller may react to.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Call { code, .. } => known_error(*code).map_or(ErrorKind::Other, |k| k.kind),
            Self::Answer { kind, .. } | Self::Request { kind, .. } => *kind,
        }
    }

    /// The error without the path, for messages that name the disk already.
    pub fn reason(&self) -> String {
        match self {
            Self::Call { operation, code, .. } => format!("{operation} it: {}", Described(code)),
            Self::Answer { operation, problem, .. } => {
                format!("{operation} it: the answer of Windows cannot be used: {problem}")
            }
            Self::Request { problem, .. } => problem.clone(),
        }
    }

    /// The code that Windows returned, where it did.
    pub fn code(&self) -> Option<u32> {
        match self {
            Self::Call { code, .. } => Some(*code),
            Self::Answer { .. } | Self::Request { .. } => None,
        }
    }
}

/// A code as a person reads it.
struct Described<'a>(&'a u32);

impl fmt::Display for Described<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code = *self.0;
        match known_error(code) {
            Some(known) => {
                write!(f, "{} ({}, 0x{code:X}); {}", known.meaning, known.name, known.mend)
            }
            None => write!(f, "error {code} (0x{code:X}) of Windows{}", system_text(code)),
        }
    }
}

/// What the running system says of a code that is not in the table.
#[cfg(windows)]
fn system_text(code: u32) -> String {
    format!(": {}", std::io::Error::from_raw_os_error(code.cast_signed()))
}

/// Only Windows knows its own texts.
#[cfg(not(windows))]
fn system_text(_: u32) -> &'static str {
    ""
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_every_line_says_something() {
        assert!(KNOWN.windows(2).all(|pair| pair[0].code < pair[1].code));
        for known in KNOWN {
            assert!(known.name.starts_with("ERROR_"), "{known:?}");
            assert!(!known.meaning.is_empty() && !known.mend.is_empty(), "{known:?}");
            let shown = VirtdiskError::call("open", r"C:\a.vhdx", known.code).to_string();
            assert!(!shown.contains('\n') && shown.contains(known.name), "{shown}");
        }
    }

    /// The range of the interface's own codes has three holes: 0x2B to 0x2F and 0x31 to 0x33 are not given out to it.
    #[test]
    fn every_code_of_the_interface_is_known() {
        let own = (1..=0x2A).chain([0x30, 0x34]);
        for low in own {
            assert!(known_error(0xC03A_0000 + low).is_some(), "0xC03A00{low:02X}");
        }
        assert_eq!(KNOWN.iter().filter(|known| known.code >> 16 == 0xC03A).count(), 44);
    }

    #[cfg(windows)]
    #[test]
    fn the_codes_are_those_of_the_bindings() {
        use windows_sys::Win32::Foundation as f;
        for (name, code) in [
            ("ERROR_VHD_INVALID_CHANGE_TRACKING_ID", f::ERROR_VHD_INVALID_CHANGE_TRACKING_ID),
            ("ERROR_VHD_CHANGE_TRACKING_DISABLED", f::ERROR_VHD_CHANGE_TRACKING_DISABLED),
            ("ERROR_VHD_INVALID_TYPE", f::ERROR_VHD_INVALID_TYPE),
            ("ERROR_VIRTUAL_DISK_LIMITATION", f::ERROR_VIRTUAL_DISK_LIMITATION),
        ] {
            assert_eq!(known_error(code).map(|known| known.name), Some(name));
        }
    }

    #[test]
    fn every_doubt_about_tracking_says_to_read_in_full() {
        for code in [0x20, 0x21, 0x22, 0x23, 0x24, 0x29, 0x2A, 0x30] {
            let error = VirtdiskError::call("query changes of", "d", 0xC03A_0000 + code);
            assert!(
                matches!(
                    error.kind(),
                    ErrorKind::UnknownTrackingId
                        | ErrorKind::TrackingDisabled
                        | ErrorKind::TrackingLost
                ),
                "{error}"
            );
            assert!(error.to_string().ends_with(FULL), "{error}");
        }
    }

    #[test]
    fn an_unknown_code_is_shown_in_both_bases() {
        let error = VirtdiskError::call("attach", "d", 0xC03A_00FF);
        assert_eq!(error.kind(), ErrorKind::Other);
        assert!(
            error.to_string().starts_with("attach d: error 3225026815 (0xC03A00FF) of Windows")
        );
    }
}
