//! Errors of the service control manager.

use std::fmt;
use thiserror::Error;

/// The result of a call.
pub type Result<T> = std::result::Result<T, ServiceError>;

/// Why a call failed: one line with the service, what happened and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ServiceError {
    /// Windows said no.
    #[error("{operation} service {name}: {}", Described(.code))]
    Call {
        /// What was being done, as in "install".
        operation: &'static str,
        /// The service.
        name: String,
        /// The `WIN32_ERROR`.
        code: u32,
    },
    /// It did not get to the state asked for.
    #[error("service {name} is not {wanted} after {seconds} s; see its log")]
    Slow {
        /// The service.
        name: String,
        /// "running" or "stopped".
        wanted: &'static str,
        /// How long it was waited for.
        seconds: u64,
    },
    /// It ended while it was waited for.
    #[error("service {name} ended with code {code}; see its log")]
    Ended {
        /// The service.
        name: String,
        /// The code it ended with.
        code: u32,
    },
    /// A name or an argument that cannot be handed to Windows.
    #[error("service {name}: {problem}")]
    Invalid {
        /// The service.
        name: String,
        /// What is wrong.
        problem: &'static str,
    },
}

impl ServiceError {
    /// The code that Windows returned, where it did.
    pub fn code(&self) -> Option<u32> {
        match self {
            Self::Call { code, .. } => Some(*code),
            Self::Slow { .. } | Self::Ended { .. } | Self::Invalid { .. } => None,
        }
    }
}

/// A code as a person reads it.
struct Described<'a>(&'a u32);

impl fmt::Display for Described<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code = *self.0;
        let text = match code {
            5 => "access is denied; run this as administrator",
            1053 => "it did not report within the manager's time; see its log",
            1056 => "it is running already",
            1060 => "there is no such service; install it first",
            1062 => "it is not running",
            1063 => {
                "this command is for the service control manager; use start, or run the agent without service"
            }
            1072 => "it is being removed; close the windows that show services and try again",
            1073 => "there is one of this name; remove it first",
            _ => return write!(f, "error {code} of Windows{}", system_text(code)),
        };
        write!(f, "{text} (error {code})")
    }
}

/// What the running system says of a code that is not in the table.
#[cfg(windows)]
fn system_text(code: u32) -> String {
    format!(": {}", std::io::Error::from_raw_os_error(code.cast_signed()))
}

/// Only Windows knows its own texts.
#[cfg(not(windows))]
fn system_text(_: u32) -> &'static str {
    ""
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_one_line_and_name_the_service() {
        for code in [5, 1056, 1060, 1062, 1063, 1072, 1073, 1234] {
            let error = ServiceError::Call { operation: "stop", name: "vmtide".into(), code };
            let shown = error.to_string();
            assert!(shown.starts_with("stop service vmtide: ") && !shown.contains('\n'), "{shown}");
            assert!(shown.contains(&code.to_string()), "{shown}");
        }
    }
}
