//! Our client against nbdkit: block sizes it insists on, and faults on demand.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed unwrap is a failed test, and the numbers here are small"
)]

use crate::support;

use std::io::ErrorKind;
use support::{Lab, Running, noise, tool};
use vmtide_block::{BlockDevice, BlockError, ByteRange, WritableBlockDevice};

/// Starts nbdkit on the socket `s` in the foreground.
fn nbdkit(lab: &Lab, arguments: &[&str]) -> Running {
    let mut command = tool("nbdkit");
    command.args(["-f", "-U"]).arg(lab.path("s")).args(arguments);
    lab.serve(&mut command, "s")
}

#[test]
fn minimum_block_sizes_are_kept() {
    let lab = Lab::new();
    let filter = "--filter=blocksize-policy";
    let policy =
        ["blocksize-minimum=4096", "blocksize-preferred=65536", "blocksize-maximum=131072"];
    let strict = "blocksize-error-policy=error";
    let arguments = [&[filter, "memory", "1M", strict], &policy[..]].concat();
    let _server = nbdkit(&lab, &arguments);
    let disk = lab.connect("");
    assert_eq!(disk.info().block_sizes.minimum, 4096);
    assert_eq!(disk.info().block_sizes.maximum_payload, 131_072);
    assert_eq!(disk.block_size_bytes(), 4096);
    let mut model = vec![0; 1 << 20];
    for (at, length) in [(0, 1 << 20), (5, 10), (4090, 20), (8191, 4097), (100_001, 300_000)] {
        let data = noise(length, at as u64);
        disk.write_at(&data, at as u64).unwrap();
        model[at..at + length].copy_from_slice(&data);
    }
    disk.write_zeroes(ByteRange::new(5000, 20_000)).unwrap();
    model[5000..25_000].fill(0);
    let mut got = vec![1; 1 << 20];
    disk.read_at(&mut got, 0).unwrap();
    assert!(got == model);
    let mut got = vec![1; 9999];
    disk.read_at(&mut got, 4097).unwrap();
    assert!(got == model[4097..4097 + 9999]);
    assert_eq!(disk.extents(ByteRange::new(4097, 10)).unwrap()[0].range.offset, 4097);
}

#[test]
fn server_errors_are_told_apart() {
    for (code, expected) in [
        ("EIO", ErrorKind::Other),
        ("ENOSPC", ErrorKind::StorageFull),
        ("EPERM", ErrorKind::PermissionDenied),
        ("EINVAL", ErrorKind::InvalidInput),
        ("ENOMEM", ErrorKind::OutOfMemory),
    ] {
        let lab = Lab::new();
        let fail = format!("pwrite=cat >/dev/null; echo {code} no luck >&2; exit 1");
        let _server =
            nbdkit(&lab, &["eval", "get_size=echo 1M", "pread=head -c $3 /dev/zero", &fail]);
        let disk = lab.connect("");
        let error = disk.write_at(&[1; 512], 0).unwrap_err();
        assert_eq!(error.io_kind(), Some(expected), "{code}: {error}");
        disk.read_at(&mut [1; 512], 0).unwrap();
    }
}

#[test]
fn a_server_that_shuts_down_says_so() {
    let lab = Lab::new();
    let fail = "pread=echo ESHUTDOWN bye >&2; exit 1";
    let _server = nbdkit(&lab, &["eval", "get_size=echo 1M", fail]);
    let error = lab.connect("").read_at(&mut [1; 512], 0).unwrap_err();
    assert!(matches!(error, BlockError::Disconnected { .. }), "{error}");
}

#[test]
fn failing_now_and_then_never_gives_wrong_bytes() {
    let lab = Lab::new();
    let _server = nbdkit(
        &lab,
        &["--filter=error", "pattern", "8M", "error-pread=EIO", "error-pread-rate=20%"],
    );
    let disk = lab.connect("");
    let (mut good, mut bad) = (0, 0);
    for round in 0..100u64 {
        let mut got = vec![0; 64 << 10];
        let at = ((round * 64) << 10) % (8 << 20);
        match disk.read_at(&mut got, at) {
            Ok(()) => {
                good += 1;
                for (index, word) in got.chunks_exact(8).enumerate() {
                    // The pattern is each word's own offset.
                    let offset = at + index as u64 * 8;
                    assert_eq!(u64::from_be_bytes(word.try_into().unwrap()), offset);
                }
            }
            Err(error) => {
                bad += 1;
                assert!(matches!(error, BlockError::Io { .. }), "{error}");
            }
        }
    }
    assert!(good > 0 && bad > 0, "{good} good, {bad} bad");
}

#[test]
fn a_killed_server_wakes_every_caller() {
    let lab = Lab::new();
    let server = nbdkit(&lab, &["--filter=delay", "memory", "1M", "rdelay=30"]);
    let disk = lab.connect("");
    std::thread::scope(|scope| {
        let callers: Vec<_> =
            (0..8).map(|_| scope.spawn(|| disk.read_at(&mut [0; 512], 0).unwrap_err())).collect();
        std::thread::sleep(std::time::Duration::from_millis(200));
        drop(server);
        for caller in callers {
            let error = caller.join().unwrap();
            assert!(matches!(error, BlockError::Disconnected { .. }), "{error}");
        }
    });
    assert!(disk.write_at(&[0; 512], 0).is_err());
}

#[test]
fn an_old_server_is_chosen_from_by_name() {
    let lab = Lab::new();
    // Without fixed newstyle there is only NBD_OPT_EXPORT_NAME.
    let _server = nbdkit(&lab, &["--mask-handshake=0", "pattern", "1M"]);
    let disk = lab.connect("");
    let mut got = [0; 8];
    disk.read_at(&mut got, 4096).unwrap();
    assert_eq!(u64::from_be_bytes(got), 4096);
}
