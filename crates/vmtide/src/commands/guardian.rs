//! `vmtide internal-guardian`: the process that thaws a guest when the backup that froze it dies.
//! Started by vmtide itself; its arguments are no interface.

use std::ffi::OsString;
use std::process::ExitCode;

/// The word that stands for a command.
pub const NAME: &str = "internal-guardian";

/// Runs it.
pub fn run(arguments: &[OsString]) -> ExitCode {
    let arguments = arguments.iter().map(|word| word.to_string_lossy().into_owned());
    let code = vmtide_qemu::guardian::run(arguments);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
