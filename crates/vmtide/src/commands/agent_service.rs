//! `vmtide agent service`: the agent as a service of Windows.

use super::agent::ServeAgentArgs;
use crate::app::App;
use crate::exit::Exit;
use clap::{Args, Subcommand, ValueHint};
use std::path::PathBuf;
use vmtide_engine::Result;

/// The name of the service where none is given.
const DEFAULT_NAME: &str = "vmtide-agent";

const EXAMPLES: &str = "\
On Windows, as administrator. The service runs as LocalSystem, starts with Windows, and is started again when it
fails. What it writes goes to agent.log in the state directory, which is %ProgramData%\\vmtide where --state-dir
does not say otherwise, and which only administrators can read then; from 16 MiB on it begins anew, and the older
part is agent.log.old. On Linux see packaging/systemd.

Examples:
  vmtide agent key add backup --auth-key-file \"C:\\Program Files\\vmtide\\keys\"
  vmtide agent service install --root D:\\VHDS --auth-key-file \"C:\\Program Files\\vmtide\\keys\"
  vmtide agent service start
  vmtide agent service stop
  vmtide agent service remove";

/// The options of `agent service`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ServiceArgs {
    #[command(subcommand)]
    command: ServiceCommand,
}

#[derive(Debug, Subcommand)]
enum ServiceCommand {
    /// Install the agent, with the options it shall have
    Install(RunArgs),
    /// Start it and wait until it answers
    Start(NameArgs),
    /// Stop it and wait until running requests have ended
    Stop(NameArgs),
    /// Stop it and remove it; keys, certificate and logs stay
    Remove(NameArgs),
    /// Run as the service: what Windows calls
    Run(RunArgs),
}

#[derive(Debug, Args)]
struct NameArgs {
    /// The name of the service
    #[arg(long, value_name = "NAME", default_value = DEFAULT_NAME)]
    name: String,
}

#[derive(Debug, Args)]
struct RunArgs {
    #[command(flatten)]
    name: NameArgs,
    /// Where its output goes [default: agent.log in the state directory]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    log_file: Option<PathBuf>,
    #[command(flatten)]
    serve: ServeAgentArgs,
}

/// Does it.
#[cfg(windows)]
pub fn run(app: &App, args: &ServiceArgs) -> Result<Exit> {
    match &args.command {
        ServiceCommand::Install(args) => windows::install(app, args),
        ServiceCommand::Start(args) => windows::start(app, &args.name),
        ServiceCommand::Stop(args) => windows::stop(app, &args.name),
        ServiceCommand::Remove(args) => windows::remove(app, &args.name),
        ServiceCommand::Run(args) => windows::run(app, args),
    }
}

/// There are none.
#[cfg(not(windows))]
pub fn run(_: &App, args: &ServiceArgs) -> Result<Exit> {
    let name = match &args.command {
        ServiceCommand::Install(args) | ServiceCommand::Run(args) => {
            let _ = (&args.log_file, &args.serve);
            &args.name.name
        }
        ServiceCommand::Start(args) | ServiceCommand::Stop(args) | ServiceCommand::Remove(args) => {
            &args.name
        }
    };
    Err(vmtide_engine::EngineError::usage(format!(
        "service {name}: services of Windows are on Windows only; on Linux use the unit in packaging/systemd"
    )))
}

#[cfg(windows)]
mod windows {
    use super::RunArgs;
    use crate::app::App;
    use crate::commands::agent::{engine_error, tell};
    use crate::commands::log_limit;
    use crate::exit::Exit;
    use std::ffi::OsString;
    use std::fs::File;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;
    use std::time::Duration;
    use vmtide_block::CancelToken;
    use vmtide_engine::{EngineError, Result};
    use vmtide_service_ffi::{self as service, NewService, ServiceError};

    /// How long a start may take: the certificate is made at the first one.
    const START_WITHIN: Duration = Duration::from_secs(60);
    /// How long a stop may take: running requests are given 20 s.
    const STOP_WITHIN: Duration = Duration::from_secs(60);

    fn failed(error: ServiceError) -> EngineError {
        const NO_SUCH_SERVICE: u32 = 1060;
        match error.code() {
            Some(NO_SUCH_SERVICE) => EngineError::NotFound {
                what: error.to_string(),
                hint: "see `vmtide agent service install`".into(),
            },
            _ => EngineError::refused("service", error.to_string()),
        }
    }

    pub fn install(app: &App, args: &RunArgs) -> Result<Exit> {
        args.serve.options(app)?;
        let state = match &app.global.state_dir {
            Some(directory) => absolute(directory)?,
            None => default_state_directory()?,
        };
        let log = args.log_file.clone().unwrap_or_else(|| state.join("agent.log"));
        let mut words = Vec::from(["agent", "service", "run", "--name"].map(OsString::from));
        words.push(args.name.name.clone().into());
        for (name, path) in [("--state-dir", &state), ("--log-file", &absolute(&log)?)] {
            words.push(name.into());
            words.push(path.into());
        }
        for _ in 0..app.global.verbose {
            words.push("-v".into());
        }
        if app.global.hyperv.only_backup_program() {
            words.push("--only-backup-program".into());
        }
        words.extend(args.serve.words()?);
        let program = std::env::current_exe()
            .map_err(|error| EngineError::io("find the path of vmtide", error))?;
        service::install(&NewService {
            name: &args.name.name,
            display_name: "vmtide agent",
            description: "Change tracking and content of virtual disks over HTTPS",
            program: &program,
            arguments: &words,
        })
        .map_err(failed)?;
        done(app, &args.name.name, "installed")
    }

    fn absolute(path: &Path) -> Result<PathBuf> {
        std::path::absolute(path)
            .map_err(|error| EngineError::io(format!("find {}", path.display()), error))
    }

    /// Of the system, not of the user who installs; for administrators only, because the private key is there.
    fn default_state_directory() -> Result<PathBuf> {
        let all = std::env::var_os("ProgramData").map(PathBuf::from);
        let all = all.filter(|path| path.is_absolute());
        let all =
            all.ok_or_else(|| EngineError::usage("%ProgramData% is not set: give --state-dir"))?;
        let directory = all.join("vmtide");
        service::private_directory(&directory).map_err(|error| {
            EngineError::io(format!("make the state directory {}", directory.display()), error)
        })?;
        Ok(directory)
    }

    pub fn start(app: &App, name: &str) -> Result<Exit> {
        service::start(name, START_WITHIN).map_err(failed)?;
        done(app, name, "started")
    }

    pub fn stop(app: &App, name: &str) -> Result<Exit> {
        service::stop(name, STOP_WITHIN).map_err(failed)?;
        done(app, name, "stopped")
    }

    pub fn remove(app: &App, name: &str) -> Result<Exit> {
        service::remove(name, STOP_WITHIN).map_err(failed)?;
        done(app, name, "removed")
    }

    fn done(app: &App, name: &str, what: &str) -> Result<Exit> {
        app.output.line(format!("service {name} {what}"));
        app.output.summary(&serde_json::json!({ "service": name, "done": what }));
        Ok(Exit::Done)
    }

    /// Appends to the log, and keeps it bounded from now on.
    fn open_log(path: &Path) -> std::io::Result<File> {
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        let file = File::options().create(true).append(true).open(path)?;
        log_limit::put_aside(path, log_limit::LIMIT_BYTES)?;
        log_limit::watch(path.to_path_buf())?;
        Ok(file)
    }

    pub fn run(app: &App, args: &RunArgs) -> Result<Exit> {
        let options = args.serve.options(app)?;
        let log =
            args.log_file.clone().unwrap_or_else(|| options.state_directory.join("agent.log"));
        open_log(&log)
            .and_then(service::redirect_output)
            .map_err(|error| EngineError::io(format!("write the log {}", log.display()), error))?;
        let app = App { global: app.global.clone(), output: Arc::clone(&app.output) };
        let main = move |running: service::RunningService| {
            let cancel = CancelToken::new();
            let stop = cancel.clone();
            running.on_stop(move || stop.cancel());
            let platform = vmtide_agent::platform_of_this_host(&options);
            let ended = vmtide_agent::run(&options, platform, &cancel, |started| {
                tell(&app, started);
                running.started();
            });
            match ended {
                Ok(()) => 0,
                Err(error) => u32::from(app.failed(&engine_error(error)).code()),
            }
        };
        service::run(&args.name.name, main).map_err(failed)?;
        Ok(Exit::Done)
    }
}
