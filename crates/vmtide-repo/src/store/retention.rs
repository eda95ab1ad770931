//! Objects that nobody can remove before a time: S3 Object Lock, as the store is asked for it.

use crate::RepoError;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// How firmly an object is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RetentionMode {
    /// Users with a special permission (`s3:BypassGovernanceRetention`) may remove it earlier.
    Governance,
    /// Nobody may, the owner of the account included.
    Compliance,
}

impl fmt::Display for RetentionMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Governance => "governance",
            Self::Compliance => "compliance",
        })
    }
}

impl FromStr for RetentionMode {
    type Err = RepoError;

    fn from_str(text: &str) -> Result<Self, RepoError> {
        match text {
            "governance" => Ok(Self::Governance),
            "compliance" => Ok(Self::Compliance),
            _ => Err(RepoError::Invalid(format!(
                "{text:?} is no kind of immutability; use governance or compliance"
            ))),
        }
    }
}

/// Until when an object is kept, and how firmly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Retention {
    /// How firmly.
    pub mode: RetentionMode,
    /// Until when, by the clock of the store.
    pub until: Timestamp,
}
