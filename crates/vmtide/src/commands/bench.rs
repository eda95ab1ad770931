//! `vmtide bench`: what this machine and a store can do.

use crate::app::App;
use crate::commands::image::OpenArgs;
use crate::exit::Exit;
use crate::table::Table;
use crate::{repository, units};
use clap::Args;
use vmtide_block::BlockDevice;
use vmtide_engine::image::{DiskSpec, open_disk};
use vmtide_engine::{BenchJob, EngineError, Result, bench};
use vmtide_image::Format;
use vmtide_repo::{BackupOptions, Measured};

const EXAMPLES: &str = "\
Measures every stage of a backup and a restore by itself: the processor's stages with one thread on a sample in
memory, the store's on objects as large as packs, and all of it together with a disk made of the sample. A backup
cannot be faster than its slowest stage, times the threads that do it.

Needs no password: nothing of the repository is read. What is measured with lies apart from it, under bench/, and is
removed at the end. Storage that keeps every object for a time keeps these as well.

Examples:
  vmtide bench -r /backup
  vmtide bench -r /backup --source web.qcow2 --size 4GiB";

/// The options of `bench`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct BenchArgs {
    /// Read this disk image, block device or NBD URL, and take the sample from it [default: made up]
    #[arg(long, value_name = "SOURCE")]
    source: Option<String>,
    /// The format of the source [default: found by its content]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// How parents are found.
    #[command(flatten)]
    open: OpenArgs,
    /// How much is backed up and restored, and at most read
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = units::parse_size)]
    size: u64,
    /// Threads [default: as many as a backup has]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: Option<u16>,
}

/// Measures.
pub fn run(app: &App, args: &BenchArgs) -> Result<Exit> {
    let location = app.global.repository.as_deref().ok_or_else(|| {
        EngineError::usage("no repository: give -r REPO, or set VMTIDE_REPOSITORY")
    })?;
    let store = repository::store_at(app, location)?;
    let open = |text: &String| open_disk(&DiskSpec::parse(text)?, &args.open.options(args.format));
    let source = args.source.as_ref().map(open).transpose()?;
    let defaults = BackupOptions::default();
    let bench_job = BenchJob {
        store,
        source: source.as_ref().map(|source| &*source.device as &dyn BlockDevice),
        size_bytes: args.size,
        options: BackupOptions {
            workers: args.workers.map_or(defaults.workers, usize::from),
            ..defaults
        },
    };
    let job = app.begin_job()?;
    let summary = job.run(app, |context| bench(&bench_job, context))?;
    let mut table =
        Table::new(&["STAGE", ">THREADS", ">RATE", ">LEFT", ">MEDIAN", ">90 %", ">99 %", ">MAX"]);
    for stage in &summary.stages {
        table.row(row(stage));
    }
    table.lines().into_iter().for_each(|line| app.output.line(line));
    app.output.remark(format!(
        "sample: {}; {} processors; store: {}",
        summary.sample, summary.processors, summary.store
    ));
    app.output.summary(&summary);
    Ok(Exit::Done)
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "rates for people"
)]
fn row(stage: &Measured) -> [String; 8] {
    let rate = if stage.bytes == 0 {
        format!("{:.0} objects/s", stage.operations as f64 / stage.seconds)
    } else {
        format!("{}/s", units::size(stage.bytes_per_second as u64))
    };
    let milliseconds = |value: Option<f64>| value.map_or(String::new(), |ms| format!("{ms:.1} ms"));
    let latency = stage.latency;
    [
        stage.stage.clone(),
        stage.threads.to_string(),
        rate,
        stage.left.map_or(String::new(), |left| format!("{:.1} %", left * 100.0)),
        milliseconds(latency.map(|latency| latency.median_ms)),
        milliseconds(latency.map(|latency| latency.p90_ms)),
        milliseconds(latency.map(|latency| latency.p99_ms)),
        milliseconds(latency.map(|latency| latency.max_ms)),
    ]
}
