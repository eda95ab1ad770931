//! Return codes of Hyper-V's methods and error codes of its jobs, in words and with what to do.
//!
//! The numbers are those of the method pages of the "Hyper-V WMI provider (V2)"; the snapshot and
//! reference-point services use the small ones of the DMTF as well.

use vmtide_hypervisor::HypervisorError;

/// Done.
pub(crate) const DONE: u32 = 0;
/// A job was started.
pub(crate) const JOB_STARTED: u32 = 4096;
/// Failed, without a reason.
pub(crate) const FAILED: u32 = 32768;
/// Access denied.
const ACCESS_DENIED: u32 = 32769;
/// Not supported.
const NOT_SUPPORTED: u32 = 32770;
/// The object is in use.
const IN_USE: u32 = 32774;
/// The VM, disk or checkpoint is in a state in which this cannot be done.
const INVALID_STATE: u32 = 32775;
/// A file is not there.
const FILE_NOT_FOUND: u32 = 32779;

/// What a code means, and what to do about it where that is known.
fn words(code: u32) -> Option<(&'static str, &'static str)> {
    let see_log = "see the event logs Hyper-V-VMMS and Hyper-V-Worker of the host";
    Some(match code {
        1 | NOT_SUPPORTED => ("not supported", "this version of Hyper-V or this VM cannot do it"),
        2 | FAILED => ("failed", see_log),
        3 | 32772 => (
            "timed out on the host",
            "the host or its storage is overloaded, or the guest \
                       does not answer; try again",
        ),
        4 | 32773 => (
            "invalid parameter",
            "the object may have been changed or removed meanwhile; \
                       try again",
        ),
        5 | INVALID_STATE => (
            "invalid state",
            "an earlier checkpoint may still be merging, another \
                       backup or a migration may be under way, or the VM is starting or saving; wait \
                       for it and try again",
        ),
        6 | 32776 => ("wrong type", "the object is not what the call works on"),
        ACCESS_DENIED => (
            "access denied",
            "add the user to the group Hyper-V Administrators of the \
                       host; for files, NT VIRTUAL MACHINE\\Virtual Machines needs its rights on them",
        ),
        32771 => ("unknown status", see_log),
        IN_USE => {
            ("in use", "another backup, merge or migration works on it; wait for it and try again")
        }
        32777 => {
            ("not available", "the guest's integration services may not answer; see that they run")
        }
        32778 => ("out of memory on the host", "free memory on the host"),
        FILE_NOT_FOUND => (
            "file not found",
            "a disk or a configuration of the VM is not where the host \
                       expects it",
        ),
        _ => return None,
    })
}

/// The error for a method that answered `code`, or a job that ended with it, while doing `what`. The
/// host's own words, where it gave any, go before ours.
pub(crate) fn error(what: &str, code: u32, host_says: &str) -> HypervisorError {
    let (meaning, mend) = words(code).unwrap_or(("an undocumented code", ""));
    let mut detail = String::new();
    if !host_says.is_empty() {
        detail = format!("{}: ", host_says.trim_end_matches(['.', ' ']));
    }
    detail.push_str(&format!("{meaning} ({code})"));
    if !mend.is_empty() {
        detail.push_str("; ");
        detail.push_str(mend);
    }
    match code {
        ACCESS_DENIED => HypervisorError::Denied { what: what.into(), detail },
        NOT_SUPPORTED | 1 => HypervisorError::Unsupported { what: what.into(), detail },
        FILE_NOT_FOUND => HypervisorError::NotFound { what: what.into(), detail },
        _ => HypervisorError::failed(what, detail),
    }
}

/// Whether a checkpoint that failed with `code` may have failed for its consistency: the guest or its
/// applications could not be brought to rest. Not where another reason is plain.
pub(crate) fn may_be_consistency(code: u32) -> bool {
    !matches!(
        code,
        4..=6 | 32773 | 32776 | ACCESS_DENIED | IN_USE | INVALID_STATE | 32778 | FILE_NOT_FOUND
    )
}

/// Whether the host has ended its work with `code`, so that nothing more will come of it. After a time limit of its own, or
/// with a state that it does not know itself, it may work on.
pub(crate) fn is_last_word(code: u32) -> bool {
    !matches!(code, 3 | 32771 | 32772)
}

/// Whether `code` says that the object is at something else, or in a state in which it will not stay.
pub(crate) fn is_busy(code: u32) -> bool {
    matches!(code, 5 | IN_USE | INVALID_STATE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_say_what_to_do() {
        let state = error("making a checkpoint of web", 32775, "").to_string();
        assert!(state.contains("32775") && state.contains("still be merging"), "{state}");
        assert!(matches!(error("x", 32769, ""), HypervisorError::Denied { .. }));
        assert!(matches!(error("x", 32770, ""), HypervisorError::Unsupported { .. }));
        assert!(matches!(error("x", 32779, ""), HypervisorError::NotFound { .. }));
        let odd = error("x", 77, "The guest is asleep.").to_string();
        assert!(odd.contains("The guest is asleep: an undocumented code (77)"), "{odd}");
        assert!(!odd.contains('\n'));
    }

    #[test]
    fn only_an_open_question_is_taken_for_consistency() {
        assert!(may_be_consistency(32768) && may_be_consistency(32772) && may_be_consistency(2));
        assert!(!may_be_consistency(32775) && !may_be_consistency(32769));
    }
}
