//! The objects of a condemned list (format §11).

use crate::context::RepoContext;
use crate::envelope::ObjectKind;
use crate::{ObjectId, Result, record};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The document of `condemned/C/list`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CondemnedRecord {
    /// The lease of the prune that wrote it.
    pub lease: Option<ObjectId>,
    /// Packs.
    pub packs: Vec<ObjectId>,
    /// Those of the packs whose live chunks are stored elsewhere by now, with the forward that says
    /// where. While the list is there, such a forward and what it leads to is needed.
    pub moved: Vec<(ObjectId, ObjectId)>,
    /// Map segments.
    pub maps: Vec<ObjectId>,
    /// Forwards: the pack, and the forward's own id.
    pub forwards: Vec<(ObjectId, ObjectId)>,
}

impl CondemnedRecord {
    /// How many objects are on it.
    pub fn len(&self) -> usize {
        self.packs.len() + self.maps.len() + self.forwards.len()
    }
}

/// The document of `condemned/C/boundary-R`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct BoundaryRecord {
    /// The leases that had not ended when they were listed, after the list could be seen.
    pub leases: Vec<ObjectId>,
    /// Those of them that may make restore points.
    pub writers: Vec<ObjectId>,
}

/// The document of `condemned/C/verdict-R`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct VerdictRecord {
    /// What of the list nothing needs, nor ever will.
    pub dead: CondemnedRecord,
    /// Leases that must end before it is removed: their holders may read a restore point that
    /// needed it and is forgotten by now.
    pub waits_for: Vec<ObjectId>,
}

/// A list, and what stands beside it.
#[derive(Clone, Debug)]
pub(crate) struct OpenList {
    /// Its id.
    pub id: ObjectId,
    /// What is on it.
    pub record: CondemnedRecord,
    /// The objects beside it.
    pub beside: Beside,
}

/// What stands beside a list, by the names in a listing.
#[derive(Clone, Debug, Default)]
pub(crate) struct Beside {
    /// Whether the list itself is there.
    pub has_list: bool,
    /// Its boundaries.
    pub boundaries: Vec<ObjectId>,
    /// Its verdicts.
    pub verdicts: Vec<ObjectId>,
    /// Whether somebody is about to remove the list though not all of it is gone.
    pub is_closing: bool,
    /// All names.
    pub names: Vec<String>,
}

impl Beside {
    fn add(&mut self, last: &str, name: String) {
        let id = |label: &str| last.strip_prefix(label)?.parse::<ObjectId>().ok();
        self.has_list |= last == "list";
        self.boundaries.extend(id("boundary-"));
        self.verdicts.extend(id("verdict-"));
        self.is_closing |= last.starts_with("closing-");
        self.names.push(name);
    }

    /// Lists what stands beside one list.
    ///
    /// # Errors
    /// Those of the store.
    pub fn read(context: &RepoContext, list: ObjectId) -> Result<Self> {
        let all = list_beside(context, &format!("{}{list}/", ObjectKind::Condemned.prefix()))?;
        Ok(all.into_values().next().unwrap_or_default())
    }
}

/// What stands beside each list, also where the list itself is gone.
///
/// # Errors
/// Those of the store.
pub(crate) fn list_beside(
    context: &RepoContext,
    prefix: &str,
) -> Result<BTreeMap<ObjectId, Beside>> {
    let mut found: BTreeMap<ObjectId, Beside> = BTreeMap::new();
    context.store.list(prefix, &mut |entry| {
        let mut parts = entry.name.split('/').skip(1);
        let id = parts.next().and_then(|id| id.parse::<ObjectId>().ok());
        if let (Some(id), Some(last)) = (id, parts.next().map(str::to_owned)) {
            found.entry(id).or_default().add(&last, entry.name);
        }
        Ok(())
    })?;
    Ok(found)
}

/// All lists. One that goes away meanwhile is gone with everything on it, or nothing on it is
/// condemned any more.
///
/// # Errors
/// Those of the store; [`RepoError::Damaged`](crate::RepoError::Damaged) for a list that cannot be
/// read.
pub(crate) fn read_all(context: &RepoContext) -> Result<Vec<OpenList>> {
    let mut lists = Vec::new();
    for (id, beside) in list_beside(context, ObjectKind::Condemned.prefix())? {
        if !beside.has_list {
            continue;
        }
        let header = context.header(ObjectKind::Condemned, id);
        if let Some(record) = record::try_read(context, header)? {
            lists.push(OpenList { id, record, beside });
        }
    }
    Ok(lists)
}

impl OpenList {
    /// Puts a new list.
    ///
    /// # Errors
    /// Those of the store.
    pub fn put(context: &RepoContext, record: CondemnedRecord) -> Result<Self> {
        let id = ObjectId::random()?;
        record::write(context, ObjectKind::Condemned, id, &record)?;
        Ok(Self { id, record, beside: Beside { has_list: true, ..Beside::default() } })
    }

    /// The header of an object beside it.
    pub fn header(
        &self,
        context: &RepoContext,
        kind: ObjectKind,
        id: ObjectId,
    ) -> crate::envelope::Header {
        context.header_under(kind, self.id, id)
    }

    /// Puts an object beside it, under a new id.
    ///
    /// # Errors
    /// Those of the store.
    pub fn put_beside(
        &self,
        context: &RepoContext,
        kind: ObjectKind,
        document: &impl Serialize,
    ) -> Result<ObjectId> {
        let id = ObjectId::random()?;
        record::write_as(context, self.header(context, kind, id), document)?;
        Ok(id)
    }

    /// Says that the list is about to be removed though not all of it is gone.
    ///
    /// # Errors
    /// Those of the store.
    pub fn put_closing(&self, context: &RepoContext) -> Result<()> {
        let id = ObjectId::random()?;
        let prefix = ObjectKind::Condemned.prefix();
        context.store.put(&format!("{prefix}{}/closing-{id}", self.id), b"closing\n")
    }

    /// Removes the list, and then what stands beside it: without the list that says nothing.
    ///
    /// # Errors
    /// Those of the store.
    pub fn remove(&self, context: &RepoContext) -> Result<()> {
        let name = ObjectKind::Condemned.object_name(self.id);
        context.store.remove(&name)?;
        let beside = Beside::read(context, self.id)?;
        beside
            .names
            .iter()
            .filter(|other| **other != name)
            .try_for_each(|name| context.store.remove(name))
    }
}
