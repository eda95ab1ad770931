//! What the fuzz targets call: the parsers of what an agent sends, which must neither panic nor take much memory,
//! whatever comes. The tests run them over seeds and mutations of them.

use crate::changes::{Gathering, RangeList};
use crate::frames::{Frame, FrameReader, MAX_FRAME_BYTES};
use crate::v1::ChangesDocument;
use crate::{AgentUrl, Fingerprint};
use vmtide_block::ByteRange;

/// A stream of frames in pieces: as it is, and with its checksums made right.
pub fn frames(input: &[u8]) {
    let (step, stream) =
        input.split_first().map_or((0, input), |(first, rest)| (usize::from(*first), rest));
    read_frames(stream, step + 1);
    let mut sound = stream.to_vec();
    forge(&mut sound);
    read_frames(&sound, step * 16 + 1);
}

fn read_frames(stream: &[u8], step: usize) {
    let mut reader = FrameReader::new();
    for piece in stream.chunks(step) {
        reader.push(piece);
        loop {
            match reader.next_frame() {
                Ok(Some(Frame::Data { content, .. })) => {
                    assert!((1..=MAX_FRAME_BYTES).contains(&content.len()))
                }
                Ok(Some(Frame::Zero { offset, length })) => {
                    assert!(length > 0 && ByteRange::new(offset, length).checked_end().is_some());
                }
                Ok(Some(Frame::End { .. })) => assert!(reader.is_ended()),
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}

/// Makes checksums right as far as the frames can be followed.
fn forge(stream: &mut [u8]) {
    let Some(head) = stream.get_mut(..16) else { return };
    head[..8].copy_from_slice(b"VMTRANGE");
    let checksum = crc32c::crc32c(&head[..12]);
    head[12..].copy_from_slice(&checksum.to_le_bytes());
    let mut at = 16_usize;
    while let Some(rest) = stream.get_mut(at..).filter(|rest| rest.len() >= 32) {
        let (header, payload) = rest.split_at_mut(32);
        let length =
            header.get(4..8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes);
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if header[0] == 0
            && let Some(payload) = payload.get(..length)
        {
            header[24..28].copy_from_slice(&crc32c::crc32c(payload).to_le_bytes());
        }
        let checksum = crc32c::crc32c(&header[..28]);
        header[28..].copy_from_slice(&checksum.to_le_bytes());
        let Some(next) = at.checked_add(32).and_then(|at| at.checked_add(length)) else { return };
        at = next;
    }
}

/// What an agent answers about changes, as both interfaces have it; and what a user writes.
pub fn answers(input: &[u8]) {
    const SIZE: u64 = 1 << 40;
    let lists = [
        serde_json::from_slice::<RangeList>(input).ok().map(|list| (list.0, None)),
        serde_json::from_slice::<ChangesDocument>(input)
            .ok()
            .map(|page| (page.ranges.0, page.next_cursor)),
    ];
    for (ranges, cursor) in lists.into_iter().flatten() {
        let mut gathering = Gathering::new(SIZE);
        if gathering.page(ranges, cursor).is_ok() {
            let set = gathering.finish();
            assert!(set.as_slice().windows(2).all(|pair| pair[0].end() < pair[1].offset));
            assert!(set.as_slice().last().is_none_or(|last| last.end() <= SIZE));
        }
    }
    if let Ok(text) = std::str::from_utf8(input) {
        if let Ok(url) = AgentUrl::parse(text) {
            assert_eq!(AgentUrl::parse(&url.to_string()).ok(), Some(url));
        }
        if let Ok(fingerprint) = text.parse::<Fingerprint>() {
            assert_eq!(fingerprint.to_string().parse::<Fingerprint>().ok(), Some(fingerprint));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frames::FrameWriter;
    use std::path::Path;

    /// Runs a target over the seed in the tree, its prefixes, and the seed with single bytes changed.
    fn mutate(target: fn(&[u8]), directory: &str, name: &str, seed: &[u8]) {
        let home = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(directory);
        if std::env::var_os("VMTIDE_WRITE_SEEDS").is_some() {
            std::fs::create_dir_all(&home).unwrap();
            std::fs::write(home.join(name), seed).unwrap();
        }
        let kept = std::fs::read(home.join(name)).unwrap_or_default();
        assert!(
            kept == seed,
            "{directory}/{name}: another seed is kept; VMTIDE_WRITE_SEEDS=1 writes them anew"
        );
        target(seed);
        for length in 0..seed.len() {
            target(&seed[..length]);
            for value in [0, 0xff, seed[length].wrapping_add(1)] {
                let mut changed = seed.to_vec();
                changed[length] = value;
                target(&changed);
            }
        }
    }

    #[test]
    fn frames_of_all_kinds() {
        let mut writer = FrameWriter::with_capacity(0);
        writer.data(4096, &[7; 40]);
        writer.zeros(1 << 40, 1 << 30);
        writer.data(0, b"abc");
        mutate(
            frames,
            "agent_client_frames",
            "data_and_zeros",
            &[&[3][..], &writer.finish()].concat(),
        );
        let packed = zstd::bulk::compress(&[9; 500], 1).unwrap();
        let mut writer = FrameWriter::with_capacity(0);
        writer.zstd(512, &packed, 500, crc32c::crc32c(&[9; 500]));
        mutate(frames, "agent_client_frames", "zstd", &[&[31][..], &writer.finish()].concat());
    }

    #[test]
    fn answers_of_both_interfaces() {
        for (name, seed) in [
            ("contract", r#"[{"offset":0,"length":65536},{"offset":131072,"length":1}]"#),
            (
                "page",
                r#"{"ranges":[{"offset":0,"length":9}],"next_cursor":7,"disk_size_bytes":1099511627776}"#,
            ),
            ("url", "agent+https://hv1:6677/C:/VMs/a%20b.vhdx?disk=/vms/b.raw"),
            (
                "fingerprint",
                "sha256:0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f",
            ),
        ] {
            mutate(answers, "agent_client_answers", name, seed.as_bytes());
        }
    }
}
