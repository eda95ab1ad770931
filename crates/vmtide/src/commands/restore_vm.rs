//! `vmtide restore … --to hyperv+winrm://HOST/NAME`: get a whole VM back.

use crate::app::App;
use crate::commands::restore::{RestoreArgs, print_lost};
use crate::exit::Exit;
use crate::{repository, units};
use clap::{Args, ValueEnum};
use std::collections::BTreeMap;
use vmtide_engine::{
    EngineError, NewVmOptions, RestoreVmJob, RestoreVmSummary, Result, VmTarget, VmTargetOptions,
    resolve, restore_vm,
};
use vmtide_hypervisor::{Firmware, NetworkPlan, RestoreRoute, VmIdentity};

/// The options of a restore to a VM.
#[derive(Debug, Args)]
#[command(next_help_heading = "Restoring a whole VM (hyperv+winrm://, hyperv://)")]
pub struct RestoreVmArgs {
    /// The directory on the host below which the VM gets a directory of its own [default: the host's]
    #[arg(long, value_name = "DIR")]
    directory: Option<String>,
    /// How the VM is made: exact (from its configuration files, every setting as it was), portable (from its
    /// settings, on any version), or auto (exact where that works)
    #[arg(long, value_enum, default_value_t = Route::Auto, value_name = "ROUTE")]
    route: Route,
    /// Restore the VM itself, with its id; refused where the host has a VM of that id [default: where the
    /// name is kept and the id is free]
    #[arg(long, conflicts_with = "new_id")]
    keep_id: bool,
    /// Restore a copy, with new ids and hardware addresses
    #[arg(long)]
    new_id: bool,
    /// Connect network adapters to the networks they were connected to [default: none is connected]
    #[arg(long)]
    connect: bool,
    /// Connect adapters that were connected to OLD to NEW; may be repeated
    #[arg(long, value_name = "OLD=NEW", value_parser = parse_map)]
    network_map: Vec<(String, String)>,
    /// The generation of the new VM: 1 (BIOS) or 2 (UEFI) [default: by how the VM booted]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u8).range(1..=2))]
    generation: Option<u8>,
    /// Read back what was written and compare it, before the VM is made of it
    #[arg(long)]
    verify: bool,
    /// With --in-place: OVERWRITE the disks of another VM than the restore point's, or disks that have
    /// been exchanged since, place by place; to refresh a test copy. What they hold is lost
    #[arg(long, requires = "in_place")]
    into_other_vm: bool,
    /// Start the VM when it is complete
    #[arg(long)]
    power_on: bool,
}

/// The values of `--route`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Route {
    Auto,
    Exact,
    Portable,
}

fn parse_map(text: &str) -> std::result::Result<(String, String), String> {
    match text.split_once('=') {
        Some((from, to)) if !from.is_empty() && !to.is_empty() => Ok((from.into(), to.into())),
        _ => Err("write OLD=NEW, two names of networks".into()),
    }
}

impl RestoreVmArgs {
    /// Whether any of them was given: they say nothing for files.
    pub fn any(&self) -> bool {
        self.directory.is_some()
            || self.route != Route::Auto
            || self.keep_id
            || self.new_id
            || self.connect
            || !self.network_map.is_empty()
            || self.generation.is_some()
            || self.verify
            || self.into_other_vm
            || self.power_on
    }

    fn new_vm(&self, name: Option<String>) -> NewVmOptions {
        NewVmOptions {
            name,
            identity: match (self.keep_id, self.new_id) {
                (true, _) => VmIdentity::Original,
                (_, true) => VmIdentity::New,
                _ => VmIdentity::Auto,
            },
            route: match self.route {
                Route::Auto => RestoreRoute::Auto,
                Route::Exact => RestoreRoute::Exact,
                Route::Portable => RestoreRoute::Portable,
            },
            directory: self.directory.clone(),
            networks: NetworkPlan {
                connect: self.connect,
                map: self.network_map.iter().cloned().collect::<BTreeMap<_, _>>(),
            },
            firmware: self.generation.map(|generation| match generation {
                2 => Firmware::Uefi,
                _ => Firmware::Bios,
            }),
        }
    }

    /// Refuses options that a restore in place has no use for.
    fn check_in_place(&self) -> Result<()> {
        let only_power = !(self.directory.is_some()
            || self.route != Route::Auto
            || self.keep_id
            || self.new_id
            || self.connect
            || !self.network_map.is_empty()
            || self.generation.is_some());
        if only_power {
            return Ok(());
        }
        Err(EngineError::usage(
            "--in-place writes the disks of a VM and leaves its settings alone: --directory, --route, \
             --keep-id, --new-id, --connect, --network-map and --generation are for new VMs",
        ))
    }
}

/// Restores a VM.
pub fn run(app: &App, args: &RestoreArgs) -> Result<Exit> {
    if args.format.is_some() || args.subformat.is_some() || args.force {
        return Err(EngineError::usage(
            "--format, --subformat and --force are for files: a VM gets the format of its platform, and \
             nothing that exists is replaced",
        ));
    }
    if args.in_place {
        args.vm.check_in_place()?;
    }
    let job = app.begin_job()?;
    let options = VmTargetOptions {
        hyperv: app.global.hyperv.options(&args.to)?,
        agent: app.global.agents.options(&args.to)?,
        state_directory: app.state_directory(),
        cancel: job.cancel().clone(),
    };
    let target = vmtide_engine::open_vm_target(&args.to, &options)?;
    let repository = repository::open(app)?;
    // What is found must not be pruned before it is restored.
    let _lease = repository.lease(vmtide_repo::Purpose::Read)?;
    let point = resolve(&repository, &args.point)?;
    let to = match args.in_place {
        true => VmTarget::InPlace {
            vm: target.name.unwrap_or_else(|| point.vm.clone()),
            into_other_vm: args.vm.into_other_vm,
        },
        false => VmTarget::New(args.vm.new_vm(target.name)),
    };
    let restore_job = RestoreVmJob {
        repository: &repository,
        point: &point,
        restorer: target.restorer.as_ref(),
        to,
        disk: args.disk.clone(),
        workers: args.workers.map(usize::from),
        verify: args.vm.verify,
        salvage: args.salvage,
        power_on: args.vm.power_on,
    };
    let summary = job.run(app, |context| restore_vm(&restore_job, context))?;
    print(app, &summary);
    let exit = Exit::with_warnings(!summary.warnings.is_empty());
    let lost = summary.disks.iter().any(|disk| !disk.lost.is_empty());
    app.output.summary(&summary);
    Ok(if lost { Exit::Damaged } else { exit })
}

fn print(app: &App, summary: &RestoreVmSummary) {
    for disk in &summary.disks {
        app.output.line(format!(
            "disk {} of {} restored to {}: {}, {} written",
            disk.id,
            summary.vm,
            disk.path,
            units::size(disk.size_bytes),
            units::size(disk.written_bytes),
        ));
    }
    print_lost(app, &summary.disks);
    let restored = &summary.restored;
    let how = if summary.in_place { "is back at" } else { "was restored from" };
    let power = if restored.powered_on { "running" } else { "off" };
    app.output.line(format!(
        "VM {} ({}) {how} {}; it is {power}",
        restored.name, restored.id, summary.point
    ));
    app.output.remark(format!("done after {}", units::duration(summary.duration_ms)));
}
