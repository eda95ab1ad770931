//! `[{"offset":0,"length":512},…]`, read as it arrives.
//!
//! A list of a million ranges is a text of some 40 MB. This reader keeps nothing of the text, only the ranges
//! (16 bytes each), takes it in pieces cut anywhere, and knows its limit before it allocates. It is stricter
//! than JSON where that costs a client nothing: other members of a range must be plain values, names are not
//! written with escapes, and strings not with `\u`.

use thiserror::Error;
use vmtide_block::ByteRange;

/// The longest number or literal that a member may have; 20 digits are a `u64`.
const LITERAL_BYTES: usize = 32;

/// What is kept of a member's name: enough to tell `offset` and `length` from all others.
const NAME_BYTES: usize = 8;

/// Why a text is not a list of ranges.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum JsonRangesError {
    /// It is not the JSON that was asked for.
    #[error("byte {at}: expected {expected} in a list of {{\"offset\":…,\"length\":…}}")]
    Syntax {
        /// Where, from 0.
        at: u64,
        /// What should be there.
        expected: &'static str,
    },
    /// It is JSON, and another kind of it.
    #[error("byte {at}: expected {expected} in a list of {{\"offset\":…,\"length\":…}}")]
    Data {
        /// Where, from 0.
        at: u64,
        /// What should be there.
        expected: &'static str,
    },
    /// More ranges than one request may have.
    #[error("more than {most} ranges: ask for them in several requests")]
    TooMany {
        /// The limit.
        most: usize,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Start,
    FirstElementOrEnd,
    Element,
    FirstNameOrEnd,
    Name,
    InName,
    Colon,
    Value,
    InLiteral,
    /// A word where a list or a range should be.
    InOtherWord,
    InString,
    InStringEscape,
    AfterValue,
    AfterElement,
    Done,
}

/// A reader that is fed bytes and gathers ranges.
#[derive(Debug)]
pub struct RangesParser {
    state: State,
    at: u64,
    most: usize,
    name: Short<NAME_BYTES>,
    literal: Short<LITERAL_BYTES>,
    offset: Option<u64>,
    length: Option<u64>,
    ranges: Vec<ByteRange>,
}

/// The first bytes of something, and how long it was.
#[derive(Debug)]
struct Short<const N: usize> {
    bytes: [u8; N],
    length: usize,
}

impl<const N: usize> Short<N> {
    const fn new() -> Self {
        Self { bytes: [0; N], length: 0 }
    }

    fn push(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(self.length) {
            *place = byte;
        }
        self.length = self.length.saturating_add(1);
    }

    /// All of it; none where it was longer than what is kept.
    fn whole(&self) -> Option<&[u8]> {
        self.bytes.get(..self.length)
    }
}

impl RangesParser {
    /// A reader of at most `most` ranges.
    pub const fn new(most: usize) -> Self {
        Self {
            state: State::Start,
            at: 0,
            most,
            name: Short::new(),
            literal: Short::new(),
            offset: None,
            length: None,
            ranges: Vec::new(),
        }
    }

    /// Takes the next bytes of the text.
    ///
    /// # Errors
    /// [`JsonRangesError`]; the reader is of no use after that.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), JsonRangesError> {
        for byte in bytes {
            self.step(*byte)?;
            self.at += 1;
        }
        Ok(())
    }

    /// How many ranges were read so far.
    pub fn count(&self) -> usize {
        self.ranges.len()
    }

    /// The ranges, once all of the text was fed.
    ///
    /// # Errors
    /// [`JsonRangesError::Syntax`] where the text ends too early.
    pub fn finish(self) -> Result<Vec<ByteRange>, JsonRangesError> {
        match self.state {
            State::Done => Ok(self.ranges),
            State::InOtherWord => Err(self.wrong_literal("a list of ranges")),
            _ => Err(self.expected("more: the text ends before the list does")),
        }
    }

    const fn expected(&self, expected: &'static str) -> JsonRangesError {
        JsonRangesError::Syntax { at: self.at, expected }
    }

    const fn other_data(&self, expected: &'static str) -> JsonRangesError {
        JsonRangesError::Data { at: self.at, expected }
    }

    /// Another value than the one expected, or none at all.
    const fn other_value(&self, byte: u8, expected: &'static str) -> JsonRangesError {
        match byte {
            b'[' | b'{' | b'"' | b'-' | b'0'..=b'9' => self.other_data(expected),
            _ => self.expected(expected),
        }
    }

    fn step(&mut self, byte: u8) -> Result<(), JsonRangesError> {
        match self.state {
            State::InName => return self.in_name(byte),
            State::InString => return self.in_string(byte),
            State::InStringEscape => return self.in_escape(byte),
            State::InOtherWord if byte.is_ascii_alphanumeric() => {
                self.literal.push(byte);
                return Ok(());
            }
            State::InOtherWord => return Err(self.wrong_literal("a list of ranges")),
            State::InLiteral => {
                if byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.') {
                    self.literal.push(byte);
                    return Ok(());
                }
                self.end_literal()?;
            }
            _ => {}
        }
        if matches!(byte, b' ' | b'\t' | b'\n' | b'\r') {
            return Ok(());
        }
        self.structure(byte)
    }

    fn structure(&mut self, byte: u8) -> Result<(), JsonRangesError> {
        self.state = match (self.state, byte) {
            (State::Start, b'[') => State::FirstElementOrEnd,
            (State::Start | State::FirstElementOrEnd | State::Element, b'a'..=b'z') => {
                self.literal = Short::new();
                self.literal.push(byte);
                State::InOtherWord
            }
            (State::Start, byte) => return Err(self.other_value(byte, "[")),
            (State::FirstElementOrEnd | State::AfterElement, b']') => State::Done,
            (State::FirstElementOrEnd | State::Element, b'{') => self.begin_element()?,
            (State::FirstElementOrEnd | State::Element, byte) => {
                return Err(self.other_value(byte, "{"));
            }
            (State::FirstNameOrEnd | State::Name, b'"') => {
                self.name = Short::new();
                State::InName
            }
            (State::FirstNameOrEnd | State::AfterValue, b'}') => self.end_element()?,
            (State::FirstNameOrEnd | State::Name, _) => return Err(self.expected("a name")),
            (State::Colon, b':') => State::Value,
            (State::Colon, _) => return Err(self.expected(":")),
            (State::Value, b'"') if !self.is_ours() => State::InString,
            (State::Value, byte) if byte.is_ascii_alphanumeric() || byte == b'-' => {
                self.literal = Short::new();
                self.literal.push(byte);
                State::InLiteral
            }
            (State::Value, byte) => return Err(self.other_value(byte, "a number")),
            (State::AfterValue, b',') => State::Name,
            (State::AfterValue, _) => return Err(self.expected(", or }")),
            (State::AfterElement, b',') => State::Element,
            (State::AfterElement, _) => return Err(self.expected(", or ]")),
            (_, _) => return Err(self.expected("the end")),
        };
        Ok(())
    }

    fn begin_element(&mut self) -> Result<State, JsonRangesError> {
        if self.ranges.len() >= self.most {
            return Err(JsonRangesError::TooMany { most: self.most });
        }
        (self.offset, self.length) = (None, None);
        Ok(State::FirstNameOrEnd)
    }

    fn end_element(&mut self) -> Result<State, JsonRangesError> {
        match (self.offset, self.length) {
            (Some(offset), Some(length)) => self.ranges.push(ByteRange::new(offset, length)),
            (None, _) => return Err(self.other_data("offset")),
            (_, None) => return Err(self.other_data("length")),
        }
        Ok(State::AfterElement)
    }

    fn in_name(&mut self, byte: u8) -> Result<(), JsonRangesError> {
        match byte {
            b'"' => self.state = State::Colon,
            b'\\' | 0..=0x1f => return Err(self.expected("a name without escapes")),
            _ => self.name.push(byte),
        }
        Ok(())
    }

    fn in_string(&mut self, byte: u8) -> Result<(), JsonRangesError> {
        match byte {
            b'"' => self.state = State::AfterValue,
            b'\\' => self.state = State::InStringEscape,
            0..=0x1f => return Err(self.expected("a string without control characters")),
            _ => {}
        }
        Ok(())
    }

    fn in_escape(&mut self, byte: u8) -> Result<(), JsonRangesError> {
        match byte {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => self.state = State::InString,
            _ => return Err(self.expected("no such escape")),
        }
        Ok(())
    }

    fn is_ours(&self) -> bool {
        matches!(self.name.whole(), Some(b"offset" | b"length"))
    }

    /// What is wrong with a literal that is not the one expected: whether it is any of JSON.
    fn wrong_literal(&self, expected: &'static str) -> JsonRangesError {
        match is_json(self.literal.whole().unwrap_or_default())
            || self.literal.length > LITERAL_BYTES
        {
            true => self.other_data(expected),
            false => self.expected(expected),
        }
    }

    /// A number or literal is over: it is one of ours, or any other plain value of JSON.
    fn end_literal(&mut self) -> Result<(), JsonRangesError> {
        let literal = self.literal.whole().unwrap_or_default();
        if self.is_ours() {
            let value =
                unsigned(literal).ok_or_else(|| self.wrong_literal("a number from 0 to 2^64-1"))?;
            let place = match self.name.whole() {
                Some(b"offset") => &mut self.offset,
                _ => &mut self.length,
            };
            if place.replace(value).is_some() {
                return Err(self.other_data("each name once"));
            }
        } else if !is_json(literal) {
            return Err(self.expected("a value"));
        }
        self.state = State::AfterValue;
        Ok(())
    }
}

fn is_json(literal: &[u8]) -> bool {
    serde_json::from_slice::<serde::de::IgnoredAny>(literal).is_ok()
}

/// A decimal `u64` as JSON writes it: no sign, no leading zero, no fraction.
fn unsigned(literal: &[u8]) -> Option<u64> {
    if literal.is_empty() || (literal.len() > 1 && literal.first() == Some(&b'0')) {
        return None;
    }
    literal.iter().try_fold(0u64, |value, byte| match byte {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(byte - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde::Deserialize;

    /// What a plain serde reader takes; unknown members are passed over.
    #[derive(Deserialize)]
    struct Loose {
        offset: u64,
        length: u64,
    }

    fn parse(pieces: &[&[u8]]) -> Result<Vec<ByteRange>, JsonRangesError> {
        let mut parser = RangesParser::new(100);
        for piece in pieces {
            parser.feed(piece)?;
        }
        parser.finish()
    }

    #[test]
    fn lists_are_read() {
        for (text, count) in [
            ("[]", 0),
            (" [ ] \n", 0),
            (r#"[{"offset":0,"length":1}]"#, 1),
            (r#"[{"length":1,"offset":18446744073709551615},{"offset":2,"length":0}]"#, 2),
            (
                r#"[{"offset" : 7 , "length": 9, "x": "a\"}]", "longer than kept": -1.5e3, "z":null}]"#,
                1,
            ),
        ] {
            assert_eq!(parse(&[text.as_bytes()]).map(|ranges| ranges.len()), Ok(count), "{text}");
        }
    }

    #[test]
    fn what_is_no_json_and_what_is_other_json_are_told_apart() {
        for text in [
            "",
            "[",
            "]",
            "nul",
            "nothing",
            "[nope]",
            "[nul",
            "[{]",
            "[}",
            "[] []",
            "[],",
            "x",
            r#"[{"offset":1,"length":1},]"#,
            r#"[{"offset":1,"length":1,}]"#,
            r#"[{"offset":1 "length":1}]"#,
            r#"[{"offset":1,"length":1} {"offset":1,"length":1}]"#,
            r#"[{"offset":01,"length":1}]"#,
            r#"[{"offset":1,"length":1,"x":nul}]"#,
        ] {
            let refused = parse(&[text.as_bytes()]);
            let data = refused == Err(JsonRangesError::Data { at: 0, expected: "[" });
            assert!(data || matches!(refused, Err(JsonRangesError::Syntax { .. })), "{text}");
        }
        for text in [
            "{}",
            "null",
            "7",
            "[1]",
            "[{}]",
            "[null]",
            "[\"x\"]",
            r#"[{"offset":1}]"#,
            r#"[{"offset":-1,"length":1}]"#,
            r#"[{"offset":1.0,"length":1}]"#,
            r#"[{"offset":"1","length":1}]"#,
            r#"[{"offset":null,"length":1}]"#,
            r#"[{"offset":18446744073709551616,"length":1}]"#,
            r#"[{"offset":111111111111111111111111111111111111111111,"length":1}]"#,
            r#"[{"offset":1,"offset":1,"length":1}]"#,
            r#"[{"offset":1,"length":1,"x":{}}]"#,
            r#"[{"offset":1,"length":1,"x":[]}]"#,
        ] {
            assert!(
                matches!(parse(&[text.as_bytes()]), Err(JsonRangesError::Data { .. })),
                "{text}"
            );
        }
    }

    #[test]
    fn the_limit_holds_before_anything_is_kept() {
        let text = format!("[{}]", vec![r#"{"offset":1,"length":1}"#; 101].join(","));
        assert_eq!(parse(&[text.as_bytes()]), Err(JsonRangesError::TooMany { most: 100 }));
    }

    proptest! {
        #[test]
        fn pieces_cut_anywhere_read_like_the_whole(
            pairs in prop::collection::vec((any::<u64>(), any::<u64>()), 0..20),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let ranges: Vec<_> = pairs.iter().map(|(o, l)| ByteRange::new(*o, *l)).collect();
            let text = serde_json::to_vec(&ranges).unwrap();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
            prop_assert_eq!(parse(&pieces).unwrap(), ranges);
        }

        #[test]
        fn what_is_taken_means_what_serde_reads(
            text in r#"(\[|\{|\}|\]|,|:|"offset"|"length"|"a"|0|1|23|-|null| )(\[|\{|\}|\]|,|:|"offset":|"length":|"a"|0|1|23|null| ){0,12}"#,
        ) {
            if let Ok(ranges) = parse(&[text.as_bytes()]) {
                let loose: Vec<Loose> = serde_json::from_str(&text).unwrap();
                let loose: Vec<_> = loose.iter().map(|r| ByteRange::new(r.offset, r.length)).collect();
                prop_assert_eq!(ranges, loose);
            }
        }
    }
}
