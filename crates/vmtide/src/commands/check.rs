//! `vmtide check`: whether an image's structure is sound, and its repair.

use crate::app::App;
use crate::commands::image::OpenArgs;
use crate::exit::Exit;
use crate::units;
use clap::{Args, ValueEnum, ValueHint};
use std::path::PathBuf;
use vmtide_engine::Result;
use vmtide_engine::image::check::{Checked, check};
use vmtide_image::{CheckReport, Format, Repair, Severity};

const EXAMPLES: &str = "\
Ends with code 0 where the image is sound, 3 where it only wastes space (leaks), 5 where it is damaged;
after a repair that is what is left. Parents are not checked. Nothing may have the image open while it
is repaired.

Examples:
  vmtide check web.vhdx
  vmtide check disk.qcow2 --repair=leaks
  vmtide check disk.vhd --repair --json";

/// The options of `check`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CheckArgs {
    /// The disk image
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    image: PathBuf,
    /// Its format [default: found by its content]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// Repair what can be repaired without guessing, or only what no reader sees
    #[arg(long, value_name = "WHAT", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "all")]
    repair: Option<RepairArg>,
    /// How the image's other files are found.
    #[command(flatten)]
    open: OpenArgs,
}

/// What is repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RepairArg {
    /// Space that nothing refers to
    Leaks,
    /// Everything that can be repaired without guessing
    All,
}

/// Checks it.
pub fn run(app: &App, args: &CheckArgs) -> Result<Exit> {
    let repair = match args.repair {
        None => Repair::Nothing,
        Some(RepairArg::Leaks) => Repair::Leaks,
        Some(RepairArg::All) => Repair::All,
    };
    let checked = check(&args.image, &args.open.options(args.format), repair)?;
    show(app, &checked);
    app.output.summary(&checked);
    Ok(match &checked.report {
        report if report.errors > 0 => Exit::Damaged,
        report => Exit::with_warnings(report.leaks > 0),
    })
}

fn show(app: &App, checked: &Checked) {
    if let Some(repair) = &checked.repair {
        problems(app, repair);
        app.output.line(format!("{} repaired; what is left:", count(repair.repaired, "problem")));
    }
    let report = &checked.report;
    problems(app, report);
    let percent = report.allocated_bytes.saturating_mul(100) / report.size_bytes.max(1);
    let found = match (report.errors, report.leaks) {
        (0, 0) => "no errors".to_owned(),
        (0, leaks) => format!("{}, no data is at risk", count(leaks, "leak")),
        (errors, leaks) => format!("{}, {}", count(errors, "error"), count(leaks, "leak")),
    };
    app.output.line(format!(
        "{} ({}): {found}; {} of {} allocated ({percent} %)",
        checked.path.display(),
        checked.format,
        units::size(report.allocated_bytes),
        units::size(report.size_bytes),
    ));
}

fn problems(app: &App, report: &CheckReport) {
    for problem in &report.problems {
        let word = match (problem.repaired, problem.severity) {
            (true, _) => "repaired",
            (false, Severity::Error) => "ERROR",
            (false, Severity::Leak) => "leak",
            (false, Severity::Note) => "note",
        };
        app.output.line(format!("  {word:<8}  {}", problem.detail));
    }
}

fn count(number: u64, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}
