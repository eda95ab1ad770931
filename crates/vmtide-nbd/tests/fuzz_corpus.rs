//! The fuzz targets over their seeds, and over every seed cut short and with every byte changed.
//!
//! The seeds are kept for the fuzzer too, in `fuzz/seeds`; with `VMTIDE_WRITE_SEEDS=1` set, these
//! tests write them there.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed unwrap is a failed test, and the numbers here are small"
)]

use std::path::Path;
use vmtide_nbd::fuzzing::{client_handshake, client_replies, server_requests};

/// A target as the fuzzer calls it.
struct Target(&'static str, fn(&[u8]));

const HANDSHAKE: Target = Target("nbd_client_handshake", client_handshake);
const REPLIES: Target = Target("nbd_client_replies", client_replies);
const REQUESTS: Target = Target("nbd_server_requests", server_requests);

impl Target {
    /// Runs the target over the seed, which must be the one in the tree, and mutations of it.
    fn mutate(&self, name: &str, seed: &[u8]) {
        self.keep(name, seed);
        mutate(self.1, seed);
    }

    fn keep(&self, name: &str, seed: &[u8]) {
        let home = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(self.0);
        if std::env::var_os("VMTIDE_WRITE_SEEDS").is_some() {
            std::fs::create_dir_all(&home).unwrap();
            std::fs::write(home.join(name), seed).unwrap();
        }
        let kept = std::fs::read(home.join(name)).unwrap_or_default();
        assert!(kept == seed, "{} {name}: another seed is kept; see the top of this file", self.0);
    }
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    [&b"IHAVEOPT"[..], &option.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    [
        &0x0003_e889_0455_65a9_u64.to_be_bytes()[..],
        &option.to_be_bytes(),
        &kind.to_be_bytes(),
        &(data.len() as u32).to_be_bytes(),
        data,
    ]
    .concat()
}

fn counted(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

/// Runs a target over the seed, its prefixes, and the seed with single bytes changed.
fn mutate(target: fn(&[u8]), seed: &[u8]) {
    target(seed);
    for length in 0..seed.len() {
        target(&seed[..length]);
        for value in [0, 0xff, seed[length].wrapping_add(1)] {
            let mut changed = seed.to_vec();
            changed[length] = value;
            target(&changed);
        }
    }
}

#[test]
fn handshakes_of_servers() {
    let greeting = b"NBDMAGICIHAVEOPT\0\x03";
    let context = [&[0, 0, 0, 1], &b"base:allocation"[..]].concat();
    let export = [&[0, 0][..], &(1u64 << 30).to_be_bytes(), &[0x01, 0x0d]].concat();
    let sizes = [0u8, 3, 0, 0, 2, 0, 0, 0, 16, 0, 2, 0, 0, 0];
    let negotiate = [
        &[15][..],
        greeting,
        &option_reply(11, 1, &[]),
        &option_reply(10, 4, &context),
        &option_reply(10, 1, &[]),
        &option_reply(7, 3, &export),
        &option_reply(7, 3, &sizes),
        &option_reply(7, 3, b"\0\x02words"),
        &option_reply(7, 1, &[]),
    ]
    .concat();
    HANDSHAKE.mutate("negotiate", &negotiate);
    let list = [
        &[0][..],
        greeting,
        &option_reply(3, 2, &[counted("disk"), b"words".to_vec()].concat()),
        &option_reply(3, 1, &[]),
    ]
    .concat();
    HANDSHAKE.mutate("list", &list);
    let by_name = [&[3][..], b"NBDMAGICIHAVEOPT\0\0", &[0; 134]].concat();
    HANDSHAKE.mutate("by_name", &by_name);
}

#[test]
fn replies_of_servers() {
    let chunk = |flags: u16, kind: u16, payload: &[u8]| {
        [
            &0x668e_33ef_u32.to_be_bytes()[..],
            &flags.to_be_bytes(),
            &kind.to_be_bytes(),
            &[0; 8],
            &(payload.len() as u32).to_be_bytes(),
            payload,
        ]
        .concat()
    };
    let data = [&4096u64.to_be_bytes()[..], &[9; 64]].concat();
    let hole = [&4160u64.to_be_bytes()[..], &8128u32.to_be_bytes()].concat();
    let read = [&[1 | 8][..], &chunk(0, 1, &data), &chunk(1, 2, &hole)].concat();
    REPLIES.mutate("read", &read);
    let status = [0u32, 4096, 0, 4096, 3].map(u32::to_be_bytes).concat();
    let dirty = [7u32, 8192, 1].map(u32::to_be_bytes).concat();
    let statuses = [&[1 | 4][..], &chunk(0, 5, &status), &chunk(1, 5, &dirty)].concat();
    REPLIES.mutate("statuses", &statuses);
    let error = [&5u32.to_be_bytes()[..], &5u16.to_be_bytes(), b"words"].concat();
    REPLIES.mutate("error", &[&[1][..], &chunk(1, 0x8001, &error)].concat());
    let extended = [
        &[2 | 8][..],
        &0x6e8a_278c_u32.to_be_bytes(),
        &[0, 1, 0, 2],
        &[0; 8],
        &4096u64.to_be_bytes(),
        &12u64.to_be_bytes(),
        &4096u64.to_be_bytes(),
        &8192u32.to_be_bytes(),
    ]
    .concat();
    REPLIES.mutate("extended", &extended);
    let simple = [&[8][..], &0x6744_6698_u32.to_be_bytes(), &[0; 12], &[5; 8192]].concat();
    REPLIES.keep("simple", &simple);
    client_replies(&simple);
    client_replies(&simple[..8000]);
}

#[test]
fn conversations_of_clients() {
    let request = |flags: u16, command: u16, offset: u64, length: u64, payload: &[u8]| {
        [
            &0x21e4_1c71_u32.to_be_bytes()[..],
            &flags.to_be_bytes(),
            &command.to_be_bytes(),
            &[3; 8],
            &offset.to_be_bytes(),
            &length.to_be_bytes(),
            payload,
        ]
        .concat()
    };
    let queries = [
        counted("ro"),
        2u32.to_be_bytes().to_vec(),
        counted("base:allocation"),
        counted("qemu:dirty-bitmap:b"),
    ]
    .concat();
    let go = [counted("ro"), vec![0, 1, 0, 3]].concat();
    let filter = [&8192u64.to_be_bytes()[..], &1u32.to_be_bytes()].concat();
    let conversation = [
        vec![0, 0, 0, 3],
        option(3, &[]),
        option(11, &[]),
        option(9, &queries),
        option(10, &queries),
        option(6, &go),
        option(7, &go),
        request(0, 0, 100, 20_000, &[]),
        request(1 << 5, 1, 100, 5, b"hello"),
        request(0, 6, 100, 5000, &[]),
        request(0, 7, 0, 65_000, &[]),
        request(1 << 5, 7, 0, 12, &filter),
        request(0, 3, 0, 0, &[]),
        request(0, 4, u64::MAX, u64::MAX, &[]),
        request(0, 99, 0, 0, &[]),
    ]
    .concat();
    REQUESTS.mutate("conversation", &conversation);
    let plain = [
        vec![0, 0, 0, 0],
        option(1, b""),
        [
            &0x2560_9513_u32.to_be_bytes()[..],
            &[0, 0, 0, 1],
            &[7; 8],
            &[0; 8],
            &[0, 0, 0, 3],
            b"abc",
        ]
        .concat(),
        [&0x2560_9513_u32.to_be_bytes()[..], &[0, 0, 0, 0], &[7; 8], &[0; 8], &[0, 0, 1, 0]]
            .concat(),
    ]
    .concat();
    REQUESTS.mutate("plain", &plain);
}
