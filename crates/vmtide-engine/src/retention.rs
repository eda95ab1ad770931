//! Which restore points to keep: a pure function of the points, the policy and the time zone.
//!
//! Every restore point is complete on its own, so any of them may be forgotten in any order. The
//! rules work per VM. A period rule (`daily: 7`) keeps the newest point of each of the newest
//! seven days *that have one*: a VM that was not backed up for a month loses nothing meanwhile.
//! For the same reason `within` counts back from the VM's newest point, not from now. It follows
//! that the newest point of a VM is always kept, whatever the policy.

use crate::{EngineError, Result};
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp, Zoned};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use vmtide_repo::ObjectId;

/// What to keep of each VM. A point is kept when at least one rule keeps it.
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
    /// All points no older than this, counted back from the VM's newest point.
    pub within: Option<Span>,
    /// All points that carry one of these tags with this value.
    pub tags: Vec<(String, String)>,
}

impl RetentionPolicy {
    /// Whether no rule is set. Such a policy would keep only what is always kept, which nobody
    /// means.
    pub fn is_empty(&self) -> bool {
        let counts = [self.last, self.hourly, self.daily, self.weekly, self.monthly, self.yearly];
        counts.iter().all(|count| *count == 0) && self.within.is_none() && self.tags.is_empty()
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
    /// The rules that keep it, e.g. `daily 2026-11-20`; empty where it is not kept.
    pub reasons: Vec<String>,
}

/// Decides over all candidates: VMs in order of name, the newest point of each first. `zone` says
/// where days begin.
///
/// # Errors
/// [`EngineError::Usage`] where the policy is empty or `within` reaches past the calendar.
pub fn decide(
    candidates: &[Candidate],
    policy: &RetentionPolicy,
    zone: &TimeZone,
) -> Result<Vec<Decision>> {
    if policy.is_empty() {
        return Err(EngineError::usage(
            "no rule says what to keep: give at least one --keep-… option",
        ));
    }
    let mut vms: BTreeMap<&str, Vec<&Candidate>> = BTreeMap::new();
    for candidate in candidates {
        vms.entry(&candidate.vm).or_default().push(candidate);
    }
    let mut decisions = Vec::with_capacity(candidates.len());
    for mut points in vms.into_values() {
        // The id settles the order of points of one moment, so that the answer is always the same.
        points.sort_by_key(|point| std::cmp::Reverse((point.time, point.id)));
        decisions.extend(decide_vm(&points, policy, zone)?);
    }
    Ok(decisions)
}

/// One period rule while it walks over the points.
struct PeriodRule {
    name: &'static str,
    left: u32,
    period_of: fn(&Zoned) -> String,
    last: Option<String>,
}

impl PeriodRule {
    fn keeps(&mut self, time: &Zoned) -> Option<String> {
        let period = (self.period_of)(time);
        if self.left == 0 || self.last.as_ref() == Some(&period) {
            return None;
        }
        self.left -= 1;
        let reason = format!("{} {period}", self.name);
        self.last = Some(period);
        Some(reason)
    }
}

fn period_rules(policy: &RetentionPolicy) -> Vec<PeriodRule> {
    let rule = |name, left, period_of| PeriodRule { name, left, period_of, last: None };
    vec![
        // The offset tells the two hours of the night when clocks are set back apart.
        rule("hourly", policy.hourly, |time| time.strftime("%Y-%m-%d %H:00%:z").to_string()),
        rule("daily", policy.daily, |time| time.strftime("%Y-%m-%d").to_string()),
        rule("weekly", policy.weekly, |time| time.strftime("%G-W%V").to_string()),
        rule("monthly", policy.monthly, |time| time.strftime("%Y-%m").to_string()),
        rule("yearly", policy.yearly, |time| time.strftime("%Y").to_string()),
    ]
}

fn decide_vm(
    points: &[&Candidate],
    policy: &RetentionPolicy,
    zone: &TimeZone,
) -> Result<Vec<Decision>> {
    let Some(newest) = points.first() else {
        return Ok(Vec::new());
    };
    let horizon = match &policy.within {
        Some(span) => Some(horizon(newest.time, *span, zone)?),
        None => None,
    };
    let tags: BTreeSet<_> = policy.tags.iter().collect();
    let mut rules = period_rules(policy);
    let mut last_left = policy.last;
    let mut decisions = Vec::with_capacity(points.len());
    for point in points {
        let mut reasons = Vec::new();
        if last_left > 0 {
            last_left -= 1;
            reasons.push(format!("last {}", policy.last));
        }
        let local = point.time.to_zoned(zone.clone());
        reasons.extend(rules.iter_mut().filter_map(|rule| rule.keeps(&local)));
        if let (Some(horizon), Some(span)) = (horizon, &policy.within)
            && point.time >= horizon
        {
            reasons.push(format!("within {span:#} of the newest"));
        }
        let tagged = tags.iter().filter(|(key, value)| point.tags.get(key) == Some(value));
        reasons.extend(tagged.map(|(key, value)| format!("tag {key}={value}")));
        if reasons.is_empty() && point.id == newest.id {
            reasons.push("newest of its VM".into());
        }
        decisions.push(Decision {
            point: point.id,
            vm: point.vm.clone(),
            time: point.time,
            keep: !reasons.is_empty(),
            reasons,
        });
    }
    Ok(decisions)
}

fn horizon(newest: Timestamp, within: Span, zone: &TimeZone) -> Result<Timestamp> {
    newest
        .to_zoned(zone.clone())
        .checked_sub(within)
        .map(|time| time.timestamp())
        .map_err(|error| EngineError::usage(format!("--keep-within {within:#}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn candidate(number: u8, vm: &str, time: &str) -> Candidate {
        Candidate {
            id: ObjectId([number; 16]),
            vm: vm.into(),
            time: time.parse().unwrap(),
            tags: BTreeMap::new(),
        }
    }

    fn kept(candidates: &[Candidate], policy: &RetentionPolicy) -> Vec<u8> {
        let decisions = decide(candidates, policy, &TimeZone::UTC).unwrap();
        let kept = decisions.iter().filter(|decision| decision.keep);
        kept.map(|decision| decision.point.0[0]).collect()
    }

    #[test]
    fn the_newest_of_each_period_is_kept_and_gaps_do_not_count() {
        let points = [
            candidate(1, "web", "2025-12-31T22:00:00Z"),
            candidate(2, "web", "2026-01-01T22:00:00Z"),
            candidate(3, "web", "2026-11-18T03:00:00Z"),
            candidate(4, "web", "2026-11-20T03:00:00Z"),
            candidate(5, "web", "2026-11-20T15:00:00Z"),
            candidate(6, "db", "2020-01-01T00:00:00Z"),
        ];
        let policy = |change: fn(&mut RetentionPolicy)| {
            let mut policy = RetentionPolicy::default();
            change(&mut policy);
            policy
        };
        assert_eq!(kept(&points, &policy(|p| p.last = 2)), [6, 5, 4]);
        assert_eq!(kept(&points, &policy(|p| p.daily = 2)), [6, 5, 3]);
        assert_eq!(kept(&points, &policy(|p| p.hourly = 3)), [6, 5, 4, 3]);
        assert_eq!(kept(&points, &policy(|p| p.monthly = 3)), [6, 5, 2, 1]);
        assert_eq!(kept(&points, &policy(|p| p.yearly = 9)), [6, 5, 1]);
        // 31 December 2025 and 1 January 2026 are in one ISO week.
        assert_eq!(kept(&points, &policy(|p| p.weekly = 9)), [6, 5, 2]);
        let within = policy(|p| p.within = Some(Span::new().hours(12)));
        assert_eq!(kept(&points, &within), [6, 5, 4]);
    }

    #[test]
    fn days_begin_where_the_zone_says() {
        let points = [
            candidate(1, "web", "2026-11-19T23:30:00Z"),
            candidate(2, "web", "2026-11-20T10:00:00Z"),
        ];
        let policy = RetentionPolicy { daily: 5, ..RetentionPolicy::default() };
        let east = TimeZone::fixed(jiff::tz::offset(1));
        let count = |zone: &TimeZone| {
            let decisions = decide(&points, &policy, zone).unwrap();
            decisions.iter().filter(|decision| decision.keep).count()
        };
        assert_eq!(count(&TimeZone::UTC), 2);
        assert_eq!(count(&east), 1);
    }

    #[test]
    fn every_kept_point_says_why_and_an_empty_policy_is_refused() {
        let mut points = [
            candidate(1, "web", "2026-11-19T23:30:00Z"),
            candidate(2, "web", "2026-11-20T10:00:00Z"),
        ];
        points[0].tags.insert("keep".into(), "yes".into());
        let policy = RetentionPolicy {
            tags: vec![("keep".into(), "yes".into())],
            ..RetentionPolicy::default()
        };
        let decisions = decide(&points, &policy, &TimeZone::UTC).unwrap();
        assert_eq!(decisions[0].reasons, ["newest of its VM"]);
        assert_eq!(decisions[1].reasons, ["tag keep=yes"]);
        let error = decide(&points, &RetentionPolicy::default(), &TimeZone::UTC).unwrap_err();
        assert!(matches!(error, EngineError::Usage(_)), "{error}");
    }

    prop_compose! {
        fn any_points()(times in prop::collection::vec((0..3u8, 0..200_000_000i64), 0..60)) -> Vec<Candidate> {
            let base = 1_600_000_000;
            times.into_iter().enumerate().map(|(number, (vm, second))| Candidate {
                id: ObjectId([u8::try_from(number).unwrap(); 16]),
                vm: format!("vm{vm}"),
                time: Timestamp::from_second(base + second).unwrap(),
                tags: BTreeMap::new(),
            }).collect()
        }
    }

    prop_compose! {
        fn any_policy()(counts in prop::array::uniform6(0..6u32), within in prop::option::of(1..500i64)) -> RetentionPolicy {
            let [last, hourly, daily, weekly, monthly, yearly] = counts;
            RetentionPolicy {
                last, hourly, daily, weekly, monthly, yearly,
                within: within.map(|days| Span::new().days(days)),
                tags: Vec::new(),
            }
        }
    }

    proptest! {
        #[test]
        fn the_newest_stays_nothing_is_lost_and_a_second_run_forgets_nothing(
            points in any_points(), policy in any_policy(),
        ) {
            prop_assume!(!policy.is_empty());
            let decisions = decide(&points, &policy, &TimeZone::UTC).unwrap();
            prop_assert_eq!(decisions.len(), points.len());
            for vm in ["vm0", "vm1", "vm2"] {
                if let Some(first) = decisions.iter().find(|decision| decision.vm == vm) {
                    let newest = points.iter().filter(|point| point.vm == vm).map(|point| point.time).max();
                    prop_assert_eq!(Some(first.time), newest);
                    prop_assert!(first.keep);
                }
            }
            for decision in &decisions {
                prop_assert_eq!(decision.keep, !decision.reasons.is_empty());
            }
            let survivors: Vec<_> = points.iter().filter(|point| {
                decisions.iter().any(|decision| decision.point == point.id && decision.keep)
            }).cloned().collect();
            let again = decide(&survivors, &policy, &TimeZone::UTC).unwrap();
            prop_assert!(again.iter().all(|decision| decision.keep));
        }

        #[test]
        fn a_larger_policy_keeps_all_that_a_smaller_one_keeps_and_counts_bound(
            points in any_points(), policy in any_policy(), more in 1..4u32,
        ) {
            prop_assume!(!policy.is_empty());
            let larger = RetentionPolicy {
                last: policy.last + more,
                daily: policy.daily + more,
                yearly: policy.yearly + more,
                ..policy.clone()
            };
            let small = decide(&points, &policy, &TimeZone::UTC).unwrap();
            let large = decide(&points, &larger, &TimeZone::UTC).unwrap();
            for (small, large) in small.iter().zip(&large) {
                prop_assert_eq!(small.point, large.point);
                prop_assert!(large.keep || !small.keep);
            }
            if policy.within.is_none() {
                let most = policy.last + policy.hourly + policy.daily
                    + policy.weekly + policy.monthly + policy.yearly;
                for vm in ["vm0", "vm1", "vm2"] {
                    let kept = small.iter().filter(|decision| decision.vm == vm && decision.keep);
                    prop_assert!(kept.count() <= most as usize);
                }
            }
        }
    }
}
