//! The reference points that are ours on one VM, written down in the state directory.
//!
//! A reference point has no place for our name, so what is not written here (or named by a restore point of ours)
//! is somebody else's and is never touched. Only the holder of the VM's lock reads and writes the file.

use crate::cycle::points::same_point;
use crate::cycle::steps::is_same_host;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use uuid::Uuid;
use vmtide_hypervisor::{HypervisorError, Result};

/// The directory of the ledgers within the state directory.
const DIRECTORY: &str = "hyper-v";

/// The longest ledger that is read: some ten thousand points, and a VM has one for each repository.
const MAX_LEDGER_BYTES: u64 = 4 << 20;

/// The most points that are kept; a VM has one for each repository. The oldest are forgotten first.
const MAX_POINTS: usize = 4096;

/// One reference point of ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OwnPoint {
    /// Its `InstanceID`.
    pub id: String,
    /// The lineage it belongs to.
    pub lineage: String,
    /// The job that made it.
    pub job: String,
    /// The host it was made on, where that is known.
    #[serde(default)]
    pub host: Option<String>,
}

/// The ledger of one VM.
#[derive(Debug)]
pub(crate) struct Ledger {
    path: PathBuf,
    points: Vec<OwnPoint>,
}

#[derive(Default, Serialize, Deserialize)]
struct Content {
    points: Vec<OwnPoint>,
}

impl Ledger {
    /// Opens the ledger of `vm`; an empty one where there is none.
    ///
    /// # Errors
    /// [`HypervisorError::Io`] where it is there and cannot be read: guessing could leave points behind.
    pub fn open(state_directory: &Path, vm: Uuid) -> Result<Self> {
        let path = state_directory.join(DIRECTORY).join(format!("{vm}.json"));
        let io = |error| HypervisorError::io(format!("read {}", path.display()), error);
        let content: Content = match std::fs::metadata(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Content::default(),
            Err(error) => return Err(io(error)),
            Ok(metadata) if metadata.len() > MAX_LEDGER_BYTES => {
                return Err(io(std::io::Error::other("it is too large to be a list of points")));
            }
            Ok(_) => {
                let bytes = std::fs::read(&path).map_err(io)?;
                serde_json::from_slice(&bytes).map_err(|error| io(error.into()))?
            }
        };
        Ok(Self { path, points: content.points })
    }

    /// The points of all lineages.
    pub fn all(&self) -> impl Iterator<Item = &OwnPoint> {
        self.points.iter()
    }

    /// The points of a lineage.
    pub fn of<'a>(&'a self, lineage: &'a str) -> impl Iterator<Item = &'a OwnPoint> {
        self.points.iter().filter(move |point| point.lineage == lineage)
    }

    /// Writes down a point, durably.
    ///
    /// # Errors
    /// [`HypervisorError::Io`].
    pub fn add(&mut self, point: OwnPoint) -> Result<()> {
        self.points.retain(|known| !same_point(&known.id, &point.id));
        self.points.push(point);
        // Of a host that is never asked again nobody learns that its points are gone.
        let excess = self.points.len().saturating_sub(MAX_POINTS);
        self.points.drain(..excess);
        self.save()
    }

    /// Forgets a point that is not there on `host`, durably; not one that was made on another host: the VM may be there
    /// as well, or have left it there.
    ///
    /// # Errors
    /// As [`remove`](Self::remove).
    pub fn remove_missing(&mut self, id: &str, host: Option<&str>) -> Result<()> {
        let is_it = |known: &OwnPoint| {
            same_point(&known.id, id) && is_same_host(known.host.as_deref(), host)
        };
        if self.points.iter().any(is_it) { self.remove(id) } else { Ok(()) }
    }

    /// Forgets a point that is gone, durably.
    ///
    /// # Errors
    /// [`HypervisorError::Io`]; harmless but for one more look at the next job.
    pub fn remove(&mut self, id: &str) -> Result<()> {
        let before = self.points.len();
        self.points.retain(|known| !same_point(&known.id, id));
        if self.points.len() == before { Ok(()) } else { self.save() }
    }

    fn save(&self) -> Result<()> {
        let temporary = self.path.with_extension("tmp");
        let write = || -> std::io::Result<()> {
            if self.points.is_empty() {
                return match std::fs::remove_file(&self.path) {
                    Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
                    _ => Ok(()),
                };
            }
            let directory = self.path.parent().unwrap_or(Path::new("."));
            std::fs::create_dir_all(directory)?;
            let mut file = File::create(&temporary)?;
            let content = Content { points: self.points.clone() };
            file.write_all(&serde_json::to_vec_pretty(&content)?)?;
            file.sync_all()?;
            std::fs::rename(&temporary, &self.path)?;
            vmtide_block::files::sync_directory(directory)
        };
        write()
            .map_err(|error| HypervisorError::io(format!("write {}", self.path.display()), error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(id: &str, lineage: &str) -> OwnPoint {
        OwnPoint { id: id.into(), lineage: lineage.into(), job: "j".into(), host: None }
    }

    #[test]
    fn points_survive_and_an_empty_ledger_leaves_no_file() {
        let state = tempfile::tempdir().unwrap();
        let vm = Uuid::from_u128(1);
        let mut ledger = Ledger::open(state.path(), vm).unwrap();
        ledger.remove("none").unwrap();
        ledger.add(point("a", "l1")).unwrap();
        ledger.add(point("b", "l2")).unwrap();
        ledger.add(point("a", "l1")).unwrap();
        let mut again = Ledger::open(state.path(), vm).unwrap();
        assert_eq!(again.of("l1").collect::<Vec<_>>(), [&point("a", "l1")]);
        assert_eq!(Ledger::open(state.path(), Uuid::nil()).unwrap().of("l1").count(), 0);
        again.remove("a").unwrap();
        again.remove("b").unwrap();
        assert_eq!(std::fs::read_dir(state.path().join(DIRECTORY)).unwrap().count(), 0);
    }

    #[test]
    fn a_point_of_another_host_is_not_forgotten_where_it_is_missing() {
        let state = tempfile::tempdir().unwrap();
        let vm = Uuid::from_u128(1);
        let mut ledger = Ledger::open(state.path(), vm).unwrap();
        ledger.add(OwnPoint { host: Some("hv1".into()), ..point("a", "l1") }).unwrap();
        ledger.add(point("b", "l1")).unwrap();
        for id in ["a", "b"] {
            ledger.remove_missing(id, Some("hv2")).unwrap();
        }
        let mut ledger = Ledger::open(state.path(), vm).unwrap();
        assert_eq!(ledger.all().map(|point| point.id.as_str()).collect::<Vec<_>>(), ["a"]);
        ledger.remove_missing("a", Some("HV1")).unwrap();
        assert_eq!(ledger.all().count(), 0);
        for number in 0..MAX_POINTS + 2 {
            ledger.points.push(point(&format!("p{number}"), "l1"));
        }
        ledger.add(point("new", "l1")).unwrap();
        assert_eq!(ledger.all().count(), MAX_POINTS);
        assert!(ledger.all().any(|point| point.id == "new"));
    }

    #[test]
    fn a_broken_ledger_is_an_error_and_not_an_empty_one() {
        let state = tempfile::tempdir().unwrap();
        let vm = Uuid::from_u128(1);
        std::fs::create_dir(state.path().join(DIRECTORY)).unwrap();
        std::fs::write(state.path().join(DIRECTORY).join(format!("{vm}.json")), "{").unwrap();
        assert!(Ledger::open(state.path(), vm).unwrap_err().to_string().contains("hyper-v"));
    }
}
