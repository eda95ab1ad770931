//! `vmtide man`: manual pages.

use crate::app::App;
use crate::cli::Cli;
use crate::exit::Exit;
use clap::{Args, CommandFactory};
use std::path::PathBuf;
use vmtide_engine::{EngineError, Result};

const EXAMPLES: &str = "\
Example:
  vmtide man /usr/local/share/man/man1";

/// The options of `man`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ManArgs {
    /// Where to write vmtide.1, vmtide-backup.1, …; made where it is missing
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Writes the pages.
pub fn run(app: &App, args: &ManArgs) -> Result<Exit> {
    let io = |error| {
        EngineError::io(format!("write man pages into {}", args.directory.display()), error)
    };
    std::fs::create_dir_all(&args.directory).map_err(io)?;
    clap_mangen::generate_to(Cli::command(), &args.directory).map_err(io)?;
    app.output.remark(format!("man pages written into {}", args.directory.display()));
    app.output.summary(&serde_json::json!({ "directory": args.directory.display().to_string() }));
    Ok(Exit::Done)
}
