//! libvmtide: the C interface. `include/vmtide.h` is its documentation; here is what stands behind it.
//!
//! Every exported function is three lines: it enters [`guard::call`], which catches panics and turns
//! errors into objects; takes its arguments apart with [`args`], the only place where foreign pointers
//! are read; and hands on to code that is safe. Handles are numbers in a [`handle`] table, so a
//! handle that is wrong is an error and never a wild pointer. Long jobs run on a thread of their own
//! ([`watch`]), while the caller's thread runs the callbacks.

mod args;
mod delta;
mod guard;
mod handle;
mod image;
mod job;
mod repository;
mod status;
mod text;
mod track;
mod watch;

pub use delta::*;
pub use image::*;
pub use job::*;
pub use repository::*;
pub use text::*;
pub use track::*;
pub use watch::Watch;
