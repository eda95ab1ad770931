//! The store on a server that fails.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::format_push_string,
    reason = "a test: what fails here fails the test"
)]

#[path = "../../vmtide-repo/tests/support/conformance.rs"]
mod conformance;
#[allow(dead_code, reason = "each test uses a part of it")]
#[path = "support/faulty.rs"]
mod faulty;

use conformance::{Promises, Subject};
use faulty::{Fault, FaultyServer, Pages};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmtide_repo::{ObjectStore, RepoError, Retention, RetentionMode, read_small};
use vmtide_s3::{Guarantee, ProbeDepth, S3Options, S3Store, StaticCredentials};

fn options(server: &FaultyServer) -> S3Options {
    let mut options = S3Options::parse("s3://bucket/x").unwrap();
    options.endpoint = Some(server.endpoint.clone());
    options.retry_time = Duration::from_secs(20);
    options.credentials = Some(StaticCredentials {
        key_id: "AKIA".into(),
        secret_key: "ganz-geheim".to_owned().into(),
        token: None,
    });
    options
}

fn store(server: &FaultyServer) -> S3Store {
    S3Store::connect(&options(server)).unwrap()
}

fn subjects() -> Vec<Subject> {
    // Every fourth request fails in one of the ways that pass.
    let faults = [Fault::Answer(503, "SlowDown"), Fault::Torn, Fault::LostAnswer, Fault::CutAnswer];
    [true, false]
        .into_iter()
        .map(|honours| {
            let server = FaultyServer::start(honours);
            for round in 0..200 {
                server.plan(&[Fault::None, Fault::None, Fault::None, faults[round % 4]]);
            }
            let promises =
                Promises { one_winner: honours, no_replacement: honours, ..Promises::ALL };
            Subject { store: Arc::new(store(&server)), promises, guard: None }
        })
        .collect()
}

// While every fourth request fails.
conformance_tests!(subjects);

#[test]
fn what_passes_is_tried_again() {
    let server = FaultyServer::start(true);
    let store = store(&server);
    for fault in [
        Fault::Answer(500, "InternalError"),
        Fault::Answer(503, "SlowDown"),
        Fault::Answer(429, ""),
        Fault::Answer(409, "ConditionalRequestConflict"),
        Fault::Torn,
        Fault::LostAnswer,
    ] {
        let name = format!("points/{}", format!("{fault:?}").len());
        server.plan(&[fault, fault]);
        store.put(&name, b"content").unwrap_or_else(|error| panic!("{fault:?}: {error}"));
        server.plan(&[fault]);
        assert_eq!(read_small(&store, &name, 7).unwrap(), b"content", "{fault:?}");
        store.remove(&name).unwrap();
    }
    store.put("points/p", &[7; 50_000]).unwrap();
    server.plan(&[Fault::CutAnswer, Fault::Slow]);
    assert_eq!(read_small(&store, "points/p", 50_000).unwrap(), [7; 50_000]);
}

#[test]
fn a_lost_answer_is_told_from_a_name_that_is_taken() {
    let server = FaultyServer::start(true);
    let (one, other) = (store(&server), store(&server));
    one.put("maps/m", b"first").unwrap();
    server.plan(&[Fault::LostAnswer]);
    let error = other.put("maps/m", b"second").unwrap_err();
    assert!(matches!(error, RepoError::AlreadyExists { .. }), "{error}");
    assert_eq!(read_small(&one, "maps/m", 10).unwrap(), b"first");
    server.plan(&[Fault::LostAnswer]);
    other.put("maps/n", b"third").unwrap();
    assert_eq!(read_small(&one, "maps/n", 10).unwrap(), b"third");
}

#[test]
fn what_does_not_pass_fails_at_once_and_what_lasts_ends() {
    let server = FaultyServer::start(true);
    let store = store(&server);
    store.put("maps/m", b"x").unwrap();
    server.seen();
    server.plan(&[Fault::Answer(403, "AccessDenied")]);
    let error = store.put("maps/n", b"x").unwrap_err();
    assert!(matches!(error, RepoError::Denied { .. }), "{error}");
    assert_eq!(server.seen().len(), 1);
    assert!(!error.to_string().contains("geheim"), "{error}");
    let mut impatient = options(&server);
    impatient.retry_time = Duration::from_secs(2);
    let impatient = S3Store::connect(&impatient).unwrap();
    server.plan(&[Fault::Answer(503, "SlowDown"); 100]);
    let begun = Instant::now();
    let error = impatient.put("maps/n", b"x").unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(60));
    for word in ["503", "SlowDown", "tries", "maps/n", "try again later"] {
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[test]
fn a_server_that_is_not_there_is_given_up_soon() {
    let server = FaultyServer::start(true);
    let mut options = options(&server);
    // The port of nobody: discard.
    options.endpoint = Some("http://127.0.0.1:9".into());
    let begun = Instant::now();
    let error = S3Store::connect(&options).unwrap().open("vmtide.repo").map(drop).unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(60));
    assert!(error.to_string().contains("http://127.0.0.1:9"), "{error}");
}

#[test]
fn conditions_that_are_passed_over_are_found_out_and_late_listings_refused() {
    let server = FaultyServer::start(false);
    let found = store(&server).require(ProbeDepth::Full).unwrap();
    assert_eq!(found.conditional_write, Guarantee::No);
    assert_eq!(found.list_after_write, Guarantee::Yes);
    assert_eq!(found.remarks().len(), 1, "{:?}", found.remarks());
    server.list_late();
    let error = store(&server).require(ProbeDepth::Full).unwrap_err();
    assert!(error.to_string().contains("not listed at once"), "{error}");
}

#[test]
fn a_listing_that_is_cut_is_an_error_and_such_a_server_is_refused() {
    let server = FaultyServer::start(true);
    let store = store(&server);
    let count = || {
        let mut names = std::collections::BTreeSet::new();
        let listed = store.list("points/", &mut |entry| {
            names.insert(entry.name);
            Ok(())
        });
        listed.map(|()| names.len())
    };
    for number in 0..1001 {
        store.put(&format!("points/{number}"), b"x").unwrap();
    }
    assert_eq!(count().unwrap(), 1001);
    assert_eq!(store.require(ProbeDepth::Full).unwrap().list_in_pages, Guarantee::Yes);
    for pages in [Pages::Cut, Pages::Same] {
        server.pages(pages);
        let error = count().unwrap_err();
        assert!(error.to_string().contains("not whole"), "{pages:?}: {error}");
        let error = store.require(ProbeDepth::Full).unwrap_err();
        assert!(error.to_string().contains("long listings are cut"), "{pages:?}: {error}");
        let mut left = 0;
        store
            .list("probe/", &mut |_| {
                left += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!(left, 0, "{pages:?}");
    }
}

fn kept(mode: RetentionMode, hours: i64) -> Retention {
    let second = jiff::Timestamp::now().as_second() + hours * 3600;
    Retention { mode, until: jiff::Timestamp::from_second(second).unwrap() }
}

#[test]
fn what_is_locked_is_not_hidden_where_nobody_tells_that_versions_are_kept() {
    let server = FaultyServer::start(true);
    server.keep_versions();
    let store = store(&server);
    store.put("points/p", b"content").unwrap();
    store.retain("points/p", &kept(RetentionMode::Governance, 5)).unwrap();
    let error = store.remove("points/p").unwrap_err();
    assert!(matches!(error, RepoError::Locked { .. }), "{error}");
    assert_eq!(read_small(&store, "points/p", 10).unwrap(), b"content");
    store.put("points/q", b"free").unwrap();
    store.remove("points/q").unwrap();
    assert!(matches!(store.open("points/q").map(drop), Err(RepoError::NotFound { .. })));
}

#[test]
fn of_two_retentions_the_firmer_mode_and_the_later_time_count() {
    let server = FaultyServer::start(true);
    server.keep_versions();
    let store = store(&server);
    let (weak, firm) = (RetentionMode::Governance, RetentionMode::Compliance);
    let cases = [
        (kept(weak, 90), kept(firm, 30), "COMPLIANCE", 90),
        (kept(firm, 30), kept(weak, 90), "COMPLIANCE", 90),
        (kept(firm, 90), kept(weak, 30), "COMPLIANCE", 90),
        (kept(weak, 90), kept(weak, 30), "GOVERNANCE", 90),
    ];
    for (number, (first, second, mode, hours)) in cases.into_iter().enumerate() {
        let name = format!("packs/{number}");
        store.put(&name, b"x").unwrap();
        store.retain(&name, &first).unwrap();
        store.retain(&name, &second).unwrap();
        let until = first.until.max(second.until);
        assert_eq!(store.retained_until(&name).unwrap(), Some(until), "{number}: {hours} h");
        assert_eq!(server.mode_of(&format!("/bucket/x/{name}")).as_deref(), Some(mode), "{number}");
    }
}
