//! Looking a host and its VMs over: what backups need, what stands in their way, and the mend.
//!
//! Nothing is changed. What this user may not see is said as such and fails nothing that works without it.

mod network;
mod system;
mod vm;

use crate::host::MissingGroup;
use crate::model::vms::UnreadableVm;
use crate::select::tags_of;
use crate::{Host, HostFiles, VmRecord, restore};
use vmtide_hypervisor::{HealthCheck, HypervisorError, Result, VmSelector};

/// The most VMs that are looked at one by one.
const MAX_VMS: usize = 256;

/// Looks over a host and one VM of it, those of a selection as [`VmSelector`] writes it, or all of them. `files` is the
/// way to its files, where there is one.
pub fn examine(host: &Host, files: Option<&dyn HostFiles>, vm: Option<&str>) -> Vec<HealthCheck> {
    let mut checks = Vec::new();
    let (vms, unreadable) = match asked_for(host, vm) {
        Ok(vms) => vms,
        Err(error) => {
            checks.push(unreachable(host, &error));
            if matches!(error, HypervisorError::Unreachable { .. }) {
                // Whether the host is down, or only its management.
                checks.extend(files.map(HostFiles::examine_way).unwrap_or_default());
            } else {
                checks.extend(network::examine(host, files));
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
    // Last, when all ways were gone.
    checks.extend(network::examine(host, files));
    checks
}

/// The VMs that are meant, and those of them that cannot be read.
fn asked_for(host: &Host, vm: Option<&str>) -> Result<(Vec<VmRecord>, Vec<UnreadableVm>)> {
    let Some(vm) = vm else { return host.all_vms() };
    let selector = vm.parse::<VmSelector>().ok().filter(VmSelector::is_many);
    let Some(selector) = selector else {
        return host.find(vm).map(|vm| (vec![vm], Vec::new()));
    };
    let (mut vms, mut unreadable) = host.all_vms()?;
    vms.retain(|vm| {
        let tags = tags_of(&vm.settings.instance);
        selector.matches(&vm.name, Some(&vm.id.to_string()), &tags)
    });
    unreadable.retain(|vm| {
        let id = vm.id.map(|id| id.to_string());
        selector.matches(&vm.name, id.as_deref(), &tags_of(&vm.settings))
    });
    if vms.is_empty() && unreadable.is_empty() {
        return Err(HypervisorError::NotFound {
            what: format!("a VM that {selector} selects"),
            detail: format!("{} has none", host.peer()),
        });
    }
    Ok((vms, unreadable))
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
    let asked = asked.filter(|_| vms.len() == 1);
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
            host.missing_group().map_or(
                "use the right user and password; the user must be in the groups Hyper-V Administrators and, \
                 from another machine, Remote Management Users of the host",
                MissingGroup::mend,
            ),
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
