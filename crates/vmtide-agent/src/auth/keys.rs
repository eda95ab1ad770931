//! The file of keys: names, rights, and salted hashes.
//!
//! One key per line, `name:rights:salt:hash`. Rights are `read-only` or `read-write`; salt (16 bytes) and hash (32
//! bytes) are hexadecimal; the hash is HMAC-SHA-256 of the key with the salt as its key. Empty lines and those that
//! begin with `#` say nothing. Keys made by `vmtide agent key add` are 256 random bits, so a fast hash is enough:
//! there is nothing to guess.
//!
//! A file that is one line of another form is that key itself, in the clear, with all rights, as rct-service has
//! it: the way to begin, and to take over a key that clients have. A line that looks like one of the first form with
//! a slip in it, or with its end cut off, is an error and never a key: its salt and hash would be the password, and
//! may be read by others than the key.

use super::Caller;
use crate::error::{AgentError, Result};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::hmac;
use serde::Serialize;
use std::fmt::{self, Write};
use std::sync::Arc;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// The most keys in a file: all of them are tried at every request.
pub const MAX_KEYS: usize = 256;
/// The longest key that is looked at; longer ones are wrong without being hashed.
const MAX_KEY_BYTES: usize = 512;
/// The most bytes of a name, which is part of every line of the audit log.
const MAX_NAME_BYTES: usize = 64;
/// Random bytes of a key made here.
const NEW_KEY_BYTES: usize = 32;
/// Random bytes that make equal keys look different.
const SALT_BYTES: usize = 16;
/// Bytes of HMAC-SHA-256.
const HASH_BYTES: usize = 32;
/// What heads a file that is made here: one that has it never holds a key in the clear.
pub(super) const HEAD: &str =
    "# Keys of a vmtide agent, made by `vmtide agent key add`. name:rights:salt:hash\n";
/// The name of the key of a file with one key in the clear.
const PLAIN_NAME: &str = "default";

/// What a key is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rights {
    /// Reading disks and their changes, also at a moment that is frozen for that.
    ReadOnly,
    /// That, and switching tracking, sealing ids, making and writing disks.
    ReadWrite,
}

impl Rights {
    /// As it stands in the file.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ReadOnly => "read-only",
            Self::ReadWrite => "read-write",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        match name {
            "read-only" | "ro" => Some(Self::ReadOnly),
            "read-write" | "rw" => Some(Self::ReadWrite),
            _ => None,
        }
    }
}

impl fmt::Display for Rights {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// One key, as its hash.
#[derive(Clone)]
struct Key {
    name: Arc<str>,
    rights: Rights,
    salt: [u8; SALT_BYTES],
    hash: [u8; HASH_BYTES],
}

/// The keys of a file.
#[derive(Clone, Default)]
pub struct KeySet {
    keys: Vec<Key>,
    plain: bool,
}

/// A key made here. The only moment at which it is known.
pub struct NewKey {
    /// The key, for the client.
    pub secret: Zeroizing<String>,
    /// Its line of the file, without a line feed.
    pub line: String,
}

impl KeySet {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether there are none, so that nobody is let in.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Whether the file holds a key in the clear.
    pub fn is_plain(&self) -> bool {
        self.plain
    }

    /// The names and rights, in the order of the file.
    pub fn entries(&self) -> impl Iterator<Item = (&str, Rights)> {
        self.keys.iter().map(|key| (&*key.name, key.rights))
    }

    /// Whose key this is. Takes as long whichever it is, and where it is none.
    pub fn find(&self, presented: &[u8]) -> Option<Caller> {
        let presented = if presented.len() <= MAX_KEY_BYTES { presented } else { &[] };
        let mut found = None;
        for key in &self.keys {
            let is_this: bool = hash(&key.salt, presented).ct_eq(&key.hash).into();
            if is_this {
                found = Some(key);
            }
        }
        // An empty key is none, even where somebody wrote its hash into the file.
        let found = found.filter(|_| !presented.is_empty())?;
        Some(Caller { name: Arc::clone(&found.name), rights: found.rights })
    }
}

/// Names only: a hash in a log would be one secret less.
impl fmt::Debug for KeySet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_list().entries(self.entries()).finish()
    }
}

fn hash(salt: &[u8], key: &[u8]) -> [u8; HASH_BYTES] {
    let mut out = [0; HASH_BYTES];
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, salt), key);
    for (to, from) in out.iter_mut().zip(tag.as_ref()) {
        *to = *from;
    }
    out
}

/// Reads the text of a file of keys.
///
/// # Errors
/// [`AgentError::Usage`] with the number of the line; never with what is in it, which may be a key.
pub fn parse(text: &str) -> Result<KeySet> {
    // Editors of Windows begin a file with this.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let lines: Vec<(usize, &str)> = text
        .lines()
        .enumerate()
        .map(|(number, line)| (number + 1, line.trim()))
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .collect();
    if let [(_, only)] = lines[..]
        && !is_meant_as_hashed(only)
        && !text.lines().any(|line| line.trim() == HEAD.trim())
    {
        return plain(only);
    }
    if lines.len() > MAX_KEYS {
        return Err(AgentError::usage(format!("more than {MAX_KEYS} keys")));
    }
    let mut set = KeySet::default();
    for (number, line) in lines {
        let key = parse_line(line)
            .map_err(|reason| AgentError::usage(format!("line {number}: {reason}")))?;
        if set.keys.iter().any(|other| other.name == key.name) {
            let reason = format!("line {number}: a second key of the name {}", key.name);
            return Err(AgentError::usage(reason));
        }
        set.keys.push(key);
    }
    Ok(set)
}

/// Whether a line is meant as `name:rights:salt:hash`, so that a slip in it is not taken for a key: by its number of
/// fields, by its rights or their beginning, or by a salt or hash anywhere but alone, where it is a key as
/// `openssl rand -hex 32` makes it.
fn is_meant_as_hashed(line: &str) -> bool {
    let mut fields = line.split(':').skip(1).peekable();
    let rights = fields.peek().copied().unwrap_or_default();
    let is_begin_of = |right: Rights| !rights.is_empty() && right.name().starts_with(rights);
    let is_hash = |field: &str| {
        [SALT_BYTES, HASH_BYTES].contains(&(field.len() / 2))
            && field.len().is_multiple_of(2)
            && field.bytes().all(|digit| digit.is_ascii_hexdigit())
    };
    Rights::parse(rights).is_some()
        || [Rights::ReadOnly, Rights::ReadWrite].into_iter().any(is_begin_of)
        || line.split(':').count() >= 4
        || fields.any(is_hash)
}

fn check_secret(key: &str) -> Result<()> {
    let is_good = |byte: u8| byte.is_ascii_graphic() || byte == b' ';
    if key.is_empty() || key.len() > MAX_KEY_BYTES || !key.bytes().all(is_good) {
        return Err(AgentError::usage(format!(
            "a key is one line of up to {MAX_KEY_BYTES} letters, digits and signs of ASCII"
        )));
    }
    Ok(())
}

fn plain(key: &str) -> Result<KeySet> {
    check_secret(key)?;
    let salt = random()?;
    let hash = hash(&salt, key.as_bytes());
    let key = Key { name: PLAIN_NAME.into(), rights: Rights::ReadWrite, salt, hash };
    Ok(KeySet { keys: vec![key], plain: true })
}

fn parse_line(line: &str) -> std::result::Result<Key, String> {
    let mut fields = line.split(':');
    let (Some(name), Some(rights), Some(salt), Some(hash), None) =
        (fields.next(), fields.next(), fields.next(), fields.next(), fields.next())
    else {
        return Err("is not name:rights:salt:hash".into());
    };
    check_name(name)?;
    let rights = Rights::parse(rights).ok_or("the rights are neither read-only nor read-write")?;
    let salt = unhex(salt).ok_or("the salt is not 32 hexadecimal digits")?;
    let hash = unhex(hash).ok_or("the hash is not 64 hexadecimal digits")?;
    Ok(Key { name: name.into(), rights, salt, hash })
}

/// Succeeds for a name that a line, a log and a terminal can hold.
///
/// # Errors
/// What is wrong with it.
pub fn check_name(name: &str) -> std::result::Result<(), String> {
    let is_good = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
    if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.chars().all(is_good) {
        return Err(format!(
            "the name of a key is 1 to {MAX_NAME_BYTES} letters, digits and - _ . @"
        ));
    }
    Ok(())
}

/// Makes a key.
///
/// # Errors
/// [`AgentError::Usage`] for a name that is none; [`AgentError::Refused`] without a source of randomness.
pub fn generate(name: &str, rights: Rights) -> Result<NewKey> {
    let bytes: Zeroizing<[u8; NEW_KEY_BYTES]> = Zeroizing::new(random()?);
    take_over(name, rights, Zeroizing::new(URL_SAFE_NO_PAD.encode(bytes.as_ref())))
}

/// A key that clients have already.
///
/// # Errors
/// As [`generate`]; [`AgentError::Usage`] for a key that no header can hold.
pub fn take_over(name: &str, rights: Rights, secret: Zeroizing<String>) -> Result<NewKey> {
    check_name(name).map_err(AgentError::usage)?;
    check_secret(&secret)?;
    let salt: [u8; SALT_BYTES] = random()?;
    let hash = hash(&salt, secret.as_bytes());
    let line = format!("{name}:{rights}:{}:{}", hex(&salt), hex(&hash));
    Ok(NewKey { secret, line })
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|error| AgentError::refused("get random bytes for a key", error))?;
    Ok(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != N * 2 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_made_here_is_found_with_its_rights_and_no_other_is() {
        let reader = generate("reader", Rights::ReadOnly).unwrap();
        let writer = generate("writer", Rights::ReadWrite).unwrap();
        let text = format!("# keys\n\n{}\r\n{}\n", reader.line, writer.line);
        let set = parse(&text).unwrap();
        assert!(!set.is_plain());
        assert_eq!(
            set.entries().collect::<Vec<_>>(),
            [("reader", Rights::ReadOnly), ("writer", Rights::ReadWrite)]
        );
        let found = set.find(writer.secret.as_bytes()).unwrap();
        assert_eq!((&*found.name, found.may_write()), ("writer", true));
        assert!(!set.find(reader.secret.as_bytes()).unwrap().may_write());
        assert_eq!(set.find(b""), None);
        assert_eq!(set.find(b"swordfish"), None);
        assert_eq!(set.find(&[b'x'; 100_000]), None);
        let mut longer = reader.secret.as_bytes().to_vec();
        longer.push(b'x');
        assert_eq!(set.find(&longer), None);
        assert!(!format!("{set:?}").contains(&reader.line[20..]));
        assert!(!text.contains(reader.secret.as_str()));
    }

    #[test]
    fn the_hash_is_what_other_programs_make() {
        // printf swordfish | openssl dgst -sha256 -mac HMAC -macopt hexkey:000102030405060708090a0b0c0d0e0f
        let salt: [u8; SALT_BYTES] = std::array::from_fn(|at| u8::try_from(at).unwrap());
        assert_eq!(
            hex(&hash(&salt, b"swordfish")),
            "bbcb1da8b8ed98f93de8e522c3b3436547dc63ae31b0ac9120387f12d6a97d91"
        );
    }

    #[test]
    fn one_line_of_another_form_is_the_key_itself() {
        for text in ["swordfish", "\u{feff}swordfish\r\n", "\n# old key\nswordfish\n"] {
            let set = parse(text).unwrap();
            assert!(set.is_plain() && set.find(b"swordfish").unwrap().may_write(), "{text:?}");
        }
        assert!(parse("a:b:c").unwrap().find(b"a:b:c").is_some());
        let digits = "0123456789abcdef".repeat(4);
        assert!(parse(&digits).unwrap().find(digits.as_bytes()).is_some());
        assert!(parse("").unwrap().is_empty());
    }

    #[test]
    fn slips_are_errors_that_do_not_show_the_line() {
        let good = generate("a", Rights::ReadOnly).unwrap().line;
        let other = generate("b", Rights::ReadOnly).unwrap().line;
        for text in [
            "a:read-only:12:34".to_owned(),
            good.replace("read-only", "all") + "\n" + &other,
            format!("{good}\n{good}"),
            format!("{good}\nswordfish"),
            format!("{good}0"),
            good.replacen('a', "a b", 1),
            good.replace("read-only", "readonly"),
            good.replace("read-only", ""),
            good.replace("read-only:", ""),
            good.replace(':', "::"),
            good[..good.len() - 7].to_owned(),
            good[..20].to_owned(),
            "a:read-".to_owned(),
            format!("{HEAD}a"),
            "x".repeat(600),
        ] {
            let error = parse(&text).unwrap_err().to_string();
            assert!(!error.contains("swordfish") && !error.contains(&good[12..40]), "{error}");
        }
        for length in 3..good.len() {
            assert!(parse(&good[..length]).is_err(), "{length}");
        }
    }
}
