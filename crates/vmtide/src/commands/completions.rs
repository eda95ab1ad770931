//! `vmtide completions`: completion scripts for shells.

use crate::app::App;
use crate::cli::Cli;
use crate::exit::Exit;
use clap::{Args, CommandFactory};
use clap_complete::Shell;
use std::io::Write;
use vmtide_engine::{EngineError, Result};

const EXAMPLES: &str = "\
Examples:
  vmtide completions bash > /etc/bash_completion.d/vmtide
  vmtide completions zsh > ~/.zfunc/_vmtide
  vmtide completions fish > ~/.config/fish/completions/vmtide.fish";

/// The options of `completions`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// Writes the script.
pub fn run(_app: &App, args: &CompletionsArgs) -> Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "vmtide", &mut script);
    std::io::stdout()
        .lock()
        .write_all(&script)
        .map_err(|error| EngineError::io("write the completion script", error))?;
    Ok(Exit::Done)
}
