//! `vmtide copy`: restore points into another repository.

use crate::app::App;
use crate::commands::immutable;
use crate::exit::{self, Exit};
use crate::passwords::PasswordSource;
use crate::table::Table;
use crate::{repository, units};
use clap::Args;
use jiff::SignedDuration;
use std::path::PathBuf;
use vmtide_engine::retention::Selector;
use vmtide_engine::{CopyJob, CopySummary, EngineError, Result, copy, resolve};
use vmtide_repo::{BackupOptions, RateLimit, Repository, RestorePoint, RetentionMode};

const EXAMPLES: &str = "\
The data is verified while it is read, encrypted with the keys of the other repository and deduplicated
there. What was copied before is passed over; of a VM of which a point was copied before, only what
differs is read. So the same line can run after every backup, and again after an interruption. Copying
is also how a repository gets a new master key or other chunk sizes. Holds are not copied, and the time
for which points are immutable is that of --immutable-for, whatever it is where they come from.

Examples:
  vmtide copy -r /backup --to /mnt/offsite --all
  vmtide copy web@latest -r /backup --to /mnt/offsite --to-password-file /root/offsite.password
  vmtide copy -r /backup --to /mnt/offsite --vm 'db-*' --tag class=gold --dry-run
  vmtide copy -r /backup --to s3://offsite/vm --all --immutable-for 30d --immutability compliance";

/// The options of `copy`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CopyArgs {
    /// Copy these restore points
    #[arg(value_name = "POINT", conflicts_with_all = ["vm", "tag", "all"])]
    point: Vec<String>,
    /// The repository to copy to, made by `vmtide init`
    #[arg(long, value_name = "REPO", value_hint = clap::ValueHint::DirPath)]
    to: String,
    /// Copy those of this VM; * stands for any characters; may be repeated
    #[arg(long, value_name = "NAME")]
    vm: Vec<String>,
    /// Copy those with this tag; may be repeated, then with all of them
    #[arg(long, value_name = "K=V", value_parser = units::parse_tag)]
    tag: Vec<(String, String)>,
    /// Copy all
    #[arg(long, conflicts_with_all = ["vm", "tag"])]
    all: bool,
    /// Read the password of the repository to copy to from this file; its last line feed does not
    /// count
    #[arg(long, value_name = "FILE", env = "VMTIDE_TO_PASSWORD_FILE", hide_env_values = true)]
    #[arg(value_hint = clap::ValueHint::FilePath)]
    to_password_file: Option<PathBuf>,
    /// Run this shell command and take its output as the password of the repository to copy to
    #[arg(
        long,
        value_name = "COMMAND",
        env = "VMTIDE_TO_PASSWORD_COMMAND",
        hide_env_values = true
    )]
    to_password_command: Option<String>,
    /// Let nobody remove the copies, nor anything they need, for this long, from the beginning of each
    /// copy: 30d, 6months; needs a bucket with S3 Object Lock
    #[arg(long, value_name = "TIME", env = "VMTIDE_TO_IMMUTABLE_FOR")]
    #[arg(hide_env_values = true, value_parser = immutable::parse_time)]
    immutable_for: Option<SignedDuration>,
    /// governance (users with a special permission may remove them), or compliance (nobody)
    #[arg(long, value_name = "HOW", default_value = "governance", env = "VMTIDE_TO_IMMUTABILITY")]
    #[arg(hide_env_values = true, hide_default_value = true)]
    immutability: RetentionMode,
    /// Copy nothing; show what would be copied and how much would be looked at
    #[arg(long)]
    dry_run: bool,
    /// Read at most so many bytes a second, e.g. 50MiB
    #[arg(long, value_name = "RATE", value_parser = units::parse_rate)]
    limit_rate: Option<RateLimit>,
    /// The zstd level, 1 to 19; -1 to -7 are quicker and store more, 0 compresses nothing
    #[arg(long, value_name = "LEVEL", default_value_t = 3, allow_negative_numbers = true, value_parser = units::compression_level())]
    compression: i32,
    /// Threads that read, hash and compress [default: two more than there are processors]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: Option<u16>,
}

/// Copies.
pub fn run(app: &App, args: &CopyArgs) -> Result<Exit> {
    let selector = Selector { vms: args.vm.clone(), tags: args.tag.clone() };
    if args.point.is_empty() && selector.is_empty() && !args.all {
        return Err(EngineError::usage("say what to copy: POINT…, --vm, --tag or --all"));
    }
    let source = repository::open(app)?;
    let password = PasswordSource::of_target(
        args.to_password_file.as_deref(),
        args.to_password_command.as_deref(),
    );
    let target = repository::open_with(app, &args.to, &password)?;
    let mut exit = Exit::Done;
    let points = if args.point.is_empty() {
        selected(app, &source, &selector, &mut exit)?
    } else {
        let named = args.point.iter().map(|spec| resolve(&source, spec));
        named.collect::<Result<Vec<_>>>()?
    };
    let defaults = BackupOptions::default();
    let job = CopyJob {
        source: &source,
        target: &target,
        points,
        options: BackupOptions {
            workers: args.workers.map_or(defaults.workers, usize::from),
            compression_level: args.compression,
            limit_rate: args.limit_rate.clone(),
            immutability: immutable::of(args.immutable_for, args.immutability)?,
            ..defaults
        },
        dry_run: args.dry_run,
    };
    let summary = app.begin_job()?.run(app, |context| copy(&job, context))?;
    show(app, &summary);
    if args.immutable_for.is_some() {
        tell_of_removable(app, &summary);
    }
    app.output.summary(&summary);
    Ok(if summary.failed.is_empty() { exit } else { exit.worse(Exit::Damaged) })
}

/// The points that are meant. One that cannot be read may be meant, too.
fn selected(
    app: &App,
    source: &Repository,
    selector: &Selector,
    exit: &mut Exit,
) -> Result<Vec<RestorePoint>> {
    let mut list = source.points()?;
    for (name, error) in &list.unreadable {
        app.output.warning(&format!("{name} cannot be read and is not copied: {error}"));
        *exit = exit.worse(exit::of_repo(error));
    }
    let is_empty = list.points.is_empty() && list.unreadable.is_empty();
    list.points.retain(|point| selector.selects_point(&point.vm, &point.tags));
    if list.points.is_empty() && !is_empty && *exit == Exit::Done {
        return Err(EngineError::NotFound {
            what: format!("a restore point to copy in {}", source.location()),
            hint: "see `vmtide points` for all".into(),
        });
    }
    Ok(list.points)
}

/// What was copied before keeps the time it has: says so where that is none though one is asked for.
fn tell_of_removable(app: &App, summary: &CopySummary) {
    let removable = summary.present.iter().filter(|point| point.immutable.is_none()).count();
    if removable > 0 {
        app.output.remark(format!(
            "{removable} restore points were copied before without --immutable-for, and stay \
             removable: forget them there and copy them again if they are to be immutable"
        ));
    }
}

fn show(app: &App, summary: &CopySummary) {
    if !summary.copied.is_empty() && !app.output.is_quiet() {
        let mut table =
            Table::new(&["from", "to", "time", "vm", "disk", ">size", ">read", ">new", ">stored"]);
        for point in &summary.copied {
            for disk in &point.disks {
                table.row([
                    units::short_id(point.from),
                    point.point.map(units::short_id).unwrap_or_default(),
                    units::time(point.time),
                    point.vm.clone(),
                    disk.id.clone(),
                    units::size(disk.size_bytes),
                    units::size(disk.read_bytes),
                    units::size(disk.new_bytes),
                    units::size(disk.stored_bytes),
                ]);
            }
        }
        app.output.lines(table.lines());
    }
    let damaged = match summary.failed.len() {
        0 => String::new(),
        count => format!(", {count} not copied because of damage"),
    };
    app.output.line(format!(
        "{} restore points {}copied, {} were there already{damaged}, after {}",
        summary.copied.len(),
        if summary.dry_run { "would be " } else { "" },
        summary.present.len(),
        units::duration(summary.duration_ms),
    ));
}
