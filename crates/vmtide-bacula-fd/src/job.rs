//! One job of the daemon: what was learned of it from events, and its backends.

use crate::abi::{IoPacket, PluginContext, RestoreObjectPacket, RestorePacket, SavePacket};
use crate::abi::{create, file_type, io, message, option, rc, variable};
use crate::backend::{Backend, Failed, Frame, Result};
use crate::backup::Entry;
use crate::core::Core;
use crate::restore;
use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_char};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The most bytes of restore objects that are kept until the restore begins.
const MAX_OBJECT_BYTES: usize = 64 << 20;

/// The most plugin lines that one restore may have restored at a time: each has a process.
const MAX_BACKENDS: usize = 256;

/// What the daemon's context points to. The job's thread works on `state`; the thread of a console that
/// cancels touches `cancelled` alone.
pub struct Job {
    /// Set when the job is cancelled, by another thread.
    pub cancelled: Arc<AtomicBool>,
    state: Mutex<State>,
}

/// What the job's thread knows.
#[derive(Default)]
pub struct State {
    level: char,
    since: i64,
    backends: Vec<Running>,
    current: Option<usize>,
    /// Set by the first failure; from then on nothing is begun.
    failed: bool,
    is_restore: bool,
    entry: Option<Entry>,
    /// Whether data of the current file is still to come from the backend.
    streaming: bool,
    /// The offset of the next byte that the backend sends, or is sent.
    offset: u64,
    objects: Vec<Object>,
    /// Plugin lines that were backed up in this job.
    seen: Vec<String>,
    /// The files that this job has offered: the catalogue keeps one of each name.
    names: BTreeSet<CString>,
}

struct Running {
    command: String,
    backend: Backend,
}

/// An object of an earlier backup.
pub struct Object {
    /// The job that made it.
    pub job_id: u32,
    /// Its name.
    pub name: String,
    /// The plugin line that it belongs to.
    pub line: String,
    /// Whether it is a form of options, filled in.
    pub is_options: bool,
    /// Its content.
    pub bytes: Vec<u8>,
}

/// What a job is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A backup.
    Backup,
    /// Only its size.
    Estimate,
    /// A restore.
    Restore,
}

impl Job {
    /// A job of which nothing is known yet.
    pub fn new() -> Self {
        Self { cancelled: Arc::default(), state: Mutex::default() }
    }

    /// The state; for the job's thread.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Job {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    /// Remembers the level and the time of the previous job.
    pub fn set_level(&mut self, level: char) {
        self.level = level;
    }

    /// Remembers when the previous job began.
    pub fn set_since(&mut self, since: i64) {
        self.since = since;
    }

    /// Keeps an object of an earlier backup for the backend that a restore starts.
    pub fn keep_object(&mut self, core: Core, packet: &RestoreObjectPacket) {
        let length = usize::try_from(packet.object_length).unwrap_or(0);
        let kept: usize = self.objects.iter().map(|object| object.bytes.len()).sum();
        if packet.object.is_null() || packet.object_name.is_null() {
            return;
        }
        if kept.saturating_add(length) > MAX_OBJECT_BYTES {
            core.message(
                message::WARNING,
                "a restore object is left out: all of them together are larger than 64 MiB",
            );
            return;
        }
        // SAFETY: the daemon gives a string and as many bytes as it says, for this call.
        let (name, bytes) = unsafe {
            (
                CStr::from_ptr(packet.object_name).to_string_lossy().into_owned(),
                std::slice::from_raw_parts(packet.object.cast::<u8>(), length).to_vec(),
            )
        };
        // The director may send blanks as this letter.
        let line = text_of(packet.plugin_name).replace('\u{1}', " ").trim().to_owned();
        let is_options = packet.object_type == file_type::PLUGIN_CONFIG_FILLED;
        self.objects.push(Object { job_id: packet.job_id, name, line, is_options, bytes });
    }

    /// Begins what a plugin line says. Answers as the interface wants it.
    pub fn begin(&mut self, core: Core, job: &Job, purpose: Purpose, command: &str) -> i32 {
        if self.failed {
            return rc::ERROR;
        }
        self.is_restore = purpose == Purpose::Restore;
        if purpose != Purpose::Restore {
            if self.seen.iter().any(|seen| seen == command) {
                core.fatal("the file set has the same vmtide line twice: remove one");
                self.failed = true;
                return rc::ERROR;
            }
            self.seen.push(command.to_owned());
            if purpose == Purpose::Backup
                && self.level != 'F'
                && core.number(variable::ACCURATE) == 0
            {
                core.fatal(
                    "incremental and differential jobs need Accurate = yes in the Job resource: without \
                     it the catalogue does not say what the last backup held",
                );
                self.failed = true;
                return rc::ERROR;
            }
        }
        let started = self.start_backend(core, job, purpose, command);
        self.told(core, started)
    }

    /// Makes of a failure what the daemon understands: the job's report has it, and nothing more is begun.
    fn told(&mut self, core: Core, outcome: Result<()>) -> i32 {
        match outcome {
            Ok(()) => rc::OK,
            Err(Failed(text)) => {
                self.fail(core, &text);
                rc::ERROR
            }
        }
    }

    /// Has the job fail. A restore goes on to its end, without doing anything: a daemon that leaves off in the
    /// middle of one takes no more from the storage daemon, and both wait for each other until somebody cancels
    /// the job. It is told to have failed when it ends.
    fn fail(&mut self, core: Core, text: &str) {
        if self.is_restore {
            core.message(message::ERROR, text);
        } else {
            core.fatal(text);
        }
        self.failed = true;
    }

    fn start_backend(
        &mut self,
        core: Core,
        job: &Job,
        purpose: Purpose,
        command: &str,
    ) -> Result<()> {
        if self.backends.len() >= MAX_BACKENDS {
            return Err(Failed(format!("more than {MAX_BACKENDS} vmtide lines in one job")));
        }
        let working_directory = core.text(variable::WORKING_DIRECTORY);
        let plugin_directory = core.text(variable::PLUGIN_DIRECTORY);
        let cancelled = Arc::clone(&job.cancelled);
        let share = purpose == Purpose::Backup;
        let backend =
            Backend::start(core, &plugin_directory, &working_directory, cancelled, share)?;
        self.backends.push(Running { command: command.to_owned(), backend });
        self.current = Some(self.backends.len() - 1);
        let lines = self.describe_job(core, purpose, command, &working_directory);
        let backend = self.backend()?;
        for line in lines.into_iter().chain(backend.memory_line()) {
            backend.command(&line)?;
        }
        backend.end()?;
        loop {
            match backend.frame(core)? {
                Frame::End => break,
                Frame::Command(line) => {
                    if let Some(seconds) = line.strip_prefix("Silence ") {
                        backend.allow_silence(seconds.parse().unwrap_or(0));
                    }
                }
                Frame::Data(_) => {
                    return Err(Failed("the backend sends data too early".into()));
                }
            }
        }
        if purpose == Purpose::Restore {
            let backend = self.backends.last_mut().map(|running| &mut running.backend);
            let Some(backend) = backend else { return Ok(()) };
            restore::send_objects(backend, core, &self.objects, command)?;
        }
        Ok(())
    }

    fn describe_job(
        &self,
        core: Core,
        purpose: Purpose,
        command: &str,
        working_directory: &str,
    ) -> Vec<String> {
        let purpose_name = match purpose {
            Purpose::Backup => "backup",
            Purpose::Estimate => "estimate",
            Purpose::Restore => "restore",
        };
        let level = if self.level == '\0' { 'F' } else { self.level };
        let replace = u8::try_from(core.number(variable::REPLACE)).unwrap_or(0);
        let mut lines = vec![
            "Job".to_owned(),
            format!("Type={purpose_name}"),
            format!("JobId={}", core.number(variable::JOB_ID)),
            format!("Name={}", core.text(variable::JOB_NAME)),
            format!("WorkingDirectory={working_directory}"),
        ];
        if purpose == Purpose::Restore {
            lines.push(format!("Where={}", core.text(variable::WHERE)));
            lines.push(format!("RegexWhere={}", core.text(variable::REGEX_WHERE)));
            if replace.is_ascii_alphabetic() {
                lines.push(format!("Replace={}", char::from(replace)));
            }
        } else {
            lines.push(format!("Level={level}"));
            lines.push(format!("Since={}", self.since));
            lines.push(format!("Previous={}", core.text(variable::PREVIOUS_JOB_NAME)));
            lines.push(format!("Accurate={}", core.number(variable::ACCURATE)));
        }
        lines.push(format!("Command={command}"));
        // A line of a command is one line, whatever a name holds.
        lines.into_iter().map(|line| line.replace(['\n', '\0'], " ")).collect()
    }

    fn backend(&mut self) -> Result<&mut Backend> {
        let current = self.current.and_then(|index| self.backends.get_mut(index));
        match current {
            Some(running) => Ok(&mut running.backend),
            None => Err(Failed("the daemon asks for a file before a command".into())),
        }
    }

    /// The next file of a backup.
    pub fn start_backup_file(&mut self, core: Core, packet: &mut SavePacket) -> i32 {
        if self.failed {
            return rc::ERROR;
        }
        if self.streaming {
            let left = Err(Failed("the daemon left a disk unread: the backup is void".into()));
            return self.told(core, left);
        }
        let level = self.level;
        let next = self.backend().and_then(|backend| Entry::next(backend, core));
        match next {
            Ok(Some(entry)) => {
                if let Err(error) = self.claim(&entry) {
                    return self.told(core, Err(error));
                }
                let entry = self.entry.insert(entry);
                entry.fill(packet);
                let is_file = packet.kind == file_type::REGULAR;
                if is_file && level != 'F' {
                    // It also tells the daemon that the file was not deleted.
                    core.check_changes(packet);
                    if entry.is_delta() {
                        packet.flags |= option::DELTA;
                    } else {
                        packet.delta_sequence = 0;
                    }
                }
                rc::OK
            }
            Ok(None) => {
                let finished = match self.backend() {
                    Ok(backend) => backend.finish(core, true),
                    Err(error) => Err(error),
                };
                match self.told(core, finished) {
                    rc::OK => rc::MAX,
                    other => other,
                }
            }
            Err(error) => self.told(core, Err(error)),
        }
    }

    /// Takes the name of a file for this job. A second file of one name would be on the volumes, and could not
    /// be chosen in a restore: the catalogue shows one of them.
    fn claim(&mut self, entry: &Entry) -> Result<()> {
        let Some(name) = entry.file_name() else { return Ok(()) };
        if self.names.insert(name.to_owned()) {
            return Ok(());
        }
        Err(Failed(format!(
            "two files of this job are called {} in the catalogue, and only one could be restored: have one \
             plugin line for each VM, and add name= where two VMs or images have the same name",
            name.to_string_lossy()
        )))
    }

    /// Input and output of a file.
    pub fn io(&mut self, core: Core, packet: &mut IoPacket) -> i32 {
        packet.status = -1;
        packet.io_errno = libc::EIO;
        packet.windows_error = 0;
        packet.is_windows_error = 0;
        if self.failed {
            return rc::ERROR;
        }
        let is_backup = self.entry.is_some();
        let outcome = match packet.func {
            io::OPEN if is_backup => self.open_to_read().map(|()| 0),
            io::READ => self.read(core, packet),
            io::CLOSE if is_backup => {
                // What was not read to its end is noticed before the next file, and at the end.
                Ok(0)
            }
            io::OPEN => {
                self.offset = 0;
                Ok(0)
            }
            io::WRITE => self.write(packet),
            io::SEEK => self.seek(packet),
            io::CLOSE => self.close_restored(core).map(|()| 0),
            other => Err(Failed(format!("the daemon asks for unknown input or output {other}"))),
        };
        match outcome {
            Ok(count) => {
                packet.status = count;
                packet.io_errno = 0;
                rc::OK
            }
            Err(error) => self.told(core, Err(error)),
        }
    }

    fn open_to_read(&mut self) -> Result<()> {
        self.backend()?.command("Data")?;
        self.streaming = true;
        self.offset = 0;
        Ok(())
    }

    /// The next block: of one data frame at most, so that it has one offset.
    fn read(&mut self, core: Core, packet: &mut IoPacket) -> Result<i32> {
        let mut offset = self.offset;
        let length = usize::try_from(packet.count).unwrap_or(0);
        if !self.streaming || packet.buffer.is_null() || length == 0 {
            return Ok(0);
        }
        let backend = self.backend()?;
        while !backend.has_pending() {
            match backend.frame(core)? {
                Frame::Data(_) => {}
                Frame::Command(line) => offset = restore::parse_offset(&line)?,
                Frame::End => {
                    self.streaming = false;
                    return Ok(0);
                }
            }
        }
        // SAFETY: the daemon gives a buffer of `count` bytes for this call.
        let buffer = unsafe { std::slice::from_raw_parts_mut(packet.buffer.cast::<u8>(), length) };
        let count = backend.data(buffer)?;
        packet.offset = i64::try_from(offset)
            .map_err(|_| Failed(format!("the backend sends an offset of {offset}")))?;
        self.offset = offset.saturating_add(count as u64);
        i32::try_from(count).map_err(|_| Failed("a block is too large".into()))
    }

    fn write(&mut self, packet: &IoPacket) -> Result<i32> {
        let length = usize::try_from(packet.count).unwrap_or(0);
        if packet.buffer.is_null() || length == 0 {
            return Ok(0);
        }
        // SAFETY: the daemon gives `count` bytes for this call.
        let bytes = unsafe { std::slice::from_raw_parts(packet.buffer.cast::<u8>(), length) };
        self.backend()?.send_data(bytes)?;
        Ok(packet.count)
    }

    fn seek(&mut self, packet: &IoPacket) -> Result<i32> {
        if packet.whence != libc::SEEK_SET || packet.offset < 0 {
            return Err(Failed(format!(
                "the daemon seeks by {} to {}",
                packet.whence, packet.offset
            )));
        }
        self.backend()?.command(&format!("At {}", packet.offset))?;
        Ok(0)
    }

    fn close_restored(&mut self, core: Core) -> Result<()> {
        let backend = self.backend()?;
        backend.command("Close")?;
        match backend.frame(core)? {
            Frame::Command(line) if line == "Done" => Ok(()),
            other => Err(Failed(format!("the backend answers {other:?} to the end of a file"))),
        }
    }

    /// What follows was backed up by `command`: finds its backend or starts one.
    pub fn start_restore_file(&mut self, core: Core, job: &Job, command: &str) -> i32 {
        self.entry = None;
        if self.failed {
            return rc::ERROR;
        }
        let known = self.backends.iter().position(|running| running.command == command);
        match known {
            Some(index) => {
                self.current = Some(index);
                rc::OK
            }
            None => self.begin(core, job, Purpose::Restore, command),
        }
    }

    /// Decides on a file to restore.
    pub fn create_file(&mut self, core: Core, packet: &mut RestorePacket) -> i32 {
        packet.create_status = create::ERROR;
        if self.failed {
            packet.create_status = create::SKIP;
            return rc::OK;
        }
        let asked = self.backend().and_then(|backend| restore::create(backend, core, packet));
        match asked {
            Ok(status) => {
                packet.create_status = status;
                rc::OK
            }
            Err(error) => self.told(core, Err(error)),
        }
    }

    /// Ends all that still runs: well, if the job is well. May be called again.
    pub fn finish(&mut self, core: Core, cancelled: bool) {
        let good = !self.failed && !cancelled && !self.streaming && !core.job_has_failed();
        let mut ended = Ok(());
        for running in &mut self.backends {
            // A backup is complete when its last file was asked for, which ended its backend already.
            ended = ended.and(running.backend.finish(core, good && self.is_restore));
        }
        if let Err(Failed(text)) = ended {
            self.fail(core, &text);
        }
        if self.is_restore && self.failed && !cancelled {
            self.is_restore = false;
            core.fatal("the restore has failed; images that it was making are removed");
        }
        self.backends.clear();
        self.current = None;
        self.entry = None;
    }
}

/// The string that the daemon hands over; empty where it hands over none.
pub fn text_of(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the daemon's strings end with a zero and live through the call.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// The job of a context; none where there is none.
///
/// # Safety
/// `context` is null or what the daemon called with, and its plugin part is null or what `newPlugin` put there.
pub unsafe fn of_context<'a>(context: *mut PluginContext) -> Option<&'a Job> {
    // SAFETY: as promised by the caller.
    unsafe { context.as_ref()?.plugin.cast::<Job>().as_ref() }
}

/// Whether the job was cancelled.
pub fn is_cancelled(job: &Job) -> bool {
    job.cancelled.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_taken_once() {
        let mut state = State::default();
        let file = |name: &str| Entry::of_file(name).unwrap();
        state.claim(&file("/@image/disk/configuration.json")).unwrap();
        state.claim(&file("/@image/disk/disk0.raw")).unwrap();
        state.claim(&file("/@image/other/configuration.json")).unwrap();
        let error = state.claim(&file("/@image/disk/configuration.json")).unwrap_err();
        assert!(error.0.contains("/@image/disk/configuration.json"), "{}", error.0);
        // Forms are called the same for every VM, and are no files.
        for _ in 0..2 {
            state.claim(&Entry::of_form("RestoreOptions").unwrap()).unwrap();
        }
    }
}
