//! The answers of `GetVirtualDiskInformation`.
//!
//! `GET_VIRTUAL_DISK_INFO` is a version number at byte 0 and a union at byte 8. Two members of the union end
//! in a string of any length, for which the C structure has room for one character only, so the answer is
//! taken as bytes of which so many are valid, and decoded here. All numbers are little-endian.

use crate::{ErrorKind, Guid, Result, TrackingId, VirtdiskError, wide};

/// Where the union begins.
const PAYLOAD: usize = 8;
/// The most candidates taken for the place of a parent; the documented providers give a handful.
const MAX_PARENT_CANDIDATES: usize = 64;

/// Versions of `GET_VIRTUAL_DISK_INFO_VERSION` that are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum InfoVersion {
    /// Sizes.
    Size = 1,
    /// The id that says whether the content may have changed.
    Identifier = 2,
    /// The place of the parent.
    ParentLocation = 3,
    /// The kind of file.
    VirtualStorageType = 6,
    /// Fixed, dynamic, differencing.
    ProviderSubtype = 7,
    /// Whether blocks lie on multiples of 4 KiB in the file.
    Is4kAligned = 8,
    /// The sectors of the disk that holds the file.
    PhysicalDisk = 9,
    /// The physical sector that the virtual disk reports.
    VhdPhysicalSectorSize = 10,
    /// The disk's own id.
    VirtualDiskId = 14,
    /// Change tracking.
    ChangeTrackingState = 15,
}

/// Sizes of a disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// What the guest sees.
    pub virtual_bytes: u64,
    /// What the file takes.
    pub physical_bytes: u64,
    /// The unit of allocation; 0 for fixed disks.
    pub block_bytes: u32,
    /// The logical sector: 512 or 4096.
    pub sector_bytes: u32,
}

/// Where a differencing disk says its parent is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParentLocation {
    /// The path at which the parent was found.
    Resolved(String),
    /// It was not found; these are the places the child names.
    Candidates(Vec<String>),
}

impl ParentLocation {
    /// The place to show: where the parent is, else the first place it was looked for.
    pub fn path(&self) -> Option<&str> {
        match self {
            Self::Resolved(path) => Some(path),
            Self::Candidates(paths) => paths.first().map(String::as_str),
        }
    }
}

/// The kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageType {
    /// 0 unknown, 1 ISO, 2 VHD, 3 VHDX, 4 VHD set.
    pub device_id: u32,
    /// Who defined the device ids.
    pub vendor_id: Guid,
}

/// Sectors of the disk that holds the file, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PhysicalSectors {
    /// Its logical sector.
    pub logical_bytes: u32,
    /// Its physical sector.
    pub physical_bytes: u32,
    /// Whether the file lies on another machine.
    pub is_remote: bool,
}

/// The state of change tracking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangeTracking {
    /// Whether writes are tracked.
    pub enabled: bool,
    /// Whether something was written since the most recent id.
    pub newer_changes: bool,
    /// The most recent id; `None` where there is none.
    pub most_recent_id: Option<TrackingId>,
}

/// An answer: the valid bytes of the structure.
#[derive(Clone, Copy, Debug)]
pub struct Answer<'a> {
    bytes: &'a [u8],
    path: &'a str,
}

impl<'a> Answer<'a> {
    /// The answer about the disk at `path` in `bytes`, of which all were filled by the call.
    pub fn new(bytes: &'a [u8], path: &'a str) -> Self {
        Self { bytes, path }
    }

    fn wrong(&self, problem: impl Into<String>, kind: ErrorKind) -> VirtdiskError {
        VirtdiskError::Answer {
            operation: "query information of",
            path: self.path.to_owned(),
            problem: problem.into(),
            kind,
        }
    }

    fn field<const N: usize>(&self, offset: usize) -> Result<[u8; N]> {
        let start = PAYLOAD.saturating_add(offset);
        self.bytes
            .get(start..start.saturating_add(N))
            .and_then(|field| field.try_into().ok())
            .ok_or_else(|| {
                let length = self.bytes.len();
                self.wrong(
                    format!("{N} bytes at {start} are missing in {length}"),
                    ErrorKind::Other,
                )
            })
    }

    fn u32(&self, offset: usize) -> Result<u32> {
        Ok(u32::from_le_bytes(self.field(offset)?))
    }

    fn u64(&self, offset: usize) -> Result<u64> {
        Ok(u64::from_le_bytes(self.field(offset)?))
    }

    fn units(&self, offset: usize) -> Vec<u16> {
        let bytes = self.bytes.get(PAYLOAD.saturating_add(offset)..).unwrap_or_default();
        bytes
            .chunks_exact(2)
            .filter_map(|pair| Some(u16::from_le_bytes(pair.try_into().ok()?)))
            .collect()
    }

    /// [`InfoVersion::Size`].
    ///
    /// # Errors
    /// [`VirtdiskError::Answer`] where it is too short, or the sizes are none that a disk can have.
    pub fn size(&self) -> Result<Size> {
        let size = Size {
            virtual_bytes: self.u64(0)?,
            physical_bytes: self.u64(8)?,
            block_bytes: self.u32(16)?,
            sector_bytes: self.u32(20)?,
        };
        if !matches!(size.sector_bytes, 512 | 4096) {
            let problem = format!("sectors of {} bytes", size.sector_bytes);
            return Err(self.wrong(problem, ErrorKind::Unsupported));
        }
        if !size.virtual_bytes.is_multiple_of(u64::from(size.sector_bytes)) {
            let problem = format!(
                "{} bytes are not whole sectors of {}",
                size.virtual_bytes, size.sector_bytes
            );
            return Err(self.wrong(problem, ErrorKind::Damaged));
        }
        Ok(size)
    }

    /// [`InfoVersion::Identifier`] and [`InfoVersion::VirtualDiskId`].
    ///
    /// # Errors
    /// [`VirtdiskError::Answer`] where it is too short.
    pub fn guid(&self) -> Result<Guid> {
        Ok(Guid::from_memory(self.field(0)?))
    }

    /// [`InfoVersion::ProviderSubtype`] and [`InfoVersion::VhdPhysicalSectorSize`].
    ///
    /// # Errors
    /// As [`guid`](Self::guid).
    pub fn number(&self) -> Result<u32> {
        self.u32(0)
    }

    /// [`InfoVersion::Is4kAligned`].
    ///
    /// # Errors
    /// As [`guid`](Self::guid).
    pub fn flag(&self) -> Result<bool> {
        Ok(self.u32(0)? != 0)
    }

    /// [`InfoVersion::VirtualStorageType`].
    ///
    /// # Errors
    /// As [`guid`](Self::guid).
    pub fn storage_type(&self) -> Result<StorageType> {
        Ok(StorageType { device_id: self.u32(0)?, vendor_id: Guid::from_memory(self.field(4)?) })
    }

    /// [`InfoVersion::PhysicalDisk`].
    ///
    /// # Errors
    /// As [`guid`](Self::guid).
    pub fn physical_disk(&self) -> Result<PhysicalSectors> {
        Ok(PhysicalSectors {
            logical_bytes: self.u32(0)?,
            physical_bytes: self.u32(4)?,
            is_remote: self.u32(8)? != 0,
        })
    }

    /// [`InfoVersion::ParentLocation`].
    ///
    /// # Errors
    /// As [`guid`](Self::guid); [`VirtdiskError::Answer`] for a resolved path without an end.
    pub fn parent(&self) -> Result<ParentLocation> {
        let resolved = self.u32(0)? != 0;
        let units = self.units(4);
        if !resolved {
            return Ok(ParentLocation::Candidates(wide::string_list(
                &units,
                MAX_PARENT_CANDIDATES,
            )));
        }
        wide::until_zero(&units)
            .map(ParentLocation::Resolved)
            .ok_or_else(|| self.wrong("the path of the parent has no end", ErrorKind::Other))
    }

    /// [`InfoVersion::ChangeTrackingState`].
    ///
    /// # Errors
    /// As [`guid`](Self::guid); [`ErrorKind::TrackingLost`] for an id without an end or longer than documented.
    pub fn change_tracking(&self) -> Result<ChangeTracking> {
        let enabled = self.u32(0)? != 0;
        let newer_changes = self.u32(4)? != 0;
        let text = wide::until_zero(&self.units(8)).ok_or_else(|| {
            self.wrong("the most recent tracking id has no end", ErrorKind::TrackingLost)
        })?;
        let most_recent_id = match text.as_str() {
            "" => None,
            text => Some(TrackingId::new(text, self.path).map_err(|error| {
                self.wrong(format!("the most recent tracking id: {error}"), ErrorKind::TrackingLost)
            })?),
        };
        Ok(ChangeTracking { enabled, newer_changes, most_recent_id })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(version: i32, payload: &[u8]) -> Vec<u8> {
        [&version.to_le_bytes()[..], &[0; 4], payload].concat()
    }

    fn wide_bytes(text: &str) -> Vec<u8> {
        text.encode_utf16().flat_map(u16::to_le_bytes).collect()
    }

    fn tracking(id: &str, enabled: u32) -> Vec<u8> {
        let flags = [enabled.to_le_bytes(), 1u32.to_le_bytes()].concat();
        answer(15, &[flags, wide_bytes(id)].concat())
    }

    fn size(virtual_bytes: u64, sector_bytes: u32) -> Vec<u8> {
        let payload = [
            &virtual_bytes.to_le_bytes()[..],
            &(4u64 << 20).to_le_bytes(),
            &(32u32 << 20).to_le_bytes(),
            &sector_bytes.to_le_bytes(),
        ];
        answer(1, &payload.concat())
    }

    #[test]
    fn sizes_are_checked() {
        let bytes = size(1 << 30, 4096);
        let found = Answer::new(&bytes, "d").size().unwrap();
        assert_eq!((found.virtual_bytes, found.physical_bytes), (1 << 30, 4 << 20));
        assert_eq!((found.block_bytes, found.sector_bytes), (32 << 20, 4096));
        for (bytes, kind) in [
            (size(1 << 30, 0), ErrorKind::Unsupported),
            (size(1 << 30, 3), ErrorKind::Unsupported),
            (size((1 << 30) + 512, 4096), ErrorKind::Damaged),
            (size(1 << 30, 512)[..28].to_vec(), ErrorKind::Other),
            (Vec::new(), ErrorKind::Other),
        ] {
            assert_eq!(Answer::new(&bytes, "d").size().unwrap_err().kind(), kind);
        }
    }

    #[test]
    fn tracking_ids_of_every_length_arrive_whole() {
        for length in [1, 8, 50, 255] {
            let id = "7".repeat(length);
            let bytes = tracking(&format!("{id}\0"), 1);
            let state = Answer::new(&bytes, "d").change_tracking().unwrap();
            assert!(state.enabled && state.newer_changes);
            assert_eq!(state.most_recent_id.unwrap().as_str(), id);
        }
        let bytes = tracking("\0leftovers", 0);
        let state = Answer::new(&bytes, "d").change_tracking().unwrap();
        assert_eq!((state.enabled, state.most_recent_id), (false, None));
    }

    #[test]
    fn a_tracking_id_that_may_be_cut_is_not_taken() {
        for id in ["rctX:5bfde23b", &format!("{}\0", "7".repeat(256))] {
            let bytes = tracking(id, 1);
            let error = Answer::new(&bytes, "d").change_tracking().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::TrackingLost, "{error}");
        }
    }

    #[test]
    fn parents_are_one_path_or_candidates() {
        let resolved = answer(3, &[&1u32.to_le_bytes()[..], &wide_bytes("C:\\p.vhdx\0")].concat());
        let found = Answer::new(&resolved, "d").parent().unwrap();
        assert_eq!(found.path(), Some("C:\\p.vhdx"));
        let list = answer(3, &[&0u32.to_le_bytes()[..], &wide_bytes("a\0b\0\0x\0")].concat());
        let found = Answer::new(&list, "d").parent().unwrap();
        assert_eq!(found, ParentLocation::Candidates(vec!["a".into(), "b".into()]));
        let endless = answer(3, &[&1u32.to_le_bytes()[..], &wide_bytes("C:\\p")].concat());
        assert!(Answer::new(&endless, "d").parent().is_err());
        let many = "p\0".repeat(5000);
        let many = answer(3, &[&0u32.to_le_bytes()[..], &wide_bytes(&many)].concat());
        let ParentLocation::Candidates(paths) = Answer::new(&many, "d").parent().unwrap() else {
            panic!("resolved");
        };
        assert_eq!(paths.len(), MAX_PARENT_CANDIDATES);
    }

    #[test]
    fn the_rest_is_numbers_at_their_places() {
        let vendor = [7u8; 16];
        let kind = answer(6, &[&3u32.to_le_bytes()[..], &vendor].concat());
        let kind = Answer::new(&kind, "d").storage_type().unwrap();
        assert_eq!((kind.device_id, kind.vendor_id), (3, Guid::from_memory(vendor)));
        let sectors = [512u32.to_le_bytes(), 4096u32.to_le_bytes(), 1u32.to_le_bytes()].concat();
        let sectors = answer(9, &sectors);
        let sectors = Answer::new(&sectors, "d").physical_disk().unwrap();
        assert_eq!(
            (sectors.logical_bytes, sectors.physical_bytes, sectors.is_remote),
            (512, 4096, true)
        );
        let number = answer(7, &4u32.to_le_bytes());
        assert_eq!(Answer::new(&number, "d").number().unwrap(), 4);
        assert!(Answer::new(&number, "d").flag().unwrap());
        assert!(Answer::new(&number, "d").guid().is_err());
    }
}
