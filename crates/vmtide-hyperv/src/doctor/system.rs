//! The host itself: its Windows, its service, the rights of this user, its virus scanner.

use crate::Host;
use crate::host::CIMV2;
use vmtide_cim::CimInstance;
use vmtide_hypervisor::HealthCheck;

/// The first build of Windows whose Hyper-V tracks changes: Windows Server 2016.
const FIRST_BUILD: u32 = 14_393;

/// The namespace of Microsoft Defender.
const DEFENDER: &str = r"root\Microsoft\Windows\Defender";

/// What Microsoft says a virus scanner should leave alone on a Hyper-V host, as far as backups meet it.
const EXCLUDED: [&str; 6] = ["vhd", "vhdx", "avhd", "avhdx", "rct", "mrt"];

/// The services whose methods a backup calls, and what for.
const SERVICES: [(&str, &str); 4] = [
    ("Msvm_VirtualSystemManagementService", "settings"),
    ("Msvm_VirtualSystemSnapshotService", "checkpoints"),
    ("Msvm_VirtualSystemReferencePointService", "reference points"),
    ("Msvm_ImageManagementService", "virtual disks"),
];

/// All of it.
pub(super) fn examine(host: &Host) -> Vec<HealthCheck> {
    let mut checks = vec![rights(host)];
    let system = windows(host);
    checks.extend(system.as_ref().and_then(version));
    checks.push(scanner(host, system.as_ref().is_none_or(is_server)));
    checks
}

/// Whether the management service runs; none where that cannot be seen, or all is well.
pub(super) fn service(host: &Host) -> Option<HealthCheck> {
    let query = "SELECT * FROM Win32_Service WHERE Name='vmms'";
    let found = host.cim().query(CIMV2, query).ok()?;
    let Some(service) = found.first() else {
        return Some(HealthCheck::fail(
            "service",
            "the host has no Hyper-V management service (vmms)",
            "install the Hyper-V role: Install-WindowsFeature Hyper-V -IncludeManagementTools -Restart",
        ));
    };
    let state = service.optional_text("State").ok()??;
    (!state.eq_ignore_ascii_case("Running")).then(|| {
        HealthCheck::fail(
            "service",
            format!("the Hyper-V management service (vmms) is in the state {state}"),
            "start it: Start-Service vmms; see the event log Hyper-V-VMMS",
        )
    })
}

/// Whether the methods of a backup can be called.
fn rights(host: &Host) -> HealthCheck {
    let failed: Vec<_> = SERVICES
        .iter()
        .filter_map(|(class, what)| Some((what, host.service(class).err()?)))
        .collect();
    match failed.as_slice() {
        [] => HealthCheck::ok("rights", "checkpoints, reference points and disks can be managed"),
        [(what, error), ..] => HealthCheck::fail(
            "rights",
            format!("no way to {what}: {error}"),
            "add the user to the group Hyper-V Administrators of the host",
        ),
    }
}

fn windows(host: &Host) -> Option<CimInstance> {
    let found = host.cim().query(CIMV2, "SELECT * FROM Win32_OperatingSystem");
    found.ok()?.into_iter().next()
}

/// `ProductType` 1 is a workstation.
fn is_server(system: &CimInstance) -> bool {
    system.optional_number::<u32>("ProductType").ok().flatten() != Some(1)
}

fn version(system: &CimInstance) -> Option<HealthCheck> {
    let caption = system.optional_text("Caption").ok().flatten().unwrap_or("Windows");
    let build: u32 = system.optional_number("BuildNumber").ok()??;
    let detail = format!("{}, build {build}", caption.trim());
    Some(if build < FIRST_BUILD {
        HealthCheck::fail(
            "Windows",
            format!("{detail}: its Hyper-V tracks no changes"),
            "back up from Windows Server 2016 or newer",
        )
    } else {
        HealthCheck::ok("Windows", detail)
    })
}

/// Scanners that look into the files of VMs and their tracking slow backups and have kept merges from ending.
fn scanner(host: &Host, is_server: bool) -> HealthCheck {
    const NAME: &str = "virus scanner";
    let advice = format!(
        "exclude the files *.{} and the processes vmms.exe and vmwp.exe from scanning",
        EXCLUDED.join(", *.")
    );
    let found = host.cim().query(DEFENDER, "SELECT * FROM MSFT_MpPreference");
    let Some(preference) = found.ok().and_then(|found| found.into_iter().next()) else {
        return HealthCheck::ok(NAME, format!("its settings cannot be seen; {advice}"));
    };
    let truth = |name| preference.optional_bool(name).ok().flatten() == Some(true);
    if truth("DisableRealtimeMonitoring") {
        return HealthCheck::ok(NAME, "Microsoft Defender does not scan in real time");
    }
    // On servers Defender leaves out what a role says, unless that is switched off.
    if is_server && !truth("DisableAutoExclusions") {
        return HealthCheck::ok(
            NAME,
            "Microsoft Defender leaves Hyper-V's files out by itself; other scanners must be told",
        );
    }
    let listed = preference.texts("ExclusionExtension").unwrap_or_default();
    let is_listed = |extension: &&str| {
        listed.iter().any(|one| one.trim_start_matches(['*', '.']).eq_ignore_ascii_case(extension))
    };
    let missing: Vec<_> = EXCLUDED.iter().copied().filter(|one| !is_listed(one)).collect();
    if missing.is_empty() {
        return HealthCheck::ok(NAME, "Microsoft Defender leaves the files of VMs out");
    }
    HealthCheck::warn(NAME, format!("Microsoft Defender scans *.{}", missing.join(", *.")), advice)
}
