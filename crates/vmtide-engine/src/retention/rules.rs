//! The rules one by one, as they walk over the points of a group, the newest first.

use super::{Candidate, RetentionPolicy};
use crate::{EngineError, Result};
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp, Zoned};
use std::collections::HashMap;
use vmtide_repo::ObjectId;

/// What one rule says of one point.
pub(super) enum Verdict {
    /// It stays, because of this.
    Keep(String),
    /// This rule does not keep it, because of this.
    Against(String),
}

/// One rule.
pub(super) enum Rule {
    Last { count: u32, seen: u32 },
    Period(PeriodRule),
    Within(Horizon),
    Tag { key: String, value: String },
}

/// How far back from the newest point a rule reaches.
#[derive(Clone, Copy)]
pub(super) struct Horizon {
    span: Span,
    oldest: Timestamp,
}

impl Horizon {
    fn new(span: Span, newest: Timestamp, zone: &TimeZone, option: &str) -> Result<Self> {
        let oldest = newest
            .to_zoned(zone.clone())
            .checked_sub(span)
            .map_err(|error| EngineError::usage(format!("--{option} {span:#}: {error}")))?
            .timestamp();
        Ok(Self { span, oldest })
    }
}

/// A rule that keeps the newest point of each period.
pub(super) struct PeriodRule {
    name: &'static str,
    unit: &'static str,
    period_of: fn(&Zoned) -> String,
    /// How many periods: the newest so many, or all of the time within.
    count: u32,
    horizon: Option<Horizon>,
    /// The periods met, and their newest points. A set and not the last one alone: where clocks are
    /// set back over midnight, the day before comes again.
    seen: HashMap<String, ObjectId>,
}

impl PeriodRule {
    fn judge(&mut self, point: &Candidate, local: &Zoned) -> Verdict {
        let name = self.name;
        if let Some(Horizon { span, .. }) = self.horizon.filter(|it| point.time < it.oldest) {
            return Verdict::Against(format!("{name}: older than {span:#}"));
        }
        let period = (self.period_of)(local);
        if let Some(newer) = self.seen.get(&period) {
            let newer = &newer.to_string()[..8];
            return Verdict::Against(format!("{name} {period}: {newer} is newer"));
        }
        if self.seen.len() >= usize::try_from(self.count).unwrap_or(usize::MAX) {
            return Verdict::Against(format!(
                "{name}: {} newer {} have one",
                self.count, self.unit
            ));
        }
        self.seen.insert(period.clone(), point.id);
        Verdict::Keep(match self.horizon {
            Some(Horizon { span, .. }) => format!("{name} {period} within {span:#}"),
            None => format!("{name} {period}"),
        })
    }
}

impl Rule {
    /// What the rule says of the next older point; `local` is its time in the zone.
    pub(super) fn judge(&mut self, point: &Candidate, local: &Zoned) -> Verdict {
        match self {
            Self::Last { count, seen } => {
                *seen = seen.saturating_add(1);
                match *seen <= *count {
                    true if *count == u32::MAX => Verdict::Keep("last: all".into()),
                    true => Verdict::Keep(format!("last {count}")),
                    false => Verdict::Against(format!("last: {count} are newer")),
                }
            }
            Self::Period(rule) => rule.judge(point, local),
            Self::Within(Horizon { span, oldest }) if point.time >= *oldest => {
                Verdict::Keep(format!("within {span:#} of the newest"))
            }
            Self::Within(Horizon { span, .. }) => {
                Verdict::Against(format!("within: older than {span:#}"))
            }
            Self::Tag { key, value } if point.tags.get(key) == Some(value) => {
                Verdict::Keep(format!("tag {key}={value}"))
            }
            Self::Tag { key, value } => Verdict::Against(format!("tag: not {key}={value}")),
        }
    }
}

/// A kind of period: its name, what several are called, and which one a moment lies in.
type Period = (&'static str, &'static str, fn(&Zoned) -> String);

// The offset tells the two hours of the night when clocks are set back apart.
const HOURLY: Period = ("hourly", "hours", |time| time.strftime("%Y-%m-%d %H:00%:z").to_string());
const DAILY: Period = ("daily", "days", |time| time.strftime("%Y-%m-%d").to_string());
const WEEKLY: Period = ("weekly", "weeks", |time| time.strftime("%G-W%V").to_string());
const MONTHLY: Period = ("monthly", "months", |time| time.strftime("%Y-%m").to_string());
const YEARLY: Period = ("yearly", "years", |time| time.strftime("%Y").to_string());

/// The rules of a policy for a group whose newest point is of this moment.
///
/// # Errors
/// [`EngineError::Usage`] where a `within` reaches past the calendar.
pub(super) fn rules_of(
    policy: &RetentionPolicy,
    newest: Timestamp,
    zone: &TimeZone,
) -> Result<Vec<Rule>> {
    let mut rules = Vec::new();
    if policy.last > 0 {
        rules.push(Rule::Last { count: policy.last, seen: 0 });
    }
    let rule = |period: Period, count, horizon| {
        let (name, unit, period_of) = period;
        Rule::Period(PeriodRule { name, unit, period_of, count, horizon, seen: HashMap::new() })
    };
    for (period, count) in [
        (HOURLY, policy.hourly),
        (DAILY, policy.daily),
        (WEEKLY, policy.weekly),
        (MONTHLY, policy.monthly),
        (YEARLY, policy.yearly),
    ] {
        if count > 0 {
            rules.push(rule(period, count, None));
        }
    }
    if let Some(span) = policy.within {
        rules.push(Rule::Within(Horizon::new(span, newest, zone, "keep-within")?));
    }
    for (period, span) in [
        (HOURLY, policy.within_hourly),
        (DAILY, policy.within_daily),
        (WEEKLY, policy.within_weekly),
        (MONTHLY, policy.within_monthly),
        (YEARLY, policy.within_yearly),
    ] {
        if let Some(span) = span {
            let option = format!("keep-within-{}", period.0);
            let horizon = Horizon::new(span, newest, zone, &option)?;
            rules.push(rule(period, u32::MAX, Some(horizon)));
        }
    }
    let tags = policy.tags.iter();
    rules.extend(tags.map(|(key, value)| Rule::Tag { key: key.clone(), value: value.clone() }));
    Ok(rules)
}
