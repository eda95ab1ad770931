//! `vmtide diff`: what differs between two restore points.

use crate::app::App;
use crate::exit::Exit;
use crate::table::Table;
use crate::{repository, units};
use clap::Args;
use vmtide_engine::{DiskChange, DiskDifference, Result, diff, resolve};

const EXAMPLES: &str = "\
Examples:
  vmtide diff web@2026-11-19 web@latest -r /backup
  vmtide diff 3fa9c1d2 88b0aa41 -r /backup --json

The ranges in the JSON summary can be given to `vmtide backup --changes`. They are whole blocks,
are found without reading more than the partition tables, and may hold bytes that are equal but were stored twice.";

/// The options of `diff`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct DiffArgs {
    /// The first restore point
    #[arg(value_name = "POINT")]
    from: String,
    /// The second restore point
    #[arg(value_name = "POINT")]
    to: String,
    /// List the ranges, too
    #[arg(long)]
    ranges: bool,
}

/// Shows the differences.
pub fn run(app: &App, args: &DiffArgs) -> Result<Exit> {
    let repository = repository::open(app)?;
    let from = resolve(&repository, &args.from)?;
    let to = resolve(&repository, &args.to)?;
    let disks = diff(&repository, &from, &to)?;
    let mut table = Table::new(&["disk", "change", ">bytes", ">ranges"]);
    for disk in &disks {
        let change = match disk.change {
            DiskChange::Same => "same",
            DiskChange::Changed => "changed",
            DiskChange::Added => "added",
            DiskChange::Removed => "removed",
        };
        table.row([
            disk.id.clone(),
            change.into(),
            units::size(disk.changed_bytes),
            disk.ranges.as_slice().len().to_string(),
        ]);
    }
    app.output.lines(table.lines());
    show_partitions(app, &disks);
    if args.ranges {
        for disk in &disks {
            for range in disk.ranges.iter() {
                app.output.line(format!("{} {} {}", disk.id, range.offset, range.length));
            }
        }
    }
    app.output.summary(&serde_json::json!({
        "from": from.id,
        "to": to.id,
        "disks": disks,
    }));
    Ok(Exit::Done)
}

/// How much differs in which partition.
fn show_partitions(app: &App, disks: &[DiskDifference]) {
    let mut table = Table::new(&["disk", "partition", "type", "name", ">bytes"]);
    let mut rows = 0;
    for disk in disks.iter().filter(|disk| !disk.partitions.is_empty()) {
        for part in &disk.partitions {
            rows += 1;
            table.row([
                disk.id.clone(),
                part.partition.number.to_string(),
                part.partition.kind.clone(),
                part.partition.name.clone().unwrap_or_default(),
                units::size(part.bytes),
            ]);
        }
        if disk.unpartitioned_bytes > 0 {
            let bytes = units::size(disk.unpartitioned_bytes);
            table.row([disk.id.clone(), "-".into(), "in none".into(), String::new(), bytes]);
        }
    }
    if rows > 0 {
        app.output.line("");
        app.output.lines(table.lines());
    }
}
