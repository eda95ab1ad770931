//! The service control manager of Windows as safe, typed calls: a service is installed, started, stopped and
//! removed, and a process that the manager started runs as one.
//!
//! Command lines and errors are the same everywhere and tested everywhere; the calls exist on Windows only.
//! Facts come from the public documentation of winsvc.h.

pub mod command_line;
mod error;

#[cfg(windows)]
mod host;
#[cfg(windows)]
mod manager;
#[cfg(windows)]
mod surroundings;

pub use error::{Result, ServiceError};
#[cfg(windows)]
pub use host::{RunningService, run};
#[cfg(windows)]
pub use manager::{NewService, ServiceState, install, remove, start, state, stop};
#[cfg(windows)]
pub use surroundings::{private_directory, redirect_output};
