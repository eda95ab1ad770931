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

/// What Microsoft Defender does not leave out of what it should, where it is told by hand what to leave out.
pub(super) struct Exclusions {
    /// The extensions of files that it scans.
    pub(super) scanned: Vec<&'static str>,
    /// The directories that it leaves out, in lower case, each with a backslash at its end.
    directories: Vec<String>,
}

impl Exclusions {
    /// Whether a directory is left out, by itself or with one above it.
    pub(super) fn cover(&self, directory: &str) -> bool {
        let directory = format!("{}\\", directory.to_lowercase().trim_end_matches('\\'));
        self.directories.iter().any(|one| directory.starts_with(one))
    }
}

/// All of it, and what is to be looked at for each VM.
pub(super) fn examine(host: &Host) -> (Vec<HealthCheck>, Option<Exclusions>) {
    let mut checks = vec![rights(host)];
    let system = windows(host);
    checks.extend(system.as_ref().and_then(version));
    match scanner(host, system.as_ref().is_none_or(is_server)) {
        Ok(check) => {
            checks.push(check);
            (checks, None)
        }
        Err(exclusions) => (checks, Some(exclusions)),
    }
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

/// Whether the services of a backup are shown to this user. That their methods may be called, and that files may be
/// written, shows when it is done.
fn rights(host: &Host) -> HealthCheck {
    let failed: Vec<_> = SERVICES
        .iter()
        .filter_map(|(class, what)| Some((what, host.service(class).err()?)))
        .collect();
    match failed.as_slice() {
        [] => HealthCheck::ok(
            "rights",
            "the services for settings, checkpoints, reference points and disks are shown to this user",
        ),
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

/// What is checked of the scanner.
pub(super) const SCANNER: &str = "virus scanner";

/// What to tell a scanner.
pub(super) fn scanner_advice() -> String {
    format!(
        "exclude the files *.{} and the processes vmms.exe and vmwp.exe from scanning",
        EXCLUDED.join(", *.")
    )
}

/// Scanners that look into the files of VMs and their tracking slow backups and have kept merges from ending.
/// Where Microsoft Defender leaves out directories and not all such files, the answer depends on the VM.
fn scanner(host: &Host, is_server: bool) -> Result<HealthCheck, Exclusions> {
    let found = host.cim().query(DEFENDER, "SELECT * FROM MSFT_MpPreference");
    let Some(preference) = found.ok().and_then(|found| found.into_iter().next()) else {
        let detail = format!("its settings cannot be seen; {}", scanner_advice());
        return Ok(HealthCheck::ok(SCANNER, detail));
    };
    let truth = |name| preference.optional_bool(name).ok().flatten() == Some(true);
    if truth("DisableRealtimeMonitoring") {
        return Ok(HealthCheck::ok(SCANNER, "Microsoft Defender does not scan in real time"));
    }
    // On servers Defender leaves out what a role says, unless that is switched off.
    if is_server && !truth("DisableAutoExclusions") {
        return Ok(HealthCheck::ok(
            SCANNER,
            "Microsoft Defender leaves Hyper-V's files out by itself; other scanners must be told",
        ));
    }
    let listed = preference.texts("ExclusionExtension").unwrap_or_default();
    let is_listed = |extension: &&str| {
        listed.iter().any(|one| one.trim_start_matches(['*', '.']).eq_ignore_ascii_case(extension))
    };
    let scanned: Vec<_> = EXCLUDED.iter().copied().filter(|one| !is_listed(one)).collect();
    if scanned.is_empty() {
        return Ok(HealthCheck::ok(SCANNER, "Microsoft Defender leaves the files of VMs out"));
    }
    let directories = preference.texts("ExclusionPath").unwrap_or_default();
    let with_end = |one: &&str| format!("{}\\", one.to_lowercase().trim_end_matches('\\'));
    Err(Exclusions { scanned, directories: directories.iter().map(with_end).collect() })
}
