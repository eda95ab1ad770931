//! Sealed messages within HTTP (MS-WSMV 2.2.9.1): `multipart/encrypted` with one part that says what it was and one
//! with the length of the signature, the signature, and the data.

use crate::auth::Sealer;

/// What follows the scheme in the name of the protocol.
const SUFFIX: &str = "-session-encrypted";
/// The boundary that WinRM itself uses.
const BOUNDARY: &str = "Encrypted Boundary";

/// Whether a content type announces a sealed message.
pub fn is_sealed(content_type: &str) -> bool {
    content_type.trim_start().to_ascii_lowercase().starts_with("multipart/encrypted")
}

/// Opens a sealed body. The answer is sealed with the same protocol, which is returned too.
///
/// # Errors
/// What is wrong with the frame or the signature.
pub fn open(
    content_type: &str,
    body: &[u8],
    sealer: &mut Sealer,
) -> Result<(Vec<u8>, String), String> {
    let protocol =
        parameter(content_type, "protocol").ok_or("the content type names no protocol")?;
    let known = ["application/HTTP-SPNEGO", "application/HTTP-Kerberos"];
    if !protocol.strip_suffix(SUFFIX).is_some_and(|name| known.contains(&name)) {
        return Err(format!("the protocol {protocol:?} is not known"));
    }
    let boundary =
        parameter(content_type, "boundary").ok_or("the content type names no boundary")?;
    let open = format!("--{boundary}\r\n");
    let close = format!("--{boundary}--\r\n");
    let rest =
        body.strip_prefix(open.as_bytes()).ok_or("the body does not begin with the boundary")?;
    let middle = find(rest, open.as_bytes()).ok_or("the body has no second part")?;
    let (head, data) = (&rest[..middle], &rest[middle + open.len()..]);
    let head = std::str::from_utf8(head).map_err(|_| "the first part is no text")?;
    let lines: Vec<&str> = head.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let [kind, original] = lines.as_slice() else {
        return Err("the first part has not two lines".into());
    };
    if *kind != format!("Content-Type: {protocol}") {
        return Err("the first part names another protocol".into());
    }
    let original =
        original.strip_prefix("OriginalContent: ").ok_or("OriginalContent is missing")?;
    if !original.starts_with("type=application/soap+xml;charset=UTF-8") {
        return Err(format!("the original content is {original:?}"));
    }
    let length =
        original.split_once("Length=").and_then(|(_, text)| text.trim().parse::<usize>().ok());
    let length = length.ok_or("OriginalContent has no length")?;
    let octets = b"\tContent-Type: application/octet-stream\r\n";
    let data = data.strip_prefix(octets).ok_or("the second part is no octet stream")?;
    let data =
        data.strip_suffix(close.as_bytes()).ok_or("the body does not end with the boundary")?;
    let (size, data) = data.split_first_chunk::<4>().ok_or("the second part is empty")?;
    let size = usize::try_from(u32::from_le_bytes(*size)).map_err(|error| error.to_string())?;
    let signature = data.get(..size).ok_or("the signature is longer than the part")?;
    let plain = sealer.unwrap(signature, data.get(size..).unwrap_or_default())?;
    if plain.len() != length {
        return Err(format!("the message has {} bytes instead of {length}", plain.len()));
    }
    Ok((plain, protocol))
}

/// Seals an answer: its content type and body.
///
/// # Errors
/// Of Kerberos' library.
pub fn close(
    plain: &[u8],
    protocol: &str,
    sealer: &mut Sealer,
) -> Result<(String, Vec<u8>), String> {
    let (signature, data, longer) = sealer.wrap(plain)?;
    let length = plain.len() + longer;
    let size = u32::try_from(signature.len()).map_err(|error| error.to_string())?;
    let mut body = format!(
        "--{BOUNDARY}\r\n\tContent-Type: {protocol}\r\n\tOriginalContent: type=application/soap+xml;charset=UTF-8;Length={length}\r\n--{BOUNDARY}\r\n\tContent-Type: application/octet-stream\r\n"
    )
    .into_bytes();
    body.extend_from_slice(&size.to_le_bytes());
    body.extend_from_slice(&signature);
    body.extend_from_slice(&data);
    body.extend_from_slice(format!("--{BOUNDARY}--\r\n").as_bytes());
    Ok((format!("multipart/encrypted;protocol=\"{protocol}\";boundary=\"{BOUNDARY}\""), body))
}

/// A parameter of a content type, with or without quotes.
fn parameter(content_type: &str, name: &str) -> Option<String> {
    content_type.split(';').skip(1).find_map(|part| {
        let (key, value) = part.split_once('=')?;
        key.trim().eq_ignore_ascii_case(name).then(|| value.trim().trim_matches('"').to_owned())
    })
}

fn find(within: &[u8], what: &[u8]) -> Option<usize> {
    within.windows(what.len()).position(|window| window == what)
}
