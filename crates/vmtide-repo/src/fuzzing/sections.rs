//! Packs, restore points and forwards from hostile bytes.

use super::forge::{FORGED, Forged, forge, put};
use crate::disk::Forward;
use crate::envelope::{NO_OWNER, ObjectKind};
use crate::pack::{FrameDecoder, MAX_FRAME_BYTES, Pack};
use crate::point;

/// A whole pack without encryption: see [`forge`] for the input. Every frame is read, decompressed
/// and compared with the ids of its chunks; every block is looked for.
pub fn pack(input: &[u8]) {
    let Some(forged) = forge(ObjectKind::Pack, input) else { return };
    let Some(object) = forged.open() else { return };
    let Ok(pack) = Pack::from_object(&forged.context, object) else { return };
    let Ok(mut decoder) = FrameDecoder::new() else { return };
    let (mut stored, mut out) = (Vec::new(), Vec::new());
    for number in 0..pack.frames().len() {
        let length = pack.content_length(number);
        assert!(length <= MAX_FRAME_BYTES, "a frame of {length} bytes was taken");
        if pack.read_stored(number..number + 1, &mut stored).is_ok() {
            out.resize(length, 0);
            let _ = pack.decode_and_compare(number, &mut stored, &mut out, &mut decoder);
        }
    }
    for (number, (first, chunk)) in pack.chunks().enumerate() {
        let last = first + u32::from(chunk.blocks) - 1;
        assert_eq!(pack.chunk_of(last).ok(), Some(number), "a block is found in another chunk");
        let frame = pack.frame_of(last).ok().map(|frame| pack.chunks_of(frame));
        assert!(frame.is_some_and(|chunks| chunks.contains(&number)), "a chunk outside its frame");
    }
}

/// A restore point without encryption. The first byte says what follows: 0 an object as [`forge`]
/// takes it, else the JSON, which is compressed here. What is taken must come back the same when
/// it is written again.
pub fn restore_point(input: &[u8]) {
    let Some((&way, rest)) = input.split_first() else { return };
    let forged = if way == 0 { forge(ObjectKind::Point, rest) } else { json_point(rest) };
    let Some(read) = forged.and_then(|forged| point::read(&forged.context, FORGED).ok()) else {
        return;
    };
    let Ok(json) = serde_json::to_vec(&read) else { return };
    let again = json_point(&json).map(|forged| point::read(&forged.context, FORGED));
    assert_eq!(again.and_then(Result::ok), Some(read), "a restore point changed by being written");
}

/// The object of a restore point with this JSON.
pub(super) fn json_point(json: &[u8]) -> Option<Forged> {
    let section = zstd::bulk::compress(json, 1).ok()?;
    let directory =
        [&(section.len() as u64).to_le_bytes()[..], blake3::hash(&section).as_bytes()].concat();
    put(ObjectKind::Point, &section, &directory, (0, 0))
}

/// A forward without encryption. The first byte says what follows: 0 an object as [`forge`] takes
/// it, else count of runs u16, count of packs u8, and the content, which is compressed here.
pub fn forward(input: &[u8]) {
    let Some((&way, rest)) = input.split_first() else { return };
    let forged = if way == 0 { forge(ObjectKind::Forward, rest) } else { plain_forward(rest) };
    let Some(forward) =
        forged.and_then(|forged| Forward::open(&forged.context, NO_OWNER, FORGED).ok()).flatten()
    else {
        return;
    };
    for ordinal in (0..300).chain([u32::MAX / 2, u32::MAX - 1, u32::MAX]) {
        for count in [1, 7, u32::MAX] {
            if let Some((target, found)) = forward.find(ordinal, count) {
                assert!((1..=count).contains(&found), "{found} of {count} blocks");
                assert!(target.ordinal.checked_add(found - 1).is_some(), "blocks past the last");
            }
        }
    }
}

/// The object of a forward with this content, counts first.
pub(super) fn plain_forward(input: &[u8]) -> Option<Forged> {
    let (&[low, high, packs], content) = input.split_first_chunk::<3>()?;
    let section = zstd::bulk::compress(content, 1).ok()?;
    let directory =
        [&(section.len() as u64).to_le_bytes()[..], blake3::hash(&section).as_bytes()].concat();
    let counts = (u32::from(u16::from_le_bytes([low, high])), u32::from(packs));
    put(ObjectKind::Forward, &section, &directory, counts)
}
