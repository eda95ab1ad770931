//! Restores to every kind of target, and what is never overwritten.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests: a failed unwrap is a failed test"
)]

use crate::support;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use support::{ScriptedHypervisor, TestRepository, content, job, run};
use vmtide_block::{CancelToken, Progress};
use vmtide_engine::{
    EngineError, JobContext, RestoreJob, RestoreSummary, RestoreTarget, Result, Silent, restore,
};
use vmtide_image::Format;
use vmtide_repo::RestorePoint;

const MIB: usize = 1 << 20;

fn backed_up(disks: &[(&str, usize)]) -> (TestRepository, ScriptedHypervisor, RestorePoint) {
    let target = TestRepository::new();
    let hypervisor = ScriptedHypervisor::new(disks);
    run(&job(&target.repository, &hypervisor)).unwrap();
    let point = target.repository.latest("web").unwrap().unwrap();
    (target, hypervisor, point)
}

fn restore_to<'a>(
    source: &'a TestRepository,
    point: &'a RestorePoint,
    to: &Path,
) -> RestoreJob<'a> {
    RestoreJob {
        repository: &source.repository,
        point,
        target: RestoreTarget::parse(to.to_str().unwrap()).unwrap(),
        disk: None,
        format: None,
        subformat: None,
        in_place: false,
        force: false,
        workers: Some(2),
        salvage: false,
    }
}

fn go(job: &RestoreJob<'_>, cancel: &CancelToken) -> Result<RestoreSummary> {
    let progress = Progress::new();
    restore(job, JobContext { progress: &progress, cancel, observer: &Silent })
}

#[test]
fn one_disk_goes_to_a_sparse_file_that_is_never_half_there() {
    let (source, hypervisor, point) = backed_up(&[("d0", 8 * MIB)]);
    let file = source.path("disk.raw");
    let cancel = CancelToken::new();
    cancel.cancel();
    assert!(go(&restore_to(&source, &point, &file), &cancel).is_err());
    let entries: Vec<_> = std::fs::read_dir(source.directory.path()).unwrap().collect();
    assert_eq!(entries.len(), 1, "only the repository is left: {entries:?}");

    let summary = go(&restore_to(&source, &point, &file), &CancelToken::new()).unwrap();
    let expected = hypervisor.disks[0].device.memory.to_bytes();
    assert_eq!(std::fs::read(&file).unwrap(), expected);
    assert_eq!(summary.disks[0].written_bytes, 4 << 20);
    assert_eq!(summary.disks[0].path, file.display().to_string());
    assert!(std::fs::metadata(&file).unwrap().blocks() * 512 <= 5 << 20, "not sparse");
}

#[test]
fn what_exists_is_only_touched_when_told_how() {
    let (source, hypervisor, point) = backed_up(&[("d0", MIB)]);
    let file = source.path("disk.raw");
    std::fs::write(&file, b"precious").unwrap();
    let mut wanted = restore_to(&source, &point, &file);
    let error = go(&wanted, &CancelToken::new()).unwrap_err();
    assert!(matches!(error, EngineError::Refused { .. }), "{error:?}");
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");

    wanted.force = true;
    go(&wanted, &CancelToken::new()).unwrap();
    let expected = hypervisor.disks[0].device.memory.to_bytes();
    assert_eq!(std::fs::read(&file).unwrap(), expected);

    // In place: one damaged grain is written, nothing else.
    let mut damaged = expected.clone();
    damaged[300_000] ^= 1;
    std::fs::write(&file, &damaged).unwrap();
    wanted.force = false;
    wanted.in_place = true;
    let summary = go(&wanted, &CancelToken::new()).unwrap();
    assert_eq!(std::fs::read(&file).unwrap(), expected);
    assert_eq!(summary.disks[0].written_bytes, 65536);
    assert_eq!(go(&wanted, &CancelToken::new()).unwrap().disks[0].written_bytes, 0);

    // A longer file gets the disk's size.
    std::fs::write(&file, vec![5; 2 * MIB]).unwrap();
    go(&wanted, &CancelToken::new()).unwrap();
    assert_eq!(std::fs::read(&file).unwrap(), expected);
}

#[test]
fn several_disks_go_to_a_directory_with_the_configuration() {
    let (source, hypervisor, point) = backed_up(&[("d0", MIB), ("a/b", 2 * MIB)]);
    let directory = source.path("out");
    let mut wanted = restore_to(&source, &point, &directory);
    wanted.format = Some(Format::Qcow2);
    let summary = go(&wanted, &CancelToken::new()).unwrap();
    let names: Vec<_> = summary.disks.iter().map(|disk| disk.path.clone()).collect();
    assert!(names[0].ends_with("out/web-d0.qcow2"), "{names:?}");
    assert!(names[1].ends_with("out/web-a_b.qcow2"), "{names:?}");
    for (name, disk) in names.iter().zip(&hypervisor.disks) {
        let image =
            vmtide_image::open_read_only(name, &vmtide_image::OpenOptions::default()).unwrap();
        assert_eq!(content(image.as_ref()), disk.device.memory.to_bytes());
    }
    let config = std::fs::read_to_string(directory.join("vm-config.json")).unwrap();
    assert!(config.contains("\"stand-in\""), "{config}");

    let one = source.path("one.raw");
    let mut wanted = restore_to(&source, &point, &one);
    wanted.disk = Some("1".into());
    go(&wanted, &CancelToken::new()).unwrap();
    assert_eq!(std::fs::read(&one).unwrap(), hypervisor.disks[1].device.memory.to_bytes());
    wanted.disk = Some("d7".into());
    let error = go(&wanted, &CancelToken::new()).unwrap_err();
    assert!(matches!(error, EngineError::NotFound { .. }), "{error:?}");
    assert!(error.to_string().contains("d0, a/b"), "{error}");
}

#[test]
fn what_a_format_does_not_have_is_refused_before_anything_is_made() {
    let (source, _, point) = backed_up(&[("d0", MIB)]);
    let file = source.path("disk.vhdx");
    let mut wanted = restore_to(&source, &point, &file);
    wanted.subformat = Some("streamOptimized".into());
    let error = go(&wanted, &CancelToken::new()).unwrap_err();
    assert!(error.to_string().contains("no subformat of vhdx"), "{error}");
    let made = std::fs::read_dir(file.parent().unwrap()).unwrap();
    let names: Vec<_> = made.map(|entry| entry.unwrap().file_name()).collect();
    assert!(!names.iter().any(|name| name.to_string_lossy().contains("disk.vhdx")), "{names:?}");
    let error = RestoreTarget::parse("s3://bucket/x").unwrap_err();
    assert!(matches!(error, EngineError::Usage(_)), "{error:?}");
}

#[test]
fn an_overwrite_that_fails_says_what_it_left() {
    let (source, _, point) = backed_up(&[("d0", 8 * MIB)]);
    let file = source.path("disk.raw");
    std::fs::write(&file, vec![9; 8 * MIB]).unwrap();
    let mut wanted = restore_to(&source, &point, &file);
    wanted.in_place = true;
    let cancel = CancelToken::new();
    cancel.cancel();
    let error = go(&wanted, &cancel).unwrap_err();
    assert!(matches!(error, EngineError::Incomplete { .. }), "{error:?}");
    assert!(error.to_string().contains("disk.raw is incomplete now"), "{error}");
}

#[test]
fn what_is_restored_is_its_owners_alone() {
    let (source, _, point) = backed_up(&[("d0", MIB)]);
    let directory = source.path("out/");
    go(&restore_to(&source, &point, &directory), &CancelToken::new()).unwrap();
    for name in ["web-d0.raw", "vm-config.json"] {
        let mode = std::fs::metadata(directory.join(name)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}
