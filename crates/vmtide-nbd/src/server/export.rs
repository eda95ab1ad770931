//! What a server offers: a device under a name, with its metadata contexts.

use crate::client::status::dirty_bitmap_context;
use crate::proto::constants::CONTEXT_ALLOCATION;
use crate::proto::export_info::{BlockSizes, TransmissionFlags};
use crate::proto::status::{StatusExtent, allocation_flags};
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, ByteRange, RangeSet, Result, WritableBlockDevice};

/// The most descriptors one answer holds, so that a fragmented disk does not take memory.
const MAX_EXTENTS: usize = 1 << 16;

/// Tells the status of a range in one metadata context: a prefix of the range, in order and
/// without gaps, not empty. Called by several threads at once.
pub type ContextSource = Arc<dyn Fn(ByteRange) -> Result<Vec<StatusExtent>> + Send + Sync>;

#[derive(Clone)]
enum Backing {
    ReadOnly(Arc<dyn BlockDevice>),
    Writable(Arc<dyn WritableBlockDevice>),
}

/// A device that a server offers under a name. Without one it is the default export.
#[derive(Clone)]
pub struct Export {
    name: String,
    description: Option<String>,
    backing: Backing,
    contexts: Vec<(String, ContextSource)>,
    block_sizes: BlockSizes,
    fast_zeroes: bool,
}

impl std::fmt::Debug for Export {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Export")
            .field("name", &self.name)
            .field("device", &self.device().name())
            .field("writable", &self.target().is_ok())
            .finish_non_exhaustive()
    }
}

impl Export {
    /// An export that clients can only read.
    pub fn read_only(device: Arc<dyn BlockDevice>) -> Self {
        Self::of(Backing::ReadOnly(device))
    }

    /// An export that clients can write.
    pub fn writable(device: Arc<dyn WritableBlockDevice>) -> Self {
        Self::of(Backing::Writable(device))
    }

    fn of(backing: Backing) -> Self {
        Self {
            name: String::new(),
            description: None,
            backing,
            contexts: Vec::new(),
            block_sizes: BlockSizes { preferred: 64 << 10, ..BlockSizes::default() },
            fast_zeroes: false,
        }
    }

    /// Under this name.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// With words for people about it.
    #[must_use]
    pub fn described(mut self, text: impl Into<String>) -> Self {
        self.description = Some(text.into());
        self
    }

    /// With a metadata context beside `base:allocation`. The name has a namespace and a colon.
    #[must_use]
    pub fn with_context(mut self, name: impl Into<String>, source: ContextSource) -> Self {
        self.contexts.push((name.into(), source));
        self
    }

    /// With `changed` as the dirty bitmap `name`, in the form QEMU gives its bitmaps.
    #[must_use]
    pub fn with_dirty_bitmap(self, name: &str, changed: RangeSet) -> Self {
        let source = move |range: ByteRange| Ok(dirty_extents(&changed, range));
        self.with_context(dirty_bitmap_context(name), Arc::new(source))
    }

    /// With a smallest block, a power of two up to 64 KiB: requests that are no multiples of it
    /// are refused. Other values are rounded up to one.
    #[must_use]
    pub fn with_minimum_block(mut self, bytes: u32) -> Self {
        self.block_sizes.minimum = bytes.clamp(1, 1 << 16).next_power_of_two();
        self
    }

    /// Says that zeroing is always faster than writing zeros, as it is where the device punches
    /// holes. A client may then zero the whole export first.
    #[must_use]
    pub const fn with_fast_zeroes(mut self) -> Self {
        self.fast_zeroes = true;
        self
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn description(&self) -> Option<&str> {
        self.description.as_deref()
    }

    pub(super) const fn block_sizes(&self) -> BlockSizes {
        self.block_sizes
    }

    pub(super) fn device(&self) -> &dyn BlockDevice {
        match &self.backing {
            Backing::ReadOnly(device) => &**device,
            Backing::Writable(device) => &**device,
        }
    }

    pub(super) fn target(&self) -> Result<&dyn WritableBlockDevice> {
        match &self.backing {
            Backing::Writable(device) => Ok(&**device),
            Backing::ReadOnly(device) => Err(BlockError::ReadOnly { device: device.name() }),
        }
    }

    /// The flags that do not depend on the connection. Several connections are safe: all of them
    /// work on the one device, whose flush covers every write.
    pub(super) fn flags(&self) -> TransmissionFlags {
        use TransmissionFlags as F;
        let mut flags = F::HAS_FLAGS | F::MULTI_CONN | F::CACHE;
        flags |= match self.backing {
            Backing::ReadOnly(_) => F::READ_ONLY,
            Backing::Writable(_) if self.fast_zeroes => {
                F::FLUSH | F::FUA | F::TRIM | F::WRITE_ZEROES | F::FAST_ZERO
            }
            Backing::Writable(_) => F::FLUSH | F::FUA | F::TRIM | F::WRITE_ZEROES,
        };
        F(flags)
    }

    /// The names of all contexts.
    pub(super) fn context_names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(CONTEXT_ALLOCATION).chain(self.contexts.iter().map(|(name, _)| &**name))
    }

    /// The status of a range that lies inside the device, in one of its contexts.
    pub(super) fn status(&self, context: &str, range: ByteRange) -> Result<Vec<StatusExtent>> {
        if context == CONTEXT_ALLOCATION {
            let extents = self.device().extents(range)?;
            return Ok(extents
                .into_iter()
                .take(MAX_EXTENTS)
                .map(|extent| StatusExtent {
                    range: extent.range,
                    flags: allocation_flags(extent.kind),
                })
                .collect());
        }
        match self.contexts.iter().find(|(name, _)| name == context) {
            Some((_, source)) => {
                let mut extents = source(range)?;
                extents.truncate(MAX_EXTENTS);
                Ok(extents)
            }
            None => Err(BlockError::unsupported(
                self.device().name(),
                format!("there is no context {context}"),
            )),
        }
    }
}

/// The parts of `range` that are changed (flag 1) and not (flag 0).
fn dirty_extents(changed: &RangeSet, range: ByteRange) -> Vec<StatusExtent> {
    let mut extents = Vec::new();
    let mut at = range.offset;
    let mut push = |start: u64, end: u64, flags: u64| {
        let range = ByteRange::from_bounds(start, end);
        if !range.is_empty() {
            extents.push(StatusExtent { range, flags });
        }
    };
    for dirty in changed.within(range).iter().take(MAX_EXTENTS / 2) {
        push(at, dirty.offset, 0);
        push(dirty.offset, dirty.end(), 1);
        at = dirty.end();
    }
    // Behind the last one looked at comes clean space only where no further one follows.
    let next = changed
        .within(ByteRange::from_bounds(at, range.end()))
        .iter()
        .next()
        .map_or(range.end(), |dirty| dirty.offset);
    push(at, next, 0);
    extents
}
