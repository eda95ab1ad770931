//! `vmtide compare`: whether two disks hold the same.

use crate::app::App;
use crate::commands::image::OpenArgs;
use crate::exit::Exit;
use crate::units;
use clap::Args;
use vmtide_engine::Result;
use vmtide_engine::image::compare::compare;
use vmtide_engine::image::{DiskSpec, open_disk};
use vmtide_image::Format;

const EXAMPLES: &str = "\
Ends with code 0 where both hold the same, 1 where they differ; 4, 5, 6 and 130 as always. A smaller
disk holds the same as a larger one whose rest is zero, unless --strict.

Examples:
  vmtide compare web.vhdx web.qcow2
  vmtide compare disk.raw nbd+unix:///?socket=/run/disk.sock --strict";

/// The options of `compare`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CompareArgs {
    /// A disk image, block device or NBD URL
    #[arg(value_name = "A")]
    left: String,
    /// Another one
    #[arg(value_name = "B")]
    right: String,
    /// The format of A [default: found by its content]
    #[arg(long, value_name = "FORMAT")]
    format_a: Option<Format>,
    /// The format of B [default: found by its content]
    #[arg(long, value_name = "FORMAT")]
    format_b: Option<Format>,
    /// How parents are found.
    #[command(flatten)]
    open: OpenArgs,
    /// Different sizes are a difference
    #[arg(long)]
    strict: bool,
    /// Threads that read and compare [default: one per processor]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: Option<u16>,
}

/// Compares.
pub fn run(app: &App, args: &CompareArgs) -> Result<Exit> {
    let open = |text: &str, format| open_disk(&DiskSpec::parse(text)?, &args.open.options(format));
    let left = open(&args.left, args.format_a)?;
    let right = open(&args.right, args.format_b)?;
    let job = app.begin_job()?;
    let workers = args.workers.map(usize::from);
    let found = job.run(app, |context| compare(&left, &right, args.strict, workers, context))?;
    let output = &app.output;
    match (found.identical, found.first_difference) {
        (true, _) if found.size_bytes[0] == found.size_bytes[1] => {
            output.line("the disks are identical");
        }
        (true, _) => output.line(format!(
            "the disks hold the same; their sizes are {} and {} bytes, and the rest is zero",
            found.size_bytes[0], found.size_bytes[1]
        )),
        (false, Some(offset)) => output.line(format!(
            "the disks differ, first at byte {offset} (after {})",
            units::size(offset)
        )),
        (false, None) => output.line(format!(
            "the disks differ in size: {} and {} bytes",
            found.size_bytes[0], found.size_bytes[1]
        )),
    }
    output.summary(&found);
    Ok(if found.identical { Exit::Done } else { Exit::Failed })
}
