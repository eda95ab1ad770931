//! Scratch files, and the private directory for the NBD socket.
//!
//! A scratch file takes the old content of blocks that the guest overwrites while it is backed
//! up. It loses its name as soon as QEMU has it open, so that nothing of it can stay behind. QEMU
//! often runs as another user than we do: what it has to open is given to the user that listens
//! on the monitor.

use crate::QemuTarget;
use crate::qmp::{QmpClient, QmpError};
use rustix::fs::{FallocateFlags, Gid, Mode, Uid};
use serde_json::Value;
use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use vmtide_hypervisor::{HypervisorError, JobId, Result};

/// The longest path of a Unix socket, without the terminating zero (`sun_path`, unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// The name of the NBD socket in its directory.
pub(crate) const SOCKET_NAME: &str = "nbd.sock";

/// Free bytes of the file system that holds `directory`.
pub(crate) fn free_bytes(directory: &Path) -> Result<u64> {
    let free = rustix::fs::statvfs(directory).map_err(|error| {
        HypervisorError::io(format!("ask for free space in {}", directory.display()), error)
    })?;
    Ok(free.f_bavail.saturating_mul(free.f_frsize))
}

/// Creates the directory for scratch files and checks that the reserve is free in it.
pub(crate) fn prepare(target: &QemuTarget) -> Result<PathBuf> {
    let directory = target.scratch();
    let io = |error| HypervisorError::io(format!("use {} for scratch", directory.display()), error);
    std::fs::create_dir_all(directory).map_err(io)?;
    let directory = directory.canonicalize().map_err(io)?;
    let free = free_bytes(&directory)?;
    if free < target.scratch_reserve_bytes {
        return Err(HypervisorError::failed(
            "make scratch space",
            format!(
                "{} has {free} bytes free, fewer than the {} that must stay free; choose another directory with scratch=DIR",
                directory.display(),
                target.scratch_reserve_bytes
            ),
        ));
    }
    Ok(directory)
}

/// The path of the scratch file of disk number `index`.
pub(crate) fn path_of(directory: &Path, job: &JobId, index: usize) -> PathBuf {
    directory.join(format!("vmtide-{job}-{index}.scratch"))
}

/// Makes a sparse file of `size_bytes` that QEMU may open.
pub(crate) fn create_sparse(path: &Path, size_bytes: u64, qmp: &QmpClient) -> Result<()> {
    let io = |error| HypervisorError::io(format!("create scratch {}", path.display()), error);
    let file = create_private(path).map_err(io)?;
    file.set_len(size_bytes).map_err(io)?;
    give_to_qemu(path, qmp)
}

/// Reserves room for `bytes` behind an existing file, so that it can never run out of space. Its
/// size does not change.
pub(crate) fn reserve(path: &Path, bytes: u64) -> Result<()> {
    let fail = |error: std::io::Error| {
        HypervisorError::failed(
            "reserve scratch space",
            format!(
                "{} for {bytes} bytes: {error}; this QEMU and disk need room for a whole copy of the disk, so that a full scratch disk cannot hurt the guest: choose a larger directory with scratch=DIR",
                path.display()
            ),
        )
    };
    let file = OpenOptions::new().write(true).open(path).map_err(fail)?;
    rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 0, bytes)
        .map_err(|error| fail(error.into()))
}

/// Makes the directory for the NBD socket, writes it down first with `record`, and answers with
/// the socket's path.
pub(crate) fn socket_directory(
    target: &QemuTarget,
    job: &JobId,
    qmp: &QmpClient,
    record: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    // Another user may not be able to enter the directories above our state.
    let parent = match foreign_owner(qmp) {
        Some(_) => std::env::temp_dir(),
        None => target.state_directory.clone(),
    };
    let directory = private_directory_path(&parent, job)?;
    record(&directory)?;
    make_private_directory(&directory)?;
    give_to_qemu(&directory, qmp)?;
    Ok(directory.join(SOCKET_NAME))
}

/// Where a directory can stand whose sockets have short enough paths: in `state_directory`, else
/// in the system's directory for temporary files.
pub(crate) fn private_directory_path(state_directory: &Path, job: &JobId) -> Result<PathBuf> {
    let io =
        |error| HypervisorError::io(format!("use directory {}", state_directory.display()), error);
    std::fs::create_dir_all(state_directory).map_err(io)?;
    let state = state_directory.canonicalize().map_err(io)?;
    let name = format!("vmtide-{job}");
    let fits = |path: &Path| path.join(SOCKET_NAME).as_os_str().len() <= MAX_SOCKET_PATH;
    Some(state.join(&name))
        .into_iter()
        .chain([std::env::temp_dir().join(&name)])
        .find(|path| fits(path))
        .ok_or_else(|| HypervisorError::Unsupported {
            what: format!("the state directory {}", state.display()),
            detail: "its path is too long for a socket".into(),
        })
}

/// Makes a directory that only its owner can enter. It must not exist.
pub(crate) fn make_private_directory(path: &Path) -> Result<()> {
    DirBuilder::new()
        .mode(0o700)
        .create(path)
        .map_err(|error| HypervisorError::io(format!("create {}", path.display()), error))
}

fn create_private(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// User and group that QEMU runs as, where that is another user than we are.
fn foreign_owner(qmp: &QmpClient) -> Option<(u32, u32)> {
    let us = rustix::process::geteuid().as_raw();
    qmp.owner().filter(|(uid, _)| *uid != us)
}

/// Lets QEMU open a block node in scratch space. Where it may not, the error says what to do.
pub(crate) fn attach(qmp: &QmpClient, node: Value, path: &Path) -> Result<()> {
    match qmp.execute("blockdev-add", node) {
        Ok(_) => Ok(()),
        Err(QmpError::Refused { description, .. }) if description.contains("ermission denied") => {
            let owner = foreign_owner(qmp)
                .map_or_else(String::new, |(uid, _)| format!("QEMU runs as user {uid}; "));
            Err(HypervisorError::Denied {
                what: format!("QEMU opening scratch {}", path.display()),
                detail: format!(
                    "{owner}choose a directory that it may enter and that its confinement (AppArmor, SELinux) allows, with scratch=DIR"
                ),
            })
        }
        Err(error) => Err(error.into()),
    }
}

/// Gives a file to the user that QEMU runs as, where that is another one and we may.
pub(crate) fn give_to_qemu(path: &Path, qmp: &QmpClient) -> Result<()> {
    let Some((uid, gid)) = foreign_owner(qmp) else {
        return Ok(());
    };
    rustix::fs::chownat(
        rustix::fs::CWD,
        path,
        Some(Uid::from_raw(uid)),
        Some(Gid::from_raw(gid)),
        rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
    )
    .map_err(|error| HypervisorError::Denied {
        what: format!("give {} to user {uid}, which QEMU runs as", path.display()),
        detail: format!("{error}; run as root or as that user"),
    })
}

/// Forbids all but the owner to read a file that another program made.
pub(crate) fn make_private(path: &Path) -> Result<()> {
    rustix::fs::chmod(path, Mode::from_raw_mode(0o600))
        .map_err(|error| HypervisorError::io(format!("protect {}", path.display()), error))
}
