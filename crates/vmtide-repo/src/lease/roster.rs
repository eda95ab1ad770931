//! Who is at work: the leases as a listing shows them.

use super::{EXPIRES_AFTER, LeaseEnd, LeaseRecord};
use crate::context::RepoContext;
use crate::envelope::ObjectKind;
use crate::{ObjectId, Result, record};
use jiff::Timestamp;
use std::collections::BTreeMap;

/// One lease in a listing.
#[derive(Clone, Debug, Default)]
pub(crate) struct LeaseState {
    /// Its objects.
    pub names: Vec<String>,
    /// When it was heard of first and last, in the store's time.
    heard: Option<(Timestamp, Timestamp)>,
    /// Whether its holder ended it.
    pub ended: bool,
}

impl LeaseState {
    /// When it was heard of first.
    pub fn first_heard(&self) -> Option<Timestamp> {
        self.heard.map(|(first, _)| first)
    }

    /// Whether nobody heard of it for so long that it is taken for dead.
    pub fn is_expired(&self, now: Timestamp) -> bool {
        self.heard.is_none_or(|(_, last)| now.duration_since(last) > EXPIRES_AFTER)
    }
}

/// All leases, by id.
#[derive(Debug, Default)]
pub(crate) struct Roster {
    leases: BTreeMap<ObjectId, LeaseState>,
    /// The store's time: that of the last renewal of whoever asks, who renews just before, so that
    /// neither another clock nor an object with a time in the future counts. Without a lease of one's
    /// own, the latest time that any of the objects was written.
    pub now: Timestamp,
}

impl Roster {
    /// Lists them; `own` is the lease of whoever asks.
    ///
    /// # Errors
    /// Those of the store.
    pub fn read(context: &RepoContext, own: Option<ObjectId>) -> Result<Self> {
        let mut roster = Self { leases: BTreeMap::new(), now: Timestamp::MIN };
        context.store.list(ObjectKind::Lease.prefix(), &mut |entry| {
            let mut parts = entry.name.split('/').skip(1);
            let id = parts.next().and_then(|id| id.parse::<ObjectId>().ok());
            if let (Some(id), Some(last)) = (id, parts.next()) {
                let lease = roster.leases.entry(id).or_default();
                lease.ended |= last == "end";
                lease.heard =
                    Some(lease.heard.map_or((entry.modified, entry.modified), |(first, last)| {
                        (first.min(entry.modified), last.max(entry.modified))
                    }));
                roster.now = roster.now.max(entry.modified);
                lease.names.push(entry.name);
            }
            Ok(())
        })?;
        let heard = own.and_then(|own| roster.get(own)?.heard);
        roster.now = heard.map_or(roster.now, |(_, last)| last);
        Ok(roster)
    }

    /// One lease.
    pub fn get(&self, id: ObjectId) -> Option<&LeaseState> {
        self.leases.get(&id)
    }

    /// All leases.
    pub fn iter(&self) -> impl Iterator<Item = (ObjectId, &LeaseState)> {
        self.leases.iter().map(|(id, lease)| (*id, lease))
    }

    /// Those that did not end by themselves, but for `own`.
    pub fn unfinished(
        &self,
        own: Option<ObjectId>,
    ) -> impl Iterator<Item = (ObjectId, &LeaseState)> {
        self.iter().filter(move |(id, lease)| !lease.ended && Some(*id) != own)
    }
}

/// What a lease says about its holder; none where that is gone or cannot be read, which says
/// nothing.
///
/// # Errors
/// Those of the store other than damage.
pub(crate) fn read_record(context: &RepoContext, id: ObjectId) -> Result<Option<LeaseRecord>> {
    tolerate(record::try_read(context, context.header(ObjectKind::Lease, id)))
}

/// What a lease's end says; none where there is no end or it cannot be read.
///
/// # Errors
/// Those of the store other than damage.
pub(crate) fn read_end(context: &RepoContext, id: ObjectId) -> Result<Option<LeaseEnd>> {
    tolerate(record::try_read(context, context.header(ObjectKind::LeaseEnd, id)))
}

fn tolerate<T>(outcome: Result<Option<T>>) -> Result<Option<T>> {
    match outcome {
        Err(error) if error.is_damage() => {
            tracing::warn!(%error, "a lease cannot be read; only its times count");
            Ok(None)
        }
        other => other,
    }
}
