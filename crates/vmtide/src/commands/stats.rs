//! `vmtide stats`: how much a repository holds.

use crate::app::App;
use crate::exit::Exit;
use crate::{repository, units};
use clap::Args;
use serde_json::Value;
use vmtide_engine::{EngineError, Result};

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
    let value = serde_json::to_value(stats)
        .map_err(|error| EngineError::refused("show the statistics", error.to_string()))?;
    if let Value::Object(fields) = &value {
        for (name, value) in fields {
            let title = name.trim_end_matches("_bytes").replace('_', " ");
            let text = match (name.ends_with("_bytes"), value.as_u64()) {
                (true, Some(bytes)) => units::size(bytes),
                (_, _) => value.to_string(),
            };
            app.output.line(format!("{title:<24} {text}"));
        }
    }
    app.output.summary(&stats);
    Ok(Exit::Done)
}
