//! The methods of the host's services.

pub(crate) mod arguments;
pub(crate) mod image;
pub(crate) mod import;
pub(crate) mod reference;
pub(crate) mod resources;
pub(crate) mod snapshot;
pub(crate) mod system;

use crate::jobs::Answer;
use crate::state::State;
use arguments::Arguments;
use vmtide_cim::{CimError, ObjectPath};

/// "Access denied" of Hyper-V's methods.
pub(crate) const ACCESS_DENIED: u32 = 32769;
/// "Not supported".
pub(crate) const NOT_SUPPORTED: u32 = 32770;
/// "Invalid parameter".
pub(crate) const INVALID_PARAMETER: u32 = 32773;
/// "System is in use".
pub(crate) const IN_USE: u32 = 32774;
/// "Invalid state for this operation".
pub(crate) const INVALID_STATE: u32 = 32775;
/// "File not found" of the image service.
pub(crate) const FILE_NOT_FOUND: u32 = 32779;

impl State {
    /// Calls a method whose parameters were checked against the schema.
    pub(crate) fn call(
        &mut self,
        path: &ObjectPath,
        method: &str,
        arguments: &Arguments,
    ) -> Result<Answer, CimError> {
        if self.faults.methods_denied {
            return Ok(Answer::code(ACCESS_DENIED));
        }
        let answer = match path.class.as_str() {
            "Msvm_VirtualSystemSnapshotService" => self.snapshot_service(method, arguments),
            "Msvm_VirtualSystemReferencePointService" => self.reference_service(method, arguments),
            "Msvm_ImageManagementService" => self.image_service(method, arguments),
            "Msvm_VirtualSystemManagementService" => self.system_service(method, arguments),
            "Msvm_ComputerSystem" => self.computer_method(path, method, arguments),
            "Msvm_ConcreteJob" => self.job_method(path, method, arguments),
            _ => None,
        };
        answer.ok_or_else(|| CimError::Fault {
            action: format!("{}.{method}", path.class),
            detail: "the provider does not implement the method".into(),
            code: Some(0x8004_1024),
        })
    }
}
