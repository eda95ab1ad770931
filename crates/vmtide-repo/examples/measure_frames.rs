//! Compares what can be chosen for frames: how much data is compressed together, and how hard.
//!
//! `cargo run --release -p vmtide-repo --example measure_frames -- DISK.raw [EVERY [ROUNDS [FRAMES.csv]]]` takes
//! every EVERY-th stretch of 4 MiB of a raw disk, leaves out what is zero, and prints stored size and the speed of
//! one core both ways for each choice. The choices take turns on every frame and the quickest of ROUNDS counts, so that
//! what else the machine does falls on all alike. The file gets a line for each frame, with bytes and nanoseconds
//! of each choice, to try rules that choose for each frame. The figures stand in
//! `docs/decisions/0003-frames-and-levels.md`.

#![allow(clippy::cast_precision_loss, reason = "figures for people")]

use std::error::Error;
use std::fmt::Write as _;
use vmtide_block::{BlockDevice, OpenMode, RawDevice, is_zero};
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{CParameter, Strategy};

/// The names and settings that are compared: level, then window, hash and chain logs, shortest
/// match, strategy and target length (of the fast strategy the step) where they are set by hand.
type Choice = (&'static str, i32, Option<(u32, u32, u32, u32, Strategy, u32)>);

const CHOICES: &[Choice] = &[
    ("level 1", 1, None),
    ("level 2", 2, None),
    ("level 3", 3, None),
    ("level 5", 5, None),
    ("fast h15 mm6", 1, Some((21, 15, 6, 6, Strategy::ZSTD_fast, 0))),
    ("fast h16 mm6", 1, Some((21, 16, 6, 6, Strategy::ZSTD_fast, 0))),
    ("fast h17 mm6", 1, Some((21, 17, 6, 6, Strategy::ZSTD_fast, 0))),
    ("fast h18 mm5", 1, Some((21, 18, 6, 5, Strategy::ZSTD_fast, 0))),
    ("dfast h15 c13 mm5", 3, Some((21, 15, 13, 5, Strategy::ZSTD_dfast, 0))),
    ("dfast h15 c14 mm5", 3, Some((21, 15, 14, 5, Strategy::ZSTD_dfast, 0))),
    ("dfast h15 c14 mm6", 3, Some((21, 15, 14, 6, Strategy::ZSTD_dfast, 0))),
    ("dfast h15 c15 mm5", 3, Some((21, 15, 15, 5, Strategy::ZSTD_dfast, 0))),
    ("dfast h16 c14 mm5", 3, Some((21, 16, 14, 5, Strategy::ZSTD_dfast, 0))),
    ("dfast h16 c15 mm5", 3, Some((21, 16, 15, 5, Strategy::ZSTD_dfast, 0))),
    ("dfast h17 c15 mm5", 3, Some((21, 17, 15, 5, Strategy::ZSTD_dfast, 0))),
    ("dfast h18 c16 mm5", 3, Some((21, 18, 16, 5, Strategy::ZSTD_dfast, 0))),
    ("level -1", -1, None),
    ("level -3", -3, None),
    ("level -5", -5, None),
    ("level -7", -7, None),
    ("skipping h14 step 1", 1, Some((21, 14, 6, 7, Strategy::ZSTD_fast, 1))),
    ("skipping h14 step 3", 1, Some((21, 14, 6, 7, Strategy::ZSTD_fast, 3))),
    ("skipping h13 step 2", 1, Some((21, 13, 6, 7, Strategy::ZSTD_fast, 2))),
    ("skipping h13 step 3", 1, Some((21, 13, 6, 7, Strategy::ZSTD_fast, 3))),
    ("skipping h13 step 5", 1, Some((21, 13, 6, 7, Strategy::ZSTD_fast, 5))),
    ("skipping h13 step 4", 1, Some((21, 13, 6, 7, Strategy::ZSTD_fast, 4))),
    ("skipping h13 step 6", 1, Some((21, 13, 6, 7, Strategy::ZSTD_fast, 6))),
    ("skipping h13 step 8", 1, Some((21, 13, 6, 7, Strategy::ZSTD_fast, 8))),
    ("skipping h13 step 12", 1, Some((21, 13, 6, 7, Strategy::ZSTD_fast, 12))),
];

/// Samples of a frame that a rule might look at: so many bytes from the middle.
const SAMPLE_BYTES: usize = 64 << 10;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: measure_frames DISK.raw [EVERY [ROUNDS [FRAMES.csv]]]";
    let path = arguments.next().ok_or(usage)?;
    let every: u64 = arguments.next().map_or(Ok(8), |text| text.parse())?;
    let rounds: usize = arguments.next().map_or(Ok(3), |text| text.parse())?;
    let table = arguments.next();
    let disk = RawDevice::open(path, OpenMode::ReadOnly)?;
    let data = sample(&disk, every)?;
    println!("{} MiB of data sampled", data.len() >> 20);
    let sizes: &[usize] = if table.is_some() { &[2 << 20] } else { &[1 << 20, 2 << 20, 4 << 20] };
    for frame_bytes in sizes {
        let lines = compare(&data, *frame_bytes, rounds.max(1))?;
        if let Some(table) = &table {
            std::fs::write(table, lines)?;
        }
    }
    Ok(())
}

/// What a choice made of a frame.
#[derive(Clone, Copy, Default)]
struct Made {
    bytes: usize,
    sample_bytes: usize,
    pack_seconds: f64,
    unpack_seconds: f64,
}

/// Compares all choices, prints a line for each, and answers with a line for each frame.
fn compare(data: &[u8], frame_bytes: usize, rounds: usize) -> Result<String, Box<dyn Error>> {
    let mut compressors = CHOICES.iter().map(compressor).collect::<Result<Vec<_>, _>>()?;
    let mut decompressor = Decompressor::new()?;
    let mut content = vec![0; frame_bytes];
    let mut out = Vec::with_capacity(zstd::zstd_safe::compress_bound(frame_bytes));
    let mut totals = vec![Made::default(); CHOICES.len()];
    let mut lines = String::from("bytes");
    for (name, _, _) in CHOICES {
        write!(lines, ",{name},{name} sample,{name} ns")?;
    }
    for frame in data.chunks(frame_bytes) {
        write!(lines, "\n{}", frame.len())?;
        let mut made = vec![Made::default(); CHOICES.len()];
        let middle = (frame.len() / 2).saturating_sub(SAMPLE_BYTES / 2);
        let sample = &frame[middle..(middle + SAMPLE_BYTES).min(frame.len())];
        for round in 0..rounds {
            for (compressor, made) in compressors.iter_mut().zip(&mut made) {
                if round == 0 {
                    made.sample_bytes = compressor.compress_to_buffer(sample, &mut out)?;
                }
                let begun = processor_seconds()?;
                made.bytes = compressor.compress_to_buffer(frame, &mut out)?;
                let packed = processor_seconds()?;
                decompressor.decompress_to_buffer(&out, &mut content)?;
                let unpacked = processor_seconds()?;
                if round == 0 || packed - begun < made.pack_seconds {
                    made.pack_seconds = packed - begun;
                }
                if round == 0 || unpacked - packed < made.unpack_seconds {
                    made.unpack_seconds = unpacked - packed;
                }
            }
        }
        for (total, made) in totals.iter_mut().zip(made) {
            total.bytes += made.bytes;
            total.pack_seconds += made.pack_seconds;
            total.unpack_seconds += made.unpack_seconds;
            write!(lines, ",{},{},{:.0}", made.bytes, made.sample_bytes, made.pack_seconds * 1e9)?;
        }
    }
    let rate = |seconds: f64| data.len() as f64 / 1_048_576.0 / seconds;
    for ((name, _, _), total) in CHOICES.iter().zip(&totals) {
        println!(
            "{:5} KiB  {name:20} {:6.2} %  {:5.0} MiB/s in  {:5.0} MiB/s out",
            frame_bytes >> 10,
            total.bytes as f64 * 100.0 / data.len() as f64,
            rate(total.pack_seconds),
            rate(total.unpack_seconds),
        );
    }
    Ok(lines)
}

fn compressor(choice: &Choice) -> std::io::Result<Compressor<'static>> {
    let (_, level, settings) = choice;
    let mut compressor = Compressor::new(*level)?;
    if let Some((window, hash, chain, shortest, strategy, target_length)) = *settings {
        compressor.set_parameter(CParameter::WindowLog(window))?;
        compressor.set_parameter(CParameter::HashLog(hash))?;
        compressor.set_parameter(CParameter::ChainLog(chain))?;
        compressor.set_parameter(CParameter::MinMatch(shortest))?;
        compressor.set_parameter(CParameter::Strategy(strategy))?;
        compressor.set_parameter(CParameter::TargetLength(target_length))?;
    }
    Ok(compressor)
}

/// The processor time this thread has had, in seconds: what else the machine does counts less than
/// by the clock.
#[cfg(unix)]
#[allow(clippy::unnecessary_wraps, reason = "the other one can fail")]
fn processor_seconds() -> Result<f64, Box<dyn Error>> {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Ok(time.tv_sec as f64 + time.tv_nsec as f64 / 1e9)
}

#[cfg(not(unix))]
fn processor_seconds() -> Result<f64, Box<dyn Error>> {
    Ok(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs_f64())
}

fn sample(disk: &RawDevice, every: u64) -> Result<Vec<u8>, vmtide_block::BlockError> {
    let mut data = Vec::new();
    let mut stretch = vec![0; 4 << 20];
    for number in (0..disk.size_bytes() >> 22).step_by(usize::try_from(every).unwrap_or(1)) {
        disk.read_at(&mut stretch, number << 22)?;
        for block in stretch.chunks(64 << 10).filter(|block| !is_zero(block)) {
            data.extend_from_slice(block);
        }
    }
    Ok(data)
}
