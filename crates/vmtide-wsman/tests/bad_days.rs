//! Broken connections, nonsense and silence: what is asked again, and what is never sent twice.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests")]

mod support;

use std::collections::BTreeSet;
use std::time::Duration;
use support::{PASSWORD, client, options, server, tls_options, trusting};
use vmtide_cim::{Cim, CimError, ObjectPath, VIRTUALIZATION_NAMESPACE as NS};
use vmtide_wsman::{WsmanCim, WsmanOptions};
use wsman_server::{Effect, Operation, ServerOptions, Switch};

const ALL: &str = "SELECT * FROM Sample_Disk";

fn service() -> ObjectPath {
    ObjectPath::new(
        "Sample_Service",
        &[("CreationClassName", "Sample_Service"), ("Name", "sample")],
    )
}

#[test]
fn questions_are_asked_again() {
    let (server, _) = server(ServerOptions::default(), 50);
    let client = client(&server);
    for switch in [
        "cut-before:enumerate:0:1",
        "cut-after:enumerate:0:1",
        "cut-during:pull:0:1",
        "cut-after:pull:1:1",
        "unavailable:enumerate:0:1",
        "unauthorized:pull:0:1",
        "unauthorized:enumerate:0:1",
        "cut-before:login:0:1",
    ] {
        server.cut_connections();
        server.switches().add(switch.parse().unwrap());
        let found = client.query(NS, ALL).unwrap_or_else(|error| panic!("{switch}: {error}"));
        let ids: BTreeSet<_> = found.iter().map(|disk| disk.text("InstanceID").unwrap()).collect();
        assert_eq!((found.len(), ids.len()), (50, 50), "{switch}");
        server.switches().clear();
    }
}

/// What is done on the way to an answer may have been done at the host before: a batch that was lost so is not passed over.
#[test]
fn a_lost_part_is_not_passed_over_whoever_says_that_it_was_not_run() {
    let (server, _) = server(ServerOptions::default(), 50);
    // Envelopes this small hold a part of the 50 each.
    let narrow = WsmanOptions { max_envelope_bytes: 8192, ..options(&server, "admin", PASSWORD) };
    let client = WsmanCim::new(narrow).unwrap();
    let pulls = || {
        let log = server.log();
        log.iter().filter(|seen| seen.operation == Some(Operation::Pull)).count()
    };
    client.query(NS, ALL).unwrap();
    assert!(pulls() > 2, "{}", pulls());
    for effect in [Effect::UnauthorizedAfter, Effect::UnavailableAfter] {
        server.switches().add(Switch::once(effect, Operation::Pull));
        let found = client.query(NS, ALL).unwrap();
        let ids: BTreeSet<_> = found.iter().map(|disk| disk.text("InstanceID").unwrap()).collect();
        assert_eq!((found.len(), ids.len()), (50, 50), "{effect:?}");
        server.switches().clear();
    }
}

#[test]
fn questions_are_not_asked_for_ever() {
    let (server, _) = server(ServerOptions::default(), 1);
    let client = client(&server);
    server.switches().add(Switch::always(Effect::CutBefore));
    let error = client.query(NS, ALL).unwrap_err();
    assert!(matches!(error, CimError::Unreachable { .. }), "{error}");
    assert!(server.log().len() <= 12, "{}", server.log().len());
}

#[test]
fn calls_are_never_sent_twice() {
    let (server, world) = server(ServerOptions::default(), 1);
    let client = client(&server);
    for (effect, calls) in [(Effect::CutAfter, 1), (Effect::CutDuring, 1), (Effect::CutBefore, 0)] {
        let before = world.calls();
        server.switches().add(Switch::once(effect, Operation::Invoke));
        let error = client.invoke(&service(), "Count", &[]).unwrap_err();
        assert!(matches!(error, CimError::Unreachable { before_request: false, .. }), "{error}");
        assert!(!error.was_not_run());
        assert_eq!(world.calls() - before, calls, "{effect:?}");
        let sent =
            server.log().into_iter().filter(|seen| seen.operation == Some(Operation::Invoke));
        assert!(sent.count() <= 3);
    }
}

#[test]
fn calls_that_did_not_arrive_are_sent_once_more() {
    let (server, world) = server(ServerOptions::default(), 1);
    let client = client(&server);
    client.invoke(&service(), "Count", &[]).unwrap();
    // The connection at rest is gone; this is seen before anything is sent.
    server.cut_connections();
    // Long enough for the client to see it on a busy machine.
    std::thread::sleep(Duration::from_secs(3));
    client.invoke(&service(), "Count", &[]).unwrap();
    assert_eq!(world.calls(), 2);
}

const REFUSALS: [&str; 2] = ["unauthorized:invoke:0:1", "unavailable:invoke:0:1"];
/// The same by somebody on the way, after the host has done it.
const FORGED: [&str; 2] = ["unauthorized-after:invoke:0:1", "unavailable-after:invoke:0:1"];

#[test]
fn a_host_proven_by_tls_may_say_that_a_call_did_not_run() {
    let (server, world) = server(tls_options(), 1);
    let (options, _file) = trusting(&server, options(&server, "admin", PASSWORD));
    let client = WsmanCim::new(options).unwrap();
    for switch in REFUSALS {
        let before = world.calls();
        server.switches().add(switch.parse().unwrap());
        client.invoke(&service(), "Count", &[]).unwrap_or_else(|error| panic!("{switch}: {error}"));
        assert_eq!(world.calls() - before, 1, "{switch}");
    }
}

#[test]
fn refusals_without_a_seal_are_no_reason_to_send_a_call_again() {
    let (server, world) = server(ServerOptions::default(), 1);
    let client = client(&server);
    for switch in REFUSALS.into_iter().chain(FORGED) {
        let sent = || {
            let log = server.log();
            log.iter().filter(|seen| seen.operation == Some(Operation::Invoke)).count()
        };
        let before = sent();
        server.switches().add(switch.parse().unwrap());
        let error = client.invoke(&service(), "Count", &[]).unwrap_err();
        assert!(
            matches!(error, CimError::Unreachable { before_request: false, .. }),
            "{switch}: {error}"
        );
        assert!(sent() - before <= 1, "{switch}");
        server.switches().clear();
    }
    assert_eq!(world.calls(), 2, "each forged one ran, and none twice");
}

#[test]
fn nonsense_is_an_error_and_the_next_request_works() {
    let (server, _) = server(ServerOptions::default(), 2);
    let client = client(&server);
    for (effect, is_expected) in [
        (Effect::Garbage, protocol as fn(&CimError) -> bool),
        (Effect::Nested, protocol_or_too_large),
        (Effect::EmptyError, protocol),
        (Effect::Oversized, protocol_or_too_large),
        (Effect::TimedOut, |error| matches!(error, CimError::Timeout { .. })),
        (Effect::AccessDenied, |error| matches!(error, CimError::Denied { .. })),
    ] {
        server.switches().add(Switch::once(effect, Operation::Enumerate));
        let error = client.query(NS, ALL).unwrap_err();
        assert!(is_expected(&error), "{effect:?}: {error}");
        assert!(!error.to_string().contains('\n') && error.to_string().len() < 700, "{error}");
        server.switches().clear();
        assert_eq!(client.query(NS, ALL).unwrap().len(), 2, "{effect:?}");
    }
}

fn protocol(error: &CimError) -> bool {
    matches!(error, CimError::Protocol { .. })
}

fn protocol_or_too_large(error: &CimError) -> bool {
    matches!(error, CimError::Protocol { .. } | CimError::TooLarge { .. })
}

#[test]
fn an_enumeration_that_the_host_forgot_is_an_error() {
    let (server, _) = server(ServerOptions::default(), 60);
    let client = client(&server);
    server.switches().add(Switch::once(Effect::ExpiredEnumeration, Operation::Pull));
    let error = client.query(NS, ALL).unwrap_err();
    assert!(matches!(error, CimError::Fault { .. }), "{error}");
}

#[test]
fn silence_ends() {
    let (server, world) = server(ServerOptions::default(), 1);
    let hasty = WsmanOptions {
        operation_timeout: Duration::from_secs(5),
        ..options(&server, "admin", PASSWORD)
    };
    let client = WsmanCim::new(hasty).unwrap();
    client.identify().unwrap();
    server.switches().add(Switch::once(Effect::Silent, Operation::Invoke));
    let error = client.invoke(&service(), "Count", &[]).unwrap_err();
    assert!(matches!(error, CimError::Timeout { .. }), "{error}");
    assert!(!error.was_not_run());
    assert!(world.calls() <= 1);
}

#[test]
fn what_is_found_is_bounded() {
    let (server, _) = server(ServerOptions::default(), 100);
    let small = WsmanOptions { max_result_bytes: 50_000, ..options(&server, "admin", PASSWORD) };
    let error = WsmanCim::new(small).unwrap().query(NS, ALL).unwrap_err();
    assert!(matches!(error, CimError::TooLarge { limit_bytes: 50_000, .. }), "{error}");
    assert!(server.log().iter().any(|seen| seen.operation == Some(Operation::Release)));
    // Small envelopes only mean more of them.
    let narrow = WsmanOptions { max_envelope_bytes: 8192, ..options(&server, "admin", PASSWORD) };
    assert_eq!(WsmanCim::new(narrow).unwrap().query(NS, ALL).unwrap().len(), 100);
}

#[test]
fn many_threads_share_few_connections() {
    let (server, world) = server(ServerOptions::default(), 30);
    let two = WsmanOptions { connections: 2, ..options(&server, "admin", PASSWORD) };
    let client = WsmanCim::new(two).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                for _ in 0..3 {
                    assert_eq!(client.query(NS, ALL).unwrap().len(), 30);
                    client.invoke(&service(), "Count", &[]).unwrap();
                }
            });
        }
    });
    assert_eq!(world.calls(), 18);
    let connections: BTreeSet<_> = server.log().iter().map(|seen| seen.connection).collect();
    assert!(connections.len() <= 2, "{connections:?}");
}
