//! A log of bounded size, for a program whose output goes to a file that stays open.
//!
//! A service of Windows writes to one handle as long as it runs, so its log cannot be exchanged for a new file. What was
//! written is copied to a second file instead, and the log cut to nothing: writers append, so they go on at its new end.
//! A line that is written between the two is lost.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// The length from which on a log is put aside, in bytes. Both files together have twice of it, and what is written until
/// somebody looks.
#[cfg(windows)]
pub const LIMIT_BYTES: u64 = 16 << 20;
/// How often it is looked.
#[cfg(windows)]
const LOOK_EVERY: std::time::Duration = std::time::Duration::from_secs(5);

/// Where an older part of the log is: one only.
fn older(log: &Path) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(".old");
    name.into()
}

/// Puts the content of a log aside where it is longer than `limit_bytes`; whether it did.
///
/// # Errors
/// What the file system says; the log is as it was then.
pub fn put_aside(log: &Path, limit_bytes: u64) -> io::Result<bool> {
    if log.metadata()?.len() <= limit_bytes {
        return Ok(false);
    }
    std::fs::copy(log, older(log))?;
    File::options().write(true).open(log)?.set_len(0)?;
    Ok(true)
}

/// Keeps a log bounded as long as this process lives.
///
/// # Errors
/// Where the thread that looks cannot begin.
#[cfg(windows)]
pub fn watch(log: PathBuf) -> io::Result<()> {
    let look = move || {
        loop {
            std::thread::sleep(LOOK_EVERY);
            // Told in the log itself, which is as long as it was: once a look.
            if let Err(error) = put_aside(&log, LIMIT_BYTES) {
                tracing::warn!(%error, "the log {} could not be put aside", log.display());
            }
        }
    };
    std::thread::Builder::new().name("log-limit".into()).spawn(look).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_log_that_is_written_stays_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("agent.log");
        let mut writer = File::options().create(true).append(true).open(&log).unwrap();
        let old = directory.path().join("agent.log.old");
        for round in 0..20 {
            writer.write_all(&[b'a' + round; 100]).unwrap();
            put_aside(&log, 250).unwrap();
            assert!(log.metadata().unwrap().len() <= 250);
            assert!(round < 2 || old.metadata().unwrap().len() == 300);
        }
        // The newest of all is in one or the other, in order.
        let text = [std::fs::read(&old).unwrap(), std::fs::read(&log).unwrap()].concat();
        assert!(text.is_sorted() && text.ends_with(&[b'a' + 19; 100]) && text.len() == 500);
        assert!(put_aside(&directory.path().join("none"), 1).is_err());
    }
}
