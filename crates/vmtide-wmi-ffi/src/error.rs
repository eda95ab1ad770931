//! What the codes of management mean: `WBEM_E_…` of `wbemcli.h`, and those of COM and RPC beneath them.

use vmtide_cim::CimError;

/// The host, as errors name it.
pub const PEER: &str = "this host";

/// What a code means for whoever asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    NotFound,
    Denied,
    /// The service is not there, so that nothing was asked.
    NotThere,
    /// The service went away in the middle.
    Gone,
    Timeout,
    Fault,
}

/// The codes that something follows from, with their names for the log and for people who search for them.
const KNOWN: &[(u32, &str, Meaning)] = &[
    (0x8004_1001, "WBEM_E_FAILED", Meaning::Fault),
    (0x8004_1002, "WBEM_E_NOT_FOUND", Meaning::NotFound),
    (0x8004_1003, "WBEM_E_ACCESS_DENIED", Meaning::Denied),
    (0x8004_1004, "WBEM_E_PROVIDER_FAILURE", Meaning::Fault),
    (0x8004_1005, "WBEM_E_TYPE_MISMATCH", Meaning::Fault),
    (0x8004_1006, "WBEM_E_OUT_OF_MEMORY", Meaning::Fault),
    (0x8004_1008, "WBEM_E_INVALID_PARAMETER", Meaning::Fault),
    (0x8004_1009, "WBEM_E_NOT_AVAILABLE", Meaning::Fault),
    (0x8004_100C, "WBEM_E_NOT_SUPPORTED", Meaning::Fault),
    (0x8004_100E, "WBEM_E_INVALID_NAMESPACE", Meaning::NotFound),
    (0x8004_100F, "WBEM_E_INVALID_OBJECT", Meaning::NotFound),
    (0x8004_1010, "WBEM_E_INVALID_CLASS", Meaning::NotFound),
    (0x8004_1011, "WBEM_E_PROVIDER_NOT_FOUND", Meaning::Fault),
    (0x8004_1013, "WBEM_E_PROVIDER_LOAD_FAILURE", Meaning::Fault),
    (0x8004_1015, "WBEM_E_TRANSPORT_FAILURE", Meaning::Gone),
    (0x8004_1017, "WBEM_E_INVALID_QUERY", Meaning::Fault),
    (0x8004_1018, "WBEM_E_INVALID_QUERY_TYPE", Meaning::Fault),
    (0x8004_102E, "WBEM_E_INVALID_METHOD", Meaning::NotFound),
    (0x8004_102F, "WBEM_E_INVALID_METHOD_PARAMETERS", Meaning::Fault),
    (0x8004_1032, "WBEM_E_CALL_CANCELLED", Meaning::Gone),
    (0x8004_1033, "WBEM_E_SHUTTING_DOWN", Meaning::Gone),
    (0x8004_103A, "WBEM_E_INVALID_OBJECT_PATH", Meaning::NotFound),
    (0x8004_1055, "WBEM_E_METHOD_NOT_IMPLEMENTED", Meaning::NotFound),
    (0x8004_1056, "WBEM_E_METHOD_DISABLED", Meaning::Fault),
    (0x8004_1062, "WBEM_E_PRIVILEGE_NOT_HELD", Meaning::Denied),
    (0x8004_1069, "WBEM_E_TIMED_OUT", Meaning::Timeout),
    (0x8004_106C, "WBEM_E_QUOTA_VIOLATION", Meaning::Fault),
    (0x8007_0005, "E_ACCESSDENIED", Meaning::Denied),
    (0x8007_06BA, "RPC_S_SERVER_UNAVAILABLE", Meaning::NotThere),
    (0x8007_06BE, "RPC_S_CALL_FAILED", Meaning::Gone),
    (0x8007_06BF, "RPC_S_CALL_FAILED_DNE", Meaning::NotThere),
    (0x8007_0422, "ERROR_SERVICE_DISABLED", Meaning::NotThere),
    (0x8001_0007, "RPC_E_SERVER_DIED", Meaning::Gone),
    (0x8001_0012, "RPC_E_SERVER_DIED_DNE", Meaning::NotThere),
    (0x8001_0108, "RPC_E_DISCONNECTED", Meaning::Gone),
    (0x8004_0154, "REGDB_E_CLASSNOTREG", Meaning::NotThere),
];

fn known(code: u32) -> Option<(&'static str, Meaning)> {
    KNOWN.iter().find(|(other, ..)| *other == code).map(|(_, name, meaning)| (*name, *meaning))
}

/// Whether the connection is of no more use after this code.
pub fn ends_connection(code: u32) -> bool {
    matches!(known(code), Some((_, Meaning::Gone | Meaning::NotThere)))
}

/// The error for a code that `action` was answered with; `text` is what the system says of it, or nothing.
pub fn of_code(action: &str, code: u32, text: &str) -> CimError {
    let (name, meaning) = known(code).unwrap_or(("", Meaning::Fault));
    of_meaning(action, code, name, meaning, text)
}

/// The same for a code that came after the call was accepted, where its result was waited for: a service that is not
/// there now was there then, and what was asked may have been done.
pub fn of_accepted(action: &str, code: u32, text: &str) -> CimError {
    let (name, meaning) = known(code).unwrap_or(("", Meaning::Fault));
    let meaning = if meaning == Meaning::NotThere { Meaning::Gone } else { meaning };
    of_meaning(action, code, name, meaning, text)
}

fn of_meaning(action: &str, code: u32, name: &str, meaning: Meaning, text: &str) -> CimError {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let words = [name, text.trim()].into_iter().filter(|word| !word.is_empty());
    let mut detail = words.collect::<Vec<_>>().join(": ");
    detail = if detail.is_empty() {
        format!("{code:#010x}")
    } else {
        format!("{detail} ({code:#010x})")
    };
    let (peer, action) = (PEER.to_owned(), action.to_owned());
    match meaning {
        Meaning::NotFound => CimError::NotFound { what: action, detail },
        Meaning::Denied => CimError::Denied {
            peer,
            detail: format!(
                "{action}: {detail}; the account must be a member of the group Hyper-V Administrators or \
                 Administrators"
            ),
        },
        Meaning::NotThere => CimError::Unreachable {
            peer,
            detail: format!(
                "{action}: {detail}; is the service Windows Management Instrumentation running?"
            ),
            before_request: true,
        },
        Meaning::Gone => CimError::Unreachable {
            peer,
            detail: format!("{action}: {detail}"),
            before_request: false,
        },
        // How long the service waits is its own; this says only that it did.
        Meaning::Timeout => CimError::Timeout { action, timeout_ms: 0 },
        Meaning::Fault => CimError::Fault { action, detail, code: Some(code) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_their_classes() {
        let error = |code| of_code("the query X", code, "said\nso");
        assert!(matches!(error(0x8004_1002), CimError::NotFound { .. }));
        assert!(matches!(error(0x8004_100E), CimError::NotFound { .. }));
        assert!(matches!(error(0x8004_1003), CimError::Denied { .. }));
        assert!(matches!(error(0x8007_06BA), CimError::Unreachable { before_request: true, .. }));
        assert!(matches!(error(0x8001_0108), CimError::Unreachable { before_request: false, .. }));
        let CimError::Fault { detail, code, .. } = error(0x8004_1017) else { panic!("no fault") };
        assert_eq!(detail, "WBEM_E_INVALID_QUERY: said so (0x80041017)");
        assert_eq!(code, Some(0x8004_1017));
        assert_eq!(of_code("x", 5, "").to_string(), "x was refused: 0x00000005");
        assert!(ends_connection(0x8001_0108) && !ends_connection(0x8004_1002));
        let mut codes: Vec<_> = KNOWN.iter().map(|(code, ..)| *code).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), KNOWN.len());
    }

    #[test]
    fn a_call_that_was_accepted_may_have_run_whatever_became_of_the_service() {
        for code in [0x8007_06BA, 0x8007_06BF, 0x8007_0422, 0x8001_0012, 0x8004_0154, 0x8001_0108] {
            let error = of_accepted("Msvm_X.DefineSystem", code, "");
            assert!(
                matches!(error, CimError::Unreachable { before_request: false, .. }),
                "{code:#x}: {error:?}"
            );
            assert!(!error.was_not_run() && ends_connection(code), "{code:#x}");
        }
        assert!(of_code("x", 0x8007_06BA, "").was_not_run());
        assert_eq!(of_accepted("x", 5, ""), of_code("x", 5, ""));
    }
}
