//! Backups of a scripted VM: what is read, what is recorded, and what holds when things fail.

use crate::support;

use std::sync::atomic::Ordering;
use support::{Answer, Recorder, ScriptedHypervisor, TestRepository, content, job, run, run_with};
use vmtide_block::{BlockError, ByteRange, CancelToken, RangeSet};
use vmtide_engine::{BackupSummary, EngineError, LevelChoice};
use vmtide_hypervisor::{Changes, Consistency, DiskId, FullReason, HypervisorError};
use vmtide_repo::{Level, RepoError};

const MIB: usize = 1 << 20;

#[test]
fn the_first_backup_is_full_and_the_next_reads_only_what_changed() {
    let target = TestRepository::new();
    let hypervisor = ScriptedHypervisor::new(&[("d0", 4 * MIB), ("d1", 2 * MIB)]);
    let first = run(&job(&target.repository, &hypervisor)).unwrap();
    assert_eq!((first.level, first.vm.as_str()), (Level::Full, "web"));
    assert_eq!(first.consistency, "crash");
    assert!(first.warnings.is_empty(), "{:?}", first.warnings);
    assert_eq!(first.disks.len(), 2);
    assert!(!first.disks[0].tracking.used);
    assert_eq!(first.disks[0].tracking.reason.as_deref(), Some("first backup of this disk"));

    hypervisor.write(0, 3 << 20, &[9; 65536]);
    let second = run(&job(&target.repository, &hypervisor)).unwrap();
    assert_eq!(second.level, Level::Incremental);
    assert!(second.disks[0].tracking.used && second.disks[1].tracking.used);
    assert_eq!(second.disks[0].counts.read_bytes, 65536);
    assert_eq!(second.disks[1].counts.read_bytes, 0);
    assert_eq!(second.disks[0].tracking.id.as_deref(), Some("moment-1"));
    assert_eq!(hypervisor.calls.counts(), (2, 2, 0));

    let point = target.repository.resolve(&second.point.to_string()).unwrap();
    assert_eq!(point.parent, Some(first.point));
    for disk in &hypervisor.disks {
        let restored = target.repository.open_disk(&point, &disk.id).unwrap();
        assert_eq!(content(restored.as_ref()), disk.device.memory.to_bytes());
    }
    // The bases of the second freeze are those of the first point.
    let requests = hypervisor.calls.requests.lock();
    assert!(requests[0].bases.is_empty());
    let base = &requests[1].bases[&DiskId("d0".into())];
    assert_eq!(base.tracking.as_ref().unwrap().0, "moment-0");
    assert_eq!(base.size_bytes, 4 << 20);
    assert_eq!(requests[0].lineage, requests[1].lineage);
    assert_ne!(requests[0].job, requests[1].job);
}

#[test]
fn a_failed_freeze_leaves_nothing_and_calls_nothing() {
    let target = TestRepository::new();
    let hypervisor = ScriptedHypervisor::new(&[("d0", MIB)]);
    hypervisor.freeze_fails.store(true, Ordering::SeqCst);
    let error = run(&job(&target.repository, &hypervisor)).unwrap_err();
    assert!(matches!(error, EngineError::Hypervisor(HypervisorError::Failed { .. })));
    assert_eq!(hypervisor.calls.counts(), (1, 0, 0));
    assert_eq!(target.points(), 0);
}

#[test]
fn a_read_error_midway_aborts_once_and_leaves_no_point() {
    let target = TestRepository::new();
    let hypervisor = ScriptedHypervisor::new(&[("d0", MIB), ("d1", 8 * MIB)]);
    *hypervisor.disks[1].device.fail_from.lock() = Some(2 << 20);
    let error = run(&job(&target.repository, &hypervisor)).unwrap_err();
    assert!(error.to_string().contains("faulty disk"), "{error}");
    assert_eq!(hypervisor.calls.counts(), (1, 0, 1));
    assert_eq!(target.points(), 0);

    // The next run is as if nothing had been.
    *hypervisor.disks[1].device.fail_from.lock() = None;
    let summary = run(&job(&target.repository, &hypervisor)).unwrap();
    assert_eq!((target.points(), summary.level), (1, Level::Full));
}

#[test]
fn a_failed_abort_does_not_hide_why_the_job_failed() {
    let target = TestRepository::new();
    let hypervisor = ScriptedHypervisor::new(&[("d0", 8 * MIB)]);
    *hypervisor.disks[0].device.fail_from.lock() = Some(0);
    hypervisor.abort_fails.store(true, Ordering::SeqCst);
    let recorder = Recorder::default();
    let error = run_with(&job(&target.repository, &hypervisor), &recorder, &CancelToken::new());
    assert!(error.unwrap_err().to_string().contains("faulty disk"));
    assert_eq!(hypervisor.calls.counts(), (1, 0, 1));
    let warnings = recorder.warnings();
    assert!(warnings.iter().any(|text| text.contains("stand-in is gone")), "{warnings:?}");
}

#[test]
fn a_failed_commit_on_the_platform_is_a_warning_and_the_point_stays() {
    let target = TestRepository::new();
    let hypervisor = ScriptedHypervisor::new(&[("d0", MIB)]);
    hypervisor.commit_fails.store(true, Ordering::SeqCst);
    let summary = run(&job(&target.repository, &hypervisor)).unwrap();
    assert_eq!(hypervisor.calls.counts(), (1, 1, 0));
    assert_eq!(target.points(), 1);
    assert_eq!(summary.warnings.len(), 1);
    assert!(summary.warnings[0].contains("the stand-in lost it"), "{:?}", summary.warnings);
}

#[test]
fn doubt_means_reading_the_disk_in_full_with_the_reason() {
    let target = TestRepository::new();
    let hypervisor = ScriptedHypervisor::new(&[("d0", 4 * MIB), ("d1", MIB)]);
    run(&job(&target.repository, &hypervisor)).unwrap();
    // The guest wrote, but the tracker answers with ranges that cannot be.
    hypervisor.write(0, 0, &[77; 4096]);
    let beyond = RangeSet::from(vec![ByteRange::new(0, (4 << 20) + 1)]);
    *hypervisor.disks[0].answer.lock() = Answer::Say(Changes::Ranges(beyond));
    let summary = run(&job(&target.repository, &hypervisor)).unwrap();
    let disk = &summary.disks[0];
    assert!(!disk.tracking.used);
    assert!(disk.tracking.reason.as_ref().unwrap().contains("in doubt"), "{:?}", disk.tracking);
    assert!(summary.disks[1].tracking.used, "the other disk is not touched by it");
    assert_eq!(summary.warnings.len(), 1, "{:?}", summary.warnings);
    // All data is read, but only what differs is stored.
    assert_eq!(disk.counts.read_bytes, 2 << 20);
    assert!((1..1 << 20).contains(&disk.counts.new_bytes), "{disk:?}");

    let lost = FullReason::TrackingLost("no such bitmap".into());
    *hypervisor.disks[0].answer.lock() = Answer::Say(Changes::Everything(lost));
    let summary = run(&job(&target.repository, &hypervisor)).unwrap();
    assert_eq!(
        summary.disks[0].tracking.reason.as_deref(),
        Some("change tracking lost: no such bitmap")
    );
    let point = target.repository.latest("web").unwrap().unwrap();
    assert_eq!(point.warnings, summary.warnings);
    let restored = target.repository.open_disk(&point, "d0").unwrap();
    assert_eq!(content(restored.as_ref()), hypervisor.disks[0].device.memory.to_bytes());
}

#[test]
fn a_resized_disk_is_read_in_full_whatever_the_tracker_says() {
    let target = TestRepository::new();
    let small = ScriptedHypervisor::new(&[("d0", MIB)]);
    run(&job(&target.repository, &small)).unwrap();
    let large = ScriptedHypervisor::new(&[("d0", 2 * MIB)]);
    *large.disks[0].answer.lock() = Answer::Say(Changes::Ranges(RangeSet::new()));
    let summary = run(&job(&target.repository, &large)).unwrap();
    let reason = summary.disks[0].tracking.reason.clone().unwrap();
    assert!(reason.contains("resized from 1048576 to 2097152"), "{reason}");
    let point = target.repository.latest("web").unwrap().unwrap();
    let restored = target.repository.open_disk(&point, "d0").unwrap();
    assert_eq!(content(restored.as_ref()), large.disks[0].device.memory.to_bytes());
}

#[test]
fn a_named_consistency_is_strict_unless_a_downgrade_is_allowed() {
    let target = TestRepository::new();
    let hypervisor = ScriptedHypervisor::new(&[("d0", MIB)]);
    let mut wanted = job(&target.repository, &hypervisor);
    wanted.consistency = Some(Consistency::Application);
    let error = run(&wanted).unwrap_err();
    assert!(error.to_string().contains("--allow-downgrade"), "{error}");
    assert_eq!((target.points(), hypervisor.calls.counts()), (0, (1, 0, 0)));

    wanted.allow_downgrade = true;
    let summary = run(&wanted).unwrap();
    assert_eq!(summary.consistency, "crash");
    assert_eq!(summary.warnings.len(), 1);
    assert!(summary.warnings[0].contains("crash consistency instead of app"), "{summary:?}");

    // A platform that goes lower without a word is caught, and the VM released.
    wanted.allow_downgrade = false;
    hypervisor.lies_about_consistency.store(true, Ordering::SeqCst);
    let error = run(&wanted).unwrap_err();
    assert!(matches!(
        error,
        EngineError::Hypervisor(HypervisorError::ConsistencyNotReached { .. })
    ));
    assert_eq!((target.points(), hypervisor.calls.counts()), (1, (3, 1, 1)));
}

#[test]
fn a_differential_counts_since_the_last_full_and_reads_since_the_newest() {
    let target = TestRepository::new();
    let hypervisor = ScriptedHypervisor::new(&[("d0", 32 * MIB)]);
    // No two blocks alike: wherever this repository ends its chunks, a change is in few of many.
    let block = |number: u32| number.to_le_bytes().repeat(1024);
    hypervisor.write(0, 0, &(1..=8192).flat_map(block).collect::<Vec<u8>>());
    let mut wanted = job(&target.repository, &hypervisor);
    wanted.level = LevelChoice::Differential;
    let first = run(&wanted).unwrap();
    assert_eq!(first.level, Level::Full);
    assert!(first.warnings[0].contains("no restore point"), "{:?}", first.warnings);

    hypervisor.write(0, 0, &[200; 65536]);
    wanted.level = LevelChoice::Incremental;
    let second = run(&wanted).unwrap();
    hypervisor.write(0, 1 << 20, &[201; 65536]);
    wanted.level = LevelChoice::Differential;
    let third = run(&wanted).unwrap();
    assert_eq!(third.level, Level::Differential);
    assert_eq!(third.disks[0].counts.read_bytes, 65536);
    assert_eq!(third.disks[0].counts.changed_bytes, 2 * 65536);
    let point = target.repository.latest("web").unwrap().unwrap();
    assert_eq!(point.parent, Some(first.point));
    assert_eq!(point.disks[0].counts.changed_bytes, 2 * 65536);
    assert_ne!(point.parent, Some(second.point));

    wanted.level = LevelChoice::Full;
    let fourth = run(&wanted).unwrap();
    assert_eq!(fourth.level, Level::Full);
    assert_eq!(fourth.disks[0].tracking.reason.as_deref(), Some("full backup requested"));
    let new = |summary: &BackupSummary| summary.disks[0].counts.new_bytes;
    assert!(new(&fourth) * 2 < new(&first), "{first:?} {fourth:?}");
}

#[test]
fn an_interrupted_backup_aborts_and_leaves_no_point() {
    let target = TestRepository::new();
    let hypervisor = ScriptedHypervisor::new(&[("d0", 64 * MIB)]);
    let cancel = CancelToken::new();
    *hypervisor.disks[0].device.cancel_on_read.lock() = Some(cancel.clone());
    let error = run_with(&job(&target.repository, &hypervisor), &Recorder::default(), &cancel);
    let error = error.unwrap_err();
    let is_cancelled = matches!(
        error,
        EngineError::Block(BlockError::Cancelled)
            | EngineError::Repo(RepoError::Block(BlockError::Cancelled))
    );
    assert!(is_cancelled, "{error:?}");
    assert_eq!((target.points(), hypervisor.calls.counts()), (0, (1, 0, 1)));
}

#[test]
fn excluded_disks_are_left_out_and_nothing_left_is_an_error() {
    let target = TestRepository::new();
    let hypervisor = ScriptedHypervisor::new(&[("d0", MIB), ("d1", MIB)]);
    let mut wanted = job(&target.repository, &hypervisor);
    wanted.exclude = vec![DiskId("d1".into())];
    let summary = run(&wanted).unwrap();
    assert_eq!(summary.disks.len(), 1);
    wanted.exclude.push(DiskId("d0".into()));
    let error = run(&wanted).unwrap_err();
    assert!(error.to_string().contains("no disk"), "{error}");
    assert_eq!(hypervisor.calls.counts(), (2, 1, 1));
}

#[test]
fn a_disk_that_is_gone_is_a_warning_once() {
    let target = TestRepository::new();
    let two = ScriptedHypervisor::new(&[("d0", MIB), ("d1", MIB)]);
    run(&job(&target.repository, &two)).unwrap();
    let one = ScriptedHypervisor::new(&[("d0", MIB)]);
    let summary = run(&job(&target.repository, &one)).unwrap();
    assert_eq!(summary.warnings.len(), 1, "{:?}", summary.warnings);
    assert!(summary.warnings[0].contains("disk d1"), "{:?}", summary.warnings);
    let summary = run(&job(&target.repository, &one)).unwrap();
    assert!(summary.warnings.is_empty(), "{:?}", summary.warnings);
}

#[test]
fn a_tracker_that_misses_a_write_is_caught_by_samples() {
    let target = TestRepository::new();
    let hypervisor = ScriptedHypervisor::new(&[("d0", MIB)]);
    let mut wanted = job(&target.repository, &hypervisor);
    wanted.check_unchanged = 400;
    run(&wanted).unwrap();
    let told = run(&wanted).unwrap();
    assert!(told.disks[0].tracking.used && told.warnings.is_empty(), "{told:?}");

    hypervisor.write(0, 700_000, &[5; 10]);
    *hypervisor.disks[0].answer.lock() = Answer::Say(Changes::Ranges(RangeSet::new()));
    let summary = run(&wanted).unwrap();
    let reason = summary.disks[0].tracking.reason.clone().unwrap();
    assert!(reason.contains("were not reported"), "{reason}");
    assert_eq!(summary.warnings.len(), 1, "{:?}", summary.warnings);
    let point = target.repository.latest("web").unwrap().unwrap();
    let restored = target.repository.open_disk(&point, "d0").unwrap();
    assert_eq!(content(restored.as_ref()), hypervisor.disks[0].device.memory.to_bytes());
}

#[test]
fn a_moment_that_did_not_hold_is_no_restore_point() {
    let target = TestRepository::new();
    let hypervisor = ScriptedHypervisor::new(&[("d0", MIB)]);
    hypervisor.check_fails.store(true, Ordering::SeqCst);
    let error = run(&job(&target.repository, &hypervisor)).unwrap_err();
    assert!(error.to_string().contains("scratch space"), "{error}");
    assert_eq!((target.points(), hypervisor.calls.counts()), (0, (1, 0, 1)));
}

#[test]
fn an_exclusion_of_no_disk_is_a_warning() {
    let target = TestRepository::new();
    let hypervisor = ScriptedHypervisor::new(&[("d0", MIB)]);
    let mut wanted = job(&target.repository, &hypervisor);
    wanted.exclude = vec![DiskId("d9".into())];
    let summary = run(&wanted).unwrap();
    assert_eq!(summary.warnings.len(), 1, "{:?}", summary.warnings);
    let text = &summary.warnings[0];
    assert!(text.contains("d9") && text.contains("d0"), "{text}");
}

#[test]
fn ranges_from_outside_count_from_the_newest_point_of_the_same_source_only() {
    let target = TestRepository::new();
    let hypervisor = ScriptedHypervisor::new(&[("d0", MIB)]);
    let mut wanted = job(&target.repository, &hypervisor);
    wanted.outside_changes = true;
    run(&wanted).unwrap();
    assert!(run(&wanted).unwrap().disks[0].tracking.used);

    wanted.source = "another".into();
    let newest = run(&wanted).unwrap();
    let reason = newest.disks[0].tracking.reason.clone().unwrap();
    assert!(reason.contains("another source, stand-in"), "{reason}");
    assert!(run(&wanted).unwrap().disks[0].tracking.used);

    // The unreadable one may be the newest: ranges since then say nothing of what was before.
    let newest = run(&wanted).unwrap();
    target.damage_point(newest.point);
    let summary = run(&wanted).unwrap();
    let reason = summary.disks[0].tracking.reason.clone().unwrap();
    assert!(reason.contains("cannot be read"), "{reason}");
    assert!(summary.warnings[0].contains("vmtide verify"), "{:?}", summary.warnings);
    // Tracking that knows its moment is not in doubt; the user is told all the same.
    wanted.outside_changes = false;
    let summary = run(&wanted).unwrap();
    assert!(summary.disks[0].tracking.used);
    assert_eq!(summary.warnings.len(), 1, "{:?}", summary.warnings);
}

#[test]
fn the_latest_is_not_guessed_while_a_point_is_unreadable() {
    let target = TestRepository::new();
    let hypervisor = ScriptedHypervisor::new(&[("d0", MIB)]);
    let first = run(&job(&target.repository, &hypervisor)).unwrap().point;
    let second = run(&job(&target.repository, &hypervisor)).unwrap().point;
    let resolve = |spec: &str| vmtide_engine::resolve(&target.repository, spec);
    assert_eq!(resolve("web@latest").unwrap().id, second);
    target.damage_point(second);
    for spec in ["web@latest", "web", "web@2100-01-01", &second.to_string()] {
        let error = resolve(spec).unwrap_err();
        assert!(matches!(error, EngineError::Repo(RepoError::Damaged { .. })), "{spec}: {error}");
    }
    assert!(resolve("web").unwrap_err().to_string().contains("by its id"));
    assert_eq!(resolve(&first.to_string()).unwrap().id, first);
    assert_eq!(resolve(&first.to_string()[..8].to_uppercase()).unwrap().id, first);
}

#[test]
fn a_damaged_base_is_read_past_with_a_full_backup() {
    let target = TestRepository::new();
    let hypervisor = ScriptedHypervisor::new(&[("d0", 4 * MIB)]);
    hypervisor.write(0, 0, &[7; MIB]);
    run(&job(&target.repository, &hypervisor)).unwrap();
    target.damage_maps();
    let summary = run(&job(&target.repository, &hypervisor)).unwrap();
    assert_eq!(summary.level, Level::Full);
    assert!(summary.warnings.iter().any(|warning| warning.contains("is damaged")));
    let point = target.repository.resolve(&summary.point.to_string()).unwrap();
    let restored = target.repository.open_disk(&point, "d0").unwrap();
    assert_eq!(content(restored.as_ref()), hypervisor.disks[0].device.memory.to_bytes());
}

#[test]
fn data_found_lost_while_a_backup_runs_is_read_again_and_told() {
    let target = TestRepository::new();
    let hypervisor = ScriptedHypervisor::new(&[("d0", 4 * MIB)]);
    let words = u32::try_from(3 * MIB / 4).unwrap();
    let data: Vec<u8> = (0..words).flat_map(scrambled).collect();
    hypervisor.write(0, 0, &data);
    run(&job(&target.repository, &hypervisor)).unwrap();
    std::fs::remove_dir_all(target.path("repository/packs")).unwrap();
    // The same bytes: written, and known by the index, which leads to what is lost.
    hypervisor.write(0, MIB as u64, &data[MIB..2 * MIB]);
    let summary = run(&job(&target.repository, &hypervisor)).unwrap();
    assert_eq!(summary.level, Level::Incremental);
    let is_told = summary.warnings.iter().any(|warning| warning.contains("were read again"));
    assert!(is_told || summary.healed_bytes >= 2 * MIB as u64, "{summary:?}");
    let point = target.repository.resolve(&summary.point.to_string()).unwrap();
    let restored = target.repository.open_disk(&point, "d0").unwrap();
    assert_eq!(content(restored.as_ref()), hypervisor.disks[0].device.memory.to_bytes());
}

/// Four bytes that do not repeat.
fn scrambled(number: u32) -> [u8; 4] {
    number.wrapping_mul(0x9e37_79b1).rotate_left(number % 31).to_le_bytes()
}
