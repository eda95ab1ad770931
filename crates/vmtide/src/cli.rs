//! The command line: its options, their help, and which command is meant.

use crate::agents::AgentAccessArgs;
use crate::commands;
use crate::hyperv::HypervAccessArgs;
use crate::s3::S3Args;
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum, ValueHint};
use std::path::PathBuf;

const ABOUT: &str =
    "Backup and recovery of virtual machines on the hypervisor's own change tracking";

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    failed
  2    wrong usage
  3    done, with warnings (consistency downgraded, tracking lost, something left behind)
  4    wrong password, or permission denied
  5    damaged data found
  6    not found
  130  interrupted

Examples:
  vmtide init /backup
  vmtide backup qemu+unix:///run/web.qmp -r /backup
  vmtide points -r /backup
  vmtide restore web@latest -r /backup --to /restored/

The password of a repository comes from VMTIDE_PASSWORD, --password-file, --password-command or the
terminal. Every option has a key of its name in the settings file; see --config.";

/// vmtide's command line.
#[derive(Debug, Parser)]
#[command(name = "vmtide", version, about = ABOUT, after_help = EXIT_CODES, max_term_width = 100)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    /// What holds for all commands.
    #[command(flatten)]
    pub global: GlobalArgs,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The options that all commands have.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Options of all commands")]
pub struct GlobalArgs {
    /// The repository: a directory, file:///DIRECTORY, or s3://BUCKET/PREFIX
    #[arg(short, long, global = true, value_name = "REPO", env = "VMTIDE_REPOSITORY")]
    #[arg(hide_env_values = true, value_hint = ValueHint::DirPath)]
    pub repository: Option<String>,
    /// Where the password comes from.
    #[command(flatten)]
    pub password: PasswordArgs,
    /// Write newline-delimited JSON events; the last one is the summary
    #[arg(long, global = true)]
    pub json: bool,
    /// Log more; twice for debugging
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// Show only results, warnings and errors
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// The form of the log on standard error
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// The settings file [default: /etc/vmtide/vmtide.toml, then ~/.config/vmtide/vmtide.toml; on
    /// Windows %APPDATA%\vmtide\vmtide.toml]
    #[arg(long, global = true, value_name = "FILE", env = "VMTIDE_CONFIG")]
    #[arg(hide_env_values = true, value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,
    /// Where journals and locks are kept [default: $XDG_STATE_HOME/vmtide; /var/lib/vmtide for root; on
    /// Windows %LOCALAPPDATA%\vmtide]
    #[arg(long, global = true, value_name = "DIR", env = "VMTIDE_STATE_DIR")]
    #[arg(hide_env_values = true, value_hint = ValueHint::DirPath)]
    pub state_dir: Option<PathBuf>,
    /// How to get at repositories in S3.
    #[command(flatten)]
    pub s3: S3Args,
    /// How to get at agents.
    #[command(flatten)]
    pub agents: AgentAccessArgs,
    /// How to get at Hyper-V hosts without agents.
    #[command(flatten)]
    pub hyperv: HypervAccessArgs,
}

/// Where the password of the repository comes from, beside `VMTIDE_PASSWORD` and the terminal.
#[derive(Clone, Debug, Args)]
pub struct PasswordArgs {
    /// Read the password from this file; its last line feed does not count
    #[arg(long, global = true, value_name = "FILE", env = "VMTIDE_PASSWORD_FILE")]
    #[arg(hide_env_values = true, value_hint = ValueHint::FilePath)]
    pub password_file: Option<PathBuf>,
    /// Run this shell command and take its output as the password
    #[arg(long, global = true, value_name = "COMMAND", env = "VMTIDE_PASSWORD_COMMAND")]
    #[arg(hide_env_values = true, value_hint = ValueHint::CommandString)]
    pub password_command: Option<String>,
}

/// The form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a new repository
    Init(commands::init::InitArgs),
    /// Back up virtual machines or disk images
    Backup(Box<commands::backup::BackupArgs>),
    /// List restore points
    Points(commands::points::PointsArgs),
    /// Show one restore point
    Show(commands::show::ShowArgs),
    /// Show which disks and bytes differ between two restore points
    Diff(commands::diff::DiffArgs),
    /// Restore disks to files, a directory, a block device or an NBD export
    Restore(commands::restore::RestoreArgs),
    /// Check that restore points can be restored
    Verify(commands::verify::VerifyArgs),
    /// Make right what is damaged in a repository
    Repair(commands::repair::RepairArgs),
    /// Forget restore points, by id or by rules of what to keep
    Forget(Box<commands::forget::ForgetArgs>),
    /// Keep restore points, whatever the rules of `forget` say
    Hold(commands::hold::HoldArgs),
    /// Remove from the repository what no restore point needs
    Prune(commands::prune::PruneArgs),
    /// Copy restore points into another repository
    Copy(Box<commands::copy::CopyArgs>),
    /// Manage the passwords of a repository
    Key(commands::key::KeyArgs),
    /// Show what a disk image says of itself
    Info(commands::info::InfoArgs),
    /// Show which bytes of a disk hold data, and where they lie
    Map(commands::map::MapArgs),
    /// Check the structure of a disk image, and repair it
    Check(commands::check::CheckArgs),
    /// Tell whether two disks hold the same
    Compare(commands::compare::CompareArgs),
    /// Make a new disk image, or a child of another one
    Create(commands::create::CreateArgs),
    /// Give the disk in an image another size
    Resize(commands::resize::ResizeArgs),
    /// Convert a disk into another format, file, device or export
    Convert(commands::convert::ConvertArgs),
    /// List, rebase and merge images that read through other images
    #[command(visible_alias = "snapshot-chain")]
    Chain(commands::chain::ChainArgs),
    /// Make, show, merge and apply deltas: the changed data of a disk as a stream
    Delta(Box<commands::delta::DeltaArgs>),
    /// Serve a disk image or restore point over NBD
    Serve(commands::serve::ServeArgs),
    /// Serve disks and what changed on them over HTTPS, on the host that has them
    Agent(Box<commands::agent::AgentArgs>),
    /// Host a disk image with change tracking over NBD, or ask about one
    Track(Box<commands::track::TrackArgs>),
    /// Look at the virtual machines of a source
    Vm(commands::vm::VmArgs),
    /// Find out what does not work with a source or repository, and what to do
    Doctor(commands::doctor::DoctorArgs),
    /// Show how much a repository holds
    Stats(commands::stats::StatsArgs),
    /// Measure what this machine and a store can do, stage by stage
    Bench(commands::bench::BenchArgs),
    /// The process behind the plugin for Bacula's file daemon, which starts it
    #[command(hide = true)]
    BaculaBackend(commands::bacula::BaculaArgs),
    /// Write the completion script of a shell to standard output
    Completions(commands::completions::CompletionsArgs),
    /// Write man pages into a directory
    Man(commands::man::ManArgs),
}
