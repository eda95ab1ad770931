//! Finding the place that a block is read from (format §10, §10.1).
//!
//! A block may be in several places: where its map says, behind a forward, and wherever it was
//! stored once more because one of these was damaged. The original comes first: what healed it is
//! only taken where the original is on record as damaged or cannot be opened, and counts only where
//! it leads to a pack that has the block and is not on record itself. So a disk that comes back, a
//! record that is taken back, and two places that heal each other do no harm. What is on record is
//! the last resort: it may be readable in spite of it, a pack first that was missing or did not open
//! and now does.

use super::Forwards;
use super::packs::{MAX_FORWARDS, PackSet, Passed, Place, Traced};
use super::repairs::Repairs;
use crate::context::RepoContext;
use crate::envelope::ObjectKind;
use crate::map::LOST;
use crate::pack::{Pack, is_media_error};
use crate::{Location, RepoError, Result};
use std::collections::VecDeque;
use std::sync::Arc;

/// The most places that are looked at for one block: hostile records must not make a search without
/// end. More than a few means that the same content was damaged again and again.
const MAX_PLACES: usize = 64;

/// A place that the way leads through.
#[derive(Clone, Copy)]
struct Step {
    at: Location,
    /// The step before it, and what leads from there to here; none for the first.
    before: Option<(usize, Passed)>,
    /// How many were passed.
    passed: usize,
    /// Whether a record of what was healed was passed.
    healed: bool,
}

/// One search.
pub(super) struct Search<'a> {
    packs: &'a PackSet,
    context: &'a RepoContext,
    /// None where the way is to lead past what was healed.
    repairs: Option<&'a Repairs>,
    /// For how many blocks all that was found out holds.
    count: u32,
    steps: Vec<Step>,
    queue: VecDeque<usize>,
    /// Those on record as damaged.
    later: VecDeque<usize>,
    failure: Option<(usize, RepoError)>,
}

impl<'a> Search<'a> {
    pub(super) fn new(
        packs: &'a PackSet,
        context: &'a RepoContext,
        repairs: Option<&'a Repairs>,
    ) -> Self {
        Self {
            packs,
            context,
            repairs: repairs.filter(|repairs| !repairs.healed.is_empty()),
            count: 0,
            steps: Vec::new(),
            queue: VecDeque::new(),
            later: VecDeque::new(),
            failure: None,
        }
    }

    /// Looks for `count` blocks from `start` on, as far as the same holds for them.
    ///
    /// # Errors
    /// Those of the store, but not [`RepoError::Damaged`], which is an answer.
    pub(super) fn run(
        mut self,
        start: Location,
        count: u32,
        passed: &mut dyn FnMut(Passed),
    ) -> Result<Traced> {
        self.count = count;
        self.steps.push(Step { at: start, before: None, passed: 0, healed: false });
        self.queue.push_back(0);
        let mut on_record = None;
        while let Some((number, is_late)) = self.next() {
            if !is_late && self.is_put_off(number) {
                continue;
            }
            match self.open(number)? {
                Some(pack) if is_late && !self.is_back(number) => {
                    on_record.get_or_insert((number, pack));
                }
                Some(pack) => return Ok(self.found(number, pack, passed)),
                None => {}
            }
        }
        if let Some((number, pack)) = on_record {
            return Ok(self.found(number, pack, passed));
        }
        let Some((number, error)) = self.failure.take() else {
            return Err(RepoError::Invalid("a block was looked for nowhere".into()));
        };
        if !error.is_damage() {
            return Err(error);
        }
        self.tell(number, passed);
        Ok(Traced { count: self.count, last: self.steps[number].at, place: Err(error) })
    }

    /// Whether what is on record of an opened place is that its pack does not open.
    fn is_back(&self, number: usize) -> bool {
        let at = self.steps[number].at;
        self.repairs.is_some_and(|repairs| repairs.damaged.covers_pack_only(at))
    }

    /// The next place to look at, and whether it was put off before.
    fn next(&mut self) -> Option<(usize, bool)> {
        let now = self.queue.pop_front().map(|number| (number, false));
        now.or_else(|| self.later.pop_front().map(|number| (number, true)))
    }

    /// Notes where the block was stored once more; answers with whether it is to be looked for there
    /// first.
    fn is_put_off(&mut self, number: usize) -> bool {
        let Some(repairs) = self.repairs else { return false };
        let at = self.steps[number].at;
        self.count = repairs.healed.same_for(at, self.count);
        self.count = repairs.damaged.same_for(at, self.count);
        let mut was_healed = false;
        for run in repairs.healed.over(at) {
            was_healed = true;
            let ordinal = run.target.ordinal + (at.ordinal - run.ordinal);
            let target = Location { pack: run.target.pack, ordinal };
            if let Some(next) = self.add(number, target, Passed::Healed(run.record)) {
                self.queue.push_back(next);
            }
        }
        // Where a record of damage cannot be read, it may have been of this.
        let is_on_record =
            repairs.damaged.covers(at) || (was_healed && !repairs.damaged.unreadable.is_empty());
        if is_on_record {
            self.later.push_back(number);
        }
        is_on_record
    }

    /// The pack in a place, if it is one that has the block. A forward is followed next.
    fn open(&mut self, number: usize) -> Result<Option<Arc<Pack>>> {
        let step = self.steps[number];
        match self.packs.place(step.at.pack) {
            Ok(Place::Pack(pack)) => return Ok(self.has_block(step, &pack).then_some(pack)),
            Ok(Place::Moved(forwards)) => self.follow(number, &forwards),
            Err(error) if is_media_error(&error) => {
                // A second place that came to nothing, or is gone again, heals nothing; nobody
                // needs to know.
                if !step.healed && step.at.pack != LOST {
                    self.context.damage.note(step.at.pack, None, error.to_string());
                }
                self.fail(number, error);
            }
            Err(error) => return Err(error),
        }
        Ok(None)
    }

    /// Goes on where a pack was moved to: of several forwards any that leads to a pack is right.
    fn follow(&mut self, number: usize, forwards: &Forwards) {
        let at = self.steps[number].at;
        let hops: Vec<_> = forwards.over(at.ordinal, self.count).collect();
        if hops.is_empty() {
            let detail = format!("no forward says where block {} went", at.ordinal);
            let name = ObjectKind::Pack.object_name(at.pack);
            self.fail(number, RepoError::damaged(name, detail));
            return;
        }
        let mut next = Vec::new();
        for (forward, target, count) in hops {
            self.count = self.count.min(count);
            next.extend(self.add(number, target, Passed::Forward(forward)));
        }
        if next.is_empty() {
            self.fail(number, too_far(at));
        }
        next.into_iter().rev().for_each(|next| self.queue.push_front(next));
    }

    /// Whether the pack that heals has the block, and for how many more. What a map says is held
    /// against the pack by whoever reads.
    fn has_block(&mut self, step: Step, pack: &Pack) -> bool {
        if !step.healed {
            return true;
        }
        let end = pack.frames().len().checked_sub(1).map_or(0, |last| pack.blocks_of(last).end);
        match end.checked_sub(step.at.ordinal) {
            None | Some(0) => false,
            Some(left) => {
                self.count = self.count.min(left);
                true
            }
        }
    }

    /// Adds a place that `passed` leads to; none where it is known or too far away.
    fn add(&mut self, from: usize, at: Location, passed: Passed) -> Option<usize> {
        let before = self.steps[from];
        let is_known = self.steps.iter().any(|step| step.at == at);
        if is_known || before.passed >= MAX_FORWARDS || self.steps.len() >= MAX_PLACES {
            return None;
        }
        self.steps.push(Step {
            at,
            before: Some((from, passed)),
            passed: before.passed + 1,
            healed: before.healed || matches!(passed, Passed::Healed(_)),
        });
        Some(self.steps.len() - 1)
    }

    /// Keeps the first reason, that of the original if there is one.
    fn fail(&mut self, number: usize, error: RepoError) {
        let key = |number: usize| (self.steps[number].healed, number);
        if self.failure.as_ref().is_none_or(|(known, _)| key(number) < key(*known)) {
            self.failure = Some((number, error));
        }
    }

    fn found(&self, number: usize, pack: Arc<Pack>, passed: &mut dyn FnMut(Passed)) -> Traced {
        self.tell(number, passed);
        let last = self.steps[number].at;
        Traced { count: self.count, last, place: Ok((pack, last.ordinal)) }
    }

    /// Tells what was passed on the way to a place.
    fn tell(&self, number: usize, passed: &mut dyn FnMut(Passed)) {
        let mut way = Vec::new();
        let mut step = self.steps[number];
        while let Some((from, through)) = step.before {
            way.push(through);
            step = self.steps[from];
        }
        way.into_iter().rev().for_each(passed);
    }
}

fn too_far(at: Location) -> RepoError {
    let detail = format!("leads through more than {MAX_FORWARDS} forwards, or in a circle");
    RepoError::damaged(ObjectKind::Pack.object_name(at.pack), detail)
}

#[cfg(test)]
mod tests;
