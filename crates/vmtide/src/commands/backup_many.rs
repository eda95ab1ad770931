//! `vmtide backup` of many VMs of one host.

use crate::app::{App, Job};
use crate::commands::backup::{self, BackupArgs};
use crate::exit::{self, Exit};
use crate::output::OfVm;
use clap::Args;
use serde::Serialize;
use vmtide_engine::source::{OpenSource, SourceSpec};
use vmtide_engine::{EngineError, JobContext, Limits, Result, run_limited};
use vmtide_hypervisor::{DiskId, Hypervisor, VmSelector, VmSummary, volume_of};
use vmtide_repo::{ObjectId, Repository};

/// The options for many VMs.
#[derive(Debug, Args)]
pub struct ManyArgs {
    /// Back up so many VMs of a selection at a time
    #[arg(long, value_name = "NUMBER", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    parallel: u16,
    /// But at most so many with disks on the same volume of the host
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=64))]
    parallel_per_volume: Option<u16>,
    /// Leave VMs out of a selection, by name, id, pattern or tag:NAME; may be repeated
    #[arg(long, value_name = "VM", value_parser = parse_selector)]
    exclude_vm: Vec<VmSelector>,
}

fn parse_selector(text: &str) -> std::result::Result<VmSelector, String> {
    text.parse()
}

/// A selection of VMs to back up.
pub struct Many<'a> {
    /// The options of the command.
    pub args: &'a BackupArgs,
    /// Where to.
    pub repository: &'a Repository,
    /// The source as it was written.
    pub spec: &'a SourceSpec,
    /// The source.
    pub open: &'a OpenSource,
    /// The VMs.
    pub vms: Vec<VmSummary>,
}

/// The VMs that a source selects; none where it is one VM.
///
/// # Errors
/// [`EngineError::Usage`] where no VM is named, [`EngineError::NotFound`] where none is selected.
pub fn select(args: &ManyArgs, open: &OpenSource) -> Result<Option<Vec<VmSummary>>> {
    let hypervisor = open.hypervisor.as_ref();
    if !hypervisor.has_lasting_ids() {
        return Ok(None);
    }
    let selector: VmSelector = open
        .vm
        .parse()
        .map_err(|error| EngineError::usage(format!("{}: {error}", open.display)))?;
    if !selector.is_many() {
        return Ok(None);
    }
    if open.name.is_some() {
        return Err(EngineError::usage("--name is for one VM, and this selects several"));
    }
    let mut vms = hypervisor.select(&selector)?;
    for excluded in &args.exclude_vm {
        let out: Vec<VmSummary> = hypervisor.select(excluded)?;
        vms.retain(|vm| !out.iter().any(|other| (&other.id, &other.name) == (&vm.id, &vm.name)));
    }
    if vms.is_empty() {
        return Err(EngineError::NotFound {
            what: format!("a VM that {} selects", open.display),
            hint: "`vmtide vm list` shows the VMs of the host".into(),
        });
    }
    Ok(Some(vms))
}

/// What came of one VM, for the last summary event.
#[derive(Debug, Serialize)]
struct VmResult {
    vm: String,
    id: Option<String>,
    exit_code: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    point: Option<ObjectId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// The disks to leave out that it does not have; none where it was not backed up.
    #[serde(skip)]
    unknown_exclusions: Option<Vec<DiskId>>,
}

/// The last summary event.
#[derive(Debug, Serialize)]
struct ManySummary {
    vms: usize,
    done: usize,
    with_warnings: usize,
    failed: usize,
    not_begun: usize,
    results: Vec<VmResult>,
    /// What the user should know of the selection as a whole, one line each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

/// Backs them up. Answers with 1 where any failed, 3 where any has warnings.
///
/// # Errors
/// Where nothing could be begun.
pub fn run(app: &App, many: &Many<'_>, job: &Job) -> Result<Exit> {
    let options = &many.args.many;
    let limits = Limits {
        parallel: options.parallel.into(),
        per_volume: options.parallel_per_volume.map(usize::from),
    };
    let results = job.run(app, |context| {
        Ok(run_limited(
            &many.vms,
            |vm| volumes(many.open.hypervisor.as_ref(), limits, vm),
            limits,
            context.cancel,
            |vm| one(app, many, limits, vm, context),
        ))
    })?;
    let summary = summary(results, many.vms.len());
    summary.warnings.iter().for_each(|warning| app.output.warning(warning));
    app.output.line(format!(
        "{} of {} VMs backed up, {} with warnings, {} failed{}",
        summary.done,
        summary.vms,
        summary.with_warnings,
        summary.failed,
        if summary.not_begun > 0 {
            format!(", {} not begun", summary.not_begun)
        } else {
            String::new()
        }
    ));
    app.output.summary(&summary);
    Ok(if job.is_interrupted() && summary.done < summary.vms {
        Exit::Interrupted
    } else if summary.failed > 0 {
        Exit::Failed
    } else {
        Exit::with_warnings(summary.with_warnings > 0 || !summary.warnings.is_empty())
    })
}

/// The volumes of a VM's disks, where they matter. A VM that cannot be described is on none; its backup tells why.
fn volumes(hypervisor: &dyn Hypervisor, limits: Limits, vm: &VmSummary) -> Vec<String> {
    if limits.per_volume.is_none() {
        return Vec::new();
    }
    let disks = hypervisor.describe(key_of(vm)).map(|config| config.disks).unwrap_or_default();
    let paths = disks.into_iter().filter_map(|disk| disk.path);
    let mut volumes: Vec<String> = paths.map(|path| volume_of(&path)).collect();
    volumes.sort();
    volumes.dedup();
    volumes
}

/// What names a VM for certain.
fn key_of(vm: &VmSummary) -> &str {
    vm.id.as_deref().unwrap_or(&vm.name)
}

fn one(
    app: &App,
    many: &Many<'_>,
    limits: Limits,
    vm: &VmSummary,
    context: JobContext<'_>,
) -> VmResult {
    let observer = OfVm { output: &app.output, vm: &vm.name };
    let context = JobContext { observer: &observer, ..context };
    let backed_up = backup::backup_job(many.args, many.repository, many.open.hypervisor.as_ref())
        .and_then(|mut job| {
            job.vm = key_of(vm).to_owned();
            job.is_one_of_many = true;
            job.source = many.spec.of_vm(&vm.name).display();
            if many.args.workers.is_none() {
                // Together they have as many as one alone would: memory and cores are those of one machine.
                job.options.workers = (job.options.workers / limits.parallel.max(1)).max(2);
            }
            vmtide_engine::backup(&job, context)
        });
    let (vm, id) = (vm.name.clone(), vm.id.clone());
    match backed_up {
        Ok(summary) => {
            backup::show(app, &summary);
            app.output.summary(&summary);
            let exit_code = Exit::with_warnings(!summary.warnings.is_empty()).code();
            VmResult {
                vm,
                id,
                exit_code,
                point: Some(summary.point),
                error: None,
                unknown_exclusions: Some(summary.unknown_exclusions),
            }
        }
        Err(error) => {
            let exit = exit::of_error(&error);
            app.output.error(&format!("{vm}: {error}"), exit);
            VmResult {
                vm,
                id,
                exit_code: exit.code(),
                point: None,
                error: Some(error.to_string()),
                unknown_exclusions: None,
            }
        }
    }
}

fn summary(results: Vec<Option<VmResult>>, vms: usize) -> ManySummary {
    let results: Vec<VmResult> = results.into_iter().flatten().collect();
    let count = |codes: &[Exit]| {
        results.iter().filter(|one| codes.iter().any(|exit| exit.code() == one.exit_code)).count()
    };
    let done = count(&[Exit::Done, Exit::Warnings]);
    ManySummary {
        vms,
        done,
        with_warnings: count(&[Exit::Warnings]),
        failed: results.len() - done,
        not_begun: vms - results.len(),
        warnings: unknown_to_all(&results),
        results,
    }
}

/// A warning of each disk to be left out that none of the VMs has which were backed up.
fn unknown_to_all(results: &[VmResult]) -> Vec<String> {
    let mut of_vms = results.iter().filter_map(|one| one.unknown_exclusions.as_ref());
    let mut unknown = of_vms.next().cloned().unwrap_or_default();
    of_vms.for_each(|other| unknown.retain(|disk| other.contains(disk)));
    let told = |disk: DiskId| {
        format!("disk {disk} to be left out is no disk of any VM that was backed up")
    };
    unknown.into_iter().map(told).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(exit: Exit) -> Option<VmResult> {
        let error = (exit == Exit::Denied).then(|| "no".to_owned());
        Some(VmResult {
            vm: "web".into(),
            id: None,
            exit_code: exit.code(),
            point: None,
            error,
            unknown_exclusions: None,
        })
    }

    #[test]
    fn results_are_counted_by_how_they_ended() {
        let all = vec![result(Exit::Done), result(Exit::Warnings), result(Exit::Denied), None];
        let summary = summary(all, 4);
        assert_eq!(
            (summary.done, summary.with_warnings, summary.failed, summary.not_begun),
            (2, 1, 1, 1)
        );
        let json = serde_json::to_value(&summary).unwrap();
        assert_eq!(json["results"][2]["exit_code"], 4);
        assert!(json["results"][0].get("error").is_none());
    }

    #[test]
    fn a_disk_to_leave_out_is_warned_of_where_no_vm_has_it() {
        let with = |exit, unknown: Option<&[&str]>| {
            let unknown = unknown.map(|ids| ids.iter().map(|id| DiskId((*id).into())).collect());
            result(exit).map(|one| VmResult { unknown_exclusions: unknown, ..one })
        };
        let all = |results| summary(results, 9).warnings;
        let first = with(Exit::Done, Some(&["scsi0:1", "scsi0:9"]));
        let second = with(Exit::Done, Some(&["scsi0:9"]));
        let told = all(vec![with(Exit::Failed, None), first, second, None]);
        assert_eq!(told, ["disk scsi0:9 to be left out is no disk of any VM that was backed up"]);
        assert!(all(vec![with(Exit::Failed, None)]).is_empty());
        assert!(all(vec![with(Exit::Done, Some(&["a"])), with(Exit::Done, Some(&[]))]).is_empty());
    }
}
