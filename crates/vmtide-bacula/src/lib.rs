//! The process behind vmtide's plugin for Bacula's file daemon.
//!
//! The plugin (`vmtide-bacula-fd`, a small library of its own inside the daemon) starts `vmtide
//! bacula-backend` for every plugin line of a job and talks to it over standard input and output
//! (`docs/bacula-protocol.md`). Here a VM becomes files of Bacula's catalogue: its configuration, and one
//! file per disk, which a full backup has whole and an incremental or differential as what differs.
//!
//! [`command`] understands the plugin line, [`moments`] knows what changed between any two backups,
//! [`decide`] says what is sent of a disk, [`send`] sends it as [`stream`] lays it out, and [`restore`] makes
//! images of it again. Every call blocks; a backend does one job and ends.

mod backup;
pub mod command;
pub mod decide;
pub mod digests;
mod error;
mod estimate;
pub mod frame;
pub mod fuzzing;
mod job;
pub mod link;
pub mod moments;
mod names;
mod object;
mod read;
mod restore;
mod restore_vm;
mod send;
pub mod stream;
mod target;

pub use error::{BackendError, Result};

use job::{Job, Purpose};
use link::Link;
use std::path::PathBuf;
use vmtide_agent_client::AgentOptions;
use vmtide_engine::hyperv::HypervAccess;
use vmtide_memory_ffi::Memory;

/// How to get at the agent that a source names, with the key where it is one.
pub type AgentAccess = Box<dyn Fn(&str) -> vmtide_engine::Result<AgentOptions>>;

/// How to get at the Hyper-V host that a source names, with the password where it is one.
pub type HypervLogin = Box<dyn Fn(&str) -> vmtide_engine::Result<HypervAccess>>;

/// What a backend needs to know beside the job.
pub struct BackendOptions {
    /// Where journals, locks and logs of moments are kept, unless the plugin line says otherwise.
    pub state_directory: PathBuf,
    /// The executable that guards a frozen guest; normally vmtide itself.
    pub guardian: Option<PathBuf>,
    /// How to get at agents; asked with the source of the plugin line.
    pub agent: AgentAccess,
    /// How to get at Hyper-V hosts without agents; asked with the source of the plugin line.
    pub hyperv: HypervLogin,
}

/// Does one job of the plugin at the other end of `link`. The reason of a failure is in the job's report.
///
/// # Errors
/// Why the job failed; everything made for it on the platform is undone then, or journalled.
pub fn run(link: &mut Link, options: &BackendOptions) -> Result<()> {
    let outcome = converse(link, options);
    if let Err(error) = &outcome {
        // Where the plugin has gone there is nobody to tell.
        let _ = link.abort(&error.to_string());
    }
    outcome
}

fn converse(link: &mut Link, options: &BackendOptions) -> Result<()> {
    link.greet()?;
    let job = Job::read(link)?;
    tracing::info!(id = job.id, name = job.name, purpose = ?job.purpose, "job");
    if let Some(seconds) = job.command.timeout_s {
        link.command(&format!("Silence {seconds}"))?;
    }
    match job.purpose {
        Purpose::Estimate => estimate::run(&job, options, link),
        Purpose::Backup => {
            let backup = backup::Backup::open(&job, options)?;
            share_memory(link, &job);
            link.end()?;
            backup.run(link)
        }
        Purpose::Restore => {
            link.end()?;
            restore::Restore::new(&job, options).run(link)
        }
    }
}

/// Takes the memory that the plugin gave, if it gave any. Without it data go through the pipe.
fn share_memory(link: &mut Link, job: &Job) {
    let Some((number, length)) = job.memory else { return };
    match Memory::inherited(number, length, read::PIECE_BYTES) {
        Ok(memory) if memory.slots() >= read::MIN_SLOTS => link.share(memory),
        Ok(_) => tracing::warn!(length, "the plugin's memory is too small to be used"),
        Err(error) => tracing::warn!(%error, "the plugin's memory cannot be used"),
    }
}
