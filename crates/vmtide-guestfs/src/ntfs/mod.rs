//! NTFS (the layout as documented by the Linux kernel's `fs/ntfs3` and ntfs-3g's `layout.h`): every file record of the
//! master file table in use is read, and the runs of its streams. A file of many runs has records of its own for them, which name the
//! first one: so no list of attributes has to be followed.

mod boot;
mod record;
mod runs;

use crate::found::{Touched, printable};
use crate::volume::Volume;
use crate::{FilesAt, FoundFile, MAX_NAMES};
use boot::Boot;
use record::{Attribute, Link, Record};
use runs::{Run, runs};
use std::collections::{BTreeSet, HashMap};
use vmtide_block::{CancelToken, RangeSet, Result};

/// The record of the root directory.
const ROOT: u64 = 5;

/// The deepest path that is followed; beyond, and in circles, it begins with `…`.
const MAX_DEPTH: usize = 256;

/// The most runs of the master file table: it grows in large pieces.
const MAX_TABLE_RUNS: usize = 1 << 16;

/// The most files whose names are remembered because they lie in other records than the first.
const MAX_FAR_NAMES: usize = 1 << 20;

/// The files at `ranges` of the disk; `None` where this is no such file system.
pub(crate) fn files_at(
    volume: &Volume<'_>,
    ranges: &RangeSet,
    cancel: &CancelToken,
) -> Result<Option<FilesAt>> {
    let Some(boot) = Boot::read(volume)? else { return Ok(None) };
    let mut table = Table { volume, boot, runs: Vec::new(), is_cut: false };
    if !table.read_own_runs()? {
        return Ok(None);
    }
    let mut scan = Scan {
        volume,
        cluster_bytes: u64::from(table.boot.cluster_bytes),
        ranges,
        touched: Touched::default(),
        far_names: HashMap::new(),
    };
    table.for_each_record(cancel, &mut |number, record| {
        scan.take(number, record);
        Ok(())
    })?;
    let Scan { touched, far_names, .. } = scan;
    let mut names = Names { table: &table, far_names, paths: HashMap::new() };
    let mut files = Vec::with_capacity(touched.files.len());
    for ((number, stream), found) in touched.files {
        let mut paths = names.paths_of(number)?;
        paths.truncate(MAX_NAMES);
        if !stream.is_empty() {
            paths.iter_mut().for_each(|path| *path = format!("{path}:{}", printable(&stream)));
        }
        let path = if paths.is_empty() { format!("[record {number}]") } else { paths.remove(0) };
        let is_directory = table.record(number)?.is_some_and(|record| record.is_directory());
        files.push(FoundFile { path, other_paths: paths, is_directory, ranges: found });
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    // Records in damaged places are not found.
    let is_complete = !touched.is_cut && !table.is_cut && !table.is_touched(ranges);
    let area = volume.area();
    Ok(Some(FilesAt { volume: None, file_system: "ntfs", files, is_complete, area }))
}

/// The master file table.
struct Table<'a> {
    volume: &'a Volume<'a>,
    boot: Boot,
    /// Where it lies, in its order.
    runs: Vec<Run>,
    is_cut: bool,
}

impl Table<'_> {
    /// Finds the table's own runs, which its first record has, and records that lie in what is known of it already; answers with
    /// whether there is such a record.
    fn read_own_runs(&mut self) -> Result<bool> {
        let mut bytes = vec![0; crate::bytes::index(self.boot.record_bytes)];
        let mut is_found = false;
        // Damage to the first record has not reached the mirror of it, most likely.
        for cluster in [self.boot.table_cluster, self.boot.mirror_cluster] {
            let offset = cluster.checked_mul(u64::from(self.boot.cluster_bytes));
            let Some(offset) = offset else { continue };
            if !is_found
                && self.volume.read(&mut bytes, offset)?
                && let Some(record) =
                    Record::parse(&mut bytes).filter(|record| record.base().is_none())
            {
                self.runs = own_runs(&record);
                is_found = !self.runs.is_empty();
            }
        }
        // The records with the rest of the runs: each lies in what those before it have told.
        let mut more: Vec<(u64, Vec<Run>)> = Vec::new();
        if is_found {
            self.for_each_record(&CancelToken::new(), &mut |_, record| {
                if record.base() == Some(0) && more.len() < MAX_TABLE_RUNS {
                    more.extend(record.attributes().filter(is_table).filter_map(|attribute| {
                        Some((attribute.first_cluster()?, runs(attribute.mapping()?)))
                    }));
                }
                Ok(())
            })?;
        }
        more.sort_by_key(|(first, _)| *first);
        for (_, runs) in more {
            if self.runs.len() + runs.len() > MAX_TABLE_RUNS {
                self.is_cut = true;
                break;
            }
            self.runs.extend(runs);
        }
        Ok(is_found)
    }

    /// Hands over all records in use, with their numbers.
    fn for_each_record(
        &self,
        cancel: &CancelToken,
        take: &mut dyn FnMut(u64, &Record<'_>) -> Result<()>,
    ) -> Result<()> {
        let (cluster_bytes, record_bytes) =
            (u64::from(self.boot.cluster_bytes), u64::from(self.boot.record_bytes));
        let mut first = 0;
        for run in &self.runs {
            let length = run.count.saturating_mul(cluster_bytes).min(self.volume.size_bytes());
            let offset = run.first_cluster.and_then(|cluster| cluster.checked_mul(cluster_bytes));
            if let Some(offset) = offset {
                let part = (offset, length);
                self.volume.for_each_entry(
                    part,
                    self.boot.record_bytes,
                    cancel,
                    &mut |entry, bytes| {
                        Record::parse(bytes).map_or(Ok(()), |record| take(first + entry, &record))
                    },
                )?;
            }
            first += length / record_bytes;
        }
        Ok(())
    }

    /// Whether any of the table lies in `ranges` of the disk.
    fn is_touched(&self, ranges: &RangeSet) -> bool {
        let cluster_bytes = u64::from(self.boot.cluster_bytes);
        self.runs.iter().any(|run| {
            let offset = run.first_cluster.and_then(|cluster| cluster.checked_mul(cluster_bytes));
            let length = run.count.saturating_mul(cluster_bytes);
            offset.is_some_and(|offset| !self.volume.touched(offset, length, ranges).is_empty())
        })
    }

    /// Reads one record; none where there is none in use.
    fn record(&self, number: u64) -> Result<Option<OwnedRecord>> {
        let (cluster_bytes, record_bytes) =
            (u64::from(self.boot.cluster_bytes), u64::from(self.boot.record_bytes));
        let Some(mut at) = number.checked_mul(record_bytes) else { return Ok(None) };
        for run in &self.runs {
            let length = run.count.saturating_mul(cluster_bytes);
            if at < length {
                let offset = run
                    .first_cluster
                    .and_then(|cluster| cluster.checked_mul(cluster_bytes)?.checked_add(at));
                let Some(offset) = offset else { return Ok(None) };
                let mut bytes = vec![0; crate::bytes::index(self.boot.record_bytes)];
                let is_there = self.volume.read(&mut bytes, offset)?;
                return Ok(is_there.then(|| OwnedRecord::new(bytes)).flatten());
            }
            at -= length;
        }
        Ok(None)
    }
}

/// What is kept of a record.
struct OwnedRecord {
    is_directory: bool,
    links: Vec<Link>,
}

impl OwnedRecord {
    fn new(mut bytes: Vec<u8>) -> Option<Self> {
        let record = Record::parse(&mut bytes)?;
        Some(Self {
            is_directory: record.is_directory(),
            links: record.links().take(MAX_NAMES).collect(),
        })
    }

    const fn is_directory(&self) -> bool {
        self.is_directory
    }
}

/// Whether this is a part of the table itself: its unnamed data.
fn is_table(attribute: &Attribute<'_>) -> bool {
    attribute.is_data() && attribute.name().is_empty()
}

fn own_runs(record: &Record<'_>) -> Vec<Run> {
    let data = record.attributes().find(is_table);
    let mut found = data.and_then(|attribute| attribute.mapping().map(runs)).unwrap_or_default();
    found.truncate(MAX_TABLE_RUNS);
    found
}

/// What the reading of all records gathers.
struct Scan<'a> {
    volume: &'a Volume<'a>,
    cluster_bytes: u64,
    ranges: &'a RangeSet,
    touched: Touched,
    /// Names that lie in other records than the first of their file.
    far_names: HashMap<u64, Vec<Link>>,
}

impl Scan<'_> {
    fn take(&mut self, number: u64, record: &Record<'_>) {
        let file = record.base().unwrap_or(number);
        if file != number {
            for link in record.links() {
                let is_known = self.far_names.contains_key(&file);
                if is_known || self.far_names.len() < MAX_FAR_NAMES {
                    let links = self.far_names.entry(file).or_default();
                    if links.len() < MAX_NAMES {
                        links.push(link);
                    }
                }
            }
        }
        for attribute in record.attributes() {
            let Some(mapping) = attribute.mapping() else { continue };
            let stream = if attribute.is_data() { attribute.name() } else { String::new() };
            for run in runs(mapping) {
                let Some(first) = run.first_cluster else { continue };
                let Some(offset) = first.checked_mul(self.cluster_bytes) else { continue };
                let length = run.count.saturating_mul(self.cluster_bytes);
                let found = self.volume.touched(offset, length, self.ranges);
                self.touched.add(file, &stream, &found);
            }
        }
    }
}

/// From records to paths.
struct Names<'a> {
    table: &'a Table<'a>,
    far_names: HashMap<u64, Vec<Link>>,
    /// Of directories, once they are known.
    paths: HashMap<u64, String>,
}

impl Names<'_> {
    fn links_of(&self, number: u64) -> Result<Vec<Link>> {
        let mut links = self.table.record(number)?.map_or_else(Vec::new, |record| record.links);
        links.extend(self.far_names.get(&number).into_iter().flatten().cloned());
        Ok(links)
    }

    fn paths_of(&mut self, number: u64) -> Result<Vec<String>> {
        if number == ROOT {
            return Ok(vec!["/".to_owned()]);
        }
        let mut seen = BTreeSet::new();
        let mut paths = Vec::new();
        for link in self.links_of(number)? {
            let path = format!("{}{}", self.path_of_directory(link.parent)?, printable(&link.name));
            if seen.insert(path.clone()) {
                paths.push(path);
            }
        }
        Ok(paths)
    }

    /// With `/` at the end.
    fn path_of_directory(&mut self, directory: u64) -> Result<String> {
        let mut names = Vec::new();
        let mut at = directory;
        let mut path = loop {
            if at == ROOT {
                break "/".to_owned();
            }
            if let Some(path) = self.paths.get(&at) {
                break path.clone();
            }
            let link =
                if names.len() < MAX_DEPTH { self.links_of(at)?.into_iter().next() } else { None };
            let Some(link) = link else { break format!("…/[record {at}]/") };
            names.push((at, printable(&link.name)));
            at = link.parent;
        };
        for (number, name) in names.into_iter().rev() {
            path = format!("{path}{name}/");
            self.paths.insert(number, path.clone());
        }
        Ok(path)
    }
}
