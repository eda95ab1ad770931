//! Changes are asked for by management, and doubtful answers are none.

use crate::support::{Fake, SHAPES, Shape, code, done, fault, started};
use vmtide_block::ByteRange;
use vmtide_cim::{CimInstance, CimType, CimValue, MethodOutput};
use vmtide_hyperv::{ChangePage, ChangesError};

fn list(numbers: &[u64]) -> CimValue {
    CimValue::Array(CimType::Uint64, numbers.iter().map(|n| CimValue::Uint64(*n)).collect())
}

fn answer(processed: u64, offsets: &[u64], lengths: &[u64]) -> MethodOutput {
    let parameters = CimInstance::default()
        .with("ProcessedByteLength", CimValue::Uint64(processed))
        .with("ChangedByteOffsets", list(offsets))
        .with("ChangedByteLengths", list(lengths));
    MethodOutput { parameters, ..done() }
}

fn ask(shape: Shape, output: MethodOutput) -> Result<ChangePage, ChangesError> {
    let fake = Fake::new(shape);
    fake.job("j", &[4, 7], |last| last);
    fake.on("GetVirtualDiskChanges", move |_, parameters| {
        let names: Vec<_> = parameters.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["Path", "LimitId", "TargetSnapshotId", "ByteOffset", "ByteLength"]);
        assert_eq!(parameters[3].1, CimValue::Uint64(1000));
        Ok(output.clone())
    });
    fake.host().virtual_disk_changes(r"C:\a.vhdx", "rctX:1:00000001", ByteRange::new(1000, 1000))
}

#[test]
fn ranges_are_merged_and_cut_to_what_was_asked_for() {
    for shape in SHAPES {
        let page =
            ask(shape, answer(1000, &[1500, 900, 1600, 1990], &[100, 200, 50, 100])).unwrap();
        assert_eq!(page.processed_bytes, 1000);
        assert_eq!(
            page.ranges.as_slice(),
            [ByteRange::new(1000, 100), ByteRange::new(1500, 150), ByteRange::new(1990, 10)]
        );
        let one = ask(shape, answer(10, &[1000], &[10])).unwrap();
        assert_eq!(one.ranges.as_slice(), [ByteRange::new(1000, 10)]);
        let none = ask(shape, answer(0, &[], &[])).unwrap();
        assert!(none.ranges.is_empty() && none.processed_bytes == 0);
    }
}

#[test]
fn what_comes_with_the_start_of_a_job_is_not_its_answer() {
    for shape in SHAPES {
        let mut early = answer(1000, &[], &[]);
        early.return_value = 4096;
        early.parameters.set("Job", started("j").parameters.value("Job").unwrap().clone());
        assert!(matches!(ask(shape, early), Err(ChangesError::Failed(_))));
    }
}

#[test]
fn answers_that_break_their_rules_are_refused() {
    for shape in SHAPES {
        for output in [
            answer(1001, &[], &[]),
            answer(1000, &[1000, 1100], &[10]),
            answer(1000, &[5000], &[10]),
            answer(1000, &[u64::MAX], &[10]),
            done(),
            MethodOutput { return_value: 4096, ..answer(1000, &[], &[]) },
        ] {
            assert!(matches!(ask(shape, output), Err(ChangesError::Failed(_))));
        }
    }
}

#[test]
fn refusals_are_told_apart() {
    let refused = |error: vmtide_cim::CimError| {
        let fake = Fake::new(Shape::Typed);
        fake.on("GetVirtualDiskChanges", move |_, _| Err(error.clone()));
        fake.host().virtual_disk_changes("a", "b", ByteRange::new(0, 1)).unwrap_err()
    };
    let unknown = |error: &ChangesError| matches!(error, ChangesError::UnknownId(_));
    assert!(unknown(&refused(fault("x", Some(0xC03A_0029)))));
    assert!(unknown(&refused(fault("failed ('0xC03A0030').", None))));
    let untracked = refused(fault("failed (0xc03a002a)", None));
    assert!(matches!(untracked, ChangesError::NotTracked(_)), "{untracked}");
    let fake = Fake::new(Shape::Texts);
    fake.job("j", &[10], |last| last.with("ErrorDescription", "Bad id (0xC03A0029)"));
    fake.on("GetVirtualDiskChanges", |_, _| Ok(started("j")));
    let error = fake.host().virtual_disk_changes("a", "b", ByteRange::new(0, 1)).unwrap_err();
    assert!(unknown(&error), "{error}");
    assert!(matches!(ask(Shape::Typed, code(32768)), Err(ChangesError::Failed(_))));
}
