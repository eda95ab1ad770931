//! How fast it is. Asserts nothing; run with `--release -- --ignored --nocapture index::tests::speed`.

use super::*;
use std::time::Instant;

#[test]
#[ignore = "a measurement, for release builds"]
fn speed_of_lookups() {
    const COUNT: u64 = 1_000_000;
    for sealed in [true, false] {
        let store = MemoryStore::default();
        let ctx = context(&store, sealed);
        let index = ChunkIndex::open(&ctx).unwrap();
        let all = entries(0..COUNT);
        let started = Instant::now();
        index.add(all).unwrap();
        println!("sealed {sealed}: {COUNT} entries written: {:?}", started.elapsed());
        let run = |what: &str, threads: u64, from: u64| {
            let keys: Vec<Key> = (from..from + COUNT).map(key).collect();
            let started = Instant::now();
            std::thread::scope(|scope| {
                for part in keys.chunks((COUNT / threads) as usize) {
                    let index = &index;
                    scope.spawn(move || {
                        part.iter().for_each(|key| {
                            index.lookup(key).unwrap();
                        })
                    });
                }
            });
            let rate = COUNT as f64 / started.elapsed().as_secs_f64();
            println!("  {what}, {threads} threads: {rate:.0} lookups/s");
        };
        run("hit", 1, 0);
        run("hit", 2, 0);
        run("miss", 1, COUNT);
        run("miss", 2, COUNT);
        let started = Instant::now();
        ChunkIndex::open(&ctx).unwrap();
        println!("  opened: {:?}, {} KiB of memory", started.elapsed(), index.memory_bytes() >> 10);
    }
}
