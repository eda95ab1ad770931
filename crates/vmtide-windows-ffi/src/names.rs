//! Names of files.

use std::io::{Error, ErrorKind, Result};
use std::os::windows::ffi::OsStrExt;
use std::path::Path;
use windows_sys::Win32::Storage::FileSystem::{MOVEFILE_WRITE_THROUGH, MoveFileExW};

/// From this length on, in UTF-16 units with the final zero, a path needs the prefix `\\?\`: MAX_PATH is
/// 260, of which a directory leaves 12 for a name (Windows documentation, "Maximum Path Length
/// Limitation").
const LONG_PATH: usize = 248;

const SEPARATOR: u16 = b'\\' as u16;

/// Gives the file `from` the name `to` on the same volume, in one step, and only where `to` is not
/// taken. The new name is on the medium when this returns, as far as the file system does that
/// (`MOVEFILE_WRITE_THROUGH`).
///
/// # Errors
/// `AlreadyExists` where `to` is taken: nothing is changed then. What the file system says.
pub fn move_new(from: &Path, to: &Path) -> Result<()> {
    let (from, to) = (wide(from)?, wide(to)?);
    // SAFETY: both are pointers to memory that lives through the call and ends in a zero, the first one
    // in it.
    super::check(unsafe { MoveFileExW(from.as_ptr(), to.as_ptr(), MOVEFILE_WRITE_THROUGH) })
}

/// A path as functions of Windows take it: UTF-16 with a zero at the end; long ones by their absolute
/// form with the prefix that lifts the limit.
pub(crate) fn wide(path: &Path) -> Result<Vec<u16>> {
    let mut text: Vec<u16> = path.as_os_str().encode_wide().collect();
    if text.contains(&0) {
        return Err(Error::new(ErrorKind::InvalidInput, "a path with a zero in it"));
    }
    if text.len() + 1 >= LONG_PATH {
        text = verbatim(std::path::absolute(path)?.as_os_str().encode_wide().collect());
    }
    text.push(0);
    Ok(text)
}

/// Puts `\\?\` before an absolute path that has no such prefix: `\\?\C:\…`, `\\?\UNC\server\…`.
fn verbatim(path: Vec<u16>) -> Vec<u16> {
    let units = |text: &str| text.encode_utf16().collect::<Vec<u16>>();
    let (prefix, rest) = match path.as_slice() {
        [SEPARATOR, SEPARATOR, c, SEPARATOR, ..]
            if [u16::from(b'?'), u16::from(b'.')].contains(c) =>
        {
            return path;
        }
        [SEPARATOR, SEPARATOR, rest @ ..] => (units(r"\\?\UNC\"), rest),
        rest => (units(r"\\?\"), rest),
    };
    [prefix.as_slice(), rest].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_taken_stays() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        std::fs::write(&from, "new").unwrap();
        std::fs::write(&to, "old").unwrap();
        assert_eq!(move_new(&from, &to).unwrap_err().kind(), ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "old");
        std::fs::remove_file(&to).unwrap();
        move_new(&from, &to).unwrap();
        assert!(!from.exists() && std::fs::read_to_string(&to).unwrap() == "new");
    }

    #[test]
    fn long_paths_get_their_prefix_once() {
        let long = "x".repeat(300);
        for (path, prefix) in [
            (format!(r"C:\{long}"), r"\\?\C:\xxx"),
            (format!(r"\\server\share\{long}"), r"\\?\UNC\server\share\xxx"),
            (format!(r"\\?\C:\{long}"), r"\\?\C:\xxx"),
        ] {
            let text = String::from_utf16(&wide(Path::new(&path)).unwrap()).unwrap();
            assert!(text.starts_with(prefix) && text.ends_with('\0'), "{text}");
        }
        assert_eq!(wide(Path::new("a")).unwrap(), [u16::from(b'a'), 0]);
        assert!(wide(Path::new("a\0b")).is_err());
    }
}
