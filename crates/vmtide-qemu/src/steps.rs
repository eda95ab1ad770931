//! What a job writes to its journal before it makes anything.

use crate::channel::Address;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use vmtide_hypervisor::{HypervisorError, Journal, JournalEntry, Result};

/// One thing that may exist from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub(crate) enum Step {
    /// Nodes, exports, jobs and temporary bitmaps whose names begin so.
    Named {
        /// `vmtide-JOB-`.
        prefix: String,
    },
    /// A directory of ours with sockets.
    Directory {
        /// Where.
        path: PathBuf,
    },
    /// A scratch file; normally without a name as soon as QEMU has it open.
    Scratch {
        /// Where.
        path: PathBuf,
    },
    /// QEMU's NBD server was started by us.
    NbdServer {
        /// The socket it listens on.
        socket: PathBuf,
    },
    /// A guest device may read and write through our filter.
    Filter {
        /// The device's place in QEMU's object tree.
        qom_path: String,
        /// The node it had and gets back.
        original: String,
        /// Our node.
        filter: String,
    },
    /// A tracking bitmap that stays if the job succeeds.
    Bitmap {
        /// The node it is on.
        node: String,
        /// Its name.
        name: String,
    },
    /// The guest's file systems may be frozen.
    Frozen {
        /// The agent's socket.
        agent: String,
        /// Whether that is a Unix socket.
        unix: bool,
    },
    /// The guest's processors may be paused.
    Paused,
    /// Neither is the case any more.
    Released,
    /// A process of ours that serves an image at rest.
    Server {
        /// Its socket, which stands in its arguments.
        socket: PathBuf,
    },
}

impl Step {
    /// Writes it down, before it is taken.
    pub fn record(&self, journal: &mut Journal) -> Result<()> {
        let value = serde_json::to_value(self)
            .map_err(|error| HypervisorError::failed("write the journal", error.to_string()))?;
        journal.record(value)
    }

    /// The steps of a journal. What a later version wrote and this one cannot read is skipped.
    pub fn all(entry: &JournalEntry) -> Vec<Self> {
        entry.steps.iter().filter_map(|step| serde_json::from_value(step.clone()).ok()).collect()
    }

    /// The step that says that the file systems behind `agent` may be frozen.
    pub fn frozen(agent: &Address) -> Self {
        Self::Frozen { agent: agent.to_string(), unix: matches!(agent, Address::Unix(_)) }
    }
}
