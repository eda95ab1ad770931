//! Which hash a certificate is signed with.

use vmtide_sspi::der::{OBJECT_ID, SEQUENCE, expect};

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

#[cfg(test)]
mod tests {
    use super::*;

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
