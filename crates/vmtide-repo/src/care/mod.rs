//! Looking after a repository: finding damage, putting it on record, repairing what can be repaired,
//! and removing what no restore point needs.

mod impact;
mod integrity;
mod mark;
mod prune;
mod quarantine;
mod read_frames;
mod repair;
mod sample;
mod usage;
mod verify;

pub use integrity::{IntegrityReport, check_integrity};
pub use prune::{PruneOptions, PruneReport, WaitsFor};
pub(crate) use quarantine::quarantine_found;
pub use repair::{RepairOptions, RepairReport};
pub use sample::{ReadData, SampleReport};
pub use usage::{Growth, UsageReport, VmUsage};
pub use verify::{Damage, DamagedPlace, VerifyOptions, VerifyReport};

pub(crate) use prune::prune;
pub(crate) use verify::verify;
