//! `vmtide prune`: free the space that no restore point needs.

use crate::app::App;
use crate::exit::Exit;
use crate::{repository, units};
use clap::Args;
use jiff::SignedDuration;
use std::time::Duration;
use vmtide_engine::{Result, prune};
use vmtide_repo::{PruneOptions, PruneReport, Repository, WaitsFor};

const ABOUT: &str = "\
Backups, restores and everything else go on meanwhile. What somebody at work may still need stays until
they have ended: the next prune removes it, or this one with --wait.";

const EXAMPLES: &str = "\
Examples:
  vmtide prune -r /backup --dry-run
  vmtide prune -r /backup
  vmtide prune -r /backup --wait 2h             waits for backups that run
  vmtide prune -r /backup --repack-below 80     frees more, rewrites more
  vmtide prune -r s3://backup --max-repack 10GiB";

/// A pack with less than this in use is rewritten: frees half the waste at the price of writing at
/// most as much as is freed.
const REPACK_BELOW_PERCENT: u8 = 50;

/// How many of those that are waited for are named.
const NAMED: usize = 5;

/// The options of `prune`.
#[derive(Debug, Args)]
#[command(long_about = ABOUT, after_help = EXAMPLES)]
pub struct PruneArgs {
    /// Change nothing; show what would be freed, and what stays and why
    #[arg(long)]
    dry_run: bool,
    /// Rewrite packs of which less than so many percent are in use
    #[arg(long, value_name = "PERCENT", default_value_t = REPACK_BELOW_PERCENT)]
    #[arg(value_parser = clap::value_parser!(u8).range(0..=100))]
    repack_below: u8,
    /// Rewrite at most so much in one run, e.g. 10GiB
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size)]
    max_repack: Option<u64>,
    /// Wait at most so long for backups and restores that run, e.g. 30m, 2h
    #[arg(long, value_name = "TIME", value_parser = parse_wait)]
    wait: Option<Duration>,
}

fn parse_wait(text: &str) -> Result<Duration, String> {
    let time: SignedDuration =
        text.parse().map_err(|error| format!("{text:?} is no time such as 30m or 2h: {error}"))?;
    Duration::try_from(time).map_err(|_| format!("{text:?} is less than nothing"))
}

/// The options of a prune that follows something else.
pub fn default_options(dry_run: bool) -> PruneOptions {
    PruneOptions { dry_run, repack_below_percent: REPACK_BELOW_PERCENT, ..PruneOptions::default() }
}

/// Prunes.
pub fn run(app: &App, args: &PruneArgs) -> Result<Exit> {
    let repository = repository::open(app)?;
    let options = PruneOptions {
        repack_below_percent: args.repack_below,
        max_repack_bytes: args.max_repack,
        wait: args.wait.unwrap_or_default(),
        ..default_options(args.dry_run)
    };
    let report = prune_now(app, &repository, &options)?;
    app.output.summary(&report);
    Ok(Exit::Done)
}

/// Prunes an open repository and shows for people what came of it.
pub fn prune_now(
    app: &App,
    repository: &Repository,
    options: &PruneOptions,
) -> Result<PruneReport> {
    let job = app.begin_job()?;
    let report = job.run(app, |context| prune(repository, options, context))?;
    let tense = if options.dry_run { "would be " } else { "" };
    app.output.line(format!(
        "{} {tense}freed: {} packs removed, {} rewritten ({}), {} kept",
        units::size(report.freed_bytes),
        report.packs_removed,
        report.packs_repacked,
        units::size(report.rewritten_bytes),
        report.packs_kept,
    ));
    app.output.lines(what_stays(&report));
    Ok(report)
}

/// What is not needed and stays all the same, and why; a line each.
fn what_stays(report: &PruneReport) -> Vec<String> {
    let mut lines = Vec::new();
    if report.waiting_objects > 0 {
        let named = report.waits_for.iter().take(NAMED).map(name);
        let more = report.waits_for.len().saturating_sub(NAMED);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        lines.push(format!(
            "{} objects ({}) wait for those who were at work before: {}{more}",
            report.waiting_objects,
            units::size(report.waiting_bytes),
            named.collect::<Vec<_>>().join(", "),
        ));
    }
    if report.new_objects > 0 {
        lines.push(format!(
            "{} objects are as new as a backup that runs, and perhaps part of it; a later prune looks \
             at them",
            report.new_objects
        ));
    }
    if report.locked_objects > 0 {
        let until = report.locked_until.map(|until| format!(" until {}", units::time(until)));
        lines.push(format!(
            "{} objects are immutable{}, and go after that",
            report.locked_objects,
            until.unwrap_or_default()
        ));
    }
    if report.needed_after_all > 0 {
        lines.push(format!(
            "{} objects that were to go are needed again and stay",
            report.needed_after_all
        ));
    }
    if report.leases_revoked > 0 {
        lines.push(format!("{} jobs were found dead", report.leases_revoked));
    }
    lines
}

fn name(waits: &WaitsFor) -> String {
    let what = waits.purpose.map_or_else(|| "somebody".into(), |purpose| purpose.to_string());
    let host = if waits.host.is_empty() { String::new() } else { format!(" on {}", waits.host) };
    let since = waits.since.map(|since| format!(" since {}", units::time(since)));
    format!("{what}{host}{}", since.unwrap_or_default())
}
