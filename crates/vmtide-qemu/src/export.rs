//! Reading the frozen views: QEMU exports them over NBD on a socket only we can reach.
//!
//! A QEMU process has one NBD server. Where somebody else runs it already, its address cannot be
//! asked for, so the backup is refused instead of guessing.

use crate::moment::Method;
use crate::names::{self, Kind};
use crate::plan::DiskPlan;
use crate::qmp::QmpError;
use crate::session::Session;
use crate::steps::Step;
use crate::{QemuTarget, scratch};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, ByteRange, CancelToken, RangeSet};
use vmtide_hypervisor::{Changes, FrozenDisk, FullReason, HypervisorError, Result};
use vmtide_nbd::{NbdDevice, NbdOptions, NbdUrl, dirty_bitmap_context};

/// The most changed ranges kept in memory per disk: 16 bytes each. A disk changed in more places
/// is read in somewhat larger pieces than changed.
pub(crate) const MAX_CHANGED_RANGES: usize = 1 << 20;

/// Connections per disk; QEMU serves each in turn on the disk's own thread, so few suffice to
/// keep it busy.
const CONNECTIONS: usize = 4;

/// Starts the server, exports all views and opens them.
pub(crate) fn open_disks(
    session: &mut Session,
    target: &QemuTarget,
    method: Method,
    cancel: &CancelToken,
) -> Result<Vec<FrozenDisk>> {
    let (qmp, job) = (Arc::clone(&session.qmp), session.job.clone());
    let socket = scratch::socket_directory(target, &job, &qmp, |directory| {
        session.record(&Step::Directory { path: directory.to_owned() })
    })?;
    session.record(&Step::NbdServer { socket: socket.clone() })?;
    start_server(session, &socket)?;
    let plain_names = !qmp.version().at_least(7, 1);
    session
        .plans
        .iter()
        .map(|plan| {
            cancel.check()?;
            add_export(session, plan, method, plain_names)?;
            open_disk(session, plan, &socket, cancel)
        })
        .collect()
}

fn start_server(session: &Session, socket: &Path) -> Result<()> {
    let address = json!({"addr": {"type": "unix", "data": {"path": socket}}});
    match session.qmp.execute("nbd-server-start", address) {
        Ok(_) => Ok(()),
        Err(QmpError::Refused { description, .. }) if description.contains("already running") => {
            Err(HypervisorError::Unsupported {
                what: "a backup while another program uses QEMU's NBD server".into(),
                detail: "QEMU has one NBD server and does not tell its address; end the other backup or migration, or run nbd-server-stop on the monitor if it was left behind".into(),
            })
        }
        Err(error) => Err(error.into()),
    }
}

fn add_export(
    session: &Session,
    plan: &DiskPlan,
    method: Method,
    plain_names: bool,
) -> Result<(), QmpError> {
    let name = names::temporary(&session.job, Kind::Export, plan.index);
    let bitmap = names::temporary(&session.job, Kind::Changes, plan.index);
    let bitmaps: Vec<Value> = match (&plan.base, plain_names) {
        (Err(_), _) => Vec::new(),
        (Ok(_), true) => vec![json!(bitmap)],
        (Ok(_), false) => vec![json!({"node": plan.drive.node, "name": bitmap})],
    };
    session
        .qmp
        .execute(
            "block-export-add",
            json!({
                "type": "nbd", "id": name, "name": name, "writable": false,
                "node-name": method.view(&session.job, plan.index), "bitmaps": bitmaps,
            }),
        )
        .map(drop)
}

fn open_disk(
    session: &Session,
    plan: &DiskPlan,
    socket: &Path,
    cancel: &CancelToken,
) -> Result<FrozenDisk> {
    let socket = socket.to_str().ok_or_else(|| HypervisorError::Unsupported {
        what: format!("the directory of {}", socket.display()),
        detail: "its path is not UTF-8".into(),
    })?;
    let export = names::temporary(&session.job, Kind::Export, plan.index);
    let bitmap = names::temporary(&session.job, Kind::Changes, plan.index);
    let (device, changes) = open_export(
        &NbdUrl::unix(socket, export),
        plan.base.as_ref().map(|_| bitmap.as_str()).map_err(Clone::clone),
        cancel,
    )?;
    Ok(FrozenDisk { id: plan.drive.id.clone(), device, changes, tracking: Some(plan.tracking()) })
}

/// Opens an export and asks for the changes that `bitmap` holds.
pub(crate) fn open_export(
    url: &NbdUrl,
    bitmap: Result<&str, FullReason>,
    cancel: &CancelToken,
) -> Result<(Arc<dyn BlockDevice>, Changes)> {
    let mut options =
        NbdOptions { connections: CONNECTIONS, read_only: true, ..NbdOptions::default() };
    if let Ok(name) = bitmap {
        options = options.with_dirty_bitmap(name);
    }
    let device = NbdDevice::connect(url, &options)?;
    let changes = match bitmap {
        Err(reason) => Changes::Everything(reason),
        Ok(name) => match read_changes(&device, name, cancel) {
            Ok(ranges) => Changes::Ranges(ranges),
            Err(error @ (BlockError::Cancelled | BlockError::Disconnected { .. })) => {
                return Err(error.into());
            }
            Err(error) => Changes::Everything(FullReason::AnswerDoubtful(error.to_string())),
        },
    };
    Ok((Arc::new(device), changes))
}

fn read_changes(
    device: &NbdDevice,
    bitmap: &str,
    cancel: &CancelToken,
) -> Result<RangeSet, BlockError> {
    if !device.has_context(&dirty_bitmap_context(bitmap)) {
        return Err(BlockError::unsupported(
            device.name(),
            format!("the server does not offer the bitmap {bitmap}"),
        ));
    }
    let whole = ByteRange::new(0, device.size_bytes());
    let ranges = device.dirty_ranges(bitmap, whole, cancel)?;
    Ok(ranges.clamp(device.size_bytes()).bounded(MAX_CHANGED_RANGES, device.size_bytes()))
}
