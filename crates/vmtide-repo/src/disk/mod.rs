//! Disks of restore points, read back.
//!
//! A [`PointDisk`] is a block device like any other: restore copies it, verify reads it, a server
//! exports it. It needs the disk map and packs, never the index.

mod forward;
mod frames;
mod healed;
mod packs;
mod point_disk;
mod quarantine;
mod repairs;
mod salvage;
mod search;
mod storage_order;
mod walk;

pub(crate) use forward::{Forward, Forwards, Move, write_forward, write_forward_as};
pub(crate) use healed::{Heal, Healed, write_healed};
pub(crate) use packs::{MAX_FORWARDS, PackSet, Passed, Place, Traced};
pub(crate) use point_disk::FETCH_BYTES;
pub use point_disk::PointDisk;
pub use quarantine::DamagedPart;
pub(crate) use quarantine::{DamageRecord, Quarantine, Quarantined, write_damaged};
pub(crate) use repairs::Repairs;
pub use salvage::SalvagedDisk;
pub(crate) use walk::{PlacedRun, Suspects, for_each_place, for_each_suspect, lost_ranges};
