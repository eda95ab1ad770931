//! The configuration of a VM, and of a checkpoint that is backed up.

use crate::cycle::HypervHypervisor;
use crate::{Configuration, SnapshotRecord, VmRecord, VmState, capture_files};
use vmtide_hypervisor::{Result, VmConfig};

impl HypervHypervisor {
    /// The configuration of a VM as it is now.
    pub(super) fn describe_vm(&self, vm: &VmRecord) -> Result<VmConfig> {
        let mut configuration = self.host().configuration(vm, &vm.settings)?;
        self.host().describe_disks(&mut configuration);
        Ok(configuration.config)
    }

    /// The configuration at the moment of a checkpoint, with the host's own files of it. Sizes of disks are told when
    /// they are opened.
    pub(super) fn capture(
        &self,
        vm: &VmRecord,
        snapshot: &SnapshotRecord,
    ) -> Result<Configuration> {
        let mut configuration = self.host().configuration(vm, &snapshot.settings)?;
        let captured = capture_files(self.files(), &snapshot.settings);
        configuration.config.native.extend(captured.files);
        configuration.warnings.extend(captured.warnings);
        Ok(configuration)
    }
}

/// The word for a state of a VM.
pub(super) const fn state_word(state: VmState) -> &'static str {
    match state {
        VmState::Running => "running",
        VmState::Off => "off",
        VmState::Paused => "paused",
        VmState::Saved => "saved",
        VmState::Other(_) => "changing",
    }
}
