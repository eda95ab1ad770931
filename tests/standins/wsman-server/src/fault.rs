//! Faults: what is wrong, in the three forms in which WinRM says it (DSP0226 clause 14, MS-WSMV 2.2.4.43).
//!
//! The numbers are those of `wsmerror.h`.

use crate::uri;
use crate::write::escape;
use std::fmt::Write;
use vmtide_cim::CimError;

/// `ERROR_WSMAN_*` that answers carry.
pub mod code {
    pub const RESOURCE_NOT_FOUND: u32 = 0x8033_8000;
    pub const UNSUPPORTED_TIMEOUT: u32 = 0x8033_800c;
    pub const SOAP_VERSION: u32 = 0x8033_800d;
    pub const INVALID_HEADER: u32 = 0x8033_800f;
    pub const MUST_UNDERSTAND: u32 = 0x8033_8010;
    pub const HEADER_REQUIRED: u32 = 0x8033_8011;
    pub const ACTION_NOT_SUPPORTED: u32 = 0x8033_8013;
    pub const FILTER_DIALECT: u32 = 0x8033_8019;
    pub const CANNOT_PROCESS_FILTER: u32 = 0x8033_801a;
    pub const INVALID_ENUMERATION_CONTEXT: u32 = 0x8033_801b;
    pub const INVALID_SOAP_BODY: u32 = 0x8033_8027;
    pub const TIMED_OUT: u32 = 0x8033_8029;
    pub const ACTION_MISMATCH: u32 = 0x8033_8031;
    pub const ENCODING_LIMIT: u32 = 0x8033_8035;
    pub const INVALID_RESOURCE_URI: u32 = 0x8033_803b;
    pub const SCHEMA_VALIDATION: u32 = 0x8033_8041;
    pub const INVALID_XML: u32 = 0x8033_8043;
    pub const MAX_ENVELOPE_EXCEEDED: u32 = 0x8033_8048;
    pub const INSUFFICIENT_SELECTORS: u32 = 0x8033_805a;
    pub const UNEXPECTED_SELECTORS: u32 = 0x8033_805b;
    pub const AMBIGUOUS_SELECTORS: u32 = 0x8033_805e;
    pub const DUPLICATE_SELECTORS: u32 = 0x8033_805f;
    pub const MIN_ENVELOPE_SIZE: u32 = 0x8033_807e;
    pub const PULL_NOT_SAME_AS_ENUMERATE: u32 = 0x8033_81ad;
    pub const WQL_NEEDS_ALL_CLASSES: u32 = 0x8033_80fb;
    pub const INTERNAL: u32 = 0x8033_8003;
    pub const ACCESS_DENIED: u32 = 5;
}

/// `WBEM_E_INVALID_CLASS`: what WMI itself says of a class that is not there.
pub const WBEM_INVALID_CLASS: u32 = 0x8004_1010;
/// `WBEM_E_NOT_FOUND`.
const WBEM_NOT_FOUND: u32 = 0x8004_1002;

/// A fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Whose mistake it is: the sender's, or else the receiver's.
    pub sender: bool,
    /// The subcode with its prefix: `w:`, `a:` or `n:`; empty for `s:MustUnderstand` and `s:VersionMismatch`.
    pub subcode: &'static str,
    /// The number of WinRM.
    pub code: u32,
    /// The words.
    pub reason: String,
    /// The end of a `w:FaultDetail` URI; empty for none.
    pub detail: &'static str,
    /// The HRESULT of WMI, where it comes from there.
    pub provider: Option<u32>,
}

impl Fault {
    /// A mistake of the sender.
    pub fn sender(subcode: &'static str, code: u32, reason: impl Into<String>) -> Self {
        Self { sender: true, subcode, code, reason: reason.into(), detail: "", provider: None }
    }

    /// A trouble of the server.
    pub fn receiver(subcode: &'static str, code: u32, reason: impl Into<String>) -> Self {
        Self { sender: false, ..Self::sender(subcode, code, reason) }
    }

    /// The same with what exactly is wrong.
    #[must_use]
    pub const fn detail(mut self, detail: &'static str) -> Self {
        self.detail = detail;
        self
    }

    /// The same with WMI's own error.
    #[must_use]
    pub const fn provider(mut self, hresult: u32) -> Self {
        self.provider = Some(hresult);
        self
    }

    /// The XML does not match the schema.
    pub fn schema(reason: impl Into<String>) -> Self {
        let reason = format!("the XML does not match its schema: {}", reason.into());
        Self::sender("w:SchemaValidationError", code::SCHEMA_VALIDATION, reason)
    }

    /// The selectors are not those of the class.
    pub fn selectors(code: u32, reason: impl Into<String>) -> Self {
        Self::sender("w:InvalidSelectors", code, reason)
    }

    /// The user has no right to it.
    pub fn denied() -> Self {
        Self::sender("w:AccessDenied", code::ACCESS_DENIED, "Access is denied.")
    }

    /// It took longer than allowed.
    pub fn timed_out() -> Self {
        Self::receiver(
            "w:TimedOut",
            code::TIMED_OUT,
            "the operation did not end within OperationTimeout",
        )
    }

    /// The enumeration is over, or never was.
    pub fn enumeration() -> Self {
        Self::receiver(
            "n:InvalidEnumerationContext",
            code::INVALID_ENUMERATION_CONTEXT,
            "the enumeration context is not valid: the enumeration is completed, cancelled or expired",
        )
    }

    /// The answer does not fit into what the request allows.
    pub fn too_large(limit: usize) -> Self {
        Self::sender(
            "w:EncodingLimit",
            code::MAX_ENVELOPE_EXCEEDED,
            format!("the answer is larger than the envelope allowed, {limit} bytes"),
        )
        .detail("MaxEnvelopeSize")
    }

    /// The class is not in the namespace.
    pub fn no_class(namespace: &str, class: &str) -> Self {
        Self::sender(
            "a:DestinationUnreachable",
            code::RESOURCE_NOT_FOUND,
            format!("the class {class} does not exist in the namespace {namespace}"),
        )
        .detail("InvalidResourceURI")
        .provider(WBEM_INVALID_CLASS)
    }

    /// What a world answered, as WinRM hands it on; none where the connection is to be cut: the world is gone.
    pub fn of_world(error: &CimError) -> Option<Self> {
        Some(match error {
            CimError::Unreachable { .. } => return None,
            CimError::Denied { .. } | CimError::Login { .. } | CimError::Untrusted { .. } => {
                Self::denied()
            }
            CimError::NotFound { .. } => Self::sender(
                "a:DestinationUnreachable",
                code::RESOURCE_NOT_FOUND,
                error.to_string(),
            )
            .provider(WBEM_NOT_FOUND),
            CimError::Timeout { .. } => Self::timed_out(),
            CimError::TooLarge { limit_bytes, .. } => {
                Self::too_large(usize::try_from(*limit_bytes).unwrap_or(usize::MAX))
            }
            CimError::Fault { code, .. } => {
                let fault = Self::receiver(
                    "w:InternalError",
                    code.unwrap_or(code::INTERNAL),
                    error.to_string(),
                );
                match code {
                    Some(hresult) => fault.provider(*hresult),
                    None => fault,
                }
            }
            CimError::Protocol { .. } => {
                Self::receiver("w:InternalError", code::INTERNAL, error.to_string())
            }
        })
    }

    /// The action of the answer that carries it.
    pub fn action(&self) -> &'static str {
        if self.subcode.starts_with("a:") {
            uri::ACTION_ADDRESSING_FAULT
        } else {
            uri::ACTION_FAULT
        }
    }

    /// The content of the answer's body. The prefixes are those of every envelope.
    pub fn body(&self, machine: &str) -> String {
        let value = match self.code {
            code::MUST_UNDERSTAND => "s:MustUnderstand",
            code::SOAP_VERSION => "s:VersionMismatch",
            _ if self.sender => "s:Sender",
            _ => "s:Receiver",
        };
        let reason = escape(&self.reason);
        let mut out = format!("<s:Fault><s:Code><s:Value>{value}</s:Value>");
        // Writing to a string does not fail, here and below.
        if !self.subcode.is_empty() {
            let _ = write!(out, "<s:Subcode><s:Value>{}</s:Value></s:Subcode>", self.subcode);
        }
        let _ = write!(
            out,
            "</s:Code><s:Reason><s:Text xml:lang=\"en-US\">{reason} </s:Text></s:Reason><s:Detail>"
        );
        if !self.detail.is_empty() {
            let _ = write!(
                out,
                "<w:FaultDetail>http://schemas.dmtf.org/wbem/wsman/1/wsman/faultDetail/{}</w:FaultDetail>",
                self.detail
            );
        }
        let machine = escape(machine);
        let open = |code: u32| {
            let namespace = uri::WSMAN_FAULT;
            format!(
                "<f:WSManFault xmlns:f=\"{namespace}\" Code=\"{code}\" Machine=\"{machine}\"><f:Message>"
            )
        };
        match self.provider {
            None => {
                let _ = write!(out, "{}{reason} </f:Message></f:WSManFault>", open(self.code));
            }
            Some(hresult) => {
                let _ = write!(
                    out,
                    "{}<f:ProviderFault provider=\"WMI Provider\" path=\"%systemroot%\\system32\\WsmWmiPl.dll\">{}{reason} HRESULT = 0x{hresult:08x} </f:Message></f:WSManFault></f:ProviderFault></f:Message></f:WSManFault>",
                    open(self.code),
                    open(hresult)
                );
            }
        }
        out.push_str("</s:Detail></s:Fault>");
        out
    }
}
