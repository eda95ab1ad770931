//! `vmtide show`: everything about one restore point.

use crate::app::App;
use crate::exit::Exit;
use crate::table::Table;
use crate::{repository, units};
use clap::Args;
use vmtide_engine::{Result, damaged_bytes, resolve};
use vmtide_hypervisor::VmConfig;
use vmtide_repo::RestorePoint;

const EXAMPLES: &str = "\
Examples:
  vmtide show web@latest -r /backup
  vmtide show 3fa9c1d2 -r /backup --json | jq .config";

/// The options of `show`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ShowArgs {
    /// Id or its first digits, VM@latest, or VM@TIME
    #[arg(value_name = "POINT")]
    point: String,
}

/// The summary event.
#[derive(serde::Serialize)]
struct Shown<'a> {
    #[serde(flatten)]
    point: &'a RestorePoint,
    damaged_bytes: u64,
}

/// Shows it.
pub fn run(app: &App, args: &ShowArgs) -> Result<Exit> {
    let repository = repository::open(app)?;
    let point = resolve(&repository, &args.point)?;
    let damaged = damaged_bytes(&repository, std::slice::from_ref(&point))?;
    let damaged = damaged.get(&point.id).copied().unwrap_or(0);
    show(app, &point);
    if damaged > 0 {
        app.output.warning(&format!(
            "{} of its data are damaged: see `vmtide verify {}`",
            units::size(damaged),
            units::short_id(point.id)
        ));
    }
    app.output.summary(&Shown { point: &point, damaged_bytes: damaged });
    Ok(if damaged > 0 { Exit::Damaged } else { Exit::Done })
}

fn show(app: &App, point: &RestorePoint) {
    let output = &app.output;
    let field = |name: &str, value: &str| {
        if !value.is_empty() {
            output.line(format!("{name:<12} {value}"));
        }
    };
    field("id", &point.id.to_string());
    field("vm", &point.vm);
    field("time", &units::time(point.time));
    let parent = point.parent.map(|id| format!(", compared with {}", units::short_id(id)));
    field("level", &format!("{}{}", point.level, parent.unwrap_or_default()));
    field("consistency", &point.consistency);
    if let Some(kept) = point.immutable {
        let until = units::time(kept.until);
        field("immutable", &format!("until {until} ({}), with all it needs", kept.mode));
    }
    field("host", &point.host);
    field("source", &point.source);
    field("written by", &point.program);
    let origin = point.origin.map(|origin| {
        format!("restore point {} of repository {}", origin.point, origin.repository)
    });
    field("copied from", &origin.unwrap_or_default());
    for (key, value) in &point.tags {
        field("tag", &format!("{key}={value}"));
    }
    for warning in &point.warnings {
        field("warning", warning);
    }
    show_machine(&field, point);
    let mut table = Table::new(&["disk", ">size", ">changed", ">read", ">stored", "tracking"]);
    for disk in &point.disks {
        table.row([
            disk.id.clone(),
            units::size(disk.size_bytes),
            units::size(disk.counts.changed_bytes),
            units::size(disk.counts.read_bytes),
            units::size(disk.counts.stored_bytes),
            disk.tracking.reason.clone().unwrap_or_else(|| "used".into()),
        ]);
    }
    output.line("");
    output.lines(table.lines());
}

/// The configuration, as far as a newer or older version wrote what this one knows.
fn show_machine(field: &impl Fn(&str, &str), point: &RestorePoint) {
    let Ok(config) = serde_json::from_value::<VmConfig>(point.config.clone()) else {
        return;
    };
    let mut words = vec![config.platform];
    words.extend(config.platform_version);
    words.extend(config.machine);
    words.extend(config.processors.map(|count| format!("{count} processors")));
    words.extend(config.memory_bytes.map(|bytes| format!("{} memory", units::size(bytes))));
    field("machine", &words.join(", "));
    for adapter in &config.network_adapters {
        let parts = [
            Some(&adapter.id),
            adapter.model.as_ref(),
            adapter.mac.as_ref(),
            adapter.network.as_ref(),
        ];
        let parts: Vec<_> = parts.into_iter().flatten().map(String::as_str).collect();
        field("network", &parts.join(", "));
    }
}
