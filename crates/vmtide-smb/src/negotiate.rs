//! Negotiation (MS-SMB2 2.2.3, 2.2.4): dialect 3.1.1 and nothing older, signing, encryption where offered.
//!
//! 3.1.1 is in every Windows that has Hyper-V's change tracking (Server 2016) and in Samba since 4.3. It is the one
//! dialect in which nobody in between can talk both sides into less: keys depend on all that was negotiated.

use crate::crypto::{Encryption, Signing};
use crate::error::{Result, SmbError, status};
use crate::header::{HEADER_BYTES, ResponseHeader};
use crate::wire::{Reader, Writer, length16, utf16};

const DIALECT_3_1_1: u16 = 0x0311;
/// `SMB2_NEGOTIATE_SIGNING_ENABLED` and `…_REQUIRED`.
pub(crate) const SIGNING_REQUIRED: u8 = 3;
/// `SMB2_GLOBAL_CAP_LARGE_MTU`: requests of more than 64 KiB.
const CAP_LARGE_MTU: u32 = 4;
/// `SMB2_GLOBAL_CAP_ENCRYPTION`.
const CAP_ENCRYPTION: u32 = 0x40;

const CONTEXT_PREAUTH: u16 = 1;
const CONTEXT_ENCRYPTION: u16 = 2;
const CONTEXT_NETNAME: u16 = 5;
const CONTEXT_SIGNING: u16 = 8;
const SHA_512: u16 = 1;
const AES_128_GCM: u16 = 2;
const AES_256_GCM: u16 = 4;
const AES_CMAC: u16 = 1;
const AES_GMAC: u16 = 2;

/// The most negotiate contexts that are looked at; servers send four.
const MAX_CONTEXTS: u16 = 64;
/// The smallest and the largest request that is made, whatever the server takes. 64 KiB is what each server must take;
/// memory in flight is bounded by the other.
const REQUEST_BYTES: std::ops::RangeInclusive<u32> = (64 << 10)..=(8 << 20);

/// What was agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Negotiated {
    /// None where the server has no encryption that is known here.
    pub(crate) encryption: Option<Encryption>,
    pub(crate) signing: Signing,
    pub(crate) max_read_bytes: u32,
    pub(crate) max_write_bytes: u32,
    pub(crate) max_transact_bytes: u32,
}

/// The body of the request.
pub(crate) fn request(
    server: &str,
    client: [u8; 16],
    salt: &[u8; 32],
    encrypt: bool,
) -> Result<Vec<u8>> {
    let mut contexts: Vec<(u16, Vec<u8>)> = Vec::new();
    let mut preauth = Writer::default();
    preauth.u16(1).u16(length16(salt, "the salt")?).u16(SHA_512).bytes(salt);
    contexts.push((CONTEXT_PREAUTH, preauth.0));
    if encrypt {
        let mut encryption = Writer::default();
        // 128 bits first: as safe in practice, and faster.
        encryption.u16(2).u16(AES_128_GCM).u16(AES_256_GCM);
        contexts.push((CONTEXT_ENCRYPTION, encryption.0));
    }
    let mut signing = Writer::default();
    signing.u16(2).u16(AES_GMAC).u16(AES_CMAC);
    contexts.push((CONTEXT_SIGNING, signing.0));
    contexts.push((CONTEXT_NETNAME, utf16(server)));

    let mut body = Writer::default();
    body.u16(36).u16(1).u16(u16::from(SIGNING_REQUIRED)).u16(0);
    body.u32(CAP_LARGE_MTU | if encrypt { CAP_ENCRYPTION } else { 0 }).bytes(&client);
    let count = contexts.len().to_le_bytes();
    // The header of 64, this body of 36 and one dialect, on a boundary of eight.
    body.u32(104).u8(count[0]).zeros(3).u16(DIALECT_3_1_1).zeros(2);
    for (kind, data) in contexts {
        body.zeros(body.0.len().next_multiple_of(8) - body.0.len());
        body.u16(kind).u16(length16(&data, "the server's name")?).u32(0).bytes(&data);
    }
    Ok(body.0)
}

/// Understands the whole message of the answer.
pub(crate) fn response(message: &[u8], header: &ResponseHeader) -> Result<Negotiated> {
    let old = || {
        SmbError::unsupported(
            "the server has no SMB 3.1.1, which Windows Server 2016, Samba 4.3 and all newer ones have; older \
             dialects are not used because they can be tampered with",
        )
    };
    if header.status == status::NOT_SUPPORTED {
        return Err(old());
    }
    if header.status != status::SUCCESS {
        return Err(SmbError::from_status("negotiation", header.status));
    }
    let reader = Reader::new(message, "answer to NEGOTIATE");
    let at = HEADER_BYTES;
    reader.structure(at, 65)?;
    if reader.u16(at + 4)? != DIALECT_3_1_1 {
        return Err(old());
    }
    let capabilities = reader.u32(at + 24)?;
    let size = |offset: usize| -> Result<u32> {
        let most = *REQUEST_BYTES.end();
        let least = *REQUEST_BYTES.start();
        // A request of more than 64 KiB takes more than one credit, which needs the capability.
        let most = if capabilities & CAP_LARGE_MTU == 0 { least } else { most };
        match reader.u32(at + offset)? {
            found if found < least => Err(SmbError::protocol(format!(
                "the server takes requests of {found} bytes, less than each must take"
            ))),
            found => Ok(found.min(most)),
        }
    };
    let mut negotiated = Negotiated {
        encryption: None,
        signing: Signing::Cmac,
        max_transact_bytes: size(28)?,
        max_read_bytes: size(32)?,
        max_write_bytes: size(36)?,
    };
    let count = reader.u16(at + 6)?.min(MAX_CONTEXTS);
    let mut offset = usize::try_from(reader.u32(at + 60)?).unwrap_or(usize::MAX);
    let mut has_preauth = false;
    for _ in 0..count {
        offset = offset.checked_next_multiple_of(8).unwrap_or(usize::MAX);
        let context = Reader::new(reader.slice(offset, 8)?, "negotiate context");
        let (kind, length) = (context.u16(0)?, usize::from(context.u16(2)?));
        let data = Reader::new(reader.slice(offset + 8, length)?, "negotiate context");
        match kind {
            CONTEXT_PREAUTH => {
                has_preauth = data.u16(0)? == 1 && data.u16(4)? == SHA_512;
            }
            CONTEXT_ENCRYPTION => {
                negotiated.encryption = match data.u16(2)? {
                    AES_128_GCM => Some(Encryption::Aes128Gcm),
                    AES_256_GCM => Some(Encryption::Aes256Gcm),
                    _ => None,
                };
            }
            CONTEXT_SIGNING if data.u16(2)? == AES_GMAC => negotiated.signing = Signing::Gmac,
            _ => {}
        }
        offset += 8 + length;
    }
    if !has_preauth {
        return Err(SmbError::protocol("the server negotiated 3.1.1 without SHA-512"));
    }
    Ok(negotiated)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::FLAG_RESPONSE;

    fn answer(dialect: u16, contexts: &[(u16, &[u8])]) -> Vec<u8> {
        let mut writer = Writer::default();
        writer.zeros(64).u16(65).u16(3).u16(dialect).u16(contexts.len().to_le_bytes()[0].into());
        writer.zeros(16).u32(CAP_LARGE_MTU).u32(1 << 30).u32(1 << 20).u32(65536).zeros(16);
        writer.u16(128).u16(0).u32(128);
        for (kind, data) in contexts {
            writer.zeros(writer.0.len().next_multiple_of(8) - writer.0.len());
            writer.u16(*kind).u16(data.len().to_le_bytes()[0].into()).u32(0).bytes(data);
        }
        writer.0
    }

    fn understood(message: &[u8], status: u32) -> Result<Negotiated> {
        let header = ResponseHeader {
            status,
            credits: 1,
            flags: FLAG_RESPONSE,
            message_id: 0,
            session_id: 0,
            tree_id: 0,
        };
        response(message, &header)
    }

    const PREAUTH: (u16, &[u8]) = (1, &[1, 0, 0, 0, 1, 0]);

    #[test]
    fn what_both_sides_have_is_agreed_on() {
        let found = understood(&answer(0x311, &[PREAUTH]), 0).unwrap();
        assert_eq!((found.encryption, found.signing), (None, Signing::Cmac));
        assert_eq!(found.max_transact_bytes, 8 << 20);
        assert_eq!((found.max_read_bytes, found.max_write_bytes), (1 << 20, 65536));
        let all = [PREAUTH, (2, &[1, 0, 4, 0][..]), (8, &[1, 0, 2, 0]), (77, &[1])];
        let found = understood(&answer(0x311, &all), 0).unwrap();
        assert_eq!(found.encryption, Some(Encryption::Aes256Gcm));
        assert_eq!(found.signing, Signing::Gmac);
    }

    #[test]
    fn less_than_3_1_1_is_refused() {
        let old = understood(&answer(0x302, &[]), 0).unwrap_err();
        assert!(matches!(old, SmbError::Unsupported { .. }), "{old}");
        assert!(understood(&[0; 80], status::NOT_SUPPORTED).is_err());
        assert!(understood(&answer(0x311, &[]), 0).is_err(), "no hash of the negotiation");
        let whole = answer(0x311, &[PREAUTH]);
        for length in 64..whole.len() {
            assert!(understood(&whole[..length], 0).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn the_request_has_its_contexts_where_it_says() {
        let body = request("hv1", [1; 16], &[2; 32], true).unwrap();
        let reader = Reader::new(&body, "test");
        assert_eq!((reader.u32(28).unwrap(), reader.u16(32).unwrap()), (104, 4));
        assert_eq!(reader.u16(104 - 64).unwrap(), CONTEXT_PREAUTH);
        assert_eq!(request("hv1", [1; 16], &[2; 32], false).unwrap()[32], 3);
        assert!(request(&"x".repeat(40_000), [1; 16], &[2; 32], true).is_err());
    }
}
