//! `vmtide forget`: give restore points up, by id or by rules.

use crate::app::App;
use crate::exit::Exit;
use crate::table::Table;
use crate::{repository, units};
use clap::Args;
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp};
use vmtide_engine::retention::{
    Candidate, Decision, RetentionPlan, RetentionPolicy, Selector, decide, parse_count,
    parse_policy, parse_span, parse_zone,
};
use vmtide_engine::{EngineError, Result, forget, points, resolve};
use vmtide_repo::{ForgetReport, Hold, ObjectId, PointList, PruneReport, Repository};

const EXAMPLES: &str = "\
The rules work per VM; a restore point stays when one of them keeps it. --keep-daily 7 keeps the newest
of each of the newest 7 days that have one; --keep-within-daily 14d the newest of each day of the 14
days before the newest. Days, weeks (from Monday), months and years are those of --time-zone. The newest
restore point of a VM always stays, unless it is named or --allow-forget-all is given; so does every
point that is held (`vmtide hold`). Any restore point can go: none depends on another. Space is freed by
`vmtide prune`, or --prune.

Examples:
  vmtide forget -r /backup --keep-daily 7 --keep-weekly 4 --keep-monthly 12 --dry-run
  vmtide forget -r /backup --keep-daily 7 --keep-within 48h --prune
  vmtide forget -r /backup --keep-daily 7 --policy 'vm=db-*,keep-hourly=48,keep-daily=30'
  vmtide forget -r /backup --vm old-web --allow-forget-all
  vmtide forget 3fa9c1d2 -r /backup

In the settings file:
  [forget]
  keep-daily = 7
  policy = [\"vm=db-*,keep-hourly=48,keep-daily=30\", \"tag=class=gold,keep-monthly=60\"]";

/// The options of `forget`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ForgetArgs {
    /// Forget these restore points, whatever the rules would say
    #[arg(value_name = "POINT", conflicts_with = "KeepArgs")]
    point: Vec<String>,
    /// Only those of this VM; * stands for any characters; may be repeated
    #[arg(long, value_name = "NAME", conflicts_with = "point")]
    vm: Vec<String>,
    /// Only those with this tag; may be repeated, then with all of them
    #[arg(long, value_name = "K=V", value_parser = units::parse_tag, conflicts_with = "point")]
    tag: Vec<(String, String)>,
    #[command(flatten)]
    keep: KeepArgs,
    /// Other rules for some VMs or tags: vm=NAME,tag=K=V,keep-daily=30,…; may be repeated, the first
    /// that fits a restore point decides
    #[arg(long, value_name = "POLICY", value_parser = parse_policy)]
    policy: Vec<(Selector, RetentionPolicy)>,
    /// Restore points of a VM with other values of this tag are counted by themselves; may be
    /// repeated
    #[arg(long, value_name = "KEY")]
    group_by_tag: Vec<String>,
    /// Where days begin: local, UTC, a name such as Europe/Berlin [default: local]
    #[arg(long, value_name = "ZONE", value_parser = parse_zone)]
    time_zone: Option<TimeZone>,
    /// Forget even the last restore point of a VM where no rule keeps it; without rules all, for which
    /// --vm or --tag must say of what
    #[arg(long)]
    allow_forget_all: bool,
    /// Remove afterwards what no restore point needs any more
    #[arg(long)]
    prune: bool,
    /// Change nothing; show what would go and why the rest stays
    #[arg(long)]
    dry_run: bool,
}

/// The rules.
#[derive(Debug, Args)]
struct KeepArgs {
    /// Keep the newest N, or all: unlimited
    #[arg(long, value_name = "N", value_parser = parse_count)]
    keep_last: Option<u32>,
    /// Keep the newest of each of the newest N hours
    #[arg(long, value_name = "N", value_parser = parse_count)]
    keep_hourly: Option<u32>,
    /// Keep the newest of each of the newest N days
    #[arg(long, value_name = "N", value_parser = parse_count)]
    keep_daily: Option<u32>,
    /// Keep the newest of each of the newest N weeks
    #[arg(long, value_name = "N", value_parser = parse_count)]
    keep_weekly: Option<u32>,
    /// Keep the newest of each of the newest N months
    #[arg(long, value_name = "N", value_parser = parse_count)]
    keep_monthly: Option<u32>,
    /// Keep the newest of each of the newest N years
    #[arg(long, value_name = "N", value_parser = parse_count)]
    keep_yearly: Option<u32>,
    /// Keep all that are no older than this, counted from the newest: 48h, 14d, 3months
    #[arg(long, value_name = "TIME", value_parser = parse_span)]
    keep_within: Option<Span>,
    /// Keep the newest of each hour, of those no older than this
    #[arg(long, value_name = "TIME", value_parser = parse_span)]
    keep_within_hourly: Option<Span>,
    /// Keep the newest of each day, of those no older than this
    #[arg(long, value_name = "TIME", value_parser = parse_span)]
    keep_within_daily: Option<Span>,
    /// Keep the newest of each week, of those no older than this
    #[arg(long, value_name = "TIME", value_parser = parse_span)]
    keep_within_weekly: Option<Span>,
    /// Keep the newest of each month, of those no older than this
    #[arg(long, value_name = "TIME", value_parser = parse_span)]
    keep_within_monthly: Option<Span>,
    /// Keep the newest of each year, of those no older than this
    #[arg(long, value_name = "TIME", value_parser = parse_span)]
    keep_within_yearly: Option<Span>,
    /// Keep all with this tag; may be repeated
    #[arg(long, value_name = "K=V", value_parser = units::parse_tag)]
    keep_tag: Vec<(String, String)>,
}

impl KeepArgs {
    fn policy(&self) -> RetentionPolicy {
        RetentionPolicy {
            last: self.keep_last.unwrap_or(0),
            hourly: self.keep_hourly.unwrap_or(0),
            daily: self.keep_daily.unwrap_or(0),
            weekly: self.keep_weekly.unwrap_or(0),
            monthly: self.keep_monthly.unwrap_or(0),
            yearly: self.keep_yearly.unwrap_or(0),
            within: self.keep_within,
            within_hourly: self.keep_within_hourly,
            within_daily: self.keep_within_daily,
            within_weekly: self.keep_within_weekly,
            within_monthly: self.keep_within_monthly,
            within_yearly: self.keep_within_yearly,
            tags: self.keep_tag.clone(),
        }
    }
}

impl ForgetArgs {
    fn selector(&self) -> Selector {
        Selector { vms: self.vm.clone(), tags: self.tag.clone() }
    }

    /// The rules as a whole.
    fn plan(&self) -> Result<RetentionPlan> {
        let general = self.keep.policy();
        let mut policies = self.policy.clone();
        if policies.is_empty() && general.is_empty() {
            if !self.allow_forget_all {
                return Err(EngineError::usage(
                    "say what to forget (POINT…) or what to keep (--keep-…)",
                ));
            }
            if self.selector().is_empty() {
                return Err(EngineError::usage(
                    "--allow-forget-all without a rule would forget everything: say of which VM \
                     or tag, with --vm or --tag",
                ));
            }
        }
        // Beside policies of their own, nobody means "and of all others nothing".
        if !general.is_empty() || policies.is_empty() {
            policies.push((Selector::default(), general));
        }
        let zone = self.time_zone.clone().map_or_else(|| parse_zone("local"), Ok);
        Ok(RetentionPlan {
            policies,
            group_by_tags: self.group_by_tag.clone(),
            allow_none: self.allow_forget_all,
            zone: zone.map_err(|error| EngineError::usage(format!("{error}; give --time-zone")))?,
            now: Timestamp::now(),
        })
    }
}

/// Forgets.
pub fn run(app: &App, args: &ForgetArgs) -> Result<Exit> {
    let named = !args.point.is_empty();
    let plan = if named { None } else { Some(args.plan()?) };
    let repository = repository::open(app)?;
    let mut decisions = match &plan {
        None => named_points(&repository, &args.point)?,
        Some(plan) => by_rules(&repository, &args.selector(), plan)?,
    };
    let wanted = doomed(&decisions);
    let report = if args.dry_run {
        ForgetReport { forgotten: wanted.clone(), ..ForgetReport::default() }
    } else {
        forget(&repository, &wanted)?
    };
    // The store may keep them, and somebody may have put a hold in between.
    let stayed: Vec<ObjectId> = match &report.failed {
        Some(_) => wanted.iter().filter(|id| !report.forgotten.contains(id)).copied().collect(),
        None => Vec::new(),
    };
    for decision in decisions.iter_mut().filter(|decision| stayed.contains(&decision.point)) {
        decision.keep = true;
        decision.reasons = vec!["could not be forgotten".into()];
    }
    let held = report.held.iter().map(|(point, hold)| (*point, hold.to_string()));
    for (point, reason) in held.chain(report.locked.iter().cloned()) {
        for decision in decisions.iter_mut().filter(|decision| decision.point == point) {
            decision.keep = true;
            decision.reasons = vec![reason.clone()];
        }
    }
    show(app, &decisions);
    let tense = if args.dry_run { "would be " } else { "" };
    app.output.line(format!(
        "{} restore points {tense}forgotten, {} kept",
        report.forgotten.len(),
        decisions.len() - report.forgotten.len()
    ));
    let mut exit = Exit::Done;
    for decision in decisions.iter().filter(|decision| named && decision.keep) {
        app.output.warning(&format!(
            "restore point {} stays: {}",
            units::short_id(decision.point),
            decision.reasons.join(", ")
        ));
        exit = Exit::Warnings;
    }
    exit = exit.worse(warn_of_future(app, &decisions, plan.as_ref()));
    let pruned = if args.prune && !args.dry_run && report.failed.is_none() {
        Some(super::prune::prune_now(app, &repository, &super::prune::default_options(false))?)
    } else {
        None
    };
    summarise(app, args, &decisions, &report.forgotten, pruned.as_ref());
    report.failed.map_or(Ok(exit), |error| Err(error.into()))
}

/// Points of a time to come: of a host with a wrong clock, or of somebody who would have the rules forget
/// the others.
fn warn_of_future(app: &App, decisions: &[Decision], plan: Option<&RetentionPlan>) -> Exit {
    let Some(plan) = plan else { return Exit::Done };
    let mut exit = Exit::Done;
    for decision in decisions.iter().filter(|decision| plan.is_future(decision.time)) {
        app.output.warning(&format!(
            "restore point {} of {} is of {}, which is in the future: no rule looks at it; `vmtide forget {}` \
             forgets it",
            units::short_id(decision.point),
            decision.vm,
            units::time(decision.time),
            units::short_id(decision.point)
        ));
        exit = Exit::Warnings;
    }
    exit
}

fn doomed(decisions: &[Decision]) -> Vec<ObjectId> {
    let doomed = decisions.iter().filter(|decision| !decision.keep);
    doomed.map(|decision| decision.point).collect()
}

/// What holds a restore point, one line each.
fn held_by(holds: &[Hold], point: ObjectId) -> Vec<String> {
    holds.iter().filter(|hold| hold.point == point).map(Hold::to_string).collect()
}

fn named_points(repository: &Repository, specs: &[String]) -> Result<Vec<Decision>> {
    let holds = readable(repository.points()?)?.holds;
    let mut decisions: Vec<Decision> = Vec::with_capacity(specs.len());
    for spec in specs {
        let point = resolve(repository, spec)?;
        if decisions.iter().all(|decision| decision.point != point.id) {
            let held = held_by(&holds, point.id);
            decisions.push(Decision {
                point: point.id,
                vm: point.vm,
                time: point.time,
                keep: !held.is_empty(),
                reasons: if held.is_empty() { vec!["named".into()] } else { held },
            });
        }
    }
    Ok(decisions)
}

/// A list in which every hold can be read: one that cannot may be on any point.
fn readable(mut list: PointList) -> Result<PointList> {
    match list.unreadable_holds.pop() {
        None => Ok(list),
        Some((name, error)) => {
            tracing::error!("{name} cannot be read, and may hold any restore point");
            Err(error.into())
        }
    }
}

fn by_rules(
    repository: &Repository,
    selector: &Selector,
    plan: &RetentionPlan,
) -> Result<Vec<Decision>> {
    let mut list = readable(points(repository, None)?)?;
    // A point that cannot be read may be the newest of a VM: rules over the rest would be wrong.
    if let Some((name, error)) = list.first_lost() {
        tracing::error!("{name} cannot be read, so the rules cannot be applied");
        return Err(error.into());
    }
    let holds = list.holds;
    let mut candidates: Vec<_> = list
        .points
        .into_iter()
        .map(|point| Candidate {
            id: point.id,
            vm: point.vm,
            time: point.time,
            tags: point.tags,
            held: held_by(&holds, point.id),
        })
        .collect();
    if !selector.vms.is_empty() && !candidates.iter().any(|it| selector.selects_vm(&it.vm)) {
        return Err(EngineError::NotFound {
            what: format!(
                "a restore point of {} in {}",
                selector.vms.join(" or "),
                repository.location()
            ),
            hint: "see `vmtide points` for all".into(),
        });
    }
    candidates.retain(|candidate| selector.selects(candidate));
    decide(&candidates, plan)
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
