//! What a bucket is set to do with objects: keep their versions, keep them until a time.

use jiff::Timestamp;
use serde::Serialize;
use vmtide_repo::RetentionMode;

/// Whether a bucket keeps versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Versioning {
    /// It never did.
    Off,
    /// Every removal and replacement leaves the version before.
    On,
    /// It did once; old versions may be there.
    Suspended,
    /// These keys may not ask, or the server does not know the question.
    Unknown,
}

/// What a bucket does by itself with every new object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BucketRetention {
    /// `GOVERNANCE` or `COMPLIANCE`.
    pub mode: String,
    /// For how many days.
    pub days: u32,
}

/// Whether a bucket has object lock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ObjectLockState {
    /// No: nothing can be made immutable.
    Off,
    /// Yes, with what it does by itself.
    On(Option<BucketRetention>),
    /// These keys may not ask, or the server does not know the question.
    Unknown,
}

/// What was asked already.
#[derive(Debug, Default)]
pub(crate) struct BucketState {
    pub(crate) versioning: Option<Versioning>,
    pub(crate) object_lock: Option<ObjectLockState>,
}

/// The name of a mode in headers and documents.
pub(crate) const fn mode_name(mode: RetentionMode) -> &'static str {
    match mode {
        RetentionMode::Governance => "GOVERNANCE",
        RetentionMode::Compliance => "COMPLIANCE",
    }
}

/// The mode of a name.
pub(crate) fn mode_of(name: &str) -> Option<RetentionMode> {
    match name {
        "GOVERNANCE" => Some(RetentionMode::Governance),
        "COMPLIANCE" => Some(RetentionMode::Compliance),
        _ => None,
    }
}

/// A time as S3 takes it: whole seconds, and never earlier than asked for.
pub(crate) fn date(time: Timestamp) -> String {
    let second = time.as_second() + i64::from(time.subsec_nanosecond() > 0);
    Timestamp::from_second(second).unwrap_or(time).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_whole_seconds_and_not_earlier() {
        let exact: Timestamp = "2026-11-21T05:00:00Z".parse().unwrap();
        assert_eq!(date(exact), "2026-11-21T05:00:00Z");
        let later: Timestamp = "2026-11-21T05:00:00.25Z".parse().unwrap();
        assert_eq!(date(later), "2026-11-21T05:00:01Z");
    }
}
