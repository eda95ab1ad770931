//! `vmtide doctor`: what does not work, and what to do.

use crate::app::App;
use crate::exit::Exit;
use crate::passwords::PasswordSource;
use crate::{repository, s3};
use clap::Args;
use std::sync::Arc;
use vmtide_engine::doctor::{self, Check, CheckStatus};
use vmtide_engine::source::{SourceOptions, SourceSpec, split_scheme};
use vmtide_engine::{EngineError, Result};
use vmtide_s3::S3Store;

const EXAMPLES: &str = "\
Examples:
  vmtide doctor qemu+unix:///run/web.qmp     a source: reachable, tracking, leftovers of killed jobs
  vmtide doctor hyperv+winrm://hv1/web        a Hyper-V host: logins, rights, versions, leftovers, space
  vmtide doctor hyperv+winrm://hv1 --remove-leftovers
                                             also what another, lost installation of vmtide left
  vmtide doctor /backup                      a repository: opens, keys, restore points, rights, space
  vmtide doctor s3://backups/vm              also: which guarantees the server gives

Removes on a source what killed jobs left there, as the next backup would. What carries vmtide's name but belongs
to no job that this state directory knows is told, and removed with --remove-leftovers.
Ends with code 1 where something fails, 3 where something should be looked at.";

/// The options of `doctor`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct DoctorArgs {
    /// Sources and repositories [default: the repository of -r]
    #[arg(value_name = "SOURCE|REPO")]
    target: Vec<String>,
    /// Remove from a source also what carries vmtide's name but belongs to no job that is known here; only where no
    /// other installation of vmtide backs it up at the moment
    #[arg(long)]
    remove_leftovers: bool,
}

/// Looks all of them over.
pub fn run(app: &App, args: &DoctorArgs) -> Result<Exit> {
    let targets = match (args.target.is_empty(), &app.global.repository) {
        (false, _) => args.target.clone(),
        (true, Some(repository)) => vec![repository.clone()],
        (true, None) => {
            return Err(EngineError::usage("nothing to look at: give a SOURCE or a REPO"));
        }
    };
    let mut all = Vec::new();
    for target in &targets {
        let checks = check(app, target, args.remove_leftovers)?;
        show(app, target, &checks);
        for check in &checks {
            let event = serde_json::json!({ "target": target, "check": check });
            app.output.event("check", &event);
        }
        all.extend(checks);
    }
    let status = doctor::worst(&all);
    app.output.summary(&serde_json::json!({ "status": status, "checks": all }));
    Ok(match status {
        CheckStatus::Ok => Exit::Done,
        CheckStatus::Warn => Exit::Warnings,
        CheckStatus::Fail => Exit::Failed,
    })
}

fn check(app: &App, target: &str, remove_leftovers: bool) -> Result<Vec<Check>> {
    if !is_repository(target) {
        let spec = SourceSpec::parse(target)?;
        let options = SourceOptions {
            state_directory: app.state_directory(),
            agent: app.global.agents.options(target)?,
            hyperv: app.global.hyperv.options(target)?,
            ..SourceOptions::default()
        };
        return Ok(if remove_leftovers {
            doctor::check_source_and_remove_orphans(&spec, &options)
        } else {
            doctor::check_source(&spec, &options)
        });
    }
    if repository::is_s3(target) {
        return check_s3(app, target);
    }
    let directory = repository::directory_of(target)?;
    Ok(match repository::open_at(app, target) {
        Ok(repository) => doctor::check_repository(&repository, Some(&directory)),
        Err(error) => doctor::cannot_open(target, &error),
    })
}

/// What the server guarantees, then the repository on it.
fn check_s3(app: &App, target: &str) -> Result<Vec<Check>> {
    let store = S3Store::connect(&app.global.s3.options(target)?)?;
    let mut checks = s3::check(&store);
    let source = PasswordSource::of_repository(&app.global.password);
    checks.extend(match repository::open_in(Arc::new(store), &source) {
        Ok(repository) => doctor::check_repository(&repository, None),
        Err(error) => doctor::cannot_open(target, &error),
    });
    Ok(checks)
}

/// Directories are repositories, files and URLs of platforms are sources.
fn is_repository(target: &str) -> bool {
    let path = match split_scheme(target) {
        None => target,
        Some(("file", rest)) => rest,
        Some(("s3", _)) => return true,
        Some(_) => return false,
    };
    std::path::Path::new(path).is_dir()
}

fn show(app: &App, target: &str, checks: &[Check]) {
    app.output.line(target);
    for check in checks {
        let word = match check.status {
            CheckStatus::Ok => "ok",
            CheckStatus::Warn => "WARN",
            CheckStatus::Fail => "FAIL",
        };
        app.output.line(format!("  {word:<4}  {}: {}", check.name, check.detail));
        if let Some(advice) = &check.advice {
            app.output.line(format!("        → {advice}"));
        }
    }
}
