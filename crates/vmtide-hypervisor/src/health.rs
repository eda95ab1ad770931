//! What a platform finds when it looks itself over.

use serde::{Deserialize, Serialize};

/// How one thing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthState {
    /// As it should be.
    Ok,
    /// Works, but not as well as it could, or not for long.
    Warn,
    /// Does not work.
    Fail,
}

/// One thing that was looked at. Texts are for people, one line each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheck {
    /// What, in a word or two: `rights`, `change tracking`.
    pub name: String,
    /// How it stands.
    pub state: HealthState,
    /// What was seen.
    pub detail: String,
    /// What to do, where something is to be done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
}

impl HealthCheck {
    /// Something that is as it should be.
    pub fn ok(name: &str, detail: impl Into<String>) -> Self {
        Self { name: name.into(), state: HealthState::Ok, detail: detail.into(), mend: None }
    }

    /// Something to be looked at, and what to do.
    pub fn warn(name: &str, detail: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            state: HealthState::Warn,
            detail: detail.into(),
            mend: Some(mend.into()),
        }
    }

    /// Something that does not work, and what to do.
    pub fn fail(name: &str, detail: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { state: HealthState::Fail, ..Self::warn(name, detail, mend) }
    }
}
