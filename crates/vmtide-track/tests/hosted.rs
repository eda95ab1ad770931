//! Images on disk with the files beside them: hosted, asked about over the socket, offline, frozen.

#![cfg(unix)]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a failed unwrap is a failed test, and the numbers here are small"
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmtide_block::{BlockDevice, ByteRange, WritableBlockDevice, all_extents};
use vmtide_image::{CreateOptions, Format, OpenOptions, create_image, open_read_only};
use vmtide_track::{
    HostOptions, HostedImage, Options, RemoteHost, TrackError, TrackedImage,
    before_untracked_write, freeze_images, socket_path,
};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;

fn image(directory: &Path, name: &str, format: Format) -> PathBuf {
    let path = directory.join(name);
    create_image(&path, &CreateOptions::new(format, SIZE)).unwrap().finish().unwrap();
    path
}

fn host(path: &Path, tracking: Options) -> Arc<HostedImage> {
    HostedImage::open(
        path,
        &OpenOptions::default(),
        &HostOptions { tracking, ..HostOptions::default() },
    )
    .unwrap()
}

fn on() -> Options {
    Options { enable: true, ..Options::default() }
}

fn changes(path: &Path, id: &str) -> vmtide_track::Result<Vec<ByteRange>> {
    let image = TrackedImage::connect_or_open(path)?;
    Ok(image.changes_since(id, ByteRange::new(0, SIZE), 1000)?.ranges)
}

fn blocks(ranges: &[(u64, u64)]) -> Vec<ByteRange> {
    ranges.iter().map(|(first, count)| ByteRange::new(first << 16, count << 16)).collect()
}

#[test]
fn images_of_every_format_are_tracked_through_stops_and_crashes() {
    let directory = tempfile::tempdir().unwrap();
    for (name, format) in [
        ("a.raw", Format::Raw),
        ("a.vhdx", Format::Vhdx),
        ("a.vhd", Format::Vhd),
        ("a.qcow2", Format::Qcow2),
        ("a.vmdk", Format::Vmdk),
    ] {
        let path = image(directory.path(), name, format);
        let hosted = host(&path, on());
        let first = hosted.disk().state().most_recent_id;
        hosted.disk().write_at(&[1; 100], 3 << 16).unwrap();
        let second = hosted.disk().checkpoint().unwrap().to_string();
        hosted.disk().write_zeroes(ByteRange::new(5 << 16, 2 << 16)).unwrap();
        assert!(socket_path(&path).exists());
        assert_eq!(changes(&path, &first).unwrap(), blocks(&[(3, 1), (5, 2)]), "{name}: hosted");
        hosted.close().unwrap();
        drop(hosted);
        assert!(!socket_path(&path).exists());
        assert_eq!(changes(&path, &first).unwrap(), blocks(&[(3, 1), (5, 2)]), "{name}: offline");
        assert_eq!(changes(&path, &second).unwrap(), blocks(&[(5, 2)]), "{name}");
        // A crash: the process ends without closing. Its lock and its socket go with it.
        let hosted = host(&path, Options::default());
        hosted.disk().write_at(&[2; 1], 0).unwrap();
        hosted.disk().flush().unwrap();
        crash(hosted);
        let changed = changes(&path, &second).unwrap();
        assert_eq!(changed, [ByteRange::new(0, SIZE)], "{name}: the region of 16 MiB");
        let hosted = host(&path, Options::default());
        assert_eq!(changes(&path, &second).unwrap(), changed, "{name}: hosted again");
        let third = hosted.disk().checkpoint().unwrap().to_string();
        drop(hosted);
        assert!(changes(&path, &third).unwrap().is_empty(), "{name}");
        let garbage = "z".repeat(255);
        assert!(matches!(changes(&path, &garbage), Err(TrackError::UnknownId { .. })));
    }
}

/// What is left when a process that hosts an image is killed: in one process that is a copy of the files, put in the place of
/// what the orderly end writes.
fn crash(hosted: Arc<HostedImage>) {
    let path = hosted.path().to_owned();
    let all: Vec<_> = ["", ".rct", ".mrt"]
        .iter()
        .map(|suffix| {
            let file = PathBuf::from(format!("{}{suffix}", path.display()));
            let bytes = std::fs::read(&file).unwrap();
            (file, bytes)
        })
        .collect();
    drop(hosted);
    for (file, bytes) in all {
        // In place: the image stays the same file.
        std::fs::write(file, bytes).unwrap();
    }
}

#[test]
fn an_image_has_one_host_and_nobody_else_writes_to_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), "disk.raw", Format::Raw);
    let hosted = host(&path, on());
    let again = HostedImage::open(&path, &OpenOptions::default(), &HostOptions::default());
    assert!(matches!(again, Err(TrackError::InUse { .. })));
    let output = std::process::Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write 0 512"])
        .arg(&path)
        .output()
        .expect("qemu-io is needed: install qemu-utils (scripts/test.sh does)");
    assert!(!output.status.success(), "{output:?}");
    drop(hosted);
    // A killed host's socket is in nobody's way.
    drop(std::os::unix::net::UnixListener::bind(socket_path(&path)).unwrap());
    assert!(matches!(TrackedImage::connect_or_open(&path).unwrap(), TrackedImage::Offline(_)));
    let hosted = host(&path, on());
    assert!(RemoteHost::connect(&path).unwrap().is_some());
    drop(hosted);
    let block_device_or_directory =
        HostedImage::open(directory.path(), &OpenOptions::default(), &HostOptions::default());
    assert!(block_device_or_directory.is_err());
}

#[test]
fn a_long_path_has_a_socket_too() {
    let directory = tempfile::tempdir().unwrap();
    let deep = directory.path().join("d".repeat(90)).join("e".repeat(90));
    std::fs::create_dir_all(&deep).unwrap();
    let path = image(&deep, "disk.raw", Format::Raw);
    let hosted = host(&path, on());
    let remote = RemoteHost::connect(&path).unwrap().unwrap();
    assert_eq!(remote.state().unwrap(), hosted.disk().state());
}

#[test]
fn offline_tracking_is_switched_sealed_and_lost() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), "disk.vhdx", Format::Vhdx);
    let open = || TrackedImage::connect_or_open(&path).unwrap();
    assert!(!open().state().unwrap().enabled);
    assert!(matches!(open().checkpoint(), Err(TrackError::Disabled { .. })));
    assert!(matches!(changes(&path, "x"), Err(TrackError::Disabled { .. })));
    open().set_enabled(true).unwrap();
    let first = open().state().unwrap();
    assert!(first.enabled && !first.newer_changes);
    open().set_enabled(true).unwrap();
    assert_eq!(open().state().unwrap(), first);
    let second = open().checkpoint().unwrap();
    assert!(second > first.most_recent_id);
    assert!(changes(&path, &first.most_recent_id).unwrap().is_empty());
    let hosted = host(&path, Options::default());
    hosted.disk().write_at(&[1; 512], 512).unwrap();
    drop(hosted);
    assert_eq!(changes(&path, &second).unwrap(), blocks(&[(0, 1)]));
    assert!(open().state().unwrap().newer_changes);
    // Somebody writes to the image who does not track.
    let writer = vmtide_image::open_writable(&path, &OpenOptions::default()).unwrap();
    writer.write_at(&[2; 512], 4 * MIB).unwrap();
    writer.finish().unwrap();
    drop(writer);
    assert!(matches!(changes(&path, &second), Err(TrackError::Lost { .. })));
    assert!(!open().state().unwrap().enabled, "what cannot be relied on is not on");
    assert!(matches!(open().checkpoint(), Err(TrackError::Lost { .. })));
    open().set_enabled(true).unwrap();
    assert!(open().state().unwrap().enabled);
    assert!(matches!(changes(&path, &second), Err(TrackError::Lost { .. })), "the reason is kept");
    open().set_enabled(false).unwrap();
    assert!(!open().state().unwrap().enabled);
    let left: Vec<_> = std::fs::read_dir(directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["disk.vhdx"]);
}

#[test]
fn a_host_is_asked_over_its_socket() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), "disk.qcow2", Format::Qcow2);
    let hosted = host(&path, Options::default());
    let remote = || RemoteHost::connect(&path).unwrap().unwrap();
    assert!(!remote().state().unwrap().enabled);
    assert!(matches!(remote().checkpoint(), Err(TrackError::Disabled { .. })));
    remote().set_enabled(true).unwrap();
    let id = remote().checkpoint().unwrap();
    assert_eq!(remote().state().unwrap().most_recent_id, id);
    hosted.disk().write_at(&[7; 1000], MIB - 500).unwrap();
    hosted.disk().write_at(&[7; 1], 3 * MIB).unwrap();
    let page = remote().changes_since(&id, ByteRange::new(0, SIZE), 1).unwrap();
    assert_eq!((page.ranges, page.processed_bytes), (blocks(&[(15, 2)]), 3 * MIB));
    let bad = remote().changes_since(&id, ByteRange::new(SIZE, 1), 1);
    assert!(matches!(bad, Err(TrackError::Io { .. })), "{bad:?}");
    assert!(matches!(
        remote().changes_since("no", ByteRange::new(0, 1), 1),
        Err(TrackError::UnknownId { .. })
    ));
    let live = remote().open().unwrap();
    let mut seen = vec![0; 1001];
    live.read_at(&mut seen, MIB - 500).unwrap();
    assert!(seen[..1000] == [7; 1000] && seen[1000] == 0);
    assert_eq!(all_extents(&live).unwrap(), all_extents(&**hosted.disk()).unwrap());
    // Many readers at once share a few connections.
    std::thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| {
                let mut all = vec![0; SIZE as usize];
                live.read_at(&mut all, 0).unwrap();
                assert_eq!(all[MIB as usize], 7);
            });
        }
    });
    remote().set_enabled(false).unwrap();
    assert!(!hosted.disk().state().enabled);
    hosted.close().unwrap();
    assert!(live.read_at(&mut [0], 0).is_err(), "its host has gone");
}

#[test]
fn garbage_on_the_socket_harms_nobody() {
    use std::io::{Read, Write};
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), "disk.raw", Format::Raw);
    let hosted = host(&path, on());
    let mut waiting = Vec::new();
    for bytes in [
        &b"\0\0\0\0\n"[..],
        b"{\"read\":{\"offset\":0,\"length\":4294967295}}\n",
        b"\"resume\"\n",
        b"no line feed",
        &[b'x'; 100_000],
    ] {
        let mut stream = std::os::unix::net::UnixStream::connect(socket_path(&path)).unwrap();
        // The host may hang up before it has all of it.
        let _ = stream.write_all(bytes);
        waiting.push(stream);
    }
    // One that freezes, holds the writes, and goes.
    let mut stream = std::os::unix::net::UnixStream::connect(socket_path(&path)).unwrap();
    stream.write_all(b"{\"freeze\":{\"hold\":true}}\n").unwrap();
    let mut done = [0; 7];
    stream.read_exact(&mut done).unwrap();
    assert_eq!(&done, b"\"done\"\n");
    drop(stream);
    hosted.disk().write_at(&[1], 0).unwrap();
    assert!(RemoteHost::connect(&path).unwrap().unwrap().state().unwrap().enabled);
    // So many callers at once are not taken; when some go, others are.
    let crowd: Vec<_> = (0..80)
        .filter_map(|_| std::os::unix::net::UnixStream::connect(socket_path(&path)).ok())
        .collect();
    hosted.disk().write_at(&[2], 0).unwrap();
    drop((crowd, waiting));
    let begun = std::time::Instant::now();
    while RemoteHost::connect(&path).unwrap().is_none_or(|remote| remote.state().is_err()) {
        assert!(begun.elapsed().as_secs() < 60);
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn a_frozen_view_stays_as_it_was_while_the_guest_writes() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), "disk.raw", Format::Raw);
    let hosted = host(&path, on());
    let disk = hosted.disk();
    disk.write_at(&vec![3; 4 * MIB as usize], MIB).unwrap();
    let read = |device: &dyn BlockDevice| {
        let mut all = vec![0; SIZE as usize];
        device.read_at(&mut all, 0).unwrap();
        all
    };
    let then = read(&**disk);
    let extents = all_extents(&**disk).unwrap();
    let view = disk.freeze().unwrap();
    assert_eq!(all_extents(&view).unwrap(), extents);
    std::thread::scope(|scope| {
        for worker in 0..3u64 {
            let view = &view;
            let then = &then;
            scope.spawn(move || {
                for round in 0..40u64 {
                    let at = (round * 7919 + worker * 104_729) * 1021 % (SIZE - 100_000);
                    disk.write_at(&vec![9; (round * 2000 + 1) as usize], at).unwrap();
                    if round % 8 == 0 {
                        assert!(read(view) == *then);
                    }
                }
            });
        }
    });
    disk.write_zeroes(ByteRange::new(0, SIZE)).unwrap();
    assert!(read(&view) == then);
    let mut sum = Vec::new();
    for extent in all_extents(&view).unwrap() {
        let mut bytes = vec![0; extent.range.length as usize];
        view.read_at(&mut bytes, extent.range.offset).unwrap();
        assert!(!extent.kind.reads_as_zero() || bytes.iter().all(|byte| *byte == 0));
        sum.extend(bytes);
    }
    assert!(sum == then);
    let id = view.id().unwrap().to_string();
    drop(view);
    assert_eq!(changes(&path, &id).unwrap(), [ByteRange::new(0, SIZE)]);
}

#[test]
fn a_full_scratch_file_ends_the_view_and_not_the_guest() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), "disk.raw", Format::Raw);
    let hosted = host(
        &path,
        Options {
            scratch_limit_bytes: 100_000,
            scratch_directory: Some(directory.path().into()),
            ..on()
        },
    );
    let disk = hosted.disk();
    disk.write_at(&vec![1; SIZE as usize], 0).unwrap();
    let view = disk.freeze().unwrap();
    let mut byte = [0];
    disk.write_at(&[2], 0).unwrap();
    view.read_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [1]);
    disk.write_at(&[2], MIB).unwrap();
    let error = view.read_at(&mut byte, MIB).unwrap_err();
    assert!(error.to_string().contains("freeze it again"), "{error}");
    assert!(
        view.read_at(&mut byte, 5 * MIB).is_err() && view.extents(ByteRange::new(0, SIZE)).is_err()
    );
    disk.read_at(&mut byte, MIB).unwrap();
    assert_eq!(byte, [2]);
    drop(view);
    let view = disk.freeze().unwrap();
    view.read_at(&mut byte, MIB).unwrap();
    hosted.close().unwrap();
    assert!(view.read_at(&mut byte, MIB).is_err(), "the disk was closed");
    let names: Vec<_> = std::fs::read_dir(directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(names.iter().all(|name| !name.to_string_lossy().contains("scratch")), "{names:?}");
}

#[test]
fn several_images_are_frozen_at_one_moment() {
    let directory = tempfile::tempdir().unwrap();
    let one = image(directory.path(), "one.raw", Format::Raw);
    let two = image(directory.path(), "two.vhdx", Format::Vhdx);
    let three = image(directory.path(), "three.raw", Format::Raw);
    let hosts = [host(&one, on()), host(&two, on())];
    TrackedImage::connect_or_open(&three).unwrap().set_enabled(true).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let open = |path: &Path| Ok(open_read_only(path, &OpenOptions::default())?);
    std::thread::scope(|scope| {
        // A guest that writes a number to the first disk, then to the second one.
        scope.spawn(|| {
            for number in 1u64.. {
                for hosted in &hosts {
                    hosted.disk().write_at(&number.to_le_bytes(), 4096).unwrap();
                }
                if stop.load(std::sync::atomic::Ordering::Relaxed) {
                    return;
                }
            }
        });
        for _ in 0..10 {
            let moment = freeze_images(&[two.clone(), three.clone(), one.clone()], &open).unwrap();
            let read = |index: usize| {
                let mut number = [0; 8];
                moment[index].device.read_at(&mut number, 4096).unwrap();
                u64::from_le_bytes(number)
            };
            let (second, first) = (read(0), read(2));
            assert!(first == second || first == second + 1, "{first} {second}");
            assert_eq!((read(0), read(2), read(1)), (second, first, 0));
            assert!(moment.iter().all(|image| image.tracking_id.is_some()));
            assert_eq!(moment[1].path, three);
            // Nobody may write to the one that nobody hosts while it is frozen.
            let third = HostedImage::open(&three, &OpenOptions::default(), &HostOptions::default());
            assert!(matches!(third, Err(TrackError::InUse { .. })));
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    drop(host(&three, Options::default()));
    let missing = freeze_images(&[one, directory.path().join("none.raw")], &open);
    assert!(missing.is_err());
    hosts[0].disk().write_at(&[1], 0).unwrap();
}

#[test]
fn an_image_that_is_restored_after_a_crash_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), "disk.raw", Format::Raw);
    let crashed = |path: &Path| {
        let hosted = host(path, on());
        let id = hosted.disk().state().most_recent_id;
        hosted.disk().write_at(&[1], 0).unwrap();
        crash(hosted);
        assert_eq!(changes(path, &id).unwrap(), [ByteRange::new(0, SIZE)]);
        id
    };
    let lost = |id: &str| match changes(&path, id) {
        Err(TrackError::Lost { reason, .. }) => reason,
        other => panic!("{other:?}"),
    };
    // In place, an hour later.
    let id = crashed(&path);
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(3600);
    std::fs::File::options().write(true).open(&path).unwrap().set_modified(later).unwrap();
    assert!(lost(&id).contains("long after"), "{}", lost(&id));
    drop(host(&path, on()));
    // By another file, whatever its inode.
    let id = crashed(&path);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, bytes).unwrap();
    assert!(lost(&id).contains("replaced or copied"), "{}", lost(&id));
    drop(host(&path, on()));
    // By one of vmtide's own commands that do not track.
    let id = crashed(&path);
    before_untracked_write(&path).unwrap();
    assert!(matches!(changes(&path, &id), Err(TrackError::Disabled { .. })));
    let link = directory.path().join("link.raw");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    drop(host(&link, on()));
    assert!(
        TrackedImage::connect_or_open(&path).unwrap().state().unwrap().enabled,
        "one set of files"
    );
    before_untracked_write(&path).unwrap();
    assert!(
        TrackedImage::connect_or_open(&path).unwrap().state().unwrap().enabled,
        "closed in order"
    );
}

#[test]
fn one_image_by_two_names_is_frozen_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), "disk.raw", Format::Raw);
    let rest = image(directory.path(), "rest.raw", Format::Raw);
    TrackedImage::connect_or_open(&rest).unwrap().set_enabled(true).unwrap();
    let link = |to: &Path, name: &str| {
        let link = directory.path().join(name);
        std::os::unix::fs::symlink(to, &link).unwrap();
        link
    };
    let (linked, rest_linked) = (link(&path, "a.raw"), link(&rest, "z.raw"));
    let hosted = host(&path, on());
    hosted.disk().write_at(&[4; 512], 0).unwrap();
    let open = |path: &Path| Ok(open_read_only(path, &OpenOptions::default())?);
    let paths = [path.clone(), rest_linked, linked, path, rest];
    // A second hold would wait for the first until that is given up, and the whole fail.
    let moment = freeze_images(&paths, &open).unwrap();
    assert!(moment.iter().map(|image| &image.path).eq(&paths));
    let ids: Vec<_> = moment.iter().map(|image| image.tracking_id.clone().unwrap()).collect();
    assert!(
        ids[0] == ids[2] && ids[0] == ids[3] && ids[1] == ids[4] && ids[0] != ids[1],
        "{ids:?}"
    );
    hosted.disk().write_at(&[5; 512], 0).unwrap();
    for index in [0, 2, 3] {
        let mut byte = [0];
        moment[index].device.read_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [4]);
    }
}

#[test]
fn images_at_rest_are_frozen_before_any_writes_are_held() {
    let directory = tempfile::tempdir().unwrap();
    let running = image(directory.path(), "a.raw", Format::Raw);
    let rest = image(directory.path(), "b.raw", Format::Raw);
    let hosted = host(&running, on());
    let open = |path: &Path| {
        // Writes go on while an image at rest is opened.
        hosted.disk().write_at(&[1; 512], 0)?;
        Ok(open_read_only(path, &OpenOptions::default())?)
    };
    assert_eq!(freeze_images(&[running, rest], &open).unwrap().len(), 2);
}

#[test]
fn what_is_done_to_an_image_at_rest_retires_no_ids() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), "disk.raw", Format::Raw);
    let hosted = host(&path, Options { max_ids: 200, ..on() });
    let first = hosted.disk().state().most_recent_id;
    for _ in 0..50 {
        hosted.disk().checkpoint().unwrap();
    }
    hosted.disk().write_at(&[1; 512], 0).unwrap();
    drop(hosted);
    let open = |path: &Path| Ok(open_read_only(path, &OpenOptions::default())?);
    let frozen = || {
        let moment = freeze_images(std::slice::from_ref(&path), &open).unwrap();
        moment[0].tracking_id.clone().unwrap()
    };
    let id = frozen();
    assert_eq!(frozen(), id, "nothing was written since");
    assert_eq!(changes(&path, &first).unwrap(), blocks(&[(0, 1)]));
    let sealed = TrackedImage::connect_or_open(&path).unwrap().checkpoint().unwrap();
    assert!(sealed > id);
    assert_eq!(changes(&path, &first).unwrap(), blocks(&[(0, 1)]));
}

#[test]
fn the_files_that_hyper_v_keeps_beside_an_image_are_not_touched() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), "disk.vhdx", Format::Vhdx);
    let beside = |suffix: &str| PathBuf::from(format!("{}.{suffix}", path.display()));
    let theirs = [(beside("rct"), vec![0xa5; 4096]), (beside("mrt"), b"theirs".to_vec())];
    for (file, bytes) in &theirs {
        std::fs::write(file, bytes).unwrap();
    }
    let tracking = || TrackedImage::connect_or_open(&path).unwrap();
    assert!(!tracking().state().unwrap().enabled);
    assert!(matches!(changes(&path, "rctX:"), Err(TrackError::Disabled { .. })));
    for refused in [
        tracking().set_enabled(true),
        tracking().set_enabled(false),
        tracking().checkpoint().map(drop),
        HostedImage::open(
            &path,
            &OpenOptions::default(),
            &HostOptions { tracking: on(), ..HostOptions::default() },
        )
        .map(drop),
    ] {
        let error = refused.unwrap_err();
        assert!(matches!(error, TrackError::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains("another program's"), "{error}");
    }
    let open = |path: &Path| Ok(open_read_only(path, &OpenOptions::default())?);
    let frozen = freeze_images(std::slice::from_ref(&path), &open).unwrap();
    assert_eq!(frozen[0].tracking_id, None);
    drop(frozen);
    before_untracked_write(&path).unwrap();
    let hosted = host(&path, Options::default());
    hosted.disk().write_at(&[1; 512], 0).unwrap();
    let remote = RemoteHost::connect(&path).unwrap().unwrap();
    assert!(remote.set_enabled(true).is_err() && remote.set_enabled(false).is_err());
    drop(hosted);
    for (file, bytes) in &theirs {
        assert_eq!(&std::fs::read(file).unwrap(), bytes);
    }
}
