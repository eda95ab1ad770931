//! Seams for the simulation of many processes in one: whose turn it is, what is random, who is
//! dead; and switches that leave out one part of the protocol, so that the simulation can be seen to
//! find what that part is for. Only in builds for tests (feature `simulation`).

use crate::ObjectId;
use parking_lot::Mutex;
use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::Arc;

/// A part of the protocol that is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Weakness {
    /// Prune does not wait for leases.
    LeasesIgnored,
    /// Writers do not read condemned lists.
    CondemnedIgnored,
    /// Restore points that a judgement leaves out count all the same.
    JudgementIgnored,
    /// A writer does not look whether its lease was revoked before it reports that it is done.
    CommitUnchecked,
    /// A prune decides by what it marked before its list could be seen.
    MarkedBefore,
    /// A list goes though not all that was found dead is gone.
    ListRemovedEarly,
    /// Writers trust the index: they refer to packs without looking whether they are there.
    IndexTrusted,
    /// Writers build on a restore point without looking whether it is still there.
    BaseUnchecked,
    /// Prune removes moved packs without looking whether all is where the forward says.
    ForwardTrusted,
    /// Prune removes the moment a verdict is put, whoever may be about to remove the list.
    VerdictUnconfirmed,
    /// Prune takes a lease for ended that ended only after the restore points were marked.
    RosterReadAgain,
}

/// One simulated process, as its thread carries it.
#[derive(Clone, Debug)]
pub struct Actor {
    /// Its number; not that of any other.
    pub pid: u32,
    /// The state of its random numbers.
    pub random: u64,
    /// The processes that are known to have ended.
    pub gone: Arc<Mutex<HashSet<u32>>>,
    /// What is left out.
    pub weakness: Option<Weakness>,
}

thread_local! {
    static ACTOR: RefCell<Option<Actor>> = const { RefCell::new(None) };
}

/// Makes this thread that of a simulated process, or of none again.
pub fn set_actor(actor: Option<Actor>) {
    ACTOR.with(|slot| *slot.borrow_mut() = actor);
}

/// The process number of this thread, where it is simulated.
pub(crate) fn process() -> Option<u32> {
    ACTOR.with(|slot| slot.borrow().as_ref().map(|actor| actor.pid))
}

/// Whether a simulated process is known to have ended.
pub(crate) fn is_gone(pid: u32) -> Option<bool> {
    ACTOR.with(|slot| slot.borrow().as_ref().map(|actor| actor.gone.lock().contains(&pid)))
}

/// Whether this part of the protocol is left out.
pub(crate) fn is_weak(weakness: Weakness) -> bool {
    ACTOR.with(|slot| slot.borrow().as_ref().is_some_and(|actor| actor.weakness == Some(weakness)))
}

/// The next random id of this thread, where it is simulated.
pub(crate) fn random_id() -> Option<ObjectId> {
    ACTOR.with(|slot| {
        let mut slot = slot.borrow_mut();
        let actor = slot.as_mut()?;
        let mut bytes = [0; 16];
        for half in bytes.chunks_exact_mut(8) {
            half.copy_from_slice(&next(&mut actor.random).to_le_bytes());
        }
        Some(ObjectId(bytes))
    })
}

/// SplitMix64, which is enough for ids that only have to differ.
const fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut value = *state;
    value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}
