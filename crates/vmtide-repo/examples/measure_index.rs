//! Measures the index of a repository of many TiB: `measure_index TIB DIRECTORY`, chunks of 64 KiB. Takes 0.4 GiB in
//! the directory for each TiB, and removes it. `bench/scale.py index` calls it.

use std::error::Error;
use std::sync::Arc;
use vmtide_block::CancelToken;
use vmtide_repo::{LocalStore, measure_index};

/// Questions of each kind.
const LOOKUPS: u64 = 200_000;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: measure_index TIB DIRECTORY";
    let tib: u64 = arguments.next().ok_or(usage)?.parse()?;
    let directory = arguments.next().ok_or(usage)?;
    let store = Arc::new(LocalStore::create(&directory)?);
    let measured = measure_index(store, tib << 24, LOOKUPS, &CancelToken::new())?;
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10
    };
    println!(
        "{}",
        serde_json::json!({ "tib": tib, "index": measured, "peak_bytes": line("VmHWM") })
    );
    std::fs::remove_dir_all(directory)?;
    Ok(())
}
