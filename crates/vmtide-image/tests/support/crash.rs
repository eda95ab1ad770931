//! Crash enumeration for any writer of images, in memory.
//!
//! A workload runs over files that record each write, resize and flush ([`Recording`]). Then the
//! files are rebuilt as a crash could leave them: at every moment, with any part of what was not
//! flushed missing or torn at a sector. Each rebuilt image is opened, read and held against what
//! the workload was promised: **flushed data is there; each sector written since is the old one or
//! a new one**. Some are also opened for writing again, written, finished and read back, and some
//! are given to an independent tool.
//!
//! ```text
//! let subject = Subject { write: &|files| …, read: &|files| …, ..Subject::new("name", start, content) };
//! let mut recording = Recording::begin(&subject);
//! recording.random_steps(7, 20, 20_000);
//! recording.finish();
//! recording.enumerate(&Sampling::default());
//! ```
//!
//! What a crash does: a flush of a file makes its earlier writes and resizes durable; later ones
//! survive or not, each by itself, a write also as any set of its 512-byte sectors. Writes to the
//! same place never change their order (page caches and disks keep it).

use super::Random;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex};
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, Extent, MemoryDevice, Result, WritableBlockDevice,
};
use vmtide_image::ImageWriter;
use vmtide_image::vmdk::ExtentFiles;

/// What every medium writes whole or not at all.
const SECTOR: usize = 512;

#[derive(Clone)]
enum Change {
    Write(u64, Arc<[u8]>),
    Resize(u64),
    Flush,
}

/// One change of the file with this index.
#[derive(Clone)]
struct Operation {
    file: usize,
    change: Change,
}

type Log = Arc<Mutex<Vec<Operation>>>;

/// A file in memory that remembers what was done to it.
pub struct RecordedFile {
    name: String,
    index: usize,
    memory: MemoryDevice,
    log: Log,
}

impl RecordedFile {
    fn record(&self, change: Change) {
        self.log.lock().unwrap().push(Operation { file: self.index, change });
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        self.memory.to_bytes()
    }
}

impl BlockDevice for RecordedFile {
    fn name(&self) -> String {
        self.name.clone()
    }
    fn size_bytes(&self) -> u64 {
        self.memory.size_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.memory.read_at(buffer, offset)
    }
    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.memory.extents(range)
    }
}

impl WritableBlockDevice for RecordedFile {
    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.memory.write_at(data, offset)?;
        self.record(Change::Write(offset, data.into()));
        Ok(())
    }
    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        self.write_at(&vec![0; usize::try_from(range.length).unwrap()], range.offset)
    }
    fn flush(&self) -> Result<()> {
        self.record(Change::Flush);
        Ok(())
    }
    fn resize(&self, size_bytes: u64) -> Result<()> {
        self.memory.resize(size_bytes)?;
        self.record(Change::Resize(size_bytes));
        Ok(())
    }
}

/// The files of one image, the one that names the others first. Also VMDK's extent files.
pub struct Files {
    log: Log,
    files: Mutex<Vec<Arc<RecordedFile>>>,
}

impl Files {
    fn new(start: &[(String, Vec<u8>)]) -> Self {
        let files = Self { log: Log::default(), files: Mutex::default() };
        for (name, bytes) in start {
            files.add(name, bytes.clone());
        }
        files
    }

    fn add(&self, name: &str, bytes: Vec<u8>) -> Arc<RecordedFile> {
        let mut files = self.files.lock().unwrap();
        let file = Arc::new(RecordedFile {
            name: name.to_owned(),
            index: files.len(),
            memory: MemoryDevice::from_bytes(bytes),
            log: self.log.clone(),
        });
        files.push(file.clone());
        file
    }

    /// The file that names the others.
    pub fn main(&self) -> Arc<RecordedFile> {
        self.files.lock().unwrap()[0].clone()
    }

    /// The file with this name, an empty new one where there is none.
    pub fn get(&self, name: &str) -> Arc<RecordedFile> {
        let found = self.find(name);
        found.unwrap_or_else(|| self.add(name, Vec::new()))
    }

    fn find(&self, name: &str) -> Option<Arc<RecordedFile>> {
        self.files.lock().unwrap().iter().find(|file| file.name == name).cloned()
    }

    fn named(&self) -> Vec<(String, Vec<u8>)> {
        let files = self.files.lock().unwrap();
        files.iter().map(|file| (file.name.clone(), file.to_bytes())).collect()
    }
}

impl ExtentFiles for Files {
    fn open(&self, name: &str) -> Result<Arc<dyn BlockDevice>> {
        match self.find(name) {
            Some(file) => Ok(file),
            None => Err(BlockError::io(name, std::io::ErrorKind::NotFound)),
        }
    }

    fn open_writable(&self, name: &str) -> Result<Arc<dyn WritableBlockDevice>> {
        Ok(self.get(name))
    }
}

/// From when on every crash must leave an image that opens.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum ValidFrom {
    /// At all times: there was an image before the workload.
    Start,
    /// Once the writer is open: the workload creates the image. Before, opening may be an error;
    /// what opens must be right.
    Opened,
    /// Once the workload called [`Recording::finish`] (write-once formats).
    Finished,
}

type OpenWriter<'a> = &'a dyn Fn(&Files) -> Result<Arc<dyn ImageWriter>>;
type OpenReader<'a> = &'a dyn Fn(&Files) -> Result<Arc<dyn BlockDevice>>;

/// The image and the ways to it.
pub struct Subject<'a> {
    /// For messages.
    pub name: String,
    /// The files before the workload; for creating, one empty file.
    pub start: Vec<(String, Vec<u8>)>,
    /// What the disk holds before the workload.
    pub content: Vec<u8>,
    pub valid_from: ValidFrom,
    /// Opens (or creates) the image for the workload.
    pub write: OpenWriter<'a>,
    /// Opens what a crash left for reading.
    pub read: OpenReader<'a>,
    /// Opens what a crash left for writing; none for write-once formats.
    pub rewrite: Option<OpenWriter<'a>>,
    /// Files that the external checker needs beside the image (a parent).
    pub beside: Vec<(String, Vec<u8>)>,
    /// An independent tool, given the main file on disk; panics where it finds damage.
    pub check: Option<&'a dyn Fn(&Path)>,
}

/// How many of the states that a crash can leave are tried.
#[derive(Clone, Copy)]
pub struct Sampling {
    /// With at most so many changes not yet flushed every subset of them is tried.
    pub exhaustive_changes: usize,
    /// Else so many random subsets, and always so many with torn writes.
    pub variants: usize,
    /// Every so many states one is given to the external checker.
    pub check_every: usize,
    /// Every so many states one is opened for writing, written, finished and read back.
    pub rewrite_every: usize,
    /// Moments farther than so many operations from a flush are skipped; none is without it.
    pub near_flush: Option<usize>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            exhaustive_changes: 4,
            variants: 3,
            check_every: 40,
            rewrite_every: 20,
            near_flush: None,
        }
    }
}

/// What the workload did, with where the log stood before and after.
enum Event {
    Write { begun: usize, at: usize, data: Vec<u8> },
    Resized { begun: usize, size: usize },
    Flushed { done: usize },
}

/// A workload under way, then recorded.
pub struct Recording<'a> {
    subject: &'a Subject<'a>,
    files: Files,
    writer: Arc<dyn ImageWriter>,
    events: Vec<Event>,
    size: usize,
    opened: usize,
    finished: Option<usize>,
}

impl<'a> Recording<'a> {
    /// Opens the subject for the workload.
    pub fn begin(subject: &'a Subject<'a>) -> Self {
        let files = Files::new(&subject.start);
        let writer = (subject.write)(&files).unwrap();
        let opened = files.log.lock().unwrap().len();
        let size = usize::try_from(writer.size_bytes()).unwrap();
        assert_eq!(size, subject.content.len(), "{}: the size of the disk", subject.name);
        Self { subject, files, writer, events: Vec::new(), size, opened, finished: None }
    }

    pub fn files(&self) -> &Files {
        &self.files
    }

    pub fn writer(&self) -> &Arc<dyn ImageWriter> {
        &self.writer
    }

    fn now(&self) -> usize {
        self.files.log.lock().unwrap().len()
    }

    pub fn write(&mut self, at: u64, data: &[u8]) {
        self.write_by(at, data, |writer| writer.write_at(data, at));
    }

    pub fn zero(&mut self, range: ByteRange) {
        let zeros = vec![0; usize::try_from(range.length).unwrap()];
        self.write_by(range.offset, &zeros, |writer| writer.write_zeroes(range));
    }

    /// Changes the disk to `data` at `at` in a way of its own, e.g. by appending compressed.
    pub fn write_by(
        &mut self,
        at: u64,
        data: &[u8],
        change: impl FnOnce(&dyn ImageWriter) -> Result<()>,
    ) {
        let begun = self.now();
        change(&*self.writer).unwrap();
        let at = usize::try_from(at).unwrap();
        self.events.push(Event::Write { begun, at, data: data.to_vec() });
    }

    pub fn resize(&mut self, size: u64) {
        let begun = self.now();
        self.writer.resize(size).unwrap();
        self.size = usize::try_from(size).unwrap();
        self.events.push(Event::Resized { begun, size: self.size });
    }

    pub fn flush(&mut self) {
        self.writer.flush().unwrap();
        self.events.push(Event::Flushed { done: self.now() });
    }

    pub fn finish(&mut self) {
        self.writer.finish().unwrap();
        self.events.push(Event::Flushed { done: self.now() });
        self.finished = Some(self.now());
    }

    /// Random writes, zeros and flushes of up to `longest` bytes each.
    pub fn random_steps(&mut self, seed: u64, steps: usize, longest: u64) {
        let mut random = Random(seed | 1);
        for _ in 0..steps {
            let size = self.size as u64;
            let at = random.below(size - 1);
            let length = (random.below(longest) + 1).min(size - at);
            match random.below(5) {
                0 => self.flush(),
                1 => self.zero(ByteRange::new(at, length)),
                _ => {
                    let value = random.next().to_le_bytes()[1] | 1;
                    self.write(at, &vec![value; usize::try_from(length).unwrap()]);
                }
            }
        }
    }

    /// Rebuilds and checks what crashes could have left. Returns how many states were tried.
    pub fn enumerate(&self, sampling: &Sampling) -> usize {
        let log = self.files.log.lock().unwrap().clone();
        let directory = tempfile::tempdir().unwrap();
        let mut enumeration = Enumeration {
            recording: self,
            sampling,
            directory: directory.path(),
            durable: self.start_files(),
            window: Vec::new(),
            random: Random(99),
            tried: 0,
        };
        let ends: BTreeSet<usize> = self
            .events
            .iter()
            .filter_map(|event| match event {
                Event::Flushed { done } => Some(*done),
                _ => None,
            })
            .collect();
        for cut in 0..=log.len() {
            if let Some(operation) = cut.checked_sub(1).and_then(|last| log.get(last)) {
                enumeration.advance(operation);
            }
            let near = |distance: usize| {
                log[cut.saturating_sub(distance)..(cut + distance).min(log.len())]
                    .iter()
                    .any(|operation| matches!(operation.change, Change::Flush))
            };
            if sampling.near_flush.is_none_or(near) {
                enumeration.try_all(cut, ends.contains(&cut));
            }
        }
        println!("{}: {} states tried", self.subject.name, enumeration.tried);
        enumeration.tried
    }

    fn start_files(&self) -> Vec<(String, Vec<u8>)> {
        let mut files = self.files.named();
        for (index, (_, bytes)) in files.iter_mut().enumerate() {
            *bytes = self.subject.start.get(index).map_or_else(Vec::new, |(_, b)| b.clone());
        }
        files
    }

    fn expected(&self, cut: usize) -> Expected<'_> {
        let flushed = self
            .events
            .iter()
            .rposition(|event| matches!(event, Event::Flushed { done } if *done <= cut))
            .map_or(0, |index| index + 1);
        let mut base = self.subject.content.clone();
        let (mut after, mut sizes) = (Vec::new(), Vec::new());
        for (index, event) in self.events.iter().enumerate() {
            match event {
                Event::Write { at, data, .. } if index < flushed => {
                    base[*at..at + data.len()].copy_from_slice(data);
                }
                Event::Resized { size, .. } if index < flushed => base.resize(*size, 0),
                Event::Write { begun, at, data } if *begun < cut => after.push((*at, &data[..])),
                Event::Resized { begun, size } if *begun < cut => sizes.push(*size),
                _ => {}
            }
        }
        sizes.push(base.len());
        Expected { base, after, sizes }
    }

    fn must_open(&self, cut: usize) -> bool {
        match self.subject.valid_from {
            ValidFrom::Start => true,
            ValidFrom::Opened => cut >= self.opened,
            ValidFrom::Finished => self.finished.is_some_and(|finished| cut >= finished),
        }
    }
}

/// What the disk may hold: `base` was flushed, each of `after` may be there or not.
struct Expected<'a> {
    base: Vec<u8>,
    after: Vec<(usize, &'a [u8])>,
    sizes: Vec<usize>,
}

impl Expected<'_> {
    fn check(&self, disk: &[u8], moment: &str) {
        assert!(self.sizes.contains(&disk.len()), "{moment}: {} bytes of disk", disk.len());
        let mut base = self.base.clone();
        base.resize(disk.len().max(base.len()), 0);
        for start in (0..disk.len()).step_by(SECTOR) {
            let end = (start + SECTOR).min(disk.len());
            if disk[start..end] != base[start..end] {
                let found = &disk[start..end];
                let wrong = (start..end).find(|at| disk[*at] != base[*at]).unwrap_or(start);
                assert!(
                    self.sector_is_possible(start, found, &base[start..end]),
                    "{moment}: byte {wrong} of the disk is {:#04x}, flushed was {:#04x}",
                    disk[wrong],
                    base[wrong]
                );
            }
        }
    }

    /// Whether some of the writes since the flush, in their order, make `found` from `base`.
    fn sector_is_possible(&self, start: usize, found: &[u8], base: &[u8]) -> bool {
        let end = start + found.len();
        let mut possible = vec![base.to_vec()];
        for (at, data) in &self.after {
            let (from, to) = ((*at).max(start), (at + data.len()).min(end));
            if from >= to {
                continue;
            }
            for index in 0..possible.len() {
                let mut next = possible[index].clone();
                next[from - start..to - start].copy_from_slice(&data[from - at..to - at]);
                if !possible.contains(&next) {
                    possible.push(next);
                }
            }
            assert!(possible.len() < 10_000, "too many writes to one sector between flushes");
        }
        possible.iter().any(|possible| possible == found)
    }
}

/// What becomes of one change in a crash.
#[derive(Clone, Copy)]
enum Fate {
    Kept,
    Lost,
    /// A write of which some sectors are there; random by this seed.
    Torn(u64),
}

struct Enumeration<'a> {
    recording: &'a Recording<'a>,
    sampling: &'a Sampling,
    directory: &'a Path,
    /// The files as of the last flush of each.
    durable: Vec<(String, Vec<u8>)>,
    /// The changes since.
    window: Vec<Operation>,
    random: Random,
    tried: usize,
}

impl Enumeration<'_> {
    fn advance(&mut self, operation: &Operation) {
        if !matches!(operation.change, Change::Flush) {
            self.window.push(operation.clone());
            return;
        }
        let (flushed, rest): (Vec<_>, Vec<_>) =
            self.window.drain(..).partition(|earlier| earlier.file == operation.file);
        self.window = rest;
        for earlier in flushed {
            apply(&mut self.durable, &earlier, Fate::Kept);
        }
    }

    /// Tries the states at this moment. A state without the last change was tried a moment ago,
    /// unless a flush has ended here, which promises more.
    fn try_all(&mut self, cut: usize, flush_ended: bool) {
        let changes = self.window.len();
        let all = vec![Fate::Kept; changes];
        self.try_state(cut, &all, "everything there");
        if changes == 0 {
            return;
        }
        if changes <= self.sampling.exhaustive_changes {
            for mask in 0..(1usize << changes) - 1 {
                let has_last = mask >> (changes - 1) & 1 == 1;
                if !has_last && !flush_ended {
                    continue;
                }
                let kept = |index: usize| mask >> index & 1 == 1;
                let fates: Vec<Fate> =
                    (0..changes).map(|i| if kept(i) { Fate::Kept } else { Fate::Lost }).collect();
                self.try_state(cut, &fates, &format!("changes {mask:b} of {changes}"));
            }
        } else {
            let mut only_last = vec![Fate::Lost; changes];
            only_last[changes - 1] = Fate::Kept;
            self.try_state(cut, &only_last, "only the last change");
            for variant in 0..self.sampling.variants {
                let fates = self.random_fates(changes, false);
                self.try_state(cut, &fates, &format!("random subset {variant}"));
            }
        }
        for variant in 0..self.sampling.variants {
            let fates = self.random_fates(changes, true);
            self.try_state(cut, &fates, &format!("torn {variant}"));
        }
    }

    fn random_fates(&mut self, changes: usize, torn: bool) -> Vec<Fate> {
        let random = &mut self.random;
        (0..changes)
            .map(|_| match random.below(if torn { 4 } else { 2 }) {
                0 => Fate::Kept,
                1 => Fate::Lost,
                _ => Fate::Torn(random.next()),
            })
            .collect()
    }

    fn try_state(&mut self, cut: usize, fates: &[Fate], what: &str) {
        self.tried += 1;
        let subject = self.recording.subject;
        let moment = format!("{}, after {cut} operations, {what}", subject.name);
        let mut files = self.durable.clone();
        for (operation, fate) in self.window.iter().zip(fates) {
            apply(&mut files, operation, *fate);
        }
        let must_open = self.recording.must_open(cut);
        let Some(disk) = read_disk(subject, &files, &moment, must_open) else {
            return;
        };
        self.recording.expected(cut).check(&disk, &moment);
        if must_open && self.tried.is_multiple_of(self.sampling.check_every) {
            self.check_externally(&files, &moment);
        }
        if must_open && self.tried.is_multiple_of(self.sampling.rewrite_every) {
            self.rewrite(&files, disk, &moment);
        }
    }

    fn check_externally(&self, files: &[(String, Vec<u8>)], moment: &str) {
        let subject = self.recording.subject;
        let Some(check) = subject.check else {
            return;
        };
        for (name, bytes) in subject.beside.iter().chain(files) {
            std::fs::write(self.directory.join(name), bytes).unwrap();
        }
        let main = self.directory.join(&files[0].0);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| check(&main))) {
            eprintln!("the external checker refuses: {moment}");
            std::panic::resume_unwind(panic);
        }
    }

    /// Writing goes on after the crash: what is written then is there, and nothing else changes.
    fn rewrite(&mut self, files: &[(String, Vec<u8>)], mut disk: Vec<u8>, moment: &str) {
        let subject = self.recording.subject;
        let Some(open) = subject.rewrite else {
            return;
        };
        let moment = format!("{moment}, then written");
        let fail = |error: BlockError| -> ! { panic!("{moment}: {error}") };
        let again = Files::new(files);
        let writer = open(&again).unwrap_or_else(|error| fail(error));
        for _ in 0..3 {
            let at = usize::try_from(self.random.below(disk.len() as u64 - 1)).unwrap();
            let end =
                (at + usize::try_from(self.random.below(30_000) + 1).unwrap()).min(disk.len());
            disk[at..end].fill(0x77);
            writer.write_at(&disk[at..end], at as u64).unwrap_or_else(|error| fail(error));
        }
        writer.finish().unwrap_or_else(|error| fail(error));
        drop(writer);
        let files = again.named();
        let read = read_disk(subject, &files, &moment, true).unwrap();
        let wrong = read.iter().zip(&disk).position(|(a, b)| a != b);
        assert_eq!((read.len(), wrong), (disk.len(), None), "{moment}: first wrong byte");
        if self.tried.is_multiple_of(self.sampling.check_every) {
            self.check_externally(&files, &moment);
        }
    }
}

/// The disk of an image whose files are these; none where it does not open and need not.
fn read_disk(
    subject: &Subject<'_>,
    files: &[(String, Vec<u8>)],
    moment: &str,
    must_open: bool,
) -> Option<Vec<u8>> {
    let image = match (subject.read)(&Files::new(files)) {
        Ok(image) => image,
        Err(error) => {
            assert!(!must_open, "{moment}: {error}");
            return None;
        }
    };
    let mut disk = vec![0xa5; usize::try_from(image.size_bytes()).unwrap()];
    image.read_at(&mut disk, 0).unwrap_or_else(|error| panic!("{moment}: {error}"));
    super::check_extents(&*image, &disk);
    Some(disk)
}

fn apply(files: &mut [(String, Vec<u8>)], operation: &Operation, fate: Fate) {
    let bytes = &mut files[operation.file].1;
    match (&operation.change, fate) {
        (_, Fate::Lost) | (Change::Flush, _) => {}
        (Change::Resize(size), _) => bytes.resize(usize::try_from(*size).unwrap(), 0),
        (Change::Write(offset, data), Fate::Kept) => {
            put(bytes, usize::try_from(*offset).unwrap(), data);
        }
        (Change::Write(offset, data), Fate::Torn(seed)) => {
            tear(bytes, usize::try_from(*offset).unwrap(), data, seed);
        }
    }
}

fn put(bytes: &mut Vec<u8>, at: usize, data: &[u8]) {
    // Its resize was lost, or the file system keeps the length with the data.
    if bytes.len() < at + data.len() {
        bytes.resize(at + data.len(), 0);
    }
    bytes[at..at + data.len()].copy_from_slice(data);
}

/// Writes some sectors of `data`: half the time the first ones, else any.
fn tear(bytes: &mut Vec<u8>, at: usize, data: &[u8], seed: u64) {
    let mut random = Random(seed | 1);
    let sectors = (at + data.len()).div_ceil(SECTOR) - at / SECTOR;
    let first = at / SECTOR;
    let prefix = random.below(2) == 0;
    let end = usize::try_from(random.below(sectors as u64 + 1)).unwrap();
    for sector in 0..sectors {
        let kept = if prefix { sector < end } else { random.below(2) == 0 };
        let start = ((first + sector) * SECTOR).max(at);
        let stop = ((first + sector + 1) * SECTOR).min(at + data.len());
        if kept && start < stop {
            put(bytes, start, &data[start - at..stop - at]);
        }
    }
}
