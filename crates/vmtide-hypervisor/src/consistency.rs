//! How good the moment is that a restore point shows.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The consistency of a frozen VM, from weakest to strongest; the order is used to tell a
/// downgrade.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Consistency {
    /// All disks at one moment, as after a power cut.
    #[serde(rename = "crash")]
    Crash,
    /// File systems flushed and frozen by an agent in the guest.
    #[serde(rename = "fs")]
    FileSystem,
    /// Applications brought to rest too (VSS writers, freeze hooks).
    #[serde(rename = "app")]
    Application,
}

impl Consistency {
    /// The word used on the command line and in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Crash => "crash",
            Self::FileSystem => "fs",
            Self::Application => "app",
        }
    }
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Consistency {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "crash" => Ok(Self::Crash),
            "fs" | "file-system" => Ok(Self::FileSystem),
            "app" | "application" => Ok(Self::Application),
            other => Err(format!("unknown consistency {other:?}: use app, fs or crash")),
        }
    }
}
