//! The JSON objects in clear: the configuration and the key slots (format §4).
//!
//! Both are small, both must be readable before there is a key, and neither can be guessed at when
//! a bit has flipped: so each ends with a checksum over the bytes before it, and a reader tells
//! damage from a wrong password.

use crate::crypto::checksum;
use crate::id::to_hex;
use crate::store::{ObjectStore, read_small};
use crate::{RepoError, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The longest document. Ours are of some 500 bytes; a hostile one may have any length.
const MAX_BYTES: usize = 64 << 10;

/// The version of both documents that this code reads and writes.
pub(crate) const VERSION: u32 = 1;

/// What comes before the 32 digits of the checksum, and after them.
const CHECKSUM_BEGIN: &[u8] = br#","checksum":""#;
const CHECKSUM_END: &[u8] = br#""}"#;
const CHECKSUM_BYTES: usize = CHECKSUM_BEGIN.len() + 32 + CHECKSUM_END.len();

/// What every version of a document has.
#[derive(Deserialize)]
struct Kind {
    format: String,
    version: u32,
}

/// The bytes of a document with these members.
///
/// # Errors
/// [`RepoError::Invalid`] where they do not fit in a document.
pub(crate) fn encode(members: &impl Serialize) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(members)
        .map_err(|error| RepoError::Invalid(format!("cannot be written as JSON: {error}")))?;
    bytes.pop();
    let sum = to_hex(&checksum(&bytes));
    bytes.extend_from_slice(CHECKSUM_BEGIN);
    bytes.extend_from_slice(sum.as_bytes());
    bytes.extend_from_slice(CHECKSUM_END);
    if bytes.len() > MAX_BYTES {
        return Err(RepoError::Invalid(format!(
            "{} bytes of JSON; {MAX_BYTES} is the most a reader takes",
            bytes.len()
        )));
    }
    Ok(bytes)
}

/// The bytes of a document in a store.
///
/// # Errors
/// [`RepoError::Damaged`] where it is too long; those of the store.
pub(crate) fn read(store: &dyn ObjectStore, name: &str) -> Result<Vec<u8>> {
    read_small(store, name, MAX_BYTES)
}

/// The members of a document of kind `format`, from the object `name`.
///
/// # Errors
/// [`RepoError::Damaged`] where the checksum does not match or the members are not those of the
/// format; [`RepoError::Unsupported`] for another version.
pub(crate) fn decode<T: DeserializeOwned>(name: &str, format: &str, bytes: &[u8]) -> Result<T> {
    let damaged = |detail: String| Err(RepoError::damaged(name, detail));
    let Some((body, digits)) = split_checksum(bytes) else {
        // What has no checksum where we look may be of a version that keeps it elsewhere.
        if let Err(error @ RepoError::Unsupported { .. }) = check_version(name, format, bytes) {
            return Err(error);
        }
        return damaged(format!(
            "its {} bytes do not end in a checksum: it was cut or overwritten",
            bytes.len()
        ));
    };
    if digits != to_hex(&checksum(body)).as_bytes() {
        return damaged("its bytes do not match its checksum".into());
    }
    let mut body = body.to_vec();
    body.push(b'}');
    check_version(name, format, &body)?;
    serde_json::from_slice(&body)
        .map_err(|error| RepoError::damaged(name, format!("not a {format}: {error}")))
}

/// What the checksum is over, and its digits; None where there is no checksum at the end.
fn split_checksum(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = bytes.len().checked_sub(CHECKSUM_BYTES)?;
    let (body, tail) = bytes.split_at_checked(at)?;
    let digits = tail.strip_prefix(CHECKSUM_BEGIN)?.strip_suffix(CHECKSUM_END)?;
    Some((body, digits))
}

fn check_version(name: &str, format: &str, body: &[u8]) -> Result<()> {
    let kind: Kind = serde_json::from_slice(body)
        .map_err(|error| RepoError::damaged(name, format!("not a {format}: {error}")))?;
    if kind.format != format {
        return Err(RepoError::damaged(
            name,
            format!("a {:?} where a {format} belongs", kind.format),
        ));
    }
    if kind.version != VERSION {
        return Err(RepoError::Unsupported {
            object: name.into(),
            what: format!("version {} of a {format}", kind.version),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    #[serde(deny_unknown_fields)]
    struct Members {
        format: String,
        version: u32,
        value: u8,
    }

    fn members(version: u32) -> Members {
        Members { format: "test".into(), version, value: 7 }
    }

    #[test]
    fn the_bytes_are_those_of_the_document() {
        let bytes = encode(&members(1)).unwrap();
        let body = br#"{"format":"test","version":1,"value":7"#;
        let sum = blake3::hash(body).to_hex();
        let expected =
            format!("{},\"checksum\":\"{}\"}}", std::str::from_utf8(body).unwrap(), &sum[..32]);
        assert_eq!(std::str::from_utf8(&bytes).unwrap(), expected);
        assert_eq!(decode::<Members>("x", "test", &bytes).unwrap(), members(1));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_damage() {
        let bytes = encode(&members(1)).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let error = decode::<Members>("x", "test", &flipped).unwrap_err();
            assert!(error.is_damage(), "bit {bit}: {error}");
        }
        for length in 0..bytes.len() {
            let error = decode::<Members>("x", "test", &bytes[..length]).unwrap_err();
            assert!(error.is_damage(), "{length}: {error}");
        }
    }

    #[test]
    fn another_version_is_unsupported_with_a_checksum_or_without() {
        for bytes in [
            encode(&members(2)).unwrap(),
            serde_json::to_vec(&members(3)).unwrap(),
            br#"{"format":"test","version":9,"more":[1]}"#.to_vec(),
        ] {
            let error = decode::<Members>("x", "test", &bytes).unwrap_err();
            assert!(matches!(error, RepoError::Unsupported { .. }), "{error}");
        }
    }

    #[test]
    fn what_is_too_long_is_not_written() {
        #[derive(Serialize)]
        struct Long {
            text: String,
        }
        let long = |length| Long { text: "x".repeat(length) };
        assert!(encode(&long(MAX_BYTES)).is_err());
        assert!(encode(&long(MAX_BYTES - 100)).is_ok());
    }
}
