//! A stand-in for a Hyper-V host, for tests only: the management objects of `root\virtualization\v2` as
//! documented, with the states, jobs, checkpoints, reference points and change tracking behind them, over
//! real VHDX files in a directory.
//!
//! [`World`] is the host. [`World::cim`] is a connection to its management, [`World::files`] to its files;
//! [`FaultPlan`] makes connections that break at a given call. Tests make VMs ([`VmSpec`]), let guests write,
//! let things happen ([`World::happen`]), switch [`Faults`], and compare what a backup has read with
//! [`Content`], which no image format has a part in.
//!
//! What it is strict about: every name is held to its exact spelling, parameters to their documented order
//! and types, instances within parameters to their class; disks that a VM writes cannot be opened; a file
//! that somebody holds open is not merged; an id is forgotten with the last reference point or checkpoint that
//! stands for it.
//!
//! What it does not do: no guest runs in it, processors and memory are numbers; configuration files are text
//! of its own; clusters, VHD sets, Hyper-V Replica, export of disks and encryption are missing. Behaviour that
//! no document tells (how long ids last, what tracking does when a disk grows) can be switched.
//!
//! Time is simulated: it goes on with every call by [`WorldOptions::tick_ms`], and by [`World::advance`].
#![allow(
    clippy::panic,
    clippy::expect_used,
    reason = "for tests only: where the stand-in itself fails the test is to stop"
)]

mod build;
mod changes;
mod cim;
mod content;
mod definition;
mod disks;
mod embedded;
mod events;
mod faults;
mod files;
mod images;
mod instances;
mod jobs;
mod plan;
mod random;
pub mod schema;
mod services;
mod state;
mod tracking;
mod world;
mod wql;

pub use build::{AdapterSpec, DiskKind, DiskSpec, VmSpec};
pub use cim::AnswerForm;
pub use content::Content;
pub use events::Event;
pub use faults::{ChangesFault, Faults, PointIds};
pub use plan::{FaultPlan, Kill, When};
pub use random::Random;
pub use state::Vss;
pub use world::{Leftovers, World, WorldOptions};
