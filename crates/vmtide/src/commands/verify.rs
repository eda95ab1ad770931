//! `vmtide verify`: check that restore points can be restored.

use crate::app::App;
use crate::exit::Exit;
use crate::{repository, units};
use clap::Args;
use vmtide_engine::{Result, resolve, verify};
use vmtide_repo::VerifyOptions;

const EXAMPLES: &str = "\
Examples:
  vmtide verify -r /backup                    all that restore points refer to is there and whole
  vmtide verify -r /backup --read-data        and all data is read and compared with its checksums
  vmtide verify -r /backup --read-data=10     a tenth of it, another one each time
  vmtide verify web@latest -r /backup --read-data

Ends with code 5 where damage is found, and lists the restore points it touches.";

/// The options of `verify`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct VerifyArgs {
    /// Only these restore points [default: all]
    #[arg(value_name = "POINT")]
    point: Vec<String>,
    /// Read data, too: all of it, or so many percent
    #[arg(long, value_name = "PERCENT", num_args = 0..=1, require_equals = true)]
    #[arg(default_value = "0", default_missing_value = "100")]
    #[arg(hide_default_value = true, value_parser = clap::value_parser!(u8).range(0..=100))]
    read_data: u8,
}

/// Verifies.
pub fn run(app: &App, args: &VerifyArgs) -> Result<Exit> {
    let repository = repository::open(app)?;
    let mut points = Vec::with_capacity(args.point.len());
    for spec in &args.point {
        points.push(resolve(&repository, spec)?.id);
    }
    let options = VerifyOptions { points, read_data_percent: args.read_data };
    let job = app.begin_job()?;
    let report = job.run(app, |context| verify(&repository, &options, context))?;
    for damage in &report.damage {
        let points: Vec<_> = damage.points.iter().map(|id| units::short_id(*id)).collect();
        let touched = if points.is_empty() {
            "no restore point needs it".to_owned()
        } else {
            format!("needed by {}", points.join(", "))
        };
        app.output.line(format!("damaged: {}: {} ({touched})", damage.object, damage.detail));
    }
    let verdict = match report.damage.len() {
        0 => "no damage".to_owned(),
        count => format!("{count} damaged objects"),
    };
    app.output.line(format!(
        "{verdict}: {} restore points and {} packs checked, {} read",
        report.points_checked,
        report.packs_checked,
        units::size(report.read_bytes),
    ));
    app.output.summary(&report);
    Ok(if report.damage.is_empty() { Exit::Done } else { Exit::Damaged })
}
