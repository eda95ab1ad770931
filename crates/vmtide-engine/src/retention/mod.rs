//! Which restore points to keep: a pure function of the points, the rules and the time zone.
//!
//! Every restore point is complete on its own, so any of them may be forgotten in any order. The
//! rules work per group: per VM, and where asked for per value of some tags. A period rule
//! (`daily: 7`) keeps the newest point of each of the newest seven days *that have one*: a VM that
//! was not backed up for a month loses nothing meanwhile. For the same reason `within` counts back
//! from the group's newest point, not from now. A point stays when one rule keeps it, or a hold. The
//! newest point of a group stays whatever the rules, unless [`RetentionPlan::allow_none`] says
//! otherwise.
//!
//! **Time zones.** Hours, days, weeks, months and years are those of the calendar in the plan's
//! zone. A day on which clocks change has 23 or 25 hours and is one day; the hour that comes twice is
//! two hours; weeks are ISO weeks and begin on Monday. In `within`, hours and smaller units are exact, and
//! days and larger ones go back on the calendar to the same time of day: `1d` before noon
//! is noon of the day before, `24h` may be 11 or 13 o'clock.

mod rules;
mod select;
#[cfg(test)]
mod tests;

pub use select::{Selector, parse_count, parse_policy, parse_span, parse_zone};

use crate::{EngineError, Result};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Span, Timestamp};
use rules::{Rule, Verdict, rules_of};
use serde::Serialize;
use std::collections::BTreeMap;
use vmtide_repo::ObjectId;

/// What to keep of each group. A point is kept when at least one rule keeps it.
#[derive(Clone, Debug, Default)]
pub struct RetentionPolicy {
    /// The newest so many.
    pub last: u32,
    /// The newest point of each of the newest so many hours that have one.
    pub hourly: u32,
    /// As `hourly`, calendar days.
    pub daily: u32,
    /// As `hourly`, ISO weeks, which begin on Monday.
    pub weekly: u32,
    /// As `hourly`, calendar months.
    pub monthly: u32,
    /// As `hourly`, calendar years.
    pub yearly: u32,
    /// All points no older than this, counted back from the group's newest point.
    pub within: Option<Span>,
    /// The newest point of each hour, of those no older than this.
    pub within_hourly: Option<Span>,
    /// As `within_hourly`, calendar days.
    pub within_daily: Option<Span>,
    /// As `within_hourly`, ISO weeks.
    pub within_weekly: Option<Span>,
    /// As `within_hourly`, calendar months.
    pub within_monthly: Option<Span>,
    /// As `within_hourly`, calendar years.
    pub within_yearly: Option<Span>,
    /// All points that carry one of these tags with this value.
    pub tags: Vec<(String, String)>,
}

impl RetentionPolicy {
    /// Whether no rule is set. Such a policy would keep only what is always kept, which nobody
    /// means.
    pub fn is_empty(&self) -> bool {
        let counts = [self.last, self.hourly, self.daily, self.weekly, self.monthly, self.yearly];
        let spans = [
            self.within,
            self.within_hourly,
            self.within_daily,
            self.within_weekly,
            self.within_monthly,
            self.within_yearly,
        ];
        counts.iter().all(|count| *count == 0)
            && spans.iter().all(Option::is_none)
            && self.tags.is_empty()
    }
}

/// Rules, and which points they are for.
#[derive(Clone, Debug)]
pub struct RetentionPlan {
    /// For each point the first policy that selects it decides; a point that none selects stays.
    pub policies: Vec<(Selector, RetentionPolicy)>,
    /// Points of one VM that differ in the value of one of these tags are groups of their own.
    pub group_by_tags: Vec<String>,
    /// Whether a group may lose all its points.
    pub allow_none: bool,
    /// Where days begin.
    pub zone: TimeZone,
    /// The present. Points of later than a day from it stay, and no rule counts them or counts from them:
    /// one host with a wrong clock, or one forged point, would have the others forgotten.
    pub now: Timestamp,
}

/// How far clocks of hosts may be ahead of ours.
const CLOCKS_DIFFER: SignedDuration = SignedDuration::from_hours(24);

impl RetentionPlan {
    /// Whether a point of that moment is of a time to come.
    pub fn is_future(&self, time: Timestamp) -> bool {
        time.duration_since(self.now) > CLOCKS_DIFFER
    }
}

/// What retention has to know of a restore point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its id.
    pub id: ObjectId,
    /// Its VM.
    pub vm: String,
    /// Its moment.
    pub time: Timestamp,
    /// Its tags.
    pub tags: BTreeMap<String, String>,
    /// Why it must stay whatever the rules say, e.g. `hold 3fa9c1d2`; one entry for each hold.
    pub held: Vec<String>,
}

/// What becomes of one restore point, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Decision {
    /// The restore point.
    pub point: ObjectId,
    /// Its VM.
    pub vm: String,
    /// Its moment.
    pub time: Timestamp,
    /// Whether it is kept.
    pub keep: bool,
    /// The rules that keep it, e.g. `daily 2026-11-20`; or, where it is not kept, what each rule says
    /// against it.
    pub reasons: Vec<String>,
}

/// Decides over all candidates: VMs in order of name, in each the groups one after the other, in
/// each the newest point first.
///
/// # Errors
/// [`EngineError::Usage`] where a policy without rules would decide and `allow_none` is not set, or
/// a `within` reaches past the calendar.
pub fn decide(candidates: &[Candidate], plan: &RetentionPlan) -> Result<Vec<Decision>> {
    let has_empty = plan.policies.iter().any(|(_, policy)| policy.is_empty());
    if plan.policies.is_empty() || (has_empty && !plan.allow_none) {
        return Err(EngineError::usage(
            "no rule says what to keep: give at least one --keep-… option",
        ));
    }
    let mut groups: BTreeMap<_, Vec<&Candidate>> = BTreeMap::new();
    for candidate in candidates {
        let policy = plan.policies.iter().position(|(selector, _)| selector.selects(candidate));
        let values: Vec<_> = plan
            .group_by_tags
            .iter()
            .map(|key| candidate.tags.get(key).map(String::as_str))
            .collect();
        groups.entry((candidate.vm.as_str(), policy, values)).or_default().push(candidate);
    }
    let mut decisions = Vec::with_capacity(candidates.len());
    for ((_, policy, _), mut points) in groups {
        // The id settles the order of points of one moment, so that the answer is always the same.
        points.sort_by_key(|point| std::cmp::Reverse((point.time, point.id)));
        match policy.and_then(|number| plan.policies.get(number)) {
            Some((_, policy)) => {
                let future = points.partition_point(|point| plan.is_future(point.time));
                let (future, present) = points.split_at(future);
                decisions.extend(future.iter().map(|point| {
                    let mut reasons = point.held.clone();
                    reasons.push("of a time in the future".into());
                    decision(point, true, reasons)
                }));
                decisions.extend(decide_group(present, policy, plan)?);
            }
            None => decisions.extend(points.into_iter().map(|point| {
                let mut reasons = point.held.clone();
                reasons.push("no policy is for it".into());
                decision(point, true, reasons)
            })),
        }
    }
    Ok(decisions)
}

fn decision(point: &Candidate, keep: bool, reasons: Vec<String>) -> Decision {
    Decision { point: point.id, vm: point.vm.clone(), time: point.time, keep, reasons }
}

/// Decides over one group, the newest point first.
fn decide_group(
    points: &[&Candidate],
    policy: &RetentionPolicy,
    plan: &RetentionPlan,
) -> Result<Vec<Decision>> {
    let Some(newest) = points.first() else {
        return Ok(Vec::new());
    };
    let mut rules = rules_of(policy, newest.time, &plan.zone)?;
    let decide = |point: &&Candidate| {
        let local = point.time.to_zoned(plan.zone.clone());
        let (mut reasons, mut against) = (point.held.clone(), Vec::new());
        for verdict in rules.iter_mut().map(|rule: &mut Rule| rule.judge(point, &local)) {
            match verdict {
                Verdict::Keep(reason) => reasons.push(reason),
                Verdict::Against(reason) => against.push(reason),
            }
        }
        if reasons.is_empty() && point.id == newest.id && !plan.allow_none {
            let of = if plan.group_by_tags.is_empty() { "its VM" } else { "its group" };
            reasons.push(format!("newest of {of}"));
        }
        if reasons.is_empty() && against.is_empty() {
            against.push("no rule keeps any".into());
        }
        let keep = !reasons.is_empty();
        decision(point, keep, if keep { reasons } else { against })
    };
    Ok(points.iter().map(decide).collect())
}
