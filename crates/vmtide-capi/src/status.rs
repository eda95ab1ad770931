//! Status codes, and what errors of the engine are among them.

use std::io::ErrorKind;
use vmtide_agent_client::AgentError;
use vmtide_block::BlockError;
use vmtide_engine::EngineError;
use vmtide_hypervisor::HypervisorError;
use vmtide_repo::RepoError;

/// What came of a call, as `vmtide_status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Status {
    Ok = 0,
    Failed = 1,
    Invalid = 2,
    Denied = 4,
    Damaged = 5,
    NotFound = 6,
    BadHandle = 7,
    Unsupported = 8,
    Internal = 9,
    Cancelled = 130,
}

/// Why a call failed: the number and one line.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub status: Status,
    pub message: String,
}

pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    pub fn new(status: Status, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    /// An argument that cannot be.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Status::Invalid, message)
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        Self::new(of_engine(&error), error.to_string())
    }
}

impl From<AgentError> for Failure {
    fn from(error: AgentError) -> Self {
        EngineError::from(error).into()
    }
}

impl From<BlockError> for Failure {
    fn from(error: BlockError) -> Self {
        Self::new(of_block(&error), error.to_string())
    }
}

impl From<RepoError> for Failure {
    fn from(error: RepoError) -> Self {
        Self::new(of_repo(&error), error.to_string())
    }
}

fn of_engine(error: &EngineError) -> Status {
    match error {
        EngineError::Usage(_) => Status::Invalid,
        EngineError::NotFound { .. } => Status::NotFound,
        EngineError::Incomplete { source, .. } => of_engine(source),
        EngineError::Io { source, .. } => of_io(source),
        EngineError::Repo(error) => of_repo(error),
        EngineError::Block(error) => of_block(error),
        EngineError::Hypervisor(error) => of_hypervisor(error),
        EngineError::Refused { .. } => Status::Failed,
    }
}

fn of_hypervisor(error: &HypervisorError) -> Status {
    match error {
        HypervisorError::NotFound { .. } => Status::NotFound,
        HypervisorError::Denied { .. } => Status::Denied,
        HypervisorError::Io { source, .. } => of_io(source),
        HypervisorError::Block(error) => of_block(error),
        HypervisorError::Unsupported { .. } => Status::Unsupported,
        HypervisorError::Unreachable { .. }
        | HypervisorError::Protocol { .. }
        | HypervisorError::Failed { .. }
        | HypervisorError::Busy { .. }
        | HypervisorError::ConsistencyNotReached { .. }
        | HypervisorError::Timeout { .. } => Status::Failed,
    }
}

fn of_repo(error: &RepoError) -> Status {
    match error {
        RepoError::NotFound { .. } => Status::NotFound,
        RepoError::WrongPassword { .. } | RepoError::Denied { .. } | RepoError::Locked { .. } => {
            Status::Denied
        }
        RepoError::Damaged { .. } => Status::Damaged,
        RepoError::Io { source, .. } => of_io(source),
        RepoError::Block(error) => of_block(error),
        RepoError::Invalid(_) => Status::Invalid,
        RepoError::Unsupported { .. } => Status::Unsupported,
        RepoError::AlreadyExists { .. } | RepoError::Busy { .. } => Status::Failed,
    }
}

fn of_block(error: &BlockError) -> Status {
    match error {
        BlockError::OutOfRange { .. } => Status::Invalid,
        BlockError::Io { source, .. } => of_io(source),
        BlockError::Damaged { .. } => Status::Damaged,
        BlockError::Unsupported { .. } | BlockError::ReadOnly { .. } => Status::Unsupported,
        BlockError::Disconnected { .. } => Status::Failed,
        BlockError::Cancelled => Status::Cancelled,
    }
}

fn of_io(error: &std::io::Error) -> Status {
    match error.kind() {
        ErrorKind::NotFound => Status::NotFound,
        ErrorKind::PermissionDenied => Status::Denied,
        _ => Status::Failed,
    }
}
