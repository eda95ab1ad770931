//! What the fuzz target runs: a delta of hostile bytes through everything that reads deltas.

use crate::format::{
    DeltaHeader, HEAD_BYTES, PRELUDE_BYTES, RecordHead, TRAILER_BYTES, short_digest,
};
use crate::{
    ApplyOptions, ApplyPlan, CreateOptions, DeltaFile, DeltaReader, apply_stream, merge_deltas,
};
use std::sync::Arc;
use vmtide_block::{BlockDevice, ByteRange, CancelToken, MemoryDevice, Progress};

/// The largest disk that something is applied to here, in bytes.
const MAX_DISK_BYTES: u64 = 1 << 20;

/// The first byte says whether the checksums of the rest, which is a delta, are made right first.
pub fn delta(input: &[u8]) {
    let Some((mode, bytes)) = input.split_first() else {
        return;
    };
    let mut bytes = bytes.to_vec();
    if mode & 1 != 0 {
        mend(&mut bytes);
    }
    let cancel = CancelToken::new();
    let progress = Progress::new();
    let streamed = DeltaReader::new(&bytes[..], "x").and_then(|mut reader| reader.read_to_end());
    let opened = DeltaFile::open(Arc::new(MemoryDevice::from_bytes(bytes.clone())));
    let verified = opened.as_ref().map(|file| file.verify(1, &progress, &cancel));
    // Both ways of reading agree on what a delta is.
    let (stream_ok, file_ok) = (streamed.is_ok(), matches!(verified, Ok(Ok(_))));
    assert!(stream_ok == file_ok, "{streamed:?} {verified:?}");
    if let Ok(file) = &opened {
        let range = ByteRange::new(u64::from(*mode) << 12, 1 << 30);
        // Only that it ends, whatever the index says.
        let _ = file.for_each_extent(range, &cancel, |_| Ok(()));
        apply_both(file, &bytes, &progress, &cancel);
    }
    let readers = || DeltaReader::new(&bytes[..], "x");
    if let (Ok(first), Ok(second)) = (readers(), readers())
        && first.header().base_id == first.header().new_id
        && first.header().base_size_bytes == first.header().size_bytes
    {
        let options = CreateOptions { workers: 1, ..CreateOptions::default() };
        let mut out = Vec::new();
        let merged = merge_deltas(&mut [first, second], &options, &mut out, &progress, &cancel);
        if merged.is_ok() {
            let again = DeltaReader::new(&out[..], "merged").and_then(|mut it| it.read_to_end());
            assert!(again.is_ok(), "{again:?}");
        }
    }
}

/// A file that is refused leaves its target alone.
fn apply_both(file: &DeltaFile, bytes: &[u8], progress: &Progress, cancel: &CancelToken) {
    let base_bytes = file.header().base_size_bytes;
    if base_bytes > MAX_DISK_BYTES || file.header().size_bytes > MAX_DISK_BYTES {
        return;
    }
    let new_target = || MemoryDevice::new(usize::try_from(base_bytes).unwrap_or(0));
    let options = ApplyOptions { workers: 1, check_base: false, ..ApplyOptions::default() };
    let target = new_target();
    match ApplyPlan::prepare(file, &target, &options, progress, cancel) {
        Ok(plan) => {
            // Data that zstd refuses is found only now.
            let _ = plan.write(&target, progress, cancel);
        }
        Err(_) => {
            let untouched = target.size_bytes() == base_bytes
                && target.to_bytes().iter().all(|byte| *byte == 0);
            assert!(untouched, "a refused delta changed its target");
        }
    }
    if let Ok(mut reader) = DeltaReader::new(bytes, "x") {
        let _ = apply_stream(&mut reader, &new_target(), &options, progress, cancel);
    }
}

/// Makes the digests right as far as the structure can be followed, so that what they protect is
/// reached.
fn mend(bytes: &mut [u8]) {
    let Some(prelude) = bytes.first_chunk::<PRELUDE_BYTES>() else {
        return;
    };
    let Ok(length) = DeltaHeader::length_of(prelude, "x") else {
        return;
    };
    let Some(header) = bytes.get_mut(..length) else {
        return;
    };
    let digest = short_digest(&[&header[..length - 16]]);
    header[length - 16..].copy_from_slice(&digest);
    let mut whole = blake3::Hasher::new();
    whole.update(header);
    let mut at = length;
    while let Some(next) = mend_record(bytes, at) {
        whole.update(&bytes[at..at + HEAD_BYTES]);
        at = next;
    }
    let trailer = bytes.len().saturating_sub(TRAILER_BYTES);
    if at == trailer && trailer > 0 {
        whole.update(&bytes[trailer..trailer + 96]);
        bytes[trailer + 96..].copy_from_slice(whole.finalize().as_bytes());
    }
}

/// Mends the record at `at`. Answers with where the next one begins.
fn mend_record(bytes: &mut [u8], at: usize) -> Option<usize> {
    let end = at.checked_add(HEAD_BYTES)?;
    let head: &[u8; HEAD_BYTES] = bytes.get(at..end)?.first_chunk()?;
    let word = |from: usize| {
        head.get(from..from + 4)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
    };
    let body_bytes = usize::try_from(word(8)?).ok()?.checked_mul(16)?;
    let body_bytes = body_bytes.checked_add(usize::try_from(word(12)?).ok()?)?;
    let next = end.checked_add(body_bytes)?;
    if next > bytes.len().checked_sub(TRAILER_BYTES)? {
        return None;
    }
    let digest = short_digest(&[&bytes[end..next]]);
    bytes[at + 40..at + 56].copy_from_slice(&digest);
    let checksum = blake3::hash(&bytes[at..at + 88]);
    bytes[at + 88..end].copy_from_slice(&checksum.as_bytes()[..8]);
    let head: &[u8; HEAD_BYTES] = bytes.get(at..end)?.first_chunk()?;
    RecordHead::from_bytes(head, "x", 0).ok()?;
    Some(next)
}
