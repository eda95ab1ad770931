//! Change tracking of images: `vmtide-track`, with its errors as the codes that the interface has for them.

use crate::content::{code_of, image_options};
use crate::faults::Faults;
use std::path::Path;
use std::sync::Arc;
use vmtide_block::{BlockDevice, ByteRange, WritableBlockDevice};
use vmtide_track::{
    HostOptions, HostedImage, MAX_RANGES_PER_PAGE, OfflineTracking, Options, TrackError,
};
use windows_sys::Win32::Foundation::{
    ERROR_FILE_CORRUPT, ERROR_INVALID_PARAMETER, ERROR_SHARING_VIOLATION,
    ERROR_VHD_CHANGE_TRACKING_DISABLED, ERROR_VHD_INVALID_CHANGE_TRACKING_ID,
    ERROR_VHD_MISSING_CHANGE_TRACKING_INFORMATION,
};

/// What the interface tells of tracking.
pub struct State {
    /// Whether writes are tracked.
    pub enabled: bool,
    /// Whether something was written since the most recent id.
    pub newer_changes: bool,
    /// The most recent id; empty where there is none.
    pub most_recent_id: String,
}

fn code(error: &TrackError) -> u32 {
    match error {
        TrackError::UnknownId { .. } => ERROR_VHD_INVALID_CHANGE_TRACKING_ID,
        TrackError::Disabled { .. } => ERROR_VHD_CHANGE_TRACKING_DISABLED,
        TrackError::Lost { .. } => ERROR_VHD_MISSING_CHANGE_TRACKING_INFORMATION,
        TrackError::InUse { .. } => ERROR_SHARING_VIOLATION,
        TrackError::Block(error) => code_of(error),
        TrackError::Io { source, .. } => crate::content::io_code(source),
        _ => ERROR_FILE_CORRUPT,
    }
}

/// The state of an image.
pub fn state(image: &Path) -> Result<State, u32> {
    let state = OfflineTracking::open(image).map_err(|error| code(&error))?.state();
    Ok(State {
        enabled: state.enabled,
        newer_changes: state.newer_changes,
        most_recent_id: state.most_recent_id,
    })
}

/// Switches tracking.
pub fn set(image: &Path, enabled: bool) -> Result<(), u32> {
    let mut tracking = OfflineTracking::open(image).map_err(|error| code(&error))?;
    tracking.set_enabled(enabled).map_err(|error| code(&error))
}

/// All that changed since an id within a range.
pub fn changes(image: &Path, id: &str, asked: ByteRange) -> Result<Vec<ByteRange>, u32> {
    let tracking = OfflineTracking::open(image).map_err(|error| code(&error))?;
    let mut all = Vec::new();
    let mut rest = asked;
    while !rest.is_empty() {
        let page =
            tracking.changes_since(id, rest, MAX_RANGES_PER_PAGE).map_err(|error| code(&error))?;
        if page.processed_bytes == 0 {
            return Err(ERROR_INVALID_PARAMETER);
        }
        all.extend(page.ranges);
        rest = ByteRange::from_bounds(rest.offset + page.processed_bytes, rest.end());
    }
    Ok(all)
}

/// The id as the caller sees it: as long as a fault says.
pub fn padded(id: String, faults: &Faults) -> String {
    let length = faults.value("tracking.id_length").and_then(|length| usize::try_from(length).ok());
    match length {
        Some(length) if !id.is_empty() => format!("{id:x<length$}"),
        _ => id,
    }
}

/// The id that the caller means.
pub fn unpadded(id: &str, faults: &Faults) -> String {
    match faults.is_on("tracking.id_length") {
        true => id.trim_end_matches('x').to_owned(),
        false => id.to_owned(),
    }
}

/// An image open for writing, every write of which is tracked.
pub struct Writer(Arc<HostedImage>);

impl Writer {
    /// Opens it.
    pub fn open(image: &Path) -> Result<Self, u32> {
        let options =
            HostOptions { tracking: Options::default(), save_interval_ms: 0, socket: false };
        HostedImage::open(image, &image_options(), &options).map(Self).map_err(|error| code(&error))
    }

    /// The size of the disk in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.0.disk().size_bytes()
    }

    /// Fills `buffer` from `offset`.
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), u32> {
        self.0.disk().read_at(buffer, offset).map_err(|error| code_of(&error))
    }

    /// Writes `data` at `offset`.
    pub fn write(&self, data: &[u8], offset: u64) -> Result<(), u32> {
        self.0.disk().write_at(data, offset).map_err(|error| code_of(&error))
    }

    /// Ends the writing.
    pub fn close(self) -> Result<(), u32> {
        self.0.close().map_err(|error| code(&error))
    }
}
