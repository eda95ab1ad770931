//! Where vmtide keeps and finds its own files, by the customs of the system.

use std::path::{Path, PathBuf};

pub use vmtide_engine::state_directory;

/// A directory that a variable of the environment names by its absolute path.
fn named(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute())
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
