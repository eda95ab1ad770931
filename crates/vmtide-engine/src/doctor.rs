//! Looking a source or a repository over: what works, what does not, and what to do about it.

use crate::source::{OpenSource, SourceOptions, SourceSpec};
use crate::{EngineError, Result};
use serde::Serialize;
use std::path::Path;
use vmtide_block::files;
use vmtide_hypervisor::{HealthCheck, HealthState, HypervisorError, VmConfig, VmSelector};
use vmtide_repo::{KeyList, Repository, RestorePoint};

/// Below this a backup of an ordinary VM is likely to end for lack of space.
const LOW_SPACE_BYTES: u64 = 10 << 30;

/// A VM without a restore point for this long is most likely no longer backed up.
const STALE_HOURS: i64 = 24 * 7;

/// How one thing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckStatus {
    /// As it should be.
    Ok,
    /// Works, but not as well as it could, or not for long.
    Warn,
    /// Does not work.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What.
    pub name: String,
    /// How it stands.
    pub status: CheckStatus,
    /// What was seen.
    pub detail: String,
    /// What to do, where something is to be done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

/// The checks made so far.
#[derive(Default)]
struct Findings(Vec<Check>);

impl Findings {
    fn ok(&mut self, name: &str, detail: impl Into<String>) {
        self.add(name, CheckStatus::Ok, detail.into(), None);
    }

    fn warn(&mut self, name: &str, detail: impl Into<String>, advice: impl Into<String>) {
        self.add(name, CheckStatus::Warn, detail.into(), Some(advice.into()));
    }

    fn fail(&mut self, name: &str, detail: impl Into<String>, advice: impl Into<String>) {
        self.add(name, CheckStatus::Fail, detail.into(), Some(advice.into()));
    }

    fn add(&mut self, name: &str, status: CheckStatus, detail: String, advice: Option<String>) {
        self.0.push(Check { name: name.into(), status, detail, advice });
    }
}

/// The worst of all checks.
pub fn worst(checks: &[Check]) -> CheckStatus {
    let all = checks.iter().map(|check| check.status);
    all.max().unwrap_or(CheckStatus::Ok)
}

/// Looks at a source. What an earlier, killed job left there is removed, as the next backup would.
///
/// # Errors
/// None: what fails is among the checks.
pub fn check_source(spec: &SourceSpec, options: &SourceOptions) -> Vec<Check> {
    look_over(spec, options, false)
}

/// As [`check_source`], and removes as well what carries vmtide's name there and belongs to no job that is known here. The
/// user vouches for it that no other installation of vmtide is at work.
///
/// # Errors
/// None: what fails is among the checks.
pub fn check_source_and_remove_orphans(spec: &SourceSpec, options: &SourceOptions) -> Vec<Check> {
    look_over(spec, options, true)
}

fn look_over(spec: &SourceSpec, options: &SourceOptions, remove_orphans: bool) -> Vec<Check> {
    let mut findings = Findings::default();
    check_state_directory(&mut findings, &options.state_directory);
    match spec.open(options) {
        Ok(source) => {
            findings.ok("open", format!("{} can be opened", source.display));
            check_open_source(&mut findings, &source, remove_orphans);
        }
        Err(error) => findings.fail("open", error.to_string(), advice_for(&error)),
    }
    findings.0
}

fn check_open_source(findings: &mut Findings, source: &OpenSource, remove_orphans: bool) {
    // Of a host without a VM, or of several that are selected, only the platform's own findings tell.
    let is_many = source.hypervisor.has_lasting_ids()
        && source.vm.parse().is_ok_and(|selector: VmSelector| selector.is_many());
    let is_named = !source.vm.is_empty();
    let one_vm = is_named && !is_many;
    let examined = source.hypervisor.examine(is_named.then_some(source.vm.as_str()));
    let is_examined = !examined.is_empty();
    for HealthCheck { name, state, detail, mend } in examined {
        let status = match state {
            HealthState::Ok => CheckStatus::Ok,
            HealthState::Warn => CheckStatus::Warn,
            HealthState::Fail => CheckStatus::Fail,
        };
        findings.0.push(Check { name, status, detail, advice: mend });
    }
    if one_vm || !is_examined {
        match source.hypervisor.describe(&source.vm) {
            Ok(config) => check_config(findings, &config),
            Err(error) => {
                let error = EngineError::from(error);
                findings.fail("describe", error.to_string(), advice_for(&error));
                return;
            }
        }
    }
    let hypervisor = &source.hypervisor;
    let report = if remove_orphans { hypervisor.reap_orphans() } else { hypervisor.reap() };
    match report {
        Ok(report) => {
            for what in &report.removed {
                findings.warn(
                    "leftovers",
                    format!("removed what a killed job left: {what}"),
                    "nothing; if this repeats, find out what kills vmtide",
                );
            }
            for what in &report.in_use {
                findings.ok("jobs", format!("another job is at work: {what}"));
            }
            for what in &report.notes {
                findings.warn("leftovers", what.clone(), "see what it says");
            }
            if report.removed.is_empty() && report.notes.is_empty() {
                findings.ok("leftovers", "nothing left by killed jobs");
            }
        }
        Err(error @ HypervisorError::Denied { .. }) => findings.warn(
            "leftovers",
            error.to_string(),
            "nothing, where the account shall only read: each backup of a VM removes what an earlier one left of it",
        ),
        Err(error) => findings.fail(
            "leftovers",
            error.to_string(),
            "remove by hand what begins with vmtide and belongs to no running job",
        ),
    }
}

fn check_config(findings: &mut Findings, config: &VmConfig) {
    let version = config.platform_version.as_deref().unwrap_or("");
    findings.ok(
        "vm",
        format!("{} on {} {version}", config.name, config.platform).trim_end().to_owned(),
    );
    if config.disks.is_empty() {
        findings.fail("disks", "the VM has no disk to back up", "attach one, or leave it out");
        return;
    }
    for disk in &config.disks {
        let format = disk.format.as_deref().unwrap_or("unknown format");
        let detail = format!("{}: {} bytes, {format}", disk.id, disk.size_bytes);
        if config.platform == "qemu" && disk.format.as_deref() == Some("raw") {
            findings.warn(
                "tracking",
                format!("{detail}: a raw image cannot keep dirty bitmaps over a restart of QEMU"),
                "incremental backups work while QEMU runs; for more, convert the image to qcow2",
            );
        } else if config.platform == "image" {
            findings.ok(
                "tracking",
                format!(
                    "{detail}: at rest, so all of it is read unless --changes says what changed"
                ),
            );
        } else if config.platform != "hyper-v" {
            // Hyper-V is asked about every disk itself.
            findings.ok("tracking", format!("{detail}: changes can be tracked"));
        }
    }
}

fn check_state_directory(findings: &mut Findings, directory: &Path) {
    let tried = std::fs::create_dir_all(directory).and_then(|()| files::check_writable(directory));
    match tried {
        Ok(()) => findings.ok("state directory", format!("{} is writable", directory.display())),
        Err(error) => findings.fail(
            "state directory",
            format!("{}: {error}", directory.display()),
            "make it writable for this user, or choose another with --state-dir",
        ),
    }
    check_free_space(findings, directory, "for scratch files of a running backup");
}

fn check_free_space(findings: &mut Findings, directory: &Path, purpose: &str) {
    let Ok(free_bytes) = files::free_bytes(directory) else {
        return;
    };
    let detail = format!(
        "{} MiB free on the file system of {} {purpose}",
        free_bytes >> 20,
        directory.display()
    );
    if free_bytes < LOW_SPACE_BYTES {
        findings.warn("space", detail, "make room, or use a larger file system");
    } else {
        findings.ok("space", detail);
    }
}

/// Looks at a repository that could be opened, in `directory` where it is a local one.
///
/// # Errors
/// None: what fails is among the checks.
pub fn check_repository(repository: &Repository, directory: Option<&Path>) -> Vec<Check> {
    let mut findings = Findings::default();
    let config = repository.config();
    findings.ok(
        "repository",
        format!(
            "{} opens; id {}, chunks of {} KiB, encryption {}",
            repository.location(),
            config.id,
            config.chunk_size_bytes >> 10,
            config.encryption
        ),
    );
    match repository.keys() {
        Ok(KeyList { unreadable, .. }) if !unreadable.is_empty() => findings.warn(
            "keys",
            unreadable.iter().map(|(_, error)| error.to_string()).collect::<Vec<_>>().join("; "),
            "remove with `vmtide key remove` what is no key of yours",
        ),
        Ok(KeyList { keys, .. }) if keys.is_empty() => {
            findings.ok("keys", "not encrypted: no key is needed");
        }
        Ok(KeyList { keys, .. }) if keys.len() == 1 => findings.warn(
            "keys",
            "one key slot: who loses this password loses all backups",
            "add a second password with `vmtide key add` and keep it elsewhere",
        ),
        Ok(KeyList { keys, .. }) => findings.ok("keys", format!("{} key slots", keys.len())),
        Err(error) => findings.fail("keys", error.to_string(), "run `vmtide verify`"),
    }
    check_points(&mut findings, repository);
    if let Some(directory) = directory {
        check_writable(&mut findings, directory);
        check_free_space(&mut findings, directory, "for new backups");
    }
    findings.0
}

fn check_writable(findings: &mut Findings, directory: &Path) {
    match files::check_writable(directory) {
        Ok(()) => findings.ok("rights", "this user may write"),
        Err(error) => findings.warn(
            "rights",
            format!("this user cannot write: {error}"),
            "restores work; for backups give this user the right to write",
        ),
    }
}

fn check_points(findings: &mut Findings, repository: &Repository) {
    let list = match repository.points() {
        Ok(list) => list,
        Err(error) => {
            findings.fail("restore points", error.to_string(), "run `vmtide verify`");
            return;
        }
    };
    for (name, error) in &list.unreadable {
        findings.fail(
            "restore points",
            format!("{name} cannot be read: {error}"),
            "run `vmtide verify`; other restore points do not depend on it",
        );
    }
    findings.ok("restore points", format!("{} can be listed", list.points.len()));
    let mut newest: std::collections::BTreeMap<&str, &RestorePoint> = Default::default();
    for point in &list.points {
        // Sorted by time: the last one stays.
        newest.insert(&point.vm, point);
    }
    for (vm, point) in newest {
        check_newest(findings, vm, point);
    }
}

fn check_newest(findings: &mut Findings, vm: &str, point: &RestorePoint) {
    let age_hours = jiff::Timestamp::now().duration_since(point.time).as_hours();
    if age_hours >= STALE_HOURS {
        findings.warn(
            "age",
            format!("the newest restore point of {vm} is {} days old", age_hours / 24),
            "check the schedule of its backups, or forget the VM",
        );
    }
    for disk in &point.disks {
        if let (false, Some(reason)) = (disk.tracking.used, &disk.tracking.reason) {
            let detail = format!("{vm}, disk {}: last read in full: {reason}", disk.id);
            findings.ok("tracking", detail);
        }
    }
}

fn advice_for(error: &EngineError) -> String {
    use vmtide_hypervisor::HypervisorError as H;
    match error {
        EngineError::Hypervisor(H::Unreachable { .. }) => {
            "check that the VM runs and the socket's path is right".into()
        }
        EngineError::Hypervisor(H::Denied { .. }) => {
            "run as a user who may use it, e.g. root or the VM's user".into()
        }
        EngineError::NotFound { .. } | EngineError::Hypervisor(H::NotFound { .. }) => {
            "check the path or URL".into()
        }
        _ => "see the message".into(),
    }
}

/// A failed attempt to open a repository as the only check.
pub fn cannot_open(location: &str, error: &EngineError) -> Vec<Check> {
    let mut findings = Findings::default();
    findings.fail("repository", error.to_string(), format!("check {location} and the password"));
    findings.0
}

/// Whether checks came out well enough to go on.
///
/// # Errors
/// [`EngineError::Refused`] with the number of checks that failed.
pub fn require_no_failure(checks: &[Check]) -> Result<()> {
    let failed = checks.iter().filter(|check| check.status == CheckStatus::Fail).count();
    if failed == 0 {
        return Ok(());
    }
    Err(EngineError::refused("doctor", format!("{failed} checks failed")))
}
