//! Where vmtide keeps and finds its own files, by the customs of the system.

use std::path::{Path, PathBuf};

/// A directory that a variable of the environment names by its absolute path.
fn named(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute())
}

/// Where journals and locks are kept that the user named no place for.
#[cfg(unix)]
pub fn state_directory() -> PathBuf {
    if let Some(directory) = named("XDG_STATE_HOME") {
        return directory.join("vmtide");
    }
    if rustix::process::geteuid().is_root() {
        return "/var/lib/vmtide".into();
    }
    let home = std::env::home_dir().unwrap_or_else(|| "/var/tmp".into());
    home.join(".local/state/vmtide")
}

/// Where journals and locks are kept that the user named no place for.
#[cfg(windows)]
pub fn state_directory() -> PathBuf {
    named("LOCALAPPDATA").unwrap_or_else(std::env::temp_dir).join("vmtide")
}

/// The settings files that are read where the user names none, in order: that of the system, then that
/// of the user.
#[cfg(unix)]
pub fn settings_files() -> Vec<PathBuf> {
    let user =
        named("XDG_CONFIG_HOME").or_else(|| std::env::home_dir().map(|home| home.join(".config")));
    let of_user = user.map(|directory| directory.join(Path::new("vmtide/vmtide.toml")));
    std::iter::once(PathBuf::from("/etc/vmtide/vmtide.toml")).chain(of_user).collect()
}

/// The settings files that are read where the user names none: that of the user. There is none of the
/// system, because every user may make a directory in `%ProgramData%`, and settings run commands.
#[cfg(windows)]
pub fn settings_files() -> Vec<PathBuf> {
    let user = named("APPDATA");
    user.map(|directory| directory.join(Path::new(r"vmtide\vmtide.toml"))).into_iter().collect()
}
