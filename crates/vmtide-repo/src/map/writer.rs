//! Writes a map segment from sorted runs, holding one page at a time.

use super::directory::{self, PageEntry};
use super::page::{PageBounds, PageRun, encode_run};
use super::{MapRun, RUNS_PER_PAGE, Target};
use crate::context::{NewObject, RepoContext};
use crate::envelope::ObjectKind;
use crate::{ObjectId, RepoError, Result};
use std::collections::HashMap;

/// How hard pages are compressed. They are small beside the data; 3 is zstd's own choice.
const COMPRESSION_LEVEL: i32 = 3;

/// Writes one map segment. Dropped before [`finish`](Self::finish), it never was.
pub(crate) struct MapSegmentWriter {
    object: NewObject,
    compressor: zstd::bulk::Compressor<'static>,
    pages: Vec<PageEntry>,
    packs: Vec<ObjectId>,
    pack_numbers: HashMap<ObjectId, u32>,
    pending: Option<MapRun>,
    page: Vec<u8>,
    page_bounds: Option<PageBounds>,
}

impl MapSegmentWriter {
    /// Begins a segment under a new id.
    ///
    /// # Errors
    /// Those of the store; `Io` where zstd cannot start.
    pub fn create(ctx: &RepoContext) -> Result<Self> {
        let compressor = zstd::bulk::Compressor::new(COMPRESSION_LEVEL)
            .map_err(|error| RepoError::io("start zstd", error))?;
        Ok(Self {
            object: ctx.create_object(ObjectKind::MapSegment, ObjectId::random()?)?,
            compressor,
            pages: Vec::new(),
            packs: Vec::new(),
            pack_numbers: HashMap::new(),
            pending: None,
            page: Vec::new(),
            page_bounds: None,
        })
    }

    /// Appends a run, joined with the one before where it continues it.
    ///
    /// # Errors
    /// [`RepoError::Invalid`] where it begins before the end of the one before or is out of
    /// bounds; those of the store.
    pub fn push(&mut self, run: MapRun) -> Result<()> {
        if !run.is_valid() || self.pending.is_some_and(|last| run.first_block < last.end()) {
            return Err(RepoError::Invalid(format!(
                "blocks {} to {} cannot be mapped after {:?}",
                run.first_block,
                run.end(),
                self.pending
            )));
        }
        if let Some(last) = &mut self.pending
            && !last.join(&run)
        {
            let last = std::mem::replace(last, run);
            return self.encode(&last);
        }
        self.pending.get_or_insert(run);
        Ok(())
    }

    /// Writes what is left and makes the segment visible. `None`, and no segment, where no run was
    /// appended.
    ///
    /// # Errors
    /// [`RepoError::Invalid`] for more runs or packs than a directory holds; those of the store.
    pub fn finish(mut self) -> Result<Option<ObjectId>> {
        let Some(last) = self.pending.take() else {
            return Ok(None);
        };
        self.encode(&last)?;
        self.flush()?;
        let id = self.object.header.id;
        let directory = directory::encode(&self.object, &self.pages, &self.packs)?;
        let (pages, packs) = (count(self.pages.len())?, count(self.packs.len())?);
        self.object.finish(&directory, pages, packs)?;
        Ok(Some(id))
    }

    fn encode(&mut self, run: &MapRun) -> Result<()> {
        let (pack, ordinal) = match run.target {
            Target::Zero => (0, 0),
            Target::Data { pack, ordinal } => (self.pack_number(pack)?, ordinal),
        };
        let previous_end = self.page_bounds.map_or(run.first_block, |page| page.end_block);
        let page_run = PageRun { first_block: run.first_block, count: run.count, pack, ordinal };
        encode_run(&page_run, previous_end, &mut self.page);
        let bounds = self.page_bounds.get_or_insert(PageBounds {
            first_block: run.first_block,
            end_block: 0,
            runs: 0,
        });
        bounds.end_block = run.end();
        bounds.runs += 1;
        if bounds.runs as usize == RUNS_PER_PAGE {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let Some(bounds) = self.page_bounds.take() else {
            return Ok(());
        };
        let mut stored = self
            .compressor
            .compress(&self.page)
            .map_err(|error| RepoError::io("compress a page of a disk map", error))?;
        self.page.clear();
        let offset = self.object.offset;
        let section = self.pages.len() as u64;
        let checksum = self.object.write_section(section, &[], &mut stored)?;
        self.pages.push(PageEntry { bounds, offset, stored_bytes: count(stored.len())?, checksum });
        Ok(())
    }

    /// The pack's number plus one.
    fn pack_number(&mut self, pack: ObjectId) -> Result<u32> {
        if let Some(&number) = self.pack_numbers.get(&pack) {
            return Ok(number);
        }
        self.packs.push(pack);
        let number = count(self.packs.len())?;
        self.pack_numbers.insert(pack, number);
        Ok(number)
    }
}

fn count(value: usize) -> Result<u32> {
    u32::try_from(value)
        .map_err(|_| RepoError::Invalid("a disk map segment of more than 2³² parts".into()))
}
