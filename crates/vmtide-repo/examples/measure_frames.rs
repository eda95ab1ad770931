//! Compares what can be chosen for frames: how much data is compressed together, and how hard.
//!
//! `cargo run --release -p vmtide-repo --example measure_frames -- DISK.raw [EVERY]` takes every
//! EVERY-th stretch of 4 MiB of a raw disk, leaves out what is zero, and prints stored size and the speed of
//! one core both ways for each choice. The figures stand in `docs/decisions/0003-frames-and-levels.md`.

use vmtide_block::{BlockDevice, OpenMode, RawDevice, is_zero};
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{CParameter, Strategy};

/// The names and settings that are compared: level, then window, hash and chain logs, shortest
/// match and strategy where they are set by hand.
type Choice = (&'static str, i32, Option<(u32, u32, u32, u32, Strategy)>);

const CHOICES: &[Choice] = &[
    ("level -1", -1, None),
    ("level 1", 1, None),
    ("level 2", 2, None),
    ("level 3", 3, None),
    ("fast h15 mm6", 1, Some((21, 15, 6, 6, Strategy::ZSTD_fast))),
    ("fast h16 mm5", 1, Some((21, 16, 6, 5, Strategy::ZSTD_fast))),
    ("fast h16 mm6", 1, Some((21, 16, 6, 6, Strategy::ZSTD_fast))),
    ("fast h16 mm7", 1, Some((21, 16, 6, 7, Strategy::ZSTD_fast))),
    ("fast h17 mm5", 1, Some((21, 17, 6, 5, Strategy::ZSTD_fast))),
    ("fast h17 mm6", 1, Some((21, 17, 6, 6, Strategy::ZSTD_fast))),
    ("fast h17 mm7", 1, Some((21, 17, 6, 7, Strategy::ZSTD_fast))),
    ("fast h18 mm6", 1, Some((21, 18, 6, 6, Strategy::ZSTD_fast))),
    ("dfast h15 c14 mm5", 3, Some((21, 15, 14, 5, Strategy::ZSTD_dfast))),
    ("dfast h16 c15 mm5", 3, Some((21, 16, 15, 5, Strategy::ZSTD_dfast))),
    ("dfast h17 c15 mm6", 3, Some((21, 17, 15, 6, Strategy::ZSTD_dfast))),
    ("dfast h17 c16 mm6", 3, Some((21, 17, 16, 6, Strategy::ZSTD_dfast))),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: measure_frames DISK.raw [EVERY]")?;
    let every: u64 = arguments.next().map_or(Ok(8), |text| text.parse())?;
    let disk = RawDevice::open(path, OpenMode::ReadOnly)?;
    let data = sample(&disk, every)?;
    println!("{} MiB of data sampled", data.len() >> 20);
    for frame_bytes in [512 << 10, 1 << 20, 2 << 20, 4 << 20] {
        for (name, level, settings) in CHOICES {
            let mut compressor = Compressor::new(*level)?;
            if let Some((window, hash, chain, shortest, strategy)) = settings {
                compressor.set_parameter(CParameter::WindowLog(*window))?;
                compressor.set_parameter(CParameter::HashLog(*hash))?;
                compressor.set_parameter(CParameter::ChainLog(*chain))?;
                compressor.set_parameter(CParameter::MinMatch(*shortest))?;
                compressor.set_parameter(CParameter::Strategy(*strategy))?;
            }
            let begun = processor_seconds()?;
            let mut frames = Vec::new();
            for frame in data.chunks(frame_bytes) {
                let mut out = Vec::with_capacity(frame_bytes + (frame_bytes >> 7) + 1024);
                compressor.compress_to_buffer(frame, &mut out)?;
                out.shrink_to_fit();
                frames.push(out);
            }
            let packed = processor_seconds()?;
            let mut decompressor = Decompressor::new()?;
            let mut content = vec![0; frame_bytes];
            for frame in &frames {
                decompressor.decompress_to_buffer(frame, &mut content)?;
            }
            let unpacked = processor_seconds()?;
            let stored: usize = frames.iter().map(Vec::len).sum();
            let rate = |seconds: f64| (data.len() >> 20) as f64 / seconds;
            println!(
                "{:5} KiB  {name:18} {:6.2} %  {:5.0} MiB/s in  {:5.0} MiB/s out",
                frame_bytes >> 10,
                stored as f64 * 100.0 / data.len() as f64,
                rate(packed - begun),
                rate(unpacked - packed),
            );
        }
    }
    Ok(())
}

/// The processor time this thread has had, in seconds: what else the machine does counts less than
/// by the clock.
fn processor_seconds() -> Result<f64, Box<dyn std::error::Error>> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat")?;
    let nanoseconds: f64 = text.split(' ').next().ok_or("schedstat is empty")?.parse()?;
    Ok(nanoseconds / 1e9)
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
