//! How fast it is. Asserts nothing; run with `--release -- --ignored --nocapture map::tests::speed`.

use super::*;
use std::time::Instant;

#[test]
#[ignore = "a measurement, for release builds"]
fn speed_of_lookups_and_writes() {
    let store = MemoryStore::default();
    let ctx = context(&store, true);
    let runs: Vec<_> = (0..1_000_000u32)
        .map(|n| data(u64::from(n) * 16, 16, (n % 251) as u8, n.wrapping_mul(48)))
        .collect();
    let blocks = 16_000_000;
    let started = Instant::now();
    let mut ids = write(&ctx, BaseMap::default(), &runs, blocks).unwrap();
    let bytes = store.bytes(&format!("maps/{}", ids[0])).unwrap().len();
    println!("1M runs written: {:?}, {bytes} bytes", started.elapsed());
    for cycle in 0..30u64 {
        let delta: Vec<_> = (0..1000)
            .map(|n| data((n * 15_013 + cycle * 997) % blocks, 1, 3, n as u32 * 5))
            .collect();
        let base = BaseMap { segments: &ids, blocks };
        ids = write(&ctx, base, &delta, blocks).unwrap();
    }
    let map = DiskMap::open(&ctx, &ids, blocks).unwrap();
    let started = Instant::now();
    let mut count = 0u64;
    map.for_each_run(0..blocks, &mut |_| {
        count += 1;
        Ok(())
    })
    .unwrap();
    println!("{count} runs of {} segments walked: {:?}", ids.len(), started.elapsed());
    let started = Instant::now();
    let mut at = 1u64;
    for _ in 0..100_000 {
        at = (at * 6_364_136_223 + 1_442_695_040) % (blocks - 64);
        map.lookup(at..at + 16).unwrap();
    }
    println!("100k random lookups of 16 blocks: {:?}", started.elapsed());
    let started = Instant::now();
    for n in 0..100_000 {
        map.lookup(n * 16..n * 16 + 16).unwrap();
    }
    println!("100k sequential lookups of 16 blocks: {:?}", started.elapsed());
}
