//! Our client against servers that lie, stop or break off: an error each time, never a panic, a
//! hang or wrong bytes.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed unwrap is a failed test, and the numbers here are small"
)]

use crate::support;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};
use support::Lab;
use vmtide_block::{BlockDevice, BlockError, ByteRange, CancelToken, WritableBlockDevice};
use vmtide_nbd::{NbdDevice, NbdOptions, list_exports};

const SIZE: u64 = 1 << 20;
const CONTEXT: u32 = 7;

/// What an answer may build on.
struct Request {
    cookie: u64,
    offset: u64,
}

fn be<const N: usize>(parts: [&[u8]; N]) -> Vec<u8> {
    parts.concat()
}

fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    be([
        &0x0003_e889_0455_65a9_u64.to_be_bytes(),
        &option.to_be_bytes(),
        &kind.to_be_bytes(),
        &(data.len() as u32).to_be_bytes(),
        data,
    ])
}

fn export_info(size: u64) -> Vec<u8> {
    // Flags: valid, flush, FUA, write zeroes.
    be([&[0, 0], &size.to_be_bytes(), &0b100_1101_u16.to_be_bytes()])
}

/// A handshake that agrees on structured replies and one context. True when in transmission.
fn shake_hands(stream: &mut UnixStream) -> std::io::Result<bool> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    stream.read_exact(&mut [0; 4])?;
    loop {
        let mut header = [0; 16];
        stream.read_exact(&mut header)?;
        let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
        let (option, length) = (number(8), number(12));
        stream.read_exact(&mut vec![0; length as usize])?;
        match option {
            8 => stream.write_all(&option_reply(8, 1, &[]))?,
            10 => {
                let context = be([&CONTEXT.to_be_bytes(), b"base:allocation"]);
                stream.write_all(&option_reply(10, 4, &context))?;
                stream.write_all(&option_reply(10, 1, &[]))?;
            }
            7 => {
                stream.write_all(&option_reply(7, 3, &export_info(SIZE)))?;
                stream.write_all(&option_reply(7, 1, &[]))?;
                return Ok(true);
            }
            other => stream.write_all(&option_reply(other, (1 << 31) + 1, &[]))?,
        }
    }
}

fn read_request(stream: &mut UnixStream) -> std::io::Result<Request> {
    let mut header = [0; 28];
    stream.read_exact(&mut header)?;
    Ok(Request {
        cookie: u64::from_be_bytes(header[8..16].try_into().unwrap()),
        offset: u64::from_be_bytes(header[16..24].try_into().unwrap()),
    })
}

fn listen(lab: &Lab, mut client: impl FnMut(UnixStream) + Send + 'static) {
    let listener = UnixListener::bind(lab.path("s")).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            client(stream.unwrap());
        }
    });
}

/// A server that gives every request the same wrong answer, then hangs up or falls silent.
fn lying(lab: &Lab, answer: fn(&Request) -> Vec<u8>, silent: bool) -> NbdDevice {
    listen(lab, move |mut stream| {
        if !shake_hands(&mut stream).unwrap_or(false) {
            return;
        }
        while let Ok(request) = read_request(&mut stream) {
            let answer = answer(&request);
            if stream.write_all(&answer).is_err() {
                return;
            }
            if silent {
                std::thread::sleep(Duration::from_secs(5));
            }
            if answer.len() < 64 {
                return;
            }
        }
    });
    let options = NbdOptions { request_timeout_ms: 300, ..NbdOptions::default() };
    NbdDevice::connect(&lab.url(""), &options).unwrap()
}

fn chunk(request: &Request, done: bool, kind: u16, length: u32, payload: &[u8]) -> Vec<u8> {
    be([
        &0x668e_33ef_u32.to_be_bytes(),
        &u16::from(done).to_be_bytes(),
        &kind.to_be_bytes(),
        &request.cookie.to_be_bytes(),
        &length.to_be_bytes(),
        payload,
    ])
}

fn data(request: &Request, done: bool, offset: u64, length: usize) -> Vec<u8> {
    let payload = be([&offset.to_be_bytes(), &vec![1; length]]);
    chunk(request, done, 1, payload.len() as u32, &payload)
}

fn hole(request: &Request, done: bool, offset: u64, length: u32) -> Vec<u8> {
    let payload = be([&offset.to_be_bytes(), &length.to_be_bytes()]);
    chunk(request, done, 2, 12, &payload)
}

fn status(request: &Request, context: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut payload = context.to_be_bytes().to_vec();
    for (length, flags) in extents {
        payload.extend(length.to_be_bytes());
        payload.extend(flags.to_be_bytes());
    }
    chunk(request, true, 5, payload.len() as u32, &payload)
}

type Silence = (&'static str, fn(&Request) -> Vec<u8>, bool);
type Case = (&'static str, fn(&Request) -> Vec<u8>);

#[test]
fn a_read_that_is_answered_wrongly_is_damaged() {
    let cases: &[Case] = &[
        ("magic", |_| vec![0; 64]),
        ("extended header", |_| be([&0x6e8a_278c_u32.to_be_bytes(), &[0; 60]])),
        ("cookie", |r| {
            let cookie = r.cookie + 100;
            data(&Request { cookie, ..*r }, true, r.offset, 4096)
        }),
        ("huge length", |r| chunk(r, true, 1, u32::MAX, &[0; 64])),
        ("short length", |r| chunk(r, true, 1, 8, &[0; 64])),
        ("before the request", |r| data(r, true, r.offset - 1, 4096)),
        ("past the request", |r| data(r, true, r.offset + 1, 4096)),
        ("offset overflow", |r| data(r, true, u64::MAX - 5, 4096)),
        ("half", |r| data(r, true, r.offset, 2048)),
        ("nothing", |r| chunk(r, true, 0, 0, &[])),
        ("twice", |r| [data(r, false, r.offset, 4096), data(r, true, r.offset, 1)].concat()),
        ("overlap", |r| {
            [hole(r, false, r.offset + 10, 100), data(r, true, r.offset, 4096)].concat()
        }),
        ("hole without length", |r| hole(r, true, r.offset, 0)),
        ("hole past the request", |r| hole(r, true, r.offset, 4097)),
        ("hole of odd length", |r| chunk(r, true, 2, 13, &[0; 64])),
        ("empty chunk that is not last", |r| chunk(r, false, 0, 0, &[0; 64])),
        ("empty chunk with payload", |r| chunk(r, true, 0, 5, &[0; 64])),
        ("status", |r| status(r, CONTEXT, &[(4096, 0)])),
        ("unknown chunk", |r| chunk(r, true, 99, 0, &[0; 64])),
        ("long error", |r| chunk(r, true, 0x8001, 1 << 20, &[0; 64])),
        ("short error", |r| chunk(r, true, 0x8001, 3, &[0; 64])),
        ("error with a message past its end", |r| {
            chunk(r, true, 0x8001, 6, &[0, 0, 0, 5, 255, 255])
        }),
    ];
    for (name, answer) in cases {
        let lab = Lab::new();
        let disk = lying(&lab, *answer, false);
        let error = disk.read_at(&mut [0; 4096], 8192).unwrap_err();
        assert!(matches!(error, BlockError::Damaged { .. }), "{name}: {error}");
        let error = disk.read_at(&mut [0; 4096], 8192).unwrap_err();
        assert!(matches!(error, BlockError::Disconnected { .. }), "{name}: {error}");
    }
}

#[test]
fn a_status_that_is_answered_wrongly_is_damaged() {
    let cases: &[Case] = &[
        ("zero length", |r| status(r, CONTEXT, &[(512, 0), (0, 0)])),
        ("nothing but zero length", |r| status(r, CONTEXT, &[(0, 3)])),
        ("no descriptor", |r| status(r, CONTEXT, &[])),
        ("torn descriptor", |r| chunk(r, true, 5, 11, &[0; 64])),
        ("other context", |r| status(r, CONTEXT + 1, &[(4096, 0)])),
        ("no context", |r| chunk(r, true, 0, 0, &[])),
        ("huge", |r| chunk(r, true, 5, u32::MAX - 3, &[0; 64])),
        ("64-bit chunk", |r| chunk(r, true, 6, 24, &[0; 24])),
        ("simple reply", |r| {
            be([&0x6744_6698_u32.to_be_bytes(), &[0; 4], &r.cookie.to_be_bytes()])
        }),
        ("twice", |r| {
            let payload = be([&CONTEXT.to_be_bytes(), &4096_u32.to_be_bytes(), &[0; 4]]);
            [chunk(r, false, 5, 12, &payload), chunk(r, true, 5, 12, &payload)].concat()
        }),
    ];
    for (name, answer) in cases {
        let lab = Lab::new();
        let disk = lying(&lab, *answer, false);
        let error = disk.extents(ByteRange::new(8192, 4096)).unwrap_err();
        assert!(matches!(error, BlockError::Damaged { .. }), "{name}: {error}");
    }
}

#[test]
fn a_status_past_the_request_is_cut() {
    let lab = Lab::new();
    let answer = |r: &Request| {
        let filler = status(r, CONTEXT, &[(512, 3), (u32::MAX, 0), (5, 3), (6, 0), (7, 0), (8, 0)]);
        assert!(filler.len() >= 64);
        filler
    };
    let disk = lying(&lab, answer, false);
    let range = ByteRange::new(8192, 4096);
    let extents = disk.block_status("base:allocation", range).unwrap();
    assert_eq!(extents.len(), 2);
    assert_eq!(extents[1].range, ByteRange::new(8704, 3584));
}

#[test]
fn tiny_status_answers_still_come_to_an_end() {
    let lab = Lab::new();
    let answer = |r: &Request| [status(r, CONTEXT, &[(1, 1)]), Vec::new()].concat();
    listen(&lab, move |mut stream| {
        if shake_hands(&mut stream).unwrap_or(false) {
            while let Ok(request) = read_request(&mut stream) {
                if stream.write_all(&answer(&request)).is_err() {
                    return;
                }
            }
        }
    });
    let disk = NbdDevice::connect(&lab.url(""), &NbdOptions::default()).unwrap();
    let mut count = 0;
    let range = ByteRange::new(0, 300);
    disk.for_each_status("base:allocation", range, &CancelToken::new(), |_| {
        count += 1;
        Ok(())
    })
    .unwrap();
    assert_eq!(count, 300);
}

#[test]
fn a_server_that_breaks_off_or_falls_silent_is_disconnected() {
    let cases: &[Silence] = &[
        ("hangs up", |_| Vec::new(), false),
        ("half a header", |_| vec![0x66, 0x8e], false),
        ("half the data", |r| chunk(r, true, 1, 4104, &r.offset.to_be_bytes()), false),
        ("silent", |_| Vec::new(), true),
        ("silent in the data", |r| chunk(r, true, 1, 4104, &r.offset.to_be_bytes()), true),
    ];
    for (name, answer, silent) in cases {
        let lab = Lab::new();
        let disk = lying(&lab, *answer, *silent);
        let start = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let error = disk.read_at(&mut [0; 4096], 8192).unwrap_err();
                    let lost = matches!(error, BlockError::Disconnected { .. });
                    assert!(lost, "{name}: {error}");
                });
            }
        });
        assert!(start.elapsed() < Duration::from_secs(60), "{name}");
    }
}

#[test]
fn a_server_that_takes_no_more_writes_is_disconnected() {
    let lab = Lab::new();
    listen(&lab, |mut stream| {
        if shake_hands(&mut stream).unwrap_or(false) {
            std::thread::sleep(Duration::from_secs(5));
        }
    });
    let options = NbdOptions { request_timeout_ms: 300, ..NbdOptions::default() };
    let disk = NbdDevice::connect(&lab.url(""), &options).unwrap();
    let error = disk.write_at(&vec![1; SIZE as usize], 0).unwrap_err();
    assert!(matches!(error, BlockError::Disconnected { .. }), "{error}");
}

#[test]
fn an_error_chunk_keeps_the_connection() {
    let lab = Lab::new();
    let answer = |r: &Request| {
        let text = "the disk is on fire\x1b[31m and more words to be long";
        let payload =
            be([&5_u32.to_be_bytes(), &(text.len() as u16).to_be_bytes(), text.as_bytes()]);
        chunk(r, true, 0x8001, payload.len() as u32, &payload)
    };
    let disk = lying(&lab, answer, false);
    for _ in 0..3 {
        let error = disk.read_at(&mut [0; 4096], 8192).unwrap_err();
        assert!(matches!(error, BlockError::Io { .. }), "{error}");
        assert!(error.to_string().contains("on fire [31m"), "{error}");
    }
}

type Handshake = (&'static str, fn(&mut UnixStream), fn(&BlockError) -> bool);

/// Greets and lets the client send its first option.
fn greet(stream: &mut UnixStream) {
    let _ = stream.write_all(b"NBDMAGICIHAVEOPT\0\x03");
    let _ = stream.read_exact(&mut [0; 20]);
}

#[test]
fn a_handshake_that_goes_wrong_is_an_error() {
    let damaged = |error: &BlockError| matches!(error, BlockError::Damaged { .. });
    let lost = |error: &BlockError| matches!(error, BlockError::Disconnected { .. });
    let cases: &[Handshake] = &[
        ("hangs up", |_| {}, lost),
        ("other protocol", |s| drop(s.write_all(b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n")), damaged),
        (
            "oldstyle",
            |s| drop(s.write_all(b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53rest")),
            |error| matches!(error, BlockError::Unsupported { .. }),
        ),
        ("newstyle of another kind", |s| drop(s.write_all(b"NBDMAGICIHAVENOT\0\x03")), damaged),
        (
            "silent",
            |s| {
                let _ = s.write_all(b"NBDMAGIC");
                std::thread::sleep(Duration::from_secs(2));
            },
            |error| error.io_kind() == Some(std::io::ErrorKind::TimedOut),
        ),
        (
            "one byte at a time",
            |s| {
                for byte in b"NBDMAGICIHAVEOPT\0\x03" {
                    let _ = s.write_all(&[*byte]);
                    std::thread::sleep(Duration::from_millis(100));
                }
            },
            |error| error.io_kind() == Some(std::io::ErrorKind::TimedOut),
        ),
        (
            "huge reply",
            |s| {
                greet(s);
                let mut reply = option_reply(11, 1, &[]);
                reply[16..].copy_from_slice(&u32::MAX.to_be_bytes());
                let _ = s.write_all(&reply);
            },
            damaged,
        ),
        (
            "reply to another option",
            |s| {
                greet(s);
                let _ = s.write_all(&option_reply(3, 1, &[]));
            },
            damaged,
        ),
        (
            "reply of another kind",
            |s| {
                greet(s);
                let _ = s.write_all(&option_reply(11, 2, &[]));
            },
            damaged,
        ),
    ];
    for (name, server, expected) in cases {
        let lab = Lab::new();
        let server = *server;
        listen(&lab, move |mut stream| server(&mut stream));
        // Only what never ends lets the time run out.
        let is_endless = matches!(*name, "silent" | "one byte at a time");
        let handshake_timeout_ms = if is_endless { 500 } else { 20_000 };
        let options = NbdOptions { handshake_timeout_ms, ..NbdOptions::default() };
        let error = NbdDevice::connect(&lab.url(""), &options).unwrap_err();
        assert!(expected(&error), "{name}: {error}");
    }
}

#[test]
fn an_export_that_cannot_be_is_refused() {
    let sizes = |minimum: u32, preferred: u32, maximum: u32| {
        be([&[0, 3], &minimum.to_be_bytes(), &preferred.to_be_bytes(), &maximum.to_be_bytes()])
    };
    for infos in [
        vec![],
        vec![export_info(u64::MAX)],
        vec![vec![0, 0, 1]],
        vec![vec![7]],
        vec![export_info(SIZE), sizes(0, 4096, 1 << 20)],
        vec![export_info(SIZE), sizes(3, 4096, 1 << 20)],
        vec![export_info(SIZE), sizes(1 << 17, 1 << 17, 1 << 20)],
        vec![export_info(SIZE), sizes(512, 4096, 0)],
        vec![export_info(SIZE), vec![0, 1, 0xff, 0xfe]],
    ] {
        let lab = Lab::new();
        let shown = format!("{infos:?}");
        listen(&lab, move |mut stream| {
            let _ = stream.write_all(b"NBDMAGICIHAVEOPT\0\x03");
            let _ = stream.read_exact(&mut [0; 4]);
            let mut header = [0; 16];
            while stream.read_exact(&mut header).is_ok() {
                let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
                let _ = stream.read_exact(&mut vec![0; number(12) as usize]);
                if number(8) != 7 {
                    let _ = stream.write_all(&option_reply(number(8), (1 << 31) + 1, &[]));
                    continue;
                }
                for info in &infos {
                    let _ = stream.write_all(&option_reply(7, 3, info));
                }
                let _ = stream.write_all(&option_reply(7, 1, &[]));
            }
        });
        let error = NbdDevice::connect(&lab.url(""), &NbdOptions::default()).unwrap_err();
        assert!(matches!(error, BlockError::Damaged { .. }), "{shown}: {error}");
    }
}

#[test]
fn an_endless_list_is_refused() {
    let lab = Lab::new();
    listen(&lab, |mut stream| {
        greet(&mut stream);
        let server = be([&4_u32.to_be_bytes(), b"name"]);
        while stream.write_all(&option_reply(3, 2, &server)).is_ok() {}
    });
    let error = list_exports(&lab.url(""), &NbdOptions::default()).unwrap_err();
    assert!(matches!(error, BlockError::Damaged { .. }), "{error}");
}

#[test]
fn a_server_that_accepts_nobody_times_out() {
    let lab = Lab::new();
    let listener = UnixListener::bind(lab.path("s")).unwrap();
    // A queue of one, which the first client fills; whoever connects then waits.
    rustix::net::listen(&listener, 0).unwrap();
    let _first = UnixStream::connect(lab.path("s")).unwrap();
    let options =
        NbdOptions { connect_timeout_ms: 100, handshake_timeout_ms: 100, ..NbdOptions::default() };
    let start = Instant::now();
    let error = NbdDevice::connect(&lab.url(""), &options).unwrap_err();
    assert_eq!(error.io_kind(), Some(std::io::ErrorKind::TimedOut), "{error}");
    assert!(error.to_string().contains("does not accept"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(60));
}
