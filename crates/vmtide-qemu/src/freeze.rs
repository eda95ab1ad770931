//! Freezing a running VM, from the lock to the opened disks.

use crate::cleanup::{Cleanup, Report, Scope};
use crate::frozen::FrozenQemu;
use crate::hold::{self, Hold};
use crate::moment::{self, Method};
use crate::qmp::QmpClient;
use crate::session::Session;
use crate::steps::Step;
use crate::watch::ScratchWatch;
use crate::{Address, FreezeMethod, QemuVm, describe, export, inventory, names, plan, scratch};
use serde_json::json;
use std::sync::Arc;
use vmtide_hypervisor::{
    Consistency, FreezeRequest, FrozenVm, HypervisorError, JobId, Journal, Result, VmConfig, VmLock,
};

/// Why application consistency cannot be had from a guest agent.
const NO_APPLICATION: &str = "the QEMU guest agent freezes file systems and runs freeze hooks, but does not tell whether applications took part";

/// How a freeze ended.
struct Reached {
    consistency: Consistency,
    downgrade: Option<String>,
}

impl QemuVm {
    pub(crate) fn lock(&self, job: &JobId) -> Result<VmLock> {
        let target = self.target();
        let name = target.name.clone().unwrap_or_else(|| target.qmp.to_string());
        VmLock::acquire(&target.state_directory, &name, &target.key(), job)
    }

    /// Removes what killed jobs left. The VM's lock is held.
    pub(crate) fn reap_locked(&self, qmp: &QmpClient) -> Result<Report> {
        let target = self.target();
        let journals: Vec<(Journal, Vec<Step>)> =
            Journal::leftovers(&target.state_directory, &target.key())?
                .into_iter()
                .map(|journal| {
                    let steps = Step::left(&journal, qmp.process());
                    (journal, steps)
                })
                .collect();
        let steps: Vec<Step> = journals.iter().flat_map(|(_, steps)| steps.clone()).collect();
        let report = Cleanup::new(qmp, Scope::AnyJob, &steps).run()?;
        if !report.failed.is_empty() {
            return Err(HypervisorError::failed(
                "remove what an earlier job left",
                report.failed.join("; "),
            ));
        }
        for what in &report.unanswered {
            tracing::warn!(what, "a killed job may have left the guest frozen");
        }
        let unanswered = !report.unanswered.is_empty() && qmp.process().is_some();
        for (journal, steps) in journals {
            // As long as this QEMU runs the guest may be frozen: the next job tries again.
            if !(unanswered && Step::hold_file_systems(&steps)) {
                journal.finish()?;
            }
        }
        Ok(report)
    }

    pub(crate) fn freeze_vm(&self, request: &FreezeRequest) -> Result<Box<dyn FrozenVm>> {
        check_request(request)?;
        let lock = self.lock(&request.job)?;
        let qmp = Arc::new(self.connect()?);
        let reaped = self.reap_locked(&qmp)?;
        for what in &reaped.removed {
            tracing::info!(what, "removed what a killed job left");
        }
        let mut found = inventory::take(&qmp)?;
        let unanswered = reaped.unanswered.iter();
        found.warnings.extend(unanswered.map(|what| {
            format!("an earlier job that was killed may have left the guest frozen: {what}")
        }));
        found.warnings.extend(describe::uncovered(&qmp)?);
        let config = describe::describe(&qmp, self.name(&qmp)?, &found)?;
        let plans = plan::plan(&found.drives, request);
        if plans.is_empty() {
            return Err(HypervisorError::NotFound {
                what: format!("a disk of {} to back up", config.name),
                detail: "the VM has no writable disk, or all are excluded".into(),
            });
        }
        let method = self.choose(&qmp, &plans)?;
        let target = self.target();
        let journal = Journal::begin(&target.state_directory, request.job.clone(), &target.key())?;
        let session = Session {
            qmp,
            job: request.job.clone(),
            lineage: request.lineage.clone(),
            plans,
            journal,
            _lock: lock,
        };
        self.make(session, request, config, method, found.warnings)
    }

    /// Makes everything, or nothing.
    fn make(
        &self,
        mut session: Session,
        request: &FreezeRequest,
        mut config: VmConfig,
        method: Method,
        warnings: Vec<String>,
    ) -> Result<Box<dyn FrozenVm>> {
        config.disks.retain(|disk| session.plans.iter().any(|plan| plan.drive.id == disk.id));
        match self.make_all(&mut session, request, method) {
            Ok((reached, disks, watch)) => Ok(Box::new(FrozenQemu {
                config,
                consistency: reached.consistency,
                downgrade: reached.downgrade,
                warnings,
                disks,
                watch: Some(watch),
                method,
                session: Some(session),
            })),
            Err(error) => {
                if let Err(undo) = session.undo() {
                    tracing::error!(%undo, "left for the next job to remove");
                }
                Err(error)
            }
        }
    }

    fn make_all(
        &self,
        session: &mut Session,
        request: &FreezeRequest,
        method: Method,
    ) -> Result<(Reached, Vec<vmtide_hypervisor::FrozenDisk>, ScratchWatch)> {
        let target = self.target();
        session.record(&Step::Named { prefix: format!("vmtide-{}-", session.job) })?;
        if let Some(identity) = session.qmp.process().map(str::to_owned) {
            session.record(&Step::Process { identity })?;
        }
        remove_useless(session)?;
        let directory = scratch::prepare(target)?;
        moment::prepare(session, method, &directory)?;
        request.cancel.check()?;
        let reached = self.hold_and_fix(session, request, method)?;
        moment::open_views(session, method)?;
        let disks = export::open_disks(session, target, method, &request.cancel)?;
        let watch = ScratchWatch::start(
            Arc::clone(&session.qmp),
            session.job.clone(),
            Step::all(session.journal.entry()),
            directory,
            // Space that was reserved beforehand is gone already and can grow no more.
            match method {
                Method::Filter => target.scratch_reserve_bytes,
                Method::Job => 0,
            },
        );
        Ok((reached, disks, watch))
    }

    /// Chooses the method, and refuses where none is safe.
    fn choose(&self, qmp: &QmpClient, plans: &[plan::DiskPlan]) -> Result<Method> {
        let version = qmp.version();
        let stuck = plans.iter().find(|plan| plan.drive.qom_path.is_none());
        let filter = match stuck {
            _ if !version.at_least(7, 1) => Err(format!("QEMU {version} is older than 7.1")),
            Some(plan) => Err(format!("disk {} hangs on no guest device", plan.drive.id)),
            None => Ok(Method::Filter),
        };
        let job = if version.at_least(5, 2) {
            Ok(Method::Job)
        } else {
            Err(format!("QEMU {version} is older than 5.2"))
        };
        let chosen = match self.target().method {
            FreezeMethod::Filter => filter,
            FreezeMethod::Job => job,
            FreezeMethod::Auto => filter.or(job),
        };
        chosen.map_err(|detail| HypervisorError::Unsupported {
            what: "backing up this VM while it runs".into(),
            detail,
        })
    }

    /// Holds the guest as the request wants, fixes the moment, and lets the guest go.
    fn hold_and_fix(
        &self,
        session: &mut Session,
        request: &FreezeRequest,
        method: Method,
    ) -> Result<Reached> {
        let running = hold::is_running(&session.qmp)?;
        let wants_agent = request.consistency > Consistency::Crash;
        let pause = running && method.needs_pause(session.plans.len());
        let agent = self.agent_address(session, wants_agent)?;
        let guardian = self.target().guardian.as_deref();
        let guardian = guardian.filter(|_| pause || (wants_agent && running));
        let qmp = Arc::clone(&session.qmp);
        let mark = session.journal.released_mark();
        let timeout = self.target().freeze_timeout;
        let mut hold = Hold::new(qmp, agent.clone(), guardian, &mark, timeout)
            .map_err(|detail| HypervisorError::failed("start the guardian", detail))?;
        let ready = match (wants_agent, running) {
            (false, _) => Err(String::new()),
            (true, false) => Err("the VM is not running, so its guest cannot be asked".into()),
            (true, true) => hold.check_agent(),
        };
        if pause {
            session.record(&Step::Paused)?;
        }
        if let (Ok(()), Some(agent)) = (&ready, &agent) {
            session.record(&Step::frozen(agent))?;
        }
        let frozen = ready.and_then(|()| hold.freeze());
        let held = fix_held(session, request, method, &mut hold, pause, frozen);
        let released = hold.release();
        if released {
            session.record(&Step::Released)?;
        }
        let mut frozen = held?;
        if !released {
            return Err(HypervisorError::failed(
                "let the guest go",
                "it may still be frozen or paused; the guardian keeps trying",
            ));
        }
        let finished = hold.finish();
        if frozen.is_ok() {
            frozen = finished;
        }
        evaluate(request, frozen)
    }

    fn agent_address(&self, session: &Session, wanted: bool) -> Result<Option<Address>> {
        match &self.target().agent {
            Some(agent) => Ok(Some(agent.clone())),
            None if wanted => {
                let found = describe::agent_socket(&session.qmp)?;
                Ok(found.map(|path| Address::Unix(path.into())))
            }
            None => Ok(None),
        }
    }
}

/// Fixes the moment while the guest is held. Answers whether its file systems were frozen in it.
fn fix_held(
    session: &Session,
    request: &FreezeRequest,
    method: Method,
    hold: &mut Hold,
    pause: bool,
    frozen: Result<(), String>,
) -> Result<Result<(), String>> {
    if let Err(reason) = &frozen
        && request.consistency > Consistency::Crash
        && !request.allow_downgrade
    {
        return Err(not_reached(request, reason));
    }
    if pause {
        hold.pause()?;
    }
    moment::fix(session, method)?;
    if let Some(paused_for) = hold.resume()? {
        tracing::info!(paused_us = paused_for.as_micros(), "guest was paused");
    }
    Ok(frozen.and_then(|()| hold.still_frozen()))
}

fn check_request(request: &FreezeRequest) -> Result<()> {
    request.cancel.check()?;
    check_lineage(request)?;
    if request.consistency == Consistency::Application && !request.allow_downgrade {
        return Err(not_reached(request, NO_APPLICATION));
    }
    Ok(())
}

/// Refuses a lineage that cannot stand in a bitmap's name.
pub(crate) fn check_lineage(request: &FreezeRequest) -> Result<()> {
    if names::is_id(&request.lineage) {
        return Ok(());
    }
    Err(HypervisorError::failed(
        "freeze the VM",
        format!("lineage {:?} is not 16 lower-case hexadecimal digits", request.lineage),
    ))
}

fn not_reached(request: &FreezeRequest, detail: &str) -> HypervisorError {
    HypervisorError::ConsistencyNotReached { wanted: request.consistency, detail: detail.into() }
}

fn evaluate(request: &FreezeRequest, frozen: Result<(), String>) -> Result<Reached> {
    match (request.consistency, frozen) {
        (Consistency::Crash, _) => Ok(Reached { consistency: Consistency::Crash, downgrade: None }),
        (Consistency::FileSystem, Ok(())) => {
            Ok(Reached { consistency: Consistency::FileSystem, downgrade: None })
        }
        (Consistency::Application, Ok(())) => Ok(Reached {
            consistency: Consistency::FileSystem,
            downgrade: Some(NO_APPLICATION.into()),
        }),
        (_, Err(reason)) if request.allow_downgrade => {
            Ok(Reached { consistency: Consistency::Crash, downgrade: Some(reason) })
        }
        (_, Err(reason)) => Err(not_reached(request, &reason)),
    }
}

/// Removes bitmaps of this lineage that no base can ever name again.
fn remove_useless(session: &Session) -> Result<()> {
    for plan in &session.plans {
        for name in &plan.useless {
            session.qmp.execute(
                "block-dirty-bitmap-remove",
                json!({"node": plan.drive.node, "name": name}),
            )?;
            tracing::info!(disk = %plan.drive.id, name, "removed a bitmap that is of no use");
        }
    }
    Ok(())
}
