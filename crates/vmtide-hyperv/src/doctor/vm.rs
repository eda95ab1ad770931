//! One VM: its version, its guest's answer to VSS, what backups have left, its disks, the room they have.

use super::system::{Exclusions, SCANNER, scanner_advice};
use crate::gates::{Checkpoints, DiskGate, VersionGate, is_leaf};
use crate::host::CIMV2;
use crate::model::read::guid;
use crate::{DiskAttachment, Host, HostFiles, VmRecord, VmState};
use std::collections::BTreeSet;
use vmtide_cim::wql;
use vmtide_hypervisor::{HealthCheck, HypervisorError};

/// Less free space than this on a volume of disks is warned of, in bytes. While a checkpoint stands all that
/// the VM writes goes to new files, and a full volume pauses every VM on it.
const LOW_SPACE_BYTES: u64 = 20 << 30;

/// All of it.
pub(super) fn examine(
    host: &Host,
    files: Option<&dyn HostFiles>,
    vm: &VmRecord,
    exclusions: Option<&Exclusions>,
) -> Vec<HealthCheck> {
    let version = VersionGate::of(&vm.settings);
    let mut checks = vec![configuration(vm, &version)];
    checks.extend(security(host, vm));
    checks.push(integration(host, vm));
    let users_checkpoints = match host.snapshots(vm.id) {
        Ok(snapshots) => {
            let sorted = Checkpoints::of(snapshots);
            checks.extend(leftovers(vm, &sorted));
            !sorted.of_users.is_empty() || !sorted.ours.is_empty() || !sorted.others.is_empty()
        }
        Err(error) => {
            checks.push(cannot_see("checkpoints", vm, &error));
            true
        }
    };
    match host.disks(&vm.settings) {
        Ok(disks) => {
            checks.extend(disks.iter().map(|disk| tracking(host, vm, &version, disk)));
            if !users_checkpoints {
                checks.extend(merges(vm, &disks));
            }
            checks.extend(exclusions.map(|exclusions| scanned(vm, &disks, exclusions)));
            checks.extend(space(host, files, vm, &disks));
        }
        Err(error) => checks.push(cannot_see("disks", vm, &error)),
    }
    checks.extend(files.map(|files| way_to_files(files, vm)));
    checks
}

fn cannot_see(name: &str, vm: &VmRecord, error: &HypervisorError) -> HealthCheck {
    HealthCheck::fail(
        name,
        format!("{}: {error}", vm.name),
        "see the event log Hyper-V-VMMS of the host, and the rights of this user",
    )
}

fn configuration(vm: &VmRecord, gate: &VersionGate) -> HealthCheck {
    let (major, minor) = vm.settings.version;
    match gate {
        VersionGate::Tracked => HealthCheck::ok(
            "version",
            format!("{}: configuration version {major}.{minor}", vm.name),
        ),
        VersionGate::Doubtful(why) | VersionGate::Untracked(why) => HealthCheck::warn(
            "version",
            format!("{}: {why}", vm.name),
            "shut the VM down and raise its version with Update-VMVersion; that cannot be undone",
        ),
    }
}

/// What a restore elsewhere would lack.
fn security(host: &Host, vm: &VmRecord) -> Option<HealthCheck> {
    let found = host.resources_of_class(&vm.settings, "Msvm_SecuritySettingData").ok()?;
    let is_on = |name| found.iter().any(|one| one.optional_bool(name).ok().flatten() == Some(true));
    (is_on("TpmEnabled") || is_on("ShieldingRequested")).then(|| {
        HealthCheck::warn(
            "virtual TPM",
            format!("{} has a virtual TPM, whose keys only this host's certificates open", vm.name),
            "export the certificates of the store \"Shielded VM Local Certificates\" and keep them apart; \
             keep BitLocker's recovery keys",
        )
    })
}

/// Whether the guest can be brought to rest. Asked of a running VM only.
fn integration(host: &Host, vm: &VmRecord) -> HealthCheck {
    const NAME: &str = "application consistency";
    /// `OperationalStatus`: OK.
    const OK: u64 = 2;
    /// `OperationalStatus`: well, by an older protocol.
    const DEGRADED: u64 = 3;
    /// `EnabledState`: enabled.
    const ENABLED: u64 = 2;
    let name = &vm.name;
    if vm.state != VmState::Running {
        return HealthCheck::ok(NAME, format!("{name} does not run: its disks are at rest"));
    }
    let query =
        format!("SELECT * FROM Msvm_VssComponent WHERE SystemName={}", wql::quote(&guid(vm.id)));
    let found = match host.query_if_known(&query) {
        Ok(found) => found.unwrap_or_default(),
        Err(error) => return cannot_see(NAME, vm, &error),
    };
    let mend = "in a Windows guest, see that the service vmicvss can run; in a Linux guest, install and start \
                hv_vss_daemon (hyperv-daemons, linux-cloud-tools); or back up with --consistency crash";
    let Some(component) = found.first() else {
        return HealthCheck::warn(
            NAME,
            format!("{name} has no integration service for backups"),
            format!("Enable-VMIntegrationService -VMName '{name}' -Name VSS; {mend}"),
        );
    };
    if component.optional_number::<u64>("EnabledState").ok().flatten() != Some(ENABLED) {
        return HealthCheck::warn(
            NAME,
            format!("the integration service for backups of {name} is switched off"),
            format!("Enable-VMIntegrationService -VMName '{name}' -Name VSS"),
        );
    }
    let status = component.numbers("OperationalStatus").unwrap_or_default();
    match status.first() {
        None | Some(&(OK | DEGRADED)) => HealthCheck::ok(
            NAME,
            format!("the guest of {name} answers to backups{}", heartbeat(host, vm)),
        ),
        Some(other) => {
            let meaning = match other {
                7 => "its service speaks no version of the protocol that the host knows",
                12 => "no contact yet, or no service",
                13 => "contact lost",
                _ => "not ready",
            };
            HealthCheck::warn(
                NAME,
                format!("the guest of {name} does not answer to backups: {meaning} ({other})"),
                mend,
            )
        }
    }
}

/// A word on the guest's heartbeat, where it has one that does not beat.
fn heartbeat(host: &Host, vm: &VmRecord) -> &'static str {
    /// `OperationalStatus`: OK.
    const OK: u64 = 2;
    let query = format!(
        "SELECT * FROM Msvm_HeartbeatComponent WHERE SystemName={}",
        wql::quote(&guid(vm.id))
    );
    let found = host.query_if_known(&query).ok().flatten().unwrap_or_default();
    let status =
        found.first().and_then(|one| one.numbers("OperationalStatus").ok()?.first().copied());
    if status.is_none_or(|status| status == OK) { "" } else { ", but its heart does not beat" }
}

fn leftovers(vm: &VmRecord, checkpoints: &Checkpoints) -> Vec<HealthCheck> {
    let mut checks = Vec::new();
    for one in &checkpoints.ours {
        checks.push(HealthCheck::warn(
            "leftovers",
            format!("{} has the checkpoint \"{}\" of a backup of ours", vm.name, one.settings.name),
            "where that backup still runs, nothing; else the next backup removes it",
        ));
    }
    if let Some(warning) = checkpoints.warning() {
        checks.push(HealthCheck::warn(
            "leftovers",
            format!("{}: {warning}", vm.name),
            "when no other backup runs, remove it: Get-VMSnapshot -SnapshotType Recovery | Remove-VMSnapshot",
        ));
    }
    checks
}

fn tracking(
    host: &Host,
    vm: &VmRecord,
    version: &VersionGate,
    disk: &DiskAttachment,
) -> HealthCheck {
    let place = format!("{}, disk {} ({})", vm.name, disk.location, disk.host_resource);
    let mut detail = String::new();
    let mut format = None;
    if !disk.pass_through && !disk.shared {
        match host.virtual_hard_disk(&disk.host_resource) {
            Ok(file) => {
                detail = format!(", {} bytes, {} {}", file.size_bytes, file.subtype, file.format);
                format = Some(file.format);
            }
            Err(error @ (HypervisorError::NotFound { .. } | HypervisorError::Denied { .. })) => {
                return HealthCheck::fail(
                    "disk",
                    format!("{place}: {error}"),
                    "see that the file is where the VM expects it and that the host may read it",
                );
            }
            Err(error) => tracing::debug!(%error, "a disk cannot be described"),
        }
    }
    match DiskGate::of(version, disk, format.as_deref()) {
        DiskGate::Tracked => {
            HealthCheck::ok("change tracking", format!("{place}{detail}: changes can be tracked"))
        }
        DiskGate::InFull(reason) => HealthCheck::warn(
            "change tracking",
            format!("{place}: every backup reads all of it: {reason}"),
            "convert VHD to VHDX and raise the VM's version; until then backups are right, only slower",
        ),
        DiskGate::NotHeld(why) => HealthCheck::warn(
            "disk",
            format!("{place} is not backed up: {why}"),
            "back it up from within the guest, and leave it out by --disk-exclude",
        ),
    }
}

/// Disks that run on differencing files although no checkpoint is there: a merge is under way, or was never
/// done.
fn merges(vm: &VmRecord, disks: &[DiskAttachment]) -> Option<HealthCheck> {
    let leaves: Vec<_> =
        disks.iter().map(|disk| disk.host_resource.as_str()).filter(|path| is_leaf(path)).collect();
    (!leaves.is_empty()).then(|| {
        HealthCheck::warn(
            "merges",
            format!("{} has no checkpoint and runs on {}", vm.name, leaves.join(", ")),
            "a merge may be under way: look again later; one that never ends is in the event log \
             Hyper-V-VMMS (19100): make room, exclude the files from virus scanning, and shut the VM down \
             once, or merge with Merge-VHD while it is off",
        )
    })
}

/// The directories of the disks that are files.
fn directories(disks: &[DiskAttachment]) -> BTreeSet<String> {
    disks
        .iter()
        .filter(|disk| !disk.pass_through)
        .filter_map(|disk| Some(disk.host_resource.rsplit_once(['\\', '/'])?.0.to_owned()))
        .collect()
}

/// Whether the virus scanner looks into the files of the VM.
fn scanned(vm: &VmRecord, disks: &[DiskAttachment], exclusions: &Exclusions) -> HealthCheck {
    let open: Vec<_> =
        directories(disks).into_iter().filter(|one| !exclusions.cover(one)).collect();
    if open.is_empty() {
        let detail = format!("Microsoft Defender leaves the directories of {} out", vm.name);
        return HealthCheck::ok(SCANNER, detail);
    }
    HealthCheck::warn(
        SCANNER,
        format!(
            "{}: Microsoft Defender scans *.{} in {}",
            vm.name,
            exclusions.scanned.join(", *."),
            open.join(", ")
        ),
        scanner_advice(),
    )
}

/// The room on the volumes of the disks.
fn space(
    host: &Host,
    files: Option<&dyn HostFiles>,
    vm: &VmRecord,
    disks: &[DiskAttachment],
) -> Vec<HealthCheck> {
    let mut checks = Vec::new();
    for directory in directories(disks) {
        let free = match files {
            Some(files) => files.free_bytes(&directory).ok().flatten(),
            None => free_on_drive(host, &directory),
        };
        let Some(free) = free else { continue };
        let detail = format!("{}: {} GiB free for {directory}", vm.name, free >> 30);
        checks.push(if free < LOW_SPACE_BYTES {
            HealthCheck::warn(
                "space",
                detail,
                "make room: what the VM writes during a backup goes to new files on this volume",
            )
        } else {
            HealthCheck::ok("space", detail)
        });
    }
    checks
}

/// What Windows says of the drive of a directory; none for mount points and shares.
fn free_on_drive(host: &Host, directory: &str) -> Option<u64> {
    let drive = directory.get(..2).filter(|drive| drive.ends_with(':'))?;
    // Volumes of a cluster lie below C: and are none of it.
    if directory.to_lowercase().contains(r":\clusterstorage\") {
        return None;
    }
    let query = format!("SELECT * FROM Win32_LogicalDisk WHERE DeviceID={}", wql::quote(drive));
    let found = host.cim().query(CIMV2, &query).ok()?;
    found.first()?.optional_number("FreeSpace").ok().flatten()
}

/// Whether the data can be read the way a backup would.
fn way_to_files(files: &dyn HostFiles, vm: &VmRecord) -> HealthCheck {
    const NAME: &str = "way to the files";
    let directory = &vm.settings.configuration_root;
    let mend = "for SMB, see that port 445 is let through and that the user may read the host's \
                administrative shares; for an agent, see its roots";
    match files.list(directory) {
        Ok(Some(_)) => HealthCheck::ok(NAME, format!("{}: {directory} can be read", vm.name)),
        Ok(None) => HealthCheck::warn(NAME, format!("{}: {directory} is not there", vm.name), mend),
        Err(error) => HealthCheck::fail(NAME, format!("{}: {error}", vm.name), mend),
    }
}
