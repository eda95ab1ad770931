//! Where vmtide keeps its own files that the user named no place for.
//!
//! The command, the C library and whatever else runs jobs must agree on it: a lock excludes only who
//! looks into the same directory, and what a killed job left behind is found by its journal there.

use std::path::PathBuf;

/// Where journals and locks are kept that the user named no place for: `$XDG_STATE_HOME/vmtide`;
/// `/var/lib/vmtide` for root and for whoever has no home; `.local/state/vmtide` in the home of everybody
/// else; on Windows `%LOCALAPPDATA%\vmtide`. Never a directory in which others make files: a journal says what is
/// to be removed, and is believed.
#[must_use]
pub fn state_directory() -> PathBuf {
    state_directory_of(named(STATE_VARIABLE), is_root(), std::env::home_dir())
}

/// The variable of the environment that says where programs keep their state.
const STATE_VARIABLE: &str = if cfg!(windows) { "LOCALAPPDATA" } else { "XDG_STATE_HOME" };

/// The directory of the system's own programs, in which only its administrators make files.
const OF_SYSTEM: &str = if cfg!(windows) {
    r"C:\Windows\System32\config\systemprofile\AppData\Local"
} else {
    "/var/lib"
};

/// Where programs keep their state below a user's home.
const BELOW_HOME: &str = if cfg!(windows) { r"AppData\Local" } else { ".local/state" };

/// The path in a variable of the environment.
fn named(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).map(PathBuf::from)
}

#[cfg(unix)]
fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[cfg(not(unix))]
fn is_root() -> bool {
    false
}

fn state_directory_of(named: Option<PathBuf>, is_root: bool, home: Option<PathBuf>) -> PathBuf {
    let below_home =
        || home.filter(|home| !is_root && home.is_absolute()).map(|home| home.join(BELOW_HOME));
    named
        .filter(|path| path.is_absolute())
        .or_else(below_home)
        .unwrap_or_else(|| OF_SYSTEM.into())
        .join("vmtide")
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn state_is_kept_where_only_its_user_makes_files() {
        let of = |named: Option<&str>, is_root, home: Option<&str>| {
            state_directory_of(named.map(PathBuf::from), is_root, home.map(PathBuf::from))
        };
        assert_eq!(of(Some("/s"), true, Some("/root")), PathBuf::from("/s/vmtide"));
        assert_eq!(of(None, true, Some("/root")), PathBuf::from("/var/lib/vmtide"));
        assert_eq!(of(None, false, Some("/home/u")), PathBuf::from("/home/u/.local/state/vmtide"));
        // What is no absolute path is none, and without any the directory is the system's.
        assert_eq!(of(Some("s"), false, Some("/u")), PathBuf::from("/u/.local/state/vmtide"));
        assert_eq!(of(None, false, Some("")), PathBuf::from("/var/lib/vmtide"));
        assert_eq!(of(None, false, None), PathBuf::from("/var/lib/vmtide"));
    }
}
