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
    /// The QEMU process in which all this is made.
    Process {
        /// As the kernel tells it from all others.
        identity: String,
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

    /// The steps of a killed job's journal that mean something to the QEMU that runs as `process`
    /// now. A guest that was let go since is not held by that job, whoever may hold it now; and
    /// what was in another QEMU process has ended with it.
    pub fn left(journal: &Journal, process: Option<&str>) -> Vec<Self> {
        let mut steps = Self::all(journal.entry());
        let released = steps.iter().rposition(|step| *step == Self::Released);
        let held_from = if journal.is_released() { steps.len() } else { released.unwrap_or(0) };
        let recorded = steps.iter().find_map(|step| match step {
            Self::Process { identity } => Some(identity.clone()),
            _ => None,
        });
        let another = recorded.is_some_and(|was| process.is_some_and(|is| is != was));
        let mut index = 0;
        steps.retain(|step| {
            index += 1;
            match step {
                Self::Directory { .. } | Self::Scratch { .. } | Self::Server { .. } => true,
                Self::Paused | Self::Frozen { .. } => !another && index > held_from,
                Self::Released => false,
                _ => !another,
            }
        });
        steps
    }

    /// Whether these steps, of those that [`left`](Self::left) says, show file systems that are
    /// frozen in a QEMU process that is known to be the same one.
    pub fn hold_file_systems(steps: &[Self]) -> bool {
        steps.iter().any(|step| matches!(step, Self::Frozen { .. }))
            && steps.iter().any(|step| matches!(step, Self::Process { .. }))
    }

    /// The step that says that the file systems behind `agent` may be frozen.
    pub fn frozen(agent: &Address) -> Self {
        Self::Frozen { agent: agent.to_string(), unix: matches!(agent, Address::Unix(_)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtide_hypervisor::JobId;

    fn frozen() -> Step {
        Step::frozen(&Address::Unix("/run/a".into()))
    }

    #[test]
    fn only_what_still_holds_is_left() {
        let state = tempfile::tempdir().unwrap();
        let mut journal = Journal::begin(state.path(), JobId::random(), "a").unwrap();
        let scratch = Step::Scratch { path: "/s".into() };
        let process = Step::Process { identity: "1:2:3".into() };
        for step in [&process, &scratch, &Step::Paused, &frozen()] {
            step.record(&mut journal).unwrap();
        }
        let all = [process.clone(), scratch.clone(), Step::Paused, frozen()];
        assert_eq!(Step::left(&journal, Some("1:2:3")), all);
        assert_eq!(Step::left(&journal, None), all);
        assert_eq!(Step::left(&journal, Some("1:9:3")), std::slice::from_ref(&scratch));
        assert!(Step::hold_file_systems(&all) && !Step::hold_file_systems(&all[1..]));

        Step::Released.record(&mut journal).unwrap();
        assert_eq!(Step::left(&journal, None), [process.clone(), scratch.clone()]);
        Step::Paused.record(&mut journal).unwrap();
        assert_eq!(Step::left(&journal, None), [process.clone(), scratch.clone(), Step::Paused]);
        std::fs::write(journal.released_mark(), "").unwrap();
        assert_eq!(Step::left(&journal, Some("1:2:3")), [process, scratch]);
    }
}
