//! `vmtide map`: which bytes of a disk hold data, and where they lie.

use crate::app::App;
use crate::commands::image::OpenArgs;
use crate::exit::Exit;
use clap::Args;
use vmtide_block::{CancelToken, ExtentKind};
use vmtide_engine::Result;
use vmtide_engine::image::map::{MapExtent, map_disk};
use vmtide_engine::image::{DiskSpec, open_disk};
use vmtide_image::Format;

const EXAMPLES: &str = "\
Examples:
  vmtide map web.vhdx
  vmtide map overlay.qcow2 --search /vm/base --json | jq 'select(.kind == \"data\")'

Depth 0 is the image itself, 1 its parent. Offsets are in the file of that layer; what is stored
compressed, or not at all, has none.";

/// The options of `map`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct MapArgs {
    /// The disk image, block device or NBD URL
    #[arg(value_name = "IMAGE")]
    image: String,
    /// Its format [default: found by its content]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// How parents are found.
    #[command(flatten)]
    open: OpenArgs,
    /// An internal snapshot of a qcow2 image, by id or name
    #[arg(long, value_name = "NAME")]
    snapshot: Option<String>,
}

/// Shows it.
pub fn run(app: &App, args: &MapArgs) -> Result<Exit> {
    let mut options = args.open.options(args.format);
    options.snapshot.clone_from(&args.snapshot);
    let disk = open_disk(&DiskSpec::parse(&args.image)?, &options)?;
    let (mut extents, mut totals) = (0u64, [0u64; 3]);
    app.output.line(format!(
        "{:>16} {:>16} {:>5}  {:<12} {:>16}  file",
        "start", "length", "depth", "kind", "offset"
    ));
    map_disk(&disk, &CancelToken::new(), &mut |extent| {
        extents += 1;
        let total = match extent.kind {
            ExtentKind::Data => &mut totals[0],
            ExtentKind::Zero => &mut totals[1],
            ExtentKind::Unallocated => &mut totals[2],
        };
        *total += extent.length;
        if app.output.is_json() {
            app.output.event("extent", &extent);
        } else {
            app.output.line(line(&extent));
        }
        Ok(())
    })?;
    let layers: Vec<_> = disk.layers.iter().map(|layer| layer.path.clone()).collect();
    app.output.summary(&serde_json::json!({
        "image": disk.name,
        "format": disk.format,
        "size_bytes": disk.device.size_bytes(),
        "extents": extents,
        "data_bytes": totals[0],
        "zero_bytes": totals[1],
        "unallocated_bytes": totals[2],
        "layers": layers,
    }));
    Ok(Exit::Done)
}

fn line(extent: &MapExtent<'_>) -> String {
    let kind = match (extent.kind, extent.compressed) {
        (ExtentKind::Data, true) => "compressed",
        (ExtentKind::Data, false) => "data",
        (ExtentKind::Zero, _) => "zero",
        (ExtentKind::Unallocated, _) => "unallocated",
    };
    let depth = extent.depth.map_or_else(|| "-".into(), |depth| depth.to_string());
    let offset = extent.offset.map_or_else(|| "-".into(), |offset| offset.to_string());
    let file = extent.file.map_or_else(String::new, |file| file.display().to_string());
    let line = format!(
        "{:>16} {:>16} {depth:>5}  {kind:<12} {offset:>16}  {file}",
        extent.start, extent.length
    );
    line.trim_end().to_owned()
}
