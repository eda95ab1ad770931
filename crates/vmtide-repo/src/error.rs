//! Errors of the repository: which object, what is wrong with it, what to do.

use jiff::Timestamp;
use vmtide_block::BlockError;

/// The result of an operation on a repository.
pub type Result<T, E = RepoError> = std::result::Result<T, E>;

/// Why an operation on a repository failed. One line for a person; the variant for the exit code.
#[derive(Debug, thiserror::Error)]
pub enum RepoError {
    /// There is no repository here, no such restore point, or an object is missing that nothing
    /// depends on.
    #[error("{what} not found{}{hint}", if .hint.is_empty() { "" } else { ": " })]
    NotFound {
        /// What was looked for, and where.
        what: String,
        /// What to do; may be empty.
        hint: String,
    },
    /// Something is there already that must not be replaced.
    #[error("{what} already exists{}{hint}", if .hint.is_empty() { "" } else { ": " })]
    AlreadyExists {
        /// What, and where.
        what: String,
        /// What to do; may be empty.
        hint: String,
    },
    /// No key slot opens with this password.
    #[error("wrong password for {repository}: no key slot opens with it")]
    WrongPassword {
        /// The repository, by path or URL.
        repository: String,
    },
    /// The store denies it to this user.
    #[error("{context}: permission denied: {source}")]
    Denied {
        /// What was done to which object.
        context: String,
        /// The operating system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The store keeps an object until a time and refuses to remove it (S3 Object Lock).
    #[error("{object} is immutable until {until}: it cannot be removed before")]
    Locked {
        /// The object's name.
        object: String,
        /// Until when.
        until: Timestamp,
    },
    /// Bytes of the repository are not what was written: a flipped bit, a cut file, a missing
    /// object that a restore point needs.
    #[error("damaged {object}: {detail}")]
    Damaged {
        /// The object's name.
        object: String,
        /// Which structure, where, and what was found.
        detail: String,
    },
    /// Written by a newer version, or by something else.
    #[error("{object}: unsupported {what}; a newer vmtide may be able to read it")]
    Unsupported {
        /// The object's name.
        object: String,
        /// The version or flag found.
        what: String,
    },
    /// Another process works on the repository in a way that excludes this.
    #[error("repository is busy: {detail}")]
    Busy {
        /// Who, and what to do.
        detail: String,
    },
    /// What was asked cannot be: a bad option, a point that fits two, a limit passed.
    #[error("{0}")]
    Invalid(String),
    /// The store failed.
    #[error("{context}: {source}")]
    Io {
        /// What was done to which object.
        context: String,
        /// The operating system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The disk read from or written to failed, or the job was cancelled.
    #[error(transparent)]
    Block(#[from] BlockError),
}

impl RepoError {
    /// An [`Io`](Self::Io) or, by the kind of `source`, a [`Denied`](Self::Denied) error.
    pub fn io(context: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        let (context, source) = (context.into(), source.into());
        match source.kind() {
            std::io::ErrorKind::PermissionDenied => Self::Denied { context, source },
            _ => Self::Io { context, source },
        }
    }

    /// A [`Damaged`](Self::Damaged) error.
    pub fn damaged(object: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Damaged { object: object.into(), detail: detail.into() }
    }

    /// Whether the data of the repository, and not the machine around it, is at fault.
    pub const fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged { .. })
    }
}

impl From<RepoError> for BlockError {
    /// For [`BlockDevice`](vmtide_block::BlockDevice)s that read from a repository.
    fn from(error: RepoError) -> Self {
        match error {
            RepoError::Block(error) => error,
            RepoError::Io { context, source } | RepoError::Denied { context, source } => {
                Self::Io { context, source }
            }
            RepoError::Damaged { object, detail } => Self::Damaged { context: object, detail },
            other => Self::Damaged { context: "repository".into(), detail: other.to_string() },
        }
    }
}
