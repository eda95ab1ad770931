//! `vmtide hold`: restore points that must stay, whatever `forget` is told.

use crate::app::App;
use crate::exit::{self, Exit};
use crate::table::Table;
use crate::{repository, units};
use clap::Args;
use jiff::Timestamp;
use vmtide_engine::{EngineError, Result, host_name, resolve};
use vmtide_repo::{Hold, HoldList, HoldOptions, ObjectId, Repository};

const EXAMPLES: &str = "\
A held restore point is passed over by `vmtide forget`, with the reason, and its data stays until the
hold is released or over. Holding needs no right to remove anything; releasing works without it, too, and
so keeps nobody from it who has the password: against that use the store's own immutability.

Examples:
  vmtide hold web@2026-11-20 -r /backup --reason \"before the migration\" --until 2027-06-30
  vmtide hold web@latest -r /backup --until 90d
  vmtide hold --list -r /backup
  vmtide hold --release 5be1 -r /backup";

/// The options of `hold`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
#[group(required = true, multiple = true)]
pub struct HoldArgs {
    /// Hold this restore point
    #[arg(value_name = "POINT", conflicts_with_all = ["list", "release"])]
    point: Option<String>,
    /// Why, for people
    #[arg(long, value_name = "TEXT", requires = "point", conflicts_with_all = ["list", "release"])]
    reason: Option<String>,
    /// When the hold ends by itself: 2027-06-30 (with that day), 2027-06-30T12:00, or 90d from now
    #[arg(long, value_name = "TIME", value_parser = parse_until, requires = "point", conflicts_with_all = ["list", "release"])]
    until: Option<Timestamp>,
    /// List the holds
    #[arg(long)]
    list: bool,
    /// Release the hold of this id, or its first digits; may be repeated
    #[arg(long, value_name = "HOLD", visible_alias = "remove", conflicts_with = "list")]
    release: Vec<String>,
}

fn parse_until(text: &str) -> std::result::Result<Timestamp, String> {
    let zone = jiff::tz::TimeZone::system();
    if let Ok(span) = vmtide_engine::retention::parse_span(text) {
        let end = Timestamp::now().to_zoned(zone).checked_add(span);
        return end.map(|end| end.timestamp()).map_err(|error| format!("{text:?}: {error}"));
    }
    if let Ok(moment) = text.parse::<Timestamp>() {
        return Ok(moment);
    }
    let local = match text.parse::<jiff::civil::Date>() {
        Ok(day) if !text.contains(['T', ' ']) => Ok(day.at(23, 59, 59, 0)),
        _ => text.parse::<jiff::civil::DateTime>(),
    };
    let moment = local.and_then(|local| local.to_zoned(zone)).map(|zoned| zoned.timestamp());
    moment.map_err(|error| {
        format!("{text:?} is no time ({error}); write 2027-06-30, 2027-06-30T12:00 or 90d")
    })
}

/// Holds, lists or releases.
pub fn run(app: &App, args: &HoldArgs) -> Result<Exit> {
    let repository = repository::open(app)?;
    match &args.point {
        Some(point) => hold(app, &repository, point, args),
        None if args.list => list(app, &repository),
        None => release(app, &repository, &args.release),
    }
}

fn hold(app: &App, repository: &Repository, spec: &str, args: &HoldArgs) -> Result<Exit> {
    let point = resolve(repository, spec)?;
    let options = HoldOptions {
        reason: args.reason.clone().unwrap_or_default(),
        until: args.until,
        host: host_name(),
    };
    let hold = repository.hold(point.id, &options)?;
    app.output.line(format!(
        "restore point {} of {} is held {}: hold {}",
        units::short_id(hold.point),
        hold.vm,
        end_of(&hold),
        units::short_id(hold.id)
    ));
    app.output.summary(&hold);
    Ok(Exit::Done)
}

/// When a hold ends, in words.
pub fn end_of(hold: &Hold) -> String {
    hold.until.map_or_else(|| "until released".into(), |end| format!("until {}", units::time(end)))
}

fn list(app: &App, repository: &Repository) -> Result<Exit> {
    let HoldList { holds, unreadable } = repository.holds()?;
    let now = Timestamp::now();
    let mut table = Table::new(&["id", "point", "vm", "time of the point", "held", "reason"]);
    for hold in &holds {
        let over = if hold.is_over_at(now) { ", over" } else { "" };
        table.row([
            units::short_id(hold.id),
            units::short_id(hold.point),
            hold.vm.clone(),
            units::time(hold.time),
            format!("{}{over}", end_of(hold)),
            hold.reason.clone(),
        ]);
    }
    if holds.is_empty() {
        app.output.remark("no restore point is held");
    } else {
        app.output.lines(table.lines());
    }
    let mut exit = Exit::Done;
    for (name, error) in &unreadable {
        app.output.warning(&format!("{name} cannot be read: {error}"));
        exit = exit.worse(exit::of_repo(error));
    }
    app.output.summary(&serde_json::json!({ "holds": holds }));
    Ok(exit)
}

fn release(app: &App, repository: &Repository, prefixes: &[String]) -> Result<Exit> {
    let HoldList { holds, unreadable } = repository.holds()?;
    let of_name = |(name, _): &(String, _)| name.rsplit('/').next()?.parse::<ObjectId>().ok();
    let mut ids: Vec<ObjectId> = holds.iter().map(|hold| hold.id).collect();
    ids.extend(unreadable.iter().filter_map(of_name));
    ids.sort_unstable();
    ids.dedup();
    let chosen: Vec<ObjectId> =
        prefixes.iter().map(|prefix| find(&ids, prefix)).collect::<Result<_>>()?;
    for id in &chosen {
        let removed = repository.release_hold(*id)?;
        let how = if removed { "" } else { " (it may not be removed here: marked as over)" };
        app.output.line(format!("hold {} released{how}", units::short_id(*id)));
    }
    app.output.summary(&serde_json::json!({ "released": chosen }));
    Ok(Exit::Done)
}

fn find(ids: &[ObjectId], prefix: &str) -> Result<ObjectId> {
    let prefix = prefix.to_ascii_lowercase();
    let fits = |id: &&ObjectId| !prefix.is_empty() && id.to_string().starts_with(&prefix);
    let matching: Vec<&ObjectId> = ids.iter().filter(fits).collect();
    match matching[..] {
        [id] => Ok(*id),
        [] => Err(EngineError::NotFound {
            what: format!("hold {prefix}"),
            hint: "see `vmtide hold --list`".into(),
        }),
        _ => {
            Err(EngineError::usage(format!("several holds begin with {prefix}: give more digits")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_days_times_and_lengths() {
        let now = Timestamp::now();
        let hours = |text: &str| parse_until(text).unwrap().duration_since(now).as_hours();
        assert!((2158..=2162).contains(&hours("90d")), "{}", hours("90d"));
        assert_eq!(
            parse_until("2099-01-01T00:00:00Z").unwrap().to_string(),
            "2099-01-01T00:00:00Z"
        );
        assert!(parse_until("2099-06-30").unwrap() > parse_until("2099-06-30T12:00").unwrap());
        for bad in ["", "soon", "-3d", "2099-13-01"] {
            assert!(parse_until(bad).is_err(), "{bad}");
        }
    }
}
