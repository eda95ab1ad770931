//! A list of arguments as the one string that Windows hands to a program, by the rules by which programs take it
//! apart (`CommandLineToArgvW`): arguments with spaces in quotes, quotes behind a backslash, backslashes before
//! a quote doubled.
//!
//! A path of a program without quotes is the classic hole of services: of `C:\Program Files\x.exe` Windows
//! would try `C:\Program.exe` first. The program is in quotes always.

use std::iter::repeat_n;

const QUOTE: u16 = b'"' as u16;
const BACKSLASH: u16 = b'\\' as u16;
const SPACE: u16 = b' ' as u16;
const TAB: u16 = b'\t' as u16;
const PERCENT: u16 = b'%' as u16;

/// The command line of `program` with `arguments`, each in UTF-16 without a terminator. `None` where one of them
/// has a zero, or the program's path a quote: both cannot be said. Nor can two percent signs: the manager keeps the line as
/// text in which `%NAME%` means a variable of the environment, and there is no way to write the sign itself.
pub fn join(program: &[u16], arguments: &[Vec<u16>]) -> Option<Vec<u16>> {
    if program.contains(&0) || program.contains(&QUOTE) {
        return None;
    }
    // The program itself is taken apart by a simpler rule, without escapes.
    let mut line = [&[QUOTE], program, &[QUOTE]].concat();
    for argument in arguments {
        if argument.contains(&0) {
            return None;
        }
        line.push(SPACE);
        push_argument(&mut line, argument);
    }
    let percents = line.iter().filter(|unit| **unit == PERCENT).count();
    (percents < 2).then_some(line)
}

fn push_argument(line: &mut Vec<u16>, argument: &[u16]) {
    let plain =
        !argument.is_empty() && !argument.iter().any(|unit| matches!(*unit, QUOTE | SPACE | TAB));
    if plain {
        line.extend_from_slice(argument);
        return;
    }
    line.push(QUOTE);
    let mut backslashes = 0;
    for unit in argument {
        match *unit {
            BACKSLASH => backslashes += 1,
            QUOTE => {
                // Those before the quote are doubled, and one more makes the quote part of the argument.
                line.extend(repeat_n(BACKSLASH, backslashes + 1));
                backslashes = 0;
            }
            _ => backslashes = 0,
        }
        line.push(*unit);
    }
    // Before the closing quote they are doubled, too.
    line.extend(repeat_n(BACKSLASH, backslashes));
    line.push(QUOTE);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wide(text: &str) -> Vec<u16> {
        text.encode_utf16().collect()
    }

    fn joined(program: &str, arguments: &[&str]) -> Option<String> {
        let arguments: Vec<_> = arguments.iter().map(|argument| wide(argument)).collect();
        join(&wide(program), &arguments).map(|line| String::from_utf16(&line).unwrap())
    }

    /// The rules of `CommandLineToArgvW`, as they are documented.
    fn split(line: &str) -> Vec<String> {
        let mut rest: Vec<char> = line.chars().collect();
        let end = 1 + rest[1..].iter().position(|c| *c == '"').unwrap();
        let mut out = vec![rest[1..end].iter().collect::<String>()];
        rest.drain(..=end);
        let (mut word, mut quoted, mut open, mut slashes) = (String::new(), false, false, 0);
        for c in rest {
            match c {
                '\\' => {
                    slashes += 1;
                    continue;
                }
                '"' => {
                    word.extend(repeat_n('\\', slashes / 2));
                    open = true;
                    if slashes % 2 == 0 {
                        quoted = !quoted;
                    } else {
                        word.push('"');
                    }
                }
                ' ' | '\t' if !quoted => {
                    word.extend(repeat_n('\\', slashes));
                    if open || !word.is_empty() {
                        out.push(std::mem::take(&mut word));
                    }
                    open = false;
                }
                c => {
                    word.extend(repeat_n('\\', slashes));
                    word.push(c);
                }
            }
            slashes = 0;
        }
        word.extend(repeat_n('\\', slashes));
        if open || !word.is_empty() {
            out.push(word);
        }
        out
    }

    #[test]
    fn what_would_be_a_variable_is_not_said() {
        assert!(joined(r"C:\v.exe", &["50%"]).is_some());
        assert!(joined(r"C:\v.exe", &["--root", r"D:\%TEMP%"]).is_none());
        assert!(joined(r"C:\100%\v.exe", &["--root", r"D:\100%"]).is_none());
    }

    #[test]
    fn every_argument_arrives_as_it_was() {
        let hard = [
            "plain",
            "two words",
            "",
            r#"a"b"#,
            r"C:\VHDs\",
            r"C:\Program Files\",
            r#"\""#,
            r#"\\"x\\"#,
            "tab\there",
            r"\\server\share\",
            r#"a\\\"b c"#,
            "\"",
            r"\",
            "ü €",
        ];
        let line = joined(r"C:\Program Files\vmtide\vmtide.exe", &hard).unwrap();
        let expected: Vec<String> = ["C:\\Program Files\\vmtide\\vmtide.exe"]
            .iter()
            .chain(&hard)
            .map(|s| (*s).to_owned())
            .collect();
        assert_eq!(split(&line), expected, "{line}");
    }

    #[test]
    fn the_program_is_always_in_quotes() {
        assert_eq!(joined(r"C:\v.exe", &["agent"]).as_deref(), Some(r#""C:\v.exe" agent"#));
    }

    #[test]
    fn what_cannot_be_said_is_refused() {
        assert_eq!(joined("C:\\a\"b.exe", &[]), None);
        assert_eq!(joined("C:\\a.exe", &["a\0b"]), None);
        assert_eq!(joined("C:\\a\0.exe", &[]), None);
    }
}
