//! Content through `/v1`: every form of it, from every position, read and written, over disks and clients that fail.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::too_many_lines,
    clippy::cast_possible_truncation,
    reason = "tests: a failed unwrap is a failed test, and one story is told in one piece"
)]

use crate::support::agent::Agent;
use crate::support::client::escape;
use crate::support::content::{DISK, content, framed, one_disk, until};
use crate::support::provider::{PATTERN_DATA, PATTERN_UNIT, TestDisk, TestProvider, pattern_byte};
use serde_json::json;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vmtide_agent::limits::Limits;
use vmtide_agent::stream::frame::{self, Frame, FrameReader};
use vmtide_block::ByteRange;

/// What frames say, laid out like the disk; bytes that they do not speak for are 0xAA.
fn unframe(body: &[u8], from: u64) -> (Vec<u8>, u64) {
    let mut frames = FrameReader::new(body, from).unwrap();
    let mut disk = vec![0xAA; DISK];
    loop {
        match frames.next_frame().unwrap() {
            Frame::Data { offset, content } => {
                let at = usize::try_from(offset).unwrap();
                disk[at..at + content.len()].copy_from_slice(content);
            }
            Frame::Zero(range) => {
                let at = usize::try_from(range.offset).unwrap();
                disk[at..at + usize::try_from(range.length).unwrap()].fill(0);
            }
            Frame::End(position) => {
                frames.expect_nothing_more().unwrap();
                return (disk, position);
            }
        }
    }
}

#[test]
fn content_comes_in_every_form_and_from_every_position() {
    let (disk, agent) = one_disk();
    let expected = content();
    let reader = agent.reader();
    let url = format!("/v1/disks/content?path={}", escape(&agent.path("a.vhdx")));

    let whole = reader.get(&url);
    assert_eq!(whole.headers["content-length"], DISK.to_string());
    assert!(whole.complete && whole.body == expected);
    let job = reader.get(&format!("/v1/jobs/{}", whole.headers["vmtide-job"])).json();
    assert_eq!((&job["state"], &job["done_bytes"]), (&json!("complete"), &json!(DISK)));

    let ranges = "5000:70000,0:512,1048000:1000,5000:10,77:0";
    let mut joined = Vec::new();
    for (at, length) in [(5000, 70000), (0, 512), (1_048_000, 1000), (5000, 10)] {
        joined.extend_from_slice(&expected[at..at + length]);
    }
    let some = reader.get(&format!("{url}&ranges={ranges}"));
    assert!(some.body == joined);
    let list: Vec<ByteRange> = [(5000, 70000), (0, 512), (1_048_000, 1000), (5000, 10)]
        .map(|(offset, length)| ByteRange::new(offset, length))
        .to_vec();
    assert!(reader.json("POST", &url, &json!(list)).body == joined);
    for from in [0, 1, 4096, 70_000, joined.len() - 1, joined.len()] {
        let rest = reader.get(&format!("{url}&ranges={ranges}&from={from}"));
        assert!(rest.body == joined[from..], "{from}");
    }
    let part = reader.request(
        "GET",
        &format!("{url}&ranges={ranges}"),
        &[("range", "bytes=69999-70010")],
        b"",
    );
    assert_eq!((part.status, part.body.as_slice()), (206, &joined[69_999..=70_010]));
    assert_eq!(part.headers["content-range"], format!("bytes 69999-70010/{}", joined.len()));
    let past = reader.request("GET", &url, &[("range", "bytes=99999999-")], b"");
    assert_eq!((past.status, past.code().as_str()), (416, "range_not_satisfiable"));

    for (target, headers) in
        [(format!("{url}&compress=zstd"), vec![]), (url.clone(), vec![("accept-encoding", "zstd")])]
    {
        let packed = reader.request("GET", &target, &headers, b"");
        assert_eq!(packed.headers["content-encoding"], "zstd");
        assert_eq!(packed.headers["vmtide-content-bytes"], DISK.to_string());
        assert!(packed.complete && zstd::decode_all(&packed.body[..]).unwrap() == expected);
    }

    for compress in ["none", "zstd"] {
        for from in [0, 1 << 20, (2 << 20) + 7] {
            let framed =
                reader.get(&format!("{url}&format=ranges&compress={compress}&from={from}"));
            assert_eq!(framed.headers["content-type"], frame::CONTENT_TYPE);
            assert!(framed.complete && framed.body.len() < DISK - (1 << 20) + 10_000);
            let (got, position) = unframe(&framed.body, from);
            assert_eq!(position, DISK as u64);
            let from = usize::try_from(from).unwrap();
            assert!(
                got[from..] == expected[from..] && got[..from].iter().all(|byte| *byte == 0xAA)
            );
        }
    }

    let head = reader.request("HEAD", &url, &[], b"");
    assert_eq!(
        (head.status, head.headers["content-length"].as_str()),
        (200, DISK.to_string().as_str())
    );
    let empty = reader.get(&format!("{url}&ranges=0:0"));
    assert!(empty.status == 200 && empty.complete && empty.body.is_empty());
    let none = reader.json("POST", &format!("{url}&format=ranges"), &json!([]));
    assert_eq!(unframe(&none.body, 0).1, 0);
    until("the end of all handles", || disk.handles.load(Ordering::SeqCst) == 0);
}

#[test]
fn holes_are_told_and_not_sent() {
    let size = 1 << 40;
    let provider = TestProvider::new(&[("big.vhdx", TestDisk::pattern(size))]);
    let agent = Agent::start(provider, Limits::default());
    let url = format!("/v1/disks/content?path={}", escape(&agent.path("big.vhdx")));
    let first = size - PATTERN_UNIT - 1000;
    let answer =
        agent.reader().get(&format!("{url}&format=ranges&ranges={first}:{}", size - first));
    let mut frames = FrameReader::new(&answer.body[..], 0).unwrap();
    let (mut zeros, mut at) = (0, first);
    loop {
        match frames.next_frame().unwrap() {
            Frame::Zero(range) => {
                assert_eq!(range.offset, at);
                zeros += range.length;
                at = range.end();
            }
            Frame::Data { offset, content } => {
                assert_eq!((offset, content[0]), (at, pattern_byte(at)));
                at += content.len() as u64;
            }
            Frame::End(position) => break assert_eq!(position, PATTERN_UNIT + 1000),
        }
    }
    assert_eq!((zeros, at), (PATTERN_UNIT - PATTERN_DATA + 1000, size));
    assert!(answer.body.len() as u64 <= PATTERN_DATA + 100_000);
}

#[test]
fn a_disk_that_fails_in_the_middle_cuts_the_connection() {
    let (disk, agent) = one_disk();
    let reader = agent.reader();
    let url = format!("/v1/disks/content?path={}", escape(&agent.path("a.vhdx")));
    disk.faults.reads_fail_from.store(2 << 20, Ordering::SeqCst);
    for form in ["", "&format=ranges", "&compress=zstd", "&format=ranges&compress=zstd"] {
        let cut = reader.get(&format!("{url}{form}"));
        assert_eq!((cut.status, cut.complete), (200, false), "{form}");
        assert!(cut.body.len() <= 2 << 20);
        let job = format!("/v1/jobs/{}", cut.headers["vmtide-job"]);
        let job = reader.get(&job).json();
        assert_eq!(job["state"], "failed");
        assert!(job["error"].as_str().unwrap().contains("the medium failed"), "{job}");
    }
    // Where not even the first piece can be read, that is told in so many words.
    let from = reader.get(&format!("{url}&ranges={}:512", (2 << 20) + 512));
    assert_eq!((from.status, from.code().as_str()), (500, "failed"));
    until("the end of all handles", || disk.handles.load(Ordering::SeqCst) == 0);
}

#[test]
fn what_was_lost_is_asked_for_again_from_where_it_broke() {
    let (disk, agent) = one_disk();
    let expected = content();
    let reader = agent.reader();
    let url = format!("/v1/disks/content?path={}", escape(&agent.path("a.vhdx")));
    let mut got = Vec::new();
    let mut failing = 300_000;
    for _ in 0..100 {
        disk.faults.reads_fail_from.store(failing, Ordering::SeqCst);
        let part = reader.try_get(&format!("{url}&from={}", got.len()));
        failing += 500_000;
        // A connection may be lost before the answer began, and the first piece may be the one that fails.
        let Some(part) = part.filter(|part| part.status == 200) else { continue };
        got.extend(part.body);
        if part.complete {
            break;
        }
    }
    assert!(got == expected);
}

#[test]
fn a_client_that_goes_away_or_cancels_stops_the_readers() {
    let disk = TestDisk::pattern(1 << 40);
    let provider = TestProvider::new(&[("big.vhdx", Arc::clone(&disk))]);
    let agent = Agent::start(provider, Limits::default());
    let (reader, other) = (agent.reader(), agent.other());
    let url = format!("/v1/disks/content?path={}", escape(&agent.path("big.vhdx")));

    let mut going = reader.send("GET", &url, &[], b"");
    going.next(4096).unwrap().unwrap();
    let id = going.headers["vmtide-job"].clone();
    drop(going);
    until("the end of the handle", || disk.handles.load(Ordering::SeqCst) == 0);
    assert_eq!(reader.get(&format!("/v1/jobs/{id}")).json()["state"], "aborted");

    let mut cancelled = reader.send("GET", &url, &[], b"");
    let job = format!("/v1/jobs/{}", cancelled.headers["vmtide-job"]);
    assert_eq!(other.request("DELETE", &job, &[], b"").code(), "unknown_job");
    assert_eq!(other.get("/v1/jobs").json()["jobs"], json!([]));
    assert_eq!(reader.get(&job).json()["state"], "running");
    assert_eq!(reader.request("DELETE", &job, &[], b"").status, 204);
    let cut = loop {
        match cancelled.next(1 << 20) {
            Ok(Some(_)) => {}
            Ok(None) => break false,
            Err(_) => break true,
        }
    };
    assert!(cut, "a cancelled transfer must not look complete");
    assert_eq!(reader.get(&job).json()["state"], "cancelled");
    until("the end of the handle", || disk.handles.load(Ordering::SeqCst) == 0);
}

#[test]
fn transfers_are_limited_in_number_and_in_speed() {
    let disk = TestDisk::pattern(1 << 40);
    let provider = TestProvider::new(&[("big.vhdx", Arc::clone(&disk))]);
    let rate = 4_000_000;
    let limits = Limits {
        streams_per_client: 2,
        streams_total: 3,
        bytes_per_second_per_client: NonZeroU64::new(rate),
        ..Limits::default()
    };
    let agent = Agent::start(provider, limits);
    let (reader, other) = (agent.reader(), agent.other());
    let url = format!("/v1/disks/content?path={}", escape(&agent.path("big.vhdx")));
    let held: Vec<_> = (0..2).map(|_| reader.send("GET", &url, &[], b"")).collect();
    let refused = reader.get(&url);
    assert_eq!((refused.status, refused.code().as_str()), (429, "too_many_streams"));
    assert!(refused.headers.contains_key("retry-after"));
    let third = other.send("GET", &url, &[], b"");
    assert_eq!(third.status, 200);
    assert_eq!(agent.writer().get(&url).code(), "busy");
    drop((held, third));
    until("the end of all handles", || disk.handles.load(Ordering::SeqCst) == 0);

    let began = Instant::now();
    let bytes = rate;
    let sent = agent.writer().get(&format!("{url}&ranges=0:{bytes}"));
    assert!(sent.complete && sent.body.len() as u64 == bytes);
    // A second, less what a client may have at once; how much longer it takes is not the agent's to say.
    assert!(began.elapsed() > Duration::from_millis(500), "{:?}", began.elapsed());
}

#[test]
fn what_is_written_is_there_and_what_is_broken_is_refused() {
    let (disk, agent) = one_disk();
    let (reader, writer) = (agent.reader(), agent.writer());
    let url = format!("/v1/disks/content?path={}", escape(&agent.path("a.vhdx")));
    let frames = [("content-type", frame::CONTENT_TYPE)];
    let bytes = [("content-type", "application/octet-stream")];
    let mut expected = content();

    let piece = vec![7u8; 100_000];
    let stream = framed(&[(1000, &piece), (200_000, b"x")], &[ByteRange::new(300_000, 100_000)]);
    assert_eq!(reader.request("PUT", &url, &frames, &stream).code(), "read_only_key");
    let written = writer.request("PUT", &url, &frames, &stream);
    assert_eq!(
        written.json(),
        json!({"written_bytes": 100_001, "zeroed_bytes": 100_000, "position": 200_001})
    );
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 1);
    expected[1000..101_000].fill(7);
    expected[200_000] = b'x';
    expected[300_000..400_000].fill(0);
    let raw: Vec<u8> = (0..2_500_000u32).map(|at| at.to_le_bytes()[1]).collect();
    let written = writer.request("PUT", &format!("{url}&offset=500000"), &bytes, &raw);
    assert_eq!(written.json()["written_bytes"], 2_500_000);
    expected[500_000..3_000_000].copy_from_slice(&raw);
    assert!(reader.get(&url).body == expected);

    // What one form was read in, the other side can write.
    let back = reader.get(&format!("{url}&format=ranges&compress=zstd")).body;
    assert_eq!(writer.request("PUT", &url, &frames, &back).status, 200);
    assert!(reader.get(&url).body == expected);

    let end = framed(&[(0, b"abc")], &[]);
    let mut flipped = end.clone();
    flipped[16 + 32] ^= 1;
    let mut more = end.clone();
    more.push(0);
    for bad in [
        &flipped,
        &more,
        &end[..end.len() - 1].to_vec(),
        &end[..40].to_vec(),
        &Vec::new(),
        &b"{}".repeat(100),
    ] {
        assert_eq!(writer.request("PUT", &url, &frames, bad).code(), "damaged_stream", "{bad:?}");
    }
    let past = framed(&[(DISK as u64 - 2, b"abc")], &[]);
    assert_eq!(writer.request("PUT", &url, &frames, &past).code(), "out_of_range");
    let zeros_past = framed(&[], &[ByteRange::new(0, 1 << 60)]);
    assert_eq!(writer.request("PUT", &url, &frames, &zeros_past).code(), "out_of_range");
    assert_eq!(writer.request("PUT", &url, &bytes, b"x").code(), "bad_request");
    assert_eq!(
        writer.request("PUT", &format!("{url}&offset=1"), &frames, b"x").code(),
        "bad_request"
    );
    assert_eq!(writer.request("PUT", &url, &[], b"x").code(), "unsupported_media_type");
    disk.faults.writes_fail.store(true, Ordering::SeqCst);
    let failed = writer.request("PUT", &url, &frames, &end);
    assert_eq!((failed.status, failed.code().as_str()), (500, "failed"));
    until("the end of all handles", || disk.handles.load(Ordering::SeqCst) == 0);
}

#[test]
fn a_write_that_breaks_off_gives_the_disk_back() {
    let (disk, agent) = one_disk();
    let writer = agent.writer();
    let url = format!("/v1/disks/content?path={}&offset=0", escape(&agent.path("a.vhdx")));
    let headers = [("content-type", "application/octet-stream"), ("content-length", "1000000")];
    let begun = writer.begin("PUT", &url, &headers);
    until("the write", || disk.handles.load(Ordering::SeqCst) == 1);
    let second = writer.request("PUT", &url, &headers[..1], b"x");
    assert_eq!((second.status, second.code().as_str()), (409, "in_use"));
    drop(begun);
    until("the end of the write", || disk.handles.load(Ordering::SeqCst) == 0);
    until("the next write", || writer.request("PUT", &url, &headers[..1], b"x").status == 200);
    let jobs = writer.get("/v1/jobs").json();
    let states: Vec<_> =
        jobs["jobs"].as_array().unwrap().iter().map(|job| job["state"].as_str().unwrap()).collect();
    assert_eq!((states[0], *states.last().unwrap()), ("complete", "aborted"), "{jobs}");
}
