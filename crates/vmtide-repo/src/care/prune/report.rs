//! What a prune is told, and what it tells.

use crate::ObjectId;
use crate::lease::Purpose;
use jiff::Timestamp;
use serde::Serialize;
use std::time::Duration;

/// The size of a rewritten pack; as in a backup.
const PACK_SIZE_BYTES: u64 = 64 << 20;

/// How to prune.
#[derive(Clone, Debug)]
pub struct PruneOptions {
    /// Only say what would be done.
    pub dry_run: bool,
    /// Packs of which less than this percentage of chunks is alive are rewritten; 0 rewrites none.
    pub repack_below_percent: u8,
    /// The most bytes that are rewritten in one run, those packs first of which least is alive; none
    /// for no limit.
    pub max_repack_bytes: Option<u64>,
    /// How long to wait for backups and readers that began before.
    pub wait: Duration,
    /// The size at which a rewritten pack is finished, in bytes.
    pub pack_size_bytes: u64,
    /// Goes on though another prune is at work: that is safe, and mostly work done twice.
    pub beside_others: bool,
}

impl Default for PruneOptions {
    fn default() -> Self {
        Self {
            dry_run: false,
            repack_below_percent: 50,
            max_repack_bytes: None,
            wait: Duration::ZERO,
            pack_size_bytes: PACK_SIZE_BYTES,
            beside_others: false,
        }
    }
}

/// Somebody whose end a prune waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WaitsFor {
    /// The lease.
    pub lease: ObjectId,
    /// What they do; none where the lease does not tell.
    pub purpose: Option<Purpose>,
    /// The host they are on.
    pub host: String,
    /// Since when, in the store's time.
    pub since: Option<Timestamp>,
}

/// What prune did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PruneReport {
    /// Whether nothing was really done.
    pub dry_run: bool,
    /// Packs that are there afterwards of those that were there before.
    pub packs_kept: u64,
    /// Packs removed because nothing in them is needed, now or by an earlier run's list.
    pub packs_removed: u64,
    /// Packs rewritten without their dead chunks.
    pub packs_repacked: u64,
    /// Map segments removed.
    pub maps_removed: u64,
    /// Index segments replaced by the new one.
    pub index_removed: u64,
    /// Packs that should have been rewritten but are damaged, and were left as they are.
    pub packs_damaged: u64,
    /// Bytes given back to the store.
    pub freed_bytes: u64,
    /// Bytes written for rewritten packs.
    pub rewritten_bytes: u64,
    /// Objects that are not needed and wait until those who were at work before have ended.
    pub waiting_objects: u64,
    /// Their bytes.
    pub waiting_bytes: u64,
    /// Whose end they wait for.
    pub waits_for: Vec<WaitsFor>,
    /// Objects that are not needed and that the store keeps until a time.
    pub locked_objects: u64,
    /// The latest of these times.
    pub locked_until: Option<Timestamp>,
    /// Objects that were to be removed and turned out to be needed.
    pub needed_after_all: u64,
    /// Objects so new that somebody at work may have made them; looked at by a later run.
    pub new_objects: u64,
    /// Leases of the dead that were revoked.
    pub leases_revoked: u64,
    /// Restore points removed that did not count: their backup was taken for dead before it was done.
    pub void_points: u64,
}
