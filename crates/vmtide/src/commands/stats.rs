//! `vmtide stats`: how much a repository holds, for whom, and what that costs.

use crate::app::App;
use crate::exit::Exit;
use crate::table::Table;
use crate::{repository, units};
use clap::Args;
use vmtide_engine::Result;
use vmtide_repo::UsageReport;

const EXAMPLES: &str = "\
A VM's data is what all its restore points speak of, as if each were stored whole; dedup says how many
times over that is more than the chunks it needs, compression what is left of these in packs. Unique
is what would become free without the VM. A price is per GB of 10^9 bytes.

Examples:
  vmtide stats -r /backup
  vmtide stats -r /backup --growth
  vmtide stats -r s3://bucket/backup --price-per-gb-month 0.023
  vmtide stats -r /backup --json";

/// The options of `stats`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct StatsArgs {
    /// What each day's backups added
    #[arg(long)]
    growth: bool,
    /// What a GB costs a month, in any currency, for an estimate
    #[arg(long, value_name = "PRICE", value_parser = parse_price)]
    price_per_gb_month: Option<f64>,
}

fn parse_price(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(price) if price.is_finite() && price >= 0.0 => Ok(price),
        _ => Err(format!("{text:?} is no price: write e.g. 0.023")),
    }
}

/// Shows them.
pub fn run(app: &App, args: &StatsArgs) -> Result<Exit> {
    let repository = repository::open(app)?;
    let job = app.begin_job()?;
    let report = job.run(app, |context| Ok(repository.usage(context.cancel)?))?;
    let cost = args.price_per_gb_month.map(|price| {
        let all = report.stats.pack_bytes + report.stats.metadata_bytes;
        (price, month(all, price))
    });
    show(app, &report, args);
    if let Some((price, cost)) = cost {
        line(app, "cost a month", format!("{cost:.2} at {price} per GB, requests apart"));
    }
    app.output.summary(&Summary {
        usage: &report,
        price_per_gb_month: args.price_per_gb_month,
        cost_per_month: cost.map(|(_, cost)| cost),
    });
    Ok(Exit::Done)
}

/// The summary event.
#[derive(serde::Serialize)]
struct Summary<'a> {
    #[serde(flatten)]
    usage: &'a UsageReport,
    price_per_gb_month: Option<f64>,
    cost_per_month: Option<f64>,
}

fn line(app: &App, name: &str, value: impl AsRef<str>) {
    app.output.line(format!("{name:<24} {}", value.as_ref()));
}

fn show(app: &App, report: &UsageReport, args: &StatsArgs) {
    let stats = &report.stats;
    line(app, "restore points", stats.points.to_string());
    line(app, "their disks", units::size(stats.virtual_bytes));
    line(app, "their data", units::size(report.logical_bytes));
    line(app, "packs", stats.packs.to_string());
    line(app, "data in packs", units::size(stats.pack_bytes));
    line(app, "no longer needed", units::size(report.unneeded_bytes));
    line(app, "maps, index and points", units::size(stats.metadata_bytes));
    line(app, "deduplication", ratio(report.logical_bytes, report.needed_bytes));
    line(app, "compression", ratio(report.needed_bytes, report.stored_bytes));
    if !report.vms.is_empty() {
        app.output.line("");
        app.output.lines(vms(report, args.price_per_gb_month).lines());
    }
    if args.growth && !report.growth.is_empty() {
        let mut table = Table::new(&["day", ">backups", ">changed", ">new", ">stored"]);
        for day in &report.growth {
            table.row([
                day.day.clone(),
                day.points.to_string(),
                units::size(day.changed_bytes),
                units::size(day.new_bytes),
                units::size(day.stored_bytes),
            ]);
        }
        app.output.line("");
        app.output.lines(table.lines());
    }
}

fn vms(report: &UsageReport, price: Option<f64>) -> Table {
    let mut table = Table::new(&[
        "vm",
        ">points",
        ">size",
        ">data",
        ">dedup",
        ">compression",
        ">stored",
        ">unique",
        if price.is_some() { ">unique cost" } else { "" },
    ]);
    for vm in &report.vms {
        let cost = price.map(|price| format!("{:.2}", month(vm.unique_bytes, price)));
        table.row([
            vm.vm.clone(),
            vm.points.to_string(),
            units::size(vm.size_bytes),
            units::size(vm.logical_bytes),
            ratio(vm.logical_bytes, vm.needed_bytes),
            ratio(vm.needed_bytes, vm.stored_bytes),
            units::size(vm.stored_bytes),
            units::size(vm.unique_bytes),
            cost.unwrap_or_default(),
        ]);
    }
    table
}

/// How many times larger one number is than another.
#[allow(clippy::cast_precision_loss, reason = "two digits are shown")]
fn ratio(large: u64, small: u64) -> String {
    match small {
        0 => "-".into(),
        small => format!("{:.2}", large as f64 / small as f64),
    }
}

/// What so many bytes cost a month.
#[allow(clippy::cast_precision_loss, reason = "an estimate in money")]
fn month(bytes: u64, price_per_gb: f64) -> f64 {
    bytes as f64 / 1e9 * price_per_gb
}
