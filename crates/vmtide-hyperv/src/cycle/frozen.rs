//! All disks of a VM at one moment, until the restore point is committed or the job fails.

use crate::cycle::checkpoint::Made;
use crate::cycle::disks::OpenDisk;
use crate::cycle::freeze::Session;
use crate::cycle::ledger::OwnPoint;
use crate::cycle::points::{self, SealedDisk};
use crate::cycle::proof;
use crate::cycle::steps::{JobState, Step};
use crate::cycle::token::{BaseToken, SealedBy};
use crate::cycle::undo::Undone;
use crate::{Host, ReferencePointRecord, SnapshotRecord};
use vmtide_block::CancelToken;
use vmtide_hypervisor::{
    Consistency, DiskId, FrozenDisk, FrozenVm, HypervisorError, Result, Seal, TrackingId, VmConfig,
};

/// `ConsistencyLevel` of a reference point that is only crash-consistent.
const CRASH_CONSISTENT: u16 = 2;

/// What [`HypervHypervisor`](crate::HypervHypervisor) freezes.
pub(crate) struct FrozenHyperv {
    config: VmConfig,
    consistency: Consistency,
    downgrade: Option<String>,
    warnings: Vec<String>,
    disks: Vec<FrozenDisk>,
    open: Vec<OpenDisk>,
    snapshot: SnapshotRecord,
    /// The reference points that the base of this backup needs, until it is committed.
    older: Vec<String>,
    trackable: bool,
    sealed: Option<Seal>,
    /// The reference point that [`sealed`](Self::sealed) names.
    point: Option<String>,
    cancel: CancelToken,
    session: Option<Session>,
}

impl FrozenHyperv {
    #[allow(clippy::too_many_arguments, reason = "the parts of one freeze, each used once")]
    pub fn new(
        session: Session,
        made: Made,
        config: VmConfig,
        open: Vec<OpenDisk>,
        older: Vec<String>,
        trackable: bool,
        warnings: Vec<String>,
        cancel: CancelToken,
    ) -> Self {
        Self {
            config,
            consistency: made.consistency,
            downgrade: made.downgrade,
            warnings,
            disks: open.iter().map(|disk| disk.frozen.clone()).collect(),
            open,
            snapshot: made.snapshot,
            older,
            trackable,
            sealed: None,
            point: None,
            cancel,
            session: Some(session),
        }
    }

    /// Closes the files: while somebody has them open the host cannot merge.
    fn close(&self) {
        self.open.iter().for_each(|disk| disk.device.close());
    }

    fn session(&mut self) -> Result<&mut Session> {
        self.session.as_mut().ok_or_else(ended)
    }

    /// Turns the checkpoint into a reference point. None, with the reason, where that cannot be done: the backup is
    /// whole without it.
    fn convert(&mut self) -> Result<Result<ReferencePointRecord, String>> {
        let (snapshot, cancel) = (self.snapshot.clone(), self.cancel.clone());
        let session = self.session()?;
        let host = session.hyperv.host().clone();
        let vm = session.vm.id;
        let points = match again(&host, || host.reference_points(vm)) {
            Ok(points) => points,
            Err(HypervisorError::Unsupported { detail, .. }) => return Ok(Err(detail)),
            Err(error) => return Ok(Err(error.to_string())),
        };
        let before: Vec<String> = points.into_iter().map(|point| point.instance_id).collect();
        session.record(&Step::Converting { before: before.clone() })?;
        let converted = host.make_reference_point(&snapshot, &cancel, &mut |job| {
            session.record(&Step::ConvertJob { job: job.clone() })
        });
        let found = match converted {
            Ok(Some(point)) if !points::is_among(&point.instance_id, &before) => Ok(point),
            Ok(_) => find(session, &before, None),
            Err(HypervisorError::Block(error)) => return Err(error.into()),
            Err(error) if is_lost(&error) => {
                await_lost(session, &snapshot, &before, error, &cancel)
            }
            Err(error) => find(session, &before, Some(error)),
        };
        if let Ok(point) = &found {
            let id = point.instance_id.clone();
            session.record(&Step::Converted { point: id.clone() })?;
            let (lineage, job) = (session.lineage.clone(), session.job.to_string());
            session.ledger.add(OwnPoint { id, lineage, job, host: host.identity() })?;
        }
        Ok(found)
    }

    /// The tokens of the disks in a reference point; what cannot be one is a warning.
    fn tokens(&mut self, point: &ReferencePointRecord) -> Result<Seal> {
        let session = self.session()?;
        let (vm, line) = (session.vm.id, session.lineage.clone());
        let mut seal = Seal::default();
        if let Some(defect) = points::defect(point, vm) {
            seal.warnings.push(no_tracking(&format!("the reference point is of no use: {defect}")));
            return Ok(seal);
        }
        for disk in self.open.iter().filter(|disk| disk.trackable) {
            let by = SealedBy { vm, point: &point.instance_id, line: &line, held: &disk.held };
            match token_of(point, disk, &by) {
                Ok(token) => {
                    seal.tracking.insert(disk.frozen.id.clone(), token);
                }
                Err(why) => seal.warnings.push(format!(
                    "disk {} will be read in full by the next backup: {why}",
                    disk.frozen.id
                )),
            }
        }
        Ok(seal)
    }

    /// Takes note of what the host says of the consistency only now, and answers whether it is less.
    fn note_consistency(&mut self, point: &ReferencePointRecord) -> bool {
        let is_less =
            point.consistency == Some(CRASH_CONSISTENT) && self.consistency > Consistency::Crash;
        if is_less {
            self.consistency = Consistency::Crash;
            self.downgrade = Some(
                "the host made the checkpoint without the guest and tells it only in the reference point".into(),
            );
        }
        is_less
    }

    /// The reference points of this lineage that a committed restore point makes useless.
    fn useless_points(&mut self) -> Result<Vec<String>> {
        let (keep, mut useless) = (self.point.clone(), self.older.clone());
        let session = self.session()?;
        useless.extend(session.ledger.of(&session.lineage).map(|point| point.id.clone()));
        useless.sort();
        useless.dedup();
        useless.retain(|id| keep.as_ref().is_none_or(|keep| !points::same_point(keep, id)));
        Ok(useless)
    }
}

fn ended() -> HypervisorError {
    HypervisorError::failed("use the frozen VM", "its freeze has ended")
}

fn no_tracking(why: &str) -> String {
    format!("the next backup will read everything: {why}")
}

/// The token of a disk.
fn token_of(
    point: &ReferencePointRecord,
    disk: &OpenDisk,
    by: &SealedBy<'_>,
) -> Result<TrackingId, String> {
    let sealed = SealedDisk {
        attachment: &disk.attachment,
        disk: disk.file.disk,
        most_recent: disk.file.most_recent.as_deref(),
    };
    let id = points::id_of(point, &sealed)?;
    let guid = disk.file.disk.ok_or("its file has no id")?;
    BaseToken::new(id, guid, &disk.file, by).encode().ok_or_else(|| "its record is too long".into())
}

/// How often a question is asked whose answer was lost. A restore point without a base costs a full read.
const ATTEMPTS: u32 = 4;

/// How long to wait before asking again, in milliseconds.
const AGAIN_MS: u64 = 2000;

/// Asks a question again whose answer did not come.
fn again<T>(host: &Host, ask: impl Fn() -> Result<T>) -> Result<T> {
    let mut attempt = 1;
    loop {
        match ask() {
            Err(HypervisorError::Unreachable { .. } | HypervisorError::Timeout { .. })
                if attempt < ATTEMPTS =>
            {
                attempt += 1;
                host.options().clock.sleep_ms(AGAIN_MS);
            }
            other => return other,
        }
    }
}

/// How long a conversion whose answer was lost is waited for, in milliseconds. It takes a host some seconds; a restore
/// point without a base costs a full read.
const LOST_WAIT_MS: u64 = 60 * 1000;

/// Whether the host may be doing what an error says nothing of.
fn is_lost(error: &HypervisorError) -> bool {
    matches!(error, HypervisorError::Unreachable { .. } | HypervisorError::Protocol { .. })
}

/// Finds the reference point of a conversion whose answer was lost: the host may still be at it, as long as the checkpoint is
/// there.
fn await_lost(
    session: &Session,
    snapshot: &SnapshotRecord,
    before: &[String],
    error: HypervisorError,
    cancel: &CancelToken,
) -> Result<ReferencePointRecord, String> {
    let host = session.hyperv.host();
    let clock = host.options().clock.as_ref();
    let deadline = clock.now_ms().saturating_add(LOST_WAIT_MS);
    let id = &snapshot.settings.instance_id;
    while clock.now_ms() < deadline && !cancel.is_cancelled() {
        let Ok(snapshots) = again(host, || host.snapshots(session.vm.id)) else { break };
        if !snapshots.iter().any(|other| other.settings.instance_id == *id) {
            break;
        }
        clock.sleep_ms(AGAIN_MS);
    }
    find(session, before, Some(error))
}

/// Finds the reference point that a conversion made although its answer does not say so. After an error only what proves
/// to be ours is taken: the checkpoint may be gone, and the new point another product's, of a later moment.
fn find(
    session: &Session,
    before: &[String],
    error: Option<HypervisorError>,
) -> Result<ReferencePointRecord, String> {
    let host = session.hyperv.host();
    let why = error.as_ref().map_or("the host does not name it".into(), ToString::to_string);
    let points = again(host, || host.reference_points(session.vm.id))
        .map_err(|error| format!("{why}; then: {error}"))?;
    let state = JobState::of(session.journal.entry());
    if let Some(point) = proof::point_of(host, session.vm.id, &state, &points, before) {
        return Ok(point.clone());
    }
    if error.is_some() {
        return Err(format!("no reference point is known to be ours: {why}"));
    }
    // The host has made one: where there is only one, it is ours.
    let new = points.iter().filter(|point| !points::is_among(&point.instance_id, before));
    points::only(new).cloned().ok_or_else(|| {
        format!("which of the new reference points is ours, if any, is not known: {why}")
    })
}

impl FrozenVm for FrozenHyperv {
    fn config(&self) -> &VmConfig {
        &self.config
    }

    fn consistency(&self) -> Consistency {
        self.consistency
    }

    fn downgrade_reason(&self) -> Option<&str> {
        self.downgrade.as_deref()
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn disks(&self) -> &[FrozenDisk] {
        &self.disks
    }

    fn moved_from(&self, disk: &DiskId) -> Option<&DiskId> {
        self.open.iter().find(|open| open.frozen.id == *disk)?.moved_from.as_ref()
    }

    /// The checkpoint still stands, and the VM writes to none of the files that were read. Somebody who removed it
    /// would have had the host merge into them.
    fn check(&self) -> Result<()> {
        let session = self.session.as_ref().ok_or_else(ended)?;
        if self.sealed.is_some() {
            return Ok(());
        }
        let lost = |what: String| {
            Err(HypervisorError::failed(
                format!("check the frozen disks of {}", session.vm.name),
                what,
            ))
        };
        let id = &self.snapshot.settings.instance_id;
        let snapshots = session.hyperv.host().snapshots(session.vm.id)?;
        let Some(found) = snapshots.iter().find(|other| other.settings.instance_id == *id) else {
            return lost("the checkpoint was removed by somebody else while it was read".into());
        };
        let held = session.hyperv.host().disks(&found.settings)?;
        let live = session.hyperv.live_paths(&session.vm)?;
        for disk in &self.open {
            let path = &disk.attachment.host_resource;
            if live.iter().any(|other| other.eq_ignore_ascii_case(path)) {
                return lost(format!("the VM writes to {path} again"));
            }
            if !held.iter().any(|other| other.host_resource.eq_ignore_ascii_case(path)) {
                return lost(format!("the checkpoint no longer holds {path}"));
            }
        }
        Ok(())
    }

    fn seal(&mut self) -> Result<Seal> {
        if let Some(sealed) = &self.sealed {
            return Ok(sealed.clone());
        }
        self.cancel.check()?;
        self.close();
        let mut seal = Seal::default();
        if self.trackable {
            match self.convert()? {
                Ok(point) => {
                    seal = self.tokens(&point)?;
                    if self.note_consistency(&point) {
                        seal.consistency = Some(self.consistency);
                        seal.downgrade_reason.clone_from(&self.downgrade);
                    }
                    self.point = (!seal.tracking.is_empty()).then_some(point.instance_id);
                }
                Err(why) => seal.warnings.push(no_tracking(&why)),
            }
        }
        self.sealed = Some(seal.clone());
        Ok(seal)
    }

    fn commit(mut self: Box<Self>) -> Result<Vec<String>> {
        self.close();
        let step = Step::Committed { keep: self.point.clone(), destroy: self.useless_points()? };
        self.session()?.record(&step)?;
        let session = self.session.take().ok_or_else(ended)?;
        let done = session.undo(true)?;
        Ok(done.left())
    }

    fn abort(mut self: Box<Self>) -> Result<()> {
        self.close();
        let wait = !self.cancel.is_cancelled();
        let session = self.session.take().ok_or_else(ended)?;
        let vm = session.vm.name.clone();
        let done = session.undo(wait)?;
        // Merges go on by themselves, and a point holds no data.
        let harmless = Undone { merging: Vec::new(), doubtful: Vec::new(), ..done.clone() };
        if harmless.left().is_empty() {
            for doubt in &done.doubtful {
                tracing::warn!(doubt, vm, "left by a failed backup");
            }
            return Ok(());
        }
        Err(HypervisorError::failed(format!("undo the freeze of {vm}"), done.left().join("; ")))
    }
}

impl Drop for FrozenHyperv {
    fn drop(&mut self) {
        self.close();
        if let Some(session) = self.session.take()
            && let Err(error) = session.undo(false)
        {
            tracing::error!(%error, "left for the next job to remove");
        }
    }
}
