//! `vmtide points`: list restore points.

use crate::app::App;
use crate::exit::{self, Exit};
use crate::table::Table;
use crate::{repository, units};
use clap::Args;
use serde::Serialize;
use std::collections::BTreeMap;
use vmtide_engine::{DiskSummary, Result, damaged_bytes, points};
use vmtide_repo::{Hold, Level, ObjectId, Origin, RestorePoint, Retention};

const EXAMPLES: &str = "\
Examples:
  vmtide points -r /backup
  vmtide points -r /backup --vm web --json

Other commands take a restore point as the first digits of its id, VM@latest, or VM@TIME for the
latest one at or before that time, e.g. web@2026-11-20T03:00.";

/// The options of `points`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct PointsArgs {
    /// Only those of this VM
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
}

/// A restore point as listed: what `show` shows without the configuration.
#[derive(Serialize)]
struct Listed<'a> {
    id: ObjectId,
    vm: &'a str,
    time: jiff::Timestamp,
    level: Level,
    parent: Option<ObjectId>,
    consistency: &'a str,
    tags: &'a BTreeMap<String, String>,
    host: &'a str,
    source: &'a str,
    disks: Vec<DiskSummary>,
    warnings: &'a [String],
    holds: Vec<&'a Hold>,
    origin: Option<Origin>,
    damaged_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    immutable: Option<Retention>,
}

impl<'a> Listed<'a> {
    fn new(point: &'a RestorePoint, holds: &'a [Hold], damaged_bytes: u64) -> Self {
        let disks = point.disks.iter().map(|disk| DiskSummary {
            id: disk.id.clone(),
            counts: disk.counts,
            tracking: disk.tracking.clone(),
        });
        Self {
            id: point.id,
            vm: &point.vm,
            time: point.time,
            level: point.level,
            parent: point.parent,
            consistency: &point.consistency,
            tags: &point.tags,
            host: &point.host,
            source: &point.source,
            disks: disks.collect(),
            warnings: &point.warnings,
            holds: holds.iter().filter(|hold| hold.point == point.id).collect(),
            origin: point.origin,
            damaged_bytes,
            immutable: point.immutable,
        }
    }
}

/// Lists them.
pub fn run(app: &App, args: &PointsArgs) -> Result<Exit> {
    let repository = repository::open(app)?;
    let list = points(&repository, args.vm.as_deref())?;
    let damaged = damaged_bytes(&repository, &list.points)?;
    let mut table = Table::new(&[
        "id",
        "time",
        "vm",
        "level",
        "consistency",
        ">size",
        ">changed",
        ">stored",
        "held",
        "immutable until",
        "tags",
    ]);
    for point in &list.points {
        let sum = |field: fn(&vmtide_repo::DiskCounts) -> u64| {
            units::size(point.disks.iter().map(|disk| field(&disk.counts)).sum())
        };
        let tags: Vec<_> = point.tags.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let holds = list.holds.iter().filter(|hold| hold.point == point.id);
        let held: Vec<_> = holds.map(super::hold::end_of).collect();
        let damage =
            damaged.get(&point.id).map(|bytes| format!("DAMAGED: {}", units::size(*bytes)));
        let notes: Vec<_> = damage.into_iter().chain(tags).collect();
        table.row([
            units::short_id(point.id),
            units::time(point.time),
            point.vm.clone(),
            point.level.to_string(),
            point.consistency.clone(),
            sum(|counts| counts.size_bytes),
            sum(|counts| counts.changed_bytes),
            sum(|counts| counts.stored_bytes),
            held.join(", "),
            point.immutable.map(|kept| units::time(kept.until)).unwrap_or_default(),
            notes.join(" "),
        ]);
    }
    if list.points.is_empty() {
        app.output.remark("no restore points yet");
    } else {
        app.output.lines(table.lines());
    }
    let mut exit = if damaged.is_empty() { Exit::Done } else { Exit::Damaged };
    if !damaged.is_empty() {
        app.output.warning("some restore points are damaged: see `vmtide verify`");
    }
    let mut unreadable = Vec::new();
    for (name, error) in list.unreadable.iter().chain(&list.unreadable_holds) {
        let message = format!("{name} cannot be read: {error}");
        app.output.warning(&message);
        unreadable.push(serde_json::json!({ "object": name, "error": error.to_string() }));
        exit = exit.worse(exit::of_repo(error));
    }
    let listed: Vec<_> = list
        .points
        .iter()
        .map(|point| Listed::new(point, &list.holds, damaged.get(&point.id).copied().unwrap_or(0)))
        .collect();
    app.output.summary(&serde_json::json!({ "points": listed, "unreadable": unreadable }));
    Ok(exit)
}
