//! `vmtide prune`: free the space that no restore point needs.

use crate::app::App;
use crate::exit::Exit;
use crate::{repository, units};
use clap::Args;
use vmtide_engine::{Result, prune};
use vmtide_repo::{PruneOptions, PruneReport, Repository};

const EXAMPLES: &str = "\
Examples:
  vmtide prune -r /backup --dry-run
  vmtide prune -r /backup
  vmtide prune -r /backup --repack-below 80     frees more, rewrites more";

/// A pack with less than this in use is rewritten: frees half the waste at the price of writing at
/// most as much as is freed.
const REPACK_BELOW_PERCENT: u8 = 50;

/// The options of `prune`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct PruneArgs {
    /// Change nothing; show what would be freed
    #[arg(long)]
    dry_run: bool,
    /// Rewrite packs of which less than so many percent are in use
    #[arg(long, value_name = "PERCENT", default_value_t = REPACK_BELOW_PERCENT)]
    #[arg(value_parser = clap::value_parser!(u8).range(0..=100))]
    repack_below: u8,
}

/// The options of a prune that follows something else.
pub fn default_options(dry_run: bool) -> PruneOptions {
    PruneOptions { dry_run, repack_below_percent: REPACK_BELOW_PERCENT }
}

/// Prunes.
pub fn run(app: &App, args: &PruneArgs) -> Result<Exit> {
    let repository = repository::open(app)?;
    let options =
        PruneOptions { repack_below_percent: args.repack_below, ..default_options(args.dry_run) };
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
    Ok(report)
}
