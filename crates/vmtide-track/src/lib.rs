//! Resilient change tracking for the disks that vmtide hosts itself: which blocks were written since a
//! tracking id was sealed, through planned stops, crashes and power loss.
//!
//! Three records, as Hyper-V has them: bitmaps in memory, one bit for each block; `<disk>.rct`, all of
//! them in a file, replaced as a whole when an id is sealed, now and then, and at a planned stop; and
//! `<disk>.mrt`, one bit for each *region* (many blocks), which is on the medium **before** the first write
//! to the region. `docs/tracking-format.md` has the files to the byte.
//!
//! # The protocol
//! `epoch` counts the replacements of `.rct`. A page of `.mrt` (one sector) carries the epoch of its last
//! change.
//!
//! 1. *Open.* `.rct` is read and held against the image (size, disk id, what the file looks like). After a planned
//!    stop its bitmaps are exact. After a crash the regions of every page of `.mrt` whose epoch is at least that of `.rct`
//!    are added to the newest bitmap, and so are all regions of a page that cannot be trusted. Then `.rct` is
//!    replaced, marked as open, under an epoch above all that were seen.
//! 2. *Write.* (a) Where the regions it touches are not yet marked in this epoch, their pages are written to
//!    `.mrt` and made durable; (b) the blocks are set in memory; (c) the blocks are kept for every frozen view that does
//!    not have them yet; (d) the data goes to the image. Steps a to d run under a shared gate.
//! 3. *Seal.* With the gate closed (no write between its steps) the epoch goes up, all regions count as
//!    unmarked, the newest bitmap becomes that of the id before, and an empty one begins. The gate opens; the image is flushed
//!    (a write before the moment that a crash takes back would be a change since it); `.rct` is replaced; only then is the id given out, shown
//!    or answered; and after a crash one number is left out, so that none ever names two moments. Where that fails the bitmap is joined to the one before again and
//!    there is no new id. A frozen view of a moment since which nothing was written has the newest id again.
//! 4. *Clearing marks.* A page that is changed keeps its earlier marks while its epoch is not below that of the `.rct` that is
//!    surely on the medium, and drops them otherwise. So marks go only after `.rct` holds what they stand for.
//! 5. *Planned stop.* The gate closes for good, the image is finished, and `.rct` is replaced, marked as closed,
//!    with what the image's files look like now.
//!
//! Why an answer is never too small: a write that reached the image had its regions durable before it began
//! (2a), under an epoch at least as high as that of any `.rct` that lacks its blocks (3, 4). So whichever `.rct` a
//! crash leaves, it has the block or a page says its region. A sector that is torn fails its checksum, and counts
//! as all of its regions.
//!
//! What it cannot see: writes by whoever ignores the lock on the image while it is open here; and changes that another program
//! makes within two minutes of a *crash*, in place, to images whose format has no mark of its last writer (raw, qcow2, VHD). Later
//! ones are seen by the time of the image against that of `.mrt`, where a host leaves a sign every 10 s; other files by inode and time of birth;
//! and after a planned stop all are, by size and time of the files.
//!
//! # Threads
//! Everything blocks its caller, and may be called from any number of threads.

mod bitmap;
mod changes;
#[cfg(unix)]
mod control;
mod disk;
mod error;
mod frozen;
#[doc(hidden)]
pub mod fuzzing;
mod gate;
mod id;
mod identity;
mod image;
mod marks;
mod moments;
mod mrt;
mod offline;
mod options;
mod rct;
mod recover;
mod store;
mod tracking;
mod view;

pub use changes::{ChangePage, MAX_RANGES_PER_PAGE};
#[cfg(unix)]
pub use control::{RemoteDisk, RemoteHost, socket_path};
pub use disk::TrackedDisk;
pub use error::{Result, TrackError};
pub use frozen::{FrozenImage, freeze_images};
pub use id::TrackingId;
pub use identity::Identity;
pub use image::{HostOptions, HostedImage, TrackedImage, image_identity};
pub use offline::{OfflineTracking, before_untracked_write};
pub use options::Options;
pub use store::{FileStore, StoreFile, TrackingStore, tracking_path};
pub use tracking::TrackingState;
pub use view::FrozenView;
