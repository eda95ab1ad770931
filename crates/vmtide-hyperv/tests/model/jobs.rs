//! Jobs are waited for, whatever becomes of them.

use crate::support::{Fake, SHAPES, Shape, TestClock, done, fault, job_path};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vmtide_block::{BlockError, CancelToken};
use vmtide_cim::{CimError, CimInstance, CimType, CimValue, MethodOutput, ObjectPath};
use vmtide_hypervisor::HypervisorError;

fn unreachable() -> CimError {
    CimError::Unreachable { peer: "HV1".into(), detail: "cut".into(), before_request: false }
}

fn row(element: &ObjectPath, effect: u16) -> CimInstance {
    CimInstance::new("Msvm_AffectedJobElement")
        .with("AffectedElement", element)
        .with("ElementEffects", CimValue::Array(CimType::Uint16, vec![CimValue::Uint16(effect)]))
}

#[test]
fn a_job_is_done_after_all_its_states() {
    for shape in SHAPES {
        let fake = Fake::new(shape);
        fake.job("j", &[2, 3, 4, 4, 5, 6, 11, 7], |last| last);
        let touched = ObjectPath::new("Msvm_ComputerSystem", &[("Name", "A")]);
        let made = ObjectPath::new("Msvm_VirtualSystemSettingData", &[("InstanceID", "B")]);
        let rows = vec![row(&touched, 0), row(&made, 0), row(&made, 5), row(&touched, 0)];
        fake.tables.lock().unwrap().affected.insert(job_path("j").to_string(), Ok(rows));
        let outcome = fake.host().wait(&job_path("j"), "a test", &CancelToken::new()).unwrap();
        assert_eq!(outcome.affected, [made, touched]);
        assert!(outcome.warnings.is_empty());
    }
}

#[test]
fn results_are_followed_where_rows_cannot_be_had() {
    let fake = Fake::new(Shape::Typed);
    fake.job("j", &[7], |last| last);
    let error = Err(fault("no filter", None));
    fake.tables.lock().unwrap().affected.insert(job_path("j").to_string(), error);
    let outcome = fake.host().wait(&job_path("j"), "a test", &CancelToken::new()).unwrap();
    assert!(outcome.affected.is_empty());
}

#[test]
fn warnings_are_kept_each_once() {
    for shape in SHAPES {
        let fake = Fake::new(shape);
        fake.job("j", &[4, 32768], |last| {
            last.with("ErrorDescription", "A disk\r\n was left out.")
                .with("ErrorSummaryDescription", "A disk was left out.")
        });
        let outcome = fake.host().wait(&job_path("j"), "a test", &CancelToken::new()).unwrap();
        assert_eq!(outcome.warnings, ["A disk was left out."]);
        // A warning that is not told is still one.
        let fake = Fake::new(shape);
        fake.job("j", &[32768], |last| last);
        let outcome = fake.host().wait(&job_path("j"), "a test", &CancelToken::new()).unwrap();
        assert_eq!(outcome.warnings.len(), 1);
    }
}

#[test]
fn failures_say_what_the_host_said_and_what_to_do() {
    for shape in SHAPES {
        let fake = Fake::new(shape);
        fake.job("j", &[4, 10], |mut last| {
            last.set("ErrorCode", CimValue::Uint16(32775));
            last.with("ErrorDescription", "The operation cannot be performed.")
        });
        fake.on("GetErrorEx", |_, _| {
            let error = "<INSTANCE CLASSNAME=\"Msvm_Error\"><PROPERTY NAME=\"Message\" TYPE=\"string\">\
                         <VALUE>Checkpoint in progress.</VALUE></PROPERTY></INSTANCE>";
            let parameters = CimInstance::default()
                .with("Errors", CimValue::strings([error, "no XML", "<INSTANCE CLASSNAME=\"E\"/>"]));
            Ok(MethodOutput { parameters, ..done() })
        });
        let error = fake.host().wait(&job_path("j"), "making it", &CancelToken::new());
        let error = error.unwrap_err().to_string();
        for part in ["making it", "cannot be performed", "in progress", "32775", "merging"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        for state in [8, 9] {
            let fake = Fake::new(shape);
            fake.job("j", &[state], |last| last);
            assert!(fake.host().wait(&job_path("j"), "x", &CancelToken::new()).is_err());
        }
        let fake = Fake::new(shape);
        fake.job("j", &[77], |last| last);
        let error = fake.host().wait(&job_path("j"), "x", &CancelToken::new()).unwrap_err();
        assert!(matches!(error, HypervisorError::Protocol { .. }), "{error}");
    }
}

#[test]
fn waiting_ends_at_its_limit_and_its_pauses_grow() {
    let fake = Fake::new(Shape::Typed);
    fake.job("j", &[4], |last| last);
    let clock = Arc::new(TestClock::default());
    let host = fake.host_with(Arc::clone(&clock));
    let error = host.wait(&job_path("j"), "x", &CancelToken::new()).unwrap_err();
    assert!(matches!(error, HypervisorError::Timeout { timeout_ms: 60_000, .. }), "{error}");
    let waited = clock.0.load(Ordering::SeqCst);
    assert!((60_000..62_000).contains(&waited), "{waited}");
}

#[test]
fn a_job_that_is_gone_has_an_unknown_outcome() {
    let fake = Fake::new(Shape::Typed);
    let error = fake.host().wait(&job_path("gone"), "x", &CancelToken::new()).unwrap_err();
    assert!(error.to_string().contains("forgotten"), "{error}");
}

#[test]
fn a_connection_that_fails_now_and_then_is_waited_out() {
    let looks = |count: usize| -> VecDeque<_> { (0..count).map(|_| Err(unreachable())).collect() };
    let fake = Fake::new(Shape::Typed);
    fake.job("j", &[7], |last| last);
    fake.tables.lock().unwrap().looks.insert(job_path("j").to_string(), looks(4));
    assert!(fake.host().wait(&job_path("j"), "x", &CancelToken::new()).is_ok());
    fake.tables.lock().unwrap().looks.insert(job_path("j").to_string(), looks(5));
    let error = fake.host().wait(&job_path("j"), "x", &CancelToken::new()).unwrap_err();
    assert!(matches!(error, HypervisorError::Unreachable { .. }), "{error}");
}

#[test]
fn cancelling_asks_the_host_to_stop_and_waits_for_the_end() {
    let cancel = CancelToken::new();
    cancel.cancel();
    let cancelled =
        |error: HypervisorError| matches!(error, HypervisorError::Block(BlockError::Cancelled));
    // It stops.
    let fake = Fake::new(Shape::Typed);
    fake.job("j", &[4, 6, 8], |last| last);
    fake.on("RequestStateChange", |_, parameters| {
        assert_eq!(parameters[0].1, CimValue::Uint16(4));
        Ok(done())
    });
    assert!(cancelled(fake.host().wait(&job_path("j"), "x", &cancel).unwrap_err()));
    let stops = |fake: &Fake| {
        fake.calls().iter().filter(|call| call.contains("RequestStateChange")).count()
    };
    assert_eq!(stops(&fake), 1);
    // It is too late: what it made must be known.
    let fake = Fake::new(Shape::Typed);
    fake.job("j", &[4, 7], |last| last);
    assert!(fake.host().wait(&job_path("j"), "x", &cancel).is_ok());
    // It does not stop.
    let fake = Fake::new(Shape::Typed);
    fake.job("j", &[4], |last| last);
    assert!(cancelled(fake.host().wait(&job_path("j"), "x", &cancel).unwrap_err()));
    assert_eq!(stops(&fake), 1);
}
