//! `vmtide vm`: what a source has to back up, and ending to track its changes.

use crate::app::App;
use crate::exit::Exit;
use crate::table::Table;
use crate::{repository, units};
use clap::{Args, Subcommand, ValueEnum};
use vmtide_engine::agent::{DiskChangesReport, changes_of};
use vmtide_engine::source::{OpenSource, SourceOptions, SourceSpec, untrack};
use vmtide_engine::{Result, lineage};
use vmtide_hypervisor::VmConfig;
use vmtide_image::BackingPolicy;

const EXAMPLES: &str = "\
Examples:
  vmtide vm list qemu+unix:///run/web.qmp
  vmtide vm show qemu+unix:///run/web.qmp
  vmtide vm show disk.qcow2 --json
  vmtide vm list hyperv+winrm://hv1
  vmtide vm show hyperv://hv1/web
  vmtide vm changes agent+https://hv1/C:/VMs/web.vhdx
  vmtide vm changes agent+https://hv1/C:/VMs/web.vhdx --since rctX:… --json
  vmtide vm untrack qemu+unix:///run/web.qmp -r /backup";

/// The options of `vm`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct VmArgs {
    #[command(subcommand)]
    command: VmCommand,
}

#[derive(Debug, Subcommand)]
enum VmCommand {
    /// List the VMs of a source
    List(SourceArgs),
    /// Show the configuration of a VM
    Show(SourceArgs),
    /// Show the change tracking of an agent's disk, and what changed since a tracking id; code 3 where
    /// that is not known
    Changes(ChangesArgs),
    /// Remove the dirty bitmaps that track changes for a repository, or with no -r those for all;
    /// the next backup reads in full
    Untrack(UntrackArgs),
}

#[derive(Debug, Args)]
struct UntrackArgs {
    /// A running VM of QEMU, as for `vmtide backup`
    #[arg(value_name = "SOURCE")]
    source: String,
    /// The VM's name in the repository [default: the VM's own]
    #[arg(long, value_name = "VM")]
    name: Option<String>,
}

#[derive(Debug, Args)]
struct ChangesArgs {
    /// A disk of an agent: agent+https://HOST/PATH
    #[arg(value_name = "SOURCE")]
    source: String,
    /// The tracking id to count from
    #[arg(long, value_name = "ID")]
    since: Option<String>,
}

#[derive(Debug, Args)]
struct SourceArgs {
    /// As for `vmtide backup`
    #[arg(value_name = "SOURCE")]
    source: String,
    /// Which files a disk image may name as its backing or data file [default: same-directory
    /// where the file's name says its format, else refuse]
    #[arg(long, value_name = "WHICH")]
    backing: Option<BackingArg>,
}

/// Which files an image may lead to. Whoever can write an image's header chooses its backing file,
/// and would otherwise have any file of this host read into a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BackingArg {
    /// None: images with a backing file are refused
    Refuse,
    /// Files in the image's own directory
    SameDirectory,
    /// Any file; for images whose every writer is trusted
    Allow,
}

impl BackingArg {
    /// As the image library knows it.
    pub const fn policy(self) -> BackingPolicy {
        match self {
            Self::Refuse => BackingPolicy::Refuse,
            Self::SameDirectory => BackingPolicy::SameDirectory,
            Self::Allow => BackingPolicy::Allow,
        }
    }
}

/// Does it.
pub fn run(app: &App, args: &VmArgs) -> Result<Exit> {
    match &args.command {
        VmCommand::List(args) => list(app, &open(app, args)?),
        VmCommand::Show(args) => show(app, &open(app, args)?),
        VmCommand::Changes(args) => changes(app, args),
        VmCommand::Untrack(args) => end_tracking(app, args),
    }
}

fn changes(app: &App, args: &ChangesArgs) -> Result<Exit> {
    let spec = SourceSpec::parse(&args.source)?;
    let agent = app.global.agents.options(&args.source)?;
    let report = changes_of(&spec, &agent, args.since.as_deref())?;
    show_changes(app, &report);
    app.output.summary(&report);
    Ok(Exit::with_warnings(report.reason.is_some()))
}

fn show_changes(app: &App, report: &DiskChangesReport) {
    let field = |name: &str, value: &str| app.output.line(format!("{name:<16} {value}"));
    field("disk", &report.path);
    field("size", &units::size(report.size_bytes));
    field("change tracking", if report.tracking { "on" } else { "off" });
    if !report.most_recent_id.is_empty() {
        field("most recent id", &report.most_recent_id);
        field("written since", if report.newer_changes { "yes" } else { "no" });
    }
    if let Some(reason) = &report.reason {
        app.output.warning(&format!("what changed is not known: {reason}"));
    }
    let Some(ranges) = &report.ranges else { return };
    field("changed", &units::size(ranges.total_bytes()));
    let mut table = Table::new(&[">offset", ">length"]);
    for range in ranges.iter() {
        table.row([range.offset.to_string(), range.length.to_string()]);
    }
    app.output.lines(table.lines());
}

fn end_tracking(app: &App, args: &UntrackArgs) -> Result<Exit> {
    let spec = SourceSpec::parse(&args.source)?;
    let state_directory = app.state_directory();
    let lineage = match &app.global.repository {
        None => None,
        Some(location) => {
            let repository = repository::open_at(app, location)?;
            let name = match &args.name {
                Some(name) => name.clone(),
                None => {
                    let options = SourceOptions {
                        agent: app.global.agents.options(&args.source)?,
                        hyperv: app.global.hyperv.options(&args.source)?,
                        state_directory: state_directory.clone(),
                        ..SourceOptions::default()
                    };
                    let source = spec.open(&options)?;
                    source.hypervisor.describe(&source.vm)?.name
                }
            };
            Some(lineage(repository.config().id, &name))
        }
    };
    let removed = untrack(&spec, &state_directory, lineage.as_deref())?;
    app.output.lines(removed.iter().map(|what| format!("removed {what}")));
    if removed.is_empty() {
        app.output.line("there is no tracking to remove");
    }
    app.output.summary(&serde_json::json!({ "removed": removed }));
    Ok(Exit::Done)
}

fn open(app: &App, args: &SourceArgs) -> Result<OpenSource> {
    SourceSpec::parse(&args.source)?.open(&SourceOptions {
        backing: args.backing.map(BackingArg::policy),
        state_directory: app.state_directory(),
        agent: app.global.agents.options(&args.source)?,
        hyperv: app.global.hyperv.options(&args.source)?,
        ..SourceOptions::default()
    })
}

fn list(app: &App, source: &OpenSource) -> Result<Exit> {
    let vms = source.hypervisor.list()?;
    let mut table = Table::new(&["name", "state", ">disks", "id"]);
    for vm in &vms {
        table.row([
            vm.name.clone(),
            if vm.problem().is_some() { "unreadable".into() } else { vm.state.clone() },
            vm.disks.to_string(),
            vm.id.clone().unwrap_or_default(),
        ]);
    }
    app.output.lines(table.lines());
    let problems = vms.iter().filter_map(|vm| Some((&vm.name, vm.problem()?)));
    let problems: Vec<_> = problems.collect();
    for (name, problem) in &problems {
        app.output.warning(&format!("{name} cannot be read: {problem}"));
    }
    app.output.summary(&serde_json::json!({ "vms": vms }));
    Ok(Exit::with_warnings(!problems.is_empty()))
}

fn show(app: &App, source: &OpenSource) -> Result<Exit> {
    let config = source.hypervisor.describe(&source.vm)?;
    show_config(app, &config);
    app.output.summary(&serde_json::json!({ "vm": config }));
    Ok(Exit::Done)
}

fn show_config(app: &App, config: &VmConfig) {
    let field = |name: &str, value: Option<String>| {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            app.output.line(format!("{name:<12} {value}"));
        }
    };
    field("name", Some(config.name.clone()));
    field("id", config.id.clone());
    let version = config.platform_version.as_deref().unwrap_or_default();
    field("platform", Some(format!("{} {version}", config.platform).trim_end().into()));
    field("machine", config.machine.clone());
    field("processors", config.processors.map(|count| count.to_string()));
    field("memory", config.memory_bytes.map(units::size));
    field("firmware", config.firmware.map(|firmware| format!("{firmware:?}").to_lowercase()));
    for adapter in &config.network_adapters {
        let parts = [Some(&adapter.id), adapter.model.as_ref(), adapter.mac.as_ref()];
        let parts: Vec<_> = parts.into_iter().flatten().map(String::as_str).collect();
        field("network", Some(parts.join(", ")));
    }
    let mut table = Table::new(&["disk", ">size", "bus", "format", "path"]);
    for disk in &config.disks {
        table.row([
            disk.id.to_string(),
            units::size(disk.size_bytes),
            format!("{:?}", disk.bus).to_lowercase(),
            disk.format.clone().unwrap_or_default(),
            disk.path.clone().unwrap_or_default(),
        ]);
    }
    app.output.line("");
    app.output.lines(table.lines());
}
