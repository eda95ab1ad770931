//! What a repository in an object store costs, estimated from what is in it and what a provider takes.
//!
//! Prices are in any currency; a GB has 10^9 bytes.

use jiff::ToSpan;
use jiff::civil::Date;
use serde::Serialize;
use vmtide_repo::{BackupOptions, Growth, UsageReport};

/// The objects of a backup beside full packs: those not full, map segments, index, the point
/// (docs/decisions/0013 counted them).
const OBJECTS_OF_A_BACKUP: u64 = 5;

/// The days that the requests of a month are counted on.
const DAYS: i64 = 30;

/// What a provider takes. None: not known, and no part of any sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Prices {
    /// A GB for a month.
    pub gb_month: Option<f64>,
    /// 1000 PUT requests.
    pub thousand_puts: Option<f64>,
    /// 1000 GET requests.
    pub thousand_gets: Option<f64>,
    /// Reading a GB: retrieval and traffic together.
    pub gb_read: Option<f64>,
}

/// Examples of the order of what providers have published, in US dollars; what anybody really pays
/// may differ. In the order of [`Prices`].
const EXAMPLES: &[(&str, [f64; 4])] = &[
    ("example-standard", [0.023, 0.005, 0.0004, 0.09]),
    ("example-infrequent", [0.0125, 0.01, 0.001, 0.10]),
    ("example-archive-instant", [0.004, 0.02, 0.01, 0.12]),
    ("example-flat", [0.006, 0.0, 0.0004, 0.01]),
];

/// The names of the examples.
pub fn examples() -> Vec<&'static str> {
    EXAMPLES.iter().map(|(name, _)| *name).collect()
}

impl Prices {
    /// The example of this name.
    pub fn example(name: &str) -> Option<Self> {
        let (_, [gb_month, puts, gets, gb_read]) =
            EXAMPLES.iter().find(|(known, _)| *known == name)?;
        Some(Self {
            gb_month: Some(*gb_month),
            thousand_puts: Some(*puts),
            thousand_gets: Some(*gets),
            gb_read: Some(*gb_read),
        })
    }

    /// These, and `others` where there are none.
    #[must_use]
    pub fn or(self, others: Self) -> Self {
        Self {
            gb_month: self.gb_month.or(others.gb_month),
            thousand_puts: self.thousand_puts.or(others.thousand_puts),
            thousand_gets: self.thousand_gets.or(others.thousand_gets),
            gb_read: self.gb_read.or(others.gb_read),
        }
    }
}

/// An estimate. A cost is none where nothing of it has a price.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct CostEstimate {
    /// What is stored, a month.
    pub storage_per_month: Option<f64>,
    /// The part of it that immutable restore points need: it cannot be given up before its time.
    pub locked_per_month: Option<f64>,
    /// PUT requests of the backups of the last 30 days of which restore points are left.
    pub puts_per_month: u64,
    /// What these cost.
    pub puts_cost_per_month: Option<f64>,
    /// Storage and PUT requests.
    pub per_month: Option<f64>,
    /// What restoring the newest point of every VM reads, in bytes.
    pub restore_bytes: u64,
    /// In how many GET requests, about.
    pub restore_gets: u64,
    /// What that costs once.
    pub restore_cost: Option<f64>,
}

/// Estimates.
pub fn estimate(report: &UsageReport, prices: &Prices) -> CostEstimate {
    let stored = report.stats.pack_bytes + report.stats.metadata_bytes;
    let storage_per_month = prices.gb_month.map(|price| of_gb(stored, price));
    let puts_per_month = puts(&report.growth);
    let puts_cost_per_month = prices.thousand_puts.map(|price| of_thousand(puts_per_month, price));
    let restore_bytes = report.vms.iter().map(|vm| vm.restore_bytes).sum();
    let restore_gets = report.vms.iter().map(|vm| vm.restore_requests).sum();
    CostEstimate {
        storage_per_month,
        locked_per_month: prices.gb_month.map(|price| of_gb(report.locked_bytes, price)),
        puts_per_month,
        puts_cost_per_month,
        per_month: sum(storage_per_month, puts_cost_per_month),
        restore_bytes,
        restore_gets,
        restore_cost: sum(
            prices.gb_read.map(|price| of_gb(restore_bytes, price)),
            prices.thousand_gets.map(|price| of_thousand(restore_gets, price)),
        ),
    }
}

/// The PUT requests of the last days.
fn puts(growth: &[Growth]) -> u64 {
    let day = |growth: &Growth| growth.day.parse::<Date>().ok();
    let Some(newest) = growth.iter().filter_map(day).max() else { return 0 };
    let oldest = newest.saturating_sub((DAYS - 1).days());
    let pack_bytes = BackupOptions::default().pack_size_bytes.max(1);
    growth
        .iter()
        .filter(|growth| day(growth).is_some_and(|day| day >= oldest))
        .map(|growth| growth.points * OBJECTS_OF_A_BACKUP + growth.stored_bytes / pack_bytes)
        .sum()
}

/// Both, or the one that is known.
fn sum(one: Option<f64>, other: Option<f64>) -> Option<f64> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one + other),
        (one, other) => one.or(other),
    }
}

/// What so many bytes cost.
#[allow(clippy::cast_precision_loss, reason = "an estimate in money")]
pub fn of_gb(bytes: u64, price: f64) -> f64 {
    bytes as f64 / 1e9 * price
}

#[allow(clippy::cast_precision_loss, reason = "an estimate in money")]
fn of_thousand(requests: u64, price: f64) -> f64 {
    requests as f64 / 1000.0 * price
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtide_repo::{RepositoryStats, VmUsage};

    fn report() -> UsageReport {
        let vm = |restore_bytes, restore_requests| VmUsage {
            restore_bytes,
            restore_requests,
            ..VmUsage::default()
        };
        let day = |day: &str, points, stored_bytes| Growth {
            day: day.into(),
            points,
            stored_bytes,
            ..Growth::default()
        };
        UsageReport {
            stats: RepositoryStats {
                pack_bytes: 1_900_000_000,
                metadata_bytes: 100_000_000,
                ..RepositoryStats::default()
            },
            locked_bytes: 500_000_000,
            vms: vec![vm(3_000_000_000, 600), vm(1_000_000_000, 400)],
            growth: vec![
                // A day too old, and the oldest that counts.
                day("2026-10-21", 100, 1 << 40),
                day("2026-10-22", 2, 640 << 20),
                day("2026-11-20", 1, 0),
            ],
            ..UsageReport::default()
        }
    }

    fn close(found: Option<f64>, expected: f64) {
        assert!(found.is_some_and(|found| (found - expected).abs() < 1e-9), "{found:?} {expected}");
    }

    #[test]
    fn every_price_counts_what_it_is_for() {
        let prices = Prices {
            gb_month: Some(10.0),
            thousand_puts: Some(100.0),
            thousand_gets: Some(7.0),
            gb_read: Some(2.0),
        };
        let found = estimate(&report(), &prices);
        close(found.storage_per_month, 20.0);
        close(found.locked_per_month, 5.0);
        assert_eq!(found.puts_per_month, 3 * 5 + 10);
        close(found.puts_cost_per_month, 2.5);
        close(found.per_month, 22.5);
        assert_eq!((found.restore_bytes, found.restore_gets), (4_000_000_000, 1000));
        close(found.restore_cost, 8.0 + 7.0);
    }

    #[test]
    fn what_has_no_price_is_no_part_of_a_sum() {
        let nothing = estimate(&report(), &Prices::default());
        assert_eq!((nothing.per_month, nothing.restore_cost), (None, None));
        assert_eq!(nothing.restore_gets, 1000);
        let storage = Prices { gb_month: Some(1.0), ..Prices::default() };
        close(estimate(&report(), &storage).per_month, 2.0);
        let read = Prices { thousand_gets: Some(1.0), ..Prices::default() };
        close(estimate(&report(), &read).restore_cost, 1.0);
        let empty = estimate(&UsageReport::default(), &storage);
        assert_eq!((empty.per_month, empty.puts_per_month), (Some(0.0), 0));
    }

    #[test]
    fn what_is_given_goes_before_an_example() {
        for name in examples() {
            let example = Prices::example(name).unwrap();
            assert!(example.gb_month.is_some_and(|price| price > 0.0), "{name}");
            let given = Prices { gb_read: Some(0.5), ..Prices::default() };
            assert_eq!(given.or(example), Prices { gb_read: Some(0.5), ..example });
        }
        assert_eq!(Prices::example("none"), None);
    }
}
