//! Processes: which one QEMU is, and how our own are started.

use rustix::process::Pid;
use std::ffi::OsStr;
use std::process::Command;

/// Variables that hold a secret of ours, which no other program needs to see.
const SECRETS: [&str; 2] = ["VMTIDE_PASSWORD", "VMTIDE_NEW_PASSWORD"];

/// Names the kernel's run, so that a process of before a reboot is never taken for one of now.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Where a process's start time stands in `/proc/PID/stat` after the name in brackets: field 22 of
/// proc(5), where the field after the name is the third.
const START_TIME_FIELD: usize = 22 - 3;

/// A command that gets our environment without our secrets.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    for name in SECRETS {
        command.env_remove(name);
    }
    command
}

/// Tells one process from all others of this host, also from later ones of the same number; none
/// where the kernel does not tell.
pub(crate) fn identity_of(process: Pid) -> Option<String> {
    let number = process.as_raw_nonzero();
    let boot = std::fs::read_to_string(BOOT_ID).ok()?;
    let status = std::fs::read_to_string(format!("/proc/{number}/stat")).ok()?;
    // The name may hold anything, also brackets and spaces.
    let (_, fields) = status.rsplit_once(')')?;
    let start = fields.split_whitespace().nth(START_TIME_FIELD)?;
    start.parse::<u64>().ok()?;
    Some(format!("{number}:{start}:{}", boot.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_itself_and_no_other() {
        let own = identity_of(rustix::process::getpid()).unwrap();
        assert_eq!(identity_of(rustix::process::getpid()), Some(own.clone()));
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        let other = identity_of(pid);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(other.is_some_and(|other| other != own));
        assert_eq!(identity_of(pid), None);
    }

    #[test]
    fn secrets_stay_with_us() {
        let removed: Vec<_> = command("true")
            .get_envs()
            .filter(|(_, value)| value.is_none())
            .map(|(name, _)| name.to_owned())
            .collect();
        assert!(removed.contains(&"VMTIDE_PASSWORD".into()), "{removed:?}");
    }
}
