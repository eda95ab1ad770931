//! What can go wrong with tracking, as callers react to it.

use vmtide_block::BlockError;

/// The result of an operation on tracking.
pub type Result<T, E = TrackError> = std::result::Result<T, E>;

/// Why tracking could not answer: one line, naming the disk, what is wrong and what to do.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The id names no moment of this disk, or one that was retired.
    #[error("{disk}: tracking id {id} is not known: read the disk in full")]
    UnknownId {
        /// The disk.
        disk: String,
        /// The id asked for, cut where it is long.
        id: String,
    },
    /// Writes to the disk are not tracked.
    #[error("{disk}: change tracking is off: read the disk in full")]
    Disabled {
        /// The disk.
        disk: String,
    },
    /// There was tracking, and it cannot be relied on any more.
    #[error("{disk}: change tracking was lost: {reason}; read the disk in full")]
    Lost {
        /// The disk.
        disk: String,
        /// How it was noticed.
        reason: String,
    },
    /// Somebody else has the image.
    #[error("{disk}: in use: {reason}")]
    InUse {
        /// The disk.
        disk: String,
        /// By whom, as far as that is known.
        reason: String,
    },
    /// What was asked for cannot be.
    #[error("{context}: {reason}")]
    Unsupported {
        /// The disk or the setting.
        context: String,
        /// Why not, and what can instead.
        reason: String,
    },
    /// A file of tracking, or the socket of the process that hosts the disk, failed.
    #[error("{context}: {source}")]
    Io {
        /// What was done, to what.
        context: String,
        /// The operating system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The disk itself failed.
    #[error(transparent)]
    Block(#[from] BlockError),
}

impl TrackError {
    /// An [`Io`](Self::Io) error with its context.
    pub fn io(context: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self::Io { context: context.into(), source: source.into() }
    }

    pub(crate) fn unsupported(context: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported { context: context.into(), reason: reason.into() }
    }

    pub(crate) fn unknown_id(disk: &str, id: &str) -> Self {
        /// More than a sound id has; garbage is not repeated at length.
        const SHOWN_CHARACTERS: usize = 64;
        let shown: String = id.chars().filter(|c| !c.is_control()).take(SHOWN_CHARACTERS).collect();
        Self::UnknownId { disk: disk.to_owned(), id: shown }
    }
}

/// The error of a device whose tracking failed.
impl From<TrackError> for BlockError {
    fn from(error: TrackError) -> Self {
        match error {
            TrackError::Block(error) => error,
            TrackError::Io { context, source } => Self::Io { context, source },
            TrackError::InUse { disk, reason } => Self::Io {
                context: format!("{disk}: {reason}"),
                source: std::io::ErrorKind::ResourceBusy.into(),
            },
            TrackError::Unsupported { context, reason } => {
                Self::Unsupported { context, detail: reason }
            }
            other => Self::unsupported("change tracking", other.to_string()),
        }
    }
}
