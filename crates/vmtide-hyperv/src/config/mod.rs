//! The configuration of a VM, kept three ways: the portable model, all settings as the host told them
//! ([`native`]), and the host's own configuration files ([`files`]).

mod boot;
mod files;
mod native;
mod network;
mod portable;

pub use files::{CapturedFiles, capture_files, configuration_files, decode};
pub use native::native_settings;
pub(crate) use native::{read_settings, settings_file};
pub use portable::Configuration;
