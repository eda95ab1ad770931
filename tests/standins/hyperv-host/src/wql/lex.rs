//! The words of a query.

/// A word of a query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// A keyword or name.
    Word(String),
    /// A literal in quotes, without them.
    Text(String),
    /// A number.
    Number(i64),
    /// What stands in braces.
    Braces(String),
    /// Anything else.
    Symbol(&'static str),
}

/// The symbols, the longer first.
const SYMBOLS: [&str; 11] = ["<>", "!=", "<=", ">=", "=", "<", ">", "(", ")", ",", "*"];

/// Splits a query into words.
pub(super) fn tokens(wql: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut rest = wql.trim_start();
    while let Some(first) = rest.chars().next() {
        let length = if first == '\'' || first == '"' {
            let (text, length) = literal(rest, first)?;
            tokens.push(Token::Text(text));
            length
        } else if first == '{' {
            let length = closing_brace(rest).ok_or("a brace is not closed")?;
            tokens.push(Token::Braces(rest[1..length - 1].to_owned()));
            length
        } else if first.is_ascii_digit() || first == '-' {
            let length = 1 + rest[1..].bytes().take_while(u8::is_ascii_digit).count();
            let number = rest[..length].parse().map_err(|_| "a number is not one")?;
            tokens.push(Token::Number(number));
            length
        } else if first.is_ascii_alphabetic() || first == '_' {
            let length =
                rest.bytes().take_while(|b| b.is_ascii_alphanumeric() || *b == b'_').count();
            tokens.push(Token::Word(rest[..length].to_owned()));
            length
        } else {
            let symbol = SYMBOLS.iter().find(|symbol| rest.starts_with(**symbol));
            let symbol = symbol.ok_or_else(|| format!("{first:?} is not understood"))?;
            tokens.push(Token::Symbol(symbol));
            symbol.len()
        };
        rest = rest[length..].trim_start();
    }
    Ok(tokens)
}

/// A literal and its length with the quotes; a backslash makes the next character stand for itself.
fn literal(rest: &str, quote: char) -> Result<(String, usize), String> {
    let mut text = String::new();
    let mut characters = rest.char_indices().skip(1);
    while let Some((at, c)) = characters.next() {
        if c == quote {
            return Ok((text, at + 1));
        }
        if c == '\\' {
            let (_, escaped) = characters.next().ok_or("a literal ends in a backslash")?;
            if !matches!(escaped, '\\' | '\'' | '"') {
                return Err(format!("the backslash before {escaped:?} is not doubled"));
            }
            text.push(escaped);
        } else {
            text.push(c);
        }
    }
    Err("a literal is not closed".into())
}

/// The length up to and with the brace that closes the first; braces in quotes do not count.
fn closing_brace(rest: &str) -> Option<usize> {
    let mut quoted = false;
    let mut escaped = false;
    for (at, c) in rest.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            '}' if !quoted => return Some(at + 1),
            _ => {}
        }
    }
    None
}
