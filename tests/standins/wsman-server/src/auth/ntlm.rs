//! The server's side of NTLMv2 (MS-NLMP 3.2.5) with signing and sealing of messages (3.4).

use super::crypto::{Rc4, hmac_md5, md4, md5};
use crate::options::{ChannelBinding, User};
use std::time::{SystemTime, UNIX_EPOCH};

const SIGNATURE: &[u8] = b"NTLMSSP\0";

const UNICODE: u32 = 0x0000_0001;
const REQUEST_TARGET: u32 = 0x0000_0004;
const SIGN: u32 = 0x0000_0010;
const SEAL: u32 = 0x0000_0020;
const NTLM: u32 = 0x0000_0200;
const ALWAYS_SIGN: u32 = 0x0000_8000;
const TARGET_TYPE_SERVER: u32 = 0x0002_0000;
const EXTENDED_SECURITY: u32 = 0x0008_0000;
const TARGET_INFO: u32 = 0x0080_0000;
const VERSION: u32 = 0x0200_0000;
const KEY_128: u32 = 0x2000_0000;
const KEY_EXCHANGE: u32 = 0x4000_0000;
const KEY_56: u32 = 0x8000_0000;

/// What a session must have so that messages can be sealed: without 128 bits and the exchange of a key it is refused.
const NEEDED_TO_SEAL: u32 = SIGN | SEAL | EXTENDED_SECURITY | KEY_128 | KEY_EXCHANGE;

/// AV pairs of the target information (MS-NLMP 2.2.2.1).
const AV_END: u16 = 0;
const AV_COMPUTER: u16 = 1;
const AV_DOMAIN: u16 = 2;
const AV_DNS_COMPUTER: u16 = 3;
const AV_DNS_DOMAIN: u16 = 4;
const AV_FLAGS: u16 = 6;
const AV_TIMESTAMP: u16 = 7;
const AV_CHANNEL_BINDINGS: u16 = 10;
/// In `AV_FLAGS`: the message carries a MIC.
const FLAG_MIC: u32 = 2;

/// Where the MIC stands in an authenticate message, and where what follows begins.
const MIC_AT: usize = 72;
const MIC_END: usize = 88;

/// From 1601 to 1970, in units of 100 ns.
const EPOCH_OFFSET: u64 = 116_444_736_000_000_000;

/// A challenge that was sent.
pub struct Challenge {
    negotiate: Vec<u8>,
    challenge: Vec<u8>,
    nonce: [u8; 8],
    flags: u32,
}

/// Answers a negotiate message.
///
/// # Errors
/// What is wrong with it.
pub fn challenge(negotiate: &[u8], machine: &str) -> Result<(Challenge, Vec<u8>), String> {
    if !negotiate.starts_with(SIGNATURE) || u32_at(negotiate, 8)? != 1 {
        return Err("no NTLM negotiate message".into());
    }
    let asked = u32_at(negotiate, 12)?;
    if asked & UNICODE == 0 {
        return Err("the client does not speak Unicode".into());
    }
    let offered =
        SIGN | SEAL | ALWAYS_SIGN | EXTENDED_SECURITY | KEY_128 | KEY_EXCHANGE | KEY_56 | VERSION;
    let flags =
        (asked & offered) | UNICODE | NTLM | TARGET_TYPE_SERVER | TARGET_INFO | REQUEST_TARGET;
    let mut nonce = [0; 8];
    getrandom::fill(&mut nonce).map_err(|error| error.to_string())?;
    let name = utf16(machine);
    let lower = utf16(&machine.to_lowercase());
    let mut info = Vec::new();
    for (id, value) in [
        (AV_DOMAIN, &name[..]),
        (AV_COMPUTER, &name[..]),
        (AV_DNS_DOMAIN, &lower[..]),
        (AV_DNS_COMPUTER, &lower[..]),
        (AV_TIMESTAMP, &filetime().to_le_bytes()[..]),
        (AV_END, &[]),
    ] {
        info.extend_from_slice(&id.to_le_bytes());
        info.extend_from_slice(&length16(value)?.to_le_bytes());
        info.extend_from_slice(value);
    }
    let mut message = SIGNATURE.to_vec();
    message.extend_from_slice(&2u32.to_le_bytes());
    field(&mut message, name.len(), 56)?;
    message.extend_from_slice(&flags.to_le_bytes());
    message.extend_from_slice(&nonce);
    message.extend_from_slice(&[0; 8]);
    field(&mut message, info.len(), 56 + name.len())?;
    // Windows Server 2022, NTLM revision 15.
    message.extend_from_slice(&[10, 0, 0x7c, 0x4f, 0, 0, 0, 15]);
    message.extend_from_slice(&name);
    message.extend_from_slice(&info);
    let sent =
        Challenge { negotiate: negotiate.to_vec(), challenge: message.clone(), nonce, flags };
    Ok((sent, message))
}

/// A user who proved the password.
pub struct Accepted {
    /// The name as in the options.
    pub user: String,
    /// Whether the message had a MIC, so that SPNEGO needs one of its own (MS-SPNG 3.3.5.1).
    pub mic: bool,
    /// What signs and seals; none where the client asked for no such session.
    pub sealing: Option<Sealing>,
}

impl Challenge {
    /// Judges an authenticate message.
    ///
    /// # Errors
    /// Why the login is refused; for the log of the tests, not for the client.
    pub fn authenticate(
        self,
        message: &[u8],
        users: &[User],
        binding: ChannelBinding,
        expected_binding: Option<[u8; 16]>,
    ) -> Result<Accepted, String> {
        if !message.starts_with(SIGNATURE) || u32_at(message, 8)? != 3 {
            return Err("no NTLM authenticate message".into());
        }
        let response = payload(message, 20)?;
        let domain = from_utf16(payload(message, 28)?)?;
        let name = from_utf16(payload(message, 36)?)?;
        let encrypted_key = payload(message, 52)?;
        let flags = u32_at(message, 60)? & self.flags;
        if response.len() < 16 + 28 {
            return Err("the response is not of NTLMv2".into());
        }
        let user = users.iter().find(|user| user.name.to_lowercase() == name.to_lowercase());
        let user = user.ok_or_else(|| format!("there is no user {name:?}"))?;
        let key = hmac_md5(
            &md4(&utf16(&user.password)),
            &[&utf16(&name.to_uppercase()), &utf16(&domain)],
        );
        let (proof, blob) = response.split_at(16);
        if hmac_md5(&key, &[&self.nonce, blob]) != proof {
            return Err(format!("the password of {name:?} is wrong"));
        }
        let base_key = hmac_md5(&key, &[proof]);
        let session_key = if flags & KEY_EXCHANGE == 0 {
            base_key
        } else {
            let mut key: [u8; 16] =
                encrypted_key.try_into().map_err(|_| "the session key has not 16 bytes")?;
            Rc4::new(&base_key).apply(&mut key);
            key
        };
        let pairs = Pairs::read(blob.get(28..).unwrap_or_default())?;
        pairs.check_binding(binding, expected_binding)?;
        // The challenge has a time stamp: the client must protect the three messages with a MIC (3.1.5.1.2).
        if pairs.flags & FLAG_MIC == 0 {
            return Err("the message has no MIC though the challenge had a time stamp".into());
        }
        self.check_mic(message, &session_key)?;
        let sealing =
            (flags & NEEDED_TO_SEAL == NEEDED_TO_SEAL).then(|| Sealing::new(&session_key));
        Ok(Accepted { user: user.name.clone(), mic: true, sealing })
    }

    fn check_mic(&self, message: &[u8], session_key: &[u8; 16]) -> Result<(), String> {
        let mic = message.get(MIC_AT..MIC_END).ok_or("the message ends before its MIC")?;
        let mut without = message.to_vec();
        without.get_mut(MIC_AT..MIC_END).ok_or("the message ends before its MIC")?.fill(0);
        if hmac_md5(session_key, &[&self.negotiate, &self.challenge, &without]) != mic {
            return Err("the MIC is wrong: a message was changed".into());
        }
        Ok(())
    }
}

/// The pairs in the client's blob that matter here.
struct Pairs {
    flags: u32,
    binding: Option<[u8; 16]>,
}

impl Pairs {
    fn read(mut rest: &[u8]) -> Result<Self, String> {
        let mut pairs = Self { flags: 0, binding: None };
        loop {
            let (id, length) = (u16_at(rest, 0)?, usize::from(u16_at(rest, 2)?));
            let value = rest.get(4..4 + length).ok_or("a pair ends beyond the message")?;
            match id {
                AV_END => return Ok(pairs),
                AV_FLAGS => pairs.flags = u32_at(value, 0)?,
                AV_CHANNEL_BINDINGS => {
                    pairs.binding =
                        Some(value.try_into().map_err(|_| "a binding has not 16 bytes")?);
                }
                _ => {}
            }
            rest = rest.get(4 + length..).unwrap_or_default();
        }
    }

    fn check_binding(
        &self,
        binding: ChannelBinding,
        expected: Option<[u8; 16]>,
    ) -> Result<(), String> {
        let Some(expected) = expected else { return Ok(()) };
        let sent = self.binding.filter(|sent| *sent != [0; 16]);
        match (binding, sent) {
            (ChannelBinding::None, _) | (ChannelBinding::Relaxed, None) => Ok(()),
            (_, Some(sent)) if sent == expected => Ok(()),
            (_, Some(_)) => Err("the login is bound to another TLS connection".into()),
            (ChannelBinding::Strict, None) => {
                Err("the login is not bound to its TLS connection".into())
            }
        }
    }
}

/// The MD5 of `gss_channel_bindings_struct` with application data only (MS-NLMP 2.2.2.1, RFC 4121 4.1.1.2).
pub fn binding_hash(application_data: &[u8]) -> [u8; 16] {
    let length = u32::try_from(application_data.len()).unwrap_or_default().to_le_bytes();
    md5(&[&[0; 16], &length, application_data])
}

/// Signing and sealing in both directions, with extended session security and 128 bits.
pub struct Sealing {
    /// From the client.
    incoming: Direction,
    /// To the client.
    outgoing: Direction,
}

struct Direction {
    sign_key: [u8; 16],
    seal_key: [u8; 16],
    rc4: Rc4,
    sequence: u32,
}

impl Direction {
    fn new(session_key: &[u8; 16], way: &str) -> Self {
        let magic = |what: &str| format!("session key to {way} {what} key magic constant\0");
        let seal_key = md5(&[session_key, magic("sealing").as_bytes()]);
        Self {
            sign_key: md5(&[session_key, magic("signing").as_bytes()]),
            seal_key,
            rc4: Rc4::new(&seal_key),
            sequence: 0,
        }
    }

    /// The signature of the next message, 16 bytes; the message itself was encrypted before.
    fn signature(&mut self, plain: &[u8]) -> [u8; 16] {
        let sequence = self.sequence.to_le_bytes();
        self.sequence = self.sequence.wrapping_add(1);
        let digest = hmac_md5(&self.sign_key, &[&sequence, plain]);
        let mut signature = [0; 16];
        signature[0] = 1;
        signature[4..12].copy_from_slice(&digest[..8]);
        self.rc4.apply(&mut signature[4..12]);
        signature[12..].copy_from_slice(&sequence);
        signature
    }

    fn restart(&mut self) {
        self.rc4 = Rc4::new(&self.seal_key);
    }
}

impl Sealing {
    fn new(session_key: &[u8; 16]) -> Self {
        Self {
            incoming: Direction::new(session_key, "client-to-server"),
            outgoing: Direction::new(session_key, "server-to-client"),
        }
    }

    /// Opens a sealed message.
    ///
    /// # Errors
    /// Where the signature is wrong: changed on the way, or out of order.
    pub fn unwrap(&mut self, signature: &[u8], sealed: &[u8]) -> Result<Vec<u8>, String> {
        let mut plain = sealed.to_vec();
        self.incoming.rc4.apply(&mut plain);
        if self.incoming.signature(&plain) != signature {
            return Err("the signature of the sealed message is wrong".into());
        }
        Ok(plain)
    }

    /// Seals a message: its signature, and it.
    pub fn wrap(&mut self, plain: &[u8]) -> ([u8; 16], Vec<u8>) {
        let mut sealed = plain.to_vec();
        self.outgoing.rc4.apply(&mut sealed);
        (self.outgoing.signature(plain), sealed)
    }

    /// Checks the client's MIC over SPNEGO's list of mechanisms and makes the server's. Both keystreams start anew after
    /// it, the sequence numbers do not (MS-SPNG 3.3.5.1).
    ///
    /// # Errors
    /// Where the client's is wrong.
    pub fn mechanism_mic(&mut self, list: &[u8], mic: &[u8]) -> Result<[u8; 16], String> {
        if self.incoming.signature(list) != mic {
            return Err("the MIC over SPNEGO's mechanisms is wrong".into());
        }
        self.incoming.restart();
        let own = self.outgoing.signature(list);
        self.outgoing.restart();
        Ok(own)
    }
}

/// Text as NTLM writes it.
pub fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

fn from_utf16(bytes: &[u8]) -> Result<String, String> {
    let units: Vec<u16> = bytes
        .chunks(2)
        .map(|pair| pair.iter().rev().fold(0, |sum, byte| (sum << 8) | u16::from(*byte)))
        .collect();
    String::from_utf16(&units).map_err(|_| "a name is not UTF-16".into())
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, String> {
    let part = bytes.get(at..at + 2).and_then(|part| part.try_into().ok());
    part.map(u16::from_le_bytes).ok_or_else(|| "the message is too short".into())
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, String> {
    let part = bytes.get(at..at + 4).and_then(|part| part.try_into().ok());
    part.map(u32::from_le_bytes).ok_or_else(|| "the message is too short".into())
}

/// What a field (length, room, offset) points to.
fn payload(message: &[u8], at: usize) -> Result<&[u8], String> {
    let length = usize::from(u16_at(message, at)?);
    let offset = usize::try_from(u32_at(message, at + 4)?).map_err(|error| error.to_string())?;
    let end = offset.checked_add(length).ok_or("a field ends beyond the message")?;
    message.get(offset..end).ok_or_else(|| "a field ends beyond the message".into())
}

fn field(message: &mut Vec<u8>, length: usize, offset: usize) -> Result<(), String> {
    let length = u16::try_from(length).map_err(|error| error.to_string())?;
    let offset = u32::try_from(offset).map_err(|error| error.to_string())?;
    message.extend_from_slice(&length.to_le_bytes());
    message.extend_from_slice(&length.to_le_bytes());
    message.extend_from_slice(&offset.to_le_bytes());
    Ok(())
}

fn length16(value: &[u8]) -> Result<u16, String> {
    u16::try_from(value.len()).map_err(|error| error.to_string())
}

fn filetime() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos() / 100).unwrap_or_default().saturating_add(EPOCH_OFFSET)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// MS-NLMP 4.2.4: the NTLMv2 response of its example.
    #[test]
    fn the_keys_are_those_of_the_specification() {
        let key = hmac_md5(&md4(&utf16("Password")), &[&utf16("USER"), &utf16("Domain")]);
        let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "0c868a403bfd7a93a3001ef22ef02e3f");
    }

    /// MS-NLMP 4.2.4.4: "Plaintext" sealed with the example's session key.
    #[test]
    fn a_message_is_sealed_as_in_the_specification() {
        let mut direction = Direction::new(&[0x55; 16], "client-to-server");
        let mut message = utf16("Plaintext");
        let plain = message.clone();
        direction.rc4.apply(&mut message);
        let signature = direction.signature(&plain);
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(hex(&message), "54e50165bf1936dc996020c1811b0f06fb5f");
        assert_eq!(hex(&signature), "010000007fb38ec5c55d497600000000");
    }

    #[test]
    fn broken_messages_are_refused() {
        assert!(challenge(b"", "M").is_err());
        assert!(challenge(b"NTLMSSP\0\x01\0\0\0", "M").is_err());
        let mut negotiate = b"NTLMSSP\0\x01\0\0\0".to_vec();
        negotiate.extend_from_slice(&(UNICODE | SIGN).to_le_bytes());
        for length in 0..120 {
            let (sent, _) = challenge(&negotiate, "M").unwrap();
            let mut message = b"NTLMSSP\0\x03\0\0\0".to_vec();
            message.resize(message.len() + length, 0xff);
            assert!(sent.authenticate(&message, &[], ChannelBinding::None, None).is_err());
        }
    }
}
