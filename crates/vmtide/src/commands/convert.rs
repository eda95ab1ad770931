//! `vmtide convert`: a disk into another format, another file, device or export.

use crate::app::App;
use crate::commands::image::OpenArgs;
use crate::exit::Exit;
use crate::units;
use clap::Args;
use vmtide_engine::image::DiskSpec;
use vmtide_engine::{ConvertJob, ConvertSummary, Durability, ImageKind, Result, convert};
use vmtide_image::{Compression, Format};

const EXAMPLES: &str = "\
IN and OUT are disk images, block devices or NBD exports (nbd://HOST/EXPORT,
nbd+unix:///EXPORT?socket=PATH). The format of IN is found by its content; that of OUT is its
extension's (.vhdx .vhd .vmdk .qcow2 .raw .img) unless --to says otherwise.

A new image has its name only when it is complete; what fails or is interrupted leaves nothing. It is
sparse: zeros are left out. A disk whose size is no multiple of the sector is rounded up with zeros,
unless OUT is raw.

A conversion that replaces nothing ends when all is written, and the system brings it to the disk within
half a minute: add --sync before you delete IN. What is replaced or changed is always waited for.

Examples:
  vmtide convert web.vhdx web.qcow2
  vmtide convert web-snap3.avhdx web.vmdk --subformat streamOptimized --search /vm/base
  vmtide convert disk.qcow2 small.qcow2 --compress
  vmtide convert disk.raw small.qcow2 --compression zstd
  vmtide convert disk.vmdk /dev/vg/disk --overwrite
  vmtide convert nbd://storage/vm7 vm7.vhdx

Subformats: vhdx and vhd: dynamic, fixed; vmdk: monolithicSparse, monolithicFlat,
twoGbMaxExtentSparse, twoGbMaxExtentFlat, streamOptimized, vmfs; qcow2: v3, v2, extended-l2.";

/// The options of `convert`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ConvertArgs {
    /// What to read
    #[arg(value_name = "IN")]
    source: String,
    /// Where to write
    #[arg(value_name = "OUT")]
    target: String,
    /// The format of IN [default: found by its content]
    #[arg(long, value_name = "FORMAT")]
    from: Option<Format>,
    /// The format of OUT [default: by its extension; devices and exports are raw]
    #[arg(long, value_name = "FORMAT")]
    to: Option<Format>,
    /// What OUT is like.
    #[command(flatten)]
    kind: KindArgs,
    /// Compress the data (qcow2; streamOptimized VMDK always is)
    #[arg(long)]
    compress: bool,
    /// Compress, and how: zlib, which every program reads, or zstd, several times faster (qcow2)
    #[arg(long, value_name = "NAME")]
    compression: Option<Compression>,
    /// How parents of IN are found.
    #[command(flatten)]
    open: OpenArgs,
    /// Read an internal snapshot of a qcow2 image, by id or name
    #[arg(long, value_name = "NAME")]
    snapshot: Option<String>,
    /// Replace an existing file; overwrite a device or export that holds data
    #[arg(long)]
    overwrite: bool,
    /// Write only what differs into an existing image, device or export
    #[arg(long, conflicts_with = "overwrite")]
    in_place: bool,
    /// Replace or change OUT even where other images read through it, which breaks them
    #[arg(long)]
    force: bool,
    /// Wait until OUT is on the disk, and give it its name only then
    #[arg(long)]
    sync: bool,
    /// Never wait for the disk, even where OUT replaces another file
    #[arg(long, conflicts_with_all = ["sync", "in_place"])]
    no_sync: bool,
    /// Threads that read and write [default: as suits the machine]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: Option<u16>,
}

/// What a new image is like, beside its format.
#[derive(Clone, Debug, Args)]
pub struct KindArgs {
    /// The kind within the format; see below
    #[arg(long, value_name = "NAME")]
    subformat: Option<String>,
    /// The unit of allocation, e.g. 2MiB: qcow2's cluster, VHDX's and VHD's block, VMDK's grain
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size)]
    block_size: Option<u64>,
    /// The logical sector size of the disk, 512 or 4096 (VHDX)
    #[arg(long, value_name = "BYTES", value_parser = parse_sector)]
    logical_sector: Option<u32>,
}

impl KindArgs {
    /// With this format and compression.
    pub fn kind(&self, format: Option<Format>, compress: bool) -> ImageKind {
        ImageKind {
            format,
            subformat: self.subformat.clone(),
            block_size_bytes: self.block_size,
            logical_sector_bytes: self.logical_sector,
            compress,
            compression: None,
        }
    }
}

fn parse_sector(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err(format!("{text:?} is no sector size: 512 or 4096")),
    }
}

/// Converts.
pub fn run(app: &App, args: &ConvertArgs) -> Result<Exit> {
    let mut open = args.open.options(args.from);
    open.snapshot.clone_from(&args.snapshot);
    let convert_job = ConvertJob {
        source: DiskSpec::parse(&args.source)?,
        open,
        target: DiskSpec::parse(&args.target)?,
        kind: ImageKind {
            compression: args.compression,
            ..args.kind.kind(args.to, args.compress || args.compression.is_some())
        },
        overwrite: args.overwrite,
        in_place: args.in_place,
        force: args.force,
        durability: match (args.sync, args.no_sync) {
            (true, _) => Durability::Always,
            (_, true) => Durability::Never,
            _ => Durability::Replaced,
        },
        workers: args.workers.map(usize::from),
    };
    let job = app.begin_job()?;
    let summary = job.run(app, |context| convert(&convert_job, context))?;
    show(app, &summary);
    app.output.summary(&summary);
    Ok(Exit::Done)
}

fn show(app: &App, summary: &ConvertSummary) {
    let kind = summary.subformat.as_ref().map_or_else(String::new, |kind| format!(", {kind}"));
    app.output.line(format!(
        "{} ({}) converted to {} ({}{kind}): {}, {} of data",
        summary.source,
        summary.source_format,
        summary.target,
        summary.format,
        units::size(summary.size_bytes),
        units::size(summary.written_bytes),
    ));
    if summary.size_bytes != summary.source_size_bytes {
        app.output.remark(format!(
            "the disk has {} bytes, rounded up from {} with zeros: its format needs whole sectors",
            summary.size_bytes, summary.source_size_bytes
        ));
    }
    let per_second =
        u128::from(summary.source_size_bytes) * 1000 / u128::from(summary.duration_ms.max(1));
    app.output.remark(format!(
        "done after {}, {}/s",
        units::duration(summary.duration_ms),
        units::size(u64::try_from(per_second).unwrap_or(u64::MAX)),
    ));
}
