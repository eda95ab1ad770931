//! First tickets from domains run by MIT's Kerberos.
//!
//! The part of such an answer that is for the user is sealed with the user's key and has a tag that says what it is.
//! MIT's servers have always written the tag of the *next* kind of answer there; RFC 4120 5.4.2 knows of it and lets
//! clients take both. The library takes the right one only, so the tag is set right before it looks.

use picky_krb::constants::key_usages::AS_REP_ENC;
use picky_krb::constants::types::PA_ETYPE_INFO2_TYPE;
use picky_krb::crypto::CipherSuite;
use picky_krb::data_types::EtypeInfo2;
use picky_krb::messages::AsRep;

/// The tags of `AS-REP` [APPLICATION 11], `EncASRepPart` [25] and `EncTGSRepPart` [26].
const AS_REP: u8 = 0x6b;
const USERS_PART: u8 = 0x79;
const SERVICES_PART: u8 = 0x7a;

/// The length before every message over TCP.
const PREFIX_BYTES: usize = 4;

/// An answer of a domain's server, with its tag set right; anything else as it is.
pub(crate) fn with_right_tag(answer: Vec<u8>, password: &str) -> Vec<u8> {
    if answer.get(PREFIX_BYTES) != Some(&AS_REP) {
        return answer;
    }
    retagged(&answer, password).unwrap_or(answer)
}

fn retagged(answer: &[u8], password: &str) -> Option<Vec<u8>> {
    let mut reply: AsRep = picky_asn1_der::from_bytes(answer.get(PREFIX_BYTES..)?).ok()?;
    let hints = reply.0.padata.0.as_ref()?;
    let hint = hints.0.0.iter().find(|hint| hint.padata_type.0.0 == PA_ETYPE_INFO2_TYPE)?;
    let hint: EtypeInfo2 = picky_asn1_der::from_bytes(&hint.padata_data.0.0).ok()?;
    let salt = hint.0.first()?.salt.0.as_ref()?.0.to_string();
    let sealed = &mut reply.0.enc_part.0;
    let cipher = CipherSuite::try_from(sealed.etype.0.0.as_slice()).ok()?.cipher();
    let key = cipher.generate_key_from_password(password.as_bytes(), salt.as_bytes()).ok()?;
    let mut plain = cipher.decrypt(&key, AS_REP_ENC, &sealed.cipher.0.0).ok()?;
    let tag = plain.first_mut().filter(|tag| **tag == SERVICES_PART)?;
    *tag = USERS_PART;
    sealed.cipher.0.0 = cipher.encrypt(&key, AS_REP_ENC, &plain).ok()?;
    let message = picky_asn1_der::to_vec(&reply).ok()?;
    let length = u32::try_from(message.len()).ok()?;
    Some([&length.to_be_bytes()[..], &message].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_first_ticket_is_left_alone() {
        for answer in [&b""[..], b"\0\0\0\x01", b"\0\0\0\x02\x6b\0", b"\0\0\0\x03\x7e\x01\0"] {
            assert_eq!(with_right_tag(answer.to_vec(), "p"), answer);
        }
    }
}
