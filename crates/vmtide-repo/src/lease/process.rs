//! Which process holds a lease, so that another one on the same machine can tell that it is gone.
//!
//! A fast path only: a lease whose process is known to be gone need not be waited for until it
//! expires. Whoever looks from another machine, another boot or another container cannot know, and
//! waits.

use serde::{Deserialize, Serialize};

/// A process, named so that no other is ever taken for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    /// The machine.
    machine: String,
    /// The boot of its kernel, a random id.
    boot: String,
    /// The namespace that the process number is of: containers have their own.
    namespace: String,
    /// The process number.
    pid: u32,
    /// When it began, in the kernel's ticks since boot, on Windows in units of 100 ns since 1601: process
    /// numbers come back.
    started: u64,
}

impl Process {
    /// This process; none where the system does not tell.
    pub fn current() -> Option<Self> {
        #[cfg(feature = "simulation")]
        if let Some(pid) = crate::simulation::process() {
            return Some(Self::simulated(pid));
        }
        Self::running(std::process::id())
    }

    /// Whether it is certain that this process has ended.
    pub fn is_gone(&self) -> bool {
        #[cfg(feature = "simulation")]
        if let Some(is_gone) = crate::simulation::is_gone(self.pid) {
            return is_gone;
        }
        let Some(me) = Self::current() else { return false };
        let comparable = me.machine == self.machine
            && me.boot == self.boot
            && me.namespace == self.namespace
            && me.pid != self.pid;
        comparable && has_ended(self)
    }

    #[cfg(feature = "simulation")]
    fn simulated(pid: u32) -> Self {
        let text = String::from("simulated");
        Self { machine: text.clone(), boot: text.clone(), namespace: text, pid, started: 0 }
    }
}

#[cfg(target_os = "linux")]
impl Process {
    fn running(pid: u32) -> Option<Self> {
        let read = |path: &str| {
            let text = std::fs::read_to_string(path).ok()?;
            Some(text.trim().to_owned()).filter(|text| !text.is_empty())
        };
        let namespace = std::fs::read_link("/proc/self/ns/pid").ok()?;
        Some(Self {
            // Two machines made from one image have the same id, but not the same name and boot.
            machine: format!(
                "{} {}",
                read("/etc/machine-id").unwrap_or_default(),
                read("/proc/sys/kernel/hostname")?
            ),
            boot: read("/proc/sys/kernel/random/boot_id")?,
            namespace: namespace.to_string_lossy().into_owned(),
            pid,
            started: started(pid).ok()??,
        })
    }
}

/// When a process began; none where the kernel's answer is not understood.
#[cfg(target_os = "linux")]
fn started(pid: u32) -> std::io::Result<Option<u64>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the program's name in parentheses and may hold anything.
    let after_name = stat.rsplit_once(')').map(|(_, rest)| rest);
    // Field 22 of proc_pid_stat(5), the 20th after the name.
    Ok(after_name.and_then(|rest| rest.split_whitespace().nth(19)?.parse().ok()))
}

#[cfg(target_os = "linux")]
fn has_ended(process: &Process) -> bool {
    match started(process.pid) {
        Ok(Some(started)) => started != process.started,
        Ok(None) => false,
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

#[cfg(windows)]
impl Process {
    fn running(pid: u32) -> Option<Self> {
        use vmtide_windows_ffi::process;
        // A container sees only its own processes, and two of them may have one name: nothing would be
        // certain there.
        if process::is_in_container() {
            return None;
        }
        Some(Self {
            machine: std::env::var("COMPUTERNAME").ok().filter(|name| !name.is_empty())?,
            // Moves when the clock is set; then the process cannot be compared, which is only slow.
            boot: process::boot_time()?.to_string(),
            namespace: String::from("windows"),
            pid,
            started: process::started(pid).ok()??,
        })
    }
}

#[cfg(windows)]
fn has_ended(process: &Process) -> bool {
    match vmtide_windows_ffi::process::started(process.pid) {
        Ok(Some(started)) => started != process.started,
        Ok(None) => true,
        // It may run for another user.
        Err(_) => false,
    }
}

#[cfg(not(any(target_os = "linux", windows)))]
impl Process {
    fn running(_pid: u32) -> Option<Self> {
        None
    }
}

#[cfg(not(any(target_os = "linux", windows)))]
fn has_ended(_process: &Process) -> bool {
    false
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_ended_is_known_to_be_gone_and_no_other() {
        let me = Process::current().unwrap();
        assert!(!me.is_gone());
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::running(child.id()).unwrap();
        assert!(!process.is_gone());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(process.is_gone());
        // The number was given to another process.
        let other = Process { started: me.started + 1, ..me.clone() };
        assert!(!other.is_gone(), "the own number says nothing");
        let parent = Process::running(std::os::unix::process::parent_id()).unwrap();
        assert!(!parent.is_gone());
        let before = Process { started: parent.started + 1, ..parent };
        assert!(before.is_gone(), "a process that began at another time is another");
        for far in [
            Process { machine: "other".into(), ..process.clone() },
            Process { boot: "other".into(), ..process.clone() },
            Process { namespace: "other".into(), ..process },
        ] {
            assert!(!far.is_gone(), "{far:?}");
        }
    }
}
