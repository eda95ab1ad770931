//! Drawing a sample of frames, and saying what it is worth.
//!
//! Every frame is drawn or not by a hash of its pack's id and its number under a seed: no list of
//! frames is kept, whatever the repository's size, and the same seed draws the same frames. Drawn
//! that way the sample is one without replacement, so with *n* of *N* frames read the chance to miss
//! all of *d* damaged ones is C(N−d, n) / C(N, n).

use super::verify::Needed;
use crate::context::RepoContext;
use crate::envelope::ObjectKind;
use crate::{ObjectId, RepoError, Result};
use serde::Serialize;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// The whole, in parts per million.
const MILLION: u32 = 1_000_000;

/// The share of damaged frames that the report speaks of: one of a thousand.
const SPOKEN_SHARE: f64 = 0.001;

/// The confidence that the report's limit is given with.
const CONFIDENCE: f64 = 0.99;

/// How much of the data to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadData {
    /// Nothing: only that all is there.
    #[default]
    None,
    /// So many frames of a million, at random.
    PerMillion(u32),
    /// About so many stored bytes, at random.
    Bytes(u64),
    /// Everything.
    All,
}

impl ReadData {
    /// So many percent of the frames; 100 and more are all, 0 none.
    pub fn percent(percent: u8) -> Self {
        match percent {
            0 => Self::None,
            1..100 => Self::PerMillion(u32::from(percent) * (MILLION / 100)),
            _ => Self::All,
        }
    }

    /// Whether anything is read.
    pub fn is_some(self) -> bool {
        self != Self::None
    }
}

/// What a sample says of the frames that were not read.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SampleReport {
    /// What draws the same sample again.
    pub seed: u64,
    /// The share of frames read, from 0 to 1.
    pub share: f64,
    /// If one frame of a thousand were damaged: the chance that this sample would have found one.
    pub chance_if_one_in_a_thousand: f64,
    /// With 99 % confidence no more than this share of the frames is damaged, where the sample found
    /// none.
    pub damaged_share_at_most: f64,
}

/// A sample to be drawn. Shared by threads.
pub(super) struct Sampling {
    seed: u64,
    /// A frame whose hash is below this is read; none reads all.
    limit: Option<u64>,
}

impl Sampling {
    /// Draws the sample.
    ///
    /// # Errors
    /// Those of listing the packs, whose lengths say what share so many bytes are; `Io` where there
    /// is no randomness.
    pub fn new(
        read: ReadData,
        seed: Option<u64>,
        context: &RepoContext,
        needed: &Needed,
    ) -> Result<Self> {
        let share = match read {
            ReadData::None => Some(0.0),
            ReadData::PerMillion(parts) if parts < MILLION => {
                Some(f64::from(parts) / f64::from(MILLION))
            }
            ReadData::PerMillion(_) | ReadData::All => None,
            ReadData::Bytes(bytes) => {
                let total = total_bytes(context, needed)?;
                (bytes < total).then(|| real(bytes) / real(total))
            }
        };
        let seed = match seed {
            Some(seed) => seed,
            None => random_seed()?,
        };
        // All of 2⁶⁴ is not reached by a share below one.
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share is between 0 and 1, and the cast saturates"
        )]
        let limit = share.map(|share| (share * 18_446_744_073_709_551_616.0) as u64);
        Ok(Self { seed, limit })
    }

    /// Whether all frames are read.
    pub const fn is_all(&self) -> bool {
        self.limit.is_none()
    }

    /// Whether a frame is drawn.
    pub fn draws(&self, pack: ObjectId, frame: usize) -> bool {
        let Some(limit) = self.limit else { return true };
        let mut name = [0; 24];
        name[..16].copy_from_slice(&pack.0);
        name[16..].copy_from_slice(&(frame as u64).to_le_bytes());
        xxh3_64_with_seed(&name, self.seed) < limit
    }

    /// What it is worth; none where everything was read.
    pub fn report(&self, frames: u64, read: u64) -> Option<SampleReport> {
        if self.is_all() || frames == 0 {
            return None;
        }
        let spoken = (real(frames) * SPOKEN_SHARE).ceil().max(1.0);
        Some(SampleReport {
            seed: self.seed,
            share: real(read) / real(frames),
            chance_if_one_in_a_thousand: 1.0 - chance_to_miss(real(frames), real(read), spoken),
            damaged_share_at_most: damaged_at_most(real(frames), real(read)) / real(frames),
        })
    }
}

/// A seed that is short enough to be typed.
fn random_seed() -> Result<u64> {
    getrandom::u32()
        .map(u64::from)
        .map_err(|error| RepoError::io("get random bytes", std::io::Error::other(error)))
}

fn total_bytes(context: &RepoContext, needed: &Needed) -> Result<u64> {
    let mut total = 0;
    context.store.list(ObjectKind::Pack.prefix(), &mut |entry| {
        if ObjectKind::of_name(&entry.name).is_some_and(|(_, id)| needed.contains_key(&id)) {
            total += entry.length_bytes;
        }
        Ok(())
    })?;
    Ok(total)
}

/// The chance that none of `damaged` frames is among `read` of `frames`: C(N−d, n) / C(N, n), which is
/// the product of (n' − i) / (N − i) for i below d, n' being the frames not read.
fn chance_to_miss(frames: f64, read: f64, damaged: f64) -> f64 {
    let left = frames - read;
    if damaged > left {
        return 0.0;
    }
    // ln Γ would do it in one step; so many factors as there are in a thousand million frames are as
    // quick, and what is smaller than a double can say is zero.
    let (mut chance, mut index) = (1.0, 0.0);
    while index < damaged && chance > 1e-12 {
        chance *= (left - index) / (frames - index);
        index += 1.0;
    }
    chance
}

/// The most damaged frames that a sample misses with a chance of more than 1 %.
fn damaged_at_most(frames: f64, read: f64) -> f64 {
    let (mut damaged, mut chance) = (0.0, 1.0);
    let left = frames - read;
    while damaged < left {
        chance *= (left - damaged) / (frames - damaged);
        if chance < 1.0 - CONFIDENCE {
            return damaged;
        }
        damaged += 1.0;
    }
    left
}

/// Counts of frames and bytes stay far below 2⁵³.
#[allow(clippy::cast_precision_loss, reason = "see above")]
const fn real(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chance_is_that_of_drawing_without_replacement() {
        // One damaged of ten, five read: half the time.
        assert!((chance_to_miss(10.0, 5.0, 1.0) - 0.5).abs() < 1e-12);
        // C(8, 5) / C(10, 5) = 56 / 252.
        assert!((chance_to_miss(10.0, 5.0, 2.0) - 56.0 / 252.0).abs() < 1e-12);
        assert!(chance_to_miss(10.0, 9.0, 2.0).abs() < f64::EPSILON);
        assert!((chance_to_miss(10.0, 0.0, 3.0) - 1.0).abs() < f64::EPSILON);
        // A tenth of many: 1 − 0.9^d, so 44 damaged ones are found with 99 %.
        let found = 1.0 - chance_to_miss(1e7, 1e6, 44.0);
        assert!((0.99..0.9904).contains(&found), "{found}");
        let most = damaged_at_most(1e7, 1e6);
        assert!((most - 43.0).abs() < 1.5, "{most}");
        assert!((damaged_at_most(10.0, 0.0) - 10.0).abs() < f64::EPSILON);
        assert!(damaged_at_most(10.0, 10.0).abs() < f64::EPSILON);
    }

    #[test]
    fn a_share_draws_that_share_and_the_same_seed_the_same_frames() {
        let sampling = |seed| Sampling { seed, limit: Some(u64::MAX / 10) };
        let drawn = |seed| -> Vec<(u8, usize)> {
            let sampling = sampling(seed);
            let frames = (0..100u8).flat_map(|pack| (0..100).map(move |frame| (pack, frame)));
            frames.filter(|(pack, frame)| sampling.draws(ObjectId([*pack; 16]), *frame)).collect()
        };
        let first = drawn(1);
        // Expected 1000, with a standard deviation of 30.
        assert!((850..1150).contains(&first.len()), "{}", first.len());
        assert_eq!(first, drawn(1));
        assert_ne!(first, drawn(2));
    }
}
