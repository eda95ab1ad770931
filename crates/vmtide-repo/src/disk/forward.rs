//! Forwards: where the chunks of a removed pack went (format §10).

use crate::context::{OpenObject, RepoContext};
use crate::envelope::{HEADER_BYTES, ObjectKind};
use crate::leb128;
use crate::record::decompress_bounded;
use crate::{Location, ObjectId, RepoError, Result};
use std::collections::BTreeSet;

/// The most bytes of pack table and runs; a pack of 64 MiB has some thousands of runs.
const MAX_CONTENT_BYTES: usize = 16 << 20;

/// Some neighbouring blocks of the removed pack, and where they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ForwardRun {
    ordinal: u32,
    count: u32,
    target: Location,
}

/// A forward, opened.
#[derive(Debug)]
pub(crate) struct Forward {
    id: ObjectId,
    runs: Vec<ForwardRun>,
}

/// All forwards of one pack, by ascending ids. Mostly there is one; two prunes at the same time may
/// have moved the same pack, and then any of them is right.
#[derive(Debug)]
pub(crate) struct Forwards(Vec<Forward>);

/// Some blocks that were moved: their first ordinal, how many, and the new place.
pub(crate) type Move = (u32, u32, Location);

/// Writes a forward of `pack`: where its live blocks went, by ascending ordinals. Answers with the
/// forward's id.
pub(crate) fn write_forward(
    context: &RepoContext,
    pack: ObjectId,
    moves: &[Move],
) -> Result<ObjectId> {
    let id = ObjectId::random()?;
    write_forward_as(context, pack, id, moves)?;
    Ok(id)
}

/// As [`write_forward`], under a given id.
pub(crate) fn write_forward_as(
    context: &RepoContext,
    pack: ObjectId,
    id: ObjectId,
    moves: &[Move],
) -> Result<()> {
    let mut runs: Vec<ForwardRun> = Vec::new();
    for (ordinal, count, target) in moves {
        match runs.last_mut() {
            Some(run)
                if run.ordinal + run.count == *ordinal
                    && run.target.pack == target.pack
                    && run.target.ordinal + run.count == target.ordinal =>
            {
                run.count += count;
            }
            _ => runs.push(ForwardRun { ordinal: *ordinal, count: *count, target: *target }),
        }
    }
    let mut packs: Vec<ObjectId> = Vec::new();
    let mut encoded = Vec::new();
    let mut end = 0;
    for run in &runs {
        let number = packs.iter().position(|id| *id == run.target.pack).unwrap_or_else(|| {
            packs.push(run.target.pack);
            packs.len() - 1
        });
        for value in [
            u64::from(run.ordinal - end),
            u64::from(run.count),
            number as u64,
            u64::from(run.target.ordinal),
        ] {
            leb128::write(value, &mut encoded);
        }
        end = run.ordinal + run.count;
    }
    let invalid = |what: &str| RepoError::Invalid(format!("a forward cannot be written: {what}"));
    let count = |count: usize| u32::try_from(count).map_err(|_| invalid("too many runs"));
    let mut content: Vec<u8> = packs.iter().flat_map(|id| id.0).collect();
    content.append(&mut encoded);
    if content.len() > MAX_CONTENT_BYTES {
        return Err(invalid("more runs than a reader takes"));
    }
    let mut section =
        zstd::bulk::compress(&content, 3).map_err(|error| invalid(&error.to_string()))?;
    let mut object = context.create(context.header_under(ObjectKind::Forward, pack, id))?;
    object.write_section(0, &[], &mut section)?;
    let mut directory = (section.len() as u64).to_le_bytes().to_vec();
    directory.extend_from_slice(blake3::hash(&section).as_bytes());
    object.finish(&directory, count(runs.len())?, count(packs.len())?)
}

impl Forward {
    /// Opens a forward of a pack; `None` where there is none.
    ///
    /// # Errors
    /// [`RepoError::Damaged`]; those of the store.
    pub(crate) fn open(
        context: &RepoContext,
        pack: ObjectId,
        id: ObjectId,
    ) -> Result<Option<Self>> {
        let header = context.header_under(ObjectKind::Forward, pack, id);
        let opened = context.try_open(header).and_then(|opened| match opened {
            Some(opened) => Self::from_object(opened).map(Some),
            None => Ok(None),
        });
        match opened {
            Err(RepoError::NotFound { .. }) => Ok(None),
            other => other,
        }
    }

    fn from_object(mut opened: OpenObject) -> Result<Self> {
        let directory = std::mem::take(&mut opened.directory);
        let damaged = |detail: &str| opened.damaged(detail);
        let length = usize::try_from(opened.trailer.directory_offset - HEADER_BYTES as u64)
            .ok()
            .filter(|length| *length <= MAX_CONTENT_BYTES)
            .ok_or_else(|| damaged("longer than a forward can be"))?;
        if directory.len() != 40 || directory[..8] != (length as u64).to_le_bytes() {
            return Err(damaged("its directory is not that of a forward"));
        }
        let mut section = vec![0; length];
        opened.reader.read_at(&mut section, HEADER_BYTES as u64)?;
        if blake3::hash(&section).as_bytes()[..] != directory[8..40] {
            return Err(damaged("its checksum does not match"));
        }
        let content = opened.cipher.open(0, &[], &mut section)?;
        let content = decompress_bounded(content, MAX_CONTENT_BYTES)
            .ok_or_else(|| damaged("it does not decompress"))?;
        let runs = content
            .split_at_checked(opened.trailer.second_count as usize * 16)
            .and_then(|(table, runs)| decode_runs(runs, table, opened.trailer.first_count))
            .ok_or_else(|| damaged("its runs cannot be read"))?;
        Ok(Self { id: opened.header.id, runs })
    }

    /// Where block `ordinal` went, and for how many blocks (at most `count`) that run goes on.
    pub(crate) fn find(&self, ordinal: u32, count: u32) -> Option<(Location, u32)> {
        let next = self.runs.partition_point(|run| run.ordinal <= ordinal);
        let run = self.runs[..next].last()?;
        let within = ordinal - run.ordinal;
        (within < run.count).then(|| {
            let target = Location { pack: run.target.pack, ordinal: run.target.ordinal + within };
            (target, count.min(run.count - within))
        })
    }

    /// All that was moved.
    pub(crate) fn moves(&self) -> impl Iterator<Item = Move> + '_ {
        self.runs.iter().map(|run| (run.ordinal, run.count, run.target))
    }
}

impl Forwards {
    /// Opens all forwards of a pack.
    ///
    /// # Errors
    /// [`RepoError::Damaged`], naming the pack where there is none; those of the store.
    pub(crate) fn open(context: &RepoContext, pack: ObjectId) -> Result<Self> {
        let prefix = format!("{}{pack}/", ObjectKind::Forward.prefix());
        let mut found = Vec::new();
        let mut failed = None;
        let mut ids = BTreeSet::new();
        context.store.list(&prefix, &mut |entry| {
            ids.extend(entry.name.rsplit('/').next().and_then(|id| id.parse::<ObjectId>().ok()));
            Ok(())
        })?;
        for id in ids {
            match Forward::open(context, pack, id) {
                Ok(forward) => found.extend(forward),
                // Another may do.
                Err(error) if error.is_damage() => failed = Some(error),
                Err(error) => return Err(error),
            }
        }
        match (found.is_empty(), failed) {
            (false, _) => Ok(Self(found)),
            (true, Some(error)) => Err(error),
            (true, None) => Err(RepoError::damaged(ObjectKind::Pack.object_name(pack), "missing")),
        }
    }

    /// Those that say where block `ordinal` went: forward, new place, and for how many blocks (at
    /// most `count`) its run goes on.
    pub(crate) fn over(
        &self,
        ordinal: u32,
        count: u32,
    ) -> impl Iterator<Item = (ObjectId, Location, u32)> + '_ {
        self.0.iter().filter_map(move |forward| {
            forward.find(ordinal, count).map(|(place, run)| (forward.id, place, run))
        })
    }

    /// What they take in memory, about.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.0.iter().map(|forward| forward.runs.len() * size_of::<ForwardRun>()).sum()
    }
}

fn decode_runs(mut encoded: &[u8], table: &[u8], count: u32) -> Option<Vec<ForwardRun>> {
    let mut runs = Vec::new();
    let mut end = 0u32;
    for _ in 0..count {
        let mut next = || leb128::read(&mut encoded).and_then(|value| u32::try_from(value).ok());
        let (gap, count, number, first) = (next()?, next()?, next()?, next()?);
        let ordinal = end.checked_add(gap)?;
        end = ordinal.checked_add(count)?;
        first.checked_add(count)?;
        let id = table.chunks_exact(16).nth(number as usize)?;
        let mut pack = ObjectId([0; 16]);
        pack.0.copy_from_slice(id);
        if count == 0 {
            return None;
        }
        runs.push(ForwardRun { ordinal, count, target: Location { pack, ordinal: first } });
    }
    encoded.is_empty().then_some(runs)
}
