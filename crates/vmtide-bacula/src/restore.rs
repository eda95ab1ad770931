//! A restore: files come as the daemon takes them from the volumes, a full first, then its deltas in order.
//!
//! A disk is written into an image that has no name yet. Each layer says which moment it is of and which one
//! it builds on, and ends with a count and a checksum; a layer that is missing, foreign or not whole ends
//! the restore. When the daemon says that all is done, and not before, the images get their names, or a Hyper-V host
//! makes a VM of the disks (`restore_vm`).

use crate::backup::state_directory;
use crate::job::{Job, Replace};
use crate::link::{Link, Said};
use crate::object::{Destination, PointObject, RestoreOptions};
use crate::restore_vm::HostVm;
use crate::stream::{CONTROL_OFFSET, Record, StreamHeader, StreamTrailer, Tally};
use crate::target::{Place, PlainFile, Target, below, may_take, place};
use crate::{BackendError, BackendOptions, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The most bytes of a restore object.
const MAX_OBJECT_BYTES: usize = 16 << 20;

/// The largest disk: its bytes lie below the records.
const MAX_SIZE_BYTES: u64 = CONTROL_OFFSET;

/// A restore.
pub struct Restore<'a> {
    job: &'a Job,
    backend: &'a BackendOptions,
    options: RestoreOptions,
    point: Option<(u32, PointObject)>,
    vm: Option<HostVm>,
    disks: BTreeMap<PathBuf, Layered>,
    skipped: BTreeSet<PathBuf>,
    incoming: Option<Incoming>,
}

/// A disk with the layers it has so far.
struct Layered {
    target: Target,
    /// The first half of the moment that the last layer is of.
    moment: u64,
}

/// What the daemon says of a file.
#[derive(Default)]
struct Described {
    path: PathBuf,
    size_bytes: u64,
    time: u64,
    moment: u64,
    base: u64,
}

enum Incoming {
    Plain(PlainFile),
    Disk(Box<Layer>),
}

/// A layer on its way.
struct Layer {
    disk: PathBuf,
    described: Described,
    header: Option<StreamHeader>,
    trailer: Option<StreamTrailer>,
    record: Vec<u8>,
    tally: Tally,
    position: u64,
}

impl<'a> Restore<'a> {
    /// A restore of what `job` names.
    pub fn new(job: &'a Job, backend: &'a BackendOptions) -> Self {
        Self {
            job,
            backend,
            options: RestoreOptions::default(),
            point: None,
            vm: None,
            disks: BTreeMap::new(),
            skipped: BTreeSet::new(),
            incoming: None,
        }
    }

    /// Does it, until the plugin says good-bye.
    ///
    /// # Errors
    /// No new image has its name then, and no host has a new VM.
    pub fn run(mut self, link: &mut Link) -> Result<()> {
        let outcome = self.serve(link);
        // Nobody may hold a disk of the VM beyond it.
        self.incoming = None;
        self.disks.clear();
        if let Some(vm) = self.vm.take()
            && let Err(error) = vm.abort()
        {
            // The plugin may have gone; the next backup of a VM on that host removes what is left.
            let _ = link.warn(&format!("what the restore had made on the host is left: {error}"));
        }
        outcome
    }

    fn serve(&mut self, link: &mut Link) -> Result<()> {
        loop {
            link.cancel.check()?;
            let line = match link.hear()? {
                Said::Data => {
                    self.data(link.data())?;
                    continue;
                }
                Said::Line(line) => line,
                Said::End => return Err(BackendError::protocol("an end of nothing")),
            };
            let (word, value) = line.split_once(' ').unwrap_or((&line, ""));
            match word {
                "Object" => self.object(link, value)?,
                "Options" => self.take_options(link)?,
                "Begin" => self.begin(link)?,
                "File" => self.file(link, value)?,
                "At" => {
                    let offset =
                        value.parse().map_err(|_| BackendError::protocol(format!("{line:?}")))?;
                    self.seek(offset)?;
                }
                "Close" => {
                    self.close()?;
                    link.command("Done")?;
                }
                "End" if value == "ok" => {
                    self.publish(link)?;
                    return link.end();
                }
                _ => return Err(BackendError::protocol(format!("{line:?} during a restore"))),
            }
        }
    }

    /// The data up to the end of the block.
    fn block(link: &mut Link) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        loop {
            match link.hear()? {
                Said::End => return Ok(bytes),
                Said::Data if bytes.len() + link.data().len() <= MAX_OBJECT_BYTES => {
                    bytes.extend_from_slice(link.data());
                }
                Said::Data => return Err(BackendError::protocol("an object of more than 16 MiB")),
                Said::Line(line) => {
                    return Err(BackendError::protocol(format!("{line:?} in an object")));
                }
            }
        }
    }

    /// Of the objects of this VM the newest counts: those of all jobs that are restored come.
    fn object(&mut self, link: &mut Link, what: &str) -> Result<()> {
        let bytes = Self::block(link)?;
        let job: u32 = what.split(' ').next().and_then(|id| id.parse().ok()).unwrap_or(0);
        let Some(object) = PointObject::parse(&bytes) else { return Ok(()) };
        let is_ours = object.source == self.job.command.source_text
            && self.job.command.name.as_ref().is_none_or(|name| *name == object.config.name);
        if is_ours && self.point.as_ref().is_none_or(|(newest, _)| *newest <= job) {
            self.point = Some((job, object));
        }
        Ok(())
    }

    fn take_options(&mut self, link: &mut Link) -> Result<()> {
        let bytes = Self::block(link)?;
        self.options = RestoreOptions::parse(&String::from_utf8_lossy(&bytes))?;
        Ok(())
    }

    fn begin(&mut self, link: &mut Link) -> Result<()> {
        if let Some((_, point)) = &self.point {
            link.info(&format!(
                "restoring {} as of job {}, {} consistent",
                point.config.name, point.job, point.consistency
            ))?;
        }
        link.end()
    }

    fn file(&mut self, link: &mut Link, path: &str) -> Result<()> {
        let described = describe(link, path)?;
        if self.incoming.is_some() {
            return Err(BackendError::protocol("a file inside another one"));
        }
        let answer = if described.moment == 0 {
            self.plain_file(&described)?
        } else {
            self.layer(link, described)?
        };
        link.command(if answer { "Extract" } else { "Skip" })
    }

    /// Whether a file that is no disk is taken.
    fn plain_file(&mut self, described: &Described) -> Result<bool> {
        let path = match &self.options.to {
            Destination::Path => described.path.clone(),
            Destination::Directory(directory) => below(directory, &described.path),
            // It stays in the catalogue: the VM has its own.
            Destination::Device(_) | Destination::Original | Destination::Vm(_) => {
                return Ok(false);
            }
        };
        if !may_take(&path, self.job.replace, described.time) {
            return Ok(false);
        }
        self.incoming = Some(Incoming::Plain(PlainFile::create(path)?));
        Ok(true)
    }

    /// Whether a layer of a disk is taken.
    fn layer(&mut self, link: &mut Link, described: Described) -> Result<bool> {
        let path = described.path.clone();
        if described.size_bytes > MAX_SIZE_BYTES {
            return Err(damaged(&path, format!("a disk of {} bytes", described.size_bytes)));
        }
        if described.base == 0 {
            let point = self.point.as_ref().map(|(_, point)| point);
            let place = place(&path, &self.options, point)?;
            if !self.may_take_place(&place, described.time) {
                link.info(&format!("{} is there and stays", path.display()))?;
                self.skipped.insert(path);
                return Ok(false);
            }
            // A later full takes the place of an earlier one.
            self.skipped.remove(&path);
            self.disks.remove(&path);
            let target = self.target(&place, &described, link)?;
            self.disks.insert(path.clone(), Layered { target, moment: described.moment });
        } else {
            if self.skipped.contains(&path) {
                return Ok(false);
            }
            let below = self.disks.get(&path).map(|disk| disk.moment);
            if below != Some(described.base) {
                return Err(damaged(
                    &path,
                    "what is restored builds on a backup that is not restored with it: select the job \
                     again, with the full backup before it"
                        .into(),
                ));
            }
        }
        self.incoming = Some(Incoming::Disk(Box::new(Layer {
            disk: path,
            described,
            header: None,
            trailer: None,
            record: Vec::new(),
            tally: Tally::default(),
            position: 0,
        })));
        Ok(true)
    }

    /// The disk of zeros that a full backup is written to.
    fn target(&mut self, place: &Place, described: &Described, link: &mut Link) -> Result<Target> {
        let size_bytes = described.size_bytes;
        match place {
            Place::Image(path, format) => {
                let mut target = Target::image(path, *format, size_bytes)?;
                if self.options.to == Destination::Original {
                    target.keep_owner()?;
                }
                Ok(target)
            }
            Place::Device(_) if !self.disks.is_empty() => Err(BackendError::Refused(
                "several disks cannot be restored to one block device: select one".into(),
            )),
            Place::Device(path) => Target::device(path, size_bytes, &mut || link.alive()),
            Place::Vm => {
                let (disk, is_new) = self.host_vm(link)?.disk(&described.path)?;
                let target = Target::existing(disk.device, disk.path, size_bytes)?;
                if !is_new {
                    target.clear(&mut || link.alive())?;
                }
                Ok(target)
            }
        }
    }

    /// The VM on the host, which its first disk begins.
    fn host_vm(&mut self, link: &mut Link) -> Result<&mut HostVm> {
        let begun = match (self.vm.take(), &self.options.to, &self.point) {
            (Some(vm), ..) => vm,
            (None, Destination::Vm(url), Some((_, point))) => {
                let state_directory = state_directory(self.job, self.backend);
                link.info(&format!("making the disks of {} for {url}", point.config.name))?;
                let vm = HostVm::begin(url, point, self.backend, state_directory, &link.cancel)?;
                for warning in vm.warnings() {
                    link.warn(warning)?;
                }
                vm
            }
            _ => {
                return Err(BackendError::Refused(
                    "what is restored does not say what VM it is of: restore it to a directory"
                        .into(),
                ));
            }
        };
        Ok(self.vm.insert(begun))
    }

    fn may_take_place(&self, place: &Place, time: u64) -> bool {
        match place {
            Place::Image(path, _) => {
                // To restore to the VM's own images is to replace them.
                let replace = match self.options.to {
                    Destination::Original => Replace::Always,
                    _ => self.job.replace,
                };
                may_take(path, replace, time)
            }
            // A host refuses a name that is taken.
            Place::Device(_) | Place::Vm => true,
        }
    }

    fn seek(&mut self, offset: u64) -> Result<()> {
        match &mut self.incoming {
            Some(Incoming::Disk(layer)) => layer.seek(offset),
            Some(Incoming::Plain(_)) if offset == 0 => Ok(()),
            _ => Err(BackendError::protocol("an offset outside of a disk")),
        }
    }

    fn data(&mut self, data: &[u8]) -> Result<()> {
        match &mut self.incoming {
            Some(Incoming::Plain(file)) => file.write(data),
            Some(Incoming::Disk(layer)) => {
                let disk = self.disks.get_mut(&layer.disk);
                let disk = disk.ok_or_else(|| BackendError::protocol("data of no disk"))?;
                layer.take(&mut disk.target, data)
            }
            None => Err(BackendError::protocol("data outside of a file")),
        }
    }

    fn close(&mut self) -> Result<()> {
        match self.incoming.take() {
            Some(Incoming::Plain(file)) => file.publish(),
            Some(Incoming::Disk(layer)) => {
                layer.check_whole()?;
                let disk = self.disks.get_mut(&layer.disk);
                let disk = disk.ok_or_else(|| BackendError::protocol("the end of no disk"))?;
                disk.target.write_buffer()?;
                disk.moment = layer.described.moment;
                Ok(())
            }
            None => Err(BackendError::protocol("the end of no file")),
        }
    }

    fn publish(&mut self, link: &mut Link) -> Result<()> {
        if self.incoming.is_some() {
            return Err(BackendError::protocol("the end of the job inside a file"));
        }
        for disk in std::mem::take(&mut self.disks).into_values() {
            link.alive()?;
            let name = disk.target.publish()?;
            link.info(&format!("restored {name}"))?;
        }
        let Some(vm) = self.vm.take() else { return Ok(()) };
        let told = vm.warnings().len();
        let vm = vm.finish()?;
        for warning in vm.warnings.iter().skip(told) {
            link.warn(warning)?;
        }
        link.info(&format!("{} is on the host, off and with its networks disconnected", vm.name))
    }
}

impl Layer {
    fn seek(&mut self, offset: u64) -> Result<()> {
        if !self.record.is_empty() && offset != self.position {
            return Err(damaged(&self.disk, "a record breaks off".into()));
        }
        self.position = offset;
        Ok(())
    }

    fn take(&mut self, target: &mut Target, data: &[u8]) -> Result<()> {
        let offset = self.position;
        self.position = offset.saturating_add(data.len() as u64);
        if self.trailer.is_some() {
            return Err(damaged(&self.disk, "there are data after its end".into()));
        }
        if offset >= CONTROL_OFFSET {
            return self.take_record(target, data);
        }
        if self.header.is_none() {
            return Err(damaged(&self.disk, "there are data before its header".into()));
        }
        self.tally.data(offset, data);
        target.write(offset, data)
    }

    fn take_record(&mut self, target: &mut Target, data: &[u8]) -> Result<()> {
        self.record.extend_from_slice(data);
        let parsed = Record::parse(&self.record).map_err(|detail| damaged(&self.disk, detail))?;
        let Some(record) = parsed else { return Ok(()) };
        self.record.clear();
        match record {
            Record::Header(header) => self.check_header(header),
            Record::Trailer(trailer) => {
                self.trailer = Some(trailer);
                Ok(())
            }
            Record::Zeros(_) if self.header.is_none() || self.described.base == 0 => {
                Err(damaged(&self.disk, "there are zeros where none belong".into()))
            }
            Record::Zeros(ranges) => ranges.into_iter().try_for_each(|range| {
                self.tally.zero(range);
                target.zero(range)
            }),
        }
    }

    /// The attributes in the catalogue and the stream must tell the same.
    fn check_header(&mut self, header: StreamHeader) -> Result<()> {
        let half = |id: &str| id.get(..16).and_then(|half| u64::from_str_radix(half, 16).ok());
        let base = header.base.as_deref().map_or(Some(0), half);
        let same = header.size_bytes == self.described.size_bytes
            && half(&header.moment) == Some(self.described.moment)
            && base == Some(self.described.base);
        if self.header.is_some() || !same {
            return Err(damaged(&self.disk, "the stream is that of another backup".into()));
        }
        self.header = Some(header);
        Ok(())
    }

    fn check_whole(&self) -> Result<()> {
        let found = self.tally.trailer();
        match &self.trailer {
            Some(trailer) if *trailer == found => Ok(()),
            Some(_) => {
                Err(damaged(&self.disk, "its data are not those that were backed up".into()))
            }
            None => Err(damaged(&self.disk, "its stream breaks off before its end".into())),
        }
    }
}

fn damaged(path: &Path, detail: String) -> BackendError {
    BackendError::Damaged { file: path.display().to_string(), detail }
}

/// What the plugin says of a file, up to the end of the block.
fn describe(link: &mut Link, path: &str) -> Result<Described> {
    let mut described = Described { path: path.into(), ..Described::default() };
    loop {
        let line = match link.hear()? {
            Said::Line(line) => line,
            Said::End => break,
            Said::Data => return Err(BackendError::protocol("data in a description")),
        };
        let (word, value) = line.split_once(' ').unwrap_or((&line, ""));
        let wrong = || BackendError::protocol(format!("{line:?} for a file"));
        match word {
            "Size" => described.size_bytes = value.parse().map_err(|_| wrong())?,
            // A time before 1970 is as old as any.
            "Time" => described.time = value.parse().unwrap_or(0),
            "Moment" => {
                let half = value.get(..16).ok_or_else(wrong)?;
                described.moment = u64::from_str_radix(half, 16).map_err(|_| wrong())?;
            }
            "Base" => described.base = u64::from_str_radix(value, 16).map_err(|_| wrong())?,
            _ => {}
        }
    }
    if !described.path.is_absolute() {
        return Err(BackendError::protocol(format!("the relative path {path:?}")));
    }
    Ok(described)
}
