//! `vmtide forget`: give restore points up, by id or by rules.

use crate::app::App;
use crate::exit::Exit;
use crate::table::Table;
use crate::{repository, units};
use clap::Args;
use jiff::Span;
use jiff::tz::TimeZone;
use vmtide_engine::retention::{Candidate, Decision, RetentionPolicy, decide};
use vmtide_engine::{EngineError, Result, forget, points, resolve};
use vmtide_repo::{ObjectId, PruneReport, Repository};

const EXAMPLES: &str = "\
The rules work per VM; a restore point stays when one of them keeps it. --keep-daily 7 keeps the newest
of each of the newest 7 days that have one. The newest restore point of a VM always stays, unless it is
named. Any restore point can go: none depends on another. Space is freed by `vmtide prune`, or --prune.

Examples:
  vmtide forget -r /backup --keep-daily 7 --keep-weekly 4 --keep-monthly 12 --dry-run
  vmtide forget -r /backup --keep-daily 7 --keep-within 48h --prune
  vmtide forget 3fa9c1d2 -r /backup";

/// The options of `forget`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ForgetArgs {
    /// Forget these restore points, whatever the rules would say
    #[arg(value_name = "POINT")]
    point: Vec<String>,
    /// Only those of this VM
    #[arg(long, value_name = "NAME", conflicts_with = "point")]
    vm: Option<String>,
    /// Keep the newest N
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_last: u32,
    /// Keep the newest of each of the newest N hours
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_hourly: u32,
    /// Keep the newest of each of the newest N days
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_daily: u32,
    /// Keep the newest of each of the newest N weeks
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_weekly: u32,
    /// Keep the newest of each of the newest N months
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_monthly: u32,
    /// Keep the newest of each of the newest N years
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_yearly: u32,
    /// Keep all that are no older than this, counted from the newest: 48h, 14d, 3months
    #[arg(long, value_name = "TIME", value_parser = parse_span)]
    keep_within: Option<Span>,
    /// Keep all with this tag; may be repeated
    #[arg(long, value_name = "K=V", value_parser = units::parse_tag)]
    keep_tag: Vec<(String, String)>,
    /// Remove afterwards what no restore point needs any more
    #[arg(long)]
    prune: bool,
    /// Change nothing; show what would go and why the rest stays
    #[arg(long)]
    dry_run: bool,
}

fn parse_span(text: &str) -> std::result::Result<Span, String> {
    let span: Span = text.parse().map_err(|error| {
        format!("{text:?} is no length of time, like 48h, 14d or 3months: {error}")
    })?;
    if span.is_negative() || span.is_zero() {
        return Err(format!("{text:?}: give a length of time greater than zero"));
    }
    Ok(span)
}

impl ForgetArgs {
    fn policy(&self) -> RetentionPolicy {
        RetentionPolicy {
            last: self.keep_last,
            hourly: self.keep_hourly,
            daily: self.keep_daily,
            weekly: self.keep_weekly,
            monthly: self.keep_monthly,
            yearly: self.keep_yearly,
            within: self.keep_within,
            tags: self.keep_tag.clone(),
        }
    }
}

/// Forgets.
pub fn run(app: &App, args: &ForgetArgs) -> Result<Exit> {
    let named = !args.point.is_empty();
    if named != args.policy().is_empty() {
        return Err(EngineError::usage(
            "say what to forget (POINT…) or what to keep (--keep-…), one of the two",
        ));
    }
    let repository = repository::open(app)?;
    let decisions =
        if named { named_points(&repository, &args.point)? } else { by_policy(&repository, args)? };
    show(app, &decisions);
    let forgotten: Vec<_> =
        decisions.iter().filter(|decision| !decision.keep).map(|decision| decision.point).collect();
    if !args.dry_run {
        forget(&repository, &forgotten)?;
    }
    let tense = if args.dry_run { "would be " } else { "" };
    app.output.line(format!(
        "{} restore points {tense}forgotten, {} kept",
        forgotten.len(),
        decisions.len() - forgotten.len()
    ));
    let pruned = if args.prune && !args.dry_run {
        Some(super::prune::prune_now(app, &repository, &super::prune::default_options(false))?)
    } else {
        None
    };
    summarise(app, args, &decisions, &forgotten, pruned.as_ref());
    Ok(Exit::Done)
}

fn named_points(repository: &Repository, specs: &[String]) -> Result<Vec<Decision>> {
    let mut decisions: Vec<Decision> = Vec::with_capacity(specs.len());
    for spec in specs {
        let point = resolve(repository, spec)?;
        if decisions.iter().all(|decision| decision.point != point.id) {
            decisions.push(Decision {
                point: point.id,
                vm: point.vm,
                time: point.time,
                keep: false,
                reasons: Vec::new(),
            });
        }
    }
    Ok(decisions)
}

fn by_policy(repository: &Repository, args: &ForgetArgs) -> Result<Vec<Decision>> {
    let list = points(repository, args.vm.as_deref())?;
    // A point that cannot be read may be the newest of a VM: rules over the rest would be wrong.
    if let Some((name, error)) = list.unreadable.into_iter().next() {
        tracing::error!("{name} cannot be read, so the rules cannot be applied");
        return Err(error.into());
    }
    let candidates: Vec<_> = list
        .points
        .into_iter()
        .map(|point| Candidate { id: point.id, vm: point.vm, time: point.time, tags: point.tags })
        .collect();
    decide(&candidates, &args.policy(), &TimeZone::system())
}

fn show(app: &App, decisions: &[Decision]) {
    if app.output.is_quiet() || decisions.is_empty() {
        return;
    }
    let mut table = Table::new(&["", "id", "time", "vm", "because of"]);
    for decision in decisions {
        table.row([
            if decision.keep { "keep" } else { "forget" }.into(),
            units::short_id(decision.point),
            units::time(decision.time),
            decision.vm.clone(),
            decision.reasons.join(", "),
        ]);
    }
    app.output.lines(table.lines());
}

fn summarise(
    app: &App,
    args: &ForgetArgs,
    decisions: &[Decision],
    forgotten: &[ObjectId],
    pruned: Option<&PruneReport>,
) {
    app.output.summary(&serde_json::json!({
        "dry_run": args.dry_run,
        "forgotten": forgotten,
        "decisions": decisions,
        "prune": pruned,
    }));
}
