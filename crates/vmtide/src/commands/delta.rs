//! `vmtide delta`: the changed data of a disk between two moments, as a file or a stream.

use crate::app::App;
use crate::commands::backup::read_changes;
use crate::commands::image::OpenArgs;
use crate::exit::Exit;
use crate::{repository, units};
use clap::{Args, Subcommand, ValueEnum, ValueHint};
use std::io::Read;
use std::path::{Path, PathBuf};
use vmtide_engine::delta::{
    AppliedDelta, ApplyJob, CreateDeltaJob, CreateOptions, DeltaOrigin, DeltaOutput, DeltaSummary,
    MadeDelta, MergeJob, apply, create, info, merge,
};
use vmtide_engine::image::{DiskSpec, open_disk};
use vmtide_engine::{EngineError, Result, resolve};
use vmtide_image::Format;

const EXAMPLES: &str = "\
A delta holds what changed in one disk between two moments, compressed and checked, in an open format
(docs/delta-format.md). It is written and read as a stream; - is standard output or input.

Examples:
  vmtide delta create web@2026-11-19..web@latest -r /backup -o web.delta
  vmtide delta create web.vhdx --changes changes.json --base-id rct:1 --new-id rct:2 -o web.delta
  vmtide delta create new.qcow2 --base old.raw -o - | ssh dr vmtide delta apply - /vm/web.vhdx
  vmtide delta info web.delta --verify
  vmtide delta merge monday.delta tuesday.delta -o both.delta
  vmtide delta apply web.delta web.vhdx
  vmtide delta apply web.delta web.vhdx --child web-new.vhdx

A delta is checked from its first byte to its last before anything is written, and refused where the
target is not what it was made from. While an image is written, a note beside it says that it is
incomplete; to apply the same delta again makes it right. Afterwards the note says at which moment the
image is, and the next delta has to begin there.";

/// The options of `delta`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct DeltaArgs {
    #[command(subcommand)]
    command: DeltaCommand,
}

#[derive(Debug, Subcommand)]
enum DeltaCommand {
    /// Make a delta of a disk: by its changed ranges, by comparing two disks, or of two restore points
    Create(CreateArgs),
    /// Show what a delta says of itself, and check it
    Info(InfoArgs),
    /// Make one delta of several that follow each other
    Merge(MergeArgs),
    /// Bring an image, block device or export from one moment to the other
    Apply(Box<ApplyArgs>),
}

#[derive(Debug, Args)]
struct OutputArgs {
    /// Where to write; - for standard output
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    output: PathBuf,
    /// Replace an existing file
    #[arg(long)]
    overwrite: bool,
    /// The level of zstd, from -7 (fastest) to 22 (smallest); 0 or none does not compress
    #[arg(long, value_name = "LEVEL", default_value = "1", value_parser = parse_level)]
    #[arg(allow_hyphen_values = true)]
    compression: Level,
    /// Threads that read and compress [default: one per processor]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: Option<u16>,
}

/// A level of zstd; none, which is also written as 0, does not compress, as with `backup`.
#[derive(Clone, Copy, Debug)]
struct Level(Option<i32>);

fn parse_level(text: &str) -> std::result::Result<Level, String> {
    match text.parse::<i32>() {
        Ok(0) => Ok(Level(None)),
        Ok(level @ -7..=22) => Ok(Level(Some(level))),
        _ if text == "none" => Ok(Level(None)),
        _ => Err(format!("{text:?} is no level: -7 to 22; 0 or none does not compress")),
    }
}

/// What a delta says of its base's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum BaseDigest {
    /// Nothing: the base is not read.
    None,
    /// A digest of what it holds where something changed.
    Ranges,
    /// That, and a fingerprint of all of it, which is read for it.
    Whole,
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// The disk as it is now: an image, block device or NBD URL; or two restore points, OLD..NEW
    #[arg(value_name = "IMAGE|POINT..POINT")]
    source: String,
    /// The changed ranges, as JSON: [{"offset":0,"length":65536},…]; - for standard input
    #[arg(long, value_name = "FILE")]
    changes: Option<String>,
    /// The disk as it was; without --changes both are compared
    #[arg(long, value_name = "IMAGE")]
    base: Option<String>,
    /// The format of --base [default: found by its content]
    #[arg(long, value_name = "FORMAT", requires = "base")]
    base_format: Option<Format>,
    /// What the delta says of its base, so that a wrong one is found
    #[arg(long, value_name = "WHICH", default_value = "ranges")]
    base_digest: BaseDigest,
    /// The name of the moment before, e.g. a tracking id [default: the restore point's id]
    #[arg(long, value_name = "ID")]
    base_id: Option<String>,
    /// The name of the moment now [default: the restore point's id]
    #[arg(long, value_name = "ID")]
    new_id: Option<String>,
    /// The virtual machine, for people
    #[arg(long, value_name = "VM")]
    name: Option<String>,
    /// The disk of the restore points, where they have several
    #[arg(long, value_name = "ID")]
    disk: Option<String>,
    /// The unit in which disks are compared, and to which changed ranges are rounded
    #[arg(long, value_name = "SIZE", default_value = "4KiB", value_parser = parse_granularity)]
    granularity: u32,
    /// The format of IMAGE [default: found by its content]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// How parents are found.
    #[command(flatten)]
    open: OpenArgs,
    /// Where it goes.
    #[command(flatten)]
    output: OutputArgs,
}

fn parse_granularity(text: &str) -> std::result::Result<u32, String> {
    let bytes = units::parse_size(text)?;
    match u32::try_from(bytes) {
        Ok(bytes @ 512..=8_388_608) if bytes.is_power_of_two() => Ok(bytes),
        _ => Err(format!("{text:?} is no granularity: a power of two from 512 to 8MiB")),
    }
}

#[derive(Debug, Args)]
struct InfoArgs {
    /// The delta
    #[arg(value_name = "DELTA", value_hint = ValueHint::FilePath)]
    delta: PathBuf,
    /// Check every byte of it
    #[arg(long)]
    verify: bool,
}

#[derive(Debug, Args)]
struct MergeArgs {
    /// The deltas, the oldest first
    #[arg(value_name = "DELTA", num_args = 2.., value_hint = ValueHint::FilePath)]
    deltas: Vec<PathBuf>,
    /// Where it goes.
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct ApplyArgs {
    /// The delta; - for standard input
    #[arg(value_name = "DELTA", value_hint = ValueHint::FilePath)]
    delta: PathBuf,
    /// What to apply it to: an image, block device or NBD URL
    #[arg(value_name = "TARGET")]
    target: String,
    /// Leave TARGET alone, and make this new image a child of it that has the changes
    #[arg(long, value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    child: Option<PathBuf>,
    /// The moment that TARGET is at; the delta must begin there [default: as the note beside it says]
    #[arg(long, value_name = "ID")]
    at: Option<String>,
    /// Do not hold TARGET against what the delta says of its base
    #[arg(long)]
    no_base_check: bool,
    /// The format of TARGET [default: by its name and content, which must agree]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// How parents of TARGET are found.
    #[command(flatten)]
    open: OpenArgs,
    /// Go on even where other images read through TARGET, which breaks them
    #[arg(long)]
    force: bool,
    /// Keep a delta from standard input here until it is checked [default: beside TARGET]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    spool: Option<PathBuf>,
    /// Threads that decompress and write [default: one per processor]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: Option<u16>,
}

/// Does it.
pub fn run(app: &App, args: &DeltaArgs) -> Result<Exit> {
    match &args.command {
        DeltaCommand::Create(args) => run_create(app, args),
        DeltaCommand::Info(args) => run_info(app, args),
        DeltaCommand::Merge(args) => run_merge(app, args),
        DeltaCommand::Apply(args) => run_apply(app, args),
    }
}

impl OutputArgs {
    fn options(&self) -> CreateOptions {
        let default = CreateOptions::default();
        CreateOptions {
            level: self.compression.0,
            workers: self.workers.map_or(default.workers, usize::from),
            ..default
        }
    }

    /// Calls `make` with where it goes, and shows what came of it.
    fn write(
        &self,
        app: &App,
        make: impl FnOnce(DeltaOutput<'_>) -> Result<MadeDelta>,
    ) -> Result<Exit> {
        if self.output != Path::new("-") {
            let output = DeltaOutput::File { path: self.output.clone(), replace: self.overwrite };
            let made = make(output)?;
            app.output.line(format!("{}: {}", self.output.display(), in_words(&made.delta)));
            app.output.summary(&made);
            return Ok(Exit::Done);
        }
        if app.output.is_json() {
            return Err(EngineError::usage(
                "--json writes to standard output, where the delta goes: write it to a file",
            ));
        }
        let mut stdout = std::io::stdout().lock();
        let made = make(DeltaOutput::Stream(&mut stdout))?;
        app.output.remark(in_words(&made.delta));
        Ok(Exit::Done)
    }
}

fn run_create(app: &App, args: &CreateArgs) -> Result<Exit> {
    let options = CreateOptions {
        base_digests: args.base_digest != BaseDigest::None,
        ..args.output.options()
    };
    let job = |origin| CreateDeltaJob {
        origin,
        base_id: args.base_id.clone(),
        new_id: args.new_id.clone(),
        vm: args.name.clone(),
        granularity_bytes: args.granularity,
        fingerprint_base: args.base_digest == BaseDigest::Whole,
        options: options.clone(),
    };
    let running = app.begin_job()?;
    let make = |origin| {
        let job = job(origin);
        args.output.write(app, |output| running.run(app, |context| create(&job, output, context)))
    };
    if let Some((from, to)) = two_points(&args.source) {
        if args.changes.is_some() || args.base.is_some() {
            return Err(EngineError::usage(
                "two restore points say themselves what changed: --changes and --base are for images",
            ));
        }
        let repository = repository::open(app)?;
        let (from, to) = (resolve(&repository, from)?, resolve(&repository, to)?);
        let disk = args.disk.as_deref();
        return make(DeltaOrigin::Points { repository: &repository, from: &from, to: &to, disk });
    }
    let open = |text: &str, format| open_disk(&DiskSpec::parse(text)?, &args.open.options(format));
    let disk = open(&args.source, args.format)?;
    let base = args.base.as_ref().map(|base| open(base, args.base_format)).transpose()?;
    match (&args.changes, &base) {
        (Some(changes), base) => make(DeltaOrigin::Changes {
            disk: &disk,
            changed: read_changes(changes)?,
            base: base.as_ref().filter(|_| args.base_digest != BaseDigest::None),
            base_size_bytes: base.as_ref().map(|base| base.device.size_bytes()),
        }),
        (None, Some(base)) => make(DeltaOrigin::Disks { base, disk: &disk }),
        (None, None) => Err(EngineError::usage("give --changes, or --base to compare with")),
    }
}

/// The two restore points of `OLD..NEW`, where this is no path.
fn two_points(text: &str) -> Option<(&str, &str)> {
    if text.contains('/') || Path::new(text).exists() {
        return None;
    }
    text.split_once("..").filter(|(from, to)| !from.is_empty() && !to.is_empty())
}

fn run_info(app: &App, args: &InfoArgs) -> Result<Exit> {
    let job = app.begin_job()?;
    let summary = job.run(app, |context| info(&args.delta, args.verify, context))?;
    let output = &app.output;
    let header = &summary.header;
    let or_none = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
    output.line(format!("delta      {}", args.delta.display()));
    output.line(format!("from       {}", or_none(&header.base_id)));
    output.line(format!("to         {}", or_none(&header.new_id)));
    output.line(format!("vm, disk   {}, {}", or_none(&header.vm), or_none(&header.disk)));
    output.line(format!("disk size  {}", units::size(header.size_bytes)));
    if header.base_size_bytes != header.size_bytes {
        output.line(format!("before     {}", units::size(header.base_size_bytes)));
    }
    output.line(format!("holds      {}", in_words(&summary)));
    output.line(format!("digest     {}", summary.digest));
    if args.verify {
        output.line("every byte of it is right");
    }
    output.summary(&summary);
    Ok(Exit::Done)
}

fn run_merge(app: &App, args: &MergeArgs) -> Result<Exit> {
    let merge_job = MergeJob { deltas: args.deltas.clone(), options: args.output.options() };
    let job = app.begin_job()?;
    args.output.write(app, |output| job.run(app, |context| merge(&merge_job, output, context)))
}

fn run_apply(app: &App, args: &ApplyArgs) -> Result<Exit> {
    let is_piped = args.delta == Path::new("-");
    let stream: Option<Box<dyn Read + Send>> =
        if is_piped { Some(Box::new(std::io::stdin())) } else { None };
    let apply_job = ApplyJob {
        delta: (!is_piped).then(|| args.delta.clone()),
        target: DiskSpec::parse(&args.target)?,
        format: args.format,
        open: args.open.options(args.format),
        child: args.child.clone(),
        target_id: args.at.clone(),
        check_base: !args.no_base_check,
        force: args.force,
        spool_directory: args.spool.clone(),
        workers: args.workers.map(usize::from),
    };
    let job = app.begin_job()?;
    let done = job.run(app, |context| apply(&apply_job, stream, context))?;
    show_applied(app, &done);
    app.output.summary(&done);
    Ok(Exit::Done)
}

fn show_applied(app: &App, done: &AppliedDelta) {
    let header = &done.applied.delta.header;
    let at = match header.new_id.as_str() {
        "" => String::new(),
        id => format!(", and is at {id} now"),
    };
    app.output.line(format!(
        "{} has the changes{at}: {} of data written, {} made zero",
        done.target,
        units::size(done.applied.written_bytes),
        units::size(done.applied.zeroed_bytes),
    ));
    if done.resumed {
        app.output.remark("an application that was interrupted before is complete now");
    }
}

fn in_words(delta: &DeltaSummary) -> String {
    let totals = &delta.totals;
    format!(
        "{} changed ({} of data, {} zero, {} not allocated), {} stored",
        units::size(totals.changed_bytes()),
        units::size(totals.data_bytes),
        units::size(totals.zero_bytes),
        units::size(totals.unallocated_bytes),
        units::size(delta.stream_bytes),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restore_points_are_told_from_paths() {
        assert_eq!(two_points("web@latest..3fa9"), Some(("web@latest", "3fa9")));
        for path in ["../web.raw", "a/../b", "web.raw", "..", "web..", "..web"] {
            assert_eq!(two_points(path), None, "{path}");
        }
    }

    #[test]
    fn a_level_of_0_does_not_compress_and_neither_does_none() {
        let parsed = ["0", "none", "-7", "22"].map(|text| parse_level(text).unwrap().0);
        assert_eq!(parsed, [None, None, Some(-7), Some(22)]);
        for text in ["23", "-8", "", "some"] {
            assert!(parse_level(text).unwrap_err().contains("0 or none"), "{text}");
        }
    }
}
