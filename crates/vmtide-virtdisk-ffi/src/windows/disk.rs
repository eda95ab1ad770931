//! A virtual disk that is open: what it is, its change tracking, what changed.

use crate::info::{Answer, InfoVersion};
use crate::{
    ChangeQuery, ChangeTracking, ErrorKind, Guid, ParentLocation, PhysicalSectors, RawAnswer,
    RawRange, Result, Size, StorageType, TrackingId, VirtdiskError, error, wide,
};
use std::os::windows::ffi::OsStrExt;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};
use std::path::Path;
use std::ptr;
use std::sync::Arc;
use vmtide_block::ByteRange;
use windows_sys::Win32::Foundation::{ERROR_SUCCESS, HANDLE};
use windows_sys::Win32::Storage::Vhd;

/// The first buffer for information, in words of 8 bytes: 1.25 KiB, which holds the longest tracking id.
const INFO_WORDS: usize = 160;
/// The largest buffer for information, in words: 1 MiB. Past it an answer is nonsense.
const MAX_INFO_WORDS: usize = 128 << 10;

const _: () = assert!(size_of::<RawRange>() == size_of::<Vhd::QUERY_CHANGES_VIRTUAL_DISK_RANGE>());

/// What a disk is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskAccess {
    /// Information only; works also while others hold the disk, and opens no parent.
    Info,
    /// Changes and content.
    ReadOnly,
    /// Content, also written; change tracking, switched on and off.
    ReadWrite,
}

/// A virtual disk that is open. May be used from many threads at once; closed when it is dropped.
#[derive(Debug)]
pub struct VirtualDisk {
    handle: Arc<OwnedHandle>,
    path: String,
    access: DiskAccess,
}

impl VirtualDisk {
    /// Opens the disk at `path`, of whatever format its content says.
    ///
    /// For [`DiskAccess::Info`] its parents are left alone: they may be missing, and may be files of other machines that
    /// whoever wrote the disk has chosen. The place of its parent is then told as the disk names it. For anything else
    /// the whole chain is opened.
    ///
    /// # Errors
    /// What Windows says; [`ErrorKind::InUse`] typically for a disk that a running machine writes.
    pub fn open(path: &Path, access: DiskAccess) -> Result<Self> {
        // As Microsoft's own sample for information does.
        let flags = match access {
            DiskAccess::Info => Vhd::OPEN_VIRTUAL_DISK_FLAG_NO_PARENTS,
            DiskAccess::ReadOnly | DiskAccess::ReadWrite => Vhd::OPEN_VIRTUAL_DISK_FLAG_NONE,
        };
        Self::open_with(path, access, flags)
    }

    fn open_with(path: &Path, access: DiskAccess, flags: i32) -> Result<Self> {
        let wide = native_path(path)?;
        let shown = path.display().to_string();
        // Detected by content: both ids unknown.
        let kind = Vhd::VIRTUAL_STORAGE_TYPE::default();
        let parameters = Vhd::OPEN_VIRTUAL_DISK_PARAMETERS {
            Version: Vhd::OPEN_VIRTUAL_DISK_VERSION_2,
            Anonymous: Vhd::OPEN_VIRTUAL_DISK_PARAMETERS_0 {
                Version2: Vhd::OPEN_VIRTUAL_DISK_PARAMETERS_0_1 {
                    GetInfoOnly: (access == DiskAccess::Info).into(),
                    ReadOnly: (access != DiskAccess::ReadWrite).into(),
                    ResiliencyGuid: Default::default(),
                },
            },
        };
        let mut handle: HANDLE = ptr::null_mut();
        // SAFETY: all pointers are to live values; the path ends with a zero; version 2 goes with access NONE.
        let code = unsafe {
            Vhd::OpenVirtualDisk(
                &raw const kind,
                wide.as_ptr(),
                Vhd::VIRTUAL_DISK_ACCESS_NONE,
                flags,
                &raw const parameters,
                &raw mut handle,
            )
        };
        check("open", &shown, code)?;
        // SAFETY: the call succeeded, so the handle is open and belongs to nobody else.
        let handle = unsafe { OwnedHandle::from_raw_handle(handle) };
        Ok(Self { handle: Arc::new(handle), path: shown, access })
    }

    pub(super) fn raw(&self) -> HANDLE {
        self.handle.as_raw_handle()
    }

    pub(super) fn handle(&self) -> &Arc<OwnedHandle> {
        &self.handle
    }

    /// The path it was opened by.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// What it was opened for.
    pub fn access(&self) -> DiskAccess {
        self.access
    }

    /// Asks with ever larger buffers until the answer fits. The buffer is zeroed before, so that what the call
    /// left alone reads as the end of a string.
    fn information<T>(
        &self,
        version: InfoVersion,
        decode: impl FnOnce(Answer<'_>) -> Result<T>,
    ) -> Result<T> {
        const WHAT: &str = "query information of";
        let mut words = INFO_WORDS;
        loop {
            let mut buffer = vec![0_u64; words];
            if let Some(first) = buffer.first_mut() {
                *first = u64::from((version as i32).cast_unsigned());
            }
            let mut bytes = u32::try_from(words.saturating_mul(8)).unwrap_or(u32::MAX);
            let mut used = 0_u32;
            // SAFETY: the buffer is aligned for the structure, larger than it, and `bytes` is its length.
            let code = unsafe {
                Vhd::GetVirtualDiskInformation(
                    self.raw(),
                    &raw mut bytes,
                    buffer.as_mut_ptr().cast(),
                    &raw mut used,
                )
            };
            if code == error::ERROR_INSUFFICIENT_BUFFER && words < MAX_INFO_WORDS {
                let asked = usize::try_from(bytes).unwrap_or(usize::MAX).div_ceil(8);
                words = asked.max(words * 2).min(MAX_INFO_WORDS);
                continue;
            }
            check(WHAT, &self.path, code)?;
            let bytes: Vec<u8> = buffer.iter().flat_map(|word| word.to_le_bytes()).collect();
            return decode(Answer::new(&bytes, &self.path));
        }
    }

    /// Sizes of the disk.
    ///
    /// # Errors
    /// What Windows says, and [`VirtdiskError::Answer`] for sizes that no disk has; so for all of these.
    pub fn size(&self) -> Result<Size> {
        self.information(InfoVersion::Size, |answer| answer.size())
    }

    /// The id of the content: said to change when it may have.
    ///
    /// # Errors
    /// As [`size`](Self::size).
    pub fn identifier(&self) -> Result<Guid> {
        self.information(InfoVersion::Identifier, |answer| answer.guid())
    }

    /// The id of the disk, the same through a chain. `None` for formats without one.
    ///
    /// # Errors
    /// As [`size`](Self::size).
    pub fn disk_id(&self) -> Result<Option<Guid>> {
        let found = self.information(InfoVersion::VirtualDiskId, |answer| answer.guid());
        Ok(absent(found)?.filter(|id| !id.is_nil()))
    }

    /// Where its parent is; `None` for a disk that has none.
    ///
    /// # Errors
    /// As [`size`](Self::size).
    pub fn parent(&self) -> Result<Option<ParentLocation>> {
        match self.information(InfoVersion::ParentLocation, |answer| answer.parent()) {
            Err(error) if error.code() == Some(error::ERROR_VHD_INVALID_TYPE) => Ok(None),
            other => other.map(Some),
        }
    }

    /// The kind of file.
    ///
    /// # Errors
    /// As [`size`](Self::size).
    pub fn storage_type(&self) -> Result<StorageType> {
        self.information(InfoVersion::VirtualStorageType, |answer| answer.storage_type())
    }

    /// 2 fixed, 3 dynamic, 4 differencing.
    ///
    /// # Errors
    /// As [`size`](Self::size).
    pub fn provider_subtype(&self) -> Result<u32> {
        self.information(InfoVersion::ProviderSubtype, |answer| answer.number())
    }

    /// Whether its blocks lie on multiples of 4 KiB in the file.
    ///
    /// # Errors
    /// As [`size`](Self::size).
    pub fn is_4k_aligned(&self) -> Result<bool> {
        self.information(InfoVersion::Is4kAligned, |answer| answer.flag())
    }

    /// The sectors of the disk that holds the file.
    ///
    /// # Errors
    /// As [`size`](Self::size).
    pub fn physical_disk(&self) -> Result<PhysicalSectors> {
        self.information(InfoVersion::PhysicalDisk, |answer| answer.physical_disk())
    }

    /// The physical sector that the guest sees, in bytes.
    ///
    /// # Errors
    /// As [`size`](Self::size).
    pub fn physical_sector_bytes(&self) -> Result<u32> {
        self.information(InfoVersion::VhdPhysicalSectorSize, |answer| answer.number())
    }

    /// The state of change tracking; off, without an id, for formats that cannot be tracked.
    ///
    /// # Errors
    /// As [`size`](Self::size).
    pub fn change_tracking(&self) -> Result<ChangeTracking> {
        let found =
            self.information(InfoVersion::ChangeTrackingState, |answer| answer.change_tracking());
        Ok(absent(found)?.unwrap_or(ChangeTracking {
            enabled: false,
            newer_changes: false,
            most_recent_id: None,
        }))
    }

    /// Gives the disk an id of its own, by which change tracking and its chain know it. Needs
    /// [`DiskAccess::ReadWrite`]; for a disk that was just made.
    ///
    /// # Errors
    /// What Windows says.
    pub fn set_disk_id(&self, id: Guid) -> Result<()> {
        let id = windows_sys::core::GUID {
            data1: id.data1,
            data2: id.data2,
            data3: id.data3,
            data4: id.data4,
        };
        let info = Vhd::SET_VIRTUAL_DISK_INFO {
            Version: Vhd::SET_VIRTUAL_DISK_INFO_VIRTUAL_DISK_ID,
            Anonymous: Vhd::SET_VIRTUAL_DISK_INFO_0 { VirtualDiskId: id },
        };
        // SAFETY: the handle is open and the structure lives through the call.
        let code = unsafe { Vhd::SetVirtualDiskInformation(self.raw(), &raw const info) };
        check("give an id to", &self.path, code)
    }

    /// Switches change tracking on or off. Needs [`DiskAccess::ReadWrite`]. Not for the disk of a running
    /// machine, whose tracking belongs to Hyper-V.
    ///
    /// # Errors
    /// What Windows says.
    pub fn set_change_tracking(&self, enabled: bool) -> Result<()> {
        let info = Vhd::SET_VIRTUAL_DISK_INFO {
            Version: Vhd::SET_VIRTUAL_DISK_INFO_CHANGE_TRACKING_STATE,
            Anonymous: Vhd::SET_VIRTUAL_DISK_INFO_0 { ChangeTrackingEnabled: enabled.into() },
        };
        // SAFETY: the handle is open and the structure lives through the call.
        let code = unsafe { Vhd::SetVirtualDiskInformation(self.raw(), &raw const info) };
        check("switch change tracking of", &self.path, code)
    }
}

impl ChangeQuery for VirtualDisk {
    fn path(&self) -> &str {
        &self.path
    }

    fn query(
        &self,
        id: &TrackingId,
        asked: ByteRange,
        ranges: &mut [RawRange],
    ) -> Result<RawAnswer> {
        let id = id.to_wide();
        let mut range_count = u32::try_from(ranges.len()).unwrap_or(u32::MAX);
        let mut processed_bytes = 0_u64;
        // SAFETY: the id ends with a zero; the array is writable for as many elements as `range_count` says, and
        // RawRange has the layout of the structure.
        let code = unsafe {
            Vhd::QueryChangesVirtualDisk(
                self.raw(),
                id.as_ptr(),
                asked.offset,
                asked.length,
                Vhd::QUERY_CHANGES_VIRTUAL_DISK_FLAG_NONE,
                ranges.as_mut_ptr().cast(),
                &raw mut range_count,
                &raw mut processed_bytes,
            )
        };
        check("query changes of", &self.path, code)?;
        Ok(RawAnswer { range_count, processed_bytes })
    }
}

/// Questions that do not fit the format or the version of Windows have no answer, which is no failure.
fn absent<T>(found: Result<T>) -> Result<Option<T>> {
    match found {
        Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::Invalid) => {
            Ok(None)
        }
        other => other.map(Some),
    }
}

/// An error for any code but success.
pub(super) fn check(operation: &'static str, path: &str, code: u32) -> Result<()> {
    match code {
        ERROR_SUCCESS => Ok(()),
        code => Err(VirtdiskError::call(operation, path, code)),
    }
}

/// The path in full, as the interface takes it.
pub(super) fn native_path(path: &Path) -> Result<Vec<u16>> {
    let wrong = |problem: String| VirtdiskError::Request {
        path: path.display().to_string(),
        problem,
        kind: ErrorKind::NotFound,
    };
    let full = std::path::absolute(path).map_err(|error| wrong(error.to_string()))?;
    let units: Vec<u16> = full.as_os_str().encode_wide().collect();
    wide::terminated(wide::path_for_calls(&units))
        .ok_or_else(|| wrong("the path has a zero character".to_owned()))
}
