//! The envelope: what a request must have, and how answers are wrapped.

use crate::fault::{Fault, code};
use crate::uri;
use crate::write::escape;
use crate::xml::{self, Element};
use std::fmt::Write;

/// The smallest `w:MaxEnvelopeSize` (DSP0226 R13.1-3).
const MIN_ENVELOPE_BYTES: usize = 8192;
/// `w:MaxEnvelopeSize` of a request that says none (MS-WSMV: 150 KiB).
const DEFAULT_ENVELOPE_BYTES: usize = 153_600;
/// The shortest `w:OperationTimeout` that WinRM takes, in milliseconds.
const MIN_TIMEOUT_MS: u64 = 500;

/// A request whose headers are in order.
#[derive(Debug)]
pub struct Request {
    /// `a:Action`; empty for Identify.
    pub action: String,
    /// `a:MessageID`, which the answer relates to; empty for Identify.
    pub message_id: String,
    /// `w:ResourceURI`; empty for Identify.
    pub resource: String,
    /// `w:SelectorSet`.
    pub selectors: Vec<(String, String)>,
    /// How many bytes the answer may have.
    pub max_envelope_bytes: usize,
    /// The one element of the body; none where it is empty.
    pub body: Option<Element>,
}

impl Request {
    /// Whether it is `wsmid:Identify`, which has no headers.
    pub fn is_identify(&self) -> bool {
        self.body.as_ref().is_some_and(|body| body.is(uri::IDENTITY, "Identify"))
    }
}

/// Reads a request.
///
/// # Errors
/// The fault, with the request's message id as far as one was seen.
pub fn read(bytes: &[u8], max_bytes: usize, strict: bool) -> Result<Request, (String, Fault)> {
    let none = |fault: Fault| (String::new(), fault);
    if bytes.len() > max_bytes {
        let reason = format!("the request is larger than {max_bytes} bytes");
        let fault = Fault::sender("w:EncodingLimit", code::ENCODING_LIMIT, reason);
        return Err(none(fault.detail("MaxEnvelopeSize")));
    }
    let root = xml::parse(bytes).map_err(|why| {
        none(Fault::sender(
            "w:SchemaValidationError",
            code::INVALID_XML,
            format!("the XML is not valid: {why}"),
        ))
    })?;
    if root.name == "Envelope" && root.namespace != uri::SOAP {
        let fault = Fault::sender("", code::SOAP_VERSION, "the version of SOAP is not 1.2");
        return Err(none(fault));
    }
    let (header, body) = match root.children.as_slice() {
        [body] if body.is(uri::SOAP, "Body") => (&Element::default(), body),
        [header, body] if header.is(uri::SOAP, "Header") && body.is(uri::SOAP, "Body") => {
            (header, body)
        }
        _ => return Err(none(Fault::schema("an envelope is s:Header and s:Body, in this order"))),
    };
    if !root.is(uri::SOAP, "Envelope") {
        return Err(none(Fault::schema("the root is not s:Envelope")));
    }
    let message_id =
        header.child(uri::ADDRESSING, "MessageID").map_or("", |id| id.text.trim()).to_owned();
    check(header, body, max_bytes, strict)
        .map(|request| Request { message_id: message_id.clone(), ..request })
        .map_err(|fault| (message_id, fault))
}

fn check(
    header: &Element,
    body: &Element,
    max_bytes: usize,
    strict: bool,
) -> Result<Request, Fault> {
    if body.children.len() > 1 {
        return Err(Fault::sender(
            "w:InvalidBody",
            code::INVALID_SOAP_BODY,
            "the body has several elements",
        ));
    }
    let body = body.children.first().cloned();
    let mut request = Request {
        action: String::new(),
        message_id: String::new(),
        resource: String::new(),
        selectors: Vec::new(),
        max_envelope_bytes: DEFAULT_ENVELOPE_BYTES.min(max_bytes),
        body,
    };
    understood(header)?;
    if request.is_identify() {
        return Ok(request);
    }
    request.action = required(header, uri::ADDRESSING, "Action")?;
    required(header, uri::ADDRESSING, "To")?;
    let id = required(header, uri::ADDRESSING, "MessageID")?;
    let uuid = id.strip_prefix("uuid:").map(uuid::Uuid::parse_str);
    if !matches!(uuid, Some(Ok(_))) {
        return Err(invalid("a:MessageID is not uuid: and a UUID"));
    }
    reply_to(header)?;
    request.resource = required(header, uri::WSMAN, "ResourceURI")?;
    let resource = header.child(uri::WSMAN, "ResourceURI");
    if strict && !resource.is_some_and(|header| header.is_true(uri::SOAP, "mustUnderstand")) {
        return Err(invalid("w:ResourceURI is not marked s:mustUnderstand"));
    }
    if let Some(size) = header.child(uri::WSMAN, "MaxEnvelopeSize") {
        request.max_envelope_bytes = envelope_size(&size.text)?.min(max_bytes);
    }
    if let Some(timeout) = header.child(uri::WSMAN, "OperationTimeout") {
        operation_timeout(timeout.text.trim())?;
    }
    if let Some(set) = header.child(uri::WSMAN, "SelectorSet") {
        request.selectors = crate::values::selectors(set)?;
    }
    Ok(request)
}

/// Every header is known, or need not be understood; none is there twice.
fn understood(header: &Element) -> Result<(), Fault> {
    const KNOWN: [(&str, &[&str]); 3] = [
        (uri::ADDRESSING, &["To", "Action", "MessageID", "ReplyTo", "From", "FaultTo"]),
        (
            uri::WSMAN,
            &[
                "ResourceURI",
                "MaxEnvelopeSize",
                "OperationTimeout",
                "SelectorSet",
                "OptionSet",
                "Locale",
            ],
        ),
        (uri::MICROSOFT, &["DataLocale", "SessionId", "OperationID", "SequenceId", "ActivityId"]),
    ];
    for (at, child) in header.children.iter().enumerate() {
        let known = KNOWN.iter().any(|(namespace, names)| {
            *namespace == child.namespace && names.contains(&child.name.as_str())
        });
        if !known && child.is_true(uri::SOAP, "mustUnderstand") {
            let reason = format!("the header {} is not understood", child.name);
            return Err(Fault::sender("", code::MUST_UNDERSTAND, reason));
        }
        let before = header.children.get(..at).unwrap_or_default();
        if known && before.iter().any(|other| other.is(&child.namespace, &child.name)) {
            return Err(invalid(&format!("the header {} is there twice", child.name)));
        }
    }
    Ok(())
}

fn invalid(why: &str) -> Fault {
    Fault::sender("a:InvalidMessageInformationHeader", code::INVALID_HEADER, why)
}

fn required(header: &Element, namespace: &str, name: &str) -> Result<String, Fault> {
    let found = header.child(namespace, name).map(|header| header.text.trim());
    match found.filter(|text| !text.is_empty()) {
        Some(text) => Ok(text.to_owned()),
        None if namespace == uri::WSMAN => Err(Fault::sender(
            "w:InvalidResourceURI",
            code::INVALID_RESOURCE_URI,
            format!("the header w:{name} is missing"),
        )),
        None => Err(Fault::sender(
            "a:MessageInformationHeaderRequired",
            code::HEADER_REQUIRED,
            format!("the header a:{name} is missing"),
        )),
    }
}

fn reply_to(header: &Element) -> Result<(), Fault> {
    let missing = || {
        Fault::sender(
            "a:MessageInformationHeaderRequired",
            code::HEADER_REQUIRED,
            "the header a:ReplyTo with an a:Address is missing",
        )
    };
    let reply_to = header.child(uri::ADDRESSING, "ReplyTo").ok_or_else(missing)?;
    let address = reply_to.child(uri::ADDRESSING, "Address").ok_or_else(missing)?;
    if address.text.trim() != uri::ANONYMOUS {
        return Err(invalid("a:ReplyTo is not the anonymous address"));
    }
    Ok(())
}

fn envelope_size(text: &str) -> Result<usize, Fault> {
    let size: usize = text.trim().parse().map_err(|_| invalid("w:MaxEnvelopeSize is no number"))?;
    if size < MIN_ENVELOPE_BYTES {
        let reason = format!("w:MaxEnvelopeSize is less than {MIN_ENVELOPE_BYTES}");
        let fault = Fault::sender("w:EncodingLimit", code::MIN_ENVELOPE_SIZE, reason);
        return Err(fault.detail("MinimumEnvelopeLimit"));
    }
    Ok(size)
}

/// `PT60S`, `PT1M30.5S`: hours, minutes and seconds of a duration of XML Schema.
fn operation_timeout(text: &str) -> Result<(), Fault> {
    let wrong = || invalid("w:OperationTimeout is no duration like PT60S");
    let mut rest = text.strip_prefix("PT").filter(|rest| !rest.is_empty()).ok_or_else(wrong)?;
    let mut total_ms = 0.0;
    for (unit, ms) in [('H', 3_600_000.0), ('M', 60_000.0), ('S', 1000.0)] {
        if let Some((number, after)) = rest.split_once(unit) {
            let number: f64 = number.parse().map_err(|_| wrong())?;
            if !(0.0..=1e9).contains(&number) {
                return Err(wrong());
            }
            total_ms += number * ms;
            rest = after;
        }
    }
    if !rest.is_empty() {
        return Err(wrong());
    }
    #[allow(clippy::cast_precision_loss, reason = "half a second is a small number")]
    let too_short = total_ms < MIN_TIMEOUT_MS as f64;
    if too_short {
        let reason = format!("w:OperationTimeout is shorter than {MIN_TIMEOUT_MS} ms");
        return Err(Fault::sender("w:InvalidTimeout", code::UNSUPPORTED_TIMEOUT, reason));
    }
    Ok(())
}

/// An answer. `body` uses the prefixes `s a x n w p` as declared here.
pub fn envelope(action: &str, relates_to: &str, body: &str) -> String {
    let mut out = format!(
        "<s:Envelope xml:lang=\"en-US\" xmlns:s=\"{}\" xmlns:a=\"{}\" xmlns:x=\"{}\" xmlns:n=\"{}\" xmlns:w=\"{}\" xmlns:p=\"{}\"><s:Header>",
        uri::SOAP,
        uri::ADDRESSING,
        uri::TRANSFER,
        uri::ENUMERATION,
        uri::WSMAN,
        uri::MICROSOFT
    );
    // Writing to a string does not fail.
    let _ = write!(
        out,
        "<a:Action>{}</a:Action><a:MessageID>uuid:{}</a:MessageID><a:To>{}</a:To>",
        escape(action),
        random_uuid(),
        uri::ANONYMOUS
    );
    if !relates_to.is_empty() {
        let _ = write!(out, "<a:RelatesTo>{}</a:RelatesTo>", escape(relates_to));
    }
    let _ = write!(out, "</s:Header><s:Body>{body}</s:Body></s:Envelope>");
    out
}

/// A random UUID in capitals, as WinRM writes them.
pub fn random_uuid() -> String {
    let mut bytes = [0; 16];
    // Without randomness a test would only see the same id twice.
    let _ = getrandom::fill(&mut bytes);
    let uuid = uuid::Builder::from_random_bytes(bytes).into_uuid();
    uuid.hyphenated().to_string().to_uppercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "<s:Envelope xmlns:s='http://www.w3.org/2003/05/soap-envelope' xmlns:a='http://schemas.xmlsoap.org/ws/2004/08/addressing' xmlns:w='http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd'><s:Header><a:To>http://h/wsman</a:To><w:ResourceURI s:mustUnderstand='true'>urn:r</w:ResourceURI><a:ReplyTo><a:Address>http://schemas.xmlsoap.org/ws/2004/08/addressing/role/anonymous</a:Address></a:ReplyTo><a:Action>urn:a</a:Action><w:MaxEnvelopeSize>153600</w:MaxEnvelopeSize><a:MessageID>uuid:11111111-2222-3333-4444-555555555555</a:MessageID><w:OperationTimeout>PT60S</w:OperationTimeout><w:SelectorSet><w:Selector Name='K'>v</w:Selector></w:SelectorSet></s:Header><s:Body/></s:Envelope>";

    #[test]
    fn a_good_request_is_read() {
        let request = read(GOOD.as_bytes(), 500 * 1024, true).unwrap();
        assert_eq!((request.action.as_str(), request.resource.as_str()), ("urn:a", "urn:r"));
        assert_eq!(request.selectors, [("K".to_owned(), "v".to_owned())]);
        assert_eq!(request.max_envelope_bytes, 153_600);
        assert!(request.body.is_none());
    }

    #[test]
    fn every_header_is_insisted_on() {
        let cases = [
            ("a:To>", "a:Too>", code::HEADER_REQUIRED),
            ("a:MessageID", "a:MessageId", code::HEADER_REQUIRED),
            ("uuid:1", "1", code::INVALID_HEADER),
            ("a:Action", "a:action", code::HEADER_REQUIRED),
            ("a:ReplyTo", "a:From", code::HEADER_REQUIRED),
            ("role/anonymous", "role/none", code::INVALID_HEADER),
            ("w:ResourceURI", "w:Resource", code::MUST_UNDERSTAND),
            (" s:mustUnderstand='true'", "", code::INVALID_HEADER),
            (">153600<", ">4096<", code::MIN_ENVELOPE_SIZE),
            (">153600<", ">many<", code::INVALID_HEADER),
            ("PT60S", "60", code::INVALID_HEADER),
            ("PT60S", "PT0.1S", code::UNSUPPORTED_TIMEOUT),
            ("w:Selector ", "w:selector ", code::INVALID_XML),
            (" Name='K'", "", code::SCHEMA_VALIDATION),
            ("2003/05/soap-envelope", "2001/06/soap-envelope", code::SOAP_VERSION),
            ("<s:Body/>", "", code::SCHEMA_VALIDATION),
            ("<s:Body/>", "<s:Body><x/><y/></s:Body>", code::INVALID_SOAP_BODY),
            ("<s:Header>", "<s:Header><a:Action>urn:b</a:Action>", code::INVALID_HEADER),
        ];
        for (from, to, wanted) in cases {
            let text = GOOD.replace(from, to);
            assert_ne!(text, GOOD, "{from}");
            let (_, fault) = read(text.as_bytes(), 500 * 1024, true).unwrap_err();
            assert_eq!(fault.code, wanted, "{from} -> {to}: {}", fault.reason);
        }
        assert_eq!(read(GOOD.as_bytes(), 100, true).unwrap_err().1.code, code::ENCODING_LIMIT);
    }
}
