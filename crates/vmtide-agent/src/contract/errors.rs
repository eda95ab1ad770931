//! What can be wrong with a request of the contract: statuses, and lines of text.

use crate::provider::ProviderError;
use crate::stream::ReceiveError;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use thiserror::Error;

/// Why a request of the contract is not answered. Its text is the body.
#[derive(Debug, Error)]
pub enum ContractError {
    /// No such interface.
    #[error("there is nothing here: see the agent's documentation for its interfaces")]
    NoRoute,
    /// A parameter is missing or no value for it; rct-service has no route then.
    #[error("{0}")]
    Parameter(&'static str),
    /// No such disk, or not one that is served.
    #[error("Bad vdisk path: {0}")]
    BadPath(String),
    /// The id names no moment of this disk.
    #[error("RCT ID not found: {0}")]
    UnknownId(String),
    /// The key may only read.
    #[error("this key may only read")]
    ReadOnlyKey,
    /// The text is none of the form asked for.
    #[error("{0}")]
    Malformed(String),
    /// The text has the form asked for, and something else in it.
    #[error("{0}")]
    WrongData(String),
    /// A range is not inside the disk.
    #[error("{0}")]
    OutOfRange(String),
    /// More was sent than is taken.
    #[error("{0}")]
    TooLarge(String),
    /// What is sent comes too slowly.
    #[error("the request did not arrive in time")]
    TooSlow,
    /// This client, or the agent, uses as much as it may.
    #[error("{0}")]
    TooMany(String),
    /// The provider failed in its own way.
    #[error("{0}")]
    Provider(ProviderError),
    /// The agent failed.
    #[error("{0}")]
    Internal(String),
}

impl ContractError {
    /// An error of a disk.
    pub fn of_disk(disk: &str, error: ProviderError) -> Self {
        match error {
            ProviderError::NotFound { .. } => Self::BadPath(disk.to_owned()),
            other => Self::Provider(other),
        }
    }

    /// An error of the question what changed. Whatever is wrong with the id or with tracking, a client of
    /// rct-service knows one answer, after which it reads the disk in full.
    pub fn of_changes(disk: &str, id: &str, error: ProviderError) -> Self {
        match error {
            ProviderError::UnknownTrackingId { .. } => Self::UnknownId(id.to_owned()),
            error @ (ProviderError::TrackingDisabled { .. }
            | ProviderError::TrackingLost { .. }) => Self::UnknownId(format!("{id} ({error})")),
            other => Self::of_disk(disk, other),
        }
    }

    /// An error of the list of ranges in a body.
    pub fn of_body(error: ReceiveError) -> Self {
        let text = error.to_string();
        match error {
            ReceiveError::TooLarge { .. } | ReceiveError::TooManyRanges { .. } => {
                Self::TooLarge(text)
            }
            ReceiveError::Timeout => Self::TooSlow,
            ReceiveError::Cut | ReceiveError::Malformed(_) => Self::Malformed(text),
            ReceiveError::WrongData(_) => Self::WrongData(text),
            ReceiveError::Busy => Self::TooMany(text),
        }
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::NoRoute | Self::Parameter(_) | Self::BadPath(_) | Self::UnknownId(_) => {
                StatusCode::NOT_FOUND
            }
            Self::ReadOnlyKey => StatusCode::FORBIDDEN,
            Self::Malformed(_) => StatusCode::BAD_REQUEST,
            Self::WrongData(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::OutOfRange(_) => StatusCode::RANGE_NOT_SATISFIABLE,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::TooSlow => StatusCode::REQUEST_TIMEOUT,
            Self::TooMany(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Provider(error) => status_of(error),
            Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// The status that fits an error of a provider.
pub fn status_of(error: &ProviderError) -> StatusCode {
    match error {
        ProviderError::NotFound { .. } | ProviderError::UnknownTrackingId { .. } => {
            StatusCode::NOT_FOUND
        }
        ProviderError::Invalid { .. } => StatusCode::BAD_REQUEST,
        ProviderError::NotADisk { .. } => StatusCode::UNPROCESSABLE_ENTITY,
        ProviderError::Exists { .. }
        | ProviderError::InUse { .. }
        | ProviderError::Cancelled { .. }
        | ProviderError::TrackingDisabled { .. }
        | ProviderError::TrackingLost { .. } => StatusCode::CONFLICT,
        ProviderError::Denied { .. } => StatusCode::FORBIDDEN,
        ProviderError::Unsupported { .. } => StatusCode::NOT_IMPLEMENTED,
        ProviderError::Failed { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        ProviderError::NoSpace { .. } => StatusCode::INSUFFICIENT_STORAGE,
    }
}

impl IntoResponse for ContractError {
    fn into_response(self) -> Response {
        let status = self.status();
        if status.is_server_error() {
            tracing::warn!(error = %self, "a request failed");
        }
        (status, self.to_string()).into_response()
    }
}
