//! Which points rules are for, and how people write rules down.

use super::{Candidate, RetentionPolicy};
use jiff::Span;
use jiff::tz::TimeZone;
use std::collections::BTreeMap;

/// Which restore points are meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    /// Names of VMs, in which `*` stands for any characters; none means every VM.
    pub vms: Vec<String>,
    /// Tags that the point must carry, all of them.
    pub tags: Vec<(String, String)>,
}

impl Selector {
    /// Whether it selects everything.
    pub const fn is_empty(&self) -> bool {
        self.vms.is_empty() && self.tags.is_empty()
    }

    /// Whether the point is meant.
    pub fn selects(&self, point: &Candidate) -> bool {
        self.selects_point(&point.vm, &point.tags)
    }

    /// Whether a point of this VM with these tags is meant.
    pub fn selects_point(&self, vm: &str, tags: &BTreeMap<String, String>) -> bool {
        self.selects_vm(vm) && self.tags.iter().all(|(key, value)| tags.get(key) == Some(value))
    }

    /// Whether points of this VM can be meant.
    pub fn selects_vm(&self, vm: &str) -> bool {
        self.vms.is_empty() || self.vms.iter().any(|pattern| fits(pattern, vm))
    }
}

/// Whether `text` is what `pattern` says, in which `*` stands for any characters. Walks back to the
/// last `*` alone, so the time is bounded by the product of the lengths.
fn fits(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), text.chars().collect());
    let (mut at, mut place) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while place < text.len() {
        match (pattern.get(at), star) {
            (Some('*'), _) => {
                star = Some((at, place));
                at += 1;
            }
            (Some(wanted), _) if Some(wanted) == text.get(place) => {
                at += 1;
                place += 1;
            }
            (_, Some((star_at, taken))) => {
                star = Some((star_at, taken + 1));
                at = star_at + 1;
                place = taken + 1;
            }
            (_, None) => return false,
        }
    }
    pattern[at..].iter().all(|character| *character == '*')
}

/// A policy in one line, for settings files: `vm=db-*,tag=class=gold,keep-daily=30,keep-within=14d`.
/// `vm` and `tag` say what it is for and may come several times; the others are the names of the
/// options of `vmtide forget`.
///
/// # Errors
/// In words, what cannot be understood, or that there is no rule in it.
pub fn parse_policy(text: &str) -> Result<(Selector, RetentionPolicy), String> {
    let (mut selector, mut policy) = (Selector::default(), RetentionPolicy::default());
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (key, value) = part
            .split_once('=')
            .ok_or_else(|| format!("{part:?} in the policy {text:?}: write NAME=VALUE"))?;
        let of_policy = |error: String| format!("{key} in the policy {text:?}: {error}");
        let count = || parse_count(value).map_err(of_policy);
        let span = || parse_span(value).map(Some).map_err(of_policy);
        let tag = || match value.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
            _ => Err(of_policy(format!("{value:?} is no tag: write KEY=VALUE"))),
        };
        match key {
            "vm" => selector.vms.push(value.to_owned()),
            "tag" => selector.tags.push(tag()?),
            "keep-last" => policy.last = count()?,
            "keep-hourly" => policy.hourly = count()?,
            "keep-daily" => policy.daily = count()?,
            "keep-weekly" => policy.weekly = count()?,
            "keep-monthly" => policy.monthly = count()?,
            "keep-yearly" => policy.yearly = count()?,
            "keep-within" => policy.within = span()?,
            "keep-within-hourly" => policy.within_hourly = span()?,
            "keep-within-daily" => policy.within_daily = span()?,
            "keep-within-weekly" => policy.within_weekly = span()?,
            "keep-within-monthly" => policy.within_monthly = span()?,
            "keep-within-yearly" => policy.within_yearly = span()?,
            "keep-tag" => policy.tags.push(tag()?),
            _ => {
                return Err(format!(
                    "{key:?} in the policy {text:?} is neither vm, tag nor a rule"
                ));
            }
        }
    }
    if policy.is_empty() {
        return Err(format!(
            "the policy {text:?} keeps nothing: give it a rule, like keep-daily=7"
        ));
    }
    Ok((selector, policy))
}

/// A number, or `unlimited`.
///
/// # Errors
/// In words, where it is neither.
pub fn parse_count(text: &str) -> Result<u32, String> {
    if text == "unlimited" {
        return Ok(u32::MAX);
    }
    text.parse().map_err(|_| format!("{text:?} is no number; write e.g. 7, or unlimited"))
}

/// A length of time: `48h`, `14d`, `3months`, `1y6mo`.
///
/// # Errors
/// In words, where it is none or not longer than zero; and for a bare `m`, which other programs take
/// for months and the library for minutes.
pub fn parse_span(text: &str) -> Result<Span, String> {
    let mut words = text.split(|c: char| !c.is_ascii_alphabetic());
    if words.any(|word| word == "m") {
        return Err(format!("{text:?}: m may mean months or minutes; write mo or min"));
    }
    let span: Span = text.parse().map_err(|error| {
        format!("{text:?} is no length of time, like 48h, 14d or 3months: {error}")
    })?;
    if span.is_negative() || span.is_zero() {
        return Err(format!("{text:?}: give a length of time greater than zero"));
    }
    Ok(span)
}

/// A time zone: `local` for this machine's, `UTC`, a name such as `Europe/Berlin`, or POSIX rules such as
/// `CET-1CEST,M3.5.0,M10.5.0/3`, which need no database of zones.
///
/// # Errors
/// In words, where there is no such zone.
pub fn parse_zone(text: &str) -> Result<TimeZone, String> {
    if text == "local" {
        return TimeZone::try_system()
            .map_err(|error| format!("this machine's time zone cannot be told: {error}"));
    }
    if text.eq_ignore_ascii_case("utc") {
        return Ok(TimeZone::UTC);
    }
    TimeZone::get(text).or_else(|error| TimeZone::posix(text).map_err(|_| error)).map_err(|error| {
        format!("{text:?} is no time zone, like local, UTC or Europe/Berlin: {error}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_whole_names() {
        for (pattern, text, wanted) in [
            ("web", "web", true),
            ("web", "web1", false),
            ("web*", "web1", true),
            ("*", "", true),
            ("*b", "web", true),
            ("w*b*1", "web-b-1", true),
            ("w*b*2", "web-b-1", false),
            ("a*a*a*a*b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", false),
            ("", "web", false),
            ("mü*r", "müller", true),
        ] {
            assert_eq!(fits(pattern, text), wanted, "{pattern} {text}");
        }
    }

    #[test]
    fn policies_read_as_they_are_written() {
        let text = "vm=db-*, vm=dc,tag=class=gold,keep-daily=30,keep-last=unlimited,\
                    keep-within-weekly=1y6mo,keep-tag=pin=yes";
        let (selector, policy) = parse_policy(text).unwrap();
        assert_eq!(selector.vms, ["db-*", "dc"]);
        assert_eq!(selector.tags, [("class".into(), "gold".into())]);
        assert_eq!((policy.daily, policy.last, policy.weekly), (30, u32::MAX, 0));
        assert!(policy.within_weekly.is_some() && policy.within.is_none());
        for (text, word) in [
            ("vm=db", "keeps nothing"),
            ("keep-daily", "NAME=VALUE"),
            ("keep-daily=x", "no number"),
            ("keep-within=-3d", "greater than zero"),
            ("keep-within=2y5m7d", "mo or min"),
            ("keep-within=5m", "mo or min"),
            ("keep-monthy=3", "keep-monthy"),
            ("tag=x,keep-last=1", "no tag"),
            ("", "keeps nothing"),
        ] {
            let error = parse_policy(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn zones_are_known_by_name_and_by_rules() {
        for text in ["local", "UTC", "utc", "CET-1CEST,M3.5.0,M10.5.0/3"] {
            parse_zone(text).unwrap();
        }
        assert!(parse_zone("Middle/Earth").unwrap_err().contains("Middle/Earth"));
    }
}
