use super::*;
use proptest::prelude::*;

fn candidate(number: u8, vm: &str, time: &str) -> Candidate {
    Candidate {
        id: ObjectId([number; 16]),
        vm: vm.into(),
        time: time.parse().unwrap(),
        tags: BTreeMap::new(),
        held: Vec::new(),
    }
}

fn plan(policy: RetentionPolicy, zone: &TimeZone) -> RetentionPlan {
    RetentionPlan {
        policies: vec![(Selector::default(), policy)],
        group_by_tags: Vec::new(),
        allow_none: false,
        zone: zone.clone(),
        now: Timestamp::MAX,
    }
}

fn policy(change: impl FnOnce(&mut RetentionPolicy)) -> RetentionPolicy {
    let mut policy = RetentionPolicy::default();
    change(&mut policy);
    policy
}

fn kept_by(candidates: &[Candidate], plan: &RetentionPlan) -> Vec<u8> {
    let decisions = decide(candidates, plan).unwrap();
    let kept = decisions.iter().filter(|decision| decision.keep);
    kept.map(|decision| decision.point.0[0]).collect()
}

fn kept(candidates: &[Candidate], policy: RetentionPolicy) -> Vec<u8> {
    kept_by(candidates, &plan(policy, &TimeZone::UTC))
}

/// Central Europe by rules, so that the test needs no database of zones.
fn berlin() -> TimeZone {
    parse_zone("CET-1CEST,M3.5.0,M10.5.0/3").unwrap()
}

fn gap_years() -> [Candidate; 6] {
    [
        candidate(1, "web", "2025-12-31T22:00:00Z"),
        candidate(2, "web", "2026-01-01T22:00:00Z"),
        candidate(3, "web", "2026-11-18T03:00:00Z"),
        candidate(4, "web", "2026-11-20T03:00:00Z"),
        candidate(5, "web", "2026-11-20T15:00:00Z"),
        candidate(6, "db", "2020-01-01T00:00:00Z"),
    ]
}

#[test]
fn the_newest_of_each_period_is_kept_and_gaps_do_not_count() {
    let points = gap_years();
    assert_eq!(kept(&points, policy(|p| p.last = 2)), [6, 5, 4]);
    assert_eq!(kept(&points, policy(|p| p.daily = 2)), [6, 5, 3]);
    assert_eq!(kept(&points, policy(|p| p.hourly = 3)), [6, 5, 4, 3]);
    assert_eq!(kept(&points, policy(|p| p.monthly = 3)), [6, 5, 2, 1]);
    assert_eq!(kept(&points, policy(|p| p.yearly = 9)), [6, 5, 1]);
    // 31 December 2025 and 1 January 2026 are in one ISO week.
    assert_eq!(kept(&points, policy(|p| p.weekly = 9)), [6, 5, 2]);
    assert_eq!(kept(&points, policy(|p| p.within = Some(Span::new().hours(12)))), [6, 5, 4]);
    let month = Some(Span::new().months(1));
    assert_eq!(kept(&points, policy(|p| p.within_daily = month)), [6, 5, 3]);
    assert_eq!(kept(&points, policy(|p| p.within_hourly = month)), [6, 5, 4, 3]);
    let year = Some(Span::new().years(1));
    assert_eq!(kept(&points, policy(|p| p.within_monthly = year)), [6, 5, 2, 1]);
    assert_eq!(kept(&points, policy(|p| p.within_yearly = year)), [6, 5, 1]);
    assert_eq!(kept(&points, policy(|p| p.within_weekly = year)), [6, 5, 2]);
    assert_eq!(kept(&points, policy(|p| p.last = u32::MAX)).len(), 6);
}

#[test]
fn every_decision_says_why() {
    let rules = policy(|p| {
        p.daily = 2;
        p.yearly = 1;
        p.within = Some(Span::new().hours(12));
        p.tags.push(("pin".into(), "yes".into()));
    });
    let decisions = decide(&gap_years(), &plan(rules, &TimeZone::UTC)).unwrap();
    let of = |number: u8| {
        let found = decisions.iter().find(|decision| decision.point.0[0] == number).unwrap();
        (found.keep, found.reasons.join("; "))
    };
    let five = "daily 2026-11-20; yearly 2026; within 12h of the newest";
    assert_eq!(of(5), (true, five.into()));
    assert_eq!(of(4), (true, "within 12h of the newest".into()));
    let two = "daily: 2 newer days have one; yearly 2026: 05050505 is newer; \
               within: older than 12h; tag: not pin=yes";
    assert_eq!(of(2), (false, two.into()));
    let rules = policy(|p| p.tags.push(("pin".into(), "yes".into())));
    let decisions = decide(&gap_years(), &plan(rules, &TimeZone::UTC)).unwrap();
    assert_eq!(decisions[0].reasons, ["newest of its VM"]);
}

#[test]
fn days_begin_where_the_zone_says() {
    let points =
        [candidate(1, "web", "2026-11-19T23:30:00Z"), candidate(2, "web", "2026-11-20T10:00:00Z")];
    let rules = policy(|p| p.daily = 5);
    assert_eq!(kept_by(&points, &plan(rules.clone(), &TimeZone::UTC)), [2, 1]);
    assert_eq!(kept_by(&points, &plan(rules, &berlin())), [2]);
}

#[test]
fn days_of_23_and_25_hours_are_days_and_the_hour_that_comes_twice_is_two() {
    // Clocks went back at 01:00 UTC on 25 October 2026: 02:30 came twice.
    let points = [
        candidate(1, "web", "2026-10-24T22:00:00Z"), // 25 October, 00:00
        candidate(2, "web", "2026-10-25T00:30:00Z"), // 02:30, summer
        candidate(3, "web", "2026-10-25T01:30:00Z"), // 02:30, winter
        candidate(4, "web", "2026-10-25T22:59:00Z"), // 23:59
    ];
    assert_eq!(kept_by(&points, &plan(policy(|p| p.daily = 9), &berlin())), [4]);
    assert_eq!(kept_by(&points, &plan(policy(|p| p.hourly = 9), &berlin())), [4, 3, 2, 1]);
    // A day back on the calendar is 25 hours here; 24 hours are 24 hours.
    let points = [
        candidate(1, "web", "2026-10-24T11:00:00Z"), // 13:00, summer
        candidate(2, "web", "2026-10-25T12:00:00Z"), // 13:00, winter
    ];
    let within = |span: Span| policy(|p| p.within = Some(span));
    assert_eq!(kept_by(&points, &plan(within(Span::new().days(1)), &berlin())), [2, 1]);
    assert_eq!(kept_by(&points, &plan(within(Span::new().hours(24)), &berlin())), [2]);
    // In spring the day has 23 hours.
    let points = [
        candidate(1, "web", "2026-03-28T11:59:00Z"), // 12:59, winter
        candidate(2, "web", "2026-03-29T11:00:00Z"), // 13:00, summer
    ];
    assert_eq!(kept_by(&points, &plan(within(Span::new().days(1)), &berlin())), [2]);
    assert_eq!(kept_by(&points, &plan(within(Span::new().hours(24)), &berlin())), [2, 1]);
}

#[test]
fn a_midnight_that_comes_twice_makes_no_third_day() {
    // As Newfoundland once did: at one minute past midnight back to 23:01 of the day before.
    let zone = parse_zone("NST3:30NDT,M4.1.0/0:01,M10.5.0/0:01").unwrap();
    let points = [
        candidate(1, "web", "2026-10-25T02:15:00Z"), // 24 October, 23:45, summer
        candidate(2, "web", "2026-10-25T02:30:30Z"), // 25 October, 00:00:30, summer
        candidate(3, "web", "2026-10-25T02:45:00Z"), // 24 October, 23:15 again, winter
        candidate(4, "web", "2026-10-25T12:00:00Z"), // 25 October
    ];
    assert_eq!(kept_by(&points, &plan(policy(|p| p.daily = 9), &zone)), [4, 3]);
}

#[test]
fn nothing_loses_its_last_point_unless_that_is_allowed() {
    let points = gap_years();
    let error = decide(&points, &plan(RetentionPolicy::default(), &TimeZone::UTC)).unwrap_err();
    assert!(matches!(error, EngineError::Usage(_)), "{error}");
    let tag = policy(|p| p.tags.push(("keep".into(), "yes".into())));
    assert_eq!(kept(&points, tag.clone()), [6, 5]);
    let mut all = plan(tag, &TimeZone::UTC);
    all.allow_none = true;
    assert_eq!(kept_by(&points, &all), [0_u8; 0]);
    all.policies[0].1 = RetentionPolicy::default();
    let decisions = decide(&points, &all).unwrap();
    assert!(decisions.iter().all(|decision| !decision.keep && decision.reasons.len() == 1));
}

#[test]
fn points_of_the_future_stay_and_are_not_what_the_rules_count_from() {
    let mut points = gap_years()[..2].to_vec();
    points[0].time = "2026-11-19T12:00:00Z".parse().unwrap();
    points[1].time = "2026-11-20T12:00:00Z".parse().unwrap();
    for (id, time) in [(98, "2099-01-01T00:00:00Z"), (99, "2099-01-01T00:00:00.001Z")] {
        points.push(candidate(id, "web", time));
    }
    let rules = policy(|p| p.within = Some(Span::new().days(14)));
    let mut plan = plan(rules, &TimeZone::UTC);
    plan.now = "2026-11-20T13:00:00Z".parse().unwrap();
    let own: Vec<u8> = [1, 0].iter().map(|at: &usize| points[*at].id.0[0]).collect();
    assert_eq!(kept_by(&points, &plan), [99, 98, own[0], own[1]]);
    plan.policies[0].1 = policy(|p| p.daily = 1);
    assert_eq!(kept_by(&points, &plan), [99, 98, own[0]]);
}

#[test]
fn held_points_stay_and_say_so() {
    let mut points = gap_years();
    points[1].held.push("hold 0123: audit".into());
    let mut all = plan(RetentionPolicy::default(), &TimeZone::UTC);
    all.allow_none = true;
    assert_eq!(kept_by(&points, &all), [2]);
    let decisions = decide(&points, &plan(policy(|p| p.last = 1), &TimeZone::UTC)).unwrap();
    let held = decisions.iter().find(|decision| decision.point.0[0] == 2).unwrap();
    assert_eq!(held.reasons, ["hold 0123: audit"]);
}

#[test]
fn groups_by_tag_and_policies_by_vm_and_tag() {
    let mut points = gap_years();
    for (number, class) in [(0, "gold"), (1, "gold"), (2, "tin"), (3, "tin")] {
        points[number].tags.insert("class".into(), class.into());
    }
    let mut by_tag = plan(policy(|p| p.last = 1), &TimeZone::UTC);
    by_tag.group_by_tags.push("class".into());
    assert_eq!(kept_by(&points, &by_tag), [6, 5, 2, 4]);
    let rules = |text: &str| parse_policy(text).unwrap();
    let by_policy = RetentionPlan {
        policies: vec![rules("vm=w*,tag=class=gold,keep-last=1"), rules("vm=web,keep-last=2")],
        ..by_tag
    };
    let by_policy = RetentionPlan { group_by_tags: Vec::new(), ..by_policy };
    let decisions = decide(&points, &by_policy).unwrap();
    assert_eq!(decisions[0].reasons, ["no policy is for it"]);
    assert_eq!(kept_by(&points, &by_policy), [6, 2, 5, 4]);
}

/// The rules once more, as simply as they can be said: a point is the newest of its period, and
/// fewer than N periods with points are newer. No calendar of a library: days are counted, and
/// the clocks of Central Europe are changed by hand.
mod model {

    fn days_of(year: i64, month: i64, day: i64) -> i64 {
        let mut days = day - 1;
        for earlier in 1..month {
            days += length(year, earlier);
        }
        for earlier in 1970..year {
            days += if is_leap(earlier) { 366 } else { 365 };
        }
        days
    }

    const fn is_leap(year: i64) -> bool {
        year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
    }

    const fn length(year: i64, month: i64) -> i64 {
        match month {
            2 if is_leap(year) => 29,
            2 => 28,
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        }
    }

    fn date_of(mut days: i64) -> (i64, i64) {
        let mut year = 1970;
        while days >= if is_leap(year) { 366 } else { 365 } {
            days -= if is_leap(year) { 366 } else { 365 };
            year += 1;
        }
        let mut month = 1;
        while days >= length(year, month) {
            days -= length(year, month);
            month += 1;
        }
        (year, month)
    }

    /// 01:00 UTC of the last Sunday of a month of 31 days; 1 January 1970 was a Thursday.
    fn change(year: i64, month: i64) -> i64 {
        let last = days_of(year, month, 31);
        (last - (last + 4) % 7) * 86_400 + 3600
    }

    pub fn offset(second: i64) -> i64 {
        let (year, _) = date_of(second / 86_400);
        if (change(year, 3)..change(year, 10)).contains(&second) { 7200 } else { 3600 }
    }

    fn period(kind: usize, second: i64) -> i64 {
        let day = (second + offset(second)) / 86_400;
        let (year, month) = date_of(day);
        match kind {
            // Offsets are whole hours, so hours are those of UTC.
            0 => second / 3600,
            1 => day,
            2 => (day + 3) / 7,
            3 => year * 12 + month,
            _ => year,
        }
    }

    pub fn keeps(points: &[(i64, u8)], it: (i64, u8), policy: &Counts) -> bool {
        let newer = |other: &&(i64, u8)| **other > it;
        let newest = points.iter().max().unwrap();
        if points.iter().filter(newer).count() < policy.last {
            return true;
        }
        if policy.within_hours.is_some_and(|hours| it.0 >= newest.0 - hours * 3600) || it == *newest
        {
            return true;
        }
        (0..5).any(|kind| {
            let mine = period(kind, it.0);
            let mut periods: Vec<i64> =
                points.iter().filter(newer).map(|other| period(kind, other.0)).collect();
            periods.sort_unstable();
            periods.dedup();
            let is_newest = !periods.contains(&mine);
            let within = policy.within_period_hours[kind]
                .is_some_and(|hours| it.0 >= newest.0 - hours * 3600);
            is_newest && (periods.len() < policy.periods[kind] || within)
        })
    }

    #[derive(Clone, Debug)]
    pub struct Counts {
        pub last: usize,
        pub periods: [usize; 5],
        pub within_hours: Option<i64>,
        pub within_period_hours: [Option<i64>; 5],
    }
}

prop_compose! {
    /// Few enough different moments for points of one second, hour and day to be common.
    fn any_points()(times in prop::collection::vec((0..3u8, 0..4i64, 0..900i64, 0..6i64), 0..60)) -> Vec<Candidate> {
        times.into_iter().enumerate().map(|(number, (vm, year, day, step))| Candidate {
            id: ObjectId([u8::try_from(number).unwrap(); 16]),
            vm: format!("vm{vm}"),
            time: Timestamp::from_second(1_600_000_000 + year * 31_000_000 + day * 86_400 / 3 + step * 1700).unwrap(),
            tags: BTreeMap::new(),
            held: Vec::new(),
        }).collect()
    }
}

prop_compose! {
    fn any_counts()(
        counts in prop::array::uniform6(0..6usize),
        within_hours in prop::option::of(1..9000i64),
        within_period_hours in prop::array::uniform5(prop::option::weighted(0.2, 1..9000i64)),
    ) -> model::Counts {
        let [last, periods @ ..] = counts;
        model::Counts { last, periods, within_hours, within_period_hours }
    }
}

fn policy_of(counts: &model::Counts) -> RetentionPolicy {
    let [hourly, daily, weekly, monthly, yearly] =
        counts.periods.map(|n| u32::try_from(n).unwrap());
    let span = |hours: Option<i64>| hours.map(|hours| Span::new().hours(hours));
    let [within_hourly, within_daily, within_weekly, within_monthly, within_yearly] =
        counts.within_period_hours.map(span);
    RetentionPolicy {
        last: u32::try_from(counts.last).unwrap(),
        hourly,
        daily,
        weekly,
        monthly,
        yearly,
        within: span(counts.within_hours),
        within_hourly,
        within_daily,
        within_weekly,
        within_monthly,
        within_yearly,
        tags: Vec::new(),
    }
}

#[test]
fn the_model_changes_its_clocks_where_central_europe_does() {
    for (time, offset) in [
        ("2026-03-29T00:59:59Z", 3600),
        ("2026-03-29T01:00:00Z", 7200),
        ("2026-10-25T00:59:59Z", 7200),
        ("2026-10-25T01:00:00Z", 3600),
        ("2024-02-29T12:00:00Z", 3600),
    ] {
        assert_eq!(model::offset(time.parse::<Timestamp>().unwrap().as_second()), offset, "{time}");
    }
}

proptest! {
    #[test]
    fn decisions_are_those_of_the_model(points in any_points(), counts in any_counts()) {
        let policy = policy_of(&counts);
        prop_assume!(!policy.is_empty());
        let decisions = decide(&points, &plan(policy, &berlin())).unwrap();
        prop_assert_eq!(decisions.len(), points.len());
        for decision in &decisions {
            let of_vm: Vec<(i64, u8)> = points.iter().filter(|point| point.vm == decision.vm)
                .map(|point| (point.time.as_second(), point.id.0[0])).collect();
            let it = (decision.time.as_second(), decision.point.0[0]);
            prop_assert_eq!(decision.keep, model::keeps(&of_vm, it, &counts), "{:?}", decision);
            prop_assert!(!decision.reasons.is_empty());
        }
    }

    #[test]
    fn a_second_run_forgets_nothing_and_a_larger_policy_no_more(
        points in any_points(), counts in any_counts(), more in 1..4u32,
    ) {
        let policy = policy_of(&counts);
        prop_assume!(!policy.is_empty());
        let small = decide(&points, &plan(policy.clone(), &berlin())).unwrap();
        let survivors: Vec<_> = points.iter().filter(|point| {
            small.iter().any(|decision| decision.point == point.id && decision.keep)
        }).cloned().collect();
        let again = decide(&survivors, &plan(policy.clone(), &berlin())).unwrap();
        prop_assert!(again.iter().all(|decision| decision.keep));
        let larger = RetentionPolicy {
            last: policy.last + more,
            daily: policy.daily + more,
            yearly: policy.yearly + more,
            ..policy
        };
        let large = decide(&points, &plan(larger, &berlin())).unwrap();
        for (small, large) in small.iter().zip(&large) {
            prop_assert_eq!(small.point, large.point);
            prop_assert!(large.keep || !small.keep);
        }
    }
}
