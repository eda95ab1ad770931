//! A map segment, opened: its tables in memory, its pages read when needed.

use super::directory::{self, PageEntry};
use super::overlay::RunSource;
use super::page::{PageRun, parse_map_page};
use super::{MAX_PAGE_BYTES, MapRun};
use crate::context::{OpenObject, RepoContext};
use crate::envelope::ObjectKind;
use crate::pack::is_media_error;
use crate::page_cache::PageCache;
use crate::{ObjectId, Result};
use std::sync::Arc;

/// The decoded runs of one page.
pub(super) type Page = Vec<PageRun>;

/// A map segment. Shared by threads.
#[derive(Debug)]
pub(crate) struct MapSegment {
    id: ObjectId,
    object: OpenObject,
    pages: Vec<PageEntry>,
    packs: Vec<ObjectId>,
    /// Whether a page that cannot be read is taken for one whose blocks are lost.
    salvaging: bool,
}

impl MapSegment {
    /// Opens a segment that a restore point names, and checks its tables.
    ///
    /// # Errors
    /// Those of [`RepoContext::open_object`].
    pub fn open(ctx: &RepoContext, id: ObjectId) -> Result<Self> {
        Self::from_object(ctx.open_object(ObjectKind::MapSegment, id)?)
    }

    /// As [`open`](Self::open), of an object whose envelope was verified.
    ///
    /// # Errors
    /// [`RepoError::Damaged`](crate::RepoError::Damaged).
    pub fn from_object(mut object: OpenObject) -> Result<Self> {
        let (pages, packs) = directory::parse(&mut object)?;
        Ok(Self { id: object.header.id, object, pages, packs, salvaging: false })
    }

    /// The same segment, that takes a page that cannot be read for one whose blocks are
    /// [`LOST`](super::LOST).
    #[must_use]
    pub fn salvaging(mut self) -> Self {
        self.packs.push(super::LOST);
        self.salvaging = true;
        self
    }

    /// Its id.
    pub const fn id(&self) -> ObjectId {
        self.id
    }

    /// The packs its runs name; some may be named by runs that newer segments hide.
    #[cfg(test)]
    pub fn packs(&self) -> &[ObjectId] {
        &self.packs
    }

    /// How many runs it holds.
    pub fn run_count(&self) -> u64 {
        self.pages.iter().map(|page| u64::from(page.bounds.runs)).sum()
    }

    /// The block after its last run.
    pub fn end_block(&self) -> u64 {
        self.pages.last().map_or(0, |page| page.bounds.end_block)
    }

    /// Calls `visit` for every run of this segment alone, in order; holds one page in memory.
    ///
    /// # Errors
    /// [`RepoError::Damaged`](crate::RepoError::Damaged), `Io`, those of `visit`.
    pub fn for_each_run(&self, visit: &mut dyn FnMut(MapRun) -> Result<()>) -> Result<()> {
        for number in 0..self.pages.len() {
            for run in self.read_page(number)? {
                visit(run.resolve(&self.packs))?;
            }
        }
        Ok(())
    }

    /// Reads, verifies and decodes a page.
    fn read_page(&self, number: usize) -> Result<Page> {
        match self.try_read_page(number) {
            Err(error) if self.salvaging && is_media_error(&error) => {
                tracing::warn!(%error, "what this part of the map covers is lost");
                let bounds = self.pages[number].bounds;
                let count = bounds.end_block - bounds.first_block;
                // The last of the packs, counted from 1.
                let pack = u32::try_from(self.packs.len()).unwrap_or(u32::MAX);
                Ok(vec![PageRun { first_block: bounds.first_block, count, pack, ordinal: 0 }])
            }
            other => other,
        }
    }

    fn try_read_page(&self, number: usize) -> Result<Page> {
        let page = &self.pages[number];
        let stored = self.object.read_section(
            number as u64,
            &[],
            page.offset,
            u64::from(page.stored_bytes),
            &page.checksum,
        )?;
        let damaged = |detail: &str| {
            self.object.damaged(format!("page {number} at byte {}: {detail}", page.offset))
        };
        let encoded = zstd::bulk::decompress(&stored, MAX_PAGE_BYTES)
            .map_err(|error| damaged(&format!("does not decompress: {error}")))?;
        parse_map_page(&encoded, page.bounds, self.packs.len()).map_err(damaged)
    }
}

/// Pages of the segments of one disk map, by the segment's place in the list.
pub(super) type MapCache = PageCache<Page>;

/// Walks the runs of a segment forward, with leaps.
pub(super) struct SegmentCursor<'a> {
    segment: &'a MapSegment,
    /// Where pages are kept for others, with this segment's number; none when streaming.
    cache: Option<(&'a MapCache, u32)>,
    page_number: usize,
    page: Option<Arc<Page>>,
    place: usize,
}

impl<'a> SegmentCursor<'a> {
    pub fn new(segment: &'a MapSegment, cache: Option<(&'a MapCache, u32)>) -> Self {
        Self { segment, cache, page_number: 0, page: None, place: 0 }
    }

    fn load(&mut self) -> Result<Arc<Page>> {
        if let Some(page) = &self.page {
            return Ok(Arc::clone(page));
        }
        let load = || self.segment.read_page(self.page_number);
        let page = match self.cache {
            Some((cache, segment)) => {
                // At most 256 MiB / 48 pages fit a directory.
                let number = u32::try_from(self.page_number).unwrap_or(u32::MAX);
                cache.get_or_load((segment, number), load)?
            }
            None => Arc::new(load()?),
        };
        self.page = Some(Arc::clone(&page));
        Ok(page)
    }
}

impl RunSource for SegmentCursor<'_> {
    fn run_from(&mut self, block: u64) -> Result<Option<MapRun>> {
        let pages = &self.segment.pages;
        let past = |page: &PageEntry| page.bounds.end_block <= block;
        match pages.get(self.page_number) {
            None => return Ok(None),
            Some(page) if past(page) => {
                self.page_number += pages[self.page_number..].partition_point(past);
                self.page = None;
                self.place = 0;
                if self.page_number == pages.len() {
                    return Ok(None);
                }
            }
            Some(_) => {}
        }
        let page = self.load()?;
        // Mostly it is this run or the next.
        if page.get(self.place).is_some_and(|run| run.end() <= block) {
            self.place += 1;
            if page.get(self.place).is_some_and(|run| run.end() <= block) {
                self.place += page[self.place..].partition_point(|run| run.end() <= block);
            }
        }
        Ok(page.get(self.place).map(|run| {
            let run = run.resolve(&self.segment.packs);
            run.slice(run.first_block.max(block), run.end())
        }))
    }
}
