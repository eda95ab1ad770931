//! The messages, and reading and writing them within limits.

use crate::{Result, TrackError, TrackingState};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, Read, Write};
use vmtide_block::ExtentKind;

/// The longest request: an id takes 255 characters, each at most 6 bytes of JSON.
pub(super) const MAX_REQUEST_BYTES: u64 = 16 << 10;

/// The longest answer: [`MAX_ITEMS`] ranges of two numbers of 20 digits.
pub(super) const MAX_ANSWER_BYTES: u64 = 2 << 20;

/// The most ranges or extents of one answer; callers ask again from there on.
pub(super) const MAX_ITEMS: usize = 16 << 10;

/// The most bytes of one read; larger reads are several.
pub(super) const MAX_READ_BYTES: u32 = 4 << 20;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Request {
    State,
    Checkpoint,
    Changes { id: String, offset: u64, length: u64, max_ranges: u32 },
    SetEnabled(bool),
    Freeze { hold: bool },
    Resume,
    Open,
    Attach { token: String },
    Read { offset: u64, length: u32 },
    Extents { offset: u64, length: u64 },
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Answer {
    State(TrackingState),
    Id(String),
    Changes { ranges: Vec<(u64, u64)>, processed_bytes: u64 },
    Done,
    View { token: String, size_bytes: u64, block_size_bytes: u32, id: Option<String> },
    Data { length: u32 },
    Extents { extents: Vec<(u64, u64, ExtentKind)> },
    Error { kind: ErrorKind, text: String },
}

/// The errors that callers tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ErrorKind {
    UnknownId,
    Disabled,
    Lost,
    InUse,
    Unsupported,
    Failed,
}

impl Answer {
    /// The answer that stands for an error.
    pub fn of_error(error: &TrackError) -> Self {
        let (kind, text) = match error {
            TrackError::UnknownId { id, .. } => (ErrorKind::UnknownId, id.clone()),
            TrackError::Disabled { .. } => (ErrorKind::Disabled, String::new()),
            TrackError::Lost { reason, .. } => (ErrorKind::Lost, reason.clone()),
            TrackError::InUse { reason, .. } => (ErrorKind::InUse, reason.clone()),
            TrackError::Unsupported { reason, .. } => (ErrorKind::Unsupported, reason.clone()),
            other => (ErrorKind::Failed, other.to_string()),
        };
        Self::Error { kind, text }
    }

    /// The answer, or the error that it stands for.
    pub fn check(self, disk: &str) -> Result<Self> {
        let Self::Error { kind, text } = self else {
            return Ok(self);
        };
        let disk = disk.to_owned();
        Err(match kind {
            ErrorKind::UnknownId => TrackError::unknown_id(&disk, &text),
            ErrorKind::Disabled => TrackError::Disabled { disk },
            ErrorKind::Lost => TrackError::Lost { disk, reason: text },
            ErrorKind::InUse => TrackError::InUse { disk, reason: text },
            ErrorKind::Unsupported => TrackError::unsupported(disk, text),
            ErrorKind::Failed => TrackError::io(disk, io::Error::other(text)),
        })
    }
}

/// Writes a message as a line.
pub(super) fn send(stream: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Reads a line of at most `limit` bytes as a message; none where the other side has ended.
pub(super) fn receive<T: DeserializeOwned>(
    stream: &mut impl BufRead,
    limit: u64,
) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    let count = stream.take(limit).read_until(b'\n', &mut line)?;
    if count == 0 {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a message is cut short or too long",
        ));
    }
    serde_json::from_slice(&line)
        .map(Some)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_within_their_limit() {
        let request = Request::Changes { id: "x".into(), offset: 1, length: 2, max_ranges: 3 };
        let mut line = Vec::new();
        send(&mut line, &request).unwrap();
        assert_eq!(receive::<Request>(&mut &line[..], 4096).unwrap(), Some(request));
        assert!(receive::<Request>(&mut &line[..], 10).is_err());
        assert!(receive::<Request>(&mut &line[..5], 4096).is_err());
        assert_eq!(receive::<Request>(&mut &b""[..], 4096).unwrap(), None);
        for bad in ["{}\n", "\"stat\"\n", "{\"read\":{\"offset\":-1,\"length\":0}}\n", "\u{0}\n"] {
            assert!(receive::<Request>(&mut bad.as_bytes(), 4096).is_err(), "{bad}");
        }
        let longest = Answer::Changes {
            ranges: vec![(u64::MAX, u64::MAX); MAX_ITEMS],
            processed_bytes: u64::MAX,
        };
        let mut line = Vec::new();
        send(&mut line, &longest).unwrap();
        assert!(line.len() as u64 <= MAX_ANSWER_BYTES);
    }
}
