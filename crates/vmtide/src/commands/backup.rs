//! `vmtide backup`: back up virtual machines or disk images.

use crate::app::{App, Job};
use crate::commands::backup_many::{self, Many, ManyArgs};
use crate::commands::immutable;
use crate::commands::vm::BackingArg;
use crate::exit::Exit;
use crate::output::Output;
use crate::table::Table;
use crate::{repository, units};
use clap::{Args, ValueEnum};
use jiff::SignedDuration;
use std::io::Read;
use vmtide_block::RangeSet;
use vmtide_engine::source::{
    OpenSource, SourceOptions, SourceSpec, image_name, parse_changes, tracked_disks,
};
use vmtide_engine::{BackupJob, BackupSummary, EngineError, LevelChoice, Result, backup};
use vmtide_hypervisor::{Consistency, DiskId, Hypervisor};
use vmtide_image::Format;
use vmtide_repo::{BackupOptions, RateLimit, Repository, RetentionMode};

const EXAMPLES: &str = "\
SOURCE is one of
  disk.qcow2, /dev/vg/disk              a disk image or block device that nobody writes to
  qemu+unix:///run/vm.qmp               a running VM of QEMU, by its monitor socket; options:
                                        ?agent=PATH&scratch=DIR&name=NAME&method=auto|filter|job
  hyperv+winrm://HOST/VM                a VM of a Hyper-V host on which nothing needs to be installed: asked by
                                        WinRM, disks read over SMB; port 5986 means HTTPS
  hyperv://HOST/VM                      a VM of a Hyper-V host where `vmtide agent` runs
  nbd://HOST/EXPORT                     an NBD export
  nbd+unix:///EXPORT?socket=PATH        an NBD export on a Unix socket
  agent+https://HOST/PATH               a disk of a host where `vmtide agent` runs; further disks of the same
                                        VM follow as ?disk=PATH&disk=PATH

Examples:
  vmtide backup qemu+unix:///run/web.qmp -r /backup
  vmtide backup qemu+unix:///run/web.qmp -r /backup --consistency fs --tag job=nightly
  vmtide backup disk.qcow2 -r /backup --name web --level full
  vmtide backup overlay.qcow2 -r /backup --format qcow2 --backing same-directory
  vmtide backup disk.raw -r /backup --changes changes.json
  vmtide backup web.qcow2 -r /backup --track
  vmtide backup hyperv+winrm://hv1.lab/web -r /backup --winrm-user 'LAB\\backup' --winrm-password-file pw
  vmtide backup agent+https://hv1/C:/VMs/web.vhdx -r /backup --agent-key-file key
  vmtide backup 'hyperv://hv1/web*' -r /backup --parallel 4 --exclude-vm web-test
  vmtide backup hyperv+winrm://hv1/tag:nightly -r /backup --winrm-user 'LAB\\backup'

--changes takes [{\"offset\":0,\"length\":65536},…]: all that may differ from the previous restore point.
With several sources each has its summary event, and a failed one does not stop the others.

VM of a Hyper-V host is a name, an id, a pattern (web*), tag:NAME (a line vmtide:tag=NAME in the VM's notes), all, or
several of these with commas. Where it can mean several VMs, so many as --parallel says are backed up at a time, each
under its own name; a last summary event counts them. A VM that is renamed or moves to another host goes on in its
line of restore points.";

/// The most bytes of a list of changed ranges: some ten million ranges.
const MAX_CHANGES_BYTES: u64 = 512 << 20;

/// The options of `backup`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct BackupArgs {
    /// What to back up; see below
    #[arg(required = true, value_name = "SOURCE")]
    source: Vec<String>,
    /// What to compare with: the previous restore point, the last full one, or nothing
    #[arg(long, default_value = "auto")]
    level: LevelArg,
    /// app, fs or crash: fail where it cannot be reached [default: the best that can be had]
    #[arg(long, value_name = "LEVEL")]
    consistency: Option<Consistency>,
    /// Go on with less consistency than asked for, with a warning
    #[arg(long, requires = "consistency")]
    allow_downgrade: bool,
    /// The VM's name in the repository [default: the VM's own, or the image's without extension]
    #[arg(long, value_name = "VM")]
    pub(super) name: Option<String>,
    /// Record a tag with the restore point; may be repeated
    #[arg(long, value_name = "K=V", value_parser = units::parse_tag)]
    pub(crate) tag: Vec<(String, String)>,
    /// Leave out a disk, by its id, of every VM that has it; may be repeated
    #[arg(long, value_name = "DISK")]
    disk_exclude: Vec<String>,
    /// Trust that only these ranges changed since the previous restore point; - reads standard input
    #[arg(long, value_name = "FILE")]
    changes: Option<String>,
    /// The format of a disk image [default: found by its content]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// Which files a disk image may name as its backing or data file [default: same-directory where
    /// the format is given or said by the file's name, else refuse]
    #[arg(long, value_name = "WHICH")]
    backing: Option<BackingArg>,
    /// The format of parents of a disk image whose child does not say it
    #[arg(long, value_name = "FORMAT")]
    backing_format: Option<Format>,
    /// Look for parents of a disk image in this directory, too; may be repeated
    #[arg(long, value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    search: Vec<std::path::PathBuf>,
    /// Begin to track changes: in a qcow2 image of a VM that is off, by a dirty bitmap kept in it, or
    /// of an agent's disk; goes on by itself after that
    #[arg(long)]
    track: bool,
    /// The disk's id while the VM runs, for an image with --track
    #[arg(long, value_name = "DISK", requires = "track")]
    disk_id: Option<String>,
    /// Compare so many blocks of each disk that change tracking calls unchanged with the previous
    /// restore point; read the disk in full where one differs
    #[arg(long, value_name = "NUMBER", default_value_t = 0, hide_default_value = true)]
    check_unchanged: u32,
    /// Let nobody remove the restore point, nor anything it needs, for this long, from the beginning
    /// of the backup: 30d, 6months; needs a bucket with S3 Object Lock
    #[arg(long, value_name = "TIME", env = "VMTIDE_IMMUTABLE_FOR", value_parser = immutable::parse_time)]
    #[arg(hide_env_values = true)]
    immutable_for: Option<SignedDuration>,
    /// governance (users with a special permission may remove it), or compliance (nobody)
    #[arg(long, value_name = "HOW", default_value = "governance", env = "VMTIDE_IMMUTABILITY")]
    #[arg(hide_env_values = true, hide_default_value = true)]
    immutability: RetentionMode,
    /// Read at most so many bytes a second, of all VMs together, e.g. 50MiB
    #[arg(long, value_name = "RATE", value_parser = units::parse_rate)]
    limit_rate: Option<RateLimit>,
    /// The zstd level, 1 to 19; -1 to -7 are quicker and store more, 0 compresses nothing
    #[arg(long, value_name = "LEVEL", default_value_t = 3, allow_negative_numbers = true, value_parser = units::compression_level())]
    pub(crate) compression: i32,
    /// Threads that read, hash and compress [default: two more than there are processors]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(super) workers: Option<u16>,
    #[command(flatten)]
    pub(super) many: ManyArgs,
}

/// The level.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum LevelArg {
    /// Incremental where there is a restore point, else full
    Auto,
    /// Read everything
    Full,
    /// Since the previous restore point
    Incremental,
    /// Since the last full one
    Differential,
}

/// Backs up one source after the other.
pub fn run(app: &App, args: &BackupArgs) -> Result<Exit> {
    let sources =
        args.source.iter().map(|text| SourceSpec::parse(text)).collect::<Result<Vec<_>>>()?;
    if sources.len() > 1 && (args.name.is_some() || args.changes.is_some()) {
        return Err(EngineError::usage("--name and --changes are for one source only"));
    }
    let changes = args.changes.as_deref().map(read_changes).transpose()?;
    let repository = repository::open(app)?;
    let job = app.begin_job()?;
    let mut exit = Exit::Done;
    for (number, source) in sources.iter().enumerate() {
        let ended = match run_source(app, args, &repository, source, changes.as_ref(), &job) {
            Ok(ended) => ended,
            Err(error) => app.failed(&error),
        };
        exit = exit.worse(ended);
        if job.is_interrupted() {
            let left = sources.len() - number - 1;
            return Ok(exit.worse(interrupted(&app.output, ended, left)));
        }
    }
    Ok(exit)
}

/// Backs up the VM of a source, or all that it selects.
fn run_source(
    app: &App,
    args: &BackupArgs,
    repository: &Repository,
    spec: &SourceSpec,
    changes: Option<&RangeSet>,
    job: &Job,
) -> Result<Exit> {
    let open = open_source(app, args, repository, spec, changes)?;
    if let Some(vms) = backup_many::select(&args.many, &open)? {
        let many = Many { args, repository, spec, open: &open, vms };
        return backup_many::run(app, &many, job);
    }
    let mut backup_job = backup_job(args, repository, open.hypervisor.as_ref())?;
    backup_job.vm = open.vm;
    backup_job.name = open.name;
    backup_job.source = open.display;
    backup_job.outside_changes = changes.is_some();
    let summary = job.run(app, |context| backup(&backup_job, context))?;
    show(app, &summary);
    app.output.summary(&summary);
    Ok(Exit::with_warnings(!summary.warnings.is_empty()))
}

/// How an interrupted run ends that began no backup of its last `left` sources. The source that the
/// interruption met may have been done at that moment.
fn interrupted(output: &Output, ended: Exit, left: usize) -> Exit {
    if left == 0 {
        return ended;
    }
    if ended != Exit::Interrupted {
        let message = format!("interrupted: {left} sources were not backed up");
        output.error(&message, Exit::Interrupted);
    }
    Exit::Interrupted
}

fn open_source(
    app: &App,
    args: &BackupArgs,
    repository: &Repository,
    source: &SourceSpec,
    changes: Option<&RangeSet>,
) -> Result<OpenSource> {
    let tracked = match source {
        SourceSpec::Image(path) => {
            let name = args.name.clone().map_or_else(|| image_name(path), Ok)?;
            tracked_disks(repository, &name)?
        }
        _ => Vec::new(),
    };
    let display = source.display();
    source.open(&SourceOptions {
        name: args.name.clone(),
        format: args.format,
        backing: args.backing.map(BackingArg::policy),
        backing_format: args.backing_format,
        search: args.search.clone(),
        changes: changes.cloned(),
        state_directory: app.state_directory(),
        guardian: std::env::current_exe().ok(),
        track: args.track,
        disk_id: args.disk_id.clone(),
        tracked,
        agent: app.global.agents.options(&display)?,
        hyperv: app.global.hyperv.options(&display)?,
    })
}

/// The backup that the options ask for, of a VM that is not named yet.
pub(super) fn backup_job<'a>(
    args: &BackupArgs,
    repository: &'a Repository,
    hypervisor: &'a dyn Hypervisor,
) -> Result<BackupJob<'a>> {
    Ok(BackupJob {
        repository,
        hypervisor,
        vm: String::new(),
        name: None,
        source: String::new(),
        level: match args.level {
            LevelArg::Auto => LevelChoice::Auto,
            LevelArg::Full => LevelChoice::Full,
            LevelArg::Incremental => LevelChoice::Incremental,
            LevelArg::Differential => LevelChoice::Differential,
        },
        outside_changes: false,
        consistency: args.consistency,
        allow_downgrade: args.allow_downgrade,
        tags: args.tag.iter().cloned().collect(),
        exclude: args.disk_exclude.iter().cloned().map(DiskId).collect(),
        check_unchanged: args.check_unchanged,
        is_one_of_many: false,
        options: store_options(args)?,
    })
}

/// How to store. The limit on reading is one for all that come of the same arguments.
fn store_options(args: &BackupArgs) -> Result<BackupOptions> {
    let defaults = BackupOptions::default();
    Ok(BackupOptions {
        workers: args.workers.map_or(defaults.workers, usize::from),
        compression_level: args.compression,
        limit_rate: args.limit_rate.clone(),
        immutability: immutable::of(args.immutable_for, args.immutability)?,
        ..defaults
    })
}

/// The changed ranges in a JSON file, or on standard input where the path is `-`.
pub fn read_changes(path: &str) -> Result<RangeSet> {
    let io = |error| EngineError::io(format!("read the changed ranges of {path}"), error);
    let reader: Box<dyn Read> = if path == "-" {
        Box::new(std::io::stdin().lock())
    } else {
        Box::new(std::fs::File::open(path).map_err(io)?)
    };
    let mut json = Vec::new();
    reader.take(MAX_CHANGES_BYTES + 1).read_to_end(&mut json).map_err(io)?;
    if json.len() as u64 > MAX_CHANGES_BYTES {
        return Err(EngineError::usage(format!(
            "{path}: a list of changed ranges may have at most {}",
            units::size(MAX_CHANGES_BYTES)
        )));
    }
    parse_changes(path, &json)
}

pub(super) fn show(app: &App, summary: &BackupSummary) {
    let output = &app.output;
    output.line(format!(
        "{} backup of {} is restore point {}, {} consistent, after {}",
        summary.level,
        summary.vm,
        units::short_id(summary.point),
        summary.consistency,
        units::duration(summary.duration_ms),
    ));
    if summary.healed_bytes > 0 {
        let bytes = units::size(summary.healed_bytes);
        output.line(format!("healed {bytes} that were damaged in earlier restore points"));
    }
    if output.is_quiet() {
        return;
    }
    let mut table = Table::new(&[
        "disk",
        ">size",
        ">changed",
        ">read",
        ">new",
        ">stored",
        "read in full because",
    ]);
    for disk in &summary.disks {
        table.row([
            disk.id.clone(),
            units::size(disk.counts.size_bytes),
            units::size(disk.counts.changed_bytes),
            units::size(disk.counts.read_bytes),
            units::size(disk.counts.new_bytes),
            units::size(disk.counts.stored_bytes),
            disk.tracking.reason.clone().unwrap_or_default(),
        ]);
    }
    output.lines(table.lines().into_iter().map(|line| format!("  {line}")));
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        backup: BackupArgs,
    }

    #[test]
    fn the_limit_of_a_command_is_one_for_all_its_vms() {
        let line = ["backup", "hyperv://hv1/all", "--limit-rate", "50MiB"];
        let args = Line::try_parse_from(line).unwrap().backup;
        let [one, other] = [(); 2].map(|()| store_options(&args).unwrap().limit_rate.unwrap());
        assert!(one.is_shared_with(&other));
        let of_another = Line::try_parse_from(line).unwrap().backup;
        assert!(!store_options(&of_another).unwrap().limit_rate.unwrap().is_shared_with(&one));
    }

    #[test]
    fn an_interruption_between_two_sources_is_one() {
        let output = Output::new(false, true);
        assert_eq!(interrupted(&output, Exit::Done, 1), Exit::Interrupted);
        assert_eq!(interrupted(&output, Exit::Failed, 2), Exit::Interrupted);
        assert_eq!(interrupted(&output, Exit::Interrupted, 2), Exit::Interrupted);
        // All was done before the interruption could have an effect.
        assert_eq!(interrupted(&output, Exit::Done, 0), Exit::Done);
    }
}
