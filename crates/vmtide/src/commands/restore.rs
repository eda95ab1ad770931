//! `vmtide restore`: get disks back.

use crate::app::App;
use crate::commands::restore_vm::{self, RestoreVmArgs};
use crate::commands::verify::touched_parts;
use crate::exit::Exit;
use crate::{repository, units};
use clap::Args;
use vmtide_engine::{
    EngineError, RestoreJob, RestoreTarget, RestoredDisk, Result, resolve, restore,
};
use vmtide_image::Format;

const EXAMPLES: &str = "\
TARGET is a file (one disk), a directory (a file VM-DISK.FORMAT for each disk and vm-config.json), a
block device, an NBD export (nbd://HOST/EXPORT, nbd+unix:///EXPORT?socket=PATH), a disk of a host
where `vmtide agent` runs (agent+https://HOST/PATH), which is made where it is not there, or a whole VM on
a Hyper-V host (hyperv+winrm://HOST/NAME, hyperv://HOST/NAME with an agent there, or hyperv:///NAME where
vmtide runs on the host), also of a VM of another platform. Without NAME it has the one it had.

A new file has its name only when it is complete, and so has a VM. Files are sparse.

A restored VM is off and its network adapters are not connected. With --in-place, the disks of a VM that
is off are written where they differ; until that is complete the VM's name says that it is not, and the
same command goes on where it was interrupted. The next backup of a restored VM reads its disks in full,
and stores only what the repository does not have.

Examples:
  vmtide restore web@latest -r /backup --to /restored/
  vmtide restore web@2026-11-20T03:00 -r /backup --disk virtio0 --to web.qcow2
  vmtide restore 3fa9c1d2 -r /backup --to /dev/vg/web --in-place
  vmtide restore 3fa9c1d2 -r /backup --to /restored/ --salvage      of a damaged one, what is left
  vmtide restore web@latest -r /backup --to hyperv+winrm://hv1/web                as it was
  vmtide restore web@latest -r /backup --to hyperv+winrm://hv1/web-test --new-id \\
      --directory 'D:\\VMs' --network-map LAN=Lab --power-on                       a copy, to look at
  vmtide restore web@latest -r /backup --to hyperv+winrm://hv1/web --in-place     only what differs
  vmtide restore web@latest -r /backup --to hyperv+winrm://hv1/web-test --in-place --into-other-vm
                                                              refresh a test copy; what it holds is lost";

/// The options of `restore`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct RestoreArgs {
    /// Id or its first digits, VM@latest, or VM@TIME
    #[arg(value_name = "POINT")]
    pub(super) point: String,
    /// Where to; see below
    #[arg(long, value_name = "TARGET")]
    pub(super) to: String,
    /// Only this disk, by id or by number from 0
    #[arg(long, value_name = "DISK")]
    pub(super) disk: Option<String>,
    /// raw, qcow2, vhdx, vhd or vmdk [default: by the target's extension, else raw; with --in-place
    /// the content must agree]
    #[arg(long, value_name = "FORMAT")]
    pub(super) format: Option<Format>,
    /// The kind within the format, e.g. fixed or streamOptimized
    #[arg(long, value_name = "NAME")]
    pub(super) subformat: Option<String>,
    /// Write only what differs into an existing file, device or export
    #[arg(long)]
    pub(super) in_place: bool,
    /// Replace existing files; overwrite devices and exports that hold data; with --in-place, write
    /// even into an image that others read through, which breaks them
    #[arg(long)]
    pub(super) force: bool,
    /// Restore what is left of a damaged restore point: what cannot be read becomes zeros and is
    /// listed, and the command ends with code 5
    #[arg(long)]
    pub(super) salvage: bool,
    /// Threads that read, decompress and write [default: two more than processors]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(super) workers: Option<u16>,
    #[command(flatten)]
    pub(super) vm: RestoreVmArgs,
}

/// Restores.
pub fn run(app: &App, args: &RestoreArgs) -> Result<Exit> {
    if vmtide_engine::is_vm_target(&args.to) {
        return restore_vm::run(app, args);
    }
    if args.vm.any() {
        return Err(EngineError::usage(
            "the options for restoring a whole VM go with --to hyperv+winrm://HOST/NAME",
        ));
    }
    let target = RestoreTarget::parse(&args.to)?.with_agent(app.global.agents.options(&args.to)?);
    let repository = repository::open(app)?;
    // What is found must not be pruned before it is restored.
    let _lease = repository.lease(vmtide_repo::Purpose::Read)?;
    let point = resolve(&repository, &args.point)?;
    let job = app.begin_job()?;
    let restore_job = RestoreJob {
        repository: &repository,
        point: &point,
        target,
        disk: args.disk.clone(),
        format: args.format,
        subformat: args.subformat.clone(),
        in_place: args.in_place,
        force: args.force,
        workers: args.workers.map(usize::from),
        salvage: args.salvage,
    };
    let summary = job.run(app, |context| restore(&restore_job, context))?;
    for disk in &summary.disks {
        app.output.line(format!(
            "disk {} of {} restored to {}: {} ({}), {} written",
            disk.id,
            summary.vm,
            disk.path,
            units::size(disk.size_bytes),
            disk.format,
            units::size(disk.written_bytes),
        ));
    }
    let mut exit = Exit::with_warnings(!summary.warnings.is_empty());
    if print_lost(app, &summary.disks) {
        exit = Exit::Damaged;
    }
    if let Some(path) = &summary.config_path {
        app.output.line(format!("configuration of {} written to {path}", summary.vm));
    }
    app.output.remark(format!("done after {}", units::duration(summary.duration_ms)));
    app.output.summary(&summary);
    Ok(exit)
}

/// Says what could not be read. Answers whether there was any.
pub(super) fn print_lost(app: &App, disks: &[RestoredDisk]) -> bool {
    let mut any = false;
    for disk in disks.iter().filter(|disk| !disk.lost.is_empty()) {
        any = true;
        app.output.line(format!(
            "{} of disk {} could not be read and are zeros in {}:",
            units::size(disk.lost.total_bytes()),
            disk.id,
            disk.path
        ));
        for range in disk.lost.iter() {
            app.output.line(format!("  bytes {} to {}", range.offset, range.end()));
        }
        for line in disk.lost_in.iter().flat_map(touched_parts) {
            app.output.line(format!("  {line}"));
        }
    }
    any
}
