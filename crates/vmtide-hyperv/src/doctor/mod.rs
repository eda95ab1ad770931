//! Looking a host and its VMs over: what backups need, what stands in their way, and the mend.
//!
//! Nothing is changed. What this user may not see is said as such and fails nothing that works without it.

mod system;
mod vm;

use crate::{Host, HostFiles, VmRecord, restore};
use vmtide_hypervisor::{HealthCheck, HypervisorError};

/// The most VMs that are looked at one by one.
const MAX_VMS: usize = 256;

/// Looks over a host and one VM of it, or all of them. `files` is the way to its files, where there is one.
pub fn examine(host: &Host, files: Option<&dyn HostFiles>, vm: Option<&str>) -> Vec<HealthCheck> {
    let mut checks = Vec::new();
    let vms = match vm {
        Some(vm) => host.find(vm).map(|vm| (vec![vm], Vec::new())),
        None => host.all_vms(),
    };
    let (vms, unreadable) = match vms {
        Ok(vms) => vms,
        Err(error) => {
            checks.push(unreachable(host, &error));
            if !matches!(error, HypervisorError::Unreachable { .. }) {
                checks.extend(system::service(host));
            }
            return checks;
        }
    };
    checks.push(HealthCheck::ok("host", reached(host, vm, &vms)));
    let (of_system, exclusions) = system::examine(host);
    checks.extend(of_system);
    if vms.len() > MAX_VMS {
        checks.push(HealthCheck::warn(
            "VMs",
            format!("{} VMs; the first {MAX_VMS} were looked at", vms.len()),
            "name one VM to look at it",
        ));
    }
    checks.extend(unreadable.iter().take(MAX_VMS).map(|vm| {
        HealthCheck::fail(
            "VM",
            format!("{} cannot be read, and is not backed up: {}", vm.name, vm.error),
            "see that its storage is online, and its state in Hyper-V Manager; a VM that is no more can be removed there",
        )
    }));
    checks.extend(unfinished_restores(host, files, &vms));
    for vm in vms.iter().take(MAX_VMS) {
        checks.extend(vm::examine(host, files, vm, exclusions.as_ref()));
    }
    checks
}

/// VMs that restores have not finished.
fn unfinished_restores(
    host: &Host,
    files: Option<&dyn HostFiles>,
    vms: &[VmRecord],
) -> Vec<HealthCheck> {
    let mut checks = Vec::new();
    for vm in vms.iter().take(MAX_VMS) {
        if restore::is_being_restored(vm) {
            checks.push(HealthCheck::warn(
                "restores",
                format!("{} is a VM that a restore is making, or has left", vm.name),
                "where no restore runs: the next restore from the machine that began it removes it; else \
                 remove it and its directory (Remove-VM)",
            ));
        } else if files.is_some_and(|files| {
            // What cannot be looked at is told by the checks of the VM.
            restore::is_incomplete(host, files, vm).unwrap_or(false)
        }) {
            checks.push(HealthCheck::warn(
                "restores",
                format!(
                    "a restore of {} in place was not finished, and it is not backed up",
                    vm.name
                ),
                "run the restore again, with all the disks that it was to write",
            ));
        }
    }
    checks
}

fn reached(host: &Host, asked: Option<&str>, vms: &[VmRecord]) -> String {
    let version = host.os_version().map_or(String::new(), |version| format!(", Windows {version}"));
    let count = match (asked, vms.len()) {
        (Some(_), _) => String::new(),
        (None, 1) => ", 1 VM".into(),
        (None, count) => format!(", {count} VMs"),
    };
    format!("{} answers{version}{count}", host.peer())
}

/// The host cannot be asked for its VMs: which of the many reasons, and what to do.
fn unreachable(host: &Host, error: &HypervisorError) -> HealthCheck {
    let detail = error.to_string();
    match error {
        HypervisorError::Unreachable { .. } => HealthCheck::fail(
            "host",
            detail,
            "see that the host runs, that its management listener (WinRM: ports 5985 and 5986) is on and \
             let through by its firewall, and that its certificate is trusted",
        ),
        HypervisorError::Denied { .. } => HealthCheck::fail(
            "rights",
            detail,
            "use the right user and password; the user must be in the groups Hyper-V Administrators and, \
             from another machine, Remote Management Users of the host",
        ),
        HypervisorError::NotFound { .. } => HealthCheck::fail(
            "VM",
            detail,
            "`vmtide vm list` names the VMs of the host; where there is no namespace root\\virtualization\\v2, \
             install the Hyper-V role",
        ),
        HypervisorError::Timeout { .. } => HealthCheck::fail(
            "host",
            detail,
            format!(
                "{} answers too slowly: see its load, and that the service vmms runs",
                host.peer()
            ),
        ),
        _ => HealthCheck::fail("host", detail, "see the event log Hyper-V-VMMS of the host"),
    }
}
