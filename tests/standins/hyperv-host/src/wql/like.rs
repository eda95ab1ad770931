//! Patterns of `LIKE`: `%` any text, `_` one character, `[abc]`, `[a-c]` and `[^a]` one of a set.

/// Whether the whole of `text` fits the pattern, without regard to case.
pub(super) fn matches(pattern: &str, text: &str) -> bool {
    let pattern: Vec<char> = pattern.to_lowercase().chars().collect();
    let text: Vec<char> = text.to_lowercase().chars().collect();
    fits(&pattern, &text)
}

fn fits(pattern: &[char], text: &[char]) -> bool {
    let Some((&first, rest)) = pattern.split_first() else { return text.is_empty() };
    match first {
        '%' => (0..=text.len()).any(|skip| fits(rest, &text[skip..])),
        '_' => !text.is_empty() && fits(rest, &text[1..]),
        '[' => {
            // A bracket that closes at once is a member of the set: `[[]`, `[]]`.
            let Some(end) = rest.iter().skip(1).position(|c| *c == ']') else { return false };
            let (set, after) = (&rest[..=end], &rest[end + 2..]);
            let Some((&c, text)) = text.split_first() else { return false };
            in_set(set, c) && fits(after, text)
        }
        c => text.first() == Some(&c) && fits(rest, &text[1..]),
    }
}

fn in_set(set: &[char], c: char) -> bool {
    let (negated, set) = match set.split_first() {
        Some(('^', rest)) if !rest.is_empty() => (true, rest),
        _ => (false, set),
    };
    let mut found = false;
    let mut at = 0;
    while at < set.len() {
        if at + 2 < set.len() && set[at + 1] == '-' {
            found |= (set[at]..=set[at + 2]).contains(&c);
            at += 3;
        } else {
            found |= set[at] == c;
            at += 1;
        }
    }
    found != negated
}
