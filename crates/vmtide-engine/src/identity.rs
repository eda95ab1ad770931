//! Which restore points are of the VM that is backed up: those of its name, or, where the platform gives VMs ids
//! for life, those of its id. A VM that was renamed or moved to another host then goes on in its line, and another
//! VM that has got its name does not continue it.

use crate::Result;
use vmtide_hypervisor::Hypervisor;
use vmtide_repo::RestorePoint;

/// The VM of a backup.
pub(crate) struct VmLine {
    /// The name under which the new restore point is recorded.
    pub name: String,
    /// The platform and the VM's id there, in lower case, where ids are for life.
    id: Option<(String, String)>,
}

impl VmLine {
    /// Asks the platform. `name` is the user's, which goes before the platform's.
    ///
    /// # Errors
    /// Those of describing the VM.
    pub fn of(hypervisor: &dyn Hypervisor, vm: &str, name: Option<&str>) -> Result<Self> {
        let lasting = hypervisor.has_lasting_ids();
        if let (Some(name), false) = (name, lasting) {
            return Ok(Self { name: name.to_owned(), id: None });
        }
        let config = hypervisor.describe(vm)?;
        let id = config.id.filter(|_| lasting).map(|id| (config.platform, id.to_lowercase()));
        Ok(Self { name: name.map_or(config.name, ToOwned::to_owned), id })
    }

    /// What names the line of the VM's restore points within a repository.
    pub fn lineage_name(&self) -> String {
        self.id
            .as_ref()
            .map_or_else(|| self.name.clone(), |(platform, id)| format!("{platform}:{id}"))
    }

    /// Whether a restore point is of this VM.
    pub fn is_of(&self, point: &RestorePoint) -> bool {
        match (&self.id, id_of(point)) {
            (Some(own), Some(recorded)) if own.0 == recorded.0 => own.1 == recorded.1,
            _ => point.vm == self.name,
        }
    }

    /// What a user should know about names: of a VM that is called otherwise now, and of two that are called the same.
    pub fn confusion(&self, points: &[RestorePoint]) -> Vec<String> {
        let mut notes = Vec::new();
        let newest = points.iter().rfind(|point| self.is_of(point));
        if let Some(newest) = newest.filter(|point| point.vm != self.name) {
            notes.push(format!(
                "this VM is {} in its earlier restore points and {} from now on",
                newest.vm, self.name
            ));
        }
        let other = points.iter().rfind(|point| point.vm == self.name);
        if let Some((_, id)) = other.filter(|point| !self.is_of(point)).and_then(id_of) {
            notes.push(format!(
                "the repository has restore points of another VM of the name {} (id {id}); tell them apart \
                 with --name",
                self.name
            ));
        }
        notes
    }
}

/// The platform and id that a restore point records, the id in lower case.
fn id_of(point: &RestorePoint) -> Option<(String, String)> {
    let text = |key: &str| point.config.get(key).and_then(|value| value.as_str());
    Some((text("platform")?.to_owned(), text("id")?.to_lowercase()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn point(vm: &str, id: &str) -> RestorePoint {
        let mut point = crate::points::tests::point_with(vmtide_repo::DiskRecord {
            id: "scsi0:0".into(),
            size_bytes: 0,
            map: Vec::new(),
            counts: vmtide_repo::DiskCounts::default(),
            tracking: vmtide_repo::TrackingRecord::default(),
        });
        point.vm = vm.into();
        point.config = json!({"platform": "hyper-v", "id": id});
        point
    }

    fn identity(name: &str, id: Option<&str>) -> VmLine {
        VmLine { name: name.into(), id: id.map(|id| ("hyper-v".into(), id.into())) }
    }

    #[test]
    fn an_id_for_life_goes_before_the_name() {
        let renamed = identity("shop", Some("a1"));
        assert!(renamed.is_of(&point("web", "A1")));
        assert!(!renamed.is_of(&point("shop", "B2")));
        assert_eq!(renamed.lineage_name(), identity("web", Some("a1")).lineage_name());
        // A point of the time before ids, or of another platform, is told by its name.
        let mut old = point("shop", "B2");
        old.config = json!({"platform": "qemu", "id": "B2"});
        assert!(renamed.is_of(&old));
        let plain = identity("web", None);
        assert!(plain.is_of(&point("web", "A1")) && !plain.is_of(&point("shop", "A1")));
        assert_eq!(plain.lineage_name(), "web");
    }

    #[test]
    fn users_are_told_of_names_that_changed_and_names_that_two_share() {
        let vm = identity("shop", Some("a1"));
        assert_eq!(vm.confusion(&[point("shop", "A1")]), Vec::<String>::new());
        let notes = vm.confusion(&[point("web", "A1")]);
        assert!(notes.len() == 1 && notes[0].contains("is web"), "{notes:?}");
        let notes = vm.confusion(&[point("shop", "A1"), point("shop", "B2")]);
        assert!(notes.len() == 1 && notes[0].contains("b2"), "{notes:?}");
    }
}
