//! `vmtide create`: a new, empty disk image, or a child of another one.

use crate::app::App;
use crate::commands::convert::KindArgs;
use crate::commands::image::OpenArgs;
use crate::exit::Exit;
use crate::units;
use clap::{Args, ValueHint};
use std::path::PathBuf;
use vmtide_engine::Result;
use vmtide_engine::image::create::{CreateJob, create};
use vmtide_image::Format;

const EXAMPLES: &str = "\
The format is that of the extension (.vhdx .vhd .vmdk .qcow2 .raw .img) unless --format says otherwise.
A size that is no multiple of the sector is rounded up, unless the format is raw.

Examples:
  vmtide create disk.vhdx 40G
  vmtide create disk.vhd 512MiB --subformat fixed
  vmtide create child.avhdx --parent disk.vhdx
  vmtide create disk.vmdk 2T --subformat twoGbMaxExtentSparse

Subformats: vhdx and vhd: dynamic, fixed, differencing; vmdk: monolithicSparse, monolithicFlat,
twoGbMaxExtentSparse, twoGbMaxExtentFlat, streamOptimized, vmfs.";

/// The options of `create`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CreateArgs {
    /// The image to make
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    image: PathBuf,
    /// The size of its disk, e.g. 10G, 512MiB [default: the parent's]
    #[arg(value_name = "SIZE", value_parser = units::parse_size)]
    size: Option<u64>,
    /// Its format [default: by the extension]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// What it is like.
    #[command(flatten)]
    kind: KindArgs,
    /// Make it a child of this image, which must not change any more
    #[arg(long, value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    parent: Option<PathBuf>,
    /// The parent's format [default: found by its content]
    #[arg(long, value_name = "FORMAT", requires = "parent")]
    parent_format: Option<Format>,
    /// How the parent's own parents are found.
    #[command(flatten)]
    open: OpenArgs,
    /// Replace an existing file
    #[arg(long)]
    overwrite: bool,
    /// Replace it even where other images read through it, which breaks them
    #[arg(long, requires = "overwrite")]
    force: bool,
}

/// Creates it.
pub fn run(app: &App, args: &CreateArgs) -> Result<Exit> {
    let summary = create(&CreateJob {
        path: args.image.clone(),
        size_bytes: args.size,
        kind: args.kind.kind(args.format, false),
        parent: args.parent.clone(),
        open_parent: args.open.options(args.parent_format),
        overwrite: args.overwrite,
        force: args.force,
    })?;
    let parent =
        summary.parent.as_ref().map_or_else(String::new, |name| format!(", child of {name}"));
    app.output.line(format!(
        "created {}: {}, {}{parent}",
        summary.path.display(),
        summary.format,
        units::size(summary.size_bytes),
    ));
    app.output.summary(&summary);
    Ok(Exit::Done)
}
