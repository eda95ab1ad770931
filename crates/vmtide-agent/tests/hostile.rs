//! Clients that stall, send nonsense or too much: a good one is answered, memory stays bounded, nothing is leaked.
//!
//! `cargo test --release -p vmtide-agent --test all -- --ignored --nocapture five_hundred` is the full count,
//! and tells how long a good client waits meanwhile.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::too_many_lines,
    clippy::cast_possible_truncation,
    reason = "tests: a failed unwrap is a failed test, and one story is told in one piece"
)]
#![cfg(target_os = "linux")]

use crate::support::client::{Client, Stream, escape};
use crate::support::process::{GOOD_BYTES, Process, serve};
use rustls::ClientConnection;
use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// What a connection may cost: buffers of TLS and HTTP, and the task.
const CONNECTION_BYTES: u64 = 256 << 10;

/// What all transfers together may cost, and what the allocator keeps.
const TRANSFERS_BYTES: u64 = 96 << 20;

#[test]
#[ignore = "is the agent of the tests below, in a process of its own"]
fn agent_process() {
    serve();
}

/// A connection that is held.
enum Held {
    Plain(TcpStream),
    Secure(Box<Stream>),
}

/// The first flight of a TLS handshake.
fn client_hello(client: &Client) -> Vec<u8> {
    let stream = client.connect();
    let mut session: ClientConnection = stream.conn;
    let mut hello = Vec::new();
    session.write_tls(&mut hello).unwrap();
    hello
}

/// One hostile client; what it holds open.
fn attack(process: &Process, number: usize, hello: &[u8]) -> Held {
    let client = &process.client;
    let plain = || TcpStream::connect(client.address).unwrap();
    let big = escape(&process.path("big.vhdx"));
    let content = format!("/v1/disks/content?path={big}");
    let json = ("content-type", "application/json");
    match number % 8 {
        0 => Held::Plain(plain()),
        1 => {
            let mut stream = plain();
            let garbage: Vec<u8> = (0..4096u32).map(|at| (at * 7 + 1).to_le_bytes()[0]).collect();
            // It may be closed on us in the middle.
            let _ = stream.write_all(&garbage);
            Held::Plain(stream)
        }
        2 => {
            let mut stream = plain();
            stream.write_all(&hello[..hello.len() / 2]).unwrap();
            Held::Plain(stream)
        }
        3 => {
            let mut stream = client.connect();
            stream.write_all(b"GET /v1/disks?path=x HTTP/1.1\r\nhost: a\r\nx: ").unwrap();
            Held::Secure(Box::new(stream))
        }
        4 => {
            let gigabyte = (1u64 << 30).to_string();
            let mut stream = client.begin("POST", &content, &[json, ("content-length", &gigabyte)]);
            let _ = stream.write_all(&[b' '; 1 << 16]);
            Held::Secure(Box::new(stream))
        }
        5 => {
            let mut stream =
                client.begin("POST", &content, &[json, ("transfer-encoding", "chunked")]);
            let mut chunk = b"10000\r\n".to_vec();
            chunk.extend([b' '; 1 << 16]);
            chunk.extend(b"\r\n");
            // 1 GiB, as far as it is taken.
            for _ in 0..1 << 14 {
                if stream.write_all(&chunk).is_err() {
                    break;
                }
            }
            Held::Secure(Box::new(stream))
        }
        6 => {
            // Half a list, and then nothing.
            let mut stream = client.begin("POST", &content, &[json, ("content-length", "1000")]);
            let _ = stream.write_all(b"[{\"offset\":");
            Held::Secure(Box::new(stream))
        }
        // All of a disk, of which nothing is read.
        _ => Held::Secure(Box::new(client.begin("GET", &content, &[]))),
    }
}

/// Requests of a good client with another key; how long each took.
fn good_requests(process: &Process, count: usize) -> Vec<Duration> {
    let client = Client { key: process.keys.other.clone(), ..process.client.clone() };
    let disk = format!("/v1/disks/content?path={}", escape(&process.path("good.vhdx")));
    let mut took: Vec<_> = (0..count)
        .map(|_| {
            let began = Instant::now();
            let answer = client.get(&disk);
            assert!(answer.complete && answer.body == vec![7; GOOD_BYTES]);
            began.elapsed()
        })
        .collect();
    took.sort_unstable();
    took
}

fn siege(count: usize, body_bytes: u64) {
    let process = Process::start("hostile::agent_process", 0, body_bytes);
    let quiet = good_requests(&process, 15);
    // The threads that answered leave with their connections.
    let handles = process.handles();
    let before = process.memory();
    process.forget_peak();
    let hello = client_hello(&process.client);
    let held: Vec<_> = (0..count).map(|number| attack(&process, number, &hello)).collect();
    let busy = good_requests(&process, 15);
    let extra = process.peak_memory().saturating_sub(before);
    let (quiet, busy) = (quiet[quiet.len() / 2], busy[busy.len() / 2]);
    println!(
        "{count} hostile connections: {} MiB more than {} MiB; a good client waits {busy:?}, {quiet:?} before",
        extra >> 20,
        before >> 20
    );
    let bound = TRANSFERS_BYTES + count as u64 * CONNECTION_BYTES;
    assert!(extra <= bound, "{} MiB more, {} MiB allowed", extra >> 20, bound >> 20);
    for connection in &held {
        // Held until here.
        match connection {
            Held::Plain(stream) => assert!(stream.local_addr().is_ok()),
            Held::Secure(stream) => assert!(stream.sock.local_addr().is_ok()),
        }
    }
    drop(held);
    process.wait_for_handles(handles);
    let began = Instant::now();
    loop {
        let metrics = process.client.get("/v1/metrics");
        let metrics = String::from_utf8(metrics.body).unwrap();
        // One connection is that of this question.
        let left = [
            "transfers 0",
            "change_lists 0",
            "freezes 0",
            "open_disks 0",
            "blocking_threads 0",
            "connections 1",
        ];
        if left.iter().all(|line| metrics.contains(&format!("\nvmtide_agent_{line}\n"))) {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "something is left: {metrics}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_good_client_is_answered_beside_hostile_ones() {
    siege(48, 1 << 20);
}

#[test]
#[ignore = "takes half a minute: 500 connections, bodies of a gigabyte"]
fn five_hundred() {
    siege(500, 64 << 20);
}
