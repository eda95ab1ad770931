//! `vmtide info`: what an image says of itself.

use crate::app::App;
use crate::commands::image::OpenArgs;
use crate::exit::Exit;
use crate::table::Table;
use crate::units;
use clap::{Args, ValueHint};
use serde::Serialize;
use std::path::PathBuf;
use vmtide_engine::Result;
use vmtide_engine::agent::{AgentDiskReport, AgentUrl, agent_disks};
use vmtide_engine::image::info::{ImageReport, report, report_chain};
use vmtide_image::{Format, LogState};

const EXAMPLES: &str = "\
Examples:
  vmtide info web.vhdx
  vmtide info web-snap3.avhdx --chain --search /vm/base
  vmtide info disk.vmdk --json | jq .size_bytes
  vmtide info agent+https://hv1/C:/VMs/web.vhdx

Without --chain no other file is opened. With it, code 3 tells of a parent that is missing or is not
the one its child was made from.";

/// The options of `info`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct InfoArgs {
    /// The disk image, or a disk of an agent (agent+https://HOST/PATH)
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    image: PathBuf,
    /// Its format [default: found by its content]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// Show all its parents, too
    #[arg(long)]
    chain: bool,
    /// How parents are found.
    #[command(flatten)]
    open: OpenArgs,
}

#[derive(Serialize)]
struct Summary<'a> {
    #[serde(flatten)]
    image: &'a ImageReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    chain: Option<&'a [ImageReport]>,
}

/// Shows it.
pub fn run(app: &App, args: &InfoArgs) -> Result<Exit> {
    if let Some(text) = args.image.to_str().filter(|text| AgentUrl::is_agent_url(text)) {
        return of_agent(app, text);
    }
    let top = report(&args.image, args.format)?;
    show(app, &top);
    let (mut chain, mut broken) = (None, None);
    if args.chain {
        let (layers, end) = report_chain(&args.image, &args.open.options(args.format))?;
        for layer in layers.iter().skip(1) {
            app.output.line("");
            show(app, layer);
        }
        chain = Some(layers);
        broken = end;
    }
    if let Some(broken) = &broken {
        app.output.warning(broken);
    }
    app.output.summary(&Summary { image: &top, chain: chain.as_deref() });
    Ok(Exit::with_warnings(broken.is_some()))
}

fn of_agent(app: &App, text: &str) -> Result<Exit> {
    let reports = agent_disks(&AgentUrl::parse(text)?, &app.global.agents.options(text)?)?;
    for (number, report) in reports.iter().enumerate() {
        if number > 0 {
            app.output.line("");
        }
        show_agent_disk(app, report);
    }
    app.output.summary(&serde_json::json!({ "disks": reports }));
    Ok(Exit::Done)
}

fn show_agent_disk(app: &App, report: &AgentDiskReport) {
    let field = |name: &str, value: Option<String>| {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            app.output.line(format!("{name:<16} {value}"));
        }
    };
    let bytes = |bytes: u64| format!("{} ({bytes} bytes)", units::size(bytes));
    field("disk", Some(report.path.clone()));
    let kind = report.subformat.map_or_else(String::new, |kind| format!(", {kind}"));
    field("format", report.format.as_ref().map(|format| format!("{format}{kind}")));
    field("virtual size", Some(bytes(report.size_bytes)));
    field("file size", report.file_size_bytes.map(bytes));
    let physical = report
        .physical_sector_bytes
        .map_or_else(String::new, |bytes| format!(", {bytes} physical"));
    field(
        "sectors",
        report.logical_sector_bytes.map(|bytes| format!("{bytes} bytes logical{physical}")),
    );
    field("parent", report.parent_path.clone());
    field("disk id", report.disk_id.clone());
    field("change tracking", Some(if report.tracking { "on" } else { "off" }.into()));
    field("most recent id", Some(report.most_recent_id.clone()));
    field(
        "agent",
        Some(if report.has_v1 { "vmtide" } else { "rct-service's interface only" }.into()),
    );
}

fn show(app: &App, report: &ImageReport) {
    let field = |name: &str, value: String| app.output.line(format!("{name:<16} {value}"));
    let optional = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            field(name, value);
        }
    };
    let info = &report.info;
    let bytes = |bytes: u64| format!("{} ({bytes} bytes)", units::size(bytes));
    field("image", report.path.display().to_string());
    let kind = info.subformat.as_ref().map_or_else(String::new, |kind| format!(", {kind}"));
    let version = info.version.map_or_else(String::new, |version| format!(", version {version}"));
    field("format", format!("{}{kind}{version}", info.format));
    field("virtual size", bytes(info.size_bytes));
    field("file size", bytes(info.file_size_bytes));
    optional("disk usage", report.disk_usage_bytes.map(bytes));
    optional("block size", info.block_size_bytes.map(bytes));
    let sectors = info.logical_sector_bytes.map(|logical| match info.physical_sector_bytes {
        Some(physical) => format!("{logical} bytes logical, {physical} physical"),
        None => format!("{logical} bytes logical"),
    });
    optional("sectors", sectors);
    optional("creator", info.creator.clone());
    for (name, value) in &info.identifiers {
        field(&name.replace('_', " "), value.clone());
    }
    if let Some(parent) = &info.backing {
        let format =
            parent.format.as_ref().map_or_else(String::new, |format| format!(" ({format})"));
        field("parent", format!("{}{format}", parent.name));
        for name in &parent.other_names {
            field("  also named", name.clone());
        }
        optional("  must be", parent.identity.clone());
    }
    optional("data file", info.data_file.clone());
    for name in &info.extent_files {
        field("extent file", name.clone());
    }
    if !info.features.is_empty() {
        field("features", info.features.join(", "));
    }
    show_state(report, &field);
    show_lists(app, report);
}

fn show_state(report: &ImageReport, field: &dyn Fn(&str, String)) {
    let info = &report.info;
    if let Some(log) = info.log {
        let state = match log {
            LogState::Empty => "empty",
            LogState::Dirty => {
                "holds changes: replayed by every reader, and written at the next opening for writing"
            }
        };
        field("log", state.into());
    }
    if info.dirty {
        field("state", "dirty: its last writer did not close it".into());
    }
    if info.corrupt {
        field(
            "state",
            "marked corrupt: repair it before it is written (vmtide check --repair)".into(),
        );
    }
    if let Some(file) = &info.change_tracking_file {
        field("change tracking", format!("in {file}"));
    }
    for file in &report.tracking_files {
        field("change tracking", format!("RCT, in {}", file.display()));
    }
}

fn show_lists(app: &App, report: &ImageReport) {
    let info = &report.info;
    if !info.snapshots.is_empty() {
        let mut table = Table::new(&["snapshot", "name", ">size", ">vm state"]);
        for snapshot in &info.snapshots {
            table.row([
                snapshot.id.clone(),
                snapshot.name.clone(),
                units::size(snapshot.size_bytes),
                units::size(snapshot.vm_state_bytes),
            ]);
        }
        app.output.lines(table.lines());
    }
    if !info.bitmaps.is_empty() {
        let mut table = Table::new(&["bitmap", ">granularity", "recording", "state"]);
        for bitmap in &info.bitmaps {
            table.row([
                bitmap.name.clone(),
                units::size(bitmap.granularity_bytes),
                if bitmap.recording { "yes" } else { "no" }.into(),
                bitmap.state.explanation().into(),
            ]);
        }
        app.output.lines(table.lines());
    }
}
