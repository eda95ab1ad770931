//! `vmtide-virtdisk-ffi` against the stand-in, call by call: a program for Windows (or Wine), with the stand-in
//! beside it. `VMTIDE_STANDIN_DIR` and `VMTIDE_STANDIN_FAULTS` are those of the stand-in; the argument is an empty
//! directory for disks. The last line is `test result: …`, as cargo's tests have it.

#[cfg(not(windows))]
fn main() {
    eprintln!("virtdisk-calls is a test for Windows");
}

#[cfg(windows)]
fn main() -> std::process::ExitCode {
    calls::run()
}

#[cfg(windows)]
mod calls {
    use std::path::{Path, PathBuf};
    use std::process::ExitCode;
    use vmtide_block::{BlockDevice, ByteRange, CancelToken, WritableBlockDevice};
    use vmtide_virtdisk_ffi::{
        AttachedDisk, DiskAccess, ErrorKind, NewVirtualDisk, ReadRoute, TrackingId, VirtdiskError,
        VirtualDisk, for_each_change,
    };

    type Outcome = Result<(), Box<dyn std::error::Error>>;
    type Check = fn(&Lab) -> Outcome;

    const SIZE: u64 = 16 << 20;
    const CHECKS: &[(&str, Check)] = &[
        ("a new disk says what it is", what_it_is),
        ("a differencing disk is asked for its parent", no_parent),
        ("what is written is read, whatever the offset", written_and_read),
        ("many threads read at once", many_threads),
        ("changes are those of the writes", changes),
        ("through the device where the handle does not work", device),
        ("attached once, refused twice, free afterwards", attached_once),
        ("errors have their kinds", errors),
        ("no handle is left", nothing_left),
    ];

    struct Lab {
        place: PathBuf,
        faults: PathBuf,
        handles: PathBuf,
    }

    impl Lab {
        fn disk(&self, name: &str) -> Result<PathBuf, VirtdiskError> {
            let path = self.place.join(name);
            let vhdx = path.extension().is_some_and(|extension| extension == "vhdx");
            VirtualDisk::create(
                &path,
                &NewVirtualDisk {
                    block_bytes: 0,
                    disk_id: None,
                    vhdx,
                    virtual_bytes: SIZE,
                    fixed: false,
                    sector_bytes: 0,
                    physical_sector_bytes: 0,
                },
                &CancelToken::new(),
            )?;
            Ok(path)
        }

        fn faults(&self, text: &str) -> std::io::Result<()> {
            std::fs::write(&self.faults, text)
        }
    }

    pub fn run() -> ExitCode {
        let variable = |name| std::env::var_os(name).map(PathBuf::from);
        let place = std::env::args_os().nth(1).map(PathBuf::from);
        let (Some(place), Some(faults), Some(handles)) =
            (place, variable("VMTIDE_STANDIN_FAULTS"), variable("VMTIDE_STANDIN_DIR"))
        else {
            eprintln!(
                "virtdisk-calls DIRECTORY, with VMTIDE_STANDIN_FAULTS and VMTIDE_STANDIN_DIR set"
            );
            return ExitCode::from(2);
        };
        let lab = Lab { place, faults, handles };
        let (mut passed, mut failed) = (0, 0);
        for (name, check) in CHECKS {
            let outcome = lab.faults("").map_err(Into::into).and_then(|()| check(&lab));
            match outcome {
                Ok(()) => passed += 1,
                Err(error) => {
                    failed += 1;
                    println!("FAILED: {name}: {error}");
                }
            }
        }
        let word = if failed == 0 { "ok" } else { "FAILED" };
        println!("test result: {word}. {passed} passed; {failed} failed");
        ExitCode::from(u8::from(failed != 0))
    }

    fn must(condition: bool, text: impl Into<String>) -> Outcome {
        if condition { Ok(()) } else { Err(text.into().into()) }
    }

    fn attach(path: &Path, access: DiskAccess) -> Result<AttachedDisk, VirtdiskError> {
        VirtualDisk::open(path, access)?.attach()
    }

    fn what_it_is(lab: &Lab) -> Outcome {
        for (name, device_id, id) in [("new.vhdx", 3, true), ("new.vhd", 2, true)] {
            let disk = VirtualDisk::open(&lab.disk(name)?, DiskAccess::Info)?;
            let size = disk.size()?;
            must(size.virtual_bytes == SIZE && size.sector_bytes == 512, format!("{size:?}"))?;
            must(disk.storage_type()?.device_id == device_id, "another type")?;
            must(disk.provider_subtype()? == 3 && disk.parent()?.is_none(), "not dynamic")?;
            must(disk.disk_id()?.is_some() == id && !disk.identifier()?.is_nil(), "no id")?;
            must(disk.is_4k_aligned()?, "not aligned")?;
            must(matches!(disk.physical_sector_bytes()?, 512 | 4096), "sectors")?;
            must(disk.physical_disk()?.physical_bytes == 4096, "sectors below")?;
            let tracking = disk.change_tracking()?;
            must(!tracking.enabled && tracking.most_recent_id.is_none(), format!("{tracking:?}"))?;
        }
        Ok(())
    }

    fn no_parent(lab: &Lab) -> Outcome {
        let disk = VirtualDisk::open(&lab.disk("alone.vhdx")?, DiskAccess::ReadOnly)?;
        must(disk.parent()?.is_none(), "a parent")
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|at| u8::try_from(at % 251).unwrap_or(0)).collect()
    }

    fn written_and_read(lab: &Lab) -> Outcome {
        for sector in [512, 4096] {
            let path = lab.disk(&format!("write-{sector}.vhdx"))?;
            lab.faults(&format!("info.sector = {sector}"))?;
            let mut model = vec![0; usize::try_from(SIZE)?];
            let disk = attach(&path, DiskAccess::ReadWrite)?;
            must(disk.block_size_bytes() == sector, "another sector")?;
            for (offset, length) in
                [(0, 512), (1 << 20, 300_000), (4095, 2), (5_000_001, 70_003), (model.len() - 1, 1)]
            {
                let data = pattern(length);
                disk.write_at(&data, offset as u64)?;
                model[offset..offset + length].copy_from_slice(&data);
            }
            disk.write_zeroes(ByteRange::new((1 << 20) + 100, 1000))?;
            model[(1 << 20) + 100..(1 << 20) + 1100].fill(0);
            disk.flush()?;
            must(disk.write_at(&[0], SIZE).is_err(), "written past the end")?;
            for again in [false, true] {
                let reread;
                let source: &dyn BlockDevice = if again {
                    reread = attach(&path, DiskAccess::ReadOnly);
                    match &reread {
                        Ok(disk) => disk,
                        // The writer has it still.
                        Err(error) if error.kind() == ErrorKind::InUse => continue,
                        Err(error) => return Err(error.clone().into()),
                    }
                } else {
                    &disk
                };
                let mut all = vec![1; model.len()];
                source.read_at(&mut all, 0)?;
                must(all == model, "other bytes")?;
            }
            drop(disk);
            let disk = attach(&path, DiskAccess::ReadOnly)?;
            let mut part = vec![1; 80_001];
            disk.read_at(&mut part, 4_999_999)?;
            must(part == model[4_999_999..5_080_000], "other bytes after it was closed")?;
            must(disk.write_at(&[0; 512], 0).is_err(), "written although read-only")?;
            must(disk.route() == ReadRoute::Handle, "through a device")?;
        }
        Ok(())
    }

    fn many_threads(lab: &Lab) -> Outcome {
        let path = lab.disk("threads.vhdx")?;
        let content = pattern(usize::try_from(SIZE)?);
        let disk = attach(&path, DiskAccess::ReadWrite)?;
        disk.write_at(&content, 0)?;
        drop(disk);
        let disk = attach(&path, DiskAccess::ReadOnly)?;
        let wrong = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..16_usize)
                .map(|thread| {
                    let (disk, content) = (&disk, &content);
                    scope.spawn(move || {
                        (0..50_usize)
                            .filter(|round| {
                                let at = (round * 7919 * 512 + thread * 104_729)
                                    % (content.len() - 66_000);
                                let mut buffer = vec![0; 65_536];
                                disk.read_at(&mut buffer, at as u64).is_err()
                                    || buffer != content[at..at + buffer.len()]
                            })
                            .count()
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or(1)).sum::<usize>()
        });
        must(wrong == 0, format!("{wrong} wrong reads"))
    }

    fn ranges(path: &Path, id: &TrackingId) -> Result<Vec<ByteRange>, VirtdiskError> {
        let disk = VirtualDisk::open(path, DiskAccess::ReadOnly)?;
        let mut found = vmtide_block::RangeSet::new();
        for_each_change(&disk, id, ByteRange::new(0, SIZE), SIZE, |range| {
            found.insert(range);
            Ok::<_, VirtdiskError>(())
        })?;
        Ok(found.into())
    }

    fn changes(lab: &Lab) -> Outcome {
        let path = lab.disk("changes.vhdx")?;
        VirtualDisk::open(&path, DiskAccess::ReadWrite)?.set_change_tracking(true)?;
        let state = VirtualDisk::open(&path, DiskAccess::Info)?.change_tracking()?;
        let id = state.most_recent_id.ok_or("no id")?;
        must(state.enabled && !state.newer_changes, "written already")?;
        must(ranges(&path, &id)?.is_empty(), "changed already")?;
        let disk = attach(&path, DiskAccess::ReadWrite)?;
        for block in [0_u64, 3, 4, 100, 255] {
            disk.write_at(&[7; 100], block * 65536 + 17)?;
        }
        drop(disk);
        must(
            VirtualDisk::open(&path, DiskAccess::Info)?.change_tracking()?.newer_changes,
            "nothing newer",
        )?;
        let blocks = |first: u64, count: u64| ByteRange::new(first * 65536, count * 65536);
        let truth = vec![blocks(0, 1), blocks(3, 2), blocks(100, 1), blocks(255, 1)];
        for fault in [
            "",
            "query.capacity = 1",
            "query.short = 1",
            "query.outside = 1",
            "query.short = 1\nquery.capacity = 2",
        ] {
            lab.faults(fault)?;
            let found = ranges(&path, &id)?;
            must(found == truth, format!("{fault}: {found:?}"))?;
        }
        for (fault, kind) in [
            ("query.error = 0xC03A0029", ErrorKind::UnknownTrackingId),
            ("query.error = 0xC03A002A", ErrorKind::TrackingDisabled),
            ("query.error = 0xC03A0030", ErrorKind::TrackingLost),
            ("query.processed = 0", ErrorKind::TrackingLost),
            ("query.count = 5000", ErrorKind::TrackingLost),
        ] {
            lab.faults(fault)?;
            let found = ranges(&path, &id).err().map(|error| error.kind());
            must(found == Some(kind), format!("{fault}: {found:?}"))?;
        }
        lab.faults("tracking.id_length = 255\ntracking.buffer = 1")?;
        let long = VirtualDisk::open(&path, DiskAccess::Info)?.change_tracking()?.most_recent_id;
        let long = long.ok_or("no id")?;
        must(long.as_str().len() == 255 && ranges(&path, &long)? == truth, "long ids")?;
        lab.faults("")?;
        let unknown = TrackingId::new("rctX:0:0:0:0:0:00000001", "")?;
        let found = ranges(&path, &unknown).err().map(|error| error.kind());
        must(found == Some(ErrorKind::UnknownTrackingId), format!("unknown id: {found:?}"))?;
        VirtualDisk::open(&path, DiskAccess::ReadWrite)?.set_change_tracking(false)?;
        must(!VirtualDisk::open(&path, DiskAccess::Info)?.change_tracking()?.enabled, "still on")
    }

    fn device(lab: &Lab) -> Outcome {
        for (number, fault) in
            ["attach.handle_error = 50", "attach.handle_error = 87", "attach.handle_unreadable = 1"]
                .iter()
                .enumerate()
        {
            let path = lab.disk(&format!("device-{number}.vhdx"))?;
            let data = pattern(100_000);
            let disk = attach(&path, DiskAccess::ReadWrite)?;
            disk.write_at(&data, 12_345)?;
            drop(disk);
            lab.faults(fault)?;
            let disk = attach(&path, DiskAccess::ReadOnly)?;
            let mut read = vec![0; data.len()];
            disk.read_at(&mut read, 12_345)?;
            must(disk.route() == ReadRoute::PhysicalDrive && read == data, *fault)?;
            drop(disk);
            lab.faults("")?;
        }
        Ok(())
    }

    fn attached_once(lab: &Lab) -> Outcome {
        let path = lab.disk("once.vhdx")?;
        let first = attach(&path, DiskAccess::ReadOnly)?;
        let second = attach(&path, DiskAccess::ReadOnly).err().map(|error| error.kind());
        must(second == Some(ErrorKind::InUse), format!("{second:?}"))?;
        must(first.disk().size()?.virtual_bytes == SIZE, "asked while attached")?;
        drop(first);
        attach(&path, DiskAccess::ReadWrite)?;
        Ok(())
    }

    fn errors(lab: &Lab) -> Outcome {
        let path = lab.disk("errors.vhdx")?;
        let garbage = lab.place.join("garbage.vhdx");
        std::fs::write(&garbage, [b"vhdxfile".as_slice(), &[0; 400_000]].concat())?;
        let missing = lab.place.join("missing.vhdx");
        for (path, fault, kind) in [
            (&missing, "", ErrorKind::NotFound),
            (&garbage, "", ErrorKind::Damaged),
            (&path, "open.error = 32", ErrorKind::InUse),
            (&path, "open.error = 5", ErrorKind::Denied),
            (&path, "attach.error = 1314", ErrorKind::Denied),
            (&path, "attach.error = 5", ErrorKind::Denied),
            (&path, "info.sector = 3", ErrorKind::Unsupported),
        ] {
            lab.faults(fault)?;
            let found = attach(path, DiskAccess::ReadOnly).err();
            let shown = found.as_ref().map(ToString::to_string).unwrap_or_default();
            must(found.map(|error| error.kind()) == Some(kind), format!("{fault}: {shown}"))?;
            must(!shown.contains('\n'), shown)?;
        }
        lab.faults("")?;
        let exists = lab.disk("errors.vhdx").err().map(|error| error.kind());
        must(exists == Some(ErrorKind::Exists), format!("{exists:?}"))?;
        let info = VirtualDisk::open(&path, DiskAccess::Info)?.attach().err();
        must(info.map(|error| error.kind()) == Some(ErrorKind::Invalid), "attached for information")
    }

    fn nothing_left(lab: &Lab) -> Outcome {
        let left = std::fs::read_dir(&lab.handles)?.count();
        must(left == 0, format!("{left} handles"))
    }
}
