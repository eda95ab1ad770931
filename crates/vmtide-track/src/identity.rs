//! How it is known that an image is the one that was tracked, and that nobody else wrote to it.

/// What an image looks like at one moment, for [`TrackedDisk::open`](crate::TrackedDisk::open).
///
/// What is `None` here, or was when it was stored, is not compared: the caller could not tell. The virtual size
/// is always compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The disk's own id, where the format has one. Always compared.
    pub disk_id: Option<String>,
    /// What the image's files look like while nobody writes to them (sizes and times of change). Compared after a
    /// planned stop: a difference means that somebody else wrote.
    pub stamp: Option<String>,
    /// Which file it is, whatever its name (inode). Compared after a crash, when the stamp is not known: the
    /// files of tracking may lie beside another image now.
    pub file_id: Option<String>,
    /// When the image was last written to, in milliseconds since 1970. After a crash that must not be long after the last
    /// sign of the host that crashed.
    pub changed_unix_ms: Option<u64>,
    /// The mark that the format's writers leave (VHDX: DataWriteGuid, VMDK: CID). Compared after a crash, with what
    /// it was when the disk was opened and what this writer said it would leave.
    pub generation: Option<String>,
    /// The mark that this opening will leave once it writes.
    pub next_generation: Option<String>,
}

/// The most bytes of one text of an identity that are stored; longer ones are cut, alike at every time.
const MAX_TEXT_BYTES: usize = 4096;

/// A text cut so that it can be stored.
pub(crate) fn stored(text: Option<&str>) -> Option<String> {
    text.map(|text| {
        let mut end = text.len().min(MAX_TEXT_BYTES);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.get(..end).unwrap_or_default().to_owned()
    })
}

/// An identity as it is stored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct StoredIdentity {
    pub disk_id: Option<String>,
    pub stamp: Option<String>,
    pub file_id: Option<String>,
    /// The marks of writers that a crash may leave; empty where the format has none.
    pub generations: Vec<String>,
}

impl StoredIdentity {
    /// Of an image that is open for writing.
    pub fn of_open(identity: &Identity) -> Self {
        let marks = [&identity.generation, &identity.next_generation];
        Self {
            disk_id: stored(identity.disk_id.as_deref()),
            stamp: None,
            file_id: stored(identity.file_id.as_deref()),
            generations: match &identity.generation {
                // Without the present one nothing can be compared.
                None => Vec::new(),
                Some(_) => marks.into_iter().filter_map(|mark| stored(mark.as_deref())).collect(),
            },
        }
    }

    /// What of the image is not as it was stored, in words; none where it is the same.
    pub fn difference(&self, now: &Identity, closed: bool) -> Option<String> {
        let differ =
            |then: &Option<String>, now: &Option<String>| match (then, stored(now.as_deref())) {
                (Some(then), Some(now)) => *then != now,
                _ => false,
            };
        if differ(&self.disk_id, &now.disk_id) {
            return Some("the files of tracking are those of another disk".into());
        }
        if closed {
            return differ(&self.stamp, &now.stamp)
                .then(|| "the image was changed or copied while nothing tracked it".into());
        }
        if differ(&self.file_id, &now.file_id) {
            return Some("the image was replaced or copied after a crash".into());
        }
        let mark = stored(now.generation.as_deref());
        if let Some(mark) = mark
            && !self.generations.is_empty()
            && !self.generations.contains(&mark)
        {
            return Some("another program wrote to the image after a crash".into());
        }
        None
    }
}
