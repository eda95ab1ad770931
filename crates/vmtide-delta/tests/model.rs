//! Deltas held against a model: a disk is a vector of bytes, a delta is what turns one into another.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test, in helpers of tests, too"
)]

use proptest::prelude::*;
use std::io::Cursor;
use std::sync::Arc;
use vmtide_block::{BlockDevice, ByteRange, CancelToken, MemoryDevice, Progress, RangeSet};
use vmtide_delta::{
    ApplyOptions, ApplyPlan, CreateOptions, DeltaError, DeltaFile, DeltaHeader, DeltaReader,
    DeltaSource, apply_stream, create_delta, merge_deltas,
};

const UNIT: usize = 4096;

/// A disk of units, each of one byte's value, so that zeros and equal units are frequent.
fn disk(units: &[u8], rest: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> =
        units.iter().flat_map(|value| std::iter::repeat_n(*value, UNIT)).collect();
    bytes.extend(std::iter::repeat_n(7, rest));
    bytes
}

fn any_disk() -> impl Strategy<Value = Vec<u8>> {
    (prop::collection::vec(0..4u8, 1..90), 0..UNIT).prop_map(|(units, rest)| disk(&units, rest))
}

/// The ranges in which two disks differ, bytes past the end of the shorter one counting as zeros.
fn changed(old: &[u8], new: &[u8]) -> RangeSet {
    (0..new.len())
        .filter(|at| old.get(*at).copied().unwrap_or(0) != new[*at])
        .map(|at| ByteRange::new(at as u64, 1))
        .collect()
}

struct Made {
    bytes: Vec<u8>,
    digest: String,
}

fn make(old: &[u8], new: &[u8], ids: (usize, usize), options: &CreateOptions, whole: bool) -> Made {
    let (base, device) =
        (MemoryDevice::from_bytes(old.to_vec()), MemoryDevice::from_bytes(new.to_vec()));
    let changed = if whole { RangeSet::full(new.len() as u64) } else { changed(old, new) };
    let source = DeltaSource { device: &device, base: Some(&base), changed: &changed };
    let header = DeltaHeader {
        base_id: format!("moment {}", ids.0),
        new_id: format!("moment {}", ids.1),
        max_frame_bytes: 16 << 10,
        ..DeltaHeader::new(old.len() as u64, new.len() as u64)
    };
    let mut bytes = Vec::new();
    let summary =
        create_delta(&source, &header, options, &mut bytes, &Progress::new(), &CancelToken::new())
            .unwrap();
    assert_eq!(summary.stream_bytes, bytes.len() as u64);
    if whole && options.differing_only {
        let most = changed_units(old, new) * UNIT as u64;
        assert!(summary.totals.changed_bytes() <= most + 2 * UNIT as u64, "{summary:?}");
    }
    Made { bytes, digest: summary.digest }
}

fn changed_units(old: &[u8], new: &[u8]) -> u64 {
    changed(old, new).align_outward(UNIT as u64, u64::MAX).total_bytes() / UNIT as u64
}

fn file(bytes: &[u8]) -> DeltaFile {
    DeltaFile::open(Arc::new(MemoryDevice::from_bytes(bytes.to_vec()))).unwrap()
}

fn apply(delta: &[u8], target: &[u8]) -> Result<Vec<u8>, DeltaError> {
    let (progress, cancel) = (Progress::new(), CancelToken::new());
    let (delta, target) = (file(delta), MemoryDevice::from_bytes(target.to_vec()));
    let options = ApplyOptions { workers: 3, ..ApplyOptions::default() };
    let plan = ApplyPlan::prepare(&delta, &target, &options, &progress, &cancel)?;
    plan.write(&target, &progress, &cancel)?;
    Ok(target.to_bytes())
}

fn apply_piped(delta: &[u8], target: &[u8]) -> Vec<u8> {
    let target = MemoryDevice::from_bytes(target.to_vec());
    let mut reader = DeltaReader::new(delta, "a pipe").unwrap();
    let (progress, cancel) = (Progress::new(), CancelToken::new());
    apply_stream(&mut reader, &target, &ApplyOptions::default(), &progress, &cancel).unwrap();
    target.to_bytes()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_delta_turns_the_old_disk_into_the_new_one(
        old in any_disk(),
        new in any_disk(),
        differing_only in any::<bool>(),
        whole in any::<bool>(),
        level in prop::sample::select(vec![None, Some(1), Some(9)]),
        workers in 1..4usize,
    ) {
        let options = CreateOptions { level, workers, differing_only, base_digests: true };
        let delta = make(&old, &new, (0, 1), &options, whole);
        let again = make(&old, &new, (0, 1), &CreateOptions { workers: 1, ..options.clone() }, whole);
        prop_assert_eq!(&delta.bytes, &again.bytes, "the same whatever the number of workers");
        prop_assert_eq!(apply(&delta.bytes, &old).unwrap(), new.clone());
        prop_assert_eq!(apply_piped(&delta.bytes, &old), new.clone());
        // A reader of the stream and one of the file find the same.
        let streamed = DeltaReader::new(&delta.bytes[..], "x").unwrap().read_to_end().unwrap();
        let verified = file(&delta.bytes).verify(2, &Progress::new(), &CancelToken::new()).unwrap();
        prop_assert_eq!(&streamed, &verified);
        prop_assert_eq!(&streamed.digest, &delta.digest);
        // By the index, any place is found.
        let mut all = RangeSet::new();
        let view = file(&delta.bytes);
        let whole_disk = ByteRange::new(0, new.len() as u64);
        view.for_each_extent(whole_disk, &CancelToken::new(), |extent| {
            all.insert(extent.range);
            Ok(())
        }).unwrap();
        prop_assert_eq!(all.total_bytes(), streamed.totals.changed_bytes());
        let window = ByteRange::new(new.len() as u64 / 3, new.len() as u64 / 4);
        let mut some = RangeSet::new();
        view.for_each_extent(window, &CancelToken::new(), |extent| {
            some.insert(extent.range);
            Ok(())
        }).unwrap();
        prop_assert_eq!(some, all.within(window));
    }

    #[test]
    fn merged_deltas_do_what_they_do_one_after_the_other(
        disks in prop::collection::vec(any_disk(), 2..6),
        level in prop::sample::select(vec![None, Some(1)]),
    ) {
        let options = CreateOptions { level, workers: 2, differing_only: true, base_digests: true };
        let made: Vec<Made> = (1..disks.len())
            .map(|at| make(&disks[at - 1], &disks[at], (at - 1, at), &options, true))
            .collect();
        let mut readers: Vec<_> = made
            .iter()
            .map(|made| DeltaReader::new(Cursor::new(made.bytes.clone()), "x").unwrap())
            .collect();
        let mut merged = Vec::new();
        let (progress, cancel) = (Progress::new(), CancelToken::new());
        let summary = merge_deltas(&mut readers, &options, &mut merged, &progress, &cancel).unwrap();
        prop_assert_eq!(summary.header.base_id, "moment 0");
        prop_assert_eq!(summary.header.new_id, format!("moment {}", disks.len() - 1));
        let (first, last) = (&disks[0], &disks[disks.len() - 1]);
        prop_assert_eq!(&apply(&merged, first).unwrap(), last);
        prop_assert_eq!(&apply_piped(&merged, first), last);
        if disks.len() > 2 {
            let mut wrong: Vec<_> = made
                .iter()
                .rev()
                .map(|made| DeltaReader::new(Cursor::new(made.bytes.clone()), "x").unwrap())
                .collect();
            let refused = merge_deltas(&mut wrong, &options, &mut Vec::new(), &progress, &cancel);
            let is_broken = matches!(refused, Err(DeltaError::BrokenChain { .. }));
            prop_assert!(is_broken);
        }
    }

    #[test]
    fn a_wrong_base_is_found_before_anything_is_written(
        old in any_disk(),
        seed in any::<prop::sample::Index>(),
    ) {
        let mut new = old.clone();
        new.iter_mut().step_by(3 * UNIT).for_each(|byte| *byte = byte.wrapping_add(100));
        let options = CreateOptions::default();
        let delta = make(&old, &new, (0, 1), &options, false);
        let mut other = old.clone();
        // One byte, in a place that the delta speaks of.
        let places = changed(&old, &new);
        let at = places.as_slice()[seed.index(places.as_slice().len())].offset;
        other[usize::try_from(at).unwrap()] ^= 0x55;
        let refused = apply(&delta.bytes, &other);
        let is_found = matches!(refused, Err(DeltaError::WrongBase { .. }));
        prop_assert!(is_found, "{:?}", refused);
    }
}

#[test]
fn size_and_moment_of_the_target_are_checked() {
    let (old, new) = (disk(&[1, 2, 3], 0), disk(&[1, 5, 3], 0));
    let delta = make(&old, &new, (0, 1), &CreateOptions::default(), true);
    let wrong = |target: &[u8], id: Option<&str>| {
        let (progress, cancel) = (Progress::new(), CancelToken::new());
        let (delta, target) = (file(&delta.bytes), MemoryDevice::from_bytes(target.to_vec()));
        let options = ApplyOptions { target_id: id.map(Into::into), ..ApplyOptions::default() };
        let prepared = ApplyPlan::prepare(&delta, &target, &options, &progress, &cancel);
        prepared.err().map(|error| error.to_string())
    };
    assert_eq!(wrong(&old, None), None);
    assert_eq!(wrong(&old, Some("moment 0")), None);
    assert!(wrong(&old, Some("moment 7")).unwrap().contains("moment 7"));
    assert!(wrong(&old[UNIT..], None).unwrap().contains("bytes"));
}

#[test]
fn a_delta_of_nothing_is_one() {
    let old = disk(&[1, 2], 9);
    let options = CreateOptions { differing_only: true, ..CreateOptions::default() };
    let delta = make(&old, &old, (0, 1), &options, true);
    assert_eq!(file(&delta.bytes).summary().totals.frames, 0);
    assert_eq!(apply(&delta.bytes, &old).unwrap(), old);
    assert_eq!(apply_piped(&delta.bytes, &old), old);
}

/// Every truncation and every altered byte of a delta is found, by the file's reader and by the
/// stream's, and a prepared target is never written to.
#[test]
fn torn_and_altered_deltas_are_refused_with_the_target_untouched() {
    let (old, new) = (disk(&[1, 2, 3, 0, 2, 1], 100), disk(&[1, 0, 3, 2, 2, 3, 3], 5));
    let options = CreateOptions { workers: 1, differing_only: true, ..CreateOptions::default() };
    let good = make(&old, &new, (0, 1), &options, true).bytes;
    let (progress, cancel) = (Progress::new(), CancelToken::new());
    let apply_options = ApplyOptions { workers: 1, ..ApplyOptions::default() };
    let refused = |bytes: &[u8]| {
        let streamed = DeltaReader::new(bytes, "x").and_then(|mut reader| reader.read_to_end());
        assert!(streamed.is_err());
        let target = MemoryDevice::from_bytes(old.clone());
        let outcome =
            DeltaFile::open(Arc::new(MemoryDevice::from_bytes(bytes.to_vec()))).and_then(|delta| {
                let plan = ApplyPlan::prepare(&delta, &target, &apply_options, &progress, &cancel)?;
                plan.write(&target, &progress, &cancel)
            });
        assert!(outcome.is_err());
        assert!(target.to_bytes() == old && target.size_bytes() == old.len() as u64);
    };
    for length in 0..good.len() {
        refused(&good[..length]);
    }
    for at in 0..good.len() {
        let mut altered = good.clone();
        altered[at] ^= 0x20;
        refused(&altered);
    }
    refused(&[&good[..], &[0]].concat());
    // Two frames in the other order, a frame left out, one twice: each is right by itself.
    let heads: Vec<usize> =
        (0..good.len() - 4).filter(|at| good[*at..*at + 4] == *b"VMTR").collect();
    let frame = &good[heads[0]..heads[1]];
    refused(&[&good[..heads[0]], &good[heads[1]..]].concat());
    refused(&[&good[..heads[0]], frame, frame, &good[heads[1]..]].concat());
}
