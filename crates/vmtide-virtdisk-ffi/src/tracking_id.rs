//! Change tracking ids: opaque names of moments of a disk.
//!
//! Windows writes them like `rctX:5bfde23b:ce75:4303:b54f:6c18394f105c:00000001`: a GUID with colons and a
//! counter that goes up with each checkpoint. Nothing but the length is relied on here; whether the counter is
//! decimal is not documented.

use crate::{ErrorKind, Result, VirtdiskError};
use std::fmt;

/// The most UTF-16 units of an id with its terminator (`VIRTUAL_DISK_MAXIMUM_CHANGE_TRACKING_ID_LENGTH`).
pub const MAX_UNITS_WITH_TERMINATOR: usize = 256;

/// An id that Windows can be asked about: not empty, without zeros, at most 255 units.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TrackingId(String);

impl TrackingId {
    /// The id written as `text`, for questions about the disk at `path`.
    ///
    /// # Errors
    /// [`ErrorKind::UnknownTrackingId`] for a text that no disk can have as an id.
    pub fn new(text: &str, path: &str) -> Result<Self> {
        let units = text.encode_utf16().count();
        let problem = match units {
            0 => "the tracking id is empty".to_owned(),
            _ if units >= MAX_UNITS_WITH_TERMINATOR => {
                format!("the tracking id has {units} characters, more than 255")
            }
            _ if text.contains('\0') => "the tracking id has a zero character".to_owned(),
            _ => return Ok(Self(text.to_owned())),
        };
        Err(VirtdiskError::Request {
            path: path.to_owned(),
            problem: format!("{problem}: read the disk in full"),
            kind: ErrorKind::UnknownTrackingId,
        })
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The id with its terminator, for a call.
    pub fn to_wide(&self) -> Vec<u16> {
        self.0.encode_utf16().chain([0]).collect()
    }
}

impl fmt::Display for TrackingId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_up_to_255_units_are_taken_as_they_are() {
        for text in ["rctX:5bfde23b:ce75:4303:b54f:6c18394f105c:00000001", "x", "ä€"] {
            assert_eq!(TrackingId::new(text, "d").map(|id| id.to_string()), Ok(text.to_owned()));
        }
        let longest = "i".repeat(255);
        assert_eq!(TrackingId::new(&longest, "d").map(|id| id.to_wide().len()), Ok(256));
    }

    #[test]
    fn what_no_disk_can_have_is_an_unknown_id() {
        // 128 characters outside the basic plane are 256 units.
        for text in ["", "a\0b", &"i".repeat(256), &"😀".repeat(128), &"i".repeat(1 << 20)] {
            let error = TrackingId::new(text, "d").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::UnknownTrackingId);
            assert!(error.to_string().len() < 200);
        }
    }
}
