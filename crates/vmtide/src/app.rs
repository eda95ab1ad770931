//! One run of the program: from the words of the command line to the exit code.

use crate::cli::{Cli, Command, GlobalArgs};
use crate::commands;
use crate::exit::{self, Exit};
use crate::output::Output;
use crate::progress::ProgressDisplay;
use crate::{logging, places, settings, signals};
use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use vmtide_block::{CancelToken, Progress};
use vmtide_engine::{EngineError, JobContext, Result};

/// What every command works with.
pub struct App {
    /// The options of all commands.
    pub global: GlobalArgs,
    /// Standard output and standard error.
    pub output: Arc<Output>,
}

/// Runs the program.
pub fn run(words: Vec<OsString>) -> ExitCode {
    // Started by vmtide itself beside a frozen guest: no settings, no help, no signals of ours.
    #[cfg(unix)]
    if words.get(1).is_some_and(|word| word == commands::guardian::NAME) {
        return commands::guardian::run(&words[2..]);
    }
    let exit = match parse(&words) {
        Ok(cli) => run_command(cli),
        Err(NotParsed::Shown(exit)) => exit,
        Err(NotParsed::Settings(error)) => {
            let exit = exit::of_error(&error);
            Output::new(wants_json(&words), false).error(&error.to_string(), exit);
            exit
        }
    };
    ExitCode::from(exit.code())
}

/// Why there is no command to run.
enum NotParsed {
    /// Help, or what is wrong with the command line, is shown already.
    Shown(Exit),
    /// The settings file.
    Settings(EngineError),
}

fn parse(words: &[OsString]) -> std::result::Result<Cli, NotParsed> {
    let command = settings::apply(Cli::command(), words).map_err(NotParsed::Settings)?;
    let parsed =
        command.try_get_matches_from(words).and_then(|matches| Cli::from_arg_matches(&matches));
    parsed.map_err(|error| {
        if wants_json(words) && error.use_stderr() {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default();
            let message = first.strip_prefix("error: ").unwrap_or(first);
            Output::new(true, false).error(message, Exit::Usage);
            return NotParsed::Shown(Exit::Usage);
        }
        // Nobody reads what cannot be written.
        let _ = error.print();
        NotParsed::Shown(match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Exit::Done,
            _ => Exit::Usage,
        })
    })
}

fn wants_json(words: &[OsString]) -> bool {
    words.iter().take_while(|word| *word != "--").any(|word| word == "--json")
}

fn run_command(cli: Cli) -> Exit {
    logging::start(&cli.global);
    let app = App {
        output: Arc::new(Output::new(cli.global.json, cli.global.quiet)),
        global: cli.global,
    };
    match dispatch(&app, cli.command) {
        Ok(exit) => exit,
        Err(error) => app.failed(&error),
    }
}

fn dispatch(app: &App, command: Command) -> Result<Exit> {
    match command {
        Command::Init(args) => commands::init::run(app, &args),
        Command::Backup(args) => commands::backup::run(app, &args),
        Command::Points(args) => commands::points::run(app, &args),
        Command::Show(args) => commands::show::run(app, &args),
        Command::Diff(args) => commands::diff::run(app, &args),
        Command::Restore(args) => commands::restore::run(app, &args),
        Command::Verify(args) => commands::verify::run(app, &args),
        Command::Repair(args) => commands::repair::run(app, &args),
        Command::Forget(args) => commands::forget::run(app, &args),
        Command::Hold(args) => commands::hold::run(app, &args),
        Command::Prune(args) => commands::prune::run(app, &args),
        Command::Copy(args) => commands::copy::run(app, &args),
        Command::Key(args) => commands::key::run(app, &args),
        Command::Info(args) => commands::info::run(app, &args),
        Command::Map(args) => commands::map::run(app, &args),
        Command::Check(args) => commands::check::run(app, &args),
        Command::Compare(args) => commands::compare::run(app, &args),
        Command::Create(args) => commands::create::run(app, &args),
        Command::Resize(args) => commands::resize::run(app, &args),
        Command::Convert(args) => commands::convert::run(app, &args),
        Command::Chain(args) => commands::chain::run(app, &args),
        Command::Delta(args) => commands::delta::run(app, &args),
        Command::Serve(args) => commands::serve::run(app, &args),
        Command::Agent(args) => commands::agent::run(app, &args),
        Command::Track(args) => commands::track::run(app, &args),
        Command::Vm(args) => commands::vm::run(app, &args),
        Command::Doctor(args) => commands::doctor::run(app, &args),
        Command::Stats(args) => commands::stats::run(app, &args),
        Command::Bench(args) => commands::bench::run(app, &args),
        Command::BaculaBackend(args) => commands::bacula::run(app, &args),
        Command::Completions(args) => commands::completions::run(app, &args),
        Command::Man(args) => commands::man::run(app, &args),
    }
}

impl App {
    /// Shows an error. Answers with how the run ends.
    pub fn failed(&self, error: &EngineError) -> Exit {
        let exit = exit::of_error(error);
        self.output.error(&error.to_string(), exit);
        exit
    }

    /// Begins a job that the user can watch and interrupt.
    ///
    /// # Errors
    /// Where signals cannot be handled.
    pub fn begin_job(&self) -> Result<Job> {
        Ok(Job { cancel: signals::cancel_on_signals()? })
    }

    /// Where journals and locks are kept.
    pub fn state_directory(&self) -> PathBuf {
        self.global.state_dir.clone().unwrap_or_else(places::state_directory)
    }
}

/// A job that the user can watch and interrupt.
pub struct Job {
    cancel: CancelToken,
}

impl Job {
    /// Whether the user interrupted it.
    pub fn is_interrupted(&self) -> bool {
        self.cancel.is_cancelled()
    }

    /// What an interruption cancels.
    pub const fn cancel(&self) -> &CancelToken {
        &self.cancel
    }

    /// Runs one step with its progress shown. A step that fails after the user interrupted it was
    /// interrupted, whatever it says.
    ///
    /// # Errors
    /// Those of the step.
    pub fn run<T>(&self, app: &App, step: impl FnOnce(JobContext<'_>) -> Result<T>) -> Result<T> {
        let progress = Arc::new(Progress::new());
        let display =
            ProgressDisplay::start(&app.output, &progress, &self.cancel, app.global.verbose == 0);
        let result = step(JobContext {
            progress: &progress,
            cancel: &self.cancel,
            observer: app.output.as_ref(),
        });
        drop(display);
        match result {
            Err(error) if self.is_interrupted() => {
                tracing::info!(%error, "interrupted");
                Err(interrupted(error))
            }
            other => other,
        }
    }
}

/// The interruption that stands for `error`; what it left half done is still told.
fn interrupted(error: EngineError) -> EngineError {
    let cancelled = EngineError::from(vmtide_block::BlockError::Cancelled);
    match error {
        EngineError::Incomplete { target, .. } => {
            EngineError::Incomplete { target, source: Box::new(cancelled) }
        }
        _ => cancelled,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupted_overwrite_says_so() {
        let error = interrupted(EngineError::Incomplete {
            target: "/dev/vg/web".into(),
            source: Box::new(EngineError::refused("x", "y")),
        });
        assert_eq!(exit::of_error(&error), Exit::Interrupted);
        assert_eq!(
            error.to_string(),
            "interrupted; /dev/vg/web is incomplete now: restore it again"
        );
        let error = interrupted(EngineError::refused("x", "y"));
        assert_eq!(error.to_string(), "interrupted");
    }
}
