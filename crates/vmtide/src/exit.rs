//! Exit codes: the one place where what happened becomes a number. They are part of the interface
//! and never change their meaning.

use std::io::ErrorKind;
use vmtide_block::BlockError;
use vmtide_engine::EngineError;
use vmtide_hypervisor::HypervisorError;
use vmtide_repo::RepoError;

/// How a run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// All done.
    Done = 0,
    /// Failed for a reason without a code of its own.
    Failed = 1,
    /// The command line, the settings file or the request is wrong.
    Usage = 2,
    /// Done, but the user should look: consistency downgraded, tracking lost, something left.
    Warnings = 3,
    /// Wrong password, or permission denied.
    Denied = 4,
    /// Damaged data found.
    Damaged = 5,
    /// The repository, restore point, VM, disk or file does not exist.
    NotFound = 6,
    /// Interrupted by the user.
    Interrupted = 130,
}

impl Exit {
    /// The number.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// [`Warnings`](Self::Warnings) where there are any.
    pub const fn with_warnings(any: bool) -> Self {
        if any { Self::Warnings } else { Self::Done }
    }

    /// Of two outcomes the one that a script has to know of.
    pub fn worse(self, other: Self) -> Self {
        let rank = |exit: Self| match exit {
            Self::Done => 0,
            Self::Warnings => 1,
            Self::Interrupted => 3,
            _ => 2,
        };
        if rank(other) > rank(self) { other } else { self }
    }
}

/// How a run ends that failed with `error`.
pub fn of_error(error: &EngineError) -> Exit {
    match error {
        EngineError::Usage(_) => Exit::Usage,
        EngineError::NotFound { .. } => Exit::NotFound,
        EngineError::Refused { .. } => Exit::Failed,
        EngineError::Incomplete { source, .. } => of_error(source),
        EngineError::Io { source, .. } => of_io(source),
        EngineError::Repo(error) => of_repo(error),
        EngineError::Hypervisor(error) => of_hypervisor(error),
        EngineError::Block(error) => of_block(error),
    }
}

/// How a run ends that failed with an error of the repository.
pub fn of_repo(error: &RepoError) -> Exit {
    match error {
        RepoError::NotFound { .. } => Exit::NotFound,
        RepoError::WrongPassword { .. } | RepoError::Denied { .. } | RepoError::Locked { .. } => {
            Exit::Denied
        }
        RepoError::Damaged { .. } => Exit::Damaged,
        RepoError::Io { source, .. } => of_io(source),
        RepoError::Block(error) => of_block(error),
        RepoError::AlreadyExists { .. }
        | RepoError::Unsupported { .. }
        | RepoError::Busy { .. }
        | RepoError::Invalid(_) => Exit::Failed,
    }
}

fn of_hypervisor(error: &HypervisorError) -> Exit {
    match error {
        HypervisorError::NotFound { .. } => Exit::NotFound,
        HypervisorError::Denied { .. } => Exit::Denied,
        HypervisorError::Io { source, .. } => of_io(source),
        HypervisorError::Block(error) => of_block(error),
        HypervisorError::Unreachable { .. }
        | HypervisorError::Protocol { .. }
        | HypervisorError::Failed { .. }
        | HypervisorError::Busy { .. }
        | HypervisorError::ConsistencyNotReached { .. }
        | HypervisorError::Unsupported { .. }
        | HypervisorError::Timeout { .. } => Exit::Failed,
    }
}

fn of_block(error: &BlockError) -> Exit {
    match error {
        BlockError::Damaged { .. } => Exit::Damaged,
        BlockError::Cancelled => Exit::Interrupted,
        BlockError::Io { source, .. } => of_io(source),
        BlockError::OutOfRange { .. }
        | BlockError::Unsupported { .. }
        | BlockError::ReadOnly { .. }
        | BlockError::Disconnected { .. } => Exit::Failed,
    }
}

fn of_io(error: &std::io::Error) -> Exit {
    match error.kind() {
        ErrorKind::PermissionDenied => Exit::Denied,
        ErrorKind::NotFound => Exit::NotFound,
        _ => Exit::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_of_error_has_its_code_through_all_layers() {
        let io = |kind| std::io::Error::from(kind);
        let cases: [(EngineError, u8); 12] = [
            (EngineError::usage("x"), 2),
            (EngineError::refused("x", "y"), 1),
            (EngineError::io("x", io(ErrorKind::PermissionDenied)), 4),
            (EngineError::io("x", io(ErrorKind::NotFound)), 6),
            (EngineError::io("x", io(ErrorKind::StorageFull)), 1),
            (RepoError::WrongPassword { repository: "r".into() }.into(), 4),
            (RepoError::io("x", io(ErrorKind::PermissionDenied)).into(), 4),
            (RepoError::damaged("x", "y").into(), 5),
            (RepoError::Block(BlockError::Cancelled).into(), 130),
            (HypervisorError::from(BlockError::Cancelled).into(), 130),
            (HypervisorError::protocol("x", "y").into(), 1),
            (BlockError::damaged("x", "y").into(), 5),
        ];
        for (error, code) in cases {
            assert_eq!(of_error(&error).code(), code, "{error}");
        }
    }

    #[test]
    fn an_interruption_outranks_a_failure_and_a_failure_a_warning() {
        assert_eq!(Exit::Done.worse(Exit::Warnings), Exit::Warnings);
        assert_eq!(Exit::Denied.worse(Exit::Warnings), Exit::Denied);
        assert_eq!(Exit::Denied.worse(Exit::Interrupted), Exit::Interrupted);
        assert_eq!(Exit::NotFound.worse(Exit::Failed), Exit::NotFound);
    }
}
