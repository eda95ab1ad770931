//! `vmtide backup` of many VMs of one host.

use crate::app::{App, Job};
use crate::commands::backup::{self, BackupArgs};
use crate::exit::{self, Exit};
use crate::output::OfVm;
use clap::Args;
use serde::Serialize;
use vmtide_engine::source::{OpenSource, SourceSpec};
use vmtide_engine::{EngineError, JobContext, Limits, Result, run_limited};
use vmtide_hypervisor::{Hypervisor, VmSelector, VmSummary, volume_of};
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
        Exit::with_warnings(summary.with_warnings > 0)
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
            VmResult { vm, id, exit_code, point: Some(summary.point), error: None }
        }
        Err(error) => {
            let exit = exit::of_error(&error);
            app.output.error(&format!("{vm}: {error}"), exit);
            VmResult { vm, id, exit_code: exit.code(), point: None, error: Some(error.to_string()) }
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
        results,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(exit: Exit) -> Option<VmResult> {
        let error = (exit == Exit::Denied).then(|| "no".to_owned());
        Some(VmResult { vm: "web".into(), id: None, exit_code: exit.code(), point: None, error })
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
}
