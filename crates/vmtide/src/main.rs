//! The command line of vmtide.
//!
//! `main` reads arguments and settings, one file in [`commands`] runs each command, and
//! [`exit`] turns what came of it into the exit code. Everything that does the work is in
//! `vmtide-engine`.

mod agents;
mod app;
mod cli;
mod commands;
mod exit;
mod hyperv;
mod logging;
mod output;
mod passwords;
mod places;
mod progress;
mod repository;
mod s3;
mod settings;
mod signals;
mod table;
mod units;

use std::process::ExitCode;

fn main() -> ExitCode {
    app::run(std::env::args_os().collect())
}
