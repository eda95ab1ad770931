//! Recovery keys: passwords that nobody chose, to be written on paper.
//!
//! 160 random bits as eight groups of five letters and digits, `7K2QX-…`. The alphabet is
//! Crockford's base 32, which has no letters that look like digits; the last character of
//! each group is a check over the group and its place, so that a wrong character, two swapped ones,
//! or two swapped groups are noticed and the group is named (format §5.1).

use crate::{Password, RepoError, Result};
use std::fmt;
use zeroize::Zeroizing;

/// No I, L, O, U: the first three are read as 1, 1 and 0.
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

const GROUPS: usize = 8;

/// Characters of a group that carry bits; one more is the check.
const DATA: usize = 4;

/// Of so many sound groups it is certain that a recovery key is meant: other text has that by one
/// chance in ten thousand.
const MIN_SOUND: usize = 4;

/// A recovery key. Not shown but by [`text`](Self::text), overwritten when dropped.
pub struct RecoveryKey {
    /// As it is written: groups joined by `-`, capital letters.
    text: Zeroizing<String>,
}

impl RecoveryKey {
    /// A new one from the operating system's random source.
    ///
    /// # Errors
    /// [`RepoError::Io`] where there is no randomness to be had.
    pub fn random() -> Result<Self> {
        let mut bytes = Zeroizing::new([0; GROUPS * DATA]);
        getrandom::fill(&mut bytes[..])
            .map_err(|error| RepoError::io("get random bytes", std::io::Error::other(error)))?;
        // Each byte gives five of its bits.
        let symbols = Zeroizing::new(bytes.map(|byte| byte % 32));
        Ok(Self::of_symbols(&symbols))
    }

    fn of_symbols(symbols: &[u8; GROUPS * DATA]) -> Self {
        // As long as it gets: text that grew would leave a copy behind.
        let mut text = Zeroizing::new(String::with_capacity(GROUPS * (DATA + 2)));
        for (number, group) in symbols.chunks(DATA).enumerate() {
            if number > 0 {
                text.push('-');
            }
            let check = [check_of(number, group)];
            for symbol in group.iter().chain(&check) {
                text.push(char::from(ALPHABET[usize::from(symbol % 32)]));
            }
        }
        Self { text }
    }

    /// The key as it is to be written down, in groups.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The password that it is.
    pub fn password(&self) -> Password {
        Password::new(self.text.as_bytes())
    }
}

impl fmt::Debug for RecoveryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RecoveryKey(secret)")
    }
}

/// Whether a password is a recovery key.
#[derive(Debug)]
pub(super) enum Recognised {
    /// It is one.
    Key(RecoveryKey),
    /// It looks like one with mistakes in these groups, in words.
    Mistyped(String),
    /// It is something else.
    Other,
}

/// The bytes a slot is sealed with: of a recovery key, however it is written, its 47 characters; of
/// everything else the password as it is.
pub(super) fn canonical(password: &Password) -> Password {
    match recognise(password) {
        Recognised::Key(key) => key.password(),
        Recognised::Mistyped(_) | Recognised::Other => password.clone(),
    }
}

/// Reads a recovery key however it is written: small letters, spaces or nothing between the groups,
/// letters for the digits they look like.
pub(super) fn recognise(password: &Password) -> Recognised {
    let mut symbols = Zeroizing::new([0_u8; GROUPS * (DATA + 1)]);
    let mut places = symbols.iter_mut();
    for byte in password.as_bytes() {
        let letter = match byte.to_ascii_uppercase() {
            b'-' | b' ' | b'\t' | b'\r' | b'\n' => continue,
            b'O' => b'0',
            b'I' | b'L' => b'1',
            other => other,
        };
        let symbol = ALPHABET.iter().position(|known| *known == letter);
        let (Some(symbol), Some(place)) =
            (symbol.and_then(|at| u8::try_from(at).ok()), places.next())
        else {
            return Recognised::Other;
        };
        *place = symbol;
    }
    if places.next().is_some() {
        return Recognised::Other;
    }
    let mut data = Zeroizing::new([0; GROUPS * DATA]);
    let mut wrong = Vec::new();
    let groups = symbols.chunks(DATA + 1).zip(data.chunks_mut(DATA)).enumerate();
    for (number, (group, data)) in groups {
        data.copy_from_slice(&group[..DATA]);
        if group[DATA] != check_of(number, data) {
            wrong.push((number + 1).to_string());
        }
    }
    match wrong.len() {
        0 => Recognised::Key(RecoveryKey::of_symbols(&data)),
        1 => Recognised::Mistyped(format!("group {}", wrong.join(""))),
        2.. if GROUPS - wrong.len() >= MIN_SOUND => {
            Recognised::Mistyped(format!("groups {}", wrong.join(", ")))
        }
        _ => Recognised::Other,
    }
}

/// The check of a group: a sum over the field of 32 elements (x⁵ + x² + 1), each place with another
/// weight, so that no single wrong character and no swap of neighbours goes unnoticed.
fn check_of(number: usize, group: &[u8]) -> u8 {
    // Groups are numbered from 1, so that swapped ones do not fit.
    let number = u8::try_from(number + 1).unwrap_or(0);
    let mut sum = 0;
    for symbol in group.iter().rev() {
        sum = double(sum ^ symbol);
    }
    sum ^ number
}

const fn double(element: u8) -> u8 {
    let doubled = element << 1;
    if doubled & 0b10_0000 == 0 { doubled } else { doubled ^ 0b10_0101 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Recognised {
        recognise(&Password::new(text))
    }

    fn same(text: &str, key: &RecoveryKey) -> bool {
        matches!(read(text), Recognised::Key(found) if found.text() == key.text())
    }

    #[test]
    fn a_key_is_read_however_it_is_written() {
        for _ in 0..100 {
            let key = RecoveryKey::random().unwrap();
            let text = key.text();
            assert_eq!(text.len(), 47);
            assert_eq!(text.split('-').map(str::len).collect::<Vec<_>>(), [5; 8]);
            assert!(same(text, &key));
            assert!(same(&text.to_lowercase(), &key));
            assert!(same(&text.replace('-', ""), &key));
            assert!(same(&format!(" {}\n", text.replace('-', "  ")), &key));
            assert!(same(&text.replace('0', "o").replace('1', "l"), &key));
        }
        assert_ne!(RecoveryKey::random().unwrap().text(), RecoveryKey::random().unwrap().text());
        assert_eq!(format!("{:?}", RecoveryKey::random().unwrap()), "RecoveryKey(secret)");
    }

    #[test]
    fn the_example_of_the_document() {
        let mut symbols = [0; GROUPS * DATA];
        for (symbol, value) in symbols.iter_mut().zip(0..) {
            *symbol = value;
        }
        let key = RecoveryKey::of_symbols(&symbols);
        assert_eq!(key.text(), EXAMPLE);
    }

    /// The symbols 0 to 31 in order (format §5.1).
    const EXAMPLE: &str = "01230-4567M-89AB9-CDEFS-GHJKJ-MNPQ6-RSTVV-WXYZ3";

    #[test]
    fn every_wrong_character_and_every_swap_is_noticed_and_its_group_named() {
        let key = RecoveryKey::random().unwrap();
        let text: Vec<char> = key.text().replace('-', "").chars().collect();
        for at in 0..text.len() {
            for other in ALPHABET {
                let mut changed = text.clone();
                changed[at] = char::from(*other);
                if changed == text {
                    continue;
                }
                let read = read(&changed.iter().collect::<String>());
                let group = format!("group {}", at / 5 + 1);
                assert!(matches!(read, Recognised::Mistyped(said) if said == group));
            }
            let mut swapped = text.clone();
            if at % 5 < 4 && swapped[at] != swapped[at + 1] {
                swapped.swap(at, at + 1);
                let read = read(&swapped.iter().collect::<String>());
                assert!(matches!(read, Recognised::Mistyped(_)));
            }
        }
        let mut groups: Vec<&str> = key.text().split('-').collect();
        groups.swap(2, 5);
        let read = read(&groups.join("-"));
        assert!(matches!(read, Recognised::Mistyped(said) if said == "groups 3, 6"));
    }

    #[test]
    fn other_passwords_are_other() {
        for text in [
            "",
            "correct horse battery staple",
            "da39a3ee5e6b4b0d3255bfef95601890afd80709",
            "0000000000000000000000000000000000000000",
            "7K2QX-7K2QX-7K2QX-7K2QX-7K2QX-7K2QX-7K2QX",
            "7K2QX-7K2QX-7K2QX-7K2QX-7K2QX-7K2QX-7K2QX-7K2QU",
        ] {
            assert!(matches!(read(text), Recognised::Other), "{text}");
        }
    }
}
