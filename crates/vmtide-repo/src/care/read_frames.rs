//! Reading and verifying frames, on all cores.

use super::sample::Sampling;
use super::verify::Needed;
use crate::context::{DISTANT_CHECKERS, RepoContext};
use crate::disk::{PackSet, Repairs};
use crate::envelope::ObjectKind;
use crate::pack::{FrameDecoder, Pack, is_media_error};
use crate::{Location, ObjectId, RepoError, Result};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use vmtide_block::{CancelToken, Progress};

/// The stored bytes read at once.
const BATCH_BYTES: u64 = 4 << 20;

/// A frame, or a whole pack, that cannot be read.
#[derive(Clone, Debug)]
pub(super) struct BadFrame {
    pub pack: ObjectId,
    pub frame: Option<u32>,
    pub first_block: u32,
    pub blocks: u32,
    pub detail: String,
}

impl BadFrame {
    /// The ordinal after its last block.
    pub const fn end(&self) -> u32 {
        self.first_block.saturating_add(self.blocks)
    }

    /// What it is reported as.
    pub fn key(&self) -> (String, Option<u32>, String) {
        (ObjectKind::Pack.object_name(self.pack), self.frame, self.detail.clone())
    }
}

/// What was read.
pub(super) struct FramesRead {
    pub frames: u64,
    pub bytes: u64,
    pub damage: Vec<BadFrame>,
}

/// What all workers share.
struct Reader<'a> {
    sampling: &'a Sampling,
    repairs: &'a Repairs,
    progress: &'a Progress,
    cancel: &'a CancelToken,
    frames: AtomicU64,
    bytes: AtomicU64,
    damage: Mutex<Vec<BadFrame>>,
}

/// Reads the frames that the sample draws. Frames that are on record as damaged are left out: they
/// are reported as far as anybody needs them.
///
/// # Errors
/// Those of the store other than damage; cancelled.
pub(super) fn read(
    context: &RepoContext,
    needed: &Needed,
    sampling: &Sampling,
    packs: &PackSet,
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<FramesRead> {
    let work: Vec<ObjectId> = needed.keys().copied().collect();
    if sampling.is_all() {
        // All lengths are known once the packs were listed; opening them here would do it twice.
        context.store.list(ObjectKind::Pack.prefix(), &mut |entry| {
            if ObjectKind::of_name(&entry.name).is_some_and(|(_, id)| needed.contains_key(&id)) {
                progress.add_total(entry.length_bytes);
            }
            Ok(())
        })?;
    }
    let reader = Reader {
        sampling,
        repairs: packs.repairs()?,
        progress,
        cancel,
        frames: AtomicU64::new(0),
        bytes: AtomicU64::new(0),
        damage: Mutex::default(),
    };
    let next = AtomicUsize::new(0);
    let worker = || -> Result<()> {
        let mut decoder = FrameDecoder::new()?;
        while let Some(id) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
            let opened = context
                .open_object(ObjectKind::Pack, *id)
                .and_then(|opened| Pack::from_object(context, opened));
            match opened {
                Ok(pack) => reader.read_pack(&pack, &mut decoder)?,
                Err(error) => {
                    context.damage.note(*id, None, error.to_string());
                    reader.note(*id, None, 0..u32::MAX, error)?;
                }
            }
        }
        Ok(())
    };
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let workers = context.readers(cores, DISTANT_CHECKERS);
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..workers).map(|_| scope.spawn(worker)).collect();
        handles.into_iter().try_for_each(|handle| {
            handle.join().unwrap_or_else(|_| {
                Err(RepoError::Invalid("a verify worker ended abnormally".into()))
            })
        })
    })?;
    Ok(FramesRead {
        frames: reader.frames.into_inner(),
        bytes: reader.bytes.into_inner(),
        damage: reader.damage.into_inner(),
    })
}

impl Reader<'_> {
    /// Notes damage; anything else ends the verification.
    fn note(
        &self,
        pack: ObjectId,
        frame: Option<usize>,
        blocks: std::ops::Range<u32>,
        error: RepoError,
    ) -> Result<()> {
        let detail = match error {
            RepoError::Damaged { detail, .. } => detail,
            RepoError::Unsupported { what, .. } => format!("unsupported {what}"),
            RepoError::Io { ref source, .. } if is_media_error(&error) => {
                format!("cannot be read: {source}")
            }
            other => return Err(other),
        };
        self.damage.lock().push(BadFrame {
            pack,
            frame: frame.and_then(|frame| u32::try_from(frame).ok()),
            first_block: blocks.start,
            blocks: blocks.end - blocks.start,
            detail,
        });
        Ok(())
    }

    fn wants(&self, pack: &Pack, frame: usize) -> bool {
        let place = Location { pack: pack.id(), ordinal: pack.blocks_of(frame).start };
        self.sampling.draws(pack.id(), frame) && !self.repairs.damaged.covers(place)
    }

    /// Reads frames of one pack.
    fn read_pack(&self, pack: &Pack, decoder: &mut FrameDecoder) -> Result<()> {
        let (mut stored, mut content) = (Vec::new(), Vec::new());
        let mut frame = 0;
        while frame < pack.frames().len() {
            self.cancel.check()?;
            if !self.wants(pack, frame) {
                frame += 1;
                continue;
            }
            let (mut bytes, mut end) = (0, frame);
            while end < pack.frames().len() && bytes < BATCH_BYTES && self.wants(pack, end) {
                bytes += u64::from(pack.frames()[end].stored_length);
                end += 1;
            }
            self.read_batch(pack, frame..end, &mut stored, &mut content, decoder)?;
            self.frames.fetch_add((end - frame) as u64, Ordering::Relaxed);
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
            self.progress.add_done(bytes);
            self.progress.add_transferred(bytes);
            frame = end;
        }
        Ok(())
    }

    fn read_batch(
        &self,
        pack: &Pack,
        frames: std::ops::Range<usize>,
        stored: &mut Vec<u8>,
        content: &mut Vec<u8>,
        decoder: &mut FrameDecoder,
    ) -> Result<()> {
        match pack.read_stored(frames.clone(), stored) {
            Ok(mut rest) => {
                for number in frames {
                    let length = pack.frames()[number].stored_length as usize;
                    let (this, after) = rest.split_at_mut(length);
                    rest = after;
                    content.resize(pack.content_length(number), 0);
                    if let Err(error) = pack.decode_and_compare(number, this, content, decoder) {
                        self.note(pack.id(), Some(number), pack.blocks_of(number), error)?;
                    }
                }
                Ok(())
            }
            // One sector that cannot be read must not take the frames around it along.
            Err(error) if frames.len() > 1 && is_media_error(&error) => {
                for number in frames {
                    self.read_batch(pack, number..number + 1, stored, content, decoder)?;
                }
                Ok(())
            }
            Err(error) => {
                let number = frames.start;
                self.note(pack.id(), Some(number), pack.blocks_of(number), error)
            }
        }
    }
}
