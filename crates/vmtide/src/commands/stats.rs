//! `vmtide stats`: how much a repository holds, for whom, and what that costs.

use crate::app::App;
use crate::exit::Exit;
use crate::table::Table;
use crate::{repository, units};
use clap::Args;
use clap::builder::PossibleValuesParser;
use vmtide_engine::Result;
use vmtide_engine::cost::{self, CostEstimate, Prices};
use vmtide_repo::UsageReport;

const EXAMPLES: &str = "\
A VM's data is what all its restore points speak of, as if each were stored whole; dedup says how many
times over that is more than the chunks it needs, compression what is left of these in packs. Unique
is what would become free without the VM. A price is per GB of 10^9 bytes. The prices of --prices are
examples and no facts: see docs/commands.md for what they are and what an estimate counts.

Examples:
  vmtide stats -r /backup
  vmtide stats -r /backup --growth
  vmtide stats -r s3://bucket/backup --price-per-gb-month 0.023
  vmtide stats -r s3://bucket/backup --prices example-standard --price-per-gb-read 0.05
  vmtide stats -r /backup --json";

/// The options of `stats`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct StatsArgs {
    /// What each day's backups added
    #[arg(long)]
    growth: bool,
    /// Take the prices that are not given from these examples, in US dollars; what you pay may differ
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(cost::examples()))]
    prices: Option<String>,
    /// What a GB costs a month, in any currency, for an estimate
    #[arg(long, value_name = "PRICE", value_parser = parse_price)]
    price_per_gb_month: Option<f64>,
    /// What 1000 PUT requests cost
    #[arg(long, value_name = "PRICE", value_parser = parse_price)]
    price_per_1000_puts: Option<f64>,
    /// What 1000 GET requests cost
    #[arg(long, value_name = "PRICE", value_parser = parse_price)]
    price_per_1000_gets: Option<f64>,
    /// What reading a GB costs, retrieval and traffic together
    #[arg(long, value_name = "PRICE", value_parser = parse_price)]
    price_per_gb_read: Option<f64>,
}

impl StatsArgs {
    /// The prices as they are given, and those of the example where there are none.
    fn all_prices(&self) -> Prices {
        let given = Prices {
            gb_month: self.price_per_gb_month,
            thousand_puts: self.price_per_1000_puts,
            thousand_gets: self.price_per_1000_gets,
            gb_read: self.price_per_gb_read,
        };
        let example = self.prices.as_deref().and_then(Prices::example).unwrap_or_default();
        given.or(example)
    }
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
    let prices = args.all_prices();
    let estimate = cost::estimate(&report, &prices);
    show(app, &report, args, &prices);
    show_costs(app, &report, &prices, &estimate);
    app.output.summary(&Summary {
        usage: &report,
        price_per_gb_month: prices.gb_month,
        cost_per_month: estimate.per_month,
        prices,
        cost: estimate,
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
    prices: Prices,
    cost: CostEstimate,
}

/// What it costs, as far as prices are known.
fn show_costs(app: &App, report: &UsageReport, prices: &Prices, estimate: &CostEstimate) {
    if let Some(until) = report.locked_until {
        let bytes = units::size(report.locked_bytes);
        let cost = estimate.locked_per_month.map(|cost| format!(", {cost:.2} a month"));
        let cost = cost.unwrap_or_default();
        line(app, "immutable", format!("{bytes} until {}{cost}", units::time(until)));
    }
    if let Some(cost) = estimate.per_month {
        let parts = [
            prices.gb_month.map(|price| format!("storage at {price} per GB")),
            prices
                .thousand_puts
                .map(|price| format!("{} PUTs at {price} per 1000", estimate.puts_per_month)),
        ];
        line(app, "cost a month", format!("{cost:.2}: {}", listed(&parts)));
    }
    if let Some(cost) = estimate.restore_cost {
        let bytes = units::size(estimate.restore_bytes);
        let parts = [
            prices.gb_read.map(|price| format!("{bytes} at {price} per GB")),
            prices
                .thousand_gets
                .map(|price| format!("{} GETs at {price} per 1000", estimate.restore_gets)),
        ];
        line(app, "cost of a restore of all", format!("{cost:.2}: {}", listed(&parts)));
    }
}

fn listed(parts: &[Option<String>]) -> String {
    parts.iter().flatten().map(String::as_str).collect::<Vec<_>>().join(", ")
}

fn line(app: &App, name: &str, value: impl AsRef<str>) {
    app.output.line(format!("{name:<24} {}", value.as_ref()));
}

fn show(app: &App, report: &UsageReport, args: &StatsArgs, prices: &Prices) {
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
        app.output.lines(vms(report, prices.gb_month).lines());
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
        let cost = price.map(|price| format!("{:.2}", cost::of_gb(vm.unique_bytes, price)));
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
