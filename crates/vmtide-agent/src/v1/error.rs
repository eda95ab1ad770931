//! What can be wrong with a request of `/v1`: one form, stable codes.

use crate::freezes::FreezeError;
use crate::places::NoPlace;
use crate::provider::ProviderError;
use crate::stream::{RangeError, ReceiveError, StreamError, WriteError};
use crate::transfers::Refused;
use crate::vms::BeginError;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::{CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use vmtide_block::BlockError;

/// What a client that met a limit is told to wait, in seconds.
const RETRY_AFTER_SECONDS: &str = "5";

/// The answer of a handler.
pub(super) type Result<T, E = ApiError> = std::result::Result<T, E>;

/// A request that is not answered as asked: the status, a code for programs and a line for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ApiError {
    pub(super) code: &'static str,
    pub(super) status: StatusCode,
    pub(super) message: String,
}

/// All codes and their statuses, as the document has them.
pub(super) const CODES: &[(&str, StatusCode)] = &[
    ("bad_request", StatusCode::BAD_REQUEST),
    ("out_of_range", StatusCode::BAD_REQUEST),
    ("unauthorized", StatusCode::UNAUTHORIZED),
    ("read_only_key", StatusCode::FORBIDDEN),
    ("denied", StatusCode::FORBIDDEN),
    ("not_found", StatusCode::NOT_FOUND),
    ("unknown_tracking_id", StatusCode::NOT_FOUND),
    ("unknown_freeze", StatusCode::NOT_FOUND),
    ("unknown_job", StatusCode::NOT_FOUND),
    ("method_not_allowed", StatusCode::METHOD_NOT_ALLOWED),
    ("timeout", StatusCode::REQUEST_TIMEOUT),
    ("exists", StatusCode::CONFLICT),
    ("in_use", StatusCode::CONFLICT),
    ("cancelled", StatusCode::CONFLICT),
    ("wrong_state", StatusCode::CONFLICT),
    ("token_used", StatusCode::CONFLICT),
    ("moment_lost", StatusCode::CONFLICT),
    ("tracking_disabled", StatusCode::CONFLICT),
    ("tracking_lost", StatusCode::CONFLICT),
    ("too_large", StatusCode::PAYLOAD_TOO_LARGE),
    ("unsupported_media_type", StatusCode::UNSUPPORTED_MEDIA_TYPE),
    ("range_not_satisfiable", StatusCode::RANGE_NOT_SATISFIABLE),
    ("not_a_disk", StatusCode::UNPROCESSABLE_ENTITY),
    ("damaged_stream", StatusCode::UNPROCESSABLE_ENTITY),
    ("too_many_streams", StatusCode::TOO_MANY_REQUESTS),
    ("too_many_freezes", StatusCode::TOO_MANY_REQUESTS),
    ("failed", StatusCode::INTERNAL_SERVER_ERROR),
    ("unsupported", StatusCode::NOT_IMPLEMENTED),
    ("busy", StatusCode::SERVICE_UNAVAILABLE),
    ("no_space", StatusCode::INSUFFICIENT_STORAGE),
];

impl ApiError {
    /// An error of this code; one that is not among [`CODES`] is a failure of the agent.
    pub(super) fn new(code: &'static str, message: impl Into<String>) -> Self {
        let known = CODES.iter().find(|(known, _)| *known == code);
        let status = known.map_or(StatusCode::INTERNAL_SERVER_ERROR, |(_, status)| *status);
        Self { code, status, message: message.into() }
    }

    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::new("bad_request", message)
    }

    pub(super) fn unknown_freeze(id: &str) -> Self {
        Self::new("unknown_freeze", format!("freeze {id}: has ended, or was never there"))
    }

    pub(super) fn unknown_job(id: &str) -> Self {
        Self::new("unknown_job", format!("job {id}: is forgotten, or was never there"))
    }
}

impl From<ProviderError> for ApiError {
    fn from(error: ProviderError) -> Self {
        let code = match &error {
            ProviderError::NotFound { .. } => "not_found",
            ProviderError::NotADisk { .. } => "not_a_disk",
            ProviderError::Exists { .. } => "exists",
            ProviderError::InUse { .. } => "in_use",
            ProviderError::Denied { .. } => "denied",
            ProviderError::UnknownTrackingId { .. } => "unknown_tracking_id",
            ProviderError::TrackingDisabled { .. } => "tracking_disabled",
            ProviderError::TrackingLost { .. } => "tracking_lost",
            ProviderError::Unsupported { .. } => "unsupported",
            ProviderError::Failed { .. } => "failed",
            ProviderError::Invalid { .. } => "bad_request",
            ProviderError::NoSpace { .. } => "no_space",
            ProviderError::Cancelled { .. } => "cancelled",
        };
        Self::new(code, error.to_string())
    }
}

impl From<ReceiveError> for ApiError {
    fn from(error: ReceiveError) -> Self {
        let code = match &error {
            ReceiveError::TooLarge { .. } | ReceiveError::TooManyRanges { .. } => "too_large",
            ReceiveError::Timeout => "timeout",
            ReceiveError::Cut | ReceiveError::Malformed(_) | ReceiveError::WrongData(_) => {
                "bad_request"
            }
            ReceiveError::Busy => "busy",
        };
        Self::new(code, error.to_string())
    }
}

impl From<RangeError> for ApiError {
    fn from(error: RangeError) -> Self {
        let code = match &error {
            RangeError::OutOfRange { .. } => "out_of_range",
            RangeError::Syntax { .. } | RangeError::TooLong => "bad_request",
            RangeError::TooMany { .. } => "too_large",
        };
        Self::new(code, error.to_string())
    }
}

impl From<Refused> for ApiError {
    fn from(error: Refused) -> Self {
        let code = match error {
            Refused::Client { .. } => "too_many_streams",
            Refused::Agent { .. } => "busy",
        };
        Self::new(code, error.to_string())
    }
}

impl From<NoPlace> for ApiError {
    fn from(error: NoPlace) -> Self {
        let code = match error {
            NoPlace::Client { .. } => "too_many_streams",
            NoPlace::Agent { .. } => "busy",
        };
        Self::new(code, error.to_string())
    }
}

impl From<FreezeError> for ApiError {
    fn from(error: FreezeError) -> Self {
        let code = match error {
            FreezeError::Client { .. } => "too_many_freezes",
            FreezeError::Agent { .. } => "busy",
        };
        Self::new(code, error.to_string())
    }
}

impl From<BeginError> for ApiError {
    fn from(error: BeginError) -> Self {
        let code = match error {
            BeginError::Request(_) => "bad_request",
            BeginError::TokenUsed => "token_used",
            BeginError::Client { .. } => "too_many_freezes",
            BeginError::Agent { .. } => "busy",
        };
        Self::new(code, error.to_string())
    }
}

impl From<StreamError> for ApiError {
    fn from(error: StreamError) -> Self {
        let code = match &error {
            StreamError::Cancelled => "cancelled",
            _ => "failed",
        };
        Self::new(code, error.to_string())
    }
}

impl From<WriteError> for ApiError {
    fn from(error: WriteError) -> Self {
        let code = match &error {
            WriteError::Damaged(_) => "damaged_stream",
            WriteError::Timeout => "timeout",
            WriteError::Cut => "bad_request",
            WriteError::Disk(BlockError::OutOfRange { .. }) => "out_of_range",
            WriteError::Disk(BlockError::Cancelled) => "cancelled",
            WriteError::Disk(_) | WriteError::WriterLost => "failed",
        };
        Self::new(code, error.to_string())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if self.status.is_server_error() {
            tracing::warn!(code = self.code, error = %self.message, "a request failed");
        }
        let text = serde_json::json!({"error": {"code": self.code, "message": self.message}});
        let json = [(CONTENT_TYPE, "application/json")];
        let mut response = (self.status, json, text.to_string()).into_response();
        let more: Option<(HeaderName, &'static str)> = match self.status {
            StatusCode::UNAUTHORIZED => Some((WWW_AUTHENTICATE, "Bearer")),
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                Some((RETRY_AFTER, RETRY_AFTER_SECONDS))
            }
            _ => None,
        };
        if let Some((name, value)) = more {
            response.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_of_an_error_is_in_the_table_and_in_the_document() {
        let document = include_str!("../../../../docs/agent-protocol.md");
        for (code, status) in CODES {
            assert!(document.contains(&format!("`{code}`")), "{code} is not in the document");
            assert!(document.contains(&format!("| {} |", status.as_u16())), "{status}");
        }
        let path = || "p".to_owned();
        let errors: Vec<ApiError> = vec![
            ProviderError::NotFound { path: path() }.into(),
            ProviderError::Denied { path: path(), reason: path() }.into(),
            ProviderError::Failed { path: path(), reason: path() }.into(),
            ReceiveError::Busy.into(),
            ReceiveError::Timeout.into(),
            RangeError::TooLong.into(),
            Refused::Client { limit: 1 }.into(),
            Refused::Agent { limit: 1 }.into(),
            NoPlace::Client { limit: 1 }.into(),
            NoPlace::Agent { limit: 1 }.into(),
            FreezeError::Client { limit: 1 }.into(),
            BeginError::TokenUsed.into(),
            BeginError::Agent { limit: 1 }.into(),
            ApiError::new("wrong_state", ""),
            ApiError::new("moment_lost", ""),
            StreamError::Cancelled.into(),
            WriteError::Timeout.into(),
            WriteError::Disk(BlockError::Cancelled).into(),
            ApiError::unknown_freeze("1"),
            ApiError::unknown_job("1"),
        ];
        for error in errors {
            let known = CODES.iter().find(|(code, _)| *code == error.code);
            assert_eq!(known.map(|(_, status)| *status), Some(error.status), "{error:?}");
        }
    }
}
