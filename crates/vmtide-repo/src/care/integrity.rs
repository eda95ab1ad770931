//! The check that needs no key: every stored byte against its checksum (format §3).
//!
//! Each byte of each object is covered by a checksum in clear: header, directory and trailer by the
//! trailer's, everything between by one in the directory. So whoever keeps a repository for others,
//! or runs it where no password should be, can tell that all objects are what was written. What is
//! *missing* only restore points can tell, and those are sealed; and whoever changes an object on
//! purpose can make its checksums right: that the key finds out.

use super::verify::Damage;
use crate::config::{self, Encryption, RepositoryConfig};
use crate::context::{DISTANT_CHECKERS, DamageLog, OpenObject, RepoContext, StoredSection};
use crate::crypto::{MasterKey, checksum};
use crate::envelope::{HEADER_BYTES, Header, ObjectKind};
use crate::pack::is_media_error;
use crate::store::{ObjectStore, read_small};
use crate::{ObjectId, RepoError, Result, index, keys, map, pack};
use parking_lot::Mutex;
use serde::Serialize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use vmtide_block::{CancelToken, Progress};

/// The stored bytes read at once: enough for a request to a distant store to pay.
const BATCH_BYTES: u64 = 4 << 20;

/// The longest section: a filter section and its tag. What claims to be longer is damaged.
const MAX_SECTION_BYTES: u64 = 32 << 20;

/// What the check without a key found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct IntegrityReport {
    /// Objects checked.
    pub objects_checked: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// What is damaged; empty when all is well.
    pub damage: Vec<Damage>,
    /// Objects under names that this version does not know, which were not checked.
    pub unknown: u64,
}

/// Checks all objects of a repository without its key.
///
/// # Errors
/// [`RepoError::NotFound`] where there is no repository; those of the store other than damage,
/// which is reported; [`BlockError::Cancelled`](vmtide_block::BlockError::Cancelled).
pub fn check_integrity(
    store: &Arc<dyn ObjectStore>,
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<IntegrityReport> {
    let config_bytes = config::read(&**store)?;
    let config = match RepositoryConfig::decode(&config_bytes) {
        Ok(config) => config,
        Err(error) => return Ok(unreadable_config(config_bytes.len(), &error)),
    };
    // No section is opened, so any key does.
    let context = RepoContext {
        store: Arc::clone(store),
        subkeys: MasterKey::from_bytes([0; 32]).subkeys(),
        repository: config.id,
        chunk_size_bytes: config.chunk_size_bytes,
        sealed: config.encryption != Encryption::None,
        retention: None,
        damage: DamageLog::default(),
        points: crate::point_list::PointCache::default(),
    };
    let mut report = IntegrityReport {
        objects_checked: 1,
        read_bytes: config_bytes.len() as u64,
        ..IntegrityReport::default()
    };
    for (id, error) in keys::unreadable(&**store)? {
        report.damage.push(Damage::of_object(format!("keys/{id}"), &error));
    }
    store.list("keys/", &mut |entry| {
        report.objects_checked += 1;
        report.read_bytes += entry.length_bytes;
        Ok(())
    })?;
    let mut objects = Vec::new();
    let mut markers = Vec::new();
    for prefix in ObjectKind::prefixes() {
        store.list(prefix, &mut |entry| {
            match ObjectKind::parse_name(&entry.name) {
                Some(object) => {
                    progress.add_total(entry.length_bytes);
                    objects.push(object);
                }
                None if ObjectKind::marker_content(&entry.name).is_some() => {
                    markers.push(entry.name);
                }
                None => report.unknown += 1,
            }
            Ok(())
        })?;
    }
    report.objects_checked += markers.len() as u64;
    report.damage.extend(check_markers(&**store, &markers)?);
    let checked = check_objects(&context, &objects, progress, cancel)?;
    report.objects_checked += objects.len() as u64;
    report.read_bytes += checked.read_bytes;
    report.damage.extend(checked.damage);
    Ok(report)
}

/// Nothing else can be checked then: the headers of all objects carry what the configuration says.
fn unreadable_config(length: usize, error: &RepoError) -> IntegrityReport {
    IntegrityReport {
        objects_checked: 1,
        read_bytes: length as u64,
        damage: vec![Damage::of_object(config::OBJECT_NAME.into(), error)],
        unknown: 0,
    }
}

/// What became of some objects.
pub(super) struct Checked {
    pub read_bytes: u64,
    pub damage: Vec<Damage>,
}

/// Checks objects on all cores, and more at once where the store is distant.
///
/// # Errors
/// Those of the store other than damage; cancelled.
pub(super) fn check_objects(
    context: &RepoContext,
    objects: &[(ObjectKind, ObjectId, ObjectId)],
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<Checked> {
    let next = AtomicUsize::new(0);
    let read_bytes = AtomicU64::new(0);
    let damage = Mutex::new(Vec::new());
    let worker = || -> Result<()> {
        let mut buffer = Vec::new();
        while let Some((kind, owner, id)) = objects.get(next.fetch_add(1, Ordering::Relaxed)) {
            cancel.check()?;
            let header = context.header_under(*kind, *owner, *id);
            match check_object(context, header, &mut buffer, cancel) {
                Ok(bytes) => {
                    read_bytes.fetch_add(bytes, Ordering::Relaxed);
                    progress.add_done(bytes);
                    progress.add_transferred(bytes);
                }
                Err(error) if is_media_error(&error) || is_unsupported(&error) => {
                    damage.lock().push(Damage::of_object(header.object_name(), &error));
                }
                Err(error) => return Err(error),
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
                Err(RepoError::Invalid("a checking worker ended abnormally".into()))
            })
        })
    })?;
    let mut damage = damage.into_inner();
    damage.sort_by(|one, other| one.object.cmp(&other.object));
    Ok(Checked { read_bytes: read_bytes.into_inner(), damage })
}

const fn is_unsupported(error: &RepoError) -> bool {
    matches!(error, RepoError::Unsupported { .. })
}

/// Checks every byte of one object. Answers with its length; 0 where it was removed meanwhile.
fn check_object(
    context: &RepoContext,
    header: Header,
    buffer: &mut Vec<u8>,
    cancel: &CancelToken,
) -> Result<u64> {
    let Some(object) = context.try_open(header)? else { return Ok(0) };
    let sections = match header.kind {
        ObjectKind::Pack => pack::stored_frames(&object)?,
        ObjectKind::MapSegment => map::stored_pages(&object)?,
        ObjectKind::IndexSegment => index::stored_pages(&object)?,
        _ => vec![stored_record(&object)?],
    };
    check_sections(&object, &sections, buffer, cancel)?;
    Ok(object.reader.length_bytes())
}

/// Checks objects in clear that only say something by being there.
///
/// # Errors
/// Those of the store other than damage.
pub(super) fn check_markers(store: &dyn ObjectStore, names: &[String]) -> Result<Vec<Damage>> {
    let mut damage = Vec::new();
    for name in names {
        let expected = ObjectKind::marker_content(name).unwrap_or_default();
        match read_small(store, name, expected.len()) {
            Ok(content) if content == expected => {}
            Err(RepoError::NotFound { .. }) => {}
            Ok(_) => {
                let error = RepoError::damaged(name.as_str(), "it is not what was written");
                damage.push(Damage::of_object(name.clone(), &error));
            }
            Err(error) if is_media_error(&error) => {
                damage.push(Damage::of_object(name.clone(), &error));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(damage)
}

/// The one section of an object whose directory begins with its length and its checksum.
fn stored_record(object: &OpenObject) -> Result<StoredSection> {
    let fields = object.directory.first_chunk::<24>();
    let Some((length, sum)) = fields.and_then(|fields| fields.split_first_chunk::<8>()) else {
        return Err(object.damaged("its directory is cut"));
    };
    let mut checksum = [0; 16];
    checksum.copy_from_slice(sum);
    let offset = HEADER_BYTES as u64;
    Ok(StoredSection { offset, stored_bytes: u64::from_le_bytes(*length), checksum })
}

/// Reads sections, several at a time, and compares each with its checksum. They lie back to back
/// between header and directory, so that no byte is left out.
fn check_sections(
    object: &OpenObject,
    sections: &[StoredSection],
    buffer: &mut Vec<u8>,
    cancel: &CancelToken,
) -> Result<()> {
    let mut end = HEADER_BYTES as u64;
    for (number, section) in sections.iter().enumerate() {
        let fits = section.offset == end && section.stored_bytes <= MAX_SECTION_BYTES;
        end = end.saturating_add(section.stored_bytes);
        if !fits || end > object.trailer.directory_offset {
            return Err(object.damaged(format!(
                "section {number} at {}+{} is not where it must be",
                section.offset, section.stored_bytes
            )));
        }
    }
    if end != object.trailer.directory_offset {
        return Err(object.damaged("its sections do not end where its directory begins"));
    }
    let mut first = 0;
    while first < sections.len() {
        cancel.check()?;
        let (mut last, mut bytes) = (first, 0);
        while last < sections.len() && (last == first || bytes < BATCH_BYTES) {
            bytes += sections[last].stored_bytes;
            last += 1;
        }
        check_batch(object, first, &sections[first..last], buffer)?;
        first = last;
    }
    Ok(())
}

fn check_batch(
    object: &OpenObject,
    first: usize,
    sections: &[StoredSection],
    buffer: &mut Vec<u8>,
) -> Result<()> {
    let Some(start) = sections.first().map(|section| section.offset) else { return Ok(()) };
    let total: u64 = sections.iter().map(|section| section.stored_bytes).sum();
    buffer.resize(usize::try_from(total).unwrap_or(usize::MAX), 0);
    object.reader.read_at(buffer, start)?;
    let mut rest = &buffer[..];
    for (number, section) in (first..).zip(sections) {
        let length = usize::try_from(section.stored_bytes).unwrap_or(usize::MAX);
        let (stored, after) = rest.split_at(length);
        rest = after;
        if checksum(stored) != section.checksum {
            return Err(object.damaged(format!(
                "section {number} at byte {} does not match its checksum",
                section.offset
            )));
        }
    }
    Ok(())
}
