//! Small sound objects as the writers make them, turned into inputs of the targets.

use super::forge::{FORGED, context};
use crate::config::{Encryption, RepositoryConfig};
use crate::context::RepoContext;
use crate::crypto::MasterKey;
use crate::disk::write_forward_as;
use crate::envelope::{HEADER_BYTES, NO_OWNER, ObjectKind, TRAILER_BYTES};
use crate::pack::{ChunkEntry, FrameEncoder, PackWriter};
use crate::point::{self, DiskCounts, DiskRecord, Level, RestorePoint, TrackingRecord};
use crate::store::MemoryStore;
use crate::{BLOCK_BYTES, Location, ObjectId, RepoError, Result};
use std::sync::Arc;

/// A sound input of a target.
#[derive(Debug)]
pub struct Seed {
    /// The fuzz target, as `cargo fuzz` calls it.
    pub target: &'static str,
    /// What it is.
    pub name: &'static str,
    /// The input.
    pub bytes: Vec<u8>,
}

/// What the corpora of this crate's targets begin with: a few hundred bytes to some kilobytes each.
///
/// # Errors
/// Those of writing to memory, which do not happen.
pub fn seeds() -> Result<Vec<Seed>> {
    let seed = |target, name, bytes| Seed { target, name, bytes };
    let tagged = |tag: u8, bytes: &[u8]| [&[tag][..], bytes].concat();
    let point = sample_point()?;
    let json = serde_json::to_vec(&point)
        .map_err(|error| RepoError::Invalid(format!("cannot be written as JSON: {error}")))?;
    let point = written(ObjectKind::Point, |context| point::write(context, &point))?;
    let forward = written(ObjectKind::Forward, sample_forward)?;
    let config = RepositoryConfig::new(65536, Encryption::None, &MasterKey::from_bytes([3; 32]))?
        .encode()?;
    let sealed = RepositoryConfig::new(16384, Encryption::Aes256Gcm, &MasterKey::random()?)?;
    Ok(vec![
        seed(
            "repo_map_segment",
            "segment",
            written(ObjectKind::MapSegment, crate::map::write_sample)?,
        ),
        seed(
            "repo_index_segment",
            "segment",
            written(ObjectKind::IndexSegment, |context| crate::index::write_sample(context))?,
        ),
        seed("repo_pack", "pack", written(ObjectKind::Pack, |context| sample_pack(context))?),
        seed("repo_point", "object", tagged(0, &point)),
        seed("repo_point", "json", tagged(1, &json)),
        seed("repo_forward", "object", tagged(0, &forward)),
        seed("repo_forward", "content", tagged(1, &forward_content())),
        seed("repo_config", "plain", without_checksum(config)),
        seed("repo_config", "encrypted", without_checksum(sealed.encode()?)),
        seed("repo_key_slot", "slot", without_checksum(crate::keys::sample_slot()?)),
    ])
}

/// What `write` puts into a repository, as an input of `forge`.
fn written(kind: ObjectKind, write: impl Fn(&Arc<RepoContext>) -> Result<()>) -> Result<Vec<u8>> {
    let store = MemoryStore::new();
    let ctx = Arc::new(context(&store));
    write(&ctx)?;
    let name = store.names().pop().unwrap_or_default();
    let bytes = store.bytes(&name).unwrap_or_default();
    let id = name.rsplit('/').next().unwrap_or_default().parse()?;
    let opened = ctx.open_object(kind, id)?;
    let mut input = opened.trailer.first_count.to_le_bytes().to_vec();
    input.extend_from_slice(&opened.trailer.second_count.to_le_bytes());
    input.extend(u16::try_from(opened.directory.len()).unwrap_or(0).to_le_bytes());
    input.extend_from_slice(&bytes[HEADER_BYTES..bytes.len() - TRAILER_BYTES]);
    Ok(input)
}

/// Two frames, one that compresses and one that does not.
fn sample_pack(context: &RepoContext) -> Result<()> {
    let mut writer = PackWriter::create(context)?;
    let mut encoder = FrameEncoder::new(1)?;
    let mut noise = vec![0; BLOCK_BYTES];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    let frames = [(b"text ".repeat(4 * BLOCK_BYTES / 5 + 4), vec![1, 3]), (noise, vec![1])];
    let mut stored = Vec::new();
    for (content, lengths) in frames {
        let mut rest = &content[..content.len() / BLOCK_BYTES * BLOCK_BYTES];
        let compression = encoder.encode(rest, &mut stored)?;
        let mut chunks = Vec::new();
        for blocks in lengths {
            let (chunk, after) = rest.split_at(usize::from(blocks) * BLOCK_BYTES);
            chunks.push(ChunkEntry { id: context.subkeys.chunk_id(chunk), blocks });
            rest = after;
        }
        writer.append(&chunks, compression, &mut stored)?;
    }
    writer.finish().map(drop)
}

fn sample_point() -> Result<RestorePoint> {
    let time = "2026-11-20T03:00:00Z"
        .parse()
        .map_err(|error| RepoError::Invalid(format!("the sample's time: {error}")))?;
    Ok(RestorePoint {
        id: FORGED,
        vm: "web".into(),
        time,
        started: time,
        level: Level::Incremental,
        parent: Some(ObjectId([9; 16])),
        consistency: "fs".into(),
        tags: [("tier".to_owned(), "gold".to_owned())].into(),
        host: "host".into(),
        source: "qemu+unix:///run/web.qmp".into(),
        config: serde_json::json!({"name": "web", "memory_bytes": 1u64 << 30, "disks": [{"id": "a"}]}),
        warnings: vec!["tracking lost".into()],
        disks: vec![DiskRecord {
            id: "a".into(),
            size_bytes: 1 << 30,
            map: vec![ObjectId([4; 16]), ObjectId([5; 16])],
            counts: DiskCounts { size_bytes: 1 << 30, ..DiskCounts::default() },
            tracking: TrackingRecord { used: true, reason: None, id: Some("bitmap".into()) },
        }],
        program: "vmtide 0.1.0".into(),
        origin: None,
        lease: None,
        immutable: None,
    })
}

fn sample_forward(context: &Arc<RepoContext>) -> Result<()> {
    let place = |pack, ordinal| Location { pack: ObjectId([pack; 16]), ordinal };
    let moves = [(0, 3, place(5, 0)), (7, 2, place(5, 3)), (20, 100, place(6, 4))];
    write_forward_as(context, NO_OWNER, FORGED, &moves)
}

/// Two runs into two packs, as it is before compression.
fn forward_content() -> Vec<u8> {
    [&[2, 0, 2][..], &[5; 16], &[6; 16], &[0, 3, 0, 0], &[4, 0x64, 1, 9]].concat()
}

/// A document as the targets take it: they put the checksum there themselves.
fn without_checksum(mut document: Vec<u8>) -> Vec<u8> {
    let end = document.windows(12).rposition(|part| part == br#","checksum":"#);
    document.truncate(end.unwrap_or(document.len()));
    document
}
