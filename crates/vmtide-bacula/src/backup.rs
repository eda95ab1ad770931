//! A backup of one VM, file by file as the daemon asks for them.
//!
//! 1. The VM is frozen when the first file is asked for; the changes are asked for since the newest moment
//!    that was kept.
//! 2. For each disk the catalogue, through the plugin, says which moment its previous version shows. What
//!    changed since is known or it is not, and accordingly the disk goes as a delta or whole.
//! 3. When all is sent the moment is written to the log ([`crate::moments`]), and only then the VM is
//!    released. In every other case it is released as if there had been no backup.

use crate::decide::{Previous, Since, decide, since_newest};
use crate::job::{Job, Level};
use crate::link::{Link, Said};
use crate::moments::{DiskMoment, Moment, MomentLog, lineage};
use crate::names::{VmPaths, namespace};
use crate::object::{PointObject, options_form};
use crate::send::{SendPlan, send_disk};
use crate::stream::MomentId;
use crate::{BackendError, BackendOptions, Result};
use std::collections::{BTreeMap, VecDeque};
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use vmtide_engine::source::{OpenSource, SourceOptions, TrackedDisk};
use vmtide_hypervisor::{
    Base, Changes, Consistency, DiskId, FreezeRequest, FrozenDisk, FrozenVm, FullReason,
    HypervisorError, JobId, TrackingId, VmConfig,
};

/// A backup that has begun.
pub struct Backup<'a> {
    job: &'a Job,
    source: OpenSource,
    name: String,
    paths: VmPaths,
    log: MomentLog,
    job_id: JobId,
    moment: MomentId,
    exclude: Vec<DiskId>,
    queue: VecDeque<Entry>,
    frozen: Option<Box<dyn FrozenVm>>,
    /// The disk that was offered, until its data are asked for.
    pending: Option<(SendPlan, DiskMoment)>,
    kept: BTreeMap<String, DiskMoment>,
}

/// What is offered to the daemon, in order. What is for restores comes last: it takes the options of the
/// file set away from what follows it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Entry {
    Configuration,
    Disk(usize),
    Row,
    Object,
    Options,
}

/// Opens the source of a job and answers with it and the VM's configuration and name.
pub(crate) fn open_source(
    job: &Job,
    options: &BackendOptions,
    tracked: Vec<TrackedDisk>,
) -> Result<(OpenSource, VmConfig, String)> {
    let command = &job.command;
    let state_directory = state_directory(job, options);
    let source = command.source.open(&SourceOptions {
        name: command.name.clone(),
        format: command.format,
        backing: command.backing,
        backing_format: command.backing_format,
        search: command.search.clone(),
        state_directory,
        guardian: options.guardian.clone(),
        track: command.track,
        agent: (options.agent)(&command.source_text)?,
        hyperv: (options.hyperv)(&command.source_text)?,
        tracked,
        ..SourceOptions::default()
    })?;
    let config = source.hypervisor.describe(&source.vm)?;
    let name = source.name.clone().unwrap_or_else(|| config.name.clone());
    for disk in command.disks.iter().chain(&command.exclude) {
        if !config.disks.iter().any(|known| known.id.0 == *disk) {
            let known: Vec<_> = config.disks.iter().map(|disk| disk.id.0.as_str()).collect();
            return Err(BackendError::Usage(format!(
                "{name} has no disk {disk}; it has {}",
                known.join(", ")
            )));
        }
    }
    Ok((source, config, name))
}

pub(crate) fn state_directory(job: &Job, options: &BackendOptions) -> std::path::PathBuf {
    job.command.state_directory.clone().unwrap_or_else(|| options.state_directory.clone())
}

/// The disks that a job leaves out.
pub(crate) fn excluded(job: &Job, config: &VmConfig) -> Vec<DiskId> {
    let command = &job.command;
    let is_excluded = |disk: &&DiskId| {
        command.exclude.contains(&disk.0)
            || (!command.disks.is_empty() && !command.disks.contains(&disk.0))
    };
    config.disks.iter().map(|disk| &disk.id).filter(is_excluded).cloned().collect()
}

impl<'a> Backup<'a> {
    /// Looks at everything that can be wrong before the VM is touched, and keeps other jobs away from it.
    ///
    /// # Errors
    /// What is wrong; `Busy` while another job of this VM runs.
    pub fn open(job: &'a Job, options: &BackendOptions) -> Result<Self> {
        let (_, config, name) = open_source(job, options, Vec::new())?;
        let job_id = JobId::random();
        let text = &job.command.source_text;
        let log = MomentLog::open(&state_directory(job, options), &name, text, &job_id)?;
        // Only the log knows which bitmap in an image at rest is ours.
        let (source, ..) = open_source(job, options, tracked(&log))?;
        let paths = VmPaths::new(namespace(&job.command.source, text), &name);
        let exclude = excluded(job, &config);
        if exclude.len() == config.disks.len() {
            return Err(BackendError::Usage(format!("{name} has no disk that is not left out")));
        }
        Ok(Self {
            job,
            source,
            name,
            paths,
            log,
            job_id,
            moment: MomentId::random(),
            exclude,
            queue: VecDeque::new(),
            frozen: None,
            pending: None,
            kept: BTreeMap::new(),
        })
    }

    /// Does the job, until the plugin says good-bye.
    ///
    /// # Errors
    /// Everything made on the platform is undone then, but for what the journal keeps for the next job.
    pub fn run(mut self, link: &mut Link) -> Result<()> {
        let outcome = self.serve(link);
        if let Some(frozen) = self.frozen.take()
            && let Err(error) = frozen.abort()
        {
            // The plugin may have gone; the log has it in any case, and the next job removes what is left.
            let _ = link.warn(&format!("not everything could be released: {error}"));
        }
        outcome
    }

    fn serve(&mut self, link: &mut Link) -> Result<()> {
        self.begin(link)?;
        let mut current = None;
        loop {
            match link.line()?.as_str() {
                "Next" => {
                    current = self.queue.pop_front();
                    match current {
                        Some(entry) => self.offer(link, entry)?,
                        None => {
                            self.commit(link)?;
                            link.end()?;
                        }
                    }
                }
                "Data" => match current.take() {
                    Some(Entry::Configuration) => {
                        let json = self.configuration()?;
                        link.send_data(&json)?;
                        link.end()?;
                    }
                    Some(Entry::Disk(index)) => self.send(link, index)?,
                    _ => return Err(BackendError::protocol("Data for what has none")),
                },
                "End ok" => return link.end(),
                other => return Err(BackendError::protocol(format!("{other:?} during a backup"))),
            }
        }
    }

    fn begin(&mut self, link: &mut Link) -> Result<()> {
        if let Some(lost) = self.log.lost.take() {
            link.warn(&format!("all disks are read in full: {lost}"))?;
        }
        link.alive()?;
        let frozen = self.source.hypervisor.freeze(&self.freeze_request(link))?;
        let frozen = self.frozen.insert(frozen);
        for warning in frozen.warnings() {
            link.warn(warning)?;
        }
        if let Some(wanted) = self.job.command.consistency {
            let reached = frozen.consistency();
            if reached < wanted {
                let detail = frozen.downgrade_reason().unwrap_or("no reason was given").to_owned();
                if !self.job.command.allow_downgrade {
                    return Err(HypervisorError::ConsistencyNotReached { wanted, detail }.into());
                }
                link.warn(&format!("{reached} consistency instead of {wanted}: {detail}"))?;
            }
        }
        self.queue.push_back(Entry::Configuration);
        for (index, disk) in frozen.disks().iter().enumerate() {
            if !self.exclude.contains(&disk.id) {
                self.queue.push_back(Entry::Disk(index));
            }
        }
        self.queue.extend([Entry::Row, Entry::Object]);
        if self.job.level == Level::Full {
            // Every restore has a full backup in it, and the console offers one form for each object.
            self.queue.push_back(Entry::Options);
        }
        let text = format!("{} is frozen, {} consistent", self.name, frozen.consistency());
        link.info(&text)
    }

    fn freeze_request(&self, link: &Link) -> FreezeRequest {
        let newest = self.log.newest();
        let bases = newest.iter().flat_map(|moment| &moment.disks).map(|(id, disk)| {
            let tracking = disk.tracking.clone().map(TrackingId);
            (DiskId(id.clone()), Base { tracking, size_bytes: disk.size_bytes })
        });
        let command = &self.job.command;
        FreezeRequest {
            vm: self.source.vm.clone(),
            job: self.job_id.clone(),
            lineage: lineage(&command.source_text, &self.name),
            // Whoever names none gets the best there is, and no complaint about what it is.
            consistency: command.consistency.unwrap_or(Consistency::Application),
            allow_downgrade: command.consistency.is_none() || command.allow_downgrade,
            bases: bases.collect(),
            exclude: self.exclude.clone(),
            cancel: link.cancel.clone(),
        }
    }

    fn frozen(&self) -> Result<&dyn FrozenVm> {
        self.frozen
            .as_deref()
            .ok_or_else(|| BackendError::protocol("a request after the last file"))
    }

    fn configuration(&self) -> Result<Vec<u8>> {
        let json = serde_json::to_vec_pretty(self.frozen()?.config());
        json.map_err(|error| BackendError::Refused(format!("write the configuration: {error}")))
    }

    fn offer(&mut self, link: &mut Link, entry: Entry) -> Result<()> {
        let time = now();
        match entry {
            Entry::Configuration => {
                self.check_accurate(link)?;
                link.command(&format!("File {}", self.paths.configuration()))?;
                link.command(&format!("Size {}", self.configuration()?.len()))?;
                link.command(&format!("Time {time}"))?;
                link.command("Kind plain")?;
            }
            Entry::Disk(index) => self.offer_disk(link, index, time)?,
            Entry::Row => {
                self.seal(link)?;
                self.offer_row(link)?;
            }
            Entry::Object => {
                let object = PointObject::new(self.frozen()?, self.job, self.moment, &self.kept);
                link.command(&format!("Object {}", self.paths.object()))?;
                link.send_data(&object.bytes()?)?;
            }
            Entry::Options => {
                link.command("Options RestoreOptions")?;
                link.send_data(options_form().as_bytes())?;
            }
        }
        link.end()
    }

    /// All disks were read: a platform that names the moment only now does so, before anything records it.
    fn seal(&mut self, link: &mut Link) -> Result<()> {
        let Some(frozen) = self.frozen.as_deref_mut() else { return Ok(()) };
        frozen.check()?;
        let sealed = frozen.seal()?;
        for warning in &sealed.warnings {
            link.warn(warning)?;
        }
        for (id, tracking) in sealed.tracking {
            if let Some(record) = self.kept.get_mut(&id.0) {
                record.tracking = Some(tracking.0);
            }
        }
        Ok(())
    }

    fn offer_row(&self, link: &mut Link) -> Result<()> {
        let config = self.frozen()?.config();
        let size: u64 = self.kept.values().map(|disk| disk.size_bytes).sum();
        for line in [
            format!("Row {}", self.paths.directory()),
            "Category Virtual Machine".into(),
            format!("Type {}", config.platform),
            format!("Name {}", self.name),
            format!("Source {}", self.source.display),
            format!("Uuid {}", config.id.as_deref().unwrap_or(&self.moment.to_string())),
            format!("Size {size}"),
            "Status T".into(),
        ] {
            link.command(&line)?;
        }
        Ok(())
    }

    /// What the catalogue has of a file.
    fn previous(&self, link: &mut Link, path: &str) -> Result<Previous> {
        if self.job.level == Level::Full {
            return Ok(Previous::None);
        }
        link.command(&format!("Previous {path}"))?;
        let line = match link.hear()? {
            Said::Line(line) => line,
            other => {
                return Err(BackendError::protocol(format!("{other:?} for a previous version")));
            }
        };
        let mut words = line.split(' ');
        match (words.next(), words.next()) {
            (Some("Previous"), Some("none")) => Ok(Previous::None),
            (Some("Previous"), Some(moment)) => {
                Ok(MomentId::parse(moment).map_or(Previous::Foreign, Previous::Moment))
            }
            _ => Err(BackendError::protocol(format!("{line:?} for a previous version"))),
        }
    }

    /// Fails where the daemon does not know the files of the previous job, though it had this VM: then the job
    /// is not in accurate mode (of which the daemon's own word is not always true), every disk would go whole,
    /// and Bacula could not tell one delta from another.
    fn check_accurate(&self, link: &mut Link) -> Result<()> {
        if self.job.level == Level::Full || !self.log.has_job(&self.job.previous) {
            return Ok(());
        }
        match self.previous(link, &self.paths.configuration())? {
            Previous::None => Err(BackendError::Refused(
                "incremental and differential jobs need Accurate = yes in the Job resource: without it the \
                 catalogue does not say what the last backup held"
                    .into(),
            )),
            _ => Ok(()),
        }
    }

    fn disk(&self, index: usize) -> Result<FrozenDisk> {
        let disk = self.frozen()?.disks().get(index).cloned();
        disk.ok_or_else(|| BackendError::Refused("a disk has gone".into()))
    }

    fn offer_disk(&mut self, link: &mut Link, index: usize, time: u64) -> Result<()> {
        let disk = self.disk(index)?;
        let path = self.paths.disk(&disk.id.0);
        let size_bytes = disk.device.size_bytes();
        let previous = self.previous(link, &path)?;
        self.tell_of_other_job(link, previous)?;
        // Bacula has the disk under the name of its place: what changed since it was in another one is no help.
        let changes = match self.frozen()?.moved_from(&disk.id) {
            Some(from) => Changes::Everything(FullReason::DiskReplaced(format!("it was {from}"))),
            None => disk.changes.clone(),
        };
        let since = since_newest(&self.log, &disk.id.0, size_bytes, &changes);
        let (selection, base, reason) =
            decide(&self.log, self.job.level, &disk.id.0, size_bytes, previous, &since);
        if let Some(reason) = reason {
            let text = format!("disk {} is sent whole: {}", disk.id, reason.text);
            if reason.is_loss { link.warn(&text)? } else { link.info(&text)? }
        }
        for line in [
            format!("File {path}"),
            format!("Size {size_bytes}"),
            format!("Time {time}"),
            format!("Moment {}", self.moment),
            format!("Base {:016x}", base.map_or(0, |base| base.0)),
            format!("Kind {}", if base.is_some() { "delta" } else { "full" }),
        ] {
            link.command(&line)?;
        }
        // A platform without tracking gets a list of digests instead. Whoever tells changes will name the moment.
        let new_digests = disk.tracking.is_none() && !matches!(changes, Changes::Ranges(_));
        let new_digests =
            new_digests.then(|| self.log.digest_path(&disk.id.0, &self.moment.to_string()));
        let mut record = DiskMoment {
            size_bytes,
            tracking: disk.tracking.map(|id| id.0),
            digests: new_digests.is_some(),
            changed: None,
        };
        let old_digests = match since {
            Since::Ranges(ranges) => {
                record.set_changed(Some(ranges));
                None
            }
            Since::Digests(path) => Some(path),
            Since::Unknown(_) => None,
        };
        let plan = SendPlan { selection, base, moment: self.moment, new_digests, old_digests };
        self.pending = Some((plan, record));
        Ok(())
    }

    /// That Bacula counts from another job than the newest one here is in order, and worth knowing.
    fn tell_of_other_job(&self, link: &mut Link, previous: Previous) -> Result<()> {
        let Previous::Moment(moment) = previous else { return Ok(()) };
        match self.log.job_of(moment) {
            Some(job) if job != self.job.previous && !self.job.previous.is_empty() => link.info(
                &format!("the catalogue counts from job {job}, not from {}", self.job.previous),
            ),
            _ => Ok(()),
        }
    }

    fn send(&mut self, link: &mut Link, index: usize) -> Result<()> {
        let disk = self.disk(index)?;
        let (plan, mut record) =
            self.pending.take().ok_or_else(|| BackendError::protocol("Data twice for one disk"))?;
        let begun = Instant::now();
        let frozen = self.frozen()?;
        let sent = send_disk(link, disk.device.as_ref(), &plan, &|| Ok(frozen.check()?))?;
        if sent.changed.is_some() {
            record.set_changed(sent.changed);
        }
        let seconds = begun.elapsed().as_secs_f64();
        tracing::info!(disk = %disk.id, bytes = sent.data_bytes, seconds, "sent");
        self.kept.insert(disk.id.0, record);
        Ok(())
    }

    /// Keeps the moment, and lets the VM go with it.
    fn commit(&mut self, link: &mut Link) -> Result<()> {
        let Some(frozen) = self.frozen.as_deref() else { return Ok(()) };
        for disk in frozen.disks().iter().filter(|disk| !self.exclude.contains(&disk.id)) {
            if !self.kept.contains_key(&disk.id.0) {
                return Err(BackendError::Refused(format!("disk {} was not read", disk.id)));
            }
        }
        link.cancel.check()?;
        frozen.check()?;
        self.log.append(Moment {
            id: self.moment.to_string(),
            job: self.job.name.clone(),
            level: self.job.level.letter(),
            time: now(),
            disks: std::mem::take(&mut self.kept),
        })?;
        let Some(frozen) = self.frozen.take() else { return Ok(()) };
        match frozen.commit() {
            Ok(left) => {
                for what in left {
                    link.warn(&format!("left for the next job to remove: {what}"))?;
                }
            }
            Err(error) => link.warn(&format!(
                "the backup is complete, but change tracking could not be kept, so the next one reads in \
                 full: {error}"
            ))?,
        }
        Ok(())
    }
}

/// The disks whose tracking may lie in an image at rest.
fn tracked(log: &MomentLog) -> Vec<TrackedDisk> {
    let disks = log.newest().into_iter().flat_map(|moment| &moment.disks);
    disks
        .filter_map(|(id, disk)| {
            Some(TrackedDisk { id: id.clone(), tracking: disk.tracking.clone()? })
        })
        .collect()
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |duration| duration.as_secs())
}
