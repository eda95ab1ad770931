//! What the client stands up to, against a stand-in of an agent with faults.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

#[allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a stand-in whose every test uses a part of it"
)]
mod common;

use common::{DISK, KEY, KNOWN_ID, StandIn};
use std::time::Duration;
use vmtide_agent_client::AgentSource;
use vmtide_agent_client::{
    AgentClient, AgentError, AgentFiles, AgentKey, AgentOptions, AgentUrl, Doubt, Fingerprint,
};
use vmtide_block::{BlockDevice, BlockError, ByteRange, CancelToken, WritableBlockDevice};
use vmtide_hyperv::HostFiles;
use vmtide_hypervisor::{
    Base, Changes, Consistency, FreezeRequest, FullReason, Hypervisor, HypervisorError, JobId,
    TrackingId,
};

const MIB: usize = 1 << 20;

fn content(size: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> =
        (0..size).map(|at| u8::try_from((at * 7 + at / 511) % 251).unwrap()).collect();
    bytes[size / 2..size * 3 / 4].fill(0);
    bytes
}

fn cancel() -> CancelToken {
    CancelToken::new()
}

#[test]
fn both_kinds_of_agents_are_read_whole() {
    let disk = content(3 * MIB + 512);
    for v1 in [false, true] {
        let agent = StandIn::new(disk.clone(), v1);
        let client = agent.client();
        assert_eq!(client.has_v1(&cancel()).unwrap(), v1);
        let device = client.open(DISK, &cancel()).unwrap();
        assert_eq!(device.size_bytes(), disk.len() as u64);
        let mut buffer = vec![1; disk.len()];
        device.read_at(&mut buffer, 0).unwrap();
        assert_eq!(buffer, disk);
        device.read_at(&mut buffer[..1000], 2 * MIB as u64 - 7).unwrap();
        assert_eq!(buffer[..1000], disk[2 * MIB - 7..2 * MIB + 993]);
        assert!(device.read_at(&mut buffer[..2], disk.len() as u64 - 1).is_err());
        device.read_at(&mut [], 0).unwrap();
    }
}

#[test]
fn a_connection_that_breaks_goes_on_where_it_broke_off() {
    let disk = content(4 * MIB);
    for v1 in [false, true] {
        let agent = StandIn::new(disk.clone(), v1);
        let device = agent.client().open(DISK, &cancel()).unwrap();
        agent.with(|state| {
            state.cuts = [100_000, 0, 1, 700_000].into();
            state.requests.clear();
        });
        let mut buffer = vec![1; disk.len()];
        device.read_at(&mut buffer, 0).unwrap();
        assert_eq!(buffer, disk);
        let requests = agent.with(|state| state.requests.clone());
        assert_eq!(requests.len(), 5, "{requests:?}");
        if v1 {
            // What came whole is not asked for again.
            assert!(requests[1].contains("ranges=65536:"), "{requests:?}");
        }
    }
}

#[test]
fn zeros_are_found_without_being_read() {
    let mut disk = content(48 * MIB);
    disk[..9 * MIB].fill(0);
    for v1 in [false, true] {
        let agent = StandIn::new(disk.clone(), v1);
        let device = agent.client().open(DISK, &cancel()).unwrap();
        let extents = vmtide_block::all_extents(&device).unwrap();
        let zeros: u64 = extents
            .iter()
            .filter(|extent| extent.kind.reads_as_zero())
            .map(|extent| {
                let at = |offset: u64| usize::try_from(offset).unwrap();
                assert!(
                    disk[at(extent.range.offset)..at(extent.range.end())]
                        .iter()
                        .all(|byte| *byte == 0)
                );
                extent.range.length
            })
            .sum();
        assert_eq!(zeros, if v1 { 9 * MIB as u64 } else { 0 }, "{extents:?}");
        agent.with(|state| state.statuses = [503, 200].into());
        let first = device.extents(ByteRange::new(0, 8 * MIB as u64)).unwrap();
        assert_eq!(first[0].range.offset, 0);
    }
}

#[test]
fn flipped_bytes_are_noticed_and_asked_for_again() {
    let disk = content(MIB);
    let agent = StandIn::new(disk.clone(), true);
    let device = agent.client().open(DISK, &cancel()).unwrap();
    agent.with(|state| state.flips = [20, 5000, 200_000].into());
    let mut buffer = vec![1; disk.len()];
    device.read_at(&mut buffer, 0).unwrap();
    assert_eq!(buffer, disk);
    // A line that always does it is given up.
    agent.with(|state| state.flips = vec![5000; 10].into());
    let error = device.read_at(&mut buffer, 0).unwrap_err();
    assert!(error.to_string().contains("checksum"), "{error}");
}

#[test]
fn failures_that_pass_are_tried_again_and_others_not() {
    let agent = StandIn::new(content(4096), false);
    let client = agent.client();
    agent.with(|state| state.statuses = [503, 429, 500].into());
    client.info(DISK, &cancel()).unwrap();
    for (status, tries) in [(500, 3), (403, 1), (409, 1)] {
        agent.with(|state| {
            state.statuses = vec![status; 10].into();
            state.requests.clear();
        });
        client.info(DISK, &cancel()).unwrap_err();
        assert_eq!(agent.with(|state| state.requests.len()), tries, "{status}");
    }
    agent.with(|state| state.statuses.clear());
    assert!(matches!(client.info("/other", &cancel()), Err(AgentError::NotFound { .. })));
    // A user who gives up does not wait for the patience of the client.
    agent.with(|state| state.statuses = vec![503; 1000].into());
    let cancel = CancelToken::new();
    let waiting = {
        let cancel = cancel.clone();
        std::thread::spawn(move || client.info(DISK, &cancel))
    };
    std::thread::sleep(Duration::from_millis(300));
    cancel.cancel();
    assert!(matches!(waiting.join().unwrap(), Err(AgentError::Cancelled)));
}

#[test]
fn nothing_is_sent_to_another_host() {
    let agent = StandIn::new(content(4096), true);
    let connect = |options: AgentOptions| {
        AgentClient::new(&agent.url(), &options).unwrap().info(DISK, &CancelToken::new())
    };
    let wrong = AgentOptions { fingerprint: Some(Fingerprint([7; 32])), ..agent.options() };
    let error = connect(wrong).unwrap_err();
    assert!(matches!(error, AgentError::Certificate { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains(&agent.fingerprint.to_string()) && !text.contains(KEY), "{text}");
    assert!(agent.with(|state| state.requests.is_empty()));

    let directory = tempfile::tempdir().unwrap();
    let ca_file = directory.path().join("ca.pem");
    std::fs::write(&ca_file, &agent.certificate_pem).unwrap();
    connect(AgentOptions { fingerprint: None, ca_file: Some(ca_file.clone()), ..agent.options() })
        .unwrap();
    let other = StandIn::new(content(4096), true);
    std::fs::write(&ca_file, &other.certificate_pem).unwrap();
    let error =
        connect(AgentOptions { fingerprint: None, ca_file: Some(ca_file), ..agent.options() })
            .unwrap_err();
    assert!(matches!(error, AgentError::Certificate { .. }), "{error:?}");
    assert!(error.to_string().contains(&agent.fingerprint.to_string()), "{error}");

    let wrong_key = AgentOptions { key: Some(AgentKey::new("not-it").unwrap()), ..agent.options() };
    let error = connect(wrong_key).unwrap_err();
    assert!(matches!(error, AgentError::Denied { .. }), "{error:?}");
    assert!(!error.to_string().contains("not-it"), "{error}");
}

#[test]
fn an_agent_that_is_not_there_is_given_up_soon() {
    let options =
        AgentOptions { retry_time: Duration::from_millis(300), ..AgentOptions::default() };
    let options = AgentOptions { fingerprint: Some(Fingerprint([0; 32])), ..options };
    let url = AgentUrl::parse("agent+https://127.0.0.1:1/x").unwrap();
    let error = AgentClient::new(&url, &options).unwrap().info("/x", &cancel()).unwrap_err();
    assert!(matches!(error, AgentError::Unreachable { .. }), "{error:?}");
}

#[test]
fn changes_count_only_where_nothing_speaks_against_them() {
    let size = 1_000_000;
    let ask = |v1: bool, answers: &[&str]| {
        let agent = StandIn::new(vec![0; size], v1);
        agent.with(|state| {
            state.changes = answers.iter().map(|answer| (*answer).to_owned()).collect()
        });
        agent.client().changes(DISK, KNOWN_ID, size as u64, &cancel()).unwrap()
    };
    let set = ask(
        false,
        &[r#"[{"offset":999000,"length":65536},{"offset":5,"length":5},{"offset":0,"length":6}]"#],
    );
    assert_eq!(set.unwrap().as_slice(), [ByteRange::new(0, 10), ByteRange::new(999_000, 1000)]);
    let page = |ranges: &str, next: &str, size: usize| {
        format!(r#"{{"ranges":{ranges},"next_cursor":{next},"disk_size_bytes":{size}}}"#)
    };
    let first = page(r#"[{"offset":0,"length":10}]"#, "700", size);
    let set = ask(true, &[&first, &page(r#"[{"offset":10,"length":10}]"#, "null", size)]);
    assert_eq!(set.unwrap().as_slice(), [ByteRange::new(0, 20)]);

    let repeated = page("[]", "700", size);
    for (v1, answers) in [
        (false, vec!["[{\"offset\":0,\"length\":5}"]),
        (false, vec!["{}"]),
        (false, vec![""]),
        (false, vec![r#"[{"offset":1000000,"length":1}]"#]),
        (false, vec![r#"[{"offset":1,"length":18446744073709551615}]"#]),
        (true, vec![&first, &repeated]),
        (true, vec!["[]"]),
        (true, vec![&page("[]", "null", size + 1)]),
        (true, vec![&page("[]", "-1", size)]),
    ] {
        assert!(matches!(ask(v1, &answers), Err(Doubt::Broken(_))), "{answers:?}");
    }
    for v1 in [false, true] {
        assert!(matches!(ask(v1, &[]), Err(Doubt::Lost(_))));
    }
    // The first page alone is not the answer.
    assert!(matches!(ask(true, &[&first]), Err(Doubt::Lost(_))));
}

#[test]
fn writes_are_gathered_sent_again_and_read_back() {
    let agent = StandIn::new(content(40 * MIB), true);
    let disk = agent.client().open_writable(DISK, &cancel()).unwrap();
    let mut expected = content(40 * MIB);
    std::thread::scope(|scope| {
        for worker in 0..4_usize {
            let disk = &disk;
            scope.spawn(move || {
                for piece in (worker..40).step_by(4) {
                    if piece % 5 == 0 {
                        disk.write_zeroes(ByteRange::new((piece * MIB) as u64, MIB as u64))
                            .unwrap();
                    } else {
                        let byte = u8::try_from(piece).unwrap();
                        disk.write_at(&vec![byte; MIB], (piece * MIB) as u64).unwrap();
                    }
                }
            });
        }
    });
    for (piece, bytes) in expected.chunks_mut(MIB).enumerate() {
        bytes.fill(if piece % 5 == 0 { 0 } else { u8::try_from(piece).unwrap() });
    }
    agent.with(|state| state.statuses = [503].into());
    // Reading gives what was written, whether it was sent yet or not.
    let mut buffer = vec![0; 100];
    disk.read_at(&mut buffer, 39 * MIB as u64).unwrap();
    assert_eq!(buffer, [39; 100]);
    disk.flush().unwrap();
    assert!(agent.with(|state| state.disk == expected));
    assert!(
        (2..=4).contains(&agent.with(|state| state.writes)),
        "one flush for each batch, no more"
    );
    assert!(disk.write_at(&[0; 2], 40 * MIB as u64 - 1).is_err());

    agent.with(|state| state.statuses = vec![409; 20].into());
    disk.write_at(&[1; 512], 0).unwrap();
    disk.flush().unwrap_err();
    agent.with(|state| state.statuses.clear());
    let error = disk.write_at(&[1; 512], 0).unwrap_err();
    assert!(error.to_string().contains("an earlier write failed"), "{error}");
}

#[test]
fn a_write_that_was_cut_waits_until_the_agent_has_noticed() {
    let agent = StandIn::new(vec![0; 4 * MIB], true);
    let client = agent.client();
    let expected = content(4 * MIB);
    // In the body, and with all of it there, as in the agent's flush.
    for in_body in [true, false] {
        let disk = client.open_writable(DISK, &cancel()).unwrap();
        agent.with(|state| {
            state.disk.fill(0);
            state.writes = 0;
            if in_body {
                state.body_cuts = [MIB].into();
                state.conflicts = ["in_use"; 3].into();
            } else {
                state.lost_answers = 1;
            }
        });
        disk.write_at(&expected, 0).unwrap();
        disk.flush().unwrap();
        agent.with(|state| {
            assert!(state.disk == expected && state.conflicts.is_empty());
            assert_eq!(state.writes, if in_body { 1 } else { 2 });
        });
    }
    // Another conflict does not pass.
    let disk = client.open_writable(DISK, &cancel()).unwrap();
    agent.with(|state| {
        state.body_cuts = [MIB].into();
        state.conflicts = ["tracking_lost"; 2].into();
    });
    disk.write_at(&expected, 0).unwrap();
    let error = disk.flush().unwrap_err();
    assert!(error.to_string().contains("tracking_lost"), "{error}");
    assert_eq!(agent.with(|state| state.conflicts.len()), 1);
}

#[test]
fn a_disk_whose_making_was_not_heard_of_is_taken() {
    let size = 3 * MIB as u64;
    let make = |agent: &StandIn, format: &str| agent.client().create(DISK, format, size, &cancel());
    let agent = StandIn::new(Vec::new(), true);
    agent.with(|state| state.lost_answers = 1);
    make(&agent, "qcow2").unwrap();
    let asked = |agent: &StandIn| {
        agent.with(|state| state.requests.iter().filter(|line| line.starts_with("POST")).count())
    };
    assert_eq!(asked(&agent), 2);
    // One that was there before is nobody's to take, empty or not.
    let error = make(&agent, "qcow2").unwrap_err();
    assert_eq!(error.code(), "exists");
    assert_eq!(asked(&agent), 3);
}

#[test]
fn a_disk_that_holds_something_is_never_taken() {
    let size = 3 * MIB;
    for (disk, format) in [(content(size), "raw"), (vec![0; size], "vhdx"), (vec![0; 512], "raw")] {
        let agent = StandIn::new(disk, true);
        agent.with(|state| {
            state.made = Some("raw".into());
            state.lost_answers = 1;
        });
        let options = AgentOptions { retry_time: Duration::from_secs(5), ..agent.options() };
        let client = AgentClient::new(&agent.url(), &options).unwrap();
        let error = client.create(DISK, format, size as u64, &cancel()).unwrap_err();
        assert_eq!(error.code(), "exists", "{error}");
    }
}

#[test]
fn small_files_are_left_when_the_job_is_cancelled_and_removed_after() {
    type Call = fn(&AgentFiles) -> Result<(), HypervisorError>;
    const CALLS: [(&str, Call); 7] = [
        ("list", |files| files.list("/vms").map(drop)),
        ("free_bytes", |files| files.free_bytes("/vms").map(drop)),
        ("read_file", |files| files.read_file("/vms/a", 10).map(drop)),
        ("create_directory", |files| files.create_directory("/vms/new")),
        ("write_file", |files| files.write_file("/vms/a", b"a")),
        ("remove_file", |files| files.remove_file("/vms/a")),
        ("remove_directory", |files| files.remove_directory("/vms/new")),
    ];
    for (name, call) in CALLS {
        let agent = StandIn::new(Vec::new(), true);
        let cancel = cancel();
        let files = AgentFiles::new(agent.client(), cancel.clone());
        // While it runs: the next try would be answered.
        agent.with(|state| state.cancels = Some(cancel));
        let error = call(&files).unwrap_err();
        assert!(matches!(error, HypervisorError::Block(BlockError::Cancelled)), "{name}: {error}");
        // Begun after that: it undoes, and is tried again like anything.
        agent.with(|state| {
            state.requests.clear();
            state.cancels = Some(CancelToken::new());
        });
        files.remove_file("/vms/a").unwrap();
        let asked = agent.with(|state| state.requests.clone());
        assert_eq!(asked, ["DELETE /v1/files?path=%2Fvms%2Fa"; 2], "{name}");
    }
}

#[test]
fn a_freeze_whose_answer_was_lost_is_found_and_none_is_left() {
    let agent = StandIn::new(content(MIB), true);
    let client = agent.client();
    let others = serde_json::json!({
        "id": "other", "ttl_seconds": 599,
        "disks": [{"path": DISK, "size_bytes": MIB, "tracking_id": null}],
    });
    agent.with(|state| {
        state.freezes.push(others.clone());
        state.lost_answers = 1;
    });
    let frozen = client.freeze(&[DISK.to_owned()], &cancel()).unwrap();
    assert_eq!(frozen.disks()[0].path, DISK);
    agent.with(|state| {
        assert_eq!(state.freezes_made, 1, "the one that was made is used: {:?}", state.requests);
        assert_eq!(state.freezes.len(), 2);
    });
    frozen.end().unwrap();
    assert_eq!(agent.with(|state| state.freezes.clone()), [others]);

    // One that is finished only after it was looked for is ended, and only that.
    agent.with(|state| (state.lost_answers, state.empty_lists, state.freezes_made) = (1, 1, 0));
    let frozen = client.freeze(&[DISK.to_owned()], &cancel()).unwrap();
    agent.with(|state| {
        assert_eq!(state.freezes_made, 2, "{:?}", state.requests);
        let ids: Vec<_> = state.freezes.iter().map(|freeze| freeze["id"].clone()).collect();
        assert_eq!(ids, ["other", "freeze-2"]);
    });
    frozen.end().unwrap();

    // Where nothing was made it is made, once.
    agent.with(|state| {
        state.freezes_made = 0;
        state.body_cuts = [3].into();
    });
    let frozen = client.freeze(&[DISK.to_owned()], &cancel()).unwrap();
    assert_eq!(agent.with(|state| (state.freezes_made, state.freezes.len())), (1, 2));
    drop(frozen);
    assert_eq!(agent.with(|state| state.freezes.len()), 1);
}

#[test]
fn a_disk_that_cannot_be_frozen_is_watched() {
    let agent = StandIn::new(content(MIB), false);
    let source = || AgentSource::new(agent.client(), agent.url(), "web".into());
    let base = Base { tracking: Some(TrackingId(KNOWN_ID.into())), size_bytes: MIB as u64 };
    let request = FreezeRequest {
        vm: "web".into(),
        job: JobId::random(),
        lineage: "0123456789abcdef".into(),
        consistency: Consistency::Application,
        allow_downgrade: true,
        bases: [(AgentSource::disk_id(0), base)].into(),
        exclude: Vec::new(),
        cancel: cancel(),
    };
    let answer = || r#"[{"offset":65536,"length":65536}]"#.to_owned();
    agent.with(|state| state.changes = [answer()].into());
    let vm = source().freeze(&request).unwrap();
    let disk = &vm.disks()[0];
    assert_eq!(disk.tracking, Some(TrackingId(KNOWN_ID.into())));
    assert_eq!(disk.changes, Changes::Ranges(vec![ByteRange::new(65536, 65536)].into()));
    assert!(
        vm.warnings().is_empty(),
        "tracking shows whether somebody writes: {:?}",
        vm.warnings()
    );
    vm.check().unwrap();
    agent.with(|state| state.newer_changes = true);
    let error = vm.check().unwrap_err();
    assert!(error.to_string().contains("it was written"), "{error}");
    vm.abort().unwrap();

    // It was written before already: what was, is compared, and that it cannot be seen in all is told.
    agent.with(|state| state.changes = vec![answer(); 3].into());
    let vm = source().freeze(&request).unwrap();
    assert_eq!(vm.warnings().len(), 1, "{:?}", vm.warnings());
    vm.check().unwrap();
    agent.with(|state| state.changes = [r#"[{"offset":0,"length":131072}]"#.to_owned()].into());
    vm.check().unwrap_err();

    // An id that is not known any more is no error, but a reason.
    agent.with(|state| state.changes.clear());
    let vm = source().freeze(&request).unwrap();
    assert!(matches!(&vm.disks()[0].changes, Changes::Everything(FullReason::TrackingLost(_))));
    assert_eq!(vm.commit().unwrap(), Vec::<String>::new());
    let strict = FreezeRequest { allow_downgrade: false, ..request };
    let refused = source().freeze(&strict).err();
    assert!(matches!(refused, Some(HypervisorError::ConsistencyNotReached { .. })));
}

#[test]
fn without_v1_nothing_is_frozen_or_written() {
    let agent = StandIn::new(content(4096), false);
    let client = agent.client();
    for error in [
        client.freeze(&[DISK.to_owned()], &cancel()).err().unwrap(),
        client.create("/new", "raw", 4096, &cancel()).err().unwrap(),
        client.open_writable(DISK, &cancel()).err().unwrap(),
    ] {
        assert!(matches!(error, AgentError::Unsupported { .. }), "{error:?}");
        assert!(error.to_string().contains("vmtide agent"), "{error}");
    }
}
