//! A million changed ranges: told, asked for and sent, in memory that does not grow with what they hold.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::too_many_lines,
    clippy::cast_possible_truncation,
    reason = "tests: a failed unwrap is a failed test, and one story is told in one piece"
)]
#![cfg(target_os = "linux")]

use crate::support::client::escape;
use crate::support::process::{Process, changed, serve};
use crate::support::provider::pattern_byte;
use vmtide_agent::stream::RangesParser;
use vmtide_block::ByteRange;

const RANGES: u64 = 1_000_000;

/// What the agent may use more than with small requests.
const EXTRA_BYTES: u64 = 64 << 20;

#[test]
#[ignore = "is the agent of the test below, in a process of its own"]
fn agent_process() {
    serve();
}

/// The bytes of a body, checked against the disk as they come.
fn check_content(process: &Process, ranges: &[ByteRange]) {
    let list = serde_json::to_vec(ranges).unwrap();
    let target = format!("/v1/disks/content?path={}", escape(&process.path("big.vhdx")));
    let headers = [("content-type", "application/json")];
    let mut answer = process.client.send("POST", &target, &headers, &list);
    assert_eq!(answer.status, 200);
    let mut position = 0u64;
    while let Some(bytes) = answer.next(1 << 20).unwrap() {
        let mut at = 0;
        while at < bytes.len() {
            let range = ranges[usize::try_from(position / 512).unwrap()];
            let offset = range.offset + position % 512;
            assert_eq!(bytes[at], pattern_byte(offset), "at {offset}");
            let step = usize::try_from(512 - position % 512).unwrap().min(bytes.len() - at);
            at += step;
            position += step as u64;
        }
    }
    assert_eq!(position, RANGES * 512);
}

#[test]
fn a_million_ranges_take_little_memory() {
    let process = Process::start("million::agent_process", RANGES, 64 << 20);
    let small = format!("/v1/disks/content?path={}", escape(&process.path("good.vhdx")));
    assert!(process.client.get(&small).complete);
    process.forget_peak();
    let before = process.memory();

    let target = format!("/vdisk/{}/rct/rctX:1/changes", escape(&process.path("big.vhdx")));
    let mut answer = process.client.send("GET", &target, &[], b"");
    let mut parser = RangesParser::new(RANGES as usize);
    while let Some(bytes) = answer.next(1 << 20).unwrap() {
        parser.feed(&bytes).unwrap();
    }
    let ranges = parser.finish().unwrap();
    assert_eq!(ranges.len() as u64, RANGES);
    assert!(ranges.iter().zip(0..).all(|(range, at)| *range == changed(at)));
    check_content(&process, &ranges);

    let extra = process.peak_memory().saturating_sub(before);
    println!("{RANGES} ranges: {} MiB more than {} MiB", extra >> 20, before >> 20);
    assert!(extra <= EXTRA_BYTES, "{} MiB more than {} MiB", extra >> 20, before >> 20);
}
