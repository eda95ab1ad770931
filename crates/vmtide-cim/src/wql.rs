//! Values within WQL queries.

use std::fmt::Write;

/// A string literal of WQL with its quotes: backslashes and quotes are escaped by a backslash, as in
/// `InstanceID='Microsoft:ABC\\DEF'`.
pub fn quote(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('\'');
    for c in text.chars() {
        if matches!(c, '\\' | '\'' | '"') {
            quoted.push('\\');
        }
        quoted.push(c);
    }
    quoted.push('\'');
    quoted
}

/// The literal of a `LIKE` pattern for everything that begins with `prefix`: what LIKE reads as a wildcard
/// (`%`, `_`, `[`) stands for itself.
pub fn quote_prefix(prefix: &str) -> String {
    let mut pattern = String::with_capacity(prefix.len() + 8);
    for c in prefix.chars() {
        match c {
            '%' | '_' | '[' => {
                // Writing to a string does not fail.
                let _ = write!(pattern, "[{c}]");
            }
            c => pattern.push(c),
        }
    }
    pattern.push('%');
    quote(&pattern)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_and_backslashes_cannot_end_a_literal() {
        assert_eq!(quote(r"Microsoft:A\B"), r"'Microsoft:A\\B'");
        assert_eq!(quote("o'x\"y"), r#"'o\'x\"y'"#);
        assert_eq!(quote_prefix("a_b%[c"), "'a[_]b[%][[]c%'");
    }
}
