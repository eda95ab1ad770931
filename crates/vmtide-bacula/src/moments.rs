//! The moments of a VM that were backed up, and what changed between them.
//!
//! A platform's change tracking counts from one moment, the newest that was kept. Bacula may ask for changes
//! since another: a differential counts from the last full, and a job that Bacula gave up after it was done
//! here is, for Bacula, none. So every moment that was kept is in this log with what had changed since the
//! one before it, and the changes since any of them are the union of what lies between, and of what the
//! platform says since the newest. Which moment a disk is counted from is told by Bacula's catalogue, which
//! has the moment's id in the attributes of each file; nothing here has to be believed about jobs.
//!
//! A moment is in the log when the file has been renamed into place. Tracking on the platform is let go only
//! after that, so a crash on either side costs nothing but a bitmap that the next job removes.

use crate::stream::MomentId;
use crate::{BackendError, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use vmtide_block::{ByteRange, RangeSet};
use vmtide_hypervisor::{JobId, VmLock};

/// The version of the file.
const FORMAT: u32 = 1;

/// The most bytes of a log that are read.
const MAX_LOG_BYTES: u64 = 256 << 20;

/// Moments kept: some three years of daily jobs. An older one makes the next job read in full.
const MAX_MOMENTS: usize = 1000;

/// Ranges kept in all: 16 MiB in memory. More, and the oldest moments go.
const MAX_RANGES: usize = 1 << 20;

/// Ranges of one disk in one moment. More are joined over the smallest gaps, which sends some unchanged
/// bytes in jobs that do not count from the newest moment.
const MAX_RANGES_OF_DISK: usize = 1 << 16;

/// What a disk was like at a moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskMoment {
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The platform's name of the moment; none where it has no tracking.
    #[serde(default)]
    pub tracking: Option<String>,
    /// Whether there is a list of digests of it.
    #[serde(default)]
    pub digests: bool,
    /// What had changed since the moment before, offset and length; none where that is not known.
    #[serde(default)]
    pub changed: Option<Vec<(u64, u64)>>,
}

impl DiskMoment {
    /// What had changed since the moment before it, for the log.
    pub fn set_changed(&mut self, changed: Option<RangeSet>) {
        self.changed = changed.map(|ranges| {
            let ranges = ranges.bounded(MAX_RANGES_OF_DISK, self.size_bytes);
            ranges.iter().map(|range| (range.offset, range.length)).collect()
        });
    }

    fn ranges(&self) -> Option<RangeSet> {
        let pairs = self.changed.as_ref()?;
        let ranges: Vec<ByteRange> =
            pairs.iter().map(|(offset, length)| ByteRange::new(*offset, *length)).collect();
        let fits =
            |range: &ByteRange| range.checked_end().is_some_and(|end| end <= self.size_bytes);
        ranges.iter().all(fits).then(|| RangeSet::from(ranges))
    }
}

/// One moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// Its id, 32 hexadecimal digits.
    pub id: String,
    /// The job that kept it, by Bacula's unique name.
    pub job: String,
    /// The job's level.
    pub level: char,
    /// Seconds since 1970.
    pub time: u64,
    /// The disks.
    pub disks: BTreeMap<String, DiskMoment>,
}

#[derive(Serialize, Deserialize)]
struct LogFile {
    format: u32,
    source: String,
    moments: Vec<Moment>,
}

/// The log of one VM. While it is open nobody else opens it.
pub struct MomentLog {
    directory: PathBuf,
    source: String,
    moments: Vec<Moment>,
    /// Why an earlier log was not used; to be told.
    pub lost: Option<String>,
    _lock: VmLock,
}

impl MomentLog {
    /// Opens the log of the VM `name` that `source` names, below `state_directory`, and keeps others away
    /// from it.
    ///
    /// # Errors
    /// `Busy` while another job of this VM runs; where the state directory cannot be used.
    pub fn open(state_directory: &Path, name: &str, source: &str, job: &JobId) -> Result<Self> {
        let lineage = lineage(source, name);
        let lock = VmLock::acquire(state_directory, name, &format!("bacula-{lineage}"), job)?;
        let directory = state_directory.join("bacula").join(&lineage);
        std::fs::create_dir_all(&directory)
            .map_err(|error| BackendError::io(format!("create {}", directory.display()), error))?;
        let mut log = Self {
            directory,
            source: source.to_owned(),
            moments: Vec::new(),
            lost: None,
            _lock: lock,
        };
        match log.load() {
            Ok(moments) => log.moments = moments,
            Err(lost) => log.lost = Some(lost),
        }
        log.remove_garbage();
        Ok(log)
    }

    /// Where lists of digests are kept.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    fn path(&self) -> PathBuf {
        self.directory.join("moments.json")
    }

    fn load(&self) -> Result<Vec<Moment>, String> {
        let path = self.path();
        let wrong = |what: String| format!("{} cannot be used: {what}", path.display());
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(wrong(error.to_string())),
        };
        let mut text = Vec::new();
        file.take(MAX_LOG_BYTES)
            .read_to_end(&mut text)
            .map_err(|error| wrong(error.to_string()))?;
        let log: LogFile =
            serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
        if log.format != FORMAT {
            return Err(wrong(format!("it has format {}", log.format)));
        }
        if log.moments.iter().any(|moment| MomentId::parse(&moment.id).is_none()) {
            return Err(wrong("a moment has no id".into()));
        }
        Ok(log.moments)
    }

    /// The newest moment.
    pub fn newest(&self) -> Option<&Moment> {
        self.moments.last()
    }

    /// The job that kept a moment.
    pub fn job_of(&self, id: MomentId) -> Option<&str> {
        self.moments
            .iter()
            .find(|moment| moment.id == id.to_string())
            .map(|moment| moment.job.as_str())
    }

    /// Whether a job, by Bacula's unique name, kept a moment.
    pub fn has_job(&self, job: &str) -> bool {
        self.moments.iter().any(|moment| moment.job == job)
    }

    /// What changed on `disk` of `size_bytes` from the moment `base` up to the newest one.
    ///
    /// # Errors
    /// Why that is not known, for the job's report.
    pub fn changed_since(
        &self,
        base: MomentId,
        disk: &str,
        size_bytes: u64,
    ) -> Result<RangeSet, String> {
        let id = base.to_string();
        let at = self.moments.iter().position(|moment| moment.id == id);
        let Some(at) = at else {
            return Err("the moment of the previous backup is not known here any more".into());
        };
        let mut changed = RangeSet::new();
        for (number, moment) in self.moments.iter().enumerate().skip(at) {
            let Some(record) = moment.disks.get(disk) else {
                return Err(format!("it was left out by job {}", moment.job));
            };
            if record.size_bytes != size_bytes {
                return Err(format!(
                    "its size was {} bytes and is {size_bytes}",
                    record.size_bytes
                ));
            }
            if number == at {
                continue;
            }
            match record.ranges() {
                Some(ranges) => changed = changed.union(&ranges),
                None => return Err(format!("what changed before job {} is not known", moment.job)),
            }
        }
        Ok(changed)
    }

    /// Adds a moment. It counts when this has returned.
    ///
    /// # Errors
    /// Where the log cannot be written; it is then as it was.
    pub fn append(&mut self, moment: Moment) -> Result<()> {
        let mut moments = std::mem::take(&mut self.moments);
        let count_of = |moment: &Moment| -> usize {
            moment.disks.values().map(|disk| disk.changed.as_ref().map_or(0, Vec::len)).sum()
        };
        let mut ranges: usize = moments.iter().map(count_of).sum::<usize>() + count_of(&moment);
        let mut drop_first = 0;
        while drop_first < moments.len()
            && (ranges > MAX_RANGES || moments.len() + 1 - drop_first > MAX_MOMENTS)
        {
            ranges -= moments.get(drop_first).map_or(0, count_of);
            drop_first += 1;
        }
        let before = moments.clone();
        moments.drain(..drop_first);
        moments.push(moment);
        let file = LogFile { format: FORMAT, source: self.source.clone(), moments };
        match write_durably(&self.path(), &file) {
            Ok(()) => {
                self.moments = file.moments;
                self.remove_garbage();
                Ok(())
            }
            Err(error) => {
                self.moments = before;
                Err(BackendError::io(format!("write {}", self.path().display()), error))
            }
        }
    }

    /// The file with the digests of a disk at a moment.
    pub fn digest_path(&self, disk: &str, moment: &str) -> PathBuf {
        let hash = blake3::hash(disk.as_bytes()).to_hex();
        self.directory.join(format!("digests-{}-{moment}", &hash[..16]))
    }

    /// Removes lists of digests that do not belong to the newest moment: killed jobs leave them, and newer
    /// ones take their place.
    fn remove_garbage(&self) {
        let keep: Vec<PathBuf> = self
            .newest()
            .iter()
            .flat_map(|moment| moment.disks.keys().map(|disk| self.digest_path(disk, &moment.id)))
            .collect();
        let Ok(listing) = std::fs::read_dir(&self.directory) else { return };
        for path in listing.flatten().map(|entry| entry.path()) {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
            let is_ours =
                name.is_some_and(|name| name.starts_with("digests-") || name.ends_with(".new"));
            if is_ours
                && !keep.contains(&path)
                && let Err(error) = std::fs::remove_file(&path)
            {
                tracing::warn!(path = %path.display(), %error, "cannot remove");
            }
        }
    }
}

/// Names the line of backups of one VM by Bacula on this host, so that its tracking is its own: 16
/// hexadecimal digits.
pub fn lineage(source: &str, vm: &str) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("vmtide 2026 bacula lineage");
    hasher.update(source.as_bytes());
    hasher.update(&[0]);
    hasher.update(vm.as_bytes());
    hasher.finalize().to_hex()[..16].to_owned()
}

fn write_durably(path: &Path, log: &LogFile) -> std::io::Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(&serde_json::to_vec(log)?)?;
    file.sync_all()?;
    drop(file);
    std::fs::rename(&new, path)?;
    #[cfg(unix)]
    if let Some(directory) = path.parent() {
        File::open(directory)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(changed: Option<&[(u64, u64)]>) -> Moment {
        let disk = DiskMoment {
            size_bytes: 1000,
            tracking: None,
            digests: false,
            changed: changed.map(<[_]>::to_vec),
        };
        Moment {
            id: MomentId::random().to_string(),
            job: "J".into(),
            level: 'I',
            time: 0,
            disks: BTreeMap::from([("d".to_owned(), disk)]),
        }
    }

    fn open(directory: &Path) -> MomentLog {
        MomentLog::open(directory, "vm", "/vm.raw", &JobId::random()).unwrap()
    }

    fn id_of(moment: &Moment) -> MomentId {
        MomentId::parse(&moment.id).unwrap()
    }

    #[test]
    fn changes_since_any_moment_are_the_union_of_what_lies_between() {
        let directory = tempfile::tempdir().unwrap();
        let all = [
            moment(None),
            moment(Some(&[(0, 10)])),
            moment(Some(&[(5, 10), (500, 1)])),
            moment(Some(&[])),
        ];
        let mut log = open(directory.path());
        for moment in &all {
            log.append(moment.clone()).unwrap();
        }
        drop(log);
        let log = open(directory.path());
        assert_eq!(log.newest(), all.last());
        let since = |at: usize| {
            let changed = log.changed_since(id_of(&all[at]), "d", 1000).unwrap();
            changed.iter().map(|range| (range.offset, range.length)).collect::<Vec<_>>()
        };
        assert_eq!(since(0), [(0, 15), (500, 1)]);
        assert_eq!(since(1), [(5, 10), (500, 1)]);
        assert_eq!(since(2), []);
        assert_eq!(since(3), []);
    }

    #[test]
    fn what_is_not_known_is_said() {
        let directory = tempfile::tempdir().unwrap();
        let (first, second) = (moment(None), moment(None));
        let mut log = open(directory.path());
        log.append(first.clone()).unwrap();
        log.append(second.clone()).unwrap();
        assert!(log.changed_since(id_of(&first), "d", 1000).unwrap_err().contains("not known"));
        assert!(log.changed_since(id_of(&second), "d", 999).unwrap_err().contains("size"));
        assert!(log.changed_since(id_of(&second), "e", 1000).unwrap_err().contains("left out"));
        assert!(log.changed_since(MomentId::random(), "d", 1000).unwrap_err().contains("any more"));
        let mut wild = moment(Some(&[(u64::MAX, 5)]));
        wild.disks.entry("d".into()).and_modify(|disk| disk.size_bytes = 1000);
        log.append(wild).unwrap();
        assert!(log.changed_since(id_of(&second), "d", 1000).is_err());
    }

    #[test]
    fn one_job_at_a_time_and_a_damaged_log_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = open(directory.path());
        let busy = MomentLog::open(directory.path(), "vm", "/vm.raw", &JobId::random());
        assert!(busy.err().unwrap().to_string().contains("another vmtide job"));
        log.append(moment(None)).unwrap();
        let path = log.path();
        drop(log);
        let text = std::fs::read(&path).unwrap();
        std::fs::write(&path, &text[..text.len() / 2]).unwrap();
        let log = open(directory.path());
        assert!(log.lost.is_some() && log.newest().is_none());
    }

    #[test]
    fn old_moments_go_when_there_are_too_many() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = open(directory.path());
        log.moments = (0..MAX_MOMENTS).map(|_| moment(Some(&[]))).collect();
        let first = id_of(&log.moments[0]);
        let last = moment(Some(&[]));
        log.append(last.clone()).unwrap();
        assert_eq!(log.moments.len(), MAX_MOMENTS);
        assert!(log.changed_since(first, "d", 1000).is_err());
        assert_eq!(log.newest(), Some(&last));
    }
}
