//! `vmtide resize`: another size for the disk in an image.

use crate::app::App;
use crate::commands::image::OpenArgs;
use crate::exit::Exit;
use crate::units;
use clap::{Args, ValueHint};
use std::path::PathBuf;
use vmtide_engine::Result;
use vmtide_engine::image::resize::{ResizeConsent, resize};
use vmtide_image::Format;

const EXAMPLES: &str = "\
The guest must be off. Partitions and file systems on the disk stay as they are: grow them in the guest
afterwards, shrink them before. VHDX and raw grow and shrink; VHD and qcow2 grow; a VMDK is converted instead.

Examples:
  vmtide resize disk.vhdx 80G
  vmtide resize disk.raw 20G --shrink";

/// The options of `resize`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ResizeArgs {
    /// The image
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    image: PathBuf,
    /// The new size of its disk, e.g. 10G, 512MiB
    #[arg(value_name = "SIZE", value_parser = units::parse_size)]
    size: u64,
    /// Its format [default: found by its content]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// Let it become smaller: what is behind the new end is lost
    #[arg(long)]
    shrink: bool,
    /// Even where other images read through it, which breaks them
    #[arg(long)]
    force: bool,
    /// How its parents and other files are found.
    #[command(flatten)]
    open: OpenArgs,
}

/// Resizes it.
pub fn run(app: &App, args: &ResizeArgs) -> Result<Exit> {
    let consent = ResizeConsent { shrink: args.shrink, force: args.force };
    let resized = resize(&args.image, args.size, &args.open.options(args.format), consent)?;
    app.output.line(format!(
        "resized {} ({}) from {} to {}",
        resized.path.display(),
        resized.format,
        units::size(resized.old_size_bytes),
        units::size(resized.size_bytes),
    ));
    app.output.summary(&resized);
    Ok(Exit::Done)
}
