//! The text that describes a volume group: sections in braces, and values of numbers, strings and lists of them.

use std::collections::BTreeMap;

/// The deepest sections: a segment is in a volume, in the volumes, in the group.
const MAX_DEPTH: u32 = 8;

/// What stands behind a name.
#[derive(Debug)]
enum Value {
    Number(u64),
    Text(String),
    List(Vec<Self>),
    Section(Section),
}

/// A section, or the whole text.
#[derive(Debug, Default)]
pub(super) struct Section(BTreeMap<String, Value>);

impl Section {
    pub(super) fn sections(&self) -> impl Iterator<Item = (&str, &Self)> {
        self.0.iter().filter_map(|(name, value)| match value {
            Value::Section(section) => Some((name.as_str(), section)),
            _ => None,
        })
    }

    pub(super) fn section(&self, name: &str) -> Option<&Self> {
        self.sections().find(|(other, _)| *other == name).map(|(_, section)| section)
    }

    pub(super) fn number(&self, name: &str) -> Option<u64> {
        match self.0.get(name)? {
            Value::Number(number) => Some(*number),
            _ => None,
        }
    }

    pub(super) fn text(&self, name: &str) -> Option<&str> {
        match self.0.get(name)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Whether a list has a string.
    pub(super) fn lists(&self, name: &str, wanted: &str) -> bool {
        let is_wanted = |value: &Value| matches!(value, Value::Text(text) if text == wanted);
        matches!(self.0.get(name), Some(Value::List(list)) if list.iter().any(is_wanted))
    }

    /// The physical volume and its extent that a segment of one stripe begins with.
    pub(super) fn stripe(&self) -> Option<(&str, u64)> {
        match self.0.get("stripes")? {
            Value::List(list) => match &list[..] {
                [Value::Text(disk), Value::Number(extent)] => Some((disk, *extent)),
                _ => None,
            },
            _ => None,
        }
    }
}

/// Reads a text; none where it makes no sense.
pub(super) fn parse(text: &str) -> Option<Section> {
    // It ends with a zero.
    let mut rest = text.trim_end_matches('\0');
    let section = section(&mut rest, 0)?;
    rest.is_empty().then_some(section)
}

/// Passes over what is between words, comments included.
fn skip(rest: &mut &str) {
    loop {
        *rest = rest.trim_start();
        if !rest.starts_with('#') {
            return;
        }
        *rest = rest.split_once('\n').map_or("", |(_, after)| after);
    }
}

/// Passes over `wanted` where it is next.
fn take(rest: &mut &str, wanted: char) -> bool {
    skip(rest);
    let after = rest.strip_prefix(wanted);
    *rest = after.unwrap_or(rest);
    after.is_some()
}

fn section(rest: &mut &str, depth: u32) -> Option<Section> {
    let mut values = BTreeMap::new();
    loop {
        skip(rest);
        if rest.is_empty() || rest.starts_with('}') {
            return Some(Section(values));
        }
        let is_name = |c: char| c.is_ascii_alphanumeric() || "_.+-/".contains(c);
        let (name, after) = rest.split_at(rest.find(|c| !is_name(c))?);
        *rest = after;
        let value = if take(rest, '=') {
            value(rest, depth)?
        } else if take(rest, '{') && depth < MAX_DEPTH {
            let inner = section(rest, depth + 1)?;
            take(rest, '}').then_some(Value::Section(inner))?
        } else {
            return None;
        };
        values.insert(Some(name).filter(|name| !name.is_empty())?.to_owned(), value);
    }
}

fn value(rest: &mut &str, depth: u32) -> Option<Value> {
    if take(rest, '"') {
        return quoted(rest).map(Value::Text);
    }
    if take(rest, '[') {
        let mut list = Vec::new();
        while !take(rest, ']') {
            list.push(
                Some(depth)
                    .filter(|depth| *depth < MAX_DEPTH)
                    .and_then(|depth| value(rest, depth + 1))?,
            );
            take(rest, ',');
        }
        return Some(Value::List(list));
    }
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let (number, after) = rest.split_at(end);
    *rest = after;
    number.parse().ok().map(Value::Number)
}

/// A string after its first quote; `\` makes the next character one of it.
fn quoted(rest: &mut &str) -> Option<String> {
    let mut text = String::new();
    let mut characters = rest.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => {
                *rest = &rest[at + 1..];
                return Some(text);
            }
            '\\' => text.push(characters.next()?.1),
            other => text.push(other),
        }
    }
    None
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::parse;

    #[test]
    fn sections_values_and_comments() {
        let text = "vg {\n  id = \"a\\\"b-c\"  # why\n n = 8192\n flags = []\n s = [\"READ\", \"VISIBLE\"]\n lv-1 { segment1 {\n\
                    stripes = [\n\"pv0\", 7\n]\n}\n}\n}\n# end\nversion = 1\n\0";
        let root = parse(text).unwrap();
        let group = root.section("vg").unwrap();
        assert_eq!((group.text("id"), group.number("n")), (Some("a\"b-c"), Some(8192)));
        assert!(group.lists("s", "VISIBLE") && !group.lists("flags", "VISIBLE"));
        let segment = group.section("lv-1").unwrap().section("segment1").unwrap();
        assert_eq!((segment.stripe(), root.number("version")), (Some(("pv0", 7)), Some(1)));
    }

    #[test]
    fn what_makes_no_sense_is_none() {
        let deep = format!("{}{}", "a {".repeat(20_000), "}".repeat(20_000));
        let list = format!("a = {}", "[".repeat(20_000));
        for text in
            ["a", "a {", "a = \"b", "a = [1", "= 1", "a = 99999999999999999999", "}", &deep, &list]
        {
            assert!(parse(text).is_none(), "{:?}", &text[..text.len().min(20)]);
        }
    }
}
