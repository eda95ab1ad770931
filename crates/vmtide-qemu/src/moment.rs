//! Fixing the moment: new bitmaps start and all disks get a frozen view, while the guest stands
//! still for as short as can be.
//!
//! Two methods, chosen in `docs/decisions/0002-qemu-frozen-view.md`:
//!
//! *Filter.* A copy-before-write filter is put between the guest's device and its disk. Prepared
//! before the moment: scratch file, scratch node, filter. In the moment: new bitmaps in one
//! transaction, then each device is switched to its filter, then the changes since the base are
//! copied to a bitmap that records nothing. New bitmaps before and the copy after the switch make
//! both hold at least what they must, even where the guest is not paused. Several disks cannot be
//! switched in one transaction, so the guest is paused between.
//!
//! *Job.* Everything of all disks is one transaction; no pause is needed. The scratch space is
//! reserved to the last byte before, because a backup job that cannot write it would fail the
//! guest's writes.

use crate::hold::MOMENT_TIMEOUT;
use crate::inventory;
use crate::names::{self, GRANULARITY_BYTES, Kind};
use crate::plan::DiskPlan;
use crate::qmp::QmpError;
use crate::scratch;
use crate::session::Session;
use crate::steps::Step;
use serde_json::{Value, json};
use std::path::Path;
use std::process::Stdio;
use vmtide_hypervisor::{HypervisorError, JobId, Result};

/// How long a copy before a guest's write may take before the backup is given up for the guest's
/// sake, in seconds. Guests give a disk 30 seconds (Linux SCSI) before they treat it as broken.
const COPY_TIMEOUT_S: u64 = 15;

/// The unit in which QEMU counts disk sizes.
const SECTOR_BYTES: u64 = 512;

/// The tables of a qcow2 file with 64 KiB clusters: 8 bytes of mapping and 2 of reference count
/// per cluster, and the headers with room to spare.
const fn qcow2_bytes(disk_bytes: u64) -> u64 {
    disk_bytes.saturating_add(disk_bytes / 4096).saturating_add(4 << 20)
}

/// How the frozen view is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    Filter,
    Job,
}

impl Method {
    /// Whether the guest has to be paused for all `disks` to share one moment.
    pub const fn needs_pause(self, disks: usize) -> bool {
        matches!(self, Self::Filter) && disks > 1
    }

    /// The node that shows disk number `index` as it was.
    pub fn view(self, job: &JobId, index: usize) -> String {
        match self {
            Self::Filter => names::temporary(job, Kind::Access, index),
            Self::Job => names::temporary(job, Kind::Scratch, index),
        }
    }
}

/// Makes and attaches what the moment needs. The guest runs.
pub(crate) fn prepare(session: &mut Session, method: Method, directory: &Path) -> Result<()> {
    for plan in session.plans.clone() {
        let path = scratch::path_of(directory, &session.job, plan.index);
        session.record(&Step::Scratch { path: path.clone() })?;
        session.record(&Step::Bitmap {
            node: plan.drive.node.clone(),
            name: plan.mark.bitmap.clone(),
        })?;
        match method {
            Method::Filter => prepare_filter(session, &plan, &path)?,
            Method::Job => prepare_job(session, &plan, &path)?,
        }
        std::fs::remove_file(&path).map_err(|error| {
            HypervisorError::io(format!("unlink scratch {}", path.display()), error)
        })?;
    }
    Ok(())
}

fn prepare_filter(session: &mut Session, plan: &DiskPlan, path: &Path) -> Result<()> {
    let qom_path = plan.drive.qom_path.clone().unwrap_or_default();
    let filter = names::temporary(&session.job, Kind::Filter, plan.index);
    let target = names::temporary(&session.job, Kind::Scratch, plan.index);
    session.record(&Step::Filter {
        qom_path,
        original: plan.drive.node.clone(),
        filter: filter.clone(),
    })?;
    let size_bytes = plan.drive.size_bytes.next_multiple_of(SECTOR_BYTES);
    scratch::create_sparse(path, size_bytes, &session.qmp)?;
    scratch::attach(
        &session.qmp,
        json!({"driver": "file", "node-name": target, "filename": path, "discard": "unmap"}),
        path,
    )?;
    session.qmp.execute(
        "blockdev-add",
        json!({
            "driver": "copy-before-write", "node-name": filter,
            "file": plan.drive.node, "target": target,
            "on-cbw-error": "break-snapshot", "cbw-timeout": COPY_TIMEOUT_S,
        }),
    )?;
    Ok(())
}

fn prepare_job(session: &mut Session, plan: &DiskPlan, path: &Path) -> Result<()> {
    let size_bytes = plan.drive.size_bytes.next_multiple_of(SECTOR_BYTES);
    create_qcow2(path, size_bytes)?;
    scratch::reserve(path, qcow2_bytes(size_bytes))?;
    scratch::give_to_qemu(path, &session.qmp)?;
    scratch::attach(
        &session.qmp,
        json!({
            "driver": "qcow2",
            "node-name": names::temporary(&session.job, Kind::Scratch, plan.index),
            "file": {"driver": "file", "filename": path},
            "backing": plan.drive.node,
        }),
        path,
    )
}

fn create_qcow2(path: &Path, size_bytes: u64) -> Result<()> {
    let output = crate::process::command("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(path)
        .arg(size_bytes.to_string())
        .stdin(Stdio::null())
        .output()
        .map_err(|error| HypervisorError::io("run qemu-img (install qemu-utils)", error))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(HypervisorError::failed(
            format!("create scratch {}", path.display()),
            crate::qmp::one_line(&text),
        ));
    }
    scratch::make_private(path)
}

/// Fixes the moment. Called while the guest is held, where it has to be.
pub(crate) fn fix(session: &Session, method: Method) -> Result<(), QmpError> {
    let starts: Vec<Value> = session.plans.iter().map(start_tracking).collect();
    let changes = session.plans.iter().flat_map(|plan| copy_changes(&session.job, plan));
    match method {
        Method::Filter => {
            transaction(session, starts)?;
            for plan in &session.plans {
                let filter = names::temporary(&session.job, Kind::Filter, plan.index);
                session.qmp.execute_within(
                    "qom-set",
                    json!({"path": plan.drive.qom_path, "property": "drive", "value": filter}),
                    MOMENT_TIMEOUT,
                )?;
            }
            transaction(session, changes.collect())
        }
        Method::Job => {
            let jobs = session.plans.iter().map(|plan| {
                json!({"type": "blockdev-backup", "data": {
                    "job-id": names::temporary(&session.job, Kind::Job, plan.index),
                    "device": plan.drive.node,
                    "target": names::temporary(&session.job, Kind::Scratch, plan.index),
                    "sync": "none",
                }})
            });
            transaction(session, starts.into_iter().chain(changes).chain(jobs).collect())
        }
    }
}

/// Makes the frozen views readable. The guest runs again.
pub(crate) fn open_views(session: &Session, method: Method) -> Result<(), QmpError> {
    if method == Method::Job {
        return Ok(());
    }
    for plan in &session.plans {
        session.qmp.execute(
            "blockdev-add",
            json!({
                "driver": "snapshot-access",
                "node-name": names::temporary(&session.job, Kind::Access, plan.index),
                "file": names::temporary(&session.job, Kind::Filter, plan.index),
            }),
        )?;
    }
    Ok(())
}

/// Whether the frozen views have stood up to now: every device still writes through its filter, or
/// every backup job still copies. Where one does not, the guest's writes may show in the view.
pub(crate) fn check(session: &Session, method: Method) -> Result<()> {
    let jobs = match method {
        Method::Filter => Value::Null,
        Method::Job => session.qmp.query("query-jobs", json!({}))?,
    };
    let block = match method {
        Method::Filter => session.qmp.query("query-block", json!({}))?,
        Method::Job => Value::Null,
    };
    for plan in &session.plans {
        let lost = match method {
            Method::Filter => filter_lost(&block, &session.job, plan),
            Method::Job => job_lost(&jobs, &session.job, plan),
        };
        if let Some(reason) = lost {
            return Err(HypervisorError::failed(
                format!("keep the frozen view of disk {}", plan.drive.id),
                format!("{reason}, so that what was read may not be of one moment"),
            ));
        }
    }
    Ok(())
}

fn filter_lost(block: &Value, job: &JobId, plan: &DiskPlan) -> Option<String> {
    let filter = names::temporary(job, Kind::Filter, plan.index);
    let top = block
        .as_array()
        .into_iter()
        .flatten()
        .find(|entry| inventory::qom_path_of(entry) == plan.drive.qom_path)
        .and_then(|entry| entry["inserted"]["node-name"].as_str());
    match top {
        Some(node) if node == filter => None,
        Some(node) => Some(format!("somebody put node {node} in the place of ours")),
        None => Some("its device was unplugged".into()),
    }
}

fn job_lost(jobs: &Value, job: &JobId, plan: &DiskPlan) -> Option<String> {
    let id = names::temporary(job, Kind::Job, plan.index);
    let mut all = jobs.as_array().into_iter().flatten();
    let status = all.find(|entry| entry["id"] == id).map(|entry| &entry["status"]);
    match status.map(|status| status.as_str().unwrap_or("unknown")) {
        // A job that is paused still copies before writes.
        Some("running" | "paused" | "ready" | "standby") => None,
        Some(other) => Some(format!("QEMU's job {id} is {other}")),
        None => Some(format!("QEMU's job {id} has ended")),
    }
}

fn start_tracking(plan: &DiskPlan) -> Value {
    json!({"type": "block-dirty-bitmap-add", "data": {
        "node": plan.drive.node,
        "name": plan.mark.bitmap,
        "granularity": GRANULARITY_BYTES,
        "persistent": plan.mark.persistent,
    }})
}

/// Copies the base's bitmap to one that records nothing. The base itself stays as it is and keeps
/// recording, so that a job that fails has nothing to merge back.
fn copy_changes(job: &JobId, plan: &DiskPlan) -> Vec<Value> {
    let Ok(base) = &plan.base else {
        return Vec::new();
    };
    let name = names::temporary(job, Kind::Changes, plan.index);
    let node = &plan.drive.node;
    vec![
        json!({"type": "block-dirty-bitmap-add", "data": {
            "node": node, "name": name, "granularity": GRANULARITY_BYTES, "disabled": true,
        }}),
        json!({"type": "block-dirty-bitmap-merge", "data": {
            "node": node, "target": name, "bitmaps": [base],
        }}),
    ]
}

fn transaction(session: &Session, actions: Vec<Value>) -> Result<(), QmpError> {
    if actions.is_empty() {
        return Ok(());
    }
    session.qmp.execute_within("transaction", json!({"actions": actions}), MOMENT_TIMEOUT).map(drop)
}
