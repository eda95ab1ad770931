//! The VMs of a host, by way of the agent there.
//!
//! The agent's own adapter freezes a VM, keeps the journal and reaps; here is what makes of its answers a platform
//! like any other. A client that dies is noticed by the agent, which gives up what it had frozen.

use crate::changes::Doubt;
use crate::client::AgentClient;
use crate::device::AgentDisk;
use crate::keeper::Keeper;
use crate::resend::TIME_TO_LIVE;
use crate::transport::words;
use crate::v1::{self, Place};
use crate::vm_calls::Step;
use crate::{AgentError, vm_calls};
use std::collections::BTreeMap;
use std::sync::Arc;
use vmtide_block::CancelToken;
use vmtide_hypervisor::remote::{ChangesView, DiskView, FreezeState, FreezeView, MomentView};
use vmtide_hypervisor::{
    Changes, Consistency, DiskId, ErrorReport, FreezeRequest, FrozenDisk, FrozenVm, FullReason,
    HealthCheck, Hypervisor, HypervisorError, ReapReport, Result, Seal, VmConfig, VmSelector,
    VmSummary,
};

/// The most lines that an agent's word of warning may have.
const MAX_LINES: usize = 100;

/// The VMs of an agent's host.
pub struct AgentHypervisor {
    client: AgentClient,
}

impl AgentHypervisor {
    /// The VMs of the host whose agent `client` talks to.
    pub const fn new(client: AgentClient) -> Self {
        Self { client }
    }

    fn need_vms(&self, cancel: &CancelToken) -> Result<()> {
        Ok(self.client.need_v1("freeze VMs", cancel)?)
    }

    /// An error about the VM `vm`.
    fn of_vm(&self, vm: &str, error: AgentError) -> HypervisorError {
        let agent = self.client.agent();
        match error {
            AgentError::NotFound { detail, .. } => {
                HypervisorError::NotFound { what: format!("the VM {vm} of {agent}"), detail }
            }
            AgentError::Refused { code, detail, .. } if code == "in_use" => {
                HypervisorError::Busy { vm: vm.into(), detail }
            }
            AgentError::Refused { status: 501, detail, .. } => {
                HypervisorError::Unsupported { what: format!("the VM {vm} of {agent}"), detail }
            }
            other => other.into(),
        }
    }

    fn frozen(&self, view: FreezeView, request: &FreezeRequest) -> Result<FrozenAgentVm> {
        let transport = &self.client.shared().transport;
        let broken = |detail: String| HypervisorError::protocol(&transport.agent, detail);
        let moment = view.moment.ok_or_else(|| broken("a frozen VM without a moment".into()))?;
        let moved = |disk: &DiskView| Some((disk.id.clone(), disk.moved_from.clone()?));
        let mut frozen = FrozenAgentVm {
            client: self.client.clone(),
            id: view.id,
            vm: request.vm.clone(),
            keeper: Arc::new(Keeper::default()),
            disks: Vec::new(),
            moved: moment.disks.iter().filter_map(moved).collect(),
            cancel: request.cancel.clone(),
            moment: MomentView { disks: Vec::new(), ..clean(moment.clone()) },
        };
        // From here on dropping it gives the freeze up.
        let (client, id) = (self.client.clone(), frozen.id.clone());
        let renew = move || vm_calls::renew_once(&client.shared().transport, &id);
        frozen.keeper.start("agent-vm-freeze", TIME_TO_LIVE / 6, renew)?;
        for (index, disk) in moment.disks.iter().enumerate() {
            if disk.index != index {
                return Err(broken(format!("disk {} in place {index}", disk.index)));
            }
            frozen.disks.push(frozen.disk(disk, request)?);
        }
        Ok(frozen)
    }
}

/// An agent's words as lines that can be shown.
fn clean(mut moment: MomentView) -> MomentView {
    moment.warnings.truncate(MAX_LINES);
    for line in &mut moment.warnings {
        *line = words(line);
    }
    moment.downgrade_reason = moment.downgrade_reason.map(|reason| words(&reason));
    moment
}

impl Hypervisor for AgentHypervisor {
    fn list(&self) -> Result<Vec<VmSummary>> {
        self.need_vms(&CancelToken::new())?;
        vm_calls::list(&self.client.shared().transport, None)
            .map_err(|error| self.of_vm("*", error))
    }

    /// Hyper-V's ids outlive renaming and moves between hosts.
    fn has_lasting_ids(&self) -> bool {
        true
    }

    fn select(&self, selector: &VmSelector) -> Result<Vec<VmSummary>> {
        self.need_vms(&CancelToken::new())?;
        vm_calls::list(&self.client.shared().transport, Some(selector))
            .map_err(|error| self.of_vm(&selector.to_string(), error))
    }

    fn describe(&self, vm: &str) -> Result<VmConfig> {
        self.need_vms(&CancelToken::new())?;
        vm_calls::config(&self.client.shared().transport, vm).map_err(|error| self.of_vm(vm, error))
    }

    fn freeze(&self, request: &FreezeRequest) -> Result<Box<dyn FrozenVm>> {
        self.need_vms(&request.cancel)?;
        let view = vm_calls::freeze(&self.client.shared().transport, request);
        let view = view.map_err(|failed| match failed {
            vm_calls::FreezeFailed::Agent(error) => self.of_vm(&request.vm, error),
            vm_calls::FreezeFailed::Platform(error) => error,
        })?;
        Ok(Box::new(self.frozen(view, request)?))
    }

    fn examine(&self, vm: Option<&str>) -> Vec<HealthCheck> {
        match vm_calls::health(&self.client.shared().transport, vm) {
            Ok(checks) => checks,
            // An agent that cannot be asked for this is described by what fails next.
            Err(error) => {
                tracing::debug!(%error, "the agent does not look its host over");
                Vec::new()
            }
        }
    }

    fn reap(&self) -> Result<ReapReport> {
        self.need_vms(&CancelToken::new())?;
        let report = vm_calls::reap(&self.client.shared().transport, false);
        report.map_err(|error| self.of_vm("*", error))
    }

    fn reap_orphans(&self) -> Result<ReapReport> {
        self.need_vms(&CancelToken::new())?;
        let report = vm_calls::reap(&self.client.shared().transport, true);
        report.map_err(|error| self.of_vm("*", error))
    }
}

/// A VM that an agent holds frozen.
struct FrozenAgentVm {
    client: AgentClient,
    id: String,
    vm: String,
    keeper: Arc<Keeper>,
    moment: MomentView,
    disks: Vec<FrozenDisk>,
    moved: BTreeMap<DiskId, DiskId>,
    cancel: CancelToken,
}

impl FrozenAgentVm {
    fn disk(&self, view: &DiskView, request: &FreezeRequest) -> Result<FrozenDisk> {
        let transport = &self.client.shared().transport;
        v1::check_size(transport, view.size_bytes)?;
        let place = Place::FrozenVm(self.id.clone(), view.index);
        let changes = match &view.changes {
            ChangesView::Everything { reason } => Changes::Everything(reason.clone()),
            // Whoever asked for nothing is given everything; an agent that thinks otherwise is mistaken.
            ChangesView::Ranges { .. }
                if !request.bases.contains_key(view.moved_from.as_ref().unwrap_or(&view.id)) =>
            {
                Changes::Everything(FullReason::FirstBackup)
            }
            ChangesView::Ranges { count, total_bytes } => {
                let told = v1::frozen_vm_changes(transport, &place, view.size_bytes, &self.cancel);
                match told? {
                    Ok(ranges)
                        if ranges.as_slice().len() as u64 == *count
                            && ranges.total_bytes() == *total_bytes =>
                    {
                        Changes::Ranges(ranges)
                    }
                    Ok(ranges) => Changes::Everything(FullReason::AnswerDoubtful(format!(
                        "{} bytes of changes came where {total_bytes} were announced",
                        ranges.total_bytes()
                    ))),
                    Err(Doubt::Disabled(text) | Doubt::Lost(text) | Doubt::Broken(text)) => {
                        Changes::Everything(FullReason::AnswerDoubtful(text))
                    }
                }
            }
        };
        let path = format!("{}/{}", self.vm, view.id);
        let device = AgentDisk::new(
            self.client.clone(),
            path,
            Some(place),
            view.size_bytes,
            self.cancel.clone(),
        );
        let (id, tracking) = (view.id.clone(), view.tracking_id.clone());
        Ok(FrozenDisk { id, device: Arc::new(device), changes, tracking })
    }

    /// Takes a step and judges how that went.
    fn step(&self, step: Step) -> Result<FreezeView> {
        let (what, wanted) = match step {
            Step::Seal => ("sealing the moment of", FreezeState::Sealed),
            Step::Commit => ("keeping the new tracking of", FreezeState::Committed),
            Step::Abort => ("undoing the freeze of", FreezeState::Aborted),
        };
        let ended = vm_calls::take(&self.client.shared().transport, &self.id, step);
        let view = ended.map_err(|error| match error {
            AgentError::NotFound { detail, .. } => HypervisorError::failed(
                format!("{what} {}", self.vm),
                format!(
                    "the agent knows the freeze no more, perhaps it was started anew: {detail}"
                ),
            ),
            other => other.into(),
        })?;
        if view.state == wanted {
            return Ok(view);
        }
        Err(view.error.map_or_else(
            || HypervisorError::failed(format!("{what} {}", self.vm), format!("{:?}", view.state)),
            ErrorReport::into_error,
        ))
    }
}

impl FrozenVm for FrozenAgentVm {
    fn config(&self) -> &VmConfig {
        &self.moment.config
    }

    fn consistency(&self) -> Consistency {
        self.moment.consistency
    }

    fn downgrade_reason(&self) -> Option<&str> {
        self.moment.downgrade_reason.as_deref()
    }

    fn warnings(&self) -> &[String] {
        &self.moment.warnings
    }

    fn disks(&self) -> &[FrozenDisk] {
        &self.disks
    }

    fn check(&self) -> Result<()> {
        let lost = |detail: String| HypervisorError::Unreachable {
            peer: self.client.agent().into(),
            detail,
        };
        if let Some(detail) = self.keeper.lost() {
            return Err(lost(detail));
        }
        match vm_calls::check(&self.client.shared().transport, &self.id, &self.cancel) {
            Err(AgentError::NotFound { detail, .. }) => Err(lost(detail)),
            other => Ok(other?),
        }
    }

    fn moved_from(&self, disk: &DiskId) -> Option<&DiskId> {
        self.moved.get(disk)
    }

    fn seal(&mut self) -> Result<Seal> {
        let seal = self.step(Step::Seal)?.seal.ok_or_else(|| {
            HypervisorError::protocol(self.client.agent(), "a sealed moment without its names")
        })?;
        let mut warnings = seal.warnings;
        warnings.truncate(MAX_LINES);
        let seal = Seal {
            warnings: warnings.iter().map(|line| words(line)).collect(),
            downgrade_reason: seal.downgrade_reason.map(|reason| words(&reason)),
            ..seal
        };
        if let Some(less) = seal.consistency.filter(|less| *less < self.moment.consistency) {
            self.moment.consistency = less;
            self.moment.downgrade_reason.clone_from(&seal.downgrade_reason);
        }
        Ok(seal)
    }

    fn commit(mut self: Box<Self>) -> Result<Vec<String>> {
        self.disks.clear();
        self.keeper.stop();
        let mut notes = self.step(Step::Commit)?.notes;
        notes.truncate(MAX_LINES);
        Ok(notes.iter().map(|note| words(note)).collect())
    }

    fn abort(mut self: Box<Self>) -> Result<()> {
        self.disks.clear();
        self.keeper.stop();
        self.step(Step::Abort).map(drop)
    }
}

impl Drop for FrozenAgentVm {
    fn drop(&mut self) {
        if self.keeper.stop() {
            vm_calls::give_up(&self.client.shared().transport, &self.id);
        }
    }
}
