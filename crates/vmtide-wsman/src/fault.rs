//! Faults: what hosts say when they refuse, as errors of CIM.
//!
//! A fault has a subcode (DSP0226 14), text, and Microsoft's detail, whose `WSManFault` carries a code and, where WMI
//! refused, the provider's own fault with an HRESULT within.

use crate::answer::short;
use crate::xml::Element;
use std::time::Duration;
use vmtide_cim::CimError;

/// Access denied, of Windows and of WMI.
const ACCESS_DENIED: [u32; 3] = [5, 0x8007_0005, 0x8004_1003];

/// No such object, namespace or class, of WMI (`WBEM_E_NOT_FOUND`, `_INVALID_NAMESPACE`, `_INVALID_CLASS`).
const NOT_FOUND: [u32; 3] = [0x8004_1002, 0x8004_100e, 0x8004_1010];

/// What the request was, for the error.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked<'a> {
    /// The host, as errors name it.
    pub peer: &'a str,
    /// What was asked, e.g. `query of Msvm_ComputerSystem`.
    pub action: &'a str,
    /// How long the host was given.
    pub timeout: Duration,
    /// The largest answer that was wanted, in bytes.
    pub max_envelope_bytes: u32,
}

/// The error that a `Fault` element stands for.
pub(crate) fn error(fault: &Element, asked: &Asked<'_>) -> CimError {
    let subcode = fault
        .descend(&["Code", "Subcode", "Value"])
        .map(|value| value.text.trim().rsplit(':').next().unwrap_or_default().to_owned())
        .unwrap_or_default();
    let detail = fault.child("Detail");
    let code = detail.and_then(innermost_code);
    let is = |codes: &[u32]| code.is_some_and(|code| codes.contains(&code));
    let words = words(fault, &subcode, code);
    let action = asked.action.to_owned();
    match subcode.as_str() {
        "AccessDenied" => denied(words, asked),
        _ if is(&ACCESS_DENIED) => denied(words, asked),
        "TimedOut" => CimError::Timeout { action, timeout_ms: milliseconds(asked.timeout) },
        "EncodingLimit" => {
            CimError::TooLarge { action, limit_bytes: asked.max_envelope_bytes.into() }
        }
        "InvalidSelectors" | "DestinationUnreachable" => {
            CimError::NotFound { what: action, detail: words }
        }
        _ if is(&NOT_FOUND) => CimError::NotFound { what: action, detail: words },
        _ => CimError::Fault { action, detail: words, code },
    }
}

fn denied(words: String, asked: &Asked<'_>) -> CimError {
    CimError::Denied {
        peer: asked.peer.into(),
        detail: format!(
            "{}: {words}; the user must be in the host's groups Hyper-V Administrators and Remote Management Users",
            asked.action
        ),
    }
}

/// A duration in milliseconds.
pub(crate) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The code nearest to the cause: the deepest `WSManFault`.
fn innermost_code(element: &Element) -> Option<u32> {
    let inner = element.children.iter().find_map(innermost_code);
    let own = || {
        let code = element.attribute("Code").filter(|_| element.name == "WSManFault")?;
        // Codes are HRESULTs in decimal, with or without a sign.
        let code: i64 = code.trim().parse().ok()?;
        u32::try_from(code).or_else(|_| i32::try_from(code).map(i32::cast_unsigned)).ok()
    };
    inner.or_else(own)
}

/// The most telling text: of the deepest message, else of the reason, else the subcode.
fn words(fault: &Element, subcode: &str, code: Option<u32>) -> String {
    let message = fault.child("Detail").and_then(deepest_message);
    let reason = fault.descend(&["Reason", "Text"]).map(|text| short(&text.text));
    let mut words = message
        .or(reason)
        .filter(|words| !words.is_empty())
        .unwrap_or_else(|| format!("fault {}", short(subcode)));
    while words.ends_with(['.', ' ']) {
        words.pop();
    }
    match code {
        Some(code) if code > 0xffff => format!("{words} (0x{code:08x})"),
        Some(code) => format!("{words} (error {code})"),
        None => words,
    }
}

fn deepest_message(element: &Element) -> Option<String> {
    let inner = element.children.iter().find_map(deepest_message);
    let own = || {
        let text = short(&element.text);
        let telling = matches!(element.name.as_str(), "Message" | "Description" | "ProviderFault");
        (telling && !text.is_empty()).then_some(text)
    };
    inner.or_else(own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml::parse;

    const ASKED: Asked<'_> = Asked {
        peer: "http://hv1:5985",
        action: "call of DestroySnapshot",
        timeout: Duration::from_secs(60),
        max_envelope_bytes: 153_600,
    };

    fn fault(subcode: &str, detail: &str) -> CimError {
        let text = format!(
            r#"<s:Fault><s:Code><s:Value>s:Sender</s:Value><s:Subcode><s:Value>{subcode}</s:Value></s:Subcode></s:Code>
            <s:Reason><s:Text xml:lang="en-US">The reason. </s:Text></s:Reason><s:Detail>{detail}</s:Detail></s:Fault>"#
        );
        error(&parse(text.as_bytes()).unwrap(), &ASKED)
    }

    #[test]
    fn faults_are_told_apart() {
        let denied = fault(
            "w:AccessDenied",
            r#"<f:WSManFault Code="5" Machine="hv1"><f:Message>Access is denied. </f:Message></f:WSManFault>"#,
        );
        assert!(
            matches!(&denied, CimError::Denied { detail, .. } if detail.starts_with("call of DestroySnapshot: Access is denied (error 5);")),
            "{denied}"
        );
        assert!(matches!(fault("w:TimedOut", ""), CimError::Timeout { timeout_ms: 60_000, .. }));
        assert!(matches!(fault("w:InvalidSelectors", ""), CimError::NotFound { .. }));
        assert!(matches!(fault("a:DestinationUnreachable", ""), CimError::NotFound { .. }));
        assert!(matches!(
            fault("w:EncodingLimit", ""),
            CimError::TooLarge { limit_bytes: 153_600, .. }
        ));
        let other = fault("w:SchemaValidationError", "");
        assert_eq!(
            other,
            CimError::Fault {
                action: "call of DestroySnapshot".into(),
                detail: "The reason".into(),
                code: None
            }
        );
    }

    #[test]
    fn what_the_provider_says_comes_first() {
        let detail = |code: &str| {
            format!(
                r#"<f:WSManFault Code="2150858778"><f:Message><f:ProviderFault provider="WMI Provider" path="p">
                <f:WSManFault Code="{code}" Machine="h"><f:Message>HRESULT = it broke
                </f:Message></f:WSManFault></f:ProviderFault></f:Message></f:WSManFault>"#
            )
        };
        let CimError::Fault { detail: words, code, .. } =
            fault("w:InternalError", &detail("-2147217407"))
        else {
            panic!()
        };
        assert_eq!((words.as_str(), code), ("HRESULT = it broke (0x80041001)", Some(0x8004_1001)));
        assert!(matches!(
            fault("w:InternalError", &detail("2147749890")),
            CimError::NotFound { .. }
        ));
        assert!(matches!(fault("w:InternalError", &detail("2147942405")), CimError::Denied { .. }));
        assert!(matches!(
            fault("x", &detail("99999999999999")),
            CimError::Fault { code: Some(2_150_858_778), .. }
        ));
    }

    #[test]
    fn an_empty_fault_is_one_too() {
        let error = error(&parse(b"<Fault/>").unwrap(), &ASKED);
        assert!(matches!(error, CimError::Fault { .. }), "{error}");
    }
}
