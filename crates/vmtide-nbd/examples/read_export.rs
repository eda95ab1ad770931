//! Reads all data of an export and throws it away, to measure the client by itself:
//! `read_export URL [THREADS] [REQUEST_BYTES] [CONNECTIONS]`. Compare with
//! `nbdcopy URL null:`.

#![allow(clippy::print_stdout, reason = "a program for the terminal")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use vmtide_block::{BlockDevice, Result};
use vmtide_nbd::{NbdDevice, NbdOptions};

/// What one worker reads at a time, as a backup does.
const BUFFER_BYTES: u64 = 2 << 20;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: u32| {
        let given = arguments.get(at).and_then(|text| text.parse().ok());
        given.unwrap_or(default)
    };
    let url = arguments.first().map_or("nbd://localhost", String::as_str).parse()?;
    let options = NbdOptions {
        request_bytes: number(2, NbdOptions::default().request_bytes),
        connections: usize::try_from(number(3, 4)).unwrap_or(4),
        read_only: true,
        ..NbdOptions::default()
    };
    let disk = NbdDevice::connect(&url, &options)?;
    let size = disk.size_bytes();
    let next = AtomicU64::new(0);
    let start = Instant::now();
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let work = || {
            let mut buffer = vec![0; usize::try_from(BUFFER_BYTES).unwrap_or(1)];
            loop {
                let at = next.fetch_add(BUFFER_BYTES, Ordering::Relaxed);
                if at >= size {
                    return Ok(());
                }
                let length = usize::try_from((size - at).min(BUFFER_BYTES)).unwrap_or(0);
                disk.read_at(&mut buffer[..length], at)?;
            }
        };
        let workers: Vec<_> = (0..number(1, 2)).map(|_| scope.spawn(work)).collect();
        workers.into_iter().filter_map(|worker| worker.join().ok()).collect()
    });
    results.into_iter().collect::<Result<()>>()?;
    let seconds = start.elapsed().as_secs_f64();
    #[allow(clippy::cast_precision_loss, reason = "a figure for people")]
    let mebibytes = size as f64 / 1_048_576.0;
    println!("{seconds:.2} s, {:.0} MiB/s", mebibytes / seconds);
    Ok(())
}
