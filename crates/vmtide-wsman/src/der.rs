//! The little of DER that is needed: which hash a certificate is signed with, and the token within SPNEGO.

/// One element: its tag, its content, and what follows it.
pub(crate) struct Node<'a> {
    pub tag: u8,
    pub content: &'a [u8],
    pub rest: &'a [u8],
}

const SEQUENCE: u8 = 0x30;
const OBJECT_ID: u8 = 0x06;
const OCTETS: u8 = 0x04;

/// Reads an element with a short tag and a length of up to four bytes.
pub(crate) fn read(bytes: &[u8]) -> Option<Node<'_>> {
    let (&tag, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81..=0x84 => {
            let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            let length = digits.iter().try_fold(0_usize, |length, byte| {
                length.checked_mul(256)?.checked_add(usize::from(*byte))
            })?;
            (length, rest)
        }
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(length)?;
    (tag & 0x1f != 0x1f).then_some(Node { tag, content, rest })
}

fn expect(bytes: &[u8], tag: u8) -> Option<Node<'_>> {
    read(bytes).filter(|node| node.tag == tag)
}

/// The hash of a certificate for channel bindings (RFC 5929, `tls-server-end-point`): that of its own signature, or
/// SHA-256 where that is weaker or unknown.
pub(crate) fn binding_hash(certificate: &[u8]) -> &'static ring::digest::Algorithm {
    match signature_hash(certificate) {
        Some(Hash::Sha384) => &ring::digest::SHA384,
        Some(Hash::Sha512) => &ring::digest::SHA512,
        _ => &ring::digest::SHA256,
    }
}

#[derive(Clone, Copy)]
enum Hash {
    Sha384,
    Sha512,
}

fn signature_hash(certificate: &[u8]) -> Option<Hash> {
    let certificate = expect(certificate, SEQUENCE)?;
    let signed = expect(certificate.content, SEQUENCE)?;
    let algorithm = expect(signed.rest, SEQUENCE)?;
    let id = expect(algorithm.content, OBJECT_ID)?;
    match id.content {
        // sha384WithRSAEncryption, ecdsa-with-SHA384
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0c]
        | [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x03] => Some(Hash::Sha384),
        // sha512WithRSAEncryption, ecdsa-with-SHA512
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0d]
        | [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x04] => Some(Hash::Sha512),
        // RSASSA-PSS names its hash in its parameters: [0] { SEQUENCE { OID } }.
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0a] => {
            let parameters = expect(id.rest, SEQUENCE)?;
            let hash = expect(expect(parameters.content, 0xa0)?.content, SEQUENCE)?;
            match expect(hash.content, OBJECT_ID)?.content {
                [0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02] => Some(Hash::Sha384),
                [0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x03] => Some(Hash::Sha512),
                _ => None,
            }
        }
        _ => None,
    }
}

/// The mechanism's own token: of an answer of SPNEGO (RFC 4178 4.2.2, `NegTokenResp`) the one within, of anything
/// else the thing itself. Empty where an answer of SPNEGO has none.
pub(crate) fn mechanism_token(token: &[u8]) -> &[u8] {
    const RESPONSE: u8 = 0xa1;
    const RESPONSE_TOKEN: u8 = 0xa2;
    let Some(response) = expect(token, RESPONSE) else { return token };
    let Some(fields) = expect(response.content, SEQUENCE) else { return &[] };
    let mut rest = fields.content;
    while let Some(field) = read(rest) {
        if field.tag == RESPONSE_TOKEN {
            return expect(field.content, OCTETS).map_or(&[], |octets| octets.content);
        }
        rest = field.rest;
    }
    &[]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_held_against_what_is_there() {
        assert_eq!(read(&[4, 2, 1, 2, 9]).unwrap().rest, [9]);
        assert_eq!(read(&[4, 0x82, 0, 1, 7]).unwrap().content, [7]);
        for bad in [
            &[][..],
            &[4],
            &[4, 1],
            &[4, 0x80],
            &[4, 0x85, 0, 0, 0, 0, 0],
            &[4, 0x84, 0xff, 0xff, 0xff, 0xff],
            &[0x1f, 0],
        ] {
            assert!(read(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn tokens_come_out_of_spnego() {
        assert_eq!(mechanism_token(b"NTLMSSP\0..."), b"NTLMSSP\0...");
        // accept-incomplete, the mechanism, the token
        let wrapped =
            [0xa1, 0x0e, 0x30, 0x0c, 0xa0, 3, 0x0a, 1, 1, 0xa2, 5, 0x04, 3, b'a', b'b', b'c'];
        assert_eq!(mechanism_token(&wrapped), b"abc");
        assert_eq!(mechanism_token(&[0xa1, 7, 0x30, 5, 0xa0, 3, 0x0a, 1, 0]), b"");
        assert_eq!(mechanism_token(&[0xa1, 0]), b"");
    }

    #[test]
    fn certificates_are_hashed_as_they_are_signed() {
        for (algorithm, expected) in [
            (&rcgen::PKCS_ECDSA_P256_SHA256, &ring::digest::SHA256),
            (&rcgen::PKCS_ECDSA_P384_SHA384, &ring::digest::SHA384),
            (&rcgen::PKCS_ED25519, &ring::digest::SHA256),
        ] {
            let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
            let made = rcgen::CertificateParams::new(vec!["h".to_owned()])
                .unwrap()
                .self_signed(&key)
                .unwrap();
            assert_eq!(binding_hash(made.der()), expected);
        }
        assert_eq!(binding_hash(b"nonsense"), &ring::digest::SHA256);
    }
}
