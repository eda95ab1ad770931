//! `vmtide restore`: get disks back.

use crate::app::App;
use crate::exit::Exit;
use crate::{repository, units};
use clap::Args;
use vmtide_engine::{RestoreJob, RestoreTarget, Result, resolve, restore};
use vmtide_image::Format;

const EXAMPLES: &str = "\
TARGET is a file (one disk), a directory (a file VM-DISK.FORMAT for each disk and vm-config.json), a
block device, an NBD export (nbd://HOST/EXPORT, nbd+unix:///EXPORT?socket=PATH), or a disk of a host
where `vmtide agent` runs (agent+https://HOST/PATH), which is made where it is not there.

A new file has its name only when it is complete. Files are sparse.

Examples:
  vmtide restore web@latest -r /backup --to /restored/
  vmtide restore web@2026-11-20T03:00 -r /backup --disk virtio0 --to web.qcow2
  vmtide restore 3fa9c1d2 -r /backup --to /dev/vg/web --in-place
  vmtide restore 3fa9c1d2 -r /backup --to /restored/ --salvage      of a damaged one, what is left";

/// The options of `restore`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct RestoreArgs {
    /// Id or its first digits, VM@latest, or VM@TIME
    #[arg(value_name = "POINT")]
    point: String,
    /// Where to; see below
    #[arg(long, value_name = "TARGET")]
    to: String,
    /// Only this disk, by id or by number from 0
    #[arg(long, value_name = "DISK")]
    disk: Option<String>,
    /// raw, qcow2, vhdx, vhd or vmdk [default: by the target's extension, else raw; with --in-place
    /// the content must agree]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// The kind within the format, e.g. fixed or streamOptimized
    #[arg(long, value_name = "NAME")]
    subformat: Option<String>,
    /// Write only what differs into an existing file, device or export
    #[arg(long)]
    in_place: bool,
    /// Replace existing files; overwrite devices and exports that hold data; with --in-place, write
    /// even into an image that others read through, which breaks them
    #[arg(long)]
    force: bool,
    /// Restore what is left of a damaged restore point: what cannot be read becomes zeros and is
    /// listed, and the command ends with code 5
    #[arg(long)]
    salvage: bool,
    /// Threads that read, decompress and write [default: two more than processors]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: Option<u16>,
}

/// Restores.
pub fn run(app: &App, args: &RestoreArgs) -> Result<Exit> {
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
    for disk in summary.disks.iter().filter(|disk| !disk.lost.is_empty()) {
        exit = Exit::Damaged;
        app.output.line(format!(
            "{} of disk {} could not be read and are zeros in {}:",
            units::size(disk.lost.total_bytes()),
            disk.id,
            disk.path
        ));
        for range in disk.lost.iter() {
            app.output.line(format!("  bytes {} to {}", range.offset, range.end()));
        }
    }
    if let Some(path) = &summary.config_path {
        app.output.line(format!("configuration of {} written to {path}", summary.vm));
    }
    app.output.remark(format!("done after {}", units::duration(summary.duration_ms)));
    app.output.summary(&summary);
    Ok(exit)
}
