//! Sealed messages: how a SOAP envelope travels over HTTP when nothing but the authentication protects it
//! (MS-WSMV 2.2.9.1).
//!
//! A body of two parts, in a form of MIME that nobody else has: the boundary is fixed, headers begin with a tab, and
//! the second part is not ended by a line feed. It holds the length of the signature (32 bits, little-endian), the
//! signature, and the sealed envelope.

use std::fmt::Write;

const BOUNDARY: &str = "--Encrypted Boundary";

/// The longest signature that is read; Kerberos' has some 60 bytes.
const MAX_SIGNATURE_BYTES: usize = 256;

/// A sealed envelope.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Sealed<'a> {
    pub signature: &'a [u8],
    pub data: &'a [u8],
    /// The length of the envelope that was sealed, as its sender says.
    pub length: usize,
}

/// The `Content-Type` of a message sealed by `protocol`.
pub(crate) fn content_type(protocol: &str) -> String {
    format!("multipart/encrypted;protocol=\"{protocol}\";boundary=\"Encrypted Boundary\"")
}

/// Whether an answer of that `Content-Type` is sealed.
pub(crate) fn is_sealed(content_type: &str) -> bool {
    content_type.trim_start().to_ascii_lowercase().starts_with("multipart/encrypted")
}

/// The body of a message: `data` and its `signature` stand for an envelope of `length` bytes.
pub(crate) fn write(protocol: &str, signature: &[u8], data: &[u8], length: usize) -> Vec<u8> {
    let mut head = String::new();
    // Writing to a string does not fail.
    let _ = write!(
        head,
        "{BOUNDARY}\r\n\tContent-Type: {protocol}\r\n\
         \tOriginalContent: type=application/soap+xml;charset=UTF-8;Length={length}\r\n\
         {BOUNDARY}\r\n\tContent-Type: application/octet-stream\r\n"
    );
    let mut body = head.into_bytes();
    let signature_length = u32::try_from(signature.len()).unwrap_or(u32::MAX);
    body.extend_from_slice(&signature_length.to_le_bytes());
    body.extend_from_slice(signature);
    body.extend_from_slice(data);
    body.extend_from_slice(BOUNDARY.as_bytes());
    body.extend_from_slice(b"--\r\n");
    body
}

/// Takes a body apart. What is sealed may itself contain the boundary, so the end is looked for from the end.
///
/// # Errors
/// A phrase that says what is missing.
pub(crate) fn read(body: &[u8]) -> Result<Sealed<'_>, &'static str> {
    let stream = b"Content-Type: application/octet-stream\r\n";
    let at = find(body, stream).ok_or("it has no sealed part")?;
    let (head, rest) = body.split_at(at);
    let rest = rest.get(stream.len()..).unwrap_or_default();
    // Some hosts write a space after the dashes.
    let end = [&b"--Encrypted Boundary"[..], b"-- Encrypted Boundary"]
        .iter()
        .filter_map(|boundary| rfind(rest, boundary))
        .max()
        .ok_or("its end is missing")?;
    let sealed = rest.get(..end).unwrap_or_default();
    let (prefix, sealed) = sealed.split_first_chunk::<4>().ok_or("it is too short")?;
    let signature_length = usize::try_from(u32::from_le_bytes(*prefix)).unwrap_or(usize::MAX);
    if signature_length > MAX_SIGNATURE_BYTES {
        return Err("its signature is too long");
    }
    let (signature, data) =
        sealed.split_at_checked(signature_length).ok_or("it is shorter than its signature")?;
    Ok(Sealed { signature, data, length: original_length(head).ok_or("it has no Length")? })
}

/// The number behind `Length=`.
fn original_length(head: &[u8]) -> Option<usize> {
    let at = find(head, b"Length=")? + b"Length=".len();
    let digits: Vec<u8> =
        head.get(at..)?.iter().copied().take_while(u8::is_ascii_digit).take(12).collect();
    std::str::from_utf8(&digits).ok()?.parse().ok()
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window.eq_ignore_ascii_case(needle))
}

fn rfind(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).rposition(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_to_the_byte() {
        let body = write("application/HTTP-SPNEGO-session-encrypted", b"sig", b"DATA", 9);
        assert_eq!(
            body,
            b"--Encrypted Boundary\r\n\tContent-Type: application/HTTP-SPNEGO-session-encrypted\r\n\
              \tOriginalContent: type=application/soap+xml;charset=UTF-8;Length=9\r\n\
              --Encrypted Boundary\r\n\tContent-Type: application/octet-stream\r\n\x03\0\0\0sigDATA--Encrypted Boundary--\r\n"
        );
        assert_eq!(read(&body), Ok(Sealed { signature: b"sig", data: b"DATA", length: 9 }));
        assert_eq!(
            content_type("x"),
            "multipart/encrypted;protocol=\"x\";boundary=\"Encrypted Boundary\""
        );
    }

    #[test]
    fn sealed_bytes_may_look_like_the_boundary() {
        let data = b"a--Encrypted Boundary--\r\nb";
        let body = write("p", b"0123456789abcdef", data, data.len());
        assert_eq!(read(&body).unwrap().data, data);
        let spaced =
            String::from_utf8(write("p", b"s", b"d", 1)).unwrap().replace("--Enc", "-- Enc");
        assert_eq!(read(spaced.as_bytes()).unwrap().data, b"d");
    }

    #[test]
    fn broken_messages_are_no_message() {
        let good = write("p", b"sig", b"DATA", 4);
        for length in 0..good.len() - 4 {
            assert!(read(&good[..length]).is_err(), "{length}");
        }
        assert!(read(&write("p", &[0; 300], b"", 0)).is_err());
        let text = String::from_utf8(good).unwrap();
        assert!(read(text.replace("Length=4", "Length=x").as_bytes()).is_err());
        assert!(is_sealed("Multipart/Encrypted; x") && !is_sealed("application/soap+xml"));
    }
}
