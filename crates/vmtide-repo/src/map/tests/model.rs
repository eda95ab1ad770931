//! Random layers against a vector of targets.

use super::*;
use proptest::prelude::*;
use std::ops::Range;

const LARGEST: u64 = 400;

/// One restore point: the disk's length, what changed, and whether to open several segments.
#[derive(Clone, Debug)]
struct Step {
    blocks: u64,
    runs: Vec<(u64, u64, Target)>,
}

fn target() -> impl Strategy<Value = Target> {
    prop_oneof![
        1 => Just(Target::Zero),
        3 => (0u8..4, 0u32..1000).prop_map(|(number, ordinal)| Target::Data { pack: pack(number), ordinal }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let size = prop_oneof![3 => Just(LARGEST), 1 => 1..LARGEST];
    let runs = prop::collection::vec((0..LARGEST, 1u64..40, target()), 0..30);
    (size, runs).prop_map(|(blocks, runs)| Step { blocks, runs })
}

/// Makes the runs disjoint and puts them on the disk; answers with them in a scrambled order.
fn disjoint(step: &Step) -> Vec<MapRun> {
    let mut taken = vec![false; step.blocks as usize];
    let mut runs = Vec::new();
    for &(first_block, count, target) in &step.runs {
        let run = MapRun { first_block, count, target };
        let range = first_block..run.end().min(step.blocks);
        if range.start >= range.end || range.clone().any(|block| taken[block as usize]) {
            continue;
        }
        range.clone().for_each(|block| taken[block as usize] = true);
        runs.push(run.slice(range.start, range.end));
    }
    runs
}

fn apply(model: &mut Vec<Target>, step: &Step, runs: &[MapRun]) {
    model.resize(step.blocks as usize, Target::Zero);
    for run in runs {
        for block in run.first_block..run.end() {
            model[block as usize] = run.cut(block, 1).target;
        }
    }
}

fn different(older: &[Target], newer: &[Target]) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for (block, target) in (0..).zip(newer) {
        if older.get(block as usize).unwrap_or(&Target::Zero) == target {
            continue;
        }
        match ranges.last_mut() {
            Some(last) if last.end == block => last.end += 1,
            _ => ranges.push(block..block + 1),
        }
    }
    ranges
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn layers_are_a_vector_of_targets(
        steps in prop::collection::vec(step(), 1..12),
        sealed in any::<bool>(),
        lookups in prop::collection::vec((0..LARGEST, 0..LARGEST), 8),
    ) {
        let store = MemoryStore::default();
        let ctx = context(&store, sealed);
        let mut model = Vec::new();
        let mut history: Vec<(Vec<ObjectId>, Vec<Target>)> = Vec::new();
        for step in &steps {
            let runs = disjoint(step);
            let (segments, blocks) = history
                .last()
                .map_or((&[][..], 0), |(ids, model)| (&ids[..], model.len() as u64));
            let ids = write(&ctx, BaseMap { segments, blocks }, &runs, step.blocks).unwrap();
            apply(&mut model, step, &runs);
            history.push((ids, model.clone()));
        }
        let open = |(ids, model): &(Vec<ObjectId>, Vec<Target>)| {
            DiskMap::open(&ctx, ids, model.len() as u64).unwrap()
        };
        for point in &history {
            let map = open(point);
            let blocks = map.blocks();
            let runs = map.lookup(0..blocks).unwrap();
            prop_assert_eq!(&targets(&runs, 0..blocks), &point.1);
            for pair in runs.windows(2) {
                prop_assert!(!pair[0].clone().join(&pair[1]), "{:?} are one run", pair);
            }
            for &(from, length) in &lookups {
                let from = from.min(blocks);
                let range = from..(from + length).min(blocks);
                let part = targets(&map.lookup(range.clone()).unwrap(), range.clone());
                prop_assert_eq!(&part[..], &point.1[range.start as usize..range.end as usize]);
            }
        }
        for older in &history {
            for newer in &history {
                let mut found = Vec::new();
                DiskMap::diff(&open(older), &open(newer), &mut |range| {
                    found.push(range);
                    Ok(())
                })
                .unwrap();
                prop_assert_eq!(found, different(&older.1, &newer.1));
            }
        }
    }

    #[test]
    fn pages_follow_each_other(count in 4000u32..13_000, gap in 0u64..3) {
        let store = MemoryStore::default();
        let ctx = context(&store, true);
        let stride = gap + 2;
        let runs: Vec<_> = (0..count).map(|n| data(u64::from(n) * stride, 2, 1, n * 3)).collect();
        let blocks = u64::from(count) * stride;
        let ids = write(&ctx, BaseMap::default(), &runs, blocks).unwrap();
        let map = DiskMap::open(&ctx, &ids, blocks).unwrap();
        let mut found = Vec::new();
        map.segments()[0]
            .for_each_run(&mut |run| {
                found.push(run);
                Ok(())
            })
            .unwrap();
        prop_assert_eq!(&found, &runs);
        for n in (0..count).step_by(977) {
            let at = u64::from(n) * stride + 1;
            prop_assert_eq!(map.lookup(at..at + 1).unwrap(), vec![data(at, 1, 1, n * 3 + 1)]);
        }
    }
}
