//! From a password to a slot key: Argon2id (format §5, RFC 9106).

use crate::password::Password;
use crate::{RepoError, Result};
use argon2::{Algorithm, Argon2, Block, Params, Version};
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde::{Deserialize, Serialize};
use std::io::{Error, ErrorKind};
use zeroize::Zeroizing;

/// The most a reader takes from a slot, which anybody who can write to the store may have put there:
/// no more memory than any other bytes from outside may ask for, and some seconds on one core.
/// Slots are tried cheapest first, so that such a slot never stands before an honest one.
const MAX_MEMORY_KIB: u32 = 256 << 10;
const MAX_ITERATIONS: u32 = 64;
const MAX_LANES: u32 = 16;

/// The most memory times passes, in KiB: 4 GiB written, some 5 s. The default costs a twentieth.
const MAX_COST_KIB: u64 = 4 << 20;

/// What Argon2 needs at least, per lane (RFC 9106 §3.1).
const MIN_MEMORY_KIB_PER_LANE: u32 = 8;

/// What one guess of a password costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KdfParameters {
    /// Memory in KiB: 8 per lane to 256 MiB.
    pub memory_kib: u32,
    /// Passes over the memory: 1 to 64, and no more than 4 GiB divided by the memory.
    pub iterations: u32,
    /// Lanes, which are computed in parallel where there are cores for it: 1 to 16.
    pub lanes: u32,
}

impl Default for KdfParameters {
    /// The second recommendation of RFC 9106 §4: 64 MiB, 3 passes, 4 lanes. Some 0.1 s of a core, and
    /// little enough memory for the smallest backup host.
    fn default() -> Self {
        Self { memory_kib: 64 << 10, iterations: 3, lanes: 4 }
    }
}

impl KdfParameters {
    /// What is wrong with them, in words, or nothing.
    pub(super) fn check(&self) -> Result<(), String> {
        let Self { memory_kib, iterations, lanes } = *self;
        if !(1..=MAX_LANES).contains(&lanes) {
            return Err(format!("{lanes} lanes; 1 to {MAX_LANES} are possible"));
        }
        let min_memory_kib = MIN_MEMORY_KIB_PER_LANE * lanes;
        if !(min_memory_kib..=MAX_MEMORY_KIB).contains(&memory_kib) {
            return Err(format!(
                "{memory_kib} KiB of memory; {min_memory_kib} to {MAX_MEMORY_KIB} are possible"
            ));
        }
        if !(1..=MAX_ITERATIONS).contains(&iterations) {
            return Err(format!("{iterations} iterations; 1 to {MAX_ITERATIONS} are possible"));
        }
        if self.cost() > MAX_COST_KIB {
            let most = MAX_COST_KIB / u64::from(memory_kib);
            return Err(format!(
                "{iterations} iterations over {memory_kib} KiB; {most} are possible"
            ));
        }
        Ok(())
    }

    /// What deriving a key takes, to compare.
    pub(super) fn cost(&self) -> u64 {
        u64::from(self.memory_kib) * u64::from(self.iterations)
    }

    /// The slot key of a password.
    ///
    /// # Errors
    /// `Io` where memory or threads are not to be had; [`RepoError::Invalid`] for parameters out of range.
    pub(super) fn derive(
        &self,
        password: &Password,
        salt: &[u8; 16],
    ) -> Result<Zeroizing<[u8; 32]>> {
        let invalid = |error: argon2::Error| RepoError::Invalid(format!("key derivation: {error}"));
        self.check().map_err(|detail| RepoError::Invalid(format!("key derivation: {detail}")))?;
        let params =
            Params::new(self.memory_kib, self.iterations, self.lanes, Some(32)).map_err(invalid)?;
        // Reserved by hand: what the library would do where there is too little is to abort.
        let mut blocks: Vec<Block> = Vec::new();
        blocks.try_reserve_exact(params.block_count()).map_err(|_| {
            RepoError::io(
                format!("derive a key with {} KiB of memory", self.memory_kib),
                Error::from(ErrorKind::OutOfMemory),
            )
        })?;
        blocks.resize(params.block_count(), Block::default());
        let mut key = Zeroizing::new([0; 32]);
        let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        // Threads of its own, gone with it: a program that loads us as a library keeps none.
        lane_threads(self.lanes)?
            .install(|| {
                argon2.hash_password_into_with_memory(
                    password.as_bytes(),
                    salt,
                    &mut key[..],
                    &mut blocks[..],
                )
            })
            .map_err(invalid)?;
        Ok(key)
    }
}

/// A thread for each lane, but no more than there are cores.
fn lane_threads(lanes: u32) -> Result<ThreadPool> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = usize::try_from(lanes).unwrap_or(usize::MAX).min(cores);
    ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|error| RepoError::io("start threads to derive a key", Error::other(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected values from the reference implementation in C, by way of Python's `argon2-cffi`.
    #[test]
    fn the_key_is_that_of_the_reference_implementation() {
        for (parameters, expected) in [
            (
                KdfParameters::default(),
                "2f56f5363a695288ff28810e46ad69a1fe3068bc6494cd26a8a673b7d9c2b0a2",
            ),
            (
                KdfParameters { lanes: 1, ..KdfParameters::default() },
                "92599c67f23f1d9dce9b6f0cfb5a9b18ce110336de00799947472465edd9e49a",
            ),
            (
                KdfParameters { memory_kib: 256, iterations: 2, lanes: 4 },
                "dc838a133d1ebc38ee7e6aed18636036e7db76e5486472a3c7300f0f0c48d25e",
            ),
        ] {
            let key =
                parameters.derive(&Password::new("correct horse"), b"0123456789abcdef").unwrap();
            assert_eq!(crate::id::to_hex(&key[..]), expected);
        }
    }

    #[test]
    fn parameters_out_of_range_are_refused() {
        let good = KdfParameters { memory_kib: 64, iterations: 1, lanes: 1 };
        assert_eq!(good.check(), Ok(()));
        assert_eq!(KdfParameters::default().check(), Ok(()));
        let dearest = KdfParameters { memory_kib: 256 << 10, iterations: 16, lanes: 16 };
        assert_eq!(dearest.check(), Ok(()));
        for bad in [
            KdfParameters { memory_kib: 7, ..good },
            KdfParameters { memory_kib: (256 << 10) + 1, ..good },
            KdfParameters { memory_kib: 256 << 10, iterations: 17, ..good },
            KdfParameters { memory_kib: (64 << 10) + 1, iterations: 64, ..good },
            KdfParameters { memory_kib: u32::MAX, ..good },
            KdfParameters { iterations: 0, ..good },
            KdfParameters { iterations: 65, ..good },
            KdfParameters { iterations: u32::MAX, ..good },
            KdfParameters { lanes: 0, ..good },
            KdfParameters { lanes: 9, ..good },
            KdfParameters { memory_kib: 1 << 20, lanes: 17, ..good },
            KdfParameters { memory_kib: 0, iterations: 0, lanes: u32::MAX },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
            let derived = bad.derive(&Password::new("x"), &[0; 16]);
            assert!(matches!(derived, Err(RepoError::Invalid(_))), "{bad:?}");
        }
    }
}
