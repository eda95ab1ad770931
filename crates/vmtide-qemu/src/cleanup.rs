//! Removing what a job made in QEMU, whether it ended well, failed or was killed.
//!
//! One procedure for all cases: it looks at what is there instead of remembering what was done,
//! so it can be repeated and continued at any point. Names tell what is ours; the journal adds
//! what names cannot tell (which node a device had, whether we paused the guest). A step that
//! fails is noted and the rest goes on, because every single thing removed is worth it.

use crate::agent::{FreezeStatus, GuestAgent, SYNC_TIMEOUT};
use crate::channel::Address;
use crate::inventory::{Bitmap, bitmaps_of};
use crate::names::{self, Kind};
use crate::qmp::{QmpClient, QmpError};
use crate::steps::Step;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How long an export or a job may take to vanish after it was told to.
const VANISH_TIMEOUT: Duration = Duration::from_secs(20);

/// How often to look whether it has.
const VANISH_POLL: Duration = Duration::from_millis(10);

/// What is to be removed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Scope<'a> {
    /// What one job made.
    Job(&'a str),
    /// What any job of ours made. Only while holding the VM's lock.
    AnyJob,
}

impl Scope<'_> {
    fn holds(self, name: &str, kind: Kind) -> bool {
        names::parse_temporary(name).is_some_and(|(job, found)| {
            found == kind
                && match self {
                    Self::Job(wanted) => job == wanted,
                    Self::AnyJob => true,
                }
        })
    }
}

/// What was done.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report {
    pub removed: Vec<String>,
    pub failed: Vec<String>,
    /// Why a guest that may be frozen could not be asked. That is in nobody's way but its own.
    pub unanswered: Vec<String>,
}

/// One clean-up of one VM.
pub(crate) struct Cleanup<'a> {
    qmp: &'a QmpClient,
    scope: Scope<'a>,
    steps: &'a [Step],
    report: Report,
}

impl<'a> Cleanup<'a> {
    /// A clean-up of what `scope` says, with the steps from the journals of those jobs.
    pub fn new(qmp: &'a QmpClient, scope: Scope<'a>, steps: &'a [Step]) -> Self {
        Self { qmp, scope, steps, report: Report::default() }
    }

    /// Removes everything but tracking bitmaps.
    ///
    /// # Errors
    /// Only where QEMU cannot be talked to any more; what it refuses is in the report.
    pub fn run(mut self) -> Result<Report, QmpError> {
        self.release_guest()?;
        self.exports()?;
        self.nbd_server()?;
        self.jobs()?;
        self.nodes(Kind::Access)?;
        self.filters()?;
        self.nodes(Kind::Scratch)?;
        self.change_bitmaps()?;
        self.files();
        Ok(self.report)
    }

    /// Runs a command; a refusal is noted with what it was for.
    fn attempt(&mut self, what: String, command: &str, data: Value) -> Result<bool, QmpError> {
        match self.qmp.execute(command, data) {
            Ok(_) => {
                self.report.removed.push(what);
                Ok(true)
            }
            Err(error) if error.is_connection() => Err(error),
            Err(error) => {
                self.report.failed.push(format!("{what}: {error}"));
                Ok(false)
            }
        }
    }

    /// Ends a pause or freeze that a journal shows as begun and not ended.
    fn release_guest(&mut self) -> Result<(), QmpError> {
        let (mut paused, mut frozen) = (false, None);
        for step in self.steps {
            match step {
                Step::Paused => paused = true,
                Step::Frozen { agent, unix: true } => frozen = Some(Address::Unix(agent.into())),
                Step::Frozen { agent, unix: false } => frozen = Some(Address::Tcp(agent.clone())),
                Step::Released => (paused, frozen) = (false, None),
                _ => {}
            }
        }
        if paused && self.qmp.query("query-status", json!({}))?["status"] == "paused" {
            self.attempt("pause of the guest".into(), "cont", json!({}))?;
        }
        if let Some(address) = frozen {
            let state = GuestAgent::connect(&address, SYNC_TIMEOUT).and_then(|mut agent| {
                let state = agent.status()?;
                if state == FreezeStatus::Frozen {
                    agent.thaw()?;
                }
                Ok(state)
            });
            let what = "freeze of the guest's file systems".to_owned();
            match state {
                Ok(FreezeStatus::Frozen) => self.report.removed.push(what),
                Ok(FreezeStatus::Thawed) => {}
                Err(error) => self.report.unanswered.push(format!("{what}: {error}")),
            }
        }
        Ok(())
    }

    fn exports(&mut self) -> Result<(), QmpError> {
        let ours = self.list("query-block-exports", "id", Kind::Export)?;
        for id in &ours {
            let data = json!({"id": id, "mode": "hard"});
            self.attempt(format!("export {id}"), "block-export-del", data)?;
        }
        self.wait_until_gone("query-block-exports", "id", Kind::Export)
    }

    fn nbd_server(&mut self) -> Result<(), QmpError> {
        // Whoever answers at our socket is the server we started; where nobody does, QEMU may run
        // somebody else's. There is one server at most, whatever the number of killed jobs.
        let Some(socket) = self.steps.iter().find_map(|step| match step {
            Step::NbdServer { socket } => {
                std::os::unix::net::UnixStream::connect(socket).ok().map(|_| socket)
            }
            _ => None,
        }) else {
            return Ok(());
        };
        if is_empty(&self.qmp.query("query-block-exports", json!({}))?) {
            let what = format!("NBD server at {}", socket.display());
            match self.qmp.execute("nbd-server-stop", json!({})) {
                Ok(_) => self.report.removed.push(what),
                Err(error) if error.is_connection() => return Err(error),
                // It was recorded before it was started, and was not started.
                Err(_) => {}
            }
        } else {
            self.report.failed.push(format!(
                "NBD server at {}: another program exports through it",
                socket.display()
            ));
        }
        Ok(())
    }

    fn jobs(&mut self) -> Result<(), QmpError> {
        for id in self.list("query-jobs", "id", Kind::Job)? {
            let data = json!({"device": id, "force": true});
            self.attempt(format!("job {id}"), "block-job-cancel", data)?;
        }
        self.wait_until_gone("query-jobs", "id", Kind::Job)
    }

    fn nodes(&mut self, kind: Kind) -> Result<(), QmpError> {
        for node in self.list("query-named-block-nodes", "node-name", kind)? {
            let data = json!({"node-name": node});
            self.attempt(format!("node {node}"), "blockdev-del", data)?;
        }
        Ok(())
    }

    /// Gives devices their own node back and removes the filters.
    fn filters(&mut self) -> Result<(), QmpError> {
        let filters = self.list("query-named-block-nodes", "node-name", Kind::Filter)?;
        if filters.is_empty() {
            return Ok(());
        }
        let block = self.qmp.query("query-block", json!({}))?;
        for filter in &filters {
            for entry in block.as_array().into_iter().flatten() {
                if entry["inserted"]["node-name"] != filter.as_str() {
                    continue;
                }
                self.give_back(filter, entry["qdev"].as_str().unwrap_or_default())?;
            }
            self.take_from_under_overlay(filter)?;
            let data = json!({"node-name": filter});
            self.attempt(format!("node {filter}"), "blockdev-del", data)?;
        }
        Ok(())
    }

    fn give_back(&mut self, filter: &str, qdev: &str) -> Result<(), QmpError> {
        let recorded = self.steps.iter().find_map(|step| match step {
            Step::Filter { qom_path, original, filter: name } if name == filter => {
                Some((qom_path.clone(), original.clone()))
            }
            _ => None,
        });
        // What the filter stands on now counts, and not what it was put on: an external snapshot
        // that was taken since stands between, and holds what the guest wrote since.
        let current = Graph::ask(self.qmp)?.child_of(filter);
        let (path, before) = recorded.unzip();
        let qom_path = path.unwrap_or_else(|| match qdev {
            path if path.starts_with('/') => path.to_owned(),
            id => format!("/machine/peripheral/{id}"),
        });
        if let (Some(current), Some(before)) = (&current, &before)
            && current != before
        {
            tracing::warn!(qdev, before, current, "the disk got another node during the backup");
        }
        let Some(original) = current.or(before) else {
            self.report.failed.push(format!(
                "node {filter}: the node that device {qdev} had before cannot be found"
            ));
            return Ok(());
        };
        let data = json!({"path": qom_path, "property": "drive", "value": original});
        self.attempt(format!("filter in front of {original}"), "qom-set", data).map(drop)
    }

    /// An external snapshot that was taken of the device, and not of its old node, stands on our
    /// filter. Streaming into it from what the filter stands on moves no data, because a filter
    /// has none, and leaves the filter out of the chain.
    fn take_from_under_overlay(&mut self, filter: &str) -> Result<(), QmpError> {
        let graph = Graph::ask(self.qmp)?;
        let (Some(overlay), Some(base)) = (graph.overlay_of(filter), graph.child_of(filter)) else {
            return Ok(());
        };
        let data = json!({"job-id": filter, "device": overlay, "base-node": base});
        self.attempt(format!("filter under snapshot {overlay}"), "block-stream", data)?;
        self.wait_until_gone("query-jobs", "id", Kind::Filter)
    }

    fn change_bitmaps(&mut self) -> Result<(), QmpError> {
        for (node, bitmaps) in nodes_with_bitmaps(self.qmp)? {
            for bitmap in bitmaps {
                if self.scope.holds(&bitmap.name, Kind::Changes) {
                    let data = json!({"node": node, "name": bitmap.name});
                    let what = format!("bitmap {} of node {node}", bitmap.name);
                    self.attempt(what, "block-dirty-bitmap-remove", data)?;
                }
            }
        }
        Ok(())
    }

    fn files(&mut self) {
        let mut report = remove_files(self.steps);
        self.report.removed.append(&mut report.removed);
        self.report.failed.append(&mut report.failed);
    }

    /// The names of `kind` in our scope in the answer to a query.
    fn list(&self, query: &str, key: &str, kind: Kind) -> Result<Vec<String>, QmpError> {
        let arguments = match query {
            "query-named-block-nodes" => json!({"flat": true}),
            _ => json!({}),
        };
        let answer = self.qmp.query(query, arguments)?;
        Ok(answer
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|entry| entry[key].as_str())
            .filter(|name| self.scope.holds(name, kind))
            .map(str::to_owned)
            .collect())
    }

    fn wait_until_gone(&mut self, query: &str, key: &str, kind: Kind) -> Result<(), QmpError> {
        let deadline = Instant::now() + VANISH_TIMEOUT;
        loop {
            let left = self.list(query, key, kind)?;
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                self.report.failed.push(format!("{} still there", left.join(", ")));
                return Ok(());
            }
            std::thread::sleep(VANISH_POLL);
        }
    }
}

/// Removes the files that steps speak of. Needs no QEMU.
pub(crate) fn remove_files(steps: &[Step]) -> Report {
    let mut report = Report::default();
    for step in steps {
        let (outcome, path) = match step {
            Step::Scratch { path } => (std::fs::remove_file(path), path),
            Step::Directory { path } => (std::fs::remove_dir_all(path), path),
            _ => continue,
        };
        match outcome {
            Ok(()) => report.removed.push(path.display().to_string()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => report.failed.push(format!("{}: {error}", path.display())),
        }
    }
    report
}

/// All block nodes that have named bitmaps.
pub(crate) fn nodes_with_bitmaps(qmp: &QmpClient) -> Result<Vec<(String, Vec<Bitmap>)>, QmpError> {
    let nodes = qmp.query("query-named-block-nodes", json!({"flat": true}))?;
    Ok(nodes
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|node| {
            let bitmaps = bitmaps_of(node);
            let name = node["node-name"].as_str()?;
            (!bitmaps.is_empty()).then(|| (name.to_owned(), bitmaps))
        })
        .collect())
}

/// How QEMU's block nodes hang together, from its debugging view.
struct Graph(Value);

impl Graph {
    /// Asks for it. Empty where this QEMU does not tell.
    fn ask(qmp: &QmpClient) -> Result<Self, QmpError> {
        match qmp.query("x-debug-query-block-graph", json!({})) {
            Ok(graph) => Ok(Self(graph)),
            Err(error) if error.is_connection() => Err(error),
            Err(_) => Ok(Self(Value::Null)),
        }
    }

    /// The node that `filter` stands on.
    fn child_of(&self, filter: &str) -> Option<String> {
        let id = self.id_of(filter)?;
        let edge = self.edges().find(|edge| edge["parent"] == *id && edge["name"] == "file")?;
        self.name_of(&edge["child"])
    }

    /// The node that has `filter` as its backing.
    fn overlay_of(&self, filter: &str) -> Option<String> {
        let id = self.id_of(filter)?;
        let edge = self.edges().find(|edge| edge["child"] == *id && edge["name"] == "backing")?;
        self.name_of(&edge["parent"])
    }

    fn nodes(&self) -> impl Iterator<Item = &Value> {
        self.0["nodes"].as_array().into_iter().flatten()
    }

    fn edges(&self) -> impl Iterator<Item = &Value> {
        self.0["edges"].as_array().into_iter().flatten()
    }

    fn id_of(&self, name: &str) -> Option<&Value> {
        self.nodes().find(|node| node["name"] == name).map(|node| &node["id"])
    }

    fn name_of(&self, id: &Value) -> Option<String> {
        let node = self.nodes().find(|node| node["id"] == *id)?;
        node["name"].as_str().map(str::to_owned)
    }
}

fn is_empty(list: &Value) -> bool {
    list.as_array().is_none_or(Vec::is_empty)
}
