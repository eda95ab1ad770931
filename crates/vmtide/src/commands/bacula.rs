//! `vmtide bacula-backend`: the process behind the plugin for Bacula's file daemon. Started by the plugin
//! alone, which talks to it over standard input and output (`docs/bacula-protocol.md`).

use crate::app::App;
use crate::exit::Exit;
use crate::signals;
use clap::Args;
use std::fs::File;
use vmtide_bacula::link::Link;
use vmtide_bacula::{BackendError, BackendOptions};
use vmtide_engine::{EngineError, Result};

/// The options of `bacula-backend`: none of its own.
#[derive(Debug, Args)]
pub struct BaculaArgs {}

/// Does one job of the plugin.
pub fn run(app: &App, _: &BaculaArgs) -> Result<Exit> {
    let cancel = signals::cancel_on_signals()?;
    let (input, output) =
        pipe().map_err(|error| EngineError::io("take the plugin's pipe", error))?;
    let mut link = Link::new(Box::new(input), Box::new(output), cancel);
    let (agents, hyperv) = (app.global.agents.clone(), app.global.hyperv.clone());
    let options = BackendOptions {
        agent: Box::new(move |source| agents.options(source)),
        hyperv: Box::new(move |source| hyperv.options(source)),
        state_directory: app.state_directory(),
        guardian: std::env::current_exe().ok(),
    };
    match vmtide_bacula::run(&mut link, &options) {
        Ok(()) => Ok(Exit::Done),
        // The reason is in the job's report; standard error is the backend's log.
        Err(BackendError::Engine(error)) => Err(error),
        Err(error) => Err(EngineError::refused("the job failed", error.to_string())),
    }
}

/// Standard input and output without the buffers of the standard library, which cut data at line feeds.
#[cfg(unix)]
fn pipe() -> std::io::Result<(File, File)> {
    use std::os::fd::AsFd;
    let input = std::io::stdin().as_fd().try_clone_to_owned()?;
    let output = std::io::stdout().as_fd().try_clone_to_owned()?;
    Ok((File::from(input), File::from(output)))
}

/// Standard input and output without the buffers of the standard library, which cut data at line feeds.
#[cfg(windows)]
fn pipe() -> std::io::Result<(File, File)> {
    use std::os::windows::io::AsHandle;
    let input = std::io::stdin().as_handle().try_clone_to_owned()?;
    let output = std::io::stdout().as_handle().try_clone_to_owned()?;
    Ok((File::from(input), File::from(output)))
}
