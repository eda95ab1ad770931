//! Names of files as Windows has them, checked as text: the same on every platform, so that it can be tested on
//! every platform.
//!
//! Windows has many ways to write one file: namespaces (`\\?\`, `\\.\`), current directories of drives (`C:a`),
//! names of devices that shadow files in every directory (`NUL.vhdx`), streams (`a.vhdx:b`), trailing dots and
//! spaces that do not count, short names (`PROGRA~1`). Only one way is taken here: a drive with an absolute path,
//! or a share, in plain names. Sources: "Naming Files, Paths, and Namespaces" and "File path formats on Windows
//! systems" (learn.microsoft.com).

/// The longest path in UTF-16 units; the kernel's own limit.
const MAX_PATH_UNITS: usize = 32_767;
/// The longest name of a file in UTF-16 units, NTFS' and ReFS' limit.
const MAX_NAME_UNITS: usize = 255;

/// Names that mean a device in every directory, whatever extension follows.
const DEVICES: [&str; 11] =
    ["CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", "CLOCK$", "COM", "LPT", "$MFT", "$VOLUME"];

/// Checks the text that a client sent as a path, and answers with its plain form: backslashes, one between names.
/// HTTP libraries put a slash before a drive; it is taken away.
///
/// # Errors
/// Why it is no path that is served.
pub fn check(requested: &str) -> Result<String, &'static str> {
    if requested.encode_utf16().count() > MAX_PATH_UNITS {
        return Err("is longer than a path can be");
    }
    let path = requested.replace('/', "\\");
    if path.ends_with('\\') {
        return Err("ends with a slash: it names no file");
    }
    let (prefix, names) = split(&path)?;
    let mut plain = prefix;
    let mut count = 0;
    for name in names.split('\\').filter(|name| !name.is_empty()) {
        check_name(name)?;
        plain.push('\\');
        plain.push_str(name);
        count += 1;
    }
    if count == 0 {
        return Err("names no file");
    }
    Ok(plain)
}

/// The drive or share, and what follows it.
fn split(path: &str) -> Result<(String, &str), &'static str> {
    let after_slash = path.strip_prefix('\\').unwrap_or(path);
    for start in [path, after_slash] {
        let mut characters = start.chars();
        if let (Some(drive), Some(':')) = (characters.next(), characters.next())
            && drive.is_ascii_alphabetic()
        {
            let names = characters.as_str();
            if !names.starts_with('\\') {
                return Err("is relative to the current directory of a drive");
            }
            return Ok((format!("{}:", drive.to_ascii_uppercase()), names));
        }
    }
    let Some(share) = path.strip_prefix("\\\\") else {
        return Err("has no drive");
    };
    let mut parts = share.splitn(3, '\\');
    let (Some(server), Some(name), Some(names)) = (parts.next(), parts.next(), parts.next()) else {
        return Err("names a share and no file on it");
    };
    if matches!(server, "" | "." | "?" | "??") {
        return Err("is in the namespace of devices");
    }
    check_name(server)?;
    check_name(name)?;
    Ok((format!("\\\\{server}\\{name}"), names))
}

/// Succeeds for the plain name of a file or directory.
fn check_name(name: &str) -> Result<(), &'static str> {
    if name.encode_utf16().count() > MAX_NAME_UNITS {
        return Err("has a name that is too long");
    }
    if name == "." || name == ".." {
        return Err("has a part . or ..");
    }
    if name.chars().any(|c| c.is_control() || "<>:\"|?*".contains(c)) {
        return Err("has a character that names cannot have; a colon would name a stream");
    }
    if name.ends_with(['.', ' ']) || name.starts_with(' ') {
        return Err("has a name that ends with a dot or space, or begins with a space");
    }
    if is_device(name) {
        return Err("has the name of a device");
    }
    if is_short(name) {
        return Err("has what looks like a short name (8.3): write the long one");
    }
    Ok(())
}

/// Whether a name means a device: one of [`DEVICES`], `COM` and `LPT` with a digit, with any extension.
fn is_device(name: &str) -> bool {
    let base = name.split('.').next().unwrap_or_default().trim_end_matches(' ').to_uppercase();
    if DEVICES.contains(&base.as_str()) {
        // COM and LPT alone are names like others; NTFS' own files are no devices, but nobody's disks either.
        return !matches!(base.as_str(), "COM" | "LPT");
    }
    let mut characters = base.chars();
    let last = characters.next_back();
    matches!(characters.as_str(), "COM" | "LPT")
        && last.is_some_and(|digit| digit.is_ascii_digit() || "¹²³".contains(digit))
}

/// Whether a name could be one that Windows made for programs that know only eight letters and three.
fn is_short(name: &str) -> bool {
    let (base, extension) = name.split_once('.').unwrap_or((name, ""));
    let Some((_, number)) = base.rsplit_once('~') else {
        return false;
    };
    base.chars().count() <= 8
        && extension.chars().count() <= 3
        && !extension.contains('.')
        && !number.is_empty()
        && number.bytes().all(|digit| digit.is_ascii_digit())
}

/// Whether two names mean the same file in a directory that does not tell cases apart.
pub fn is_same_name(one: &str, other: &str) -> bool {
    fn folded(name: &str) -> impl Iterator<Item = char> {
        // One character for one, as the tables of NTFS do: no ß that becomes SS.
        name.chars().map(|c| {
            let mut upper = c.to_uppercase();
            match (upper.next(), upper.next()) {
                (Some(upper), None) => upper,
                _ => c,
            }
        })
    }
    folded(one).eq(folded(other))
}

/// A path as Windows' own calls answer it, without the prefix that switches off the reading of names.
pub fn without_verbatim(path: &str) -> String {
    match path.strip_prefix("\\\\?\\") {
        Some(rest) => match rest.strip_prefix("UNC\\") {
            Some(share) => format!("\\\\{share}"),
            None => rest.to_owned(),
        },
        None => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_plain_form_comes_of_every_harmless_one() {
        for (text, path) in [
            ("C:\\VHDS\\a.vhdx", "C:\\VHDS\\a.vhdx"),
            ("c:/VHDS/a.vhdx", "C:\\VHDS\\a.vhdx"),
            ("/C:/VHDS/a.vhdx", "C:\\VHDS\\a.vhdx"),
            ("C:\\\\VHDS\\\\a.vhdx", "C:\\VHDS\\a.vhdx"),
            (
                "D:\\Hyper-V\\Virtual Hard Disks\\web 1.avhdx",
                "D:\\Hyper-V\\Virtual Hard Disks\\web 1.avhdx",
            ),
            ("C:\\ClusterStorage\\Volume1\\a.vhdx", "C:\\ClusterStorage\\Volume1\\a.vhdx"),
            ("C:\\a\\disk~1.vhdx", "C:\\a\\disk~1.vhdx"),
            ("C:\\a\\console.vhdx", "C:\\a\\console.vhdx"),
            ("C:\\a\\COM.vhdx", "C:\\a\\COM.vhdx"),
            ("C:\\a\\..b\\c..d.vhdx", "C:\\a\\..b\\c..d.vhdx"),
            ("C:\\a\\Überwachung-Platte.vhdx", "C:\\a\\Überwachung-Platte.vhdx"),
            ("\\\\server\\share\\vm\\a.vhdx", "\\\\server\\share\\vm\\a.vhdx"),
            ("//server/share/a.vhdx", "\\\\server\\share\\a.vhdx"),
        ] {
            assert_eq!(check(text).as_deref(), Ok(path), "{text}");
        }
    }

    /// What a hostile client could write.
    const ATTEMPTS: &[&str] = &[
        "",
        "C:",
        "C:\\",
        "\\",
        "a.vhdx",
        "a\\b.vhdx",
        "\\a\\b.vhdx",
        "..\\a.vhdx",
        ".\\a.vhdx",
        "C:a.vhdx",
        "C:..\\a.vhdx",
        "C:.\\a.vhdx",
        "1:\\a.vhdx",
        "é:\\a.vhdx",
        "CC:\\a.vhdx",
        "C:\\VHDS\\..\\Windows\\a",
        "C:\\VHDS\\.\\a",
        "C:/VHDS/../a",
        "C:\\VHDS\\..",
        "C:\\VHDS\\a\\",
        "C:\\VHDS\\.. \\a",
        "C:\\VHDS\\...\\a",
        "C:\\VHDS\\ ..\\a",
        "C:\\VHDS\\..\0\\a",
        "\\\\?\\C:\\VHDS\\a.vhdx",
        "\\\\.\\C:\\VHDS\\a.vhdx",
        "\\\\.\\PhysicalDrive0",
        "\\\\?\\PhysicalDrive0",
        "\\\\.\\HarddiskVolume1\\a",
        "//./PhysicalDrive0",
        "//?/C:/a",
        "\\\\?\\GLOBALROOT\\Device\\Harddisk0\\DR0",
        "\\\\?\\UNC\\server\\share\\a",
        "\\??\\C:\\a",
        "\\Device\\Harddisk0\\DR0",
        "\\\\?\\Volume{b75e2c83-0000-0000-0000-602f00000000}\\a",
        "\\\\",
        "\\\\server",
        "\\\\server\\share",
        "\\\\server\\share\\",
        "\\\\\\share\\a",
        "\\\\server\\..\\a",
        "\\\\..\\share\\a",
        "\\\\server\\share\\..\\a",
        "C:\\VHDS\\NUL",
        "C:\\VHDS\\nul.vhdx",
        "C:\\VHDS\\CON",
        "C:\\VHDS\\con .txt",
        "C:\\VHDS\\PRN.x.y",
        "C:\\VHDS\\AUX",
        "C:\\VHDS\\COM1",
        "C:\\VHDS\\com9.vhdx",
        "C:\\VHDS\\LPT0",
        "C:\\VHDS\\COM¹",
        "C:\\VHDS\\LPT².vhdx",
        "C:\\VHDS\\CONIN$",
        "C:\\VHDS\\conout$.x",
        "C:\\VHDS\\CLOCK$",
        "C:\\NUL\\a.vhdx",
        "C:\\$MFT",
        "NUL",
        "CON:",
        "COM1:",
        "C:\\VHDS\\$Volume",
        "C:\\VHDS\\a.vhdx:stream",
        "C:\\VHDS\\a.vhdx::$DATA",
        "C:\\VHDS:x\\a",
        "C:\\VHDS::$INDEX_ALLOCATION\\a",
        "C:\\VHDS\\a.vhdx.",
        "C:\\VHDS\\a.vhdx ",
        "C:\\VHDS\\a.vhdx...",
        "C:\\VHDS.\\a",
        "C:\\VHDS \\a",
        "C:\\VHDS\\ a.vhdx",
        "C:\\VHDS~1\\a.vhdx",
        "C:\\VHDS\\MYDISK~1.VHD",
        "C:\\PROGRA~1\\a.vhdx",
        "C:\\VHDS\\A~12345",
        "C:\\VHDS\\a*.vhdx",
        "C:\\VHDS\\a?.vhdx",
        "C:\\VHDS\\<a",
        "C:\\VHDS\\a|b",
        "C:\\VHDS\\\"a\"",
        "C:\\VHDS\\a\0.vhdx",
        "C:\\VHDS\\a\n",
        "C:\\VHDS\\a\u{1f}",
        "C:\\VHDS\\a\u{7f}",
        "file:///C:/VHDS/a.vhdx",
        "%SystemRoot%\\a",
        "/VHDS/a.vhdx",
        "/srv/a.vhdx",
        "C|\\a",
        "C:\u{ff3c}a",
    ];

    #[test]
    fn every_other_way_to_write_a_file_is_refused() {
        assert!(ATTEMPTS.len() >= 60, "{}", ATTEMPTS.len());
        for attempt in ATTEMPTS {
            let found = check(attempt);
            assert!(found.is_err(), "{attempt:?} is taken as {found:?}");
        }
        assert!(check(&format!("C:\\{}", "a".repeat(256))).is_err());
        assert!(check(&format!("C:{}", "\\a".repeat(20_000))).is_err());
    }

    #[test]
    fn case_does_not_count_and_verbatim_paths_are_made_plain() {
        assert!(is_same_name("VHDS", "vhds") && is_same_name("Ä", "ä"));
        assert!(!is_same_name("VHDS", "VHDS2") && !is_same_name("ß", "ss"));
        assert_eq!(without_verbatim("\\\\?\\C:\\a"), "C:\\a");
        assert_eq!(without_verbatim("\\\\?\\UNC\\server\\share\\a"), "\\\\server\\share\\a");
        assert_eq!(without_verbatim("C:\\a"), "C:\\a");
    }
}
