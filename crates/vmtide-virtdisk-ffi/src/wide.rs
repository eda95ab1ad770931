//! Strings as Windows takes and gives them: UTF-16 with a zero at the end, and paths without their prefixes.

/// The longest path that functions without support of long paths take, with its terminator (`MAX_PATH`).
const MAX_PATH_UNITS: usize = 260;

const VERBATIM: [u16; 4] = [b'\\' as u16, b'\\' as u16, b'?' as u16, b'\\' as u16];
const UNC: [u16; 4] = [b'U' as u16, b'N' as u16, b'C' as u16, b'\\' as u16];
const SHARE: [u16; 2] = [b'\\' as u16, b'\\' as u16];

/// With a terminator. `None` where the string has a zero inside: Windows would see another, shorter one.
pub fn terminated(units: impl IntoIterator<Item = u16>) -> Option<Vec<u16>> {
    let mut out: Vec<u16> = units.into_iter().collect();
    if out.contains(&0) {
        return None;
    }
    out.push(0);
    Some(out)
}

/// The string that begins `units` and ends before its first zero; `None` where there is no zero, i.e. where
/// the string may have been cut. What is no UTF-16 is replaced.
pub fn until_zero(units: &[u16]) -> Option<String> {
    let end = units.iter().position(|unit| *unit == 0)?;
    Some(String::from_utf16_lossy(units.get(..end)?))
}

/// The strings of a list that ends with an empty one, or with the buffer: at most `limit` of them.
pub fn string_list(units: &[u16], limit: usize) -> Vec<String> {
    units
        .split(|unit| *unit == 0)
        .take_while(|part| !part.is_empty())
        .take(limit)
        .map(String::from_utf16_lossy)
        .collect()
}

/// The path as the interface takes it: [plain](plain_path), and with the prefix `\\?\` where it is too long for that.
/// A plain one of more than `MAX_PATH` is "not found", whatever is there.
pub fn path_for_calls(units: &[u16]) -> Vec<u16> {
    let plain = plain_path(units);
    let is_verbatim = plain.starts_with(&VERBATIM);
    if plain.len() < MAX_PATH_UNITS || is_verbatim {
        return plain;
    }
    match plain.strip_prefix(&SHARE) {
        Some(share) => [&VERBATIM[..], &UNC, share].concat(),
        None => [&VERBATIM[..], &plain].concat(),
    }
}

/// The path without the prefix `\\?\` that resolving a path puts there: virtdisk.dll is documented with plain
/// paths only. Kept where the rest would be too long for a plain path, or is no drive or share.
pub fn plain_path(units: &[u16]) -> Vec<u16> {
    let Some(rest) = units.strip_prefix(&VERBATIM) else {
        return units.to_vec();
    };
    let plain = match rest.strip_prefix(&UNC) {
        Some(share) => [&SHARE, share].concat(),
        None if matches!(rest, [_, colon, ..] if *colon == u16::from(b':')) => rest.to_vec(),
        None => return units.to_vec(),
    };
    if plain.len() < MAX_PATH_UNITS { plain } else { units.to_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wide(text: &str) -> Vec<u16> {
        text.encode_utf16().collect()
    }

    #[test]
    fn long_paths_get_the_prefix_that_they_need() {
        let long = format!(r"C:\{}\a.vhdx", "x".repeat(300));
        let share = format!(r"\\srv\vms\{}\a.vhdx", "x".repeat(300));
        for (path, expected) in [
            (r"C:\a.vhdx".to_owned(), r"C:\a.vhdx".to_owned()),
            (r"\\?\C:\a.vhdx".to_owned(), r"C:\a.vhdx".to_owned()),
            (long.clone(), format!(r"\\?\{long}")),
            (format!(r"\\?\{long}"), format!(r"\\?\{long}")),
            (share.clone(), format!(r"\\?\UNC{}", &share[1..])),
        ] {
            assert_eq!(path_for_calls(&wide(&path)), wide(&expected), "{path}");
        }
    }

    #[test]
    fn strings_end_at_their_zero() {
        assert_eq!(until_zero(&wide("rctX:1\0rest")), Some("rctX:1".into()));
        assert_eq!(until_zero(&wide("\0")), Some(String::new()));
        assert_eq!(until_zero(&wide("cut")), None);
        assert_eq!(until_zero(&[]), None);
        assert_eq!(terminated(wide("ab")), Some(wide("ab\0")));
        assert_eq!(terminated(wide("a\0b")), None);
    }

    #[test]
    fn lists_end_at_an_empty_string() {
        let list = wide("C:\\a.vhdx\0\\\\srv\\b.vhdx\0\0garbage\0");
        assert_eq!(string_list(&list, 8), ["C:\\a.vhdx", "\\\\srv\\b.vhdx"]);
        assert_eq!(string_list(&list, 1), ["C:\\a.vhdx"]);
        assert_eq!(string_list(&wide("one without end"), 8), ["one without end"]);
        assert!(string_list(&[], 8).is_empty());
    }

    #[test]
    fn prefixes_go_where_the_path_means_the_same_without() {
        for (given, expected) in [
            (r"\\?\C:\VHDs\a.vhdx", r"C:\VHDs\a.vhdx"),
            (r"\\?\UNC\server\share\a.vhdx", r"\\server\share\a.vhdx"),
            (r"C:\VHDs\a.vhdx", r"C:\VHDs\a.vhdx"),
            (r"\\server\share\a.vhdx", r"\\server\share\a.vhdx"),
            (r"\\?\Volume{1}\a.vhdx", r"\\?\Volume{1}\a.vhdx"),
        ] {
            assert_eq!(plain_path(&wide(given)), wide(expected), "{given}");
        }
        let long = format!(r"\\?\C:\{}\a.vhdx", "d".repeat(MAX_PATH_UNITS));
        assert_eq!(plain_path(&wide(&long)), wide(&long));
    }
}
