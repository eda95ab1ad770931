//! `vmtide chain`: images that read through other images.

use crate::app::App;
use crate::commands::image::OpenArgs;
use crate::exit::Exit;
use crate::table::Table;
use crate::units;
use clap::{Args, Subcommand, ValueHint};
use std::path::PathBuf;
use vmtide_engine::Result;
use vmtide_engine::image::chain::{RebaseJob, broken_end, commit, list, rebase};
use vmtide_image::{ChainLayer, Format, ParentState};

const EXAMPLES: &str = "\
A chain is an image and its parents: VHDX and VHD differencing disks, VMDK snapshots, qcow2 overlays.

Examples:
  vmtide chain list web-snap3.avhdx --search /vm/base
  vmtide chain commit web-snap3.avhdx            merge it into its parent; then it may be deleted
  vmtide chain rebase top.qcow2 --parent base.qcow2
  vmtide chain rebase top.vhdx --parent /new/place/base.vhdx --relink-only
  vmtide chain rebase top.qcow2 --no-parent      copy all it reads from its parents into it

Nothing else may have the images open. What is cut off leaves images that read as before, and can be
run again.";

/// The options of `chain`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ChainArgs {
    #[command(subcommand)]
    command: ChainCommand,
}

#[derive(Debug, Subcommand)]
enum ChainCommand {
    /// List an image and its parents, and whether each is the one its child was made from
    List(ListArgs),
    /// Give an image another parent, keeping what it reads as
    Rebase(RebaseArgs),
    /// Merge an image into its parent
    Commit(CommitArgs),
}

#[derive(Debug, Args)]
struct ImageArgs {
    /// The disk image
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    image: PathBuf,
    /// Its format [default: found by its content]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// How parents are found.
    #[command(flatten)]
    open: OpenArgs,
}

#[derive(Debug, Args)]
struct ListArgs {
    #[command(flatten)]
    image: ImageArgs,
}

#[derive(Debug, Args)]
struct RebaseArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// The new parent
    #[arg(long, value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    #[arg(required_unless_present = "no_parent", conflicts_with = "no_parent")]
    parent: Option<PathBuf>,
    /// The new parent's format [default: found by its content]
    #[arg(long, value_name = "FORMAT", requires = "parent")]
    parent_format: Option<Format>,
    /// Make the image complete by itself
    #[arg(long)]
    no_parent: bool,
    /// Name the parent like this in the image [default: its path from the image's directory]
    #[arg(long, value_name = "NAME", requires = "parent")]
    stored_name: Option<String>,
    /// Copy nothing: the parent is the same one, moved or renamed
    #[arg(long, requires = "parent")]
    relink_only: bool,
    /// Go on even where other images read through this one and would break
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
struct CommitArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// Delete the image when it is merged
    #[arg(long)]
    delete: bool,
    /// Go on even where other images read through the parent, which breaks them
    #[arg(long)]
    force: bool,
}

/// Does it.
pub fn run(app: &App, args: &ChainArgs) -> Result<Exit> {
    match &args.command {
        ChainCommand::List(args) => run_list(app, &args.image),
        ChainCommand::Rebase(args) => run_rebase(app, args),
        ChainCommand::Commit(args) => run_commit(app, args),
    }
}

fn run_list(app: &App, args: &ImageArgs) -> Result<Exit> {
    let layers = list(&args.image, &args.open.options(args.format))?;
    let mut table =
        Table::new(&["", "image", "format", ">size", ">file size", "identity", "parent"]);
    for (depth, layer) in layers.iter().enumerate() {
        let kind = layer.subformat.as_ref().map_or_else(String::new, |kind| format!(", {kind}"));
        table.row([
            depth.to_string(),
            layer.path.display().to_string(),
            format!("{}{kind}", layer.format),
            units::size(layer.size_bytes),
            units::size(layer.file_size_bytes),
            layer.identity.clone().unwrap_or_default(),
            parent_of(layer),
        ]);
    }
    app.output.lines(table.lines());
    let broken = broken_end(&layers);
    if let Some(broken) = &broken {
        app.output.warning(broken);
    }
    app.output.summary(&serde_json::json!({ "layers": layers, "complete": broken.is_none() }));
    Ok(Exit::with_warnings(broken.is_some()))
}

fn parent_of(layer: &ChainLayer) -> String {
    let Some(parent) = &layer.parent else {
        return "none".into();
    };
    let state = match parent.state {
        ParentState::Ok => "ok",
        ParentState::Missing => "MISSING",
        ParentState::Mismatch => "NOT THE SAME",
        ParentState::NotLookedFor => "not looked for",
    };
    format!("{}: {state}", parent.name)
}

fn run_rebase(app: &App, args: &RebaseArgs) -> Result<Exit> {
    let rebase_job = RebaseJob {
        path: args.image.image.clone(),
        open: args.image.open.options(args.image.format),
        parent: args.parent.clone(),
        parent_format: args.parent_format,
        stored_name: args.stored_name.clone(),
        relink_only: args.relink_only,
        force: args.force,
    };
    let job = app.begin_job()?;
    let done = job.run(app, |context| rebase(&rebase_job, context))?;
    let parent = done.parent.as_ref().map_or_else(
        || "stands alone now".to_owned(),
        |parent| format!("is a child of {} now", parent.display()),
    );
    app.output.line(format!(
        "{} {parent}; {} copied",
        done.path.display(),
        units::size(done.summary.copied_bytes)
    ));
    app.output.summary(&done);
    Ok(Exit::Done)
}

fn run_commit(app: &App, args: &CommitArgs) -> Result<Exit> {
    let options = args.image.open.options(args.image.format);
    let job = app.begin_job()?;
    let done = job.run(app, |context| {
        commit(&args.image.image, &options, args.force, args.delete, context)
    })?;
    let summary = &done.summary;
    let rest = if done.deleted { "it is deleted" } else { "it may be deleted" };
    app.output.line(format!(
        "{} merged into {}: {} written; {rest}",
        done.path.display(),
        summary.parent.display(),
        units::size(summary.written_bytes),
    ));
    for child in &summary.broken_children {
        app.output.warning(&format!("{} read through it and is broken now", child.display()));
    }
    app.output.summary(&done);
    Ok(Exit::with_warnings(!summary.broken_children.is_empty()))
}
