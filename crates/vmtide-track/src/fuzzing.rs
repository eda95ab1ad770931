//! Entry points for fuzzing: hostile bytes in, nothing but a return out.
//!
//! Each function is one target of the `fuzz` package and is also run over a small corpus by the tests. None may panic,
//! allocate by a length that was not checked, or run without an end.

use crate::bitmap::{Layer, PagedBitmap};
use crate::id::{Series, TrackingId};
use crate::mrt::{self, Owner};
use crate::options::Geometry;
use crate::rct::{self, Saved};
use vmtide_block::ByteRange;

/// A disk that a fuzzed file may be of without taking the fuzzer's memory for its answers.
const MOST_BLOCKS: u64 = 1 << 24;

/// A `.rct`. With an odd first byte its checksums are made right. What is understood must be written and read to the
/// same, and be answered.
pub fn rct(input: &[u8]) {
    let Some((mode, bytes)) = input.split_first() else {
        return;
    };
    let mut bytes = bytes.to_vec();
    if mode & 1 == 1 {
        rct::fix_checksums(&mut bytes);
    }
    let Ok(saved) = Saved::decode(&bytes) else {
        return;
    };
    if saved.geometry.blocks() > MOST_BLOCKS {
        return;
    }
    let again = Saved::decode(&saved.encode());
    assert!(again.is_ok_and(|again| again.state() == saved.state()), "what is written is read");
    let whole = ByteRange::new(0, saved.geometry.size_bytes);
    let newest = saved.state().most_recent_id;
    let answer = saved.changes_since("fuzzed", &newest, whole, 100);
    assert!(answer.is_ok(), "the newest id is always known");
}

/// A `.mrt`, for a disk whose size and region the first bytes choose.
pub fn mrt(input: &[u8]) {
    let Some((head, bytes)) = input.split_at_checked(4) else {
        return;
    };
    let [size, region, series, epoch] = *head else {
        return;
    };
    let region_bytes = 1 << (20 + u32::from(region) % 8);
    let size_bytes = u64::from(size) << 30;
    let Ok(geometry) = Geometry::new(size_bytes, 65536, region_bytes) else {
        return;
    };
    let owner = Owner { series: Series([series; 16]), geometry };
    if let Some(found) = mrt::read(&owner, bytes, epoch.into()) {
        let total = geometry.regions();
        let mut before = 0;
        for (first, end) in found.regions {
            assert!(
                first >= before && first < end && end <= total,
                "regions are in order, inside the disk"
            );
            before = end;
        }
    }
}

/// The text of an id.
pub fn id(input: &[u8]) {
    if let Ok(text) = std::str::from_utf8(input)
        && let Some(id) = TrackingId::parse(text)
    {
        assert!(id.to_string().eq_ignore_ascii_case(text), "an id has one spelling");
    }
}

/// A small `.rct` that is sound, to begin with.
pub fn rct_seed() -> Vec<u8> {
    let Ok(geometry) = Geometry::new(5 << 30, 65536, 16 << 20) else {
        return Vec::new();
    };
    let bitmap = crate::bitmap::AtomicBitmap::new(geometry.blocks());
    bitmap.set_range(7, 90);
    let changed = Layer::Growing(std::sync::Arc::new(bitmap));
    let none = Layer::Sealed(std::sync::Arc::new(PagedBitmap::of(&[], geometry.blocks())));
    let saved = Saved {
        series: Series([5; 16]),
        geometry,
        epoch: 3,
        closed: true,
        last_counter: 9,
        identity: crate::identity::StoredIdentity {
            disk_id: Some("d".into()),
            stamp: Some("s".into()),
            file_id: None,
            generations: vec!["g".into()],
        },
        lost: vec![(Series::ANY, "r".into())],
        ids: vec![
            rct::SavedId { counter: 2, sealed_unix_ms: 1, changed },
            rct::SavedId { counter: 9, sealed_unix_ms: 2, changed: none },
        ],
    };
    let mut bytes = vec![1];
    bytes.extend(saved.encode());
    bytes
}

/// A small `.mrt` that is sound, to begin with.
pub fn mrt_seed() -> Vec<u8> {
    let Ok(geometry) = Geometry::new(5 << 30, 65536, 1 << 20) else {
        return Vec::new();
    };
    let owner = Owner { series: Series([7; 16]), geometry };
    let mut bytes = vec![5, 0, 7, 2];
    bytes.extend(owner.empty_file(2));
    bytes
}
