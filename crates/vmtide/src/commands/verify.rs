//! `vmtide verify`: check that restore points can be restored.

use crate::app::App;
use crate::exit::Exit;
use crate::{repository, units};
use clap::Args;
use serde::Serialize;
use vmtide_engine::{
    EngineError, FilesAt, FoundFile, LocatedDamage, LocatedPartition, PartitionBytes, Result,
    TouchedParts, check_integrity, locate_damage, resolve, verify,
};
use vmtide_repo::{Damage, ReadData, SampleReport, VerifyOptions, VerifyReport};

const EXAMPLES: &str = "\
Examples:
  vmtide verify -r /backup                    all that restore points refer to is there and whole
  vmtide verify -r /backup --read-data        and all data is read and compared with its checksums
  vmtide verify -r /backup --read-data=10%    a tenth of it, another one each time
  vmtide verify -r /backup --read-data=50GiB  about so much of it
  vmtide verify web@latest -r /backup --read-data
  vmtide verify -r /backup --no-key           all stored bytes against their checksums, no password

A sample says what it is worth: how likely it would have found damage, and how much there can be.
Ends with code 5 where damage is found, and lists the restore points, disks and bytes it touches. What
is damaged is put on record, so that the next backup stores it again; `vmtide repair` does what can
be done now.";

/// The options of `verify`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct VerifyArgs {
    /// Only these restore points [default: all]
    #[arg(value_name = "POINT")]
    point: Vec<String>,
    /// Read data, too: all of it, so many percent of it (10%), or about so much of it (50GiB)
    #[arg(long, value_name = "PERCENT|SIZE", num_args = 0..=1, require_equals = true)]
    #[arg(default_value = "0%", default_missing_value = "100%")]
    #[arg(hide_default_value = true, value_parser = parse_read_data)]
    read_data: ReadData,
    /// Draw the same sample as an earlier run, by the seed it told
    #[arg(long, value_name = "NUMBER", requires = "read_data")]
    seed: Option<u64>,
    /// Ask for no password: only compare all stored bytes with their checksums. Finds damage, but not
    /// what is missing
    #[arg(long, conflicts_with_all = ["point", "read_data", "seed"])]
    no_key: bool,
}

/// Parses `10%`, `0.5%`, `10` (percent) or `50GiB`.
fn parse_read_data(text: &str) -> Result<ReadData, String> {
    let percent = text.strip_suffix('%').unwrap_or(text);
    let is_percent = percent.chars().all(|c| c.is_ascii_digit() || c == '.');
    if !is_percent {
        return match units::parse_size(text)? {
            0 => Ok(ReadData::None),
            bytes => Ok(ReadData::Bytes(bytes)),
        };
    }
    let bad = || format!("{text:?} is no share: write e.g. 10%, 0.5% or 50GiB");
    let (whole, fraction) = percent.split_once('.').unwrap_or((percent, ""));
    let whole: u32 = whole.parse().map_err(|_| bad())?;
    if whole > 100 || fraction.len() > 4 {
        return Err(bad());
    }
    let fraction: u32 = format!("{fraction:0<4}").parse().map_err(|_| bad())?;
    match whole * 10_000 + fraction {
        0 => Ok(ReadData::None),
        parts @ 1..1_000_000 => Ok(ReadData::PerMillion(parts)),
        1_000_000 => Ok(ReadData::All),
        _ => Err(bad()),
    }
}

/// Verifies.
pub fn run(app: &App, args: &VerifyArgs) -> Result<Exit> {
    if args.no_key {
        return run_without_key(app);
    }
    let repository = repository::open(app)?;
    let mut points = Vec::with_capacity(args.point.len());
    for spec in &args.point {
        points.push(resolve(&repository, spec)?.id);
    }
    let options = VerifyOptions { points, read: args.read_data, seed: args.seed };
    let job = app.begin_job()?;
    let (report, damage) = job.run(app, |context| {
        let report = verify(&repository, &options, context)?;
        let damage = locate_damage(&repository, &report.damage, context.cancel);
        Ok((report, damage))
    })?;
    show(app, &report, &damage);
    app.output.summary(&with_partitions(&report, &damage));
    Ok(if report.damage.is_empty() { Exit::Done } else { Exit::Damaged })
}

fn show(app: &App, report: &VerifyReport, damage: &[LocatedDamage]) {
    damage.iter().for_each(|damage| show_damage(app, damage));
    app.output.line(format!(
        "{}: {} restore points and {} packs checked, {} read",
        verdict(report.damage.len()),
        report.points_checked,
        report.packs_checked,
        units::size(report.read_bytes),
    ));
    if let Some(sample) = &report.sample {
        show_sample(app, report, sample);
    }
    if report.quarantined > 0 {
        app.output.line(format!(
            "{} damaged parts put on record: the next backup that sees their content stores it again",
            report.quarantined
        ));
    }
    if report.recovered > 0 {
        app.output.line(format!(
            "{} parts that were on record as damaged are sound after all",
            report.recovered
        ));
    }
    if let Some(reason) = &report.not_recorded {
        app.output.warning(&format!("the damage could not be put on record: {reason}"));
    }
}

/// The disks that are listed for one piece of damage: a year of daily restore points shares most data.
const PLACES_SHOWN: usize = 10;

/// The files that are listed for one partition.
const FILES_SHOWN: usize = 20;

/// One piece of damage and what it touches.
pub fn show_damage(app: &App, damage: &LocatedDamage) {
    let points: Vec<_> = damage.points.iter().map(|id| units::short_id(*id)).collect();
    let touched = if points.is_empty() {
        "no restore point needs it".to_owned()
    } else {
        format!("needed by {}", points.join(", "))
    };
    let frame = damage.frame.map(|frame| format!(" frame {frame}")).unwrap_or_default();
    app.output.line(format!("damaged: {}{frame}: {} ({touched})", damage.object, damage.detail));
    for located in damage.places.iter().take(PLACES_SHOWN) {
        let place = &located.place;
        let bytes = match place.ranges.as_slice() {
            [] => "the disk map".to_owned(),
            [range] => format!("bytes {} to {}", range.offset, range.end()),
            [first, .., last] => format!(
                "{} in {} ranges between {} and {}",
                units::size(place.ranges.total_bytes()),
                place.ranges.as_slice().len(),
                first.offset,
                last.end()
            ),
        };
        app.output.line(format!(
            "  {} {} disk {}: {bytes}",
            units::short_id(place.point),
            place.vm,
            place.disk
        ));
        for line in touched_parts(&located.parts) {
            app.output.line(format!("    {line}"));
        }
    }
    if damage.places.len() > PLACES_SHOWN {
        let more = damage.places.len() - PLACES_SHOWN;
        app.output.line(format!("  and {more} more disks of restore points; --json has all"));
    }
}

/// In which partitions and files damage lies, for people; nothing where that cannot be told.
pub fn touched_parts(parts: &TouchedParts) -> Vec<String> {
    let mut lines = Vec::new();
    for LocatedPartition { bytes: PartitionBytes { partition, bytes }, files } in
        parts.partitions.iter().flatten()
    {
        let name = partition.name.as_ref().map(|name| format!(" {name:?}")).unwrap_or_default();
        let size = units::size(*bytes);
        lines.push(format!("{size} in partition {}{name} ({})", partition.number, partition.kind));
        lines
            .extend(files.iter().flatten().flat_map(touched_files).map(|line| format!("  {line}")));
    }
    lines.extend(parts.files.iter().flatten().flat_map(touched_files));
    lines
}

fn touched_files(found: &FilesAt) -> Vec<String> {
    let volume = found.volume.as_ref().map(|name| format!("{name}: ")).unwrap_or_default();
    let name = |file: &FoundFile| match file.is_directory {
        true => format!("{volume}directory {}", file.path),
        false => format!("{volume}{}", file.path),
    };
    let mut lines: Vec<_> = found.files.iter().take(FILES_SHOWN).map(name).collect();
    if found.files.is_empty() && found.is_complete {
        lines.push(format!(
            "no file there: free space, or what {} keeps for itself",
            found.file_system
        ));
    }
    if found.files.len() > FILES_SHOWN {
        lines.push(format!(
            "{volume}and {} more files; --json has all",
            found.files.len() - FILES_SHOWN
        ));
    }
    if !found.is_complete {
        lines.push(format!(
            "there may be more files: what {} knows of them is damaged, too",
            found.file_system
        ));
    }
    lines
}

/// A report with the partitions that its damage touches, for `--json`.
pub fn with_partitions(report: &impl Serialize, damage: &[LocatedDamage]) -> serde_json::Value {
    let mut summary = serde_json::json!(report);
    summary["damage"] = serde_json::json!(damage);
    summary
}

fn show_sample(app: &App, report: &VerifyReport, sample: &SampleReport) {
    app.output.line(format!(
        "a sample of {} of {} frames ({:.1} %, --seed {}): if 0.1 % of them were damaged, it would \
         have found one with {:.1} %",
        report.frames_read,
        report.frames,
        sample.share * 100.0,
        sample.seed,
        sample.chance_if_one_in_a_thousand * 100.0,
    ));
    if report.damage.is_empty() {
        app.output.line(format!(
            "with 99 % confidence no more than {:.3} % of the frames are damaged",
            sample.damaged_share_at_most * 100.0
        ));
    }
}

fn verdict(damaged: usize) -> String {
    match damaged {
        0 => "no damage".to_owned(),
        1 => "1 damaged object".to_owned(),
        count => format!("{count} damaged objects"),
    }
}

fn run_without_key(app: &App) -> Result<Exit> {
    let location = app.global.repository.as_deref().ok_or_else(|| {
        EngineError::usage("no repository: give -r REPO, or set VMTIDE_REPOSITORY")
    })?;
    let store = repository::store_at(app, location)?;
    let job = app.begin_job()?;
    let report = job.run(app, |context| check_integrity(&store, context))?;
    report.damage.iter().for_each(|damage| show_damage_without_key(app, damage));
    app.output.line(format!(
        "{}: {} objects, {} compared with their checksums",
        verdict(report.damage.len()),
        report.objects_checked,
        units::size(report.read_bytes),
    ));
    app.output.remark("without the key nobody can tell whether anything is missing");
    app.output.summary(&report);
    Ok(if report.damage.is_empty() { Exit::Done } else { Exit::Damaged })
}

fn show_damage_without_key(app: &App, damage: &Damage) {
    app.output.line(format!("damaged: {}: {}", damage.object, damage.detail));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_sizes_are_told_apart() {
        for (text, read) in [
            ("10", ReadData::PerMillion(100_000)),
            ("10%", ReadData::PerMillion(100_000)),
            ("0.5%", ReadData::PerMillion(5_000)),
            ("0.0001%", ReadData::PerMillion(1)),
            ("100%", ReadData::All),
            ("100", ReadData::All),
            ("0", ReadData::None),
            ("50GiB", ReadData::Bytes(50 << 30)),
            ("512B", ReadData::Bytes(512)),
        ] {
            assert_eq!(parse_read_data(text), Ok(read), "{text}");
        }
        for bad in ["", "101%", "100.1%", "-1", "x", "0.00001%", "%", "1.2.3%"] {
            assert!(parse_read_data(bad).is_err(), "{bad}");
        }
    }
}
