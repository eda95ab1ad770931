//! `vmtide stats`: how much a repository holds.

use crate::app::App;
use crate::exit::Exit;
use crate::{repository, units};
use clap::Args;
use vmtide_engine::Result;

const EXAMPLES: &str = "\
Examples:
  vmtide stats -r /backup
  vmtide stats -r /backup --json";

/// The options of `stats`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct StatsArgs {}

/// Shows them.
pub fn run(app: &App, _args: &StatsArgs) -> Result<Exit> {
    let repository = repository::open(app)?;
    let stats = repository.stats()?;
    let line = |name: &str, value: String| app.output.line(format!("{name:<24} {value}"));
    line("restore points", stats.points.to_string());
    line("their disks", units::size(stats.virtual_bytes));
    line("packs", stats.packs.to_string());
    line("data in packs", units::size(stats.pack_bytes));
    line("maps, index and points", units::size(stats.metadata_bytes));
    app.output.summary(&stats);
    Ok(Exit::Done)
}
