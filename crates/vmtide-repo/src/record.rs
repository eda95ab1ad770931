//! Objects that are one sealed JSON document: restore points and holds (format §9).

use crate::context::{OpenObject, RepoContext};
use crate::envelope::{HEADER_BYTES, Header, ObjectKind};
use crate::{ObjectId, RepoError, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The most bytes of JSON a reader takes (format §9). A VM with hundreds of disks and its platform's
/// own documents stays far below. Two bytes of hostile JSON become 32 in memory, more while an
/// array grows: at this length some 200 MiB.
const MAX_JSON_BYTES: usize = 8 << 20;

/// The most JSON objects in them. The smallest, of seven bytes, becomes some 660 in memory: 40 MiB.
const MAX_JSON_OBJECTS: usize = 64 << 10;

/// Writes a document under a new id.
///
/// # Errors
/// [`RepoError::Invalid`] where a reader would not take it; those of the store.
pub(crate) fn write(
    context: &RepoContext,
    kind: ObjectKind,
    id: ObjectId,
    document: &impl Serialize,
) -> Result<()> {
    write_as(context, context.header(kind, id), document)
}

/// As [`write`], of the object with this header.
///
/// # Errors
/// The same.
pub(crate) fn write_as(
    context: &RepoContext,
    header: Header,
    document: &impl Serialize,
) -> Result<()> {
    let name = header.object_name();
    let invalid = |error: &dyn std::fmt::Display| {
        RepoError::Invalid(format!("{name} cannot be written: {error}"))
    };
    let json = serde_json::to_vec(document).map_err(|error| invalid(&error))?;
    if json.len() > MAX_JSON_BYTES {
        return Err(invalid(&format!("{} bytes of JSON, more than fits", json.len())));
    }
    let objects = count_objects(&json);
    if objects > MAX_JSON_OBJECTS {
        return Err(invalid(&format!("{objects} JSON objects, more than a reader takes")));
    }
    let mut section = zstd::bulk::compress(&json, 3).map_err(|error| invalid(&error))?;
    let mut object = context.create(header)?;
    object.write_section(0, &[], &mut section)?;
    let mut directory = (section.len() as u64).to_le_bytes().to_vec();
    directory.extend_from_slice(blake3::hash(&section).as_bytes());
    object.finish(&directory, 0, 0)
}

/// Reads the document of an object.
///
/// # Errors
/// [`RepoError::Damaged`] where it is missing or not what was written; those of the store.
pub(crate) fn read<T: DeserializeOwned>(
    context: &RepoContext,
    kind: ObjectKind,
    id: ObjectId,
) -> Result<T> {
    from_object(&context.open_object(kind, id)?)
}

/// As [`read`], of the object with this header; `None` where there is none.
///
/// # Errors
/// The same, but for the missing object.
pub(crate) fn try_read<T: DeserializeOwned>(
    context: &RepoContext,
    header: Header,
) -> Result<Option<T>> {
    match context.try_open(header).and_then(|opened| opened.as_ref().map(from_object).transpose()) {
        // It went away between two requests.
        Err(RepoError::NotFound { .. }) => Ok(None),
        other => other,
    }
}

fn from_object<T: DeserializeOwned>(opened: &OpenObject) -> Result<T> {
    let name = opened.header.object_name();
    let damaged = |detail: &str| RepoError::damaged(&name, detail);
    let length = usize::try_from(opened.trailer.directory_offset - HEADER_BYTES as u64)
        .ok()
        .filter(|length| *length <= MAX_JSON_BYTES)
        .ok_or_else(|| damaged("longer than it can be"))?;
    if opened.directory.len() != 40 || opened.directory[..8] != (length as u64).to_le_bytes() {
        return Err(damaged("its directory is not that of a JSON document"));
    }
    let mut section = vec![0; length];
    opened.reader.read_at(&mut section, HEADER_BYTES as u64)?;
    if blake3::hash(&section).as_bytes()[..] != opened.directory[8..] {
        return Err(damaged("its checksum does not match"));
    }
    let content = opened.cipher.open(0, &[], &mut section)?;
    let json = decompress_bounded(content, MAX_JSON_BYTES)
        .ok_or_else(|| damaged("it does not decompress"))?;
    let objects = count_objects(&json);
    if objects > MAX_JSON_OBJECTS {
        return Err(damaged(&format!("{objects} JSON objects; {MAX_JSON_OBJECTS} are possible")));
    }
    serde_json::from_slice(&json)
        .map_err(|error| damaged(&format!("its JSON cannot be read: {error}")))
}

/// The ids of all objects of a kind that has no further folders. What has no id for a name is not
/// ours.
///
/// # Errors
/// Those of the store.
pub(crate) fn list(context: &RepoContext, kind: ObjectKind) -> Result<Vec<ObjectId>> {
    let mut ids = Vec::new();
    context.store.list(kind.prefix(), &mut |entry| {
        let id = entry.name.strip_prefix(kind.prefix()).and_then(|id| id.parse::<ObjectId>().ok());
        ids.extend(id.filter(|id| kind.object_name(*id) == entry.name));
        Ok(())
    })?;
    ids.sort_unstable();
    Ok(ids)
}

/// How many objects begin in a JSON text; of what is none, any number.
fn count_objects(json: &[u8]) -> usize {
    let (mut objects, mut in_text, mut escaped) = (0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            b'{' if !in_text => objects += 1,
            _ => {}
        }
    }
    objects
}

/// Decompresses one zstd frame of at most `limit` bytes. The frame says how long it is; a frame that
/// lies is caught by the limit, one that does not say is refused.
pub(crate) fn decompress_bounded(frame: &[u8], limit: usize) -> Option<Vec<u8>> {
    let length = zstd::zstd_safe::get_frame_content_size(frame).ok()??;
    let length = usize::try_from(length).ok().filter(|length| *length <= limit)?;
    zstd::bulk::decompress(frame, length).ok().filter(|content| content.len() == length)
}

#[cfg(test)]
mod tests {
    use super::count_objects;

    #[test]
    fn objects_are_counted_outside_of_text() {
        for (json, objects) in [
            (r#"{"a":[{},{}]}"#, 3),
            (r#"["{{{",{"b":"{\"{"},"\\",{}]"#, 2),
            ("", 0),
            (r#""\"#, 0),
            ("{{{", 3),
        ] {
            assert_eq!(count_objects(json.as_bytes()), objects, "{json}");
        }
    }
}
