//! Errors of the way over SMB.

use std::io::ErrorKind;
use vmtide_block::BlockError;
use vmtide_hypervisor::HypervisorError;

/// The result of a call over SMB.
pub type Result<T, E = SmbError> = std::result::Result<T, E>;

/// Why a call over SMB failed. One line for a person; the variant for code that reacts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SmbError {
    /// The server cannot be reached.
    #[error("cannot reach {peer} over SMB: {detail}")]
    Unreachable {
        /// The server and port.
        peer: String,
        /// What was seen, and what to do.
        detail: String,
    },
    /// The server refused the user, password or ticket, or took the user for a guest.
    #[error("{peer} refused the login over SMB: {detail}")]
    Login {
        /// The server.
        peer: String,
        /// What is wrong, and what to do.
        detail: String,
    },
    /// The user lacks a right.
    #[error("{what}: access denied over SMB: {detail}")]
    Denied {
        /// The file or share.
        what: String,
        /// Which right is missing.
        detail: String,
    },
    /// There is no such share, directory or file.
    #[error("{what} not found over SMB: {detail}")]
    NotFound {
        /// The file or share.
        what: String,
        /// What of it is missing.
        detail: String,
    },
    /// There is a file of this name already.
    #[error("{what} exists already")]
    Exists {
        /// The file.
        what: String,
    },
    /// Somebody has the file open in a way that excludes this.
    #[error("{what} is open elsewhere: {detail}")]
    InUse {
        /// The file.
        what: String,
        /// By whom it may be.
        detail: String,
    },
    /// The volume is full, or the user's quota of it.
    #[error("{what}: no space left on the server")]
    Full {
        /// The file.
        what: String,
    },
    /// The server, or this client, cannot do it.
    #[error("not possible over SMB: {detail}")]
    Unsupported {
        /// What, and what works instead.
        detail: String,
    },
    /// The server does not keep to the protocol; also a signature that is wrong.
    #[error("unexpected answer over SMB: {detail}")]
    Protocol {
        /// What was expected and what came.
        detail: String,
    },
    /// The connection broke.
    #[error("the SMB connection to {peer} broke: {detail}")]
    Disconnected {
        /// The server.
        peer: String,
        /// What was seen.
        detail: String,
    },
    /// The server did not answer in time.
    #[error("{peer} did not answer within {timeout_ms} ms over SMB")]
    Timeout {
        /// The server.
        peer: String,
        /// How long was waited, in milliseconds.
        timeout_ms: u64,
    },
    /// The server refused a request in a way that has no variant of its own.
    #[error("{what}: the server answered status {status:#010x}{}", status_name(*.status))]
    Refused {
        /// What was asked for.
        what: String,
        /// The NTSTATUS.
        status: u32,
    },
}

impl SmbError {
    /// A [`Protocol`](Self::Protocol) error.
    pub(crate) fn protocol(detail: impl Into<String>) -> Self {
        Self::Protocol { detail: detail.into() }
    }

    /// An [`Unsupported`](Self::Unsupported) error.
    pub(crate) fn unsupported(detail: impl Into<String>) -> Self {
        Self::Unsupported { detail: detail.into() }
    }

    /// Whether the connection is gone, so that the same may work over a new one.
    pub const fn is_connection_lost(&self) -> bool {
        matches!(self, Self::Disconnected { .. } | Self::Timeout { .. } | Self::Unreachable { .. })
    }

    /// What a server's `status` means for `what`.
    pub(crate) fn from_status(what: &str, status: u32) -> Self {
        let what = what.to_owned();
        let text = |text: &str| text.to_owned();
        match status {
            status::ACCESS_DENIED | status::NETWORK_ACCESS_DENIED => Self::Denied {
                what,
                detail: text("this user lacks the right; administrators of the host have it"),
            },
            status::PRIVILEGE_NOT_HELD | status::CANNOT_DELETE => {
                Self::Denied { what, detail: text("this user lacks the right") }
            }
            status::OBJECT_NAME_NOT_FOUND | status::NO_SUCH_FILE => {
                Self::NotFound { what, detail: text("there is no such file") }
            }
            status::OBJECT_PATH_NOT_FOUND => {
                Self::NotFound { what, detail: text("its directory is missing") }
            }
            status::OBJECT_NAME_INVALID | status::OBJECT_PATH_SYNTAX_BAD => {
                Self::NotFound { what, detail: text("the server takes no such name") }
            }
            status::BAD_NETWORK_NAME => {
                Self::NotFound { what, detail: text("there is no such share") }
            }
            status::OBJECT_NAME_COLLISION => Self::Exists { what },
            status::SHARING_VIOLATION | status::FILE_LOCK_CONFLICT | status::DELETE_PENDING => {
                Self::InUse {
                    what,
                    detail: text("a running VM writes it, or another program has it open"),
                }
            }
            status::DISK_FULL | status::QUOTA_EXCEEDED => Self::Full { what },
            status::NOT_SUPPORTED | status::INVALID_DEVICE_REQUEST | status::INVALID_INFO_CLASS => {
                Self::Unsupported { detail: format!("{what}: the server does not support it") }
            }
            status::NETWORK_SESSION_EXPIRED => Self::Disconnected {
                peer: what,
                detail: text("the session's Kerberos ticket has expired"),
            },
            status::USER_SESSION_DELETED
            | status::NETWORK_NAME_DELETED
            | status::FILE_CLOSED
            | status::CONNECTION_DISCONNECTED
            | status::SERVER_UNAVAILABLE
            | status::FILE_NOT_AVAILABLE => Self::Disconnected {
                peer: what,
                detail: format!("the server ended it (status {status:#010x})"),
            },
            _ => Self::Refused { what, status },
        }
    }
}

impl From<SmbError> for HypervisorError {
    fn from(error: SmbError) -> Self {
        let text = error.to_string();
        match error {
            SmbError::Unreachable { peer, detail } => Self::Unreachable { peer, detail },
            SmbError::Disconnected { peer, .. } => Self::Unreachable { peer, detail: text },
            SmbError::Login { peer, detail } => {
                Self::Denied { what: format!("login to {peer} over SMB"), detail }
            }
            SmbError::Denied { what, detail } => Self::Denied { what, detail },
            SmbError::NotFound { what, detail } => Self::NotFound { what, detail },
            SmbError::InUse { what, detail } => Self::Busy { vm: what, detail },
            SmbError::Exists { what } => Self::io(what, ErrorKind::AlreadyExists),
            SmbError::Full { what } => Self::io(what, ErrorKind::StorageFull),
            SmbError::Unsupported { detail } => {
                Self::Unsupported { what: "this over SMB".into(), detail }
            }
            SmbError::Protocol { detail } => Self::protocol("the SMB server", detail),
            SmbError::Timeout { peer, timeout_ms } => {
                Self::Timeout { action: format!("a request to {peer} over SMB"), timeout_ms }
            }
            SmbError::Refused { what, .. } => Self::failed(what, text),
        }
    }
}

impl From<SmbError> for BlockError {
    fn from(error: SmbError) -> Self {
        let text = error.to_string();
        let io = |kind: ErrorKind| Self::io(text.clone(), kind);
        match error {
            SmbError::Login { .. } | SmbError::Denied { .. } => io(ErrorKind::PermissionDenied),
            SmbError::NotFound { .. } => io(ErrorKind::NotFound),
            SmbError::Exists { .. } => io(ErrorKind::AlreadyExists),
            SmbError::InUse { .. } => io(ErrorKind::ResourceBusy),
            SmbError::Full { .. } => io(ErrorKind::StorageFull),
            SmbError::Timeout { .. } => io(ErrorKind::TimedOut),
            SmbError::Unreachable { peer, detail } | SmbError::Disconnected { peer, detail } => {
                Self::disconnected(peer, detail)
            }
            SmbError::Unsupported { detail } => Self::unsupported("SMB", detail),
            SmbError::Protocol { detail } => Self::damaged("SMB", detail),
            SmbError::Refused { .. } => io(ErrorKind::Other),
        }
    }
}

/// The statuses that mean something here (MS-ERREF 2.3.1).
pub(crate) mod status {
    pub(crate) const SUCCESS: u32 = 0;
    pub(crate) const PENDING: u32 = 0x0000_0103;
    pub(crate) const BUFFER_OVERFLOW: u32 = 0x8000_0005;
    pub(crate) const NO_MORE_FILES: u32 = 0x8000_0006;
    pub(crate) const INVALID_INFO_CLASS: u32 = 0xC000_0003;
    pub(crate) const NO_SUCH_FILE: u32 = 0xC000_000F;
    pub(crate) const INVALID_DEVICE_REQUEST: u32 = 0xC000_0010;
    pub(crate) const END_OF_FILE: u32 = 0xC000_0011;
    pub(crate) const MORE_PROCESSING_REQUIRED: u32 = 0xC000_0016;
    pub(crate) const ACCESS_DENIED: u32 = 0xC000_0022;
    pub(crate) const OBJECT_NAME_INVALID: u32 = 0xC000_0033;
    pub(crate) const OBJECT_NAME_NOT_FOUND: u32 = 0xC000_0034;
    pub(crate) const OBJECT_NAME_COLLISION: u32 = 0xC000_0035;
    pub(crate) const OBJECT_PATH_NOT_FOUND: u32 = 0xC000_003A;
    pub(crate) const OBJECT_PATH_SYNTAX_BAD: u32 = 0xC000_003B;
    pub(crate) const SHARING_VIOLATION: u32 = 0xC000_0043;
    pub(crate) const QUOTA_EXCEEDED: u32 = 0xC000_0044;
    pub(crate) const FILE_LOCK_CONFLICT: u32 = 0xC000_0054;
    pub(crate) const DELETE_PENDING: u32 = 0xC000_0056;
    pub(crate) const PRIVILEGE_NOT_HELD: u32 = 0xC000_0061;
    pub(crate) const NO_SUCH_USER: u32 = 0xC000_0064;
    pub(crate) const WRONG_PASSWORD: u32 = 0xC000_006A;
    pub(crate) const LOGON_FAILURE: u32 = 0xC000_006D;
    pub(crate) const ACCOUNT_RESTRICTION: u32 = 0xC000_006E;
    pub(crate) const INVALID_LOGON_HOURS: u32 = 0xC000_006F;
    pub(crate) const INVALID_WORKSTATION: u32 = 0xC000_0070;
    pub(crate) const PASSWORD_EXPIRED: u32 = 0xC000_0071;
    pub(crate) const ACCOUNT_DISABLED: u32 = 0xC000_0072;
    pub(crate) const DISK_FULL: u32 = 0xC000_007F;
    pub(crate) const FILE_IS_A_DIRECTORY: u32 = 0xC000_00BA;
    pub(crate) const NOT_SUPPORTED: u32 = 0xC000_00BB;
    pub(crate) const NETWORK_NAME_DELETED: u32 = 0xC000_00C9;
    pub(crate) const NETWORK_ACCESS_DENIED: u32 = 0xC000_00CA;
    pub(crate) const BAD_NETWORK_NAME: u32 = 0xC000_00CC;
    pub(crate) const CANNOT_DELETE: u32 = 0xC000_0121;
    pub(crate) const FILE_CLOSED: u32 = 0xC000_0128;
    pub(crate) const LOGON_TYPE_NOT_GRANTED: u32 = 0xC000_015B;
    pub(crate) const ACCOUNT_EXPIRED: u32 = 0xC000_0193;
    pub(crate) const USER_SESSION_DELETED: u32 = 0xC000_0203;
    pub(crate) const CONNECTION_DISCONNECTED: u32 = 0xC000_020C;
    pub(crate) const PASSWORD_MUST_CHANGE: u32 = 0xC000_0224;
    pub(crate) const ACCOUNT_LOCKED_OUT: u32 = 0xC000_0234;
    pub(crate) const NETWORK_SESSION_EXPIRED: u32 = 0xC000_035C;
    pub(crate) const SERVER_UNAVAILABLE: u32 = 0xC000_0466;
    pub(crate) const FILE_NOT_AVAILABLE: u32 = 0xC000_0467;
}

/// Why a login failed, in words; none for statuses that are not about the account.
pub(crate) const fn login_reason(code: u32) -> Option<&'static str> {
    Some(match code {
        status::LOGON_FAILURE | status::WRONG_PASSWORD | status::NO_SUCH_USER => {
            "the user name or password is wrong"
        }
        status::ACCOUNT_RESTRICTION => {
            "the account may not log in this way (an empty password, or a policy)"
        }
        status::INVALID_LOGON_HOURS => "the account may not log in at this time",
        status::INVALID_WORKSTATION => "the account may not log in from this machine",
        status::PASSWORD_EXPIRED | status::PASSWORD_MUST_CHANGE => "the password has expired",
        status::ACCOUNT_DISABLED => "the account is disabled",
        status::ACCOUNT_EXPIRED => "the account has expired",
        status::ACCOUNT_LOCKED_OUT => "the account is locked out",
        status::LOGON_TYPE_NOT_GRANTED => "the account may not log in over the network",
        status::ACCESS_DENIED | status::NETWORK_ACCESS_DENIED => {
            "the server allows this user no session"
        }
        _ => return None,
    })
}

fn status_name(code: u32) -> &'static str {
    match code {
        status::FILE_IS_A_DIRECTORY => " (it is a directory)",
        status::END_OF_FILE => " (end of file)",
        0xC000_000D => " (invalid parameter)",
        0xC000_009A => " (the server lacks resources)",
        0xC000_0101 => " (the directory is not empty)",
        0xC000_0185 | 0xC000_009C => " (input/output error)",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_become_what_jobs_react_to() {
        let of = |status| SmbError::from_status(r"\\hv1\C$\x.vhdx", status);
        let busy: HypervisorError = of(status::SHARING_VIOLATION).into();
        assert!(matches!(busy, HypervisorError::Busy { .. }), "{busy}");
        let denied: HypervisorError = of(status::ACCESS_DENIED).into();
        assert!(matches!(denied, HypervisorError::Denied { .. }), "{denied}");
        let missing: BlockError = of(status::OBJECT_NAME_NOT_FOUND).into();
        assert_eq!(missing.io_kind(), Some(ErrorKind::NotFound));
        assert!(of(status::USER_SESSION_DELETED).is_connection_lost());
        assert!(!of(status::DISK_FULL).is_connection_lost());
        let odd = of(0xC000_000D).to_string();
        assert!(odd.contains("0xc000000d (invalid parameter)"), "{odd}");
        let expired = login_reason(status::PASSWORD_EXPIRED).unwrap();
        assert_eq!(expired, "the password has expired");
    }
}
