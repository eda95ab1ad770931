//! One agent, as callers that block see it.

use crate::changes::Changes;
use crate::contract::{self, DiskInfo, TrackingState};
use crate::device::AgentDisk;
use crate::frozen::FrozenDisks;
use crate::hyperv_url::HypervUrl;
use crate::options::AgentOptions;
use crate::resend::{self, CreateDocument};
use crate::transport::Transport;
use crate::url::AgentUrl;
use crate::v1::{self, DiskDetails, Place};
use crate::writer::WritableAgentDisk;
use crate::{AgentError, Result};
use parking_lot::{Condvar, Mutex};
use std::sync::{Arc, OnceLock};
use vmtide_block::CancelToken;

/// Transfers of content at once to one agent. An agent allows one key 24 by default, and several jobs with
/// one key should not have to wait for each other; more than a few gain nothing on one line.
const TRANSFERS: usize = 6;

/// A connection to one agent: vmtide's own, or rct-service, which has less.
///
/// Cheap to clone; clones share the connections. The calls block and may be made from many threads at once, but not
/// from inside of an asynchronous runtime.
#[derive(Clone)]
pub struct AgentClient(Arc<Shared>);

pub(crate) struct Shared {
    pub transport: Transport,
    pub compress: bool,
    has_v1: OnceLock<bool>,
    slots: Mutex<usize>,
    slot_freed: Condvar,
}

/// The right to one transfer, given back when it is dropped.
pub(crate) struct Slot<'a>(&'a Shared);

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        *self.0.slots.lock() += 1;
        self.0.slot_freed.notify_one();
    }
}

impl Shared {
    /// Waits for the right to one transfer.
    pub fn slot(&self) -> Slot<'_> {
        let mut slots = self.slots.lock();
        while *slots == 0 {
            self.slot_freed.wait(&mut slots);
        }
        *slots -= 1;
        Slot(self)
    }
}

impl AgentClient {
    /// For the agent of `url`. Asks nobody yet.
    ///
    /// # Errors
    /// [`AgentError::Usage`] for options that cannot be; those of reading a CA file.
    pub fn new(url: &AgentUrl, options: &AgentOptions) -> Result<Self> {
        Ok(Self(Arc::new(Shared {
            transport: Transport::new(url.authority(), url.agent(), options)?,
            compress: options.compress,
            has_v1: OnceLock::new(),
            slots: Mutex::new(TRANSFERS),
            slot_freed: Condvar::new(),
        })))
    }

    /// For the agent of a URL of VMs. Asks nobody yet.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`AgentError::Usage`] for a URL of this host, which has no agent in between.
    pub fn for_vms(url: &HypervUrl, options: &AgentOptions) -> Result<Self> {
        let authority = url.authority().ok_or_else(|| {
            AgentError::usage(format!("{url}: names this host, not an agent: add the agent's host"))
        })?;
        Ok(Self(Arc::new(Shared {
            transport: Transport::new(authority, format!("hyperv://{authority}"), options)?,
            compress: options.compress,
            has_v1: OnceLock::new(),
            slots: Mutex::new(TRANSFERS),
            slot_freed: Condvar::new(),
        })))
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.0
    }

    /// The agent as errors name it.
    pub fn agent(&self) -> &str {
        &self.0.transport.agent
    }

    /// Whether the agent is vmtide's own, with `/v1`: freezes, details, checksums, writing. Asks once.
    ///
    /// # Errors
    /// Where the agent cannot be reached, is another one, or the key is wrong.
    pub fn has_v1(&self, cancel: &CancelToken) -> Result<bool> {
        if let Some(known) = self.0.has_v1.get() {
            return Ok(*known);
        }
        let found = v1::is_there(&self.0.transport, cancel)?;
        Ok(*self.0.has_v1.get_or_init(|| found))
    }

    pub(crate) fn need_v1(&self, what: &str, cancel: &CancelToken) -> Result<()> {
        if self.has_v1(cancel)? {
            return Ok(());
        }
        let detail = format!(
            "this agent cannot {what}: it has only rct-service's interface; run `vmtide agent` there"
        );
        Err(AgentError::Unsupported { agent: self.agent().into(), detail })
    }

    /// What a disk is, as every agent tells it.
    ///
    /// # Errors
    /// [`AgentError::NotFound`], and those of the connection.
    pub fn info(&self, path: &str, cancel: &CancelToken) -> Result<DiskInfo> {
        contract::info(&self.0.transport, path, cancel)
    }

    /// What a disk is, in full; none where the agent has no `/v1`.
    ///
    /// # Errors
    /// As [`info`](Self::info).
    pub fn details(&self, path: &str, cancel: &CancelToken) -> Result<Option<DiskDetails>> {
        if self.has_v1(cancel)? {
            v1::details(&self.0.transport, path, cancel).map(Some)
        } else {
            Ok(None)
        }
    }

    /// The state of a disk's change tracking.
    ///
    /// # Errors
    /// As [`info`](Self::info).
    pub fn tracking(&self, path: &str, cancel: &CancelToken) -> Result<TrackingState> {
        contract::tracking(&self.0.transport, path, cancel)
    }

    /// Switches change tracking of a disk on or off. Needs a key that may write.
    ///
    /// # Errors
    /// As [`info`](Self::info), and where the agent refuses.
    pub fn set_tracking(&self, path: &str, enabled: bool, cancel: &CancelToken) -> Result<()> {
        contract::set_tracking(&self.0.transport, path, enabled, cancel)
    }

    /// The ranges of the live disk of `size_bytes` that changed since `id`, or why that is not known.
    ///
    /// # Errors
    /// Only of the connection and the key: what speaks against an answer is in the answer.
    pub fn changes(
        &self,
        path: &str,
        id: &str,
        size_bytes: u64,
        cancel: &CancelToken,
    ) -> Result<Changes> {
        if self.has_v1(cancel)? {
            v1::changes(&self.0.transport, &Place::Live(path.to_owned()), id, size_bytes, cancel)
        } else {
            contract::changes(&self.0.transport, path, id, size_bytes, cancel)
        }
    }

    /// The live disk, for reading. It shows writes that happen meanwhile.
    ///
    /// # Errors
    /// As [`info`](Self::info).
    pub fn open(&self, path: &str, cancel: &CancelToken) -> Result<AgentDisk> {
        let info = self.info(path, cancel)?;
        let place = self.has_v1(cancel)?.then(|| Place::Live(path.to_owned()));
        Ok(AgentDisk::new(self.clone(), path.to_owned(), place, info.virtual_size, cancel.clone()))
    }

    /// One moment of all of these disks, until what is returned is dropped.
    ///
    /// # Errors
    /// [`AgentError::Unsupported`] where the agent cannot, for want of `/v1` or on this platform.
    pub fn freeze(&self, paths: &[String], cancel: &CancelToken) -> Result<FrozenDisks> {
        self.need_v1("freeze disks", cancel)?;
        FrozenDisks::new(self, paths, cancel)
    }

    /// Makes a new, empty disk of `format` (`vhdx`, `vhd`, `qcow2`, `vmdk` or `raw`). Replaces nothing. Where an answer
    /// was lost and the disk is there when it is asked for again, of this format and size and empty, it is made.
    ///
    /// # Errors
    /// [`AgentError::Refused`] where it exists; [`AgentError::Unsupported`] without `/v1`.
    pub fn create(
        &self,
        path: &str,
        format: &str,
        size_bytes: u64,
        cancel: &CancelToken,
    ) -> Result<()> {
        self.need_v1("make disks", cancel)?;
        let document = CreateDocument {
            format: format.to_owned(),
            virtual_size_bytes: size_bytes,
            ..CreateDocument::default()
        };
        resend::create(&self.0.transport, path, &document, cancel)
    }

    /// A disk for writing: a restore.
    ///
    /// # Errors
    /// As [`info`](Self::info); [`AgentError::Unsupported`] without `/v1`.
    pub fn open_writable(&self, path: &str, cancel: &CancelToken) -> Result<WritableAgentDisk> {
        self.need_v1("write disks", cancel)?;
        Ok(WritableAgentDisk::new(self.open(path, cancel)?))
    }
}
